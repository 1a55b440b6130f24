//! Which waypoint stands before a service or workload.

use std::sync::Arc;

use ambit_api::workload as api;

use super::reader::Reader;
use super::{Finding, wire};
use crate::object::{
    AddressValue, AllowedNamespaces, CANARY_WEIGHT, Canary, Choice, Gateway, Kind, Labels, NamespacedName,
    Pod, WaypointBinding, WaypointFor,
};

/// What kind of destination asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::index) enum Destination {
    Service,
    Workload,
}

/// The waypoints of a destination as they go on the wire.
#[derive(Debug, Default)]
pub(in crate::index) struct Waypoints {
    /// Where connections must go; a name that leads nowhere when the waypoint is not ready.
    pub(in crate::index) primary: Option<api::GatewayAddress>,
    /// Primary and canary with their shares, when there is a canary.
    pub(in crate::index) weighted: Vec<api::WeightedWaypoint>,
    /// Whether ingress goes there too.
    pub(in crate::index) ingress: bool,
    /// Whether connections may go directly when the waypoint is missing.
    pub(in crate::index) failure_open: bool,
}

impl Waypoints {
    /// What there is to say beside the addresses.
    pub(in crate::index) fn extensions(&self) -> impl Iterator<Item = api::Extension> {
        let open = self.failure_open && self.primary.is_some();
        open.then(|| wire::marker(wire::WAYPOINT_FAILURE_OPEN)).into_iter()
    }
}

/// How a named gateway answers.
enum GatewayState {
    Ready(api::GatewayAddress),
    /// It is not for this kind of destination, so it does not concern it.
    NotConcerned,
    /// It does not exist. What it was for is not known, so it concerns everybody: one for all that was deleted must not
    /// open the direct way.
    Missing(String),
    NotReady(&'static str, String),
}

/// Resolves the waypoints of an object in `namespace` that carries `labels` and says `binding`.
pub(in crate::index) fn resolve(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    labels: &Labels,
    binding: &WaypointBinding,
    destination: Destination,
) -> Waypoints {
    let defaults = reader.namespace(namespace).map(|n| &n.waypoint);
    let of_object = binding.choice.is_some();
    let in_force = if of_object { Some(binding) } else { defaults };
    let Some(Choice::Named(name)) = in_force.and_then(|b| b.choice.as_ref()) else {
        return Waypoints::default();
    };
    if is_waypoint(reader, namespace, labels) {
        return Waypoints::default();
    }
    // A canary stands beside the waypoint of its own object or, on an object without one, beside the namespace's.
    let inherited = in_force.and_then(|b| b.canary.as_ref());
    let canary = binding.canary.as_ref().or(inherited);
    let primary = match gateway_state(reader, namespace, name, destination) {
        GatewayState::Ready(address) => {
            reader.find(bound(name, true, "WaypointAccepted", format!("bound to waypoint {name}")));
            address
        }
        GatewayState::NotConcerned => {
            if of_object {
                let message = format!("waypoint {name} is not for this kind of destination");
                reader.find(bound(name, false, "AttachmentNotApplicable", message));
            }
            return Waypoints::default();
        }
        GatewayState::Missing(message) => {
            reader.find(bound(name, false, "WaypointMissing", message));
            nowhere(name)
        }
        GatewayState::NotReady(reason, message) => {
            reader.find(bound(name, false, reason, message));
            nowhere(name)
        }
    };
    Waypoints {
        weighted: weighted(reader, namespace, canary, &primary, destination),
        primary: Some(primary),
        ingress: binding.ingress.or(defaults.and_then(|d| d.ingress)).unwrap_or(false),
        failure_open: binding.failure_open || defaults.is_some_and(|d| d.failure_open),
    }
}

/// A canary counts only once it is ready; until then the primary has everything.
fn weighted(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    canary: Option<&Canary>,
    primary: &api::GatewayAddress,
    destination: Destination,
) -> Vec<api::WeightedWaypoint> {
    let Some(canary) = canary else { return Vec::new() };
    let Some(weight) = canary.weight else {
        let message = format!(
            "canary waypoint {} gets no connections: annotation {CANARY_WEIGHT} is no number from 0 to 100",
            canary.gateway
        );
        reader.find(canary_finding(&canary.gateway, "WeightInvalid", message));
        return Vec::new();
    };
    let GatewayState::Ready(address) = gateway_state(reader, namespace, &canary.gateway, destination) else {
        let message = format!("canary waypoint {} is not ready and gets no connections", canary.gateway);
        reader.find(canary_finding(&canary.gateway, "NotReady", message));
        return Vec::new();
    };
    let share = |destination, weight| api::WeightedWaypoint { destination: Some(destination), weight };
    vec![share(primary.clone(), 100 - weight), share(address, weight)]
}

/// Whether an object belongs to a waypoint itself: nothing stands before a waypoint.
pub(in crate::index) fn is_waypoint(reader: &Reader<'_>, namespace: &Arc<str>, labels: &Labels) -> bool {
    own_gateway(reader, namespace, labels)
        .is_some_and(|gateway| reader.settings.waypoint_classes.contains(&gateway.class))
}

/// The gateway whose deployment or service an object belongs to.
pub(in crate::index) fn own_gateway<'a>(
    reader: &Reader<'a>,
    namespace: &Arc<str>,
    labels: &Labels,
) -> Option<&'a Gateway> {
    let name = labels.get(Pod::GATEWAY_NAME)?;
    reader.gateway(&NamespacedName::new(namespace.clone(), name))
}

