//! ServiceEntries, WorkloadEntries and the gateways of other networks as resources.

use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::workload as api;
use ipnet::IpNet;

use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::waypoints::{self, Destination};
use super::workloads::{self, Memberships};
use super::{services, wire};
use crate::object::{
    AddressValue, EntryAddress, EntryPort, Gateway, Kind, Labels, NamespacedName, Resolution, ServiceEntry,
    TargetPort, WorkloadEntry, WorkloadSpec,
};

/// `gatewayClassName`s that stand for a gateway of another cluster, whose pods we do not see.
const REMOTE_CLASSES: [&str; 2] = ["ambit-remote", "istio-remote"];

/// The services of an entry's hosts and the workloads of the endpoints that it lists.
pub(super) fn of_service_entry(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(entry) = reader.store.service_entries.get(id) else { return Vec::new() };
    let mut resources: Vec<_> = entry.hosts.iter().map(|host| service(reader, entry, host)).collect();
    for (i, endpoint) in entry.endpoints.iter().enumerate() {
        let mut services = Memberships::new();
        entry
            .hosts
            .iter()
            .for_each(|host| join(&mut services, entry, host, |port| entry_target(endpoint, port)));
        resources.push(listed(reader, entry, endpoint, &i.to_string(), services));
    }
    let by_dns = matches!(entry.resolution, Resolution::Dns | Resolution::DnsRoundRobin);
    if by_dns && entry.endpoints.is_empty() && entry.selector.is_none() {
        resources.extend(
            entry.hosts.iter().filter(|h| !h.starts_with('*')).map(|host| named(reader, entry, host)),
        );
    }
    resources
}

fn service(reader: &Reader<'_>, entry: &ServiceEntry, host: &Arc<str>) -> (ResourceType, Resource) {
    let id = &entry.meta.id;
    let waypoints =
        waypoints::resolve(reader, &id.namespace, &entry.meta.labels, &entry.waypoint, Destination::Service);
    let network = workloads::network(reader, &id.namespace, None);
    let allocated =
        entry.allocated.iter().filter(|(of, _)| of.is_empty() || of == host).map(|(_, block)| *block);
    let addresses: Vec<IpNet> = entry.addresses.iter().copied().chain(allocated).collect();
    let passthrough = api::LoadBalancing {
        mode: api::load_balancing::Mode::Passthrough as i32,
        ..api::LoadBalancing::default()
    };
    let port = |port: &EntryPort| api::Port {
        service_port: port.number.into(),
        target_port: port.target.into(),
        app_protocol: wire::app_protocol(port.protocol) as i32,
    };
    let message = api::Service {
        name: id.name.to_string(),
        namespace: id.namespace.to_string(),
        hostname: host.to_string(),
        addresses: addresses.iter().map(|block| wire::network_block(&network, *block)).collect(),
        ports: entry.ports.iter().map(port).collect(),
        subject_alt_names: entry.subject_alt_names.clone(),
        extensions: waypoints.extensions().collect(),
        waypoint: waypoints.primary,
        load_balancing: (entry.resolution == Resolution::None).then_some(passthrough),
        ip_families: api::IpFamilies::Automatic as i32,
        canonical: reader.is_first_for_host(id, host),
        ingress_use_waypoint: waypoints.ingress,
        weighted_waypoints: waypoints.weighted,
        visibility: services::visibility(entry.private) as i32,
    };
    wire::service_resource(message, &addresses)
}

/// An endpoint that the entry lists; `part` tells it from the others.
fn listed(
    reader: &Reader<'_>,
    entry: &ServiceEntry,
    endpoint: &WorkloadSpec,
    part: &str,
    services: Memberships,
) -> (ResourceType, Resource) {
    let id = &entry.meta.id;
    let uid = format!("{}/{part}", wire::uid(reader.settings, Kind::ServiceEntry, id));
    let name = format!("{}-{part}", id.name);
    let message = api::Workload {
        canonical_name: workloads::canonical_name(&endpoint.labels, &id.name).to_owned(),
        status: workloads::status(true) as i32,
        tunnel_protocol: workloads::tunnel_protocol(false) as i32,
        ..described(reader, &id.namespace, name, uid, endpoint, services)
    };
    wire::workload_resource(message, &ips(endpoint))
}

