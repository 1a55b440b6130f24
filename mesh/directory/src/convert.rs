//! From resources on the wire to ours. What cannot be read is rejected whole, so nothing is left to check per connection.

use std::net::{IpAddr, Ipv6Addr};

use ambit_api::ports::INBOUND_HBONE;
use ambit_api::workload as wire;
use ambit_identity::SpiffeId;
use ambit_policy::{PolicyList, PolicyName};
use ipnet::IpNet;
use prost::Message;

use crate::error::InvalidResource;
use crate::intern::Interner;
use crate::name::{HostRef, NamespacedHost, NetworkAddress};
use crate::service::{
    AppProtocol, Gateway, GatewayDestination, HealthPolicy, IpFamilies, LoadBalancing, Mode, PortMapping,
    Ports, Scope, Service, Transport, Vip, Visibility, WeightedWaypoint,
};
use crate::workload::{
    ApplicationTunnel, Label, Locality, Membership, Status, TunnelProtocol, Workload, WorkloadType,
};
use crate::{DYNAMIC_HOST_EXTENSION, SESSION_AFFINITY_EXTENSION, WAYPOINT_FAILURE_OPEN_EXTENSION};

/// Control planes leave out the trust domain when it is this one.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// Control planes leave out the service account when it is this one.
const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// Reads a workload.
pub(crate) fn workload(source: wire::Workload, texts: &mut Interner) -> Result<Workload, InvalidResource> {
    if source.uid.is_empty() {
        return Err(InvalidResource::Missing { field: "workload.uid" });
    }
    let (tunnel, workload_type, status) = (
        tunnel_protocol(source.tunnel_protocol)?,
        workload_type(source.workload_type)?,
        status(source.status)?,
    );
    let host_network = match wire::NetworkMode::try_from(source.network_mode) {
        Ok(wire::NetworkMode::Standard) => false,
        Ok(wire::NetworkMode::HostNetwork) => true,
        Err(_) => return Err(unknown("workload.network_mode", source.network_mode)),
    };
    let trust_domain = or_default(&source.trust_domain, DEFAULT_TRUST_DOMAIN);
    let account = or_default(&source.service_account, DEFAULT_SERVICE_ACCOUNT);
    let addresses = source.addresses.iter().map(|bytes| ip("workload.addresses", bytes));
    let policies = source.authorization_policies.iter().map(|name| PolicyName::from(texts.intern(name)));
    let policies = policies.collect::<PolicyList>();
    let policies = texts.policies(policies);
    let labels = labels(&source, texts)?;
    let identity = texts.identity(SpiffeId::new(trust_domain, &source.namespace, account)?);
    Ok(Workload {
        spread: spread(source.uid.as_bytes()),
        is_pod: is_pod(&source),
        created: source.created,
        identity,
        addresses: addresses.collect::<Result<_, _>>()?,
        tunnel,
        serving_while_terminating: source.serving_while_terminating,
        native_tunnel: source.native_tunnel,
        waypoint: source.waypoint.as_ref().map(|it| gateway("workload.waypoint", it, texts)).transpose()?,
        network_gateway: source
            .network_gateway
            .as_ref()
            .map(|it| gateway("workload.network_gateway", it, texts))
            .transpose()?,
        services: memberships(&source, texts)?,
        application_tunnel: source.application_tunnel.as_ref().map(application_tunnel).transpose()?,
        locality: source.locality.as_ref().map(|it| locality(it, texts)).unwrap_or_default(),
        capacity: source.capacity.unwrap_or(1),
        waypoint_failure_open: has_extension(&source.extensions, WAYPOINT_FAILURE_OPEN_EXTENSION),
        uid: source.uid.as_str().into(),
        name: source.name.into(),
        namespace: texts.intern(&source.namespace),
        network: texts.intern(&source.network),
        node: texts.intern(&source.node),
        canonical_name: texts.intern(&source.canonical_name),
        canonical_revision: texts.intern(&source.canonical_revision),
        workload_name: texts.intern(&source.workload_name),
        cluster_id: texts.intern(&source.cluster_id),
        hostname: source.hostname.to_ascii_lowercase().into(),
        workload_type,
        policies,
        status,
        host_network,
        labels,
    })
}

/// The labels that subsets select by.
fn labels(source: &wire::Workload, texts: &mut Interner) -> Result<Box<[Label]>, InvalidResource> {
    let mut extensions = source.extensions.iter();
    let Some(extension) = extensions.find(|extension| extension.name == ambit_api::LABELS_EXTENSION) else {
        return Ok(Box::default());
    };
    let invalid = || InvalidResource::Missing { field: "workload.extensions[ambit.dev/labels].config" };
    let config = extension.config.as_ref().ok_or_else(invalid)?;
    let labels = ambit_api::l7::WorkloadLabels::decode(config.value.as_slice()).map_err(|_| invalid())?;
    Ok(labels.labels.iter().map(|(name, value)| (texts.intern(name), texts.intern(value))).collect())
}

