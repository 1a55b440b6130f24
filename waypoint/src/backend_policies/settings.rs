//! What a policy says of one port of a service or subset.

use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use ambit_balance::{Algorithm, Outcome, OutlierSettings};
use http::HeaderName;
use serde::Serialize;

use crate::backend_tls::BackendTls;

/// What a policy says of one port of a service or subset. The default: of services without a policy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PortPolicy {
    /// The object, for admin and log.
    pub object: Option<Arc<str>>,
    /// Why requests can't be sent as the policy demands.
    pub invalid: Option<Arc<str>>,
    /// How an endpoint is chosen; `None`: as the service says, by default by peak EWMA.
    pub algorithm: Option<Algorithm>,
    /// What consistent hashing goes by.
    pub hash: Option<HashKey>,
    /// Which localities are preferred.
    pub locality: Option<l7::LocalityPreference>,
    /// How long the share of a new endpoint grows.
    pub warmup: Duration,
    /// When an endpoint is ejected.
    pub outliers: Option<Outliers>,
    /// How much is sent at once.
    pub pool: PoolPolicy,
    /// How many retries there may be at once; `None`: the waypoint's own limit.
    pub retry_budget: Option<RetryBudget>,
    /// TLS to the endpoints, inside the tunnel where there is one.
    pub tls: Option<Arc<BackendTls>>,
    /// Whether something is said of TLS, be it that there is none.
    pub says_tls: bool,
}

/// What of a request the hash is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// The value of a header.
    Header(HeaderName),
    /// The value of a parameter of the query.
    Query(Arc<str>),
    /// The value of a cookie, which is set where a lifetime is given.
    Cookie {
        /// Its name.
        name: Arc<str>,
        /// Its path; empty: not said.
        path: Arc<str>,
        /// How long a cookie lasts that is set here; 0: the session.
        lifetime: Option<Duration>,
    },
    /// The client's address.
    SourceIp,
}

/// Ejection, and when it is given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outliers {
    /// When an endpoint is ejected.
    pub settings: OutlierSettings,
    /// Per cent of the endpoints that must not be ejected, else ejections are ignored.
    pub min_health: u32,
    /// Answers with these statuses are failures too.
    pub codes: Box<[u16]>,
}

impl Outliers {
    /// How a request ended in the eyes of the policy: what it calls a failure is one.
    pub fn judge(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Answer(code) if code < 500 && self.codes.contains(&code) => Outcome::Answer(500),
            Outcome::Answer(_) | Outcome::LocalFailure | Outcome::ClientDeadline => outcome,
        }
    }
}

/// Bounds of what is sent at once, and how connections are made and kept. `None`: the waypoint's own, or none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolPolicy {
    /// Connections to all endpoints.
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection.
    pub max_pending: Option<u32>,
    /// Requests in progress.
    pub max_requests: Option<u32>,
    /// Retries in progress.
    pub max_retries: Option<u32>,
    /// Requests that a connection is used for.
    pub max_requests_per_connection: Option<u32>,
    /// Budget of one connection, handshakes included.
    pub connect_timeout: Option<Duration>,
    /// How long an unused connection is kept.
    pub idle_timeout: Option<Duration>,
    /// Whether requests of HTTP/1 clients are sent in HTTP/2.
    pub upgrade_to_http2: bool,
    /// Whether requests are sent in the version of HTTP that their clients speak.
    pub use_client_protocol: bool,
    /// How long a connection that is passed on may be silent.
    pub stream_idle_timeout: Option<Duration>,
    /// How old a connection may become.
    pub max_age: Option<Duration>,
    /// Requests at once on one HTTP/2 connection.
    pub max_concurrent_streams: Option<u32>,
    /// Probes of sockets to endpoints outside the mesh.
    pub tcp_keepalive: Option<TcpProbes>,
    /// Time between the PINGs of an HTTP/2 connection.
    pub ping_interval: Option<Duration>,
    /// How long the answer to a PING may take.
    pub ping_timeout: Option<Duration>,
}

/// Probes of a silent TCP connection. `None`: as the system has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
pub struct TcpProbes {
    /// Silence before the first one.
    pub idle: Option<Duration>,
    /// Time between them.
    pub interval: Option<Duration>,
    /// How many must be lost.
    pub probes: Option<u32>,
}

/// Retries at once, in proportion to the requests in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryBudget {
    /// Thousandths of a per cent.
    pub percent_milli: u32,
    /// So many are always allowed.
    pub least: u32,
}

impl RetryBudget {
    /// How many retries there may be while so many requests are in progress.
    pub fn most(self, active: u32) -> u32 {
        let share = u64::from(active) * u64::from(self.percent_milli) / 100_000;
        u32::try_from(share).unwrap_or(u32::MAX).max(self.least)
    }
}
