//! The splice relay over real sockets on loopback.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use ambit_net::relay::{Counters, RelayError, Side};
use ambit_net::socket::reset_on_close;
use ambit_net::splice::splice;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const SOON: Duration = Duration::from_secs(20);

async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

/// A client and a server with a relay between them.
struct Relayed {
    client: TcpStream,
    server: TcpStream,
    counters: Arc<Counters>,
    relay: JoinHandle<Result<(), RelayError>>,
}

async fn relayed() -> Relayed {
    let (client, mut downstream) = connection().await;
    let (mut upstream, server) = connection().await;
    let counters = Arc::new(Counters::new());
    let counting = Arc::clone(&counters);
    let relay = tokio::spawn(async move { splice(&mut downstream, &mut upstream, &counting).await });
    Relayed { client, server, counters, relay }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.unwrap_or_else(|_| panic!("{what}: not within {SOON:?}"))
}

/// Bytes that depend on their position, so that a lost or repeated piece is noticed.
fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut x = seed.wrapping_mul(2_654_435_761) | 1;
    std::iter::repeat_with(|| {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as u8
    })
    .take(len)
    .collect()
}

async fn send(to: &mut TcpStream, bytes: &[u8], piece: usize) {
    for part in bytes.chunks(piece) {
        to.write_all(part).await.unwrap();
    }
    to.shutdown().await.unwrap();
}

#[tokio::test]
async fn bytes_of_both_directions_arrive_whole_in_every_size_of_piece() {
    for (len, piece) in [(1, 1), (10_000, 7), (3_000_000, 65_536), (20_000_000, 1_000_000)] {
        let Relayed { client, server, counters, relay } = relayed().await;
        let (there, back) = (pattern(len, 1), pattern(len / 2 + 1, 2));
        let (mut client_reads, mut client_writes) = client.into_split();
        let (mut server_reads, mut server_writes) = server.into_split();
        let exchange = async {
            let (mut got_there, mut got_back) = (Vec::new(), Vec::new());
            let sends = async {
                for part in there.chunks(piece) {
                    client_writes.write_all(part).await.unwrap();
                }
                client_writes.shutdown().await.unwrap();
            };
            let answers = async {
                for part in back.chunks(piece) {
                    server_writes.write_all(part).await.unwrap();
                }
                server_writes.shutdown().await.unwrap();
            };
            tokio::join!(
                sends,
                answers,
                async { server_reads.read_to_end(&mut got_there).await.unwrap() },
                async { client_reads.read_to_end(&mut got_back).await.unwrap() },
            );
            assert!(got_there == there, "{len} bytes in pieces of {piece}: to the server");
            assert!(got_back == back, "{len} bytes in pieces of {piece}: to the client");
        };
        within("the exchange", exchange).await;
        within("the relay's end", relay).await.unwrap().unwrap();
        assert_eq!(counters.sent(), there.len() as u64);
        assert_eq!(counters.received(), back.len() as u64);
    }
}

#[tokio::test]
async fn a_slow_reader_loses_nothing() {
    let Relayed { mut client, mut server, relay, .. } = relayed().await;
    let bytes = pattern(6_000_000, 3);
    let wanted = bytes.clone();
    let sender = tokio::spawn(async move {
        for (i, part) in bytes.chunks(1_000_000).enumerate() {
            client.write_all(part).await.unwrap();
            if i % 2 == 0 {
                client.write_all(b"small").await.unwrap();
            }
        }
        client.shutdown().await.unwrap();
        client
    });
    let mut got = Vec::new();
    let mut buffer = vec![0; 10_000];
    within("all bytes", async {
        loop {
            let n = server.read(&mut buffer).await.unwrap();
            if n == 0 {
                break;
            }
            got.extend_from_slice(&buffer[..n]);
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut expected = Vec::new();
    for (i, part) in wanted.chunks(1_000_000).enumerate() {
        expected.extend_from_slice(part);
        if i % 2 == 0 {
            expected.extend_from_slice(b"small");
        }
    }
    assert!(got == expected);
    drop((sender.await.unwrap(), server));
    within("the relay's end", relay).await.unwrap().unwrap();
}

#[tokio::test]
async fn one_half_may_end_long_before_the_other() {
    let Relayed { mut client, mut server, relay, .. } = relayed().await;
    send(&mut client, b"question", 3).await;
    let mut question = String::new();
    within("the question's end", server.read_to_string(&mut question)).await.unwrap();
    assert_eq!(question, "question");
    send(&mut server, &pattern(300_000, 4), 1000).await;
    let mut answer = Vec::new();
    within("the answer", client.read_to_end(&mut answer)).await.unwrap();
    assert!(answer == pattern(300_000, 4));
    within("the relay's end", relay).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_reset_of_either_side_is_a_reset_at_the_other() {
    for client_resets in [true, false] {
        let Relayed { mut client, mut server, relay, .. } = relayed().await;
        client.write_all(b"x").await.unwrap();
        server.read_u8().await.unwrap();
        let (broken, mut other) = if client_resets { (client, server) } else { (server, client) };
        reset_on_close(&broken);
        drop(broken);
        let error = within("the relay's end", relay).await.unwrap().unwrap_err();
        let side = if client_resets { Side::Downstream } else { Side::Upstream };
        assert!(matches!(&error, RelayError::Read { side: s, .. } if *s == side), "{error}");
        let seen = within("the other's end", other.read_u8()).await.unwrap_err();
        assert_eq!(seen.kind(), ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn bytes_are_counted_while_the_connection_lives() {
    let Relayed { mut client, mut server, counters, relay } = relayed().await;
    client.write_all(b"12345").await.unwrap();
    let mut buffer = [0; 5];
    within("the bytes", server.read_exact(&mut buffer)).await.unwrap();
    assert_eq!((counters.sent(), counters.received()), (5, 0));
    assert!(!relay.is_finished());
    relay.abort();
}
