//! Listeners of gateways as resources, and what their statuses say: those of Gateways, and those that ListenerSets add.

use std::sync::Arc;

use ambit_api::{l7, ports};
use prost::Message;

use super::gateways::object_name;
use super::listener_filters::{self, Unresolved};
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, ListenerFacts, attachment, backend_tls, views};
use crate::object::{
    CertificateRef, Gateway, Ingress, Kind, Listener, ListenerProtocol, ListenerSet, ObjectRef, ParentRef,
    RootsRef, Route, TargetKind, Transport,
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

/// The listeners of a Gateway itself, or those that a ListenerSet or Ingress adds to it.
#[derive(Clone, Copy)]
pub(super) struct Owner<'o> {
    pub(super) gateway: &'o Gateway,
    added: Added<'o>,
}

/// What adds listeners.
#[derive(Clone, Copy)]
enum Added<'o> {
    None,
    Set(&'o ListenerSet),
    Ingress(&'o Ingress),
}

impl<'o> Owner<'o> {
    pub(super) fn gateway(gateway: &'o Gateway) -> Self {
        Self { gateway, added: Added::None }
    }

    pub(super) fn set(gateway: &'o Gateway, set: &'o ListenerSet) -> Self {
        Self { gateway, added: Added::Set(set) }
    }

    pub(super) fn ingress(gateway: &'o Gateway, ingress: &'o Ingress) -> Self {
        Self { gateway, added: Added::Ingress(ingress) }
    }

    /// The object that has the listeners.
    pub(super) fn object(self) -> ObjectRef {
        let (kind, name) = match self.added {
            Added::None => (Kind::Gateway, &self.gateway.meta.id),
            Added::Set(set) => (Kind::ListenerSet, &set.meta.id),
            Added::Ingress(ingress) => (Kind::Ingress, &ingress.meta.id),
        };
        ObjectRef { kind, name: name.clone() }
    }

    pub(super) fn listeners(self) -> &'o [Listener] {
        match self.added {
            Added::None => &self.gateway.listeners,
            Added::Set(set) => &set.listeners,
            Added::Ingress(ingress) => &ingress.listeners,
        }
    }

    pub(super) fn namespace(self) -> &'o Arc<str> {
        match self.added {
            Added::None => &self.gateway.meta.id.namespace,
            Added::Set(set) => &set.meta.id.namespace,
            Added::Ingress(ingress) => &ingress.meta.id.namespace,
        }
    }

    /// Whether a route means this object by a parent reference.
    fn is_parent(self, parent: &ParentRef) -> bool {
        match self.added {
            Added::None => parent.kind == TargetKind::Gateway && parent.name == self.gateway.meta.id,
            Added::Set(set) => parent.kind == TargetKind::ListenerSet && parent.name == set.meta.id,
            Added::Ingress(_) => false,
        }
    }

    /// What the names of its resources begin with.
    fn prefix(self) -> String {
        let gateway = &self.gateway.meta.id;
        match self.added {
            Added::None => gateway.to_string(),
            Added::Set(set) => format!("{gateway}/{}", set.meta.id),
            Added::Ingress(ingress) => format!("{gateway}/{}/{}", Kind::Ingress, ingress.meta.id),
        }
    }

    /// The name of a listener's resource.
    pub(super) fn resource_name(self, listener: &Listener) -> String {
        format!("{}/{}", self.prefix(), listener.name)
    }
}

