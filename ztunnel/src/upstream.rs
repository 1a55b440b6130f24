//! From a dialled address to an open connection: resolve, connect, and try another endpoint if one
//! fails before the first byte.
//!
//! `outbound` calls it for every connection of a pod. Nothing of the application is read here.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_directory::{
    ClientRole, Demand, Dependency, DoubleTunnel, Load, Lookup, Plain, Question, Route, Service,
    WaypointTunnel, Workload, WorkloadUid, resolve, resolve_on_demand,
};
use ambit_hbone::client::Target;
use ambit_hbone::{
    Authority, Baggage, ConnectRequest, Forwarded, OpenError, TraceParent, Tunnel, WorkloadKind,
};
use ambit_identity::SpiffeId;
use ambit_net::relay::Counters;
use ambit_net::{ConnectError, SocketStock, connect, connect_from};
use ambit_xds::Found;
use smallvec::SmallVec;
use tokio::net::TcpStream;

use crate::config::SameNode;
use crate::destination::{Authenticated, Connected};
use crate::error::ConnectionError;
use crate::pods::Pod;
use crate::proxy::{Proxy, Worker};
use crate::report::{AccessRecord, End};
use crate::tunnels::TunnelKey;
use ambit_runtime::connections::Direction;
use ambit_runtime::loads::LoadGuard;
use ambit_runtime::shares::{Counted, Taken};

/// Requests that a peer did not process, beside [`connect_attempts`](crate::config::Limits::connect_attempts).
const UNPROCESSED_ATTEMPTS: u32 = 8;

/// Names asked for while one connection is routed, at most: address, waypoint, gateway and their services.
const MAX_DEMANDS: usize = 8;

/// An open connection to the destination.
#[derive(Debug)]
pub enum Upstream {
    /// Through a tunnel on a pooled connection.
    Tunnel(Box<Tunnel>),
    /// Through a tunnel inside a tunnel, on a connection of its own.
    InnerTunnel(Box<Tunnel>),
    /// In plaintext, out of the pod's namespace.
    Plain(TcpStream),
    /// To a pod of this node, in its namespace.
    Local(Box<Connected>),
}

/// A connection that was reached, and its record.
#[derive(Debug)]
pub struct ConnectedUpstream {
    /// The connection.
    pub upstream: Upstream,
    /// Its record.
    pub record: AccessRecord,
    /// Counts it at its workload.
    pub load: Option<LoadGuard>,
}

/// A connection that was not reached, and its record.
#[derive(Debug)]
pub struct ConnectFailure {
    /// Why.
    pub error: ConnectionError,
    /// Its record.
    pub record: AccessRecord,
}

/// Who dials what.
#[derive(Debug)]
pub struct Dial<'a> {
    /// The worker that carries the connection.
    pub worker: &'a Arc<Worker>,
    /// The pod that dials.
    pub pod: &'a Arc<Pod>,
    /// Its workload.
    pub client: Arc<Workload>,
    /// The application's address.
    pub source: SocketAddr,
    /// What it dialled.
    pub dialled: Authority,
    /// Since when.
    pub since: Instant,
    /// Where its bytes will be counted.
    pub counters: Arc<Counters>,
}

