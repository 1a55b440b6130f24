//! ZDS both ways: the agent's packets at the proxy, the proxy's at the agent.

use std::collections::HashSet;

use ambit_api::workload::zds::{Listener, WorkloadInfo};
use ambit_node::zds::{MAX_PACKET, Request, decode_hello, decode_response, encode_request};
use ztunnel::zds::session::{Session, Step, answer};

use crate::pieces::cut;

/// A session of packets, each with a number of descriptors before it. A snapshot retains what was added or kept in
/// it and not deleted since, and there is only one.
pub(crate) fn proxy(data: &[u8]) {
    let mut session = Session::new();
    let mut listed = HashSet::new();
    let mut complete = false;
    for part in cut(data) {
        let Some((&descriptors, packet)) = part.split_first() else { continue };
        let result = session.handle_packet(packet, usize::from(descriptors));
        let said = decode_response(&answer(&result.as_ref().map(drop).map_err(ToString::to_string)));
        assert_eq!(said.expect("an answer").is_ok(), result.is_ok());
        match result {
            Ok(Step::Add { uid, listeners, .. }) => {
                assert!(!uid.is_empty());
                assert_eq!(usize::from(descriptors), listeners.len() + 1);
                listed.insert(uid);
            }
            Ok(Step::Keep(uid)) => assert!(listed.insert(uid.clone()) || !uid.is_empty()),
            Ok(Step::Delete(uid)) => drop(listed.remove(&uid)),
            Ok(Step::Retain(uids)) => {
                assert!(!complete, "a second snapshot would drop every pod that came since the first");
                assert!(uids.is_superset(&listed), "a pod of the snapshot would be dropped");
                complete = true;
            }
            // What could not be followed is listed nevertheless, as long as it names a pod.
            Err(_) => {}
        }
        assert_eq!(session.in_snapshot(), !complete);
    }
}

/// What a proxy says is read, and what it answers is what it meant; every order that is sent is understood.
pub(crate) fn agent(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 3 {
        0 => {
            if let Ok(hello) = decode_hello(rest) {
                assert_eq!(hello.version, 1);
            }
        }
        1 => {
            if let Ok(said) = decode_response(rest) {
                assert_eq!(decode_response(&answer(&said)).expect("an answer"), said);
            }
        }
        _ => order(rest),
    }
}

/// An order of the agent arrives at the proxy as it was meant.
fn order(data: &[u8]) {
    let parts = cut(data);
    let text =
        |at: usize| parts.get(at).map(|part| String::from_utf8_lossy(part).into_owned()).unwrap_or_default();
    let listeners: Vec<Listener> = parts
        .get(4)
        .map(|part| part.chunks_exact(3))
        .into_iter()
        .flatten()
        .map(|it| Listener {
            port: u32::from(u16::from_be_bytes([it[0], it[1]])),
            udp: it[2] & 1 != 0,
            ipv6: it[2] & 2 != 0,
        })
        .collect();
    let uid = text(0);
    let info = WorkloadInfo { name: text(1), namespace: text(2), service_account: text(3) };
    let requests = [
        (Request::Add(uid.clone(), info, listeners.clone()), listeners.len() + 1),
        (Request::Keep(uid.clone()), 0),
        (Request::Del(uid.clone()), 0),
        (Request::SnapshotSent, 0),
    ];
    for (request, descriptors) in requests {
        let Ok(packet) = encode_request(request.clone()) else { continue };
        assert!(packet.len() <= MAX_PACKET);
        let step = Session::new().handle_packet(&packet, descriptors);
        match request {
            Request::SnapshotSent => assert_eq!(step, Ok(Step::Retain(HashSet::new()))),
            _ if uid.is_empty() => assert!(step.is_err()),
            Request::Add(uid, info, listeners) => assert_eq!(step, Ok(Step::Add { uid, info, listeners })),
            Request::Keep(uid) => assert_eq!(step, Ok(Step::Keep(uid))),
            Request::Del(uid) => assert_eq!(step, Ok(Step::Delete(uid))),
        }
    }
}
