//! Measures the server: many subscribers on loopback take a full table, then single changes.
//!
//! `cargo run --profile bench -p ambit-xds --example push -- [SUBSCRIBERS] [RESOURCES]`. Prints time and the
//! process's CPU time of both ends together; without TLS.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that fails says where")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ambit_api::ADDRESS_TYPE_URL;
use ambit_api::workload::{Address, Workload, address};
use ambit_xds::{Change, Resource, Server, ServerConfig, Table, TableConfig};
use bytes::Bytes;
use h2::client::SendRequest;
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;

const PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

fn workload(number: usize, node: &str) -> Resource {
    let name = format!("reviews-v{number}-5d4b8f7c9-{number:05}");
    let uid = format!("Kubernetes//v1/Pod/default/{name}");
    let ip = [10, (number >> 16) as u8, (number >> 8) as u8, number as u8];
    let workload = Workload {
        name,
        namespace: "default".into(),
        addresses: vec![Bytes::copy_from_slice(&ip)],
        tunnel_protocol: 1,
        service_account: "bookinfo-reviews".into(),
        node: node.into(),
        canonical_name: "reviews".into(),
        canonical_revision: "v1".into(),
        workload_name: "reviews-v1".into(),
        cluster_id: "Kubernetes".into(),
        uid: uid.clone(),
        services: [("default/reviews.default.svc.cluster.local".to_owned(), Default::default())].into(),
        ..Workload::default()
    };
    let message = Address { r#type: Some(address::Type::Workload(workload)) };
    Resource::new(uid, &message).alias(format!("/{}.{}.{}.{}", ip[0], ip[1], ip[2], ip[3]))
}

/// User and system time of this process so far.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit(')').next().unwrap();
    let ticks: u64 =
        after_name.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

fn resident_megabytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

async fn connect(addr: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(addr).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (client, connection) =
        h2::client::Builder::new().initial_window_size(1 << 20).handshake::<_, Bytes>(stream).await.unwrap();
    tokio::spawn(async move { connection.await.unwrap() });
    client
}

/// Subscribes and counts what arrives, frame by frame, without decoding it.
async fn subscribe(addr: SocketAddr, bytes: Arc<AtomicU64>) {
    let mut client = connect(addr).await;
    let request = http::Request::post(format!("http://a{PATH}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (response, mut requests) = client.send_request(request, false).unwrap();
    let ask = ambit_api::discovery::DeltaDiscoveryRequest {
        type_url: ADDRESS_TYPE_URL.into(),
        ..Default::default()
    };
    let mut frame = vec![0, 0, 0, 0, ask.encoded_len() as u8];
    frame.extend(ask.encode_to_vec());
    requests.send_data(frame.into(), false).unwrap();
    let mut body = response.await.unwrap().into_body();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
    }
}

async fn until(bytes: &AtomicU64, total: u64) {
    while bytes.load(Ordering::Relaxed) < total {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>().unwrap());
    let subscribers = arguments.next().unwrap_or(1000);
    let resources = arguments.next().unwrap_or(11_000);
    let (table, publisher) = Table::new(ADDRESS_TYPE_URL, TableConfig::default());
    tokio::spawn(publisher.run());
    table.apply((0..resources).map(|number| Change::Upsert(workload(number, "node-1"))).collect());
    let server = Server::new(vec![table.clone()], ServerConfig::default());
    let metrics = Arc::clone(server.metrics());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let incoming = TcpListenerStream::new(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming));

    let bytes = Arc::new(AtomicU64::new(0));
    subscribe_one(addr, &bytes, &metrics, resources).await;
    let per_subscriber = bytes.swap(0, Ordering::Relaxed);
    println!("one answer of {} KiB for {resources} resources", per_subscriber >> 10);

    let (start, before) = (Instant::now(), cpu());
    for _ in 0..subscribers {
        tokio::spawn(subscribe(addr, Arc::clone(&bytes)));
    }
    until(&bytes, per_subscriber * subscribers as u64).await;
    println!(
        "full push to {subscribers}: {:?}, {:?} of CPU, {} MB resident",
        start.elapsed(),
        cpu() - before,
        resident_megabytes()
    );

    let changes = 50;
    let (before, mut waits) = (cpu(), Vec::new());
    for change in 0..changes {
        tokio::time::sleep(Duration::from_millis(60)).await;
        let answers = metrics.answers.load(Ordering::Relaxed) + subscribers as u64;
        let (seen, start) = (bytes.load(Ordering::Relaxed), Instant::now());
        table.apply(vec![Change::Upsert(workload(7, &format!("node-{}", change + 2)))]);
        while metrics.answers.load(Ordering::Relaxed) < answers || bytes.load(Ordering::Relaxed) == seen {
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        waits.push(start.elapsed());
    }
    waits.sort();
    println!(
        "one change to {subscribers}: p50 {:?}, worst {:?}, {:?} of CPU a change",
        waits[waits.len() / 2],
        waits[waits.len() - 1],
        (cpu() - before) / changes
    );
}

/// One subscriber alone, until it has everything.
async fn subscribe_one(
    addr: SocketAddr,
    bytes: &Arc<AtomicU64>,
    metrics: &ambit_xds::ServerMetrics,
    resources: usize,
) {
    let task = tokio::spawn(subscribe(addr, Arc::clone(bytes)));
    let mut last = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = bytes.load(Ordering::Relaxed);
        if now == last && metrics.resources.load(Ordering::Relaxed) == resources as u64 {
            break;
        }
        last = now;
    }
    task.abort();
    while metrics.subscribers.load(Ordering::Relaxed) > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
