//! DestinationRule: how requests to a host are balanced, limited and kept from failing endpoints.
//!
//! [`settings`] and [`limits`] read traffic policies and [`tls`] their TLS; what waypoints can't do of them is listed, and never ignored in
//! silence.

mod fields;
mod limits;
mod settings;
pub(in crate::object) mod tls;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ambit_api::l7;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use self::settings::{Reading, TrafficPolicy};
use super::meta::{Invalid, Meta, annotation};

/// Annotation that asks for a way of balancing that Istio's API has no name for: `ADAPTIVE`.
const LOAD_BALANCER: &str = "ambit.dev/load-balancer";

/// A DestinationRule.
#[derive(Clone, Debug, PartialEq)]
pub struct DestinationRule {
    /// Name and age: of two rules for one host the older one's settings count.
    pub meta: Meta,
    /// Its host as it was written, in lower case.
    pub host: Arc<str>,
    /// Namespaces whose proxies see it (`exportTo`); none: all.
    pub export_to: Vec<Arc<str>>,
    /// Whether it is for the requests of some clients only (`workloadSelector`).
    pub selects_clients: bool,
    /// For requests without subset.
    pub settings: Vec<l7::PortSettings>,
    /// Its subsets, merged with what is for all.
    pub subsets: Vec<l7::Subset>,
    /// Fields that have no effect, each with the reason.
    pub unsupported: Vec<String>,
}

impl DestinationRule {
    /// The labels that its subsets select by.
    pub fn label_keys(&self) -> BTreeSet<&str> {
        self.subsets.iter().flat_map(|subset| subset.labels.keys()).map(String::as_str).collect()
    }

    /// What stands for a rule that can't be read and says something of TLS: requests to its host are answered with 500, since they
    /// might go out in the clear. Other rules that can't be read have no effect.
    pub fn unreadable(object: &Value, reason: String) -> Option<DestinationRule> {
        let meta = Meta::salvage(object).ok()?;
        let spec = object.get("spec")?;
        let host = spec.get("host").and_then(Value::as_str).filter(|host| !host.is_empty())?;
        let settings = l7::PortSettings { invalid: reason, ..l7::PortSettings::default() };
        tls::is_named(spec).then(|| DestinationRule {
            meta,
            host: host.to_ascii_lowercase().into(),
            export_to: Vec::new(),
            selects_clients: false,
            settings: vec![settings],
            subsets: Vec::new(),
            unsupported: Vec::new(),
        })
    }

    /// Whether proxies in `namespace` see it.
    pub fn is_exported_to(&self, namespace: &str) -> bool {
        let own = &*self.meta.id.namespace;
        self.export_to.is_empty()
            || self.export_to.iter().any(|item| match &**item {
                "*" => true,
                "." => own == namespace,
                other => other == namespace,
            })
    }
}

/// The manifest. Fields that are not known are named; those of `tls` make it unreadable, since requests might go out in the clear.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    metadata: ObjectMeta,
    spec: Value,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    host: String,
    #[serde(default)]
    traffic_policy: Option<TrafficPolicy>,
    #[serde(default)]
    subsets: Vec<Subset>,
    #[serde(default)]
    export_to: Vec<String>,
    #[serde(default)]
    workload_selector: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Subset {
    name: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    traffic_policy: Option<TrafficPolicy>,
}

impl TryFrom<Manifest> for DestinationRule {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<DestinationRule, Invalid> {
        let Manifest { metadata, spec: written } = manifest;
        let spec: Spec = serde_path_to_error::deserialize(&written)
            .map_err(|error| Invalid::new(format!("spec.{}", error.path()), error.inner().to_string()))?;
        let Spec { host, traffic_policy, subsets, export_to, workload_selector } = spec;
        if host.is_empty() {
            return Err(Invalid::new("spec.host", "is empty"));
        }
        let mut reading = Reading::default();
        for (field, advice) in fields::unknown(&written) {
            reading.unsupported(field, advice);
        }
        match annotation(&metadata, LOAD_BALANCER) {
            None => {}
            Some("ADAPTIVE") => reading.adaptive = true,
            Some(other) => reading.unsupported(format!("annotation {LOAD_BALANCER}"), format!("{other:?}")),
        }
        let policy = traffic_policy.unwrap_or_default();
        let settings = reading.of_all(&policy, "spec.trafficPolicy")?;
        let mut lowered: Vec<l7::Subset> = Vec::new();
        for (i, subset) in subsets.into_iter().enumerate() {
            let at = format!("spec.subsets[{i}]");
            if subset.name.is_empty() {
                return Err(Invalid::new(format!("{at}.name"), "is empty"));
            }
            if lowered.iter().any(|other| other.name == subset.name) {
                return Err(Invalid::new(format!("{at}.name"), format!("{:?} is there twice", subset.name)));
            }
            let own = subset.traffic_policy.unwrap_or_default();
            let settings = reading.of_subset(&policy, &own, &format!("{at}.trafficPolicy"))?;
            lowered.push(l7::Subset { name: subset.name, labels: subset.labels, settings });
        }
        Ok(DestinationRule {
            meta: Meta::read(&metadata)?,
            host: host.to_ascii_lowercase().into(),
            export_to: export_to.into_iter().map(Arc::from).collect(),
            selects_clients: workload_selector.is_some(),
            settings,
            subsets: lowered,
            unsupported: reading.finish(),
        })
    }
}
