//! The control plane on a real API server: what it reads, whom it believes, what it writes, and what happens when the API
//! server goes away.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod api_server;
mod contention;
mod istiod;
mod pod_certificates;
mod read_back;
mod replica;
mod rotation;
mod statuses;
mod traffic_policies;
mod waypoints;

use serde_json::{Value, json};

use api_server::{ApiServer, DEADLINE};
use replica::Replica;

/// Waits until something is there.
async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = tokio::time::timeout(DEADLINE, async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
    found.await.unwrap_or_else(|_| panic!("not within {DEADLINE:?}: {what}"))
}

/// Waits until something holds.
async fn until_true(what: &str, mut holds: impl FnMut() -> bool) {
    until(what, async || holds().then_some(())).await;
}

/// A namespaced kind of an extension that takes any fields.
fn definition(group: &str, kind: &str, plural: &str) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{plural}.{group}") },
        "spec": {
            "group": group, "scope": "Namespaced",
            "names": { "kind": kind, "plural": plural, "singular": kind.to_lowercase(), "listKind": format!("{kind}List") },
            "versions": [{
                "name": "v1", "served": true, "storage": true, "subresources": { "status": {} },
                "schema": { "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } },
            }],
        },
    })
}

fn policies() -> Value {
    definition("security.istio.io", "AuthorizationPolicy", "authorizationpolicies")
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": { "name": name, "namespace": "shop" }, "spec": spec,
    })
}

fn namespace(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } })
}

fn service(name: &str, port: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": { "selector": { "app": "reviews" }, "ports": [{ "name": "http", "port": port }] },
    })
}

/// A token of the node proxy on a node.
async fn node_proxy(server: &ApiServer, node: &str) -> String {
    let pod = server.run_pod("ambit-system", &format!("ztunnel-{node}"), "ztunnel", node, "10.9.0.1").await;
    server.token("ambit-system", "ztunnel", "istio-ca", Some(&pod)).await
}

const REVIEWS: &str = "spiffe://cluster.local/ns/shop/sa/reviews";

