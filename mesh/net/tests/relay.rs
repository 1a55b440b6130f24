//! The plain relay over real sockets.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use ambit_net::relay::{Counters, RelayError, Side, relay_tcp, reset_on_close};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const DEADLINE: Duration = Duration::from_secs(20);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap()
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (one, two) = tokio::join!(TcpStream::connect(address), listener.accept());
    (one.unwrap(), two.unwrap().0)
}

type Ended = JoinHandle<Result<(), RelayError>>;

/// Client, server, and the relay between them.
async fn relayed(idle: Option<Duration>) -> (TcpStream, TcpStream, Arc<Counters>, Ended) {
    let (client, mut downstream) = pair().await;
    let (server, mut upstream) = pair().await;
    let counters = Arc::new(Counters::new());
    let counting = Arc::clone(&counters);
    let task = tokio::spawn(async move { relay_tcp(&mut downstream, &mut upstream, &counting, idle).await });
    (client, server, counters, task)
}

#[tokio::test]
async fn bytes_go_both_ways_at_once_and_are_counted() {
    let (client, server, counters, task) = relayed(None).await;
    let data: Vec<u8> =
        (0..30_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut client_reader, mut client_writer) = client.into_split();
    let (mut server_reader, mut server_writer) = server.into_split();
    let (mut at_client, mut at_server) = (Vec::new(), Vec::new());
    let up = async {
        client_writer.write_all(&data).await.unwrap();
        client_writer.shutdown().await.unwrap();
    };
    let down = async {
        server_writer.write_all(&data).await.unwrap();
        server_writer.shutdown().await.unwrap();
    };
    soon(async {
        let at_client = client_reader.read_to_end(&mut at_client);
        let at_server = server_reader.read_to_end(&mut at_server);
        let (_, _, one, two) = tokio::join!(up, down, at_client, at_server);
        one.unwrap();
        two.unwrap();
    })
    .await;
    assert!(at_client == data && at_server == data);
    soon(task).await.unwrap().unwrap();
    assert_eq!((counters.sent(), counters.received()), (data.len() as u64, data.len() as u64));
}

#[tokio::test]
async fn a_half_close_leaves_the_other_direction_open() {
    let (mut client, mut server, _, task) = relayed(None).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = Vec::new();
    soon(server.read_to_end(&mut question)).await.unwrap();
    assert_eq!(question, b"question");
    server.write_all(b"answer").await.unwrap();
    drop(server);
    let mut answer = Vec::new();
    soon(client.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"answer");
    soon(task).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_reset_on_one_side_is_a_reset_on_the_other() {
    let (mut client, server, _, task) = relayed(None).await;
    reset_on_close(&server).unwrap();
    drop(server);
    let ended = soon(task).await.unwrap();
    assert!(matches!(ended, Err(RelayError::Read { side: Side::Upstream, .. })), "{ended:?}");
    assert_eq!(soon(client.read_u8()).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn an_idle_relay_ends_at_its_limit() {
    let (mut client, mut server, _, task) = relayed(Some(Duration::from_millis(200))).await;
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        client.write_all(b"x").await.unwrap();
        soon(server.read_u8()).await.unwrap();
    }
    assert!(!task.is_finished());
    assert!(matches!(soon(task).await.unwrap(), Err(RelayError::Idle(_))));
}
