//! Listeners of gateways as resources, and what their statuses say.

use std::sync::Arc;

use ambit_api::{l7, ports};
use prost::Message;

use super::gateways::object_name;
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, ListenerFacts, attachment, views};
use crate::object::{
    CertificateRef, Gateway, Kind, Listener, ListenerProtocol, NamespacedName, ObjectRef, Route, TargetKind,
};

/// Ports of the program itself.
const OWN_PORTS: [u16; 4] = [ports::ADMIN, ports::INBOUND_HBONE, ports::METRICS, ports::READINESS];

/// A condition that a listener meets, or does not.
struct Condition {
    name: &'static str,
    met: bool,
    reason: &'static str,
    message: String,
}

impl Condition {
    fn new(name: &'static str, met: bool, reason: &'static str, message: impl Into<String>) -> Condition {
        Condition { name, met, reason, message: message.into() }
    }
}

/// The name of a listener's resource.
pub(super) fn resource_name(gateway: &NamespacedName, listener: &Listener) -> String {
    format!("{gateway}/{}", listener.name)
}

/// The resources of the listeners that are served; reports how each stands.
pub(super) fn of_gateway(reader: &Reader<'_>, gateway: &Gateway) -> Vec<(ResourceType, Resource)> {
    let mut resources = Vec::new();
    let routes: Vec<&Route> = routes_of(reader, &gateway.meta.id);
    for (at, listener) in gateway.listeners.iter().enumerate() {
        let (kinds, unknown) = kinds(listener);
        let certificates = certificates(reader, gateway, listener);
        let refs = resolved(unknown, certificates.iter().find_map(|found| found.as_ref().err()));
        let key_pairs: Vec<Resource> = certificates.into_iter().filter_map(Result::ok).collect();
        let conflict = conflict(&gateway.listeners, at);
        let accepted = accepted(listener, conflict.as_ref());
        let has_certificate = !ends_tls(listener) || !key_pairs.is_empty();
        let is_served = accepted.met && !kinds.is_empty() && has_certificate;
        if is_served && let Some(resource) = resource(gateway, listener, &key_pairs) {
            resources.push((ResourceType::Listener, resource));
            // Several listeners may have the same one.
            let is_new = |new: &Resource| {
                let of_pairs = resources.iter().filter(|(kind, _)| *kind == ResourceType::KeyPair);
                of_pairs.into_iter().all(|(_, known)| known.name != new.name)
            };
            let new: Vec<Resource> = key_pairs.into_iter().filter(is_new).collect();
            resources.extend(new.into_iter().map(|resource| (ResourceType::KeyPair, resource)));
        }
        let programmed = match is_served {
            true => Condition::new("Programmed", true, "Programmed", "the gateway serves it"),
            false => Condition::new("Programmed", false, "Invalid", "it is not served"),
        };
        let attached = routes.iter().filter(|route| is_attached(reader, gateway, listener, route)).count();
        let facts = ListenerFacts { name: listener.name.clone(), kinds, attached };
        for Condition { name, met, reason, message } in
            [accepted, refs, programmed].into_iter().chain(conflict)
        {
            let message = match met && name != "Conflicted" {
                true => message,
                false => format!("listener {}: {message}", listener.name),
            };
            let finding = Finding::new(name, met, reason, message);
            reader.find(Finding { listener: Some(facts.clone()), ..finding });
        }
    }
    resources
}

fn routes_of<'a>(reader: &Reader<'a>, gateway: &NamespacedName) -> Vec<&'a Route> {
    let gateway = ObjectRef { kind: Kind::Gateway, name: gateway.clone() };
    reader.routes_of(&gateway).collect()
}

fn is_attached(reader: &Reader<'_>, gateway: &Gateway, listener: &Listener, route: &Route) -> bool {
    let parents = route
        .parents
        .iter()
        .filter(|parent| parent.kind == TargetKind::Gateway && parent.name == gateway.meta.id);
    let mut attached = parents.filter_map(|parent| attachment::attach(reader, gateway, route, parent).ok());
    attached.any(|attached| attached.iter().any(|attached| attached.listener.name == listener.name))
}

