//! DestinationRules as resources: which services they are for, and which waypoints see them.
//!
//! A waypoint goes by the rules of the service's own namespace, else by those of the root namespace; which of several counts
//! it decides itself, as all that it needs is in the resources. What has no effect of a rule is in its findings.

use std::collections::BTreeSet;
use std::sync::Arc;

use ambit_api::l7;
use prost::Message;

use super::gateways::object_name;
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, credentials, views};
use crate::object::{DestinationRule, Kind, NamespacedName, ServiceEntry, WaypointBinding, subject_name};

/// Whether waypoints go by it.
const ACCEPTED: &str = "WaypointAccepted";
/// Whether every field has an effect.
const HONOURED: &str = "ambit.dev/FieldsHonoured";

type Roots = BTreeSet<Arc<str>>;

/// The resource of a rule that some waypoint goes by.
pub(in crate::index) fn of_rule(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(rule) = reader.store.destination_rules.get(id) else { return Vec::new() };
    for field in &rule.unsupported {
        without_effect(reader, field.clone());
    }
    if rule.selects_clients {
        report(reader, "UnsupportedField", "spec.workloadSelector: not supported, the rule has no effect");
        return Vec::new();
    }
    let host = reader.settings.full_host(&id.namespace, &rule.host);
    let roots = match waypoints_of(reader, rule, &host) {
        Ok(roots) => roots,
        Err(reason) => {
            report(reader, "NoEffect", reason);
            return Vec::new();
        }
    };
    let parents: Vec<Arc<str>> = roots.into_iter().filter(|root| is_exported(rule, root)).collect();
    if parents.is_empty() {
        report(reader, "NoEffect", format!("no waypoint that sees the rule sends requests to {host}"));
        return Vec::new();
    }
    let message = format!("waypoints go by it for requests to {host}");
    reader.find(Finding::new(ACCEPTED, true, "Accepted", message));
    let is_pattern = host.starts_with('*');
    if is_pattern && !rule.subsets.is_empty() {
        without_effect(reader, "spec.subsets: not supported with a wildcard host");
    }
    let message = l7::BackendPolicy {
        object: Some(object_name(Kind::DestinationRule, id)),
        created: rule.meta.created.unwrap_or_default(),
        host: host.to_string(),
        mesh_wide: id.namespace == reader.settings.root_namespace,
        settings: rule.settings.clone(),
        subsets: if is_pattern { Vec::new() } else { rule.subsets.clone() },
    };
    let message = with_names_of_entry(reader, message, &host);
    let name = format!("{}/{id}", Kind::DestinationRule);
    let resource = |name: String, parents: Vec<Arc<str>>, message: &l7::BackendPolicy| Resource {
        name: name.into(),
        aliases: Vec::new(),
        parents,
        body: message.encode_to_vec().into(),
        unhealthy: false,
    };
    if !credentials::are_named(&message) {
        return vec![(ResourceType::BackendPolicy, resource(name, parents, &message))];
    }
    let by_namespace = credentials::by_namespace(reader, rule, &message, parents);
    let resources = by_namespace.map(|(namespace, parents, message)| {
        (ResourceType::BackendPolicy, resource(format!("{name}/{namespace}"), parents, &message))
    });
    resources.collect()
}

/// Where TLS names no names, the certificate must have one of those of the ServiceEntry, if it names any.
fn with_names_of_entry(
    reader: &Reader<'_>,
    mut policy: l7::BackendPolicy,
    host: &Arc<str>,
) -> l7::BackendPolicy {
    let of_subsets = policy.subsets.iter_mut().flat_map(|subset| &mut subset.settings);
    let all = policy.settings.iter_mut().chain(of_subsets).filter_map(|settings| settings.tls.as_mut());
    let is_unnamed = |tls: &&mut l7::BackendTls| tls.mode() == l7::TlsMode::Tls && tls.names.is_empty();
    let mut unnamed: Vec<_> = all.filter(is_unnamed).collect();
    if unnamed.is_empty() {
        return policy;
    }
    let own = policy.object.as_ref().map(|object| object.namespace.clone()).unwrap_or_default();
    let is_for = |entry: &&ServiceEntry| policy.mesh_wide || *entry.meta.id.namespace == *own;
    let entries: Vec<&ServiceEntry> = reader.entries_of_host(host).filter(is_for).collect();
    // What one namespace says of a host is not for that of another.
    if let [entry] = entries[..] {
        for tls in &mut unnamed {
            tls.names = entry.subject_alt_names.iter().map(|name| subject_name(name)).collect();
        }
    }
    policy
}

/// The roots of the waypoints that send requests to services of the host.
fn waypoints_of(reader: &Reader<'_>, rule: &DestinationRule, host: &Arc<str>) -> Result<Roots, String> {
    let own = &rule.meta.id.namespace;
    let is_wide = *own == reader.settings.root_namespace;
    if host.starts_with('*') {
        let classes = reader.settings.waypoint_classes.iter().chain(&reader.settings.gateway_classes);
        let gateways = classes.flat_map(|class| reader.gateways_of_class(class));
        let served = gateways.filter(|gateway| is_wide || gateway.meta.id.namespace == *own);
        let mut roots: Roots = served.map(|gateway| views::root(&gateway.meta.id)).collect();
        roots.extend(views::of_binding(reader, own, &WaypointBinding::default()));
        return Ok(roots);
    }
    let mut elsewhere = None;
    let mut roots = Roots::new();
    let mut is_known = false;
    if let Some(service) = reader.settings.own_service(host).and_then(|id| reader.service(&id)) {
        let namespace = &service.meta.id.namespace;
        match is_wide || namespace == own {
            true => roots.extend(views::of_service(reader, service)),
            false => elsewhere = Some(namespace.clone()),
        }
        is_known = true;
    }
    for entry in reader.entries_of_host(host) {
        let namespace = &entry.meta.id.namespace;
        match is_wide || namespace == own {
            true => roots.extend(views::of_binding(reader, namespace, &entry.waypoint)),
            false => elsewhere = elsewhere.or(Some(namespace.clone())),
        }
        is_known = true;
    }
    match elsewhere {
        _ if !is_known => Err(format!("there is no service {host}")),
        Some(namespace) if roots.is_empty() => Err(format!(
            "waypoints go by rules in the service's namespace {namespace} and in the root namespace only"
        )),
        _ => Ok(roots),
    }
}

/// Whether the waypoint of this root is in a namespace that sees the rule.
fn is_exported(rule: &DestinationRule, root: &str) -> bool {
    let namespace = root.split('/').nth(1);
    namespace.is_some_and(|namespace| rule.is_exported_to(namespace))
}

fn report(reader: &Reader<'_>, reason: &'static str, message: impl Into<String>) {
    reader.find(Finding::new(ACCEPTED, false, reason, message.into()));
}

fn without_effect(reader: &Reader<'_>, field: impl Into<String>) {
    reader.find(Finding::new(HONOURED, false, "NoEffect", field.into()));
}
