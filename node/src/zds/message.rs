//! ZDS packets as bytes.

use ambit_api::workload::zds::{
    AddWorkload, DelWorkload, KeepWorkload, Listener, SnapshotSent, WorkloadInfo, WorkloadRequest,
    WorkloadResponse, ZdsHello, workload_request, workload_response,
};
use prost::Message;

/// Bytes that a packet to a proxy has at most (ZDS contract).
pub const MAX_PACKET: usize = 1024;

/// A packet that cannot be sent or not be understood.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The packet would be too long for the proxy's buffer.
    #[error("packet of {0} bytes, beyond {MAX_PACKET}")]
    TooLong(usize),
    /// The bytes are no message of the expected kind.
    #[error("packet cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// The proxy speaks another version.
    #[error("proxy speaks version {0} of ZDS, not 1")]
    Version(i32),
    /// The response is empty.
    #[error("response has no payload")]
    Empty,
}

/// A message to a proxy.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// Serve a pod; listeners are announced in the order in which their descriptors follow.
    Add(String, WorkloadInfo, Vec<Listener>),
    /// Keep serving a pod.
    Keep(String),
    /// Stop serving a pod.
    Del(String),
    /// The snapshot is complete.
    SnapshotSent,
}

/// A packet for a proxy.
pub fn encode_request(request: Request) -> Result<Vec<u8>, MessageError> {
    use workload_request::Payload;
    let payload = match request {
        Request::Add(uid, info, listeners) => {
            Payload::Add(AddWorkload { uid, workload_info: Some(info), listeners })
        }
        Request::Keep(uid) => Payload::Keep(KeepWorkload { uid }),
        Request::Del(uid) => Payload::Del(DelWorkload { uid }),
        Request::SnapshotSent => Payload::SnapshotSent(SnapshotSent {}),
    };
    let bytes = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
    if bytes.len() > MAX_PACKET { Err(MessageError::TooLong(bytes.len())) } else { Ok(bytes) }
}

/// The proxy's first packet.
pub fn decode_hello(packet: &[u8]) -> Result<ZdsHello, MessageError> {
    let hello = ZdsHello::decode(packet)?;
    // 0: a proxy that sent no version.
    if hello.version == 1 { Ok(hello) } else { Err(MessageError::Version(hello.version)) }
}

/// The proxy's answer: `Ok` for done, `Err` with its reason for not.
pub fn decode_response(packet: &[u8]) -> Result<Result<(), String>, MessageError> {
    match WorkloadResponse::decode(packet)?.payload {
        Some(workload_response::Payload::Ack(ack)) if ack.error.is_empty() => Ok(Ok(())),
        Some(workload_response::Payload::Ack(ack)) => Ok(Err(ack.error)),
        None => Err(MessageError::Empty),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listeners::wanted;
    use crate::redirect::Options;

    fn announced() -> Vec<Listener> {
        let options = Options { socks5: true, ..Options::default() };
        wanted(&options)
            .into_iter()
            .map(|l| Listener { port: l.port.into(), udp: l.udp, ipv6: l.address.is_ipv6() })
            .collect()
    }

    #[test]
    fn the_longest_names_that_kubernetes_allows_fit_in_a_packet() {
        // RFC 1123 names: 253 bytes for pods and service accounts, 63 for namespaces; a uid has 36.
        let info = WorkloadInfo {
            name: "n".repeat(253),
            namespace: "s".repeat(63),
            service_account: "a".repeat(253),
        };
        let packet = encode_request(Request::Add("u".repeat(36), info, announced())).unwrap();
        assert!(packet.len() <= MAX_PACKET, "{}", packet.len());
    }

    #[test]
    fn a_packet_that_no_proxy_could_receive_is_not_made() {
        let info = WorkloadInfo { name: "n".repeat(1000), ..WorkloadInfo::default() };
        let error = encode_request(Request::Add("u".repeat(36), info, announced())).unwrap_err();
        assert!(matches!(error, MessageError::TooLong(n) if n > MAX_PACKET));
    }

    #[test]
    fn packets_are_the_contract_byte_for_byte() {
        // ZDS contract: request field 1 = add {uid 1, info 2}, 2 = del {uid 2}, 3 = sent, 5 = keep {uid 1}.
        let info = WorkloadInfo { name: "p".into(), namespace: "n".into(), service_account: "s".into() };
        let listeners = vec![Listener { port: 15001, udp: false, ipv6: true }];
        assert_eq!(
            encode_request(Request::Add("u".into(), info, listeners)).unwrap(),
            b"\x0a\x16\x0a\x01u\x12\x09\x0a\x01p\x12\x01n\x1a\x01s\xa2\x06\x05\x08\x99\x75\x18\x01"
        );
        assert_eq!(encode_request(Request::Del("u".into())).unwrap(), b"\x12\x03\x12\x01u");
        assert_eq!(encode_request(Request::SnapshotSent).unwrap(), b"\x1a\x00");
        assert_eq!(encode_request(Request::Keep("u".into())).unwrap(), b"\x2a\x03\x0a\x01u");
    }

    #[test]
    fn answers_are_decoded_and_invalid_packets_refused() {
        assert_eq!(decode_response(b"\x0a\x00").unwrap(), Ok(()));
        assert_eq!(decode_response(b"\x0a\x03\x0a\x01e").unwrap(), Err("e".into()));
        assert!(matches!(decode_response(b""), Err(MessageError::Empty)));
        assert!(matches!(decode_response(b"\xff"), Err(MessageError::Decode(_))));
        assert!(matches!(decode_hello(b""), Err(MessageError::Version(0))));
        // Field 100, wire type varint: 100 << 3 = 800 = a0 06.
        assert!(decode_hello(b"\x08\x01\xa0\x06\x01").unwrap().takes_listeners);
        assert!(!decode_hello(b"\x08\x01").unwrap().takes_listeners);
    }
}
