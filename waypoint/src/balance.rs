//! Step 7: which backend of the rule gets a request, by weight, and which endpoint of it, as its policy balances.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ambit_api::is_local;
use ambit_directory::{
    AppProtocol, Authority, ClientRole, DoubleTunnel, HostRef, Load, NamespacedHost, Question, Route,
    Service, Snapshot, Transport, Vip, Workload, WorkloadUid, resolve,
};
use ambit_identity::SpiffeId;
use ambit_route::Backend;
use rand::RngExt;
use smallvec::SmallVec;

use crate::accept::{Destination, Inbound};
use crate::backend_policies::{BackendPolicies, PoolPolicy};
use crate::backend_tls::EndpointTls;
use crate::balancers::balancer::Balancer;
use crate::balancers::{Gate, Slot, SlotKey, Sources, Trial, Unresolved, Wanted};
use crate::failure::Failure;
use crate::matching::Routed;
use crate::names;
use crate::proxy::{Proxy, Published, Worker};
use crate::session::{BackendId, EndpointId};
use crate::upstream::Key;

/// What a request is for: a port of a service or of a part of it, or an address.
#[derive(Debug, Clone)]
pub struct Target {
    /// The destination.
    pub authority: Authority,
    /// The backend that was drawn, where a rule decides.
    pub backend: Option<Backend>,
    /// What is spoken there, as far as it was declared.
    pub protocol: AppProtocol,
    /// The endpoints of a service.
    pub balanced: Option<Balanced>,
    /// Whether requests are sent inside TLS to the endpoint, as a policy demands.
    pub tls: bool,
    /// Whether it is for the host that a client asks for: [`Target::asking`] says which.
    pub is_dynamic: bool,
    /// That host.
    pub asked: Option<Arc<str>>,
    /// The endpoint that the client's session is at.
    pub session: Option<EndpointId>,
    /// Whose routes lead there: that of a gateway may lead through the waypoint of the service.
    pub role: ClientRole,
}

impl Target {
    /// The target for a host that a client asks for. It must be covered by the service, and by no other that is more specific: that
    /// one's policies would not hold.
    ///
    /// # Errors
    /// [`Failure::NoRoute`].
    pub fn asking(
        &self,
        published: &Published,
        inbound: &Inbound,
        host: Option<Arc<str>>,
    ) -> Result<Cow<'_, Self>, Failure> {
        let Some(balanced) = self.balanced.as_ref().filter(|_| self.is_dynamic) else {
            return Ok(Cow::Borrowed(self));
        };
        let service = &balanced.slot.key().host.hostname;
        let client = inbound.identity().map_or("", SpiffeId::namespace);
        let is_meant = |host: &str| {
            let meant = published.directory.service_named(host, client);
            names::covers(service, host) && meant.is_some_and(|meant| meant.host.hostname == *service)
        };
        match host.filter(|host| is_meant(host)) {
            Some(host) => Ok(Cow::Owned(Self { asked: Some(host), ..self.clone() })),
            None => {
                tracing::info!(source = %inbound.source, %service, "a host was asked for that the service does not cover");
                Err(Failure::NoRoute)
            }
        }
    }
}

impl Target {
    /// What a policy says of the connections to it.
    pub fn pool(&self, proxy: &Proxy) -> Option<PoolPolicy> {
        let balancer = self.balanced.as_ref()?.current(proxy).ok()?;
        Some(balancer.policy().pool)
    }
}

/// Endpoints to balance over.
#[derive(Debug, Clone)]
pub struct Balanced {
    slot: Arc<Slot>,
    policies: Arc<BackendPolicies>,
}

