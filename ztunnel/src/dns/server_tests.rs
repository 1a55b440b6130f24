//! The DNS proxy over real sockets, with resolvers that behave and some that do not.

use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ambit_net::{Netns, SocketStock};
use ambit_runtime::shares::{PodShares, Shares};
use ambit_telemetry::Registry;
use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use super::forward::framed;
use super::resolver_tests::directory;
use super::{Client, DnsProxy, Metrics, Originals, Settings, wire};

const PATIENCE: Duration = Duration::from_secs(10);
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Every datagram was going there.
struct Always(Option<SocketAddr>);

impl Originals for Always {
    fn original(&mut self, _: SocketAddr) -> impl Future<Output = Option<SocketAddr>> + Send {
        std::future::ready(self.0)
    }
}

fn shares() -> Shares {
    Shares::new(4096, 1, 1)
}

fn client(proxy: &DnsProxy) -> Arc<Client> {
    let sockets = SocketStock::new(Netns::current().unwrap(), None);
    proxy.client(&"uid".into(), PodShares::default().outbound(), ("shop", ""), sockets)
}

struct Proxy {
    registry: Registry,
    udp: SocketAddr,
    tcp: SocketAddr,
}

impl Proxy {
    async fn start(upstreams: Vec<SocketAddr>, original: Option<SocketAddr>) -> Self {
        Self::with(
            Settings {
                attempt_timeout: Duration::from_millis(500),
                ..Settings::new("cluster.local", upstreams)
            },
            original,
        )
        .await
    }

    async fn with(settings: Settings, original: Option<SocketAddr>) -> Self {
        let registry = Registry::new();
        let proxy = DnsProxy::new(settings, directory(), shares(), Metrics::register(&registry));
        let client = client(&proxy);
        let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
        let listener = TcpListener::bind(LOOPBACK).await.unwrap();
        let (udp, tcp) = (socket.local_addr().unwrap(), listener.local_addr().unwrap());
        let (on_udp, udp_client) = (proxy.clone(), Arc::clone(&client));
        tokio::spawn(async move {
            on_udp.serve_udp(udp_client, socket, Always(original), std::future::pending()).await;
        });
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (proxy, client) = (proxy.clone(), Arc::clone(&client));
                tokio::spawn(async move { proxy.serve_tcp(client, stream, original).await });
            }
        });
        Self { registry, udp, tcp }
    }

    fn count(&self, name: &str) -> u64 {
        let text = self.registry.encode();
        let line = text.lines().find(|line| line.starts_with(&format!("ambit_dns_{name}_total ")));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap()
    }
}

fn query(name: &str, kind: RecordType, payload: Option<u16>) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        message.set_edns(edns);
    }
    message
}

async fn ask_bytes(server: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(bytes).await.unwrap();
    let mut buffer = vec![0; 65_535];
    let length = timeout(PATIENCE, socket.recv(&mut buffer)).await.ok()?.unwrap();
    buffer.truncate(length);
    Some(buffer)
}

async fn ask(server: SocketAddr, message: &Message) -> Message {
    let bytes = ask_bytes(server, &message.to_vec().unwrap()).await.expect("an answer must come");
    let answer = Message::from_vec(&bytes).unwrap();
    assert_eq!(answer.metadata.id, message.metadata.id);
    answer
}

async fn ask_tcp(server: SocketAddr, messages: &[Message]) -> Vec<Message> {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let mut answers = Vec::new();
    for message in messages {
        stream.write_all(&framed(&message.to_vec().unwrap())).await.unwrap();
        let length = timeout(PATIENCE, stream.read_u16()).await.unwrap().unwrap();
        let mut bytes = vec![0; usize::from(length)];
        timeout(PATIENCE, stream.read_exact(&mut bytes)).await.unwrap().unwrap();
        answers.push(Message::from_vec(&bytes).unwrap());
    }
    answers
}

fn addresses(message: &Message) -> Vec<String> {
    let mut found: Vec<_> =
        message.answers.iter().filter_map(|record| record.data.ip_addr()).map(|ip| ip.to_string()).collect();
    found.sort();
    found
}

