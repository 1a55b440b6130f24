//! One request from a client outside the mesh to a server in it by way of a gateway, and listeners that change.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;
use ambit_tests::http::{self, Client};
use ambit_tests::wait::{self, SOON};

use crate::bed::Gateways;

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials
        .add("a request from outside reaches a server that knows the gateway", async |bed| passes(bed).await);
    trials.add("each listener has its own hosts and routes", async |bed| isolated(bed).await);
    trials.add("listeners change and open connections stay", async |bed| changes(bed).await);
    trials.add("policies of a gateway hold for clients without identity", async |bed| policies(bed).await);
}

async fn passes(bed: &Gateways) {
    bed.service("thin").await;
    let to = SocketAddr::new(bed.gateway("thin-gw", "[{name: http, port: 80, protocol: HTTP}]").await, 80);
    bed.route("thin", "[{name: thin-gw}]", "[thin.example]").await;
    let answer = bed.eventually(to, "thin.example", |answer| answer.status == 200).await;
    assert_eq!(answer.server(), "thin");
    assert_eq!(answer.request_line(), "GET / HTTP/1.1");
    assert_eq!(answer.sent("host"), Some("thin.example"));
    assert_eq!(answer.sent("x-forwarded-for"), Some(bed.outside.ip().to_string().as_str()));
    assert_eq!(answer.sent("x-forwarded-proto"), Some("http"));
    // No route is for another host.
    let other = http::get(&bed.outside, to, "/", "host: other.example\r\n").await.unwrap();
    assert_eq!(other.status, 404);
    // The server's node has seen the gateway's certificate.
    let identities = [
        "src.identity=\"spiffe://cluster.local/ns/edge/sa/thin-gw\"",
        "dst.identity=\"spiffe://cluster.local/ns/edge/sa/thin\"",
    ];
    wait::until("the gateway's identity in the log of node 1", SOON, || async {
        let logs = bed.cluster.ztunnel(1).unwrap().logs();
        logs.iter().any(|line| identities.iter().all(|identity| line.contains(identity)))
    })
    .await;
    // A client may not say who it is, or for whom it asks.
    let claims = "host: thin.example\r\nx-forwarded-for: 192.0.2.1\r\nx-forwarded-client-cert: By=me\r\n";
    let answer = http::get(&bed.outside, to, "/", claims).await.unwrap();
    assert_eq!(answer.sent("x-forwarded-for"), Some(bed.outside.ip().to_string().as_str()));
    assert_eq!(answer.sent("x-forwarded-client-cert"), None);
}

/// Gateway API, conformance test HTTPRouteListenerHostnameMatching and GEP-1867.
async fn isolated(bed: &Gateways) {
    let listeners = "[{name: all, port: 80, protocol: HTTP}, \
                     {name: wide, port: 80, protocol: HTTP, hostname: '*.iso.example'}, \
                     {name: exact, port: 80, protocol: HTTP, hostname: a.iso.example}, \
                     {name: other, port: 81, protocol: HTTP}]";
    for name in ["iso-all", "iso-wide", "iso-exact", "iso-other"] {
        bed.service(name).await;
    }
    let at = bed.gateway("iso", listeners).await;
    for section in ["all", "wide", "exact", "other"] {
        let parents = format!("[{{name: iso, sectionName: {section}}}]");
        bed.route(&format!("iso-{section}"), &parents, "[]").await;
    }
    for (port, host, server) in [
        (80, "iso.example", "iso-all"),
        (80, "else.example", "iso-all"),
        (80, "b.iso.example", "iso-wide"),
        (80, "b.a.iso.example", "iso-wide"),
        (80, "A.iso.example:80", "iso-exact"),
        (81, "a.iso.example", "iso-other"),
    ] {
        let to = SocketAddr::new(at, port);
        bed.eventually(to, host, |answer| answer.status == 200 && answer.server() == server).await;
    }
    // Without a route of its own a listener answers 404: those of a wider one do not count.
    bed.cluster.delete("HTTPRoute", "edge", "iso-exact").await.unwrap();
    bed.eventually(SocketAddr::new(at, 80), "a.iso.example", |answer| answer.status == 404).await;
}

async fn changes(bed: &Gateways) {
    bed.service("live").await;
    let at = bed.gateway("live-gw", "[{name: first, port: 80, protocol: HTTP}]").await;
    bed.route("live", "[{name: live-gw}]", "[]").await;
    let (first, second) = (SocketAddr::new(at, 80), SocketAddr::new(at, 8081));
    bed.eventually(first, "live.example", |answer| answer.status == 200).await;
    let request = b"GET / HTTP/1.1\r\nhost: live.example\r\n\r\n";
    let mut kept = Client::connect(&bed.outside, first).await.unwrap();
    assert_eq!(kept.send(request).await.unwrap().status, 200);
    // Another port, and another host on the first one.
    let both = "[{name: renamed, port: 80, protocol: HTTP, hostname: '*.example'}, {name: second, port: 8081, protocol: HTTP}]";
    bed.set_listeners("live-gw", both).await;
    bed.eventually(second, "live.example", |answer| answer.status == 200).await;
    bed.eventually(first, "live.other", |answer| answer.status == 404).await;
    assert_eq!(kept.send(request).await.unwrap().status, 200);
    // The first port goes; the connection on the second one stays.
    let mut kept = Client::connect(&bed.outside, second).await.unwrap();
    assert_eq!(kept.send(request).await.unwrap().status, 200);
    bed.set_listeners("live-gw", "[{name: second, port: 8081, protocol: HTTP}]").await;
    wait::until("the first port is closed", SOON, || async {
        Client::connect(&bed.outside, first).await.is_err()
    })
    .await;
    assert_eq!(kept.send(request).await.unwrap().status, 200);
}

async fn policies(bed: &Gateways) {
    bed.service("guarded").await;
    let to = SocketAddr::new(bed.gateway("guarded-gw", "[{name: http, port: 80, protocol: HTTP}]").await, 80);
    bed.route("guarded", "[{name: guarded-gw}]", "[]").await;
    bed.eventually(to, "a.example", |answer| answer.status == 200).await;
    let policy = |rules: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: guarded, namespace: edge}}\n\
             spec: {{targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: guarded-gw}}], \
             action: ALLOW, rules: [{rules}]}}\n"
        )
    };
    // A client without identity is none of them.
    bed.apply(&policy("{from: [{source: {principals: ['*']}}]}")).await;
    bed.eventually(to, "a.example", |answer| answer.status == 403).await;
    let own = format!("{{from: [{{source: {{ipBlocks: [{}]}}}}]}}", bed.outside.ip());
    bed.apply(&policy(&own)).await;
    bed.eventually(to, "a.example", |answer| answer.status == 200).await;
}
