//! Waypoints: Gateways of a waypoint's class, as the API server has them.

use ambit_control::api_server::{CallError, call};
use ambit_control::index::CONTROLLER;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, ResourceExt};
use serde::Serialize;

use crate::cluster::{Cluster, list};
use crate::output::{Palette, table};

/// The class of Ambit's waypoints.
pub(crate) const CLASS: &str = "ambit-waypoint";
/// Classes whose Gateways are waypoints: the second is Istio's, which the chart can own.
pub(crate) const CLASSES: [&str; 2] = [CLASS, "istio-waypoint"];
/// Label that says what a waypoint is for.
pub(crate) const WAYPOINT_FOR: &str = "istio.io/waypoint-for";

/// A waypoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Waypoint {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) class: String,
    /// What it is for: service, workload, all or none.
    #[serde(rename = "for")]
    pub(crate) serves: String,
    pub(crate) addresses: Vec<String>,
    /// The condition `Programmed`; nothing while no controller wrote it.
    pub(crate) programmed: Option<bool>,
    /// What the condition says while it does not hold.
    pub(crate) message: String,
}

impl Waypoint {
    /// Reads a Gateway; nothing if it is no waypoint.
    pub(crate) fn read(gateway: &DynamicObject) -> Option<Waypoint> {
        let class = gateway.data["spec"]["gatewayClassName"].as_str()?;
        if !CLASSES.contains(&class) {
            return None;
        }
        let status = &gateway.data["status"];
        let addresses = status["addresses"].as_array().into_iter().flatten();
        let conditions = status["conditions"].as_array().into_iter().flatten();
        let programmed = conditions.into_iter().find(|condition| condition["type"] == "Programmed");
        let holds = programmed.map(|condition| condition["status"] == "True");
        let message = programmed.filter(|_| holds == Some(false)).and_then(|c| c["message"].as_str());
        Some(Waypoint {
            namespace: gateway.namespace().unwrap_or_default(),
            name: gateway.name_any(),
            class: class.to_owned(),
            serves: gateway.labels().get(WAYPOINT_FOR).cloned().unwrap_or_else(|| "service".to_owned()),
            addresses: addresses.filter_map(|a| a["value"].as_str().map(str::to_owned)).collect(),
            programmed: holds,
            message: message.unwrap_or_default().to_owned(),
        })
    }

    /// Whether it is used: it counts once it has an address.
    pub(crate) fn is_ready(&self) -> bool {
        !self.addresses.is_empty() && self.programmed != Some(false)
    }

    /// Its state in a few words.
    pub(crate) fn state(&self) -> String {
        match (self.is_ready(), self.programmed) {
            (true, _) => "ready".to_owned(),
            (false, Some(false)) if !self.message.is_empty() => format!("not ready: {}", self.message),
            (false, None) if self.addresses.is_empty() => {
                "not ready: no controller deployed it yet".to_owned()
            }
            (false, _) => "not ready".to_owned(),
        }
    }
}

/// The API of Gateways.
pub(crate) fn api(cluster: &Cluster, namespace: Option<&str>) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "Gateway");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "gateways");
    match namespace {
        Some(namespace) => Api::namespaced_with(cluster.client.clone(), namespace, &resource),
        None => Api::all_with(cluster.client.clone(), &resource),
    }
}

/// The classes of waypoints whose Gateways the control plane deploys: Istio's may be Istio's own.
///
/// # Errors
/// When the API server can't be asked.
pub(crate) async fn own_classes(cluster: &Cluster) -> Result<Vec<&'static str>, CallError> {
    let gvk = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "GatewayClass");
    let resource = ApiResource::from_gvk_with_plural(&gvk, "gatewayclasses");
    let api: Api<DynamicObject> = Api::all_with(cluster.client.clone(), &resource);
    let mut own = Vec::with_capacity(CLASSES.len());
    for class in CLASSES {
        if is_own(class, call(api.get_opt(class)).await?.as_ref()) {
            own.push(class);
        }
    }
    Ok(own)
}

fn is_own(class: &str, object: Option<&DynamicObject>) -> bool {
    match object {
        Some(object) => object.data["spec"]["controllerName"] == CONTROLLER,
        // The control plane is not there, or no more.
        None => class == CLASS,
    }
}

/// The waypoints of one namespace or all; none where the kind is not defined.
///
/// # Errors
/// When the API server can't be asked.
pub(crate) async fn waypoints(
    cluster: &Cluster,
    namespace: Option<&str>,
) -> Result<Vec<Waypoint>, CallError> {
    match list(&api(cluster, namespace), "").await {
        Ok(found) => Ok(found.iter().filter_map(Waypoint::read).collect()),
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Waypoints for people.
pub(crate) fn render(waypoints: &[Waypoint], paint: Palette) -> String {
    let row = |w: &Waypoint| {
        [w.namespace.clone(), w.name.clone(), w.serves.clone(), w.addresses.join(","), w.state()]
    };
    table(paint, ["NAMESPACE", "WAYPOINT", "FOR", "ADDRESS", "STATE"], waypoints.iter().map(row))
}

/// A Gateway from its manifest, as a test has it.
#[cfg(test)]
pub(crate) fn gateway(manifest: serde_json::Value) -> DynamicObject {
    serde_json::from_value(manifest).unwrap_or_else(|error| panic!("a Gateway: {error}"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_class_of_another_controller_is_not_our_own() {
        let class = |controller: &str| {
            gateway(json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
                "metadata": { "name": "istio-waypoint" }, "spec": { "controllerName": controller },
            }))
        };
        assert!(is_own("istio-waypoint", Some(&class(CONTROLLER))));
        assert!(!is_own("istio-waypoint", Some(&class("istio.io/mesh-controller"))));
        assert!(!is_own("istio-waypoint", None));
        assert!(is_own(CLASS, None));
    }

    #[test]
    fn a_waypoint_is_ready_with_an_address() {
        let of = |class: &str, status: Value| {
            Waypoint::read(&gateway(json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
                "metadata": { "namespace": "shop", "name": "waypoint" },
                "spec": { "gatewayClassName": class }, "status": status,
            })))
        };
        assert_eq!(of("istio", json!({})), None);
        let state = |status: Value| of(CLASS, status).map(|waypoint| waypoint.state());
        let state = |status| state(status).unwrap_or_default();
        assert_eq!(state(json!({})), "not ready: no controller deployed it yet");
        assert_eq!(state(json!({ "addresses": [{ "value": "10.0.0.1" }] })), "ready");
        let pending = json!([{ "type": "Programmed", "status": "False", "message": "no pod is ready" }]);
        assert_eq!(state(json!({ "conditions": pending })), "not ready: no pod is ready");
    }
}
