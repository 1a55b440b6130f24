//! TrafficPolicies: local rate limits and conditions for requests. The kind is Ambit's own (group `ambit.dev`).

use std::sync::Arc;

use ambit_api::l7;
use ambit_api::l7::limit_key::Kind as KeyKind;
use ambit_traffic::Expression;
use http::HeaderName;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use super::gateway::route::duration;
use super::meta::{Invalid, Meta};
use super::{Kind, NamespacedName, ObjectRef};

/// Most targets, rate limits, conditions and keys of a limit: what the schema says.
const MOST_TARGETS: usize = 16;
const MOST_LIMITS: usize = 16;
const MOST_CONDITIONS: usize = 32;
const MOST_KEYS: usize = 8;
/// Most requests of a rate limit, at once or in an interval.
const MOST_REQUESTS: u32 = 1_000_000;
/// Bounds of an interval.
const SHORTEST: u64 = 100_000_000;
const LONGEST: u64 = 24 * 3600 * 1_000_000_000;
/// RFC 6585 §4.
const TOO_MANY_REQUESTS: u32 = 429;

/// A TrafficPolicy.
#[derive(Clone, Debug, PartialEq)]
pub struct TrafficPolicy {
    /// Name and age: of two for one target the older one counts.
    pub meta: Meta,
    /// What it is for; `None` where that can't be read.
    pub targets: Option<Vec<TrafficTarget>>,
    /// What it demands.
    pub demands: Result<l7::Traffic, Arc<str>>,
}

/// Something whose requests a policy is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrafficTarget {
    /// A Gateway, HTTPRoute, GRPCRoute, Service or ServiceEntry of the policy's namespace.
    pub object: ObjectRef,
    /// A listener, a rule or a port of it by name; none: all.
    pub section: Option<Arc<str>>,
}

impl std::fmt::Display for TrafficTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.object.kind, self.object.name.name)
    }
}

impl TrafficPolicy {
    /// What stands for a policy that can't be read: it denies what it is for.
    ///
    /// # Errors
    /// When the object has no name.
    pub fn unreadable(object: &Value, reason: &str) -> Result<TrafficPolicy, Invalid> {
        let meta = Meta::salvage(object)?;
        let targets = object.pointer("/spec/targetRefs").and_then(Value::as_array);
        let targets: Option<Vec<_>> = targets.filter(|targets| !targets.is_empty()).and_then(|targets| {
            let read = |target| TargetRef::deserialize(target).ok()?.read(&meta.id.namespace, 0).ok();
            targets.iter().map(read).collect()
        });
        Ok(TrafficPolicy { meta, targets, demands: Err(reason.into()) })
    }

    /// Its targets, as far as they can be read.
    pub fn known_targets(&self) -> &[TrafficTarget] {
        self.targets.as_deref().unwrap_or_default()
    }
}

