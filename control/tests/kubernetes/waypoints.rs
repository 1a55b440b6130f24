//! Waypoints: what is deployed for a Gateway, how its status follows, and what is never touched.

use std::io::Write;

use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::api_server::ApiServer;
use crate::replica::Replica;
use crate::{definition, namespace, service, until};

const GATEWAY: (&str, &str) = ("gateway.networking.k8s.io/v1", "Gateway");
const CLASS: (&str, &str) = ("gateway.networking.k8s.io/v1", "GatewayClass");
/// A kind of Gateway API's experimental channel, which the chart does not install.
pub(crate) const MESH: (&str, &str) = ("gateway.networking.x-k8s.io/v1alpha1", "XMesh");
const ROUTE: (&str, &str) = ("gateway.networking.k8s.io/v1", "HTTPRoute");
const DEPLOYMENT: (&str, &str) = ("apps/v1", "Deployment");
/// The definitions that the chart installs.
const DEFINITIONS: [&str; 3] = [
    include_str!(
        "../../../charts/ambit/files/crds/gateway-api/gatewayclasses.gateway.networking.k8s.io.yaml"
    ),
    include_str!("../../../charts/ambit/files/crds/gateway-api/gateways.gateway.networking.k8s.io.yaml"),
    include_str!("../../../charts/ambit/files/crds/gateway-api/httproutes.gateway.networking.k8s.io.yaml"),
];
const TEMPLATE: &str = "
deployment:
  spec:
    replicas: 2
    template: {spec: {containers: [{name: waypoint, image: 'ambit/waypoint:1', env: [{name: NETWORK, value: ''}]}]}}
podDisruptionBudget: {spec: {maxUnavailable: 1}}
";

/// An API server with the kinds of Gateway API, and a replica that deploys waypoints.
async fn start() -> (ApiServer, NamedTempFile) {
    let server = ApiServer::start().await;
    for definition in DEFINITIONS {
        server.apply(definition).await;
    }
    server.apply_value(definition_of_mesh()).await;
    server.apply_value(namespace("shop")).await;
    (server, template())
}

/// The definition of [`MESH`], which takes any fields.
pub(crate) fn definition_of_mesh() -> Value {
    let mut mesh = definition("gateway.networking.x-k8s.io", MESH.1, "xmeshes");
    mesh["spec"]["scope"] = "Cluster".into();
    mesh["spec"]["versions"][0]["name"] = "v1alpha1".into();
    // Kinds in groups of Kubernetes need an approval.
    mesh["metadata"]["annotations"] =
        json!({ "api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/gateway-api/pull/5371" });
    mesh
}

/// What replicas deploy for waypoints.
pub(crate) fn template() -> NamedTempFile {
    let mut template = NamedTempFile::new().unwrap();
    template.write_all(TEMPLATE.as_bytes()).unwrap();
    template
}

pub(crate) async fn replica(server: &ApiServer, template: &NamedTempFile) -> Replica {
    Replica::start_with(server, &["--waypoint-template", template.path().to_str().unwrap()]).await
}

fn gateway(infrastructure: &Value) -> Value {
    json!({
        "apiVersion": GATEWAY.0, "kind": GATEWAY.1,
        "metadata": { "name": "waypoint", "namespace": "shop" },
        "spec": {
            "gatewayClassName": "ambit-waypoint", "infrastructure": infrastructure,
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
        },
    })
}

fn parameters(deployment: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "parameters", "namespace": "shop" },
        "data": { "deployment": deployment },
    })
}

/// Waits until a condition of the Gateway has this status and reason, and returns the Gateway.
async fn condition_of(server: &ApiServer, condition: &str, status: &str, reason: &str) -> Value {
    until(&format!("{condition} is {status} {reason}"), async || {
        let gateway = server.get(GATEWAY.0, GATEWAY.1, "shop", "waypoint").await?;
        let conditions = gateway["status"]["conditions"].as_array()?;
        let found = conditions.iter().find(|found| found["type"] == condition)?;
        let observed = found["observedGeneration"] == gateway["metadata"]["generation"];
        (observed && found["status"] == status && found["reason"] == reason).then(|| gateway.clone())
    })
    .await
}

