//! Changes under load: a waypoint's pods are replaced, and its routes change, while requests go on.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ambit_local::{Pod, PodOptions};
use ambit_tests::apps::{self, App};
use ambit_tests::beds::Trials;
use ambit_tests::load::{Load, Shape};
use ambit_tests::wait::{self, SOON};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::net::TcpStream;

use crate::bed::{GATEWAY_NAME, PORT, Waypoints};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("replacing a waypoint's pods loses no request", async |bed| replaced(bed).await);
    trials.add("a waypoint that is asked to stop answers for a moment more", async |bed| lasting(bed).await);
    trials.add("idle tunnels do not delay the end of a waypoint", async |bed| idling(bed).await);
    trials.add("changing routes loses no request", async |bed| rerouted(bed).await);
    trials.add("replacing waypoint, endpoints and routes at once loses no request", async |bed| {
        replaced_all(bed).await;
    });
}

/// A waypoint of two pods.
async fn waypoint(bed: &Waypoints, name: &str) {
    bed.apply(&format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
         metadata: {{name: {name}, namespace: shop, annotations: {{local.ambit.dev/replicas: '2'}}}}\n\
         spec: {{gatewayClassName: ambit-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]}}\n"
    ))
    .await;
}

/// A service behind a waypoint of its own.
async fn service(bed: &Waypoints, name: &str) -> (apps::Running, SocketAddr) {
    waypoint(bed, name).await;
    let pod = format!("{name}-app");
    let options = PodOptions::new("shop", &pod).service_account(&pod).label("app", &pod).node(1);
    let server = bed.cluster.pod(options).await.expect("a pod");
    let address = SocketAddr::new(server.ip().into(), PORT);
    let running = apps::run(&server, address, App::Http(name.to_owned())).await.expect("a free port");
    (running, bind(bed, name, &pod, PORT).await)
}

/// The service of an application, behind a waypoint; requests pass.
async fn bind(bed: &Waypoints, name: &str, app: &str, port: u16) -> SocketAddr {
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: {app}, namespace: shop, labels: {{istio.io/use-waypoint: {name}}}}}\n\
         spec: {{selector: {{app: {app}}}, ports: [{{name: http, port: 80, targetPort: {port}}}]}}\n"
    ))
    .await;
    ready(bed, name).await;
    let vip = bed.cluster.service_ips("shop", app).into_iter().next().expect("a virtual address");
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
    to
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