/// Draws the backend of a rule; without a rule it is the destination itself.
///
/// # Errors
/// [`Failure::InvalidRoute`], [`Failure::InvalidPolicy`], [`Failure::UnknownService`], [`Failure::NoRoute`].
pub fn split(published: &Published, routed: Option<&Routed>, inbound: &Inbound) -> Result<Target, Failure> {
    let proxy = &inbound.worker.proxy;
    let Some(routed @ Routed { rule, .. }) = routed else {
        let authority = match &inbound.destination {
            Destination::Service { service, port, .. } => {
                return of_service(proxy, published, service, *port);
            }
            Destination::Workload { address, .. } => Authority::Address(*address),
            // A gateway sends on what a route sends, and nothing else.
            Destination::Listener { .. } => return Err(Failure::NoRoute),
        };
        let protocol = inbound.destination.protocol();
        return Ok(Target {
            authority,
            backend: None,
            protocol,
            balanced: None,
            tls: false,
            is_dynamic: false,
            asked: None,
            session: None,
            role: ClientRole::Waypoint,
        });
    };
    let invalid =
        |reason: &str| Failure::InvalidRoute { route: rule.route.to_string(), reason: reason.to_owned() };
    if let Some(target) = of_session(proxy, published, routed) {
        return Ok(target);
    }
    let total = rule.backends.total();
    if total == 0 {
        return Err(invalid("no backend gets requests"));
    }
    let drawn = rule.backends.choose(rand::rng().random_range(0..total));
    let backend = drawn.ok_or_else(|| invalid("no backend gets requests"))?;
    let transport = inbound.destination.transport();
    of_port(proxy, published, backend, transport).map_err(|reason| invalid(&reason))
}

/// The backend that the client's session is at, as long as that has endpoints.
pub fn of_session(proxy: &Proxy, published: &Published, routed: &Routed) -> Option<Target> {
    let token = routed.session.as_ref()?.token?;
    let rule = &routed.rule;
    let backend = rule.backends.of_sessions().find(|it| BackendId::new(rule, it) == token.backend)?;
    let target = of_backend(proxy, published, backend).ok()?;
    let balancer = target.balanced.as_ref()?.current(proxy).ok()?;
    (!balancer.hosts().is_empty()).then(|| Target { session: Some(token.endpoint), ..target })
}

/// A port of a service as a target.
///
/// # Errors
/// [`Failure::NoEndpoint`], [`Failure::InvalidPolicy`], [`Failure::UnknownService`].
pub fn of_service(
    proxy: &Proxy,
    published: &Published,
    service: &Service,
    port: u16,
) -> Result<Target, Failure> {
    let Some(mapping) = service.ports.get(port) else {
        return Err(Failure::NoEndpoint(format!("service {} has no port {port}", service.host)));
    };
    let key = SlotKey { host: service.host.clone(), port, transport: Transport::Tcp, subset: None };
    let (balanced, tls) = balanced(proxy, published, &key).map_err(|why| failure(why, &key))?;
    Ok(Target {
        authority: Authority::Host { host: service.host.hostname.clone(), port },
        backend: None,
        protocol: mapping.app_protocol,
        balanced: Some(balanced),
        tls,
        is_dynamic: service.resolves_dynamically,
        asked: None,
        session: None,
        role: ClientRole::Waypoint,
    })
}

/// Where a request to a service goes that a gateway sends through the service's waypoint, which chooses the endpoint and goes by
/// policies; `None` for one that it sends straight to an endpoint.
fn through_waypoint(
    proxy: &Proxy,
    published: &Published,
    service: &Service,
    backend: &Backend,
) -> Option<Target> {
    let has_waypoint = service.waypoint.is_some() || !service.weighted_waypoints.is_empty();
    if !published.is_gateway() || !service.ingress_use_waypoint || !has_waypoint {
        return None;
    }
    let own = |vip: &Vip| match vip {
        Vip::Address(address) if address.network == proxy.settings.network => Some(address.address),
        Vip::Address(_) | Vip::Net { .. } => None,
    };
    let authority = match service.vips.iter().find_map(own) {
        Some(address) => Authority::Address(SocketAddr::new(address, backend.port)),
        None => Authority::Host { host: backend.hostname.clone(), port: backend.port },
    };
    Some(Target {
        authority,
        backend: Some(backend.clone()),
        protocol: service.ports.get(backend.port).map(|port| port.app_protocol).unwrap_or_default(),
        balanced: None,
        tls: false,
        is_dynamic: false,
        asked: None,
        session: None,
        role: ClientRole::Ingress,
    })
}