/// A resolver: for each query the datagrams to send back.
async fn resolver<F>(respond: F) -> SocketAddr
where
    F: Fn(&[u8]) -> Vec<Vec<u8>> + Send + Sync + 'static,
{
    let listener = TcpListener::bind(LOOPBACK).await.unwrap();
    let address = listener.local_addr().unwrap();
    let socket = UdpSocket::bind(address).await.unwrap();
    let respond = Arc::new(respond);
    let on_tcp = Arc::clone(&respond);
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_535];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            for response in respond(&buffer[..length]) {
                socket.send_to(&response, peer).await.unwrap();
            }
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let respond = Arc::clone(&on_tcp);
            tokio::spawn(async move {
                while let Ok(length) = stream.read_u16().await {
                    let mut query = vec![0; usize::from(length)];
                    stream.read_exact(&mut query).await.unwrap();
                    for response in respond(&query) {
                        stream.write_all(&framed(&response)).await.unwrap();
                    }
                }
            });
        }
    });
    address
}

/// Answers with one address, and a text of that size if asked for one.
fn honest(query: &[u8], text: usize) -> Vec<u8> {
    let asked = Message::from_vec(query).unwrap();
    let mut response = Message::response(asked.metadata.id, asked.metadata.op_code);
    let question = asked.queries[0].clone();
    let name = question.name().clone();
    response.add_query(question.clone());
    if question.query_type() == RecordType::A {
        response.add_answer(Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 1))));
    } else {
        for _ in 0..text.div_ceil(200) {
            let data = RData::TXT(TXT::new(vec!["x".repeat(200)]));
            response.add_answer(Record::from_rdata(name.clone(), 60, data));
        }
    }
    response.to_vec().unwrap()
}

async fn honest_resolver(text: usize) -> SocketAddr {
    resolver(move |query| vec![honest(query, text)]).await
}

#[tokio::test]
async fn known_names_are_answered_here_and_others_by_the_resolver() {
    let upstream = honest_resolver(0).await;
    let proxy = Proxy::start(vec![upstream], None).await;
    let known = ask(proxy.udp, &query("reviews.", RecordType::A, None)).await;
    assert_eq!(addresses(&known), ["10.96.0.1"]);
    assert!(known.metadata.authoritative && known.metadata.recursion_available);
    let other = ask(proxy.udp, &query("www.example.org.", RecordType::A, None)).await;
    assert_eq!(addresses(&other), ["192.0.2.1"]);
    assert_eq!((proxy.count("answered"), proxy.count("forwarded")), (1, 1));
}

#[tokio::test]
async fn tcp_serves_several_questions_on_one_connection() {
    let upstream = honest_resolver(0).await;
    let proxy = Proxy::start(vec![upstream], None).await;
    let questions = [
        query("reviews.", RecordType::A, None),
        query("example.org.", RecordType::A, None),
        query("db.", RecordType::A, None),
    ];
    let answers = ask_tcp(proxy.tcp, &questions).await;
    assert_eq!(addresses(&answers[0]), ["10.96.0.1"]);
    assert_eq!(addresses(&answers[1]), ["192.0.2.1"]);
    assert_eq!(addresses(&answers[2]), ["10.0.0.1", "10.0.0.2"]);
}

#[tokio::test]
async fn a_foreign_resolver_gets_questions_for_known_names_too() {
    let (own, foreign) = (honest_resolver(0).await, honest_resolver(0).await);
    // Another address of loopback, so that it is not taken for the cluster's.
    let own = SocketAddr::new("127.0.0.2".parse().unwrap(), own.port());
    let proxy = Proxy::start(vec![own], Some(foreign)).await;
    let answer = ask(proxy.udp, &query("reviews.shop.svc.cluster.local.", RecordType::A, None)).await;
    assert_eq!(addresses(&answer), ["192.0.2.1"]);
    assert_eq!(proxy.count("foreign"), 1);
}

#[tokio::test]
async fn the_resolver_that_was_asked_comes_before_the_configured_ones() {
    let configured = resolver(|_| Vec::new()).await;
    let asked = honest_resolver(0).await;
    let proxy = Proxy::start(vec![configured], Some(asked)).await;
    let answer = ask(proxy.udp, &query("example.org.", RecordType::A, None)).await;
    assert_eq!(addresses(&answer), ["192.0.2.1"]);
}

