//! HTTP/2 by hand: a client that sends any frames, right or wrong, which no library would.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::http::Stream;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(20);
/// RFC 9113 §3.4 and §6.5: the preface, and SETTINGS that leave everything as it is.
const START: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Types of frames (RFC 9113 §6).
pub mod kind {
    #![allow(missing_docs, reason = "the names of RFC 9113")]
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// Flag of frames that end their stream; of SETTINGS and PING: an acknowledgement.
pub const END_STREAM: u8 = 1;
/// Flag of frames that end a header block.
pub const END_HEADERS: u8 = 4;

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// An answer with one of the statuses that HPACK's static table has.
    Status(u16),
    /// An answer with another status.
    OtherStatus,
    /// The stream was reset, with this code.
    Reset(u32),
    /// The connection is ended by GOAWAY, with this code.
    GoAway(u32),
    /// The connection ended without a word.
    Closed,
}

/// A frame with its header.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A header block of literal fields, which are not indexed and not compressed (RFC 7541 §6.2.2).
pub fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            length(text.len(), &mut block);
            block.extend(*text);
        }
    }
    block
}

/// An integer with a prefix of seven bits (RFC 7541 §5.1).
fn length(length: usize, block: &mut Vec<u8>) {
    const PREFIX: usize = 0x7f;
    if length < PREFIX {
        return block.push(u8::try_from(length).unwrap_or(0x7e));
    }
    block.push(0x7f);
    let mut rest = length - PREFIX;
    while rest >= 0x80 {
        block.push(u8::try_from(rest & 0x7f).unwrap_or(0) | 0x80);
        rest >>= 7;
    }
    block.push(u8::try_from(rest).unwrap_or(0));
}

/// A connection of which every byte is the test's.
#[expect(missing_debug_implementations, reason = "a stream of any kind")]
pub struct Frames {
    stream: Box<dyn Stream>,
}

impl Frames {
    /// Begins HTTP/2 on a stream.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn start(stream: impl Stream + 'static) -> io::Result<Self> {
        let mut frames = Self { stream: Box::new(stream) };
        frames.write(START).await?;
        Ok(frames)
    }

    /// Sends bytes.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// Sends the head of a request, whose stream it ends if there is no body.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn request(&mut self, stream: u32, fields: &[(&[u8], &[u8])], ends: bool) -> io::Result<()> {
        let flags = END_HEADERS | if ends { END_STREAM } else { 0 };
        self.write(&frame(kind::HEADERS, flags, stream, &block(fields))).await
    }

    /// What comes of the request on a stream. SETTINGS and PING are acknowledged meanwhile.
    ///
    /// # Panics
    /// When nothing comes in time.
    pub async fn outcome(&mut self, stream: u32) -> Outcome {
        let outcome = async {
            loop {
                let Ok((kind, flags, of, payload)) = self.read().await else { return Outcome::Closed };
                let code = |at: usize| {
                    let bytes = payload.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
                    bytes.map_or(u32::MAX, u32::from_be_bytes)
                };
                match kind {
                    kind::HEADERS if of == stream => return status(&payload),
                    kind::RST_STREAM if of == stream => return Outcome::Reset(code(0)),
                    kind::GOAWAY => return Outcome::GoAway(code(4)),
                    kind::SETTINGS | kind::PING if flags & END_STREAM == 0 => {
                        let payload = if kind == kind::PING { &payload[..] } else { &[] };
                        if self.write(&frame(kind, END_STREAM, 0, payload)).await.is_err() {
                            return Outcome::Closed;
                        }
                    }
                    _ => {}
                }
            }
        };
        tokio::time::timeout(LIMIT, outcome).await.expect("an answer in time")
    }

    /// The next frame: type, flags, stream and payload.
    async fn read(&mut self) -> io::Result<(u8, u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(0)];
        self.stream.read_exact(&mut payload).await?;
        Ok((kind, flags, u32::from_be_bytes(stream) & 0x7fff_ffff, payload))
    }

    /// Sends the same bytes until the other end has had enough, at most `count` times; whether it had.
    ///
    /// # Panics
    /// When that takes more than a minute.
    pub async fn flood(self, bytes: &[u8], count: usize) -> bool {
        self.flood_with(|_| bytes.to_vec(), count).await
    }

    /// The same with bytes that differ each time.
    ///
    /// # Panics
    /// When that takes more than a minute.
    pub async fn flood_with(self, bytes: impl Fn(u32) -> Vec<u8>, count: usize) -> bool {
        let (mut reading, mut writing) = tokio::io::split(self.stream);
        let writing = async {
            for turn in 0..u32::try_from(count).unwrap_or(u32::MAX) {
                if writing.write_all(&bytes(turn)).await.is_err() || writing.flush().await.is_err() {
                    return true;
                }
            }
            false
        };
        let ended = async {
            let mut sink = [0; 4096];
            while reading.read(&mut sink).await.is_ok_and(|length| length > 0) {}
        };
        let flood = async {
            tokio::select! {
                had_enough = writing => had_enough,
                () = ended => true,
            }
        };
        tokio::time::timeout(LIMIT * 3, flood).await.expect("an end in time")
    }
}

/// The status of an answer by HPACK's static table (RFC 7541, appendix A).
fn status(block: &[u8]) -> Outcome {
    // An update of the table's size may come first.
    let first = block.iter().find(|byte| **byte & 0xe0 != 0x20);
    match first.copied() {
        Some(0x88) => Outcome::Status(200),
        Some(0x8c) => Outcome::Status(400),
        Some(0x8d) => Outcome::Status(404),
        Some(0x8e) => Outcome::Status(500),
        _ => Outcome::OtherStatus,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_have_a_length_of_several_bytes() {
        let text = [b'a'; 300];
        let block = block(&[(b"x", &text)]);
        assert_eq!(block[..6], [0, 1, b'x', 0x7f, 0xad, 0x01]);
        assert_eq!(block.len(), 6 + 300);
    }
}
