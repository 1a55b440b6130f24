//! Where connections go: tables of what the control plane says, what is dialled, and the way that must come out.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeMap;

use ambit_api::workload::load_balancing::{HealthPolicy, Mode, Scope};
use ambit_api::workload::service::Visibility;
use ambit_api::workload::{PortList, Service, Workload};
use ambit_directory::{ClientRole, Load, Question, Route, SESSION_AFFINITY_EXTENSION, WorkloadUid, resolve};
use common::{
    PodExt, Resource, ServiceExt, World, balancing, names, octets, pod, port, reached, say, service,
    spread_of, table,
};

#[test]
fn workloads_and_services_are_reached_as_they_can_be() {
    let mut world = World::new([
        pod("client", "10.0.0.1").of("web").into(),
        pod("near", "10.0.0.2").into(),
        pod("far", "10.0.1.2").on("two").of("one").into(),
        pod("bare", "10.0.1.3").on("two").plain().of("bare").into(),
        pod("native", "10.0.0.4").with(|pod| pod.native_tunnel = true).into(),
        pod("six", "fd00::1").on("two").into(),
        pod("host", "192.168.0.1").plain().host_network().of("hosted").into(),
        pod("named", "10.0.0.0")
            .with(|pod| {
                pod.addresses.clear();
                pod.hostname = "db.example.com".into();
            })
            .plain()
            .of("external")
            .into(),
        service("web", &["10.96.0.1", "fd96::1"]).into(),
        service("one", &["10.96.0.2", "fd96::2"]).into(),
        service("bare", &["10.96.0.3"]).into(),
        service("hosted", &["10.96.0.4"]).into(),
        service("external", &["10.96.0.5"]).into(),
        service("empty", &["10.96.0.6"]).into(),
    ]);
    table(
        &mut world,
        &[
            ("10.0.0.2:9000", "same node near 10.0.0.2:9000 as near"),
            ("[::ffff:10.0.0.2]:9000", "same node near 10.0.0.2:9000 as near"),
            ("10.0.1.2:9000", "tunnel far 10.0.1.2:9000 via 10.0.1.2:15008 as far"),
            ("10.0.1.3:9000", "plain bare 10.0.1.3:9000"),
            ("10.0.0.4:9000", "tunnel native 10.0.0.4:9000 via 10.0.0.4:15008 as native"),
            ("[fd00::1]:80", "tunnel six [fd00::1]:80 via [fd00::1]:15008 as six"),
            ("10.0.0.1:9000", "own 10.0.0.1:9000"),
            ("10.96.0.1:80", "own 10.0.0.1:8080"),
            ("10.96.0.2:80", "tunnel far 10.0.1.2:8080 via 10.0.1.2:15008 as far"),
            ("[fd96::2]:80", "tunnel far 10.0.1.2:8080 via 10.0.1.2:15008 as far"),
            ("one.app.svc:80", "tunnel far 10.0.1.2:8080 via 10.0.1.2:15008 as far"),
            ("10.96.0.3:80", "plain bare 10.0.1.3:8080"),
            ("10.96.0.4:80", "plain host 192.168.0.1:8080"),
            ("192.168.0.1:80", "unknown, ask for /192.168.0.1"),
            ("10.96.0.5:80", "lookup named db.example.com:8080"),
            ("10.96.0.2:81", "refused: service app/one.app.svc has no port 81"),
            ("10.96.0.6:80", "refused: service app/empty.app.svc, port 80: no endpoint is known"),
            ("1.1.1.1:53", "unknown, ask for /1.1.1.1"),
            ("www.example.com:80", "unknown, ask for app/www.example.com"),
        ],
    );
}