/// The target that a backend is.
///
/// # Errors
/// Why it can be none.
pub fn of_backend(proxy: &Proxy, published: &Published, backend: &Backend) -> Result<Target, String> {
    of_port(proxy, published, backend, Transport::Tcp)
}

/// The same for the backend's port of a transport.
fn of_port(
    proxy: &Proxy,
    published: &Published,
    backend: &Backend,
    transport: Transport,
) -> Result<Target, String> {
    if let Some(reason) = &backend.invalid {
        return Err(reason.to_string());
    }
    let service = service_of(published, backend)?;
    // Waypoints take no datagrams.
    let through = match transport {
        Transport::Tcp => through_waypoint(proxy, published, service, backend),
        Transport::Udp => None,
    };
    match through {
        Some(target) => Ok(target),
        None => of_endpoints(proxy, published, service, backend, transport),
    }
}

fn service_of<'p>(published: &'p Published, backend: &Backend) -> Result<&'p Arc<Service>, String> {
    let host = HostRef { namespace: &backend.namespace, hostname: &backend.hostname };
    let service = published.directory.service(host);
    service.ok_or_else(|| format!("service {} is not known", backend.hostname))
}

/// The endpoints of a backend as the target.
fn of_endpoints(
    proxy: &Proxy,
    published: &Published,
    service: &Service,
    backend: &Backend,
    transport: Transport,
) -> Result<Target, String> {
    let port = service.ports.of(transport, backend.port);
    let key = SlotKey {
        host: NamespacedHost { namespace: backend.namespace.clone(), hostname: backend.hostname.clone() },
        port: backend.port,
        transport,
        subset: backend.subset.clone(),
    };
    let (balanced, tls) = balanced(proxy, published, &key).map_err(|why| why.to_string())?;
    Ok(Target {
        authority: Authority::Host { host: backend.hostname.clone(), port: backend.port },
        backend: Some(backend.clone()),
        protocol: port.map(|port| port.app_protocol).unwrap_or_default(),
        balanced: Some(balanced),
        tls,
        is_dynamic: service.resolves_dynamically,
        asked: None,
        session: None,
        role: ClientRole::Waypoint,
    })
}

/// The endpoints of a port or subset, and whether they are sent requests inside TLS.
fn balanced(proxy: &Proxy, published: &Published, key: &SlotKey) -> Result<(Balanced, bool), Unresolved> {
    let snapshot = &published.directory;
    let policies = published.backends.clone();
    let slot = proxy.balancers.get(key);
    let known = slot.as_ref().and_then(|slot| slot.known(snapshot, &policies));
    // A subset that is not known any more, and a policy that can't be followed, are known before anything is sent.
    let (slot, balancer) = match (slot, known) {
        (Some(slot), Some(known)) => (slot, known?),
        _ => {
            let own = own_workload(proxy, snapshot).map_err(|_| Unresolved::Service)?;
            let sources = Sources { snapshot, own, policies: &policies };
            let slot = proxy.balancers.find(key, &sources)?;
            let balancer = slot.current(&sources)?;
            (slot, balancer)
        }
    };
    let tls = balancer.policy().tls.as_ref().is_some_and(|tls| !tls.is_of_mesh());
    Ok((Balanced { slot, policies }, tls))
}

fn failure(why: Unresolved, key: &SlotKey) -> Failure {
    match why {
        Unresolved::Service => Failure::UnknownService(key.host.to_string()),
        Unresolved::Subset(reason) => Failure::InvalidPolicy(reason),
        Unresolved::Policy(reason) => Failure::InvalidPolicy(reason.to_string()),
    }
}

impl Balanced {
    /// The time that ejections are measured by.
    pub fn now(&self) -> Duration {
        self.slot.now()
    }