/// xDS contract: the uid of a pod is `<cluster>//Pod/<namespace>/<name>`. Other uids may end in a text of their author's, so the
/// whole beginning counts.
fn is_pod(source: &wire::Workload) -> bool {
    let after_cluster = source.uid.strip_prefix(source.cluster_id.as_str());
    after_cluster.is_some_and(|rest| rest.starts_with("//Pod/"))
}

/// Reads a service.
pub(crate) fn service(source: &wire::Service, texts: &mut Interner) -> Result<Service, InvalidResource> {
    if source.hostname.is_empty() {
        return Err(InvalidResource::Missing { field: "service.hostname" });
    }
    for (field, part) in [("service.namespace", &source.namespace), ("service.hostname", &source.hostname)] {
        // Its removal could not name it.
        if part.contains('/') {
            let name = format!("{}/{}", source.namespace, source.hostname);
            return Err(InvalidResource::Host { field, name });
        }
    }
    let vips = source.addresses.iter().map(|address| vip(address, texts)).collect::<Result<Vec<_>, _>>()?;
    let weighted = source.weighted_waypoints.iter().map(|it| weighted_waypoint(it, texts));
    let weighted_waypoints = weighted.collect::<Result<_, _>>()?;
    // Names that are no identities (of servers outside any mesh) vouch for nothing here.
    let names = source.subject_alt_names.iter().filter_map(|name| name.parse::<SpiffeId>().ok());
    Ok(Service {
        vips: vips.into_iter().flatten().collect(),
        ports: texts
            .ports(ports(["service.ports", "service.udp_ports"], [&source.ports, &source.udp_ports])?),
        subject_alt_names: names.collect(),
        waypoint: source.waypoint.as_ref().map(|it| gateway("service.waypoint", it, texts)).transpose()?,
        weighted_waypoints,
        load_balancing: source.load_balancing.as_ref().map(load_balancing).transpose()?.unwrap_or_default(),
        ip_families: ip_families(source.ip_families)?,
        canonical: source.canonical,
        ingress_use_waypoint: source.ingress_use_waypoint,
        visibility: match wire::service::Visibility::try_from(source.visibility) {
            Ok(wire::service::Visibility::Public) => Visibility::Public,
            Ok(wire::service::Visibility::Namespace) => Visibility::Namespace,
            Err(_) => return Err(unknown("service.visibility", source.visibility)),
        },
        resolves_dynamically: has_extension(&source.extensions, DYNAMIC_HOST_EXTENSION),
        session_affinity: has_extension(&source.extensions, SESSION_AFFINITY_EXTENSION),
        waypoint_failure_open: has_extension(&source.extensions, WAYPOINT_FAILURE_OPEN_EXTENSION),
        name: texts.intern(&source.name),
        host: host(HostRef { namespace: &source.namespace, hostname: &source.hostname }, texts),
    })
}

fn or_default<'a>(text: &'a str, default: &'a str) -> &'a str {
    if text.is_empty() { default } else { text }
}

fn has_extension(extensions: &[wire::Extension], name: &str) -> bool {
    extensions.iter().any(|extension| extension.name == name)
}

fn unknown(field: &'static str, value: i32) -> InvalidResource {
    InvalidResource::Enumeration { field, value }
}

fn ip(field: &'static str, bytes: &[u8]) -> Result<IpAddr, InvalidResource> {
    let invalid = |_| InvalidResource::Address { field, bytes: bytes.len() };
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    Ok(IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).map_err(invalid)?)).to_canonical())
}

fn port(field: &'static str, port: u32) -> Result<u16, InvalidResource> {
    u16::try_from(port).map_err(|_| InvalidResource::Port { field, port })
}

fn host(host: HostRef<'_>, texts: &mut Interner) -> NamespacedHost {
    // RFC 4343 §2: names compare without regard to case.
    let hostname = texts.intern(&host.hostname.to_ascii_lowercase());
    NamespacedHost { namespace: texts.intern(host.namespace), hostname }
}

fn network_address(
    field: &'static str,
    source: &wire::NetworkAddress,
    texts: &mut Interner,
) -> Result<NetworkAddress, InvalidResource> {
    Ok(NetworkAddress { network: texts.intern(&source.network), address: ip(field, &source.address)? })
}