/// Whether services in a namespace may be bound to a gateway, as far as is known now.
///
/// # Errors
/// Why not.
pub(in crate::index) fn usable(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    gateway: &NamespacedName,
) -> Result<(), String> {
    match gateway_state(reader, namespace, gateway, Destination::Service) {
        GatewayState::Ready(_) => Ok(()),
        GatewayState::NotConcerned => Err(format!("waypoint {gateway} is not for services")),
        GatewayState::Missing(message) | GatewayState::NotReady(_, message) => Err(message),
    }
}

fn gateway_state(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    name: &NamespacedName,
    destination: Destination,
) -> GatewayState {
    let Some(gateway) = reader.gateway(name) else {
        return GatewayState::Missing(format!("Gateway {name} does not exist"));
    };
    let not_ready =
        |message: &str| GatewayState::NotReady("WaypointNotReady", format!("Gateway {name} {message}"));
    if !reader.settings.waypoint_classes.contains(&gateway.class) {
        return not_ready("is not of a waypoint's class");
    }
    match (gateway.waypoint_for, destination) {
        (WaypointFor::All, _)
        | (WaypointFor::Service, Destination::Service)
        | (WaypointFor::Workload, Destination::Workload) => {}
        _ => return GatewayState::NotConcerned,
    }
    let Some(allowed) = &gateway.hbone else {
        return not_ready("has no listener on port 15008 with protocol HBONE");
    };
    if name.namespace != *namespace && !is_allowed(reader, allowed, namespace) {
        let message = format!("Gateway {name} does not allow namespace {namespace}");
        return GatewayState::NotReady("NotAllowedByWaypoint", message);
    }
    match gateway.addresses.first() {
        Some(AddressValue::Ip(address)) => {
            GatewayState::Ready(wire::gateway_at(&network(reader, gateway), *address))
        }
        Some(AddressValue::Hostname(host)) => {
            GatewayState::Ready(wire::gateway_hostname(&gateway.meta.id.namespace, host))
        }
        None => not_ready("has no address yet"),
    }
}

fn is_allowed(reader: &Reader<'_>, allowed: &AllowedNamespaces, namespace: &Arc<str>) -> bool {
    match allowed {
        AllowedNamespaces::Nobody | AllowedNamespaces::Same => false,
        AllowedNamespaces::All => true,
        AllowedNamespaces::Selector { .. } => allowed.allows(&reader.namespace_labels(namespace)),
    }
}

fn network(reader: &Reader<'_>, gateway: &Gateway) -> Arc<str> {
    gateway.network.clone().unwrap_or_else(|| reader.settings.network.clone())
}

/// A name that can lead nowhere, so that a proxy refuses (RFC 6761 §6.4: `invalid` never resolves). The
/// gateway's own service name would not do: that may exist before the gateway may be used.
fn nowhere(name: &NamespacedName) -> api::GatewayAddress {
    wire::gateway_hostname(&name.namespace, &format!("{}.{}.waypoint.invalid", name.name, name.namespace))
}

fn canary_finding(gateway: &NamespacedName, reason: &'static str, message: String) -> Finding {
    Finding::new("ambit.dev/WaypointCanaryAccepted", false, reason, message)
        .relative_to(Kind::Gateway, gateway)
}

fn bound(gateway: &NamespacedName, met: bool, reason: &'static str, message: String) -> Finding {
    Finding::new("istio.io/WaypointBound", met, reason, message).relative_to(Kind::Gateway, gateway)
}
