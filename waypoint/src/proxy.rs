//! What all connections share ([`Proxy`]) and what each worker has of its own ([`Worker`]).

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use ambit_directory::{Gateway, GatewayDestination, Reader, Service, Workload, WorkloadUid};
use ambit_hbone::{Pool, Server};
use ambit_identity::{CertificateStore, SpiffeId, Trust};
use ambit_route::Table;
use ambit_runtime::connections::Connections;
use ambit_runtime::drain::Drain;
use ambit_runtime::loads::Loads;
use arc_swap::ArcSwap;

use crate::config::Limits;
use crate::dump::RouteSummary;
use crate::policies::Policies;
use crate::report::Reporter;
use crate::upstream::Upstreams;

/// What the control plane says of this waypoint, at one moment. A request keeps the one that it began with.
#[derive(Debug, Default)]
pub struct Published {
    /// Where the waypoint is reached: what is bound to it names one of these.
    pub addresses: Vec<GatewayDestination>,
    /// The routes of what is bound to it.
    pub routes: Table,
    /// The policies of what is bound to it.
    pub policies: Policies,
    /// The routes as the admin server shows them.
    pub routes_dump: Vec<RouteSummary>,
}

impl Published {
    /// Whether a service is bound to this waypoint.
    pub fn is_bound(&self, service: &Service) -> bool {
        let weighted = service.weighted_waypoints.iter().map(|weighted| &weighted.gateway);
        service.waypoint.iter().chain(weighted).any(|waypoint| self.is_me(waypoint))
    }

    /// Whether connections to the address of a workload are bound to this waypoint.
    pub fn is_bound_workload(&self, workload: &Workload) -> bool {
        workload.waypoint.as_ref().is_some_and(|waypoint| self.is_me(waypoint))
    }

    fn is_me(&self, waypoint: &Gateway) -> bool {
        self.addresses.contains(&waypoint.destination)
    }
}

/// What the data path needs of the configuration.
#[derive(Debug)]
pub struct Settings {
    /// The network that the waypoint is in.
    pub network: Arc<str>,
    /// Uid of the waypoint's own workload.
    pub uid: WorkloadUid,
    /// Clients whose claims about other clients are kept.
    pub trusted_forwarders: Vec<String>,
    /// Bounds.
    pub limits: Limits,
}

/// Counts of decisions and events.
#[derive(Debug, Default)]
pub struct Tallies {
    /// Tunnels to something that is not bound to this waypoint.
    pub unbound: AtomicU64,
    /// Requests sent again.
    pub retries: AtomicU64,
    /// Requests that were not sent again because too many were.
    pub retries_over_budget: AtomicU64,
    /// Requests that broke the rules of HTTP.
    pub malformed: AtomicU64,
    /// Copies of requests that could not be delivered.
    pub mirrors_failed: AtomicU64,
}

/// What all connections share.
#[derive(Debug)]
pub struct Proxy {
    /// Configuration.
    pub settings: Settings,
    /// Who is where.
    pub directory: Reader,
    /// Routes and what is bound here.
    pub published: Arc<ArcSwap<Published>>,
    /// The waypoint's own identity.
    pub identity: SpiffeId,
    /// The certificate of that identity.
    pub certificates: CertificateStore,
    /// Whom we believe.
    pub trust: Trust,
    /// Open connections.
    pub connections: Connections,
    /// Requests in progress by workload.
    pub loads: Loads<WorkloadUid>,
    /// Tells when nothing new is to be taken.
    pub drain: Drain,
    /// Accepts and serves the tunnel connections of other proxies.
    pub server: Server,
    /// Counts.
    pub tallies: Tallies,
}

/// What a tunnel connection to a workload may be shared by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// Uid of the destination workload: an address that is used again by another has another key.
    pub destination: WorkloadUid,
    /// Where its proxy listens.
    pub address: SocketAddr,
}

/// What one worker has of its own.
#[derive(Debug)]
pub struct Worker {
    /// What it shares with the others.
    pub proxy: Arc<Proxy>,
    /// Its number, from 0.
    pub index: usize,
    /// Its tunnels.
    pub tunnels: Pool<TunnelKey>,
    /// Its HTTP connections to endpoints.
    pub upstreams: Upstreams,
    /// Metrics and log.
    pub reporter: Arc<Reporter>,
    /// Requests in progress, and those of them that are sent again.
    pub requests: InProgress,
}

/// Requests in progress, for the budget of retries.
#[derive(Debug, Default)]
pub struct InProgress {
    requests: Arc<AtomicUsize>,
    retries: Arc<AtomicUsize>,
    mirrors: Arc<AtomicUsize>,
}

/// Counts one until it is dropped.
#[derive(Debug)]
pub struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Retries that are always allowed at once.
const LEAST_RETRIES: usize = 3;

impl InProgress {
    /// Counts a request.
    pub fn request(&self) -> Counted {
        Counted::new(&self.requests)
    }

    /// Counts a copy, if there may be one more.
    pub fn mirror(&self, most: usize) -> Option<Counted> {
        (self.mirrors.load(Ordering::Relaxed) < most).then(|| Counted::new(&self.mirrors))
    }

    /// Counts a retry, if there may be one more: at once at most `percent` of the requests in progress.
    pub fn retry(&self, percent: u32) -> Option<Counted> {
        let requests = self.requests.load(Ordering::Relaxed);
        let share = requests.saturating_mul(usize::try_from(percent).unwrap_or(usize::MAX)) / 100;
        let retries = self.retries.load(Ordering::Relaxed);
        (retries < share.max(LEAST_RETRIES)).then(|| Counted::new(&self.retries))
    }
}
