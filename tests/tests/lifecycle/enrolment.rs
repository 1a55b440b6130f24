//! Pods that enter and leave the mesh while they talk, and captured pods whose node has no proxy.

use std::time::{Duration, Instant};

use ambit_local::DATAPLANE_MODE;
use tokio::io::AsyncWriteExt;

use crate::bed::{Bed, ECHO, NAMESPACE, ping};
use ambit_tests::wait;

/// How long a captured pod is watched while there is no proxy. The time is the subject: something that leaks
/// does so with the first packets.
const WATCHED: Duration = Duration::from_secs(2);
/// Text that must not be readable on the wire.
const SECRET: &str = "xyzzy-in-the-clear-xyzzy";

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_labelled_under_load_is_in_the_mesh_within_a_second_and_no_request_fails() {
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
async fn a_namespace_unlabelled_under_load_is_out_of_the_mesh_and_no_request_fails() {
    let bed = Bed::start(true, &[0, 1]).await;
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
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_node_proxy_a_captured_pod_sends_nothing_in_the_clear_and_waits_for_one() {
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
    tokio::time::sleep(WATCHED).await;
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
async fn a_pod_labelled_while_its_node_has_no_proxy_sends_nothing_in_the_clear_and_waits_for_one() {
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
    tokio::time::sleep(WATCHED).await;
    assert!(!waiting.is_finished(), "the connection waits");
    bed.cluster.ztunnel(0).unwrap().start().await.unwrap();
    assert_eq!(waiting.await.unwrap().expect("held, then served"), SECRET);
    let captured = capture.stop().await.unwrap();
    assert_eq!(captured.dropped, 0);
    assert_eq!(captured.find(SECRET.as_bytes()), []);
    assert!(!captured.find(b"older than the label").is_empty(), "the capture can see what is in the clear");
    bed.shutdown().await;
}
