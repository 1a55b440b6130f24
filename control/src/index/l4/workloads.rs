//! Pods as workloads, and what all workloads have in common.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::workload as api;

use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::waypoints::{self, Destination};
use super::{authentication, l7, required, wire};
use crate::object::{
    Gateway, Kind, Labels, NamespacedName, Owner, OwnerKind, Pod, Service, ServicePort, TargetPort, Transport,
};

/// Ports by service, keyed `<namespace>/<hostname>`.
pub(in crate::index) type Memberships = BTreeMap<String, api::PortList>;

/// The workload of a pod that has an address and has not finished.
pub(in crate::index) fn of_pod(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(pod) = reader.store.pods.get(id).filter(|p| !p.finished && !p.addresses.is_empty()) else {
        return Vec::new();
    };
    let labels = &pod.meta.labels;
    let (workload_name, workload_type) = owner(reader, pod);
    let waypoints = waypoints::resolve(reader, &id.namespace, labels, &pod.waypoint, Destination::Workload);
    let network = network(reader, &id.namespace, pod.network.as_ref());
    let gateway = waypoints::own_gateway(reader, &id.namespace, labels);
    let tunnel = gateway.and_then(|g| g.application_tunnel);
    let native_tunnel = pod.native_tunnel || (tunnel.is_none() && is_waypoint(reader, gateway));
    let has_tunnel = (pod.captured || native_tunnel) && !pod.host_network;
    let mut services = memberships(reader, pod);
    // What requires its waypoint does so until the pod is gone.
    let required = required::policy(reader, id, &services);
    leave(reader, pod, &mut services);
    let of_subsets = wire::subset_labels(reader, &services, labels);
    let message = api::Workload {
        name: id.name.to_string(),
        namespace: id.namespace.to_string(),
        addresses: pod.addresses.iter().map(|a| wire::octets(*a)).collect(),
        network_gateway: network_gateway(reader, &network),
        network: network.to_string(),
        tunnel_protocol: tunnel_protocol(has_tunnel) as i32,
        trust_domain: reader.settings.trust_domain.to_string(),
        service_account: pod.service_account.to_string(),
        extensions: waypoints.extensions().chain(of_subsets).collect(),
        waypoint: waypoints.primary,
        node: pod.node.to_string(),
        canonical_name: canonical_name(labels, &workload_name).to_owned(),
        canonical_revision: canonical_revision(labels).to_owned(),
        workload_type: workload_type as i32,
        workload_name: workload_name.to_string(),
        native_tunnel: has_tunnel && native_tunnel,
        authorization_policies: listed(reader, &id.namespace, labels, required.as_ref()),
        status: status(pod.ready && !pod.terminating) as i32,
        cluster_id: reader.settings.cluster_id.to_string(),
        uid: wire::uid(reader.settings, Kind::Pod, id),
        hostname: String::new(),
        services,
        application_tunnel: tunnel.map(|t| api::ApplicationTunnel {
            protocol: if t.proxy {
                api::application_tunnel::Protocol::Proxy
            } else {
                api::application_tunnel::Protocol::None
            } as i32,
            port: t.port.into(),
        }),
        locality: locality(reader, &pod.node),
        network_mode: if pod.host_network {
            api::NetworkMode::HostNetwork
        } else {
            api::NetworkMode::Standard
        } as i32,
        capacity: None,
        serving_while_terminating: pod.terminating && pod.ready,
        created: wire::created(&pod.meta),
    };
    let (kind, mut resource) = wire::workload_resource(message, &pod.addresses);
    resource.parents.extend(l7::views::of_pod(reader, pod));
    required.map(|(_, policy)| policy).into_iter().chain([(kind, resource)]).collect()
}

/// The policies that a workload lists, with that of services that require their waypoints.
pub(in crate::index) fn listed(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    labels: &Labels,
    required: Option<&(String, (ResourceType, Resource))>,
) -> Vec<String> {
    let mut names = policies(reader, namespace, labels);
    names.extend(required.map(|(name, _)| name.clone()));
    names
}

