//! Links that go down, and single connections that a network drops silently.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ambit_local::{Cluster, Pod};
use ambit_net::Netns;
use ambit_net::sockdiag::{Kind, list};
use ambit_node::nft::{
    self, Action, Chain, ChainKind, Compare, Hook, HookPoint, Match, Protocol, Rule, Table,
};
use ambit_tests::load::{Load, Shape};
use ambit_tests::usage::descriptors;
use ambit_tests::wait;

use crate::bed::{Bed, ECHO, HTTP, ping, until_ended};

/// Duration of a short cut: longer than the first retransmissions, shorter than any timeout of a connection.
const SHORT: Duration = Duration::from_secs(3);
/// How long it may take to connect again once the link is back.
const BACK: Duration = Duration::from_secs(5);
/// A PING every 10 s, 20 s to answer it, and some time for the driver.
const REAPED: Duration = Duration::from_secs(35);
/// The tunnel port.
const HBONE: u16 = 15008;
/// Counts failed connections.
const FAILED: &str = "istio_tcp_connections_failed_total";

/// Both proxies of a bed have as few descriptors as before, within what comes and goes by itself.
async fn descriptors_are_back(bed: &Bed, before: [usize; 2]) {
    for (node, before) in before.into_iter().enumerate() {
        let ztunnel = bed.cluster.ztunnel(node).unwrap();
        wait::until("the descriptors are back", wait::SOON, || async { descriptors(&ztunnel) <= before + 8 })
            .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_cut_of_a_node_fails_no_request() {
    let bed = Bed::start(true, &[0, 1]).await;
    let [near, far] = [0, 1].map(|server| SocketAddr::new(bed.servers[server].ip().into(), HTTP));
    let beside = Load::start(&bed.client, near, &Shape::default()).await.unwrap();
    // Few enough that what waits for the link is no crowd of its own.
    let few = Shape { new_per_second: 10, kept_per_second: 20, ..Shape::default() };
    let across = Load::start(&bed.client, far, &few).await.unwrap();
    across.more(30).await;
    let answered = beside.tally().new_answered;
    bed.cluster.set_link(1, false).await.unwrap();
    tokio::time::sleep(SHORT).await;
    let meanwhile = beside.tally().new_answered - answered;
    bed.cluster.set_link(1, true).await.unwrap();
    let back = Instant::now();
    wait::for_ok("a new connection across", wait::SOON, || async {
        let mut stream = bed.client.connect_within(far, wait::SOON).await?;
        ambit_tests::apps::get(&mut stream).await
    })
    .await;
    let took = back.elapsed();
    across.more(30).await;
    assert!(meanwhile > 60, "the node's own traffic stood still: {meanwhile} in {SHORT:?}");
    assert_eq!(across.finish().await.not_allowed(|_| false), Vec::<String>::new());
    assert!(took < BACK, "back after {took:?} only");
    let tally = beside.finish().await;
    bed.end(&tally, |_| false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn vanished_peers_are_detected_by_ping_and_freed() {
    let bed = Bed::start(true, &[1]).await;
    drop(bed.echo(bed.vip(ECHO)).await);
    let before = [0, 1].map(|node| descriptors(&bed.cluster.ztunnel(node).unwrap()));
    let mut kept = Vec::new();
    for _ in 0..40 {
        kept.push(bed.echo(bed.vip(ECHO)).await);
    }
    bed.cluster.set_link(1, false).await.unwrap();
    let cut = Instant::now();
    for stream in &mut kept {
        until_ended(stream, REAPED).await;
    }
    assert!(cut.elapsed() > Duration::from_secs(15), "given up after {:?} already", cut.elapsed());
    drop(kept);
    descriptors_are_back(&bed, before).await;
    let noticed = bed.count(0, "ambit_hbone_ping_timeouts_total", &[]).await;
    assert!(noticed > 0.0, "the client's proxy did not count it");
    wait::until("the server's proxy counts it", wait::SOON, || async {
        bed.count(1, "ambit_hbone_inbound_ping_timeouts_total", &[]).await > 0.0
    })
    .await;
    bed.cluster.set_link(1, true).await.unwrap();
    let back = Instant::now();
    drop(bed.echo(bed.vip(ECHO)).await);
    assert!(back.elapsed() < BACK, "back after {:?} only", back.elapsed());
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_proxy_away_beyond_the_budget_fails_in_time() {
    let budget = Duration::from_secs(3);
    let limits = serde_json::json!({
        "connectTimeout": "3s", "attemptTimeout": "1s", "handshakeTimeout": "1s",
    });
    let bed = Bed::on(Cluster::builder().nodes(2).ztunnel_config("limits", limits), true, &[1]).await;
    drop(bed.echo(bed.vip(ECHO)).await);
    let ztunnel = bed.cluster.ztunnel(1).unwrap();
    ztunnel.kill().await.unwrap();
    let failed = bed.count(0, FAILED, &[("reporter", "source")]).await;
    let asked = Instant::now();
    let mut stream = bed.client.connect_within(bed.vip(ECHO), wait::SOON).await.unwrap();
    ping(&mut stream, "anybody").await.expect_err("nobody is there");
    let failed_after = asked.elapsed();
    assert!(failed_after < budget + Duration::from_secs(2), "failed after {failed_after:?} only");
    assert!(bed.count(0, FAILED, &[("reporter", "source")]).await > failed, "it is counted");
    ztunnel.start().await.unwrap();
    ztunnel.wait_ready().await.unwrap();
    let back = Instant::now();
    drop(bed.echo(bed.vip(ECHO)).await);
    assert!(back.elapsed() < BACK, "found again after {:?} only", back.elapsed());
    bed.shutdown().await;
}

/// From now on the network drops what a pod sends on the tunnel connections that it has now.
async fn black_hole(pod: &Pod) -> usize {
    let inside = Netns::from_fd(pod.netns().unwrap()).unwrap();
    let sockets = list(&inside, Kind::TcpConnections).await.unwrap();
    let ports =
        sockets.iter().filter(|socket| socket.remote.port() == HBONE).map(|socket| socket.local.port());
    let drop_from = |port| {
        let matches = [Match::Protocol(Protocol::Tcp), Match::SourcePort(Compare::Is, port)];
        Rule::new(matches, Action::Drop, "a tunnel connection that the network lost")
    };
    let rules: Vec<Rule> = ports.map(drop_from).collect();
    let count = rules.len();
    let hook = Hook { kind: ChainKind::Filter, point: HookPoint::Postrouting, priority: 300 };
    let chain = Chain { name: "lost".to_owned(), hook: Some(hook), rules };
    nft::apply(&inside, Table { name: "black-hole".to_owned(), chains: vec![chain] }).await.unwrap();
    count
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_endpoint_behind_lost_tunnels_is_reached_soon() {
    let bed = Bed::start(true, &[1]).await;
    // As many as it takes for both workers to have a tunnel.
    for _ in 0..10 {
        drop(bed.echo(bed.vip(ECHO)).await);
    }
    let lost = black_hole(&bed.client).await;
    assert!(lost > 0, "there is no tunnel to lose");
    let mut slowest = Duration::ZERO;
    for _ in 0..10 {
        let asked = Instant::now();
        drop(bed.echo(bed.vip(ECHO)).await);
        slowest = slowest.max(asked.elapsed());
    }
    assert!(slowest > Duration::from_secs(1), "nothing was lost: {slowest:?}");
    assert!(slowest < BACK, "a connection waited for {slowest:?}");
    let silent = bed.count(0, "ambit_hbone_silent_total", &[]).await;
    assert_eq!(silent as usize, lost, "each lost one is left once");
    assert_eq!(bed.servers[0].ips(), [IpAddr::V4(bed.servers[0].ip())], "the endpoint was a lone one");
    bed.shutdown().await;
}
