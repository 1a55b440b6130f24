//! Services: stable names and addresses in front of workloads.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::binding::WaypointBinding;
use super::meta::{Invalid, Labels, Meta, annotation};

/// What a port speaks, as far as it was declared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppProtocol {
    /// Not declared.
    Unknown,
    /// HTTP/1.
    Http11,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC.
    Grpc,
    /// Opaque bytes.
    Tcp,
    /// TLS, not terminated by the mesh.
    Tls,
}

impl AppProtocol {
    /// The protocol of a port: `appProtocol` first, else the prefix of the port's name up to a dash.
    pub fn of_port(app_protocol: Option<&str>, name: &str) -> AppProtocol {
        if let Some(declared) = app_protocol.filter(|p| !p.is_empty()) {
            return AppProtocol::parse(declared.strip_prefix("kubernetes.io/").unwrap_or(declared));
        }
        AppProtocol::parse(name.split('-').next().unwrap_or_default())
    }

    fn parse(text: &str) -> AppProtocol {
        match text.to_ascii_lowercase().as_str() {
            "http" | "http1" | "ws" | "grpcweb" | "grpc-web" => AppProtocol::Http11,
            "http2" | "h2c" => AppProtocol::Http2,
            "grpc" => AppProtocol::Grpc,
            "https" | "tls" | "wss" => AppProtocol::Tls,
            "tcp" | "mysql" | "mongo" | "redis" | "postgres" => AppProtocol::Tcp,
            _ => AppProtocol::Unknown,
        }
    }
}

/// Where a service port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// This port of every endpoint.
    Number(u16),
    /// The container port of this name, which may differ from pod to pod.
    Name(Arc<str>),
}

/// What a port of a service takes. The mesh tunnels connections; datagrams are sent on by gateways only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl Transport {
    /// The transport of a port with this `protocol`; `None` for others, as SCTP.
    pub fn of_port(protocol: Option<&str>) -> Option<Transport> {
        match protocol {
            None | Some("TCP") => Some(Transport::Tcp),
            Some("UDP") => Some(Transport::Udp),
            Some(_) => None,
        }
    }
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name, empty if it has none.
    pub name: Arc<str>,
    /// The port that clients dial.
    pub number: u16,
    /// The port of the endpoints.
    pub target: TargetPort,
    /// What is spoken on it.
    pub protocol: AppProtocol,
}

/// `trafficDistribution`: endpoints near the client first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    /// Same network, region, zone.
    Zone,
    /// The same, then the same node.
    Node,
}

impl Distribution {
    /// The annotation that stands for the field on older services, and on namespaces.
    pub const ANNOTATION: &str = "networking.istio.io/traffic-distribution";

    /// The distribution of that name; `None` for no preference.
    pub fn parse(text: &str) -> Option<Distribution> {
        match text {
            "PreferClose" | "PreferSameZone" => Some(Distribution::Zone),
            "PreferSameNode" => Some(Distribution::Node),
            _ => None,
        }
    }
}

/// Who sees a service (`exportTo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    /// Every namespace.
    Public,
    /// Its own namespace.
    Namespace,
    /// Nobody.
    Hidden,
}

impl Visibility {
    /// The visibility that a list of `*`, `.`, `~` and namespaces comes to in `namespace`. The wire can express all
    /// namespaces or the service's own; a list that names others shows the service to as many as can be expressed.
    pub fn of_list<'a>(list: impl IntoIterator<Item = &'a str>, namespace: &str) -> Visibility {
        let mut visibility = None;
        for item in list.into_iter().map(str::trim).filter(|item| !item.is_empty()) {
            if item == "*" {
                return Visibility::Public;
            }
            if item == "." || item == namespace {
                visibility = Some(Visibility::Namespace);
            } else {
                visibility = visibility.or(Some(Visibility::Hidden));
            }
        }
        visibility.unwrap_or(Visibility::Public)
    }
}

/// `ipFamilies` of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpFamilies {
    /// Not stated.
    Automatic,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
    /// Both.
    Dual,
}

/// A service that has endpoints (not `ExternalName`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name, labels and age.
    pub meta: Meta,
    /// `ExternalName`: a DNS alias without endpoints, which the mesh skips.
    pub external_name: bool,
    /// Cluster IPs; none for headless services. Load-balancer and external IPs are none of the mesh's: kube-proxy
    /// translates them, and a load-balancer IP may be a node's own address.
    pub addresses: Vec<IpAddr>,
    /// The pods behind it; `None` leaves them to EndpointSlices.
    pub selector: Option<Labels>,
    /// Its TCP ports.
    pub ports: Vec<ServicePort>,
    /// Its UDP ports.
    pub udp_ports: Vec<ServicePort>,
    /// `internalTrafficPolicy: Local`: only endpoints on the client's node.
    pub node_local: bool,
    /// Which endpoints are preferred.
    pub distribution: Option<Distribution>,
    /// `publishNotReadyAddresses`: endpoints that are not ready count.
    pub publish_not_ready: bool,
    /// `sessionAffinity: ClientIP` with its timeout in seconds.
    pub affinity: Option<u32>,
    /// Its address families.
    pub families: IpFamilies,
    /// Who sees it (annotation `networking.istio.io/exportTo`). One that is hidden is still seen by its own namespace:
    /// its cluster IP would be reached without the mesh otherwise.
    pub visibility: Visibility,
    /// What it says about its waypoint.
    pub waypoint: WaypointBinding,
}

