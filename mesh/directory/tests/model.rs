//! After any history of changes the directory answers as a naive reading of what is there now would.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ambit_api::workload::load_balancing::{HealthPolicy, Mode, Scope};
use ambit_api::workload::{
    GatewayAddress, Locality, NetworkAddress, NetworkMode, PortList, Service, TunnelProtocol, Workload,
    WorkloadStatus, gateway_address,
};
use ambit_directory::{
    ClientRole, HostRef, Removed, SESSION_AFFINITY_EXTENSION, Update, WAYPOINT_FAILURE_OPEN_EXTENSION,
    WorkloadUid,
};
use common::{PodExt, Resource, ServiceExt, World, balancing, by_address, by_host, pod, port, say, service};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

const UIDS: [&str; 9] = ["p0", "p1", "p2", "p3", "p4", "p5", "wp", "gw", "host"];
const SERVICES: [&str; 4] = ["s0", "s1", "s2", "wps"];
const ADDRESSES: [&str; 6] = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.1", "fd00::1", "10.0.1.2"];
const VIPS: [&str; 7] =
    ["10.96.0.1", "10.96.0.2", "fd96::1", "10.0.1.0/24", "10.96.0.0/16", "10.0.0.3", "0.0.0.0/0"];
const NETWORKS: [&str; 2] = ["", "far"];

/// What is there, as it came.
#[derive(Default)]
struct Naive {
    workloads: BTreeMap<String, Workload>,
    services: BTreeMap<String, Service>,
    /// Who took which address, in that order.
    claims: Vec<(String, IpAddr, String)>,
}

fn ip(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(v4) => v4.into(),
        Err(_) => <[u8; 16]>::try_from(bytes).unwrap().into(),
    }
}

fn key(service: &Service) -> String {
    format!("{}/{}", service.namespace, service.hostname)
}

fn healthy(workload: &Workload) -> bool {
    workload.status == WorkloadStatus::Healthy as i32
}

fn scope_of(workload: &Workload, scope: i32) -> String {
    let locality = workload.locality.clone().unwrap_or_default();
    match Scope::try_from(scope).unwrap() {
        Scope::Region => locality.region,
        Scope::Zone => locality.zone,
        Scope::Node => workload.node.clone(),
        Scope::Network => workload.network.clone(),
        other => panic!("{other:?} is not generated"),
    }
}

impl Naive {
    fn put(&mut self, workload: Workload) {
        self.workloads.insert(workload.uid.clone(), workload.clone());
        let own = if workload.network_mode == NetworkMode::HostNetwork as i32 {
            vec![]
        } else {
            workload.addresses
        };
        let own: BTreeSet<(String, IpAddr)> =
            own.iter().map(|address| (workload.network.clone(), ip(address))).collect();
        self.claims.retain(|(network, address, uid)| {
            *uid != workload.uid || own.contains(&(network.clone(), *address))
        });
        for (network, address) in own {
            let claim = (network, address, workload.uid.clone());
            if !self.claims.contains(&claim) {
                self.claims.push(claim);
            }
        }
    }

    fn remove(&mut self, name: &str) {
        self.workloads.remove(name);
        self.services.remove(name);
        self.claims.retain(|(_, _, uid)| uid != name);
    }

    fn at(&self, network: &str, address: IpAddr) -> Option<&Workload> {
        let there = self.claims.iter().rev().filter(|(net, ip, _)| net == network && *ip == address);
        let there: Vec<&Workload> = there.map(|(_, _, uid)| &self.workloads[uid]).collect();
        there.iter().find(|workload| healthy(workload)).or(there.first()).copied()
    }

    /// The service at `address`: with `exact` by its own address, else by the longest network around it.
    fn service_at(&self, network: &str, address: IpAddr, namespace: &str, exact: bool) -> Option<&Service> {
        let full = if address.is_ipv4() { 32 } else { 128 };
        let lengths: Vec<u32> = if exact { vec![full] } else { (0..full).rev().collect() };
        lengths.into_iter().find_map(|length| {
            let has = |vip: &NetworkAddress| {
                let vip_ip = ip(&vip.address);
                vip.network == network
                    && vip_ip.is_ipv4() == address.is_ipv4()
                    && vip.length.unwrap_or(full) == length
                    && ipnet::IpNet::new(vip_ip, u8::try_from(length).unwrap()).unwrap().contains(&address)
            };
            let sharing: Vec<&Service> =
                self.services.values().filter(|it| it.addresses.iter().any(has)).collect();
            let visible: Vec<&Service> =
                sharing.into_iter().filter(|it| it.visibility == 0 || it.namespace == namespace).collect();
            let own = visible.iter().find(|it| it.namespace == namespace && it.canonical);
            let own = own.or(visible.iter().find(|it| it.namespace == namespace));
            own.or(visible.iter().find(|it| it.canonical)).or(visible.first()).copied()
        })
    }

