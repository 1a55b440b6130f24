//! Where a connection goes: a pure function of a snapshot, the client and what was dialled.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ambit_api::Authority;
use ambit_api::ports::INBOUND_HBONE;
use rand::Rng;
use smallvec::SmallVec;

use crate::choose::Load;
use crate::endpoints::Known;
use crate::name::{AddressRef, Demand, NamespacedHost, NetworkAddress, WorkloadUid};
use crate::route::{DoubleTunnel, Expected, Lookup, Plain, Refusal, Route, Tunnel, Unknown, WaypointTunnel};
use crate::service::{Gateway, GatewayDestination, IpFamilies, Mode, Service};
use crate::snapshot::Snapshot;
use crate::upstream::{Chooser, NoProxy, Proxy, expected, gateway_refusal, waypoint_refusal};
use crate::workload::{TunnelProtocol, Workload};

/// What a client is, as far as waypoints go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum ClientRole {
    /// A pod like any other: waypoints apply.
    #[default]
    Workload,
    /// A waypoint that has done its part: none applies.
    Waypoint,
    /// A gateway for traffic from outside: waypoints apply to services that say so.
    Ingress,
}

/// A connection that is to be routed.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    /// Who dials.
    pub client: &'a Workload,
    /// What the client is.
    pub role: ClientRole,
    /// The address that it dials from; decides where a service keeps clients on one endpoint.
    pub source: IpAddr,
    /// What it dialled.
    pub destination: Authority,
    /// Workloads that were tried already ([`Route::next_hop`]): none of them is chosen.
    pub exclude: &'a [WorkloadUid],
}

/// Routes a connection. Fails closed: where a waypoint or gateway is demanded and missing, the answer is a refusal.
///
/// `load` gives the number of connections to each workload, as this node sees it.
pub fn resolve(snapshot: &Snapshot, question: &Question<'_>, load: &impl Load, rng: &mut impl Rng) -> Route {
    resolve_with(snapshot, question, load, rng, None)
}

/// As [`resolve`], for a directory that holds only what was demanded: returns in addition the names that the route depends on. While one of them
/// is not known, the control plane has to be asked for it before the route is taken.
pub fn resolve_on_demand(
    snapshot: &Snapshot,
    question: &Question<'_>,
    load: &impl Load,
    rng: &mut impl Rng,
) -> (Route, Dependencies) {
    let mut dependencies = Dependencies::new();
    let route = resolve_with(snapshot, question, load, rng, Some(&mut dependencies));
    (route, dependencies)
}

/// A name that a route depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dependency {
    /// The name on the control plane.
    pub demand: Demand,
    /// Whether the directory has a resource of that name.
    pub is_known: bool,
}

/// The names that a route depends on.
pub type Dependencies = SmallVec<[Dependency; 2]>;

fn resolve_with(
    snapshot: &Snapshot,
    question: &Question<'_>,
    load: &impl Load,
    rng: &mut impl Rng,
    dependencies: Option<&mut Dependencies>,
) -> Route {
    let chooser = Chooser { snapshot, question, load, rng, dependencies };
    let mut resolver = Resolver { chooser, bypassed: false };
    let route = match &question.destination {
        Authority::Address(address) => resolver.by_address(*address),
        Authority::Host { host, port } => resolver.by_host(host, *port),
    };
    route.unwrap_or_else(Route::Refuse)
}

struct Resolver<'a, 'q, L, R> {
    chooser: Chooser<'a, 'q, L, R>,
    /// Whether a missing waypoint was passed by, as its owner allows.
    bypassed: bool,
}

type Outcome = Result<Route, Refusal>;

