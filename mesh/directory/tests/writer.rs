//! What the writer accepts, rejects and reports.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use ambit_api::security::{Action, Authorization, Match, Rule, Scope};
use ambit_api::workload::{
    Address, Extension, GatewayAddress, NetworkAddress, Port, PortList, Service, Workload, address,
};
use ambit_directory::{HostRef, Removed, SESSION_AFFINITY_EXTENSION, Update};
use common::{PodExt, Resource, ServiceExt, World, octets, pod, port, say, service};

fn deny_all(name: &str, scope: Scope) -> Authorization {
    Authorization {
        name: name.into(),
        namespace: "app".into(),
        scope: scope.into(),
        action: Action::Deny.into(),
        rules: vec![Rule::default()],
        ..Authorization::default()
    }
}

#[test]
fn a_service_goes_by_the_name_that_it_came_by() {
    let mut world = World::new([]);
    let odd = Service { namespace: "App".into(), hostname: "Web.app.svc".into(), ..service("web", &[]) };
    world.apply([odd.into()]);
    world.remove("app/web.app.svc");
    assert_eq!(world.snapshot().services().len(), 1, "another namespace's");
    world.remove("App/WEB.app.svc");
    assert_eq!(world.snapshot().services().len(), 0);
}

#[test]
fn an_unreadable_resource_is_rejected_and_its_last_form_stays() {
    let bad_workload =
        |change: fn(&mut Workload)| Resource::from(pod("web", "10.0.0.2").with(change)).update();
    let bad_service =
        |change: fn(&mut Service)| Resource::from(service("web", &["10.96.0.1"]).with(change)).update();
    let bad = [
        (
            bad_workload(|it| it.addresses.push(vec![1, 2, 3].into())),
            "web: an address of 3 bytes in workload.addresses",
        ),
        (bad_workload(|it| it.namespace = "a/b".into()), "web: no identity: "),
        (bad_workload(|it| it.tunnel_protocol = 9), "web: workload.tunnel_protocol has unknown value 9"),
        (bad_workload(|it| it.network_mode = 9), "web: workload.network_mode has unknown value 9"),
        (bad_workload(|it| it.status = 9), "web: workload.status has unknown value 9"),
        (bad_workload(|it| it.waypoint = Some(GatewayAddress::default())), "web: workload.waypoint is empty"),
        (
            bad_workload(|it| _ = it.services.insert("nonsense".into(), PortList::default())),
            "web: \"nonsense\" in workload.services is not <namespace>/<hostname>",
        ),
        (
            bad_service(|it| it.ports.push(port(70000, 1))),
            "app/web.app.svc: 70000 in service.ports is no port",
        ),
        (bad_service(|it| it.ports.push(Port::default())), "app/web.app.svc: 0 in service.ports is no port"),
        (
            bad_service(|it| {
                let address =
                    NetworkAddress { network: String::new(), address: octets("10.0.0.0"), length: Some(33) };
                it.addresses.push(address);
            }),
            "app/web.app.svc: prefix length 33 in service.addresses is longer than the address",
        ),
        (bad_service(|it| it.visibility = 9), "app/web.app.svc: service.visibility has unknown value 9"),
        (
            Update::Address { name: "x".into(), address: Address { r#type: None } },
            "x: address is neither a workload nor a service",
        ),
        (
            Update::Address {
                name: "x".into(),
                address: Address { r#type: Some(address::Type::Workload(Workload::default())) },
            },
            "x: workload.uid is empty",
        ),
        (
            // Its removal could not name it.
            Resource::from(Service { namespace: "a/b".into(), ..service("web", &[]) }).update(),
            "a/b/web.app.svc: \"a/b/web.app.svc\" in service.namespace is not <namespace>/<hostname>",
        ),
    ];
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        pod("web", "10.0.0.2").of("web").into(),
        service("web", &["10.96.0.1"]).into(),
    ]);
    let good = Resource::from(pod("good", "10.0.0.3")).update();
    let (updates, expected): (Vec<Update>, Vec<&str>) = bad.into_iter().unzip();
    let rejected = world.directory.apply(updates.into_iter().chain([good]));
    assert_eq!(rejected.len(), expected.len());
    for (rejected, expected) in rejected.iter().zip(expected) {
        assert!(rejected.to_string().starts_with(expected), "{rejected} is not {expected}");
    }
    assert_eq!(say(&world.route("client", "10.96.0.1:80")), "same node web 10.0.0.2:8080 as web");
    assert_eq!(say(&world.route("client", "10.0.0.3:80")), "same node good 10.0.0.3:80 as good");
}

#[test]
fn a_policy_that_cannot_be_read_refuses() {
    let mut world = World::new([pod("web", "10.0.0.2").into()]);
    let source = Authorization {
        rules: vec![Rule {
            clauses: vec![ambit_api::security::Clause {
                matches: vec![Match { destination_ports: vec![70000], ..Match::default() }],
            }],
        }],
        ..deny_all("bad", Scope::Namespace)
    };
    let rejected = world.directory.apply([Resource::from(source).update()]);
    assert!(
        rejected[0].to_string().starts_with("app/bad: policy app/bad, rule 0: 70000 in destination_ports"),
        "{rejected:?}"
    );
    let allowed = |world: &World| {
        let snapshot = world.snapshot();
        let web = snapshot.workload("web").unwrap();
        snapshot.authorize(web, None, "10.0.0.1".parse().unwrap(), "10.0.0.2:80".parse().unwrap()).allowed()
    };
    assert!(!allowed(&world));
    world.directory.apply([Update::PolicyRemoved { name: "app/bad".into() }]);
    assert!(allowed(&world));
}

#[test]
fn a_snapshot_that_is_kept_does_not_change() {
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        pod("web", "10.0.0.2").of("web").into(),
        service("web", &["10.96.0.1"]).into(),
        deny_all("p", Scope::Namespace).into(),
    ]);
    let kept = world.snapshot();
    let before = serde_json::to_value(&*kept).unwrap();
    world.apply([
        pod("web", "10.0.0.9").of("other").unhealthy().into(),
        service("web", &["10.96.0.7"]).into(),
    ]);
    world.remove("client");
    world.remove("app/web.app.svc");
    world.directory.apply([Update::PolicyRemoved { name: "app/p".into() }]);
    assert_eq!(serde_json::to_value(&*kept).unwrap(), before);
    assert_ne!(serde_json::to_value(&*world.snapshot()).unwrap(), before);
}

