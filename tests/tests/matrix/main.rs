//! Connectivity of every pair of captured and uncaptured pods, on one node and across nodes, by every kind of target, over both
//! address families, with every kind of protocol, and what is readable on the wire.
//!
//! The tests run under each of some configurations of the node proxy, all of one configuration in one cluster, which
//! starts with the first of them. Only the default one runs without `--include-ignored`. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

mod bed;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use ambit_local::Pod;
use ambit_tests::apps::{self, exchange};
use ambit_tests::{dns, wait};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::OnceCell;

use bed::{Bed, Pair, Protocol, Setting, Target, sign};

/// More than every buffer on the way holds at rest, and no multiple of any of their sizes.
const BULK: usize = 200_003;
/// Time to live of the mesh's own DNS answers, seconds; the cluster DNS behind it gives another.
const MESH_TTL: u32 = 30;
/// The cluster DNS's addresses.
const RESOLVERS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xa)),
];

/// Bytes that repeat nowhere near, different for every seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

async fn echoes_byte_for_byte(mut stream: TcpStream, seed: u64) {
    let message = noise(seed, BULK);
    let answer = exchange(&mut stream, &message).await.expect("an echo");
    assert_eq!(answer.len(), message.len(), "bytes were lost or added");
    assert!(answer == message, "bytes differ");
}

async fn serves_pages(mut stream: TcpStream, server: &Pod) {
    for _ in 0..3 {
        assert_eq!(apps::get(&mut stream).await.expect("a page"), format!("page of {server}"));
    }
}

async fn greets_first(mut stream: TcpStream, server: &Pod) {
    let greeting = format!("220 {server}\r\n");
    let mut heard = vec![0; greeting.len()];
    let read = tokio::time::timeout(wait::SOON, stream.read_exact(&mut heard)).await;
    read.expect("the server speaks before the client does").expect("a greeting");
    assert_eq!(String::from_utf8_lossy(&heard), greeting);
    assert_eq!(exchange(&mut stream, b"EHLO").await.expect("an echo"), b"EHLO");
}

async fn keeps_the_clients_address(mut stream: TcpStream, client: &Pod, ipv6: bool) {
    let seen = exchange(&mut stream, b"").await.expect("the address");
    let seen: SocketAddr = String::from_utf8_lossy(&seen).parse().expect("an address");
    let own = client.ips().into_iter().find(|ip| ip.is_ipv6() == ipv6);
    assert_eq!(Some(seen.ip()), own, "the server sees another address than the client's");
}

/// The server pod asked as a resolver gives its own answer, from its own address, as it is.
async fn asks_the_server_itself(bed: &Bed, pair: Pair, ipv6: bool) {
    let (client, server) = bed.pods(pair);
    let ip = server.ips().into_iter().find(|ip| ip.is_ipv6() == ipv6).unwrap();
    let answer = dns::ask(client, SocketAddr::new(ip, 53), "who.example.", ipv6).await.expect("an answer");
    assert_eq!(answer.addresses, [sign(server, ipv6)]);
}

/// The pod's resolver, asked over one family, knows the server's services in both.
async fn asks_for_the_servers_names(bed: &Bed, pair: Pair, ipv6: bool) {
    let (client, server) = bed.pods(pair);
    let resolver = SocketAddr::new(RESOLVERS[usize::from(ipv6)], 53);
    let (name, namespace) = (server.name(), server.namespace());
    let vips = bed.cluster.service_ips(namespace, name);
    for (host, all) in [(name.to_owned(), vips), (format!("{name}-pods"), server.ips())] {
        let host = format!("{host}.{namespace}.svc.cluster.local.");
        for of_ipv6 in [false, true] {
            let answer = dns::ask(client, resolver, &host, of_ipv6).await.expect("an answer");
            let expected: Vec<_> = all.iter().copied().filter(|ip| ip.is_ipv6() == of_ipv6).collect();
            assert_eq!(answer.addresses, expected, "{host}");
            // The mesh answers its own pods itself, and no others; of what nobody has dialled it may know nothing.
            if bed.setting != Setting::AddressesOnDemand {
                let by_mesh = answer.ttl == Some(MESH_TTL);
                assert_eq!(by_mesh, pair.client_captured && !ipv6, "{host}: {answer:?}");
            }
        }
    }
}