/// The manifest.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    target_refs: Vec<TargetRef>,
    #[serde(default)]
    rate_limits: Vec<RateLimit>,
    #[serde(default)]
    conditions: Vec<Condition>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TargetRef {
    group: String,
    kind: String,
    name: String,
    #[serde(default)]
    section_name: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RateLimit {
    name: String,
    requests: u32,
    interval: String,
    #[serde(default)]
    burst: Option<u32>,
    #[serde(default)]
    key: Vec<LimitKey>,
    #[serde(default)]
    when: Option<String>,
    #[serde(default)]
    status: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct LimitKey {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    header: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Condition {
    #[serde(default)]
    name: Option<String>,
    expression: String,
}

impl TryFrom<Manifest> for TrafficPolicy {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<TrafficPolicy, Invalid> {
        let Manifest { metadata, spec: Spec { target_refs, rate_limits, conditions } } = manifest;
        let meta = Meta::read(&metadata)?;
        bounded("spec.targetRefs", target_refs.len(), MOST_TARGETS)?;
        bounded("spec.rateLimits", rate_limits.len(), MOST_LIMITS)?;
        bounded("spec.conditions", conditions.len(), MOST_CONDITIONS)?;
        if target_refs.is_empty() {
            return Err(Invalid::new("spec.targetRefs", "is empty"));
        }
        if rate_limits.is_empty() && conditions.is_empty() {
            return Err(Invalid::new("spec", "has neither rateLimits nor conditions"));
        }
        let targets = target_refs.into_iter().enumerate();
        let targets: Result<Vec<_>, _> =
            targets.map(|(at, target)| target.read(&meta.id.namespace, at)).collect();
        let limits: Result<Vec<_>, _> =
            rate_limits.into_iter().enumerate().map(|(at, limit)| limit.read(at)).collect();
        let limits = limits?;
        for (at, limit) in limits.iter().enumerate() {
            if limits.iter().take(at).any(|before| before.name == limit.name) {
                return Err(Invalid::new(format!("spec.rateLimits[{at}].name"), "is another limit's too"));
            }
        }
        let conditions: Result<Vec<_>, _> =
            conditions.into_iter().enumerate().map(|(at, condition)| condition.read(at)).collect();
        let demands = l7::Traffic { rate_limits: limits, conditions: conditions?, ..l7::Traffic::default() };
        Ok(TrafficPolicy { targets: Some(targets?), demands: Ok(demands), meta })
    }
}

fn bounded(field: &str, count: usize, most: usize) -> Result<(), Invalid> {
    match count <= most {
        true => Ok(()),
        false => Err(Invalid::new(field, format!("has more than {most} entries"))),
    }
}

impl TargetRef {
    fn read(self, namespace: &Arc<str>, at: usize) -> Result<TrafficTarget, Invalid> {
        let kind = match (self.group.as_str(), self.kind.as_str()) {
            ("gateway.networking.k8s.io", "Gateway") => Kind::Gateway,
            ("gateway.networking.k8s.io", "HTTPRoute") => Kind::HttpRoute,
            ("gateway.networking.k8s.io", "GRPCRoute") => Kind::GrpcRoute,
            ("" | "core", "Service") => Kind::Service,
            ("networking.istio.io", "ServiceEntry") => Kind::ServiceEntry,
            (group, kind) => {
                let problem = format!("{kind:?} of group {group:?} is nothing that a TrafficPolicy is for");
                return Err(Invalid::new(format!("spec.targetRefs[{at}].kind"), problem));
            }
        };
        if self.name.is_empty() {
            return Err(Invalid::new(format!("spec.targetRefs[{at}].name"), "is empty"));
        }
        let object = ObjectRef { kind, name: NamespacedName::new(namespace.clone(), self.name) };
        let section = self.section_name.filter(|section| !section.is_empty()).map(Arc::from);
        Ok(TrafficTarget { object, section })
    }
}

impl RateLimit {
    fn read(self, at: usize) -> Result<l7::RateLimit, Invalid> {
        let RateLimit { name, requests, interval, burst, key, when, status } = self;
        let wrong = |field: &str, problem: String| {
            Err(Invalid::new(format!("spec.rateLimits[{at}].{field}"), problem))
        };
        if name.is_empty() {
            return wrong("name", "is empty".to_owned());
        }
        let burst = burst.unwrap_or(requests);
        for (field, count) in [("requests", requests), ("burst", burst)] {
            if !(1..=MOST_REQUESTS).contains(&count) {
                return wrong(field, format!("is not from 1 to {MOST_REQUESTS}"));
            }
        }
        let interval_nanos = match duration(&interval) {
            Ok(nanos @ SHORTEST..=LONGEST) => nanos,
            Ok(_) => return wrong("interval", format!("{interval} is not from 100ms to 24h")),
            Err(problem) => return wrong("interval", problem),
        };
        let status = status.unwrap_or(TOO_MANY_REQUESTS);
        if !(400..=599).contains(&status) {
            return wrong("status", format!("{status} is not from 400 to 599"));
        }
        bounded(&format!("spec.rateLimits[{at}].key"), key.len(), MOST_KEYS)?;
        let keys: Result<Vec<_>, String> = key.into_iter().map(LimitKey::read).collect();
        let keys = match keys {
            Ok(keys) => keys,
            Err(problem) => return wrong("key", problem),
        };
        let when = when.unwrap_or_default();
        if !when.is_empty()
            && let Err(error) = Expression::compile(&when)
        {
            return wrong("when", error.to_string());
        }
        Ok(l7::RateLimit { name, requests, interval_nanos, burst, keys, when, status })
    }
}

impl LimitKey {
    fn read(self) -> Result<l7::LimitKey, String> {
        let kind = match (self.kind.as_str(), self.header) {
            ("Route", None) => KeyKind::Route(true),
            ("ClientIdentity", None) => KeyKind::ClientIdentity(true),
            ("RemoteAddress", None) => KeyKind::RemoteAddress(true),
            ("Header", Some(name)) => {
                let name = HeaderName::try_from(&name).map_err(|_| format!("{name:?} is no header"))?;
                KeyKind::Header(name.as_str().to_owned())
            }
            ("Header", None) => return Err("a key of type Header names no header".to_owned()),
            ("Route" | "ClientIdentity" | "RemoteAddress", Some(_)) => {
                return Err(format!("a key of type {} has no header", self.kind));
            }
            (kind, _) => return Err(format!("type {kind:?} of a key is not known")),
        };
        Ok(l7::LimitKey { kind: Some(kind) })
    }
}

impl Condition {
    fn read(self, at: usize) -> Result<l7::Condition, Invalid> {
        let Condition { name, expression } = self;
        if let Err(error) = Expression::compile(&expression) {
            return Err(Invalid::new(format!("spec.conditions[{at}].expression"), error.to_string()));
        }
        let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| (at + 1).to_string());
        Ok(l7::Condition { name, expression })
    }
}