#[test]
fn a_workload_known_by_name_is_reached_where_dns_finds_it() {
    let named = |name: &str| {
        pod(name, "10.0.0.9").of(name).with(|pod| {
            pod.addresses.clear();
            pod.hostname = "db.example.com".into();
        })
    };
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        named("plain").plain().into(),
        named("meshed").into(),
        service("plain", &["10.96.0.1"]).into(),
        service("meshed", &["10.96.0.2"]).into(),
    ]);
    for (vip, expected) in [
        ("10.96.0.1:80", "plain plain 203.0.113.1:8080"),
        ("10.96.0.2:80", "tunnel meshed 203.0.113.1:8080 via 203.0.113.1:15008 as meshed"),
    ] {
        let Route::Lookup(lookup) = world.route("client", vip) else { panic!("no look-up for {vip}") };
        assert_eq!(say(&lookup.at("203.0.113.1".parse().unwrap())), expected);
    }
}

#[test]
fn an_unknown_address_passes_and_an_unknown_name_does_not() {
    let mut world = World::new([pod("client", "10.0.0.1").into()]);
    let Route::Unknown(unknown) = world.route("client", "1.1.1.1:53") else { panic!("known") };
    assert_eq!(unknown.passthrough().map(|plain| plain.address), Some("1.1.1.1:53".parse().unwrap()));
    let Route::Unknown(unknown) = world.route("client", "www.example.com:53") else { panic!("known") };
    assert!(unknown.passthrough().is_none());
}

#[test]
fn ports_are_those_of_the_workload_before_those_of_the_service() {
    let own = |target| PortList { ports: vec![port(80, target)] };
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        pod("mapped", "10.0.0.2")
            .with(|pod| _ = pod.services.insert("app/named.app.svc".into(), own(9090)))
            .into(),
        pod("unmapped", "10.0.0.3").of("named").into(),
        pod("zero", "10.0.0.4")
            .with(|pod| _ = pod.services.insert("app/numbered.app.svc".into(), own(0)))
            .into(),
        service("named", &["10.96.0.1"]).with(|service| service.ports = vec![port(80, 0)]).into(),
        service("numbered", &["10.96.0.2"]).into(),
    ]);
    for _ in 0..50 {
        // The other endpoint has no port by that name.
        table(&mut world, &[("10.96.0.1:80", "same node mapped 10.0.0.2:9090 as mapped")]);
    }
    table(&mut world, &[("10.96.0.2:80", "same node zero 10.0.0.4:8080 as zero")]);
    let route = world.route_but("client", "10.96.0.1:80", &["mapped"]);
    assert!(matches!(&route, Route::Refuse(refusal) if refusal.is_exhausted()), "{route:?}");
}

#[test]
fn unhealthy_endpoints_are_out_unless_the_service_takes_all() {
    let allow_all = |service: Service| {
        service.with(|service| {
            service.load_balancing = Some(balancing(Mode::UnspecifiedMode, &[]));
            service.load_balancing.as_mut().unwrap().health_policy = HealthPolicy::AllowAll.into();
        })
    };
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        pod("a", "10.0.0.2").of("web").of("all").into(),
        pod("b", "10.0.0.3").of("web").of("all").into(),
        service("web", &["10.96.0.1"]).into(),
        allow_all(service("all", &["10.96.0.2"])).into(),
    ]);
    assert_eq!(reached(&mut world, "10.96.0.1:80"), names(&["a", "b"]));
    world.apply([pod("a", "10.0.0.2").of("web").of("all").unhealthy().into()]);
    assert_eq!(reached(&mut world, "10.96.0.1:80"), names(&["b"]));
    assert_eq!(reached(&mut world, "10.96.0.2:80"), names(&["a", "b"]));
    world.remove("b");
    table(
        &mut world,
        &[("10.96.0.1:80", "refused: service app/web.app.svc, port 80: no endpoint is healthy")],
    );
    // Its own address still leads there.
    table(&mut world, &[("10.0.0.2:1", "same node a 10.0.0.2:1 as a")]);
}

