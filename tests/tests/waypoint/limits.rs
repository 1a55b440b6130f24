//! Limits of a client's connection: each has an answer and a count, and other clients are served meanwhile.

use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};
use tokio::io::AsyncWriteExt;

use crate::bed::Waypoints;
use crate::http::{self, Client};

/// Requests of one connection, as the bed sets it.
pub(crate) const LAST: u32 = 1000;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a head that is too large is answered with 431", async |bed| large_heads(bed).await);
    trials.add("a head that takes too long is answered with 408", async |bed| slow_head(bed).await);
    trials.add("a body that takes too long is answered with 408", async |bed| slow_body(bed).await);
    trials.add("a connection without requests is closed", async |bed| idle(bed).await);
    trials.add("a connection is closed after its last request", async |bed| used_up(bed).await);
    trials.add("a body that waits for 100 Continue is asked for", async |bed| continues(bed).await);
    trials.add("trailers of HTTP/1.1 pass in both directions", async |bed| trailers(bed).await);
}

/// How often a limit was passed.
pub(crate) async fn exceeded(bed: &Waypoints, limit: &str) -> u64 {
    let series = format!("ambit_client_limits_exceeded_total{{limit=\"{limit}\"}}");
    http::metric(&bed.metrics().await, &series)
}

async fn large_heads(bed: &Waypoints) {
    let to = bed.service("largehead").await;
    let before = exceeded(bed, "head_size").await;
    let long = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "a".repeat(80 << 10));
    let fields: String = (0..150).map(|at| format!("x-{at}: 1\r\n")).collect();
    let many = format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
    for request in [long, many] {
        let mut client = Client::connect(&bed.cli, to).await.unwrap();
        assert_eq!(client.send(request.as_bytes()).await.unwrap().status, 431);
        assert!(client.is_closed().await);
    }
    assert!(exceeded(bed, "head_size").await >= before + 2);
    assert_eq!(http::get(&bed.cli, to, "/", "").await.unwrap().status, 200);
}

async fn slow_head(bed: &Waypoints) {
    let to = bed.service("slowhead").await;
    let before = exceeded(bed, "head_timeout").await;
    let mut slow = Client::connect(&bed.cli, to).await.unwrap();
    slow.write(b"GET / HTTP/1.1\r\nhost: a\r\nx").await.unwrap();
    assert_eq!(http::get(&bed.cli, to, "/", "").await.unwrap().status, 200);
    let answer = slow.response().await.unwrap();
    assert_eq!((answer.status, answer.header("connection")), (408, Some("close")));
    assert!(slow.is_closed().await);
    // The same on a connection that had a request before.
    let mut slow = Client::connect(&bed.cli, to).await.unwrap();
    assert_eq!(slow.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap().status, 200);
    assert_eq!(slow.send(b"GET /").await.unwrap().status, 408);
    assert!(exceeded(bed, "head_timeout").await >= before + 2);
    assert!(crate::thin::log_line(bed, "response_code=408").await.contains("response_flags=\"SI\""));
}

async fn slow_body(bed: &Waypoints) {
    let to = bed.service("slowbody").await;
    let before = exceeded(bed, "body_timeout").await;
    let mut slow = Client::connect(&bed.cli, to).await.unwrap();
    let request = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc";
    assert_eq!(slow.send(request).await.unwrap().status, 408);
    assert!(slow.is_closed().await);
    assert!(exceeded(bed, "body_timeout").await > before);
}

async fn idle(bed: &Waypoints) {
    let to = bed.service("idleconn").await;
    let before = exceeded(bed, "idle_timeout").await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    assert_eq!(client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap().status, 200);
    assert!(client.is_closed().await);
    // The waypoint counts it when the client has closed its side too, or did not in time.
    wait::until("it is counted", SOON, || async { exceeded(bed, "idle_timeout").await > before }).await;
}

async fn used_up(bed: &Waypoints) {
    let to = bed.service("usedup").await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    for count in 1..=LAST {
        let answer = client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert_eq!((answer.status, answer.header("connection").is_some()), (200, count == LAST), "{count}");
    }
    assert!(client.is_closed().await);
    let counted = || async { exceeded(bed, "requests_per_connection").await >= 1 };
    wait::until("it is counted", SOON, counted).await;
}

async fn continues(bed: &Waypoints) {
    let to = bed.service("continues").await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    let head = b"POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";
    assert_eq!(client.send(head).await.unwrap().status, 100);
    let answer = client.send(b"hello").await.unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.body.ends_with("hello"), "{}", answer.body);
    assert_eq!(answer.sent("expect"), None);
    // Whoever is refused is not asked for a body.
    let rule = "  - matches: [{path: {value: /open}}]\n    backendRefs: [{name: continues, port: 80}]\n";
    bed.route("continues", rule).await;
    bed.eventually(to, "/", "", |answer| answer.status == 404).await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    assert_eq!(client.send(head).await.unwrap().status, 404);
}

async fn trailers(bed: &Waypoints) {
    // Answers with the trailers of the request, and one of its own.
    let answer = async |mut stream: tokio::net::TcpStream| {
        let mut read = Vec::new();
        while let Some(head) = http::head(&mut stream, &mut read).await? {
            let (body, trailers) = http::body(&mut stream, &mut read, &head).await?;
            if http::header(&head, "trailer").is_none() {
                stream.write_all(&http::mirror()("trailers", &head, &body)).await?;
                continue;
            }
            let answer = format!(
                "HTTP/1.1 200 OK\r\ntrailer: x-sum, x-mine\r\ntransfer-encoding: chunked\r\n\r\n\
                 5\r\nhello\r\n0\r\nx-sum: 42\r\n{trailers}\r\n"
            );
            stream.write_all(answer.as_bytes()).await?;
        }
        Ok(())
    };
    bed.by_hand("trailers", answer).await;
    let to = bed.bind("trailers", "http").await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    let request = b"POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: te\r\ntrailer: x-mine\r\n\
                    transfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\nx-mine: 7\r\n\r\n";
    let answer = client.send(request).await.unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (200, "hello"));
    assert_eq!(http::header(&answer.trailers, "x-sum"), Some("42"));
    // What the client sent came back.
    assert_eq!(http::header(&answer.trailers, "x-mine"), Some("7"));
}
