//! Endpoints of services without selector: pods that a slice names, and addresses with no pod behind them.

use std::sync::Arc;

use ambit_api::workload as api;

use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::store::service_of;
use super::wire;
use super::workloads::{self, Memberships};
use crate::object::{Endpoint, EndpointSlice, Kind, NamespacedName, Pod};

/// The workloads of a slice's endpoints that have no pod behind them.
pub(super) fn of_slice(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(slice) = reader.store.slices.get(id) else { return Vec::new() };
    let mut services = Memberships::new();
    join_slice(reader, &mut services, slice);
    if services.is_empty() {
        return Vec::new();
    }
    let strangers = slice.endpoints.iter().filter(|endpoint| !has_pod(reader, endpoint));
    let mut resources: Vec<(ResourceType, Resource)> = Vec::new();
    for endpoint in strangers {
        let Some(first) = endpoint.addresses.first() else { continue };
        let message = workload(reader, slice, endpoint, &first.to_string(), services.clone());
        // A slice that lists an address twice has one workload there.
        if !resources.iter().any(|(_, resource)| *resource.name == *message.uid) {
            resources.push(wire::workload_resource(message, &endpoint.addresses));
        }
    }
    resources
}

fn has_pod(reader: &Reader<'_>, endpoint: &Endpoint) -> bool {
    match &endpoint.pod {
        Some(pod) => reader.has_pod(pod),
        // Those after the first that has one matter only when that one goes, which computes this again.
        None => endpoint.addresses.iter().any(|address| reader.has_pod_at(*address)),
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
        trust_domain: reader.settings.trust_domain.to_string(),
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

/// The slices with an endpoint that is this pod.
pub(super) fn slices_of_pod<'a>(reader: &Reader<'a>, pod: &Pod) -> Vec<&'a Arc<EndpointSlice>> {
    let named = reader.store.slices_by_pod.of(&pod.meta.id);
    let addresses = pod.addresses.iter().filter(|_| super::store::is_addressable(pod));
    let addressed = addresses.flat_map(|address| reader.store.slices_by_address.of(address));
    let mut ids: Vec<&NamespacedName> = named.chain(addressed).collect();
    ids.sort();
    ids.dedup();
    ids.into_iter().filter_map(|id| reader.store.slices.get(id)).collect()
}

/// Adds the slice's service, if it has no selector, with the ports that the slice gives it.
pub(super) fn join_slice(reader: &Reader<'_>, services: &mut Memberships, slice: &EndpointSlice) {
    let service = reader.store.services.get(&service_of(slice));
    let Some(service) = service.filter(|s| s.selector.is_none() && !s.external_name) else { return };
    workloads::join(reader, services, service, |port| {
        slice.ports.iter().find(|(name, _)| *name == port.name).map(|(_, number)| *number)
    });
}