    /// The endpoints in their present state.
    ///
    /// # Errors
    /// [`Failure::UnknownService`], [`Failure::InvalidPolicy`], [`Failure::Unavailable`].
    pub fn current(&self, proxy: &Proxy) -> Result<Arc<Balancer>, Failure> {
        let published = proxy.published.load();
        let snapshot = &published.directory;
        let known = self.slot.known(snapshot, &self.policies);
        let current = match known {
            Some(known) => known,
            None => {
                let own = own_workload(proxy, snapshot)?;
                self.slot.current(&Sources { snapshot, own, policies: &self.policies })
            }
        };
        current.map_err(|why| failure(why, self.slot.key()))
    }
}

/// An endpoint.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The workload; none for an address that the directory does not know.
    pub workload: Option<Arc<Workload>>,
    /// The service that it was chosen for.
    pub service: Option<Arc<Service>>,
    /// Its address and port.
    pub address: SocketAddr,
    /// Where its proxy listens, and who must answer there; none outside the mesh.
    pub tunnel: Option<(SocketAddr, SmallVec<[SpiffeId; 1]>)>,
    /// TLS that ends at the endpoint itself, as a policy demands.
    pub tls: Option<EndpointTls>,
    /// The name that DNS locates it by; its address is that of [`names::locate`] then.
    pub host: Option<names::Host>,
    /// The second tunnel inside that one, where it leads into another network.
    pub crossing: Option<Box<Crossing>>,
    /// What the waypoint is asked for where the tunnel leads to the waypoint of a service.
    pub asked_of_waypoint: Option<Authority>,
}

/// What a tunnel to the gateway of another network carries (HBONE contract, "Double HBONE").
#[derive(Debug, Clone)]
pub struct Crossing {
    /// The gateway's workload.
    pub gateway: WorkloadUid,
    /// The service and its port: which endpoint answers is the other network's choice.
    pub authority: Authority,
    /// Who must answer inside.
    pub expected: SmallVec<[SpiffeId; 1]>,
    /// The waypoint's own network.
    pub network: Arc<str>,
}

impl Endpoint {
    /// What sessions name it by; none for what is not one of the endpoints of a service here.
    pub fn session_id(&self) -> Option<EndpointId> {
        let is_endpoint = self.crossing.is_none() && self.asked_of_waypoint.is_none();
        let workload = self.workload.as_ref().filter(|_| is_endpoint)?;
        Some(EndpointId::new(&workload.uid, self.address.port()))
    }

    /// What its HTTP connections may be shared by.
    ///
    /// # Errors
    /// [`Failure::InvalidPolicy`].
    pub fn key(&self, http2: bool, gate: Option<&Gate>) -> Result<Key, Failure> {
        Ok(Key {
            workload: self.workload.as_ref().map(|workload| workload.uid.clone()),
            address: self.address,
            http2,
            tls: self.tls.as_ref().map(EndpointTls::key).transpose()?,
            shape: gate.and_then(|gate| gate.shape.clone()),
            asked_of_waypoint: self.asked_of_waypoint.clone(),
        })
    }

    /// Its identity, as far as one is expected.
    pub fn identity(&self) -> Option<&SpiffeId> {
        match (&self.crossing, &self.tunnel) {
            (Some(crossing), _) => crossing.expected.first(),
            (None, Some((_, expected))) => expected.first(),
            (None, None) => None,
        }
    }
}

/// An endpoint that was chosen.
#[derive(Debug)]
pub struct Chosen {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// Learns how the request ends; none for an address that was dialled.
    pub trial: Option<Trial>,
    /// How much may go there at once; none for an address that was dialled.
    pub gate: Option<Gate>,
}

/// Chooses an endpoint for a request, which is counted among those in progress.
///
/// # Errors
/// Those of [`endpoint`], and [`Failure::Overflow`].
pub fn request_endpoint(
    worker: &Worker,
    source: SocketAddr,
    target: &Target,
    tried: &[WorkloadUid],
    key: Option<u64>,
) -> Result<Chosen, Failure> {
    let mut chosen = endpoint(worker, source, target, tried, key)?;
    if let (Some(trial), Some(gate)) = (&mut chosen.trial, &chosen.gate) {
        trial.admit(gate.pool())?;
    }
    Ok(chosen)
}

