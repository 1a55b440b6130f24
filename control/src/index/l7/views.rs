//! Which waypoints and gateways see a resource: those that its service is bound to, and those whose routes lead to it.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::l4::waypoints::own_gateway;
use super::listeners::Owner;
use super::reader::Reader;
use super::{attachment, ingresses, listener_filters, listener_sets, policies, telemetry, virtual_services};
use crate::object::{
    Choice, Kind, NamespacedName, ObjectRef, ParentRef, Pod, Route, Service, ServiceEntry, TargetKind,
    WaypointBinding,
};

/// The root of the view of the waypoint `<namespace>/<name>`: the name that its resources have among their parents.
pub fn root_of_view(gateway: &str) -> Arc<str> {
    format!("Gateway/{gateway}").into()
}

/// The gateway whose root this is.
pub(in crate::index) fn gateway_of(root: &str) -> Option<ObjectRef> {
    let (namespace, name) = root.strip_prefix("Gateway/")?.split_once('/')?;
    Some(ObjectRef { kind: Kind::Gateway, name: NamespacedName::new(namespace, name) })
}

type Roots = BTreeSet<Arc<str>>;

/// Below what a Service is.
pub(in crate::index) fn of_service(reader: &Reader<'_>, service: &Service) -> Vec<Arc<str>> {
    let mut roots = of_binding(reader, &service.meta.id.namespace, &service.waypoint);
    let own = ObjectRef { kind: Kind::Service, name: service.meta.id.clone() };
    for route in reader.routes_to(&service.meta.id) {
        let from = &route.meta.id.namespace;
        // A reference that is not permitted shows nothing of what it names.
        let is_own = *from == own.name.namespace || route.is_consumer_of(&own.name);
        if is_own || reader.is_granted(route.kind(), from, &own) {
            roots.extend(of_route(reader, route));
        }
    }
    roots.extend(of_waypoint(reader, service));
    roots.extend(ingresses::roots_to(reader, &service.meta.id));
    let host = reader.settings.host_of_service(&service.meta.id).into();
    roots.extend(virtual_services::roots_to(reader, &host, &own.name.namespace, service.visibility));
    roots.extend(of_authorizer(reader, &own.name.namespace, &host));
    roots.extend(listener_filters::roots_asking(reader, &service.meta.id));
    roots.extend(telemetry::roots_of_collector(reader, &own.name.namespace, &host));
    roots.into_iter().collect()
}

/// The gateways that find the Service of a waypoint, and its pods behind it: all of them, if requests of clients outside the mesh pass it.
fn of_waypoint(reader: &Reader<'_>, service: &Service) -> Roots {
    let own = own_gateway(reader, &service.meta.id.namespace, &service.meta.labels);
    let waypoint = own.filter(|it| reader.settings.waypoint_classes.contains(&it.class));
    if !waypoint.is_some_and(|waypoint| reader.is_ingress_waypoint(&waypoint.meta.id)) {
        return Roots::new();
    }
    let gateways = reader.settings.gateway_classes.iter().flat_map(|class| reader.gateways_of_class(class));
    gateways.map(|gateway| root(&gateway.meta.id)).collect()
}

/// Below what a host of a ServiceEntry is.
pub(in crate::index) fn of_entry(
    reader: &Reader<'_>,
    entry: &ServiceEntry,
    host: &Arc<str>,
) -> Vec<Arc<str>> {
    let namespace = &entry.meta.id.namespace;
    let mut roots = of_binding(reader, namespace, &entry.waypoint);
    roots.extend(virtual_services::roots_to(reader, host, namespace, entry.visibility));
    roots.extend(of_authorizer(reader, namespace, host));
    roots.extend(telemetry::roots_of_collector(reader, namespace, host));
    roots.into_iter().collect()
}

