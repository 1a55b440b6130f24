//! Counters of the pools of a process, for its metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The number so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Totals since the process started; shared by the pools of all workers.
#[derive(Debug, Default)]
pub struct PoolCounters {
    /// Connections established.
    pub connections: Count,
    /// Connections that could not be established.
    pub failed_connections: Count,
    /// Tunnels opened.
    pub tunnels: Count,
    /// Tunnels that could not be opened on an established connection.
    pub failed_tunnels: Count,
    /// Tunnels that waited for a connection that was being dialled for another one.
    pub shared: Count,
    /// Connections evicted because their workload was removed or their peer's certificate is no longer trusted.
    pub evicted: Count,
    /// Connections that take no more tunnels because a CONNECT and the PING after it were not answered.
    pub silent: Count,
    /// Connections closed because a PING was not answered.
    pub ping_timeouts: Count,
}