/// Chooses an endpoint that was not tried, by the hash of the request where it has one.
///
/// # Errors
/// [`Failure::NoEndpoint`], [`Failure::UnknownService`], [`Failure::InvalidPolicy`], [`Failure::Unavailable`].
pub fn endpoint(
    worker: &Worker,
    source: SocketAddr,
    target: &Target,
    tried: &[WorkloadUid],
    key: Option<u64>,
) -> Result<Chosen, Failure> {
    let proxy = &worker.proxy;
    let Some(balanced) = &target.balanced else {
        return match resolved(proxy, source, target, tried)? {
            Resolved::Endpoint(endpoint) => {
                Ok(Chosen { endpoint: Arc::new(*endpoint), trial: None, gate: None })
            }
            Resolved::PastWaypoint(direct) => endpoint(worker, source, &direct, tried, key),
        };
    };
    let balancer = balanced.current(proxy)?;
    if let Some(asked) = &target.asked {
        let endpoint = Arc::new(dynamic(&balancer, balanced.slot.key(), asked)?);
        let chosen = balanced.slot.choose_asked(&balancer, asked);
        let (trial, gate) = chosen.ok_or_else(|| Failure::NoEndpoint(format!("{asked} is ejected")))?;
        return Ok(Chosen { endpoint, trial: Some(trial), gate: Some(gate) });
    }
    let chosen = balanced.slot.choose(
        &balancer,
        &proxy.published.load().directory,
        tried,
        Wanted { key, session: target.session.as_ref() },
    );
    let why = match chosen {
        Ok(chosen) => {
            let (trial, gate) = (Some(chosen.trial), Some(chosen.gate));
            return Ok(Chosen { endpoint: chosen.endpoint, trial, gate });
        }
        Err(why) => why,
    };
    let slot = balanced.slot.key();
    // TLS that a policy demands ends at the endpoint itself, and who that is the other network decides.
    if !target.tls
        && let Some(endpoint) = in_another_network(proxy, source, slot, tried)?
    {
        return Ok(Chosen { endpoint: Arc::new(endpoint), trial: None, gate: None });
    }
    let SlotKey { host, port, .. } = slot;
    Err(Failure::NoEndpoint(format!("service {host}, port {port}: {why}")))
}

/// An endpoint of a service in another network, for when this one has none. Subsets stay in their network: labels are not
/// known across.
fn in_another_network(
    proxy: &Proxy,
    source: SocketAddr,
    SlotKey { host, port, transport, subset }: &SlotKey,
    tried: &[WorkloadUid],
) -> Result<Option<Endpoint>, Failure> {
    // Tunnels carry no datagrams.
    if subset.is_some() || *transport == Transport::Udp {
        return Ok(None);
    }
    let published = proxy.published.load();
    let question = Question {
        client: own_workload(proxy, &published.directory)?,
        role: ClientRole::Waypoint,
        source: source.ip(),
        destination: Authority::Host { host: host.hostname.clone(), port: *port },
        exclude: tried,
    };
    match resolve(&published.directory, &question, &InProgress(proxy), &mut rand::rng()) {
        // The name may be another's in the waypoint's own namespace.
        Route::DoubleHbone(route) if route.service.host == *host => Ok(Some(across(route))),
        _ => Ok(None),
    }
}

/// The way into another network.
fn across(route: DoubleTunnel) -> Endpoint {
    Endpoint {
        workload: Some(route.workload),
        service: Some(route.service),
        address: route.hbone,
        tunnel: Some((route.hbone, route.expected)),
        tls: None,
        host: None,
        crossing: Some(Box::new(Crossing {
            gateway: route.gateway.uid.clone(),
            authority: route.authority,
            expected: route.inner_expected,
            network: route.network,
        })),
        asked_of_waypoint: None,
    }
}