/// The endpoint of a host that DNS resolves.
fn named(reader: &Reader<'_>, entry: &ServiceEntry, host: &Arc<str>) -> (ResourceType, Resource) {
    let endpoint = WorkloadSpec {
        address: EntryAddress::Hostname(host.clone()),
        ports: Default::default(),
        labels: Labels::default(),
        network: None,
        locality: [(); 3].map(|()| "".into()),
        weight: None,
        service_account: "".into(),
    };
    let mut services = Memberships::new();
    join(&mut services, entry, host, |port| entry_target(&endpoint, port));
    listed(reader, entry, &endpoint, host, services)
}

/// The workload of a WorkloadEntry.
pub(super) fn of_workload_entry(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(entry) = reader.store.workload_entries.get(id) else { return Vec::new() };
    let labels = &entry.meta.labels;
    let waypoints = waypoints::resolve(reader, &id.namespace, labels, &entry.waypoint, Destination::Workload);
    let uid = wire::uid(reader.settings, Kind::WorkloadEntry, id);
    let services = memberships(reader, entry);
    let message = api::Workload {
        extensions: waypoints.extensions().collect(),
        waypoint: waypoints.primary,
        tunnel_protocol: workloads::tunnel_protocol(entry.captured || entry.native_tunnel) as i32,
        native_tunnel: entry.native_tunnel,
        authorization_policies: workloads::policies(reader, &id.namespace, labels),
        status: workloads::status(entry.healthy) as i32,
        ..described(reader, &id.namespace, id.name.to_string(), uid, &entry.spec, services)
    };
    vec![wire::workload_resource(message, &ips(&entry.spec))]
}

/// What a description of a workload says by itself.
fn described(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    name: String,
    uid: String,
    spec: &WorkloadSpec,
    services: Memberships,
) -> api::Workload {
    let network = workloads::network(reader, namespace, spec.network.as_ref());
    let [region, zone, subzone] = spec.locality.each_ref().map(ToString::to_string);
    let is_placed = !(region.is_empty() && zone.is_empty() && subzone.is_empty());
    api::Workload {
        canonical_name: workloads::canonical_name(&spec.labels, &name).to_owned(),
        canonical_revision: workloads::canonical_revision(&spec.labels).to_owned(),
        workload_name: name.clone(),
        workload_type: api::WorkloadType::Pod as i32,
        name,
        namespace: namespace.to_string(),
        addresses: ips(spec).into_iter().map(wire::octets).collect(),
        network_gateway: workloads::network_gateway(reader, &network),
        network: network.to_string(),
        trust_domain: reader.settings.trust_domain.to_string(),
        service_account: spec.service_account.to_string(),
        cluster_id: reader.settings.cluster_id.to_string(),
        uid,
        hostname: match &spec.address {
            EntryAddress::Hostname(host) => host.to_string(),
            EntryAddress::Ip(_) | EntryAddress::Unknown => String::new(),
        },
        services,
        locality: is_placed.then_some(api::Locality { region, zone, subzone }),
        capacity: spec.weight,
        ..api::Workload::default()
    }
}

fn ips(spec: &WorkloadSpec) -> Vec<IpAddr> {
    match spec.address {
        EntryAddress::Ip(address) => vec![address],
        EntryAddress::Hostname(_) | EntryAddress::Unknown => Vec::new(),
    }
}

