//! What all connections share ([`Proxy`]) and what each worker has of its own ([`Worker`]).

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use ambit_directory::{Gateway, GatewayDestination, Reader, Service, Snapshot, Workload, WorkloadUid};
use ambit_hbone::{Pool, Server};
use ambit_identity::{CertificateStore, SpiffeId, Trust};
use ambit_route::{StreamTable, Table};
use ambit_runtime::connections::Connections;
use ambit_runtime::drain::Drain;
use ambit_runtime::loads::Loads;
use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use crate::activity::{Activity, Exceeded};
use crate::backend_policies::BackendPolicies;
use crate::balancers::Balancers;
use crate::clients::{self, Clients};
use crate::config::Limits;
use crate::datagrams::Datagrams;
use crate::dump::RouteSummary;
use crate::failure::Failure;
use crate::listeners::Listeners;
use crate::names::Names;
use crate::policies::Policies;
use crate::report::Reporter;
use crate::session::SessionKeys;
use crate::telemetry::{Exports, TelemetryTable};
use crate::traffic::Refusals;
use crate::trusted_proxies::TrustedProxies;
use crate::upstream::Upstreams;

/// What the control plane says of this waypoint, at one moment. A request keeps the one that it began with.
#[derive(Debug, Clone, Default)]
pub struct Published {
    /// Who is where.
    pub directory: Arc<Snapshot>,
    /// Where the waypoint is reached: what is bound to it names one of these.
    pub addresses: Arc<[GatewayDestination]>,
    /// Whether endpoints learn who the client is.
    pub forwards_client_identity: bool,
    /// What tokens of sessions are authenticated with.
    pub session_keys: Arc<SessionKeys>,
    /// Which proxies in front of a gateway are believed.
    pub trusted_proxies: Arc<TrustedProxies>,
    /// SPIFFE ids of gateways that are believed about their clients.
    pub trusted_forwarders: Arc<[String]>,
    /// Where a gateway takes connections.
    pub listeners: Arc<Listeners>,
    /// The routes of what is bound to it, and of its listeners.
    pub routes: Arc<Table>,
    /// Those for connections.
    pub streams: Arc<StreamTable>,
    /// The policies of what is bound to it.
    pub policies: Arc<Policies>,
    /// How the endpoints of services are treated.
    pub backends: Arc<BackendPolicies>,
    /// What is reported of requests beside metrics.
    pub telemetry: Arc<TelemetryTable>,
    /// `streams` as the admin server shows them.
    pub streams_dump: Arc<[RouteSummary]>,
}

/// Where [`Published`] is read, and where open connections learn that policies have changed.
#[derive(Debug, Default)]
pub struct Publication {
    current: ArcSwap<Published>,
    policies_changed: watch::Sender<()>,
    listeners_changed: watch::Sender<()>,
}

impl Publication {
    /// The newest, for the length of one decision.
    pub fn load(&self) -> Guard<Arc<Published>> {
        self.current.load()
    }

    /// The newest, to keep.
    pub fn load_full(&self) -> Arc<Published> {
        self.current.load_full()
    }

    /// Publishes one batch. `decisions` says whether what was allowed may be denied now.
    pub fn publish(&self, published: Published, decisions: bool) {
        let same_listeners = Arc::ptr_eq(&self.current.load().listeners, &published.listeners);
        self.current.store(Arc::new(published));
        if !same_listeners {
            self.listeners_changed.send_replace(());
        }
        if decisions {
            self.policies_changed.send_replace(());
        }
    }

    /// Wakes when something was published that may deny what was allowed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.policies_changed.subscribe()
    }
}

impl Publication {
    /// Wakes when other listeners were published.
    pub fn listener_changes(&self) -> watch::Receiver<()> {
        self.listeners_changed.subscribe()
    }
}

impl Published {
    /// Whether this takes connections of clients outside the mesh.
    pub fn is_gateway(&self) -> bool {
        self.listeners.ports().next().is_some()
    }

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
    /// The waypoint as Envoys and Istio's tools name proxies.
    pub node_id: Box<str>,
    /// Clients whose claims about other clients are kept.
    pub trusted_forwarders: Vec<String>,
    /// How long a client's HTTP/2 connection that carries nothing may continue in a drain.
    pub drain_idle: Duration,
    /// Bounds.
    pub limits: Limits,
}