    /// The endpoints of `service` that may be chosen now, each with its port.
    fn choices(
        &self,
        service: &Service,
        client: &Workload,
        exclude: &[String],
        fallback: Option<u32>,
        wanted: u32,
        crossing: bool,
    ) -> Vec<(&Workload, u32)> {
        let policy = service.load_balancing.clone().unwrap_or_default();
        let name = key(service);
        let usable = self.workloads.values().filter_map(|workload| {
            let ports = workload.services.get(&name)?;
            let own = ports.ports.iter().find(|it| it.service_port == wanted).map(|it| it.target_port);
            let general = service.ports.iter().find(|it| it.service_port == wanted).map(|it| it.target_port);
            let target = own.filter(|it| *it != 0).or(general.filter(|it| *it != 0)).or(fallback)?;
            let fit = (healthy(workload) || policy.health_policy == HealthPolicy::AllowAll as i32)
                && workload.capacity != Some(0)
                && !exclude.contains(&workload.uid)
                && (workload.network == client.network || (workload.network_gateway.is_some() && crossing));
            fit.then_some((workload, target))
        });
        let rank = |workload: &Workload| {
            let shared = |scope: &&i32| scope_of(workload, **scope) == scope_of(client, **scope);
            policy.routing_preference.iter().take_while(shared).count()
        };
        let usable: Vec<(&Workload, u32)> = usable.collect();
        let least = match Mode::try_from(policy.mode).unwrap() {
            Mode::Strict => policy.routing_preference.len(),
            Mode::Failover => usable.iter().map(|(workload, _)| rank(workload)).max().unwrap_or(0),
            Mode::UnspecifiedMode | Mode::Passthrough => 0,
        };
        usable.into_iter().filter(|(workload, _)| rank(workload) >= least).collect()
    }

    /// The workloads that stand behind a gateway, and the service they do it for; `None` if the gateway is not known.
    fn behind(
        &self,
        gateway: &GatewayAddress,
        client: &Workload,
        exclude: &[String],
        crossing: bool,
    ) -> Option<Vec<(&Workload, u32)>> {
        let service = match gateway.destination.as_ref().unwrap() {
            gateway_address::Destination::Hostname(name) => {
                Some(self.services.get(&format!("{}/{}", name.namespace, name.hostname))?)
            }
            gateway_address::Destination::Address(at) => {
                let has = |vip: &NetworkAddress| vip == at;
                self.services.values().find(|it| it.addresses.iter().any(has))
            }
        };
        if let Some(service) = service {
            return Some(self.choices(service, client, exclude, Some(15008), 15008, crossing));
        }
        let Some(gateway_address::Destination::Address(at)) = &gateway.destination else { unreachable!() };
        let workload = self.at(&at.network, ip(&at.address))?;
        let usable = healthy(workload) && !exclude.contains(&workload.uid);
        Some(if usable { vec![(workload, 15008)] } else { vec![] })
    }

    fn client_is(&self, gateway: &GatewayAddress, client: &Workload) -> bool {
        match gateway.destination.as_ref().unwrap() {
            gateway_address::Destination::Hostname(name) => {
                client.services.contains_key(&format!("{}/{}", name.namespace, name.hostname))
            }
            gateway_address::Destination::Address(at) => {
                let serves =
                    |it: &&Service| it.addresses.contains(at) && client.services.contains_key(&key(it));
                (client.network == at.network && client.addresses.contains(&at.address))
                    || self.services.values().any(|it| serves(&it))
            }
        }
    }

