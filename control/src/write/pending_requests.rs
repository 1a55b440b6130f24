//! PodCertificateRequests that have no answer yet: which is looked at next, and when all must be listed again. No I/O.
//!
//! Their number is bounded. One that finds no room is not lost: [`PendingRequests::list_due`] says when the signer lists
//! all requests again. Requests that were put off give way to new ones, so that they keep nobody from an answer.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kube::api::DynamicObject;
use kube::runtime::watcher::Event;
use tokio::time::Instant;

use super::pod_request::Request;
use crate::api_server::Backoff;
use crate::object::NamespacedName;
use crate::write::trust_bundle::SIGNER;

/// How long a request that found no room waits at most before all are listed again.
const LIST_AFTER: Duration = Duration::from_secs(30);

/// Requests without an answer.
#[derive(Debug)]
pub(super) struct PendingRequests {
    capacity: usize,
    waiting: BTreeMap<NamespacedName, Waiting>,
    /// The same by the time of their next turn.
    turns: BTreeSet<(Instant, NamespacedName)>,
    /// Since when there is a request that found no room.
    missed: Option<Instant>,
    is_listing: bool,
}

#[derive(Debug)]
struct Waiting {
    request: Request,
    at: Instant,
    backoff: Backoff,
    /// Whether the list that is being read has it.
    is_listed: bool,
}