async fn replaced_all(bed: &Waypoints) {
    waypoint(bed, "restless").await;
    let endpoints = async |generation: u32| {
        bed.apply(&format!(
            "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: restless-app, namespace: shop}}\nspec:\n  \
             replicas: 3\n  selector: {{matchLabels: {{app: restless-app}}}}\n  template:\n    \
             metadata: {{labels: {{app: restless-app}}}}\n    spec:\n      containers:\n      \
             - name: productpage\n        image: bookinfo\n        args: [productpage]\n        \
             env: [{{name: GENERATION, value: '{generation}'}}]\n        \
             ports: [{{containerPort: 9080}}]\n        \
             readinessProbe: {{httpGet: {{path: /health, port: 9080}}, periodSeconds: 1}}\n        \
             lifecycle: {{preStop: {{sleep: {{seconds: 1}}}}}}\n"
        ))
        .await;
        bed.cluster.wait_ready("shop", "restless-app", Duration::from_secs(60)).await.expect("endpoints");
    };
    endpoints(1).await;
    let to = bind(bed, "restless", "restless-app", 9080).await;
    let load =
        Load::start(&bed.cli, to, &Shape { reopen: true, ..Shape::default() }).await.expect("connections");
    load.more(100).await;
    let finished = AtomicBool::new(false);
    let routes = async {
        let mut round = 0;
        while !finished.load(Ordering::Relaxed) {
            route(bed, "restless-app", round).await;
            round += 1;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        round
    };
    let replacements = async {
        for (generation, old) in (2..).zip(pods(bed, "restless")) {
            let replaced = async {
                bed.cluster.delete_pod(&old).await.expect("its end");
                ready(bed, "restless").await;
            };
            tokio::join!(replaced, endpoints(generation));
            load.more(100).await;
        }
        finished.store(true, Ordering::Relaxed);
    };
    let (rounds, ()) = tokio::join!(routes, replacements);
    load.finish().await.assert_all_answered();
    assert!(rounds > 2, "routes changed {rounds} times");
}

/// Routes that differ in each round.
async fn route(bed: &Waypoints, app: &str, round: u32) {
    let backend = format!("backendRefs: [{{name: {app}, port: 80}}]");
    bed.route(
        app,
        &format!(
            "  - matches: [{{path: {{type: PathPrefix, value: /}}, headers: [{{name: x, value: '{round}'}}]}}]\n    \
             {backend}\n  - {backend}\n"
        ),
    )
    .await;
}

/// Peers learn after a moment only that a waypoint leaves. What they send to it until then is answered.
async fn lasting(bed: &Waypoints) {
    let (_running, to) = service(bed, "lasting").await;
    for old in pods(bed, "lasting") {
        let says = |text: &str| old.logs().iter().any(|line| line.contains(text));
        let asking = async {
            wait::until("the waypoint is asked to stop", SOON, || async { says("asked to stop") }).await;
            let accepts = old.connect(SocketAddr::new(old.ip().into(), 15008)).await.is_ok();
            assert!(accepts || says("nothing new is accepted"), "it refuses connections at once");
            while pods(bed, "lasting").iter().any(|pod| pod.name() == old.name()) {
                let answer = crate::http::get(&bed.cli, to, "/", "").await;
                assert_eq!(answer.expect("an answer").status, 200);
            }
        };
        let (deleted, ()) = tokio::join!(bed.cluster.delete_pod(&old), asking);
        deleted.expect("its end");
        ready(bed, "lasting").await;
    }
}

/// An idle HTTP/2 connection of a client that reads only when it asks for something: it leaves PING and GOAWAY unanswered.
type Idle = (h2::client::SendRequest<Bytes>, h2::client::Connection<TcpStream, Bytes>);

async fn idle(bed: &Waypoints, to: SocketAddr) -> Idle {
    let stream = bed.cli.connect(to).await.expect("a connection");
    let (mut requests, mut connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    let request = http::Request::get("http://app.example/").body(()).expect("a request");
    let (response, _) = requests.send_request(request, true).expect("sent");
    let body = async {
        let (head, mut body) = response.await.expect("an answer").into_parts();
        assert_eq!(head.status, 200);
        while let Some(data) = body.data().await {
            data.expect("a body");
        }
    };
    tokio::select! {
        () = body => (requests, connection),
        ended = &mut connection => panic!("the connection ended: {ended:?}"),
    }
}

/// Ends all pods of a waypoint at once.
async fn end_all(bed: &Waypoints, gateway: &str) {
    let old = pods(bed, gateway);
    for deleted in join_all(old.iter().map(|pod| bed.cluster.delete_pod(pod))).await {
        deleted.expect("its end");
    }
}

/// Who has nothing to say is waited for a moment, who waits for an answer as long as it takes.
async fn idling(bed: &Waypoints) {
    waypoint(bed, "idling").await;
    let (asked, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (seen, wanted) = (asked.clone(), answered.clone());
    let slow: crate::http::Answer = Arc::new(move |_, head, _| {
        if head.starts_with("GET /slow") {
            seen.store(true, Ordering::Relaxed);
            while !wanted.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        crate::http::answer("200 OK", "", "at last")
    });
    bed.server("idling-app", "idling-app", slow).await;
    let to = bind(bed, "idling", "idling-app", PORT).await;
    let _idle = join_all((0..8).map(|_| idle(bed, to))).await;
    let start = Instant::now();
    end_all(bed, "idling").await;
    assert!(start.elapsed() < Duration::from_secs(12), "ended after {:?}", start.elapsed());
    ready(bed, "idling").await;
    let busy = crate::http::get(&bed.cli, to, "/slow", "");
    let ending = async {
        wait::until("the request is on its way", SOON, || async { asked.load(Ordering::Relaxed) }).await;
        let releasing = async {
            // Several times `drainIdle` and `drainMinimum`.
            tokio::time::sleep(Duration::from_secs(5)).await;
            answered.store(true, Ordering::Relaxed);
        };
        tokio::join!(end_all(bed, "idling"), releasing)
    };
    let (answer, _) = tokio::join!(busy, ending);
    assert_eq!(answer.expect("an answer").status, 200);
}

async fn rerouted(bed: &Waypoints) {
    let (_running, to) = service(bed, "rerouted").await;
    let shape = Shape { reopen: true, ..Shape::default() };
    let load = Load::start(&bed.cli, to, &shape).await.expect("kept connections");
    for round in 0..20 {
        route(bed, "rerouted-app", round).await;
        load.more(20).await;
    }
    let tally = load.finish().await;
    tally.assert_all_answered();
    assert_eq!((tally.kept_reopened, tally.kept_renewed), (0, 0), "a change of routes closed connections");
}
