//! What every relay is built from: read sizes that follow the traffic, buffers shared by a worker, byte counters, errors.
//!
//! [`splice`](crate::splice) and the tunnel relay of `ambit-hbone` use it.

pub mod buffers;
mod sizing;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

pub use sizing::{Sizing, Tier};

/// Bytes of one connection, counted while it lives, so that a dump of open connections shows them.
///
/// Both counters only grow. *Sent* counts bytes from the downstream (the accepted side) that were passed to the
/// upstream; *received* counts bytes that were delivered to the downstream.
#[derive(Debug, Default)]
pub struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Counters {
    /// Counters at zero.
    pub const fn new() -> Counters {
        Counters { sent: AtomicU64::new(0), received: AtomicU64::new(0) }
    }

    /// Bytes from downstream to upstream so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes from upstream to downstream so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Adds bytes that went from downstream to upstream.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Adds bytes that went from upstream to downstream.
    pub fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of both directions together.
    pub fn total(&self) -> u64 {
        self.sent() + self.received()
    }
}

/// One of the two ends of a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The connection that was accepted.
    Downstream,
    /// The connection that was dialled for it.
    Upstream,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Side::Downstream => "downstream",
            Side::Upstream => "upstream",
        })
    }
}

/// Why a relay ended before both directions were finished.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Reading from one side failed, most often because it was reset.
    #[error("reading from {side}: {source}")]
    Read {
        /// The side that was read from.
        side: Side,
        /// The error of the socket.
        source: io::Error,
    },
    /// Writing to one side failed, most often because it was reset.
    #[error("writing to {side}: {source}")]
    Write {
        /// The side that was written to.
        side: Side,
        /// The error of the socket.
        source: io::Error,
    },
}