/// The server's node, if it captures the server, and else the client's, count the pair with the identities that
/// were proven, and with no other.
async fn is_reported_as_it_was(bed: &Bed, pair: Pair) {
    let (client, server) = bed.pods(pair);
    let stream = bed.connect(pair, Target::PodIp, Protocol::Echo, false).await;
    echoes_byte_for_byte(stream, 1).await;
    let identities = [client.spiffe_id(), server.spiffe_id()];
    for (reporter, captured, node) in [
        ("source", pair.client_captured, client.node()),
        ("destination", pair.server_captured, server.node()),
    ] {
        if !captured {
            continue;
        }
        let of_pair = [
            ("reporter", reporter),
            ("source_workload", client.name()),
            ("source_workload_namespace", client.namespace()),
            ("destination_workload", server.name()),
            ("destination_workload_namespace", server.namespace()),
        ];
        let mut mutual = of_pair.to_vec();
        mutual.extend([
            ("connection_security_policy", "mutual_tls"),
            ("source_principal", identities[0].as_str()),
            ("destination_principal", identities[1].as_str()),
        ]);
        let ztunnel = bed.cluster.ztunnel(node).unwrap();
        let opened = "istio_tcp_connections_opened_total";
        wait::until(&format!("{reporter} reports {client} to {server}"), wait::SOON, || async {
            ztunnel.metrics().await.is_ok_and(|metrics| metrics.sum(opened, &of_pair) >= 1.0)
        })
        .await;
        let metrics = ztunnel.metrics().await.unwrap();
        let (all, authenticated) = (metrics.sum(opened, &of_pair), metrics.sum(opened, &mutual));
        let expected = if pair.is_captured() { all } else { 0.0 };
        assert!((authenticated - expected).abs() < 0.5, "{authenticated} of {all} were authenticated");
    }
}

/// Connections between captured pods of one node are handed over inside the proxy, unless it is configured to use tunnels.
async fn meets_on_one_node_as_configured(bed: &Bed) {
    let pair = Pair { client_captured: true, server_captured: true, near: true };
    for ipv6 in [false, true] {
        let stream = bed.connect(pair, Target::PodIp, Protocol::Echo, ipv6).await;
        echoes_byte_for_byte(stream, 1).await;
    }
    let metrics = bed.cluster.ztunnel(0).unwrap().metrics().await.unwrap();
    let handed_over = metrics.sum("ambit_handed_over_total", &[]);
    assert_eq!(
        handed_over >= 2.0,
        bed.setting != Setting::TunnelsOnOneNode,
        "{handed_over} were handed over"
    );
}

const SECRET: &str = "between captured pods";
const OPEN: &str = "an open letter";

/// Sends `words` in every protocol, to every kind of target, over both families.
async fn say(bed: &Bed, pair: Pair, words: &str) {
    for target in Target::ALL {
        for ipv6 in [false, true] {
            for protocol in [Protocol::Echo, Protocol::Http, Protocol::ServerFirst] {
                let mut stream = bed.connect(pair, target, protocol, ipv6).await;
                let request = format!("GET / HTTP/1.1\r\nhost: {words}\r\n\r\n");
                let answer = exchange(&mut stream, request.as_bytes()).await.expect("an answer");
                assert!(!answer.is_empty());
            }
        }
    }
}

/// No byte of a captured pair is readable between the nodes; the same capture does read everybody else.
async fn the_wire_shows_only_what_is_not_captured(bed: &Bed) {
    let capture = bed.cluster.capture().await.expect("a capture needs root");
    for pair in Pair::all() {
        let words = if pair.is_captured() { SECRET.to_owned() } else { format!("{OPEN} by {pair}") };
        say(bed, pair, &words).await;
    }
    let captured = capture.stop().await.expect("what was captured");
    assert_eq!(captured.dropped, 0, "the capture saw only a part");
    let leaks = captured.find(SECRET.as_bytes());
    assert!(leaks.is_empty(), "readable on the wire: {leaks:?}");
    let tunnelled = captured.tcp_ports().get(&15008).copied().unwrap_or_default();
    assert!(tunnelled > 24 * SECRET.len(), "the captured pairs' bytes crossed in tunnels: {tunnelled}");
    let open: Vec<Pair> = Pair::all().filter(|pair| !pair.is_captured()).collect();
    for pair in open {
        let seen = captured.find(format!("{OPEN} by {pair}").as_bytes());
        // Three protocols, four targets, two families, and an echo back of two of the three.
        let expected = if pair.near { 0 } else { 24 + 16 };
        assert_eq!(seen.len(), expected, "{pair}");
    }
}

