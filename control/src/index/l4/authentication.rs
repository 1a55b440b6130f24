//! PeerAuthentication as policies: a workload that is STRICT lists a DENY of peers without identity.
//!
//! One such policy for all ports always exists; a workload with settings for single ports has one of its own.
//! A workload's object overrides its namespace's, which overrides the mesh's; on each level the oldest counts.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::security::{self as api, string_match::MatchType};

use super::authorization::policy_resource;
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use crate::object::{Labels, MutualTls, NamespacedName, PeerAuthentication};

/// Name of the policy that refuses plaintext on every port. No Kubernetes name has a `_`.
const STATIC_STRICT: &str = "istio_converted_static_strict";

/// Prefix of the names of policies for workloads with ports of their own.
const CONVERTED: &str = "converted_peer_authentication_";

/// What a workload's PeerAuthentications come to.
enum Effect<'a> {
    /// Plaintext is accepted.
    Permissive,
    /// Refused on all ports.
    Strict,
    /// As the policy of this PeerAuthentication says port by port.
    ByPort(&'a PeerAuthentication),
}

/// The names of the policies that a workload lists for its PeerAuthentications.
pub(in crate::index) fn listed(reader: &Reader<'_>, namespace: &Arc<str>, labels: &Labels) -> Option<String> {
    match effect(reader, namespace, labels) {
        Effect::Permissive => None,
        Effect::Strict => Some(format!("{}/{STATIC_STRICT}", reader.settings.root_namespace)),
        Effect::ByPort(own) => Some(format!("{}/{CONVERTED}{}", own.id.namespace, own.id.name)),
    }
}

fn effect<'a>(reader: &Reader<'a>, namespace: &Arc<str>, labels: &Labels) -> Effect<'a> {
    let selecting = reader.store.authentication_selectors.selecting(namespace, labels);
    let own = selecting.iter().filter_map(|id| reader.store.authentications.get(id)).map(AsRef::as_ref);
    // In the root namespace a selector has no meaning beyond that namespace.
    let own: Option<&PeerAuthentication> =
        own.min_by_key(|a: &&PeerAuthentication| (!a.unreadable, a.meta.seniority()));
    let whole = is_strict(reader, namespace, own);
    match own {
        Some(own) if has_exceptions(own, whole) => Effect::ByPort(own),
        _ if whole => Effect::Strict,
        _ => Effect::Permissive,
    }
}

/// Whether ports that have no mode of their own are strict.
fn is_strict(reader: &Reader<'_>, namespace: &Arc<str>, own: Option<&PeerAuthentication>) -> bool {
    let mode = own.map(|a| a.mode).unwrap_or_default();
    let levels = [
        mode,
        reader.wide_authentication(namespace).map(|a| a.mode).unwrap_or_default(),
        reader.wide_authentication(&reader.settings.root_namespace).map(|a| a.mode).unwrap_or_default(),
    ];
    levels.into_iter().find(|mode| *mode != MutualTls::Unset) == Some(MutualTls::Strict)
}

fn has_exceptions(own: &PeerAuthentication, whole: bool) -> bool {
    own.ports.values().any(|mode| resolved(*mode, whole) != whole)
}

/// Whether a port's mode makes it strict.
fn resolved(mode: MutualTls, whole: bool) -> bool {
    match mode {
        MutualTls::Strict => true,
        MutualTls::Permissive | MutualTls::Disable => false,
        MutualTls::Unset => whole,
    }
}

/// The policy of a PeerAuthentication with ports that differ; for the empty name the one for all ports.
pub(in crate::index) fn of_authentication(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    if id.name.is_empty() {
        return vec![deny_unidentified(&id.namespace, STATIC_STRICT, api::Match::default())];
    }
    let Some(own) = reader.store.authentications.get(id).filter(|a| a.selector.is_some()) else {
        return Vec::new();
    };
    let whole = is_strict(reader, &id.namespace, Some(own));
    if !has_exceptions(own, whole) {
        return Vec::new();
    }
    let differing = exceptions(&own.ports, whole);
    let ports = match whole {
        true => api::Match { not_destination_ports: differing, ..api::Match::default() },
        false => api::Match { destination_ports: differing, ..api::Match::default() },
    };
    vec![deny_unidentified(&id.namespace, &format!("{CONVERTED}{}", id.name), ports)]
}

fn exceptions(ports: &BTreeMap<u16, MutualTls>, whole: bool) -> Vec<u32> {
    let differing = ports.iter().filter(|(_, mode)| resolved(**mode, whole) != whole);
    differing.map(|(port, _)| u32::from(*port)).collect()
}

fn deny_unidentified(namespace: &str, name: &str, ports: api::Match) -> (ResourceType, Resource) {
    let anybody = api::StringMatch { match_type: Some(MatchType::Presence(())) };
    let unidentified = api::Match { not_principals: vec![anybody], ..ports };
    policy_resource(&api::Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: api::Scope::WorkloadSelector as i32,
        action: api::Action::Deny as i32,
        rules: vec![api::Rule { clauses: vec![api::Clause { matches: vec![unidentified] }] }],
        dry_run: false,
        extensions: Vec::new(),
    })
}
