//! What a gateway does with datagrams: each client's are a session, which has one endpoint from its first datagram to its end.
//!
//! Each worker has a socket of its own on each port ([`port`]); the kernel gives the datagrams of a client to the same one. How
//! many sessions there are is bounded over all of them, and what one client has of them ([`shares`]). Nothing is answered to a
//! datagram that is refused: who sent it is not proved.

pub mod avoided;
pub mod port;
pub mod session;
pub mod shares;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use self::avoided::Avoided;
use self::shares::{Full, Shares};
use crate::failure::Failure;

/// Time between two log lines about refused datagrams.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// What the sockets of all ports and workers share.
#[derive(Debug)]
pub struct Datagrams {
    /// Who has how many sessions.
    pub shares: Arc<Shares>,
    /// Endpoints that were not reached a moment ago.
    pub avoided: Avoided,
    /// Counts.
    pub counts: Counts,
    /// When a refusal was logged last.
    logged: Mutex<Option<Instant>>,
}

/// Counts of datagrams and sessions.
#[derive(Debug, Default)]
pub struct Counts {
    /// Datagrams of clients that were sent on.
    pub to_endpoints: AtomicU64,
    /// Datagrams of endpoints that were sent on.
    pub to_clients: AtomicU64,
    /// Those of clients that a full buffer or the size of packets kept from being sent on.
    pub lost_to_endpoints: AtomicU64,
    /// Those of endpoints, likewise.
    pub lost_to_clients: AtomicU64,
    /// Sessions whose endpoint could not be reached.
    pub unreachable: AtomicU64,
    /// Datagrams that began no session.
    pub refused: Refusals,
}

/// Counts of datagrams that began no session, by the reason.
#[derive(Debug, Default)]
pub struct Refusals {
    /// There were as many sessions as may be.
    pub total: AtomicU64,
    /// Their client had its share of them.
    pub client: AtomicU64,
    /// Policy denies it.
    pub policy: AtomicU64,
    /// No route leads anywhere.
    pub route: AtomicU64,
    /// No endpoint could be chosen.
    pub endpoint: AtomicU64,
    /// No socket could be had.
    pub socket: AtomicU64,
    /// The gateway takes nothing new.
    pub draining: AtomicU64,
    /// They claim to come from the gateway itself.
    pub own_address: AtomicU64,
}

/// Why a datagram begins no session.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// There are enough already.
    #[error(transparent)]
    Full(#[from] Full),
    /// A decision about it.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// The system has no socket for it.
    #[error("no socket: {0}")]
    Socket(#[from] std::io::Error),
    /// The gateway takes nothing new.
    #[error("the gateway is about to stop")]
    Draining,
    /// It claims to come from the gateway itself: answers to it would go round for ever.
    #[error("it claims to come from the gateway itself")]
    OwnAddress,
}

impl Datagrams {
    /// Nobody has a session yet.
    pub fn new(most_sessions: usize) -> Self {
        Self {
            shares: Arc::new(Shares::new(most_sessions)),
            avoided: Avoided::default(),
            counts: Counts::default(),
            logged: Mutex::default(),
        }
    }

    /// Counts a datagram that is refused; logs one of many.
    pub fn refuse(&self, port: u16, from: std::net::SocketAddr, refused: &Refused) {
        self.counts.refused.of(refused).fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let mut logged = self.logged.lock();
        if logged.is_none_or(|last| now.saturating_duration_since(last) >= LOG_EVERY) {
            *logged = Some(now);
            drop(logged);
            tracing::info!(port, source = %from, reason = %refused, "a datagram is refused; others may be, too");
        }
    }
}

impl Refusals {
    fn of(&self, refused: &Refused) -> &AtomicU64 {
        match refused {
            Refused::Full(Full::Total) => &self.total,
            Refused::Full(Full::Client) => &self.client,
            Refused::Failure(Failure::Denied(_) | Failure::RateLimited(_)) => &self.policy,
            Refused::Failure(Failure::NoRoute | Failure::InvalidRoute { .. } | Failure::InvalidPolicy(_)) => {
                &self.route
            }
            Refused::Failure(_) => &self.endpoint,
            Refused::Socket(_) => &self.socket,
            Refused::Draining => &self.draining,
            Refused::OwnAddress => &self.own_address,
        }
    }
}
