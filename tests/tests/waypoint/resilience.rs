//! Failing and slow endpoints: timeouts, retries on another endpoint, copies that delay nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
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
            // The server's own task only.
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
