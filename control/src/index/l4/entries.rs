//! ServiceEntries, WorkloadEntries and the gateways of other networks as resources.

use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::workload as api;
use ipnet::IpNet;

use super::outputs::{Resource, ResourceType};
use super::ownership::{self, EndpointClaim, LostClaims};
use super::reader::Reader;
use super::waypoints::{self, Destination};
use super::workloads::{self, Memberships};
use super::{required, services, wire};
use crate::object::{
    AddressValue, EntryAddress, EntryPort, Gateway, Kind, Labels, NamespacedName, Resolution, ServiceEntry,
    TargetPort, Visibility, WaypointBinding, WorkloadEntry, WorkloadSpec,
};

/// `gatewayClassName`s that stand for a gateway of another cluster, whose pods we do not see.
const REMOTE_CLASSES: [&str; 2] = ["ambit-remote", "istio-remote"];

/// The services of an entry's hosts and the workloads of the endpoints that it lists.
pub(in crate::index) fn of_service_entry(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(entry) = reader.store.service_entries.get(id) else { return Vec::new() };
    if !entry.foreign_namespaces.is_empty() {
        let mut lost = LostClaims::default();
        lost.other(format!(
            "exportTo names {}: node proxies know `*` and `.` only",
            entry.foreign_namespaces.join(", ")
        ));
        lost.find(reader, "ambit.dev/ExportAccepted", "NamespacesUnsupported");
    }
    if entry.visibility == Visibility::Hidden {
        return Vec::new();
    }
    let hosts = hosts_in_force(reader, entry);
    if hosts.is_empty() {
        return Vec::new();
    }
    let network = workloads::network(reader, &id.namespace, None);
    let addresses = addresses_in_force(reader, entry, &network);
    let mut resources: Vec<_> =
        hosts.iter().map(|host| service(reader, entry, host, &network, &addresses)).collect();
    resources.extend(endpoints(reader, entry, &hosts));
    let by_dns =
        matches!(entry.resolution, Resolution::Dns | Resolution::DnsRoundRobin | Resolution::DynamicDns);
    if by_dns && entry.endpoints.is_empty() && entry.selector.is_none() {
        let names = hosts.iter().filter(|host| !host.starts_with('*'));
        resources.extend(names.map(|host| named(reader, entry, host)));
    }
    resources
}

/// The hosts that the entry offers. Of several entries of a namespace the oldest has a host, and a Service its own.
fn hosts_in_force<'a>(reader: &Reader<'_>, entry: &'a ServiceEntry) -> Vec<&'a Arc<str>> {
    let (mut hosts, mut lost) = (Vec::new(), LostClaims::default());
    for host in &entry.hosts {
        if hosts.contains(&host) {
            continue;
        }
        if reader.settings.covers_cluster_names(host) {
            lost.other(format!("host {host} covers names of the cluster's own domain"));
            continue;
        }
        match reader.host_owner(entry, host) {
            None => hosts.push(host),
            Some(owner) => lost.host(host, owner),
        }
    }
    lost.find(reader, "ambit.dev/HostsAccepted", "HostTaken");
    hosts
}

/// The virtual addresses of the entry that nobody else owns, each with the host that it was allocated for, if it was.
fn addresses_in_force<'a>(
    reader: &Reader<'_>,
    entry: &'a ServiceEntry,
    network: &Arc<str>,
) -> Vec<(Option<&'a Arc<str>>, IpNet)> {
    let mut lost = LostClaims::default();
    let own = entry.addresses.iter().map(|block| (None, *block));
    let allocated = entry.allocated.iter().map(|(of, block)| (Some(of).filter(|of| !of.is_empty()), *block));
    let in_force = own.chain(allocated).filter(|(_, block)| {
        let owner = ownership::of_virtual_address(reader, network, entry, *block);
        owner.iter().for_each(|owner| lost.address(block.addr(), owner));
        owner.is_none()
    });
    let in_force = in_force.collect();
    lost.find(reader, "ambit.dev/AddressesAccepted", "AddressTaken");
    in_force
}

