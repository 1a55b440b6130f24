//! What is rare on the wire and right all the same: HTTP/1.0, interim and early answers, gRPC-web, trace context, and what
//! may and may not be sent again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::bed::Waypoints;
use crate::http::{self, Answer, Client};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("HTTP/1.0 is served without a host", async |bed| old_clients(bed).await);
    trials.add("an answer of HTTP/1.0 ends with its connection", async |bed| old_servers(bed).await);
    trials.add("interim answers are dropped, and the final one passes", async |bed| interim(bed).await);
    trials.add("an answer may come before the body has ended", async |bed| early(bed).await);
    trials.add("gRPC-web passes unchanged", async |bed| grpc_web(bed).await);
    trials.add("trace context passes unchanged", async |bed| traced(bed).await);
    trials.add("a body that is lost is never sent again", async |bed| lost_body(bed).await);
    trials.add("Retry-After is followed, or passed on", async |bed| retry_after(bed).await);
    trials.add("a timeout covers the body of the answer", async |bed| slow_answer(bed).await);
    trials.add("copies that fail are counted and delay nothing", async |bed| failed_copies(bed).await);
}

async fn old_clients(bed: &Waypoints) {
    let chunked: Answer = Arc::new(|name, head, body| match head.starts_with("GET /chunked") {
        true => b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec(),
        false => http::mirror()(name, head, body),
    });
    let to = bed.service_with("oldclient", chunked).await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    let answer = client.send(b"GET /a HTTP/1.0\r\n\r\n").await.unwrap();
    assert_eq!((answer.status, answer.sent("host")), (200, Some("oldclient.shop.svc.cluster.local")));
    assert!(client.is_closed().await, "HTTP/1.0 keeps a connection only if asked to");
    // It knows no chunks: the body ends with the connection.
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    client.write(b"GET /chunked HTTP/1.0\r\nhost: a\r\n\r\n").await.unwrap();
    let answer = String::from_utf8(client.rest().await.unwrap()).unwrap();
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n") && answer.ends_with("\r\n\r\nhello"), "{answer}");
    assert_eq!(http::header(&answer, "transfer-encoding"), None);
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    for _ in 0..2 {
        let kept = b"GET /a HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n";
        assert_eq!(client.send(kept).await.unwrap().status, 200);
    }
}

/// Answers `GET /` as the bed expects, and everything else by `answer`.
async fn serve(
    mut stream: TcpStream,
    answer: impl AsyncFn(&mut TcpStream, &mut Vec<u8>, &str) -> io::Result<()>,
) -> io::Result<()> {
    let mut read = Vec::new();
    while let Some(head) = http::head(&mut stream, &mut read).await? {
        match head.starts_with("GET / ") {
            true => stream.write_all(&http::mirror()("by hand", &head, b"")).await?,
            false => answer(&mut stream, &mut read, &head).await?,
        }
    }
    Ok(())
}

