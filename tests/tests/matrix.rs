//! Who reaches whom, and how: every pair of captured and uncaptured pods, on one node and across nodes, by every
//! kind of target, over both address families, with every kind of protocol; what of it the wire shows.
//!
//! All tests share one cluster, which starts with the first of them. Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write as _};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use ambit_local::{Cluster, Pod, PodOptions};
use ambit_tests::apps::{self, App, Running, exchange};
use ambit_tests::{dns, wait};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::OnceCell;

/// More than every buffer on the way holds at rest, and no multiple of any of their sizes.
const BULK: usize = 200_003;
/// Time to live of the mesh's own DNS answers, seconds; the cluster DNS behind it gives another.
const MESH_TTL: u32 = 30;
/// The cluster DNS's addresses.
const RESOLVERS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xa)),
];

/// Which pods talk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    client_captured: bool,
    server_captured: bool,
    near: bool,
}

impl Pair {
    fn all() -> impl Iterator<Item = Self> {
        (0..8).map(|n| Self { client_captured: n & 4 == 0, server_captured: n & 2 == 0, near: n & 1 == 0 })
    }

    fn is_captured(self) -> bool {
        self.client_captured && self.server_captured
    }
}

impl Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |captured| if captured { "captured" } else { "uncaptured" };
        let place = if self.near { "the_same_node" } else { "the_other_node" };
        let (client, server) = (word(self.client_captured), word(self.server_captured));
        write!(f, "{client}_client_to_{server}_server_on_{place}")
    }
}

/// What the client dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    PodIp,
    Vip,
    Headless,
    Hostname,
}

impl Target {
    const ALL: [Self; 4] = [Self::PodIp, Self::Vip, Self::Headless, Self::Hostname];

    fn name(self) -> &'static str {
        match self {
            Self::PodIp => "pod_ip",
            Self::Vip => "vip",
            Self::Headless => "headless_name",
            Self::Hostname => "service_name",
        }
    }
}

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Echo,
    Http,
    ServerFirst,
    WhoAmI,
}

impl Protocol {
    const ALL: [Self; 4] = [Self::Echo, Self::Http, Self::ServerFirst, Self::WhoAmI];

    /// The server's own port, and the service's that leads to it.
    fn ports(self) -> (u16, u16) {
        match self {
            Self::Echo => (8080, 80),
            Self::Http => (8081, 81),
            Self::ServerFirst => (8082, 82),
            Self::WhoAmI => (8083, 83),
        }
    }

    fn app(self, server: &str) -> App {
        match self {
            Self::Echo => App::Echo,
            Self::Http => App::Http(format!("page of {server}")),
            Self::ServerFirst => App::ServerFirst(server.to_owned()),
            Self::WhoAmI => App::WhoAmI,
        }
    }
}

/// The shared cluster and what runs in it.
struct Bed {
    cluster: Cluster,
    clients: BTreeMap<bool, Pod>,
    servers: BTreeMap<(bool, bool), Pod>,
    _running: Vec<Running>,
}

/// What a resolver inside a server pod answers, by which it is told from any other.
fn sign(server: &Pod, ipv6: bool) -> IpAddr {
    match server.ip().octets() {
        [_, _, node, pod] if ipv6 => {
            Ipv6Addr::from([0x2001, 0xdb8, 0, 0, 0, 0, node.into(), pod.into()]).into()
        }
        [_, _, node, pod] => Ipv4Addr::from([192, 0, node, pod]).into(),
    }
}

impl Bed {
    async fn start() -> ambit_local::Result<Self> {
        let cluster = Cluster::builder().nodes(2).start().await?;
        cluster.namespace("inside", true).await?;
        cluster.namespace("outside", false).await?;
        let namespace = |captured| if captured { "inside" } else { "outside" };
        let mut clients = BTreeMap::new();
        let mut servers = BTreeMap::new();
        let mut running = Vec::new();
        for captured in [true, false] {
            let options = PodOptions::new(namespace(captured), "client").service_account("client").node(0);
            clients.insert(captured, cluster.pod(options).await?);
            for (near, name) in [(true, "near"), (false, "far")] {
                let options = PodOptions::new(namespace(captured), name)
                    .service_account(name)
                    .label("app", name)
                    .node(usize::from(!near));
                let pod = cluster.pod(options).await?;
                running.extend(run_all(&pod).await.expect("the ports of a new pod are free"));
                cluster.apply(&services(&pod)).await?;
                servers.insert((captured, near), pod);
            }
        }
        let bed = Self { cluster, clients, servers, _running: running };
        bed.know_each_other().await;
        Ok(bed)
    }

