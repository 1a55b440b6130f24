//! The server's half of the delta protocol for one type of one stream, without I/O.
//!
//! A wildcard subscriber is a pair of positions in the change log; only resources that differ after a reconnect are
//! listed, by position. An on-demand subscriber also holds the names it asked for and was sent.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use ambit_api::discovery::DeltaDiscoveryRequest;

use super::answer::{Answer, Builder};
use super::shared::{Cursor, SharedAnswers, Turn};
use super::state::{Entry, Position, State};
use crate::WILDCARD;
use crate::batch_mark::BatchMark;

/// Removals that this subscriber needs have been forgotten; it must reconnect with its versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lagged;

/// The subscriber asked for more names than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooManyNames;

#[derive(Debug)]
pub(crate) struct Subscription {
    wildcard: bool,
    /// What the subscriber gets everything below of, and nothing else.
    root: Option<Arc<str>>,
    /// Names asked for one by one.
    names: HashSet<String>,
    cursor: Cursor,
    /// Names to be reported as not there, before anything else.
    owed_removals: BTreeSet<String>,
    /// Resources to be sent although the cursor has passed them; those that changed since are skipped,
    /// as the log brings them again.
    owed: BTreeSet<Position>,
    /// On demand only: what the subscriber holds.
    sent: HashSet<Arc<str>>,
    /// The first answer is due, even if it is empty.
    open: bool,
    nonces: u64,
}

impl Subscription {
    /// Opens a type with the stream's first request for it. With a `root`, what the request subscribes does not count.
    pub(crate) fn open(
        request: &DeltaDiscoveryRequest,
        root: Option<&Arc<str>>,
        state: &State,
        max_names: usize,
    ) -> Result<Self, TooManyNames> {
        let subscribe = &request.resource_names_subscribe;
        let unsubscribe = &request.resource_names_unsubscribe;
        let known = &request.initial_resource_versions;
        // xDS "how the client specifies what resources to return": an empty first request is a wildcard.
        let asks_all = subscribe.is_empty() || subscribe.iter().any(|name| name == WILDCARD);
        let wildcard = root.is_none() && asks_all && unsubscribe.iter().all(|name| name != WILDCARD);
        let given_up: HashSet<&str> = unsubscribe.iter().map(String::as_str).collect();
        let mut names: HashSet<String> = subscribe
            .iter()
            .filter(|name| root.is_none() && *name != WILDCARD && !given_up.contains(name.as_str()))
            .cloned()
            .collect();
        // istio's ztunnel repeats names of earlier streams only in the list of its versions.
        if root.is_none() && !wildcard && names.is_empty() {
            names.extend(known.keys().cloned());
        }
        let head = state.head();
        let mut opened = Self {
            wildcard,
            root: root.cloned(),
            names,
            cursor: Cursor { removed: head, live: head },
            owed_removals: BTreeSet::new(),
            owed: BTreeSet::new(),
            sent: HashSet::new(),
            open: true,
            nonces: 0,
        };
        if opened.names.len() > max_names {
            return Err(TooManyNames);
        }
        if wildcard && known.is_empty() {
            opened.cursor.live = 0;
        } else if wildcard {
            opened.owe_difference(state.entries(), known);
        } else {
            let covered = opened.covered(state);
            opened.owe_difference(covered.into_iter(), known);
        }
        let stale: Vec<_> = known.keys().filter(|name| !opened.holds(name, state)).cloned().collect();
        opened.owed_removals.extend(stale);
        for name in &opened.names {
            if !known.contains_key(name) && state.named(name).next().is_none() {
                opened.owed_removals.insert(name.clone());
            }
        }
        Ok(opened)
    }

