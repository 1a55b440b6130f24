//! Endpoints that die while they are connected to, and whole rollouts.

use std::time::Duration;

use ambit_local::Cluster;
use ambit_tests::load::{Load, Shape};
use ambit_tests::wait;
use serde_json::json;

use crate::bed::{Bed, ECHO, HTTP, NAMESPACE};

/// Connections that are tried: so many never all choose the sound one of two endpoints.
const TRIES: usize = 20;

/// Short waits of single attempts, so that tests need not wait long for endpoints that keep silent.
fn quick() -> serde_json::Value {
    json!({ "attemptTimeout": "700ms", "handshakeTimeout": "700ms" })
}

/// Every connection to the service is answered, by the second endpoint where the first was chosen.
async fn all_answered(bed: &Bed) {
    let before = bed.count(0, "ambit_connect_retries_total", &[]).await;
    let mut tries = tokio::task::JoinSet::new();
    for _ in 0..TRIES {
        let (client, target) = (bed.client.clone(), bed.vip(ECHO));
        tries.spawn(async move {
            let mut stream = client.connect_within(target, wait::SOON).await?;
            crate::bed::ping(&mut stream, "anybody").await
        });
    }
    while let Some(answer) = tries.join_next().await {
        if let Err(error) = answer.unwrap() {
            bed.print_logs();
            panic!("not led to the other endpoint: {error}");
        }
    }
    let retries = bed.count(0, "ambit_connect_retries_total", &[]).await - before;
    assert!(retries > 0.0, "the dead endpoint was never tried");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_whose_application_refuses_is_replaced() {
    let mut bed = Bed::start(true, &[1]).await;
    let deaf = bed.server("deaf", 1).await;
    bed.servers.push(deaf);
    bed.all_known().await;
    all_answered(&bed).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_refuses_on_the_clients_node_is_replaced() {
    let mut bed = Bed::start(true, &[1]).await;
    let deaf = bed.server("deaf", 0).await;
    bed.servers.push(deaf);
    bed.all_known().await;
    all_answered(&bed).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_whose_node_is_cut_off_is_replaced() {
    let builder = Cluster::builder().nodes(3).ztunnel_config("limits", quick());
    let bed = Bed::on(builder, true, &[1, 2]).await;
    bed.cluster.set_link(2, false).await.unwrap();
    all_answered(&bed).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_cut_off_behind_open_tunnels_is_replaced() {
    let builder = Cluster::builder().nodes(3).ztunnel_config("limits", quick());
    let bed = Bed::on(builder, true, &[1, 2]).await;
    // Tunnels to both, which stay in the pool.
    let load = bed.load().await;
    load.more(20).await;
    load.finish().await.assert_all_answered();
    bed.cluster.set_link(2, false).await.unwrap();
    all_answered(&bed).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_whose_proxy_is_paused_is_replaced() {
    let builder = Cluster::builder().nodes(3).ztunnel_config("limits", quick());
    let bed = Bed::on(builder, true, &[1, 2]).await;
    let ztunnel = bed.cluster.ztunnel(2).unwrap();
    ztunnel.pause().await.unwrap();
    all_answered(&bed).await;
    ztunnel.resume().await.unwrap();
    bed.shutdown().await;
}

fn deployment(generation: u32) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: rolled, namespace: {NAMESPACE}}}
spec: {{selector: {{app: rolled}}, ports: [{{name: http, port: 80, targetPort: 9080}}]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: rolled, namespace: {NAMESPACE}}}
spec:
  replicas: 3
  selector: {{matchLabels: {{app: rolled}}}}
  template:
    metadata: {{labels: {{app: rolled}}}}
    spec:
      serviceAccountName: rolled
      containers:
        - name: productpage
          image: bookinfo
          args: [productpage]
          env: [{{name: GENERATION, value: \"{generation}\"}}]
          ports: [{{containerPort: 9080}}]
          readinessProbe: {{httpGet: {{path: /health, port: 9080}}, periodSeconds: 1}}
          lifecycle: {{preStop: {{sleep: {{seconds: 1}}}}}}
"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_is_answered_during_a_rollout() {
    let bed = Bed::start(true, &[]).await;
    bed.cluster.apply(&deployment(1)).await.unwrap();
    let limit = Duration::from_secs(30);
    bed.cluster.wait_ready(NAMESPACE, "rolled", limit).await.unwrap();
    let first: Vec<String> = pods_of(&bed);
    let target = (bed.cluster.service_ips(NAMESPACE, "rolled")[0], 80).into();
    wait::for_ok("the service answers", wait::SOON, || async {
        let mut stream = bed.client.connect_within(target, wait::SOON).await?;
        ambit_tests::apps::get(&mut stream).await
    })
    .await;
    let shape = Shape { reopen: true, ..Shape::default() };
    let load = Load::start(&bed.client, target, &shape).await.unwrap();
    load.more(100).await;
    bed.cluster.apply(&deployment(2)).await.unwrap();
    bed.cluster.wait_ready(NAMESPACE, "rolled", limit).await.unwrap();
    wait::until("the first generation is gone", limit, || async {
        let now = pods_of(&bed);
        now.len() == 3 && first.iter().all(|name| !now.contains(name))
    })
    .await;
    load.more(100).await;
    let tally = load.finish().await;
    // Kept connections end with the pod that they led to, and with nothing else: three pods may end one after another.
    let kept = u64::from(shape.kept_connections);
    assert!((kept..=3 * kept).contains(&tally.kept_reopened), "{tally:?}");
    bed.end(&tally, |_| false).await;
}

fn pods_of(bed: &Bed) -> Vec<String> {
    bed.cluster.pods_of(NAMESPACE, "app", "rolled").iter().map(|pod| pod.name().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tunnels_go_with_the_pod_that_they_were_made_for() {
    let bed = Bed::start(true, &[1]).await;
    let leaving = bed.cluster.pod(ambit_local::PodOptions::new(NAMESPACE, "leaving").node(0)).await.unwrap();
    for pod in [&bed.client, &leaving] {
        let mut stream = pod.connect_within(bed.vip(HTTP), wait::SOON).await.unwrap();
        ambit_tests::apps::get(&mut stream).await.unwrap();
    }
    assert_eq!(bed.count(0, "ambit_hbone_evicted_total", &[]).await, 0.0);
    bed.cluster.delete_pod(&leaving).await.unwrap();
    // The proxy serves what has left for ten seconds more; an unused tunnel would stay for two minutes.
    wait::until("the tunnel of the pod that left is closed", Duration::from_secs(20), || async {
        bed.count(0, "ambit_hbone_evicted_total", &[]).await > 0.0
    })
    .await;
    let made = bed.count(0, "ambit_hbone_connections_total", &[]).await;
    drop(bed.echo(bed.vip(ECHO)).await);
    assert_eq!(bed.count(0, "ambit_hbone_connections_total", &[]).await, made, "the others keep theirs");
    bed.shutdown().await;
}
