//! Cuts a stream of bytes into lines.

/// Longest line; what is longer is cut.
const LONGEST: usize = 1 << 20;

/// The beginning of a line whose end has not come.
#[derive(Debug, Default)]
pub(crate) struct Lines(Vec<u8>);

impl Lines {
    /// Takes bytes; returns the lines that they complete, without their ends. Empty ones are left out.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.0.extend_from_slice(piece);
            if piece.ends_with(b"\n") || self.0.len() > LONGEST {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.0)).trim_end().to_owned();
                lines.extend((!line.is_empty()).then_some(line));
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_come() {
        let text = "äb\n\ncd\n".as_bytes();
        for at in 0..text.len() {
            let (first, second) = text.split_at(at);
            let mut lines = Lines::default();
            let found: Vec<String> = [first, second].iter().flat_map(|part| lines.feed(part)).collect();
            assert_eq!(found, ["äb", "cd"]);
        }
    }
}
