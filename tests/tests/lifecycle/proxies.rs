//! Node proxies that are killed, replaced, stopped and starved.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use ambit_local::{Cluster, PodOptions, Ztunnel};
use ambit_tests::access::AccessLog;
use ambit_tests::load::{Failure, Load, Shape};
use ambit_tests::wait;
use tokio::task::JoinSet;

use crate::bed::{Bed, ECHO, HTTP, NAMESPACE, ping, until_ended};

/// Drain time of the tests that wait for its end.
const DRAIN: Duration = Duration::from_secs(4);

/// Whether a failure is allowed when a proxy is killed. Only connections that were requested before its death may fail, because
/// the process may have accepted them, and only by being closed at once. Later connections must neither fail nor hang.
fn may_fail(failure: &Failure, died: Instant) -> bool {
    let closed = [ErrorKind::ConnectionReset, ErrorKind::UnexpectedEof, ErrorKind::BrokenPipe];
    failure.asked <= died && closed.contains(&failure.kind)
}

async fn kill_and_start_under_load(node: usize) {
    let bed = Bed::start(true, &[1]).await;
    let load = bed.load().await;
    load.more(50).await;
    let ztunnel = bed.cluster.ztunnel(node).unwrap();
    ztunnel.kill().await.unwrap();
    let died = Instant::now();
    ztunnel.start().await.unwrap();
    ztunnel.wait_ready().await.unwrap();
    load.more(200).await;
    let tally = load.finish().await;
    assert!(tally.kept_failed >= 10, "kept connections went through the process that was killed: {tally:?}");
    bed.end(&tally, |failure| may_fail(failure, died)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_client_proxy_refuses_no_new_connection() {
    kill_and_start_under_load(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_proxy_refuses_no_new_connection() {
    kill_and_start_under_load(1).await;
}

/// Tunnelled connections that a node proxy has taken, as the client's on node 0, as the server's on node 1.
async fn opened(ztunnel: &Ztunnel, node: usize) -> f64 {
    let reporter = if node == 0 { "source" } else { "destination" };
    let labels = [("reporter", reporter), ("connection_security_policy", "mutual_tls")];
    ztunnel.metrics().await.unwrap().sum("istio_tcp_connections_opened_total", &labels)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_proxy_takes_over_and_every_request_succeeds() {
    let builder = Cluster::builder().nodes(2).ztunnel_config("drainTimeout", "60s");
    let bed = Bed::on(builder, true, &[0, 1]).await;
    let load = bed.load().await;
    load.more(50).await;
    let mut drained = Vec::new();
    for node in 0..2 {
        let first = bed.cluster.ztunnel(node).unwrap();
        let second = bed.cluster.start_another_ztunnel(node).await.unwrap();
        load.more(50).await;
        first.terminate().await.unwrap();
        load.more(100).await;
        assert!(first.is_running(), "it serves the kept connections");
        let before = [opened(&first, node).await, opened(&second, node).await];
        load.more(100).await;
        let taken = [opened(&first, node).await - before[0], opened(&second, node).await - before[1]];
        assert_eq!(taken[0], 0.0, "the draining proxy takes nothing new: {taken:?}");
        // Every second one leads to the server of the client's own node.
        assert!(taken[1] >= 20.0, "the second proxy serves what is new: {taken:?}");
        drained.push(first);
    }
    load.more(100).await;
    let tally = load.finish().await;
    // The load's connections have ended with it, and the drained proxies end then.
    let ended = end_of_all(&drained).await;
    bed.end(&tally, |_| false).await;
    assert_eq!(ended, [Some(0), Some(0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_waits_for_the_servers_proxy_beyond_one_attempt() {
    let limits = serde_json::json!({ "attemptTimeout": "2s", "handshakeTimeout": "2s" });
    let bed = Bed::on(Cluster::builder().nodes(2).ztunnel_config("limits", limits), true, &[1]).await;
    drop(bed.echo(bed.vip(ECHO)).await);
    let ztunnel = bed.cluster.ztunnel(1).unwrap();
    ztunnel.kill().await.unwrap();
    let (client, target) = (bed.client.clone(), bed.vip(ECHO));
    let waiting = tokio::spawn(async move {
        let mut stream = client.connect_within(target, wait::SOON).await?;
        ping(&mut stream, "patience").await
    });
    let failed = async || bed.count(0, "ambit_hbone_connections_failed_total", &[]).await > 0.0;
    wait::until("one attempt has failed", wait::SOON, failed).await;
    assert!(!waiting.is_finished(), "it waits");
    ztunnel.start().await.unwrap();
    assert_eq!(waiting.await.unwrap().expect("held, then served"), "patience");
    bed.shutdown().await;
}

async fn end_of_all(ztunnels: &[Ztunnel]) -> Vec<Option<i32>> {
    let mut codes = Vec::new();
    for ztunnel in ztunnels {
        codes.push(ztunnel.wait_ended(wait::SOON).await.expect("it ends after its last connection"));
    }
    codes
}

async fn drain_to_the_end(node: usize) {
    let logs = tempfile::tempdir().unwrap();
    let log = AccessLog::of(logs.path(), node);
    let builder = Cluster::builder()
        .nodes(2)
        .ztunnel_config("drainTimeout", format!("{}s", DRAIN.as_secs()))
        .ztunnel_config_of(node, "accessLog", log.config());
    let bed = Bed::on(builder, true, &[1]).await;
    let mut kept = bed.echo(bed.vip(ECHO)).await;
    let mut idle = bed.echo(bed.vip(ECHO)).await;
    let new_only = Shape { kept_connections: 0, ..Shape::default() };
    let load = Load::start(&bed.client, bed.vip(HTTP), &new_only).await.unwrap();
    let first = bed.cluster.ztunnel(node).unwrap();
    bed.cluster.start_another_ztunnel(node).await.unwrap();
    first.terminate().await.unwrap();
    let began = Instant::now();
    let mut turns = tokio::time::interval(Duration::from_millis(20));
    while began.elapsed() < DRAIN * 3 / 4 {
        turns.tick().await;
        assert_eq!(ping(&mut kept, "draining").await.unwrap(), "draining");
    }
    until_ended(&mut kept, wait::SOON).await;
    let lasted = began.elapsed();
    until_ended(&mut idle, wait::SOON).await;
    assert_eq!(first.wait_ended(wait::SOON).await.unwrap(), Some(0));
    // They were cut on purpose, not with the process.
    let direction = ["outbound", "inbound"][node];
    let cut = |line: &&serde_json::Value| {
        let error = line["error"].as_str().unwrap_or_default();
        line["direction"] == direction && error.contains("drain time is over")
    };
    assert_eq!(log.lines().iter().filter(cut).count(), 2, "{:?}", log.lines());
    load.more(50).await;
    let tally = load.finish().await;
    assert_eq!(tally.not_allowed(|_| false), Vec::<String>::new());
    assert!(lasted >= DRAIN - Duration::from_millis(200), "cut after {lasted:?}");
    assert!(lasted < DRAIN + Duration::from_secs(3), "cut after {lasted:?} only");
    bed.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_proxys_drain_cuts_connections_only_at_its_end() {
    drain_to_the_end(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_proxys_drain_cuts_connections_only_at_its_end() {
    drain_to_the_end(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_without_descriptors_keeps_serving_and_recovers() {
    let bed = Bed::start(true, &[1]).await;
    let other = PodOptions::new(NAMESPACE, "other").node(1).service_account("client");
    let other = bed.cluster.pod(other).await.unwrap();
    // Those that must not notice: kept connections through the starved proxy, and new ones through the other.
    let kept = Shape { new_per_second: 0, ..Shape::default() };
    let kept = Load::start(&bed.client, bed.vip(HTTP), &kept).await.unwrap();
    let beside = Load::start(&other, bed.vip(HTTP), &Shape::default()).await.unwrap();
    let ztunnel = bed.cluster.ztunnel(0).unwrap();
    let pid = ztunnel.pid().unwrap();
    let used = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    limit_files(pid, used as u64 + 8);
    let mut crowd = Vec::new();
    for _ in 0..40 {
        crowd.push(bed.client.connect_within(bed.vip(ECHO), wait::SOON).await.expect("held in the queue"));
    }
    kept.more(100).await;
    beside.more(100).await;
    assert!(ztunnel.is_running());
    limit_files(pid, 4096);
    let mut waiting = JoinSet::new();
    for mut stream in crowd {
        waiting.spawn(async move { ping(&mut stream, "late").await });
    }
    let mut served = 0;
    while let Some(answer) = waiting.join_next().await {
        // What was accepted without a descriptor left for its way on is closed; nothing may hang.
        match answer.unwrap() {
            Ok(_) => served += 1,
            Err(error) => assert_ne!(error.kind(), ErrorKind::TimedOut, "neither answered nor closed"),
        }
    }
    assert!(served > 0, "those that were never accepted are served now");
    let shortages = bed.count(0, "ambit_accept_shortages_total", &[]).await;
    assert!(shortages > 0.0, "the limit was never met");
    for _ in 0..20 {
        drop(bed.echo(bed.vip(ECHO)).await);
    }
    assert_eq!(kept.finish().await.not_allowed(|_| false), Vec::<String>::new());
    let tally = beside.finish().await;
    bed.end(&tally, |_| false).await;
}

/// Sets the soft limit of open files of a process.
fn limit_files(pid: u32, soft: u64) {
    let done = std::process::Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--nofile={soft}:")])
        .status()
        .expect("prlimit (util-linux)");
    assert!(done.success());
}