    /// Adds every entry whose version the subscriber does not hold to `owed`.
    fn owe_difference<'a>(
        &mut self,
        entries: impl Iterator<Item = &'a Arc<Entry>>,
        known: &BTreeMap<String, String>,
    ) {
        for entry in entries {
            let same = known.get(&*entry.name).is_some_and(|version| **version == *entry.version);
            if !same {
                self.owed.insert(entry.position);
            } else if !self.wildcard {
                self.sent.insert(Arc::clone(&entry.name));
            }
        }
    }

    /// Whether a resource that the subscriber names is there and covered.
    fn holds(&self, name: &str, state: &State) -> bool {
        state.get(name).is_some_and(|entry| self.wildcard || self.covers(entry, state))
    }

    /// A later request for the same type: changes what is subscribed. Acks change nothing.
    pub(crate) fn handle_request(
        &mut self,
        request: &DeltaDiscoveryRequest,
        state: &State,
        max_names: usize,
    ) -> Result<(), TooManyNames> {
        if self.root.is_some() {
            return Ok(());
        }
        let subscribe = &request.resource_names_subscribe;
        let unsubscribe = &request.resource_names_unsubscribe;
        // Both at once is on demand, as in the first request.
        let drops_all = unsubscribe.iter().any(|name| name == WILDCARD);
        for name in subscribe.iter().filter(|name| !(drops_all && *name == WILDCARD)) {
            self.subscribe(name, state);
        }
        if self.names.len() > max_names {
            return Err(TooManyNames);
        }
        if !unsubscribe.is_empty() {
            self.unsubscribe(unsubscribe, state);
        }
        Ok(())
    }

    fn subscribe(&mut self, name: &str, state: &State) {
        if name == WILDCARD {
            if !self.wildcard {
                self.wildcard = true;
                self.sent = HashSet::new();
                self.owed.clear();
                self.cursor.live = 0;
                self.open = true;
            }
            return;
        }
        // A name that is requested again is answered again.
        self.names.insert(name.to_owned());
        let found = state.with_members(state.named(name));
        if found.is_empty() {
            self.owed_removals.insert(name.to_owned());
        }
        self.owed.extend(found.iter().map(|entry| entry.position));
    }

    fn unsubscribe(&mut self, names: &[String], state: &State) {
        for name in names {
            self.names.remove(name);
        }
        if self.wildcard && names.iter().any(|name| name == WILDCARD) {
            self.wildcard = false;
            let head = state.head();
            self.cursor = Cursor { removed: head, live: head };
            self.owed = self.covered(state).iter().map(|entry| entry.position).collect();
        } else if !self.wildcard {
            let sent = std::mem::take(&mut self.sent);
            self.sent = sent.into_iter().filter(|name| self.holds(name, state)).collect();
            let kept =
                self.owed.iter().copied().filter(|position| {
                    state.live_at(*position).is_some_and(|entry| self.covers(entry, state))
                });
            self.owed = kept.collect();
        }
    }

    /// Every entry that the names stand for.
    fn covered<'a>(&self, state: &'a State) -> Vec<&'a Arc<Entry>> {
        let below = self.root.iter().flat_map(|root| state.members(root));
        state.with_members(self.names.iter().flat_map(|name| state.named(name)).chain(below))
    }

    /// Whether an entry is subscribed by a name of its own or of a resource above it.
    fn covers(&self, entry: &Entry, state: &State) -> bool {
        state.is_within(entry, self.root.as_deref(), &|name| self.names.contains(name))
    }

    /// Whether the subscriber has not been sent anything yet.
    pub(crate) fn is_opening(&self) -> bool {
        self.open
    }

    /// Whether an answer is due; [`catch_up`](Self::catch_up) comes first.
    pub(crate) fn is_behind(&self, state: &State) -> bool {
        self.open || self.owes(state)
    }

    fn owes(&self, state: &State) -> bool {
        !self.owed.is_empty() || self.owes_removals(state) || self.has_news(state)
    }

    fn owes_removals(&self, state: &State) -> bool {
        !self.owed_removals.is_empty()
            || (self.wildcard && state.removed_after(self.cursor.removed).next().is_some())
    }

    fn has_news(&self, state: &State) -> bool {
        self.wildcard && state.changed_after(self.cursor.live).next().is_some()
    }

    /// Processes new log entries; `Err` if the subscriber cannot be brought up to date.
    pub(crate) fn catch_up(&mut self, state: &State) -> Result<(), Lagged> {
        if self.cursor.removed < state.horizon() {
            return Err(Lagged);
        }
        if !self.wildcard {
            self.look_through(state);
        }
        Ok(())
    }

    /// The next answer, if anything is due; [`catch_up`](Self::catch_up) comes first. `index` is the number of the type.
    pub(crate) fn poll_answer(
        &mut self,
        shared: &SharedAnswers,
        (index, state): (usize, &State),
        turn: Turn,
    ) -> Option<Answer> {
        let owes = !self.owed.is_empty() || !self.owed_removals.is_empty();
        if owes && let Some(answer) = self.pay(state, turn) {
            self.open = false;
            return Some(answer);
        }
        if self.wildcard {
            if let Some(step) = shared.step(index, state, self.cursor, turn) {
                self.cursor = step.to;
                self.open = false;
                return Some(step.answer);
            }
            self.cursor.live = state.head();
        }
        if turn.hold_removals && self.owes_removals(state) {
            return None;
        }
        self.cursor.removed = state.head();
        std::mem::take(&mut self.open).then(|| self.empty_answer(state, turn))
    }

    /// An answer without resources: the first one of an empty state, or the end of a batch.
    pub(crate) fn empty_answer(&mut self, state: &State, turn: Turn) -> Answer {
        let mark = BatchMark { number: turn.batch, more: turn.more_elsewhere };
        Builder::new(turn.limit, &state.type_url).finish(&self.nonce(), mark)
    }

    /// On demand: adds new log entries that are subscribed to `owed`.
    fn look_through(&mut self, state: &State) {
        for (_, name) in state.removed_after(self.cursor.removed) {
            if self.sent.remove(name) {
                self.owed_removals.insert(name.to_string());
            }
            if self.root.is_some() {
                for member in state.members(name) {
                    self.leave(member, state);
                }
            }
        }
        for (position, entry) in state.live_after(self.cursor.live) {
            let covered = self.covers(entry, state);
            let is_held = self.sent.contains(&entry.name);
            if self.root.is_some() && !covered {
                self.leave(entry, state);
                continue;
            }
            if (covered || is_held) && !(is_held && entry.changed <= self.cursor.live) {
                self.owed.insert(position);
            }
            if covered {
                let members = state.with_members(std::iter::once(entry));
                let missing = members.into_iter().filter(|member| !self.sent.contains(&member.name));
                self.owed.extend(missing.map(|member| member.position));
            }
        }
        self.cursor = Cursor { removed: state.head(), live: state.head() };
    }

    /// An entry is below the root no longer: it goes, and with it what it alone brought along.
    fn leave(&mut self, entry: &Arc<Entry>, state: &State) {
        for member in state.with_members(std::iter::once(entry)) {
            if !self.covers(member, state) && self.sent.remove(&member.name) {
                self.owed_removals.insert(member.name.to_string());
            }
        }
    }

    /// An answer with the owed resources; removals first.
    fn pay(&mut self, state: &State, turn: Turn) -> Option<Answer> {
        let mut builder = Builder::new(turn.limit, &state.type_url);
        if turn.hold_removals || self.pay_removals(&mut builder, state) {
            while let Some(position) = self.owed.first().copied() {
                if let Some(entry) = state.live_at(position) {
                    if !builder.resource(&entry.field) {
                        break;
                    }
                    if !self.wildcard {
                        self.sent.insert(Arc::clone(&entry.name));
                    }
                }
                self.owed.pop_first();
            }
        }
        if builder.is_empty() {
            return None;
        }
        let mark = BatchMark { number: turn.batch, more: turn.more_elsewhere || self.owes(state) };
        Some(builder.finish(&self.nonce(), mark))
    }

    /// Adds the removals that are due; false if the answer is full before all are in.
    fn pay_removals(&mut self, builder: &mut Builder, state: &State) -> bool {
        while let Some(name) = self.owed_removals.first() {
            // A resource that exists (again) by now is sent, and must not be removed after that.
            let there = state.named(name).any(|entry| self.wildcard || self.covers(entry, state));
            if !there && !builder.remove(name) {
                return false;
            }
            self.owed_removals.pop_first();
        }
        if self.wildcard {
            for (position, name) in state.removed_after(self.cursor.removed) {
                if !builder.remove(name) {
                    return false;
                }
                self.cursor.removed = position;
            }
        }
        true
    }

    /// Nonces of answers made for this subscriber alone; shared answers are named by positions.
    fn nonce(&mut self) -> String {
        self.nonces += 1;
        format!("own-{}", self.nonces)
    }
}