#[tokio::test]
async fn a_silent_resolver_is_skipped_and_without_others_fails() {
    let silent = resolver(|_| Vec::new()).await;
    let honest = honest_resolver(0).await;
    let proxy = Proxy::start(vec![silent, honest], None).await;
    let answer = ask(proxy.udp, &query("example.org.", RecordType::A, None)).await;
    assert_eq!(addresses(&answer), ["192.0.2.1"]);
    let lonely = Proxy::start(vec![silent], None).await;
    let answer = ask(lonely.udp, &query("example.org.", RecordType::A, None)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(lonely.count("failed"), 1);
}

#[tokio::test]
async fn answers_that_answer_something_else_are_forgotten() {
    let upstream = resolver(|query| {
        let good = honest(query, 0);
        let wrong_id = wire::with_id(&good, wire::id(&good).unwrap().wrapping_add(1));
        let other = honest(&self::query("evil.org.", RecordType::A, None).to_vec().unwrap(), 0);
        let other = wire::with_id(&other, wire::id(&good).unwrap());
        vec![b"x".to_vec(), vec![0xff; 3000], wrong_id, other, query.to_vec(), good]
    })
    .await;
    let proxy = Proxy::start(vec![upstream], None).await;
    let answer = ask(proxy.udp, &query("example.org.", RecordType::A, None)).await;
    assert_eq!(addresses(&answer), ["192.0.2.1"]);
    assert_eq!(proxy.count("bad_answers"), 5);
    let answers = ask_tcp(proxy.tcp, &[query("example.org.", RecordType::A, None)]).await;
    assert_eq!(addresses(&answers[0]), ["192.0.2.1"]);
}

#[tokio::test]
async fn a_giant_answer_is_cut_for_udp_and_whole_by_tcp() {
    let upstream = honest_resolver(20_000).await;
    let proxy = Proxy::start(vec![upstream], None).await;
    for payload in [None, Some(1232), Some(u16::MAX)] {
        let answer = ask(proxy.udp, &query("example.org.", RecordType::TXT, payload)).await;
        assert!(answer.metadata.truncation, "{payload:?}");
        assert!(answer.answers.is_empty());
    }
    let answers = ask_tcp(proxy.tcp, &[query("example.org.", RecordType::TXT, None)]).await;
    assert_eq!(answers[0].answers.len(), 100);
}

#[tokio::test]
async fn an_own_answer_is_cut_to_what_the_client_takes() {
    let proxy = Proxy::start(Vec::new(), None).await;
    // Two targets with three addresses fit with EDNS; without, the addresses go first.
    let whole = ask(proxy.udp, &query("_http._tcp.db.", RecordType::SRV, Some(1232))).await;
    assert_eq!((whole.answers.len(), whole.additionals.len()), (2, 3));
    assert!(whole.edns.is_some());
    let bytes = ask_bytes(proxy.udp, &query("_http._tcp.db.", RecordType::SRV, None).to_vec().unwrap()).await;
    assert!(bytes.unwrap().len() <= 512);
}

#[tokio::test]
async fn a_newer_edns_is_answered_with_badvers() {
    let proxy = Proxy::start(Vec::new(), None).await;
    let mut message = query("reviews.", RecordType::A, Some(1232));
    message.edns.as_mut().unwrap().set_version(1);
    let answer = ask(proxy.udp, &message).await;
    // 16 is BADVERS here and BADSIG with a signature; the library reads the latter.
    assert_eq!(u16::from(answer.metadata.response_code), u16::from(ResponseCode::BADVERS));
    assert!(answer.answers.is_empty());
}

#[tokio::test]
async fn what_is_no_question_is_refused_or_ignored_and_harms_nobody() {
    let proxy = Proxy::start(Vec::new(), None).await;
    let mut garbage = query("reviews.", RecordType::A, None).to_vec().unwrap();
    garbage.truncate(15);
    let refused = ask_bytes(proxy.udp, &garbage).await.unwrap();
    assert_eq!(Message::from_vec(&refused).unwrap().metadata.response_code, ResponseCode::FormErr);
    let mut two = query("reviews.", RecordType::A, None);
    two.add_query(Query::query(Name::from_ascii("db.").unwrap(), RecordType::A));
    assert_eq!(ask(proxy.udp, &two).await.metadata.response_code, ResponseCode::FormErr);
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    for ignored in [&b""[..], b"x", &[0xff; 40]] {
        socket.send_to(ignored, proxy.udp).await.unwrap();
    }
    let answer = ask(proxy.udp, &query("reviews.", RecordType::A, None)).await;
    assert_eq!(addresses(&answer), ["10.96.0.1"]);
    assert_eq!(proxy.count("malformed"), 5);
}

#[tokio::test]
async fn questions_beyond_the_limit_are_refused_except_known_names() {
    let silent = resolver(|_| Vec::new()).await;
    let settings = Settings { max_in_flight_per_pod: 2, ..Settings::new("cluster.local", vec![silent]) };
    let proxy = Proxy::with(settings, None).await;
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    for number in 0..3 {
        let message = query(&format!("{number}.example.org."), RecordType::A, None);
        socket.send_to(&message.to_vec().unwrap(), proxy.udp).await.unwrap();
    }
    let mut buffer = [0; 512];
    let length = timeout(PATIENCE, socket.recv(&mut buffer)).await.unwrap().unwrap();
    let refused = Message::from_vec(&buffer[..length]).unwrap();
    assert_eq!(refused.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(proxy.count("refused"), 1);
    let known = ask(proxy.udp, &query("reviews.", RecordType::A, None)).await;
    assert_eq!(addresses(&known), ["10.96.0.1"]);
}

#[tokio::test]
async fn a_stopped_proxy_still_delivers_what_is_with_resolvers() {
    let (release, mut released) = tokio::sync::watch::channel(false);
    let upstream = UdpSocket::bind(LOOPBACK).await.unwrap();
    let address = upstream.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 512];
        let (length, peer) = upstream.recv_from(&mut buffer).await.unwrap();
        released.wait_for(|released| *released).await.unwrap();
        upstream.send_to(&honest(&buffer[..length], 0), peer).await.unwrap();
    });
    let settings = Settings { attempt_timeout: PATIENCE, ..Settings::new("cluster.local", vec![address]) };
    let proxy = DnsProxy::new(settings, directory(), shares(), Metrics::register(&Registry::new()));
    let client = client(&proxy);
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    let asker = UdpSocket::bind(LOOPBACK).await.unwrap();
    asker.connect(socket.local_addr().unwrap()).await.unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let in_flight = Arc::clone(&client.in_flight);
    let all = in_flight.available_permits();
    let serving = tokio::spawn(async move {
        let stop = async { drop(stopped.await) };
        proxy.serve_udp(client, socket, Always(None), stop).await;
    });
    asker.send(&query("example.org.", RecordType::A, None).to_vec().unwrap()).await.unwrap();
    let forwarded = async {
        while in_flight.available_permits() == all {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, forwarded).await.unwrap();
    stop.send(()).unwrap();
    release.send_replace(true);
    let mut buffer = [0; 512];
    let length = timeout(PATIENCE, asker.recv(&mut buffer)).await.unwrap().unwrap();
    assert_eq!(addresses(&Message::from_vec(&buffer[..length]).unwrap()), ["192.0.2.1"]);
    timeout(PATIENCE, serving).await.unwrap().unwrap();
}