/// The kinds of routes that can be attached to a listener, and the first of those that it names that can't.
pub(super) fn kinds(listener: &Listener) -> (Vec<Kind>, Option<&Arc<str>>) {
    let fitting: &[Kind] = match listener.protocol {
        ListenerProtocol::Http | ListenerProtocol::Https => &[Kind::HttpRoute, Kind::GrpcRoute],
        ListenerProtocol::Tls if ends_tls(listener) => &[Kind::TlsRoute, Kind::TcpRoute],
        ListenerProtocol::Tls => &[Kind::TlsRoute],
        ListenerProtocol::Tcp => &[Kind::TcpRoute],
        ListenerProtocol::Hbone | ListenerProtocol::Other(_) => &[],
    };
    if listener.kinds.is_empty() {
        return (fitting.to_vec(), None);
    }
    let fits = |(group, name): &(Arc<str>, Arc<str>)| {
        fitting.iter().copied().find(|kind| kind.group() == &**group && kind.as_str() == &**name)
    };
    let unknown = listener.kinds.iter().find(|kind| fits(kind).is_none()).map(|(_, name)| name);
    (listener.kinds.iter().filter_map(fits).collect(), unknown)
}

fn resolved(unknown_kind: Option<&Arc<str>>, fault: Option<&Fault>) -> Condition {
    match (unknown_kind, fault) {
        (Some(kind), _) => {
            let message = format!("routes of kind {kind} can't be attached to it");
            Condition::new("ResolvedRefs", false, "InvalidRouteKinds", message)
        }
        (None, Some(Fault(reason, message))) => {
            Condition::new("ResolvedRefs", false, reason, message.clone())
        }
        (None, None) => Condition::new("ResolvedRefs", true, "ResolvedRefs", "every reference is known"),
    }
}

fn accepted(listener: &Listener, conflict: Option<&Condition>) -> Condition {
    let no = |reason, message: String| Condition::new("Accepted", false, reason, message);
    match &listener.protocol {
        ListenerProtocol::Http | ListenerProtocol::Tls | ListenerProtocol::Tcp => {}
        ListenerProtocol::Https if ends_tls(listener) => {}
        ListenerProtocol::Https => {
            return no("UnsupportedProtocol", "TLS of protocol HTTPS can't be passed through".into());
        }
        ListenerProtocol::Hbone => {
            return no("UnsupportedProtocol", "protocol HBONE is for waypoints".into());
        }
        ListenerProtocol::Other(name) => {
            return no("UnsupportedProtocol", format!("protocol {name} is not supported"));
        }
    }
    if OWN_PORTS.contains(&listener.port) {
        return no("PortUnavailable", format!("port {} is one of the gateway's own", listener.port));
    }
    match conflict {
        Some(Condition { reason, message, .. }) => no(reason, message.clone()),
        None => Condition::new("Accepted", true, "Accepted", "it can be served"),
    }
}

/// What keeps a listener from standing beside another one of its Gateway. Neither is served then, as Gateway API demands.
fn conflict(listeners: &[Listener], at: usize) -> Option<Condition> {
    let own = listeners.get(at)?;
    let others = listeners.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, other)| other);
    let on_port = others.filter(|other| other.port == own.port);
    for other in on_port {
        let reason = match (layer(&own.protocol), layer(&other.protocol)) {
            (one, another) if one != another => "ProtocolConflict",
            (Layer::Plain, _) => "ProtocolConflict",
            _ if own.hostname == other.hostname => "HostnameConflict",
            _ => continue,
        };
        let message = format!("listener {} is in the way on port {}", other.name, own.port);
        return Some(Condition::new("Conflicted", true, reason, message));
    }
    None
}

/// What listeners of one port must have in common.
#[derive(PartialEq)]
enum Layer {
    /// Distinguished by the host of each request.
    Requests,
    /// Distinguished by the name that TLS asks for.
    Encrypted,
    /// Not distinguished.
    Plain,
}

fn layer(protocol: &ListenerProtocol) -> Layer {
    match protocol {
        ListenerProtocol::Http => Layer::Requests,
        ListenerProtocol::Https | ListenerProtocol::Tls => Layer::Encrypted,
        ListenerProtocol::Tcp | ListenerProtocol::Hbone | ListenerProtocol::Other(_) => Layer::Plain,
    }
}