#[test]
fn readers_see_whole_updates_and_never_wait() {
    let mut world = World::new([pod("client", "10.0.0.1").into()]);
    let reader = world.reader.clone();
    let pods = (0..5000).map(|n| pod(&format!("p{n}"), &format!("10.1.{}.{}", n / 250, n % 250)));
    let pods = pods.map(|pod| Resource::from(pod).update()).inspect(|_| {
        // In the midst of the update.
        let snapshot = reader.load();
        assert_eq!(snapshot.workloads().len(), 1);
        assert!(snapshot.workload("client").is_some());
    });
    world.directory.apply(pods);
    assert_eq!(reader.load().workloads().len(), 5001);
}

#[test]
fn the_revision_and_stamps_say_whose_verdicts_may_have_changed() {
    let listing = |names: &[&str]| {
        pod("web", "10.0.0.2")
            .with(|pod| pod.authorization_policies = names.iter().map(ToString::to_string).collect())
    };
    let mut world = World::new([listing(&[]).into(), pod("other", "10.0.0.3").into()]);
    let mut changes = world.reader.changes();
    changes.mark_unchanged();
    let look = |world: &World| {
        let snapshot = world.snapshot();
        let stamp = |uid: &str| snapshot.authorization_stamp(snapshot.workload(uid).unwrap());
        (snapshot.revision(), stamp("web"), stamp("other"))
    };
    let start = look(&world);
    world.apply([listing(&[]).into()]);
    assert!(!changes.has_changed().unwrap(), "nothing is published when nothing changed");
    world.apply([listing(&[]).of("web").into(), service("web", &["10.96.0.1"]).into()]);
    let moved = look(&world);
    assert!(moved.0.snapshot > start.0.snapshot && moved.0.authorization == start.0.authorization);
    assert_eq!((moved.1, moved.2), (start.1, start.2));
    assert_eq!(*changes.borrow_and_update(), moved.0);
    // A policy that the workload will list, then the list, then a change of that policy.
    world.apply([deny_all("p", Scope::WorkloadSelector).into()]);
    let unlisted = look(&world);
    assert!(unlisted.0.authorization > moved.0.authorization);
    assert_eq!((unlisted.1, unlisted.2), (start.1, start.2), "it concerns nobody yet");
    world.apply([listing(&["app/p"]).of("web").into()]);
    let listed = look(&world);
    assert!(listed.0.authorization > unlisted.0.authorization && listed.1 != start.1 && listed.2 == start.2);
    world.apply([Authorization { dry_run: true, ..deny_all("p", Scope::WorkloadSelector) }.into()]);
    let changed = look(&world);
    assert!(changed.1 != listed.1 && changed.2 == start.2);
    world.apply([deny_all("all", Scope::Namespace).into()]);
    assert!(look(&world).1 != changed.1 && look(&world).2 != start.2);
    assert!(changes.has_changed().unwrap());
}

