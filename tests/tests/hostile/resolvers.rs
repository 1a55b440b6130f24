//! Resolvers with oversized and malformed answers. The pod gets what fits, or an error, and the memory of the node proxy stays
//! bounded.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use ambit_local::{Pod, PodOptions};
use ambit_tests::beds::Trials;
use ambit_tests::usage::resident;
use ambit_tests::wait;
use futures_util::future::join_all;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::AbortHandle;

use crate::{Hostile, RESOLVER};

/// What this project sends and takes by UDP at most.
const MAX_UDP: usize = 4096;
/// Questions at the same time.
const TOGETHER: usize = 20;
/// How often so many.
const ROUNDS: usize = 10;
/// What the node proxy may grow by meanwhile, bytes.
const GROWTH: u64 = 24 << 20;
/// Longer than a resolver may take.
const GIVEN_UP: Duration = Duration::from_secs(5);

/// The question of `name` with an answer behind it that is `length` bytes long in all.
fn giant(question: &[u8], name: &str, length: usize) -> Vec<u8> {
    // Header and question, as they came; EDNS is left out.
    let mut answer = question[..12 + name.len() + 2 + 4].to_vec();
    answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0xff, 0xff, 0, 0, 0, 0]);
    // Records without end, whose names lead to themselves (RFC 1035 §4.1.4: a pointer to an earlier place).
    while answer.len() + 16 <= length {
        let here = u16::try_from(answer.len().min(0x3fff)).unwrap() | 0xc000;
        answer.extend(here.to_be_bytes());
        answer.extend([0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 10, 0, 0, 1]);
    }
    answer.resize(length, 0);
    answer
}

fn first_label(question: &[u8]) -> String {
    let length = usize::from(question[12]);
    String::from_utf8_lossy(&question[13..13 + length]).into_owned()
}

/// What this resolver says to a question, by the first label of its name.
fn answers(question: &[u8], limit: usize) -> Vec<Vec<u8>> {
    let label = first_label(question);
    let name = format!("{label}.example");
    let other = |id: u8| {
        let mut answer = giant(question, &name, 100);
        answer[0] ^= id;
        answer
    };
    match label.as_str() {
        "giant" => vec![giant(question, &name, limit)],
        "fitting" => vec![giant(question, &name, 4000)],
        // To nothing that was asked, again and again.
        "others" => (1..=64).map(other).collect(),
        "nonsense" => vec![vec![0xff; 500], Vec::new(), vec![0; 3]],
        _ => Vec::new(),
    }
}

/// Runs the resolver, by UDP and TCP.
async fn run(pod: &Pod) -> [AbortHandle; 2] {
    let socket = pod.udp(RESOLVER).await.unwrap();
    let listener = pod.listen(RESOLVER).await.unwrap();
    let by_udp = tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
            for answer in answers(&buffer[..length], 60_000) {
                socket.send_to(&answer, client).await.ok();
            }
        }
    });
    let by_tcp = tokio::spawn(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else { continue };
            tokio::spawn(async move {
                let length = stream.read_u16().await?;
                let mut question = vec![0; length.into()];
                stream.read_exact(&mut question).await?;
                for answer in answers(&question, 65_535) {
                    stream.write_u16(u16::try_from(answer.len()).unwrap()).await?;
                    stream.write_all(&answer).await?;
                }
                if first_label(&question) == "unfinished" {
                    stream.write_all(&[0xff, 0xff, 1, 2, 3]).await?;
                }
                // Until the other side has gone.
                stream.read(&mut [0]).await
            });
        }
    });
    [by_udp.abort_handle(), by_tcp.abort_handle()]
}

fn question(label: &str) -> Vec<u8> {
    let mut message = Message::new(0x4d1, MessageType::Query, OpCode::Query);
    let name = Name::from_ascii(format!("{label}.example.")).unwrap();
    message.add_query(Query::query(name, RecordType::A));
    let mut edns = Edns::new();
    edns.set_max_payload(u16::MAX);
    message.set_edns(edns);
    message.to_vec().unwrap()
}

async fn ask_udp(pod: &Pod, label: &str) -> Vec<u8> {
    let socket = pod.udp((Ipv4Addr::UNSPECIFIED, 0).into()).await.unwrap();
    socket.connect(RESOLVER).await.unwrap();
    socket.send(&question(label)).await.unwrap();
    let mut answer = vec![0; 65_535];
    let received = tokio::time::timeout(wait::SOON, socket.recv(&mut answer)).await;
    answer.truncate(received.expect("an answer in time").unwrap());
    answer
}

