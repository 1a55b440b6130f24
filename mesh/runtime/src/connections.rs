//! The table of open connections: for dumps, for reviews when policy or trust changes, and for the end of a drain.
//!
//! Each worker has a shard of its own, so that opening and closing never waits for another worker. Control tasks walk over
//! all shards, a few entries at a time, so that a worker never waits long for its own lock.

use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use ambit_directory::WorkloadUid;
use ambit_identity::{PeerCertificate, SpiffeId};
use ambit_net::relay::Counters;
use ambit_policy::Stamp;
use ambit_telemetry::tcp;
use parking_lot::Mutex;
use serde::Serialize;

use crate::cut::{Cut, CutReason};

/// The direction of a connection, seen from the pod that it is reported for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the pod.
    Inbound,
    /// From the pod.
    Outbound,
}

impl Direction {
    /// The value in the access log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// What a review of a connection to a pod of this node needs.
#[derive(Debug)]
pub struct Subject {
    /// The destination workload.
    pub workload: WorkloadUid,
    /// The client's identity, if it is authenticated.
    pub peer: Option<SpiffeId>,
    /// The client's address.
    pub source: SocketAddr,
    /// The workload's address and port.
    pub destination: SocketAddr,
    /// What the last decision depended on. No new decision is needed while this is equal.
    pub stamp: Mutex<Option<Stamp>>,
}

/// One open connection.
#[derive(Debug)]
pub struct Connection {
    id: u64,
    /// Its direction.
    pub direction: Direction,
    /// When it was opened, for durations.
    pub since: Instant,
    /// When it was opened, as wall-clock time.
    pub opened: SystemTime,
    /// The client.
    pub source: SocketAddr,
    /// What the client dialled.
    pub destination: SocketAddr,
    /// For connections to a pod of this node: what a review by policy needs.
    pub subject: Option<Subject>,
    /// The peer's certificate, if the connection is as good as that: a client's, or that of the inner peer of a tunnel inside
    /// a tunnel. Peers of pooled connections are reviewed in the pool.
    pub certificate: Option<PeerCertificate>,
    /// Bytes so far. The two entries of a hand-over on this node share them.
    pub counters: Arc<Counters>,
    metrics: OnceLock<tcp::Connection>,
    cut: Cut,
    activity: Activity,
}

/// What is known of a connection when it is opened; each field is that of [`Connection`].
#[derive(Debug)]
#[allow(missing_docs, reason = "documented there")]
pub struct NewConnection {
    pub direction: Direction,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub subject: Option<Subject>,
    pub certificate: Option<PeerCertificate>,
    pub counters: Arc<Counters>,
}

/// When a connection moved bytes last, as far as was seen. Only one control task writes it.
#[derive(Debug, Default)]
struct Activity {
    bytes: AtomicU64,
    /// Milliseconds after the connection was opened.
    at: AtomicU64,
}

impl Activity {
    /// Takes the bytes that have moved so far, and says for how long there were none, since the connection is open for
    /// `age`.
    fn quiet_for(&self, bytes: u64, age: Duration) -> Duration {
        let age_millis = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        if self.bytes.swap(bytes, Ordering::Relaxed) != bytes {
            self.at.store(age_millis, Ordering::Relaxed);
        }
        Duration::from_millis(age_millis.saturating_sub(self.at.load(Ordering::Relaxed)))
    }
}

impl Connection {
    /// Closes it.
    pub fn cut(&self) -> &Cut {
        &self.cut
    }

    /// For how long no byte has moved, as far as it was asked before.
    pub fn quiet_for(&self, now: Instant) -> Duration {
        let bytes = self.counters.sent().wrapping_add(self.counters.received());
        self.activity.quiet_for(bytes, now.saturating_duration_since(self.since))
    }

    /// Counts the bytes that moved since the last call.
    pub fn report_bytes(&self) {
        if let Some(metrics) = self.metrics.get() {
            // Metrics contract: what dashboards call sent is what the server sent.
            metrics.report(self.counters.received(), self.counters.sent());
        }
    }
}

/// An entry of a dump.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    direction: Direction,
    source: SocketAddr,
    destination: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<String>,
    seconds: u64,
    sent: u64,
    received: u64,
}

