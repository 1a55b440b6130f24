//! Pods and peers that take all they can get: others keep their service, and the metrics port answers.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use ambit_net::SocketStock;
use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use crate::mesh::{LIMIT, Mesh, Pod, Ztunnel, echo, eventually, exchange, ping};
use crate::routing::{by_host_name, resolver};

/// Descriptors that a node proxy may open: few, so that a test can use them up.
const OPEN_FILES: u64 = 400;
/// Connections that a greedy client opens: more than the proxy has descriptors.
const CROWD: usize = 500;
/// Requests of the other client, each on a new connection.
const REQUESTS: usize = 100;
/// What 99 of 100 of them may take beside a greedy client. A connection that waits for a descriptor takes seconds.
const P99: Duration = Duration::from_millis(500);
/// The application's port.
const PORT: u16 = 8080;

/// A greedy and a modest pod on the first node, and a server on each.
struct Bed {
    mesh: Mesh,
    greedy: Pod,
    modest: Pod,
    near: SocketAddr,
    far: SocketAddr,
}

impl Bed {
    /// The proxy of node `limited` has few descriptors.
    async fn start(extra: Value, limited: usize) -> Self {
        let mesh = Mesh::start_with_files(2, extra, limited, OPEN_FILES).await;
        let greedy = mesh.pod(0, "greedy", "greedy").await;
        let modest = mesh.pod(0, "modest", "modest").await;
        let [near, far] = [serve(&mesh, 0, "near").await, serve(&mesh, 1, "far").await];
        Self { mesh, greedy, modest, near, far }
    }

    fn ztunnel(&self, node: usize) -> &Ztunnel {
        &self.mesh.nodes[node].ztunnel
    }

    /// The modest pod is served by both nodes, and the metrics of `node` are, which counts refusals of `listener` for `reason`.
    async fn others_are_served(&self, node: usize, listener: &str, reason: &str) {
        for target in [self.near, self.far] {
            requests(&self.modest, target).await;
        }
        let labels = [format!("listener=\"{listener}\""), format!("reason=\"{reason}\"")];
        eventually("refusals are counted", async || {
            let metrics =
                tokio::time::timeout(P99, self.ztunnel(node).metrics()).await.expect("metrics at once");
            metrics.lines().any(|line| {
                line.starts_with("ambit_connections_refused_total{")
                    && labels.iter().all(|label| line.contains(label.as_str()))
                    && !line.ends_with(" 0")
            })
        })
        .await;
    }
}

async fn serve(mesh: &Mesh, node: usize, name: &str) -> SocketAddr {
    let pod = mesh.pod(node, name, name).await;
    let mut seen = echo(pod.net.listen(pod.net.v4.into(), PORT).await);
    tokio::spawn(async move { while seen.recv().await.is_some() {} });
    (pod.net.v4, PORT).into()
}

/// Requests on connections of their own; all are answered, nearly all at once.
async fn requests(pod: &Pod, target: SocketAddr) {
    let mut times = Vec::new();
    for _ in 0..REQUESTS {
        let began = Instant::now();
        let request = async {
            let mut stream = pod.net.dial(target).await.unwrap();
            exchange(&mut stream, b"modest").await.unwrap()
        };
        assert_eq!(tokio::time::timeout(LIMIT, request).await.expect("an answer"), b"modest");
        times.push(began.elapsed());
    }
    times.sort_unstable();
    let p99 = times[REQUESTS * 99 / 100];
    assert!(p99 < P99, "99 of 100 requests to {target} took up to {p99:?}");
}

/// Opens connections that are kept and say `words`.
async fn crowd(from: &Pod, target: SocketAddr, words: &[u8]) -> Vec<TcpStream> {
    let stock = SocketStock::new(from.net.netns.clone(), None);
    let mut open = Vec::new();
    for _ in 0..CROWD {
        // One that is refused is reset, perhaps before it is looked at.
        if let Ok(mut stream) = ambit_net::connect(&stock, target, LIMIT).await {
            stream.write_all(words).await.ok();
            open.push(stream);
        }
    }
    open
}

/// Waits until the client of the crowd is served again after the crowd has gone.
async fn is_served_again(pod: &Pod, target: SocketAddr) {
    eventually("the greedy client is served again", async || {
        let Ok(mut stream) = pod.net.dial(target).await else { return false };
        ping(&mut stream, b"again").await.is_ok_and(|answer| answer == b"again")
    })
    .await;
}