/// What stands against a listener beside others: the reason, and one sentence.
pub(super) struct Conflict(&'static str, String);

/// The resources of the listeners that are served; reports how each stands. `conflicts` has what is in the way of each.
pub(super) fn of_owner(
    reader: &Reader<'_>,
    owner: Owner<'_>,
    conflicts: Vec<Option<Conflict>>,
) -> Vec<(ResourceType, Resource)> {
    let mut resources = Vec::new();
    let routes: Vec<&Route> = reader.routes_of(&owner.object()).collect();
    for (listener, conflict) in owner.listeners().iter().zip(conflicts) {
        let (kinds, unknown) = kinds(listener);
        let certificates = certificates(reader, owner, listener);
        let validation = client_validation(reader, owner.gateway, listener);
        let of_validation = validation.as_ref().and_then(|validation| validation.fault.as_ref());
        let of_certificates = certificates.iter().find_map(|found| found.as_ref().err());
        let (authorizers, of_filters) = listener_filters::authorizers(reader, owner, listener);
        let of_filters = of_filters.map(|Unresolved(reason, message)| Fault(reason, message));
        let fault = of_validation.or(of_certificates).or(of_filters.as_ref());
        let refs = resolved(unknown, fault);
        let key_pairs: Vec<Resource> = certificates.into_iter().filter_map(Result::ok).collect();
        let conflict =
            conflict.map(|Conflict(reason, message)| Condition::new("Conflicted", true, reason, message));
        let accepted = accepted(listener, conflict.as_ref(), validation.as_ref());
        let has_certificate = !ends_tls(listener) || !key_pairs.is_empty();
        let is_served = accepted.met && !kinds.is_empty() && has_certificate;
        if is_served && let Some(resource) = resource(owner, listener, &key_pairs, validation, authorizers) {
            resources.push((ResourceType::Listener, resource));
            // Several listeners may have the same one.
            let is_new = |new: &Resource| {
                let of_pairs = resources.iter().filter(|(kind, _)| *kind == ResourceType::KeyPair);
                of_pairs.into_iter().all(|(_, known)| known.name != new.name)
            };
            let new: Vec<Resource> = key_pairs.into_iter().filter(is_new).collect();
            resources.extend(new.into_iter().map(|resource| (ResourceType::KeyPair, resource)));
        }
        let programmed = match (is_served, &conflict) {
            (true, _) => Condition::new("Programmed", true, "Programmed", "the gateway serves it"),
            (false, Some(conflict)) => {
                Condition::new("Programmed", false, conflict.reason, "it is not served")
            }
            (false, None) => Condition::new("Programmed", false, "Invalid", "it is not served"),
        };
        let attached = routes.iter().filter(|route| is_attached(reader, owner, listener, route)).count();
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

/// The resources of a listener of an Ingress: itself, and its certificate.
///
/// # Errors
/// Why it can't be served.
pub(super) fn served(
    reader: &Reader<'_>,
    owner: Owner<'_>,
    listener: &Listener,
) -> Result<Vec<(ResourceType, Resource)>, String> {
    let validation = client_validation(reader, owner.gateway, listener);
    let accepted = accepted(listener, None, validation.as_ref());
    if !accepted.met {
        return Err(accepted.message);
    }
    let pairs = certificates(reader, owner, listener).into_iter().collect::<Result<Vec<_>, Fault>>();
    let pairs = pairs.map_err(|Fault(_, problem)| problem)?;
    let listener = resource(owner, listener, &pairs, validation, Vec::new());
    let pairs = pairs.into_iter().map(|pair| (ResourceType::KeyPair, pair));
    Ok(listener.into_iter().map(|listener| (ResourceType::Listener, listener)).chain(pairs).collect())
}

/// The ports of the listeners that are served, one for each.
pub(super) fn served_ports(
    reader: &Reader<'_>,
    owner: Owner<'_>,
    conflicts: &[Option<Conflict>],
) -> Vec<(u16, Transport)> {
    let is_served = |(listener, conflict): &(&Listener, &Option<Conflict>)| {
        let can_be = conflict.is_none()
            && accepted(listener, None, client_validation(reader, owner.gateway, listener).as_ref()).met
            && !kinds(listener).0.is_empty();
        can_be && (!ends_tls(listener) || certificates(reader, owner, listener).iter().any(Result::is_ok))
    };
    let served = owner.listeners().iter().zip(conflicts).filter(is_served);
    served.map(|(listener, _)| (listener.port, transport(&listener.protocol))).collect()
}

fn is_attached(reader: &Reader<'_>, owner: Owner<'_>, listener: &Listener, route: &Route) -> bool {
    let parents = route.parents.iter().filter(|parent| owner.is_parent(parent));
    let mut attached = parents.filter_map(|parent| attachment::attach(reader, owner, route, parent).ok());
    attached.any(|attached| attached.iter().any(|attached| attached.listener.name == listener.name))
}

/// The kinds of routes that can be attached to a listener, and the first of those that it names that can't.
pub(super) fn kinds(listener: &Listener) -> (Vec<Kind>, Option<&Arc<str>>) {
    let fitting: &[Kind] = match listener.protocol {
        ListenerProtocol::Http | ListenerProtocol::Https => &[Kind::HttpRoute, Kind::GrpcRoute],
        ListenerProtocol::Tls if ends_tls(listener) => &[Kind::TlsRoute, Kind::TcpRoute],
        ListenerProtocol::Tls => &[Kind::TlsRoute],
        ListenerProtocol::Tcp => &[Kind::TcpRoute],
        ListenerProtocol::Udp => &[Kind::UdpRoute],
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

fn accepted(listener: &Listener, conflict: Option<&Condition>, validation: Option<&Validation>) -> Condition {
    let no = |reason, message: String| Condition::new("Accepted", false, reason, message);
    match &listener.protocol {
        ListenerProtocol::Http | ListenerProtocol::Tls | ListenerProtocol::Tcp | ListenerProtocol::Udp => {}
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
    if let Err(reason) = &listener.filters {
        return no("UnsupportedValue", reason.to_string());
    }
    if transport(&listener.protocol) == Transport::Tcp && OWN_PORTS.contains(&listener.port) {
        return no("PortUnavailable", format!("port {} is one of the gateway's own", listener.port));
    }
    match conflict {
        Some(Condition { reason, message, .. }) => no(reason, message.clone()),
        None if validation.is_some_and(|validation| validation.roots.is_empty()) => {
            no("NoValidCACertificate", "no root for certificates of clients can be used".to_owned())
        }
        None => Condition::new("Accepted", true, "Accepted", "it can be served"),
    }
}

/// What keeps listeners of a Gateway from standing beside each other. Neither of two is served then, as Gateway API demands.
pub(super) fn conflicts(listeners: &[Listener]) -> Vec<Option<Conflict>> {
    let conflict = |(at, own): (usize, &Listener)| {
        let others = listeners.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, other)| other);
        let (reason, other) = others.into_iter().find_map(|other| Some((clash(own, other)?, other)))?;
        let message = format!("listener {} is in the way on port {}", other.name, own.port);
        Some(Conflict(reason, message))
    };
    listeners.iter().enumerate().map(conflict).collect()
}

/// What keeps listeners of a ListenerSet from standing beside those that come before them. Nothing is said of these: they may
/// be others' (Gateway API, `ListenerSetSpec`).
pub(super) fn conflicts_with<'o>(
    before: &mut Vec<&'o Listener>,
    listeners: &'o [Listener],
) -> Vec<Option<Conflict>> {
    let mut conflict = |own: &'o Listener| {
        let Some(reason) = before.iter().find_map(|other| clash(own, other)) else {
            before.push(own);
            return None;
        };
        Some(Conflict(reason, format!("another listener of the Gateway is in the way on port {}", own.port)))
    };
    listeners.iter().map(&mut conflict).collect()
}

/// Why two listeners can't stand beside each other.
pub(super) fn clash(own: &Listener, other: &Listener) -> Option<&'static str> {
    if own.port != other.port || transport(&own.protocol) != transport(&other.protocol) {
        return None;
    }
    match (layer(&own.protocol), layer(&other.protocol)) {
        (one, another) if one != another => Some("ProtocolConflict"),
        (Layer::Plain, _) => Some("ProtocolConflict"),
        _ => (own.hostname == other.hostname).then_some("HostnameConflict"),
    }
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
        ListenerProtocol::Tcp
        | ListenerProtocol::Udp
        | ListenerProtocol::Hbone
        | ListenerProtocol::Other(_) => Layer::Plain,
    }
}