    /// Waits until both node proxies know every server and service, so that no test meets a half-told mesh.
    async fn know_each_other(&self) {
        for node in 0..2 {
            let ztunnel = self.cluster.ztunnel(node).unwrap();
            wait::until("every workload and service is told", wait::SOON, || async {
                let Ok(dump) = ztunnel.config_dump().await else { return false };
                let of = |key: &str| dump[key].as_array().cloned().unwrap_or_default();
                let (workloads, services) = (of("workloads"), of("services"));
                let told = |pod: &Pod, captured: bool| {
                    let protocol = if captured { "HBONE" } else { "TCP" };
                    workloads.iter().any(|w| {
                        w["name"] == pod.name()
                            && w["namespace"] == pod.namespace()
                            && w["protocol"] == protocol
                    })
                };
                let led = |pod: &Pod| {
                    let served = services.iter().filter(|s| {
                        s["namespace"] == pod.namespace()
                            && s["hostname"].as_str().is_some_and(|name| name.starts_with(pod.name()))
                    });
                    served.filter(|s| s["endpoints"].as_array().is_some_and(|e| !e.is_empty())).count() == 2
                };
                self.clients.iter().all(|(captured, pod)| told(pod, *captured))
                    && self.servers.iter().all(|((captured, _), pod)| told(pod, *captured) && led(pod))
            })
            .await;
        }
    }

    fn pods(&self, pair: Pair) -> (&Pod, &Pod) {
        (&self.clients[&pair.client_captured], &self.servers[&(pair.server_captured, pair.near)])
    }

    /// What `target` is for the client, with names resolved as a program in its pod would.
    async fn address(&self, pair: Pair, target: Target, protocol: Protocol, ipv6: bool) -> SocketAddr {
        let (client, server) = self.pods(pair);
        let (own, of_service) = protocol.ports();
        let resolve = async |name: String| client.resolve(&name).await.expect("the name resolves");
        let (found, port) = match target {
            Target::PodIp => (server.ips(), own),
            Target::Vip => (self.cluster.service_ips(server.namespace(), server.name()), of_service),
            Target::Headless => {
                (resolve(format!("{}-pods.{}", server.name(), server.namespace())).await, own)
            }
            Target::Hostname => {
                (resolve(format!("{}.{}", server.name(), server.namespace())).await, of_service)
            }
        };
        let ip = found.iter().find(|ip| ip.is_ipv6() == ipv6);
        SocketAddr::new(*ip.unwrap_or_else(|| panic!("{target:?} in {found:?}")), port)
    }

    async fn connect(&self, pair: Pair, target: Target, protocol: Protocol, ipv6: bool) -> TcpStream {
        let address = self.address(pair, target, protocol, ipv6).await;
        let (client, _) = self.pods(pair);
        let stream = client.connect_within(address, wait::SOON).await;
        stream.unwrap_or_else(|error| panic!("{client} to {address}: {error}"))
    }
}

async fn run_all(pod: &Pod) -> io::Result<Vec<Running>> {
    let mut running = Vec::new();
    for ip in pod.ips() {
        for protocol in Protocol::ALL {
            let address = SocketAddr::new(ip, protocol.ports().0);
            running.push(apps::run(pod, address, protocol.app(&pod.to_string())).await?);
        }
        running.push(dns::serve(pod, SocketAddr::new(ip, 53), sign(pod, ip.is_ipv6())).await?);
    }
    Ok(running)
}

