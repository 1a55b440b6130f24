//! Kubernetes services as resources.

use ambit_api::workload::{
    self as api,
    load_balancing::{HealthPolicy, Mode, Scope},
};
use ipnet::IpNet;

use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::waypoints::{self, Destination};
use super::{l7, required, wire};
use crate::object::{Distribution, NamespacedName, Service, TargetPort, Visibility};

/// The resource of a service, unless it is an `ExternalName`.
pub(in crate::index) fn of_service(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(service) = reader.store.services.get(id).filter(|s| !s.external_name) else { return Vec::new() };
    let waypoints = waypoints::resolve(
        reader,
        &id.namespace,
        &service.meta.labels,
        &service.waypoint,
        Destination::Service,
    );
    required::report(reader, service);
    let namespace = reader.namespace(&id.namespace);
    let network = namespace.and_then(|n| n.network.as_ref()).unwrap_or(&reader.settings.network);
    let affinity = service.affinity.map(|timeout| wire::number(wire::SESSION_AFFINITY, timeout));
    let extensions = affinity.into_iter().chain(waypoints.extensions()).collect();
    let distribution = service.distribution.or(namespace.and_then(|n| n.distribution));
    let message = api::Service {
        name: id.name.to_string(),
        namespace: id.namespace.to_string(),
        hostname: reader.settings.host_of_service(id),
        addresses: service.addresses.iter().map(|a| wire::network_address(network, *a)).collect(),
        ports: ports(&service.ports),
        udp_ports: ports(&service.udp_ports),
        subject_alt_names: Vec::new(),
        waypoint: waypoints.primary,
        load_balancing: load_balancing(service, distribution),
        ip_families: wire::families(service.families) as i32,
        extensions,
        canonical: true,
        ingress_use_waypoint: waypoints.ingress,
        weighted_waypoints: waypoints.weighted,
        visibility: visibility(service.visibility) as i32,
    };
    let blocks: Vec<IpNet> = service.addresses.iter().map(|a| IpNet::from(*a)).collect();
    let parents = l7::views::of_service(reader, service);
    vec![wire::service_resource(message, &blocks, parents)]
}

/// Who sees a service.
pub(in crate::index) fn visibility(visibility: Visibility) -> api::service::Visibility {
    match visibility {
        Visibility::Public => api::service::Visibility::Public,
        Visibility::Namespace | Visibility::Hidden => api::service::Visibility::Namespace,
    }
}

/// A named target port has no number of its own: 0, and each workload says its own.
fn ports(ports: &[crate::object::ServicePort]) -> Vec<api::Port> {
    let port = |port: &crate::object::ServicePort| api::Port {
        service_port: port.number.into(),
        target_port: match port.target {
            TargetPort::Number(number) => number.into(),
            TargetPort::Name(_) => 0,
        },
        app_protocol: wire::app_protocol(port.protocol) as i32,
    };
    ports.iter().map(port).collect()
}

/// How endpoints are preferred; `None` when there is nothing to say.
fn load_balancing(service: &Service, distribution: Option<Distribution>) -> Option<api::LoadBalancing> {
    let (mode, scopes): (Mode, &[Scope]) = match distribution {
        // A demand stands above a preference.
        _ if service.node_local => (Mode::Strict, &[Scope::Node]),
        Some(Distribution::Zone) => (Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone]),
        Some(Distribution::Node) => {
            (Mode::Failover, &[Scope::Network, Scope::Region, Scope::Zone, Scope::Node])
        }
        None => (Mode::UnspecifiedMode, &[]),
    };
    let health = if service.publish_not_ready { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    let is_default = mode == Mode::UnspecifiedMode && health == HealthPolicy::OnlyHealthy;
    (!is_default).then(|| api::LoadBalancing {
        routing_preference: scopes.iter().map(|scope| *scope as i32).collect(),
        mode: mode as i32,
        health_policy: health as i32,
    })
}
