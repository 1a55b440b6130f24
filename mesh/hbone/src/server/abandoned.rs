//! Detection of peers that open and abandon requests without end (CVE-2023-44487).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How many requests of a connection were reset before they were answered, in the current period.
#[derive(Debug)]
pub(super) struct Abandoned {
    limit: u32,
    within: Duration,
    tally: Tally,
    /// Start of the current period, and the tally at that time.
    period: Option<(Instant, u32)>,
}

/// The count of abandoned requests, shared with the requests.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally(Arc<AtomicU32>);

impl Tally {
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Abandoned {
    pub(super) fn new(limit: u32, within: Duration) -> Abandoned {
        Abandoned { limit, within, tally: Tally::default(), period: None }
    }

    pub(super) fn tally(&self) -> Tally {
        self.tally.clone()
    }

    /// The count of this period, if it is above the limit.
    pub(super) fn excess(&mut self, now: Instant) -> Option<u32> {
        let total = self.tally.0.load(Ordering::Relaxed);
        let (start, before) = self.period.unwrap_or((now, 0));
        let current = now.saturating_duration_since(start) < self.within;
        let before = if current { before } else { total };
        self.period = Some((if current { start } else { now }, before));
        let count = total.wrapping_sub(before);
        (count > self.limit).then_some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_many_in_a_short_time_are_too_many() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut abandoned = Abandoned::new(3, 10 * second);
        for round in 0..100 {
            abandoned.tally().add();
            assert_eq!(abandoned.excess(start + round * 4 * second), None);
        }
        for _ in 0..4 {
            abandoned.tally().add();
        }
        assert!(abandoned.excess(start + 397 * second).is_some());
    }
}
