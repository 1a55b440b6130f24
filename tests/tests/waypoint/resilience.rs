//! Failing and slow endpoints: timeouts, retries on another endpoint, copies that delay nothing.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::Waypoints;
use crate::http::{self, Answer};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a retry hides a failing endpoint", async |bed| retries(bed).await);
    trials.add("a body is sent again as it was", async |bed| bodies(bed).await);
    trials.add("a request that takes too long is answered with 504", async |bed| times_out(bed).await);
    trials.add("a service without endpoints answers 503", async |bed| no_endpoint(bed).await);
    trials.add("an endpoint that fails is ejected and comes back", async |bed| ejected(bed).await);
    trials.add("too many requests at once are refused", async |bed| overflows(bed).await);
    trials.add("requests wait in turn for a connection", async |bed| queues(bed).await);
    trials.add("too many connections to a TCP port are closed", async |bed| streams(bed).await);
    trials.add("a second endpoint answers for one that is slow", async |bed| hedges(bed).await);
    trials.add("a mirror gets the whole request and delays nothing", async |bed| mirrors(bed).await);
}

/// Fails every other request with this status.
fn flaky(status: &'static str) -> Answer {
    let (count, mirror) = (AtomicUsize::new(0), http::mirror());
    Arc::new(move |name, head, body| match count.fetch_add(1, Ordering::Relaxed) % 2 {
        0 => http::answer(status, "", ""),
        _ => mirror(name, head, body),
    })
}

async fn retries(bed: &Waypoints) {
    let to = bed.service_with("retried", flaky("503 Service Unavailable")).await;
    bed.route(
        "retried",
        "  - retry: {attempts: 2, codes: [503], backoff: 1ms}\n    backendRefs: [{name: retried, port: 80}]\n",
    )
    .await;
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
    let route_in_force = || async {
        let first = http::get(&bed.cli, to, "/", "").await.map(|answer| answer.status).unwrap_or(0);
        let second = http::get(&bed.cli, to, "/", "").await.map(|answer| answer.status).unwrap_or(0);
        (first, second) == (200, 200)
    };
    wait::until("the route is in force", SOON, route_in_force).await;
    for _ in 0..20 {
        assert_eq!(http::get(&bed.cli, to, "/", "").await.unwrap().status, 200);
    }
    let line = crate::thin::log_line(bed, "attempts=2").await;
    assert!(line.contains("response_code=200"), "{line}");
}

async fn bodies(bed: &Waypoints) {
    let to = bed.service_with("bodies", flaky("503 Service Unavailable")).await;
    bed.route(
        "bodies",
        "  - retry: {attempts: 2, codes: [503], backoff: 1ms}\n    backendRefs: [{name: bodies, port: 80}]\n",
    )
    .await;
    let body = "x".repeat(20_000);
    let sent = || async {
        let answer = http::request(&bed.cli, to, "POST", "/", "", &body).await.unwrap();
        (answer.status, answer.body.ends_with(&body))
    };
    wait::until("the route is in force", SOON, || async { sent().await.0 == 200 && sent().await.0 == 200 })
        .await;
    for _ in 0..6 {
        assert_eq!(sent().await, (200, true));
    }
}

async fn times_out(bed: &Waypoints) {
    let slow: Answer = Arc::new(|name, head, body| {
        if head.starts_with("GET /slow") {
            std::thread::sleep(Duration::from_secs(3));
        }
        http::mirror()(name, head, body)
    });
    let to = bed.service_with("slow", slow).await;
    bed.route("slow", "  - timeouts: {request: 300ms}\n    backendRefs: [{name: slow, port: 80}]\n").await;
    let before = Instant::now();
    let answer = bed.eventually(to, "/slow", "", |answer| answer.status == 504).await;
    assert_eq!(answer.body, "upstream request timeout\n");
    assert!(before.elapsed() < Duration::from_secs(12), "{:?}", before.elapsed());
    assert!(crate::thin::log_line(bed, "response_flags=\"UT\"").await.contains("response_code=504"));
}

async fn no_endpoint(bed: &Waypoints) {
    let to = bed.bind("empty", "http").await;
    let answer = http::get(&bed.cli, to, "/", "").await.unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (503, "no healthy upstream\n"));
    crate::thin::log_line(bed, "response_flags=\"UH\"").await;
}

fn destination_rule(host: &str, policy: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {host}, namespace: shop}}\n\
         spec: {{host: {host}, trafficPolicy: {policy}}}\n"
    )
}

/// What the waypoint shows of a service's port.
pub(crate) async fn balancer(bed: &Waypoints, service: &str) -> serde_json::Value {
    let balancers = bed.dump("balancers").await;
    let is_it = |it: &&serde_json::Value| it["service"].as_str().is_some_and(|name| name.contains(service));
    balancers.as_array().and_then(|all| all.iter().find(is_it)).cloned().unwrap_or_default()
}

