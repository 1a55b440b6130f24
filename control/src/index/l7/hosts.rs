//! The hosts that a VirtualService names, in full: what Services and ServiceEntries are found by.

use std::sync::Arc;

use super::Settings;
use crate::object::{NamespacedName, VirtualService};

/// A host as an object in `namespace` means it: a short name is a Service of that namespace, a name that the search path of
/// pods completes is completed, and all others stay as they are. In lower case.
pub(in crate::index) fn in_full(settings: &Settings, host: &str, namespace: &Arc<str>) -> Arc<str> {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    if host.starts_with('*') {
        return host.into();
    }
    let service = match host.contains('.') {
        true => settings.service_of_host(&host),
        false => Some(NamespacedName::new(namespace.clone(), host.as_str())),
    };
    match service {
        Some(service) => settings.host_of_service(&service).into(),
        None => host.into(),
    }
}

/// The hosts of a VirtualService for clients in the mesh.
pub(in crate::index) fn of_virtual_service(
    settings: &Settings,
    virtual_service: &VirtualService,
) -> impl Iterator<Item = Arc<str>> {
    let namespace = &virtual_service.meta.id.namespace;
    let hosts = virtual_service.hosts.iter().filter(|_| virtual_service.for_mesh);
    hosts.flat_map(|host| candidates(settings, host, namespace))
}

/// The hosts that the rules of a VirtualService send requests to.
pub(in crate::index) fn of_destinations(
    settings: &Settings,
    virtual_service: &VirtualService,
) -> impl Iterator<Item = Arc<str>> {
    let namespace = &virtual_service.meta.id.namespace;
    virtual_service.destinations().flat_map(|to| candidates(settings, &to.host, namespace))
}

/// What a host may mean: `reviews.shop` is a Service, or a name that a ServiceEntry offers.
pub(in crate::index) fn candidates(
    settings: &Settings,
    host: &str,
    namespace: &Arc<str>,
) -> impl Iterator<Item = Arc<str>> {
    let full = in_full(settings, host, namespace);
    let plain: Arc<str> = host.trim_end_matches('.').to_ascii_lowercase().into();
    let plain = (plain != full).then_some(plain);
    std::iter::once(full).chain(plain)
}

/// The wildcards that cover a host, the most specific first.
pub(in crate::index) fn wildcards(host: &str) -> impl Iterator<Item = Arc<str>> {
    let below = host.match_indices('.').filter_map(|(at, _)| Some(format!("*{}", host.get(at..)?).into()));
    below.chain(std::iter::once(Arc::from("*")))
}
