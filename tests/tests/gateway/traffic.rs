//! TrafficPolicies at a gateway: of all of it, of a listener, and of a route.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;
use ambit_tests::http;

use crate::bed::Gateways;

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("a rate limit and conditions hold for clients from outside", async |bed| limited(bed).await);
}

async fn policy(bed: &Gateways, name: &str, target: &str, spec: &str) {
    bed.apply(&format!(
        "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {name}, namespace: edge}}\n\
         spec: {{targetRefs: [{{group: gateway.networking.k8s.io, {target}}}], {spec}}}\n"
    ))
    .await;
}

async fn limited(bed: &Gateways) {
    bed.service("limited").await;
    let listeners = "[{name: one, port: 80, protocol: HTTP}, {name: two, port: 81, protocol: HTTP}]";
    let at = bed.gateway("limited-gw", listeners).await;
    bed.route("limited", "[{name: limited-gw}]", "[limited.example]").await;
    let (one, two) = (SocketAddr::new(at, 80), SocketAddr::new(at, 81));
    bed.eventually(one, "limited.example", |answer| answer.status == 200).await;
    bed.eventually(two, "limited.example", |answer| answer.status == 200).await;
    let get = async |to: SocketAddr, path: &str| {
        http::get(&bed.outside, to, path, "host: limited.example\r\n").await.unwrap().status
    };
    let limit =
        "rateLimits: [{name: few, requests: 1, interval: 1h, burst: 2, key: [{type: RemoteAddress}]}]";
    policy(bed, "limited-one", "kind: Gateway, name: limited-gw, sectionName: one", limit).await;
    bed.eventually(one, "limited.example", |answer| answer.status == 429).await;
    for _ in 0..4 {
        assert_eq!(get(two, "/").await, 200, "another listener");
    }
    let inside = "conditions: [{expression: \"request.path != '/inside' || source.identity != ''\"}]";
    policy(bed, "limited-all", "kind: Gateway, name: limited-gw", inside).await;
    let denied = || async { get(two, "/inside").await == 403 };
    ambit_tests::wait::until("the gateway's policy holds", ambit_tests::wait::SOON, &denied).await;
    assert_eq!(get(one, "/inside").await, 403, "conditions come before limits");
    policy(bed, "limited-route", "kind: HTTPRoute, name: limited", limit).await;
    bed.eventually(two, "limited.example", |answer| answer.status == 429).await;
}