async fn ejected(bed: &Waypoints) {
    let fails = Arc::new(AtomicBool::new(true));
    let broken = fails.clone();
    let answer: Answer = Arc::new(move |name, head, body| match broken.load(Ordering::Relaxed) {
        true => http::answer("500 Internal Server Error", "", &format!("server: {name}\n")),
        false => http::mirror()(name, head, body),
    });
    bed.version("ejected", "good", 1, http::mirror()).await;
    bed.version("ejected", "bad", 1, answer).await;
    let to = bed.bind("ejected", "http").await;
    let policy = "{loadBalancer: {simple: ROUND_ROBIN}, outlierDetection: \
                  {consecutive5xxErrors: 3, baseEjectionTime: 4s, maxEjectionPercent: 100}}";
    bed.apply(&destination_rule("ejected", policy)).await;
    let ask = || async { http::get(&bed.cli, to, "/", "").await.unwrap() };
    let is_ejected = || async {
        let shown = balancer(bed, "ejected").await;
        shown["endpoints"]
            .as_array()
            .is_some_and(|all| all.iter().any(|it| it["ejectedForSeconds"].is_number()))
    };
    wait::until("it is ejected", SOON, || async {
        ask().await;
        is_ejected().await
    })
    .await;
    // Until the ejection ends, only the other one is asked.
    while is_ejected().await {
        let answer = ask().await;
        if is_ejected().await {
            assert_eq!((answer.status, answer.server()), (200, "ejected-good"));
        }
    }
    fails.store(false, Ordering::Relaxed);
    wait::until("it is asked again", SOON, || async { ask().await.server() == "ejected-bad" }).await;
    let metrics = bed.metrics().await;
    assert!(http::metric(&metrics, "ambit_outlier_ejections_total ") >= 1);
}

/// Answers after a while, and counts how many requests it has at once.
fn slow(most: &Arc<AtomicUsize>, millis: u64) -> Answer {
    let (now, most) = (AtomicUsize::new(0), most.clone());
    Arc::new(move |name, head, body| {
        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(millis));
        now.fetch_sub(1, Ordering::SeqCst);
        http::mirror()(name, head, body)
    })
}

async fn at_once(bed: &Waypoints, to: SocketAddr, count: usize) -> Vec<u16> {
    let all = (0..count).map(|_| http::get(&bed.cli, to, "/", ""));
    let answers = futures_util::future::join_all(all).await;
    answers.into_iter().map(|answer| answer.unwrap().status).collect()
}

async fn overflows(bed: &Waypoints) {
    let most = Arc::default();
    let to = bed.service_with("bounded", slow(&most, 300)).await;
    bed.apply(&destination_rule("bounded", "{connectionPool: {http: {http2MaxRequests: 2}}}")).await;
    wait::until("the limit is in force", SOON, || async {
        let answers = at_once(bed, to, 8).await;
        assert!(answers.iter().all(|status| [200, 503].contains(status)), "{answers:?}");
        answers.iter().filter(|status| **status == 503).count() == 6
    })
    .await;
    let line = crate::thin::log_line(bed, "response_flags=\"UO\"").await;
    assert!(line.contains("response_code=503"), "{line}");
    let shown = balancer(bed, "bounded").await;
    assert_eq!(shown["limits"]["maxRequests"], 2, "{shown}");
    assert_eq!(
        (&shown["circuit"]["requests"], &shown["circuit"]["pending"]),
        (&0.into(), &0.into()),
        "{shown}"
    );
    let refused = shown["circuit"]["overflows"]["requests"].as_u64().unwrap_or_default();
    let metrics = bed.metrics().await;
    assert!(refused >= 6, "{shown}");
    assert!(http::metric(&metrics, "ambit_upstream_overflows_total{limit=\"requests\"}") >= refused);
}

async fn queues(bed: &Waypoints) {
    let most = Arc::new(AtomicUsize::new(0));
    let to = bed.service_with("queued", slow(&most, 50)).await;
    bed.apply(&destination_rule("queued", "{connectionPool: {tcp: {maxConnections: 1}}}")).await;
    wait::until("the limit is in force", SOON, || async {
        // A request makes the waypoint look at its policies again.
        at_once(bed, to, 1).await;
        balancer(bed, "queued").await["limits"]["maxConnections"] == 1
    })
    .await;
    // Those of before the limit have ended.
    at_once(bed, to, 2).await;
    most.store(0, Ordering::SeqCst);
    // From both workers: an idle connection of one makes room for the other.
    for _ in 0..3 {
        assert_eq!(at_once(bed, to, 10).await, [200; 10]);
    }
    assert_eq!(most.load(Ordering::SeqCst), 1);
    assert_eq!(balancer(bed, "queued").await["circuit"]["overflows"]["connections"], 0);
}

