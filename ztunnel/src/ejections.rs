//! Endpoints that could not be reached, and are left out for a while.
//!
//! A connection that meets a node that is cut off waits for its whole attempt; those that follow choose another
//! endpoint. [`Ejections`] is pure, time is an argument; [`EjectedEndpoints`] shares it between workers.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use crate::proxy::Tally;

/// The first ejection; each failure in a row doubles it.
const FIRST: Duration = Duration::from_secs(1);
/// The longest ejection.
const LONGEST: Duration = Duration::from_secs(30);
/// How long after its ejection an endpoint counts as one that failed before.
const MEMORY: Duration = Duration::from_secs(60);
/// Endpoints that are remembered; beyond it, none is ejected.
const MAX_ENDPOINTS: usize = 4096;

/// Who is ejected until when.
#[derive(Debug)]
pub struct Ejections<K> {
    failed: HashMap<K, Failed>,
}

#[derive(Debug, Clone, Copy)]
struct Failed {
    in_a_row: u32,
    until: Instant,
}

impl<K> Default for Ejections<K> {
    fn default() -> Self {
        Self { failed: HashMap::new() }
    }
}

impl<K: Eq + Hash + Clone> Ejections<K> {
    /// An endpoint could not be reached. Whether it is ejected for that: connections that were on their way when it was
    /// ejected already do not prolong it.
    pub fn handle_failure(&mut self, endpoint: &K, now: Instant) -> bool {
        if self.is_ejected(endpoint, now) {
            return false;
        }
        if self.failed.len() >= MAX_ENDPOINTS {
            self.failed.retain(|_, failed| now < failed.until + MEMORY);
            if self.failed.len() >= MAX_ENDPOINTS {
                return false;
            }
        }
        let before = self.failed.get(endpoint).filter(|failed| now < failed.until + MEMORY);
        let in_a_row = before.map_or(0, |failed| failed.in_a_row);
        let time = FIRST.saturating_mul(1 << in_a_row.min(16)).min(LONGEST);
        self.failed
            .insert(endpoint.clone(), Failed { in_a_row: in_a_row.saturating_add(1), until: now + time });
        true
    }

    /// An endpoint was reached.
    pub fn handle_success(&mut self, endpoint: &K) {
        self.failed.remove(endpoint);
    }

    /// Whether an endpoint is ejected.
    pub fn is_ejected(&self, endpoint: &K, now: Instant) -> bool {
        self.failed.get(endpoint).is_some_and(|failed| now < failed.until)
    }

    /// Endpoints that are ejected.
    pub fn count(&self, now: Instant) -> usize {
        self.failed.values().filter(|failed| now < failed.until).count()
    }
}

/// The same for all workers.
#[derive(Debug)]
pub struct EjectedEndpoints<K> {
    /// Guards the table: read a few times a connection, and only while it is not empty.
    ejections: RwLock<Ejections<K>>,
    /// Entries of the table.
    remembered: AtomicUsize,
    /// Ejections so far.
    pub ejected: Tally,
}

impl<K> Default for EjectedEndpoints<K> {
    fn default() -> Self {
        Self { ejections: RwLock::default(), remembered: AtomicUsize::new(0), ejected: Tally::default() }
    }
}

impl<K: Eq + Hash + Clone> EjectedEndpoints<K> {
    /// As [`Ejections::handle_failure`].
    pub fn failed(&self, endpoint: &K) {
        let mut ejections = self.ejections.write();
        if ejections.handle_failure(endpoint, Instant::now()) {
            self.ejected.add(1);
        }
        self.remembered.store(ejections.failed.len(), Ordering::Relaxed);
    }

    /// As [`Ejections::handle_success`].
    pub fn reached(&self, endpoint: &K) {
        if self.remembers(endpoint) {
            let mut ejections = self.ejections.write();
            ejections.handle_success(endpoint);
            self.remembered.store(ejections.failed.len(), Ordering::Relaxed);
        }
    }

    /// Whether an endpoint is ejected.
    pub fn is_ejected(&self, endpoint: &K) -> bool {
        self.remembered.load(Ordering::Relaxed) > 0
            && self.ejections.read().is_ejected(endpoint, Instant::now())
    }

    /// Endpoints that are ejected.
    pub fn count(&self) -> usize {
        self.ejections.read().count(Instant::now())
    }

    fn remembers(&self, endpoint: &K) -> bool {
        self.remembered.load(Ordering::Relaxed) > 0 && self.ejections.read().failed.contains_key(endpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn failures_in_a_row_double_the_time_up_to_a_limit() {
        let (mut ejections, mut now) = (Ejections::default(), Instant::now());
        for seconds in [1, 2, 4, 8, 16, 30, 30, 30] {
            assert!(ejections.handle_failure(&"node", now));
            assert!(!ejections.handle_failure(&"node", now), "another connection met the same failure");
            assert!(ejections.is_ejected(&"node", now + SECOND * seconds - Duration::from_millis(1)));
            now += SECOND * seconds;
            assert!(!ejections.is_ejected(&"node", now));
        }
        assert!(!ejections.is_ejected(&"other", now));
    }

    #[test]
    fn success_or_time_makes_an_endpoint_as_good_as_new() {
        let (mut ejections, start) = (Ejections::default(), Instant::now());
        ejections.handle_failure(&"a", start);
        ejections.handle_failure(&"b", start);
        ejections.handle_success(&"a");
        assert!(!ejections.is_ejected(&"a", start));
        let later = start + MEMORY + SECOND * 2;
        for endpoint in ["a", "b"] {
            ejections.handle_failure(&endpoint, later);
            assert!(!ejections.is_ejected(&endpoint, later + SECOND), "{endpoint}: the first time again");
        }
    }

    #[test]
    fn only_so_many_are_remembered_and_old_ones_make_room() {
        let (mut ejections, now) = (Ejections::default(), Instant::now());
        for endpoint in 0..MAX_ENDPOINTS {
            assert!(ejections.handle_failure(&endpoint, now));
        }
        assert!(!ejections.handle_failure(&usize::MAX, now));
        assert_eq!(ejections.count(now), MAX_ENDPOINTS);
        assert!(ejections.handle_failure(&usize::MAX, now + FIRST + MEMORY));
        assert_eq!(ejections.failed.len(), 1);
    }
}
