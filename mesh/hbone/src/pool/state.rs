//! The pool's index: which connections exist, and which are being dialled. No I/O, no waiting.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ambit_identity::{ClientTls, PeerCertificate};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::InFlight;
use super::choice::{Bounds, Candidate, Choice, choose};
use crate::client::{Connection, Target};
use crate::load::{Lease, Load};
use crate::overhead::Tally;
use crate::{OpenError, PoolSettings};

/// The key of a pool's connections.
pub trait Key: Clone + Eq + Hash + Debug + Send + Sync + 'static {}

impl<T: Clone + Eq + Hash + Debug + Send + Sync + 'static> Key for T {}

/// How a dial ended. On success, with a handle to the connection's later failure.
pub(super) type DialOutcome = Result<Arc<Tally>, OpenError>;

/// Identifies one dial, so that the end of a late one is not attributed to its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DialId(u64);

/// Waits for the end of a dial.
#[derive(Debug)]
pub(super) struct DialWaiter {
    outcome: watch::Receiver<Option<DialOutcome>>,
    /// Its strong count is the number of waiters plus one.
    _waiting: Arc<()>,
}

impl DialWaiter {
    pub(super) async fn outcome(mut self, address: SocketAddr) -> DialOutcome {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(OpenError::Abandoned { address })),
            Err(_) => Err(OpenError::Abandoned { address }),
        }
    }
}

/// Permission to dial a connection.
#[derive(Debug)]
pub(super) struct DialPermit {
    pub(super) id: DialId,
    pub(super) report: watch::Sender<Option<DialOutcome>>,
    pub(super) waiter: DialWaiter,
}

/// A connection that was chosen.
#[derive(Debug)]
pub(super) struct Selected {
    pub(super) id: u64,
    pub(super) connection: Connection,
}

/// What the caller must do next.
#[derive(Debug)]
pub(super) enum Step {
    Use(Selected, Lease),
    Wait(DialWaiter),
    Dial(DialPermit),
}

#[derive(Debug)]
pub(super) struct State<K> {
    groups: HashMap<K, Group>,
    last_id: u64,
    draining: bool,
}

impl<K> Default for State<K> {
    fn default() -> Self {
        State { groups: HashMap::new(), last_id: 0, draining: false }
    }
}

/// The connections of one key.
#[derive(Debug, Default)]
struct Group {
    members: Vec<Member>,
    dial: Option<Dial>,
}

#[derive(Debug)]
struct Member {
    id: u64,
    /// `None` once it takes no more tunnels; the last one dropped closes the connection.
    connection: Option<Connection>,
    load: Arc<Load>,
    peer: PeerCertificate,
    tls: Arc<ClientTls>,
    task: Option<AbortHandle>,
}

#[derive(Debug)]
struct Dial {
    id: DialId,
    outcome: watch::Receiver<Option<DialOutcome>>,
    waiting: Arc<()>,
    task: Option<AbortHandle>,
}

impl Member {
    fn serves(&self, target: Target<'_>) -> bool {
        self.connection.is_some()
            && Arc::ptr_eq(&self.tls, target.tls)
            && target.expected.contains(self.peer.identity())
    }