async fn old_servers(bed: &Waypoints) {
    bed.by_hand("oldserver", |stream| {
        serve(stream, async |stream, _, _| {
            stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello").await?;
            stream.shutdown().await
        })
    })
    .await;
    let to = bed.bind("oldserver", "http").await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    for _ in 0..2 {
        let answer = client.send(b"GET /old HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (200, "hello"));
    }
}

async fn interim(bed: &Waypoints) {
    let answer: Answer = Arc::new(|name, head, body| {
        let mut all =
            b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n".to_vec();
        all.extend(http::mirror()(name, head, body));
        all
    });
    let to = bed.service_with("interim", answer).await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    for _ in 0..2 {
        let answer = client.send(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!((answer.status, answer.server()), (200, "interim"));
        assert_eq!(answer.header("link"), None, "a field of an interim answer is in the final one");
    }
}

async fn early(bed: &Waypoints) {
    bed.by_hand("early", |stream| {
        serve(stream, async |stream, read, head| {
            // The answer is there before the body has come.
            stream.write_all(&http::answer("413 Content Too Large", "", "early")).await?;
            if head.starts_with("POST /closed") {
                stream.shutdown().await?;
                let mut rest = Vec::new();
                return stream.read_to_end(&mut rest).await.map(drop);
            }
            http::body(stream, read, head).await.map(drop)
        })
    })
    .await;
    let to = bed.bind("early", "http").await;
    let half = "x".repeat(100_000);
    for path in ["/read", "/closed"] {
        let mut client = Client::connect(&bed.cli, to).await.unwrap();
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{half}", 2 * half.len());
        let answer = client.send(head.as_bytes()).await.unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (413, "early"), "{path}");
        if path == "/read" {
            // The rest of the body is no part of the next request.
            client.write(half.as_bytes()).await.unwrap();
            let next = client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            assert_eq!((next.status, next.server()), (200, "by hand"));
        }
    }
}

async fn grpc_web(bed: &Waypoints) {
    let answer: Answer = Arc::new(|name, head, body| match http::header(head, "content-type") {
        Some("application/grpc-web+proto") => {
            // A message, and the trailers as the last frame of the body.
            let mut whole = body.to_vec();
            whole.extend(b"\x80\0\0\0\x0fgrpc-status:0\r\n");
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/grpc-web+proto\r\ncontent-length: {}\r\n\r\n",
                whole.len()
            );
            [head.into_bytes(), whole].concat()
        }
        _ => http::mirror()(name, head, body),
    });
    let to = bed.service_with("grpcweb", answer).await;
    let headers = "content-type: application/grpc-web+proto\r\nx-grpc-web: 1\r\n";
    let answer =
        http::request(&bed.cli, to, "POST", "/shop.Cart/Get", headers, "\0\0\0\0\u{2}ok").await.unwrap();
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/grpc-web+proto")));
    assert!(
        answer.body.starts_with("\0\0\0\0\u{2}ok") && answer.body.ends_with("grpc-status:0\r\n"),
        "{answer:?}"
    );
    // What fails here is an answer of HTTP: a browser reads its status.
    let to = bed.bind("grpcwebempty", "http").await;
    let answer = http::request(&bed.cli, to, "POST", "/shop.Cart/Get", headers, "\0\0\0\0\0").await.unwrap();
    assert_eq!((answer.status, answer.header("grpc-status")), (503, None));
}

async fn traced(bed: &Waypoints) {
    let to = bed.service("traced").await;
    let fields = [
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tracestate", "vendor=opaque"),
        ("baggage", "user=ann"),
        ("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1"),
        ("x-b3-traceid", "80f198ee56343ba864fe8b2a57d3eff7"),
        ("x-b3-spanid", "e457b5a2e4d86bd1"),
        ("x-b3-parentspanid", "05e3ac9a4f6e3b90"),
        ("x-b3-sampled", "1"),
        ("x-request-id", "9d1b9b5e-6d0b-4a43-8f0c-1c6f2f6f2f3e"),
    ];
    let headers: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let answer = http::get(&bed.cli, to, "/", &headers).await.unwrap();
    for (name, value) in fields {
        assert_eq!(answer.sent(name), Some(value), "{name}");
    }
}

async fn lost_body(bed: &Waypoints) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let answer: Answer = Arc::new(move |name, head, body| match head.starts_with("POST /") {
        true => {
            counted.fetch_add(1, Ordering::Relaxed);
            http::answer("503 Service Unavailable", "", "")
        }
        false => http::mirror()(name, head, body),
    });
    let to = bed.service_with("lostbody", answer).await;
    bed.route(
        "lostbody",
        "  - retry: {attempts: 2, codes: [503], backoff: 1ms}\n    backendRefs: [{name: lostbody, port: 80}]\n",
    )
    .await;
    let tries = async |length: usize| {
        count.store(0, Ordering::Relaxed);
        let answer = http::request(&bed.cli, to, "POST", "/", "", &"x".repeat(length)).await.unwrap();
        assert_eq!(answer.status, 503);
        count.load(Ordering::Relaxed)
    };
    wait::until("the route is in force", SOON, || async { tries(100).await == 3 }).await;
    assert_eq!(tries(60 << 10).await, 3);
    // Larger than what is kept.
    assert_eq!(tries(200 << 10).await, 1);
}