/// The waypoints whose policies ask a service about requests: the mesh's settings name it, so everybody may.
fn of_authorizer(reader: &Reader<'_>, namespace: &Arc<str>, host: &Arc<str>) -> Roots {
    let mut roots = Roots::new();
    for (provider, authorizer) in &reader.settings.authorizers {
        let is_it = authorizer.hostname == **host && authorizer.namespace == **namespace;
        for policy in is_it.then(|| reader.policies_asking(provider)).into_iter().flatten() {
            roots.extend(policies::roots_of(reader, policy));
        }
    }
    roots
}

/// Below what a route is: the waypoints of what it is attached to, and the gateways.
pub(in crate::index) fn of_route(reader: &Reader<'_>, route: &Route) -> Roots {
    let mut roots = Roots::new();
    for parent in &route.parents {
        match parent.kind {
            TargetKind::Service => {
                if let Some(service) = reader.service(&parent.name) {
                    roots.extend(of_binding(reader, &parent.name.namespace, &service.waypoint));
                }
            }
            TargetKind::ServiceEntry => {
                if let Some(entry) = reader.service_entry(&parent.name) {
                    roots.extend(of_binding(reader, &parent.name.namespace, &entry.waypoint));
                }
            }
            TargetKind::Gateway => {
                let gateway = reader.gateway(&parent.name);
                let gateway = gateway.filter(|it| reader.settings.gateway_classes.contains(&it.class));
                let owner = gateway.map(Owner::gateway);
                roots.extend(owner.and_then(|owner| of_listeners(reader, owner, route, parent)));
            }
            TargetKind::ListenerSet => {
                let owner = listener_sets::attached_by_name(reader, &parent.name).and_then(Result::ok);
                roots.extend(owner.and_then(|owner| of_listeners(reader, owner, route, parent)));
            }
            TargetKind::Hostname | TargetKind::Other => {}
        }
    }
    roots
}

/// The root of the gateway of listeners that a route is attached to.
fn of_listeners(
    reader: &Reader<'_>,
    owner: Owner<'_>,
    route: &Route,
    parent: &ParentRef,
) -> Option<Arc<str>> {
    attachment::attach(reader, owner, route, parent).is_ok().then(|| root(&owner.gateway.meta.id))
}

/// The roots of the waypoints that something in `namespace` with this binding is bound to, canary included.
pub(in crate::index) fn of_binding(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    binding: &WaypointBinding,
) -> Roots {
    gateways_of(reader, namespace, binding).into_iter().map(root).collect()
}

/// The waypoints that something in `namespace` with this binding is bound to, canary included.
pub(in crate::index) fn gateways_of<'b>(
    reader: &Reader<'b>,
    namespace: &Arc<str>,
    binding: &'b WaypointBinding,
) -> Vec<&'b NamespacedName> {
    let defaults = reader.namespace(namespace).map(|namespace| &namespace.waypoint);
    let in_force = if binding.choice.is_some() { Some(binding) } else { defaults };
    let Some(Choice::Named(primary)) = in_force.and_then(|binding| binding.choice.as_ref()) else {
        return Vec::new();
    };
    let canary = binding.canary.as_ref().or(in_force.and_then(|binding| binding.canary.as_ref()));
    canary.map(|canary| &canary.gateway).into_iter().chain([primary]).collect()
}

/// Below what a pod is by itself: its own gateway, if it is a waypoint's, and the waypoint of its own address.
pub(in crate::index) fn of_pod(reader: &Reader<'_>, pod: &Pod) -> Roots {
    let namespace = &pod.meta.id.namespace;
    let mut roots = of_binding(reader, namespace, &pod.waypoint);
    if let Some(gateway) = own_gateway(reader, namespace, &pod.meta.labels) {
        roots.insert(root(&gateway.meta.id));
    }
    roots
}

/// The root of a gateway's view.
pub(in crate::index) fn root(gateway: &NamespacedName) -> Arc<str> {
    root_of_view(&gateway.to_string())
}