fn memberships(reader: &Reader<'_>, entry: &WorkloadEntry) -> Memberships {
    let (namespace, labels) = (&entry.meta.id.namespace, &entry.meta.labels);
    let mut services = Memberships::new();
    for service in reader.store.service_selectors.selecting(namespace, labels) {
        let Some(service) = reader.store.services.get(&service) else { continue };
        workloads::join(reader, &mut services, service, |port| {
            let own = |name: &Arc<str>| entry.spec.ports.get(name).copied();
            own(&port.name).or_else(|| match &port.target {
                TargetPort::Number(number) => Some(*number),
                TargetPort::Name(name) => Some(own(name).unwrap_or(port.number)),
            })
        });
    }
    join_entries(reader, &mut services, namespace, labels, |port| entry_target(&entry.spec, port));
    services
}

/// The port of a described workload for a port of its service.
fn entry_target(spec: &WorkloadSpec, port: &EntryPort) -> u16 {
    spec.ports.get(&port.name).copied().unwrap_or(port.target)
}

/// Adds the ServiceEntries whose selector selects labels in a namespace.
pub(super) fn join_entries(
    reader: &Reader<'_>,
    services: &mut Memberships,
    namespace: &Arc<str>,
    labels: &Labels,
    target: impl Fn(&EntryPort) -> u16,
) {
    for entry in reader.store.entry_selectors.selecting(namespace, labels) {
        let Some(entry) = reader.store.service_entries.get(&entry) else { continue };
        entry.hosts.iter().for_each(|host| join(services, entry, host, &target));
    }
}

fn join(services: &mut Memberships, entry: &ServiceEntry, host: &str, target: impl Fn(&EntryPort) -> u16) {
    let list = services.entry(format!("{}/{host}", entry.meta.id.namespace)).or_default();
    for port in &entry.ports {
        if !list.ports.iter().any(|p| p.service_port == u32::from(port.number)) {
            list.ports.push(api::Port {
                service_port: port.number.into(),
                target_port: target(port).into(),
                app_protocol: wire::app_protocol(port.protocol) as i32,
            });
        }
    }
}

/// Where a gateway into a network takes tunnels.
pub(super) fn gateway_address(gateway: &Gateway, network: &Arc<str>) -> Option<api::GatewayAddress> {
    let address = match is_remote(gateway) {
        true => gateway.requested.first(),
        false if gateway.hbone.is_some() => gateway.addresses.first(),
        false => None,
    }?;
    Some(match address {
        AddressValue::Ip(address) => wire::gateway_at(network, *address),
        AddressValue::Hostname(host) => wire::gateway_hostname(&gateway.meta.id.namespace, host),
    })
}

fn is_remote(gateway: &Gateway) -> bool {
    REMOTE_CLASSES.contains(&&*gateway.class)
}

/// A gateway of another cluster as a workload, so that its identity can be verified.
pub(super) fn of_remote_gateway(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(gateway) = reader.store.gateways.get(id).filter(|g| is_remote(g)) else { return Vec::new() };
    let (Some(network), Some(account)) = (&gateway.network, &gateway.service_account) else {
        return Vec::new();
    };
    let addresses: Vec<IpAddr> = gateway
        .requested
        .iter()
        .filter_map(|address| match address {
            AddressValue::Ip(address) => Some(*address),
            AddressValue::Hostname(_) => None,
        })
        .collect();
    let trust_domain = gateway.trust_domain.as_ref().unwrap_or(&reader.settings.trust_domain);
    let message = api::Workload {
        name: id.name.to_string(),
        namespace: id.namespace.to_string(),
        addresses: addresses.iter().map(|a| wire::octets(*a)).collect(),
        network: network.to_string(),
        tunnel_protocol: api::TunnelProtocol::Hbone as i32,
        native_tunnel: true,
        trust_domain: trust_domain.to_string(),
        service_account: account.to_string(),
        canonical_name: id.name.to_string(),
        canonical_revision: "latest".to_owned(),
        workload_type: api::WorkloadType::Pod as i32,
        workload_name: id.name.to_string(),
        status: workloads::status(true) as i32,
        cluster_id: reader.settings.cluster_id.to_string(),
        uid: wire::uid(reader.settings, Kind::Gateway, id),
        ..api::Workload::default()
    };
    vec![wire::workload_resource(message, &addresses)]
}