impl Dial<'_> {
    /// Reaches the destination within the connect budget.
    ///
    /// # Errors
    /// [`ConnectFailure`]: the last attempt's error, or why there was none.
    pub async fn reach(&self) -> Result<ConnectedUpstream, Box<ConnectFailure>> {
        let limits = self.worker.proxy.settings.limits;
        let mut record = self.record();
        let attempts = self.attempts(&mut record);
        match tokio::time::timeout(limits.connect_timeout, Box::pin(attempts)).await {
            Ok(Ok((upstream, load))) => Ok(ConnectedUpstream { upstream, record, load }),
            Ok(Err(error)) => Err(Box::new(ConnectFailure { error, record })),
            Err(_) => {
                let error = ConnectionError::Budget {
                    destination: self.dialled.clone(),
                    budget: limits.connect_timeout,
                };
                Err(Box::new(ConnectFailure { error, record }))
            }
        }
    }

    async fn attempts(
        &self,
        record: &mut AccessRecord,
    ) -> Result<(Upstream, Option<LoadGuard>), ConnectionError> {
        let limits = self.worker.proxy.settings.limits;
        let deadline = Instant::now() + limits.connect_timeout;
        let mut tried: SmallVec<[WorkloadUid; 4]> = SmallVec::new();
        let mut last: Option<ConnectionError> = None;
        let (mut attempts, mut unprocessed) = (0, 0);
        while attempts < limits.connect_attempts {
            let mut route = self.route(&tried).await?;
            if let (Route::Refuse(refusal), Some(error)) = (&route, &last)
                && refusal.is_exhausted()
            {
                if !is_passing(error) {
                    break;
                }
                tried.clear();
                route = self.route(&tried).await?;
            }
            record.service = route.service().cloned();
            if bypasses_waypoint(&route) {
                self.worker.proxy.tallies.waypoint_bypassed.add(1);
            }
            let peer = route.peer().cloned();
            let load = peer.as_ref().map(|peer| self.worker.proxy.loads.open(&peer.uid));
            // Each attempt leaves to the others their part of what is left of the budget.
            let attempts_left = u32::from(limits.connect_attempts - attempts).max(1);
            let part = deadline.saturating_duration_since(Instant::now()) / attempts_left;
            let limit = limits.attempt_timeout.min(part);
            let ejected = self.pod.ejected();
            match Box::pin(self.attempt(route, record, limit)).await {
                Ok(upstream) => {
                    if let Some(peer) = &peer {
                        ejected.reached(peer);
                    }
                    return Ok((upstream, load));
                }
                // The peer's connection was closing, as before an upgrade: the same endpoint may take it on another one.
                Err(ConnectionError::Tunnel(error))
                    if error.never_processed() && unprocessed < UNPROCESSED_ATTEMPTS =>
                {
                    tracing::debug!(%error, dialled = %self.dialled, "a request was not processed");
                    self.worker.proxy.tallies.retries.add(1);
                    unprocessed += 1;
                    last = Some(error.into());
                }
                Err(error) => {
                    attempts += 1;
                    if let (Some(peer), Some(what)) = (&peer, error.unreachable()) {
                        self.worker.proxy.tallies.ejected.add(ejected.failed(peer, what));
                    }
                    let again = error.another_endpoint_may_help();
                    tracing::debug!(%error, dialled = %self.dialled, again, "an attempt failed");
                    last = Some(error);
                    match peer {
                        Some(peer) if again => {
                            self.worker.proxy.tallies.retries.add(1);
                            tried.push(peer.uid.clone());
                        }
                        _ => break,
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| ConnectionError::UnknownName(self.dialled.to_string())))
    }

    /// Where to go.
    async fn route(&self, tried: &[WorkloadUid]) -> Result<Route, ConnectionError> {
        self.route_to(&self.dialled, tried).await
    }

    /// Where a connection to `destination` goes. Where resources come on demand, the control plane is asked first for every
    /// name that the route depends on.
    async fn route_to(
        &self,
        destination: &Authority,
        tried: &[WorkloadUid],
    ) -> Result<Route, ConnectionError> {
        let proxy = &self.worker.proxy;
        let Some(demander) = &proxy.demander else {
            return Ok(resolve(
                &proxy.directory.load(),
                &self.question(destination, tried),
                &self.load(),
                &mut rand::rng(),
            ));
        };
        let mut answers: SmallVec<[(Demand, Found); 4]> = SmallVec::new();
        loop {
            let (route, names) = {
                let (question, load) = (self.question(destination, tried), self.load());
                resolve_on_demand(&proxy.directory.load(), &question, &load, &mut rand::rng())
            };
            for name in names.iter().filter(|name| name.is_known) {
                demander.note_use(self.pod.shared_uid(), &name.demand.to_string());
            }
            let is_asked = |name: &Demand| answers.iter().any(|(asked, _)| asked == name);
            let next = names.into_iter().find(|name| !name.is_known && !is_asked(&name.demand));
            let Some(Dependency { demand, .. }) = next.filter(|_| answers.len() < MAX_DEMANDS) else {
                return self.settled(route, &answers);
            };
            let name = demand.to_string();
            let found =
                demander.demand(self.pod.shared_uid(), &name, proxy.settings.limits.directory_wait).await;
            let found = found.map_err(|reason| ConnectionError::Undetermined { name, reason })?;
            answers.push((demand, found));
        }
    }

    /// What the directory doesn't know passes only if the control plane said that there is no such thing.
    fn settled(&self, route: Route, answers: &[(Demand, Found)]) -> Result<Route, ConnectionError> {
        if let Route::Unknown(unknown) = &route
            && !answers.contains(&(unknown.demand.clone(), Found::Absent))
        {
            return Err(ConnectionError::UnknownName(unknown.demand.to_string()));
        }
        Ok(route)
    }

    fn question<'a>(&'a self, destination: &Authority, tried: &'a [WorkloadUid]) -> Question<'a> {
        Question {
            client: &self.client,
            role: ClientRole::Workload,
            source: self.source.ip(),
            destination: destination.clone(),
            exclude: tried,
        }
    }

    fn load(&self) -> SeenByPod<'_> {
        SeenByPod { proxy: &self.worker.proxy, pod: self.pod }
    }

    async fn attempt(
        &self,
        route: Route,
        record: &mut AccessRecord,
        limit: Duration,
    ) -> Result<Upstream, ConnectionError> {
        match route {
            Route::SameNode(route) if self.worker.proxy.settings.same_node == SameNode::Splice => {
                match self.worker.proxy.local.get(&route.workload.uid) {
                    Some(pod) => self.hand_over(pod, &route, record).await,
                    None => self.tunnel(&route, record, limit).await,
                }
            }
            Route::SameNode(route) | Route::Tunnel(route) => self.tunnel(&route, record, limit).await,
            Route::Waypoint(route) => self.waypoint(&route, record, limit).await,
            Route::DoubleHbone(route) => self.double(&route, record, limit).await,
            Route::Plain(route) | Route::Own(route) => self.plain(route, record, limit).await,
            Route::Lookup(route) => self.lookup(route, record, limit).await,
            Route::Unknown(route) => match route.passthrough() {
                Some(plain) => self.plain(plain, record, limit).await,
                None => Err(ConnectionError::UnknownName(route.authority.to_string())),
            },
            Route::Refuse(reason) => {
                Err(ConnectionError::Refused { destination: self.dialled.clone(), reason })
            }
        }
    }

    /// To a pod of this node: its policy is asked as its own proxy would, then the application is
    /// dialled in its namespace.
    async fn hand_over(
        &self,
        pod: Arc<Pod>,
        route: &ambit_directory::Tunnel,
        record: &mut AccessRecord,
    ) -> Result<Upstream, ConnectionError> {
        let authority: Arc<str> = route.address.to_string().into();
        self.set_destination(
            record,
            &route.workload,
            Some(pod.identity().clone()),
            route.hbone,
            Some(authority.clone()),
        );
        let arrived = Authenticated {
            worker: self.worker.clone(),
            pod,
            source: self.source,
            client_port: self.source.port(),
            peer: Some(self.pod.identity().clone()),
            certificate: None,
            client: Some(self.client.clone()),
            reached: route.hbone,
            authority: Some(route.address.into()),
            host: route.service.as_ref().map(|service| service.host.hostname.clone()),
            baggage: None,
            since: self.since,
            counters: self.counters.clone(),
        };
        let connected = Box::pin(arrived.authorize()).await?.connect().await?;
        self.worker.proxy.tallies.handed_over.add(1);
        Ok(Upstream::Local(Box::new(connected)))
    }

    async fn tunnel(
        &self,
        route: &ambit_directory::Tunnel,
        record: &mut AccessRecord,
        limit: Duration,
    ) -> Result<Upstream, ConnectionError> {
        let authority = Authority::from(route.address);
        self.set_destination(
            record,
            &route.workload,
            route.expected.first().cloned(),
            route.hbone,
            Some(authority.to_string().into()),
        );
        let request = self.request(authority, route.service.as_deref());
        let tunnel = self.open(&route.workload, route.hbone, &route.expected, &request, limit).await?;
        record.destination.identity = Some(tunnel.peer().clone());
        Ok(Upstream::Tunnel(Box::new(tunnel)))
    }

    async fn waypoint(
        &self,
        route: &WaypointTunnel,
        record: &mut AccessRecord,
        limit: Duration,
    ) -> Result<Upstream, ConnectionError> {
        let authority = route.authority.clone();
        self.set_destination(
            record,
            &route.waypoint,
            route.expected.first().cloned(),
            route.hbone,
            Some(authority.to_string().into()),
        );
        let request = self.request(authority, route.service.as_deref());
        let tunnel = self.open(&route.waypoint, route.hbone, &route.expected, &request, limit).await?;
        record.destination.identity = Some(tunnel.peer().clone());
        Ok(Upstream::Tunnel(Box::new(tunnel)))
    }

    /// Into another network: a tunnel to its gateway, and inside it a second one to the service.
    async fn double(
        &self,
        route: &DoubleTunnel,
        record: &mut AccessRecord,
        limit: Duration,
    ) -> Result<Upstream, ConnectionError> {
        let authority = route.authority.clone();
        let inner_identity = route.inner_expected.first().cloned();
        self.set_destination(
            record,
            &route.workload,
            inner_identity,
            route.hbone,
            Some(authority.to_string().into()),
        );
        let mut request = self.request(authority, Some(&route.service));
        let outer = self.open(&route.gateway, route.hbone, &route.expected, &request, limit).await?;
        request.forwarded_network = Some(route.network.to_string());
        let certificate = self.worker.proxy.certificates.certificate(self.pod.identity()).await?;
        let (address, tls) = (route.hbone, certificate.client_tls());
        let target = Target { address, source: self.source.ip(), tls: &tls, expected: &route.inner_expected };
        let settings = &self.worker.pool.settings().client;
        let inner = ambit_hbone::client::open_within(outer, target, &request, settings);
        let timed_out = OpenError::HandshakeTimeout { address: route.hbone, limit };
        let inner = tokio::time::timeout(limit, Box::pin(inner)).await.unwrap_or(Err(timed_out));
        let inner = inner.map_err(ConnectionError::InnerTunnel)?;
        record.destination.identity = Some(inner.peer().clone());
        if let Some(baggage) = inner.baggage() {
            // The directory holds the other network's gateway, not which workload behind it was chosen.
            record.destination.workload = None;
            record.destination.baggage = Some(Arc::new(baggage.clone()));
        }
        Ok(Upstream::InnerTunnel(Box::new(inner)))
    }

    async fn plain(
        &self,
        route: Plain,
        record: &mut AccessRecord,
        limit: Duration,
    ) -> Result<Upstream, ConnectionError> {
        record.destination = End { workload: route.workload, ..End::default() };
        record.destination_address = route.address;
        record.hbone_address = None;
        Ok(Upstream::Plain(connect(self.pod.stock(), route.address, limit).await?))
    }

    /// To a workload whose address must be resolved by DNS: its addresses in turn, those of the family that was dialled first.
    async fn lookup(
        &self,
        route: Lookup,
        record: &mut AccessRecord,
        limit: Duration,
    ) -> Result<Upstream, ConnectionError> {
        let deadline = Instant::now() + limit;
        let like = match &self.dialled {
            Authority::Address(address) => address.ip(),
            Authority::Host { .. } => self.source.ip(),
        };
        let name = &route.workload.hostname;
        let addresses = self.worker.proxy.lookup(self.pod, name, like, limit).await?;
        let mut left = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
        let mut last = None;
        for address in addresses {
            let part = deadline.saturating_duration_since(Instant::now()) / left.max(1);
            left = left.saturating_sub(1);
            let found = match route.clone().at(address) {
                Route::Plain(plain) => self.plain_or_mesh(plain).await?,
                tunnel => tunnel,
            };
            match Box::pin(self.attempt(found, record, part)).await {
                Ok(upstream) => return Ok(upstream),
                Err(error) if error.another_endpoint_may_help() => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| ConnectionError::UnknownName(name.to_string())))
    }

    /// The route to an address that DNS gave for an endpoint outside the mesh. An address of the mesh is reached as if it had
    /// been dialled: in the clear, the connection would go past its tunnel and its waypoint.
    async fn plain_or_mesh(&self, plain: Plain) -> Result<Route, ConnectionError> {
        let address = Authority::Address(plain.address);
        Ok(match self.route_to(&address, &[]).await? {
            Route::Unknown(_) | Route::Lookup(_) | Route::Plain(_) => Route::Plain(plain),
            of_mesh => of_mesh,
        })
    }

    /// A tunnel from the pool, or on a new connection out of the pod's namespace. The limit holds for the way to the other
    /// proxy, and once more for that proxy's way to the destination.
    async fn open(
        &self,
        workload: &Workload,
        address: SocketAddr,
        expected: &[SpiffeId],
        request: &ConnectRequest,
        limit: Duration,
    ) -> Result<Tunnel, ConnectionError> {
        let certificate = self.worker.proxy.certificates.certificate(self.pod.identity()).await?;
        let key = TunnelKey {
            origin: self.pod.shared_uid().clone(),
            source: self.pod.identity().clone(),
            destination: workload.uid.shared().clone(),
            address,
        };
        let dial_limit = self.worker.proxy.settings.limits.attempt_timeout;
        let stock = self.pod.stock();
        // Not what the pod's routes would choose: the other proxy's policies go by it.
        let source = self.client.address_like(Some(address.ip()));
        let (proxy, pod) = (&self.worker.proxy, self.pod);
        let dial = || {
            let (proxy, pod, stock) = (proxy.clone(), pod.clone(), stock.clone());
            async move {
                let taken = take_pooled(&proxy, &pod, address)?;
                Ok(Counted::new(dial_proxy(stock, source, address, dial_limit).await?, taken))
            }
        };
        let tls = certificate.client_tls();
        let target = Target { address, source: self.source.ip(), tls: &tls, expected };
        // The connection goes on being made without us: others may wait for it too.
        let reserved = tokio::time::timeout(limit, Box::pin(self.worker.pool.reserve(&key, target, dial)));
        let reserved = reserved.await.map_err(|_| ConnectionError::AttemptTimedOut { address, limit })??;
        // From here on it is the destination that may be slow.
        let timed_out = || OpenError::ConnectTimeout { address, authority: request.authority.clone(), limit };
        let opened = tokio::time::timeout(limit, Box::pin(reserved.open(request))).await;
        Ok(opened.unwrap_or_else(|_| Err(timed_out()))?)
    }

    /// What the CONNECT says of us.
    fn request(&self, authority: Authority, service: Option<&Service>) -> ConnectRequest {
        ConnectRequest {
            baggage: Some(baggage(&self.client)),
            forwarded: Some(Forwarded {
                client: self.source,
                host: service.map(|service| service.host.hostname.to_string()),
            }),
            traceparent: Some(TraceParent::new(&mut rand::rng())),
            ..ConnectRequest::new(authority)
        }
    }

    fn record(&self) -> AccessRecord {
        AccessRecord {
            direction: Direction::Outbound,
            source: End { workload: Some(self.client.clone()), ..End::default() },
            source_address: self.source,
            destination: End::default(),
            destination_address: match &self.dialled {
                Authority::Address(address) => *address,
                Authority::Host { port, .. } => (std::net::Ipv4Addr::UNSPECIFIED, *port).into(),
            },
            hbone_address: None,
            service: None,
            since: self.since,
        }
    }

    /// Notes where a tunnelled attempt goes; both ends have identities then.
    fn set_destination(
        &self,
        record: &mut AccessRecord,
        workload: &Arc<Workload>,
        identity: Option<SpiffeId>,
        address: SocketAddr,
        authority: Option<Arc<str>>,
    ) {
        record.source.identity = Some(self.pod.identity().clone());
        record.destination = End { workload: Some(workload.clone()), identity, baggage: None };
        record.destination_address = address;
        record.hbone_address = authority;
    }
}

