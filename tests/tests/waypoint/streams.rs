//! Connections that the waypoint passes on unread, routed by TCPRoute, TLSRoute and VirtualService.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ambit_tests::apps::{self, App};
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};
use rustls::pki_types::ServerName;

use crate::bed::Waypoints;
use crate::http;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a TCPRoute splits connections", async |bed| tcp_route(bed).await);
    trials.add("TLS is routed by the name that it asks for", async |bed| by_name(bed).await);
    trials.add("a policy sees the name that TLS asks for", async |bed| policies_by_name(bed).await);
    trials.add("rules of a VirtualService see names, networks and clients", async |bed| declared(bed).await);
}

const SPOKEN: u16 = 9090;

/// Servers that greet by their names, each with a service of its name.
pub(crate) async fn servers(bed: &Waypoints, names: &[&str]) -> Vec<apps::Running> {
    let mut running = Vec::new();
    for name in names {
        let pod = bed.server(name, name, http::mirror()).await;
        let address = SocketAddr::new(pod.ip().into(), SPOKEN);
        running.push(apps::run(&pod, address, App::ServerFirst((*name).to_owned())).await.unwrap());
        bed.apply(&format!(
            "apiVersion: v1\nkind: Service\n\
             metadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
             spec: {{selector: {{app: {name}}}, ports: [{{name: tcp, port: 80, targetPort: {SPOKEN}}}, {{name: tls, port: 443, targetPort: {SPOKEN}}}]}}\n"
        ))
        .await;
    }
    running
}

pub(crate) fn vip(bed: &Waypoints, name: &str) -> IpAddr {
    bed.cluster.service_ips("shop", name).into_iter().find(IpAddr::is_ipv4).unwrap()
}

/// The beginning of TLS for a name.
pub(crate) fn hello(name: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.unwrap().with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut bytes = Vec::new();
    rustls::ClientConnection::new(Arc::new(config), name).unwrap().write_tls(&mut bytes).unwrap();
    bytes
}

/// Who greets a client that sends these bytes; nobody where the connection is closed.
pub(crate) async fn greeted(client: &ambit_local::Pod, to: SocketAddr, bytes: &[u8]) -> Option<String> {
    let talk = async {
        let mut stream = client.connect(to).await?;
        apps::exchange(&mut stream, bytes).await
    };
    let answer = tokio::time::timeout(SOON, talk).await.ok()?.ok()?;
    let rest = answer.strip_prefix(b"220 ")?;
    // What was sent comes back too: to the endpoint it is as it was.
    let (name, echoed) = rest.split_at(rest.iter().position(|byte| *byte == b'\r')?);
    assert_eq!(echoed.strip_prefix(b"\r\n"), Some(bytes), "bytes were lost or changed");
    Some(String::from_utf8_lossy(name).into_owned())
}

async fn until_greeted(bed: &Waypoints, to: SocketAddr, bytes: &[u8], wanted: Option<&str>) {
    wait::until(&format!("{wanted:?} greets"), SOON, || async {
        greeted(&bed.cli, to, bytes).await.as_deref() == wanted
    })
    .await;
}

async fn tcp_route(bed: &Waypoints) {
    let _running = servers(bed, &["streams", "streams-v1", "streams-v2"]).await;
    let to = SocketAddr::new(vip(bed, "streams"), 80);
    until_greeted(bed, to, b"x", Some("streams")).await;
    bed.apply(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: TCPRoute\nmetadata: {name: streams, namespace: shop}\n\
         spec:\n  parentRefs: [{group: '', kind: Service, name: streams, port: 80}]\n  rules:\n  \
         - backendRefs: [{name: streams-v1, port: 80, weight: 80}, {name: streams-v2, port: 80, weight: 20}]\n",
    )
    .await;
    wait::until("the route is in force", SOON, || async {
        greeted(&bed.cli, to, b"x").await.is_some_and(|name| name != "streams")
    })
    .await;
    let mut shares: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..100 {
        *shares.entry(greeted(&bed.cli, to, b"x").await.unwrap()).or_default() += 1;
    }
    assert!((60..=95).contains(&shares["streams-v1"]) && shares.len() == 2, "{shares:?}");
    // Its port alone.
    let other = SocketAddr::new(to.ip(), 443);
    assert_eq!(greeted(&bed.cli, other, b"x").await.as_deref(), Some("streams"));
}

async fn by_name(bed: &Waypoints) {
    let _running = servers(bed, &["named", "named-a", "named-any"]).await;
    let to = SocketAddr::new(vip(bed, "named"), 443);
    let route = |name: &str, host: &str, backend: &str| {
        format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: TLSRoute\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec:\n  parentRefs: [{{group: '', kind: Service, name: named, port: 443}}]\n  hostnames: ['{host}']\n  \
             rules: [{{backendRefs: [{{name: {backend}, port: 80}}]}}]\n"
        )
    };
    bed.apply(&route("any", "*.example", "named-any")).await;
    bed.apply(&route("one", "a.example", "named-a")).await;
    until_greeted(bed, to, &hello("a.example"), Some("named-a")).await;
    until_greeted(bed, to, &hello("b.example"), Some("named-any")).await;
    // No route is for these.
    assert_eq!(greeted(&bed.cli, to, &hello("other.test")).await, None);
    assert_eq!(greeted(&bed.cli, to, b"no TLS at all").await, None);
    explains(bed, to).await;
}

