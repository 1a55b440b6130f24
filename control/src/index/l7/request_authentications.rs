//! RequestAuthentications as resources: the rules with their keys, for the waypoints of what they are bound to.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use ambit_api::{l7, security};
use ambit_token::keys;
use bytes::Bytes;
use prost::Message;

use super::gateways::object_name;
use super::l4::authorization::{everything, policy_resource};
use super::outputs::{Resource, ResourceType};
use super::policies::{Bound, report};
use super::reader::Reader;
use crate::object::{JwtRule, KeySource, Kind, NamespacedName, RequestAuthentication};

/// Bytes of keys that one object may have in all: each waypoint that it is for gets them.
const MOST_KEY_BYTES: usize = 256 << 10;

/// What became of fetching keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchedKeys {
    /// The key set that was fetched last.
    pub keys: Option<Bytes>,
    /// Why there is none, or why it may be old.
    pub problem: Option<Arc<str>>,
}

/// Keys that are to be fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WantedKeys {
    /// How long that may take.
    pub timeout: Duration,
    /// The namespaces of the objects that name them.
    pub namespaces: BTreeSet<Arc<str>>,
    /// Differs each time that they are wanted anew: what was known of them before is forgotten.
    pub generation: u64,
}

/// The resource of a RequestAuthentication that is bound to something of a waypoint.
pub(in crate::index) fn of_authentication(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(authentication) = reader.store.request_authentications.get(id) else { return Vec::new() };
    if let (true, Err(reason)) = (authentication.lost_targets, &authentication.rules) {
        report(
            reader,
            false,
            "Unreadable",
            format!("{reason}: node proxies deny everything in its namespace instead"),
        );
        return vec![closed(reader, id)];
    }
    if authentication.targets.is_empty() {
        let message = "it has no effect without targetRefs: node proxies do not read requests";
        report(reader, false, "NoEffect", message.to_owned());
        return Vec::new();
    }
    let mut bound = Bound::default();
    let targets = authentication.targets.iter();
    let faults: Vec<String> = targets.filter_map(|target| bound.add(reader, id, target).err()).collect();
    for fault in &faults {
        report(reader, false, "TargetNotFound", format!("{fault}: it has no effect there"));
    }
    if bound.roots.is_empty() {
        return Vec::new();
    }
    let enforced = enforced(reader, authentication);
    let has_keys = |rule: &l7::TokenRule| !rule.jwks.is_empty();
    let is_complete = |rules: &l7::Authentication| rules.rules.iter().all(has_keys);
    if faults.is_empty() && enforced.as_ref().is_some_and(is_complete) {
        report(reader, true, "Accepted", "enforced by waypoints".to_owned());
    }
    let message = l7::Policy {
        object: Some(object_name(Kind::RequestAuthentication, id)),
        targets: bound.targets,
        gateways: bound.gateways,
        authorization: None,
        authentication: enforced,
        external: None,
        traffic: None,
        audit: None,
    };
    let resource = Resource {
        name: format!("{}/{id}", Kind::RequestAuthentication).into(),
        aliases: Vec::new(),
        parents: bound.roots.into_iter().collect(),
        body: message.encode_to_vec().into(),
        unhealthy: false,
    };
    vec![(ResourceType::Policy, resource)]
}

/// What stands for one of which nobody knows what it is for: as with such an AuthorizationPolicy, everything of its namespace is
/// denied, or of the mesh.
fn closed(reader: &Reader<'_>, id: &NamespacedName) -> (ResourceType, Resource) {
    let scope = match id.namespace == reader.settings.root_namespace {
        true => security::Scope::Global,
        false => security::Scope::Namespace,
    };
    policy_resource(&security::Authorization {
        // No AuthorizationPolicy can have such a name.
        name: format!("unreadable_request_authentication_{}", id.name),
        namespace: id.namespace.to_string(),
        scope: scope.into(),
        action: security::Action::Deny.into(),
        rules: vec![everything()],
        dry_run: false,
        extensions: Vec::new(),
    })
}

/// The rules with their keys; `None` where waypoints deny everything instead.
fn enforced(reader: &Reader<'_>, authentication: &RequestAuthentication) -> Option<l7::Authentication> {
    match &authentication.rules {
        Ok(rules) => {
            let mut size = 0;
            let rules = rules.iter().map(|rule| bounded(reader, with_keys(reader, rule), &mut size));
            Some(l7::Authentication { rules: rules.collect() })
        }
        Err(reason) => {
            report(reader, false, "Unreadable", format!("{reason}: everything is denied instead"));
            None
        }
    }
}

/// A rule whose keys are left out where those before it have used up the object's share.
fn bounded(reader: &Reader<'_>, mut rule: l7::TokenRule, size: &mut usize) -> l7::TokenRule {
    let sum = size.saturating_add(rule.jwks.len());
    if sum > MOST_KEY_BYTES {
        let message = format!(
            "keys of {}: those of the object are too large together: its tokens are refused",
            rule.issuer
        );
        report(reader, false, "KeysUnknown", message);
        rule.jwks = Bytes::new();
    } else {
        *size = sum;
    }
    rule
}

fn with_keys(reader: &Reader<'_>, JwtRule { rule, keys }: &JwtRule) -> l7::TokenRule {
    let jwks = match keys {
        KeySource::Inline(content) => match keys::canonical(content.as_bytes()) {
            Ok(keys) => keys.into(),
            Err(error) => {
                let message = format!("jwks of {}: {error}: its tokens are refused", rule.issuer);
                report(reader, false, "KeysUnknown", message);
                Bytes::new()
            }
        },
        KeySource::Remote { address, .. } => {
            let (keys, problem) = match reader.keys(address) {
                Some(FetchedKeys { keys, problem }) => (keys.clone(), problem.clone()),
                None => (None, Some("they are being fetched".into())),
            };
            match (&keys, problem) {
                (None, problem) => {
                    let problem = problem.map(|problem| format!(": {problem}")).unwrap_or_default();
                    let message = format!("keys of {address} are not known{problem}: its tokens are refused");
                    report(reader, false, "KeysUnknown", message);
                }
                (Some(_), Some(problem)) => {
                    let message =
                        format!("keys of {address} can't be refreshed: {problem}: the last good ones count");
                    report(reader, false, "KeysStale", message);
                }
                (Some(_), None) => {}
            }
            keys.unwrap_or_default()
        }
    };
    l7::TokenRule { jwks, ..rule.clone() }
}
