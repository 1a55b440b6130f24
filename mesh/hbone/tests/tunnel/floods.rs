//! Peers that flood connections with frames that carry nothing. Each is disconnected; other peers are not affected.

use ambit_hbone::{ConnectionSettings, ServerSettings};
use ambit_identity::unnamed_server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;
use crate::hostile::bystander;

/// RFC 9113 §4.1: a frame of a connection (stream 0) or a stream.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Opens stream 1: CONNECT to `authority`, or a head that goes on in CONTINUATION frames.
fn head(authority: &str, complete: bool) -> Vec<u8> {
    // RFC 7541 §6.2.2: literals without indexing, named by the static table (2 is :method, 1 is :authority).
    let literal =
        |name: u8, value: &str| [&[name, u8::try_from(value.len()).unwrap()], value.as_bytes()].concat();
    let block = [literal(2, "CONNECT"), literal(1, authority)].concat();
    frame(1, if complete { 4 } else { 0 }, 1, &block)
}

/// The error code of the GOAWAY that the server sends before it disconnects.
async fn goodbye(mut reader: impl tokio::io::AsyncRead + Unpin) -> Option<u32> {
    let mut said = None;
    let mut header = [0; 9];
    while reader.read_exact(&mut header).await.is_ok() {
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let mut payload = vec![0; length as usize];
        if reader.read_exact(&mut payload).await.is_err() {
            break;
        }
        if header[3] == 7 {
            said = payload.get(4..8).map(|code| u32::from_be_bytes(code.try_into().unwrap()));
        }
    }
    said
}

/// Repeats `piece` after `first` until the server disconnects, which it must. Returns its GOAWAY.
async fn flood(world: &World, node: &Node, first: &[u8], piece: &[u8]) -> Option<u32> {
    let tls = world.certificate("client").client_tls().dangerous_expecting_anyone();
    let socket = TcpStream::connect(node.address).await.unwrap();
    let stream = tokio_rustls::TlsConnector::from(tls).connect(unnamed_server(), socket).await.unwrap();
    let (reader, mut writer) = tokio::io::split(stream);
    let pieces = piece.repeat(1000);
    let flooding = async {
        let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(4, 0, 0, &[]).as_slice(), first].concat();
        writer.write_all(&preface).await?;
        for _ in 0..2_000 {
            writer.write_all(&pieces).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let (flooded, said) =
        soon("the end of the flood", async { tokio::join!(flooding, goodbye(reader)) }).await;
    assert!(flooded.is_err(), "two million frames were taken");
    said
}

/// RFC 9113 §7.
const PROTOCOL_ERROR: u32 = 1;
const ENHANCE_YOUR_CALM: u32 = 11;

#[tokio::test]
async fn floods_of_empty_frames_end_only_their_connection() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let silent = application(|socket| async move {
        std::future::pending::<()>().await;
        drop(socket);
    });
    let open = head(&silent.await.to_string(), true);
    let floods = [
        ("SETTINGS", &[][..], frame(4, 0, 0, &[])),
        ("SETTINGS that change something", &[], frame(4, 0, 0, &[0, 4, 0, 1, 0, 0])),
        ("acknowledgements of SETTINGS", &[], frame(4, 1, 0, &[])),
        ("PING", &[], frame(6, 0, 0, &[7; 8])),
        ("answers to PING", &[], frame(6, 1, 0, &[7; 8])),
        ("PRIORITY", &[], frame(2, 0, 1, &[0, 0, 0, 3, 1])),
        ("frames of a kind that nobody knows", &[], frame(200, 0, 0, &[])),
        ("empty DATA", open.as_slice(), frame(0, 0, 1, &[])),
        ("WINDOW_UPDATE of the connection", &[], frame(8, 0, 0, &[0, 0, 0, 1])),
        ("WINDOW_UPDATE of a stream", open.as_slice(), frame(8, 0, 1, &[0, 0, 0, 1])),
    ];
    for (number, (name, first, piece)) in floods.into_iter().enumerate() {
        let said = flood(&world, &node, first, &piece).await;
        until("the server's verdict", || node.seen.connections_ended() == 2 * number + 1).await;
        let verdict = format!("{:?}", node.seen.ended.lock().last());
        assert!(
            verdict.contains("Overhead") || verdict.contains("Http2"),
            "{name}: {verdict}, GOAWAY {said:?}"
        );
        // A socket that is closed with unread bytes may lose the GOAWAY.
        assert!(matches!(said, None | Some(ENHANCE_YOUR_CALM | PROTOCOL_ERROR)), "{name}: GOAWAY {said:?}");
        bystander(&world, &node).await;
        until("the bystander's end", || node.seen.connections_ended() == 2 * number + 2).await;
    }
}

#[tokio::test]
async fn a_head_that_goes_on_without_end_ends_the_connection() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let begun = head("127.0.0.1:2", false);
    // RFC 7541 §6.2.2: a literal header `a: b`, again and again; and nothing at all.
    for piece in [frame(9, 0, 1, b"\x00\x01a\x01b"), frame(9, 0, 1, &[])] {
        let said = flood(&world, &node, &begun, &piece).await;
        assert!(matches!(said, None | Some(ENHANCE_YOUR_CALM | PROTOCOL_ERROR)), "GOAWAY {said:?}");
        bystander(&world, &node).await;
    }
    assert_eq!(node.seen.requests.lock().iter().filter(|asked| asked.authority.port() == 2).count(), 0);
}

#[tokio::test]
async fn a_peer_that_gets_much_may_send_many_window_updates() {
    let world = World::new();
    let settings = ConnectionSettings { max_overhead: 20, ..ConnectionSettings::default() };
    let node = Node::start(&world, "server", server_with(settings.clone())).await;
    let client = Client::new(&world, "client", pool_with(settings));
    let (mut socket, _task) = client.application(node.address, echo().await).await;
    let (mut reader, mut writer) = socket.split();
    let data = pattern(32 << 20);
    let mut back = vec![0; data.len()];
    let (sent, received) = soon("32 MiB and back", async {
        tokio::join!(writer.write_all(&data), reader.read_exact(&mut back))
    })
    .await;
    sent.unwrap();
    received.unwrap();
    assert!(back == data);
    assert_eq!(node.seen.connections_ended(), 0);
}
