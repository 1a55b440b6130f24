//! Services that are reached through their waypoint only.

use std::net::{IpAddr, SocketAddr};

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::{PORT, Waypoints};
use crate::http::{self, Client};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("what requires its waypoint refuses every other way in", async |bed| only_way(bed).await);
    trials.add("a waypoint that is required and missing lets nobody in", async |bed| missing(bed).await);
    trials.add("a missing waypoint is passed by only where that is allowed, and counted", async |bed| {
        open(bed).await;
    });
}

fn service(name: &str, app: &str, waypoint: &str, annotations: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: {name}, namespace: shop, labels: {{istio.io/use-waypoint: {waypoint}}}, annotations: {{{annotations}}}}}\n\
         spec: {{selector: {{app: {app}}}, ports: [{{name: http, port: 80, targetPort: {PORT}}}]}}\n"
    )
}

fn vip(bed: &Waypoints, name: &str) -> SocketAddr {
    let vips = bed.cluster.service_ips("shop", name);
    SocketAddr::new(vips.into_iter().find(IpAddr::is_ipv4).expect("a virtual address"), 80)
}

async fn is_refused(pod: &Pod, to: SocketAddr) -> bool {
    http::get(pod, to, "/", "").await.is_err()
}

async fn only_way(bed: &Waypoints) {
    let pod = bed.server("onlyway", "onlyway", http::mirror()).await;
    let direct = SocketAddr::new(pod.ip().into(), PORT);
    bed.apply(&service("onlyway", "onlyway", "waypoint", "")).await;
    bed.apply(&service("sideway", "onlyway", "none", "")).await;
    let (through, beside) = (vip(bed, "onlyway"), vip(bed, "sideway"));
    let answers = |answer: &http::Response| answer.status == 200;
    bed.eventually(through, "/", "", |answer| answer.sent("x-forwarded-for").is_some()).await;
    bed.eventually(beside, "/", "", answers).await;
    let mut open = Client::connect(&bed.cli, direct).await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    assert_eq!(open.send(request).await.unwrap().status, 200);
    bed.apply(&service("onlyway", "onlyway", "waypoint", "ambit.dev/require-waypoint: 'true'")).await;
    assert!(open.is_closed().await, "a connection that passed by the waypoint stays open");
    for (route, to) in [("the pod's address", direct), ("another service", beside)] {
        for client in [&bed.cli, &bed.other] {
            assert!(is_refused(client, to).await, "{route} is a way past the waypoint");
        }
    }
    assert_eq!(http::get(&bed.cli, through, "/", "").await.unwrap().status, 200);
    bed.apply(&service("onlyway", "onlyway", "waypoint", "ambit.dev/require-waypoint: 'false'")).await;
    bed.eventually(direct, "/", "", answers).await;
}

async fn missing(bed: &Waypoints) {
    let pod = bed.server("nowayin", "nowayin", http::mirror()).await;
    let direct = SocketAddr::new(pod.ip().into(), PORT);
    bed.apply(&service("nowayin", "nowayin", "none", "")).await;
    bed.eventually(vip(bed, "nowayin"), "/", "", |answer| answer.status == 200).await;
    // Nobody knows what its identity would be, and to go by without it is forbidden too.
    let demands = "ambit.dev/require-waypoint: 'true', ambit.dev/waypoint-failure: open";
    bed.apply(&service("nowayin", "nowayin", "nobody", demands)).await;
    for to in [direct, vip(bed, "nowayin")] {
        wait::until("nobody gets in", SOON, || is_refused(&bed.cli, to)).await;
    }
}

async fn open(bed: &Waypoints) {
    bed.server("waypast", "waypast", http::mirror()).await;
    let counted = async || {
        let metrics = bed.cluster.ztunnel(0).expect("a node proxy").metrics().await.expect("its metrics");
        metrics.sum("ambit_waypoint_bypassed_total", &[])
    };
    bed.apply(&service("waypast", "waypast", "nobody", "")).await;
    let to = vip(bed, "waypast");
    wait::until("it is refused by default", SOON, || is_refused(&bed.cli, to)).await;
    let before = counted().await;
    bed.apply(&service("waypast", "waypast", "nobody", "ambit.dev/waypoint-failure: open")).await;
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
    assert!(counted().await > before, "it was not counted");
    bed.apply(&service("waypast", "waypast", "nobody", "ambit.dev/waypoint-failure: closed")).await;
    wait::until("it is refused again", SOON, || is_refused(&bed.cli, to)).await;
}
