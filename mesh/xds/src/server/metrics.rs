//! Live counters of the server; the program registers them.

use std::sync::atomic::{AtomicI64, AtomicU64};

use super::observed::{Convergence, Streams};

/// Plain counters and gauges, read at scrape time.
#[derive(Debug, Default)]
pub struct ServerMetrics {
    /// Streams open now.
    pub subscribers: AtomicI64,
    /// Streams refused because too many were open.
    pub refused: AtomicU64,
    /// Streams that ended because the subscriber fell behind the change log.
    pub lagged: AtomicU64,
    /// Requests received.
    pub requests: AtomicU64,
    /// Requests that rejected resources.
    pub nacks: AtomicU64,
    /// Answers sent.
    pub answers: AtomicU64,
    /// Bytes of answers sent.
    pub bytes: AtomicU64,
    /// Resources sent.
    pub resources: AtomicU64,
    /// Removals sent.
    pub removals: AtomicU64,
    /// How long changes take to be sent.
    pub convergence: Convergence,
    /// The open streams.
    pub streams: Streams,
}