/// RFC 2136 §3.8: an UPDATE, and the bare header that answers it.
#[tokio::test]
async fn an_update_to_a_foreign_resolver_passes_as_it_is() {
    let foreign = resolver(|query| {
        let mut bare = query[..wire::HEADER].to_vec();
        bare[2..4].copy_from_slice(&[0xa8, 0]);
        bare[4..].fill(0);
        vec![bare]
    })
    .await;
    let own = SocketAddr::new("127.0.0.2".parse().unwrap(), 53);
    let proxy = Proxy::start(vec![own], Some(foreign)).await;
    let mut update = query("zone.example.", RecordType::SOA, None).to_vec().unwrap();
    update[2..4].copy_from_slice(&[0x28, 0]);
    let answer = ask_bytes(proxy.udp, &update).await.expect("the header arrives");
    assert_eq!(answer, [&update[..2], &[0xa8, 0, 0, 0, 0, 0, 0, 0, 0, 0][..]].concat());
}

/// Its client sees its own time-out, not an answer that the resolver never gave.
#[tokio::test]
async fn for_a_silent_foreign_resolver_nobody_answers() {
    let silent = resolver(|_| Vec::new()).await;
    let own = SocketAddr::new("127.0.0.2".parse().unwrap(), 53);
    let settings =
        Settings { foreign_timeout: Duration::from_millis(50), ..Settings::new("cluster.local", vec![own]) };
    let proxy = Proxy::with(settings, Some(silent)).await;
    let socket = UdpSocket::bind(LOOPBACK).await.unwrap();
    socket.connect(proxy.udp).await.unwrap();
    socket.send(&query("example.org.", RecordType::A, None).to_vec().unwrap()).await.unwrap();
    let given_up = async {
        while proxy.count("failed") == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, given_up).await.unwrap();
    assert!(socket.try_recv(&mut [0; 512]).is_err(), "something answered");
}