impl PendingRequests {
    /// None yet, and at most `capacity`.
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, waiting: BTreeMap::new(), turns: BTreeSet::new(), missed: None, is_listing: false }
    }

    /// Takes an event: a request without an answer waits, everything else does not.
    pub(super) fn handle_event(&mut self, event: Event<DynamicObject>, now: Instant) {
        match event {
            Event::Init => {
                // Those that are known keep their turns.
                self.waiting.values_mut().for_each(|waiting| waiting.is_listed = false);
                (self.is_listing, self.missed) = (true, None);
            }
            Event::InitDone => {
                self.is_listing = false;
                let gone = self.waiting.iter().filter(|(_, waiting)| !waiting.is_listed);
                let gone: Vec<NamespacedName> = gone.map(|(name, _)| name.clone()).collect();
                gone.iter().for_each(|name| self.remove(name));
            }
            Event::InitApply(object) | Event::Apply(object) => {
                let Some((name, request)) = Request::read(object) else { return };
                if request.is_answered || request.signer != SIGNER {
                    self.remove(&name);
                } else {
                    self.add(name, request, now);
                }
            }
            Event::Delete(object) => {
                if let Some((name, _)) = Request::read(object) {
                    self.remove(&name);
                }
            }
        }
    }

    fn add(&mut self, name: NamespacedName, request: Request, now: Instant) {
        if let Some(known) = self.waiting.get_mut(&name).filter(|known| known.request.uid == request.uid) {
            (known.request, known.is_listed) = (request, true);
            return;
        }
        self.remove(&name);
        if self.waiting.len() >= self.capacity {
            if self.missed.is_none() {
                tracing::warn!(
                    most = self.capacity,
                    "too many PodCertificateRequests wait; they are listed again soon"
                );
            }
            self.missed.get_or_insert(now);
            let last = self.turns.last().filter(|(at, _)| *at > now).map(|(_, name)| name.clone());
            let Some(last) = last else { return };
            self.remove(&last);
        }
        self.turns.insert((now, name.clone()));
        let waiting = Waiting { request, at: now, backoff: Backoff::default(), is_listed: true };
        self.waiting.insert(name, waiting);
    }

    /// Forgets a request: it has an answer, or will never have one.
    pub(super) fn remove(&mut self, name: &NamespacedName) {
        if let Some(waiting) = self.waiting.remove(name) {
            self.turns.remove(&(waiting.at, name.clone()));
        }
    }

    /// Puts a request off, each time for longer.
    pub(super) fn put_off(&mut self, name: &NamespacedName, now: Instant) {
        let Some(waiting) = self.waiting.get_mut(name) else { return };
        self.turns.remove(&(waiting.at, name.clone()));
        waiting.at = now + waiting.backoff.pause();
        self.turns.insert((waiting.at, name.clone()));
    }

    /// When the next request is to be looked at.
    pub(super) fn next_turn(&self) -> Option<Instant> {
        self.turns.first().map(|(at, _)| *at)
    }

    /// The requests whose turn has come, at most `most`.
    pub(super) fn due(&self, now: Instant, most: usize) -> Vec<(NamespacedName, Request)> {
        let due = self.turns.iter().take_while(|(at, _)| *at <= now).take(most);
        due.filter_map(|(_, name)| Some((name.clone(), self.waiting.get(name)?.request.clone()))).collect()
    }

    /// When all requests must be listed again, since one found no room: once half of the room is free, and at the latest
    /// after [`LIST_AFTER`].
    pub(super) fn list_due(&self) -> Option<Instant> {
        let since = self.missed.filter(|_| !self.is_listing)?;
        Some(if self.waiting.len() <= self.capacity / 2 { since } else { since + LIST_AFTER })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request(name: &str) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "certificates.k8s.io/v1", "kind": "PodCertificateRequest",
            "metadata": { "name": name, "namespace": "shop", "uid": name },
            "spec": { "signerName": SIGNER, "podName": "p" },
        }))
        .unwrap()
    }

    fn names(pending: &PendingRequests, now: Instant) -> Vec<String> {
        pending.due(now, 100).into_iter().map(|(name, _)| name.name.to_string()).collect()
    }

    fn name(name: &str) -> NamespacedName {
        NamespacedName::new("shop", name)
    }

    #[test]
    fn what_finds_no_room_is_listed_again_once_there_is_room() {
        let (mut pending, now) = (PendingRequests::new(4), Instant::now());
        for number in 0..6 {
            pending.handle_event(Event::Apply(request(&number.to_string())), now);
        }
        assert_eq!(names(&pending, now), ["0", "1", "2", "3"]);
        assert_eq!(pending.list_due(), Some(now + LIST_AFTER));
        for answered in ["0", "1"] {
            pending.remove(&name(answered));
        }
        assert_eq!(pending.list_due(), Some(now));
        pending.handle_event(Event::Init, now);
        assert_eq!(pending.list_due(), None, "not while it is listed");
        for number in 2..6 {
            pending.handle_event(Event::InitApply(request(&number.to_string())), now);
        }
        pending.handle_event(Event::InitDone, now);
        assert_eq!(names(&pending, now), ["2", "3", "4", "5"]);
        assert_eq!(pending.list_due(), None);
    }

    #[test]
    fn requests_that_must_wait_keep_no_other_from_an_answer() {
        let (mut pending, now) = (PendingRequests::new(2), Instant::now());
        for stuck in ["a", "b"] {
            pending.handle_event(Event::Apply(request(stuck)), now);
            pending.put_off(&name(stuck), now);
        }
        pending.handle_event(Event::Apply(request("c")), now);
        assert_eq!(names(&pending, now), ["c"]);
        // A list does not bring their turns forward.
        pending.handle_event(Event::Init, now);
        for listed in ["a", "b", "c", "d"] {
            pending.handle_event(Event::InitApply(request(listed)), now);
        }
        pending.handle_event(Event::InitDone, now);
        assert!(names(&pending, now).contains(&"c".to_owned()), "{pending:?}");
        assert!(pending.list_due().is_some());
    }

    #[test]
    fn requests_that_a_list_no_longer_has_are_forgotten() {
        let (mut pending, now) = (PendingRequests::new(4), Instant::now());
        pending.handle_event(Event::Apply(request("gone")), now);
        pending.handle_event(Event::Apply(request("kept")), now);
        pending.put_off(&name("kept"), now);
        pending.handle_event(Event::Init, now);
        pending.handle_event(Event::InitApply(request("kept")), now);
        pending.handle_event(Event::InitDone, now);
        assert_eq!(names(&pending, now), Vec::<String>::new(), "put off still");
        assert_eq!(names(&pending, now + LIST_AFTER), ["kept"]);
        let mut answered = request("kept");
        answered.data["status"] = json!({ "conditions": [{ "type": "Issued", "status": "True" }] });
        pending.handle_event(Event::Apply(answered), now);
        assert_eq!(pending.next_turn(), None);
    }
}
