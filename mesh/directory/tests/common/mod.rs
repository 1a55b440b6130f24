//! Small ways to say what a control plane sends and what a client dials.

#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "a test that cannot go on fails; not every test uses all of it"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::security::Authorization;
use ambit_api::workload::{
    Address, Extension, GatewayAddress, LoadBalancing, Locality, NamespacedHostname, NetworkAddress,
    NetworkMode, Port, PortList, Service, TunnelProtocol, Workload, WorkloadStatus, address, gateway_address,
    load_balancing::{Mode, Scope},
};
use ambit_directory::{
    Authority, ClientRole, Directory, Question, Reader, Route, Snapshot, Update, WorkloadUid, resolve,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// A directory with its reader and a seeded source of chance.
pub(crate) struct World {
    pub(crate) directory: Directory,
    pub(crate) reader: Reader,
    pub(crate) rng: StdRng,
}

impl World {
    pub(crate) fn new(resources: impl IntoIterator<Item = Resource>) -> Self {
        let (directory, reader) = Directory::new();
        let mut world = Self { directory, reader, rng: StdRng::seed_from_u64(7) };
        world.apply(resources);
        world
    }

    pub(crate) fn apply(&mut self, resources: impl IntoIterator<Item = Resource>) {
        let rejected = self.directory.apply(resources.into_iter().map(Resource::update));
        assert!(rejected.is_empty(), "{rejected:?}");
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.directory.apply([Update::AddressRemoved { name: name.to_owned() }]);
    }

    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.reader.snapshot()
    }

    /// Where `client` gets that dials `destination`.
    pub(crate) fn route(&mut self, client: &str, destination: &str) -> Route {
        self.ask(client, destination, ClientRole::Workload, &[], |_| 0)
    }

    pub(crate) fn route_but(&mut self, client: &str, destination: &str, exclude: &[&str]) -> Route {
        let exclude: Vec<WorkloadUid> = exclude.iter().map(|uid| WorkloadUid::from(*uid)).collect();
        self.ask(client, destination, ClientRole::Workload, &exclude, |_| 0)
    }

    pub(crate) fn ask(
        &mut self,
        client: &str,
        destination: &str,
        role: ClientRole,
        exclude: &[WorkloadUid],
        load: impl Fn(&WorkloadUid) -> u32,
    ) -> Route {
        let snapshot = self.reader.snapshot();
        let client = snapshot.workload(client).unwrap();
        let question = Question {
            client,
            role,
            source: client.addresses.first().copied().unwrap_or(IpAddr::from([127, 0, 0, 1])),
            destination: destination.parse::<Authority>().unwrap(),
            exclude,
        };
        resolve(&snapshot, &question, &load, &mut self.rng)
    }
}

/// A resource of the control plane.
pub(crate) enum Resource {
    Workload(Box<Workload>),
    Service(Box<Service>),
    Policy(Box<Authorization>),
}

