//! ListenerSets: which are attached to their Gateway, the resources of their listeners, and what their statuses say.

use std::sync::Arc;

use super::listeners::{self, Conflict, Owner};
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::routes::NotAttached;
use super::{Finding, ListenerSetFacts, ingresses};
use crate::object::{AllowedNamespaces, Gateway, HTTPS, Listener, ListenerSet, NamespacedName, Transport};

/// The condition that both conditions of a ListenerSet follow.
const ACCEPTED: &str = "Accepted";

/// The resources of the listeners of a ListenerSet that are served; reports how it and each of them stands.
pub(in crate::index) fn of_set(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(set) = reader.listener_set(id) else { return Vec::new() };
    let Some(gateway) = gateway_of(reader, set) else { return Vec::new() };
    if !admits(reader, gateway, set) {
        let message = format!("Gateway {} takes no ListenerSets of this namespace", gateway.meta.id);
        reader.find(Finding::new(ACCEPTED, false, "NotAllowed", message));
        return Vec::new();
    }
    let resources = listeners::of_owner(reader, Owner::set(gateway, set), conflicts(reader, gateway, set));
    let is_served = resources.iter().any(|(kind, _)| *kind == ResourceType::Listener);
    let (reason, message) = match is_served {
        true => ("Accepted", "its listeners are attached to the Gateway"),
        false => ("ListenersNotValid", "none of its listeners can be served"),
    };
    reader.find(Finding::new(ACCEPTED, is_served, reason, message.to_owned()));
    resources
}

/// Reports what the ListenerSets of a Gateway add to it.
pub(super) fn report(reader: &Reader<'_>, gateway: &Gateway) {
    let sets = reader.listener_sets_of(&gateway.meta.id);
    let ingress_port = ingresses::has_tls(reader, &gateway.meta.id).then_some(HTTPS);
    if sets.is_empty() && ingress_port.is_none() {
        return;
    }
    let mut facts = ListenerSetFacts {
        ports: ingress_port.map(|port| (port, Transport::Tcp)).into_iter().collect(),
        ..Default::default()
    };
    let mut before: Vec<&Listener> = gateway.listeners.iter().collect();
    for set in sets {
        facts.all.push(set.meta.id.clone());
        if !admits(reader, gateway, set) {
            continue;
        }
        let conflicts = listeners::conflicts_with(&mut before, &set.listeners);
        let owner = Owner::set(gateway, set);
        let served = listeners::served_ports(reader, owner, &conflicts);
        facts.attached += usize::from(!served.is_empty());
        facts.ports.extend(served);
    }
    let finding = Finding::new("ListenerSets", true, "Attached", String::new());
    reader.find(Finding { listener_sets: Some(facts), ..finding });
}

/// The ListenerSets that a Gateway takes listeners of, the senior first.
pub(super) fn attached_to<'a>(reader: &Reader<'a>, gateway: &Gateway) -> Vec<&'a ListenerSet> {
    let mut sets = reader.listener_sets_of(&gateway.meta.id);
    sets.retain(|set| admits(reader, gateway, set));
    sets
}

/// The listeners of a ListenerSet as a parent of routes; `None` if its Gateway is another controller's.
pub(super) fn attached_by_name<'a>(
    reader: &Reader<'a>,
    id: &NamespacedName,
) -> Option<Result<Owner<'a>, NotAttached>> {
    let set = reader.listener_set(id)?;
    let gateway = gateway_of(reader, set)?;
    if !admits(reader, gateway, set) {
        let message = format!("ListenerSet {id} is not attached to its Gateway");
        return Some(Err(NotAttached("NoMatchingParent", message)));
    }
    Some(Ok(Owner::set(gateway, set)))
}

/// The Gateway of a ListenerSet, if the mesh runs it for clients outside.
fn gateway_of<'a>(reader: &Reader<'a>, set: &ListenerSet) -> Option<&'a Gateway> {
    let gateway = reader.gateway(set.gateway.as_ref()?)?;
    reader.settings.gateway_classes.contains(&gateway.class).then_some(gateway)
}

/// Whether a Gateway takes listeners of a ListenerSet.
fn admits(reader: &Reader<'_>, gateway: &Gateway, set: &ListenerSet) -> bool {
    let namespace: &Arc<str> = &set.meta.id.namespace;
    match &gateway.listener_sets {
        AllowedNamespaces::Nobody => false,
        AllowedNamespaces::All => true,
        AllowedNamespaces::Same => *namespace == gateway.meta.id.namespace,
        allowed @ AllowedNamespaces::Selector { .. } => allowed.allows(&reader.namespace_labels(namespace)),
    }
}

/// What is in the way of the listeners of a ListenerSet: the Gateway's own come first, then those of senior ListenerSets.
fn conflicts(reader: &Reader<'_>, gateway: &Gateway, set: &ListenerSet) -> Vec<Option<Conflict>> {
    let mut before: Vec<&Listener> = gateway.listeners.iter().collect();
    for other in reader.listener_sets_of(&gateway.meta.id) {
        if other.meta.id == set.meta.id {
            break;
        }
        if admits(reader, gateway, other) {
            listeners::conflicts_with(&mut before, &other.listeners);
        }
    }
    listeners::conflicts_with(&mut before, &set.listeners)
}
