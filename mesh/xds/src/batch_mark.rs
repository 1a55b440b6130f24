//! The use of `system_version_info` for batches: the batch that an answer belongs to, and whether more of it follows.
//!
//! The protocol keeps the field for debugging. Our server writes the number of the batch, then `+` when further answers
//! of the batch follow on the stream, of any type. A version in another form comes from a server without batches.

use std::fmt;

/// The batch of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchMark {
    pub(crate) number: u64,
    /// Further answers of this batch follow.
    pub(crate) more: bool,
}

impl BatchMark {
    /// Reads a server's version; `None` if the server has no batches.
    pub(crate) fn read(version: &str) -> Option<Self> {
        let (digits, more) = version.strip_suffix('+').map_or((version, false), |digits| (digits, true));
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| digits.parse().ok()).flatten().map(|number| Self { number, more })
    }
}

impl fmt::Display for BatchMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.number, if self.more { "+" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_are_batches() {
        assert_eq!(BatchMark::read("42+"), Some(BatchMark { number: 42, more: true }));
        assert_eq!(BatchMark::read("42"), Some(BatchMark { number: 42, more: false }));
        for foreign in ["", "+", "2026-11-27T21:00:00Z/12", "+42", "42++", "99999999999999999999999"] {
            assert_eq!(BatchMark::read(foreign), None, "{foreign}");
        }
        assert_eq!(BatchMark { number: 7, more: true }.to_string(), "7+");
    }
}