/// Wherever DNS says that a host is which a client asks for.
fn dynamic(balancer: &Balancer, key: &SlotKey, asked: &Arc<str>) -> Result<Endpoint, Failure> {
    let service = balancer.service();
    let port = service.ports.get(key.port).map(|mapping| mapping.target_port);
    let no_port = || Failure::NoEndpoint(format!("service {} has no port {}", key.host, key.port));
    let tls = balancer.policy().tls.as_ref().map(|settings| EndpointTls {
        settings: settings.clone(),
        name: settings.server_name().map_or_else(|| asked.clone(), Arc::from),
        identity: None,
    });
    Ok(Endpoint {
        workload: None,
        service: Some(service.clone()),
        address: SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port.ok_or_else(no_port)?),
        tunnel: None,
        tls,
        crossing: None,
        asked_of_waypoint: None,
        host: Some(names::Host::asked(asked)),
    })
}

/// Where a target without endpoints of its own leads.
enum Resolved {
    Endpoint(Box<Endpoint>),
    /// The waypoint that it leads to is missing, and the owner of the service allows the direct way.
    PastWaypoint(Box<Target>),
}

/// What the directory says of an address that was dialled, and of a service that a gateway sends requests to through its waypoint.
fn resolved(
    proxy: &Proxy,
    source: SocketAddr,
    target: &Target,
    tried: &[WorkloadUid],
) -> Result<Resolved, Failure> {
    let published = proxy.published.load();
    let snapshot = &published.directory;
    let question = Question {
        client: own_workload(proxy, snapshot)?,
        role: target.role,
        source: source.ip(),
        destination: target.authority.clone(),
        exclude: tried,
    };
    let route = resolve(snapshot, &question, &InProgress(proxy), &mut rand::rng());
    if let (Some(backend), true) = (&target.backend, is_past_waypoint(&route)) {
        proxy.tallies.waypoint_bypassed.fetch_add(1, Ordering::Relaxed);
        let service = service_of(&published, backend).map_err(Failure::UnknownService)?;
        let direct =
            of_endpoints(proxy, &published, service, backend, Transport::Tcp).map_err(Failure::NoEndpoint)?;
        return Ok(Resolved::PastWaypoint(Box::new(direct)));
    }
    let endpoint = match route {
        Route::Tunnel(route) | Route::SameNode(route) => Endpoint {
            workload: Some(route.workload),
            service: route.service,
            address: route.address,
            tunnel: Some((route.hbone, route.expected)),
            crossing: None,
            asked_of_waypoint: None,
            tls: None,
            host: None,
        },
        Route::Waypoint(route) => Endpoint {
            workload: Some(route.waypoint),
            service: route.service,
            address: route.hbone,
            tunnel: Some((route.hbone, route.expected)),
            crossing: None,
            asked_of_waypoint: Some(route.authority),
            tls: None,
            host: None,
        },
        Route::DoubleHbone(route) if target.role == ClientRole::Ingress => across(route),
        Route::Plain(route) | Route::Own(route) => Endpoint {
            workload: route.workload,
            service: route.service,
            address: route.address,
            tunnel: None,
            crossing: None,
            asked_of_waypoint: None,
            tls: None,
            host: None,
        },
        Route::Refuse(refusal) => return Err(Failure::NoEndpoint(refusal.to_string())),
        Route::Unknown(unknown) => return Err(Failure::UnknownService(unknown.authority.to_string())),
        Route::Lookup(_) | Route::DoubleHbone(_) => {
            return Err(Failure::NoEndpoint(format!(
                "{} needs a route that a waypoint does not support",
                target.authority
            )));
        }
    };
    // The name of a service may be another's in the gateway's own namespace.
    if let (Some(backend), Some(service)) = (&target.backend, &endpoint.service)
        && (service.host.hostname != backend.hostname || service.host.namespace != backend.namespace)
    {
        return Err(Failure::UnknownService(target.authority.to_string()));
    }
    if !is_elsewhere(endpoint.address.ip(), question.client) {
        return Err(Failure::NoEndpoint(format!("{} is the waypoint's own address", endpoint.address)));
    }
    Ok(Resolved::Endpoint(Box::new(endpoint)))
}

