//! Slows down writes to objects that somebody else keeps changing back, as another control plane in the same cluster does.
//!
//! An object may be written a few times in a row; after that its writes wait, longer each time. An object that was left alone
//! for a while is written at once again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// Writes of an object before the first pause.
const FREE: u32 = 4;
/// The first pause; each further one is twice as long.
const FIRST: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(120);
/// An object that was not written for so long is no longer contended.
const QUIET: Duration = Duration::from_secs(300);
/// Objects that are remembered; of more, those that were written longest ago are forgotten.
const CAPACITY: usize = 8192;

/// Counters of backoffs.
#[derive(Debug, Default)]
pub(crate) struct WriteBackoffMetrics {
    /// Writes that waited.
    pub(crate) held: AtomicU64,
}

/// The writes of objects, and when each may be written again.
#[derive(Debug)]
pub(super) struct WriteBackoff<K> {
    objects: BTreeMap<K, Writes>,
    metrics: Arc<WriteBackoffMetrics>,
}

#[derive(Debug)]
struct Writes {
    count: u32,
    last: Instant,
    /// Whether a write waits for its time.
    is_held: bool,
}

impl Writes {
    fn due(&self) -> Instant {
        let doublings = self.count.saturating_sub(FREE);
        match self.count >= FREE {
            true => self.last + FIRST.saturating_mul(1 << doublings.min(16)).min(LONGEST),
            false => self.last,
        }
    }

    fn is_quiet(&self, now: Instant) -> bool {
        now.duration_since(self.last) > QUIET
    }
}

impl<K: Ord + Clone + std::fmt::Display> WriteBackoff<K> {
    pub(super) fn new(metrics: Arc<WriteBackoffMetrics>) -> Self {
        Self { objects: BTreeMap::new(), metrics }
    }

    /// Whether the object may be written now. One that may not is held until it is [`due`](Self::take_due).
    pub(super) fn admits(&mut self, object: &K, now: Instant) -> bool {
        let Some(writes) = self.objects.get_mut(object) else { return true };
        if writes.due() <= now {
            writes.is_held = false;
            return true;
        }
        if !std::mem::replace(&mut writes.is_held, true) {
            self.metrics.held.fetch_add(1, Ordering::Relaxed);
        }
        false
    }

    /// Notes that the object was written.
    pub(super) fn wrote(&mut self, object: &K, now: Instant) {
        if self.objects.len() >= CAPACITY && !self.objects.contains_key(object) {
            self.make_room(now);
        }
        let new = || Writes { count: 0, last: now, is_held: false };
        let writes = self.objects.entry(object.clone()).or_insert_with(new);
        if writes.is_quiet(now) {
            *writes = new();
        }
        (writes.count, writes.last) = (writes.count.saturating_add(1), now);
        if writes.count == FREE {
            tracing::warn!(%object, "somebody else changes what is written to the object; further writes are slowed down");
        }
    }

    /// When the first write that is held is due.
    pub(super) fn next(&self) -> Option<Instant> {
        self.objects.values().filter(|writes| writes.is_held).map(Writes::due).min()
    }

    /// The held writes that are due.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<K> {
        let due = self.objects.iter_mut().filter(|(_, writes)| writes.is_held && writes.due() <= now);
        due.map(|(object, writes)| {
            writes.is_held = false;
            object.clone()
        })
        .collect()
    }

    fn make_room(&mut self, now: Instant) {
        self.objects.retain(|_, writes| !writes.is_quiet(now));
        if self.objects.len() >= CAPACITY {
            let mut times: Vec<Instant> = self.objects.values().map(|writes| writes.last).collect();
            times.sort_unstable();
            let median = times.get(times.len() / 2).copied().unwrap_or(now);
            self.objects.retain(|_, writes| writes.last > median);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backoff() -> WriteBackoff<&'static str> {
        WriteBackoff::new(Arc::default())
    }

    /// Writes as often as the backoff admits within `time`, looking every 100 ms.
    fn writes(backoff: &mut WriteBackoff<&'static str>, begin: Instant, time: Duration) -> usize {
        let looks = u32::try_from(time.as_millis() / 100).unwrap();
        let mut count = 0;
        for look in 0..looks {
            let now = begin + Duration::from_millis(100) * look;
            if backoff.admits(&"contended", now) {
                backoff.wrote(&"contended", now);
                count += 1;
            }
        }
        count
    }

    #[test]
    fn a_contended_object_is_written_ever_more_seldom() {
        let (mut backoff, begin) = (backoff(), Instant::now());
        assert_eq!(writes(&mut backoff, begin, Duration::from_secs(60)), 9);
        let later = writes(&mut backoff, begin + Duration::from_secs(60), Duration::from_secs(600));
        assert!((3..=6).contains(&later), "{later}");
        assert!(backoff.admits(&"other", begin), "others are not held up");
        assert!(backoff.metrics.held.load(Ordering::Relaxed) > 5);
    }

    #[test]
    fn an_object_left_alone_is_written_at_once_again() {
        let (mut backoff, begin) = (backoff(), Instant::now());
        writes(&mut backoff, begin, Duration::from_secs(60));
        let later = begin + Duration::from_secs(60) + QUIET + LONGEST;
        assert_eq!(writes(&mut backoff, later, Duration::from_millis(500)), FREE as usize);
    }

    #[test]
    fn a_held_write_comes_when_it_is_due() {
        let (mut backoff, begin) = (backoff(), Instant::now());
        for _ in 0..FREE {
            backoff.wrote(&"contended", begin);
        }
        assert_eq!(backoff.next(), None, "nothing waits");
        assert!(!backoff.admits(&"contended", begin));
        let due = backoff.next().unwrap();
        assert_eq!(due, begin + FIRST);
        assert!(backoff.take_due(begin).is_empty());
        assert_eq!(backoff.take_due(due), ["contended"]);
        assert_eq!(backoff.next(), None);
    }

    #[test]
    fn the_objects_remembered_are_bounded() {
        let mut backoff = WriteBackoff::<String>::new(Arc::default());
        let begin = Instant::now();
        for n in 0..CAPACITY * 2 {
            backoff.wrote(&n.to_string(), begin + Duration::from_millis(n as u64));
        }
        assert!(backoff.objects.len() <= CAPACITY);
    }
}
