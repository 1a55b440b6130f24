//! Peers that stop in the middle of a handshake.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_identity::unnamed_server;
use ambit_local::{Cluster, PodOptions};
use ambit_tests::credentials::Credentials;
use ambit_tests::usage::descriptors;
use ambit_tests::wait;
use rustls::ClientConnection;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::bed::{Bed, NAMESPACE};

/// The tunnel port.
const HBONE: u16 = 15008;
/// How many stop at once.
const STOPPED: usize = 100;
/// The default limit of a handshake is 5 s; this leaves time to notice.
const ENDED: Duration = Duration::from_secs(10);

/// Says hello as a mesh peer does, and reads nothing of the answer, for which its buffer is too small.
async fn stop_after_hello(
    from: &ambit_local::Pod,
    to: SocketAddr,
    tls: &Arc<rustls::ClientConfig>,
) -> TcpStream {
    let mut stream = from.connect_within(to, wait::SOON).await.unwrap();
    SockRef::from(&stream).set_recv_buffer_size(1).unwrap();
    let mut session = ClientConnection::new(Arc::clone(tls), unnamed_server()).unwrap();
    let mut hello = Vec::new();
    session.write_tls(&mut hello).unwrap();
    stream.write_all(&hello).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_that_stall_in_the_handshake_are_closed_and_counted() {
    let directory = tempfile::tempdir().unwrap();
    let bed = Bed::on(Cluster::builder().nodes(2), true, &[1]).await;
    bed.cluster.namespace("street", false).await.unwrap();
    let stranger = bed.cluster.pod(PodOptions::new("street", "stranger").node(0)).await.unwrap();
    let credentials = Credentials::of(&bed.cluster, &directory.path().join("crl.pem")).await;
    let id = format!("spiffe://cluster.local/ns/{NAMESPACE}/sa/client");
    let tls = credentials.certificate(&id).client_tls().dangerous_expecting_anyone();
    let load = bed.load().await;
    load.more(20).await;
    let ztunnel = bed.cluster.ztunnel(1).unwrap();
    let before = descriptors(&ztunnel);
    let flags = [("response_flags", "TLS_FAILURE")];
    let failed = bed.count(1, "istio_tcp_connections_failed_total", &flags).await;
    let door = SocketAddr::new(bed.servers[0].ip().into(), HBONE);
    let mut stopped = Vec::new();
    for _ in 0..STOPPED {
        stopped.push(stop_after_hello(&stranger, door, &tls).await);
    }
    let began = Instant::now();
    wait::until("each is ended and counted", ENDED, || async {
        let now = bed.count(1, "istio_tcp_connections_failed_total", &flags).await;
        now >= failed + STOPPED as f64
    })
    .await;
    assert!(began.elapsed() > Duration::from_secs(2), "ended after {:?} already", began.elapsed());
    for stream in &mut stopped {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(wait::SOON, stream.read_to_end(&mut rest)).await;
        drop(ended.expect("the connection is ended"));
    }
    // Those of the load come and go.
    wait::until("the descriptors are back", wait::SOON, || async {
        descriptors(&ztunnel) < before + STOPPED / 2
    })
    .await;
    let tally = load.finish().await;
    bed.end(&tally, |_| false).await;
}
