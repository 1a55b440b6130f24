//! Netlink attributes as trees: encoding, and comparing with what the kernel lists.

/// Set in an attribute's type when its value is attributes (linux/netlink.h, `NLA_F_NESTED`).
const NESTED: u16 = 0x8000;
/// The flags in an attribute's type.
const FLAGS: u16 = 0xc000;
const HEADER: usize = 4;

/// One attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attribute {
    kind: u16,
    value: Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Bytes(Vec<u8>),
    Tree(Vec<Attribute>),
}

impl Attribute {
    pub(super) fn bytes(kind: u16, value: impl Into<Vec<u8>>) -> Self {
        Self { kind, value: Value::Bytes(value.into()) }
    }

    /// A number in network byte order, as nftables wants all of its own.
    pub(super) fn number(kind: u16, value: u32) -> Self {
        Self::bytes(kind, value.to_be_bytes())
    }

    /// A string with its terminator.
    pub(super) fn string(kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        Self::bytes(kind, bytes)
    }

    pub(super) fn tree(kind: u16, value: Vec<Self>) -> Self {
        Self { kind, value: Value::Tree(value) }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; HEADER]);
        let kind = match &self.value {
            Value::Bytes(bytes) => {
                out.extend_from_slice(bytes);
                self.kind
            }
            Value::Tree(attributes) => {
                encode_all(attributes, out);
                self.kind | NESTED
            }
        };
        // No attribute of ours comes near the 64 KiB that the length field can say.
        let len = u16::try_from(out.len() - start).unwrap_or(u16::MAX);
        if let Some(header) = out.get_mut(start..start + HEADER) {
            let [a, b] = len.to_ne_bytes();
            let [c, d] = kind.to_ne_bytes();
            header.copy_from_slice(&[a, b, c, d]);
        }
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

pub(super) fn encode_all(attributes: &[Attribute], out: &mut Vec<u8>) {
    for attribute in attributes {
        attribute.encode(out);
    }
}

/// Walks attributes in received bytes. Ends at the first that is malformed.
pub(super) fn walk(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(rest.get(0..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & !FLAGS;
        let value = rest.get(HEADER..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of a kind.
pub(super) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    walk(bytes).find(|(k, _)| *k == kind).map(|(_, value)| value)
}

/// A string attribute without its terminator.
pub(super) fn find_string(bytes: &[u8], kind: u16) -> Option<String> {
    let value = find(bytes, kind)?;
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8(value.get(..end)?.to_vec()).ok()
}

/// Whether everything in `wanted` is found in `listed`. The kernel lists more than it was given
/// (defaults, counters), never less. Attributes of one kind are compared in order.
pub(super) fn covers(listed: &[u8], wanted: &[Attribute]) -> bool {
    wanted.iter().enumerate().all(|(i, attribute)| {
        let nth = wanted.iter().take(i).filter(|before| before.kind == attribute.kind).count();
        let Some((_, value)) = walk(listed).filter(|(kind, _)| *kind == attribute.kind).nth(nth) else {
            return false;
        };
        match &attribute.value {
            Value::Bytes(bytes) => value == bytes,
            Value::Tree(inner) => covers(value, inner),
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
        fn what_was_encoded_is_covered_and_no_less_is(attributes in prop::collection::vec(trees(), 1..5)) {
            let mut bytes = Vec::new();
            encode_all(&attributes, &mut bytes);
            prop_assert!(covers(&bytes, &attributes));
            prop_assert_eq!(walk(&bytes).count(), attributes.len());
            let mut more = attributes;
            more.push(Attribute::bytes(9, [1]));
            prop_assert!(!covers(&bytes, &more));
        }

        #[test]
        fn no_bytes_break_the_walk(bytes in prop::collection::vec(any::<u8>(), 0..64), kind in 0..8_u16) {
            walk(&bytes).for_each(drop);
            find_string(&bytes, kind);
        }
    }
}
