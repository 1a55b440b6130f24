//! Netlink messages and their attributes (netlink(7)), for connection tracking, nftables and the listing of sockets.
//!
//! Framing, attribute headers and error messages come from `netlink-packet-core`. The crate for netfilter that builds on
//! it lacks most of the nftables expressions that are needed here, so callers describe messages as trees of
//! [`Attribute`]s, and what the kernel lists is compared with such trees.

use std::io;

use netlink_packet_core::{
    Emitable, ErrorBuffer, NLA_F_NESTED, NLA_HEADER_SIZE, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer,
    NetlinkHeader, Nla, NlasIterator,
};
use socket2::{Domain, Protocol, Socket, Type};

pub use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST,
};

/// A netlink protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Sockets (sock_diag(7)).
    SockDiag,
    /// Connection tracking and nftables.
    Netfilter,
}

impl Family {
    /// Opens a blocking socket in the calling thread's namespace.
    pub fn open(self) -> io::Result<Socket> {
        let protocol = match self {
            Self::SockDiag => libc::NETLINK_SOCK_DIAG,
            Self::Netfilter => libc::NETLINK_NETFILTER,
        };
        Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW.cloexec(), Some(Protocol::from(protocol)))
    }
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The type of the message.
    pub kind: u16,
    /// Flags beside `NLM_F_REQUEST`.
    pub flags: u16,
    /// The number that answers repeat.
    pub sequence: u32,
}

impl Request {
    /// Appends the message: header, the protocol's fixed part, attributes.
    pub fn push(self, out: &mut Vec<u8>, fixed: &[u8], attributes: &[Attribute]) {
        let Self { kind, flags, sequence } = self;
        let mut header = NetlinkHeader::default();
        let start = out.len();
        let body = start + header.buffer_len();
        let length = header.buffer_len() + fixed.len() + attributes.buffer_len();
        header.length = u32::try_from(length).unwrap_or(u32::MAX);
        header.message_type = kind;
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = sequence;
        out.resize(start + length, 0);
        let (head, rest) = out.split_at_mut(body);
        header.emit(&mut head[start..]);
        let (fixed_part, attribute_part) = rest.split_at_mut(fixed.len());
        fixed_part.copy_from_slice(fixed);
        attributes.emit(attribute_part);
    }

    /// The message alone.
    pub fn encode(self, fixed: &[u8], attributes: &[Attribute]) -> Vec<u8> {
        let mut out = Vec::new();
        self.push(&mut out, fixed, attributes);
        out
    }
}

/// An attribute to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    kind: u16,
    value: Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Bytes(Vec<u8>),
    Tree(Vec<Attribute>),
}

impl Attribute {
    /// An attribute of these bytes.
    pub fn bytes(kind: u16, value: impl Into<Vec<u8>>) -> Self {
        Self { kind, value: Value::Bytes(value.into()) }
    }

    /// A number in network byte order, as netfilter wants all of its own.
    pub fn number(kind: u16, value: u32) -> Self {
        Self::bytes(kind, value.to_be_bytes())
    }

    /// A string with its terminator.
    pub fn string(kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        Self::bytes(kind, bytes)
    }

    /// An attribute of attributes.
    pub fn tree(kind: u16, value: Vec<Self>) -> Self {
        Self { kind, value: Value::Tree(value) }
    }
}

impl Nla for Attribute {
    fn value_len(&self) -> usize {
        match &self.value {
            Value::Bytes(bytes) => bytes.len(),
            Value::Tree(attributes) => attributes.as_slice().buffer_len(),
        }
    }

    fn kind(&self) -> u16 {
        match &self.value {
            Value::Bytes(_) => self.kind,
            Value::Tree(_) => self.kind | NLA_F_NESTED,
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match &self.value {
            Value::Bytes(bytes) => buffer.copy_from_slice(bytes),
            Value::Tree(attributes) => attributes.as_slice().emit(buffer),
        }
    }
}

/// The attributes in received bytes, without the flags of their types. Ends at the first that is malformed.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(|attribute| {
        let attribute = attribute.ok()?;
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        Some((kind, attribute.into_inner().get(NLA_HEADER_SIZE..length)?))
    })
}

/// The value of the first attribute of a type.
pub fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

/// A string attribute without its terminator.
pub fn find_string(bytes: &[u8], kind: u16) -> Option<String> {
    let value = find(bytes, kind)?;
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8(value.get(..end)?.to_vec()).ok()
}

/// Whether everything in `wanted` is found in `listed`. The kernel lists more than it was given
/// (defaults, counters), never less. Attributes of one type are compared in order.
pub fn covers(listed: &[u8], wanted: &[Attribute]) -> bool {
    wanted.iter().enumerate().all(|(i, attribute)| {
        let nth = wanted.iter().take(i).filter(|before| before.kind == attribute.kind).count();
        let Some((_, value)) = attributes(listed).filter(|(kind, _)| *kind == attribute.kind).nth(nth) else {
            return false;
        };
        match &attribute.value {
            Value::Bytes(bytes) => value == bytes,
            Value::Tree(inner) => covers(value, inner),
        }
    })
}

