//! Every status that the control plane writes, read back from the API server: with two replicas, after the one that writes has
//! died, and after a time without any.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::api_server::ApiServer;
use crate::replica::Replica;
use crate::waypoints::{MESH, definition_of_mesh, replica, template};
use crate::{namespace, until, until_true};

type Kind = (&'static str, &'static str);

const SERVICE: Kind = ("v1", "Service");
const SERVICE_ENTRY: Kind = ("networking.istio.io/v1", "ServiceEntry");
const WORKLOAD_ENTRY: Kind = ("networking.istio.io/v1", "WorkloadEntry");
const VIRTUAL_SERVICE: Kind = ("networking.istio.io/v1", "VirtualService");
const DESTINATION_RULE: Kind = ("networking.istio.io/v1", "DestinationRule");
const POLICY: Kind = ("security.istio.io/v1", "AuthorizationPolicy");
const REQUEST_AUTHENTICATION: Kind = ("security.istio.io/v1", "RequestAuthentication");
const GATEWAY: Kind = ("gateway.networking.k8s.io/v1", "Gateway");
const CLASS: Kind = ("gateway.networking.k8s.io/v1", "GatewayClass");
const ROUTE: Kind = ("gateway.networking.k8s.io/v1", "HTTPRoute");
const BACKEND_TLS: Kind = ("gateway.networking.k8s.io/v1", "BackendTLSPolicy");
const TRAFFIC_POLICY: Kind = ("ambit.dev/v1alpha1", "TrafficPolicy");

/// Where the conditions are, which, and what they must be.
const CONDITIONS: [(Kind, &str, &str, &str, &str); 24] = [
    (SERVICE, "bound", "/status/conditions", "istio.io/WaypointBound", "True"),
    (SERVICE, "unbound", "/status/conditions", "istio.io/WaypointBound", "False"),
    (SERVICE_ENTRY, "entry", "/status/conditions", "istio.io/WaypointBound", "True"),
    (SERVICE_ENTRY, "loser", "/status/conditions", "ambit.dev/HostsAccepted", "False"),
    (WORKLOAD_ENTRY, "machine", "/status/conditions", "istio.io/WaypointBound", "False"),
    (POLICY, "l4", "/status/conditions", "ZtunnelAccepted", "True"),
    (POLICY, "l7-at-l4", "/status/conditions", "ZtunnelAccepted", "False"),
    (POLICY, "l7", "/status/conditions", "WaypointAccepted", "True"),
    (POLICY, "l7-lost", "/status/conditions", "WaypointAccepted", "False"),
    (VIRTUAL_SERVICE, "bound", "/status/conditions", "WaypointAccepted", "True"),
    (DESTINATION_RULE, "bound", "/status/conditions", "WaypointAccepted", "True"),
    (REQUEST_AUTHENTICATION, "unbound", "/status/conditions", "WaypointAccepted", "False"),
    (GATEWAY, "waypoint", "/status/conditions", "Accepted", "True"),
    (GATEWAY, "waypoint", "/status/conditions", "Programmed", "True"),
    (GATEWAY, "waypoint", "/status/listeners/0/conditions", "Accepted", "True"),
    (GATEWAY, "waypoint", "/status/listeners/0/conditions", "Programmed", "True"),
    (CLASS, "ambit-waypoint", "/status/conditions", "Accepted", "True"),
    (CLASS, "ambit", "/status/conditions", "Accepted", "True"),
    (MESH, "ambit", "/status/conditions", "Accepted", "True"),
    (ROUTE, "bound", "/status/parents/0/conditions", "Accepted", "True"),
    (ROUTE, "bound", "/status/parents/0/conditions", "ResolvedRefs", "False"),
    (BACKEND_TLS, "bound", "/status/ancestors/0/conditions", "Accepted", "True"),
    (BACKEND_TLS, "bound", "/status/ancestors/0/conditions", "ResolvedRefs", "True"),
    (TRAFFIC_POLICY, "bound", "/status/ancestors/0/conditions", "Accepted", "True"),
];

