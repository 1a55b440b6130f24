//! The TLS port: who holds up whom, and how long a connection lives.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};

use crate::world::{DEADLINE, World};
use crate::{ask, start, start_with, subscribe};

/// A socket that says nothing, from an address of the loopback network.
async fn silent(world: &World, from: Ipv4Addr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((from, 0))).unwrap();
    socket.connect(world.address).await.unwrap()
}

async fn until_metric(world: &World, name: &str, holds: impl Fn(f64) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds(world.metric(name)) {
        assert!(Instant::now() < deadline, "{name} is {}", world.metric(name));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A signing request is answered long before a silent socket's time is over.
async fn assert_prompt(world: &World) {
    let asked = tokio::time::timeout(Duration::from_secs(1), ask(world.node_proxy("node-a"), "reviews"));
    asked.await.expect("a proxy is held up").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_sockets_of_one_address_hold_up_nobody() {
    let world = start();
    let mut sockets = Vec::new();
    for _ in 0..1500 {
        sockets.push(silent(&world, Ipv4Addr::LOCALHOST).await);
    }
    assert_prompt(&world).await;
    until_metric(&world, "ambit_control_tls_evicted_total", |evicted| evicted >= 1400.0).await;
    until_metric(&world, "ambit_control_tls_silent_total", |silent| silent > 0.0).await;
    until_metric(&world, "ambit_control_tls_failures_total", |failures| failures > 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_sockets_of_many_addresses_hold_up_nobody() {
    let world = start();
    let mut sockets = Vec::new();
    for number in 0..1500_u16 {
        let [high, low] = number.to_be_bytes();
        sockets.push(silent(&world, Ipv4Addr::new(127, 1, high, low | 1)).await);
    }
    assert_prompt(&world).await;
    let mut first = sockets.swap_remove(0);
    let ended = tokio::time::timeout(DEADLINE, first.read_u8()).await;
    assert!(ended.expect("a silent socket is closed").is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_at_its_age_and_the_subscriber_comes_back() {
    let world = start_with(&["--max-connection-age", "1s"]);
    let (_client, held) = subscribe(world.node_proxy("node-a"));
    held.until("the first state", |held| held.service().is_some()).await;
    until_metric(&world, "ambit_control_connections_aged_total", |aged| aged >= 2.0).await;
    until_metric(&world, "ambit_control_xds_subscribers", |streams| streams == 1.0).await;
    until_metric(&world, "ambit_control_connections_total", |connections| connections >= 3.0).await;
    world.replace("service.yaml", &crate::service(9090));
    held.until("a change after it", |held| held.port() == Some(9090)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_pod_has_a_bounded_number_of_streams() {
    let world = start();
    let mut clients = Vec::new();
    for _ in 0..12 {
        clients.push(subscribe(world.node_proxy("node-a")));
    }
    until_metric(&world, "ambit_control_xds_unauthenticated_total", |refused| refused >= 4.0).await;
    until_metric(&world, "ambit_control_xds_subscribers", |streams| streams == 8.0).await;
    let (_client, held) = subscribe(world.node_proxy("node-b"));
    held.until("another pod is served", |held| held.service().is_some()).await;
    clients.truncate(2);
    until_metric(&world, "ambit_control_xds_subscribers", |streams| streams <= 9.0).await;
    let (_client, held) = subscribe(world.node_proxy("node-a"));
    held.until("a place that was given back", |held| held.service().is_some()).await;
}

/// A descriptor per connection: the usual soft limit of 1024 would end service at a thousand proxies.
#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_open_files_is_raised() {
    let world = World::start_limited(&[], &[], "256:4096");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", world.pid())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[3..5], ["4096", "4096"], "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded_in_total() {
    let world = start_with(&["--max-connections", "16"]);
    let mut sockets = Vec::new();
    for number in 0..40_u8 {
        sockets.push(silent(&world, Ipv4Addr::new(127, 2, 0, number + 1)).await);
    }
    until_metric(&world, "ambit_control_connections_refused_total", |refused| refused >= 24.0).await;
    assert!(world.metric("ambit_control_open_connections") <= 16.0);
    // Silent sockets are closed after a while, and proxies are served again.
    until_metric(&world, "ambit_control_open_connections", |open| open == 0.0).await;
    assert_prompt(&world).await;
}

/// A request that never ends must not hold its connection for as long as that may live.
#[tokio::test(flavor = "multi_thread")]
async fn an_unfinished_request_fails_after_a_while() {
    let world = start();
    let (mut client, connection) = h2::client::handshake(world.dial().await).await.unwrap();
    let connection = tokio::spawn(connection);
    let token = world.signer.token("ambit-system", "ztunnel", "node-a");
    let mut unfinished = Vec::new();
    for path in [
        "/istio.v1.auth.IstioCertificateService/CreateCertificate",
        "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
    ] {
        let request = http::Request::post(format!("https://localhost{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("authorization", format!("Bearer {token}"))
            .header("clusterid", "Kubernetes");
        unfinished.push(client.send_request(request.body(()).unwrap(), false).unwrap());
    }
    until_metric(&world, "ambit_control_requests_unfinished_total", |count| count >= 2.0).await;
    drop(unfinished);
    assert_prompt(&world).await;
    connection.abort();
}
