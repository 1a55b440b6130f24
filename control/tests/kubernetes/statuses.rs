//! Statuses: conditions with foreign ones kept, addresses allocated, nothing written twice.

use serde_json::{Value, json};

use crate::api_server::ApiServer;
use crate::replica::Replica;
use crate::{definition, namespace, policies, policy, service, until};

/// A condition of an object, once it is there.
async fn condition(server: &ApiServer, (version, kind): (&str, &str), name: &str, condition: &str) -> Value {
    until(&format!("{condition} of {kind} {name}"), async || {
        let object = server.get(version, kind, "shop", name).await?;
        let conditions = object["status"]["conditions"].as_array()?.clone();
        conditions.into_iter().find(|found| found["type"] == condition)
    })
    .await
}

const SERVICE: (&str, &str) = ("v1", "Service");
const POLICY: (&str, &str) = ("security.istio.io/v1", "AuthorizationPolicy");
const RULE: (&str, &str) = ("networking.istio.io/v1", "DestinationRule");
const ENTRY: (&str, &str) = ("networking.istio.io/v1", "ServiceEntry");

#[tokio::test(flavor = "multi_thread")]
async fn conditions_are_written_beside_foreign_ones_and_follow() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    server.apply_value(policies()).await;
    server.apply_value(policy("deny", &json!({ "action": "DENY", "rules": [{}] }))).await;
    let mut bound = service("reviews", 9080);
    bound["metadata"]["labels"] = json!({ "istio.io/use-waypoint": "gone" });
    let foreign = json!({ "type": "Other", "status": "True", "reason": "Because", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z" });
    bound["status"] = json!({ "conditions": [foreign] });
    server.apply_value(bound).await;
    let replica = Replica::start(&server).await;

    let waypoint = condition(&server, SERVICE, "reviews", "istio.io/WaypointBound").await;
    assert_eq!((&waypoint["status"], &waypoint["reason"]), (&json!("False"), &json!("WaypointMissing")));
    assert_eq!(condition(&server, SERVICE, "reviews", "Other").await, foreign);
    let accepted = condition(&server, POLICY, "deny", "ZtunnelAccepted").await;
    assert_eq!((&accepted["status"], &accepted["observedGeneration"]), (&json!("True"), &json!(1)));

    server.apply_value(policy("deny", &json!({ "action": "DENY", "rules": [{}, {}] }))).await;
    until("the new generation is observed", async || {
        let accepted = condition(&server, POLICY, "deny", "ZtunnelAccepted").await;
        (accepted["observedGeneration"] == 2).then_some(())
    })
    .await;
    server.apply_value(service("reviews", 9080)).await;
    until("no waypoint is asked for any more", async || {
        let object = server.get("v1", "Service", "shop", "reviews").await?;
        (object["status"]["conditions"] == json!([foreign])).then_some(())
    })
    .await;

    // A replica that takes over finds everything right.
    let version = async || {
        let policy = server.get(POLICY.0, POLICY.1, "shop", "deny").await.unwrap();
        policy["metadata"]["resourceVersion"].clone()
    };
    let before = version().await;
    replica.terminate();
    let next = Replica::start(&server).await;
    server.apply_value(policy("later", &json!({}))).await;
    condition(&server, POLICY, "later", "ZtunnelAccepted").await;
    assert_eq!(version().await, before);
    drop(next);
}

#[tokio::test(flavor = "multi_thread")]
async fn destination_rules_say_what_waypoints_make_of_them() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    server.apply_value(definition("networking.istio.io", "DestinationRule", "destinationrules")).await;
    server.apply_value(service("reviews", 9080)).await;
    let rule = |host: &str| json!({ "apiVersion": RULE.0, "kind": RULE.1, "metadata": { "name": "rule", "namespace": "shop" }, "spec": { "host": host } });
    server.apply_value(rule("reviews")).await;
    let _replica = Replica::start(&server).await;
    let accepted = condition(&server, RULE, "rule", "WaypointAccepted").await;
    assert_eq!((&accepted["status"], &accepted["reason"]), (&json!("False"), &json!("NoEffect")));
    assert_eq!(accepted["observedGeneration"], 1);
    server.apply_value(rule("nobody")).await;
    until("the new generation is observed", async || {
        let accepted = condition(&server, RULE, "rule", "WaypointAccepted").await;
        (accepted["observedGeneration"] == 2).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn service_entries_without_address_get_one_each() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    server.apply_value(definition("networking.istio.io", "ServiceEntry", "serviceentries")).await;
    let entry = |name: &str, spec: Value| json!({ "apiVersion": ENTRY.0, "kind": ENTRY.1, "metadata": { "name": name, "namespace": "shop" }, "spec": spec });
    let dns = |host: &str| json!({ "hosts": [host], "resolution": "DNS", "ports": [{ "number": 443, "name": "tls", "protocol": "TLS" }] });
    server.apply_value(entry("before", dns("before.example"))).await;
    let mut own = dns("own.example");
    own["addresses"] = json!(["10.1.2.3"]);
    server.apply_value(entry("own", own)).await;
    let replica = Replica::start(&server).await;
    let allocated = async |name: &str| {
        until(&format!("addresses of {name}"), async || {
            let object = server.get(ENTRY.0, ENTRY.1, "shop", name).await?;
            object["status"]["addresses"].as_array().cloned()
        })
        .await
    };
    let first = allocated("before").await;
    server.apply_value(entry("after", dns("after.example"))).await;
    let second = allocated("after").await;
    assert_eq!((first.len(), second.len()), (2, 2));
    assert!(first.iter().all(|address| !second.contains(address)), "{first:?} {second:?}");
    assert!(first[0]["value"].as_str().unwrap().starts_with("240.240."), "{first:?}");
    assert_eq!(server.get(ENTRY.0, ENTRY.1, "shop", "own").await.unwrap().get("status"), None);

    // They come back from the API server as addresses of the service.
    let pod = server.run_pod("ambit-system", "ztunnel-1", "ztunnel", "n1", "10.9.0.1").await;
    let token = server.token("ambit-system", "ztunnel", "istio-ca", Some(&pod)).await;
    let (_client, held) = replica.subscribe(&token);
    until("the service has its addresses", async || {
        (held.service("shop/after.example")?.addresses.len() == 2).then_some(())
    })
    .await;
}