    /// Every answer that is right, by kind and next hop.
    fn answers(
        &self,
        client: &Workload,
        to: SocketAddr,
        role: ClientRole,
        exclude: &[String],
    ) -> BTreeSet<String> {
        let exact = self.service_at(&client.network, to.ip(), &client.namespace, true);
        let there = self.at(&client.network, to.ip());
        let around = || self.service_at(&client.network, to.ip(), &client.namespace, false);
        let service = exact.or_else(|| if there.is_some() { None } else { around() });
        match (service, there) {
            (Some(service), _) => self.to_service(service, client, to, role, exclude),
            (None, Some(workload)) => {
                let guarded = workload.waypoint.as_ref().filter(|waypoint| {
                    workload.uid != client.uid
                        && role == ClientRole::Workload
                        && !self.client_is(waypoint, client)
                });
                if let Some(waypoint) = guarded {
                    let (mut answers, may_fail) = self.through(waypoint, client, false, exclude);
                    if may_fail {
                        answers.extend(refused());
                    }
                    return answers;
                }
                if exclude.contains(&workload.uid) { refused() } else { [direct(workload, client)].into() }
            }
            (None, None) => ["unknown".to_owned()].into(),
        }
    }

    fn to_service(
        &self,
        service: &Service,
        client: &Workload,
        to: SocketAddr,
        role: ClientRole,
        exclude: &[String],
    ) -> BTreeSet<String> {
        let wanted = u32::from(to.port());
        if !service.ports.iter().any(|it| it.service_port == wanted) {
            return refused();
        }
        let applies = match role {
            ClientRole::Workload => true,
            ClientRole::Waypoint => false,
            ClientRole::Ingress => service.ingress_use_waypoint,
        };
        let waypoint = service.waypoint.as_ref().filter(|it| applies && !self.client_is(it, client));
        let (mut answers, may_fail) =
            waypoint.map_or((BTreeSet::new(), true), |it| self.through(it, client, true, exclude));
        let open = service.extensions.iter().any(|it| it.name == WAYPOINT_FAILURE_OPEN_EXTENSION);
        if waypoint.is_some() && (!may_fail || !open) {
            if may_fail {
                answers.extend(refused());
            }
            return answers;
        }
        answers.extend(self.past_waypoint(service, client, to, exclude));
        answers
    }

    fn past_waypoint(
        &self,
        service: &Service,
        client: &Workload,
        to: SocketAddr,
        exclude: &[String],
    ) -> BTreeSet<String> {
        let wanted = u32::from(to.port());
        if service.load_balancing.as_ref().is_some_and(|it| it.mode == Mode::Passthrough as i32) {
            return match self.at(&client.network, to.ip()) {
                Some(workload) if exclude.contains(&workload.uid) => refused(),
                Some(workload) => [direct(workload, client)].into(),
                None => ["plain -".to_owned()].into(),
            };
        }
        let choices = self.choices(service, client, exclude, None, wanted, true);
        let mut answers = BTreeSet::new();
        for (workload, _) in &choices {
            if workload.network == client.network {
                answers.insert(direct(workload, client));
                continue;
            }
            match self.behind(workload.network_gateway.as_ref().unwrap(), client, exclude, true) {
                Some(gateways) if !gateways.is_empty() => {
                    answers.extend(gateways.iter().map(|(gateway, _)| format!("gateway {}", gateway.uid)));
                }
                Some(_) | None => answers.extend(refused()),
            }
        }
        if choices.is_empty() { refused() } else { answers }
    }

    /// The ways through a waypoint, and whether it may turn out that there is none.
    fn through(
        &self,
        waypoint: &GatewayAddress,
        client: &Workload,
        to_service: bool,
        exclude: &[String],
    ) -> (BTreeSet<String>, bool) {
        let behind = self.behind(waypoint, client, exclude, to_service).unwrap_or_default();
        let (mut answers, mut may_fail) = (BTreeSet::new(), false);
        let near = |it: &Workload| it.network == client.network;
        for (workload, _) in &behind {
            if near(workload) {
                answers.insert(format!("waypoint {}", workload.uid));
                continue;
            }
            if !to_service {
                may_fail = true;
                continue;
            }
            let gateway = workload.network_gateway.as_ref();
            let gateways = gateway.and_then(|it| self.behind(it, client, exclude, true)).unwrap_or_default();
            may_fail |= gateways.is_empty();
            answers.extend(gateways.iter().map(|(gateway, _)| format!("gateway {}", gateway.uid)));
        }
        (answers, may_fail || behind.is_empty())
    }
}

fn refused() -> BTreeSet<String> {
    ["refused".to_owned()].into()
}

