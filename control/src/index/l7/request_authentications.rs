//! RequestAuthentications as resources: the rules with their keys, for the waypoints of what they are bound to.

use std::sync::Arc;

use ambit_api::l7;
use ambit_token::KeySet;
use bytes::Bytes;
use prost::Message;

use super::gateways::object_name;
use super::outputs::{Resource, ResourceType};
use super::policies::{Bound, report};
use super::reader::Reader;
use crate::object::{JwtRule, KeySource, Kind, NamespacedName, RequestAuthentication};

/// What became of fetching keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchedKeys {
    /// The key set that was fetched last.
    pub keys: Option<Bytes>,
    /// Why there is none, or why it may be old.
    pub problem: Option<Arc<str>>,
}

/// The resource of a RequestAuthentication that is bound to something of a waypoint.
pub(in crate::index) fn of_authentication(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(authentication) = reader.store.request_authentications.get(id) else { return Vec::new() };
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

/// The rules with their keys; `None` where waypoints deny everything instead.
fn enforced(reader: &Reader<'_>, authentication: &RequestAuthentication) -> Option<l7::Authentication> {
    match &authentication.rules {
        Ok(rules) => {
            Some(l7::Authentication { rules: rules.iter().map(|rule| with_keys(reader, rule)).collect() })
        }
        Err(reason) => {
            report(reader, false, "Unreadable", format!("{reason}: everything is denied instead"));
            None
        }
    }
}

fn with_keys(reader: &Reader<'_>, JwtRule { rule, keys }: &JwtRule) -> l7::TokenRule {
    let jwks = match keys {
        KeySource::Inline(content) => match KeySet::parse(content.as_bytes()) {
            Ok(_) => Bytes::copy_from_slice(content.as_bytes()),
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
