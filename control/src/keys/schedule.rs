//! When which keys are fetched. No I/O; the time is an argument.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Wanted;
use crate::index::FetchedKeys;
use crate::object::KeyAddress;

/// Key sets that are fetched at the same time.
const CONCURRENT: usize = 8;
/// Key sets that are fetched at all; more are reported as not fetched.
const MOST: usize = 1024;
/// The wait after the first failure; it doubles with each.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest wait after a failure.
const LAST_RETRY: Duration = Duration::from_secs(60);

/// Key sets by address.
#[derive(Debug)]
pub(super) struct Schedule {
    refresh: Duration,
    entries: BTreeMap<KeyAddress, Entry>,
}

#[derive(Debug)]
struct Entry {
    timeout: Duration,
    /// `None` while it is being fetched.
    due: Option<Instant>,
    failures: u32,
    keys: Option<Bytes>,
    /// What was reported.
    reported: Option<FetchedKeys>,
}

impl Schedule {
    pub(super) fn new(refresh: Duration) -> Self {
        Self { refresh, entries: BTreeMap::new() }
    }

    /// Replaces what is wanted. What is new is due at once; what is not wanted any more is forgotten.
    pub(super) fn set_wanted(&mut self, wanted: &Wanted, now: Instant) {
        self.entries.retain(|address, _| wanted.contains_key(address));
        for (address, timeout) in wanted.iter().take(MOST) {
            let new = || Entry { timeout: *timeout, due: Some(now), failures: 0, keys: None, reported: None };
            self.entries.entry(address.clone()).or_insert_with(new).timeout = *timeout;
        }
    }

    /// What is to be fetched now, with the time that it may take.
    pub(super) fn poll_due(&mut self, now: Instant) -> Vec<(KeyAddress, Duration)> {
        let free = CONCURRENT.saturating_sub(self.fetching());
        let is_due = |entry: &Entry| entry.due.is_some_and(|due| due <= now);
        let due = self.entries.iter_mut().filter(|(_, entry)| is_due(entry)).take(free);
        due.map(|(address, entry)| {
            entry.due = None;
            (address.clone(), entry.timeout)
        })
        .collect()
    }

    /// When something is due next; `None` while as much as may be is being fetched.
    pub(super) fn next(&self) -> Option<Instant> {
        let earliest = self.entries.values().filter_map(|entry| entry.due).min();
        earliest.filter(|_| self.fetching() < CONCURRENT)
    }

    /// Takes what was fetched, and says what is new by it.
    pub(super) fn handle_fetched(
        &mut self,
        address: &KeyAddress,
        fetched: Result<Bytes, String>,
        now: Instant,
    ) -> Option<FetchedKeys> {
        // It may not be wanted any more.
        let entry = self.entries.get_mut(address)?;
        let problem = match fetched {
            Ok(keys) => {
                (entry.failures, entry.due) = (0, Some(now + self.refresh));
                entry.keys = Some(keys);
                None
            }
            Err(problem) => {
                let wait = FIRST_RETRY.saturating_mul(1 << entry.failures.min(10)).min(LAST_RETRY);
                (entry.failures, entry.due) = (entry.failures.saturating_add(1), Some(now + wait));
                Some(Arc::from(problem))
            }
        };
        let news = FetchedKeys { keys: entry.keys.clone(), problem };
        let is_new = entry.reported.as_ref() != Some(&news);
        entry.reported = Some(news.clone());
        is_new.then_some(news)
    }

    /// How many key sets are not known, and how many could not be refreshed.
    pub(super) fn problems(&self) -> (u64, u64) {
        let count = |is: fn(&Entry) -> bool| self.entries.values().filter(|entry| is(entry)).count() as u64;
        (count(|entry| entry.keys.is_none()), count(|entry| entry.keys.is_some() && entry.failures > 0))
    }

    fn fetching(&self) -> usize {
        self.entries.values().filter(|entry| entry.due.is_none()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFRESH: Duration = Duration::from_secs(1200);

    fn address(name: &str) -> KeyAddress {
        KeyAddress::Uri(name.into())
    }

    fn wanting(names: &[&str], now: Instant) -> Schedule {
        let mut schedule = Schedule::new(REFRESH);
        let wanted = names.iter().map(|name| (address(name), Duration::from_secs(5))).collect();
        schedule.set_wanted(&wanted, now);
        schedule
    }

    #[test]
    fn keys_are_refreshed_and_kept_while_that_fails() {
        let now = Instant::now();
        let mut schedule = wanting(&["a"], now);
        assert_eq!(schedule.poll_due(now), [(address("a"), Duration::from_secs(5))]);
        assert_eq!(schedule.poll_due(now), [], "it is being fetched");
        let keys = Bytes::from_static(b"keys");
        let good = FetchedKeys { keys: Some(keys.clone()), problem: None };
        assert_eq!(schedule.handle_fetched(&address("a"), Ok(keys.clone()), now), Some(good.clone()));
        assert_eq!(schedule.next(), Some(now + REFRESH));

        let later = now + REFRESH;
        assert_eq!(schedule.poll_due(later).len(), 1);
        assert_eq!(
            schedule.handle_fetched(&address("a"), Ok(keys.clone()), later),
            None,
            "they did not change"
        );

        let later = later + REFRESH;
        assert_eq!(schedule.poll_due(later).len(), 1);
        let stale = FetchedKeys { keys: Some(keys.clone()), problem: Some("gone".into()) };
        assert_eq!(schedule.handle_fetched(&address("a"), Err("gone".to_owned()), later), Some(stale));
        assert_eq!(schedule.problems(), (0, 1));
        assert_eq!(schedule.next(), Some(later + FIRST_RETRY));
        let later = later + FIRST_RETRY;
        assert_eq!(schedule.poll_due(later).len(), 1);
        assert_eq!(schedule.handle_fetched(&address("a"), Ok(keys), later), Some(good));
        assert_eq!(schedule.problems(), (0, 0));
    }

    #[test]
    fn failures_wait_longer_each_time() {
        let mut now = Instant::now();
        let mut schedule = wanting(&["a"], now);
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(schedule.poll_due(now).len(), 1);
            schedule.handle_fetched(&address("a"), Err("no".to_owned()), now);
            assert_eq!(schedule.next(), Some(now + Duration::from_secs(seconds)));
            now += Duration::from_secs(seconds);
        }
        assert_eq!(schedule.problems(), (1, 0));
    }

    #[test]
    fn only_so_many_are_fetched_at_once() {
        let now = Instant::now();
        let names: Vec<String> = (0..CONCURRENT + 1).map(|number| format!("{number:02}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut schedule = wanting(&names, now);
        assert_eq!(schedule.poll_due(now).len(), CONCURRENT);
        assert_eq!((schedule.poll_due(now).len(), schedule.next()), (0, None));
        schedule.handle_fetched(&address("03"), Ok(Bytes::new()), now);
        assert_eq!(schedule.poll_due(now).len(), 1);
    }

    #[test]
    fn what_is_not_wanted_any_more_is_forgotten() {
        let now = Instant::now();
        let mut schedule = wanting(&["a"], now);
        assert_eq!(schedule.poll_due(now).len(), 1);
        schedule.set_wanted(&Wanted::new(), now);
        assert_eq!(schedule.handle_fetched(&address("a"), Ok(Bytes::new()), now), None);
        assert_eq!(schedule.next(), None);
    }
}
