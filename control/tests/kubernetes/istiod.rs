//! Istio's control plane in the same cluster, played: what it writes, with its field managers and in its words. It writes an
//! object when the object changes, by server-side apply with force, and its conditions have the same types as ours.

use kube::Api;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::api_server::ApiServer;
use crate::replica::Replica;
use crate::waypoints::{replica, template};
use crate::{namespace, policy, service, until};

const POLICY: (&str, &str) = ("security.istio.io/v1", "AuthorizationPolicy");
const ENTRY: (&str, &str) = ("networking.istio.io/v1", "ServiceEntry");
const CLASS: (&str, &str) = ("gateway.networking.k8s.io/v1", "GatewayClass");
const GATEWAY: (&str, &str) = ("gateway.networking.k8s.io/v1", "Gateway");
const DEFINITIONS: [&str; 4] = [
    include_str!(
        "../../../charts/ambit/files/crds/gateway-api/gatewayclasses.gateway.networking.k8s.io.yaml"
    ),
    include_str!("../../../charts/ambit/files/crds/gateway-api/gateways.gateway.networking.k8s.io.yaml"),
    include_str!("../../../charts/ambit/files/crds/istio/authorizationpolicies.security.istio.io.yaml"),
    include_str!("../../../charts/ambit/files/crds/istio/serviceentries.networking.istio.io.yaml"),
];

/// Writes a status as istiod does.
async fn apply_status(
    server: &ApiServer,
    (version, kind): (&str, &str),
    name: &str,
    manager: &str,
    status: Value,
) {
    let (group, of_group) = version.split_once('/').unwrap_or(("", version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, of_group, kind));
    let api: Api<DynamicObject> = Api::namespaced_with(server.admin.clone(), "shop", &resource);
    let patch =
        json!({ "apiVersion": version, "kind": kind, "metadata": { "name": name }, "status": status });
    api.patch_status(name, &PatchParams::apply(manager).force(), &Patch::Apply(patch)).await.unwrap();
}

fn condition(name: &str, status: &str, message: &str) -> Value {
    json!({ "type": name, "status": status, "reason": "OfIstio", "message": message,
        "lastTransitionTime": "2026-01-01T00:00:00Z" })
}

/// The conditions of an object, by type.
async fn conditions(server: &ApiServer, (version, kind): (&str, &str), name: &str) -> Vec<(String, String)> {
    let object = server.get(version, kind, "shop", name).await.unwrap_or_default();
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    conditions.iter().map(|one| (text(&one["type"]), text(&one["message"]))).collect()
}

/// Waits until a condition is in our words again.
async fn ours(server: &ApiServer, object: (&str, &str), name: &str, condition: &str) {
    until(&format!("{condition} of {name} in our words"), async || {
        let found = conditions(server, object, name).await;
        found.iter().any(|(of, message)| of == condition && !message.contains("istiod")).then_some(())
    })
    .await;
}

/// What has to be the same when nothing is written any more.
async fn versions(server: &ApiServer) -> Vec<Value> {
    let mut versions = Vec::new();
    for ((version, kind), name) in [(("v1", "Service"), "reviews"), (POLICY, "deny"), (ENTRY, "entry")] {
        let object = server.get(version, kind, "shop", name).await.unwrap();
        versions.push(object["metadata"]["resourceVersion"].clone());
    }
    versions
}