impl<'a, L: Load, R: Rng> Resolver<'a, '_, L, R> {
    fn by_address(&mut self, address: SocketAddr) -> Outcome {
        let snapshot = self.chooser.snapshot;
        let client = self.chooser.question.client;
        let (network, ip, port) = (&*client.network, address.ip(), address.port());
        // A network of addresses, or another workload that claims this one, says nothing of whether a pod has it.
        self.chooser.depend(|| {
            let at = AddressRef { network, address: ip.to_canonical() };
            let is_known = !snapshot.vips.at(at).is_empty() || snapshot.has_pod_at(at);
            Dependency { demand: demand_of(client, ip), is_known }
        });
        if let Some(known) = snapshot.known_at(network, ip, port, &client.namespace) {
            self.by_service(known, port)
        } else if let Some(workload) = snapshot.workload_at(network, ip) {
            self.dialled_workload(workload, None, address)
        } else if let Some(known) = snapshot.known_around(network, ip, port, &client.namespace) {
            self.by_service(known, port)
        } else {
            Ok(Route::Unknown(Unknown { authority: address.into(), demand: demand_of(client, ip) }))
        }
    }

    fn by_host(&mut self, hostname: &Arc<str>, port: u16) -> Outcome {
        let snapshot = self.chooser.snapshot;
        let client = self.chooser.question.client;
        let service = snapshot.service_named(hostname, &client.namespace);
        let host =
            || NamespacedHost { namespace: Arc::clone(&client.namespace), hostname: Arc::clone(hostname) };
        self.chooser.depend(|| match service {
            Some(service) => Dependency { demand: Demand::Service(service.host.clone()), is_known: true },
            None => Dependency {
                demand: Demand::Service(host()),
                is_known: !snapshot.workloads_named(hostname).is_empty(),
            },
        });
        if let Some(known) = service.and_then(|service| snapshot.known(service.host.as_ref())) {
            return self.by_service(known, port);
        }
        if let Some(workload) =
            snapshot.workloads_named(hostname).iter().find(|workload| workload.is_healthy())
            && let Some(ip) = workload.address_like(None)
        {
            return self.dialled_workload(workload, None, SocketAddr::new(ip, port));
        }
        let authority = self.chooser.question.destination.clone();
        Ok(Route::Unknown(Unknown { authority, demand: Demand::Service(host()) }))
    }

    fn by_service(&mut self, known: &'a Arc<Known>, port: u16) -> Outcome {
        let service = &known.service;
        let passthrough = service.load_balancing.mode == Mode::Passthrough;
        if !service.captures(port) {
            return Err(Refusal::NoSuchPort { service: service.host.clone(), port });
        }
        if let Some(route) = self.through_service_waypoint(service)? {
            return Ok(route);
        }
        if passthrough && let Authority::Address(address) = self.chooser.question.destination {
            return self.past(service, address);
        }
        let choice = self.chooser.endpoint(known, port).map_err(|cause| Refusal::NoEndpoint {
            service: service.host.clone(),
            port,
            cause,
        })?;
        let workload = &choice.endpoint.workload;
        let ip = workload.address_like(self.family(service));
        self.reach(workload, Some(service), ip, choice.port)
    }

    /// To the address that was dialled, as the service makes no choice.
    fn past(&mut self, service: &'a Arc<Service>, address: SocketAddr) -> Outcome {
        let network = &self.chooser.question.client.network;
        match self.chooser.snapshot.workload_at(network, address.ip()) {
            Some(workload) => {
                self.check_untried(workload)?;
                self.reach(workload, Some(service), Some(address.ip().to_canonical()), address.port())
            }
            None => Ok(Route::Plain(Plain {
                address,
                workload: None,
                service: Some(Arc::clone(service)),
                waypoint_bypassed: self.bypassed,
            })),
        }
    }

    /// To a workload whose own address was dialled.
    fn dialled_workload(
        &mut self,
        workload: &'a Arc<Workload>,
        service: Option<&'a Arc<Service>>,
        address: SocketAddr,
    ) -> Outcome {
        // A pod that dials itself stays within itself, with or without waypoint.
        if !workload.is_same(self.chooser.question.client)
            && let Some(route) = self.through_workload_waypoint(workload, address)?
        {
            return Ok(route);
        }
        self.check_untried(workload)?;
        self.reach(workload, service, Some(address.ip().to_canonical()), address.port())
    }

    fn check_untried(&self, workload: &Workload) -> Result<(), Refusal> {
        if self.chooser.question.exclude.contains(&workload.uid) {
            return Err(Refusal::Tried { workload: workload.uid.clone() });
        }
        Ok(())
    }

    fn through_service_waypoint(&mut self, service: &'a Arc<Service>) -> Result<Option<Route>, Refusal> {
        let applies = match self.chooser.question.role {
            ClientRole::Workload => true,
            ClientRole::Waypoint => false,
            ClientRole::Ingress => service.ingress_use_waypoint,
        };
        if !applies || (service.waypoint.is_none() && service.weighted_waypoints.is_empty()) {
            return Ok(None);
        }
        let waypoints = self.chooser.waypoints(service);
        if waypoints.iter().any(|waypoint| self.chooser.client_is(waypoint)) {
            return Ok(None);
        }
        let mut first_refusal = None;
        for waypoint in waypoints {
            match self.through_waypoint(waypoint, Some(service), None) {
                Ok(route) => return Ok(Some(route)),
                Err(refusal) => _ = first_refusal.get_or_insert(refusal),
            }
        }
        match first_refusal {
            Some(refusal) if !service.waypoint_failure_open => Err(refusal),
            refusal => {
                self.bypassed = refusal.is_some();
                Ok(None)
            }
        }
    }

    fn through_workload_waypoint(
        &mut self,
        workload: &'a Arc<Workload>,
        address: SocketAddr,
    ) -> Result<Option<Route>, Refusal> {
        let Some(waypoint) = &workload.waypoint else { return Ok(None) };
        if self.chooser.question.role != ClientRole::Workload || self.chooser.client_is(waypoint) {
            return Ok(None);
        }
        match self.through_waypoint(waypoint, None, Some((workload, address))) {
            Ok(route) => Ok(Some(route)),
            Err(_) if workload.waypoint_failure_open => {
                self.bypassed = true;
                Ok(None)
            }
            Err(refusal) => Err(refusal),
        }
    }

    fn through_waypoint(
        &mut self,
        waypoint: &Gateway,
        service: Option<&'a Arc<Service>>,
        dialled: Option<(&'a Arc<Workload>, SocketAddr)>,
    ) -> Outcome {
        // Into another network only services lead.
        let proxy = self
            .chooser
            .proxy(waypoint, service.is_some())
            .map_err(|reason| waypoint_refusal(waypoint, reason))?;
        if proxy.workload.network != self.chooser.question.client.network {
            let port = self.chooser.question.destination.port();
            return self.through_gateway(proxy.workload, service, port, proxy.expected());
        }
        let hbone = proxy.hbone(self.own_family()).ok_or(NoProxy::Unknown);
        Ok(Route::Waypoint(WaypointTunnel {
            hbone: hbone.map_err(|reason| waypoint_refusal(waypoint, reason))?,
            expected: proxy.expected(),
            waypoint: Arc::clone(proxy.workload),
            waypoint_service: proxy.service.cloned(),
            service: service.cloned(),
            workload: dialled.map(|(workload, _)| Arc::clone(workload)),
            authority: match dialled {
                Some((_, address)) => Authority::Address(address),
                None => self.chooser.question.destination.clone(),
            },
        }))
    }

    fn reach(
        &mut self,
        workload: &'a Arc<Workload>,
        service: Option<&'a Arc<Service>>,
        ip: Option<IpAddr>,
        port: u16,
    ) -> Outcome {
        let client = self.chooser.question.client;
        let waypoint_bypassed = self.bypassed;
        let service_arc = service.cloned();
        if workload.network != client.network {
            let service_port = self.chooser.question.destination.port();
            let inner_expected = self.expected_in_network(workload, service);
            return self.through_gateway(workload, service, service_port, inner_expected);
        }
        let workload_arc = Arc::clone(workload);
        let Some(ip) = ip else {
            return Ok(Route::Lookup(Lookup {
                expected: expected(workload, service.map(|service| &**service)),
                workload: workload_arc,
                service: service_arc,
                port,
                waypoint_bypassed,
            }));
        };
        let address = SocketAddr::new(ip, port);
        let plain =
            |workload| Plain { address, workload: Some(workload), service: service_arc, waypoint_bypassed };
        if workload.is_same(client) {
            return Ok(Route::Own(plain(workload_arc)));
        }
        match workload.tunnel {
            TunnelProtocol::None | TunnelProtocol::LegacyIstioMtls => Ok(Route::Plain(plain(workload_arc))),
            TunnelProtocol::Hbone => {
                let tunnel = Tunnel {
                    expected: expected(workload, service.map(|service| &**service)),
                    workload: workload_arc,
                    service: service.cloned(),
                    address,
                    hbone: SocketAddr::new(ip, INBOUND_HBONE),
                    waypoint_bypassed,
                };
                // One that ends its tunnels itself has no proxy on the node that could take its part.
                let hand_over = !workload.native_tunnel && client.shares_node_with(workload);
                Ok(if hand_over { Route::SameNode(tunnel) } else { Route::Tunnel(tunnel) })
            }
        }
    }

    /// Into the network of `workload`. HBONE contract, "Double HBONE": the entry is by service, and the other network chooses who
    /// answers.
    fn through_gateway(
        &mut self,
        workload: &'a Arc<Workload>,
        service: Option<&'a Arc<Service>>,
        port: u16,
        inner_expected: Expected,
    ) -> Outcome {
        let (uid, network) = (|| workload.uid.clone(), || Arc::clone(&workload.network));
        let gateway = workload
            .network_gateway
            .as_ref()
            .ok_or_else(|| Refusal::NoNetworkGateway { workload: uid(), network: network() })?;
        let service =
            service.ok_or_else(|| Refusal::NoServiceInNetwork { workload: uid(), network: network() })?;
        let proxy = self.chooser.proxy(gateway, true).map_err(|reason| gateway_refusal(gateway, reason))?;
        let hbone = gateway_address(gateway, &proxy, self.own_family())
            .ok_or_else(|| gateway_refusal(gateway, NoProxy::Unknown))?;
        Ok(Route::DoubleHbone(DoubleTunnel {
            expected: proxy.expected(),
            gateway: Arc::clone(proxy.workload),
            workload: Arc::clone(workload),
            hbone,
            authority: Authority::Host { host: Arc::clone(&service.host.hostname), port },
            inner_expected,
            network: Arc::clone(&self.chooser.question.client.network),
            service: Arc::clone(service),
            waypoint_bypassed: self.bypassed,
        }))
    }

    /// Who may answer for `service` in the network of `workload`: any of its endpoints there, as the other network chooses.
    fn expected_in_network(&self, workload: &Workload, service: Option<&'a Arc<Service>>) -> Expected {
        let mut expected = expected(workload, service.map(|service| &**service));
        let endpoints = service.and_then(|service| self.chooser.snapshot.endpoints(service.host.as_ref()));
        let others = endpoints.into_iter().flatten().map(|endpoint| &endpoint.workload);
        for other in others.filter(|other| other.network == workload.network) {
            if !expected.contains(&other.identity) {
                expected.push(other.identity.clone());
            }
        }
        expected
    }

    /// An address of the family that is preferred for endpoints of `service`.
    fn family(&self, service: &Service) -> Option<IpAddr> {
        match (service.ip_families, &self.chooser.question.destination) {
            (IpFamilies::Ipv4Only, _) => Some(std::net::Ipv4Addr::UNSPECIFIED.into()),
            (IpFamilies::Ipv6Only, _) => Some(std::net::Ipv6Addr::UNSPECIFIED.into()),
            (IpFamilies::Automatic | IpFamilies::Dual, Authority::Address(address)) => {
                Some(address.ip().to_canonical())
            }
            (IpFamilies::Automatic | IpFamilies::Dual, Authority::Host { .. }) => self.own_family(),
        }
    }

    /// An address of the client's own family.
    fn own_family(&self) -> Option<IpAddr> {
        self.chooser.question.client.addresses.first().copied()
    }
}

/// What to ask the control plane for to know who is at `ip`.
fn demand_of(client: &Workload, ip: IpAddr) -> Demand {
    Demand::Address(NetworkAddress { network: Arc::clone(&client.network), address: ip.to_canonical() })
}

/// Where to dial a network gateway: as it was named, which is what this network can reach.
fn gateway_address(gateway: &Gateway, proxy: &Proxy<'_>, like: Option<IpAddr>) -> Option<SocketAddr> {
    match (&gateway.destination, proxy.named_address) {
        (GatewayDestination::Address(_), Some(address)) => {
            Some(SocketAddr::new(address, gateway.hbone_mtls_port))
        }
        (GatewayDestination::Address(_) | GatewayDestination::Hostname(_), _) => proxy.hbone(like),
    }
}