#[test]
fn endpoints_may_come_before_their_service_and_outlive_it() {
    let strict = || {
        service("web", &["10.96.0.1"]).with(|service| {
            service.load_balancing = Some(balancing(Mode::Strict, &[Scope::Node]));
        })
    };
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        pod("near", "10.0.0.2").of("web").into(),
        pod("far", "10.0.1.2").on("two").of("web").into(),
    ]);
    table(&mut world, &[("10.96.0.1:80", "unknown, ask for /10.96.0.1")]);
    world.apply([strict().into()]);
    assert_eq!(reached(&mut world, "10.96.0.1:80"), names(&["near"]));
    world.remove("app/web.app.svc");
    table(&mut world, &[("10.96.0.1:80", "unknown, ask for /10.96.0.1")]);
    world.apply([service("web", &["10.96.0.9"]).into()]);
    assert_eq!(reached(&mut world, "10.96.0.9:80"), names(&["far", "near"]));
    // All gone and come again, the service's balancing holds.
    world.apply([strict().into()]);
    world.remove("near");
    world.remove("far");
    world
        .apply([pod("far", "10.0.1.2").on("two").of("web").into(), pod("near", "10.0.0.2").of("web").into()]);
    assert_eq!(reached(&mut world, "10.96.0.1:80"), names(&["near"]));
}

#[test]
fn strict_stays_in_scope_and_failover_prefers_it() {
    let preferring = |name: &str, vip: &str, mode, scopes: &[Scope]| -> Resource {
        service(name, &[vip]).with(|service| service.load_balancing = Some(balancing(mode, scopes))).into()
    };
    let everywhere = |pod: Workload| pod.of("strict").of("failover").of("any");
    let zone_b = || everywhere(pod("other-zone", "10.0.2.2").on("three").zone("r", "b"));
    let mut world = World::new([
        pod("client", "10.0.0.1").zone("r", "a").into(),
        everywhere(pod("same-zone", "10.0.1.2").on("two").zone("r", "a")).into(),
        zone_b().into(),
        everywhere(pod("other-region", "10.0.3.2").on("four").zone("q", "a")).into(),
        preferring("strict", "10.96.0.1", Mode::Strict, &[Scope::Region, Scope::Zone]),
        preferring("failover", "10.96.0.2", Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone]),
        preferring("any", "10.96.0.3", Mode::UnspecifiedMode, &[Scope::Zone]),
    ]);
    assert_eq!(reached(&mut world, "10.96.0.1:80"), names(&["same-zone"]));
    assert_eq!(reached(&mut world, "10.96.0.2:80"), names(&["same-zone"]));
    assert_eq!(reached(&mut world, "10.96.0.3:80"), names(&["same-zone", "other-zone", "other-region"]));
    // Tried in vain: failover goes on outwards, strict does not.
    assert_eq!(
        world.route_but("client", "10.96.0.2:80", &["same-zone"]).next_hop(),
        Some(&WorkloadUid::from("other-zone"))
    );
    let refused = world.route_but("client", "10.96.0.1:80", &["same-zone"]);
    assert_eq!(
        say(&refused),
        "refused: service app/strict.app.svc, port 80: every suitable endpoint was tried"
    );
    world.apply([everywhere(pod("same-zone", "10.0.1.2").on("two").zone("r", "a")).unhealthy().into()]);
    table(
        &mut world,
        &[(
            "10.96.0.1:80",
            "refused: service app/strict.app.svc, port 80: no healthy endpoint is in scope, serves the port and can be reached",
        )],
    );
    assert_eq!(reached(&mut world, "10.96.0.2:80"), names(&["other-zone"]));
    world.apply([zone_b().unhealthy().into()]);
    assert_eq!(reached(&mut world, "10.96.0.2:80"), names(&["other-region"]));
}