/// The descriptor of a pooled connection, which may outlive the connection that it is dialled for.
fn take_pooled(proxy: &Proxy, pod: &Pod, address: SocketAddr) -> io::Result<Taken> {
    let (shares, holder) = (&proxy.shares, pod.shares().outbound());
    shares.descriptors.take(&holder, 1).map_err(|exceeded| {
        shares.report(exceeded, "pool", &holder, pod.uid(), address.ip());
        io::Error::other(exceeded)
    })
}

/// What endpoint choice asks: the connections of this node, and what the pod could not reach.
struct SeenByPod<'a> {
    proxy: &'a Proxy,
    pod: &'a Pod,
}

impl Load for SeenByPod<'_> {
    fn connections(&self, workload: &WorkloadUid) -> u32 {
        self.proxy.loads.get(workload)
    }

    fn is_ejected(&self, workload: &Workload) -> bool {
        self.pod.ejected().is_ejected(workload)
    }
}

/// One TCP connection to another proxy, out of the pod's namespace and from its own address.
async fn dial_proxy(
    stock: SocketStock,
    source: Option<IpAddr>,
    address: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    let connected = match source {
        Some(source) => connect_from(&stock, source, address, limit).await,
        None => connect(&stock, address, limit).await,
    };
    connected.map_err(|error| match error {
        ConnectError::Refused { source, .. } | ConnectError::Bind { source, .. } => source,
        ConnectError::TimedOut { .. } => io::Error::new(io::ErrorKind::TimedOut, error.to_string()),
        ConnectError::Namespace { .. } => io::Error::other(error.to_string()),
    })
}