async fn deployment(server: &ApiServer, holds: impl Fn(&Value) -> bool) -> Value {
    until("the Deployment is as it must be", async || {
        let found = server.get(DEPLOYMENT.0, DEPLOYMENT.1, "shop", "waypoint").await?;
        holds(&found).then_some(found)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_is_deployed_and_its_status_follows() {
    let (server, template) = start().await;
    let _replica = replica(&server, &template).await;
    let class = until("the class is accepted", async || {
        let class = server.get(CLASS.0, CLASS.1, "", "ambit-waypoint").await?;
        let features = class["status"]["supportedFeatures"].as_array()?;
        features.iter().any(|feature| feature["name"] == "Mesh").then_some(class)
    })
    .await;
    assert_eq!(class["spec"]["controllerName"], "ambit.dev/mesh-controller");
    let mesh = until("the mesh is announced", async || {
        let mesh = server.get(MESH.0, MESH.1, "", "ambit").await?;
        (mesh["status"]["conditions"][0]["status"] == "True").then_some(mesh)
    })
    .await;
    assert_eq!(mesh["spec"]["controllerName"], class["spec"]["controllerName"]);
    assert_eq!(mesh["status"]["supportedFeatures"], class["status"]["supportedFeatures"]);

    server.apply_value(parameters("spec: {template: {spec: {nodeSelector: {pool: mesh}}}}")).await;
    let reference = json!({ "group": "", "kind": "ConfigMap", "name": "parameters" });
    server.apply_value(gateway(&json!({ "labels": { "team": "a" }, "parametersRef": reference }))).await;
    condition_of(&server, "Accepted", "True", "Accepted").await;
    let waiting = condition_of(&server, "Programmed", "False", "Pending").await;
    assert_eq!(waiting["status"].get("addresses").cloned().unwrap_or(json!([])), json!([]));
    let found = deployment(&server, |_| true).await;
    let pod = &found["spec"]["template"];
    assert_eq!(pod["spec"]["containers"][0]["image"], "ambit/waypoint:1");
    assert_eq!(pod["spec"]["serviceAccountName"], "waypoint");
    assert_eq!(pod["spec"]["nodeSelector"]["pool"], "mesh");
    assert_eq!(pod["metadata"]["labels"]["team"], "a");
    assert_eq!(pod["metadata"]["labels"]["gateway.istio.io/managed"], "istio.io-mesh-controller");
    for (version, kind) in [("v1", "Service"), ("v1", "ServiceAccount"), ("policy/v1", "PodDisruptionBudget")]
    {
        let object = server.get(version, kind, "shop", "waypoint").await.expect(kind);
        assert_eq!(object["metadata"]["ownerReferences"][0]["kind"], "Gateway", "{kind}");
    }

    let available = json!({ "replicas": 2, "readyReplicas": 2, "availableReplicas": 2 });
    server
        .set_status(json!({ "apiVersion": DEPLOYMENT.0, "kind": DEPLOYMENT.1,
        "metadata": { "name": "waypoint", "namespace": "shop" }, "status": available }))
        .await;
    let serving = condition_of(&server, "Programmed", "True", "Programmed").await;
    let service = server.get("v1", "Service", "shop", "waypoint").await.unwrap();
    assert_eq!(serving["status"]["addresses"][0]["value"], service["spec"]["clusterIP"]);
    assert_eq!(serving["status"]["listeners"][0]["name"], "mesh");

    // An edit of the Gateway and one of the Deployment itself both come to what it must be.
    server.apply_value(gateway(&json!({ "labels": { "team": "b" } }))).await;
    let generation = |found: &Value| found["metadata"]["labels"]["team"] == "b";
    let found = deployment(&server, generation).await;
    assert_eq!(found["spec"]["template"]["spec"].get("nodeSelector"), None, "parameters that are gone");
    let mut scaled = found.clone();
    scaled["metadata"] = json!({ "name": "waypoint", "namespace": "shop" });
    scaled["spec"]["replicas"] = 7.into();
    scaled.as_object_mut().unwrap().remove("status");
    server.apply_value(scaled).await;
    deployment(&server, |found| found["spec"]["replicas"] == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_changes_its_class_keeps_nothing_of_ours() {
    let (server, template) = start().await;
    let _replica = replica(&server, &template).await;
    server.apply_value(gateway(&json!({}))).await;
    deployment(&server, |_| true).await;
    let available = json!({ "replicas": 2, "readyReplicas": 2, "availableReplicas": 2 });
    server
        .set_status(json!({ "apiVersion": DEPLOYMENT.0, "kind": DEPLOYMENT.1,
        "metadata": { "name": "waypoint", "namespace": "shop" }, "status": available }))
        .await;
    condition_of(&server, "Programmed", "True", "Programmed").await;

    let mut others = gateway(&json!({}));
    others["spec"]["gatewayClassName"] = "istio-waypoint".into();
    server.apply_value(others).await;
    for (version, kind) in [
        ("apps/v1", "Deployment"),
        ("v1", "Service"),
        ("v1", "ServiceAccount"),
        ("policy/v1", "PodDisruptionBudget"),
    ] {
        until(&format!("the {kind} is gone"), async || {
            server.get(version, kind, "shop", "waypoint").await.is_none().then_some(())
        })
        .await;
    }
    let left = until("the status says nothing of it", async || {
        let gateway = server.get(GATEWAY.0, GATEWAY.1, "shop", "waypoint").await?;
        let conditions = gateway["status"]["conditions"].as_array()?;
        conditions.iter().all(|condition| condition["status"] == "Unknown").then_some(gateway)
    })
    .await;
    assert!(left["status"]["addresses"].as_array().is_none_or(Vec::is_empty), "{left}");
    assert!(left["status"]["listeners"].as_array().is_none_or(Vec::is_empty), "{left}");

    // And back.
    server.apply_value(gateway(&json!({}))).await;
    deployment(&server, |_| true).await;
    condition_of(&server, "Programmed", "False", "Pending").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_autoscaler_begins_with_the_pods_that_there_are() {
    let (server, template) = start().await;
    let _replica = replica(&server, &template).await;
    let own = json!({ "deployment": "spec: {replicas: 4, template: {spec: {terminationGracePeriodSeconds: 300}}}" });
    let parameters = |data: &Value| {
        json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": data,
            "metadata": { "name": "parameters", "namespace": "shop" } })
    };
    server.apply_value(parameters(&own)).await;
    let reference = json!({ "group": "", "kind": "ConfigMap", "name": "parameters" });
    server.apply_value(gateway(&json!({ "parametersRef": reference }))).await;
    let found = deployment(&server, |found| found["spec"]["replicas"] == 4).await;
    let container = &found["spec"]["template"]["spec"]["containers"][0];
    let drain = json!({ "name": "AMBIT_WAYPOINT_DRAIN_TIMEOUT", "value": "295s" });
    assert!(container["env"].as_array().unwrap().contains(&drain), "{container}");

    let mut scaled = own;
    scaled["horizontalPodAutoscaler"] = "spec: {minReplicas: 2, maxReplicas: 9}".into();
    server.apply_value(parameters(&scaled)).await;
    // Parameters are not watched: a change of the Gateway has them read at once.
    let infrastructure = json!({ "parametersRef": reference, "labels": { "team": "a" } });
    server.apply_value(gateway(&infrastructure)).await;
    until("the autoscaler is there", async || {
        server.get("autoscaling/v2", "HorizontalPodAutoscaler", "shop", "waypoint").await
    })
    .await;
    let found = deployment(&server, |found| found["metadata"]["labels"]["team"] == "a").await;
    assert_eq!(found["spec"]["replicas"], 4, "{found}");
    // From now on the number is the autoscaler's.
    let mut by_autoscaler = json!({ "apiVersion": DEPLOYMENT.0, "kind": DEPLOYMENT.1,
        "metadata": { "name": "waypoint", "namespace": "shop" } });
    by_autoscaler["spec"]["replicas"] = 6.into();
    server.apply_value(by_autoscaler).await;
    let infrastructure = json!({ "parametersRef": reference, "labels": { "team": "b" } });
    server.apply_value(gateway(&infrastructure)).await;
    let found = deployment(&server, |found| found["metadata"]["labels"]["team"] == "b").await;
    assert_eq!(found["spec"]["replicas"], 6, "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_of_others_and_forbidden_parameters_are_refused() {
    let (server, template) = start().await;
    let foreign = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "waypoint", "namespace": "shop" },
        "spec": { "selector": { "app": "other" }, "ports": [{ "port": 80 }] },
    });
    server.apply_value(foreign).await;
    server.apply_value(gateway(&json!({}))).await;
    let _replica = replica(&server, &template).await;
    condition_of(&server, "Programmed", "False", "Invalid").await;
    let untouched = server.get("v1", "Service", "shop", "waypoint").await.unwrap();
    assert_eq!(untouched["spec"]["selector"], json!({ "app": "other" }));
    assert_eq!(server.get(DEPLOYMENT.0, DEPLOYMENT.1, "shop", "waypoint").await, None);
    server.delete("v1", "Service", "shop", "waypoint").await;
    condition_of(&server, "Programmed", "False", "Pending").await;

    server.apply_value(parameters("spec: {template: {spec: {hostNetwork: true}}}")).await;
    let reference = json!({ "group": "", "kind": "ConfigMap", "name": "parameters" });
    server.apply_value(gateway(&json!({ "parametersRef": reference }))).await;
    condition_of(&server, "Accepted", "False", "InvalidParameters").await;
    let found = deployment(&server, |_| true).await;
    assert_eq!(found["spec"]["template"]["spec"].get("hostNetwork"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_have_an_entry_for_each_parent_of_the_mesh() {
    let (server, template) = start().await;
    server.apply_value(service("reviews", 9080)).await;
    let parent =
        |name: &str, port: u16| json!({ "group": "", "kind": "Service", "name": name, "port": port });
    let foreign = json!({
        "parentRef": { "group": GATEWAY.0.split('/').next(), "kind": "Gateway", "name": "edge" },
        "controllerName": "example.com/gateway",
        "conditions": [{ "type": "Accepted", "status": "True", "reason": "Accepted", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z" }],
    });
    server
        .apply_value(json!({
            "apiVersion": ROUTE.0, "kind": ROUTE.1, "metadata": { "name": "reviews", "namespace": "shop" },
            "spec": {
                "parentRefs": [parent("reviews", 9080), parent("gone", 1), { "name": "edge" }],
                "rules": [{ "backendRefs": [{ "name": "gone", "port": 80 }] }],
            },
            "status": { "parents": [foreign] },
        }))
        .await;
    let _replica = replica(&server, &template).await;
    let parents = until("the entries of the route", async || {
        let route = server.get(ROUTE.0, ROUTE.1, "shop", "reviews").await?;
        let parents = route["status"]["parents"].as_array()?.clone();
        (parents.len() == 3).then_some(parents)
    })
    .await;
    assert_eq!(parents[0]["controllerName"], "example.com/gateway");
    let conditions = |entry: &Value| -> Vec<String> {
        let conditions = entry["conditions"].as_array().unwrap().iter();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        conditions
            .map(|c| format!("{} {} {}", text(&c["type"]), text(&c["status"]), text(&c["reason"])))
            .collect()
    };
    assert_eq!(conditions(&parents[1]), ["Accepted True Accepted", "ResolvedRefs False BackendNotFound"]);
    assert_eq!(
        conditions(&parents[2]),
        ["Accepted False NoMatchingParent", "ResolvedRefs False BackendNotFound"]
    );
    assert_eq!(parents[2]["parentRef"]["port"], 1);
}