async fn retry_after(bed: &Waypoints) {
    let count = AtomicUsize::new(0);
    let answer: Answer = Arc::new(move |name, head, body| {
        let first = count.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
        match (head.starts_with("GET /soon "), head.starts_with("GET /late ")) {
            (true, _) if first => http::answer("503 Service Unavailable", "retry-after: 1\r\n", ""),
            (_, true) => http::answer("503 Service Unavailable", "retry-after: 3600\r\n", ""),
            _ => http::mirror()(name, head, body),
        }
    });
    let to = bed.service_with("retryafter", answer).await;
    bed.route(
        "retryafter",
        "  - retry: {attempts: 1, codes: [503], backoff: 1ms}\n    backendRefs: [{name: retryafter, port: 80}]\n",
    )
    .await;
    wait::until("a wait was asked for", SOON, || async {
        let before = Instant::now();
        let answer = http::get(&bed.cli, to, "/soon", "").await.unwrap();
        let took = before.elapsed();
        answer.status == 200 && took >= Duration::from_secs(1)
    })
    .await;
    let before = Instant::now();
    let answer = http::get(&bed.cli, to, "/late", "").await.unwrap();
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("3600")));
    assert!(before.elapsed() < Duration::from_secs(5), "{:?}", before.elapsed());
}

async fn slow_answer(bed: &Waypoints) {
    bed.by_hand("slowanswer", |stream| {
        serve(stream, async |stream, _, _| {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc").await?;
            // Until the proxy gives it up.
            stream.read_to_end(&mut Vec::new()).await.map(drop)
        })
    })
    .await;
    let to = bed.bind("slowanswer", "http").await;
    bed.route(
        "slowanswer",
        "  - matches: [{path: {value: /}}]\n    timeouts: {request: 500ms}\n    \
             filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-route, value: r}]}}]\n    \
             backendRefs: [{name: slowanswer, port: 80}]\n",
    )
    .await;
    bed.eventually(to, "/", "", |answer| answer.header("x-route").is_some()).await;
    // The head has come; the body breaks off, and does not look whole.
    assert!(http::get(&bed.cli, to, "/stalls", "").await.is_err());
    let line = crate::thin::log_line(bed, "path=\"/stalls\"").await;
    assert!(line.contains("response_code=200") && line.contains("response_flags=\"UT\""), "{line}");
}

async fn failed_copies(bed: &Waypoints) {
    let slow: Answer = Arc::new(|name, head, body| {
        if head.starts_with("GET /copied") {
            std::thread::sleep(Duration::from_secs(3));
        }
        http::mirror()(name, head, body)
    });
    bed.server("slowcopy", "slowcopy", slow).await;
    for name in ["slowcopy", "nocopy"] {
        bed.apply(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n"
        ))
        .await;
    }
    let to = bed.service("copied").await;
    bed.route(
        "copied",
        "  - filters:\n    \
             - {type: RequestMirror, requestMirror: {backendRef: {name: slowcopy, port: 80}}}\n    \
             - {type: RequestMirror, requestMirror: {backendRef: {name: nocopy, port: 80}}}\n    \
             backendRefs: [{name: copied, port: 80}]\n",
    )
    .await;
    let failed = async || http::metric(&bed.metrics().await, "ambit_mirrors_failed_total ");
    let before = failed().await;
    wait::until("a copy for nobody is counted", SOON, || async {
        let asked = Instant::now();
        let answer = http::get(&bed.cli, to, "/copied", "").await.unwrap();
        assert_eq!((answer.status, answer.server()), (200, "copied"));
        assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
        failed().await > before
    })
    .await;
}