/// What a listener's port takes.
fn transport(protocol: &ListenerProtocol) -> Transport {
    match protocol {
        ListenerProtocol::Udp => Transport::Udp,
        ListenerProtocol::Http
        | ListenerProtocol::Https
        | ListenerProtocol::Tls
        | ListenerProtocol::Tcp
        | ListenerProtocol::Hbone
        | ListenerProtocol::Other(_) => Transport::Tcp,
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
fn certificates(reader: &Reader<'_>, owner: Owner<'_>, listener: &Listener) -> Vec<Result<Resource, Fault>> {
    if !ends_tls(listener) {
        return Vec::new();
    }
    let references = listener.tls.as_ref().map(|tls| &tls.certificates[..]).unwrap_or_default();
    if references.is_empty() {
        return vec![Err(Fault("InvalidCertificateRef", "it has no tls.certificateRefs".to_owned()))];
    }
    references.iter().map(|reference| key_pair(reader, owner, reference)).collect()
}

fn key_pair(reader: &Reader<'_>, owner: Owner<'_>, reference: &CertificateRef) -> Result<Resource, Fault> {
    let CertificateRef { is_secret, kind_name, name } = reference;
    let invalid = |message: String| Err(Fault("InvalidCertificateRef", message));
    if !is_secret {
        return invalid(format!("certificates are read from Secrets, not from {kind_name} {name}"));
    }
    let own = owner.namespace();
    let secret = ObjectRef { kind: Kind::Secret, name: name.clone() };
    // Whether it exists is said only to who may refer to it.
    if name.namespace != *own && !reader.is_granted(owner.object().kind, own, &secret) {
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
        name: format!("{}/{name}", owner.prefix()).into(),
        aliases: Vec::new(),
        parents: vec![views::root(&owner.gateway.meta.id)],
        body: message.encode_to_vec().into(),
        unhealthy: false,
    })
}

/// What is asked of certificates of clients.
struct Validation {
    /// In PEM; empty if none of the references leads to any.
    roots: String,
    allow_insecure_fallback: bool,
    /// What is wrong with a reference.
    fault: Option<Fault>,
}

/// What the Gateway asks of clients of a listener.
fn client_validation(reader: &Reader<'_>, gateway: &Gateway, listener: &Listener) -> Option<Validation> {
    let asked = gateway.tls.validation(listener.port)?;
    if listener.protocol != ListenerProtocol::Https {
        return None;
    }
    let own = &gateway.meta.id.namespace;
    let (mut roots, mut fault) = (String::new(), None);
    for reference in &asked.roots {
        let found = client_roots(reader, own, reference);
        match found {
            Ok(pem) => {
                roots.push_str(pem);
                roots.push('\n');
            }
            Err(problem) => _ = fault.get_or_insert(problem),
        }
    }
    Some(Validation { roots, allow_insecure_fallback: asked.allow_insecure_fallback, fault })
}

/// The roots of clients that a reference of a Gateway in `own` leads to.
fn client_roots<'r>(reader: &Reader<'r>, own: &Arc<str>, reference: &RootsRef) -> Result<&'r str, Fault> {
    let Some(object) = &reference.object else {
        let message =
            format!("roots are read from ConfigMaps and ClusterTrustBundles, not from {}", reference.text);
        return Err(Fault("InvalidCACertificateKind", message));
    };
    let is_foreign = object.kind.is_namespaced() && object.name.namespace != *own;
    if is_foreign && !reader.is_granted(Kind::Gateway, own, object) {
        return Err(Fault("RefNotPermitted", format!("no ReferenceGrant allows a reference to {object}")));
    }
    let invalid = |problem| Fault("InvalidCACertificateRef", format!("{object}: {problem}"));
    backend_tls::roots_in(reader, object).map_err(invalid)
}

