//! The shared cluster of one configuration, who is in it, and what is dialled and spoken.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write as _};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ambit_local::{Cluster, ClusterBuilder, Pod, PodOptions};
use ambit_tests::apps::{self, App, Running};
use ambit_tests::{dns, wait};
use serde_json::json;
use tokio::net::TcpStream;

/// Which pods talk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pair {
    pub(crate) client_captured: bool,
    pub(crate) server_captured: bool,
    pub(crate) near: bool,
}

impl Pair {
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..8).map(|n| Self { client_captured: n & 4 == 0, server_captured: n & 2 == 0, near: n & 1 == 0 })
    }

    pub(crate) fn is_captured(self) -> bool {
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
pub(crate) enum Target {
    PodIp,
    Vip,
    Headless,
    Hostname,
}

impl Target {
    pub(crate) const ALL: [Self; 4] = [Self::PodIp, Self::Vip, Self::Headless, Self::Hostname];

    pub(crate) fn name(self) -> &'static str {
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
pub(crate) enum Protocol {
    Echo,
    Http,
    ServerFirst,
    WhoAmI,
}

impl Protocol {
    pub(crate) const ALL: [Self; 4] = [Self::Echo, Self::Http, Self::ServerFirst, Self::WhoAmI];

    /// The server's own port, and the service's that leads to it.
    pub(crate) fn ports(self) -> (u16, u16) {
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

/// How the node proxies are configured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Setting {
    Default,
    /// What stays on one node is not handed over but goes through a tunnel like everything else.
    TunnelsOnOneNode,
    /// The clients' node asks the control plane only for what somebody dials.
    AddressesOnDemand,
}

impl Setting {
    pub(crate) const ALL: [Self; 3] = [Self::Default, Self::TunnelsOnOneNode, Self::AddressesOnDemand];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Default => "by_default",
            Self::TunnelsOnOneNode => "with_tunnels_on_one_node",
            Self::AddressesOnDemand => "with_addresses_on_demand",
        }
    }

    fn configure(self, cluster: ClusterBuilder) -> ClusterBuilder {
        match self {
            Self::Default => cluster,
            Self::TunnelsOnOneNode => cluster.ztunnel_config("sameNode", "tunnel"),
            Self::AddressesOnDemand => cluster.ztunnel_config_of(0, "xds", json!({"onDemand": true})),
        }
    }

    /// The nodes whose proxies get all resources without a request.
    fn fully_informed(self) -> std::ops::Range<usize> {
        if self == Self::AddressesOnDemand { 1..2 } else { 0..2 }
    }
}

/// The shared cluster and what runs in it.
pub(crate) struct Bed {
    pub(crate) setting: Setting,
    pub(crate) cluster: Cluster,
    clients: BTreeMap<bool, Pod>,
    servers: BTreeMap<(bool, bool), Pod>,
    _running: Vec<Running>,
}

/// The answer of a resolver inside a server pod, which differs from that of any other.
pub(crate) fn sign(server: &Pod, ipv6: bool) -> IpAddr {
    match server.ip().octets() {
        [_, _, node, pod] if ipv6 => {
            Ipv6Addr::from([0x2001, 0xdb8, 0, 0, 0, 0, node.into(), pod.into()]).into()
        }
        [_, _, node, pod] => Ipv4Addr::from([192, 0, node, pod]).into(),
    }
}

impl Bed {
    pub(crate) async fn start(setting: Setting) -> ambit_local::Result<Self> {
        let cluster = setting.configure(Cluster::builder().nodes(2)).start().await?;
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
        let bed = Self { setting, cluster, clients, servers, _running: running };
        bed.know_each_other().await;
        Ok(bed)
    }

    /// Waits until the node proxies know every server and service, so that no test runs before the mesh is complete.
    async fn know_each_other(&self) {
        for node in self.setting.fully_informed() {
            let ztunnel = self.cluster.ztunnel(node).unwrap();
            wait::until("every workload and service is known", wait::SOON, || async {
                let Ok(dump) = ztunnel.config_dump().await else { return false };
                let of = |key: &str| dump[key].as_array().cloned().unwrap_or_default();
                let (workloads, services) = (of("workloads"), of("services"));
                let is_known = |pod: &Pod, captured: bool| {
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
                    served.filter(|s| s["endpoints"].as_object().is_some_and(|e| !e.is_empty())).count() == 2
                };
                self.clients.iter().all(|(captured, pod)| is_known(pod, *captured))
                    && self.servers.iter().all(|((captured, _), pod)| is_known(pod, *captured) && led(pod))
            })
            .await;
        }
    }

    pub(crate) fn pods(&self, pair: Pair) -> (&Pod, &Pod) {
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

    pub(crate) async fn connect(
        &self,
        pair: Pair,
        target: Target,
        protocol: Protocol,
        ipv6: bool,
    ) -> TcpStream {
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
