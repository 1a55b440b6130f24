//! Proxies in front of a gateway: which of them are believed about clients.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;
use ambit_tests::http::{self, Client, Response};
use ambit_tests::wait::{self, SOON};

use crate::bed::Gateways;

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("addresses of clients come from trusted proxies", async |bed| forwarded(bed).await);
    trials.add("the number of trusted proxies says who the client is", async |bed| counted(bed).await);
    trials.add("a load balancer says by the PROXY protocol who the client is", async |bed| {
        proxy_protocol(bed).await;
    });
}

/// What a client claims that stands for a proxy with a client of its own, behind another proxy.
const CLAIMS: &str = "x-forwarded-for: 198.51.100.1, 203.0.113.7\r\nx-forwarded-proto: https\r\n\
                      x-envoy-external-address: 198.51.100.1\r\n";

async fn ask(bed: &Gateways, to: SocketAddr) -> Response {
    http::get(&bed.outside, to, "/", &format!("host: a.example\r\n{CLAIMS}")).await.unwrap()
}

/// Denies what comes from an address, as a rule's `source`.
async fn deny(bed: &Gateways, gateway: &str, source: &str) {
    bed.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {gateway}, namespace: edge}}\n\
         spec: {{targetRefs: [{{group: gateway.networking.k8s.io, kind: Gateway, name: {gateway}}}], action: DENY, \
         rules: [{{from: [{{source: {{{source}}}}}]}}]}}\n"
    ))
    .await;
}

async fn forwarded(bed: &Gateways) {
    bed.service("hops").await;
    bed.route("hops", "[{name: hops-gw}, {name: nohops-gw}]", "[]").await;
    let own = bed.outside.ip().to_string();
    let trusting = bed.annotated("hops-gw", &format!("{{ambit.dev/trusted-proxies: '{own}'}}")).await;
    bed.eventually(trusting, "a.example", |answer| answer.status == 200).await;
    let answer = ask(bed, trusting).await;
    // What is left of the believed entry is the client's own claim.
    assert_eq!(answer.sent("x-forwarded-for"), Some(&*format!("203.0.113.7, {own}")));
    assert_eq!(answer.sent("x-forwarded-proto"), Some("https"));
    assert_eq!(answer.sent("x-envoy-external-address"), Some("203.0.113.7"));
    wait::until("the client's address in the log", SOON, || async {
        bed.logs("hops-gw").iter().any(|line| line.contains("src.addr=203.0.113.7"))
    })
    .await;
    // The address of the connection is another matter.
    deny(bed, "hops-gw", "ipBlocks: [203.0.113.7]").await;
    deny(bed, "nohops-gw", "remoteIpBlocks: [203.0.113.7]").await;
    assert_eq!(ask(bed, trusting).await.status, 200);
    deny(bed, "hops-gw", "remoteIpBlocks: [203.0.113.7]").await;
    wait::until("the client is denied", SOON, || async { ask(bed, trusting).await.status == 403 }).await;
    bed.eventually(trusting, "a.example", |answer| answer.status == 200).await;
    // Who trusts nobody takes the claims of nobody.
    let plain = bed.annotated("nohops-gw", "{}").await;
    bed.eventually(plain, "a.example", |answer| answer.status == 200).await;
    let answer = ask(bed, plain).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.sent("x-forwarded-for"), Some(&*own));
    assert_eq!(answer.sent("x-forwarded-proto"), Some("http"));
    assert_eq!(answer.sent("x-envoy-external-address"), Some(&*own));
}

async fn counted(bed: &Gateways) {
    bed.service("counted").await;
    bed.route("counted", "[{name: counted-gw}]", "[]").await;
    let config = |hops: u32| {
        format!("{{proxy.istio.io/config: '{{gatewayTopology: {{numTrustedProxies: {hops}}}}}'}}")
    };
    let to = bed.annotated("counted-gw", &config(2)).await;
    bed.eventually(to, "a.example", |answer| answer.status == 200).await;
    let answer = ask(bed, to).await;
    let chain = format!("198.51.100.1, 203.0.113.7, {}", bed.outside.ip());
    assert_eq!(answer.sent("x-forwarded-for"), Some(&*chain));
    assert_eq!(answer.sent("x-envoy-external-address"), Some("198.51.100.1"));
    // It changes while the gateway runs.
    bed.annotated("counted-gw", &config(1)).await;
    wait::until("one proxy is trusted", SOON, || async {
        ask(bed, to).await.sent("x-envoy-external-address") == Some("203.0.113.7")
    })
    .await;
    // A client that goes around the proxies is its own.
    let answer = http::get(&bed.outside, to, "/", "host: a.example\r\n").await.unwrap();
    assert_eq!(answer.sent("x-envoy-external-address"), Some(&*bed.outside.ip().to_string()));
}

async fn proxy_protocol(bed: &Gateways) {
    bed.service("proxied").await;
    bed.route("proxied", "[{name: proxied-gw}]", "[]").await;
    let config = "{proxy.istio.io/config: '{gatewayTopology: {proxyProtocol: {}}}'}";
    let to = bed.annotated("proxied-gw", config).await;
    let request = b"GET / HTTP/1.1\r\nhost: a.example\r\n\r\n";
    let ask = async |header: &[u8]| {
        let mut client = Client::connect(&bed.outside, to).await?;
        client.send(&[header, &request[..]].concat()).await
    };
    let text = b"PROXY TCP4 203.0.113.9 192.0.2.1 4711 80\r\n";
    let mut binary = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    binary.extend([203, 0, 113, 10, 192, 0, 2, 1, 0x12, 0x67, 0, 80]);
    wait::until("the gateway serves", SOON, || async {
        ask(text).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    for (header, client) in [(&text[..], "203.0.113.9"), (&binary[..], "203.0.113.10")] {
        let answer = ask(header).await.unwrap();
        assert_eq!(answer.sent("x-forwarded-for"), Some(client));
        assert_eq!(answer.sent("x-envoy-external-address"), Some(client));
    }
    wait::until("the client's port in the log", SOON, || async {
        bed.logs("proxied-gw").iter().any(|line| line.contains("src.addr=203.0.113.9:4711"))
    })
    .await;
    // A client that speaks to the gateway itself says nothing of whom to believe.
    assert!(ask(b"").await.is_err());
    assert!(ask(b"PROXY TCP4 203.0.113.9\r\n").await.is_err());
    let refused = r#"ambit_gateway_connections_refused_total{limit="proxy_protocol"} "#;
    assert!(bed.metric("proxied-gw", refused).await >= 2);
    deny(bed, "proxied-gw", "remoteIpBlocks: [203.0.113.9]").await;
    wait::until("the client is denied", SOON, || async { ask(text).await.unwrap().status == 403 }).await;
    assert_eq!(ask(&binary).await.unwrap().status, 200);
}
