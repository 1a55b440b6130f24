//! Services with two waypoints, and services whose waypoint comes and goes.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::{GATEWAY_NAME, PORT, Waypoints};
use crate::http::{self, Client};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a canary waypoint gets its share of the connections", async |bed| shares(bed).await);
    trials.add("both waypoints are seen in where one is required", async |bed| required(bed).await);
    trials.add("a waypoint that is missing is not passed by", async |bed| comes_and_goes(bed).await);
    trials.add("a connection past a missing waypoint counts once", async |bed| passed_by(bed).await);
}

/// A waypoint that says its name in each request (`x-forwarded-client-cert`).
async fn waypoint(bed: &Waypoints, name: &str) {
    bed.apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
         metadata: {{name: {name}, namespace: shop, annotations: {{ambient.istio.io/xfcc-include-client-identity: 'true'}}}}\n\
         spec: {{gatewayClassName: ambit-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}\n"
    ))
    .await;
    wait::until("the waypoint is ready", SOON, || async {
        bed.cluster.pods_of("shop", GATEWAY_NAME, name).iter().any(Pod::is_ready)
    })
    .await;
}

async fn service(bed: &Waypoints, name: &str, labels: &str, annotations: &str) -> SocketAddr {
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: {name}, namespace: shop, labels: {{{labels}}}, annotations: {{{annotations}}}}}\n\
         spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: {PORT}}}]}}\n"
    ))
    .await;
    let vips = bed.cluster.service_ips("shop", name);
    SocketAddr::new(vips.into_iter().find(std::net::IpAddr::is_ipv4).unwrap(), 80)
}

/// The waypoint that a request has passed: the one that named itself, else the one that does not; `direct` without any.
fn passed(answer: &http::Response) -> String {
    if let Some(by) = answer.sent("x-forwarded-client-cert") {
        let by = by.split(';').find_map(|part| part.strip_prefix("By=")).unwrap_or_default();
        return by.rsplit('/').next().unwrap_or_default().to_owned();
    }
    match answer.sent("x-forwarded-for") {
        Some(_) => "waypoint".to_owned(),
        None => "direct".to_owned(),
    }
}

/// How many of so many connections pass which waypoint. Each must be answered.
async fn counted(bed: &Waypoints, to: SocketAddr, connections: usize) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for _ in 0..connections {
        let answer = http::get(&bed.cli, to, "/", "").await.unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        *counts.entry(passed(&answer)).or_default() += 1;
    }
    counts
}

fn weighted(canary: &str, weight: u32) -> (String, String) {
    (
        format!("istio.io/use-waypoint: waypoint, istio.io/use-waypoint-canary: {canary}"),
        format!("istio.io/use-waypoint-canary-weight: '{weight}'"),
    )
}

async fn shares(bed: &Waypoints) {
    waypoint(bed, "cny").await;
    bed.server("weighed", "weighed", http::mirror()).await;
    let bound = async |weight: u32| {
        let (labels, annotations) = weighted("cny", weight);
        service(bed, "weighed", &labels, &annotations).await
    };
    let only = async |to: SocketAddr, name: &str| {
        let all = counted(bed, to, 20).await;
        all.keys().eq([name])
    };
    let to = bound(0).await;
    bed.eventually(to, "/", "", |answer| answer.status == 200 && passed(answer) == "waypoint").await;
    assert!(only(to, "waypoint").await);
    bound(30).await;
    bed.eventually(to, "/", "", |answer| passed(answer) == "cny").await;
    let counts = counted(bed, to, 400).await;
    let percent = counts["cny"] / 4;
    assert!((20..=40).contains(&percent) && counts.len() == 2, "{counts:?}");
    bound(100).await;
    wait::until("everything goes to the canary", SOON, || only(to, "cny")).await;
    bound(30).await;
    wait::until("both get connections", SOON, || async { counted(bed, to, 20).await.len() == 2 }).await;
    // A weight that is none, and a canary that is gone: the waypoint gets everything, and no connection is refused.
    let (labels, _) = weighted("cny", 30);
    service(bed, "weighed", &labels, "istio.io/use-waypoint-canary-weight: most").await;
    wait::until("the canary gets nothing", SOON, || only(to, "waypoint")).await;
    bound(50).await;
    wait::until("both get connections", SOON, || async { counted(bed, to, 20).await.len() == 2 }).await;
    bed.cluster.delete("Gateway", "shop", "cny").await.unwrap();
    wait::until("the canary is gone", SOON, || only(to, "waypoint")).await;
}

