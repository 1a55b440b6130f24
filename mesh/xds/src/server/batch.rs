//! When changes are announced: urgent ones, and the first after a quiet time, at once; others together.

use std::time::{Duration, Instant};

/// What to do about a change that was just logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Announce {
    /// Wake the subscribers.
    Now,
    /// Wake them at that time.
    At(Instant),
    /// A wake-up that will include this change is already planned.
    Planned,
}

/// The batching rule. Time comes in as an argument.
#[derive(Debug)]
pub(super) struct Batcher {
    window: Duration,
    last: Option<Instant>,
    planned: bool,
}

impl Batcher {
    pub(super) fn new(window: Duration) -> Self {
        Self { window, last: None, planned: false }
    }

    /// A change was logged.
    pub(super) fn handle_change(&mut self, now: Instant, urgent: bool) -> Announce {
        let quiet = self.last.is_none_or(|last| now.saturating_duration_since(last) >= self.window);
        if urgent || (quiet && !self.planned) {
            self.last = Some(now);
            self.planned = false;
            return Announce::Now;
        }
        if self.planned {
            return Announce::Planned;
        }
        self.planned = true;
        Announce::At(self.last.unwrap_or(now) + self.window)
    }

    /// A planned time has come; false if an urgent change has announced everything in the meantime.
    pub(super) fn handle_deadline(&mut self, now: Instant) -> bool {
        let due = std::mem::replace(&mut self.planned, false);
        if due {
            self.last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_millis(50);

    #[test]
    fn the_first_change_is_announced_at_once_and_others_together() {
        let mut batcher = Batcher::new(WINDOW);
        let start = Instant::now();
        assert_eq!(batcher.handle_change(start, false), Announce::Now);
        let later = start + Duration::from_millis(10);
        assert_eq!(batcher.handle_change(later, false), Announce::At(start + WINDOW));
        assert_eq!(batcher.handle_change(later, false), Announce::Planned);
        assert!(batcher.handle_deadline(start + WINDOW));
        assert_eq!(batcher.handle_change(start + WINDOW * 2, false), Announce::Now);
    }

    #[test]
    fn a_change_right_after_a_batch_waits_for_the_next() {
        let mut batcher = Batcher::new(WINDOW);
        let start = Instant::now();
        batcher.handle_change(start, false);
        batcher.handle_change(start, false);
        batcher.handle_deadline(start + WINDOW);
        let next = start + WINDOW + Duration::from_millis(1);
        assert_eq!(batcher.handle_change(next, false), Announce::At(start + WINDOW * 2));
    }

    #[test]
    fn an_urgent_change_announces_waiting_ones_too() {
        let mut batcher = Batcher::new(WINDOW);
        let start = Instant::now();
        batcher.handle_change(start, false);
        batcher.handle_change(start, false);
        assert_eq!(batcher.handle_change(start, true), Announce::Now);
        assert!(!batcher.handle_deadline(start + WINDOW));
    }
}
