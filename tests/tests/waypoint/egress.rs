//! Requests that leave the mesh through a waypoint by a ServiceEntry: named by address, by DNS, and by what the client asks for.

use std::net::{IpAddr, SocketAddr};

use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::backend_tls::Authority;
use crate::bed::Waypoints;
use crate::http;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("DNS locates the endpoints of a ServiceEntry", async |bed| by_dns(bed).await);
    trials.add("a waypoint resolves the host that a client asks for", async |bed| dynamic(bed).await);
    trials.add("a host that a client asks for and that fails is ejected", async |bed| ejected(bed).await);
    trials.add("limits hold for hosts that clients ask for", async |bed| limited(bed).await);
    trials.add("hosts that are not covered, or lead inside, are refused", async |bed| refused(bed).await);
}

/// A ServiceEntry that is bound to the waypoint, with this address.
async fn entry(bed: &Waypoints, name: &str, host: &str, address: &str, rest: &str) {
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
         metadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
         spec: {{hosts: ['{host}'], addresses: [{address}], location: MESH_EXTERNAL, {rest}}}\n"
    ))
    .await;
}

/// Where a client gets by a name, through its node's DNS.
async fn resolved(bed: &Waypoints, name: &str, port: u16) -> SocketAddr {
    let found = async || bed.cli.resolve(name).await.unwrap_or_default().into_iter().find(IpAddr::is_ipv4);
    wait::until("the name resolves", SOON, || async { found().await.is_some() }).await;
    SocketAddr::new(found().await.unwrap(), port)
}

async fn by_dns(bed: &Waypoints) {
    let authority = Authority::new();
    let address = bed.tls_outside(9444, "named", authority.server("named.example", None)).await;
    bed.cluster.set_dns_record("real.named.example", vec![address]).await.unwrap();
    entry(
        bed,
        "named",
        "named.example",
        "240.0.0.101",
        "resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP, targetPort: 9444}], \
         endpoints: [{address: real.named.example}]",
    )
    .await;
    bed.apply(&authority.policy("named")).await;
    let to = resolved(bed, "named.example", 80).await;
    assert_eq!(to.ip().to_string(), "240.0.0.101");
    let answer = bed.eventually(to, "/", "host: named.example\r\n", |answer| answer.status == 200).await;
    assert_eq!((answer.server(), answer.sent("sni")), ("named", Some("named.example")));
    assert_eq!(answer.sent("host"), Some("named.example"));
    let metrics = bed.metrics().await;
    assert!(http::metric(&metrics, "ambit_host_lookups_total{outcome=\"found\"}") > 0, "{metrics}");
}

async fn dynamic(bed: &Waypoints) {
    let authority = Authority::new();
    let address = bed.tls_outside(9445, "wild", authority.server("*.wild.example", None)).await;
    bed.cluster.set_dns_record("api.wild.example", vec![address]).await.unwrap();
    entry(
        bed,
        "wild",
        "*.wild.example",
        "240.0.0.102",
        "resolution: DYNAMIC_DNS, ports: [{number: 80, name: http, protocol: HTTP, targetPort: 9445}, \
         {number: 443, name: tls, protocol: TLS, targetPort: 9445}]",
    )
    .await;
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: wild, namespace: shop}}\n\
         spec: {{host: '*.wild.example', trafficPolicy: {{portLevelSettings: [\
         {{port: {{number: 80}}, tls: {{mode: SIMPLE, caCertificates: {}}}}}]}}}}\n",
        authority.root_file()
    ))
    .await;
    let virtual_address: IpAddr = "240.0.0.102".parse().unwrap();
    let leads_there = async || resolved(bed, "api.wild.example", 80).await.ip() == virtual_address;
    wait::until("the name leads to the entry's address", SOON, leads_there).await;
    let to = SocketAddr::new(virtual_address, 80);
    let answer = bed.eventually(to, "/", "host: api.wild.example\r\n", |answer| answer.status == 200).await;
    assert_eq!((answer.server(), answer.sent("sni")), ("wild", Some("api.wild.example")));
    // TLS of the client's own is passed on to the host that it asks for.
    let answer = authority.get(&bed.cli, SocketAddr::new(to.ip(), 443), "api.wild.example").await;
    assert_eq!(
        answer.as_deref().unwrap_or_default().lines().find(|line| line.starts_with("sni")),
        Some("sni: api.wild.example")
    );
    let hidden = authority.get(&bed.cli, SocketAddr::new(to.ip(), 443), "api.other.example").await;
    assert_eq!(hidden, None);
}

