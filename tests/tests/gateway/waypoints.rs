//! Gateways that send requests to services through their waypoints.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;
use ambit_tests::http;
use ambit_tests::wait::{self, SOON};

use crate::bed::Gateways;

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("ingress passes the waypoint of a service that says so", async |bed| through(bed).await);
}

/// The waypoint, with annotations (a YAML map in one line).
async fn waypoint(bed: &Gateways, annotations: &str) {
    bed.apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
         metadata: {{name: through-wp, namespace: edge, annotations: {annotations}}}\n\
         spec: {{gatewayClassName: ambit-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}\n"
    ))
    .await;
}

/// The service behind it, with labels.
async fn label(bed: &Gateways, ingress: &str) {
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: through, namespace: edge, labels: {{istio.io/use-waypoint: through-wp, \
         istio.io/ingress-use-waypoint: '{ingress}'}}}}\n\
         spec: {{selector: {{app: through}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
    ))
    .await;
}

async fn status(bed: &Gateways, to: SocketAddr, path: &str) -> u16 {
    http::get(&bed.outside, to, path, "host: a.example\r\n").await.unwrap().status
}

async fn through(bed: &Gateways) {
    bed.service("through").await;
    waypoint(bed, "{}").await;
    label(bed, "false").await;
    bed.route("through", "[{name: through-gw}]", "[]").await;
    let to = bed.annotated("through-gw", "{}").await;
    bed.eventually(to, "a.example", |answer| answer.status == 200).await;
    // The waypoint allows the gateway one path.
    bed.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: through, namespace: edge}\n\
         spec: {targetRefs: [{group: '', kind: Service, name: through}], action: ALLOW, rules: [\
         {from: [{source: {principals: [cluster.local/ns/edge/sa/through-gw]}}], to: [{operation: {paths: [/allowed]}}]}]}\n",
    )
    .await;
    // The way does not lead through it yet.
    assert_eq!(status(bed, to, "/other").await, 200);
    label(bed, "true").await;
    wait::until("the waypoint denies", SOON, || async { status(bed, to, "/other").await == 403 }).await;
    assert_eq!(status(bed, to, "/allowed").await, 200);
    let logged = async |what: &[&str]| {
        wait::until(&format!("{what:?} in the waypoint's log"), SOON, || async {
            bed.logs("through-wp").iter().any(|line| what.iter().all(|part| line.contains(part)))
        })
        .await;
    };
    let gateway = "src.identity=\"spiffe://cluster.local/ns/edge/sa/through-gw\"";
    logged(&[gateway, "path=\"/allowed\"", "response_code=200"]).await;
    logged(&[gateway, "path=\"/other\"", "response_code=403"]).await;
    // The server's node sees the waypoint, and nobody else.
    wait::until("the waypoint's identity in the log of node 1", SOON, || async {
        let waypoint = "src.identity=\"spiffe://cluster.local/ns/edge/sa/through-wp\"";
        let server = "dst.identity=\"spiffe://cluster.local/ns/edge/sa/through\"";
        let logs = bed.cluster.ztunnel(1).unwrap().logs();
        logs.iter().any(|line| line.contains(waypoint) && line.contains(server))
    })
    .await;
    // Who the client is the waypoint believes a gateway that its owner trusts.
    let answer = http::get(&bed.outside, to, "/allowed", "host: a.example\r\n").await.unwrap();
    let first = answer.sent("x-forwarded-for").and_then(|chain| chain.split(',').next());
    assert_ne!(first, Some(&*bed.outside.ip().to_string()));
    waypoint(bed, "{ambit.dev/trusted-gateways: through-gw}").await;
    wait::until("the client's address passes the waypoint", SOON, || async {
        let answer = http::get(&bed.outside, to, "/allowed", "host: a.example\r\n").await.unwrap();
        let first = answer.sent("x-forwarded-for").and_then(|chain| chain.split(',').next());
        first == Some(&*bed.outside.ip().to_string())
    })
    .await;
    // Without the waypoint nothing passes, however healthy the server is.
    bed.cluster.delete("Gateway", "edge", "through-wp").await.unwrap();
    wait::until("the gateway refuses", SOON, || async { status(bed, to, "/allowed").await == 503 }).await;
    label(bed, "false").await;
    wait::until("the direct way is open", SOON, || async { status(bed, to, "/other").await == 200 }).await;
}