async fn policies_by_name(bed: &Waypoints) {
    let _running = servers(bed, &["bynames"]).await;
    let to = SocketAddr::new(vip(bed, "bynames"), 443);
    until_greeted(bed, to, &hello("b.example"), Some("bynames")).await;
    let policy = async |action: &str, values: &str| {
        bed.apply(&format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: bynames, namespace: shop}}\n\
             spec: {{targetRefs: [{{group: '', kind: Service, name: bynames}}], action: {action}, \
             rules: [{{when: [{{key: connection.sni, values: [{values}]}}]}}]}}\n"
        ))
        .await;
    };
    policy("DENY", "'b.example', '*.secret'").await;
    until_greeted(bed, to, &hello("b.example"), None).await;
    for name in ["a.example", "secret.example"] {
        assert_eq!(greeted(&bed.cli, to, &hello(name)).await.as_deref(), Some("bynames"), "{name}");
    }
    assert_eq!(greeted(&bed.cli, to, &hello("deep.secret")).await, None);
    policy("ALLOW", "a.example").await;
    until_greeted(bed, to, &hello("secret.example"), None).await;
    assert_eq!(greeted(&bed.cli, to, &hello("a.example")).await.as_deref(), Some("bynames"));
    // What is no TLS asks for no name, and on a port of plain TCP nobody looks for one.
    assert_eq!(greeted(&bed.cli, to, b"no TLS at all").await, None);
    let plain = SocketAddr::new(to.ip(), 80);
    assert_eq!(greeted(&bed.cli, plain, &hello("a.example")).await, None);
}

/// What `ambit why` learns of the same connections.
async fn explains(bed: &Waypoints, to: SocketAddr) {
    let waypoint = bed.pods().into_iter().find(ambit_local::Pod::is_ready).unwrap();
    let client = bed.cli.spiffe_id();
    for (name, step, text, considered) in [
        ("&server-name=a.example", "balance", "endpoints may get it", ""),
        ("&server-name=a.example", "match", "TLSRoute/shop/one, rule 1", ""),
        ("&server-name=b.example", "match", "TLSRoute/shop/any", "a.example is wanted, not b.example"),
        ("&server-name=other.test", "match", "no route matches", "*.example is wanted, not other.test"),
        ("", "match", "no route matches", "TLS is wanted"),
    ] {
        let path = format!("/explain/connection?from={client}&source={}&to={to}{name}", bed.cli.ip());
        let (status, answer) = bed.cluster.waypoint_admin(&waypoint, &path).await.unwrap();
        assert_eq!(status, 200, "{answer}");
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        let found = answer["steps"].as_array().unwrap().iter().find(|it| it["step"] == step);
        let found = found.unwrap_or_else(|| panic!("{name}: no step {step} in {answer}"));
        assert!(found["text"].as_str().unwrap().contains(text), "{name}: {answer}");
        assert!(found["considered"].to_string().contains(considered), "{name}: {answer}");
        let passes = answer["next"]["to"] == "workload";
        assert_eq!(passes, name.ends_with(".example"), "{name}: {answer}");
    }
}

async fn declared(bed: &Waypoints) {
    let _running = servers(bed, &["declared", "declared-tls", "declared-net", "declared-cli"]).await;
    let to = vip(bed, "declared");
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: declared, namespace: shop}}\n\
         spec:\n  hosts: [declared]\n  tls:\n  \
         - match: [{{sniHosts: ['*.example']}}]\n    route: [{{destination: {{host: declared-tls, port: {{number: 80}}}}}}]\n  tcp:\n  \
         - match: [{{port: 80, sourceNamespace: other}}]\n    route: [{{destination: {{host: declared-cli, port: {{number: 80}}}}}}]\n  \
         - match: [{{port: 80, destinationSubnets: [192.0.2.0/24]}}]\n    route: [{{destination: {{host: declared, port: {{number: 80}}}}}}]\n  \
         - match: [{{port: 80, destinationSubnets: [{to}]}}]\n    route: [{{destination: {{host: declared-net, port: {{number: 80}}}}}}]\n"
    ))
    .await;
    let (plain, tls) = (SocketAddr::new(to, 80), SocketAddr::new(to, 443));
    until_greeted(bed, plain, b"x", Some("declared-net")).await;
    assert_eq!(greeted(&bed.other, plain, b"x").await.as_deref(), Some("declared-cli"));
    assert_eq!(greeted(&bed.cli, tls, &hello("a.example")).await.as_deref(), Some("declared-tls"));
    // No rule is for it: straight to the service.
    assert_eq!(greeted(&bed.cli, tls, &hello("a.test")).await.as_deref(), Some("declared"));
}
