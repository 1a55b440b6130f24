//! Services, their ports, balancing and waypoints.

use std::sync::Arc;

use ambit_identity::SpiffeId;
use ipnet::IpNet;
use serde::Serialize;

use crate::dump;
use crate::name::{Demand, NamespacedHost, NetworkAddress};

/// A service: a name and addresses that stand for workloads. Immutable; kept behind an `Arc`.
///
/// The order of the fields is that in memory: what every look-up reads comes first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
#[repr(C)]
pub struct Service {
    /// The full name.
    #[serde(flatten, serialize_with = "dump::host_fields")]
    pub host: NamespacedHost,
    /// Its ports.
    pub ports: Ports,
    /// Identities that its endpoints may show besides their own.
    #[serde(serialize_with = "dump::identities")]
    pub subject_alt_names: Box<[SpiffeId]>,
    /// Waypoints among which connections are shared by weight; when there is one with a weight, they take the place of `waypoint`.
    pub weighted_waypoints: Box<[WeightedWaypoint]>,
    /// The families of address that it has.
    pub ip_families: IpFamilies,
    /// Preferred among services of the same host name.
    pub canonical: bool,
    /// Whether ingress gateways send its traffic through the waypoint too.
    pub ingress_use_waypoint: bool,
    /// Who may see it.
    pub visibility: Visibility,
    /// Whether a client address stays with an endpoint as long as that is there.
    pub session_affinity: bool,
    /// Whether its waypoint resolves the host that a client asks for; there are no endpoints then.
    pub resolves_dynamically: bool,
    /// Whether the direct route is allowed while the waypoint is missing.
    pub waypoint_failure_open: bool,
    /// The waypoint that its traffic must pass.
    pub waypoint: Option<Gateway>,
    /// How an endpoint is chosen.
    pub load_balancing: LoadBalancing,
    /// Its virtual addresses; empty for a headless service.
    pub vips: Box<[Vip]>,
    /// The short name.
    pub name: Arc<str>,
}

impl Service {
    /// Whether a client in `namespace` may see it.
    pub fn visible_to(&self, namespace: &str) -> bool {
        match self.visibility {
            Visibility::Public => true,
            Visibility::Namespace => &*self.host.namespace == namespace,
        }
    }

    /// Whether connections to `port` are its own. One that makes no choice and names no port takes all.
    pub(crate) fn captures(&self, port: u16) -> bool {
        self.ports.get(port).is_some()
            || (self.load_balancing.mode == Mode::Passthrough && self.ports.is_empty())
    }

    /// Whether its name stands for its endpoints' addresses, for lack of its own.
    pub fn is_headless(&self) -> bool {
        self.vips.is_empty()
    }
}

/// A virtual address, or a whole network of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Vip {
    /// One address.
    Address(NetworkAddress),
    /// Every address of `net`.
    Net {
        /// The network that the addresses are in.
        network: Arc<str>,
        /// The addresses.
        net: IpNet,
    },
}

impl Serialize for Vip {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Address(address) => address.serialize(serializer),
            Self::Net { network, net } => serializer.collect_str(&format_args!("{network}/{net}")),
        }
    }
}

/// One port of a service, or what a workload makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The port that clients dial.
    pub service_port: u16,
    /// The workload's port; 0 if only each workload knows it (a named port).
    pub target_port: u16,
    /// What is spoken there.
    pub app_protocol: AppProtocol,
    /// What it takes.
    #[serde(skip_serializing_if = "Transport::is_tcp")]
    pub transport: Transport,
}

/// What a port takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Transport {
    /// Connections: what the mesh tunnels.
    #[default]
    Tcp,
    /// Datagrams, which gateways send on.
    Udp,
}

impl Transport {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    fn is_tcp(&self) -> bool {
        *self == Self::Tcp
    }
}

/// Ports, by transport and service port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Ports(Arc<[PortMapping]>);

impl Ports {
    /// The mapping of `service_port` for connections.
    pub fn get(&self, service_port: u16) -> Option<&PortMapping> {
        self.of(Transport::Tcp, service_port)
    }

    /// The mapping of `service_port` for what `transport` says.
    pub fn of(&self, transport: Transport, service_port: u16) -> Option<&PortMapping> {
        let wanted = (transport, service_port);
        let at = self.0.binary_search_by_key(&wanted, PortMapping::key).ok()?;
        self.0.get(at)
    }

    /// The mappings for connections in the order of service ports.
    pub fn iter(&self) -> std::slice::Iter<'_, PortMapping> {
        let connections = self.0.partition_point(|mapping| mapping.transport == Transport::Tcp);
        self.0.get(..connections).unwrap_or_default().iter()
    }

    /// Whether there is none for connections.
    pub fn is_empty(&self) -> bool {
        self.iter().as_slice().is_empty()
    }
}

impl PortMapping {
    fn key(&self) -> (Transport, u16) {
        (self.transport, self.service_port)
    }
}

impl FromIterator<PortMapping> for Ports {
    fn from_iter<I: IntoIterator<Item = PortMapping>>(ports: I) -> Self {
        let mut ports: Vec<PortMapping> = ports.into_iter().collect();
        ports.sort_by_key(PortMapping::key);
        ports.dedup_by_key(|mapping| mapping.key());
        Self(ports.into())
    }
}

/// What is spoken on a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs, reason = "the names are those of the protocols")]
pub enum AppProtocol {
    #[default]
    Unknown,
    Http11,
    Http2,
    Grpc,
    Tcp,
    Tls,
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadBalancing {
    /// What an endpoint should share with the client, most important first.
    pub preference: Box<[Scope]>,
    /// What the preference means.
    pub mode: Mode,
    /// Whether unhealthy endpoints are chosen too.
    pub health: HealthPolicy,
}

/// Something that an endpoint may share with the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs, reason = "the names are those of the wire (xDS contract)")]
pub enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

/// What a routing preference means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Mode {
    /// Nothing: all endpoints are alike.
    #[default]
    Any,
    /// Only endpoints that share every scope.
    Strict,
    /// Those that share most scopes, counted from the first up to the first that is not shared; others when there is none such.
    Failover,
    /// No choice: the address that was dialled.
    Passthrough,
}

/// Which endpoints are chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
pub enum HealthPolicy {
    /// Healthy ones.
    #[default]
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// The families of address that a service has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs, reason = "the names are those of the wire (xDS contract)")]
pub enum IpFamilies {
    #[default]
    Automatic,
    Ipv4Only,
    Ipv6Only,
    Dual,
}

/// Who may see a service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Visibility {
    /// Everybody.
    #[default]
    Public,
    /// Clients in its namespace.
    Namespace,
}

/// A proxy that traffic must pass: a waypoint, or the gateway of another network.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Gateway {
    /// Where it is.
    pub destination: GatewayDestination,
    /// Its HBONE port.
    pub hbone_mtls_port: u16,
}

/// Where a gateway is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum GatewayDestination {
    /// Behind a service.
    Hostname(NamespacedHost),
    /// At an address: of a service or a workload.
    Address(NetworkAddress),
}

impl GatewayDestination {
    /// What to ask the control plane for to know the gateway.
    pub fn demand(&self) -> Demand {
        match self {
            Self::Hostname(host) => Demand::Service(host.clone()),
            Self::Address(address) => Demand::Address(address.clone()),
        }
    }
}

impl std::fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Hostname(host) => host.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// A waypoint with its share of the connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub gateway: Gateway,
    /// Its share, in proportion to the sum of all.
    pub weight: u32,
}