fn direct(workload: &Workload, client: &Workload) -> String {
    let near = !workload.node.is_empty() && workload.node == client.node;
    let kind = if workload.uid == client.uid {
        "own"
    } else if workload.tunnel_protocol != TunnelProtocol::Hbone as i32 {
        "plain"
    } else if near && !workload.native_tunnel {
        "same node"
    } else {
        "tunnel"
    };
    if kind == "own" { kind.to_owned() } else { format!("{kind} {}", workload.uid) }
}

fn workload() -> impl Strategy<Value = Workload> {
    let place = (select(&["one", "two", ""][..]), select(&["a", "b"][..]), select(&["r", "q"][..]), 0..8u8);
    let health = (prop::bool::weighted(0.75), prop::option::weighted(0.2, 0..4u32));
    let shape = (prop::bool::weighted(0.8), prop::bool::weighted(0.15), prop::bool::weighted(0.15), 0..3u8);
    let ports = prop::option::weighted(0.3, select(&[0u32, 9090][..]));
    (
        select(&UIDS[..]),
        subsequence(&ADDRESSES[..], 1..3),
        subsequence(&SERVICES[..], 0..4),
        place,
        health,
        shape,
        ports,
    )
        .prop_map(
            |(uid, addresses, services, (node, zone, region, network), (up, capacity), shape, ports)| {
                let (hbone, native, host_network, waypoint) = shape;
                let mut workload = pod(uid, "10.0.0.1");
                workload.addresses = addresses.iter().map(|address| common::octets(address)).collect();
                for name in services {
                    let ports = ports.map(|target| port(80, target)).into_iter().collect();
                    workload.services.insert(format!("app/{name}.app.svc"), PortList { ports });
                }
                workload.node = node.into();
                workload.locality =
                    Some(Locality { region: region.into(), zone: zone.into(), subzone: String::new() });
                // Waypoints stay in the first network, gateways in the other.
                let far = uid == "gw"
                    || (network == 0 && uid != "wp" && !workload.services.contains_key("app/wps.app.svc"));
                workload.network = NETWORKS[usize::from(far)].into();
                workload.network_gateway = (network < 6 && far).then(|| by_address("far", "10.0.0.2"));
                workload.capacity = capacity;
                workload.native_tunnel = native;
                workload.tunnel_protocol = i32::from(hbone);
                if waypoint == 0 {
                    workload.waypoint = Some(by_host("app", "wps.app.svc"));
                }
                let workload = if up { workload } else { workload.unhealthy() };
                if host_network { workload.host_network() } else { workload }
            },
        )
}

fn a_service() -> impl Strategy<Value = Service> {
    let scopes = subsequence(&[Scope::Network, Scope::Region, Scope::Zone, Scope::Node][..], 0..4);
    let mode =
        select(&[Mode::UnspecifiedMode, Mode::Strict, Mode::Failover, Mode::Failover, Mode::Passthrough][..]);
    let flags =
        (any::<bool>(), prop::bool::weighted(0.2), any::<bool>(), any::<bool>(), prop::bool::weighted(0.3));
    let waypoint = prop_oneof![
        3 => Just(None),
        1 => Just(Some(by_host("app", "wps.app.svc"))),
        1 => Just(Some(by_address("", "10.96.0.2"))),
        1 => Just(Some(by_address("", "10.0.0.1"))),
    ];
    let target = select(&[0u32, 8080][..]);
    (select(&SERVICES[..]), subsequence(&VIPS[..], 0..3), scopes, mode, flags, waypoint, target).prop_map(
        |(name, vips, scopes, mode, (canonical, all, open, ingress, private), waypoint, target)| {
            let mut service = service(name, &vips);
            service.load_balancing = Some(balancing(mode, &scopes));
            if all {
                service.load_balancing.as_mut().unwrap().health_policy = HealthPolicy::AllowAll.into();
            }
            service.ports = vec![port(80, target)];
            service.canonical = canonical;
            service.visibility = private.into();
            service.ingress_use_waypoint = ingress;
            // A waypoint behind a waypoint is no waypoint.
            service.waypoint = waypoint.filter(|_| name != "wps");
            let service = if open { service.extended(WAYPOINT_FAILURE_OPEN_EXTENSION) } else { service };
            if canonical { service.extended(SESSION_AFFINITY_EXTENSION) } else { service }
        },
    )
}

#[derive(Debug, Clone)]
enum Step {
    Workload(Box<Workload>),
    Service(Box<Service>),
    Remove(String),
}