async fn ask_tcp(pod: &Pod, label: &str) -> Vec<u8> {
    let asking = async {
        let mut stream = pod.connect(RESOLVER).await.unwrap();
        let message = question(label);
        stream.write_u16(u16::try_from(message.len()).unwrap()).await.unwrap();
        stream.write_all(&message).await.unwrap();
        let mut answer = vec![0; stream.read_u16().await.unwrap().into()];
        stream.read_exact(&mut answer).await.unwrap();
        answer
    };
    tokio::time::timeout(wait::SOON, asking).await.expect("an answer in time")
}

/// Whether an answer is SERVFAIL: neither this resolver nor the next one has answered.
fn is_failure(answer: &[u8]) -> bool {
    let code = Message::from_vec(answer).unwrap().metadata.response_code;
    matches!(code, ResponseCode::ServFail | ResponseCode::NXDomain | ResponseCode::Refused)
}

async fn count(bed: &Hostile, counter: &str) -> f64 {
    let metrics = bed.cluster.ztunnel(0).unwrap().metrics().await.unwrap();
    metrics.sum(&format!("ambit_dns_{counter}_total"), &[])
}

async fn giant_and_malformed_dns_answers_hurt_nobody(bed: &Hostile) {
    let address = match RESOLVER {
        SocketAddr::V4(address) => *address.ip(),
        SocketAddr::V6(_) => unreachable!(),
    };
    let options = PodOptions::new("street", "resolver").node(0).address(address);
    let resolver = bed.cluster.pod(options).await.unwrap();
    let running = run(&resolver).await;

    // By UDP what is too long is cut, so that the client asks by TCP; there it comes as it is.
    let before = count(bed, "truncated").await;
    let cut = ask_udp(&bed.client, "giant").await;
    assert_eq!(cut.len(), 12 + "giant.example".len() + 2 + 4, "header and question");
    assert_eq!(cut[2] & 2, 2, "it does not say that it was cut");
    assert!(count(bed, "truncated").await > before, "it is not counted");
    let fitting = ask_udp(&bed.client, "fitting").await;
    assert_eq!(fitting, giant(&question("fitting"), "fitting.example", 4000));
    let whole = ask_tcp(&bed.client, "giant").await;
    assert_eq!(whole, giant(&question("giant"), "giant.example", 65_535));

    // What answers nothing is counted and comes to an end.
    for label in ["others", "nonsense"] {
        let before = count(bed, "bad_answers").await;
        assert!(is_failure(&ask_udp(&bed.client, label).await), "{label}");
        assert!(is_failure(&ask_tcp(&bed.client, label).await), "{label}");
        assert!(count(bed, "bad_answers").await > before, "{label} is not counted");
    }
    let failing = tokio::time::timeout(GIVEN_UP * 2, ask_tcp(&bed.client, "unfinished")).await;
    assert!(is_failure(&failing.expect("it is given up")));

    let ztunnel = bed.cluster.ztunnel(0).unwrap();
    // The first round makes what is kept for the next.
    join_all((0..TOGETHER).map(|_| ask_tcp(&bed.client, "giant"))).await;
    let memory = resident(&ztunnel);
    for _ in 0..ROUNDS {
        let by_tcp = join_all((0..TOGETHER).map(|_| ask_tcp(&bed.client, "giant")));
        let by_udp = join_all((0..TOGETHER).map(|_| ask_udp(&bed.client, "giant")));
        let (by_tcp, by_udp) = tokio::join!(by_tcp, by_udp);
        // One that comes late on a busy machine is word that there is none.
        assert!(by_tcp.iter().all(|answer| answer.len() == 65_535 || is_failure(answer)));
        assert!(by_tcp.iter().any(|answer| answer.len() == 65_535));
        assert!(by_udp.iter().all(|answer| answer.len() <= MAX_UDP));
    }
    let grown = resident(&ztunnel).saturating_sub(memory);
    assert!(grown < GROWTH, "{grown} bytes");
    running.iter().for_each(AbortHandle::abort);
    bed.cluster.delete_pod(&resolver).await.unwrap();
    bed.goes_on().await;
}

pub(crate) fn add(trials: &mut Trials<Hostile>) {
    trials.add("resolvers::giant_and_malformed_dns_answers_hurt_nobody", async |bed| {
        giant_and_malformed_dns_answers_hurt_nobody(bed).await;
    });
}
