//! Read sizes: small while a connection is quiet, large once traffic is proven.

use std::time::{Duration, Instant};

/// Traffic after which reads of [`Tier::Steady`] are used even if none filled its buffer.
const STEADY_AFTER: u64 = 128 * 1024;
/// Traffic after which a read that fills [`Tier::Steady`] proves bulk.
const BULK_AFTER: u64 = 10 * 1024 * 1024;
/// Consecutive reads that fit [`Tier::Steady`], after which the largest size is no longer used.
const SMALLER_READS: u8 = 16;
/// A pause after which a direction starts over at [`Tier::Idle`].
const QUIET: Duration = Duration::from_secs(2);

/// The three read sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// 1 KiB: most connections most of the time.
    Idle,
    /// 16 KiB: after a read that filled its buffer, or 128 KiB of traffic.
    Steady,
    /// 256 KiB: after 10 MiB of traffic, while reads fill more than the 16 KiB.
    Bulk,
}

impl Tier {
    /// Largest number of bytes of one read.
    pub const fn read_size(self) -> usize {
        match self {
            Tier::Idle => 1024,
            Tier::Steady => 16 * 1024,
            Tier::Bulk => 256 * 1024,
        }
    }
}

/// The read size of one direction of one connection, which follows its traffic.
///
/// It grows to 16 KiB after a full read or 128 KiB of traffic, and to 256 KiB by a full read after 10 MiB. Small
/// messages never lead to the largest size, and 16 in a row end it: each message that
/// waits to be sent pins the memory that it was read into. After two seconds without a byte the size
/// starts over.
#[derive(Debug)]
pub struct Sizing {
    tier: Tier,
    smaller: u8,
    proven: u64,
    last: Option<Instant>,
}

impl Default for Sizing {
    fn default() -> Self {
        Sizing::new()
    }
}

impl Sizing {
    /// The sizing of a direction without traffic.
    pub const fn new() -> Sizing {
        Sizing { tier: Tier::Idle, smaller: 0, proven: 0, last: None }
    }

    /// The tier of the next read.
    pub const fn tier(&self) -> Tier {
        self.tier
    }

    /// Records a read of `bytes` that ended at `now` and returns the tier of the next one.
    pub fn record(&mut self, bytes: usize, now: Instant) -> Tier {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) >= QUIET) {
            *self = Sizing::new();
        }
        self.last = Some(now);
        self.proven = self.proven.saturating_add(bytes as u64);
        let large = bytes >= Tier::Steady.read_size();
        self.smaller = if large { 0 } else { self.smaller.saturating_add(1) };
        self.tier = match self.tier {
            Tier::Idle if bytes < Tier::Idle.read_size() && self.proven < STEADY_AFTER => Tier::Idle,
            Tier::Bulk if self.smaller < SMALLER_READS => Tier::Bulk,
            _ if large && self.proven >= BULK_AFTER => Tier::Bulk,
            _ => Tier::Steady,
        };
        self.tier
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_read_or_128_kib_proves_steady_traffic() {
        let now = Instant::now();
        let mut sizing = Sizing::new();
        assert_eq!(sizing.record(64, now), Tier::Idle);
        assert_eq!(sizing.record(1024, now), Tier::Steady);

        let mut sizing = Sizing::new();
        for _ in 0..(STEADY_AFTER / 512 - 1) {
            assert_eq!(sizing.record(512, now), Tier::Idle);
        }
        assert_eq!(sizing.record(512, now), Tier::Steady);
    }

    #[test]
    fn ten_mebibytes_prove_bulk_and_two_quiet_seconds_take_it_back() {
        let now = Instant::now();
        let mut sizing = Sizing::new();
        let mut carried = 0;
        while carried + 16 * 1024 < BULK_AFTER {
            assert!(sizing.record(16 * 1024, now) < Tier::Bulk);
            carried += 16 * 1024;
        }
        assert_eq!(sizing.record(16 * 1024, now), Tier::Bulk);
        assert_eq!(sizing.record(100, now + Duration::from_millis(1999)), Tier::Bulk);
        assert_eq!(sizing.record(100, now + Duration::from_secs(4)), Tier::Idle);
    }

    #[test]
    fn small_messages_never_prove_bulk() {
        let now = Instant::now();
        let mut sizing = Sizing::new();
        for _ in 0..2 * BULK_AFTER / 1000 {
            assert!(sizing.record(1000, now) < Tier::Bulk);
        }
    }

    #[test]
    fn small_messages_after_bulk_end_large_reads() {
        let now = Instant::now();
        let mut sizing = Sizing::new();
        while sizing.record(16 * 1024, now) < Tier::Bulk {}
        for _ in 1..SMALLER_READS {
            assert_eq!(sizing.record(1000, now), Tier::Bulk);
        }
        assert_eq!(sizing.record(1000, now), Tier::Steady);
        assert_eq!(sizing.record(1000, now), Tier::Steady);
        assert_eq!(sizing.record(16 * 1024, now), Tier::Bulk);
        assert_eq!(sizing.record(1000, now), Tier::Bulk);
    }
}
