//! Names and encodings that several kinds of resources share (xDS contract).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::l7;
use ambit_api::ports::INBOUND_HBONE;
use ambit_api::workload::{self as api, address, gateway_address};
use bytes::Bytes;
use ipnet::IpNet;
use prost::Message;

use super::Settings;
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::workloads::Memberships;
use crate::object::{AppProtocol, IpFamilies, Kind, Labels, Meta, NamespacedName};

/// Extension of a service with `sessionAffinity: ClientIP`; its value is a `UInt32Value`, the timeout in seconds.
pub(in crate::index) const SESSION_AFFINITY: &str = "ambit.dev/session-affinity";

/// Extension of a service with a wildcard host whose waypoint resolves what clients ask for.
pub(in crate::index) const DYNAMIC_HOST: &str = "ambit.dev/dynamic-host";

/// Extension of what may be reached directly when its waypoint cannot be.
pub(in crate::index) const WAYPOINT_FAILURE_OPEN: &str = "ambit.dev/waypoint-failure-open";

/// `<cluster>/<group>/<kind>/<namespace>/<name>`
pub(in crate::index) fn uid(settings: &Settings, kind: Kind, id: &NamespacedName) -> String {
    match kind {
        Kind::Pod => format!("{}//Pod/{}/{}", settings.cluster_id, id.namespace, id.name),
        _ => format!("{}/{}/{kind}/{}/{}", settings.cluster_id, kind.group(), id.namespace, id.name),
    }
}

/// When an object was created, in seconds since the epoch; 0 if that is not known.
pub(in crate::index) fn created(meta: &Meta) -> i64 {
    meta.created.unwrap_or_default()
}

/// The octets of an address.
pub(in crate::index) fn octets(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(v4) => Bytes::copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => Bytes::copy_from_slice(&v6.octets()),
    }
}

/// An address in a network.
pub(in crate::index) fn network_address(network: &str, address: IpAddr) -> api::NetworkAddress {
    api::NetworkAddress { network: network.to_owned(), address: octets(address), length: None }
}

/// A block of addresses in a network; one of a single address is that address.
pub(in crate::index) fn network_block(network: &str, block: IpNet) -> api::NetworkAddress {
    let length = (block.prefix_len() != block.max_prefix_len()).then(|| u32::from(block.prefix_len()));
    api::NetworkAddress { network: network.to_owned(), address: octets(block.network()), length }
}

/// A gateway reached by name.
pub(in crate::index) fn gateway_hostname(namespace: &str, hostname: &str) -> api::GatewayAddress {
    let host = api::NamespacedHostname { namespace: namespace.to_owned(), hostname: hostname.to_owned() };
    api::GatewayAddress {
        destination: Some(gateway_address::Destination::Hostname(host)),
        hbone_mtls_port: INBOUND_HBONE.into(),
    }
}

/// A gateway reached at an address.
pub(in crate::index) fn gateway_at(network: &str, address: IpAddr) -> api::GatewayAddress {
    api::GatewayAddress {
        destination: Some(gateway_address::Destination::Address(network_address(network, address))),
        hbone_mtls_port: INBOUND_HBONE.into(),
    }
}

/// An extension that says something by being there.
pub(in crate::index) fn marker(name: &str) -> api::Extension {
    extension(name, "type.googleapis.com/google.protobuf.Empty", Vec::new())
}

/// An extension with a number.
pub(in crate::index) fn number(name: &str, value: u32) -> api::Extension {
    // Encoded as google.protobuf.UInt32Value, which prost maps to u32.
    extension(name, "type.googleapis.com/google.protobuf.UInt32Value", value.encode_to_vec())
}

/// The labels of an endpoint of `services` that subsets of DestinationRules select by.
pub(in crate::index) fn subset_labels(
    reader: &Reader<'_>,
    services: &Memberships,
    labels: &Labels,
) -> Option<api::Extension> {
    let store = reader.store;
    if store.destination_rules.is_empty() || labels.is_empty() {
        return None;
    }
    let mut selected = BTreeMap::new();
    for (namespace, host) in services.keys().filter_map(|service| service.split_once('/')) {
        for id in store.destination_rules_by_host.of(&Arc::from(host)) {
            // Others have no effect at waypoints, and show nothing of what they name.
            if *id.namespace != *namespace && id.namespace != reader.settings.root_namespace {
                continue;
            }
            let Some(rule) = store.destination_rules.get(id) else { continue };
            for key in rule.label_keys() {
                if let Some(value) = labels.get(key) {
                    selected.insert(key.to_owned(), value.to_owned());
                }
            }
        }
    }
    let labels = l7::WorkloadLabels { labels: selected };
    let encode =
        || extension(ambit_api::LABELS_EXTENSION, ambit_api::LABELS_TYPE_URL, labels.encode_to_vec());
    (!labels.labels.is_empty()).then(encode)
}

fn extension(name: &str, type_url: &str, value: Vec<u8>) -> api::Extension {
    let config = prost_types::Any { type_url: type_url.to_owned(), value };
    api::Extension { name: name.to_owned(), config: Some(config) }
}

/// A declared protocol on the wire.
pub(in crate::index) fn app_protocol(protocol: AppProtocol) -> api::AppProtocol {
    match protocol {
        AppProtocol::Unknown => api::AppProtocol::Unknown,
        AppProtocol::Http11 => api::AppProtocol::Http11,
        AppProtocol::Http2 => api::AppProtocol::Http2,
        AppProtocol::Grpc => api::AppProtocol::Grpc,
        AppProtocol::Tcp => api::AppProtocol::Tcp,
        AppProtocol::Tls => api::AppProtocol::Tls,
    }
}

/// Address families on the wire.
pub(in crate::index) fn families(families: IpFamilies) -> api::IpFamilies {
    match families {
        IpFamilies::Automatic => api::IpFamilies::Automatic,
        IpFamilies::V4 => api::IpFamilies::Ipv4Only,
        IpFamilies::V6 => api::IpFamilies::Ipv6Only,
        IpFamilies::Dual => api::IpFamilies::Dual,
    }
}

/// The resource of a workload: named by its uid, also asked for by its addresses, brought along by its services.
pub(in crate::index) fn workload_resource(
    workload: api::Workload,
    addresses: &[IpAddr],
) -> (ResourceType, Resource) {
    let name: Arc<str> = workload.uid.as_str().into();
    let aliases = addresses.iter().map(|address| format!("{}/{address}", workload.network).into()).collect();
    let parents = workload.services.keys().map(|service| service.as_str().into()).collect();
    let unhealthy = workload.status == api::WorkloadStatus::Unhealthy as i32;
    let body = encode(address::Type::Workload(workload));
    (ResourceType::Address, Resource { name, aliases, parents, body, unhealthy })
}

/// The resource of a service: named `<namespace>/<hostname>`, also asked for by its single addresses.
pub(in crate::index) fn service_resource(
    service: api::Service,
    addresses: &[IpNet],
    parents: Vec<Arc<str>>,
) -> (ResourceType, Resource) {
    let name = format!("{}/{}", service.namespace, service.hostname).into();
    let network = service.addresses.first().map(|a| a.network.clone()).unwrap_or_default();
    let single = addresses.iter().filter(|block| block.prefix_len() == block.max_prefix_len());
    let aliases = single.map(|block| format!("{network}/{}", block.addr()).into()).collect();
    let body = encode(address::Type::Service(service));
    (ResourceType::Address, Resource { name, aliases, parents, body, unhealthy: false })
}

fn encode(kind: address::Type) -> Bytes {
    api::Address { r#type: Some(kind) }.encode_to_vec().into()
}
