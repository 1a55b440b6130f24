//! DNS over UDP as tests speak it: a resolver inside a pod that gives one answer, and a client.
//!
//! The client's socket is connected, so it receives answers only from the resolver that was asked.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use ambit_local::Pod;

use crate::apps::Running;

/// How long a resolver may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Time to live of the answers of [`serve`], seconds.
const TTL: u32 = 1;

/// What a resolver answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The addresses, in order.
    pub addresses: Vec<IpAddr>,
    /// Time to live of the first record, seconds.
    pub ttl: Option<u32>,
}

/// Runs a resolver at `address` inside `pod` that answers every question for an address of its family with `given`.
///
/// # Errors
/// When the address can't be bound.
pub async fn serve(pod: &Pod, address: SocketAddr, given: IpAddr) -> io::Result<Running> {
    let socket = pod.udp(address).await?;
    let address = socket.local_addr()?;
    let task = tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        loop {
            // An ICMP error of an earlier answer is returned by this call; the socket can still be used.
            let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
            let Ok(question) = Message::from_vec(&buffer[..length]) else { continue };
            if let Ok(answer) = answer(&question, given).to_vec() {
                socket.send_to(&answer, client).await.ok();
            }
        }
    });
    Ok(Running { address, task })
}

fn answer(question: &Message, given: IpAddr) -> Message {
    let mut answer = Message::new(question.metadata.id, MessageType::Response, question.metadata.op_code);
    answer.metadata = Metadata::response_from_request(&question.metadata);
    for query in &question.queries {
        answer.add_query(query.clone());
        let data = match (given, query.query_type()) {
            (IpAddr::V4(ip), RecordType::A) => RData::A(A(ip)),
            (IpAddr::V6(ip), RecordType::AAAA) => RData::AAAA(AAAA(ip)),
            _ => continue,
        };
        answer.answers.push(Record::from_rdata(query.name().clone(), TTL, data));
    }
    answer
}

/// Asks `resolver` from inside `pod`, by UDP, for the addresses of `name` in one family.
///
/// # Errors
/// When no answer comes within 10 s, or one that says anything but "no error".
pub async fn ask(pod: &Pod, resolver: SocketAddr, name: &str, ipv6: bool) -> io::Result<Answer> {
    let kind = if ipv6 { RecordType::AAAA } else { RecordType::A };
    let name = Name::from_ascii(name).map_err(io::Error::other)?;
    let mut question = Message::new(4711, MessageType::Query, OpCode::Query);
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(name, kind));
    let any: IpAddr =
        if resolver.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = pod.udp(SocketAddr::new(any, 0)).await?;
    socket.connect(resolver).await?;
    socket.send(&question.to_vec().map_err(io::Error::other)?).await?;
    let mut buffer = vec![0; 4096];
    let received = tokio::time::timeout(LIMIT, socket.recv(&mut buffer)).await;
    let length = received.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, resolver.to_string()))??;
    let message = Message::from_vec(&buffer[..length]).map_err(io::Error::other)?;
    let (id, code) = (message.metadata.id, message.metadata.response_code);
    if id != question.metadata.id || code != ResponseCode::NoError {
        return Err(io::Error::other(format!("{resolver} answered {code:?} under id {id}")));
    }
    let addresses = message.answers.iter().filter_map(|record| match &record.data {
        RData::A(A(ip)) => Some(IpAddr::V4(*ip)),
        RData::AAAA(AAAA(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    Ok(Answer { addresses: addresses.collect(), ttl: message.answers.first().map(|record| record.ttl) })
}