#[test]
fn connections_are_shared_by_capacity() {
    let with = |name: &str, address: &str, capacity| {
        pod(name, address).of("web").with(|pod| pod.capacity = capacity)
    };
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        with("one", "10.0.0.2", Some(1)).into(),
        with("three", "10.0.0.3", Some(3)).into(),
        with("default", "10.0.0.4", None).into(),
        with("none", "10.0.0.5", Some(0)).into(),
        service("web", &["10.96.0.1"]).into(),
    ]);
    // Real load: each connection stays open and counts.
    let mut open: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..5000 {
        let counts = open.clone();
        let load = |uid: &WorkloadUid| counts.get(uid.as_str()).copied().unwrap_or_default();
        let route = world.ask("client", "10.96.0.1:80", ClientRole::Workload, &[], load);
        *open.entry(route.next_hop().unwrap().to_string()).or_default() += 1;
    }
    assert_eq!(open.get("none"), None);
    for (name, share) in [("one", 1000), ("three", 3000), ("default", 1000)] {
        let got = open[name];
        assert!(got.abs_diff(share) < share / 10, "{name} got {got} of {share}");
    }
    // Without load the draw alone keeps the proportion roughly.
    let hits = spread_of(&mut world, "10.96.0.1:80", 3000);
    assert!(hits["three"] > hits["one"] && hits["three"] > hits["default"], "{hits:?}");
}

#[test]
fn of_two_endpoints_the_less_loaded_gets_the_connection() {
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        pod("busy", "10.0.0.2").of("web").into(),
        pod("idle", "10.0.0.3").of("web").into(),
        service("web", &["10.96.0.1"]).into(),
    ]);
    for _ in 0..200 {
        let load = |uid: &WorkloadUid| if uid.as_str() == "busy" { 5 } else { 4 };
        let route = world.ask("client", "10.96.0.1:80", ClientRole::Workload, &[], load);
        assert_eq!(route.next_hop(), Some(&WorkloadUid::from("idle")));
    }
}

#[test]
fn a_retry_goes_elsewhere_until_all_were_tried() {
    let mut world = World::new(
        (1..=30)
            .map(|n| pod(&format!("p{n}"), &format!("10.0.0.{n}")).of("web").into())
            .chain([pod("client", "10.0.1.1").into(), service("web", &["10.96.0.1"]).into()]),
    );
    let mut tried: Vec<WorkloadUid> = Vec::new();
    loop {
        match world.ask("client", "10.96.0.1:80", ClientRole::Workload, &tried, |_| 0) {
            Route::Refuse(refusal) => {
                assert!(refusal.is_exhausted());
                break;
            }
            route => {
                let hop = route.next_hop().unwrap().clone();
                assert!(!tried.contains(&hop), "{hop} again");
                tried.push(hop);
            }
        }
    }
    assert_eq!(tried.len(), 30);
    assert_eq!(
        world.ask("client", "10.0.0.1:80", ClientRole::Workload, &tried, |_| 0).next_hop(),
        None,
        "a workload that was dialled itself has no alternative"
    );
}

#[test]
fn affinity_keeps_clients_and_few_move_when_an_endpoint_leaves() {
    let pods = |count| (1..=count).map(|n| pod(&format!("p{n}"), &format!("10.0.0.{n}")).of("web").into());
    let client = |n: usize| pod(&format!("c{n}"), &format!("10.1.{}.{}", n / 250, n % 250 + 1)).into();
    let sticky = service("web", &["10.96.0.1"]).extended(SESSION_AFFINITY_EXTENSION);
    let mut world = World::new(pods(10).chain((0..400).map(client)).chain([sticky.into()]));
    let chosen = |world: &mut World| -> Vec<String> {
        let hop = |n: usize| world.route(&format!("c{n}"), "10.96.0.1:80").next_hop().unwrap().to_string();
        (0..400).map(hop).collect()
    };
    let before = chosen(&mut world);
    assert_eq!(chosen(&mut world), before, "the same client gets the same endpoint");
    let mut share: BTreeMap<&String, usize> = BTreeMap::new();
    before.iter().for_each(|hop| *share.entry(hop).or_default() += 1);
    assert!(share.len() == 10 && share.values().all(|count| (15..80).contains(count)), "{share:?}");
    world.remove("p3");
    let after = chosen(&mut world);
    for (was, is) in before.iter().zip(&after) {
        assert!(was == is || was == "p3", "moved from {was} to {is}");
    }
    assert!(after.iter().all(|hop| hop != "p3"));
}

