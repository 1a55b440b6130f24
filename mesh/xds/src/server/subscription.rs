//! The server's half of the delta protocol for one type of one stream, without I/O.
//!
//! A wildcard subscriber is a pair of positions in the change log; only what a reconnect owes it is
//! listed, by position. An on-demand subscriber also holds the names it asked for and was sent.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::sync::Arc;

use ambit_api::discovery::DeltaDiscoveryRequest;

use super::answer::{Answer, Builder};
use super::state::{Entry, Position, State};
use super::table::{Cursor, Inner};
use crate::WILDCARD;

/// Removals that this subscriber needs have been forgotten; it must reconnect with its versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lagged;

/// The subscriber asked for more names than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooManyNames;

#[derive(Debug)]
pub(crate) struct Subscription {
    wildcard: bool,
    /// Names asked for one by one.
    names: HashSet<String>,
    cursor: Cursor,
    /// Names to be reported as not there, before anything else.
    owed_removals: VecDeque<String>,
    /// Resources to be sent although the cursor has passed them; those that changed since are skipped,
    /// as the log brings them again.
    owed: BTreeSet<Position>,
    /// On demand only: what the subscriber holds.
    sent: HashSet<Arc<str>>,
    /// An answer is due even if it is empty: the first, and one that ends what was said to go on.
    open: bool,
    nonces: u64,
}

impl Subscription {
    /// Opens a type with the stream's first request for it.
    pub(crate) fn open(
        request: &DeltaDiscoveryRequest,
        state: &State,
        max_names: usize,
    ) -> Result<Self, TooManyNames> {
        let subscribe = &request.resource_names_subscribe;
        let unsubscribes_all = request.resource_names_unsubscribe.iter().any(|name| name == WILDCARD);
        // xDS "how the client specifies what resources to return": an empty first request is a wildcard.
        let wildcard =
            (subscribe.is_empty() && !unsubscribes_all) || subscribe.iter().any(|name| name == WILDCARD);
        let head = state.head();
        let mut opened = Self {
            wildcard,
            names: subscribe.iter().filter(|name| *name != WILDCARD).cloned().collect(),
            cursor: Cursor { removed: head, live: head },
            owed_removals: VecDeque::new(),
            owed: BTreeSet::new(),
            sent: HashSet::new(),
            open: true,
            nonces: 0,
        };
        if opened.names.len() > max_names {
            return Err(TooManyNames);
        }
        let known = &request.initial_resource_versions;
        if wildcard && known.is_empty() {
            opened.cursor.live = 0;
        } else if wildcard {
            opened.owe_difference(state.entries(), known);
        } else {
            let covered = opened.covered(state);
            opened.owe_difference(covered.iter(), known);
        }
        let stale: Vec<_> = known.keys().filter(|name| !opened.holds(name, state)).cloned().collect();
        opened.owed_removals.extend(stale);
        for name in &opened.names {
            if !known.contains_key(name) && state.named(name).next().is_none() {
                opened.owed_removals.push_back(name.clone());
            }
        }
        Ok(opened)
    }

