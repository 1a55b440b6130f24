//! How many connections one client outside the mesh may have.

use std::net::SocketAddr;

use ambit_local::{Pod, PodOptions};
use ambit_tests::beds::Trials;
use ambit_tests::http::Client;
use ambit_tests::wait::{self, SOON};

use crate::bed::Gateways;

/// Connections of one address.
pub(crate) const OPEN: usize = 40;
/// Those of them that have not begun.
pub(crate) const PENDING: usize = 16;

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("a client with too many connections stops no other", async |bed| crowded(bed).await);
}

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: a.example\r\n\r\n";

/// A connection with one answered request; nothing if the gateway closes it.
async fn connected(from: &Pod, to: SocketAddr) -> Option<Client> {
    let mut client = Client::connect(from, to).await.ok()?;
    let answer = client.send(REQUEST).await.ok()?;
    assert_eq!(answer.status, 200);
    Some(client)
}

async fn crowded(bed: &Gateways) {
    bed.service("crowd").await;
    bed.route("crowd", "[{name: crowd-gw}]", "[]").await;
    let to = bed.annotated("crowd-gw", "{}").await;
    bed.eventually(to, "a.example", |answer| answer.status == 200).await;
    let other = bed.cluster.pod(PodOptions::new("outside", "crowd-other").node(0)).await.unwrap();
    let series = |limit: &str| format!("ambit_gateway_connections_refused_total{{limit=\"{limit}\"}} ");
    // Connections that say nothing.
    let mut silent = Vec::new();
    for _ in 0..PENDING {
        silent.push(Client::connect(&bed.outside, to).await.unwrap());
    }
    wait::until("all are counted", SOON, || async {
        bed.metric("crowd-gw", "ambit_gateway_connections{state=\"pending\"} ").await >= PENDING as u64
    })
    .await;
    assert!(connected(&bed.outside, to).await.is_none());
    assert!(connected(&other, to).await.is_some());
    assert!(bed.metric("crowd-gw", &series("pending_address")).await >= 1);
    // They begin, and others may wait in their place.
    for client in &mut silent {
        assert_eq!(client.send(REQUEST).await.unwrap().status, 200);
    }
    let mut open = silent;
    while open.len() < OPEN {
        open.push(connected(&bed.outside, to).await.expect("fewer than the limit"));
    }
    assert!(connected(&bed.outside, to).await.is_none());
    assert!(connected(&other, to).await.is_some());
    assert!(bed.metric("crowd-gw", &series("address")).await >= 1);
    // Those that are open stay, and one that ends makes room.
    assert_eq!(open.last_mut().unwrap().send(REQUEST).await.unwrap().status, 200);
    drop(open.pop());
    wait::until("there is room again", SOON, || async { connected(&bed.outside, to).await.is_some() }).await;
}