#[test]
fn passthrough_services_keep_the_address_that_was_dialled() {
    let passing = |name: &str, vip: &str| {
        service(name, &[vip]).with(|service| service.load_balancing = Some(balancing(Mode::Passthrough, &[])))
    };
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        pod("inside", "20.0.0.7").on("two").into(),
        passing("range", "20.0.0.0/8").into(),
        passing("narrow", "20.1.0.0/16").with(|service| service.ports = vec![port(443, 443)]).into(),
        passing("single", "30.0.0.1").into(),
    ]);
    table(
        &mut world,
        &[
            ("20.0.0.9:80", "plain - 20.0.0.9:80"),
            // A workload's own address is nearer than a network around it.
            ("20.0.0.7:9000", "tunnel inside 20.0.0.7:9000 via 20.0.0.7:15008 as inside"),
            ("30.0.0.1:80", "plain - 30.0.0.1:80"),
            ("20.1.0.9:443", "plain - 20.1.0.9:443"),
            // Other ports of the narrower network are those of the wider.
            ("20.1.0.9:80", "plain - 20.1.0.9:80"),
            ("21.0.0.1:80", "unknown, ask for /21.0.0.1"),
        ],
    );
    assert_eq!(&*world.route("client", "20.1.0.9:443").service().unwrap().name, "narrow");
}

#[test]
fn private_services_are_seen_in_their_namespace_and_preferred() {
    let elsewhere = |pod: Workload| pod.with(|pod| pod.namespace = "other".into());
    let other = |name: &str| {
        service(name, &["10.96.0.1"]).with(|service| {
            service.namespace = "other".into();
            service.hostname = "shared.example.com".into();
            service.canonical = true;
        })
    };
    let private =
        |service: Service| service.with(|service| service.visibility = Visibility::Namespace.into());
    let shared = |service: Service| service.with(|service| service.hostname = "shared.example.com".into());
    let into =
        |pod: Workload, key: &str| pod.with(|pod| _ = pod.services.insert(key.into(), PortList::default()));
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        elsewhere(pod("stranger", "10.0.0.9")).into(),
        into(pod("mine", "10.0.0.2"), "app/shared.example.com").into(),
        into(elsewhere(pod("theirs", "10.0.0.3")), "other/shared.example.com").into(),
        private(shared(service("shared", &["10.96.0.1"]))).into(),
        other("shared").into(),
    ]);
    for destination in ["10.96.0.1:80", "shared.example.com:80"] {
        assert_eq!(world.route("client", destination).next_hop().unwrap().as_str(), "mine");
        assert_eq!(world.route("stranger", destination).next_hop().unwrap().as_str(), "theirs");
    }
    world.remove("other/shared.example.com");
    assert_eq!(say(&world.route("stranger", "10.96.0.1:80")), "unknown, ask for /10.96.0.1");
    assert_eq!(
        say(&world.route("stranger", "shared.example.com:80")),
        "unknown, ask for other/shared.example.com"
    );
}

#[test]
fn wildcard_hosts_serve_their_subdomains() {
    let wildcard = |name: &str, host: &str| {
        service(name, &[]).with(|service| {
            service.hostname = host.into();
            service.ports = vec![port(80, 8080)];
        })
    };
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        wildcard("wide", "*.example.com").into(),
        wildcard("deep", "*.deep.example.com").into(),
    ]);
    let of = |world: &mut World, host: &str| say(&world.route("client", &format!("{host}:80")));
    assert!(of(&mut world, "a.example.com").contains("app/*.example.com"));
    assert!(of(&mut world, "a.b.example.com").contains("app/*.example.com"));
    assert!(of(&mut world, "a.deep.example.com").contains("app/*.deep.example.com"));
    assert_eq!(of(&mut world, "example.com"), "unknown, ask for app/example.com");
}