/// Why a certificate can't be used: a reason of Gateway API, and one sentence.
struct Fault(&'static str, String);

/// Whether TLS ends at a listener.
fn ends_tls(listener: &Listener) -> bool {
    let passes = listener.tls.as_ref().is_some_and(|tls| tls.passthrough);
    matches!(listener.protocol, ListenerProtocol::Https | ListenerProtocol::Tls) && !passes
}

/// The certificates that TLS ends with at a listener, each as a resource of its gateway alone.
fn certificates(reader: &Reader<'_>, gateway: &Gateway, listener: &Listener) -> Vec<Result<Resource, Fault>> {
    if !ends_tls(listener) {
        return Vec::new();
    }
    let references = listener.tls.as_ref().map(|tls| &tls.certificates[..]).unwrap_or_default();
    if references.is_empty() {
        return vec![Err(Fault("InvalidCertificateRef", "it has no tls.certificateRefs".to_owned()))];
    }
    references.iter().map(|reference| key_pair(reader, gateway, reference)).collect()
}

fn key_pair(reader: &Reader<'_>, gateway: &Gateway, reference: &CertificateRef) -> Result<Resource, Fault> {
    let CertificateRef { is_secret, kind_name, name } = reference;
    let invalid = |message: String| Err(Fault("InvalidCertificateRef", message));
    if !is_secret {
        return invalid(format!("certificates are read from Secrets, not from {kind_name} {name}"));
    }
    let own = &gateway.meta.id;
    let secret = ObjectRef { kind: Kind::Secret, name: name.clone() };
    // Whether it exists is said only to who may refer to it.
    if name.namespace != own.namespace && !reader.is_granted(Kind::Gateway, &own.namespace, &secret) {
        let message = format!("no ReferenceGrant allows a reference to Secret {name}");
        return Err(Fault("RefNotPermitted", message));
    }
    let Some(secret) = reader.secret(name) else {
        return invalid(format!("there is no Secret {name} of type kubernetes.io/tls"));
    };
    let pair = match &secret.key_pair {
        Ok(pair) => pair,
        Err(reason) => return invalid(format!("Secret {name} {reason}")),
    };
    let message = l7::KeyPair {
        object: Some(object_name(Kind::Secret, name)),
        certificates: pair.certificates.to_vec().into(),
        private_key: pair.private_key.to_vec().into(),
    };
    Ok(Resource {
        name: format!("{own}/{name}").into(),
        aliases: Vec::new(),
        parents: vec![views::root(own)],
        body: message.encode_to_vec().into(),
        unhealthy: false,
    })
}

fn resource(gateway: &Gateway, listener: &Listener, key_pairs: &[Resource]) -> Option<Resource> {
    let protocol = match listener.protocol {
        ListenerProtocol::Http => l7::ListenerProtocol::HttpListener,
        ListenerProtocol::Https => l7::ListenerProtocol::HttpsListener,
        ListenerProtocol::Tls => l7::ListenerProtocol::TlsListener,
        ListenerProtocol::Tcp => l7::ListenerProtocol::TcpListener,
        ListenerProtocol::Hbone | ListenerProtocol::Other(_) => return None,
    };
    let id = &gateway.meta.id;
    let message = l7::Listener {
        object: Some(object_name(Kind::Gateway, id)),
        gateway: id.to_string(),
        port: listener.port.into(),
        protocol: protocol.into(),
        hostname: listener.hostname.as_deref().unwrap_or_default().to_owned(),
        tls: (layer(&listener.protocol) == Layer::Encrypted).then(|| l7::ListenerTls {
            passthrough: !ends_tls(listener),
            key_pairs: key_pairs.iter().map(|pair| pair.name.to_string()).collect(),
        }),
    };
    Some(Resource {
        name: resource_name(id, listener).into(),
        aliases: Vec::new(),
        parents: vec![views::root(id)],
        body: message.encode_to_vec().into(),
        unhealthy: false,
    })
}