#[test]
fn removals_are_reported_as_long_as_they_are_remembered() {
    let mut world =
        World::new((0..1500).map(|n| pod(&format!("p{n}"), &format!("10.0.{}.{}", n / 250, n % 250)).into()));
    let start = world.snapshot().revision().snapshot;
    let uids = |removed: &Removed<'_>| match removed {
        Removed::These(uids) => uids.iter().map(ToString::to_string).collect::<Vec<_>>(),
        Removed::TooMany => vec!["too many".to_owned()],
    };
    assert_eq!(uids(&world.snapshot().removed_since(start)), [""; 0]);
    world.remove("p0");
    world.remove("p1");
    world.apply([pod("p1", "10.9.9.9").into()]);
    assert_eq!(uids(&world.snapshot().removed_since(start)), ["p0"], "p1 is there again");
    let later = world.snapshot().revision().snapshot;
    assert_eq!(uids(&world.snapshot().removed_since(later)), [""; 0]);
    for n in 2..1200 {
        world.remove(&format!("p{n}"));
    }
    assert_eq!(uids(&world.snapshot().removed_since(start)), ["too many"]);
    let recent = world.snapshot().revision().snapshot;
    world.remove("p1300");
    assert_eq!(uids(&world.snapshot().removed_since(recent)), ["p1300"]);
}

#[test]
fn pods_are_found_by_what_the_node_agent_knows_of_them() {
    let named = pod("reviews-1", "10.0.0.2").with(|pod| {
        pod.uid = "Kubernetes//Pod/app/reviews-1".into();
        pod.service_account = String::new();
        pod.trust_domain = String::new();
    });
    let world = World::new([named.into()]);
    let snapshot = world.snapshot();
    let found = snapshot.pod("Kubernetes", "app", "reviews-1", "default").unwrap();
    // What control planes leave out because it is the default.
    assert_eq!(found.identity.as_str(), "spiffe://cluster.local/ns/app/sa/default");
    assert!(snapshot.pod("Kubernetes", "app", "reviews-1", "other").is_none(), "another service account");
    assert!(snapshot.pod("elsewhere", "app", "reviews-1", "default").is_none());
    assert_eq!(snapshot.workloads_of(&found.identity).count(), 1);
}

#[test]
fn names_compare_without_regard_to_case() {
    let mut world = World::new([
        pod("client", "10.0.0.1").into(),
        pod("web", "10.0.0.2")
            .with(|pod| _ = pod.services.insert("app/WEB.app.svc".into(), PortList::default()))
            .into(),
        service("web", &["10.96.0.1"]).with(|service| service.hostname = "Web.App.Svc".into()).into(),
    ]);
    assert_eq!(say(&world.route("client", "wEb.app.svc:80")), "same node web 10.0.0.2:8080 as web");
    world.remove("app/Web.App.Svc");
    assert_eq!(world.snapshot().services().len(), 0);
}

#[test]
fn the_dump_shows_services_workloads_and_policies() {
    let world = World::new([
        pod("web", "10.0.0.2").of("web").with(|pod| pod.extensions.push(Extension::default())).into(),
        service("web", &["10.96.0.1", "10.97.0.0/16"]).extended(SESSION_AFFINITY_EXTENSION).into(),
        deny_all("p", Scope::Global).into(),
    ]);
    let dump = serde_json::to_value(&*world.snapshot()).unwrap();
    let service = &dump["services"][0];
    assert_eq!((&service["namespace"], &service["hostname"]), (&"app".into(), &"web.app.svc".into()));
    assert_eq!(service["endpoints"], serde_json::json!(["web"]));
    assert_eq!(service["vips"], serde_json::json!(["/10.96.0.1", "/10.97.0.0/16"]));
    assert_eq!(service["sessionAffinity"], true);
    let workload = &dump["workloads"][0];
    assert_eq!(workload["identity"], "spiffe://cluster.local/ns/app/sa/web");
    assert_eq!((&workload["protocol"], &workload["status"]), (&"HBONE".into(), &"Healthy".into()));
    assert_eq!(workload["workloadIps"], serde_json::json!(["10.0.0.2"]));
    assert_eq!(dump["policies"][0]["name"], "app/p");
    let snapshot = world.snapshot();
    let host = HostRef { namespace: "app", hostname: "web.app.svc" };
    assert_eq!(snapshot.endpoints(host).unwrap().len(), 1);
}
