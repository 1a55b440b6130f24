//! Addresses that several workloads or services claim.

use ambit_api::workload::Workload;
use ambit_api::workload::load_balancing::Mode;

use crate::common::{
    PodExt, Resource, ServiceExt, World, balancing, names, pod, port, reached, service, table,
};

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
