//! What the mesh adds to a request at 200 requests a second.

use std::net::SocketAddr;
use std::time::Duration;

use ambit_local::PodOptions;
use ambit_tests::apps::{self, App};
use ambit_tests::load::{Load, Shape};

use crate::bed::{Bed, HTTP};

/// What the mesh may add to the median: twice the goal, for machines that do something else beside. An unoptimised
/// build is only kept from waiting for something, such as a timer of the kernel's.
const MOST_ADDED: Duration = Duration::from_millis(if cfg!(debug_assertions) { 10 } else { 1 });
/// Requests of each kind in a round.
const REQUESTS: u64 = 200;
/// Rounds; the best one counts, as what disturbs a round is not the mesh's.
const ROUNDS: usize = 3;

#[tokio::test(flavor = "multi_thread")]
async fn the_mesh_adds_little_to_the_median_request() {
    let bed = Bed::start(true, &[1]).await;
    let pod = async |name, node| bed.cluster.pod(PodOptions::new("outside", name).node(node)).await.unwrap();
    let (client, server) = (pod("client", 0).await, pod("server", 1).await);
    let plain = SocketAddr::new(server.ip().into(), HTTP);
    let _server = apps::run(&server, plain, App::Http("plain".to_owned())).await.unwrap();
    let shape = Shape::default();
    let mut added = Vec::new();
    for _ in 0..ROUNDS {
        // Both at once: what else the machine does concerns both alike.
        let meshed = bed.load().await;
        let without = Load::start(&client, plain, &shape).await.unwrap();
        meshed.more(REQUESTS).await;
        let (meshed, without) = (meshed.finish().await, without.finish().await);
        meshed.assert_all_answered();
        without.assert_all_answered();
        let (meshed, without) = (meshed.medians, without.medians);
        let worst = meshed.new.saturating_sub(without.new).max(meshed.kept.saturating_sub(without.kept));
        eprintln!("with the mesh {meshed:?}, without {without:?}");
        added.push(worst);
    }
    assert!(added.iter().any(|added| *added <= MOST_ADDED), "the mesh added {added:?} to the median");
    bed.shutdown().await;
}
