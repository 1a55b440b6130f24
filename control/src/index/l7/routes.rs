//! Routes of Gateway API as resources: attachment, references, and what their authors should know.

use std::sync::Arc;

use ambit_api::l7;
use aws_lc_rs::digest::{SHA256, digest};
use prost::Message;

use super::gateways::object_name;
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::virtual_services::HONOURED;
use super::{Finding, attachment, listener_sets, listeners, paths, views};
use crate::object::{
    BackendRef, Kind, ObjectRef, ParentRef, Route, RouteFilter, RouteProtocol, RouteRule, TargetKind,
    Transport,
};

/// The resource of a route that is attached to something.
pub(in crate::index) fn of_route(
    reader: &Reader<'_>,
    reference: &ObjectRef,
) -> Vec<(ResourceType, Resource)> {
    let Some(route) = reader.store.routes.get(reference) else { return Vec::new() };
    let namespace = &route.meta.id.namespace;
    let lowering = Lowering { reader, route, namespace };
    let rules: Vec<l7::Rule> =
        route.rules.iter().enumerate().map(|(at, rule)| lowering.rule(at, rule)).collect();
    let mut targets = Vec::new();
    for parent in &route.parents {
        let Some(attached) = lowering.attach(parent) else { continue };
        match attached {
            Ok(attached) => {
                targets.extend(attached);
                reader.find(condition(parent, "Accepted", true, "Accepted", "attached".to_owned()));
                report_references(reader, parent, &rules);
                report_paths(reader, parent, &rules);
            }
            Err(NotAttached(reason, message)) => {
                reader.find(condition(parent, "Accepted", false, reason, message));
                report_references(reader, parent, &rules);
            }
        }
    }
    if targets.is_empty() {
        return Vec::new();
    }
    let (kind, body) = encoded(route, reference, targets, rules);
    let name = format!("{}/{}", reference.kind, reference.name).into();
    let parents = views::of_route(reader, route).into_iter().collect();
    vec![(kind, Resource { name, aliases: Vec::new(), parents, body: body.into(), unhealthy: false })]
}

/// The route as a message for requests or for connections.
fn encoded(
    route: &Route,
    reference: &ObjectRef,
    targets: Vec<l7::Target>,
    rules: Vec<l7::Rule>,
) -> (ResourceType, Vec<u8>) {
    let of_requests = |protocol: l7::Protocol, targets, rules| {
        let message = l7::Route {
            object: Some(object_name(reference.kind, &reference.name)),
            created: route.meta.created.unwrap_or_default(),
            targets,
            rules,
            order: l7::Order::Specific.into(),
            protocol: protocol.into(),
        };
        (ResourceType::Route, message.encode_to_vec())
    };
    let layer = match route.protocol {
        RouteProtocol::Http => return of_requests(l7::Protocol::Http, targets, rules),
        RouteProtocol::Grpc => return of_requests(l7::Protocol::Grpc, targets, rules),
        RouteProtocol::Tcp => l7::StreamLayer::TcpStream,
        RouteProtocol::Tls => l7::StreamLayer::TlsStream,
        RouteProtocol::Udp => l7::StreamLayer::UdpStream,
    };
    let server_names: Vec<String> = route.hostnames.iter().map(ToString::to_string).collect();
    let rule = |rule: l7::Rule| l7::StreamRule {
        name: rule.name,
        matches: match server_names.is_empty() {
            true => Vec::new(),
            false => vec![l7::StreamMatch { server_names: server_names.clone(), ..Default::default() }],
        },
        backends: rule.backends,
        invalid: rule.invalid,
    };
    let message = l7::StreamRoute {
        object: Some(object_name(reference.kind, &reference.name)),
        created: route.meta.created.unwrap_or_default(),
        targets,
        rules: rules.into_iter().map(rule).collect(),
        order: l7::Order::Specific.into(),
        layer: layer.into(),
    };
    (ResourceType::StreamRoute, message.encode_to_vec())
}

/// Says whether all references of a route lead somewhere.
fn report_references(reader: &Reader<'_>, parent: &ParentRef, rules: &[l7::Rule]) {
    let of_backends = rules.iter().flat_map(|rule| &rule.backends).map(|backend| &backend.invalid);
    let mut faults =
        rules.iter().map(|rule| &rule.invalid).chain(of_backends).filter(|text| !text.is_empty());
    let finding = match faults.next() {
        None => {
            condition(parent, "ResolvedRefs", true, "ResolvedRefs", "every reference is known".to_owned())
        }
        Some(fault) => {
            let reason = match fault.as_str() {
                text if text.contains("ReferenceGrant") => "RefNotPermitted",
                text if text.contains("of kind") => "InvalidKind",
                text if text.contains("does not exist") || text.contains("has no port") => "BackendNotFound",
                _ => "UnsupportedValue",
            };
            condition(parent, "ResolvedRefs", false, reason, fault.clone())
        }
    };
    reader.find(finding);
}

