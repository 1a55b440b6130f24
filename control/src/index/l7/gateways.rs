//! Gateways that the mesh runs as resources: what a waypoint or gateway must know of itself.

use ambit_api::l7;
use prost::Message;

use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::virtual_services::HONOURED;
use super::{Finding, l4, listener_sets, listeners, telemetry, views};
use crate::object::{AddressValue, Gateway, Kind, NamespacedName};

/// The resources of a waypoint or gateway.
pub(in crate::index) fn of_gateway(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(gateway) = reader.gateway(id) else { return Vec::new() };
    if !reader.settings.runs(&gateway.class) {
        return Vec::new();
    }
    let is_waypoint = reader.settings.waypoint_classes.contains(&gateway.class);
    // Services are bound to addresses of waypoints only.
    let addresses = if is_waypoint { &gateway.addresses[..] } else { &[] };
    let network = gateway.network.as_ref().unwrap_or(&reader.settings.network);
    let address = |address: &AddressValue| match address {
        AddressValue::Ip(ip) => l7::GatewayAddress {
            network: network.to_string(),
            ip: l4::wire::octets(*ip),
            ..l7::GatewayAddress::default()
        },
        AddressValue::Hostname(host) => {
            let (hostname, namespace) = (host.to_string(), id.namespace.to_string());
            l7::GatewayAddress { hostname, namespace, ..l7::GatewayAddress::default() }
        }
    };
    let (telemetry, service_telemetries) = telemetry::of_gateway(reader, gateway);
    let shown = (!is_waypoint).then(|| listeners::client_key_pair(reader, gateway)).flatten();
    let message = l7::Gateway {
        object: Some(object_name(Kind::Gateway, id)),
        addresses: addresses.iter().map(address).collect(),
        forwards_client_identity: gateway.forwards_client_identity,
        client_key_pair: shown.as_ref().map(|pair| pair.name.to_string()).unwrap_or_default(),
        session_key: reader.session_key(id).into(),
        trusted_proxies: (!is_waypoint).then(|| trusted_proxies(reader, gateway)),
        trusted_forwarders: if is_waypoint { trusted_forwarders(reader, gateway) } else { Vec::new() },
        telemetry,
        service_telemetries,
    };
    let resource = Resource {
        name: id.to_string().into(),
        aliases: Vec::new(),
        parents: vec![views::root(id)],
        body: message.encode_to_vec().into(),
        unhealthy: false,
    };
    let listeners = match is_waypoint {
        true => Vec::new(),
        false => {
            listener_sets::report(reader, gateway);
            let conflicts = listeners::conflicts(&gateway.listeners);
            listeners::of_owner(reader, listeners::Owner::gateway(gateway), conflicts)
        }
    };
    // A listener may have the same one.
    let is_known = |pair: &Resource| listeners.iter().any(|(_, known)| known.name == pair.name);
    let shown = shown.filter(|pair| !is_known(pair)).map(|pair| (ResourceType::KeyPair, pair));
    std::iter::once((ResourceType::Gateway, resource)).chain(shown).chain(listeners).collect()
}

/// The proxies in front of a gateway that are believed; nobody where what its annotations say can't be read.
fn trusted_proxies(reader: &Reader<'_>, gateway: &Gateway) -> l7::TrustedProxies {
    match &gateway.topology {
        Ok(topology) => topology.within(&reader.settings.gateway_topology),
        Err(problem) => {
            let message = format!("{problem}: no proxy in front of the gateway is believed");
            reader.find(Finding::new(HONOURED, false, "InvalidParameters", message));
            l7::TrustedProxies::default()
        }
    }
}

/// The identities of the gateways that a waypoint believes about their clients.
fn trusted_forwarders(reader: &Reader<'_>, waypoint: &Gateway) -> Vec<String> {
    let identity = |name: &NamespacedName| {
        let gateway = reader.gateway(name);
        if !gateway.is_some_and(|it| reader.settings.gateway_classes.contains(&it.class)) {
            let message =
                format!("ambit.dev/trusted-gateways: {name} is no Gateway for clients outside the mesh");
            reader.find(Finding::new(HONOURED, false, "NoEffect", message));
            return None;
        }
        let trust_domain = &reader.settings.trust_domain;
        Some(format!("spiffe://{trust_domain}/ns/{}/sa/{}", name.namespace, name.name))
    };
    waypoint.trusted_gateways.iter().filter_map(identity).collect()
}

/// An object as messages name it.
pub(in crate::index) fn object_name(kind: Kind, id: &NamespacedName) -> l7::ObjectName {
    l7::ObjectName {
        kind: kind.as_str().to_owned(),
        namespace: id.namespace.to_string(),
        name: id.name.to_string(),
    }
}
