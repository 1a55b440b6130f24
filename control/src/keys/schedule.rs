//! When which keys are fetched. No I/O; the time is an argument.
//!
//! Whoever writes objects of one namespace cannot keep the keys of another from being fetched: each namespace has a share of
//! the key sets and of the attempts at a time, and what waits longest comes first.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::Wanted;
use crate::index::FetchedKeys;
use crate::object::KeyAddress;

/// Key sets that are fetched at the same time.
const CONCURRENT: usize = 16;
/// Of these, how many for one namespace.
const CONCURRENT_OF_NAMESPACE: usize = 2;
/// Key sets that are fetched at all; more are reported as not fetched.
const MOST: usize = 1024;
/// Of these, how many for one namespace.
const MOST_OF_NAMESPACE: usize = 64;
/// The wait after the first failure; it doubles with each.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest wait after a failure.
const LAST_RETRY: Duration = Duration::from_secs(60);
/// How long keys stay in force after they should have been refreshed: an issuer that revokes a key must be able to say so.
const LONGEST_STALE: Duration = Duration::from_hours(24);

/// The reason that is reported, whatever it is: who writes the address must not learn what answers there.
const NOT_FETCHED: &str = "they can't be fetched";
const NO_KEYS: &str = "the issuer has no key that can verify tokens";
const TOO_MANY: &str = "the namespace, or the mesh, has too many key sets to fetch";

/// Key sets by address.
#[derive(Debug)]
pub(super) struct Schedule {
    refresh: Duration,
    entries: BTreeMap<KeyAddress, Entry>,
    /// What is being fetched and for which namespace, whether it is still wanted or not.
    running: BTreeMap<KeyAddress, Arc<str>>,
    expired: u64,
}

#[derive(Debug)]
struct Entry {
    timeout: Duration,
    namespaces: BTreeSet<Arc<str>>,
    generation: u64,
    /// Whether it is within its namespace's share.
    is_admitted: bool,
    due: Instant,
    failures: u32,
    keys: Option<Bytes>,
    /// When the keys are no longer used if they are not refreshed.
    expiry: Instant,
    /// What was reported.
    reported: Option<FetchedKeys>,
}

impl Entry {
    fn new(generation: u64, now: Instant) -> Self {
        Self {
            timeout: Duration::ZERO,
            namespaces: BTreeSet::new(),
            generation,
            is_admitted: true,
            due: now,
            failures: 0,
            keys: None,
            expiry: now,
            reported: None,
        }
    }

    /// What is new since the last report.
    fn report(&mut self, problem: Option<&str>) -> Option<FetchedKeys> {
        let news = FetchedKeys { keys: self.keys.clone(), problem: problem.map(Arc::from) };
        let is_new = self.reported.as_ref() != Some(&news);
        self.reported = Some(news.clone());
        is_new.then_some(news)
    }

    fn handle_failure(&mut self, now: Instant) {
        let wait = FIRST_RETRY.saturating_mul(1 << self.failures.min(10)).min(LAST_RETRY);
        (self.failures, self.due) = (self.failures.saturating_add(1), now + wait);
    }
}

impl Schedule {
    pub(super) fn new(refresh: Duration) -> Self {
        Self { refresh, entries: BTreeMap::new(), running: BTreeMap::new(), expired: 0 }
    }

    /// Replaces what is wanted, and says what is new by it. What is new is due at once; what is not wanted any more is forgotten;
    /// what was given up and is wanted again is reported again.
    pub(super) fn set_wanted(&mut self, wanted: &Wanted, now: Instant) -> Vec<(KeyAddress, FetchedKeys)> {
        self.entries.retain(|address, _| wanted.contains_key(address));
        let admitted = admitted(wanted);
        let mut all_news = Vec::new();
        for (address, want) in wanted {
            let new = || Entry::new(want.generation, now);
            let entry = self.entries.entry(address.clone()).or_insert_with(new);
            (entry.timeout, entry.namespaces) = (want.timeout, want.namespaces.clone());
            let was_admitted = std::mem::replace(&mut entry.is_admitted, admitted.contains(address));
            let is_again = std::mem::replace(&mut entry.generation, want.generation) != want.generation;
            let lost = entry.reported.take_if(|_| is_again);
            let news = match entry.is_admitted {
                false => {
                    entry.keys = None;
                    entry.report(Some(TOO_MANY))
                }
                true if !was_admitted => {
                    (entry.failures, entry.due) = (0, now);
                    None
                }
                true => lost.and_then(|lost| entry.report(lost.problem.as_deref())),
            };
            all_news.extend(news.map(|news| (address.clone(), news)));
        }
        all_news
    }

