//! Which of several endpoints gets a connection.

use std::collections::BTreeMap;

use ambit_directory::{ClientRole, Route, SESSION_AFFINITY_EXTENSION, WorkloadUid};

use crate::common::{PodExt, ServiceExt, World, pod, service, spread_of};

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
