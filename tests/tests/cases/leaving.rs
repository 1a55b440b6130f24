//! Pods that leave: they serve for as long as they can where nobody else does, and get nothing new where others are.

use std::net::{IpAddr, SocketAddr};

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::{Cases, PORT, answer};

/// New connections that are opened while a pod leaves.
const CONNECTIONS: usize = 20;

pub(crate) fn add(trials: &mut Trials<Cases>) {
    trials.add("a_last_pod_that_leaves_serves_until_it_ends", last_pod);
    trials.add("a_pod_that_leaves_gets_nothing_new_beside_another", one_of_two);
}

/// A Deployment whose pods take `seconds` to leave, and its service.
fn manifests(name: &str, replicas: usize, seconds: u64) -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  replicas: {replicas}\n  \
         selector: {{matchLabels: {{app: {name}}}}}\n  template:\n    metadata: {{labels: {{app: {name}}}}}\n    spec:\n      \
         terminationGracePeriodSeconds: 30\n      containers:\n      - name: c\n        image: any\n        \
         command: [sleep, '1000']\n        lifecycle: {{preStop: {{sleep: {{seconds: {seconds}}}}}}}\n        \
         readinessProbe: {{tcpSocket: {{port: {PORT}}}, periodSeconds: 1}}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: {PORT}}}]}}\n"
    )
}

/// Starts so many pods, which greet with their names.
async fn deploy(bed: &Cases, name: &str, replicas: usize, seconds: u64) -> (Vec<Pod>, SocketAddr) {
    bed.apply(&manifests(name, replicas, seconds)).await;
    wait::until("the pods are made", SOON, || async {
        bed.cluster.pods_of("shop", "app", name).len() == replicas
    })
    .await;
    let pods = bed.cluster.pods_of("shop", "app", name);
    for pod in &pods {
        bed.listen(pod, pod.ip().into(), PORT, pod.name()).await;
    }
    bed.cluster.wait_ready("shop", name, SOON).await.expect("ready by their probes");
    for pod in &pods {
        bed.knows(0, "workloads", |it| {
            it["name"] == pod.name() && it["protocol"] == "HBONE" && it["status"] == "Healthy"
        })
        .await;
    }
    let vips = bed.cluster.service_ips("shop", name);
    let vip = vips.into_iter().find(IpAddr::is_ipv4).expect("a virtual address");
    (pods, SocketAddr::new(vip, 80))
}

/// Waits until the client's node proxy knows that one of the pods leaves; returns it.
async fn leaving<'a>(bed: &Cases, pods: &'a [Pod]) -> &'a Pod {
    let is_leaving = |pod: &&Pod| pod.view().terminating.is_some();
    wait::until("a pod leaves", SOON, || async { pods.iter().any(|pod| is_leaving(&pod)) }).await;
    let pod = pods.iter().find(is_leaving).unwrap();
    bed.knows(0, "workloads", |it| it["name"] == pod.name() && it["servingWhileTerminating"] == true).await;
    pod
}

/// Whether its containers still run.
fn runs(pod: &Pod) -> bool {
    let view = pod.view();
    !view.gone && view.phase() == "Running"
}

/// Case k, with one replica.
async fn last_pod(bed: &Cases) {
    let (pods, service) = deploy(bed, "last", 1, 8).await;
    bed.must_reach(&bed.cli, service, pods[0].name()).await;
    bed.apply(&manifests("last", 0, 8)).await;
    let pod = leaving(bed, &pods).await;
    let mut served = 0;
    while runs(pod) && served < CONNECTIONS {
        let answered = answer(&bed.cli, service).await;
        match answered {
            Ok(name) => assert_eq!(name, pod.name()),
            Err(error) => assert!(!runs(pod), "refused while the pod served: {error}"),
        }
        served += 1;
    }
    assert_eq!(served, CONNECTIONS, "the pod left too soon to see");
    pod.wait_for("its end", SOON, |view| view.gone).await.unwrap();
    bed.will_be_refused(&bed.cli, service).await;
}

/// Case k, beside a second pod that is ready.
async fn one_of_two(bed: &Cases) {
    let (pods, service) = deploy(bed, "pair", 2, 8).await;
    bed.apply(&manifests("pair", 1, 8)).await;
    let pod = leaving(bed, &pods).await;
    let other = pods.iter().find(|other| other.name() != pod.name()).unwrap();
    for n in 0..CONNECTIONS {
        let answered = answer(&bed.cli, service).await.expect("the other pod serves");
        assert_eq!(answered, other.name(), "connection {n}");
    }
    assert!(runs(pod), "the pod left too soon to see");
}