fn service(
    reader: &Reader<'_>,
    entry: &ServiceEntry,
    host: &Arc<str>,
    network: &Arc<str>,
    addresses: &[(Option<&Arc<str>>, IpNet)],
) -> (ResourceType, Resource) {
    let id = &entry.meta.id;
    let waypoints =
        waypoints::resolve(reader, &id.namespace, &entry.meta.labels, &entry.waypoint, Destination::Service);
    let of_host = addresses.iter().filter(|(of, _)| of.is_none_or(|of| of == host));
    let addresses: Vec<IpNet> = of_host.map(|(_, block)| *block).collect();
    let passthrough = api::LoadBalancing {
        mode: api::load_balancing::Mode::Passthrough as i32,
        ..api::LoadBalancing::default()
    };
    let is_dynamic = entry.resolution == Resolution::DynamicDns && host.starts_with("*.");
    let dynamic = is_dynamic.then(|| wire::marker(wire::DYNAMIC_HOST));
    let port = |port: &EntryPort| api::Port {
        service_port: port.number.into(),
        target_port: port.target.into(),
        app_protocol: wire::app_protocol(port.protocol) as i32,
    };
    let message = api::Service {
        name: id.name.to_string(),
        namespace: id.namespace.to_string(),
        hostname: host.to_string(),
        addresses: addresses.iter().map(|block| wire::network_block(network, *block)).collect(),
        ports: entry.ports.iter().map(port).collect(),
        subject_alt_names: entry.subject_alt_names.clone(),
        extensions: waypoints.extensions().chain(dynamic).collect(),
        waypoint: waypoints.primary,
        load_balancing: (entry.resolution == Resolution::None).then_some(passthrough),
        ip_families: api::IpFamilies::Automatic as i32,
        canonical: reader.is_first_for_host(id, host),
        ingress_use_waypoint: waypoints.ingress,
        weighted_waypoints: waypoints.weighted,
        visibility: services::visibility(entry.visibility) as i32,
        udp_ports: Vec::new(),
    };
    wire::service_resource(message, &addresses, super::l7::views::of_entry(reader, entry, host))
}

/// The workloads of the endpoints that an entry lists, for the hosts that it offers.
fn endpoints(
    reader: &Reader<'_>,
    entry: &ServiceEntry,
    hosts: &[&Arc<str>],
) -> Vec<(ResourceType, Resource)> {
    let id = &entry.meta.id;
    let mut resources: Vec<(ResourceType, Resource)> = Vec::new();
    let mut lost = LostClaims::default();
    for endpoint in &entry.endpoints {
        let network = workloads::network(reader, &id.namespace, endpoint.network.as_ref());
        let claim = ownership::of_endpoint(reader, &network, Kind::ServiceEntry, &entry.meta, &ips(endpoint));
        match &claim {
            EndpointClaim::Found => {}
            EndpointClaim::Unlisted(address, owner) => lost.unlisted(*address, owner),
            EndpointClaim::LeftOut(address, owner) => {
                lost.address(*address, owner);
                continue;
            }
        }
        let mut services = Memberships::new();
        for host in hosts {
            join(&mut services, entry, host, |port| entry_target(endpoint, port));
        }
        let part = match &endpoint.address {
            EntryAddress::Ip(address) => address.to_string(),
            EntryAddress::Hostname(host) => host.to_string(),
            // Of those that are reached through the gateway of their network there is one in each.
            EntryAddress::Unknown => network.to_string(),
        };
        let is_found = matches!(claim, EndpointClaim::Found);
        let (kind, resource) = listed(reader, entry, endpoint, &part, services, is_found);
        if resources.iter().any(|(_, other)| other.name == resource.name) {
            lost.other(format!("endpoint {part} is listed twice, of which the first counts"));
        } else {
            resources.push((kind, resource));
        }
    }
    lost.find(reader, "ambit.dev/EndpointsAccepted", "AddressTaken");
    find_local(reader, &entry.endpoints, "ambit.dev/EndpointsAccepted");
    resources
}

