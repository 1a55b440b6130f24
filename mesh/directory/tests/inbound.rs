//! What comes in: whether it is meant for the workload, and who is at either end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use ambit_api::workload::ApplicationTunnel;
use common::{PodExt, World, behind_waypoint, pod};

#[test]
fn connects_are_admitted_for_the_local_address_or_as_waypoint() {
    let mut resources = behind_waypoint(|_| {});
    resources.push(
        pod("sandwich", "10.0.0.6")
            .with(|pod| pod.application_tunnel = Some(ApplicationTunnel { protocol: 1, port: 15088 }))
            .into(),
    );
    let world = World::new(resources);
    let snapshot = world.snapshot();
    let ask = |uid: &str, authority: &str| {
        let workload = snapshot.workload(uid).unwrap();
        let target = snapshot.inbound_target(workload, workload.addresses[0], &authority.parse().unwrap());
        target.map_or_else(
            |refusal| refusal.to_string(),
            |target| format!("{} at {} {}", target.destination, target.dial, target.proxy_header),
        )
    };
    for (uid, authority, expected) in [
        ("web", "10.0.0.2:8080", "10.0.0.2:8080 at 10.0.0.2:8080 false"),
        ("web", "10.0.0.3:8080", "10.0.0.3:8080 is not an address of workload web"),
        ("web", "10.96.0.1:80", "10.96.0.1:80 is not an address of workload web"),
        ("web", "web.app.svc:80", "10.0.0.2:8080 at 10.0.0.2:8080 false"),
        ("web", "web.app.svc:81", "workload web serves no web.app.svc:81"),
        ("web", "wp.app.svc:80", "workload web serves no wp.app.svc:80"),
        ("wp", "10.96.0.1:80", "10.96.0.1:80 at 10.0.0.3:80 false"),
        ("wp", "10.0.0.2:80", "10.0.0.2:80 is not an address of workload wp"),
        ("sandwich", "10.96.0.1:80", "10.96.0.1:80 at 10.0.0.6:15088 true"),
    ] {
        assert_eq!(ask(uid, authority), expected, "{authority} at {uid}");
    }
}

#[test]
fn the_source_of_a_connection_is_who_proves_to_be_there() {
    let twin = |name: &str, address: &str| pod(name, address).with(|pod| pod.service_account = "twin".into());
    let world = World::new([
        pod("solo", "10.0.0.1").into(),
        twin("t1", "10.0.0.2").into(),
        twin("t2", "10.0.0.3").into(),
    ]);
    let snapshot = world.snapshot();
    let source = |address: &str, peer: Option<&str>| {
        let peer = peer.map(|account| format!("spiffe://cluster.local/ns/app/sa/{account}").parse().unwrap());
        snapshot.inbound_source("", address.parse().unwrap(), peer.as_ref()).map(|it| it.uid.to_string())
    };
    assert_eq!(source("10.0.0.2", Some("twin")).as_deref(), Some("t1"));
    assert_eq!(source("10.0.0.9", Some("solo")).as_deref(), Some("solo"), "by identity, across networks");
    assert_eq!(
        source("10.0.0.1", Some("twin")),
        None,
        "neither of the twins for certain, and not who is at the address"
    );
    assert_eq!(source("10.0.0.1", None).as_deref(), Some("solo"));
    assert_eq!(source("10.0.0.9", None), None);
}