/// A gauge of a node proxy.
async fn gauge(ztunnel: &Ztunnel, name: &str) -> u64 {
    let metrics = ztunnel.metrics().await;
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.parse().ok()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooled_connection_counts_until_it_is_closed_for_being_idle() {
    let bed = Bed::start(json!({ "limits": { "poolIdle": "3s" } }), 0).await;
    let used = async || {
        let name = "ambit_descriptors_used";
        [gauge(bed.ztunnel(0), name).await, gauge(bed.ztunnel(1), name).await]
    };
    let before = used().await;
    let mut stream = bed.modest.net.dial(bed.far).await.unwrap();
    assert_eq!(exchange(&mut stream, b"once").await.unwrap(), b"once");
    drop(stream);
    let pooled = before.map(|count| count + 1);
    eventually("only the tunnel connection is left", async || used().await == pooled).await;
    eventually("it is closed on both sides", async || used().await == before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_dials_without_end_leaves_others_their_share() {
    let bed = Bed::start(json!({}), 0).await;
    for target in [bed.far, bed.near] {
        let mut held = crowd(&bed.greedy, target, b"held").await;
        bed.others_are_served(0, "outbound", "pod").await;
        // What was let in first is served as before.
        let mut answer = [0; 4];
        tokio::time::timeout(LIMIT, held[0].read_exact(&mut answer)).await.expect("an answer").unwrap();
        assert_eq!(&answer, b"held");
        drop(held);
        is_served_again(&bed.greedy, target).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_wait_for_an_upstream_count_as_well() {
    let bed = Bed::start(json!({ "limits": { "connectTimeout": "20s", "attemptTimeout": "20s" } }), 0).await;
    let silent = bed.mesh.uncaptured_pod(1, "silent", "silent").await;
    let address = SocketAddr::new(silent.net.v4.into(), PORT);
    // Its queue takes one connection; the others wait for an answer.
    let listener = silent.net.netns.run(move || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.bind(&address.into())?;
        socket.listen(0)?;
        Ok::<_, std::io::Error>(socket)
    });
    let listener = listener.await.unwrap().unwrap();
    let held = crowd(&bed.greedy, address, b"").await;
    bed.others_are_served(0, "outbound", "pod").await;
    drop((held, listener));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_with_socks_and_dns_connections_leaves_a_share() {
    let bed = Bed::start(json!({ "socks5": true, "dns": { "upstreams": ["10.96.0.53:53"] } }), 0).await;
    let held = crowd(&bed.greedy, (Ipv4Addr::LOCALHOST, 15080).into(), b"").await;
    bed.others_are_served(0, "socks5", "pod").await;
    drop(held);
    let held = crowd(&bed.greedy, (Ipv4Addr::new(10, 96, 0, 53), 53).into(), b"").await;
    bed.others_are_served(0, "dns", "pod").await;
    drop(held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_floods_resolvers_leaves_others_their_share() {
    let bed = Bed::start(json!({ "dns": { "upstreams": ["10.77.9.9:53"] } }), 0).await;
    let socket =
        ambit_net::listen::bind_udp(&bed.greedy.net.netns, "0.0.0.0:0".parse().unwrap(), <_>::default());
    let socket = UdpSocket::from_std(socket.await.unwrap()).unwrap();
    let question = crate::dns::question("www.example.org.");
    let asking = tokio::spawn(async move {
        loop {
            // Nobody is there, which the kernel may say now and then.
            socket.send_to(&question, "10.77.9.9:53").await.ok();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    bed.others_are_served(0, "dns", "pod").await;
    asking.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_floods_lookups_leaves_others_their_share() {
    // The address of the third pod.
    let (resolver, _serving) = resolver("known", Ipv4Addr::new(10, 77, 0, 3)).await;
    let mesh = Mesh::start(2, json!({ "dns": { "upstreams": [resolver.to_string()] } })).await;
    let [greedy, modest] = [mesh.pod(0, "greedy", "greedy").await, mesh.pod(0, "modest", "modest").await];
    let outside = mesh.uncaptured_pod(1, "outside", "outside").await;
    assert_eq!(outside.net.v4, Ipv4Addr::new(10, 77, 0, 3));
    let mut seen = echo(outside.net.listen(outside.net.v4.into(), PORT).await);
    tokio::spawn(async move { while seen.recv().await.is_some() {} });
    let silent =
        by_host_name(&mesh, "silent", "silent.example.com", Ipv4Addr::new(10, 96, 0, 20), PORT).await;
    let known = by_host_name(&mesh, "known", "known.example.com", Ipv4Addr::new(10, 96, 0, 21), PORT).await;
    let held = crowd(&greedy, silent, b"").await;
    requests(&modest, known).await;
    let ztunnel = &mesh.nodes[0].ztunnel;
    let metrics = ztunnel.metrics().await;
    let refused = metrics.lines().find(|line| {
        line.starts_with("ambit_connections_refused_total{") && line.contains("resource=\"lookups\"")
    });
    assert!(refused.is_some_and(|line| line.contains("listener=\"lookup\"")), "{metrics}");
    drop(held);
    eventually("no look-up outlives its connection", async || {
        gauge(ztunnel, "ambit_lookups_used").await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_with_plaintext_connections_leaves_others_their_share() {
    let bed = Bed::start(json!({}), 1).await;
    let stranger = bed.mesh.uncaptured_pod(0, "stranger", "stranger").await;
    let held = crowd(&stranger, bed.far, b"held").await;
    bed.others_are_served(1, "passthrough", "peer").await;
    drop(held);
    is_served_again(&stranger, bed.far).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_floods_handshakes_leaves_others_their_share() {
    let bed = Bed::start(json!({ "limits": { "handshakeTimeout": "15s", "handshakes": 60 } }), 1).await;
    let stranger = bed.mesh.uncaptured_pod(0, "stranger", "stranger").await;
    let hbone = SocketAddr::new(bed.far.ip(), 15008);
    let held = crowd(&stranger, hbone, b"\x16\x03\x01\x02\x00\x01").await;
    bed.others_are_served(1, "inbound", "peer").await;
    drop(held);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_floods_tunnels_leaves_others_their_share() {
    let bed = Bed::start(json!({}), 1).await;
    let held = crowd(&bed.greedy, bed.far, b"held").await;
    bed.others_are_served(1, "tunnel", "peer").await;
    drop(held);
    is_served_again(&bed.greedy, bed.far).await;
}