#[test]
fn dual_stack_endpoints_are_reached_in_the_dialled_family() {
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        pod("dual", "10.0.0.2").on("two").of("web").with(|pod| pod.addresses.push(octets("fd00::2"))).into(),
        service("web", &["10.96.0.1", "fd96::1"]).into(),
    ]);
    table(
        &mut world,
        &[
            ("10.96.0.1:80", "tunnel dual 10.0.0.2:8080 via 10.0.0.2:15008 as dual"),
            ("[fd96::1]:80", "tunnel dual [fd00::2]:8080 via [fd00::2]:15008 as dual"),
            ("[fd00::2]:80", "tunnel dual [fd00::2]:80 via [fd00::2]:15008 as dual"),
        ],
    );
}

#[test]
fn a_reused_address_belongs_to_its_new_holder() {
    let old = || real_pod("old", "10.0.0.2").with(|pod| pod.created = 1);
    let new = || real_pod("new", "10.0.0.2").on("two").with(|pod| pod.created = 2);
    let mut world = World::new([pod("client", "10.0.0.1").into(), new().into(), old().into()]);
    let there = "tunnel Kubernetes//Pod/app/new 10.0.0.2:80 via 10.0.0.2:15008 as new";
    table(&mut world, &[("10.0.0.2:80", there)]);
    world.apply([old().unhealthy().into()]);
    table(&mut world, &[("10.0.0.2:80", there)]);
    world.apply([new().unhealthy().into()]);
    table(&mut world, &[("10.0.0.2:80", there)]);
    world.remove("Kubernetes//Pod/app/new");
    table(&mut world, &[("10.0.0.2:80", "same node Kubernetes//Pod/app/old 10.0.0.2:80 as old")]);
}

/// A WorkloadEntry of another namespace that claims an address.
fn claim(address: &str) -> Workload {
    pod("claim", address).plain().with(|entry| {
        entry.uid = "Kubernetes/networking.istio.io/WorkloadEntry/other/claim".into();
        entry.namespace = "other".into();
    })
}

/// A pod, as its uid says.
fn real_pod(name: &str, address: &str) -> Workload {
    pod(name, address).with(|pod| pod.uid = format!("Kubernetes//Pod/app/{name}"))
}

#[test]
fn a_pod_owns_its_address_whatever_else_claims_it() {
    let direct = "same node Kubernetes//Pod/app/web 10.0.0.2:80 as web";
    let entry = |vips: &[&str]| service("entry", vips).with(|service| service.namespace = "other".into());
    let claims: [fn() -> Resource; 2] =
        [|| claim("10.0.0.2").into(), || claim("10.0.0.2").unhealthy().into()];
    for claim in claims {
        for pod_first in [true, false] {
            let mut world = World::new([pod("client", "10.0.0.1").into()]);
            let mut resources =
                vec![real_pod("web", "10.0.0.2").unhealthy().into(), claim(), entry(&["10.0.0.2"]).into()];
            if !pod_first {
                resources.reverse();
            }
            resources.into_iter().for_each(|resource| world.apply([resource]));
            table(&mut world, &[("10.0.0.2:80", direct)]);
            // Without the pod the others come to their right.
            world.remove("Kubernetes//Pod/app/web");
            let refused = "refused: service other/entry.app.svc, port 80: no endpoint is known";
            table(&mut world, &[("10.0.0.2:80", refused)]);
            world.remove("other/entry.app.svc");
            let other = "plain Kubernetes/networking.istio.io/WorkloadEntry/other/claim 10.0.0.2:80";
            table(&mut world, &[("10.0.0.2:80", other)]);
            world.apply([real_pod("web", "10.0.0.2").into()]);
            table(&mut world, &[("10.0.0.2:80", direct)]);
        }
    }
}

