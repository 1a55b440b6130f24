//! Filters of listeners: an external authorizer is asked before a request is routed.

use std::net::SocketAddr;
use std::sync::Arc;

use ambit_local::PodOptions;
use ambit_tests::beds::Trials;
use ambit_tests::http;

use crate::bed::Gateways;

/// The authorizer's port.
const PORT: u16 = 8000;

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("an authorizer of a listener decides before routes do", async |bed| asked(bed).await);
}

async fn asked(bed: &Gateways) {
    let options = PodOptions::new("edge", "login").service_account("login").label("app", "login").node(1);
    let pod = bed.cluster.pod(options).await.unwrap();
    // Knows the tenant of a cookie; says nothing of the host.
    let answer: http::Answer = Arc::new(|_, head, _| {
        let seen = http::header(head, "x-hidden").is_some();
        match http::header(head, "cookie") {
            Some("tenant=a") if head.starts_with("GET /check/") && !seen => {
                http::answer("200 OK", "x-tenant: a\r\nhost: other.example\r\nx-more: no\r\n", "")
            }
            _ => http::answer("401 Unauthorized", "x-reason: who are you\r\n", "go away"),
        }
    });
    let _server = http::serve(&pod, SocketAddr::new(pod.ip().into(), PORT), "login", answer).await.unwrap();
    bed.service("tenant-a").await;
    bed.service("nobody").await;
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: login, namespace: edge}}\n\
         spec: {{selector: {{app: login}}, ports: [{{name: http, port: {PORT}}}]}}\n---\n\
         apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: tenants, namespace: edge}}\n\
         spec:\n  parentRefs: [{{name: asked-gw}}]\n  hostnames: [asked.example]\n  rules:\n  \
         - {{matches: [{{headers: [{{name: x-tenant, value: a}}]}}], backendRefs: [{{name: tenant-a, port: 80}}]}}\n  \
         - {{backendRefs: [{{name: nobody, port: 80}}]}}\n"
    ))
    .await;
    let filter = |backend: &str| {
        format!(
            "filters: {{requests: [{{type: ExternalAuth, externalAuth: {{protocol: HTTP, backendRef: {{name: {backend}, port: {PORT}}}, \
             http: {{path: /check, allowedHeaders: [Cookie], allowedResponseHeaders: [x-tenant, host]}}}}}}]}}"
        )
    };
    let listeners = format!(
        "[{{name: asked, port: 80, protocol: HTTP, {}}}, {{name: lost, port: 81, protocol: HTTP, {}}}, {{name: free, port: 82, protocol: HTTP}}]",
        filter("login"),
        filter("gone"),
    );
    let at = bed.gateway("asked-gw", &listeners).await;
    let (asked, lost, free) = (SocketAddr::new(at, 80), SocketAddr::new(at, 81), SocketAddr::new(at, 82));
    let get = async |to: SocketAddr, headers: &str| {
        http::get(&bed.outside, to, "/x", &format!("host: asked.example\r\n{headers}")).await.unwrap()
    };
    bed.eventually(free, "asked.example", |answer| answer.server() == "nobody").await;
    let denied = bed.eventually(asked, "asked.example", |answer| answer.status == 401).await;
    assert_eq!((denied.body.as_str(), denied.header("x-reason")), ("go away", Some("who are you")));
    // What the authorizer says is what routes match; a field that was not named and the host do not change.
    let allowed = get(asked, "cookie: tenant=a\r\nx-hidden: yes\r\n").await;
    assert_eq!((allowed.status, allowed.server()), (200, "tenant-a"), "{allowed:?}");
    assert_eq!((allowed.sent("x-more"), allowed.sent("host")), (None, Some("asked.example")));
    // A client can't claim a tenant.
    assert_eq!(get(asked, "x-tenant: a\r\n").await.status, 401);
    assert_eq!(get(free, "x-tenant: a\r\n").await.server(), "tenant-a", "without the filter it could");
    // An authorizer that does not exist denies.
    assert_eq!(get(lost, "cookie: tenant=a\r\n").await.status, 500);
}
