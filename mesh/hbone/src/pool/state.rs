//! The pool's index: which connections there are, and which are being made. No I/O, no waiting.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ambit_identity::{ClientTls, PeerCertificate, SpiffeId};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::choice::{Bounds, Candidate, Choice, choose};
use super::{InFlight, PoolKey};
use crate::client::Connection;
use crate::load::{Lease, Load};
use crate::{OpenError, Settings};

/// How the making of a connection ended.
pub(super) type Outcome = Result<(), OpenError>;

/// Names one attempt to make a connection, so that a late one is not taken for its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flight(u64);

/// Waits for the end of a flight.
#[derive(Debug)]
pub(super) struct Waiter {
    outcome: watch::Receiver<Option<Outcome>>,
    /// Counts those who wait.
    _present: Arc<()>,
}

impl Waiter {
    pub(super) async fn outcome(mut self, address: SocketAddr) -> Outcome {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(OpenError::Abandoned { address })),
            Err(_) => Err(OpenError::Abandoned { address }),
        }
    }
}

/// Permission to make a connection.
#[derive(Debug)]
pub(super) struct Ticket {
    pub(super) flight: Flight,
    pub(super) report: watch::Sender<Option<Outcome>>,
    pub(super) waiter: Waiter,
}

/// A connection that was chosen.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) id: u64,
    pub(super) connection: Connection,
}

/// What the caller is to do next.
#[derive(Debug)]
pub(super) enum Step {
    Use(Handle, Lease),
    Wait(Waiter),
    Dial(Ticket),
}

#[derive(Debug, Default)]
pub(super) struct State {
    groups: HashMap<PoolKey, Group>,
    /// Keys of each workload, for eviction.
    keys: HashMap<Arc<str>, Vec<PoolKey>>,
    last_id: u64,
    draining: bool,
}

#[derive(Debug, Default)]
struct Group {
    members: Vec<Member>,
    dialling: Option<Dialling>,
}

#[derive(Debug)]
struct Member {
    id: u64,
    /// Gone once it takes no more tunnels; the last one dropped closes the connection.
    connection: Option<Connection>,
    load: Arc<Load>,
    peer: PeerCertificate,
    tls: Arc<ClientTls>,
    task: Option<AbortHandle>,
}

#[derive(Debug)]
struct Dialling {
    flight: Flight,
    outcome: watch::Receiver<Option<Outcome>>,
    waiting: Arc<()>,
    task: Option<AbortHandle>,
}

impl Member {
    fn serves(&self, tls: &Arc<ClientTls>, expected: &[SpiffeId]) -> bool {
        self.connection.is_some() && Arc::ptr_eq(&self.tls, tls) && expected.contains(self.peer.identity())
    }

