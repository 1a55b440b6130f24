//! The `traceparent` header (W3C Trace Context, level 1).

use std::fmt;

use http::HeaderValue;
use rand::Rng;

/// The trace that a connection belongs to, and the span that opened it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceParent {
    /// Never zero.
    pub trace_id: u128,
    /// The span, never zero.
    pub parent_id: u64,
    /// Bit 0: sampled.
    pub flags: u8,
}

impl TraceParent {
    /// A new trace, not sampled.
    pub fn new(rng: &mut impl Rng) -> TraceParent {
        TraceParent {
            trace_id: (u128::from(rng.next_u64()) << 64 | u128::from(rng.next_u64())).max(1),
            parent_id: rng.next_u64().max(1),
            flags: 0,
        }
    }

    /// The same trace with a new span.
    pub fn child(self, rng: &mut impl Rng) -> TraceParent {
        TraceParent { parent_id: rng.next_u64().max(1), ..self }
    }

    /// Reads a header; `None` if it is malformed.
    pub fn parse(header: &str) -> Option<TraceParent> {
        let field = |range: std::ops::Range<usize>| {
            header.get(range).filter(|text| {
                text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
            })
        };
        let version = field(0..2)?;
        // Trace Context §2.2.1: ff is invalid; versions above 00 may go on after the flags.
        let complete = match version {
            "ff" => false,
            "00" => header.len() == 55,
            _ => header.len() == 55 || header.as_bytes().get(55) == Some(&b'-'),
        };
        let dashes = [2, 35, 52].into_iter().all(|at| header.as_bytes().get(at) == Some(&b'-'));
        if !complete || !dashes {
            return None;
        }
        let parent = TraceParent {
            trace_id: u128::from_str_radix(field(3..35)?, 16).ok()?,
            parent_id: u64::from_str_radix(field(36..52)?, 16).ok()?,
            flags: u8::from_str_radix(field(53..55)?, 16).ok()?,
        };
        (parent.trace_id != 0 && parent.parent_id != 0).then_some(parent)
    }

    /// The header's value.
    pub fn header(&self) -> Option<HeaderValue> {
        HeaderValue::try_from(self.to_string()).ok()
    }
}

impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.parent_id, self.flags)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXAMPLE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn malformed_headers_are_no_trace() {
        assert!(TraceParent::parse(EXAMPLE).is_some_and(|parent| parent.flags == 1));
        for bad in [
            "",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
            "00-0af7651916cd43dd8448eb211c80319c+b7ad6b7169203331-01",
        ] {
            assert_eq!(TraceParent::parse(bad), None, "{bad:?} was accepted");
        }
        assert!(TraceParent::parse(&format!("01{}-more", &EXAMPLE[2..])).is_some());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(trace_id in 1u128.., parent_id in 1u64.., flags: u8) {
            let parent = TraceParent { trace_id, parent_id, flags };
            prop_assert_eq!(TraceParent::parse(&parent.to_string()), Some(parent));
        }

        #[test]
        fn any_header_is_read_or_refused(header in "\\PC{0,80}") {
            let _ = TraceParent::parse(&header);
        }
    }
}
