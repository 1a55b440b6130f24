//! Connections that must pass a waypoint or the gateway of another network, and that go nowhere without.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use ambit_api::workload::WeightedWaypoint;
use ambit_directory::{ClientRole, Refusal, Route, WAYPOINT_FAILURE_OPEN_EXTENSION};
use common::{
    PodExt, ServiceExt, World, behind_waypoint, by_address, by_host, names, pod, port, reached, say, service,
    spread_of, table,
};

#[test]
fn a_service_with_a_waypoint_is_reached_through_it_only() {
    let through = "waypoint wp for 10.96.0.1:80 via 10.0.0.3:15008 as wp";
    let mut world = World::new(behind_waypoint(|_| {}));
    table(
        &mut world,
        &[
            ("10.96.0.1:80", through),
            ("web.app.svc:80", "waypoint wp for web.app.svc:80 via 10.0.0.3:15008 as wp"),
            ("10.0.0.2:8080", "same node web 10.0.0.2:8080 as web"),
            ("10.96.0.1:81", "refused: service app/web.app.svc has no port 81"),
        ],
    );
    // By address, of the waypoint's service or of the waypoint itself.
    for address in ["10.96.0.9", "10.0.0.3"] {
        world.apply(behind_waypoint(|service| service.waypoint = Some(by_address("", address))));
        table(&mut world, &[("10.96.0.1:80", through)]);
    }
    // The waypoint itself, and whoever acts as one, goes on to the endpoint.
    assert_eq!(say(&world.route("wp", "10.96.0.1:80")), "same node web 10.0.0.2:8080 as web");
    let as_role = |world: &mut World, role| say(&world.ask("client", "10.96.0.1:80", role, &[], |_| 0));
    assert_eq!(as_role(&mut world, ClientRole::Waypoint), "same node web 10.0.0.2:8080 as web");
    assert_eq!(as_role(&mut world, ClientRole::Ingress), "same node web 10.0.0.2:8080 as web");
    world.apply(behind_waypoint(|service| service.ingress_use_waypoint = true));
    assert_eq!(as_role(&mut world, ClientRole::Ingress), through);
}

#[test]
fn a_waypoint_that_is_missing_or_not_ready_means_refusal() {
    let mut world = World::new(behind_waypoint(|_| {}));
    let refused = |world: &mut World, why: &str| {
        table(world, &[("10.96.0.1:80", &format!("refused: waypoint app/wp.app.svc{why}"))]);
    };
    assert_eq!(
        say(&world.route_but("client", "10.96.0.1:80", &["wp"])),
        "refused: waypoint app/wp.app.svc: every suitable endpoint was tried"
    );
    world.apply([pod("wp", "10.0.0.3").of("wp").unhealthy().into()]);
    refused(&mut world, ": no endpoint is healthy");
    world.remove("wp");
    refused(&mut world, ": no endpoint is known");
    world.remove("app/wp.app.svc");
    refused(&mut world, " is not known");
    let Route::Refuse(refusal) = world.route("client", "10.96.0.1:80") else { panic!("let through") };
    assert_eq!(refusal.demand().unwrap().to_string(), "app/wp.app.svc");
    world.apply(behind_waypoint(|service| service.waypoint = Some(by_address("", "10.99.9.9"))));
    table(&mut world, &[("10.96.0.1:80", "refused: waypoint /10.99.9.9 is not known")]);
}

#[test]
fn a_missing_waypoint_is_bypassed_only_if_its_owner_allows_it() {
    let mut world = World::new(behind_waypoint(|service| {
        *service = service.clone().extended(WAYPOINT_FAILURE_OPEN_EXTENSION);
    }));
    table(&mut world, &[("10.96.0.1:80", "waypoint wp for 10.96.0.1:80 via 10.0.0.3:15008 as wp")]);
    world.remove("wp");
    table(&mut world, &[("10.96.0.1:80", "same node web 10.0.0.2:8080 as web bypassing waypoint")]);
}

#[test]
fn a_workload_dialled_itself_is_reached_through_its_waypoint() {
    let guarded = |name: &str, address: &str| {
        pod(name, address).of("web").with(|pod| pod.waypoint = Some(by_host("app", "wp.app.svc")))
    };
    let mut world = World::new(
        behind_waypoint(|service| service.waypoint = None)
            .into_iter()
            .chain([guarded("web", "10.0.0.2").into()]),
    );
    table(
        &mut world,
        &[
            ("10.0.0.2:9000", "waypoint wp for 10.0.0.2:9000 via 10.0.0.3:15008 as wp"),
            // Who dials the service is not concerned.
            ("10.96.0.1:80", "same node web 10.0.0.2:8080 as web"),
        ],
    );
    assert_eq!(say(&world.route("wp", "10.0.0.2:9000")), "same node web 10.0.0.2:9000 as web");
    assert_eq!(say(&world.route("web", "10.0.0.2:9000")), "own 10.0.0.2:9000");
    world.remove("wp");
    table(&mut world, &[("10.0.0.2:9000", "refused: waypoint app/wp.app.svc: no endpoint is known")]);
}