fn is_waypoint(reader: &Reader<'_>, gateway: Option<&Gateway>) -> bool {
    gateway.is_some_and(|g| reader.settings.waypoint_classes.contains(&g.class))
}

/// Whether a tunnel can be opened to a workload.
pub(in crate::index) fn tunnel_protocol(has_tunnel: bool) -> api::TunnelProtocol {
    if has_tunnel { api::TunnelProtocol::Hbone } else { api::TunnelProtocol::None }
}

/// Health on the wire.
pub(in crate::index) fn status(healthy: bool) -> api::WorkloadStatus {
    if healthy { api::WorkloadStatus::Healthy } else { api::WorkloadStatus::Unhealthy }
}

/// `service.istio.io/canonical-name`, `app.kubernetes.io/name`, `app`, else the workload's name.
pub(in crate::index) fn canonical_name<'a>(labels: &'a Labels, workload: &'a str) -> &'a str {
    let keys = ["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"];
    keys.iter().find_map(|key| labels.get(key)).unwrap_or(workload)
}

/// `service.istio.io/canonical-revision`, `app.kubernetes.io/version`, `version`, else `latest`.
pub(in crate::index) fn canonical_revision(labels: &Labels) -> &str {
    let keys = ["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"];
    keys.iter().find_map(|key| labels.get(key)).unwrap_or("latest")
}

/// The network of a workload: its own, its namespace's, the mesh's.
pub(in crate::index) fn network(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    own: Option<&Arc<str>>,
) -> Arc<str> {
    let inherited = || reader.namespace(namespace).and_then(|n| n.network.as_ref());
    own.or_else(inherited).unwrap_or(&reader.settings.network).clone()
}

/// The way into another network; `None` within ours.
pub(in crate::index) fn network_gateway(
    reader: &Reader<'_>,
    network: &Arc<str>,
) -> Option<api::GatewayAddress> {
    if *network == reader.settings.network {
        return None;
    }
    reader
        .gateways_into(network)
        .into_iter()
        .find_map(|gateway| super::entries::gateway_address(gateway, network))
}

/// The policies that a workload lists: those selecting it, then what stands for its PeerAuthentication.
pub(in crate::index) fn policies(reader: &Reader<'_>, namespace: &Arc<str>, labels: &Labels) -> Vec<String> {
    let selecting = reader.store.policy_selectors.selecting(namespace, labels);
    let in_force = selecting.iter().filter(|id| {
        reader.store.policies.get(*id).is_some_and(|p| super::authorization::selector_at_l4(p).is_some())
    });
    let mut names: Vec<String> = in_force.map(ToString::to_string).collect();
    names.extend(authentication::listed(reader, namespace, labels));
    names
}

/// Where a node is; `None` if nothing is known.
pub(in crate::index) fn locality(reader: &Reader<'_>, node: &Arc<str>) -> Option<api::Locality> {
    if node.is_empty() {
        return None;
    }
    let node = reader.node(node)?;
    let is_known = !(node.region.is_empty() && node.zone.is_empty() && node.subzone.is_empty());
    is_known.then(|| api::Locality {
        region: node.region.to_string(),
        zone: node.zone.to_string(),
        subzone: node.subzone.to_string(),
    })
}