/// Whether the same endpoint may do better a little later: its proxy was lost or kept silent, as one does
/// that is being started again. What was answered or refused would be so again.
fn is_passing(error: &ConnectionError) -> bool {
    let error = match error {
        ConnectionError::AttemptTimedOut { .. } => return true,
        ConnectionError::Tunnel(error) | ConnectionError::InnerTunnel(error) => error,
        _ => return false,
    };
    match error {
        OpenError::Lost { .. }
        | OpenError::NotProcessed { .. }
        | OpenError::ConnectTimeout { .. }
        | OpenError::Silent { .. }
        | OpenError::HandshakeTimeout { .. }
        | OpenError::Abandoned { .. } => true,
        OpenError::Tls { source, .. } => {
            matches!(source.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
        }
        _ => false,
    }
}

/// Whether a missing waypoint is passed by because its owner allows that.
fn bypasses_waypoint(route: &Route) -> bool {
    match route {
        Route::Tunnel(route) | Route::SameNode(route) => route.waypoint_bypassed,
        Route::DoubleHbone(route) => route.waypoint_bypassed,
        Route::Plain(route) | Route::Own(route) => route.waypoint_bypassed,
        Route::Lookup(route) => route.waypoint_bypassed,
        Route::Waypoint(_) | Route::Unknown(_) | Route::Refuse(_) => false,
    }
}

/// What a workload says of itself (contracts.md, section 2).
pub fn baggage(workload: &Workload) -> Baggage {
    use ambit_directory::WorkloadType;
    let kind = match workload.workload_type {
        WorkloadType::Deployment => WorkloadKind::Deployment,
        WorkloadType::CronJob => WorkloadKind::CronJob,
        WorkloadType::Pod => WorkloadKind::Pod,
        WorkloadType::Job => WorkloadKind::Job,
    };
    Baggage {
        cluster: workload.cluster_id.to_string(),
        namespace: workload.namespace.to_string(),
        workload: Some((kind, workload.workload_name.to_string())),
        service: workload.canonical_name.to_string(),
        version: workload.canonical_revision.to_string(),
        region: workload.locality.region.to_string(),
        zone: workload.locality.zone.to_string(),
    }
}