async fn required(bed: &Waypoints) {
    waypoint(bed, "cnyreq").await;
    let pod = bed.server("bothways", "bothways", http::mirror()).await;
    let (labels, annotations) = weighted("cnyreq", 50);
    let annotations = format!("{annotations}, ambit.dev/require-waypoint: 'true'");
    let to = service(bed, "bothways", &labels, &annotations).await;
    wait::until("both get connections", SOON, || async {
        let mut seen = BTreeMap::new();
        for _ in 0..20 {
            if let Ok(answer) = http::get(&bed.cli, to, "/", "").await {
                seen.insert(passed(&answer), answer.status);
            }
        }
        seen.into_iter().eq([("cnyreq".to_owned(), 200), ("waypoint".to_owned(), 200)])
    })
    .await;
    let direct = SocketAddr::new(pod.ip().into(), PORT);
    wait::until("nobody gets in past them", SOON, || async {
        http::get(&bed.cli, direct, "/", "").await.is_err()
    })
    .await;
    assert_eq!(counted(bed, to, 60).await.len(), 2);
    bed.cluster.delete("Gateway", "shop", "cnyreq").await.unwrap();
}

async fn comes_and_goes(bed: &Waypoints) {
    bed.server("waiting", "waiting", http::mirror()).await;
    let to = service(bed, "waiting", "istio.io/use-waypoint: waypoint", "").await;
    bed.eventually(to, "/", "", |answer| answer.status == 200 && passed(answer) == "waypoint").await;
    let refused = async || http::get(&bed.cli, to, "/", "").await.is_err();
    let only_by = async |name: &str| {
        wait::until("its waypoint is missed", SOON, || async {
            match http::get(&bed.cli, to, "/", "").await {
                Ok(answer) => {
                    assert_eq!(passed(&answer), name, "{answer:?}");
                    false
                }
                Err(_) => true,
            }
        })
        .await;
        for _ in 0..20 {
            assert!(refused().await, "a request passed by a waypoint that is not there");
        }
    };
    service(bed, "waiting", "istio.io/use-waypoint: late", "").await;
    only_by("waypoint").await;
    waypoint(bed, "late").await;
    bed.eventually(to, "/", "", |answer| answer.status == 200 && passed(answer) == "late").await;
    let mut held = Client::connect(&bed.cli, to).await.unwrap();
    assert_eq!(held.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap().status, 200);
    // Deleted while it is in use: what it has open ends, and nothing goes past it.
    bed.cluster.delete("Gateway", "shop", "late").await.unwrap();
    only_by("late").await;
    assert!(held.is_closed().await, "a connection outlives its waypoint");
    waypoint(bed, "late").await;
    bed.eventually(to, "/", "", |answer| answer.status == 200 && passed(answer) == "late").await;
    bed.cluster.delete("Gateway", "shop", "late").await.unwrap();
}

async fn passed_by(bed: &Waypoints) {
    // One of two endpoints refuses connections, so some connections are tried twice.
    bed.server("skipping", "skipping-up", http::mirror()).await;
    let down = ambit_local::PodOptions::new("shop", "skipping-down").service_account("skipping");
    bed.cluster.pod(down.label("app", "skipping").node(1)).await.unwrap();
    let series = async |name: &str| {
        let metrics = bed.cluster.ztunnel(0).unwrap().metrics().await.unwrap();
        metrics.sum(name, &[]) as u64
    };
    let to = service(bed, "skipping", "istio.io/use-waypoint: waypoint", "").await;
    bed.eventually(to, "/", "", |answer| passed(answer) == "waypoint").await;
    service(bed, "skipping", "istio.io/use-waypoint: nobody", "ambit.dev/waypoint-failure: open").await;
    bed.eventually(to, "/", "", |answer| passed(answer) == "direct").await;
    let (before, retried) =
        (series("ambit_waypoint_bypassed_total").await, series("ambit_connect_retries_total").await);
    let mut connections = 0;
    while series("ambit_connect_retries_total").await == retried || connections < 10 {
        assert!(connections < 200, "no connection was tried twice");
        let answer = http::get(&bed.cli, to, "/", "").await.unwrap();
        assert_eq!((answer.status, answer.server()), (200, "skipping-up"));
        connections += 1;
    }
    assert_eq!(series("ambit_waypoint_bypassed_total").await - before, connections);
}
