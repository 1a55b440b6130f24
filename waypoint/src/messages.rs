//! Counts the messages of gRPC bodies as they pass. Pure: bytes in, a count out.
//!
//! gRPC over HTTP/2, "Length-Prefixed-Message": a flag of one byte, a length of four, the message.

/// Length of a message's prefix.
const PREFIX: u8 = 5;

/// The messages of one body. A message counts from its first byte on.
#[derive(Debug, Default, Clone, Copy)]
pub struct Messages {
    count: u64,
    /// Bytes of the current prefix that were read.
    prefix: u8,
    /// What is known of the current message's length, and then what is left of it.
    left: u32,
}

impl Messages {
    /// How many have begun.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Reads on. It looks at prefixes only.
    pub fn feed(&mut self, mut data: &[u8]) {
        while let Some((byte, rest)) = data.split_first() {
            if self.prefix == PREFIX {
                let skipped = usize::try_from(self.left).unwrap_or(usize::MAX).min(data.len());
                self.left = self.left.saturating_sub(u32::try_from(skipped).unwrap_or(u32::MAX));
                data = data.get(skipped..).unwrap_or_default();
            } else {
                match self.prefix {
                    0 => (self.count, self.left) = (self.count + 1, 0),
                    _ => self.left = self.left << 8 | u32::from(*byte),
                }
                self.prefix += 1;
                data = rest;
            }
            if self.prefix == PREFIX && self.left == 0 {
                self.prefix = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let mut body = Vec::new();
        for length in [0_u32, 1, 300, 0, 70_000] {
            body.push(0);
            body.extend(length.to_be_bytes());
            body.extend(vec![1; length as usize]);
        }
        for chunk in [1, 2, 3, 5, 7, 1000, body.len()] {
            let mut messages = Messages::default();
            body.chunks(chunk).for_each(|data| messages.feed(data));
            assert_eq!(messages.count(), 5, "{chunk}");
        }
        let mut messages = Messages::default();
        messages.feed(&[0, 0xff, 0xff]);
        messages.feed(&[0xff, 0xff, 1, 2, 3]);
        assert_eq!(messages.count(), 1);
    }
}