/// A virtual address; the unspecified address stands for none.
fn vip(source: &wire::NetworkAddress, texts: &mut Interner) -> Result<Option<Vip>, InvalidResource> {
    const FIELD: &str = "service.addresses";
    let NetworkAddress { network, address } = network_address(FIELD, source, texts)?;
    let mapped = source.address.len() == 16 && address.is_ipv4();
    let length = match source.length {
        Some(length) if mapped => length.checked_sub(96),
        Some(length) => Some(length),
        None => Some(if address.is_ipv4() { 32 } else { 128 }),
    };
    let invalid =
        || InvalidResource::PrefixLength { field: FIELD, length: source.length.unwrap_or_default() };
    let length = length.and_then(|length| u8::try_from(length).ok()).ok_or_else(invalid)?;
    let net = IpNet::new(address, length).map_err(|_| invalid())?.trunc();
    Ok(if net.prefix_len() < net.max_prefix_len() {
        Some(Vip::Net { network, net })
    } else if address.is_unspecified() {
        None
    } else {
        Some(Vip::Address(NetworkAddress { network, address }))
    })
}

/// Those for connections and those for datagrams.
fn ports(fields: [&'static str; 2], sources: [&[wire::Port]; 2]) -> Result<Ports, InvalidResource> {
    let transports = [Transport::Tcp, Transport::Udp].into_iter().zip(fields).zip(sources);
    let sources = transports.flat_map(|(kind, ports)| ports.iter().map(move |port| (kind, port)));
    let ports = sources.map(|((transport, field), source)| {
        let service_port = port(field, source.service_port)?;
        if service_port == 0 {
            return Err(InvalidResource::Port { field, port: 0 });
        }
        Ok(PortMapping {
            service_port,
            target_port: port(field, source.target_port)?,
            app_protocol: match wire::AppProtocol::try_from(source.app_protocol) {
                Ok(wire::AppProtocol::Unknown) | Err(_) => AppProtocol::Unknown,
                Ok(wire::AppProtocol::Http11) => AppProtocol::Http11,
                Ok(wire::AppProtocol::Http2) => AppProtocol::Http2,
                Ok(wire::AppProtocol::Grpc) => AppProtocol::Grpc,
                Ok(wire::AppProtocol::Tcp) => AppProtocol::Tcp,
                Ok(wire::AppProtocol::Tls) => AppProtocol::Tls,
            },
            transport,
        })
    });
    ports.collect()
}

fn memberships(source: &wire::Workload, texts: &mut Interner) -> Result<Box<[Membership]>, InvalidResource> {
    const FIELD: &str = "workload.services";
    let mut memberships = Vec::with_capacity(source.services.len());
    for (name, list) in &source.services {
        let service =
            HostRef::parse(name).ok_or_else(|| InvalidResource::Host { field: FIELD, name: name.clone() })?;
        let ports = texts.ports(ports([FIELD; 2], [&list.ports, &list.udp_ports])?);
        memberships.push(Membership { host: host(service, texts), ports });
    }
    memberships.sort_unstable_by(|one, other| one.host.cmp(&other.host));
    Ok(memberships.into())
}

fn gateway(
    field: &'static str,
    source: &wire::GatewayAddress,
    texts: &mut Interner,
) -> Result<Gateway, InvalidResource> {
    use wire::gateway_address::Destination;
    let destination = match &source.destination {
        Some(Destination::Hostname(name)) => GatewayDestination::Hostname(host(
            HostRef { namespace: &name.namespace, hostname: &name.hostname },
            texts,
        )),
        Some(Destination::Address(address)) => {
            GatewayDestination::Address(network_address(field, address, texts)?)
        }
        // Dropping a gateway that can't be read would allow the direct route.
        None => return Err(InvalidResource::Missing { field }),
    };
    let hbone_mtls_port = match port(field, source.hbone_mtls_port)? {
        0 => INBOUND_HBONE,
        port => port,
    };
    Ok(Gateway { destination, hbone_mtls_port })
}

fn weighted_waypoint(
    source: &wire::WeightedWaypoint,
    texts: &mut Interner,
) -> Result<WeightedWaypoint, InvalidResource> {
    const FIELD: &str = "service.weighted_waypoints";
    let destination = source.destination.as_ref().ok_or(InvalidResource::Missing { field: FIELD })?;
    Ok(WeightedWaypoint { gateway: gateway(FIELD, destination, texts)?, weight: source.weight })
}

fn load_balancing(source: &wire::LoadBalancing) -> Result<LoadBalancing, InvalidResource> {
    use wire::load_balancing::{HealthPolicy as WireHealth, Mode as WireMode, Scope as WireScope};
    let mut preference = Vec::with_capacity(source.routing_preference.len());
    for &scope in &source.routing_preference {
        preference.push(match WireScope::try_from(scope) {
            Ok(WireScope::UnspecifiedScope) => continue,
            Ok(WireScope::Region) => Scope::Region,
            Ok(WireScope::Zone) => Scope::Zone,
            Ok(WireScope::Subzone) => Scope::Subzone,
            Ok(WireScope::Node) => Scope::Node,
            Ok(WireScope::Cluster) => Scope::Cluster,
            Ok(WireScope::Network) => Scope::Network,
            Err(_) => return Err(unknown("service.load_balancing.routing_preference", scope)),
        });
    }
    let mode = match WireMode::try_from(source.mode) {
        Ok(WireMode::UnspecifiedMode) => Mode::Any,
        Ok(WireMode::Strict) => Mode::Strict,
        Ok(WireMode::Failover) => Mode::Failover,
        Ok(WireMode::Passthrough) => Mode::Passthrough,
        Err(_) => return Err(unknown("service.load_balancing.mode", source.mode)),
    };
    let health = match WireHealth::try_from(source.health_policy) {
        Ok(WireHealth::OnlyHealthy) => HealthPolicy::OnlyHealthy,
        Ok(WireHealth::AllowAll) => HealthPolicy::AllowAll,
        Err(_) => return Err(unknown("service.load_balancing.health_policy", source.health_policy)),
    };
    Ok(LoadBalancing { preference: preference.into(), mode, health })
}

fn ip_families(value: i32) -> Result<IpFamilies, InvalidResource> {
    match wire::IpFamilies::try_from(value) {
        Ok(wire::IpFamilies::Automatic) => Ok(IpFamilies::Automatic),
        Ok(wire::IpFamilies::Ipv4Only) => Ok(IpFamilies::Ipv4Only),
        Ok(wire::IpFamilies::Ipv6Only) => Ok(IpFamilies::Ipv6Only),
        Ok(wire::IpFamilies::Dual) => Ok(IpFamilies::Dual),
        Err(_) => Err(unknown("service.ip_families", value)),
    }
}

fn tunnel_protocol(value: i32) -> Result<TunnelProtocol, InvalidResource> {
    match wire::TunnelProtocol::try_from(value) {
        Ok(wire::TunnelProtocol::None) => Ok(TunnelProtocol::None),
        Ok(wire::TunnelProtocol::Hbone) => Ok(TunnelProtocol::Hbone),
        Ok(wire::TunnelProtocol::LegacyIstioMtls) => Ok(TunnelProtocol::LegacyIstioMtls),
        Err(_) => Err(unknown("workload.tunnel_protocol", value)),
    }
}

fn workload_type(value: i32) -> Result<WorkloadType, InvalidResource> {
    match wire::WorkloadType::try_from(value) {
        Ok(wire::WorkloadType::Deployment) => Ok(WorkloadType::Deployment),
        Ok(wire::WorkloadType::Cronjob) => Ok(WorkloadType::CronJob),
        Ok(wire::WorkloadType::Pod) => Ok(WorkloadType::Pod),
        Ok(wire::WorkloadType::Job) => Ok(WorkloadType::Job),
        Err(_) => Err(unknown("workload.workload_type", value)),
    }
}

fn status(value: i32) -> Result<Status, InvalidResource> {
    match wire::WorkloadStatus::try_from(value) {
        Ok(wire::WorkloadStatus::Healthy) => Ok(Status::Healthy),
        Ok(wire::WorkloadStatus::Unhealthy) => Ok(Status::Unhealthy),
        Err(_) => Err(unknown("workload.status", value)),
    }
}

fn application_tunnel(source: &wire::ApplicationTunnel) -> Result<ApplicationTunnel, InvalidResource> {
    use wire::application_tunnel::Protocol;
    let proxy = match Protocol::try_from(source.protocol) {
        Ok(Protocol::None) => false,
        Ok(Protocol::Proxy) => true,
        Err(_) => return Err(unknown("workload.application_tunnel.protocol", source.protocol)),
    };
    Ok(ApplicationTunnel { proxy, port: port("workload.application_tunnel.port", source.port)? })
}

fn locality(source: &wire::Locality, texts: &mut Interner) -> Locality {
    Locality {
        region: texts.intern(&source.region),
        zone: texts.intern(&source.zone),
        subzone: texts.intern(&source.subzone),
    }
}

/// FNV-1a with a finisher: the same on every node, whatever its process's seeds.
pub(crate) fn spread(bytes: &[u8]) -> u64 {
    let folded = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    mix(folded)
}

/// The finisher of splitmix64: spreads every bit of `value` over the whole.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