fn step() -> impl Strategy<Value = Step> {
    let name = prop_oneof![
        select(&UIDS[..]).prop_map(str::to_owned),
        select(&SERVICES[..]).prop_map(|name| format!("app/{name}.app.svc")),
    ];
    prop_oneof![
        6 => workload().prop_map(|it| Step::Workload(Box::new(it))),
        4 => a_service().prop_map(|it| Step::Service(Box::new(it))),
        2 => name.prop_map(Step::Remove),
    ]
}

/// The kind of a route and its next hop.
fn brief(route: &ambit_directory::Route) -> String {
    let said = say(route);
    let words = match route {
        ambit_directory::Route::SameNode(_) => 3,
        ambit_directory::Route::Tunnel(_)
        | ambit_directory::Route::Waypoint(_)
        | ambit_directory::Route::DoubleHbone(_)
        | ambit_directory::Route::Plain(_)
        | ambit_directory::Route::Lookup(_) => 2,
        ambit_directory::Route::Own(_)
        | ambit_directory::Route::Unknown(_)
        | ambit_directory::Route::Refuse(_) => 1,
    };
    let words: Vec<&str> = said.split(' ').take(words).collect();
    words.join(" ").trim_end_matches([',', ':']).to_owned()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1200, max_shrink_iters: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn routes_are_those_that_a_naive_reading_gives(
        steps in prop::collection::vec(step(), 1..40),
        batch in 1..12usize,
        dialled in prop::collection::vec(
            (select(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.1", "10.0.1.9", "10.96.0.1", "10.96.0.2", "10.96.7.7", "fd00::1", "fd96::1", "1.1.1.1"][..]),
             select(&[80u16, 80, 80, 81][..]), 0..8u8, subsequence(&UIDS[..], 0..3)), 1..12),
    ) {
        let (mut world, mut naive) = (World::new([]), Naive::default());
        let start = world.snapshot().revision().snapshot;
        let mut removed = BTreeSet::new();
        for steps in steps.chunks(batch) {
            let updates = steps.iter().cloned().map(|step| match step {
                Step::Workload(workload) => {
                    removed.remove(&workload.uid);
                    naive.put((*workload).clone());
                    Resource::Workload(workload).update()
                }
                Step::Service(service) => {
                    naive.services.insert(key(&service), (*service).clone());
                    Resource::Service(service).update()
                }
                Step::Remove(name) => {
                    if naive.workloads.contains_key(&name) {
                        removed.insert(name.clone());
                    }
                    naive.remove(&name);
                    Update::AddressRemoved { name }
                }
            });
            prop_assert!(world.directory.apply(updates).is_empty());
        }
        let snapshot = world.snapshot();
        prop_assert_eq!(snapshot.workloads().len(), naive.workloads.len());
        prop_assert_eq!(snapshot.services().len(), naive.services.len());
        for name in SERVICES {
            let name = format!("app/{name}.app.svc");
            let members = naive.workloads.values().filter(|it| it.services.contains_key(&name)).count();
            let endpoints = snapshot.endpoints(HostRef::parse(&name).unwrap());
            prop_assert_eq!(endpoints.map_or(0, |it| it.len()), members);
        }
        match snapshot.removed_since(start) {
            Removed::These(uids) => {
                let uids: BTreeSet<String> = uids.iter().map(ToString::to_string).collect();
                prop_assert_eq!(uids, removed);
            }
            Removed::TooMany => prop_assert!(false, "so few are remembered"),
        }
        for (address, port, role, exclude) in dialled {
            let to = SocketAddr::new(address.parse().unwrap(), port);
            let role = [ClientRole::Workload, ClientRole::Waypoint, ClientRole::Ingress][usize::from(role.saturating_sub(5))];
            let excluded: Vec<String> = exclude.iter().map(ToString::to_string).collect();
            let exclude: Vec<WorkloadUid> = exclude.iter().map(|uid| WorkloadUid::from(*uid)).collect();
            for client in naive.workloads.values() {
                let right = naive.answers(client, to, role, &excluded);
                for _ in 0..3 {
                    let route = world.ask(&client.uid, &to.to_string(), role, &exclude, |uid| u32::from(uid.as_str() == "p1"));
                    prop_assert!(right.contains(&brief(&route)), "{} to {to}: {} is none of {right:?}", client.uid, say(&route));
                }
            }
        }
    }
}
