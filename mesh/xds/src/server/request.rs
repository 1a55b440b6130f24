//! Decodes requests within limits: names are counted before any of them is allocated.
//!
//! A request of the largest permitted size could hold tens of millions of one-byte names, each of which costs an
//! allocation when it is decoded. So the encoded form is scanned first.

use ambit_api::discovery::DeltaDiscoveryRequest;
use bytes::{Buf, Bytes};
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use tonic::Status;
use tonic::codec::{DecodeBuf, Decoder};

/// Field numbers of `DeltaDiscoveryRequest`.
mod field {
    pub(super) const RESOURCE_NAMES_SUBSCRIBE: u32 = 3;
    pub(super) const RESOURCE_NAMES_UNSUBSCRIBE: u32 = 4;
    pub(super) const INITIAL_RESOURCE_VERSIONS: u32 = 5;
}

/// Longest name, in bytes: two DNS names and an address, with room.
const MAX_NAME: usize = 1024;
/// Longest of the other fields, in bytes: the node with its metadata, a nack with its details, the type URL.
const MAX_OTHER: usize = 64 << 10;

/// What one request may hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Names subscribed and unsubscribed, repeated ones included.
    pub(super) names: usize,
    /// Versions of resources that the subscriber holds.
    pub(super) versions: usize,
}

/// Why a request is not decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("not a discovery request: {0}")]
    Malformed(#[from] prost::DecodeError),
    #[error("more than {0} names in one request")]
    Names(usize),
    #[error("more than {0} versions in one request")]
    Versions(usize),
    #[error("field {field} is {bytes} bytes long, more than {limit}")]
    TooLong { field: u32, bytes: usize, limit: usize },
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Malformed(_) => Self::invalid_argument(refused.to_string()),
            Refused::Names(_) | Refused::Versions(_) | Refused::TooLong { .. } => {
                Self::resource_exhausted(refused.to_string())
            }
        }
    }
}

/// The decoder of a stream's requests.
#[derive(Debug)]
pub(super) struct RequestDecoder(pub(super) Limits);

impl Decoder for RequestDecoder {
    type Item = DeltaDiscoveryRequest;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<DeltaDiscoveryRequest>, Status> {
        let message = buffer.copy_to_bytes(buffer.remaining());
        Ok(Some(decode(message, self.0)?))
    }
}

/// Decodes a request that keeps the limits.
pub(super) fn decode(message: Bytes, limits: Limits) -> Result<DeltaDiscoveryRequest, Refused> {
    check(message.clone(), limits)?;
    Ok(DeltaDiscoveryRequest::decode(message)?)
}

fn check(mut message: Bytes, limits: Limits) -> Result<(), Refused> {
    let (mut names, mut versions) = (0_usize, 0_usize);
    while message.has_remaining() {
        let (tag, wire_type) = decode_key(&mut message)?;
        if wire_type != WireType::LengthDelimited {
            skip_field(wire_type, tag, &mut message, DecodeContext::default())?;
            continue;
        }
        let length = usize::try_from(decode_varint(&mut message)?).unwrap_or(usize::MAX);
        let limit = match tag {
            field::RESOURCE_NAMES_SUBSCRIBE | field::RESOURCE_NAMES_UNSUBSCRIBE => {
                names += 1;
                MAX_NAME
            }
            field::INITIAL_RESOURCE_VERSIONS => {
                versions += 1;
                // A name, a version, and their tags.
                2 * MAX_NAME
            }
            _ => MAX_OTHER,
        };
        if names > limits.names {
            return Err(Refused::Names(limits.names));
        }
        if versions > limits.versions {
            return Err(Refused::Versions(limits.versions));
        }
        if length > limit {
            return Err(Refused::TooLong { field: tag, bytes: length, limit });
        }
        // A truncated field is reported by the decoder.
        message.advance(length.min(message.remaining()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const LIMITS: Limits = Limits { names: 3, versions: 2 };

    fn of(
        subscribe: &[&str],
        unsubscribe: &[&str],
        versions: &[&str],
    ) -> Result<DeltaDiscoveryRequest, Refused> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let request = DeltaDiscoveryRequest {
            resource_names_subscribe: owned(subscribe),
            resource_names_unsubscribe: owned(unsubscribe),
            initial_resource_versions: versions
                .iter()
                .map(|it| ((*it).to_owned(), String::new()))
                .collect::<BTreeMap<_, _>>(),
            ..DeltaDiscoveryRequest::default()
        };
        decode(request.encode_to_vec().into(), LIMITS)
    }

    #[test]
    fn names_are_counted_repeats_included() {
        assert!(of(&["a", "b"], &["*"], &["a", "b"]).is_ok());
        assert_eq!(of(&["a", "a", "a"], &["a"], &[]), Err(Refused::Names(3)));
        assert_eq!(of(&[], &[], &["a", "b", "c"]), Err(Refused::Versions(2)));
    }

    #[test]
    fn long_fields_are_refused_before_they_are_decoded() {
        let long = "n".repeat(MAX_NAME + 1);
        assert!(matches!(of(&[&long], &[], &[]), Err(Refused::TooLong { field: 3, .. })));
        let node = ambit_api::core::Node { id: "n".repeat(MAX_OTHER), ..Default::default() };
        let request = DeltaDiscoveryRequest { node: Some(node), ..DeltaDiscoveryRequest::default() };
        let refused = decode(request.encode_to_vec().into(), LIMITS);
        assert!(matches!(refused, Err(Refused::TooLong { field: 1, .. })));
    }

    #[test]
    fn bytes_that_are_no_request_are_refused() {
        for bytes in [&[0xff][..], &[0x1a, 5, b'a'], &[0x1a, 0xff, 0xff, 0xff, 0xff, 0xff], &[0x0f]] {
            assert!(decode(Bytes::from(bytes.to_vec()), LIMITS).is_err(), "{bytes:?}");
        }
    }
}
