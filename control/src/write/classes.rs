//! What the control plane announces of itself: the GatewayClasses of waypoints and gateways and, where the API server has the
//! kind, an XMesh. They are made where they are absent; their status names the features that are supported.

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
use super::status::{list_all, now};
use crate::api_server::{CallError, FIELD_MANAGER, call};
use crate::index::CONTROLLER;
use crate::kind::{KindInfo, Needed, Scope};
use crate::source::kubernetes::served_version;

/// How often they are compared.
const INTERVAL: Duration = Duration::from_secs(15);
/// How soon a class whose kind is not installed yet, or that could not be written, is tried again.
const SOON: Duration = Duration::from_secs(3);

pub(super) const CLASS: KindInfo = KindInfo {
    name: "GatewayClass",
    plural: "gatewayclasses",
    group: "gateway.networking.k8s.io",
    versions: &["v1"],
    scope: Scope::Cluster,
    needed: Needed::Everything,
};
pub(super) const MESH: KindInfo = KindInfo {
    name: "XMesh",
    plural: "xmeshes",
    group: "gateway.networking.x-k8s.io",
    versions: &["v1alpha1"],
    scope: Scope::Cluster,
    needed: Needed::Everything,
};
/// The name of the XMesh.
const MESH_NAME: &str = "ambit";

/// What the mesh and its waypoints support, by the names of Gateway API 1.7, in their order.
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

/// What gateways support, likewise.
const GATEWAY_FEATURES: [&str; 54] = [
    "BackendTLSPolicy",
    "BackendTLSPolicySANValidation",
    "ClusterTrustBundle",
    "GRPCRoute",
    "GRPCRouteNamedRouteRule",
    "GRPCRouteRequestHeaderModifier",
    "Gateway",
    "GatewayAddressEmpty",
    "GatewayAddressRoutability",
    "GatewayAddressRoutabilityCluster",
    "GatewayBackendClientCertificate",
    "GatewayFrontendClientCertificateValidation",
    "GatewayFrontendClientCertificateValidationInsecureFallback",
    "GatewayHTTPListenerIsolation",
    "GatewayHTTPSListenerDetectMisdirectedRequests",
    "GatewayInfrastructure",
    "GatewayListenerFilters",
    "GatewayPort8080",
    "GatewayRouteHostnameIntersectionPrecedence",
    "GatewayStaticAddresses",
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteBackendProtocolH2C",
    "HTTPRouteBackendProtocolWebSocket",
    "HTTPRouteBackendRequestHeaderModification",
    "HTTPRouteBackendTimeout",
    "HTTPRouteBackendURLRewrite",
    "HTTPRouteCORS",
    "HTTPRouteDestinationPortMatching",
    "HTTPRouteHostRewrite",
    "HTTPRouteMethodMatching",
    "HTTPRouteNamedRouteRule",
    "HTTPRouteParentRefPort",
    "HTTPRoutePathRedirect",
    "HTTPRoutePathRewrite",
    "HTTPRoutePortRedirect",
    "HTTPRouteQueryParamMatching",
    "HTTPRouteRequestMirror",
    "HTTPRouteRequestMultipleMirrors",
    "HTTPRouteRequestPercentageMirror",
    "HTTPRouteRequestTimeout",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteRetryCodes",
    "HTTPRouteRetryConnectionError",
    "HTTPRouteSchemeRedirect",
    "ListenerSet",
    "ReferenceGrant",
    "TCPRoute",
    "TLSRoute",
    "TLSRouteModeMixed",
    "TLSRouteModeTerminate",
    "UDPRoute",
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
    /// Classes of waypoints.
    pub(crate) waypoints: Vec<Arc<str>>,
    /// Classes of gateways.
    pub(crate) gateways: Vec<Arc<str>>,
    pub(crate) metrics: Arc<WriteMetrics>,
}

/// Whose a class is.
pub(super) async fn owner(client: &Client, class: &str) -> Result<Owned, CallError> {
    let class = call(api(client, &CLASS, "v1").get_opt(class)).await?;
    Ok(class.map_or(Owned::Absent, |class| owner_of(&class.data)))
}

fn owner_of(object: &Value) -> Owned {
    if is_ours(object) { Owned::ByUs } else { Owned::ByOthers }
}

/// Whether a class or mesh names this controller.
pub(super) fn is_ours(object: &Value) -> bool {
    object["spec"]["controllerName"] == CONTROLLER
}

