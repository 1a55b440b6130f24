//! What the server knows of its streams, for metrics and tools: who is connected, how far each is, how long changes take.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use super::metrics::ServerMetrics;

/// Upper bounds of the buckets, seconds: those of Istio's `pilot_proxy_convergence_time`, and finer ones below.
const BOUNDS: [f64; 10] = [0.01, 0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0, f64::INFINITY];

/// How long it took from a change until a subscriber had been sent everything that is due.
#[derive(Debug, Default)]
pub struct Convergence {
    buckets: [AtomicU64; BOUNDS.len()],
    micros: AtomicU64,
}

impl Convergence {
    pub(super) fn observe(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let bucket = BOUNDS.iter().zip(&self.buckets).find(|(bound, _)| seconds <= **bound);
        if let Some((_, count)) = bucket {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.micros.fetch_add(micros, Ordering::Relaxed);
    }

    /// Each bucket's upper bound in seconds, the last one infinite, and how many times fell into it.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        BOUNDS
            .iter()
            .zip(&self.buckets)
            .map(|(bound, count)| (*bound, count.load(Ordering::Relaxed)))
            .collect()
    }

    /// The sum of all times, seconds.
    pub fn seconds(&self) -> f64 {
        self.micros.load(Ordering::Relaxed) as f64 / 1e6
    }
}

/// One open stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamStatus {
    /// The node's own name; empty until its first request.
    pub node: String,
    /// Whom its credentials prove.
    pub identity: Arc<str>,
    /// Number of the last batch of changes that it was sent completely.
    pub batch: u64,
    /// Requests of it that rejected resources.
    pub nacks: u64,
}

/// The open streams. The lock guards the map alone; it is taken when a stream opens or ends, and for a dump.
#[derive(Debug, Default)]
pub struct Streams {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<StreamRecord>>>,
}

/// What a stream reports of itself.
#[derive(Debug)]
pub(super) struct StreamRecord {
    pub(super) node: OnceLock<String>,
    identity: Arc<str>,
    pub(super) batch: AtomicU64,
    pub(super) nacks: AtomicU64,
}

/// A stream's entry among those of a server; dropping it removes it.
#[derive(Debug)]
pub(super) struct Entered {
    server: Arc<ServerMetrics>,
    number: u64,
    pub(super) record: Arc<StreamRecord>,
}

impl Entered {
    pub(super) fn new(server: &Arc<ServerMetrics>, identity: Arc<str>) -> Self {
        let number = server.streams.next.fetch_add(1, Ordering::Relaxed);
        let record = StreamRecord {
            identity,
            node: OnceLock::new(),
            batch: AtomicU64::new(0),
            nacks: AtomicU64::new(0),
        };
        let record = Arc::new(record);
        server.streams.open.lock().insert(number, Arc::clone(&record));
        Self { server: Arc::clone(server), number, record }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.server.streams.open.lock().remove(&self.number);
    }
}

impl Streams {
    /// The streams that are open now, by node.
    pub fn statuses(&self) -> Vec<StreamStatus> {
        let status = |record: &Arc<StreamRecord>| StreamStatus {
            node: record.node.get().cloned().unwrap_or_default(),
            identity: record.identity.clone(),
            batch: record.batch.load(Ordering::Relaxed),
            nacks: record.nacks.load(Ordering::Relaxed),
        };
        let mut statuses: Vec<StreamStatus> = self.open.lock().values().map(status).collect();
        statuses.sort_by(|one, other| one.node.cmp(&other.node));
        statuses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_their_buckets() {
        let convergence = Convergence::default();
        for millis in [5, 10, 700, 60_000] {
            convergence.observe(Duration::from_millis(millis));
        }
        let counts: Vec<u64> = convergence.buckets().iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [2, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
        assert!((convergence.seconds() - 60.715).abs() < 1e-6);
    }

    #[test]
    fn a_stream_is_listed_while_it_is_open() {
        let server = Arc::new(ServerMetrics::default());
        let entered = Entered::new(&server, "spiffe://td/ns/a/sa/b".into());
        entered.record.node.set("ztunnel~1".to_owned()).unwrap();
        assert_eq!(server.streams.statuses().len(), 1);
        assert_eq!(server.streams.statuses()[0].node, "ztunnel~1");
        drop(entered);
        assert!(server.streams.statuses().is_empty());
    }
}
