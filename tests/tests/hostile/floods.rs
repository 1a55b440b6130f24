//! Authenticated peers that flood HTTP/2 connections with frames. Each is disconnected, logged and counted, and memory stays
//! bounded.

use std::net::SocketAddr;
use std::time::Duration;

use ambit_tests::beds::Trials;
use ambit_tests::usage::resident;
use ambit_tests::wait;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{FRIEND, Hostile};

/// Peers that flood at the same time.
const TOGETHER: usize = 8;
/// What one of them may cost the node proxy, bytes: what HTTP/2 and TLS may have in their buffers.
const EACH: u64 = 4 << 20;
/// Frames in one write.
const PIECES: usize = 1_000;
/// Writes until the server must have disconnected.
const WRITES: usize = 2_000;

/// RFC 9113 §7.
const PROTOCOL_ERROR: u32 = 1;
const ENHANCE_YOUR_CALM: u32 = 11;

/// A frame (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// HEADERS of a CONNECT on stream 1, which CONTINUATION frames may follow if it is not complete.
fn head(authority: &str, complete: bool) -> Vec<u8> {
    // RFC 7541 §6.2.2: literals without indexing, named by the static table (2 is :method, 1 is :authority).
    let literal =
        |name: u8, value: &str| [&[name, u8::try_from(value.len()).unwrap()], value.as_bytes()].concat();
    let block = [literal(2, "CONNECT"), literal(1, authority)].concat();
    frame(1, if complete { 4 } else { 0 }, 1, &block)
}

/// One peer that sends `first` and then `piece` repeatedly until the server disconnects. Returns its address and the error code
/// of the GOAWAY, if that could be read.
async fn flood(bed: &Hostile, first: &[u8], piece: &[u8]) -> (SocketAddr, Option<u32>) {
    let (from, stream) =
        bed.approach(bed.credentials.certificate(FRIEND).client_tls().dangerous_expecting_anyone()).await;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let pieces = piece.repeat(PIECES);
    let flooding = async {
        let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(4, 0, 0, &[]).as_slice(), first].concat();
        writer.write_all(&preface).await?;
        for _ in 0..WRITES {
            writer.write_all(&pieces).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let goodbye = async {
        let (mut said, mut header) = (None, [0; 9]);
        while reader.read_exact(&mut header).await.is_ok() {
            let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
            if reader.read_exact(&mut payload).await.is_err() {
                break;
            }
            if header[3] == 7 {
                said = payload.get(4..8).map(|code| u32::from_be_bytes(code.try_into().unwrap()));
            }
        }
        said
    };
    let both = async { tokio::join!(flooding, goodbye) };
    let (flooded, said) = tokio::time::timeout(wait::SOON * 2, both).await.expect("an end in time");
    assert!(flooded.is_err(), "{} frames were taken", PIECES * WRITES);
    (from, said)
}

/// Runs several such peers at once: each is logged with `reason` and counted, memory stays bounded, and others are served.
async fn is_disconnected(bed: &Hostile, first: &[u8], piece: &[u8], goaway: u32, flags: &str, reason: &str) {
    let ztunnel = bed.cluster.ztunnel(1).unwrap();
    let before = bed.failures(flags).await;
    let memory = resident(&ztunnel);
    let floods = join_all((0..TOGETHER).map(|_| flood(bed, first, piece)));
    let meanwhile = tokio::time::timeout(Duration::from_secs(20), bed.goes_on());
    let (ends, served) = tokio::join!(floods, meanwhile);
    served.expect("others are served while it goes on");
    let grown = resident(&ztunnel).saturating_sub(memory);
    assert!(grown < TOGETHER as u64 * EACH, "{grown} bytes for {TOGETHER} peers");
    for (from, said) in ends {
        // A socket that is closed with unread bytes may lose the GOAWAY.
        assert!(said.is_none_or(|said| said == goaway), "GOAWAY {said:?}");
        let source = from.to_string();
        let is_it = |line: &serde_json::Value| {
            line["src.addr"] == source.as_str()
                && line["error"].as_str().is_some_and(|it| it.contains(reason))
        };
        let line = bed.log.wait_for(&format!("{source} with {reason:?}"), is_it).await;
        assert_eq!(line["src.identity"], FRIEND, "{line}");
    }
    let all = before + f64::from(u32::try_from(TOGETHER).unwrap());
    wait::until("each is counted", wait::SOON, || async { bed.failures(flags).await >= all }).await;
    bed.goes_on().await;
}

pub(crate) fn add(trials: &mut Trials<Hostile>) {
    let floods = [
        ("settings", frame(4, 0, 0, &[0, 4, 0, 1, 0, 0])),
        ("pings", frame(6, 0, 0, &[7; 8])),
        ("answers_to_pings", frame(6, 1, 0, &[7; 8])),
        ("window_updates", frame(8, 0, 0, &[0, 0, 0, 1])),
        ("priorities", frame(2, 0, 1, &[0, 0, 0, 3, 1])),
        ("frames_of_unknown_kinds", frame(200, 0, 0, &[])),
    ];
    for (name, piece) in floods {
        let name = format!("floods::a_peer_that_floods_with_{name}_is_disconnected");
        trials.add(name, async move |bed: &Hostile| {
            let reason = "frames that carry nothing";
            is_disconnected(bed, &[], &piece, ENHANCE_YOUR_CALM, "H2_HANDSHAKE_FAILURE", reason).await;
        });
    }
    trials.add("floods::unsolicited_settings_acknowledgements_are_refused", async |bed: &Hostile| {
        let answer = frame(4, 1, 0, &[]);
        is_disconnected(bed, &[], &answer, PROTOCOL_ERROR, "H2_HANDSHAKE_FAILURE", "HTTP/2").await;
    });
    trials.add("floods::a_peer_that_floods_with_empty_data_is_disconnected", async |bed: &Hostile| {
        let open = head(&bed.application().to_string(), true);
        let empty = frame(0, 0, 1, &[]);
        is_disconnected(bed, &open, &empty, ENHANCE_YOUR_CALM, "H2_HANDSHAKE_FAILURE", "HTTP/2").await;
    });
    trials.add("floods::a_peer_whose_head_never_ends_is_disconnected", async |bed: &Hostile| {
        let begun = head(&bed.application().to_string(), false);
        // RFC 7541 §6.2.2: a literal header `a: b`, again and again.
        let goes_on = frame(9, 0, 1, b"\x00\x01a\x01b");
        is_disconnected(bed, &begun, &goes_on, ENHANCE_YOUR_CALM, "H2_HANDSHAKE_FAILURE", "HTTP/2").await;
    });
}