/// Counts of decisions and events.
#[derive(Debug, Default)]
pub struct Tallies {
    /// Tunnels to something that is not bound to this waypoint.
    pub unbound: AtomicU64,
    /// Tries past a waypoint that is missing, as the owner of the service allows.
    pub waypoint_bypassed: AtomicU64,
    /// What limits of clients outside the mesh refused.
    pub clients: clients::Refusals,
    /// Requests that were not sent again because too many were.
    pub retries_over_budget: AtomicU64,
    /// Requests that were sent to a second endpoint beside the first.
    pub hedges: AtomicU64,
    /// Those of them that the second one answered first.
    pub hedges_won: AtomicU64,
    /// Clients whose session went to another endpoint than before.
    pub sessions_moved: AtomicU64,
    /// Requests that broke the rules of HTTP.
    pub malformed: AtomicU64,
    /// Requests whose token was refused.
    pub unauthenticated: AtomicU64,
    /// What external authorizers said.
    pub external: External,
    /// Requests that passed a limit.
    pub limited: Limited,
    /// Requests that TrafficPolicies refused.
    pub traffic: Refusals,
    /// Copies of requests that could not be delivered.
    pub mirrors_failed: AtomicU64,
    /// Requests that policies with the action AUDIT match, once for each.
    pub audited: AtomicU64,
    /// Decisions that a dry-run policy would change.
    pub dry_run_differs: AtomicU64,
    /// Ports of listeners that can't be opened now.
    pub closed_listeners: AtomicU64,
    /// Connections from outside the mesh that did not come to an HTTP request or a route because of their TLS.
    pub failed_handshakes: AtomicU64,
}

/// Counts of requests that external authorizers were asked about.
#[derive(Debug, Default)]
pub struct External {
    /// Those that they allowed.
    pub allowed: AtomicU64,
    /// Those that they denied.
    pub denied: AtomicU64,
    /// Those that they did not answer.
    pub failed: AtomicU64,
}

/// Counts of requests and connections that passed a limit of their client.
#[derive(Debug, Default)]
pub struct Limited {
    /// Heads that were too large.
    pub head_size: AtomicU64,
    /// Targets that were too long.
    pub target_size: AtomicU64,
    /// Heads that took too long.
    pub head_timeout: AtomicU64,
    /// Bodies that were silent for too long.
    pub body_timeout: AtomicU64,
    /// Connections whose client took nothing for too long.
    pub write_timeout: AtomicU64,
    /// Connections that were idle for too long.
    pub idle_timeout: AtomicU64,
    /// Connections that had all the requests that they may have.
    pub requests_per_connection: AtomicU64,
    /// Connections whose client reset too many requests.
    pub abandoned_requests: AtomicU64,
}

impl Tallies {
    /// Counts a request that is refused for what its client did.
    pub fn count_failure(&self, failure: &Failure) {
        let count = match failure {
            Failure::Malformed(_) | Failure::TransferCoding | Failure::Method(_) => &self.malformed,
            Failure::Unauthenticated(_) => &self.unauthenticated,
            Failure::HeadTooLarge => &self.limited.head_size,
            Failure::TargetTooLong => &self.limited.target_size,
            Failure::HeadTimeout => &self.limited.head_timeout,
            Failure::BodyTimeout => &self.limited.body_timeout,
            _ => return,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection that was closed for a bound. Heads that took too long are counted as requests.
    pub fn count_closed(&self, activity: &Activity) {
        if activity.is_used_up() {
            self.limited.requests_per_connection.fetch_add(1, Ordering::Relaxed);
        }
        let count = match activity.exceeded() {
            Some(Exceeded::Write) => &self.limited.write_timeout,
            Some(Exceeded::Idle) => &self.limited.idle_timeout,
            Some(Exceeded::Abandoned) => &self.limited.abandoned_requests,
            Some(Exceeded::Head) | None => return,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// What all connections share.
#[derive(Debug)]
pub struct Proxy {
    /// Configuration.
    pub settings: Settings,
    /// What changes in the directory; decisions read the snapshot in `published`.
    pub directory: Reader,
    /// What is where, routes, policies and what is bound here.
    pub published: Arc<Publication>,
    /// The waypoint's own identity.
    pub identity: SpiffeId,
    /// The certificate of that identity.
    pub certificates: CertificateStore,
    /// Whom we believe.
    pub trust: Trust,
    /// Open connections.
    pub connections: Connections,
    /// Requests in progress by workload, of those whose address was dialled.
    pub loads: Loads<WorkloadUid>,
    /// The endpoints of services, and what is known of them.
    pub balancers: Balancers,
    /// Notifies when nothing new is to be taken.
    pub drain: Drain,
    /// Resolves host names.
    pub names: Names,
    /// What became of spans and log records.
    pub exports: Exports,
    /// Accepts and serves the tunnel connections of other proxies.
    pub server: Server,
    /// Connections of clients outside the mesh.
    pub clients: Clients,
    /// Counts.
    pub tallies: Tallies,
    /// Sessions of clients that send datagrams.
    pub datagrams: Datagrams,
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
    authorizations: Arc<AtomicUsize>,
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

    /// Counts a request that waits for an authorizer, if there may be one more.
    pub fn authorization(&self, most: usize) -> Option<Counted> {
        (self.authorizations.load(Ordering::Relaxed) < most).then(|| Counted::new(&self.authorizations))
    }

    /// Counts a retry, if there may be one more: at once at most `percent` of the requests in progress.
    pub fn retry(&self, percent: u32) -> Option<Counted> {
        let requests = self.requests.load(Ordering::Relaxed);
        let share = requests.saturating_mul(usize::try_from(percent).unwrap_or(usize::MAX)) / 100;
        let retries = self.retries.load(Ordering::Relaxed);
        (retries < share.max(LEAST_RETRIES)).then(|| Counted::new(&self.retries))
    }
}