impl Resource {
    pub(crate) fn update(self) -> Update {
        let (name, kind) = match self {
            Self::Workload(workload) => (workload.uid.clone(), address::Type::Workload(*workload)),
            Self::Service(service) => {
                (format!("{}/{}", service.namespace, service.hostname), address::Type::Service(*service))
            }
            Self::Policy(policy) => {
                return Update::Policy {
                    name: format!("{}/{}", policy.namespace, policy.name),
                    policy: *policy,
                };
            }
        };
        Update::Address { name, address: Address { r#type: Some(kind) } }
    }
}

impl From<Workload> for Resource {
    fn from(workload: Workload) -> Self {
        Self::Workload(Box::new(workload))
    }
}

impl From<Service> for Resource {
    fn from(service: Service) -> Self {
        Self::Service(Box::new(service))
    }
}

impl From<Authorization> for Resource {
    fn from(policy: Authorization) -> Self {
        Self::Policy(Box::new(policy))
    }
}

pub(crate) fn octets(address: &str) -> bytes::Bytes {
    match address.parse::<IpAddr>().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

/// A meshed pod of namespace `app` on node `one`, with uid and name `name`.
pub(crate) fn pod(name: &str, address: &str) -> Workload {
    Workload {
        uid: name.into(),
        name: name.into(),
        namespace: "app".into(),
        addresses: vec![octets(address)],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        service_account: name.into(),
        node: "one".into(),
        cluster_id: "Kubernetes".into(),
        ..Workload::default()
    }
}

/// A public service of namespace `app`, host `<name>.app.svc`, port 80 to 8080.
pub(crate) fn service(name: &str, vips: &[&str]) -> Service {
    Service {
        name: name.into(),
        namespace: "app".into(),
        hostname: format!("{name}.app.svc"),
        addresses: vips.iter().map(|vip| vip_of(vip)).collect(),
        ports: vec![port(80, 8080)],
        ..Service::default()
    }
}

/// `address`, or `address/length` for a network of them.
pub(crate) fn vip_of(vip: &str) -> NetworkAddress {
    let (address, length) = match vip.split_once('/') {
        Some((address, length)) => (address, Some(length.parse().unwrap())),
        None => (vip, None),
    };
    NetworkAddress { network: String::new(), address: octets(address), length }
}

pub(crate) fn port(service_port: u32, target_port: u32) -> Port {
    Port { service_port, target_port, ..Port::default() }
}

pub(crate) fn balancing(mode: Mode, scopes: &[Scope]) -> LoadBalancing {
    LoadBalancing {
        routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        ..LoadBalancing::default()
    }
}

pub(crate) fn by_host(namespace: &str, hostname: &str) -> GatewayAddress {
    let name = NamespacedHostname { namespace: namespace.into(), hostname: hostname.into() };
    GatewayAddress { destination: Some(gateway_address::Destination::Hostname(name)), hbone_mtls_port: 15008 }
}

pub(crate) fn by_address(network: &str, address: &str) -> GatewayAddress {
    let address = NetworkAddress { network: network.into(), address: octets(address), length: None };
    GatewayAddress {
        destination: Some(gateway_address::Destination::Address(address)),
        hbone_mtls_port: 15008,
    }
}

/// Ways to vary a pod.
pub(crate) trait PodExt: Sized {
    fn with(self, change: impl FnOnce(&mut Workload)) -> Self;
    fn of(self, service: &str) -> Self;
    fn unhealthy(self) -> Self;
    fn plain(self) -> Self;
    fn on(self, node: &str) -> Self;
    fn zone(self, region: &str, zone: &str) -> Self;
    fn network(self, network: &str) -> Self;
    fn host_network(self) -> Self;
}

impl PodExt for Workload {
    fn with(mut self, change: impl FnOnce(&mut Workload)) -> Self {
        change(&mut self);
        self
    }

    fn of(self, service: &str) -> Self {
        self.with(|pod| {
            pod.services.insert(format!("app/{service}.app.svc"), PortList::default());
        })
    }

    fn unhealthy(self) -> Self {
        self.with(|pod| pod.status = WorkloadStatus::Unhealthy.into())
    }

    fn plain(self) -> Self {
        self.with(|pod| pod.tunnel_protocol = TunnelProtocol::None.into())
    }

    fn on(self, node: &str) -> Self {
        self.with(|pod| pod.node = node.into())
    }

    fn zone(self, region: &str, zone: &str) -> Self {
        self.with(|pod| {
            pod.locality =
                Some(Locality { region: region.into(), zone: zone.into(), subzone: String::new() });
        })
    }

    fn network(self, network: &str) -> Self {
        self.with(|pod| pod.network = network.into())
    }

    fn host_network(self) -> Self {
        self.with(|pod| pod.network_mode = NetworkMode::HostNetwork.into())
    }
}

pub(crate) trait ServiceExt: Sized {
    fn with(self, change: impl FnOnce(&mut Service)) -> Self;
    fn extended(self, name: &str) -> Self;
}

impl ServiceExt for Service {
    fn with(mut self, change: impl FnOnce(&mut Service)) -> Self {
        change(&mut self);
        self
    }

    fn extended(self, name: &str) -> Self {
        self.with(|service| service.extensions.push(Extension { name: name.into(), config: None }))
    }
}

/// A route in a few words, for tables: its kind, where to, through what, and who is expected.
pub(crate) fn say(route: &Route) -> String {
    let names = |expected: &[ambit_identity::SpiffeId]| {
        let names: Vec<&str> = expected.iter().map(|id| id.service_account()).collect();
        names.join(",")
    };
    let bypassed = |bypassed: bool| if bypassed { " bypassing waypoint" } else { "" };
    match route {
        Route::Tunnel(it) => {
            format!(
                "tunnel {} {} via {} as {}{}",
                it.workload.uid,
                it.address,
                it.hbone,
                names(&it.expected),
                bypassed(it.waypoint_bypassed)
            )
        }
        Route::SameNode(it) => {
            format!(
                "same node {} {} as {}{}",
                it.workload.uid,
                it.address,
                names(&it.expected),
                bypassed(it.waypoint_bypassed)
            )
        }
        Route::Waypoint(it) => {
            format!(
                "waypoint {} for {} via {} as {}",
                it.waypoint.uid,
                it.authority,
                it.hbone,
                names(&it.expected)
            )
        }
        Route::DoubleHbone(it) => format!(
            "gateway {} via {} as {} for {} as {}",
            it.gateway.uid,
            it.hbone,
            names(&it.expected),
            it.authority,
            names(&it.inner_expected)
        ),
        Route::Plain(it) => {
            let workload = it.workload.as_ref().map_or("-", |workload| workload.uid.as_str());
            format!("plain {workload} {}{}", it.address, bypassed(it.waypoint_bypassed))
        }
        Route::Own(it) => format!("own {}", it.address),
        Route::Lookup(it) => format!("lookup {} {}:{}", it.workload.uid, it.workload.hostname, it.port),
        Route::Unknown(it) => format!("unknown, ask for {}", it.demand),
        Route::Refuse(refusal) => format!("refused: {refusal}"),
    }
}

/// Asks from `client` and compares each way in words.
#[track_caller]
pub(crate) fn table(world: &mut World, rows: &[(&str, &str)]) {
    for (destination, expected) in rows {
        assert_eq!(say(&world.route("client", destination)), *expected, "dialled {destination}");
    }
}

/// The workloads that `count` connections get, by uid.
pub(crate) fn spread_of(world: &mut World, destination: &str, count: usize) -> BTreeMap<String, usize> {
    let mut hits = BTreeMap::new();
    for _ in 0..count {
        let route = world.route("client", destination);
        let hop = route.next_hop().map_or_else(|| say(&route), ToString::to_string);
        *hits.entry(hop).or_default() += 1;
    }
    hits
}

pub(crate) fn reached(world: &mut World, destination: &str) -> BTreeSet<String> {
    spread_of(world, destination, 200).into_keys().collect()
}

pub(crate) fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// A client, a service `web` whose waypoint is `wp`, its endpoint, and the waypoint's service and pod.
pub(crate) fn behind_waypoint(change: impl FnOnce(&mut Service)) -> Vec<Resource> {
    vec![
        pod("client", "10.0.0.1").into(),
        pod("web", "10.0.0.2").of("web").into(),
        pod("wp", "10.0.0.3").of("wp").with(|pod| pod.native_tunnel = true).into(),
        service("wp", &["10.96.0.9"]).with(|service| service.ports = vec![port(15008, 15008)]).into(),
        service("web", &["10.96.0.1"])
            .with(|service| service.waypoint = Some(by_host("app", "wp.app.svc")))
            .with(change)
            .into(),
    ]
}