/// Entries that a control task takes from a shard at a time.
const CHUNK: usize = 64;

/// The connections of one worker. A connection stays in its slot, so that a walk in pieces meets each one that was open
/// all the time.
#[derive(Debug, Default)]
struct Slots {
    slots: Vec<Option<Arc<Connection>>>,
    free: Vec<usize>,
}

impl Slots {
    fn insert(&mut self, connection: Arc<Connection>) -> usize {
        if let Some(index) = self.free.pop()
            && let Some(slot) = self.slots.get_mut(index)
        {
            *slot = Some(connection);
            return index;
        }
        self.slots.push(Some(connection));
        self.slots.len() - 1
    }

    fn remove(&mut self, index: usize) {
        if self.slots.get_mut(index).and_then(Option::take).is_some() {
            self.free.push(index);
        }
        if self.free.len() == self.slots.len() {
            // Gives back what a burst had needed.
            *self = Self::default();
        }
    }

    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

type Shard = Mutex<Slots>;

/// All open connections. Guards slots only; nothing is decided or awaited under a shard's lock.
#[derive(Debug)]
pub struct Connections {
    shards: Box<[Arc<Shard>]>,
    next: AtomicU64,
}

/// The entry of an open connection. Dropping it removes the connection from the table.
#[derive(Debug)]
pub struct Open {
    connection: Arc<Connection>,
    shard: Arc<Shard>,
    slot: usize,
}

impl Deref for Open {
    type Target = Arc<Connection>;

