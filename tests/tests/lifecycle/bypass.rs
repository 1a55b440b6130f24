//! No bypass: whatever part is missing, the wire carries only tunnels of an enrolled pod while its client keeps trying. When the
//! part is back, the client is answered again.

use ambit_local::{Cluster, DATAPLANE_MODE};
use ambit_tests::wait;

use crate::bed::{Bed, ECHO, NAMESPACE, ping};
use crate::wire::{RetryingClient, SECRET, Wire};

/// Attempts during an outage: a second of them. Where a proxy gives up after a time, tests make that a second, so
/// that what it does then is watched too.
const TRIES: u64 = 50;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_in_the_clear_after_node_proxies_stopped() {
    let builder = Cluster::builder().nodes(2).ztunnel_config("drainTimeout", "1s");
    let bed = Bed::on(builder, true, &[1]).await;
    let client = RetryingClient::start(&bed).await;
    let wire = Wire::tap(&bed).await;
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().terminate().await.unwrap();
    }
    client.tries(TRIES).await;
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().wait_ended(wait::SOON).await.unwrap();
    }
    let answered = client.answered();
    client.tries(TRIES).await;
    assert_eq!(client.answered(), answered, "answered without a proxy");
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().start().await.unwrap();
    }
    client.answered_again().await;
    wire.assert_nothing_in_the_clear(&bed, &[]).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_in_the_clear_while_node_proxies_die() {
    let bed = Bed::start(true, &[1]).await;
    let client = RetryingClient::start(&bed).await;
    let wire = Wire::tap(&bed).await;
    for round in 0..8_usize {
        let ztunnel = bed.cluster.ztunnel(round % 2).unwrap();
        ztunnel.kill().await.unwrap();
        client.tries(10).await;
        ztunnel.start().await.unwrap();
        // Killed at any moment of its start too.
        client.tries(2 * (round as u64 % 4)).await;
    }
    client.answered_again().await;
    wire.assert_nothing_in_the_clear(&bed, &[]).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_in_the_clear_while_node_proxies_stand_still() {
    let bed = Bed::start(true, &[1]).await;
    let client = RetryingClient::start(&bed).await;
    let wire = Wire::tap(&bed).await;
    for node in 0..2 {
        let ztunnel = bed.cluster.ztunnel(node).unwrap();
        ztunnel.pause().await.unwrap();
        let at_most = client.under_way() + client.answered();
        client.tries(TRIES).await;
        assert!(client.answered() <= at_most, "answered past a proxy that stands still");
        ztunnel.resume().await.unwrap();
        client.answered_again().await;
    }
    wire.assert_nothing_in_the_clear(&bed, &[]).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_in_the_clear_without_certificates() {
    let limits = serde_json::json!({ "connectTimeout": "1s" });
    let directory = tempfile::tempdir().unwrap();
    let settings = directory.path().join("control.yaml");
    let trust =
        |account: &str| std::fs::write(&settings, format!("trustedNodeProxies: [{account}]\n")).unwrap();
    trust("ambit-system/ztunnel");
    let builder = Cluster::builder()
        .nodes(2)
        .control_arg(format!("--config={}", settings.display()))
        .control_arg("--max-certificate-lifetime=10s")
        .ztunnel_config("limits", limits);
    let bed = Bed::on(builder, true, &[1]).await;
    let wire = Wire::tap(&bed).await;
    let client = RetryingClient::start(&bed).await;
    // The proxies keep what they know, but no certificate is renewed.
    trust("ambit-system/nobody");
    bed.cluster.control().unwrap().kill().await.unwrap();
    bed.cluster.control().unwrap().start().await.unwrap();
    let is_unanswered = async || {
        let answered = client.answered();
        client.tries(TRIES).await;
        client.answered() == answered
    };
    wait::until("certificates have expired", 3 * wait::SOON, is_unanswered).await;
    let answered = client.answered();
    client.tries(2 * TRIES).await;
    assert_eq!(client.answered(), answered, "answered without a certificate");
    let refused = bed.count(0, "ambit_certificates_failed_total", &[]).await;
    assert!(refused > 0.0, "the authority refused nothing");
    wire.assert_nothing_in_the_clear(&bed, &[]).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_in_the_clear_with_proxies_without_control_plane() {
    let limits = serde_json::json!({ "directoryWait": "1s" });
    let bed = Bed::on(Cluster::builder().nodes(2).ztunnel_config("limits", limits), true, &[1]).await;
    let client = RetryingClient::start(&bed).await;
    let wire = Wire::tap(&bed).await;
    bed.cluster.control().unwrap().kill().await.unwrap();
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().kill().await.unwrap();
    }
    let answered = client.answered();
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().start().await.unwrap();
    }
    let ztunnel = bed.cluster.ztunnel(0).unwrap();
    wait::until("its proxy serves the client", wait::SOON, async || {
        ztunnel.metrics().await.is_ok_and(|metrics| metrics.sum("ambit_pods_served", &[]) > 0.0)
    })
    .await;
    client.tries(2 * TRIES).await;
    assert_eq!(client.answered(), answered, "answered without certificate and directory");
    bed.cluster.control().unwrap().start().await.unwrap();
    client.answered_again().await;
    wire.assert_nothing_in_the_clear(&bed, &[]).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_in_the_clear_without_agents_and_without_proxies() {
    let bed = Bed::start(true, &[1]).await;
    let client = RetryingClient::start(&bed).await;
    let wire = Wire::tap(&bed).await;
    for node in 0..2 {
        bed.cluster.stop_agent(node).await.unwrap();
    }
    client.answered_again().await;
    // From here on a node is as after a reboot: namespaces and rules are there, no process is.
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().kill().await.unwrap();
    }
    let answered = client.answered();
    client.tries(TRIES).await;
    // A proxy without an agent serves no pods.
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().start().await.unwrap();
    }
    client.tries(TRIES).await;
    assert_eq!(client.answered(), answered, "answered without agent and proxy");
    for node in 0..2 {
        bed.cluster.start_agent(node).await.unwrap();
    }
    client.answered_again().await;
    wire.assert_nothing_in_the_clear(&bed, &[]).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_in_the_clear_when_a_rebooted_node_comes_back() {
    let bed = Bed::start(true, &[1]).await;
    let client = RetryingClient::start(&bed).await;
    let wire = Wire::tap(&bed).await;
    for node in 0..2 {
        bed.cluster.ztunnel(node).unwrap().kill().await.unwrap();
        bed.cluster.stop_agent(node).await.unwrap();
        let at_most = client.under_way() + client.answered();
        client.tries(TRIES).await;
        assert!(client.answered() <= at_most, "answered without agent and proxy");
        bed.cluster.start_agent(node).await.unwrap();
        assert!(bed.pods().all(ambit_local::Pod::is_enrolled), "nobody was called out of the mesh");
        let answered = client.answered();
        client.tries(TRIES).await;
        assert_eq!(client.answered(), answered, "answered without proxy");
        bed.cluster.ztunnel(node).unwrap().start().await.unwrap();
        client.answered_again().await;
    }
    wire.assert_nothing_in_the_clear(&bed, &[]).await;
    bed.shutdown().await;
}

/// A pod whose program says the secret to the first server, from its first moment on.
fn talkative(bed: &Bed) -> String {
    let (server, length) = (bed.servers[0].ip(), SECRET.len());
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: talkative, namespace: {NAMESPACE}}}
spec:
  nodeName: node-1
  serviceAccountName: talkative
  terminationGracePeriodSeconds: 0
  containers:
    - name: main
      image: any
      command:
        - bash
        - -c
        - \"while :; do (exec 3<>/dev/tcp/{server}/{ECHO} && printf {SECRET} >&3 && head -c {length} <&3); done\"
