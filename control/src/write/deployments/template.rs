//! What the manifests of a waypoint are made from beside its Gateway: the template of the installation, and the
//! parameters that the Gateway's author gives in a ConfigMap.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::overlay;

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The file cannot be read.
    #[error("cannot be read")]
    Read(#[from] std::io::Error),
    /// The file cannot be understood.
    #[error("{0}")]
    Parse(String),
}

/// Parts of the manifests of a waypoint, merged into what the control plane itself gives. The optional kinds are made only
/// where they are given.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Template {
    pub(super) service_account: Value,
    pub(super) deployment: Value,
    pub(super) service: Value,
    pub(super) pod_disruption_budget: Option<Value>,
    pub(super) horizontal_pod_autoscaler: Option<Value>,
}

/// Metadata that anybody may add to an object.
const METADATA: [&str; 2] = ["metadata.labels", "metadata.annotations"];
/// What the author of a Gateway may set of its Deployment. None of it changes what runs, as whom, and what it may touch on
/// a node: whoever may make a Gateway may not thereby run any pod.
const DEPLOYMENT: [&str; 9] = [
    "spec.replicas",
    "spec.template.metadata.labels",
    "spec.template.metadata.annotations",
    "spec.template.spec.affinity",
    "spec.template.spec.nodeSelector",
    "spec.template.spec.tolerations",
    "spec.template.spec.topologySpreadConstraints",
    "spec.template.spec.terminationGracePeriodSeconds",
    "spec.template.spec.containers[waypoint].resources",
];
const SERVICE: [&str; 1] = ["spec.trafficDistribution"];
const BUDGET: [&str; 3] = ["spec.minAvailable", "spec.maxUnavailable", "spec.unhealthyPodEvictionPolicy"];
const AUTOSCALER: [&str; 4] = ["spec.minReplicas", "spec.maxReplicas", "spec.metrics", "spec.behavior"];

impl Template {
    /// Reads the template of the installation.
    ///
    /// # Errors
    /// [`TemplateError`] when the file is not a template.
    pub fn read(path: &Path) -> Result<Template, TemplateError> {
        let text = std::fs::read_to_string(path)?;
        serde_saphyr::from_str(&text)
            .map_err(|error| TemplateError::Parse(error.without_snippet().to_string()))
    }

    /// The parameters in a ConfigMap that a Gateway names.
    ///
    /// # Errors
    /// What cannot be read, or may not be set.
    pub(super) fn of_config_map(config_map: &Value) -> Result<Template, String> {
        let mut parameters = Template::default();
        for (key, text) in config_map["data"].as_object().into_iter().flatten() {
            let text = text.as_str().unwrap_or_default();
            let value: Value = serde_saphyr::from_str(text).map_err(|error| {
                format!("{key} is not YAML: {}", serde_saphyr::Error::without_snippet(&error))
            })?;
            let own = match key.as_str() {
                "deployment" => &DEPLOYMENT[..],
                "service" => &SERVICE,
                "serviceAccount" => &[],
                "podDisruptionBudget" => &BUDGET,
                "horizontalPodAutoscaler" => &AUTOSCALER,
                _ => return Err(format!("{key} is not the name of a part of a waypoint")),
            };
            let allowed = [&METADATA[..], own].concat();
            if let Some(path) = overlay::first_not_allowed(&value, &allowed) {
                return Err(format!("{key} may not set {path}"));
            }
            match key.as_str() {
                "deployment" => parameters.deployment = value,
                "service" => parameters.service = value,
                "serviceAccount" => parameters.service_account = value,
                "podDisruptionBudget" => parameters.pod_disruption_budget = Some(value),
                _ => parameters.horizontal_pod_autoscaler = Some(value),
            }
        }
        Ok(parameters)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parameters(key: &str, text: &str) -> Result<Template, String> {
        Template::of_config_map(&json!({ "data": { key: text } }))
    }

    #[test]
    fn parameters_set_placement_and_size_and_nothing_else() {
        let set = parameters("deployment", "spec: {replicas: 3}").unwrap();
        assert_eq!(set.deployment, json!({ "spec": { "replicas": 3 } }));
        assert!(parameters("podDisruptionBudget", "spec: {minAvailable: 1}").is_ok());
        for (key, text) in [
            ("deployment", "spec: {template: {spec: {hostNetwork: true}}}"),
            ("deployment", "spec: {template: {spec: {serviceAccountName: admin}}}"),
            ("deployment", "spec: {template: {spec: {containers: [{name: waypoint, image: x}]}}}"),
            ("deployment", "spec: {template: {spec: {containers: [{name: second, image: x}]}}}"),
            ("deployment", "spec: {template: {spec: {volumes: [{name: v, hostPath: {path: /}}]}}}"),
            ("deployment", "spec: {selector: {}}"),
            ("service", "spec: {selector: {app: x}}"),
            ("service", "metadata: {name: other}"),
            ("deployment", "- a"),
            ("deployment", "a: [b"),
            ("secret", "a: b"),
        ] {
            assert!(parameters(key, text).is_err(), "{key}: {text}");
        }
    }
}