/// Other fields of statuses, which must be there.
const FIELDS: [(Kind, &str, &str); 7] = [
    (SERVICE_ENTRY, "entry", "/status/addresses/0/value"),
    (SERVICE_ENTRY, "entry", "/status/addresses/1/value"),
    (GATEWAY, "waypoint", "/status/addresses/0/value"),
    (CLASS, "ambit-waypoint", "/status/supportedFeatures/0/name"),
    (CLASS, "ambit", "/status/supportedFeatures/0/name"),
    (MESH, "ambit", "/status/supportedFeatures/0/name"),
    (ROUTE, "bound", "/status/parents/0/controllerName"),
];

/// An API server with every definition that the chart installs.
async fn start() -> ApiServer {
    let server = ApiServer::start().await;
    let definitions = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/ambit/files/crds");
    for group in ["gateway-api", "istio", "ambit"] {
        for file in std::fs::read_dir(definitions.join(group)).unwrap() {
            server.apply(&std::fs::read_to_string(file.unwrap().path()).unwrap()).await;
        }
    }
    server.apply_value(definition_of_mesh()).await;
    server.apply_value(namespace("shop")).await;
    server
}

/// Every object of the table as it is.
async fn read(server: &ApiServer) -> BTreeMap<String, Value> {
    let named = CONDITIONS.iter().map(|(kind, name, ..)| (kind, name));
    let mut objects = BTreeMap::new();
    for ((version, kind), name) in named.chain(FIELDS.iter().map(|(kind, name, _)| (kind, name))) {
        let of = if matches!(*kind, "GatewayClass" | "XMesh") { "" } else { "shop" };
        let object = server.get(version, kind, of, name).await.unwrap_or_default();
        objects.insert(format!("{kind} {name}"), object);
    }
    objects
}

/// The first thing of the tables that is not in the objects.
fn missing(objects: &BTreeMap<String, Value>) -> Option<String> {
    let lacks = |((_, kind), name, list, condition, status): &(Kind, &str, &str, &str, &str)| {
        let object = &objects[&format!("{kind} {name}")];
        let conditions = object.pointer(list).and_then(Value::as_array);
        let found = conditions.into_iter().flatten().find(|found| found["type"] == *condition);
        let generation = &object["metadata"]["generation"];
        let is_right = found.is_some_and(|found| {
            found["status"] == *status && (generation.is_null() || found["observedGeneration"] == *generation)
        });
        (!is_right).then(|| format!("{kind} {name}: {condition} {status} in {object}"))
    };
    let lacks_field = |((_, kind), name, field): &(Kind, &str, &str)| {
        let object = &objects[&format!("{kind} {name}")];
        object.pointer(field).is_none().then(|| format!("{kind} {name}: {field} in {object}"))
    };
    CONDITIONS.iter().find_map(lacks).or_else(|| FIELDS.iter().find_map(lacks_field))
}

