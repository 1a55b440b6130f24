//! Names, addresses and ports that are dialled.

use ambit_api::workload::load_balancing::Mode;
use ambit_api::workload::service::Visibility;
use ambit_api::workload::{PortList, Service, Workload};
use ambit_directory::Route;

use crate::common::{PodExt, ServiceExt, World, balancing, octets, pod, port, say, service, table};

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
    let own = |target| PortList { ports: vec![port(80, target)], ..PortList::default() };
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
