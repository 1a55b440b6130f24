//! One request from a captured client to a server by way of a waypoint: who proved what to whom, and what was reported.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::Waypoints;
use crate::http;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a request passes its route and three proxies that know each other", async |bed| {
        passes(bed).await;
    });
    trials.add("what is not bound to the waypoint is refused", async |bed| refuses(bed).await);
    trials.add("a service without routes gets its requests as they are", async |bed| {
        let to = bed.service("plainsvc").await;
        let answer = http::get(&bed.cli, to, "/a/b?c=d", "").await.unwrap();
        assert_eq!((answer.status, answer.server()), (200, "plainsvc"));
        assert_eq!(answer.request_line(), "GET /a/b?c=d HTTP/1.1");
    });
}

async fn passes(bed: &Waypoints) {
    let to = bed.service("thin").await;
    bed.route(
        "thin",
        "  - matches: [{path: {type: PathPrefix, value: /hello}}]\n    \
             backendRefs: [{name: thin, port: 80}]\n",
    )
    .await;
    bed.eventually(to, "/other", "", |answer| answer.status == 404).await;
    let answer = http::get(&bed.cli, to, "/hello/world", "").await.unwrap();
    assert_eq!((answer.status, answer.server()), (200, "thin"));
    assert_eq!(answer.request_line(), "GET /hello/world HTTP/1.1");
    assert_eq!(answer.sent("x-forwarded-for"), Some(bed.cli.ip().to_string().as_str()));
    let id = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");
    let (client, waypoint, server) = (id("cli"), id("waypoint"), id("thin"));
    // The waypoint has seen the client's certificate and the server's.
    let line = log_line(bed, "path=\"/hello/world\"").await;
    for part in [
        format!("src.identity=\"{client}\""),
        format!("dst.identity=\"{server}\""),
        "response_code=200".to_owned(),
        "response_flags=\"-\"".to_owned(),
        "route=\"HTTPRoute/shop/thin\"".to_owned(),
        "dst.service=\"thin.shop.svc.cluster.local\"".to_owned(),
    ] {
        assert!(line.contains(&part), "{part} is missing in {line}");
    }
    // The client's node has seen the waypoint's, and the server's node that of the waypoint.
    ztunnel_line(bed, 0, &[&format!("src.identity=\"{client}\""), &format!("dst.identity=\"{waypoint}\"")])
        .await;
    ztunnel_line(bed, 1, &[&format!("src.identity=\"{waypoint}\""), &format!("dst.identity=\"{server}\"")])
        .await;
    let metrics = bed.metrics().await;
    let total = metrics.lines().find(|line| {
        line.starts_with("istio_requests_total{")
            && line.contains(&format!("source_principal=\"{client}\""))
            && line.contains(&format!("destination_principal=\"{server}\""))
            && line.contains("response_code=\"200\"")
            && line.contains("reporter=\"waypoint\"")
    });
    assert!(total.is_some(), "{metrics}");
}

async fn refuses(bed: &Waypoints) {
    // Bound to no waypoint, and dialled at the waypoint all the same.
    let pod = bed.pods().into_iter().next().unwrap();
    bed.server("unbound", "unbound", http::mirror()).await;
    bed.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: unbound, namespace: shop}\n\
         spec: {selector: {app: unbound}, ports: [{name: http, port: 80, targetPort: 8080}]}\n",
    )
    .await;
    let vip = bed.cluster.service_ips("shop", "unbound").into_iter().next().unwrap();
    let direct = http::get(&bed.cli, SocketAddr::new(vip, 80), "/", "").await.unwrap();
    assert_eq!(direct.sent("x-forwarded-for"), None);
    // The waypoint's own ports are no destinations either: its pod is bound to nothing.
    let own = SocketAddr::new(pod.ip().into(), 15000);
    assert!(http::get(&bed.cli, own, "/config_dump", "").await.is_err());
}

/// The line of the waypoint's access log with this in it.
pub(crate) async fn log_line(bed: &Waypoints, part: &str) -> String {
    let found = || bed.logs().into_iter().find(|line| line.contains("\taccess") && line.contains(part));
    wait::until("the access log", SOON, || async { found().is_some() }).await;
    found().unwrap()
}

async fn ztunnel_line(bed: &Waypoints, node: usize, parts: &[&str]) {
    let has = |line: &String| parts.iter().all(|part| line.contains(part));
    wait::until(&format!("{parts:?} in the log of node {node}"), SOON, || async {
        bed.cluster.ztunnel(node).unwrap().logs().iter().any(has)
    })
    .await;
}