#[test]
fn weighted_waypoints_share_and_replace_each_other() {
    let weighted = |primary, canary| {
        let share = |host: &str, weight| WeightedWaypoint { destination: Some(by_host("app", host)), weight };
        move |service: &mut ambit_api::workload::Service| {
            service.weighted_waypoints = vec![share("wp.app.svc", primary), share("canary.app.svc", canary)];
        }
    };
    let mut resources = behind_waypoint(weighted(90, 10));
    resources.push(pod("canary", "10.0.0.4").of("canary").into());
    resources.push(service("canary", &["10.96.0.8"]).with(|it| it.ports = vec![port(15008, 15008)]).into());
    let mut world = World::new(resources);
    let hits = spread_of(&mut world, "10.96.0.1:80", 4000);
    assert!((300..500).contains(&hits["canary"]) && hits["canary"] + hits["wp"] == 4000, "{hits:?}");
    world.remove("canary");
    assert_eq!(reached(&mut world, "10.96.0.1:80"), names(&["wp"]));
    world.remove("wp");
    assert!(matches!(
        world.route("client", "10.96.0.1:80"),
        Route::Refuse(Refusal::WaypointUnavailable { .. })
    ));
    // Without weights the one waypoint counts.
    world.apply(behind_waypoint(weighted(0, 0)));
    assert_eq!(reached(&mut world, "10.96.0.1:80"), names(&["wp"]));
}

#[test]
fn another_network_is_reached_by_service_through_its_gateway() {
    let remote = |name: &str, address: &str| {
        pod(name, address)
            .network("far")
            .of("web")
            .with(|pod| pod.network_gateway = Some(by_address("far", "203.0.113.9")))
    };
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        remote("one", "10.0.0.1").into(),
        remote("two", "10.0.0.2").into(),
        remote("gateway", "203.0.113.9").with(|pod| pod.services.clear()).into(),
        service("web", &["10.96.0.1"])
            .with(|it| {
                it.subject_alt_names = vec!["spiffe://td/ns/app/sa/extra".into(), "www.example.com".into()];
            })
            .into(),
    ]);
    for _ in 0..20 {
        let Route::DoubleHbone(double) = world.route("client", "10.96.0.1:80") else { panic!("no gateway") };
        assert_eq!(double.hbone, "203.0.113.9:15008".parse().unwrap());
        assert_eq!(double.authority.to_string(), "web.app.svc:80");
        assert_eq!(&*double.gateway.uid.to_string(), "gateway");
        let mut inner: Vec<&str> = double.inner_expected.iter().map(|id| id.service_account()).collect();
        inner.sort_unstable();
        assert_eq!(inner, ["extra", "one", "two"], "whoever the other network chooses");
    }
    world.apply([remote("lost", "10.0.0.7").with(|pod| pod.network_gateway = None).into()]);
    assert!(!reached(&mut world, "10.96.0.1:80").contains("lost"), "no way in, no choice");
    world.remove("gateway");
    table(&mut world, &[("10.96.0.1:80", "refused: network gateway far/203.0.113.9 is not known")]);
    // An endpoint in the own network needs none.
    world.apply([pod("local", "10.0.0.3").of("web").into(), remote("one", "10.0.0.1").unhealthy().into()]);
    world.remove("two");
    world.remove("lost");
    assert_eq!(say(&world.route("client", "10.96.0.1:80")), "same node local 10.0.0.3:8080 as local,extra");
}

#[test]
fn a_gateway_behind_a_service_is_chosen_like_any_endpoint() {
    let gateway = |name: &str, address: &str| pod(name, address).of("gw");
    let remote = pod("remote", "10.0.0.5").network("far").of("web");
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        remote.with(|pod| pod.network_gateway = Some(by_host("app", "gw.app.svc"))).into(),
        gateway("g1", "10.0.0.2").into(),
        gateway("g2", "10.0.0.3").into(),
        service("gw", &["10.96.0.2"]).into(),
        service("web", &["10.96.0.1"]).into(),
    ]);
    assert_eq!(reached(&mut world, "10.96.0.1:80"), names(&["g1", "g2"]));
    assert_eq!(world.route_but("client", "10.96.0.1:80", &["g1"]).next_hop().unwrap().as_str(), "g2");
    assert_eq!(
        say(&world.route_but("client", "10.96.0.1:80", &["g1", "g2"])),
        "refused: network gateway app/gw.app.svc: every suitable endpoint was tried"
    );
}