async fn read_complete(server: &ApiServer) -> BTreeMap<String, Value> {
    let mut last = None;
    let complete = tokio::time::timeout(crate::api_server::DEADLINE, async {
        loop {
            let objects = read(server).await;
            last = missing(&objects);
            if last.is_none() {
                return objects;
            }
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    })
    .await;
    complete.unwrap_or_else(|_| panic!("not written: {last:?}"))
}

/// Waits until an object that was made now has its condition: what came before it was looked at too.
async fn settle(server: &ApiServer, name: &str) {
    server.apply_value(policy(name)).await;
    until(&format!("the status of {name}"), async || {
        let object = server.get(POLICY.0, POLICY.1, "shop", name).await?;
        object.pointer("/status/conditions/0/observedGeneration").cloned()
    })
    .await;
}

fn policy(name: &str) -> Value {
    json!({ "apiVersion": POLICY.0, "kind": POLICY.1, "metadata": { "name": name, "namespace": "shop" },
        "spec": { "action": "DENY", "rules": [{ "from": [{ "source": { "namespaces": ["other"] } }] }] } })
}

/// Nothing that is right already was written again.
fn assert_untouched(before: &BTreeMap<String, Value>, after: &BTreeMap<String, Value>, but: &[&str]) {
    let version =
        |objects: &BTreeMap<String, Value>, key: &str| objects[key]["metadata"]["resourceVersion"].clone();
    for key in before.keys().filter(|key| !but.contains(&key.as_str())) {
        assert_eq!(version(before, key), version(after, key), "{key}: {} {}", before[key], after[key]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_status_is_read_back_across_replicas_and_restarts() {
    let server = start().await;
    let template = template();
    server.apply(OBJECTS).await;
    let (first, second) = tokio::join!(replica(&server, &template), replica(&server, &template));
    let deployed = json!({ "replicas": 1, "readyReplicas": 1, "availableReplicas": 1 });
    until("the waypoint is deployed", async || server.get("apps/v1", "Deployment", "shop", "waypoint").await)
        .await;
    server
        .set_status(json!({ "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": { "name": "waypoint", "namespace": "shop" }, "status": deployed }))
        .await;
    let before = read_complete(&server).await;
    for (version, kind, of, name) in [
        ("v1", "ConfigMap", "shop", "istio-ca-root-cert"),
        ("certificates.k8s.io/v1", "ClusterTrustBundle", "", "ambit.dev:workload:roots"),
    ] {
        until(name, async || server.get(version, kind, of, name).await).await;
    }

    // The one that writes dies; the other finds everything right.
    let leads = |replica: &Replica| replica.metric("ambit_control_leader") == 1.0;
    let (leader, follower) = if leads(&first) { (first, second) } else { (second, first) };
    leader.kill();
    until_true("the other leads", || leads(&follower)).await;
    settle(&server, "after-the-first").await;
    assert_untouched(&before, &read_complete(&server).await, &[]);

    // While none runs, one object changes, and another asks for nothing any more.
    follower.terminate();
    let mut changed = policy("l4");
    changed["spec"]["action"] = "ALLOW".into();
    server.apply_value(changed).await;
    server.apply_value(crate::service("freed", 9080)).await;
    let next = replica(&server, &template).await;
    settle(&server, "after-both").await;
    let after = read_complete(&server).await;
    assert_eq!(after["AuthorizationPolicy l4"]["metadata"]["generation"], 2);
    assert_untouched(&before, &after, &["AuthorizationPolicy l4"]);
    until("a service that is not bound any more says nothing of it", async || {
        let service = server.get(SERVICE.0, SERVICE.1, "shop", "freed").await?;
        service["status"]["conditions"].as_array().is_none_or(Vec::is_empty).then_some(())
    })
    .await;
    drop(next);
}

const OBJECTS: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop, labels: {istio.io/waypoint-for: all}}
spec: {gatewayClassName: ambit-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: bound, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec: {selector: {app: bound}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: virtual, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec: {selector: {app: virtual}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: unbound, namespace: shop, labels: {istio.io/use-waypoint: gone}}
spec: {selector: {app: none}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: freed, namespace: shop, labels: {istio.io/use-waypoint: gone}}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: entry, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}
spec: {hosts: [entry.example.com], resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: loser, namespace: shop}
spec: {hosts: [bound.shop.svc.cluster.local], addresses: [240.0.0.9], resolution: STATIC, ports: [{number: 80, name: http, protocol: HTTP}]}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: machine, namespace: shop, labels: {istio.io/use-waypoint: gone}}
spec: {address: 192.0.2.1}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: bound, namespace: shop}
spec: {hosts: [virtual], http: [{route: [{destination: {host: virtual}}]}]}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: bound, namespace: shop}
spec: {host: bound}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: l4, namespace: shop}
spec: {action: DENY, rules: [{from: [{source: {namespaces: [other]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: l7-at-l4, namespace: shop}
spec: {action: DENY, rules: [{to: [{operation: {methods: [DELETE]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: l7, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: bound}]
  action: DENY
  rules: [{to: [{operation: {methods: [DELETE]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: l7-lost, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: nowhere}]
  action: DENY
  rules: [{to: [{operation: {methods: [DELETE]}}]}]
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: unbound, namespace: shop}
spec: {jwtRules: [{issuer: issuer.example, jwks: '{"keys": []}'}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: bound, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: bound, port: 80}]
  rules: [{backendRefs: [{name: nowhere, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: bound, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: bound}]
  validation: {hostname: bound.example, wellKnownCACertificates: System}
---
apiVersion: ambit.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: bound, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: bound}]
  conditions: [{expression: request.method == 'GET'}]
"#;
