//! EndpointSlices: who is behind a service that has no selector.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::discovery::v1;

use super::NamespacedName;
use super::meta::{Invalid, labels, namespaced};
use super::service::Transport;

/// One endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its addresses; all reach the same endpoint.
    pub addresses: Vec<IpAddr>,
    /// The pod behind it.
    pub pod: Option<NamespacedName>,
    /// Takes new connections: ready and not terminating.
    pub ready: bool,
    /// Is terminating and still passes its readiness probe.
    pub serving_while_terminating: bool,
    /// The node that it is on, empty if unknown.
    pub node: Arc<str>,
    /// The zone that it is in, empty if unknown.
    pub zone: Arc<str>,
}

/// A part of a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Namespace and name.
    pub id: NamespacedName,
    /// The service, in the same namespace.
    pub service: Arc<str>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Port numbers by the name of the service's port, with what they take.
    pub ports: Vec<(Arc<str>, u16, Transport)>,
}

impl TryFrom<v1::EndpointSlice> for EndpointSlice {
    type Error = Invalid;

    fn try_from(object: v1::EndpointSlice) -> Result<EndpointSlice, Invalid> {
        let id = namespaced(&object.metadata)?;
        let service = labels(&object.metadata).get("kubernetes.io/service-name").unwrap_or_default().into();
        let mut endpoints = Vec::new();
        // Names in DNS are not endpoints of the mesh.
        if object.address_type != "FQDN" {
            for (i, endpoint) in object.endpoints.into_iter().enumerate() {
                endpoints.push(read_endpoint(endpoint, &id, i)?);
            }
        }
        let ports = object.ports.into_iter().flatten();
        let ports = ports.filter_map(|port| {
            let transport = Transport::of_port(port.protocol.as_deref())?;
            Some((port.name.unwrap_or_default().into(), u16::try_from(port.port?).ok()?, transport))
        });
        Ok(EndpointSlice { ports: ports.collect(), id, service, endpoints })
    }
}

fn read_endpoint(endpoint: v1::Endpoint, slice: &NamespacedName, i: usize) -> Result<Endpoint, Invalid> {
    let mut addresses = Vec::new();
    for text in &endpoint.addresses {
        let field = format!("endpoints[{i}].addresses");
        addresses.push(text.parse().map_err(|_| Invalid::new(field, format!("{text:?} is no IP address")))?);
    }
    let target = endpoint.target_ref.filter(|t| t.kind.as_deref() == Some("Pod"));
    let pod = target.and_then(|t| {
        let namespace = t.namespace.map_or_else(|| slice.namespace.clone(), Arc::from);
        Some(NamespacedName::new(namespace, t.name?))
    });
    let conditions = endpoint.conditions.unwrap_or_default();
    let terminating = conditions.terminating.unwrap_or(false);
    // discovery/v1: an unknown `ready` means ready, an unknown `serving` is as `ready`.
    let ready = conditions.ready.unwrap_or(true);
    Ok(Endpoint {
        addresses,
        pod,
        ready: ready && !terminating,
        serving_while_terminating: terminating && conditions.serving.unwrap_or(ready),
        node: endpoint.node_name.unwrap_or_default().into(),
        zone: endpoint.zone.unwrap_or_default().into(),
    })
}
