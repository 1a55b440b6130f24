//! Endpoints of services without selector: pods that a slice names, and addresses with no pod behind them.

use std::sync::Arc;

use ambit_api::workload as api;

use super::outputs::{Resource, ResourceType};
use super::ownership::{self, LostClaims};
use super::reader::Reader;
use super::store::{is_addressable, service_of};
use super::wire;
use super::workloads::{self, Memberships};
use crate::object::{Endpoint, EndpointSlice, Kind, NamespacedName, Pod, Service};

/// The workloads of a slice's endpoints that have no pod behind them.
pub(in crate::index) fn of_slice(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(slice) = reader.store.slices.get(id) else { return Vec::new() };
    let mut services = Memberships::new();
    join_slice(reader, &mut services, slice);
    if services.is_empty() {
        return Vec::new();
    }
    let strangers = slice.endpoints.iter().filter(|endpoint| !has_pod(reader, endpoint));
    let network = workloads::network(reader, &slice.id.namespace, None);
    let mut resources: Vec<(ResourceType, Resource)> = Vec::new();
    let mut lost = LostClaims::default();
    for endpoint in strangers {
        let Some(first) = endpoint.addresses.first() else { continue };
        if let Some((address, owner)) = ownership::of_pod_or_service(reader, &network, &endpoint.addresses) {
            lost.address(address, &owner);
            continue;
        }
        let message = workload(reader, slice, endpoint, &first.to_string(), services.clone());
        // A slice that lists an address twice has one workload there.
        if !resources.iter().any(|(_, resource)| *resource.name == *message.uid) {
            // They share their node's address or are outside of the mesh: nobody finds them by address.
            resources.push(wire::workload_resource(message, &[]));
        }
    }
    lost.find(reader, "ambit.dev/EndpointsAccepted", "AddressTaken");
    resources
}

/// Whether a pod is behind an endpoint: the one that it names or, if there is none of that name, the one that has the
/// address.
fn has_pod(reader: &Reader<'_>, endpoint: &Endpoint) -> bool {
    // Addresses after the first that has one matter only when that one goes, which computes this again.
    endpoint.pod.as_ref().is_some_and(|pod| reader.has_pod(pod))
        || endpoint.addresses.iter().any(|address| reader.has_pod_at(*address))
}

/// Whether `pod` is behind an endpoint, as [`has_pod`].
fn is_pod(reader: &Reader<'_>, endpoint: &Endpoint, pod: &Pod) -> bool {
    match &endpoint.pod {
        Some(named) if *named == pod.meta.id => true,
        Some(named) if reader.has_pod(named) => false,
        _ => is_addressable(pod) && endpoint.addresses.iter().any(|address| pod.addresses.contains(address)),
    }
}

fn workload(
    reader: &Reader<'_>,
    slice: &EndpointSlice,
    endpoint: &Endpoint,
    address: &str,
    services: Memberships,
) -> api::Workload {
    let network = workloads::network(reader, &slice.id.namespace, None);
    let zone = (!endpoint.zone.is_empty())
        .then(|| api::Locality { zone: endpoint.zone.to_string(), ..api::Locality::default() });
    api::Workload {
        name: format!("{}-{address}", slice.service),
        namespace: slice.id.namespace.to_string(),
        addresses: endpoint.addresses.iter().map(|a| wire::octets(*a)).collect(),
        network: network.to_string(),
        network_mode: api::NetworkMode::HostNetwork as i32,
        node: endpoint.node.to_string(),
        canonical_name: slice.service.to_string(),
        canonical_revision: "latest".to_owned(),
        workload_type: api::WorkloadType::Pod as i32,
        workload_name: slice.service.to_string(),
        status: workloads::status(endpoint.ready) as i32,
        serving_while_terminating: endpoint.serving_while_terminating,
        cluster_id: reader.settings.cluster_id.to_string(),
        uid: format!("{}/{address}", wire::uid(reader.settings, Kind::EndpointSlice, &slice.id)),
        services,
        locality: workloads::locality(reader, &endpoint.node).or(zone),
        ..api::Workload::default()
    }
}

/// The slices of services without selector that have an endpoint with this pod behind it.
pub(in crate::index) fn slices_of_pod<'a>(reader: &Reader<'a>, pod: &Pod) -> Vec<&'a Arc<EndpointSlice>> {
    let named = reader.store.slices_by_pod.of(&pod.meta.id);
    let addresses = pod.addresses.iter().filter(|_| is_addressable(pod));
    let addressed = addresses.flat_map(|address| reader.store.slices_by_address.of(address));
    let mut ids: Vec<&NamespacedName> = named.chain(addressed).collect();
    ids.sort();
    ids.dedup();
    let slices = ids.into_iter().filter_map(|id| reader.store.slices.get(id));
    let without_selector = slices.filter(|slice| service_without_selector(reader, slice).is_some());
    without_selector
        .filter(|slice| slice.endpoints.iter().any(|endpoint| is_pod(reader, endpoint, pod)))
        .collect()
}

fn service_without_selector<'a>(reader: &Reader<'a>, slice: &EndpointSlice) -> Option<&'a Service> {
    let service = reader.store.services.get(&service_of(slice))?;
    (service.selector.is_none() && !service.external_name).then_some(service)
}

/// Adds the slice's service, if it has no selector, with the ports that the slice gives it.
pub(in crate::index) fn join_slice(reader: &Reader<'_>, services: &mut Memberships, slice: &EndpointSlice) {
    let Some(service) = service_without_selector(reader, slice) else { return };
    workloads::join(reader, services, service, |transport, port| {
        let mut ports = slice.ports.iter().filter(|(_, _, own)| *own == transport);
        ports.find(|(name, ..)| *name == port.name).map(|(_, number, _)| *number)
    });
}