    fn deref(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Open {
    /// The connection, which may outlive its entry.
    pub fn connection(&self) -> Arc<Connection> {
        self.connection.clone()
    }

    /// Sets the metrics that count its bytes from now on.
    pub fn set_metrics(&self, metrics: tcp::Connection) {
        if self.connection.metrics.set(metrics).is_err() {
            tracing::error!("a connection's metrics were set twice");
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shard.lock().remove(self.slot);
    }
}

impl Connections {
    /// A table for `workers` workers.
    pub fn new(workers: usize) -> Self {
        Self { shards: (0..workers.max(1)).map(|_| Arc::default()).collect(), next: AtomicU64::new(0) }
    }

    /// Adds a connection of worker `worker`.
    pub fn open(&self, worker: usize, connection: NewConnection) -> Open {
        let NewConnection { direction, source, destination, subject, certificate, counters } = connection;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            id,
            direction,
            since: Instant::now(),
            opened: SystemTime::now(),
            source,
            destination,
            subject,
            certificate,
            counters,
            metrics: OnceLock::new(),
            cut: Cut::default(),
            activity: Activity::default(),
        });
        let index = worker.checked_rem(self.shards.len()).unwrap_or_default();
        let shard = self.shards.get(index).cloned().unwrap_or_default();
        let slot = shard.lock().insert(connection.clone());
        Open { connection, shard, slot }
    }

    /// Number of open connections.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Whether no connection is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `look` for every connection that is open from the beginning to the end of this call; for others perhaps.
    fn for_each(&self, mut look: impl FnMut(&Arc<Connection>)) {
        let mut chunk = Vec::with_capacity(CHUNK);
        for shard in &self.shards {
            for start in (0..).step_by(CHUNK) {
                {
                    let slots = shard.lock();
                    let Some(rest) = slots.slots.get(start..).filter(|rest| !rest.is_empty()) else { break };
                    chunk.extend(rest.iter().take(CHUNK).flatten().cloned());
                }
                chunk.drain(..).for_each(|connection| look(&connection));
            }
        }
    }

    /// Asks `judge` about every open connection and closes those that it gives a reason for. Returns how many that were.
    pub fn review(&self, judge: impl Fn(&Connection) -> Option<CutReason>) -> usize {
        let mut closed = 0;
        self.for_each(|connection| {
            if let Some(reason) = judge(connection) {
                connection.cut.cut(reason);
                closed += 1;
            }
        });
        closed
    }

    /// What is open, for dumps.
    pub fn summaries(&self) -> Vec<Summary> {
        let now = Instant::now();
        let mut open = Vec::new();
        self.for_each(|connection| open.push(connection.clone()));
        open.sort_by_key(|connection| connection.id);
        open.iter().map(|connection| connection.summary(now)).collect()
    }
}

impl Connection {
    fn summary(&self, now: Instant) -> Summary {
        let subject = self.subject.as_ref();
        Summary {
            direction: self.direction,
            source: self.source,
            destination: self.destination,
            peer: subject.and_then(|s| s.peer.as_ref()).map(ToString::to_string),
            workload: subject.map(|s| s.workload.to_string()),
            seconds: now.saturating_duration_since(self.since).as_secs(),
            sent: self.counters.sent(),
            received: self.counters.received(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> SocketAddr {
        ([10, 0, 0, 1], port).into()
    }

    fn connection(direction: Direction, port: u16) -> NewConnection {
        NewConnection {
            direction,
            source: address(port),
            destination: address(80),
            subject: None,
            certificate: None,
            counters: Arc::default(),
        }
    }

    #[test]
    fn a_connection_is_on_the_table_for_as_long_as_its_entry_lives() {
        let table = Connections::new(2);
        let first = table.open(0, connection(Direction::Inbound, 1));
        let second = table.open(1, connection(Direction::Outbound, 2));
        second.counters.add_sent(5);
        assert_eq!(table.len(), 2);
        assert_eq!(table.summaries()[1].sent, 5);
        drop(first);
        assert_eq!(table.len(), 1);
        drop(second);
        assert!(table.is_empty());
    }

    #[test]
    fn a_walk_meets_every_connection_however_slots_are_used_again() {
        let table = Connections::new(2);
        let open = |n: u16| table.open(n.into(), connection(Direction::Inbound, n));
        let mut kept: Vec<_> = (0..1000).map(open).collect();
        kept.retain(|connection| connection.source.port() % 3 == 0);
        kept.extend((1000..1200).map(open));
        let mut met: Vec<u16> = Vec::new();
        table.for_each(|connection| met.push(connection.source.port()));
        met.sort_unstable();
        let mut expected: Vec<u16> = kept.iter().map(|connection| connection.source.port()).collect();
        expected.sort_unstable();
        assert_eq!(met, expected);
        drop(kept);
        assert!(table.is_empty());
    }

    #[test]
    fn a_walk_takes_few_connections_at_a_time_and_holds_no_lock() {
        let table = Connections::new(1);
        let open: Vec<_> = (0..1000).map(|n| table.open(0, connection(Direction::Inbound, n))).collect();
        table.for_each(|_| {
            assert!(table.shards[0].try_lock().is_some(), "a worker would wait");
            // The entry, the table and the walk have one each.
            let taken = open.iter().filter(|open| Arc::strong_count(&open.connection) > 2).count();
            assert!(taken <= CHUNK, "{taken}");
        });
    }

    #[test]
    fn a_connection_is_quiet_from_its_last_byte_on() {
        let (activity, second) = (Activity::default(), Duration::from_secs(1));
        assert_eq!(activity.quiet_for(0, 5 * second), 5 * second);
        assert_eq!(activity.quiet_for(7, 10 * second), Duration::ZERO);
        assert_eq!(activity.quiet_for(7, 70 * second), 60 * second);
    }

    #[tokio::test]
    async fn a_review_ends_exactly_those_that_it_gives_a_reason_for() {
        let table = Connections::new(2);
        let open: Vec<_> = (0..4).map(|n| table.open(n.into(), connection(Direction::Inbound, n))).collect();
        let ended = table.review(|c| c.source.port().is_multiple_of(2).then_some(CutReason::Revoked));
        assert_eq!(ended, 2);
        for connection in &open {
            let outcome = connection.cut().race(async {}).await;
            assert_eq!(outcome.is_err(), connection.source.port().is_multiple_of(2));
        }
    }
}