/// Names paths that no request has.
fn report_paths(reader: &Reader<'_>, parent: &ParentRef, rules: &[l7::Rule]) {
    let named = |(at, rule)| {
        paths::faults(rule).map(move |fault| format!("rules[{at}].matches: {fault}")).collect::<Vec<_>>()
    };
    let faults: Vec<String> = rules.iter().enumerate().flat_map(named).collect();
    if !faults.is_empty() {
        reader.find(condition(parent, HONOURED, false, "NeverMatches", faults.join("; ")));
    }
}

fn condition(
    parent: &ParentRef,
    condition: &'static str,
    met: bool,
    reason: &'static str,
    message: String,
) -> Finding {
    let kind = match parent.kind {
        TargetKind::ServiceEntry => Kind::ServiceEntry,
        TargetKind::Gateway => Kind::Gateway,
        TargetKind::ListenerSet => Kind::ListenerSet,
        TargetKind::Service | TargetKind::Hostname | TargetKind::Other => Kind::Service,
    };
    let finding = Finding::new(condition, met, reason, message).relative_to(kind, &parent.name);
    Finding { parent_ref: Some(parent.clone()), ..finding }
}

/// Why a route is not attached to a parent: a reason of Gateway API, and one sentence.
pub(super) struct NotAttached(pub(super) &'static str, pub(super) String);

/// The port that a parent reference is for, 0 for all of them: by its number, its name (`sectionName`), or both.
fn port_of<'a>(
    parent: &ParentRef,
    ports: impl IntoIterator<Item = (&'a Arc<str>, u16)>,
) -> Result<u32, NotAttached> {
    if parent.port.is_none() && parent.section.is_none() {
        return Ok(0);
    }
    let is_meant = |(name, number): &(&Arc<str>, u16)| {
        parent.port.is_none_or(|port| port == *number)
            && parent.section.as_ref().is_none_or(|section| section == *name)
    };
    let found = ports.into_iter().find(is_meant);
    let (port, section) = (parent.port.map(|port| port.to_string()), parent.section.as_deref());
    let wanted = [port.as_deref(), section].into_iter().flatten().collect::<Vec<_>>().join(" ");
    let missing = || NotAttached("NoMatchingParent", format!("{} has no port {wanted}", parent.name));
    found.map(|(_, number)| number.into()).ok_or_else(missing)
}

struct Lowering<'a, 'r> {
    reader: &'r Reader<'a>,
    route: &'r Route,
    namespace: &'r Arc<str>,
}

impl Lowering<'_, '_> {
    /// What a parent stands for; `None` if it is none of the mesh's.
    fn attach(&self, parent: &ParentRef) -> Option<Result<Vec<l7::Target>, NotAttached>> {
        let target = |hostname: String, port: u32| l7::Target {
            namespace: parent.name.namespace.to_string(),
            hostname,
            port,
            // Gateway API, GEP-1426: hosts of a route don't count where its parent is a service.
            hostnames: Vec::new(),
            // GEP-1426: a route in another namespace is for the requests of that namespace's clients.
            client_namespace: match parent.name.namespace == *self.namespace {
                true => String::new(),
                false => self.namespace.to_string(),
            },
            listener: String::new(),
        };
        let missing = |kind: &str| {
            Err(NotAttached("NoMatchingParent", format!("{kind} {} does not exist", parent.name)))
        };
        if self.route.transport() == Transport::Udp
            && matches!(parent.kind, TargetKind::Service | TargetKind::ServiceEntry)
        {
            // The mesh does not carry datagrams.
            let message = "a UDPRoute can be attached to a gateway only".to_owned();
            return Some(Err(NotAttached("UnsupportedValue", message)));
        }
        match parent.kind {
            TargetKind::Service => Some(match self.reader.service(&parent.name) {
                None => missing("Service"),
                Some(service) => port_of(parent, service.ports.iter().map(|port| (&port.name, port.number)))
                    .map(|port| vec![target(self.reader.settings.host_of_service(&parent.name), port)]),
            }),
            TargetKind::ServiceEntry => Some(match self.reader.service_entry(&parent.name) {
                None => missing("ServiceEntry"),
                Some(entry) => port_of(parent, entry.ports.iter().map(|port| (&port.name, port.number)))
                    .map(|port| entry.hosts.iter().map(|host| target(host.to_string(), port)).collect()),
            }),
            TargetKind::Gateway => self.attach_to_gateway(parent),
            TargetKind::ListenerSet => {
                let owner = listener_sets::attached_by_name(self.reader, &parent.name)?;
                Some(owner.and_then(|owner| self.attach_to_listeners(owner, parent)))
            }
            TargetKind::Hostname | TargetKind::Other => None,
        }
    }

    /// The listeners of a Gateway; `None` if it is another controller's.
    fn attach_to_gateway(&self, parent: &ParentRef) -> Option<Result<Vec<l7::Target>, NotAttached>> {
        let gateway = self.reader.gateway(&parent.name)?;
        if self.reader.settings.waypoint_classes.contains(&gateway.class) {
            // The listener of a waypoint takes connections of the mesh, not routes: these are attached to services.
            let message =
                format!("{} is a waypoint: attach the route to the services behind it", parent.name);
            return Some(Err(NotAttached("NotAllowedByListeners", message)));
        }
        if !self.reader.settings.gateway_classes.contains(&gateway.class) {
            return None;
        }
        Some(self.attach_to_listeners(listeners::Owner::gateway(gateway), parent))
    }

    fn attach_to_listeners(
        &self,
        owner: listeners::Owner<'_>,
        parent: &ParentRef,
    ) -> Result<Vec<l7::Target>, NotAttached> {
        let attached = attachment::attach(self.reader, owner, self.route, parent)?;
        let target = |it: attachment::Attached<'_>| l7::Target {
            listener: owner.resource_name(it.listener),
            hostnames: it.hostnames.iter().map(ToString::to_string).collect(),
            ..l7::Target::default()
        };
        Ok(attached.into_iter().map(target).collect())
    }

    fn rule(&self, at: usize, rule: &RouteRule) -> l7::Rule {
        let mut lowered = rule.own.clone();
        if let Some(session) = lowered.session.as_mut().filter(|session| session.name.is_empty()) {
            session.name = self.session_name(at, &rule.own.name);
        }
        lowered.filters = self.filters(&rule.filters);
        let backends = rule.backends.iter().map(|backend| l7::Backend {
            weight: backend.weight,
            filters: self.filters(&backend.filters),
            ..self.backend(&backend.to)
        });
        lowered.backends = backends.collect();
        if lowered.invalid.is_empty() {
            lowered.invalid = ambit_route::fault(&lowered).unwrap_or_default();
        }
        lowered
    }

    /// The name of the sessions of a rule that names none. It is the rule's alone, and says nothing of it.
    fn session_name(&self, at: usize, name: &str) -> String {
        let rule = if name.is_empty() { at.to_string() } else { name.to_owned() };
        let rule = format!("{}/{}/{rule}", self.route.kind(), self.route.meta.id);
        let hash = digest(&SHA256, rule.as_bytes());
        let hex: String = hash.as_ref().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        format!("ambit-session-{hex}")
    }

    fn filters(&self, filters: &[RouteFilter]) -> Vec<l7::Filter> {
        let lower = |filter: &RouteFilter| {
            let kind = match filter {
                RouteFilter::Own(kind) => kind.clone(),
                RouteFilter::Mirror { backend, denominator, numerator } => {
                    l7::filter::Kind::Mirror(l7::Mirror {
                        backend: Some(l7::Backend { weight: 1, ..self.backend(backend) }),
                        denominator: *denominator,
                        numerator: *numerator,
                        shadow_host: false,
                    })
                }
            };
            l7::Filter { kind: Some(kind) }
        };
        filters.iter().map(lower).collect()
    }

    /// The backend of a reference, or why it is none.
    fn backend(&self, to: &BackendRef) -> l7::Backend {
        match self.resolve(to) {
            Ok(backend) => backend,
            Err(reason) => l7::Backend {
                namespace: to.name_in(self.namespace).namespace.to_string(),
                hostname: to.name.to_string(),
                port: to.port.map(u32::from).unwrap_or_default(),
                invalid: reason,
                ..l7::Backend::default()
            },
        }
    }

    fn resolve(&self, to: &BackendRef) -> Result<l7::Backend, String> {
        let name = to.name_in(self.namespace);
        match to.kind {
            TargetKind::Service => {}
            TargetKind::ServiceEntry
            | TargetKind::Hostname
            | TargetKind::Gateway
            | TargetKind::ListenerSet
            | TargetKind::Other => {
                return Err(format!("backends of kind {} are not supported", to.kind_name));
            }
        }
        let object = ObjectRef { kind: Kind::Service, name: name.clone() };
        // Clients of the route's own namespace reach the Service that they asked for without a grant, too.
        let is_own = name.namespace == *self.namespace || self.route.is_consumer_of(&name);
        if !is_own && !self.reader.is_granted(self.route.kind(), self.namespace, &object) {
            return Err(format!("no ReferenceGrant allows a reference to Service {name}"));
        }
        let service = self.reader.service(&name).ok_or_else(|| format!("Service {name} does not exist"))?;
        let port = to.port.ok_or_else(|| format!("the reference to Service {name} has no port"))?;
        let (transport, other) = match self.route.transport() {
            Transport::Tcp => (Transport::Tcp, None),
            Transport::Udp => (Transport::Udp, Some("UDP")),
        };
        if !service.ports_of(transport).iter().any(|known| known.number == port) {
            let port = other.map_or_else(|| port.to_string(), |other| format!("{port} of protocol {other}"));
            return Err(format!("Service {name} has no port {port}"));
        }
        Ok(l7::Backend {
            namespace: name.namespace.to_string(),
            hostname: self.reader.settings.host_of_service(&name),
            port: port.into(),
            ..l7::Backend::default()
        })
    }
}