/// The cluster, made by the first test that needs it.
struct Shared {
    runtime: Arc<Runtime>,
    setting: Setting,
    bed: OnceCell<Result<Bed, String>>,
}

impl Shared {
    async fn bed(&self) -> Result<&Bed, Failed> {
        let started = self
            .bed
            .get_or_init(async || Bed::start(self.setting).await.map_err(|error| error.to_string()))
            .await;
        started.as_ref().map_err(|error| Failed::from(format!("the cluster needs root and starts: {error}")))
    }
}

fn trial<F>(shared: &Arc<Shared>, name: &str, test: F) -> Trial
where
    F: AsyncFnOnce(&Bed) + Send + 'static,
{
    let shared = Arc::clone(shared);
    let name = format!("{}::{name}", shared.setting.name());
    // The other settings take as long again; `make soak` runs them.
    let ignored = shared.setting != Setting::Default;
    let trial = Trial::test(name, move || {
        shared.runtime.block_on(async {
            test(shared.bed().await?).await;
            Ok(())
        })
    });
    trial.with_ignored_flag(ignored)
}

fn trials(shared: &Arc<Shared>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (index, pair) in Pair::all().enumerate() {
        for (ipv6, family) in [(false, "ipv4"), (true, "ipv6")] {
            for (number, target) in Target::ALL.into_iter().enumerate() {
                let name = |what: &str| format!("{pair}::{what}_over_{family}_by_{}", target.name());
                let seed = (index * 16 + number * 2 + usize::from(ipv6)) as u64 + 2;
                trials.push(trial(shared, &name("tcp_echoes_byte_for_byte"), async move |bed| {
                    let stream = bed.connect(pair, target, Protocol::Echo, ipv6).await;
                    echoes_byte_for_byte(stream, seed).await;
                }));
                trials.push(trial(shared, &name("http_serves_pages"), async move |bed| {
                    let stream = bed.connect(pair, target, Protocol::Http, ipv6).await;
                    serves_pages(stream, bed.pods(pair).1).await;
                }));
                trials.push(trial(shared, &name("a_server_speaks_first"), async move |bed| {
                    let stream = bed.connect(pair, target, Protocol::ServerFirst, ipv6).await;
                    greets_first(stream, bed.pods(pair).1).await;
                }));
                trials.push(trial(shared, &name("the_server_sees_the_clients_address"), async move |bed| {
                    let stream = bed.connect(pair, target, Protocol::WhoAmI, ipv6).await;
                    keeps_the_clients_address(stream, bed.pods(pair).0, ipv6).await;
                }));
            }
            let name = |what: &str| format!("{pair}::dns_over_udp_{what}_over_{family}");
            trials.push(trial(shared, &name("asks_the_server_itself"), async move |bed| {
                asks_the_server_itself(bed, pair, ipv6).await;
            }));
            trials.push(trial(shared, &name("finds_the_servers_names"), async move |bed| {
                asks_for_the_servers_names(bed, pair, ipv6).await;
            }));
        }
        // With resources on demand, the node has not requested the plain client, and does not do so for its connections.
        let is_unknown = shared.setting == Setting::AddressesOnDemand && !pair.client_captured && pair.near;
        if !is_unknown {
            trials.push(trial(shared, &format!("{pair}::is_reported_as_it_was"), async move |bed| {
                is_reported_as_it_was(bed, pair).await;
            }));
        }
    }
    let name = "captured_pairs_on_one_node_meet_as_configured";
    trials.push(trial(shared, name, async |bed| meets_on_one_node_as_configured(bed).await));
    let name = "a_capture_between_the_nodes_reads_no_byte_of_captured_pairs_and_all_of_others";
    trials.push(trial(shared, name, async |bed| the_wire_shows_only_what_is_not_captured(bed).await));
    trials
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let runtime = Arc::new(runtime);
    let mut failed = false;
    for setting in Setting::ALL {
        let shared = Arc::new(Shared { runtime: Arc::clone(&runtime), setting, bed: OnceCell::new() });
        let conclusion = libtest_mimic::run(&arguments, trials(&shared));
        failed |= conclusion.has_failed();
        let Shared { bed, .. } = Arc::into_inner(shared).expect("every test has ended");
        if let Some(Ok(bed)) = bed.into_inner() {
            runtime.block_on(bed.cluster.shutdown());
        }
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