"
    )
}

async fn is_silent_until_served(bed: Bed, serve: impl AsyncFnOnce(&Cluster)) {
    let wire = Wire::tap(&bed).await;
    bed.cluster.apply(&talkative(&bed)).await.unwrap();
    let pod = bed.cluster.find_pod(NAMESPACE, "talkative").expect("it was made");
    // Another client of the node is the clock.
    let client = RetryingClient::start_unanswered(&bed);
    client.tries(TRIES).await;
    assert!(!pod.is_enrolled() && !pod.is_ready(), "it waits for its agent and proxy: {:?}", pod.view());
    assert!(pod.process(0).is_none(), "its program does not run yet");
    serve(&bed.cluster).await;
    bed.cluster.wait_enrolled(&pod).await.unwrap();
    let tunnelled = [
        ("reporter", "source"),
        ("source_workload", "talkative"),
        ("connection_security_policy", "mutual_tls"),
    ];
    wait::until("it talks in tunnels", wait::SOON, async || {
        bed.count(0, "istio_tcp_connections_opened_total", &tunnelled).await > 10.0
    })
    .await;
    wire.assert_nothing_in_the_clear(&bed, &[pod]).await;
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_made_without_an_agent_waits_until_it_is_served() {
    let bed = Bed::start(true, &[1]).await;
    bed.cluster.stop_agent(0).await.unwrap();
    is_silent_until_served(bed, async |cluster| cluster.start_agent(0).await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_made_without_a_proxy_waits_until_it_is_served() {
    let bed = Bed::start(true, &[1]).await;
    bed.cluster.ztunnel(0).unwrap().kill().await.unwrap();
    is_silent_until_served(bed, async |cluster| cluster.ztunnel(0).unwrap().start().await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_labelled_without_an_agent_is_enrolled_when_it_is_back() {
    let bed = Bed::start(false, &[1]).await;
    bed.cluster.stop_agent(0).await.unwrap();
    bed.cluster.label_namespace(NAMESPACE, DATAPLANE_MODE, Some("ambient")).await.unwrap();
    bed.cluster.wait_enrolled(&bed.servers[0]).await.unwrap();
    let mut plain = bed.echo(bed.vip(ECHO)).await;
    assert!(bed.client.is_wanted_in_mesh() && bed.client.view().redirection.is_none(), "nobody calls it in");
    bed.cluster.start_agent(0).await.unwrap();
    bed.cluster.wait_enrolled(&bed.client).await.unwrap();
    assert_eq!(ping(&mut plain, "older").await.unwrap(), "older");
    drop(plain);
    bed.all_known().await;
    let wire = Wire::tap(&bed).await;
    let client = RetryingClient::start(&bed).await;
    client.tries(TRIES).await;
    wire.assert_nothing_in_the_clear(&bed, &[]).await;
    bed.shutdown().await;
}
