//! What the node agent's packets mean (ZDS contract): decoding and bookkeeping, no I/O.
//!
//! `client` feeds it packets and the descriptors that came with them and does what it answers.

use std::collections::HashSet;

use ambit_api::workload::zds::workload_request::Payload;
use ambit_api::workload::zds::workload_response;
use ambit_api::workload::zds::{
    Ack, AddWorkload, Listener, Version, WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello,
};
use prost::Message;

/// Most bytes of a message to the proxy (ZDS contract).
pub const MAX_MESSAGE: usize = 1024;
/// Most descriptors that one packet can carry: the namespace, and every port over two families.
pub const MAX_DESCRIPTORS: usize = 17;

/// A step that the agent asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Serve this pod; the packet's descriptors go with it.
    Add {
        /// The pod's Kubernetes uid.
        uid: String,
        /// Who it is.
        info: WorkloadInfo,
        /// What the descriptors after the first are, in order.
        listeners: Vec<Listener>,
    },
    /// Go on serving this pod; the agent has lost its descriptor.
    Keep(String),
    /// Stop serving this pod.
    Delete(String),
    /// The snapshot is complete: serve these and no others.
    Retain(HashSet<String>),
}

/// A packet that can't be followed. It is nacked; the session goes on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Not a `WorkloadRequest`.
    #[error("the packet is no WorkloadRequest: {0}")]
    Decode(String),
    /// A request of a kind that we don't know, or none.
    #[error("the request has no payload that is known here")]
    Empty,
    /// A snapshot was complete before: followed, this one would drop every pod that came since.
    #[error("a second snapshot on one connection")]
    SecondSnapshot,
    /// An add without identity.
    #[error("pod {uid}: the add names no workload")]
    NoWorkload {
        /// The pod.
        uid: String,
    },
    /// No uid.
    #[error("the request names no pod")]
    NoUid,
    /// Descriptors and listeners don't fit together.
    #[error("pod {uid}: {got} descriptors came, but {expected} were announced")]
    Descriptors {
        /// The pod.
        uid: String,
        /// The namespace's and one per listener.
        expected: usize,
        /// How many came.
        got: usize,
    },
}

/// One connection to the agent.
#[derive(Debug, Default)]
pub struct Session {
    /// Pods of the snapshot so far; `None` once it was complete.
    listed: Option<HashSet<String>>,
}

impl Session {
    /// A session that has yet to receive its snapshot.
    pub fn new() -> Self {
        Self { listed: Some(HashSet::new()) }
    }

    /// The proxy's first packet.
    pub fn hello() -> Vec<u8> {
        ZdsHello { version: Version::V1.into(), takes_listeners: true }.encode_to_vec()
    }

    /// Whether the snapshot is still under way.
    pub fn in_snapshot(&self) -> bool {
        self.listed.is_some()
    }

    /// Takes one packet and the number of descriptors with it.
    ///
    /// # Errors
    /// [`PacketError`]: to be nacked. A pod of a snapshot whose add can't be followed still counts
    /// as listed, so that the one served so far under its uid is not dropped.
    pub fn handle_packet(&mut self, packet: &[u8], descriptors: usize) -> Result<Step, PacketError> {
        let request = WorkloadRequest::decode(packet).map_err(|e| PacketError::Decode(e.to_string()))?;
        match request.payload.ok_or(PacketError::Empty)? {
            Payload::Add(add) => self.handle_add(add, descriptors),
            Payload::Keep(keep) => {
                let uid = named(keep.uid)?;
                self.list(&uid);
                Ok(Step::Keep(uid))
            }
            Payload::Del(del) => {
                let uid = named(del.uid)?;
                if let Some(listed) = &mut self.listed {
                    listed.remove(&uid);
                }
                Ok(Step::Delete(uid))
            }
            Payload::SnapshotSent(_) => {
                self.listed.take().map(Step::Retain).ok_or(PacketError::SecondSnapshot)
            }
        }
    }

    fn handle_add(&mut self, add: AddWorkload, descriptors: usize) -> Result<Step, PacketError> {
        let uid = named(add.uid)?;
        self.list(&uid);
        let expected = add.listeners.len() + 1;
        if descriptors != expected {
            return Err(PacketError::Descriptors { uid, expected, got: descriptors });
        }
        let Some(info) = add.workload_info else {
            return Err(PacketError::NoWorkload { uid });
        };
        Ok(Step::Add { uid, info, listeners: add.listeners })
    }

    fn list(&mut self, uid: &str) {
        if let Some(listed) = &mut self.listed {
            listed.insert(uid.to_owned());
        }
    }
}