/// Name and type of what runs the pod; the hash of a ReplicaSet's name is cut.
fn owner(reader: &Reader<'_>, pod: &Pod) -> (Arc<str>, api::WorkloadType) {
    let Some(Owner { kind, name }) = &pod.owner else {
        return (pod.meta.id.name.clone(), api::WorkloadType::Pod);
    };
    match kind {
        OwnerKind::Deployment => (name.clone(), api::WorkloadType::Deployment),
        OwnerKind::CronJob => (name.clone(), api::WorkloadType::Cronjob),
        OwnerKind::Other => (name.clone(), api::WorkloadType::Pod),
        OwnerKind::Job => match cron_job(name) {
            Some(cron_job) => (cron_job.into(), api::WorkloadType::Cronjob),
            None => (name.clone(), api::WorkloadType::Job),
        },
        OwnerKind::ReplicaSet => {
            let set = reader.replica_set(&NamespacedName::new(pod.meta.id.namespace.clone(), name.clone()));
            if let Some(owner) = set.and_then(|set| set.owner.as_ref()) {
                let is_deployment = owner.kind == OwnerKind::Deployment;
                let kind = if is_deployment { api::WorkloadType::Deployment } else { api::WorkloadType::Pod };
                return (owner.name.clone(), kind);
            }
            let hash = pod.meta.labels.get("pod-template-hash").filter(|hash| !hash.is_empty());
            let cut = hash.and_then(|hash| name.strip_suffix(hash)?.strip_suffix('-'));
            // Only a deployment's replica sets carry the hash in their name.
            cut.map_or_else(
                || (name.clone(), api::WorkloadType::Pod),
                |deployment| (deployment.into(), api::WorkloadType::Deployment),
            )
        }
    }
}

/// The CronJob of a job by its name: Kubernetes appends the scheduled minute, at least eight digits.
fn cron_job(job: &str) -> Option<&str> {
    let (name, minute) = job.rsplit_once('-')?;
    (minute.len() >= 8 && minute.bytes().all(|b| b.is_ascii_digit())).then_some(name)
}

/// The services in front of a pod: those that select it, and those whose endpoints name it.
fn memberships(reader: &Reader<'_>, pod: &Pod) -> Memberships {
    let (id, labels) = (&pod.meta.id, &pod.meta.labels);
    let mut services = Memberships::new();
    for service in reader.store.service_selectors.selecting(&id.namespace, labels) {
        let Some(service) = reader.store.services.get(&service) else { continue };
        join(reader, &mut services, service, |transport, port| match &port.target {
            TargetPort::Number(number) => Some(*number),
            TargetPort::Name(name) => pod.port_of(transport, name),
        });
    }
    for slice in super::endpoints::slices_of_pod(reader, pod) {
        super::endpoints::join_slice(reader, &mut services, slice);
    }
    super::entries::join_entries(reader, &mut services, &id.namespace, labels, |port| {
        pod.port(&port.name).unwrap_or(port.target)
    });
    services
}

/// Removes the services that a terminating pod leaves at once: those that take unready endpoints would take it too.
fn leave(reader: &Reader<'_>, pod: &Pod, services: &mut Memberships) {
    if !pod.terminating {
        return;
    }
    let (id, labels) = (&pod.meta.id, &pod.meta.labels);
    for service in reader.store.service_selectors.selecting(&id.namespace, labels) {
        if reader.store.services.get(&service).is_some_and(|service| service.publish_not_ready) {
            services.remove(&key(reader, &service));
        }
    }
}

/// The key of a Service among memberships.
fn key(reader: &Reader<'_>, service: &NamespacedName) -> String {
    format!("{}/{}", service.namespace, reader.settings.host_of_service(service))
}

/// Adds a service's ports as far as the workload has their targets.
pub(in crate::index) fn join(
    reader: &Reader<'_>,
    services: &mut Memberships,
    service: &Service,
    target: impl Fn(Transport, &ServicePort) -> Option<u16>,
) {
    let list = services.entry(key(reader, &service.meta.id)).or_default();
    for (transport, ports) in [(Transport::Tcp, &mut list.ports), (Transport::Udp, &mut list.udp_ports)] {
        for port in service.ports_of(transport) {
            let known = ports.iter().any(|p| p.service_port == u32::from(port.number));
            if let Some(target) = target(transport, port).filter(|_| !known) {
                ports.push(api::Port {
                    service_port: port.number.into(),
                    target_port: target.into(),
                    app_protocol: wire::app_protocol(port.protocol) as i32,
                });
            }
        }
    }
}