    fn cut(&mut self) {
        self.connection = None;
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

impl<K: Key> State<K> {
    /// Decides where the next tunnel of `key` goes. Without `may_spread`, a busy connection is as
    /// good as a quiet one.
    pub(super) fn step(
        &mut self,
        key: &K,
        target: Target<'_>,
        believed: impl Fn(&PeerCertificate) -> bool,
        settings: &PoolSettings,
        may_spread: bool,
    ) -> Result<Step, OpenError> {
        if self.draining {
            return Err(OpenError::Draining);
        }
        let address = target.address;
        let group = self.groups.entry(key.clone()).or_default();
        for member in &mut group.members {
            if member.connection.is_some()
                && !(Arc::ptr_eq(&member.tls, target.tls) && believed(&member.peer))
            {
                member.connection = None;
            }
        }
        let (indices, candidates) = group.candidates(target, settings, Instant::now());
        let bounds = Bounds {
            spread: if may_spread { settings.spread } else { 0 },
            connections: settings.max_connections,
            busy: settings.busy_streams,
        };
        match choose(&candidates, group.dial.is_some(), bounds) {
            Choice::Use(chosen) => match indices.get(chosen).and_then(|index| group.members.get(*index)) {
                Some(Member { id, connection: Some(connection), load, .. }) => {
                    Ok(Step::Use(Selected { id: *id, connection: connection.clone() }, load.enter()))
                }
                _ => Err(OpenError::Abandoned { address }),
            },
            Choice::Wait => group.wait(address, settings),
            Choice::Dial => {
                self.last_id += 1;
                Ok(Step::Dial(group.start_dial(DialId(self.last_id))))
            }
            Choice::Full => Err(OpenError::Exhausted { address, connections: group.members.len() }),
        }
    }

    /// Keeps the task of a dial, unless it has ended.
    pub(super) fn hold_dial(&mut self, key: &K, id: DialId, task: AbortHandle) {
        match self.groups.get_mut(key).and_then(|group| group.dial.as_mut()) {
            Some(dial) if dial.id == id => dial.task = Some(task),
            _ => {}
        }
    }

    /// Adds a connection that was dialled.
    ///
    /// # Errors
    ///
    /// [`OpenError::Evicted`] if its key was evicted meanwhile, [`OpenError::Draining`].
    pub(super) fn add(
        &mut self,
        key: &K,
        id: DialId,
        connection: Connection,
        tls: Arc<ClientTls>,
    ) -> Result<u64, OpenError> {
        if self.draining {
            return Err(OpenError::Draining);
        }
        let evicted = || OpenError::Evicted { address: connection.address() };
        let group = self.groups.get_mut(key).ok_or_else(evicted)?;
        if group.dial.as_ref().is_none_or(|dial| dial.id != id) {
            return Err(evicted());
        }
        group.members.push(Member {
            id: id.0,
            load: Arc::clone(connection.load()),
            peer: connection.peer().clone(),
            connection: Some(connection),
            tls,
            task: None,
        });
        Ok(id.0)
    }

    /// Keeps a connection's task.
    pub(super) fn hold_driver(&mut self, key: &K, id: u64, task: AbortHandle) {
        if let Some(member) = self.member(key, id) {
            member.task = Some(task);
        }
    }

    /// Ends a dial.
    pub(super) fn end_dial(&mut self, key: &K, id: DialId) {
        if let Some(group) = self.groups.get_mut(key)
            && group.dial.as_ref().is_some_and(|dial| dial.id == id)
        {
            group.dial = None;
        }
        self.remove_empty(key);
    }

    /// Lets a connection take no more tunnels; it closes with its last one.
    pub(super) fn retire(&mut self, key: &K, id: u64) {
        if let Some(member) = self.member(key, id) {
            member.connection = None;
        }
    }

    /// Removes a connection that has ended.
    pub(super) fn remove(&mut self, key: &K, id: u64) {
        if let Some(group) = self.groups.get_mut(key) {
            group.members.retain(|member| member.id != id);
        }
        self.remove_empty(key);
    }

    /// Removes the connections of matching keys. Returns how many there were.
    pub(super) fn evict(&mut self, matches: impl Fn(&K) -> bool, in_flight: InFlight) -> usize {
        let mut evicted = 0;
        for (_, group) in self.groups.iter_mut().filter(|(key, _)| matches(key)) {
            if let Some(task) = group.dial.take().and_then(|dial| dial.task) {
                task.abort();
            }
            for member in &mut group.members {
                evicted += usize::from(member.connection.is_some());
                match in_flight {
                    InFlight::Finish => member.connection = None,
                    InFlight::Cut => member.cut(),
                }
            }
        }
        self.groups.retain(|_, group| !group.is_empty());
        evicted
    }

    /// The peers of all connections, with the connections' numbers.
    pub(super) fn peers(&self) -> Vec<(u64, PeerCertificate)> {
        let members = self.groups.values().flat_map(|group| &group.members);
        members.map(|member| (member.id, member.peer.clone())).collect()
    }

    /// Cuts connections by their numbers. Returns how many there were.
    pub(super) fn cut_these(&mut self, ids: &[u64]) -> usize {
        let members = self.groups.values_mut().flat_map(|group| &mut group.members);
        members.filter(|member| ids.contains(&member.id)).map(Member::cut).count()
    }

    pub(super) fn drain(&mut self) {
        self.draining = true;
        for group in self.groups.values_mut() {
            if let Some(task) = group.dial.take().and_then(|dial| dial.task) {
                task.abort();
            }
            for member in &mut group.members {
                member.connection = None;
            }
        }
    }

    pub(super) fn cut(&mut self) {
        self.groups.values_mut().flat_map(|group| &mut group.members).for_each(Member::cut);
    }

    pub(super) fn connections(&self) -> usize {
        self.groups.values().map(|group| group.members.len()).sum()
    }

    pub(super) fn tunnels(&self) -> usize {
        let members = self.groups.values().flat_map(|group| &group.members);
        members.map(|member| member.load.open() as usize).sum()
    }

    pub(super) fn connections_of(&self, key: &K) -> usize {
        let members = self.groups.get(key).map(|group| group.members.iter());
        members.into_iter().flatten().filter(|member| member.connection.is_some()).count()
    }

    pub(super) fn has_usable(&self, key: &K, target: Target<'_>) -> bool {
        self.groups.get(key).is_some_and(|group| group.members.iter().any(|member| member.serves(target)))
    }

    fn member(&mut self, key: &K, id: u64) -> Option<&mut Member> {
        self.groups.get_mut(key)?.members.iter_mut().find(|member| member.id == id)
    }

    /// Removes a key without connections and dials, so that the index does not grow without bound.
    fn remove_empty(&mut self, key: &K) {
        if self.groups.get(key).is_some_and(Group::is_empty) {
            self.groups.remove(key);
        }
    }
}

impl Group {
    fn is_empty(&self) -> bool {
        self.members.is_empty() && self.dial.is_none()
    }

    fn start_dial(&mut self, id: DialId) -> DialPermit {
        let (report, outcome) = watch::channel(None);
        let waiting = Arc::new(());
        let waiter = DialWaiter { outcome: outcome.clone(), _waiting: Arc::clone(&waiting) };
        self.dial = Some(Dial { id, outcome, waiting, task: None });
        DialPermit { id, report, waiter }
    }

    fn candidates(
        &self,
        target: Target<'_>,
        settings: &PoolSettings,
        now: Instant,
    ) -> (Vec<usize>, Vec<Candidate>) {
        self.members
            .iter()
            .enumerate()
            .filter(|(_, member)| member.serves(target))
            .map(|(index, member)| {
                let peer_limit = member.connection.as_ref().map_or(0, Connection::peer_limit);
                let candidate = Candidate {
                    open: member.load.open(),
                    limit: settings.max_streams.min(peer_limit),
                    bulk: member.load.is_bulk(now),
                };
                (index, candidate)
            })
            .unzip()
    }

    fn wait(&self, address: SocketAddr, settings: &PoolSettings) -> Result<Step, OpenError> {
        match &self.dial {
            Some(dial) if Arc::strong_count(&dial.waiting) <= settings.max_waiting => {
                let outcome = dial.outcome.clone();
                Ok(Step::Wait(DialWaiter { outcome, _waiting: Arc::clone(&dial.waiting) }))
            }
            _ => Err(OpenError::Exhausted { address, connections: self.members.len() }),
        }
    }
}