/// Reports addresses that waypoints never dial: they name another host for each that dials them.
fn find_local<'a>(
    reader: &Reader<'_>,
    described: impl IntoIterator<Item = &'a WorkloadSpec>,
    condition: &'static str,
) {
    let mut lost = LostClaims::default();
    for address in described.into_iter().filter_map(WorkloadSpec::ip).filter(|ip| ambit_api::is_local(*ip)) {
        lost.other(format!("{address} is local to whoever dials it: waypoints send nothing there"));
    }
    lost.find(reader, condition, "AddressLocal");
}

/// An endpoint that the entry lists; `part` distinguishes it from the others. Whether it is found by its address is up to
/// `is_found`.
fn listed(
    reader: &Reader<'_>,
    entry: &ServiceEntry,
    endpoint: &WorkloadSpec,
    part: &str,
    services: Memberships,
    is_found: bool,
) -> (ResourceType, Resource) {
    let id = &entry.meta.id;
    let uid = format!("{}/{part}", wire::uid(reader.settings, Kind::ServiceEntry, id));
    let name = format!("{}-{part}", id.name);
    let binding = WaypointBinding::of_labels(&endpoint.labels, &id.namespace);
    let waypoints =
        waypoints::resolve(reader, &id.namespace, &endpoint.labels, &binding, Destination::Workload);
    reader.depend_on_selectors(&id.namespace);
    let of_subsets = wire::subset_labels(reader, &services, &endpoint.labels);
    let message = api::Workload {
        canonical_name: workloads::canonical_name(&endpoint.labels, &id.name).to_owned(),
        status: workloads::status(true) as i32,
        tunnel_protocol: workloads::tunnel_protocol(endpoint.has_native_tunnel()) as i32,
        native_tunnel: endpoint.has_native_tunnel(),
        extensions: waypoints.extensions().chain(of_subsets).collect(),
        waypoint: waypoints.primary,
        authorization_policies: workloads::policies(reader, &id.namespace, &endpoint.labels),
        created: wire::created(&entry.meta),
        ..described(reader, &id.namespace, name, uid, endpoint, services)
    };
    resource(message, &ips(endpoint), is_found)
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
    listed(reader, entry, &endpoint, host, services, true)
}

/// The workload of a WorkloadEntry.
pub(in crate::index) fn of_workload_entry(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(entry) = reader.store.workload_entries.get(id) else { return Vec::new() };
    let network = workloads::network(reader, &id.namespace, entry.spec.network.as_ref());
    let mut lost = LostClaims::default();
    let claim = ownership::of_endpoint(reader, &network, Kind::WorkloadEntry, &entry.meta, &ips(&entry.spec));
    match &claim {
        EndpointClaim::Found => {}
        EndpointClaim::Unlisted(address, owner) => lost.unlisted(*address, owner),
        EndpointClaim::LeftOut(address, owner) => lost.address(*address, owner),
    }
    lost.find(reader, "ambit.dev/AddressesAccepted", "AddressTaken");
    find_local(reader, [&entry.spec], "ambit.dev/AddressesAccepted");
    if matches!(claim, EndpointClaim::LeftOut(..)) {
        return Vec::new();
    }
    let labels = &entry.meta.labels;
    let waypoints = waypoints::resolve(reader, &id.namespace, labels, &entry.waypoint, Destination::Workload);
    let uid = wire::uid(reader.settings, Kind::WorkloadEntry, id);
    let services = memberships(reader, entry);
    let of_subsets = wire::subset_labels(reader, &services, labels);
    let name = NamespacedName::new(id.namespace.clone(), format!("entry_{}", id.name));
    let required = required::policy(reader, &name, &services);
    let message = api::Workload {
        extensions: waypoints.extensions().chain(of_subsets).collect(),
        waypoint: waypoints.primary,
        tunnel_protocol: workloads::tunnel_protocol(entry.captured || entry.native_tunnel) as i32,
        native_tunnel: entry.native_tunnel,
        authorization_policies: workloads::listed(reader, &id.namespace, labels, required.as_ref()),
        status: workloads::status(entry.healthy) as i32,
        created: wire::created(&entry.meta),
        ..described(reader, &id.namespace, id.name.to_string(), uid, &entry.spec, services)
    };
    let workload = resource(message, &ips(&entry.spec), matches!(claim, EndpointClaim::Found));
    required.map(|(_, policy)| policy).into_iter().chain([workload]).collect()
}