fn api(client: &Client, kind: &KindInfo, version: &str) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk(kind.group, version, kind.name);
    Api::all_with(client.clone(), &ApiResource::from_gvk_with_plural(&gvk, kind.plural))
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

    /// Looks at every object; false where the kind of classes is not installed.
    async fn reconcile(&self) -> Result<bool, CallError> {
        if let Some(version) = served_version(&self.client, &MESH).await? {
            let accepted = Condition::new("Accepted", true, "Accepted", "the control plane serves the mesh");
            self.announce(&MESH, version, MESH_NAME, "The Ambit mesh", &accepted, &FEATURES).await?;
        }
        let Some(version) = served_version(&self.client, &CLASS).await? else { return Ok(false) };
        let message = "the control plane deploys its Gateways";
        let accepted = Condition::new("Accepted", true, "Accepted", message);
        for class in &self.waypoints {
            let description = "Waypoints of the Ambit mesh";
            self.announce(&CLASS, version, class, description, &accepted, &FEATURES).await?;
        }
        for class in &self.gateways {
            let description = "Gateways into the Ambit mesh";
            self.announce(&CLASS, version, class, description, &accepted, &GATEWAY_FEATURES).await?;
        }
        self.refuse_others(version).await?;
        Ok(true)
    }

    /// Writes to classes that name this controller, but are not among those that it is set up for, that they have no effect.
    async fn refuse_others(&self, version: &str) -> Result<(), CallError> {
        let api = api(&self.client, &CLASS, version);
        let message = "it is not among the classes that the control plane is set up for";
        let refused = Condition::new("Accepted", false, "Unsupported", message);
        for class in list_all(api.clone()).await? {
            let name = class.metadata.name.clone().unwrap_or_default();
            let is_known = self.waypoints.iter().chain(&self.gateways).any(|known| **known == *name);
            if !is_known {
                self.write_status(&api, &name, class, &refused, &[]).await?;
            }
        }
        Ok(())
    }

    /// Makes an object if it is absent, and writes the status of one that is ours.
    async fn announce(
        &self,
        kind: &KindInfo,
        version: &str,
        name: &str,
        description: &str,
        accepted: &Condition,
        features: &[&str],
    ) -> Result<(), CallError> {
        let api = api(&self.client, kind, version);
        let object = match call(api.get_opt(name)).await? {
            Some(object) => object,
            None => {
                let manifest = json!({
                    "apiVersion": format!("{}/{version}", kind.group), "kind": kind.name, "metadata": { "name": name },
                    "spec": { "controllerName": CONTROLLER, "description": description },
                });
                let parameters = PatchParams::apply(FIELD_MANAGER);
                self.metrics.written.fetch_add(1, Ordering::Relaxed);
                call(api.patch(name, &parameters, &Patch::Apply(manifest))).await?
            }
        };
        self.write_status(&api, name, object, accepted, features).await
    }

    /// Writes the status of an object that is ours, if it differs.
    async fn write_status(
        &self,
        api: &Api<DynamicObject>,
        name: &str,
        object: DynamicObject,
        accepted: &Condition,
        features: &[&str],
    ) -> Result<(), CallError> {
        if owner_of(&object.data) != Owned::ByUs {
            return Ok(());
        }
        let resource_version = object.metadata.resource_version.clone();
        let object = serde_json::to_value(object).unwrap_or_default();
        let Some(status) = plan(&object, accepted, features, &now()) else { return Ok(()) };
        let patch = json!({ "metadata": { "resourceVersion": resource_version }, "status": status });
        let parameters = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        call(api.patch_status(name, &parameters, &Patch::Merge(patch))).await?;
        self.metrics.written.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// `status` of an object of ours, if it must differ from what it is.
fn plan(object: &Value, accepted: &Condition, features: &[&str], now: &str) -> Option<Value> {
    let generation = object["metadata"]["generation"].as_i64();
    let present = object["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    // GEP-91: an object whose parameters the controller can't use is not accepted.
    let accepted = match accepted.met && !object["spec"]["parametersRef"].is_null() {
        false => accepted.clone(),
        true => {
            let message = "parameters are not supported: the chart's `waypoint` values are for all";
            Condition::new("Accepted", false, "InvalidParameters", message)
        }
    };
    let features: Vec<Value> = features.iter().map(|name| json!({ "name": name })).collect();
    let status = json!({
        "conditions": conditions::merge(present, &[accepted], generation, now),
        "supportedFeatures": features,
    });
    let is_present = |field: &str| {
        let present = object["status"].get(field).cloned().unwrap_or_else(|| json!([]));
        present == status[field]
    };
    (!is_present("conditions") || !is_present("supportedFeatures")).then_some(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_of_ours_is_accepted_and_names_its_features() {
        let ours = Condition::new("Accepted", true, "Accepted", "it is ours");
        let mut class = json!({ "metadata": { "generation": 3 }, "spec": { "controllerName": CONTROLLER } });
        let status = plan(&class, &ours, &FEATURES, "t").unwrap();
        let accepted = &status["conditions"][0];
        assert_eq!((&accepted["status"], &accepted["observedGeneration"]), (&json!("True"), &json!(3)));
        assert_eq!(status["supportedFeatures"][0]["name"], "Mesh");
        class["status"] = status;
        assert_eq!(plan(&class, &ours, &FEATURES, "t2"), None);
        class["metadata"]["generation"] = 4.into();
        class["spec"]["parametersRef"] = json!({ "group": "", "kind": "ConfigMap", "name": "p" });
        let refused = plan(&class, &ours, &FEATURES, "t2").unwrap();
        assert_eq!(refused["conditions"][0]["reason"], "InvalidParameters");
        assert_eq!(refused["conditions"][0]["observedGeneration"], 4);
        let unknown = Condition::new("Accepted", false, "Unsupported", "it is unknown");
        let refused = plan(&class, &unknown, &[], "t2").unwrap();
        assert_eq!(refused["conditions"][0]["reason"], "Unsupported");
        class["status"] = refused;
        class["status"].as_object_mut().unwrap().remove("supportedFeatures");
        assert_eq!(plan(&class, &unknown, &[], "t3"), None);
    }

    #[test]
    fn features_are_in_order() {
        assert!(FEATURES.is_sorted() && GATEWAY_FEATURES.is_sorted());
    }
}