#[test]
fn an_entry_at_a_pods_address_is_no_endpoint() {
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        real_pod("web", "10.0.0.2").of("web").into(),
        claim("10.0.0.2").of("web").of("mine").into(),
        service("web", &["10.96.0.1"]).into(),
        service("mine", &["10.96.0.2"]).into(),
    ]);
    assert_eq!(reached(&mut world, "10.96.0.1:80"), names(&["Kubernetes//Pod/app/web"]));
    let none = "refused: service app/mine.app.svc, port 80: no healthy endpoint is in scope, serves the port and can be reached";
    table(&mut world, &[("10.96.0.2:80", none)]);
    world.remove("Kubernetes//Pod/app/web");
    assert_eq!(reached(&mut world, "10.96.0.2:80").len(), 1);
}

#[test]
fn of_entries_that_claim_an_address_the_oldest_has_it() {
    let older = claim("10.0.0.2").with(|entry| {
        entry.uid.push_str("-older");
        entry.created = 1;
    });
    let younger = claim("10.0.0.2").with(|entry| entry.created = 2);
    let mut world = World::new([pod("client", "10.0.0.1").into(), younger.into(), older.unhealthy().into()]);
    let of =
        |uid: &str| format!("plain Kubernetes/networking.istio.io/WorkloadEntry/other/{uid} 10.0.0.2:80");
    table(&mut world, &[("10.0.0.2:80", of("claim-older").as_str())]);
    world.remove("Kubernetes/networking.istio.io/WorkloadEntry/other/claim-older");
    table(&mut world, &[("10.0.0.2:80", of("claim").as_str())]);
}

#[test]
fn a_range_of_addresses_captures_its_own_ports_only() {
    let passthrough = |name: &str, vip: &str, number| {
        service(name, &[vip]).with(|service| {
            service.load_balancing = Some(balancing(Mode::Passthrough, &[]));
            service.ports = vec![port(number, number)];
        })
    };
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        real_pod("web", "10.0.0.2").of("web").into(),
        service("web", &["10.96.0.1"]).into(),
        passthrough("all", "0.0.0.0/0", 5432).into(),
        passthrough("more", "0.0.0.0/0", 5433).into(),
        passthrough("nodes", "172.18.0.0/16", 6379).into(),
        service("static", &["172.19.0.0/16"]).into(),
        passthrough("single", "172.18.0.9", 6380).into(),
    ]);
    table(
        &mut world,
        &[
            ("1.1.1.1:5432", "plain - 1.1.1.1:5432"),
            ("1.1.1.1:5433", "plain - 1.1.1.1:5433"),
            ("1.1.1.1:443", "unknown, ask for /1.1.1.1"),
            ("172.18.0.1:6379", "plain - 172.18.0.1:6379"),
            ("172.18.0.1:5432", "plain - 172.18.0.1:5432"),
            ("172.18.0.1:80", "unknown, ask for /172.18.0.1"),
            ("172.18.0.9:6380", "plain - 172.18.0.9:6380"),
            ("172.18.0.9:6379", "plain - 172.18.0.9:6379"),
            ("172.18.0.9:81", "unknown, ask for /172.18.0.9"),
            ("172.19.0.1:80", "refused: service app/static.app.svc, port 80: no endpoint is known"),
            ("172.19.0.1:81", "unknown, ask for /172.19.0.1"),
            ("10.0.0.2:5432", "same node Kubernetes//Pod/app/web 10.0.0.2:5432 as web"),
            ("10.96.0.1:80", "same node Kubernetes//Pod/app/web 10.0.0.2:8080 as web"),
        ],
    );
}

