//! Which endpoints of a service can be chosen.

use ambit_api::workload::load_balancing::{HealthPolicy, Mode, Scope};
use ambit_api::workload::{Service, Workload};
use ambit_directory::{ClientRole, Load, Question, SESSION_AFFINITY_EXTENSION, WorkloadUid, resolve};

use crate::common::{
    PodExt, Resource, ServiceExt, World, balancing, names, pod, reached, say, service, table,
};

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