/// A wildcard entry that leads to a port of node 1, with a policy.
async fn wildcard(bed: &Waypoints, name: &str, address: &str, port: u16, policy: &str) -> SocketAddr {
    entry(
        bed,
        name,
        &format!("*.{name}.example"),
        address,
        &format!(
            "resolution: DYNAMIC_DNS, ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {port}}}]"
        ),
    )
    .await;
    bed.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{host: '*.{name}.example', trafficPolicy: {policy}}}\n"
    ))
    .await;
    SocketAddr::new(address.parse().unwrap(), 80)
}

async fn ejected(bed: &Waypoints) {
    let answer: http::Answer =
        std::sync::Arc::new(|name, head, body| match head.contains("bad.failing.example") {
            true => http::answer("500 Internal Server Error", "", &format!("server: {name}\n")),
            false => http::mirror()(name, head, body),
        });
    bed.outside(9451, "failing", answer).await;
    let policy =
        "{outlierDetection: {consecutive5xxErrors: 3, baseEjectionTime: 3m, maxEjectionPercent: 100}}";
    let to = wildcard(bed, "failing", "240.0.0.104", 9451, policy).await;
    for host in ["good.failing.example", "bad.failing.example"] {
        bed.cluster.set_dns_record(host, vec![bed.node_address()]).await.unwrap();
    }
    bed.eventually(to, "/", "host: good.failing.example\r\n", |answer| answer.status == 200).await;
    let refused = |answer: &http::Response| answer.status == 503 && answer.body == "no healthy upstream\n";
    bed.eventually(to, "/", "host: bad.failing.example\r\n", refused).await;
    // Another host of the wildcard, at the same address, is another endpoint.
    let good = http::get(&bed.cli, to, "/", "host: good.failing.example\r\n").await.unwrap();
    assert_eq!((good.status, good.server()), (200, "failing"));
    let shown = bed.dump("balancers").await.to_string();
    assert!(shown.contains("bad.failing.example:80") && shown.contains("ejectedForSeconds"), "{shown}");
}

async fn limited(bed: &Waypoints) {
    let answer: http::Answer = std::sync::Arc::new(|name, head, body| {
        if head.contains(" /slow") {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
        http::mirror()(name, head, body)
    });
    bed.outside(9452, "limited", answer).await;
    let policy = "{connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}}";
    let to = wildcard(bed, "capped", "240.0.0.105", 9452, policy).await;
    bed.cluster.set_dns_record("a.capped.example", vec![bed.node_address()]).await.unwrap();
    bed.eventually(to, "/", "host: a.capped.example\r\n", |answer| answer.status == 200).await;
    let overflows = async || {
        let asked = (0..6).map(|_| http::get(&bed.cli, to, "/slow", "host: a.capped.example\r\n"));
        let answers = futures_util::future::join_all(asked).await;
        let statuses: Vec<u16> = answers.into_iter().map(|answer| answer.unwrap().status).collect();
        let refused = statuses.iter().filter(|status| **status == 503).count();
        assert!(statuses.iter().all(|status| [200, 503].contains(status)), "{statuses:?}");
        (4..=5).contains(&refused)
    };
    wait::until("what is too much is refused", SOON, overflows).await;
}

async fn refused(bed: &Waypoints) {
    entry(
        bed,
        "narrow",
        "*.narrow.example",
        "240.0.0.103",
        "resolution: DYNAMIC_DNS, ports: [{number: 80, name: http, protocol: HTTP, targetPort: 15000}]",
    )
    .await;
    for (name, address) in [
        ("loop.narrow.example", "127.0.0.1"),
        ("meta.narrow.example", "169.254.169.254"),
        ("pod.narrow.example", &bed.cli.ip().to_string()),
        ("gone.narrow.example", ""),
    ] {
        let addresses = address.parse().into_iter().collect();
        bed.cluster.set_dns_record(name, addresses).await.unwrap();
    }
    let to = SocketAddr::new("240.0.0.103".parse().unwrap(), 80);
    bed.eventually(to, "/", "host: app.elsewhere\r\n", |answer| answer.status == 404).await;
    for host in ["loop.narrow.example", "meta.narrow.example", "pod.narrow.example", "gone.narrow.example"] {
        let answer = http::get(&bed.cli, to, "/", &format!("host: {host}\r\n")).await.unwrap();
        assert_eq!(answer.status, 503, "{host}: {answer:?}");
    }
    for host in ["narrow.example", "127.0.0.1", "x.narrow.example.evil"] {
        let answer = http::get(&bed.cli, to, "/", &format!("host: {host}\r\n")).await.unwrap();
        assert_eq!(answer.status, 404, "{host}: {answer:?}");
    }
    let metrics = bed.metrics().await;
    assert!(http::metric(&metrics, "ambit_host_lookups_total{outcome=\"refused\"}") >= 2, "{metrics}");
}
