//! The connections that are open now: for dumps, for deciding again when policy or trust changes, and
//! for the end of a drain.
//!
//! Each worker has a shard of its own, so that opening and closing never waits for another worker;
//! only control tasks look at all of them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime};

use ambit_directory::WorkloadUid;
use ambit_identity::{PeerCertificate, SpiffeId};
use ambit_net::relay::Counters;
use ambit_policy::Stamp;
use ambit_telemetry::tcp;
use parking_lot::Mutex;
use serde::Serialize;

use crate::cut::Cut;
use crate::error::CutReason;

/// Which way a connection goes, seen from the pod that it is reported for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To the pod.
    Inbound,
    /// From the pod.
    Outbound,
}

impl Direction {
    /// As the access log says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// What policy has to be asked again about a connection to a pod of ours.
#[derive(Debug)]
pub struct Subject {
    /// The workload that the connection is to.
    pub workload: WorkloadUid,
    /// Who it is from, if that was proven.
    pub peer: Option<SpiffeId>,
    /// The certificate that proved it.
    pub certificate: Option<PeerCertificate>,
    /// The address that it is from.
    pub source: SocketAddr,
    /// The workload's address and port.
    pub destination: SocketAddr,
    /// What the last decision depended on; an equal stamp needs no new one.
    pub stamp: Mutex<Option<Stamp>>,
}

/// One open connection.
#[derive(Debug)]
pub struct Connection {
    id: u64,
    /// Which way it goes.
    pub direction: Direction,
    /// Since when, for durations.
    pub since: Instant,
    /// Since when, for people.
    pub opened: SystemTime,
    /// The client.
    pub source: SocketAddr,
    /// What the client dialled.
    pub destination: SocketAddr,
    /// For connections to a pod of ours: what to ask policy again.
    pub subject: Option<Subject>,
    /// Bytes so far; the two ends of a hand-over on this node share them.
    pub counters: Arc<Counters>,
    metrics: OnceLock<tcp::Connection>,
    cut: Cut,
}

impl Connection {
    /// The switch that ends it.
    pub fn cut(&self) -> &Cut {
        &self.cut
    }

    /// Counts the bytes that moved since this was called last.
    pub fn report_bytes(&self) {
        if let Some(metrics) = self.metrics.get() {
            // What dashboards call sent is what the server sent: contracts.md, section 6.
            metrics.report(self.counters.received(), self.counters.sent());
        }
    }
}

/// The line of a dump.
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

type Shard = Mutex<HashMap<u64, Arc<Connection>>>;

/// All open connections. Guards maps only; nothing is decided or awaited under a shard's lock.
#[derive(Debug)]
pub struct Connections {
    shards: Box<[Arc<Shard>]>,
    next: AtomicU64,
}

/// An open connection's entry; dropping it takes the connection off the table.
#[derive(Debug)]
pub struct Open {
    connection: Arc<Connection>,
    shard: Arc<Shard>,
}

impl Deref for Open {
    type Target = Arc<Connection>;

    fn deref(&self) -> &Arc<Connection> {
        &self.connection
    }
}

impl Open {
    /// The connection itself, to be kept beyond its entry.
    pub fn connection(&self) -> Arc<Connection> {
        self.connection.clone()
    }

    /// Has its bytes counted in these metrics from now on.
    pub fn set_metrics(&self, metrics: tcp::Connection) {
        if self.connection.metrics.set(metrics).is_err() {
            tracing::error!("a connection's metrics were set twice");
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.shard.lock().remove(&self.connection.id);
    }
}

impl Connections {
    /// A table for `workers` workers.
    pub fn new(workers: usize) -> Self {
        Self { shards: (0..workers.max(1)).map(|_| Arc::default()).collect(), next: AtomicU64::new(0) }
    }

    /// Puts a connection on the table of worker `worker`.
    pub fn open(
        &self,
        worker: usize,
        direction: Direction,
        source: SocketAddr,
        destination: SocketAddr,
        subject: Option<Subject>,
        counters: Arc<Counters>,
    ) -> Open {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let connection = Arc::new(Connection {
            id,
            direction,
            since: Instant::now(),
            opened: SystemTime::now(),
            source,
            destination,
            subject,
            counters,
            metrics: OnceLock::new(),
            cut: Cut::default(),
        });
        let index = worker.checked_rem(self.shards.len()).unwrap_or_default();
        let shard = self.shards.get(index).cloned().unwrap_or_default();
        shard.lock().insert(id, connection.clone());
        Open { connection, shard }
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Asks `judge` about every open connection and ends those that it gives a reason for. Returns how
    /// many that were.
    pub fn review(&self, judge: impl Fn(&Connection) -> Option<CutReason>) -> usize {
        let mut ended = 0;
        for shard in &self.shards {
            let open: Vec<_> = shard.lock().values().cloned().collect();
            for connection in open {
                if let Some(reason) = judge(&connection) {
                    connection.cut.cut(reason);
                    ended += 1;
                }
            }
        }
        ended
    }

    /// Counts the bytes of long-lived connections before they end.
    pub fn report_bytes(&self) {
        self.review(|connection| {
            connection.report_bytes();
            None
        });
    }

    /// What is open, for dumps.
    pub fn summaries(&self) -> Vec<Summary> {
        let now = Instant::now();
        let mut open: Vec<_> =
            self.shards.iter().flat_map(|shard| shard.lock().values().cloned().collect::<Vec<_>>()).collect();
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

    #[test]
    fn a_connection_is_on_the_table_for_as_long_as_its_entry_lives() {
        let table = Connections::new(2);
        let first = table.open(0, Direction::Inbound, address(1), address(80), None, Arc::default());
        let second = table.open(1, Direction::Outbound, address(2), address(80), None, Arc::default());
        second.counters.add_sent(5);
        assert_eq!(table.len(), 2);
        assert_eq!(table.summaries()[1].sent, 5);
        drop(first);
        assert_eq!(table.len(), 1);
        drop(second);
        assert!(table.is_empty());
    }

    #[tokio::test]
    async fn a_review_ends_exactly_those_that_it_gives_a_reason_for() {
        let table = Connections::new(2);
        let open: Vec<_> = (0..4)
            .map(|n| table.open(n.into(), Direction::Inbound, address(n), address(80), None, Arc::default()))
            .collect();
        let ended = table.review(|c| c.source.port().is_multiple_of(2).then_some(CutReason::Revoked));
        assert_eq!(ended, 2);
        for connection in &open {
            let outcome = connection.cut().race(async {}).await;
            assert_eq!(outcome.is_err(), connection.source.port().is_multiple_of(2));
        }
    }
}