/// The answer to a packet: an ack, or a nack with its reason.
pub fn answer(result: &Result<(), String>) -> Vec<u8> {
    let error = match result {
        Ok(()) => String::new(),
        // An empty error would be read as success.
        Err(reason) if reason.is_empty() => "failed".to_owned(),
        Err(reason) => reason.clone(),
    };
    WorkloadResponse { payload: Some(workload_response::Payload::Ack(Ack { error })) }.encode_to_vec()
}

fn named(uid: String) -> Result<String, PacketError> {
    if uid.is_empty() { Err(PacketError::NoUid) } else { Ok(uid) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_api::workload::zds::{DelWorkload, KeepWorkload, SnapshotSent};
    use proptest::prelude::*;

    fn packet(payload: Payload) -> Vec<u8> {
        WorkloadRequest { payload: Some(payload) }.encode_to_vec()
    }

    fn add(uid: &str, listeners: usize) -> Vec<u8> {
        packet(Payload::Add(AddWorkload {
            uid: uid.into(),
            workload_info: Some(WorkloadInfo {
                name: "n".into(),
                namespace: "ns".into(),
                service_account: "sa".into(),
            }),
            listeners: vec![Listener { port: 15001, udp: false, ipv6: false }; listeners],
        }))
    }

    #[test]
    fn the_snapshot_retains_what_was_added_or_kept_and_nothing_else() {
        let mut session = Session::new();
        assert!(matches!(session.handle_packet(&add("a", 2), 3), Ok(Step::Add { uid, .. }) if uid == "a"));
        let keep = packet(Payload::Keep(KeepWorkload { uid: "b".into() }));
        assert_eq!(session.handle_packet(&keep, 0), Ok(Step::Keep("b".into())));
        session.handle_packet(&add("c", 0), 1).unwrap();
        let del = packet(Payload::Del(DelWorkload { uid: "c".into() }));
        assert_eq!(session.handle_packet(&del, 0), Ok(Step::Delete("c".into())));
        assert!(session.in_snapshot());
        let sent = packet(Payload::SnapshotSent(SnapshotSent {}));
        let listed = ["a", "b"].map(String::from).into_iter().collect();
        assert_eq!(session.handle_packet(&sent, 0), Ok(Step::Retain(listed)));
        assert!(!session.in_snapshot());
    }

    #[test]
    fn a_second_snapshot_drops_nobody() {
        let mut session = Session::new();
        let sent = packet(Payload::SnapshotSent(SnapshotSent {}));
        session.handle_packet(&sent, 0).unwrap();
        session.handle_packet(&add("a", 0), 1).unwrap();
        assert_eq!(session.handle_packet(&sent, 0), Err(PacketError::SecondSnapshot));
    }

    #[test]
    fn an_add_with_wrong_descriptors_is_refused_but_listed() {
        let mut session = Session::new();
        let error = session.handle_packet(&add("a", 2), 1).unwrap_err();
        assert_eq!(error, PacketError::Descriptors { uid: "a".into(), expected: 3, got: 1 });
        assert!(session.handle_packet(&add("x", 0), 0).is_err());
        let sent = packet(Payload::SnapshotSent(SnapshotSent {}));
        assert!(
            matches!(session.handle_packet(&sent, 0), Ok(Step::Retain(l)) if l.contains("a") && l.contains("x"))
        );
    }

    #[test]
    fn a_nack_always_has_words() {
        for (result, empty) in [(Ok(()), true), (Err("x".to_owned()), false), (Err(String::new()), false)] {
            let response = WorkloadResponse::decode(answer(&result).as_slice()).unwrap();
            let Some(workload_response::Payload::Ack(ack)) = response.payload else { panic!("no ack") };
            assert_eq!(ack.error.is_empty(), empty);
        }
    }

    #[test]
    fn an_add_of_the_longest_kubernetes_names_fits_into_a_packet() {
        let long = "x".repeat(253);
        let add = packet(Payload::Add(AddWorkload {
            uid: "12345678-1234-1234-1234-123456789012".into(),
            workload_info: Some(WorkloadInfo {
                name: long.clone(),
                namespace: "n".repeat(63),
                service_account: long,
            }),
            listeners: vec![Listener { port: 15008, udp: true, ipv6: true }; 12],
        }));
        assert!(add.len() <= MAX_MESSAGE);
    }

    proptest! {
        #[test]
        fn no_packet_makes_the_session_panic(bytes in proptest::collection::vec(any::<u8>(), 0..MAX_MESSAGE), fds in 0usize..20) {
            let _ = Session::new().handle_packet(&bytes, fds);
        }
    }
}