    /// What is to be fetched now, with the time that it may take.
    pub(super) fn poll_due(&mut self, now: Instant) -> Vec<(KeyAddress, Duration)> {
        let is_due = |(address, entry): &(&KeyAddress, &Entry)| {
            entry.is_admitted && entry.due <= now && !self.running.contains_key(*address)
        };
        let due = self.entries.iter().filter(is_due).map(|(address, entry)| (entry.due, address));
        let mut due: Vec<(Instant, &KeyAddress)> = due.collect();
        due.sort();
        let mut started = Vec::new();
        for (_, address) in due {
            let Some(entry) = self.entries.get(address) else { continue };
            if let Some(namespace) = free_namespace(&self.running, entry) {
                self.running.insert(address.clone(), namespace);
                started.push((address.clone(), entry.timeout));
            }
        }
        started
    }

    /// When something is due next that may be fetched then; `None` while nothing may.
    pub(super) fn next(&self) -> Option<Instant> {
        let may_start = |(address, entry): &(&KeyAddress, &Entry)| {
            entry.is_admitted
                && !self.running.contains_key(*address)
                && free_namespace(&self.running, entry).is_some()
        };
        self.entries.iter().filter(may_start).map(|(_, entry)| entry.due).min()
    }

    /// Takes what was fetched, `None` being a key set without usable keys, and says what is new by it.
    pub(super) fn handle_fetched(
        &mut self,
        address: &KeyAddress,
        fetched: Result<Option<Bytes>, ()>,
        now: Instant,
    ) -> Option<FetchedKeys> {
        self.running.remove(address);
        // It may not be wanted any more.
        let entry = self.entries.get_mut(address).filter(|entry| entry.is_admitted)?;
        match fetched {
            Ok(Some(keys)) => {
                (entry.failures, entry.due) = (0, now + self.refresh);
                (entry.keys, entry.expiry) = (Some(keys), entry.due + LONGEST_STALE);
                entry.report(None)
            }
            // The issuer has revoked them all.
            Ok(None) => {
                entry.handle_failure(now);
                entry.keys = None;
                entry.report(Some(NO_KEYS))
            }
            Err(()) => {
                entry.handle_failure(now);
                if entry.keys.take_if(|_| entry.expiry <= now).is_some() {
                    self.expired = self.expired.saturating_add(1);
                }
                entry.report(Some(NOT_FETCHED))
            }
        }
    }

    /// How many key sets are not known, and how many could not be refreshed.
    pub(super) fn problems(&self) -> (u64, u64) {
        let count = |is: fn(&Entry) -> bool| self.entries.values().filter(|entry| is(entry)).count() as u64;
        (count(|entry| entry.keys.is_none()), count(|entry| entry.keys.is_some() && entry.failures > 0))
    }

    /// How many key sets were dropped as they could not be refreshed for too long.
    pub(super) fn expired(&self) -> u64 {
        self.expired
    }
}

/// The namespace whose turn an attempt takes: of those that want the keys, the one with the fewest attempts, if it may have
/// another.
fn free_namespace(running: &BTreeMap<KeyAddress, Arc<str>>, entry: &Entry) -> Option<Arc<str>> {
    if running.len() >= CONCURRENT {
        return None;
    }
    let attempts = |namespace: &Arc<str>| running.values().filter(|other| *other == namespace).count();
    let least = entry.namespaces.iter().min_by_key(|namespace| attempts(namespace))?;
    (attempts(least) < CONCURRENT_OF_NAMESPACE).then(|| least.clone())
}

/// The key sets that are fetched: the first of each namespace in the order of their addresses, and if these are too many, from
/// every namespace equally many. One that several namespaces want counts for each, and one of them is enough.
fn admitted(wanted: &Wanted) -> BTreeSet<&KeyAddress> {
    let mut counts: BTreeMap<&Arc<str>, usize> = BTreeMap::new();
    let mut ranked: Vec<(usize, &KeyAddress)> = Vec::new();
    for (address, want) in wanted {
        let ranks = want.namespaces.iter().map(|namespace| {
            let count = counts.entry(namespace).or_default();
            *count += 1;
            *count
        });
        // Each is counted, not only up to the least.
        let rank = ranks.collect::<BTreeSet<_>>().into_iter().next();
        ranked.extend(rank.filter(|rank| *rank <= MOST_OF_NAMESPACE).map(|rank| (rank, address)));
    }
    ranked.sort_unstable();
    ranked.truncate(MOST);
    ranked.into_iter().map(|(_, address)| address).collect()
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
