//! Pods that enter and leave the mesh while they talk, and captured pods whose node has no proxy.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use ambit_local::{Cluster, DATAPLANE_MODE};
use tokio::io::AsyncWriteExt;

use crate::bed::{Bed, ECHO, HBONE, NAMESPACE, ping};
use crate::wire::{RetryingClient, SECRET};
use ambit_tests::wait;

/// How long proxies and agents may take to let go of pods that have left and whose last connection has ended.
const LEFT: Duration = Duration::from_secs(30);
/// Attempts while there is no proxy.
const TRIES: u64 = 50;

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_is_enrolled_under_load_within_a_second() {
    let bed = Bed::start(false, &[0, 1]).await;
    let load = bed.load().await;
    load.more(50).await;
    let began = Instant::now();
    bed.cluster.label_namespace(NAMESPACE, DATAPLANE_MODE, Some("ambient")).await.unwrap();
    for pod in bed.pods() {
        bed.cluster.wait_enrolled(pod).await.unwrap();
    }
    let enrolled = began.elapsed();
    wait::until("new connections are tunnelled", wait::SOON, || async { bed.tunnelled(0).await > 0.0 }).await;
    let tunnelled = began.elapsed();
    // Connections from before have ended by then, but for the kept ones.
    bed.all_known().await;
    load.more(50).await;
    let capture = bed.cluster.capture().await.unwrap();
    load.more(100).await;
    let mut seen = bed.seen(&capture.stop().await.unwrap());
    let kept = load.kept_addresses();
    seen.clear.retain(|own| !kept.contains(own));
    assert!(seen.clear.is_empty(), "new connections in the clear: {seen:?}");
    assert!(!seen.tunnels.is_empty(), "no tunnel was used: {seen:?}");
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
    assert!(enrolled < Duration::from_secs(1), "the pods were enrolled after {enrolled:?}");
    assert!(tunnelled < Duration::from_secs(1), "the first tunnel was there after {tunnelled:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_is_unenrolled_under_load_and_nothing_fails() {
    // Unused tunnels count as connections of a pod that leaves.
    let limits = serde_json::json!({ "poolIdle": "2s" });
    let bed = Bed::on(Cluster::builder().nodes(2).ztunnel_config("limits", limits), true, &[0, 1]).await;
    let load = bed.load().await;
    load.more(50).await;
    assert!(bed.tunnelled(0).await > 0.0);
    bed.cluster.label_namespace(NAMESPACE, DATAPLANE_MODE, None).await.unwrap();
    for pod in bed.pods() {
        bed.cluster.wait_unenrolled(pod).await.unwrap();
    }
    bed.all_known().await;
    load.more(50).await;
    let before = bed.tunnelled(0).await;
    let capture = bed.cluster.capture().await.unwrap();
    load.more(100).await;
    let seen = bed.seen(&capture.stop().await.unwrap());
    assert!(seen.clear.len() > 10, "new connections go past the mesh: {seen:?}");
    let since = bed.tunnelled(0).await - before;
    assert!(since == 0.0, "{since} new connections were tunnelled");
    // Longer than the proxies and the agent go on serving pods that have left: kept connections must not notice
    // the end of that either.
    load.more(1300).await;
    for node in 0..2 {
        assert!(
            bed.count(node, "ambit_pods_served", &[]).await > 0.0,
            "served for the kept connections' sake"
        );
    }
    let tally = load.finish().await;
    // With the last tunnelled connection the pods are let go, by their proxies and agents: nobody listens there.
    for node in 0..2 {
        wait::until("no pod is served", LEFT, async || {
            bed.count(node, "ambit_pods_served", &[]).await == 0.0
        })
        .await;
    }
    for server in &bed.servers {
        wait::until("its tunnels' port is closed", LEFT, async || {
            let outcome = bed.client.connect_within((server.ip(), HBONE).into(), wait::SOON).await;
            outcome.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
        })
        .await;
    }
    bed.end(&tally, |_| false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enrolled_pod_waits_for_a_node_proxy() {
    let bed = Bed::start(true, &[1]).await;
    let mut kept = bed.echo(bed.vip(ECHO)).await;
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().kill().await.unwrap();
    }
    let capture = bed.cluster.capture().await.unwrap();
    // The tunnel that carried it is gone, so the kernel may refuse.
    kept.write_all(SECRET.as_bytes()).await.ok();
    let (client, targets) = (bed.client.clone(), [bed.vip(ECHO), (bed.servers[0].ip(), ECHO).into()]);
    let mut waiting = tokio::task::JoinSet::new();
    for target in targets {
        let client = client.clone();
        waiting.spawn(async move {
            let mut stream = client.connect_within(target, wait::SOON).await?;
            ping(&mut stream, SECRET).await
        });
    }
    RetryingClient::start_unanswered(&bed).tries(TRIES).await;
    let captured = capture.stop().await.unwrap();
    let own = captured.packets.iter().filter(|p| p.tcp && p.source.ip() == bed.client.ip());
    assert_eq!(own.filter(|p| !p.payload.is_empty()).count(), 0, "a captured pod sent past its proxy");
    assert!(waiting.try_join_next().is_none(), "connections wait");
    let capture = bed.cluster.capture().await.unwrap();
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().start().await.unwrap();
    }
    while let Some(ended) = waiting.join_next().await {
        assert_eq!(ended.unwrap().expect("held, then served"), SECRET);
    }
    let captured = capture.stop().await.unwrap();
    assert_eq!(captured.dropped, 0);
    assert_eq!(captured.find(SECRET.as_bytes()), []);
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_labelled_without_a_node_proxy_waits_for_one() {
    let bed = Bed::start(false, &[1]).await;
    let target = bed.vip(ECHO);
    let mut plain = bed.echo(target).await;
    bed.cluster.ztunnel(0).unwrap().kill().await.unwrap();
    bed.cluster.label_namespace(NAMESPACE, DATAPLANE_MODE, Some("ambient")).await.unwrap();
    bed.client
        .wait_for("its rules", wait::SOON, |view| view.redirection.is_some())
        .await
        .expect("captured, though not served");
    bed.cluster.wait_enrolled(&bed.servers[0]).await.unwrap();
    assert!(!bed.client.is_enrolled(), "it is not served yet");
    let capture = bed.cluster.capture().await.unwrap();
    let client = bed.client.clone();
    let waiting = tokio::spawn(async move {
        let mut stream = client.connect_within(target, wait::SOON).await?;
        ping(&mut stream, SECRET).await
    });
    assert_eq!(ping(&mut plain, "older than the label").await.unwrap(), "older than the label");
    RetryingClient::start_unanswered(&bed).tries(TRIES).await;
    assert!(!waiting.is_finished(), "the connection waits");
    bed.cluster.ztunnel(0).unwrap().start().await.unwrap();
    assert_eq!(waiting.await.unwrap().expect("held, then served"), SECRET);
    let captured = capture.stop().await.unwrap();
    assert_eq!(captured.dropped, 0);
    assert_eq!(captured.find(SECRET.as_bytes()), []);
    assert!(!captured.find(b"older than the label").is_empty(), "the capture can see what is in the clear");
    bed.shutdown().await;
}