#[tokio::test(flavor = "multi_thread")]
async fn a_node_proxy_gets_what_the_api_server_has() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    server.apply_value(service("reviews", 9080)).await;
    server.run_pod("shop", "reviews-1", "reviews", "n1", "10.0.0.7").await;
    let token = node_proxy(&server, "n1").await;
    let replica = Replica::start(&server).await;
    let (_client, held) = replica.subscribe(&token);
    until_true("the first state", || held.workload("shop", "reviews-1").is_some()).await;
    let workload = held.workload("shop", "reviews-1").unwrap();
    assert_eq!((&*workload.addresses[0], &*workload.node), (&[10, 0, 0, 7][..], "n1"));
    assert_eq!(workload.services["shop/reviews.shop.svc.cluster.local"].ports[0].service_port, 9080);

    server.run_pod("shop", "reviews-2", "reviews", "n2", "10.0.1.7").await;
    until_true("a new pod", || held.workload("shop", "reviews-2").is_some()).await;
    server.delete("v1", "Pod", "shop", "reviews-1").await;
    until_true("a deleted pod", || held.workload("shop", "reviews-1").is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_installed_later_is_picked_up_and_gone_with_its_definition() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    let token = node_proxy(&server, "n1").await;
    let replica = Replica::start(&server).await;
    let (_client, held) = replica.subscribe(&token);
    server.apply_value(policies()).await;
    server.apply_value(policy("nobody", &json!({}))).await;
    until_true("the policy", || held.has("shop/nobody")).await;

    // One that cannot be read fails closed, is reported, and holds nobody else up.
    server.apply_value(policy("broken", &json!({ "action": "DENY", "rules": 7 }))).await;
    server.apply_value(policy("later", &json!({}))).await;
    until_true("the policy after the broken one", || held.has("shop/later")).await;
    let line = replica.log_line(|line| line["object"] == "AuthorizationPolicy shop/broken").await;
    assert!(line["message"].as_str().unwrap().starts_with("object cannot be taken"), "{line}");
    assert_eq!(held.policy("shop/broken").unwrap().action, 1);
    assert_eq!(replica.metric("ambit_control_source_problems"), 1.0);

    server
        .delete(
            "apiextensions.k8s.io/v1",
            "CustomResourceDefinition",
            "",
            "authorizationpolicies.security.istio.io",
        )
        .await;
    until_true("no policy", || !held.has("shop/nobody") && !held.has("shop/broken")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_signed_for_pods_of_the_callers_node_only() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    server.run_pod("shop", "reviews-1", "reviews", "n1", "10.0.0.7").await;
    let (first, second) = (node_proxy(&server, "n1").await, node_proxy(&server, "n2").await);
    let pod = server.run_pod("shop", "web-1", "web", "n1", "10.0.0.8").await;
    let stranger = server.token("shop", "web", "istio-ca", Some(&pod)).await;
    let unbound = server.token("ambit-system", "ztunnel", "istio-ca", None).await;
    let elsewhere = server.token("ambit-system", "ztunnel", "", None).await;
    let replica = Replica::start(&server).await;

    let chain = replica.ask(&first, REVIEWS).await.unwrap();
    assert_eq!(chain.last().unwrap().trim(), replica.roots().trim());
    for (token, why) in [
        (&second, "no live pod"),
        (&stranger, "not a trusted node proxy"),
        (&unbound, "not bound to a pod"),
        (&elsewhere, "another audience"),
        (&"not.a.token".to_owned(), "token refused"),
    ] {
        let refused = replica.ask(token, REVIEWS).await.unwrap_err();
        assert!(refused.contains(why), "{why}: {refused}");
    }
    // Many certificates, one review a token; what cannot be for us was not asked about at all.
    replica.ask(&first, "spiffe://cluster.local/ns/shop/sa/web").await.unwrap();
    assert_eq!(replica.metric("ambit_control_token_reviews_total"), 4.0);

    let finished = json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "reviews-1", "namespace": "shop" },
        "status": { "phase": "Succeeded" } });
    server.set_status(finished).await;
    until("a pod that has finished has no identity", async || replica.ask(&first, REVIEWS).await.err()).await;
    // The token was reviewed a moment ago, and that answer still counts; its pod does not.
    server.delete("v1", "Pod", "ambit-system", "ztunnel-n1").await;
    until("the token of a deleted proxy gets nothing", async || {
        let refused = replica.ask(&first, "spiffe://cluster.local/ns/shop/sa/web").await.err()?;
        refused.contains("is not known").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_are_in_every_namespace_and_put_right() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    let replica = Replica::start(&server).await;
    let roots = replica.roots();
    let written = async |namespace: &str| {
        let map = server.get("v1", "ConfigMap", namespace, "istio-ca-root-cert").await;
        map.filter(|map| map["data"]["root-cert.pem"] == *roots)
    };
    until("a namespace that was there", async || written("shop").await).await;
    server.apply_value(namespace("later")).await;
    until("a namespace that came later", async || written("later").await).await;
    server.apply_value(json!({ "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": "istio-ca-root-cert", "namespace": "shop" }, "data": { "root-cert.pem": "other" } }))
        .await;
    until("one that others changed", async || written("shop").await).await;
    server.delete("v1", "ConfigMap", "later", "istio-ca-root-cert").await;
    until("one that was deleted", async || written("later").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_share_the_authority_and_one_writes() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    let (first, second) = tokio::join!(Replica::start(&server), Replica::start(&server));
    assert_eq!(first.roots(), second.roots());
    let leads = |replica: &Replica| replica.metric("ambit_control_leader") == 1.0;
    until_true("one of them leads", || leads(&first) || leads(&second)).await;
    assert!(leads(&first) != leads(&second));
    let (leader, follower) = if leads(&first) { (first, second) } else { (second, first) };
    assert_eq!(follower.metric("ambit_control_objects_written_total"), 0.0);
    leader.kill();
    server.apply_value(namespace("later")).await;
    until("the other takes over", async || {
        server.get("v1", "ConfigMap", "later", "istio-ca-root-cert").await
    })
    .await;
    assert!(leads(&follower));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_was_away_changes_only_what_differs() {
    let mut server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    server.apply_value(service("reviews", 9080)).await;
    server.apply_value(service("gone", 9080)).await;
    server.run_pod("shop", "reviews-1", "reviews", "n1", "10.0.0.7").await;
    let token = node_proxy(&server, "n1").await;
    let replica = Replica::start(&server).await;
    let (_client, held) = replica.subscribe(&token);
    until_true("the first state", || held.workload("shop", "reviews-1").is_some()).await;
    let before = held.sent();

    server.stop();
    until_true("the loss is noticed", || replica.metric("ambit_control_watch_failures_total") > 0.0).await;
    // Certificates and new streams for whoever was believed before.
    replica.ask(&token, REVIEWS).await.unwrap();
    let (_other_client, other) = replica.subscribe(&token);
    until_true("a new stream", || other.workload("shop", "reviews-1").is_some()).await;

    server.resume().await;
    server.delete("v1", "Service", "shop", "gone").await;
    server.apply_value(service("new", 9080)).await;
    until_true("the changes", || {
        held.has("shop/new.shop.svc.cluster.local") && !held.has("shop/gone.shop.svc.cluster.local")
    })
    .await;
    let sent = held.sent();
    // The new service, and the workload that joined it and left the other; at most once for each.
    assert!(sent <= before + 3, "{before} before, {sent} after");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_admin_interface_takes_commands_on_the_loopback_only() {
    let server = ApiServer::start().await;
    let replica = Replica::start_with(&server, &["--admin", "0.0.0.0:0", "--commands", "127.0.0.1:0"]).await;
    for command in ["/quitquitquit", "/logging?level=debug"] {
        let answer = replica.admin_answer("POST", command).await;
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    }
    assert!(replica.admin_answer("GET", "/config_dump").await.starts_with("HTTP/1.1 200"));
    let level = replica.answer_at("commands", "POST", "/logging?level=debug").await;
    assert!(level.starts_with("HTTP/1.1 200") && level.contains("debug"), "{level}");
    assert!(replica.metrics_answer("/version").ends_with("1.31.0-ambit-0.1.0"));
}

/// What Kiali and the boards for Istio's control plane read.
#[tokio::test(flavor = "multi_thread")]
async fn tools_for_istio_find_proxies_and_metrics() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    server.apply_value(service("reviews", 9080)).await;
    let replica = Replica::start_with(&server, &["--admin", "0.0.0.0:0"]).await;
    assert!(replica.admin_answer("GET", "/debug/syncz").await.ends_with("[]"));
    let pod = server.run_pod("ambit-system", "ztunnel-1", "ztunnel", "n1", "10.9.0.1").await;
    let token = server.token("ambit-system", "ztunnel", "istio-ca", Some(&pod)).await;
    let (client, held) = replica.subscribe(&token);
    until_true("the service is known", || held.has("shop/reviews.shop.svc.cluster.local")).await;
    until("the proxy is listed", async || {
        let list = replica.admin_answer("GET", "/debug/syncz").await;
        list.contains("\"proxy\":\"ztunnel-a.ambit-system\"").then_some(())
    })
    .await;
    assert_eq!(replica.metric("pilot_xds"), 1.0);
    assert!(replica.metric("pilot_services") >= 1.0);
    assert!(replica.metric("ambit_control_watch_last_event_age_seconds{kind=\"Service\"}") < 60.0);
    let text = replica.metrics_answer("/metrics");
    assert!(text.contains("istio_build{component=\"pilot\",tag=\"1.31.0-ambit-0.1.0\"} 1"), "{text}");

    server.apply_value(service("later", 9080)).await;
    until_true("a change arrives", || held.has("shop/later.shop.svc.cluster.local")).await;
    until_true("its time is measured", || replica.metric("pilot_proxy_convergence_time_count") >= 1.0).await;
    drop(client);
    until("the proxy is gone", async || {
        replica.admin_answer("GET", "/debug/syncz").await.ends_with("[]").then_some(())
    })
    .await;
}