/// A received message.
#[derive(Debug)]
pub struct Message<'a> {
    /// Its type; of no meaning for acknowledgements, errors and the end of a list.
    pub kind: u16,
    /// Its flags.
    pub flags: u16,
    /// The number of the request that it answers.
    pub sequence: u32,
    /// What it says.
    pub content: Content<'a>,
}

/// What a received message says.
#[derive(Debug)]
pub enum Content<'a> {
    /// The protocol's own: its fixed part, then attributes.
    Body(&'a [u8]),
    /// The request was carried out.
    Acknowledged,
    /// The request was refused.
    Refused(io::Error),
    /// The list is complete.
    Done,
}

/// The messages of a received datagram. Ends at the first that is malformed.
pub fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(rest).ok()?;
        let content = match message.message_type() {
            NLMSG_DONE => Content::Done,
            NLMSG_ERROR => {
                let error = ErrorBuffer::new_checked(message.payload()).ok()?;
                match error.code() {
                    None => Content::Acknowledged,
                    Some(code) => Content::Refused(io::Error::from_raw_os_error(code.get().wrapping_neg())),
                }
            }
            _ => Content::Body(message.payload()),
        };
        let (kind, flags, sequence) = (message.message_type(), message.flags(), message.sequence_number());
        let length = usize::try_from(message.length()).ok()?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message { kind, flags, sequence, content })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(attributes: &[Attribute]) -> Vec<u8> {
        let mut bytes = vec![0; attributes.buffer_len()];
        attributes.emit(&mut bytes);
        bytes
    }

    fn trees() -> impl Strategy<Value = Attribute> {
        let leaf = (0..8_u16, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(kind, bytes)| Attribute::bytes(kind, bytes));
        leaf.prop_recursive(3, 24, 4, |inner| {
            (0..8_u16, prop::collection::vec(inner, 0..4))
                .prop_map(|(kind, value)| Attribute::tree(kind, value))
        })
    }

    proptest! {
        #[test]
        fn encoded_attributes_are_covered_and_more_are_not(wanted in prop::collection::vec(trees(), 1..5)) {
            let bytes = encoded(&wanted);
            prop_assert!(covers(&bytes, &wanted));
            prop_assert_eq!(attributes(&bytes).count(), wanted.len());
            let mut more = wanted;
            more.push(Attribute::bytes(9, [1]));
            prop_assert!(!covers(&bytes, &more));
        }

        #[test]
        fn no_bytes_break_the_decoders(bytes in prop::collection::vec(any::<u8>(), 0..96), kind in 0..8_u16) {
            attributes(&bytes).for_each(drop);
            find_string(&bytes, kind);
            messages(&bytes).for_each(drop);
        }

        #[test]
        fn requests_are_read_as_they_were_written(
            kind in 16..u16::MAX,
            flags in 0..u16::MAX,
            sequence: u32,
            fixed in prop::collection::vec(any::<u8>(), 4..5),
            wanted in prop::collection::vec(trees(), 0..3),
        ) {
            let mut bytes = Vec::new();
            for _ in 0..2 {
                Request { kind, flags, sequence }.push(&mut bytes, &fixed, &wanted);
            }
            let read: Vec<_> = messages(&bytes).collect();
            prop_assert_eq!(read.len(), 2);
            for message in read {
                prop_assert_eq!(
                    (message.kind, message.flags, message.sequence),
                    (kind, flags | NLM_F_REQUEST, sequence)
                );
                let Content::Body(body) = message.content else { panic!("not a body") };
                prop_assert_eq!(&body[..4], &fixed[..]);
                prop_assert!(covers(&body[4..], &wanted));
            }
        }
    }

    #[test]
    fn acknowledgements_and_errors_are_distinguished() {
        let answer = |code: i32| {
            let mut bytes = Vec::new();
            let request = [0; 16];
            let mut fixed = code.to_ne_bytes().to_vec();
            fixed.extend_from_slice(&request);
            Request { kind: NLMSG_ERROR, flags: 0, sequence: 7 }.push(&mut bytes, &fixed, &[]);
            bytes
        };
        let read = |bytes: &[u8]| match messages(bytes).next().unwrap().content {
            Content::Acknowledged => None,
            Content::Refused(error) => error.raw_os_error(),
            content => panic!("{content:?}"),
        };
        assert_eq!(read(&answer(0)), None);
        assert_eq!(read(&answer(-libc::ENOENT)), Some(libc::ENOENT));
        assert_eq!(read(&answer(i32::MIN)), Some(i32::MIN));
    }
}
