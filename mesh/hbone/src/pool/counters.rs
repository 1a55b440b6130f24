//! What the pools of a process count, for its metrics.

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
    /// Connections made.
    pub connections: Count,
    /// Connections that could not be made.
    pub failed_connections: Count,
    /// Tunnels opened.
    pub tunnels: Count,
    /// Tunnels that could not be opened on a connection that was there.
    pub failed_tunnels: Count,
    /// Tunnels that waited for a connection that another one was making.
    pub shared: Count,
    /// Connections taken out because their workload or their peer's certificate went.
    pub evicted: Count,
    /// Connections that take no more tunnels because a CONNECT and a PING after it met silence.
    pub silent: Count,
    /// Connections given up because a PING was not answered.
    pub ping_timeouts: Count,
}
