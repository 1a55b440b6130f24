//! ZDS packets as bytes.

use ambit_api::workload::zds::{
    AddWorkload, DelWorkload, KeepWorkload, Listener, SnapshotSent, WorkloadInfo, WorkloadRequest,
    WorkloadResponse, ZdsHello, workload_request, workload_response,
};
use prost::Message;

/// Bytes that a packet to a proxy has at most (contracts.md, section 3).
pub const MAX_PACKET: usize = 1024;

/// A packet that cannot be sent, or that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The packet would be too long for the proxy's buffer.
    #[error("packet of {0} bytes, beyond {MAX_PACKET}")]
    TooLong(usize),
    /// The bytes are no message of the kind that was due.
    #[error("packet cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// The proxy speaks another version.
    #[error("proxy speaks version {0} of ZDS, not 1")]
    Version(i32),
    /// The response says nothing.
    #[error("response has no payload")]
    Empty,
}

/// What is said to a proxy.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// Serve a pod; listeners are announced in the order in which their descriptors follow.
    Add(String, WorkloadInfo, Vec<Listener>),
    /// Keep serving a pod.
    Keep(String),
    /// Stop serving a pod.
    Del(String),
    /// Everything has been told.
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
    // Version 1; 0 would be a proxy that says nothing of itself.
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