async fn start() -> (ApiServer, Replica, NamedTempFile) {
    let server = ApiServer::start().await;
    for definition in DEFINITIONS {
        server.apply(definition).await;
    }
    server.apply_value(namespace("shop")).await;
    let template = template();
    let replica = replica(&server, &template).await;
    (server, replica, template)
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_that_istiod_writes_too_come_to_rest() {
    let (server, replica, _template) = start().await;
    let mut bound = service("reviews", 9080);
    bound["metadata"]["labels"] = json!({ "istio.io/use-waypoint": "gone" });
    server.apply_value(bound).await;
    server.apply_value(policy("deny", &json!({ "action": "DENY", "rules": [{}] }))).await;
    // It had its address from istiod, of the range that both allocate from.
    let entry = json!({ "apiVersion": ENTRY.0, "kind": ENTRY.1, "metadata": { "name": "entry", "namespace": "shop" },
        "spec": { "hosts": ["a.example"], "resolution": "DNS", "ports": [{ "number": 80, "name": "http", "protocol": "HTTP" }] },
        "status": { "addresses": [{ "host": "a.example", "value": "240.240.3.4" }, { "host": "a.example", "value": "2001:2::f0f0:304" }] } });
    server.apply_value(entry).await;
    let bound = "istio.io/WaypointBound";
    ours(&server, ("v1", "Service"), "reviews", bound).await;
    ours(&server, POLICY, "deny", "ZtunnelAccepted").await;

    let service =
        [condition(bound, "False", "istiod: no waypoint"), condition("istio.io/Other", "True", "istiod")];
    apply_status(
        &server,
        ("v1", "Service"),
        "reviews",
        "istio-ambient-service",
        json!({ "conditions": service }),
    )
    .await;
    let accepted = [condition("ZtunnelAccepted", "True", "istiod: attached to ztunnel")];
    apply_status(&server, POLICY, "deny", "istio-ambient-ztunnel-policy", json!({ "conditions": accepted }))
        .await;
    ours(&server, ("v1", "Service"), "reviews", bound).await;
    ours(&server, POLICY, "deny", "ZtunnelAccepted").await;
    // What only istiod says stays, and so does the address that it gave.
    let kept = conditions(&server, ("v1", "Service"), "reviews").await;
    assert!(kept.contains(&("istio.io/Other".to_owned(), "istiod".to_owned())), "{kept:?}");
    let entry = server.get(ENTRY.0, ENTRY.1, "shop", "entry").await.unwrap();
    assert_eq!(entry["status"]["addresses"][0]["value"], "240.240.3.4");

    // Nobody changes anything: nothing is written.
    let (before, written) = (versions(&server).await, replica.metric("ambit_control_objects_written_total"));
    server.apply_value(policy("later", &json!({}))).await;
    ours(&server, POLICY, "later", "ZtunnelAccepted").await;
    assert_eq!(versions(&server).await, before);
    assert_eq!(replica.metric("ambit_control_objects_written_total"), written + 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn classes_and_gateways_of_istio_stay_istios() {
    let (server, _replica, _template) = start().await;
    let class = |name: &str, controller: &str| {
        json!({ "apiVersion": CLASS.0, "kind": CLASS.1, "metadata": { "name": name },
            "spec": { "controllerName": controller } })
    };
    server.apply_value(class("istio-waypoint", "istio.io/mesh-controller")).await;
    server.apply_value(class("istio", "istio.io/gateway-controller")).await;
    let gateway = |name: &str, class: &str, listener: &Value| {
        json!({ "apiVersion": GATEWAY.0, "kind": GATEWAY.1, "metadata": { "name": name, "namespace": "shop" },
            "spec": { "gatewayClassName": class, "listeners": [listener] } })
    };
    let mesh = json!({ "name": "mesh", "port": 15008, "protocol": "HBONE" });
    let http = json!({ "name": "http", "port": 80, "protocol": "HTTP" });
    server.apply_value(gateway("theirs", "istio-waypoint", &mesh)).await;
    server.apply_value(gateway("edge", "istio", &http)).await;
    let programmed = json!({ "addresses": [{ "type": "IPAddress", "value": "10.96.7.7" }],
        "conditions": [condition("Programmed", "True", "istiod")] });
    for name in ["theirs", "edge"] {
        apply_status(&server, GATEWAY, name, "istio.io/gateway-controller", programmed.clone()).await;
    }
    // One of ours comes later and is looked at after them.
    server.apply_value(gateway("ours", "ambit-waypoint", &mesh)).await;
    until("ours is deployed", async || server.get("apps/v1", "Deployment", "shop", "ours").await).await;
    for name in ["theirs", "edge"] {
        let found = server.get(GATEWAY.0, GATEWAY.1, "shop", name).await.unwrap();
        assert_eq!(found["status"]["addresses"], programmed["addresses"], "{found}");
        let said = conditions(&server, GATEWAY, name).await;
        let programmed = said.iter().find(|(of, _)| of == "Programmed").map(|(_, message)| message.as_str());
        assert_eq!(programmed, Some("istiod"), "{said:?}");
        assert_eq!(server.get("apps/v1", "Deployment", "shop", name).await, None);
    }
    // A service may use it: what is bound to it is served by both meshes.
    let mut bound = service("reviews", 9080);
    bound["metadata"]["labels"] = json!({ "istio.io/use-waypoint": "theirs" });
    server.apply_value(bound).await;
    until("the service is bound to Istio's waypoint", async || {
        let service = server.get("v1", "Service", "shop", "reviews").await?;
        let conditions = service["status"]["conditions"].as_array()?;
        conditions
            .iter()
            .any(|one| one["type"] == "istio.io/WaypointBound" && one["status"] == "True")
            .then_some(())
    })
    .await;
    for name in ["istio-waypoint", "istio"] {
        let class = server.get(CLASS.0, CLASS.1, "", name).await.unwrap();
        let managers = class["metadata"]["managedFields"].to_string();
        assert!(!managers.contains("ambit"), "{managers}");
    }
}
