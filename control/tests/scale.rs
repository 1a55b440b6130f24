//! The cost of one change does not grow with the cluster.
//!
//! What is compared is the number of producers computed, which a busy machine does not change.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use ambit_control::index::{Changes, Index, Settings};
use ambit_control::object::{Change, Labels, NamespacedName, Object, Pod, Service};
use ambit_control::source;

/// Pods of one service.
const REPLICAS: usize = 10;
/// Namespaces that pods and services are spread over.
const NAMESPACES: usize = 20;

fn parse(text: &str) -> Object {
    let (mut objects, problems) = source::parse(Path::new("scale.yaml"), text);
    assert!(problems.is_empty(), "{problems:?}");
    objects.remove(0)
}

/// What all pods have in common.
static POD: LazyLock<Pod> = LazyLock::new(|| {
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, annotations: {ambient.istio.io/redirection: enabled}}\n\
                spec: {containers: []}\nstatus: {podIP: 10.0.0.1, conditions: [{type: Ready, status: \"True\"}]}\n";
    let Object::Pod(pod) = parse(text) else { panic!("no pod") };
    Pod::clone(&pod)
});

/// What all services have in common.
static SERVICE: LazyLock<Service> = LazyLock::new(|| {
    let text =
        "apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {selector: {a: b}, ports: [{port: 80}]}\n";
    let Object::Service(service) = parse(text) else { panic!("no service") };
    Service::clone(&service)
});

/// The labels of one service's pods; `tier` is shared by everybody.
fn labels(i: usize) -> Labels {
    [("app", format!("app-{i}")), ("tier", "common".to_owned())].into_iter().collect()
}

fn pod(i: usize) -> Arc<Pod> {
    let service = i / REPLICAS;
    let mut pod = POD.clone();
    pod.meta.id = NamespacedName::new(format!("ns-{}", service % NAMESPACES), format!("pod-{i}"));
    pod.meta.labels = labels(service);
    pod.node = format!("node-{}", i % 100).into();
    pod.addresses = vec![Ipv4Addr::from_bits(0x0a00_0000 + u32::try_from(i).unwrap()).into()];
    Arc::new(pod)
}

fn service(i: usize, port: u16) -> Arc<Service> {
    let mut service = SERVICE.clone();
    service.meta.id = NamespacedName::new(format!("ns-{}", i % NAMESPACES), format!("svc-{i}"));
    service.selector = Some(labels(i));
    service.ports[0].number = port;
    Arc::new(service)
}

fn cluster(pods: usize) -> Index {
    let services = (0..pods / REPLICAS).map(|i| Change::Apply(Object::Service(service(i, 80))));
    let pods = (0..pods).map(|i| Change::Apply(Object::Pod(pod(i))));
    let mut index = Index::new(Settings::default());
    index.apply(pods.chain(services));
    index
}

fn change(index: &mut Index, object: Object) -> (Changes, u64) {
    let before = index.computed();
    let changes = index.apply([Change::Apply(object)]);
    (changes, index.computed() - before)
}

/// What one change of each kind computes and publishes.
fn costs(index: &mut Index) -> Vec<(&'static str, u64, usize)> {
    let mut leaving = Pod::clone(&pod(7));
    leaving.ready = false;
    let (changes, pod_cost) = change(index, Object::Pod(Arc::new(leaving)));
    assert_eq!(changes.addresses.urgent.len(), 1);
    let pod_changes = changes.addresses.upserts.len();
    let (changes, service_cost) = change(index, Object::Service(service(3, 81)));
    let service_changes = changes.addresses.upserts.len();
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: ns-2}\n\
                  spec: {selector: {matchLabels: {app: app-2, tier: common}}, rules: [{}]}\n";
    let (changes, policy_cost) = change(index, parse(policy));
    let policy_changes = changes.addresses.upserts.len() + changes.policies.upserts.len();
    vec![
        ("pod", pod_cost, pod_changes),
        ("service", service_cost, service_changes),
        ("policy", policy_cost, policy_changes),
    ]
}

#[test]
fn a_change_costs_the_same_in_a_large_and_a_small_cluster() {
    let small = costs(&mut cluster(1_000));
    let large = costs(&mut cluster(10_000));
    assert_eq!(small, large);
    let members = REPLICAS as u64;
    assert_eq!(
        large,
        [("pod", 1, 1), ("service", 1 + members, 1 + REPLICAS), ("policy", 1 + members, 1 + REPLICAS)]
    );
}

#[test]
fn taking_a_large_cluster_computes_each_object_once() {
    // Beside them, the policy that is always there.
    assert_eq!(cluster(10_000).computed(), 11_000 + 1);
}
