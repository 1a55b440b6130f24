//! Resources that come on demand: which names a route depends on, and what goes when a name is given up.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::net::IpAddr;

use ambit_api::workload::load_balancing::Mode;
use ambit_directory::{
    Authority, ClientRole, Question, Route, WAYPOINT_FAILURE_OPEN_EXTENSION, WorkloadUid, resolve_on_demand,
};

use common::{PodExt, ServiceExt, World, balancing, by_host, pod, service};

/// The route and the names that it depends on, each with whether it is known.
fn ask(world: &mut World, destination: &str) -> (Route, Vec<(String, bool)>) {
    let snapshot = world.snapshot();
    let client = snapshot.workload("c").unwrap();
    let question = Question {
        client,
        role: ClientRole::Workload,
        source: IpAddr::from([10, 0, 0, 1]),
        destination: destination.parse::<Authority>().unwrap(),
        exclude: &[],
    };
    let load = |_: &WorkloadUid| 0;
    let (route, dependencies) = resolve_on_demand(&snapshot, &question, &load, &mut world.rng);
    (route, dependencies.into_iter().map(|it| (it.demand.to_string(), it.is_known)).collect())
}

#[test]
fn an_address_inside_a_known_block_is_still_to_be_asked_for() {
    let block = service("block", &["10.9.0.0/16"])
        .with(|service| service.load_balancing = Some(balancing(Mode::Passthrough, &[])));
    let mut world = World::new([pod("c", "10.0.0.1").into(), block.into()]);
    let (route, names) = ask(&mut world, "10.9.1.2:80");
    assert!(matches!(route, Route::Plain(_)), "{route:?}");
    assert_eq!(names, [("/10.9.1.2".to_owned(), false)]);
}

#[test]
fn a_missing_waypoint_is_asked_for_even_if_it_may_be_bypassed() {
    let open = service("app", &["10.1.0.1"])
        .extended(WAYPOINT_FAILURE_OPEN_EXTENSION)
        .with(|service| service.waypoint = Some(by_host("app", "wp.app.svc")));
    let server = pod("s", "10.0.0.2").of("app");
    let mut world = World::new([pod("c", "10.0.0.1").into(), server.into(), open.into()]);
    let (_, names) = ask(&mut world, "10.1.0.1:80");
    assert_eq!(names, [("/10.1.0.1".to_owned(), true), ("app/wp.app.svc".to_owned(), false)]);
}

#[test]
fn a_name_given_up_takes_with_it_what_nothing_else_demands() {
    let both = || pod("both", "10.0.0.2").of("one").of("two");
    let mut world = World::new([
        service("one", &["10.1.0.1"]).into(),
        service("two", &["10.1.0.2"]).into(),
        pod("first", "10.0.0.3").of("one").into(),
        both().into(),
        pod("dialled", "10.0.0.4").of("one").into(),
    ]);
    let (one, two) = ("app/one.app.svc".to_owned(), "app/two.app.svc".to_owned());
    let mut subscribed = vec!["/10.0.0.4".to_owned(), two.clone()];
    assert!(world.directory.release("/10.1.0.1", |name| *name == one).is_empty(), "demanded by its name");
    let mut dropped = world.directory.release("/10.1.0.1", |name| subscribed.iter().any(|it| it == name));
    dropped.sort();
    assert_eq!(dropped, [one, "first".to_owned()], "the others are demanded, or behind a service that is");
    assert!(world.snapshot().workload("both").is_some());
    subscribed.clear();
    let mut dropped = world.directory.release(&two, |_| false);
    dropped.sort();
    assert_eq!(dropped, [two, "both".to_owned()]);
    assert_eq!(world.directory.release("/10.0.0.4", |_| false), ["dialled"]);
    assert!(world.directory.release("/192.0.2.1", |_| false).is_empty());
    assert!(world.directory.release("no name at all", |_| false).is_empty());
}
