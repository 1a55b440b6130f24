//! The GatewayClasses of waypoints: made where they are absent, and what their status says.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::WriteMetrics;
use super::conditions::{self, Condition};
use super::status::now;
use crate::api_server::{CallError, FIELD_MANAGER, call};
use crate::index::CONTROLLER;
use crate::kind::{KindInfo, Needed, Scope};
use crate::source::kubernetes::served_version;

/// How often they are compared.
const INTERVAL: Duration = Duration::from_secs(30);
/// How soon a class whose kind is not installed yet, or that could not be written, is tried again.
const SOON: Duration = Duration::from_secs(3);

const KIND: KindInfo = KindInfo {
    name: "GatewayClass",
    plural: "gatewayclasses",
    group: "gateway.networking.k8s.io",
    versions: &["v1"],
    scope: Scope::Cluster,
    needed: Needed::Everything,
};

/// What waypoints support, by the names of Gateway API 1.7, in their order.
const FEATURES: [&str; 10] = [
    "Mesh",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
];

/// Whose a class is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owned {
    /// This control plane's.
    ByUs,
    /// Another controller's, such as Istio's.
    ByOthers,
    /// It does not exist.
    Absent,
}

/// Writes the classes.
pub(crate) struct ClassWriter {
    pub(crate) client: Client,
    pub(crate) classes: Vec<Arc<str>>,
    pub(crate) metrics: Arc<WriteMetrics>,
}

/// Whose a class is.
pub(super) async fn owner(client: &Client, class: &str) -> Result<Owned, CallError> {
    let class = call(api(client).get_opt(class)).await?;
    Ok(class.map_or(Owned::Absent, |class| owner_of(&class.data)))
}

fn owner_of(class: &Value) -> Owned {
    if class["spec"]["controllerName"] == CONTROLLER { Owned::ByUs } else { Owned::ByOthers }
}

fn api(client: &Client) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk(KIND.group, "v1", KIND.name);
    Api::all_with(client.clone(), &ApiResource::from_gvk_with_plural(&gvk, KIND.plural))
}

impl ClassWriter {
    /// Writes while `leads` is true; ends with its sender.
    pub(crate) async fn run(self, mut leads: watch::Receiver<bool>) {
        let mut last_error = None;
        while leads.wait_for(|leads| *leads).await.is_ok() {
            let outcome = self.reconcile().await;
            let pause = if matches!(outcome, Ok(true)) { INTERVAL } else { SOON };
            let error = outcome.err().map(|error| error.to_string());
            if let Some(error) = &error {
                self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                if last_error.as_ref() != Some(error) {
                    tracing::warn!(error, "GatewayClasses not written; trying again");
                }
            }
            last_error = error;
            // A sender that is gone ends the loop.
            tokio::time::timeout(pause, leads.wait_for(|leads| !*leads)).await.ok();
        }
    }

    /// Looks at every class; false where their kind is not installed.
    async fn reconcile(&self) -> Result<bool, CallError> {
        if served_version(&self.client, &KIND).await?.is_none() {
            return Ok(false);
        }
        for class in &self.classes {
            self.reconcile_class(class).await?;
        }
        Ok(true)
    }

    async fn reconcile_class(&self, name: &str) -> Result<(), CallError> {
        let api = api(&self.client);
        let class = match call(api.get_opt(name)).await? {
            Some(class) => class,
            None => {
                let manifest = json!({
                    "apiVersion": "gateway.networking.k8s.io/v1", "kind": KIND.name, "metadata": { "name": name },
                    "spec": { "controllerName": CONTROLLER, "description": "Waypoints of the Ambit mesh" },
                });
                let parameters = PatchParams::apply(FIELD_MANAGER);
                self.metrics.written.fetch_add(1, Ordering::Relaxed);
                call(api.patch(name, &parameters, &Patch::Apply(manifest))).await?
            }
        };
        if owner_of(&class.data) != Owned::ByUs {
            return Ok(());
        }
        let version = class.metadata.resource_version.clone();
        let class = serde_json::to_value(class).unwrap_or_default();
        let Some(status) = plan(&class, &now()) else { return Ok(()) };
        let patch = json!({ "metadata": { "resourceVersion": version }, "status": status });
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        call(api.patch_status(name, &parameters, &Patch::Merge(patch))).await?;
        self.metrics.written.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// `status` of a class of ours, if it must differ from what it is.
fn plan(class: &Value, now: &str) -> Option<Value> {
    let generation = class["metadata"]["generation"].as_i64();
    let present = class["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    // GEP-91: a class whose parameters the controller can't use is not accepted.
    let accepted = match class["spec"]["parametersRef"].is_null() {
        true => Condition::new("Accepted", true, "Accepted", "the control plane deploys its Gateways"),
        false => {
            let message =
                "parameters of classes are not supported: the chart's `waypoint` values are for all";
            Condition::new("Accepted", false, "InvalidParameters", message)
        }
    };
    let features: Vec<Value> = FEATURES.iter().map(|name| json!({ "name": name })).collect();
    let status = json!({
        "conditions": conditions::merge(present, &[accepted], generation, now),
        "supportedFeatures": features,
    });
    let is_present = |field: &str| class["status"][field] == status[field];
    (!is_present("conditions") || !is_present("supportedFeatures")).then_some(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_of_ours_is_accepted_and_names_its_features() {
        let mut class = json!({ "metadata": { "generation": 3 }, "spec": { "controllerName": CONTROLLER } });
        let status = plan(&class, "t").unwrap();
        let accepted = &status["conditions"][0];
        assert_eq!((&accepted["status"], &accepted["observedGeneration"]), (&json!("True"), &json!(3)));
        assert_eq!(status["supportedFeatures"][0]["name"], "Mesh");
        class["status"] = status;
        assert_eq!(plan(&class, "t2"), None);
        class["metadata"]["generation"] = 4.into();
        class["spec"]["parametersRef"] = json!({ "group": "", "kind": "ConfigMap", "name": "p" });
        let refused = plan(&class, "t2").unwrap();
        assert_eq!(refused["conditions"][0]["reason"], "InvalidParameters");
        assert_eq!(refused["conditions"][0]["observedGeneration"], 4);
    }

    #[test]
    fn features_are_in_order() {
        assert!(FEATURES.is_sorted());
    }
}
