//! Detection of peers that flood a connection with frames that carry nothing (RFC 9113 §10.5).
//!
//! SETTINGS, PING, WINDOW_UPDATE, PRIORITY, CONTINUATION, unknown and empty DATA frames cost both sides about the
//! same, and nothing in HTTP/2 limits them (CVE-2019-9511 to 9518). Frames that open or reset a stream have separate limits.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// RFC 9113 §3.4: what a client sends before its first frame.
const PREFACE: usize = 24;
/// RFC 9113 §4.1.
const HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const END_STREAM: u8 = 1;
/// Bytes sent that allow the peer one more frame: it has to send WINDOW_UPDATE for them.
const EARNED_BY: u64 = 64;

/// Counts of a connection: written by its stream, read by its task.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    frames: AtomicU64,
    sent: AtomicU64,
    failure: OnceLock<Arc<io::Error>>,
}

impl Tally {
    /// Why the stream failed. HTTP/2 passes on the text of an I/O error only, not its type.
    pub(crate) fn failure(&self) -> Option<&Arc<io::Error>> {
        self.failure.get()
    }

    /// Only one stream counts, so there is no update to lose.
    fn add(counter: &AtomicU64, n: u64) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
}

/// Reads the frame headers in a stream of bytes and skips payloads.
#[derive(Debug)]
pub(crate) struct Meter {
    tally: Arc<Tally>,
    header: [u8; HEADER],
    /// Bytes of the header that were read.
    have: usize,
    /// Bytes to skip before the next header.
    skip: usize,
}

impl Meter {
    /// A meter of what a client sends.
    pub(crate) fn of_client() -> Meter {
        Meter { skip: PREFACE, ..Meter::of_server() }
    }

    /// A meter of what a server sends.
    pub(crate) fn of_server() -> Meter {
        Meter { tally: Arc::default(), header: [0; HEADER], have: 0, skip: 0 }
    }

    pub(crate) fn tally(&self) -> Arc<Tally> {
        Arc::clone(&self.tally)
    }

    /// Keeps the first error of the stream, and returns a copy of it for HTTP/2.
    pub(crate) fn failed(&self, error: io::Error) -> io::Error {
        let again = io::Error::new(error.kind(), error.to_string());
        // The first failure is the cause of those that follow.
        let _ = self.tally.failure.set(Arc::new(error));
        again
    }

    /// Counts bytes that were sent to the peer.
    pub(crate) fn sent(&mut self, bytes: usize) {
        Tally::add(&self.tally.sent, bytes as u64);
    }

    /// Reads bytes that were received from the peer.
    pub(crate) fn received(&mut self, mut bytes: &[u8]) {
        let mut frames = 0;
        while !bytes.is_empty() {
            let (_, rest) = bytes.split_at(self.skip.min(bytes.len()));
            self.skip -= bytes.len() - rest.len();
            let (head, rest) = rest.split_at(rest.len().min(HEADER - self.have));
            if let Some(place) = self.header.get_mut(self.have..self.have + head.len()) {
                place.copy_from_slice(head);
            }
            self.have += head.len();
            bytes = rest;
            if self.have == HEADER {
                self.have = 0;
                let [a, b, c, kind, flags, ..] = self.header;
                self.skip = u32::from_be_bytes([0, a, b, c]) as usize;
                frames += u64::from(carries_nothing(kind, flags, self.skip));
            }
        }
        if frames > 0 {
            Tally::add(&self.tally.frames, frames);
        }
    }
}

fn carries_nothing(kind: u8, flags: u8, length: usize) -> bool {
    match kind {
        DATA => length == 0 && flags & END_STREAM == 0,
        HEADERS | RST_STREAM => false,
        _ => true,
    }
}

/// Limits how many such frames a peer may send in a period.
#[derive(Debug)]
pub(crate) struct Overhead {
    limit: u64,
    within: Duration,
    tally: Arc<Tally>,
    /// The current period: its start, and the tally then.
    since: Instant,
    frames: u64,
    sent: u64,
}