#[test]
fn terminating_endpoints_that_serve_are_the_last_choice() {
    let leaving = |name: &str, address: &str| {
        pod(name, address).of("s").unhealthy().with(|pod| pod.serving_while_terminating = true)
    };
    let mut world = World::new([
        pod("c", "10.0.0.1").into(),
        service("s", &["10.1.0.1"]).into(),
        leaving("leaving", "10.0.0.2").into(),
        pod("broken", "10.0.0.3").of("s").unhealthy().into(),
    ]);
    let chosen = |world: &mut World, exclude: &[&str]| {
        let route = world.route_but("c", "10.1.0.1:80", exclude);
        route.next_hop().map(ToString::to_string)
    };
    assert_eq!(chosen(&mut world, &[]).as_deref(), Some("leaving"));
    world.apply([pod("ready", "10.0.0.4").of("s").into()]);
    for _ in 0..50 {
        assert_eq!(chosen(&mut world, &[]).as_deref(), Some("ready"), "the leaving one gets nothing new");
    }
    assert_eq!(
        chosen(&mut world, &["ready"]).as_deref(),
        Some("leaving"),
        "for a retry it is better than none"
    );
    world.remove("ready");
    assert_eq!(chosen(&mut world, &[]).as_deref(), Some("leaving"));
    world.apply([leaving("leaving", "10.0.0.2").with(|pod| pod.serving_while_terminating = false).into()]);
    assert_eq!(chosen(&mut world, &[]), None, "it has stopped serving");
}

#[test]
fn strict_uses_terminating_endpoints_in_scope() {
    let leaving = |name: &str, address: &str, node: &str| {
        let leaving = pod(name, address).of("s").on(node).unhealthy();
        leaving.with(|pod| pod.serving_while_terminating = true)
    };
    let local = service("s", &["10.1.0.1"]).with(|service| {
        service.load_balancing = Some(balancing(Mode::Strict, &[Scope::Node]));
    });
    let mut world = World::new([
        pod("c", "10.0.0.1").on("one").into(),
        local.into(),
        leaving("far", "10.0.0.3", "two").into(),
        pod("far-ready", "10.0.0.4").of("s").on("two").into(),
    ]);
    let chosen = |world: &mut World| world.route("c", "10.1.0.1:80").next_hop().map(ToString::to_string);
    assert_eq!(chosen(&mut world), None, "neither is on the client's node");
    world.apply([leaving("near", "10.0.0.2", "one").into()]);
    assert_eq!(chosen(&mut world).as_deref(), Some("near"), "nothing else on the node serves");
    world.apply([pod("ready", "10.0.0.5").of("s").on("one").into()]);
    for _ in 0..50 {
        assert_eq!(chosen(&mut world).as_deref(), Some("ready"));
    }
}

/// A load of nothing, with some workloads ejected.
struct Ejecting(&'static [&'static str]);

impl Load for Ejecting {
    fn connections(&self, _: &WorkloadUid) -> u32 {
        0
    }

    fn is_ejected(&self, workload: &ambit_directory::Workload) -> bool {
        self.0.contains(&workload.uid.as_str())
    }
}

#[test]
fn an_ejected_endpoint_is_chosen_only_where_all_are() {
    let affine = |sticky: bool| {
        let balanced = service("s", &["10.1.0.1"]);
        if sticky { balanced.extended(SESSION_AFFINITY_EXTENSION) } else { balanced }
    };
    for sticky in [false, true] {
        let mut world = World::new([
            pod("c", "10.0.0.1").into(),
            affine(sticky).into(),
            pod("a", "10.0.0.2").of("s").into(),
            pod("b", "10.0.0.3").of("s").into(),
        ]);
        let snapshot = world.snapshot();
        let mut chosen = |ejected: &'static [&'static str], exclude: &[WorkloadUid]| {
            let question = Question {
                client: snapshot.workload("c").unwrap(),
                role: ClientRole::Workload,
                source: [10, 0, 0, 1].into(),
                destination: "10.1.0.1:80".parse().unwrap(),
                exclude,
            };
            let route = resolve(&snapshot, &question, &Ejecting(ejected), &mut world.rng);
            route.next_hop().map(ToString::to_string)
        };
        for _ in 0..50 {
            assert_eq!(chosen(&["a"], &[]).as_deref(), Some("b"));
            assert!(chosen(&["a", "b"], &[]).is_some());
        }
        assert_eq!(chosen(&["a"], &["b".into()]).as_deref(), Some("a"));
    }
}
