//! Which listeners of a Gateway or ListenerSet a route is attached to. Pure but for the labels of namespaces.

use std::sync::Arc;

use super::listeners::{Owner, kinds};
use super::reader::Reader;
use super::routes::NotAttached;
use crate::object::{AllowedNamespaces, Listener, ParentRef, Route};

/// A listener that a route is attached to.
pub(super) struct Attached<'g> {
    pub(super) listener: &'g Listener,
    /// Hosts of requests that the route is for there; none: all of the listener's.
    pub(super) hostnames: Vec<Arc<str>>,
}

/// The listeners of `owner` that `route` is attached to by `parent`, which names that object.
///
/// # Errors
/// The condition that keeps it from the listener that comes closest.
pub(super) fn attach<'g>(
    reader: &Reader<'_>,
    owner: Owner<'g>,
    route: &Route,
    parent: &ParentRef,
) -> Result<Vec<Attached<'g>>, NotAttached> {
    let name = owner.object();
    let is_meant = |listener: &&Listener| {
        parent.section.as_ref().is_none_or(|section| *section == listener.name)
            && parent.port.is_none_or(|port| port == listener.port)
    };
    let meant: Vec<&Listener> = owner.listeners().iter().filter(is_meant).collect();
    if meant.is_empty() {
        let message = format!("{name} has no such listener");
        return Err(NotAttached("NoMatchingParent", message));
    }
    let admitting: Vec<&Listener> =
        meant.into_iter().filter(|listener| admits(reader, owner, listener, route)).collect();
    if admitting.is_empty() {
        let message = format!(
            "no listener of {name} takes routes of kind {} from namespace {}",
            route.kind(),
            route.meta.id.namespace
        );
        return Err(NotAttached("NotAllowedByListeners", message));
    }
    let attached = admitting.into_iter().filter_map(|listener| {
        let hostnames = common_hosts(listener.hostname.as_ref(), &route.hostnames)?;
        Some(Attached { listener, hostnames })
    });
    let attached: Vec<Attached<'g>> = attached.collect();
    if attached.is_empty() {
        let message = format!("no listener of {name} is for a host of the route");
        return Err(NotAttached("NoMatchingListenerHostname", message));
    }
    Ok(attached)
}

/// Whether a listener takes routes of this kind from the route's namespace.
fn admits(reader: &Reader<'_>, owner: Owner<'_>, listener: &Listener, route: &Route) -> bool {
    let namespace = &route.meta.id.namespace;
    let from = match &listener.namespaces {
        AllowedNamespaces::Nobody => false,
        AllowedNamespaces::All => true,
        AllowedNamespaces::Same => namespace == owner.namespace(),
        allowed @ AllowedNamespaces::Selector { .. } => allowed.allows(&reader.namespace_labels(namespace)),
    };
    from && kinds(listener).0.contains(&route.kind())
}

/// The hosts of a route that overlap with that of a listener, as the route has them: by these routes take precedence, and no
/// request comes to a listener for another host than its own. Without any: all hosts. `None`: they have nothing in common.
pub(super) fn common_hosts(listener: Option<&Arc<str>>, route: &[Arc<str>]) -> Option<Vec<Arc<str>>> {
    let Some(own) = listener.filter(|_| !route.is_empty()) else { return Some(route.to_vec()) };
    let overlaps = |host: &&Arc<str>| covers(own, host) || covers(host, own);
    let common: Vec<Arc<str>> = route.iter().filter(overlaps).cloned().collect();
    (!common.is_empty()).then_some(common)
}

/// Whether a host, or a wildcard for all names below one, covers another.
fn covers(wide: &str, narrow: &str) -> bool {
    match wide.strip_prefix('*') {
        None => wide == narrow,
        Some(suffix) => narrow == wide || (narrow.len() > suffix.len() && narrow.ends_with(suffix)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_a_route_count_where_they_overlap_with_the_listener() {
        for (listener, route, common) in [
            (None, &[][..], Some(&[][..])),
            (None, &["a.b"][..], Some(&["a.b"][..])),
            (Some("a.b"), &[], Some(&[])),
            (Some("a.b"), &["a.b", "c.b"], Some(&["a.b"])),
            (Some("a.b"), &["*.b"], Some(&["*.b"])),
            (Some("*.b"), &["a.b", "c.a.b", "b", "*.a.b"], Some(&["a.b", "c.a.b", "*.a.b"])),
            (Some("*.a.b"), &["*.b"], Some(&["*.b"])),
            (Some("a.b"), &["c.b"], None),
            (Some("*.b"), &["b"], None),
            (Some("a.b"), &["*.a.b"], None),
        ] {
            let listener = listener.map(Arc::from);
            let hosts: Vec<Arc<str>> = route.iter().map(|host| Arc::from(*host)).collect();
            let found = common_hosts(listener.as_ref(), &hosts);
            let common = common.map(|hosts| hosts.iter().map(|host| Arc::from(*host)).collect());
            assert_eq!(found, common, "{listener:?} {route:?}");
        }
    }
}