    fn cut(&mut self) {
        self.connection = None;
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

impl State {
    /// Decides where the next tunnel to `key` goes. Without `may_spread`, a busy connection is as
    /// good as a quiet one.
    pub(super) fn step(
        &mut self,
        key: &PoolKey,
        tls: &Arc<ClientTls>,
        expected: &[SpiffeId],
        settings: &Settings,
        may_spread: bool,
    ) -> Result<Step, OpenError> {
        if self.draining {
            return Err(OpenError::Draining);
        }
        let now = Instant::now();
        if !self.groups.contains_key(key) {
            self.groups.insert(key.clone(), Group::default());
            self.keys.entry(Arc::clone(&key.destination)).or_default().push(key.clone());
        }
        let Some(group) = self.groups.get_mut(key) else {
            return Err(OpenError::Abandoned { address: key.address });
        };
        for member in &mut group.members {
            if !Arc::ptr_eq(&member.tls, tls) {
                member.connection = None;
            }
        }
        let (indices, candidates) = group.candidates(tls, expected, settings, now);
        let bounds = Bounds {
            spread: if may_spread { settings.spread } else { 0 },
            connections: settings.max_connections,
            busy: settings.busy_streams,
        };
        match choose(&candidates, group.dialling.is_some(), bounds) {
            Choice::Use(chosen) => match indices.get(chosen).and_then(|index| group.members.get(*index)) {
                Some(Member { id, connection: Some(connection), load, .. }) => {
                    Ok(Step::Use(Handle { id: *id, connection: connection.clone() }, load.enter()))
                }
                _ => Err(OpenError::Abandoned { address: key.address }),
            },
            Choice::Wait => group.wait(key, settings),
            Choice::Dial => {
                self.last_id += 1;
                Ok(Step::Dial(group.take_off(Flight(self.last_id))))
            }
            Choice::Full => {
                Err(OpenError::Exhausted { address: key.address, connections: group.members.len() })
            }
        }
    }

    /// Keeps hold of the task of a flight, unless it has landed already.
    pub(super) fn watch(&mut self, key: &PoolKey, flight: Flight, task: AbortHandle) {
        match self.groups.get_mut(key).and_then(|group| group.dialling.as_mut()) {
            Some(dialling) if dialling.flight == flight => dialling.task = Some(task),
            _ => {}
        }
    }

    /// Adds a connection that was made.
    ///
    /// # Errors
    ///
    /// [`OpenError::Evicted`] if its workload went meanwhile, [`OpenError::Draining`].
    pub(super) fn add(
        &mut self,
        key: &PoolKey,
        flight: Flight,
        connection: Connection,
        tls: Arc<ClientTls>,
    ) -> Result<u64, OpenError> {
        if self.draining {
            return Err(OpenError::Draining);
        }
        let evicted = || OpenError::Evicted { destination: Arc::clone(&key.destination) };
        let group = self.groups.get_mut(key).ok_or_else(evicted)?;
        if group.dialling.as_ref().is_none_or(|dialling| dialling.flight != flight) {
            return Err(evicted());
        }
        let id = flight.0;
        group.members.push(Member {
            id,
            load: Arc::clone(connection.load()),
            peer: connection.peer().clone(),
            connection: Some(connection),
            tls,
            task: None,
        });
        Ok(id)
    }

    /// Keeps hold of a connection's task.
    pub(super) fn hold(&mut self, key: &PoolKey, id: u64, task: AbortHandle) {
        if let Some(member) = self.member(key, id) {
            member.task = Some(task);
        }
    }

    /// Ends a flight.
    pub(super) fn landed(&mut self, key: &PoolKey, flight: Flight) {
        if let Some(group) = self.groups.get_mut(key)
            && group.dialling.as_ref().is_some_and(|dialling| dialling.flight == flight)
        {
            group.dialling = None;
        }
        self.tidy(key);
    }

    /// Lets a connection take no more tunnels; it closes with its last one.
    pub(super) fn retire(&mut self, key: &PoolKey, id: u64) {
        if let Some(member) = self.member(key, id) {
            member.connection = None;
        }
    }

    /// Forgets a connection that has ended.
    pub(super) fn remove(&mut self, key: &PoolKey, id: u64) {
        if let Some(group) = self.groups.get_mut(key) {
            group.members.retain(|member| member.id != id);
        }
        self.tidy(key);
    }

    /// Takes a workload's connections out; yields how many.
    pub(super) fn evict(&mut self, destination: &str, in_flight: InFlight) -> usize {
        let keys = self.keys.get(destination).cloned().unwrap_or_default();
        keys.iter().map(|key| self.evict_key(key, in_flight)).sum()
    }

    /// Takes the connections of a source pod out; yields how many.
    pub(super) fn evict_origin(&mut self, origin: &str) -> usize {
        let keys: Vec<_> = self.groups.keys().filter(|key| &*key.origin == origin).cloned().collect();
        keys.iter().map(|key| self.evict_key(key, InFlight::Finish)).sum()
    }

    fn evict_key(&mut self, key: &PoolKey, in_flight: InFlight) -> usize {
        let Some(group) = self.groups.get_mut(key) else { return 0 };
        if let Some(task) = group.dialling.take().and_then(|dialling| dialling.task) {
            task.abort();
        }
        let mut evicted = 0;
        for member in &mut group.members {
            evicted += usize::from(member.connection.is_some());
            match in_flight {
                InFlight::Finish => member.connection = None,
                InFlight::Cut => member.cut(),
            }
        }
        self.tidy(key);
        evicted
    }

    /// Cuts connections whose peer is not accepted; yields how many.
    pub(super) fn retain(&mut self, keep: impl Fn(&PeerCertificate) -> bool) -> usize {
        let members = self.groups.values_mut().flat_map(|group| &mut group.members);
        members.filter(|member| !keep(&member.peer)).map(Member::cut).count()
    }

    pub(super) fn drain(&mut self) {
        self.draining = true;
        for group in self.groups.values_mut() {
            if let Some(task) = group.dialling.take().and_then(|dialling| dialling.task) {
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

    pub(super) fn connections_of(&self, key: &PoolKey) -> usize {
        let members = self.groups.get(key).map(|group| group.members.iter());
        members.into_iter().flatten().filter(|member| member.connection.is_some()).count()
    }

    pub(super) fn has_usable(&self, key: &PoolKey, tls: &Arc<ClientTls>, expected: &[SpiffeId]) -> bool {
        self.groups
            .get(key)
            .is_some_and(|group| group.members.iter().any(|member| member.serves(tls, expected)))
    }

    fn member(&mut self, key: &PoolKey, id: u64) -> Option<&mut Member> {
        self.groups.get_mut(key)?.members.iter_mut().find(|member| member.id == id)
    }

    /// Drops a key that holds nothing, so that the index does not outgrow what is alive.
    fn tidy(&mut self, key: &PoolKey) {
        let empty = |group: &Group| group.members.is_empty() && group.dialling.is_none();
        if !self.groups.get(key).is_some_and(empty) {
            return;
        }
        self.groups.remove(key);
        if let Some(keys) = self.keys.get_mut(&key.destination) {
            keys.retain(|other| other != key);
            if keys.is_empty() {
                self.keys.remove(&key.destination);
            }
        }
    }
}

impl Group {
    fn take_off(&mut self, flight: Flight) -> Ticket {
        let (report, outcome) = watch::channel(None);
        let waiting = Arc::new(());
        let waiter = Waiter { outcome: outcome.clone(), _present: Arc::clone(&waiting) };
        self.dialling = Some(Dialling { flight, outcome, waiting, task: None });
        Ticket { flight, report, waiter }
    }

    fn candidates(
        &self,
        tls: &Arc<ClientTls>,
        expected: &[SpiffeId],
        settings: &Settings,
        now: Instant,
    ) -> (Vec<usize>, Vec<Candidate>) {
        self.members
            .iter()
            .enumerate()
            .filter(|(_, member)| member.serves(tls, expected))
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

    fn wait(&self, key: &PoolKey, settings: &Settings) -> Result<Step, OpenError> {
        match &self.dialling {
            Some(dialling) if Arc::strong_count(&dialling.waiting) <= settings.max_waiting => {
                Ok(Step::Wait(Waiter {
                    outcome: dialling.outcome.clone(),
                    _present: Arc::clone(&dialling.waiting),
                }))
            }
            _ => Err(OpenError::Exhausted { address: key.address, connections: self.members.len() }),
        }
    }
}