/// The resource of an endpoint. One that is not found by its addresses is like one on its node's network: proxies reach it
/// by its services only.
fn resource(message: api::Workload, addresses: &[IpAddr], is_found: bool) -> (ResourceType, Resource) {
    if is_found {
        return wire::workload_resource(message, addresses);
    }
    let network_mode = api::NetworkMode::HostNetwork as i32;
    wire::workload_resource(api::Workload { network_mode, ..message }, &[])
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
    spec.ip().into_iter().collect()
}

fn memberships(reader: &Reader<'_>, entry: &WorkloadEntry) -> Memberships {
    let (namespace, labels) = (&entry.meta.id.namespace, &entry.meta.labels);
    let mut services = Memberships::new();
    for service in reader.store.service_selectors.selecting(namespace, labels) {
        let Some(service) = reader.store.services.get(&service) else { continue };
        workloads::join(reader, &mut services, service, |_, port| {
            let own = |name: &Arc<str>| entry.spec.ports.get(name).copied();
            // A named target port is looked up by that name only.
            match &port.target {
                TargetPort::Number(number) => Some(own(&port.name).unwrap_or(*number)),
                TargetPort::Name(name) => own(name),
            }
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
pub(in crate::index) fn join_entries(
    reader: &Reader<'_>,
    services: &mut Memberships,
    namespace: &Arc<str>,
    labels: &Labels,
    target: impl Fn(&EntryPort) -> u16,
) {
    for entry in reader.store.entry_selectors.selecting(namespace, labels) {
        let Some(entry) = reader.store.service_entries.get(&entry) else { continue };
        let is_visible = entry.visibility != Visibility::Hidden;
        for host in entry.hosts.iter().filter(|_| is_visible) {
            if !reader.settings.covers_cluster_names(host) && reader.host_owner(entry, host).is_none() {
                join(services, entry, host, &target);
            }
        }
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
pub(in crate::index) fn gateway_address(
    gateway: &Gateway,
    network: &Arc<str>,
) -> Option<api::GatewayAddress> {
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

/// Whether a gateway is one of another cluster.
pub(in crate::index) fn is_remote(gateway: &Gateway) -> bool {
    REMOTE_CLASSES.contains(&&*gateway.class)
}

/// A gateway of another cluster as a workload, so that its identity can be verified.
pub(in crate::index) fn of_remote_gateway(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(gateway) = reader.store.gateways.get(id).filter(|g| is_remote(g)) else { return Vec::new() };
    let (Some(network), Some(account)) = (&gateway.network, &gateway.service_account) else {
        return Vec::new();
    };
    let addresses = gateway_addresses(reader, gateway, network);
    if addresses.is_empty() {
        return Vec::new();
    }
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
        created: wire::created(&gateway.meta),
        ..api::Workload::default()
    };
    let (kind, mut resource) = wire::workload_resource(message, &addresses);
    // Whatever a waypoint is for may have endpoints in that network.
    let classes = &reader.settings.waypoint_classes;
    let waypoints = classes.iter().flat_map(|class| reader.gateways_of_class(class));
    resource.parents.extend(waypoints.map(|waypoint| super::l7::views::root(&waypoint.meta.id)));
    vec![(kind, resource)]
}

/// The addresses of a gateway of another cluster that nobody else owns.
fn gateway_addresses(reader: &Reader<'_>, gateway: &Gateway, network: &Arc<str>) -> Vec<IpAddr> {
    let mut lost = LostClaims::default();
    let mut in_force = Vec::new();
    for address in gateway.requested_ips() {
        match ownership::of_gateway(reader, network, &gateway.meta, address) {
            Some(owner) => lost.address(address, &owner),
            // In our own network it would only capture an address: nobody needs a gateway into it.
            None if *network == reader.settings.network => {
                lost.other(format!("{address}: {network:?} is this cluster's own network"));
            }
            None => in_force.push(address),
        }
    }
    lost.find(reader, "ambit.dev/AddressesAccepted", "AddressTaken");
    in_force
}
