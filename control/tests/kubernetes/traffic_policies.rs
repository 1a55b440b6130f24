//! TrafficPolicies: what the schema of the chart's definition refuses, and what their status says.

use kube::api::{DynamicObject, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::api_server::ApiServer;
use crate::replica::Replica;
use crate::{namespace, until};

const POLICY: (&str, &str) = ("ambit.dev/v1alpha1", "TrafficPolicy");
const DEFINITIONS: [&str; 2] = [
    include_str!("../../../charts/ambit/files/crds/ambit/trafficpolicies.ambit.dev.yaml"),
    include_str!("../../../charts/ambit/files/crds/gateway-api/gateways.gateway.networking.k8s.io.yaml"),
];

async fn start() -> ApiServer {
    let server = ApiServer::start().await;
    for definition in DEFINITIONS {
        server.apply(definition).await;
    }
    server.apply_value(namespace("shop")).await;
    server
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": POLICY.0, "kind": POLICY.1,
        "metadata": { "name": name, "namespace": "shop" }, "spec": spec,
    })
}

fn target() -> Value {
    json!([{ "group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "waypoint" }])
}

/// Why the API server refuses a policy, if it does.
async fn refused(client: &Client, name: &str, spec: &Value) -> Option<String> {
    let kind = GroupVersionKind::gvk("ambit.dev", "v1alpha1", POLICY.1);
    let resource = ApiResource::from_gvk_with_plural(&kind, "trafficpolicies");
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), "shop", &resource);
    let object: DynamicObject = serde_json::from_value(policy(name, spec)).unwrap();
    let parameters = PostParams { dry_run: true, ..PostParams::default() };
    api.create(&parameters, &object).await.err().map(|error| error.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schema_refuses_what_can_not_be_meant() {
    let server = start().await;
    let limit = |fields: Value| {
        let mut limit = json!({ "name": "a", "requests": 1, "interval": "1s" });
        limit.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        json!({ "targetRefs": target(), "rateLimits": [limit] })
    };
    let to = |group: &str, kind: &str| json!({ "targetRefs": [{ "group": group, "kind": kind, "name": "a" }], "conditions": [{ "expression": "true" }] });
    until("the definition is served", async || {
        refused(&server.admin, "a", &limit(json!({}))).await.is_none().then_some(())
    })
    .await;
    let good = [
        limit(json!({ "burst": 5, "status": 503, "when": "true", "interval": "1h30m" })),
        limit(json!({ "key": [{ "type": "Route" }, { "type": "Header", "header": "X-User" }] })),
        to("", "Service"),
        to("networking.istio.io", "ServiceEntry"),
        to("gateway.networking.k8s.io", "GRPCRoute"),
    ];
    for spec in good {
        assert_eq!(refused(&server.admin, "a", &spec).await, None, "{spec}");
    }
    let one = json!({ "name": "a", "requests": 1, "interval": "1s" });
    let bad = [
        (json!({ "targetRefs": target() }), "at least one of"),
        (json!({ "targetRefs": [], "conditions": [{ "expression": "true" }] }), "spec.targetRefs"),
        (json!({ "targetRefs": target(), "rateLimits": [one, one] }), "Duplicate"),
        (to("", "Gateway"), "the target must be"),
        (to("networking.istio.io", "Service"), "the target must be"),
        (to("", "Pod"), "Unsupported value"),
        (limit(json!({ "requests": 0 })), "requests"),
        (limit(json!({ "requests": 1_000_001 })), "requests"),
        (limit(json!({ "interval": "soon" })), "interval"),
        (limit(json!({ "status": 200 })), "status"),
        (limit(json!({ "key": [{ "type": "Header" }] })), "header must be given"),
        (limit(json!({ "key": [{ "type": "Route", "header": "a" }] })), "header must be given"),
        (limit(json!({ "when": "a".repeat(2049) })), "when"),
    ];
    for (spec, wanted) in bad {
        let problem = refused(&server.admin, "a", &spec).await.unwrap_or_default();
        assert!(problem.contains(wanted), "{spec}: {problem}");
    }
}

/// Waits until what is said of a policy at its only ancestor has this status and reason.
async fn accepted(server: &ApiServer, name: &str, status: &str, reason: &str) -> Value {
    until(&format!("{name} is {status} {reason}"), async || {
        let policy = server.get(POLICY.0, POLICY.1, "shop", name).await?;
        let [ancestor] = &policy["status"]["ancestors"].as_array()?[..] else { return None };
        let found = ancestor["conditions"].as_array()?.first()?;
        let observed = found["observedGeneration"] == policy["metadata"]["generation"];
        (observed && found["status"] == status && found["reason"] == reason).then(|| ancestor.clone())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_says_where_a_policy_is_enforced() {
    let server = start().await;
    let _replica = Replica::start(&server).await;
    let gateway = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": { "name": "waypoint", "namespace": "shop" },
        "spec": {
            "gatewayClassName": "ambit-waypoint",
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
        },
    });
    let spec =
        |expression: &str| json!({ "targetRefs": target(), "conditions": [{ "expression": expression }] });
    server.apply_value(policy("first", &spec("true"))).await;
    accepted(&server, "first", "False", "TargetNotFound").await;
    server.apply_value(gateway).await;
    let ancestor = accepted(&server, "first", "True", "Accepted").await;
    assert_eq!(ancestor["controllerName"], "ambit.dev/mesh-controller");
    assert_eq!(ancestor["ancestorRef"]["kind"], "Gateway");
    assert_eq!(ancestor["ancestorRef"]["name"], "waypoint");
    // Only the control plane knows which names there are.
    server.apply_value(policy("first", &spec("request.pth == 'a'"))).await;
    accepted(&server, "first", "False", "Invalid").await;
    server.apply_value(policy("first", &spec("request.path == '/a'"))).await;
    accepted(&server, "first", "True", "Accepted").await;
}
