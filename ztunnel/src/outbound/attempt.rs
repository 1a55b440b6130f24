//! One attempt on one route: handed over, through a tunnel, in plaintext, or where DNS says.
//!
//! [`dial`](super::dial) chooses routes and repeats attempts; nothing is tried again here.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_directory::{Authority, DoubleTunnel, Lookup, Plain, Route, WaypointTunnel, Workload};
use ambit_hbone::client::Target;
use ambit_hbone::{ConnectRequest, OpenError, Tunnel};
use ambit_identity::SpiffeId;
use ambit_net::{ConnectError, SocketStock, connect, connect_from};
use ambit_runtime::shares::{Counted, Taken};
use tokio::net::TcpStream;

use super::dial::{Dial, Upstream};
use super::tunnels::TunnelKey;
use crate::config::SameNode;
use crate::connection::error::ConnectionError;
use crate::connection::report::{AccessRecord, End};
use crate::inbound::destination::Authenticated;
use crate::pods::Pod;
use crate::proxy::Proxy;

impl Dial<'_> {
    pub(super) async fn attempt(
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
            netns: self.pod.netns(),
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
