//! After any history of changes the directory answers as a naive reading of what is there now would.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../common/mod.rs"]
mod common;
mod naive;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use ambit_api::workload::load_balancing::{HealthPolicy, Mode, Scope};
use ambit_api::workload::{Locality, PortList, Service, Workload};
use ambit_directory::{
    ClientRole, HostRef, Removed, SESSION_AFFINITY_EXTENSION, Update, WAYPOINT_FAILURE_OPEN_EXTENSION,
    WorkloadUid,
};
use common::{PodExt, Resource, ServiceExt, World, balancing, by_address, by_host, pod, port, say, service};
use naive::{Naive, key};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

/// Pods, and workloads that are none but may claim the same addresses.
const UIDS: [&str; 9] = [
    "Kubernetes//Pod/app/p0",
    "Kubernetes//Pod/app/p1",
    "Kubernetes//Pod/app/p2",
    "Kubernetes/networking.istio.io/WorkloadEntry/app/p3",
    "Kubernetes/networking.istio.io/WorkloadEntry/app/p4",
    "Kubernetes/networking.istio.io/ServiceEntry/app/p5/Kubernetes//Pod/app/p5",
    "wp",
    "gw",
    "host",
];
const SERVICES: [&str; 4] = ["s0", "s1", "s2", "wps"];
const ADDRESSES: [&str; 6] = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.1", "fd00::1", "10.0.1.2"];
const VIPS: [&str; 7] =
    ["10.96.0.1", "10.96.0.2", "fd96::1", "10.0.1.0/24", "10.96.0.0/16", "10.0.0.3", "0.0.0.0/0"];
const NETWORKS: [&str; 2] = ["", "far"];

fn workload() -> impl Strategy<Value = Workload> {
    let place = (select(&["one", "two", ""][..]), select(&["a", "b"][..]), select(&["r", "q"][..]), 0..8u8);
    let health = (prop::bool::weighted(0.75), prop::option::weighted(0.2, 0..4u32), any::<bool>(), 0..4i64);
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
            |(
                uid,
                addresses,
                services,
                (node, zone, region, network),
                (up, capacity, serving, created),
                shape,
                ports,
            )| {
                let (hbone, native, host_network, waypoint) = shape;
                let mut workload = pod(uid.rsplit('/').next().unwrap(), "10.0.0.1");
                workload.uid = uid.into();
                workload.addresses = addresses.iter().map(|address| common::octets(address)).collect();
                for name in services {
                    let ports = ports.map(|target| port(80, target)).into_iter().collect();
                    workload
                        .services
                        .insert(format!("app/{name}.app.svc"), PortList { ports, ..PortList::default() });
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
                workload.serving_while_terminating = serving && !up;
                workload.created = created;
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
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    /// The order of arrival decides nothing: a reconnected proxy gets everything in another order.
    #[test]
    fn an_address_has_one_owner_in_any_order(
        (first, second) in prop::collection::vec(workload(), 1..12).prop_flat_map(|workloads| {
            // The last state of each.
            let last: BTreeMap<String, Workload> = workloads.into_iter().map(|it| (it.uid.clone(), it)).collect();
            let last: Vec<Workload> = last.into_values().collect();
            (Just(last.clone()).prop_shuffle(), Just(last).prop_shuffle())
        }),
    ) {
        let owners = |workloads: &[Workload]| {
            let mut world = World::new([]);
            workloads.iter().for_each(|workload| world.apply([workload.clone().into()]));
            let snapshot = world.snapshot();
            let keys = NETWORKS.iter().flat_map(|network| ADDRESSES.iter().map(move |address| (*network, *address)));
            let owner = |(network, address): (&str, &str)| {
                let owner = snapshot.workload_at(network, address.parse().unwrap());
                (network.to_owned(), address.to_owned(), owner.map(|workload| workload.uid.to_string()))
            };
            keys.map(owner).collect::<Vec<_>>()
        };
        let mut naive = Naive::default();
        first.iter().for_each(|workload| naive.put(workload.clone()));
        let found = owners(&first);
        prop_assert_eq!(&found, &owners(&second));
        for (network, address, owner) in found {
            prop_assert_eq!(owner, naive.at(&network, address.parse().unwrap()).map(|it| it.uid.clone()));
        }
    }
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
                    let route = world.ask(&client.uid, &to.to_string(), role, &exclude, |uid| u32::from(uid.as_str().ends_with("/p1")));
                    prop_assert!(right.contains(&brief(&route)), "{} to {to}: {} is none of {right:?}", client.uid, say(&route));
                }
            }
        }
    }
}