async fn streams(bed: &Waypoints) {
    bed.server("strict", "strict", http::mirror()).await;
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: strict, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
         spec: {{selector: {{app: strict}}, ports: [{{name: tcp, port: 80, targetPort: {}}}]}}\n{}",
        crate::bed::PORT,
        format_args!("---\n{}", destination_rule("strict", "{connectionPool: {tcp: {maxConnections: 1}}}")),
    ))
    .await;
    let vip = bed.cluster.service_ips("shop", "strict").into_iter().find(IpAddr::is_ipv4).unwrap();
    let to = SocketAddr::new(vip, 80);
    let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let limited = || async {
        let Ok(mut first) = http::Client::connect(&bed.cli, to).await else { return false };
        if first.send(request).await.is_err() {
            return false;
        }
        // While the first one is open the second one is closed; then the next one passes.
        let mut second = http::Client::connect(&bed.cli, to).await.unwrap();
        second.send(request).await.is_err() && first.send(request).await.is_ok()
    };
    wait::until("the limit is in force", SOON, limited).await;
    wait::until("there is room again", SOON, || async {
        http::get(&bed.cli, to, "/", "").await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    let metrics = bed.metrics().await;
    assert!(http::metric(&metrics, "ambit_upstream_overflows_total{limit=\"connections\"}") >= 1);
}

async fn hedges(bed: &Waypoints) {
    let posted = Arc::new(AtomicUsize::new(0));
    let count = posted.clone();
    let answer: Answer = Arc::new(move |name, head, body| {
        if head.starts_with("POST") {
            count.fetch_add(1, Ordering::Relaxed);
        }
        if name == "hedged-slow" {
            std::thread::sleep(Duration::from_millis(1500));
        }
        http::mirror()(name, head, body)
    });
    bed.version("hedged", "slow", 1, answer.clone()).await;
    bed.version("hedged", "fast", 1, answer).await;
    let to = bed.bind("hedged", "http").await;
    bed.apply(&destination_rule("hedged", "{loadBalancer: {simple: ROUND_ROBIN}}")).await;
    bed.apply(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n\
         metadata: {name: hedged, namespace: shop, annotations: {ambit.dev/hedge-after: 50ms}}\n\
         spec:\n  parentRefs: [{group: '', kind: Service, name: hedged, port: 80}]\n  \
         rules: [{backendRefs: [{name: hedged, port: 80}]}]\n",
    )
    .await;
    let won = || async { http::metric(&bed.metrics().await, "ambit_request_hedges_won_total ") };
    wait::until("a second endpoint answers", SOON, || async {
        assert_eq!(http::get(&bed.cli, to, "/", "").await.unwrap().status, 200);
        won().await > 0
    })
    .await;
    for _ in 0..6 {
        let before = Instant::now();
        assert_eq!(http::get(&bed.cli, to, "/", "").await.unwrap().server(), "hedged-fast");
        assert!(before.elapsed() < Duration::from_millis(1400), "{:?}", before.elapsed());
    }
    // What changes something is sent once.
    posted.store(0, Ordering::Relaxed);
    for _ in 0..4 {
        let answer = http::request(&bed.cli, to, "POST", "/", "", "x").await.unwrap();
        assert_eq!(answer.status, 200);
    }
    assert_eq!(posted.load(Ordering::Relaxed), 4);
}

async fn mirrors(bed: &Waypoints) {
    let copies = Arc::new(AtomicUsize::new(0));
    let counted = copies.clone();
    let shadow: Answer = Arc::new(move |_, head, body| {
        if head.starts_with("POST /copied") && body.len() == 5000 {
            counted.fetch_add(1, Ordering::Relaxed);
        }
        http::answer("500 Internal Server Error", "", "")
    });
    bed.server("shadow", "shadow", shadow).await;
    bed.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: shadow, namespace: shop}\n\
         spec: {selector: {app: shadow}, ports: [{name: http, port: 80, targetPort: 8080}]}\n",
    )
    .await;
    let to = bed.service("mirrored").await;
    bed.route(
        "mirrored",
        "  - filters: [{type: RequestMirror, requestMirror: {backendRef: {name: shadow, port: 80}}}]\n    \
             backendRefs: [{name: mirrored, port: 80}]\n",
    )
    .await;
    let body = "y".repeat(5000);
    wait::until("a copy arrives", SOON, || async {
        let answer = http::request(&bed.cli, to, "POST", "/copied", "", &body).await.unwrap();
        assert_eq!((answer.status, answer.server()), (200, "mirrored"));
        copies.load(Ordering::Relaxed) > 0
    })
    .await;
}