/// The key pair that a gateway shows to endpoints, reported with its conditions.
pub(super) fn client_key_pair(reader: &Reader<'_>, gateway: &Gateway) -> Option<Resource> {
    let insecure = "InsecureFrontendValidationMode";
    if gateway.tls.has_insecure_fallback() {
        let message = "clients without a valid certificate may connect where one is asked for";
        reader.find(Finding::new(insecure, true, "ConfigurationChanged", message.to_owned()));
    }
    let reference = gateway.tls.client_certificate.as_ref()?;
    let found = key_pair(reader, Owner::gateway(gateway), reference);
    let finding = match &found {
        Ok(_) => Finding::new("ResolvedRefs", true, "ResolvedRefs", "every reference is known".to_owned()),
        Err(Fault(reason, message)) => {
            let reason = if *reason == "RefNotPermitted" { reason } else { "InvalidClientCertificateRef" };
            Finding::new("ResolvedRefs", false, reason, format!("tls.backend: {message}"))
        }
    };
    reader.find(finding);
    found.ok()
}

fn resource(
    owner: Owner<'_>,
    listener: &Listener,
    key_pairs: &[Resource],
    validation: Option<Validation>,
    authorizers: Vec<l7::ExternalAuthorizer>,
) -> Option<Resource> {
    let protocol = match listener.protocol {
        ListenerProtocol::Http => l7::ListenerProtocol::HttpListener,
        ListenerProtocol::Https => l7::ListenerProtocol::HttpsListener,
        ListenerProtocol::Tls => l7::ListenerProtocol::TlsListener,
        ListenerProtocol::Tcp => l7::ListenerProtocol::TcpListener,
        ListenerProtocol::Udp => l7::ListenerProtocol::UdpListener,
        ListenerProtocol::Hbone | ListenerProtocol::Other(_) => return None,
    };
    let id = &owner.gateway.meta.id;
    let object = owner.object();
    let message = l7::Listener {
        object: Some(object_name(object.kind, &object.name)),
        gateway: id.to_string(),
        port: listener.port.into(),
        protocol: protocol.into(),
        hostname: listener.hostname.as_deref().unwrap_or_default().to_owned(),
        tls: (layer(&listener.protocol) == Layer::Encrypted).then(|| l7::ListenerTls {
            passthrough: !ends_tls(listener),
            key_pairs: key_pairs.iter().map(|pair| pair.name.to_string()).collect(),
            client_validation: validation.map(|validation| l7::ClientValidation {
                roots: validation.roots.into_bytes().into(),
                allow_insecure_fallback: validation.allow_insecure_fallback,
            }),
        }),
        authorizers,
    };
    Some(Resource {
        name: owner.resource_name(listener).into(),
        aliases: Vec::new(),
        parents: vec![views::root(id)],
        body: message.encode_to_vec().into(),
        unhealthy: false,
    })
}