/// A service with VIPs and a headless one for a pod.
fn services(pod: &Pod) -> String {
    let (name, namespace) = (pod.name(), pod.namespace());
    let mut ports = [String::new(), String::new()];
    for protocol in Protocol::ALL {
        let (own, of_service) = protocol.ports();
        let label = format!("{protocol:?}").to_lowercase();
        write!(ports[0], "{{name: {label}, port: {of_service}, targetPort: {own}}}, ").unwrap();
        write!(ports[1], "{{name: {label}, port: {own}}}, ").unwrap();
    }
    let [led, direct] = ports;
    let head = format!("apiVersion: v1\nkind: Service\nmetadata: {{namespace: {namespace}, name: {name}");
    format!(
        "{head}}}\nspec: {{ipFamilyPolicy: PreferDualStack, selector: {{app: {name}}}, ports: [{led}]}}\n---\n\
         {head}-pods}}\nspec: {{clusterIP: None, ipFamilyPolicy: PreferDualStack, selector: {{app: {name}}}, ports: [{direct}]}}\n"
    )
}

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
            // The mesh answers its own pods itself, and no others.
            let by_mesh = answer.ttl == Some(MESH_TTL);
            assert_eq!(by_mesh, pair.client_captured && !ipv6, "{host}: {answer:?}");
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

const SECRET: &str = "between captured pods";
const OPEN: &str = "an open letter";

/// Says `words` in every protocol, to every kind of target, over both families.
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
    runtime: Runtime,
    bed: OnceCell<Result<Bed, String>>,
}

impl Shared {
    async fn bed(&self) -> Result<&Bed, Failed> {
        let started =
            self.bed.get_or_init(async || Bed::start().await.map_err(|error| error.to_string())).await;
        started.as_ref().map_err(|error| Failed::from(format!("the cluster needs root and starts: {error}")))
    }
}

fn trial<F>(shared: &Arc<Shared>, name: String, test: F) -> Trial
where
    F: AsyncFnOnce(&Bed) + Send + 'static,
{
    let shared = Arc::clone(shared);
    Trial::test(name, move || {
        shared.runtime.block_on(async {
            test(shared.bed().await?).await;
            Ok(())
        })
    })
}

fn trials(shared: &Arc<Shared>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (index, pair) in Pair::all().enumerate() {
        for (ipv6, family) in [(false, "ipv4"), (true, "ipv6")] {
            for (number, target) in Target::ALL.into_iter().enumerate() {
                let name = |what: &str| format!("{pair}::{what}_over_{family}_by_{}", target.name());
                let seed = (index * 16 + number * 2 + usize::from(ipv6)) as u64 + 2;
                trials.push(trial(shared, name("tcp_echoes_byte_for_byte"), async move |bed| {
                    let stream = bed.connect(pair, target, Protocol::Echo, ipv6).await;
                    echoes_byte_for_byte(stream, seed).await;
                }));
                trials.push(trial(shared, name("http_serves_pages"), async move |bed| {
                    let stream = bed.connect(pair, target, Protocol::Http, ipv6).await;
                    serves_pages(stream, bed.pods(pair).1).await;
                }));
                trials.push(trial(shared, name("a_server_speaks_first"), async move |bed| {
                    let stream = bed.connect(pair, target, Protocol::ServerFirst, ipv6).await;
                    greets_first(stream, bed.pods(pair).1).await;
                }));
                trials.push(trial(shared, name("the_server_sees_the_clients_address"), async move |bed| {
                    let stream = bed.connect(pair, target, Protocol::WhoAmI, ipv6).await;
                    keeps_the_clients_address(stream, bed.pods(pair).0, ipv6).await;
                }));
            }
            let name = |what: &str| format!("{pair}::dns_over_udp_{what}_over_{family}");
            trials.push(trial(shared, name("asks_the_server_itself"), async move |bed| {
                asks_the_server_itself(bed, pair, ipv6).await;
            }));
            trials.push(trial(shared, name("finds_the_servers_names"), async move |bed| {
                asks_for_the_servers_names(bed, pair, ipv6).await;
            }));
        }
        trials.push(trial(shared, format!("{pair}::is_reported_as_it_was"), async move |bed| {
            is_reported_as_it_was(bed, pair).await;
        }));
    }
    let name = "a_capture_between_the_nodes_reads_no_byte_of_captured_pairs_and_all_of_others".to_owned();
    trials.push(trial(shared, name, async |bed| the_wire_shows_only_what_is_not_captured(bed).await));
    trials
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let shared = Arc::new(Shared { runtime, bed: OnceCell::new() });
    let conclusion = libtest_mimic::run(&arguments, trials(&shared));
    let Shared { runtime, bed } = Arc::into_inner(shared).expect("every test has ended");
    if let Some(Ok(bed)) = bed.into_inner() {
        runtime.block_on(bed.cluster.shutdown());
    }
    conclusion.exit_code()
}