    /// Owes every entry whose version the subscriber does not hold.
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
        for name in &request.resource_names_subscribe {
            self.subscribe(name, state);
        }
        if self.names.len() > max_names {
            return Err(TooManyNames);
        }
        if !request.resource_names_unsubscribe.is_empty() {
            self.unsubscribe(&request.resource_names_unsubscribe, state);
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
        // A name that is asked for again is answered again.
        self.names.insert(name.to_owned());
        let mut found = false;
        for entry in with_members(state.named(name), state) {
            found = true;
            self.owed.insert(entry.position);
        }
        if !found {
            self.owed_removals.push_back(name.to_owned());
        }
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
    fn covered(&self, state: &State) -> Vec<Arc<Entry>> {
        let named = self.names.iter().flat_map(|name| state.named(name));
        with_members(named, state).cloned().collect()
    }

    /// Whether an entry is subscribed by a name of its own or through a parent.
    fn covers(&self, entry: &Entry, state: &State) -> bool {
        let asked = |name: &Arc<str>| self.names.contains(&**name);
        let brings = |parent: &Arc<str>| state.get(parent).is_some_and(|parent| parent.names().any(asked));
        entry.names().any(asked) || entry.parents.iter().any(brings)
    }

    /// Whether an answer is due, as far as can be told without making it.
    pub(crate) fn is_behind(&self, state: &State) -> bool {
        let Cursor { removed, live } = self.cursor;
        let owes = !self.owed.is_empty() || !self.owed_removals.is_empty();
        owes || self.open || live < state.head() || removed < state.head()
    }

    /// The next answer, if anything is due; `Err` if the subscriber cannot be brought up to date.
    /// `hold_removals` keeps back what is gone, for as long as another type may still refer to it.
    pub(crate) fn poll_answer(
        &mut self,
        table: &Inner,
        state: &State,
        hold_removals: bool,
    ) -> Result<Option<Answer>, Lagged> {
        if self.cursor.removed < state.horizon() {
            return Err(Lagged);
        }
        if !self.wildcard {
            self.look_through(state);
        }
        let owes = !self.owed.is_empty() || !self.owed_removals.is_empty();
        if owes && let Some(answer) = self.pay(table, state, hold_removals) {
            return Ok(Some(answer));
        }
        if self.wildcard {
            if let Some(step) = table.step(self.cursor, state, hold_removals) {
                self.cursor = step.to;
                self.open = step.more;
                return Ok(Some(step.answer));
            }
            self.cursor.live = state.head();
        }
        if hold_removals && self.owes_removals(state) {
            return Ok(None);
        }
        self.cursor.removed = state.head();
        if std::mem::take(&mut self.open) {
            let builder = Builder::new(table.config.answer_limit, &state.type_url);
            return Ok(Some(builder.finish(&self.nonce(), state.head(), false)));
        }
        Ok(None)
    }

    fn owes_removals(&self, state: &State) -> bool {
        !self.owed_removals.is_empty() || state.removed_after(self.cursor.removed).next().is_some()
    }

    /// On demand: turns what the log gained into what is owed.
    fn look_through(&mut self, state: &State) {
        for (_, name) in state.removed_after(self.cursor.removed) {
            if self.sent.remove(name) {
                self.owed_removals.push_back(name.to_string());
            }
        }
        for (position, entry) in state.live_after(self.cursor.live) {
            let covered = self.covers(entry, state);
            if covered || self.sent.contains(&entry.name) {
                self.owed.insert(position);
            }
            if covered {
                let missing = state.members(&entry.name).filter(|member| !self.sent.contains(&member.name));
                self.owed.extend(missing.map(|member| member.position));
            }
        }
        self.cursor = Cursor { removed: state.head(), live: state.head() };
    }

    /// An answer from what is owed; removals first.
    fn pay(&mut self, table: &Inner, state: &State, hold_removals: bool) -> Option<Answer> {
        let mut builder = Builder::new(table.config.answer_limit, &state.type_url);
        if hold_removals || self.pay_removals(&mut builder, state) {
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
        let behind = self.cursor.live < state.head() || self.cursor.removed < state.head();
        let more = behind || !self.owed.is_empty() || !self.owed_removals.is_empty();
        self.open = more;
        Some(builder.finish(&self.nonce(), state.head(), more))
    }

    /// Adds the removals that are due; false if the answer is full before all are in.
    fn pay_removals(&mut self, builder: &mut Builder, state: &State) -> bool {
        while let Some(name) = self.owed_removals.front() {
            // What came (back) in the meantime is sent, and must not be taken away after that.
            let there = state.named(name).any(|entry| self.wildcard || self.covers(entry, state));
            if !there && !builder.remove(name) {
                return false;
            }
            self.owed_removals.pop_front();
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

fn with_members<'a>(
    entries: impl Iterator<Item = &'a Arc<Entry>>,
    state: &'a State,
) -> impl Iterator<Item = &'a Arc<Entry>> {
    entries.flat_map(|entry| std::iter::once(entry).chain(state.members(&entry.name)))
}