/// Whether a route leads past a waypoint that is missing, as the owner of the service allows.
fn is_past_waypoint(route: &Route) -> bool {
    match route {
        Route::Tunnel(route) | Route::SameNode(route) => route.waypoint_bypassed,
        Route::Plain(route) | Route::Own(route) => route.waypoint_bypassed,
        Route::Lookup(route) => route.waypoint_bypassed,
        Route::DoubleHbone(route) => route.waypoint_bypassed,
        Route::Waypoint(_) | Route::Refuse(_) | Route::Unknown(_) => false,
    }
}

/// Whether an address leads away from the waypoint `own`. Who writes a ServiceEntry must not reach what listens here for
/// the pod alone, and a request that the waypoint sends to itself would come back for ever.
pub fn is_elsewhere(address: IpAddr, own: &Workload) -> bool {
    !is_local(address) && !own.has_address(address)
}

/// The same at the last moment, for an address that is about to be dialled.
///
/// # Errors
/// [`Failure::NoEndpoint`], [`Failure::Unavailable`].
pub fn guard(proxy: &Proxy, address: SocketAddr) -> Result<(), Failure> {
    let published = proxy.published.load();
    let own = own_workload(proxy, &published.directory)?;
    match is_elsewhere(address.ip(), own) {
        true => Ok(()),
        false => Err(Failure::NoEndpoint(format!("{address} is the waypoint's own address"))),
    }
}

pub(crate) fn own_workload<'a>(proxy: &Proxy, snapshot: &'a Snapshot) -> Result<&'a Arc<Workload>, Failure> {
    let own = snapshot.workload(proxy.settings.uid.as_str());
    own.ok_or_else(|| {
        Failure::Unavailable(format!("the waypoint's own workload {} is not known", proxy.settings.uid))
    })
}

/// An address of the waypoint itself.
pub(crate) fn own_address(proxy: &Proxy) -> Result<IpAddr, Failure> {
    let published = proxy.published.load();
    let own = own_workload(proxy, &published.directory)?;
    own.addresses
        .first()
        .copied()
        .ok_or_else(|| Failure::Unavailable("the waypoint has no address".to_owned()))
}

/// Requests in progress stand for connections.
struct InProgress<'a>(&'a Proxy);

impl Load for InProgress<'_> {
    fn connections(&self, workload: &WorkloadUid) -> u32 {
        self.0.loads.get(workload)
    }
}

#[cfg(test)]
mod tests {
    use ambit_api::workload as wire;
    use ambit_directory::{Directory, Update};

    use super::*;

    #[test]
    fn nothing_is_sent_to_the_waypoint_itself() {
        let (mut directory, reader) = Directory::new();
        let uid = "c//Pod/shop/waypoint";
        let own = wire::Workload {
            uid: uid.to_owned(),
            name: "waypoint".to_owned(),
            namespace: "shop".to_owned(),
            addresses: vec![vec![10, 0, 0, 9].into()],
            ..wire::Workload::default()
        };
        let address = wire::Address { r#type: Some(wire::address::Type::Workload(own)) };
        assert!(directory.apply([Update::Address { name: uid.to_owned(), address }]).is_empty());
        let own = reader.load().workload(uid).unwrap().clone();
        for address in ["10.0.0.8", "172.16.0.1", "fd00::1", "240.240.0.1"] {
            assert!(is_elsewhere(address.parse().unwrap(), &own), "{address}");
        }
        for address in [
            "10.0.0.9",
            "::ffff:10.0.0.9",
            "127.0.0.1",
            "127.8.0.1",
            "::1",
            "::ffff:127.0.0.1",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "169.254.169.254",
            "fe80::1",
            "255.255.255.255",
            "224.0.0.1",
            "ff02::1",
        ] {
            assert!(!is_elsewhere(address.parse().unwrap(), &own), "{address}");
        }
    }
}
