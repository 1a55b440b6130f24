//! Inputs of several parts: cut at a mark, so that a change of one part moves no other.

/// Stands between two parts. No text holds it, and no message of ours is likely to.
pub const MARK: [u8; 4] = [0xff, 0xfe, 0xfd, 0xff];

/// The parts of an input.
pub fn cut(mut data: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    while let Some(at) = data.windows(MARK.len()).position(|window| window == MARK) {
        parts.push(&data[..at]);
        data = &data[at + MARK.len()..];
    }
    parts.push(data);
    parts
}

/// An input of these parts.
pub fn join(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.join(&MARK[..])
}
