//! Encodes answers from parts that are encoded already.
//!
//! An answer is a `DeltaDiscoveryResponse` in a gRPC frame, put together by hand so that a resource is
//! encoded once, and an answer for many subscribers once for all of them. Golden tests hold it against
//! the generated types.

use ambit_api::discovery;
use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

use super::store::Resource;
use crate::batch_mark::BatchMark;

/// Field numbers of `DeltaDiscoveryResponse`.
mod field {
    pub(crate) const SYSTEM_VERSION_INFO: u32 = 1;
    pub(crate) const RESOURCES: u32 = 2;
    pub(crate) const TYPE_URL: u32 = 4;
    pub(crate) const NONCE: u32 = 5;
    pub(crate) const REMOVED_RESOURCES: u32 = 6;
}

/// Compression flag and message length, before every gRPC message.
const GRPC_HEADER: usize = 5;

/// An encoded answer, ready to be sent to any number of subscribers.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// The gRPC frame.
    pub(crate) frame: Bytes,
    pub(crate) resources: u64,
    pub(crate) removals: u64,
    /// Whether it says that more of its batch follows.
    pub(crate) more: bool,
}

/// A resource as a field of an answer, tag and length included.
pub(crate) fn resource_field(type_url: &str, resource: &Resource, version: &str) -> Bytes {
    let message = discovery::Resource {
        version: version.to_owned(),
        resource: Some(prost_types::Any { type_url: type_url.to_owned(), value: resource.body.to_vec() }),
        name: resource.name.to_string(),
        aliases: resource.aliases.iter().map(ToString::to_string).collect(),
        ..discovery::Resource::default()
    };
    let length = message.encoded_len();
    let mut field = BytesMut::with_capacity(length + 1 + encoded_len_varint(length as u64));
    encode_key(field::RESOURCES, WireType::LengthDelimited, &mut field);
    encode_varint(length as u64, &mut field);
    // A BytesMut grows as needed, so there is always room.
    message.encode_raw(&mut field);
    field.freeze()
}

/// Collects an answer's parts up to a size.
#[derive(Debug)]
pub(crate) struct Builder {
    body: BytesMut,
    limit: usize,
    resources: u64,
    removals: u64,
}

impl Builder {
    /// An answer of at most `limit` bytes, unless a single resource is larger.
    pub(crate) fn new(limit: usize, type_url: &str) -> Self {
        let mut body = BytesMut::new();
        body.put_bytes(0, GRPC_HEADER);
        put_string(field::TYPE_URL, type_url, &mut body);
        Self { body, limit, resources: 0, removals: 0 }
    }

    /// Adds a removal; false if the answer is full.
    pub(crate) fn remove(&mut self, name: &str) -> bool {
        if !self.fits(name.len() + 4) {
            return false;
        }
        put_string(field::REMOVED_RESOURCES, name, &mut self.body);
        self.removals += 1;
        true
    }

    /// Adds a resource; false if the answer is full.
    pub(crate) fn resource(&mut self, field: &Bytes) -> bool {
        if !self.fits(field.len()) {
            return false;
        }
        self.body.extend_from_slice(field);
        self.resources += 1;
        true
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.resources == 0 && self.removals == 0
    }

    /// Room for nonce and version is kept within the limit.
    fn fits(&self, length: usize) -> bool {
        const TRAILER: usize = 64;
        self.is_empty() || self.body.len() + length + TRAILER <= self.limit
    }

    /// Closes the answer.
    pub(crate) fn finish(mut self, nonce: &str, mark: BatchMark) -> Answer {
        put_string(field::SYSTEM_VERSION_INFO, &mark.to_string(), &mut self.body);
        put_string(field::NONCE, nonce, &mut self.body);
        let length = u32::try_from(self.body.len() - GRPC_HEADER).unwrap_or(u32::MAX);
        if let Some(header) = self.body.get_mut(1..GRPC_HEADER) {
            header.copy_from_slice(&length.to_be_bytes());
        }
        let Self { body, resources, removals, .. } = self;
        Answer { frame: body.freeze(), resources, removals, more: mark.more }
    }
}

fn put_string(tag: u32, value: &str, buffer: &mut BytesMut) {
    encode_key(tag, WireType::LengthDelimited, buffer);
    encode_varint(value.len() as u64, buffer);
    buffer.extend_from_slice(value.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_api::discovery::DeltaDiscoveryResponse;

    fn decode(answer: &Answer) -> DeltaDiscoveryResponse {
        assert_eq!(answer.frame[0], 0, "not compressed");
        let length = u32::from_be_bytes(answer.frame[1..5].try_into().unwrap()) as usize;
        assert_eq!(length, answer.frame.len() - 5);
        DeltaDiscoveryResponse::decode(&answer.frame[5..]).unwrap()
    }

    #[test]
    fn the_hand_made_answer_is_what_the_generated_types_read() {
        let resource = Resource::from_bytes("c//Pod/a/b", Bytes::from_static(b"body")).alias("/10.0.0.1");
        let mut builder = Builder::new(1 << 16, "type.example/T");
        assert!(builder.remove("gone"));
        assert!(builder.resource(&resource_field("type.example/T", &resource, "v7")));
        let answer = builder.finish("n1", BatchMark { number: 42, more: true });
        let expected = DeltaDiscoveryResponse {
            system_version_info: "42+".into(),
            resources: vec![discovery::Resource {
                version: "v7".into(),
                resource: Some(prost_types::Any {
                    type_url: "type.example/T".into(),
                    value: b"body".to_vec(),
                }),
                name: "c//Pod/a/b".into(),
                aliases: vec!["/10.0.0.1".into()],
                ttl: None,
                cache_control: None,
            }],
            type_url: "type.example/T".into(),
            nonce: "n1".into(),
            removed_resources: vec!["gone".into()],
        };
        assert_eq!(decode(&answer), expected);
        assert_eq!((answer.resources, answer.removals), (1, 1));
    }

    #[test]
    fn an_answer_stays_within_its_limit_but_always_takes_one_part() {
        let field = resource_field("t", &Resource::from_bytes("n", Bytes::from(vec![7; 900])), "v");
        let mut builder = Builder::new(2048, "t");
        assert!(builder.resource(&field));
        assert!(builder.resource(&field));
        assert!(!builder.resource(&field));
        assert!(builder.finish("nonce", BatchMark { number: u64::MAX, more: true }).frame.len() <= 2048);
        let mut small = Builder::new(100, "t");
        assert!(small.resource(&field), "one resource larger than the limit goes alone");
        assert!(!small.remove("x"));
    }
}