impl Overhead {
    pub(crate) fn new(limit: u32, within: Duration, tally: Arc<Tally>, now: Instant) -> Overhead {
        Overhead { limit: limit.into(), within, tally, since: now, frames: 0, sent: 0 }
    }

    /// The count of this period, if it is above the limit. The clock is read only then.
    pub(crate) fn excess(&mut self, now: impl FnOnce() -> Instant) -> Option<u64> {
        let frames = self.tally.frames.load(Ordering::Relaxed);
        let sent = self.tally.sent.load(Ordering::Relaxed);
        let count = frames.wrapping_sub(self.frames);
        if count <= self.limit + sent.wrapping_sub(self.sent) / EARNED_BY {
            return None;
        }
        let now = now();
        if now.saturating_duration_since(self.since) < self.within {
            return Some(count);
        }
        (self.since, self.frames, self.sent) = (now, frames, sent);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const WITHIN: Duration = Duration::from_secs(10);

    fn frame(kind: u8, flags: u8, length: usize) -> Vec<u8> {
        let size = u32::try_from(length).unwrap().to_be_bytes();
        [&size[1..], &[kind, flags, 0, 0, 0, 1], &vec![0xff; length]].concat()
    }

    fn counted(meter: &Meter) -> u64 {
        meter.tally.frames.load(Ordering::Relaxed)
    }

    #[test]
    fn frames_that_open_end_or_carry_are_no_overhead() {
        let mut meter = Meter::of_client();
        meter.received(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        for frame in
            [frame(DATA, 0, 5), frame(DATA, END_STREAM, 0), frame(HEADERS, 4, 9), frame(RST_STREAM, 0, 4)]
        {
            meter.received(&frame);
        }
        assert_eq!(counted(&meter), 0);
        // Empty DATA, PRIORITY, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION, a kind that nobody knows.
        for kind in [DATA, 2, 4, 6, 8, 9, 200] {
            meter.received(&frame(kind, 0, 0));
        }
        assert_eq!(counted(&meter), 7);
    }

    #[test]
    fn only_many_empty_frames_in_a_short_time_are_too_many() {
        let start = Instant::now();
        let mut meter = Meter::of_server();
        let mut overhead = Overhead::new(100, WITHIN, meter.tally(), start);
        let ping = frame(6, 0, 8);
        for round in 1..10 {
            (0..90).for_each(|_| meter.received(&ping));
            assert_eq!(overhead.excess(|| start + round * WITHIN), None, "90 in each period");
        }
        meter.sent(1000 * 64);
        (0..1000).for_each(|_| meter.received(&ping));
        assert_eq!(overhead.excess(|| start + 9 * WITHIN), None, "a thousand for what was sent");
        (0..101).for_each(|_| meter.received(&ping));
        assert!(overhead.excess(|| start + 9 * WITHIN - WITHIN / 2).is_some());
    }

    proptest! {
        #[test]
        fn frames_are_counted_however_they_are_cut(
            kinds in prop::collection::vec((0..12u8, 0..2u8, 0..40usize), 0..20),
            cuts in prop::collection::vec(1..30usize, 1..40),
        ) {
            let bytes: Vec<u8> = kinds.iter().flat_map(|(kind, flags, length)| frame(*kind, *flags, *length)).collect();
            let mut meter = Meter::of_server();
            let mut rest = bytes.as_slice();
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at(rest.len().min(*cut));
                meter.received(piece);
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            let expected = kinds.iter().filter(|(kind, flags, length)| carries_nothing(*kind, *flags, *length)).count();
            prop_assert_eq!(counted(&meter), expected as u64);
        }

        #[test]
        fn any_bytes_are_counted_without_harm(bytes: Vec<u8>) {
            Meter::of_client().received(&bytes);
        }
    }
}
