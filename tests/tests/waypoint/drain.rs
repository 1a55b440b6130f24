//! Changes under load: a waypoint's pods are replaced, and its routes change, while requests go on.

use std::net::SocketAddr;
use std::time::Duration;

use ambit_local::{Pod, PodOptions};
use ambit_tests::apps::{self, App};
use ambit_tests::beds::Trials;
use ambit_tests::load::{Load, Shape};
use ambit_tests::wait::{self, SOON};

use crate::bed::{GATEWAY_NAME, PORT, Waypoints};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("replacing a waypoint's pods loses no request", async |bed| replaced(bed).await);
    trials.add("changing routes loses no request", async |bed| rerouted(bed).await);
}

/// A service behind a waypoint of its own of two pods.
async fn service(bed: &Waypoints, name: &str) -> (apps::Running, SocketAddr) {
    bed.apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
         metadata: {{name: {name}, namespace: shop, annotations: {{local.ambit.dev/replicas: '2'}}}}\n\
         spec: {{gatewayClassName: ambit-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}\n"
    ))
    .await;
    let pod = format!("{name}-app");
    let options = PodOptions::new("shop", &pod).service_account(&pod).label("app", &pod).node(1);
    let server = bed.cluster.pod(options).await.expect("a pod");
    let address = SocketAddr::new(server.ip().into(), PORT);
    let running = apps::run(&server, address, App::Http(name.to_owned())).await.expect("a free port");
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: {pod}, namespace: shop, labels: {{istio.io/use-waypoint: {name}}}}}\n\
         spec: {{selector: {{app: {pod}}}, ports: [{{name: http, port: 80, targetPort: {PORT}}}]}}\n"
    ))
    .await;
    ready(bed, name).await;
    let vip = bed.cluster.service_ips("shop", &pod).into_iter().next().expect("a virtual address");
    let to = SocketAddr::new(vip, 80);
    wait::until("requests pass the waypoint", SOON, || async {
        let answered = match bed.cli.connect(to).await {
            Ok(mut stream) => apps::get(&mut stream).await.is_ok(),
            Err(_) => false,
        };
        let lines: Vec<String> = pods(bed, name).iter().flat_map(Pod::logs).collect();
        answered && lines.iter().any(|line| line.contains("\taccess") && line.contains("response_code=200"))
    })
    .await;
    (running, to)
}

fn pods(bed: &Waypoints, gateway: &str) -> Vec<Pod> {
    bed.cluster.pods_of("shop", GATEWAY_NAME, gateway)
}

async fn ready(bed: &Waypoints, gateway: &str) {
    let limit = Duration::from_secs(60);
    wait::until("both of its pods are ready", limit, || async {
        pods(bed, gateway).iter().filter(|pod| pod.is_ready()).count() == 2
    })
    .await;
}

async fn replaced(bed: &Waypoints) {
    let (_running, to) = service(bed, "replaced").await;
    let shape = Shape { reopen: true, ..Shape::default() };
    let load = Load::start(&bed.cli, to, &shape).await.expect("kept connections");
    load.more(100).await;
    for old in pods(bed, "replaced") {
        bed.cluster.delete_pod(&old).await.expect("its end");
        ready(bed, "replaced").await;
        load.more(100).await;
    }
    load.finish().await.assert_all_answered();
}

async fn rerouted(bed: &Waypoints) {
    let (_running, to) = service(bed, "rerouted").await;
    let shape = Shape { reopen: true, ..Shape::default() };
    let load = Load::start(&bed.cli, to, &shape).await.expect("kept connections");
    for round in 0..20 {
        let backend = "backendRefs: [{name: rerouted-app, port: 80}]";
        bed.route(
            "rerouted-app",
            &format!(
                "  - matches: [{{path: {{type: PathPrefix, value: /}}, headers: [{{name: x, value: '{round}'}}]}}]\n    \
                 {backend}\n  - {backend}\n"
            ),
        )
        .await;
        load.more(20).await;
    }
    let tally = load.finish().await;
    tally.assert_all_answered();
    assert_eq!(tally.kept_reopened, 0, "a change of routes closed connections");
}