/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_TIMEOUT: u32 = 10_800;

impl Service {
    /// Its ports of one transport.
    pub fn ports_of(&self, transport: Transport) -> &[ServicePort] {
        match transport {
            Transport::Tcp => &self.ports,
            Transport::Udp => &self.udp_ports,
        }
    }
}

impl TryFrom<v1::Service> for Service {
    type Error = Invalid;

    fn try_from(object: v1::Service) -> Result<Service, Invalid> {
        let meta = object.metadata;
        let spec = object.spec.unwrap_or_default();
        let common = Meta::read(&meta)?;
        let selector = spec.selector.as_ref().filter(|s| !s.is_empty());
        let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
            let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
            config.and_then(|c| u32::try_from(c.timeout_seconds?).ok()).unwrap_or(AFFINITY_TIMEOUT)
        });
        let annotated = annotation(&meta, Distribution::ANNOTATION).and_then(Distribution::parse);
        Ok(Service {
            external_name: spec.type_.as_deref() == Some("ExternalName"),
            addresses: addresses(&spec)?,
            selector: selector.map(|s| s.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect()),
            ports: ports(&spec, Transport::Tcp)?,
            udp_ports: ports(&spec, Transport::Udp)?,
            node_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            distribution: spec.traffic_distribution.as_deref().and_then(Distribution::parse).or(annotated),
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            affinity,
            families: families(&spec),
            visibility: match Visibility::of_list(
                annotation(&meta, "networking.istio.io/exportTo")
                    .into_iter()
                    .flat_map(|list| list.split(',')),
                &common.id.namespace,
            ) {
                Visibility::Public => Visibility::Public,
                Visibility::Namespace | Visibility::Hidden => Visibility::Namespace,
            },
            waypoint: WaypointBinding::read(&common.labels, &meta, &common.id.namespace),
            meta: common,
        })
    }
}

/// Cluster IPs, both of a dual-stack service.
fn addresses(spec: &v1::ServiceSpec) -> Result<Vec<IpAddr>, Invalid> {
    let cluster = spec.cluster_ips.iter().flatten().chain(spec.cluster_ip.as_ref());
    let mut addresses = Vec::new();
    for text in cluster.filter(|ip| !ip.is_empty() && *ip != "None") {
        let invalid = |_| Invalid::new("spec.clusterIPs", format!("{text:?} is no IP address"));
        let address = text.parse().map_err(invalid)?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

fn ports(spec: &v1::ServiceSpec, transport: Transport) -> Result<Vec<ServicePort>, Invalid> {
    let mut ports = Vec::new();
    for (i, port) in spec.ports.iter().flatten().enumerate() {
        if Transport::of_port(port.protocol.as_deref()) != Some(transport) {
            continue;
        }
        let number = number(&format!("spec.ports[{i}].port"), port.port)?;
        let target = match &port.target_port {
            None | Some(IntOrString::Int(0)) => TargetPort::Number(number),
            Some(IntOrString::Int(target)) => {
                TargetPort::Number(self::number(&format!("spec.ports[{i}].targetPort"), *target)?)
            }
            Some(IntOrString::String(name)) => {
                name.parse().map_or_else(|_| TargetPort::Name(name.as_str().into()), TargetPort::Number)
            }
        };
        let name = port.name.as_deref().unwrap_or_default();
        let protocol = AppProtocol::of_port(port.app_protocol.as_deref(), name);
        ports.push(ServicePort { name: name.into(), number, target, protocol });
    }
    Ok(ports)
}

fn number(field: &str, port: i32) -> Result<u16, Invalid> {
    match u16::try_from(port) {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(Invalid::new(field, format!("{port} is no port (1 to 65535)"))),
    }
}

fn families(spec: &v1::ServiceSpec) -> IpFamilies {
    let has = |family: &str| spec.ip_families.iter().flatten().any(|f| f == family);
    match (has("IPv4"), has("IPv6")) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::V4,
        (false, true) => IpFamilies::V6,
        (false, false) => IpFamilies::Automatic,
    }
}
