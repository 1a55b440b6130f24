//! Hostile requests of HTTP/1 from outside the mesh, each in the clear and inside TLS: what is wrong is refused and reaches no server,
//! and the next client is served.

use std::sync::Arc;

use ambit_tests::beds::Trials;
use ambit_tests::frames::Outcome;
use ambit_tests::http::{self, Answer, Client};
use ambit_tests::wait::{self, SOON};

use crate::bed::Gateways;
use crate::edge::{BOTH, Edge};

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("malformed requests from outside reach no server", async |bed| malformed(bed).await);
    trials.add("bodies that break off or are framed badly are no requests", async |bed| bodies(bed).await);
    trials
        .add("what follows a request that ends its connection is not read", async |bed| smuggled(bed).await);
    trials.add("a request from outside goes on in one form", async |bed| one_form(bed).await);
    trials.add("heads from outside are bounded in size and time", async |bed| bounded(bed).await);
    trials.add("a client that takes nothing of its answer is cut", async |bed| unread(bed).await);
    trials.add("no change to HTTP/2 or of a refused protocol is made", async |bed| upgrades(bed).await);
    trials.add("trailers say nothing that belongs to a header", async |bed| trailers(bed).await);
}

async fn malformed(bed: &Gateways) {
    let edge = Edge::start(bed, "hostile").await;
    let with = |fields: &str| format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n\r\n");
    let to = |target: &str| format!("GET {target} HTTP/1.1\r\nhost: a\r\n\r\n");
    let from = |host: &str| format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n");
    let requests = [
        ("GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nhost:\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".to_owned(), 400),
        ("GET http://a/ HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".to_owned(), 400),
        ("GET http://user@a/ HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), 400),
        (from("a b"), 400),
        (from("user@a"), 400),
        (from("a/b"), 400),
        (from("a:b"), 400),
        (from("a:65536"), 400),
        (from("[::1"), 400),
        // Field lines: a bare CR, obs-fold, NUL, a space before the colon or at the beginning, and other control characters.
        (with("x: a\rb"), 400),
        (with("x: a\r\n b"), 400),
        (with("x: a\0b"), 400),
        (with("x: a\x0bb"), 400),
        (with("x : a"), 400),
        (with("x\0y: a"), 400),
        (with("x"), 400),
        ("GET / HTTP/1.1\r\n host: a\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1\rhost: a\r\n\r\n".to_owned(), 400),
        // Lines that begin a request.
        ("GET  / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/9.9\r\nhost: a\r\n\r\n".to_owned(), 400),
        ("GET / HTTP/1.1 x\r\nhost: a\r\n\r\n".to_owned(), 400),
        ("G\0T / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), 400),
        ("GET /\0 HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), 400),
        // Paths that have no normal form, or hide one.
        (to("/.."), 400),
        (to("/%2e%2e/"), 400),
        (to("/a/%2E%2e/%2e./etc"), 400),
        (to("/%00"), 400),
        (to("/%zz"), 400),
        (to("/a\\..\\b"), 400),
        (to("/a/..%2fadmin"), 400),
        (to("/a/..%5cadmin"), 400),
        (to("/a/..;/admin"), 400),
        // Framing.
        (with("content-length: 1\r\ncontent-length: 2") + "ab", 400),
        (with("content-length: 1, 2") + "ab", 400),
        (with("content-length: +1") + "a", 400),
        (with("content-length: -1") + "a", 400),
        (with("content-length: 0x1") + "a", 400),
        (with("content-length: 1 1") + "a", 400),
        (with("content-length: 18446744073709551617") + "a", 400),
        (with("transfer-encoding: xchunked") + "0\r\n\r\n", 400),
        (with("transfer-encoding: identity"), 400),
        (with("transfer-encoding: chunked, identity") + "0\r\n\r\n", 400),
        (with("transfer-encoding: chunked\r\ntransfer-encoding: cow") + "0\r\n\r\n", 400),
        (with("transfer-encoding: \x0bchunked") + "0\r\n\r\n", 400),
        (with("transfer-encoding : chunked") + "0\r\n\r\n", 400),
        (with("transfer-encoding:\r\n chunked") + "0\r\n\r\n", 400),
        (with("transfer-encoding: gzip, chunked") + "0\r\n\r\n", 501),
        (with("transfer-encoding: gzip\r\ntransfer-encoding: chunked") + "0\r\n\r\n", 501),
        (with("transfer-encoding: chunked, chunked") + "0\r\n\r\n", 501),
        (with("transfer-encoding: chunked\r\ncontent-length: 3\r\ntransfer-encoding: x") + "0\r\n\r\n", 400),
        ("POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(), 400),
    ];
    let requests: Vec<_> = requests.iter().map(|(request, status)| (request.as_str(), *status)).collect();
    edge.refuses(&requests).await;
    // What a proxy must not do.
    let connect = "CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n";
    for over in BOTH {
        assert_eq!(edge.client(over).await.send(connect.as_bytes()).await.unwrap().status, 405, "{over:?}");
    }
    assert_eq!(edge.got(), Vec::<String>::new());
}

/// The server must not take a part of a body for the whole.
async fn bodies(bed: &Gateways) {
    let edge = Edge::start(bed, "bodies").await;
    let chunked =
        |body: &str| format!("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{body}");
    let requests = [
        chunked("g\r\nhello\r\n0\r\n\r\n"),
        chunked("-5\r\nhello\r\n0\r\n\r\n"),
        chunked("0x5\r\nhello\r\n0\r\n\r\n"),
        chunked("ffffffffffffffff0\r\nhello\r\n0\r\n\r\n"),
        chunked("5\nhello\r\n0\r\n\r\n"),
        chunked("5;a\nb\r\nhello\r\n0\r\n\r\n"),
        chunked("5\rhello\r\n0\r\n\r\n"),
        chunked("5\r\nhelloX\r\n0\r\n\r\n"),
        chunked("5\r\nhello0\r\n\r\n"),
        chunked("5 5\r\nhello\r\n0\r\n\r\n"),
    ];
    let requests: Vec<_> = requests.iter().map(|request| (request.as_str(), 400)).collect();
    edge.refuses(&requests).await;
}

/// One request, whatever the bytes after it look like.
async fn smuggled(bed: &Gateways) {
    let edge = Edge::start(bed, "smuggled").await;
    const SECOND: &str = "GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
    for over in BOTH {
        // RFC 9112 §6.1: chunked counts, and the connection is closed after the answer.
        for length in [3, 5 + SECOND.len()] {
            let request = format!(
                "POST /first HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{SECOND}"
            );
            let mut client = edge.client(over).await;
            let answer = client.send(request.as_bytes()).await.unwrap();
            assert_eq!(answer.status, 200, "{over:?}");
            let framing =
                (answer.sent("content-length").is_some(), answer.sent("transfer-encoding").is_some());
            assert_ne!(framing, (true, true), "{over:?}");
            assert!(client.is_closed().await, "{over:?}");
            assert_eq!(edge.got(), ["POST /first HTTP/1.1"], "{over:?}");
        }
        // A body that the method does not need is a body all the same.
        let request =
            format!("GET /first HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{SECOND}", SECOND.len());
        let mut client = edge.client(over).await;
        assert_eq!(client.send(request.as_bytes()).await.unwrap().status, 200, "{over:?}");
        assert_eq!(edge.got(), ["GET /first HTTP/1.1"], "{over:?}");
        // Of two requests at once the first is refused: the second is not read.
        let request = format!("GET /.. HTTP/1.1\r\nhost: a\r\n\r\n{SECOND}");
        let mut client = edge.client(over).await;
        assert_eq!(client.send(request.as_bytes()).await.unwrap().status, 400, "{over:?}");
        assert!(client.is_closed().await, "{over:?}");
        assert_eq!(edge.got(), Vec::<String>::new(), "{over:?}");
    }
}

async fn one_form(bed: &Gateways) {
    let edge = Edge::start(bed, "oneform").await;
    for over in BOTH {
        for (target, path) in [
            ("/a//b", "/a/b"),
            ("//a/./b", "/a/b"),
            ("/a/%2e%2e/b", "/b"),
            ("/a/x/%2E%2E/b", "/a/b"),
            ("/%61", "/a"),
            ("/a%2fb", "/a%2Fb"),
            ("/a%252e%252e/b", "/a%252e%252e/b"),
            ("/a?q=//../%2e", "/a?q=//../%2e"),
            ("/a#fragment", "/a"),
            ("http://b.example//x", "/x"),
        ] {
            let mut client = edge.client(over).await;
            let request = format!("GET {target} HTTP/1.1\r\nhost: a.example\r\n\r\n");
            let answer = client.send(request.as_bytes()).await.unwrap();
            assert_eq!(answer.request_line(), format!("GET {path} HTTP/1.1"), "{over:?} {target}");
            // RFC 9112 §3.2.2: the target's host counts.
            let host = if target.starts_with("http:") { "b.example" } else { "a.example" };
            assert_eq!(answer.sent("host"), Some(host), "{over:?} {target}");
        }
        // Fields of one hop, over all lines; none that the gateway writes can be taken away.
        let request = "GET / HTTP/1.1\r\nhost: a\r\nconnection: x-one, x-forwarded-for, host\r\nConnection: X-Two, close\r\n\
                       x-one: 1\r\nx-two: 2\r\nx-end: 3\r\nte: trailers, gzip\r\nkeep-alive: 1\r\nproxy-connection: a\r\n\
                       x-forwarded-for: 192.0.2.1\r\nx-forwarded-client-cert: By=me\r\nhttp2-settings: AA\r\n\r\n";
        let answer = edge.client(over).await.send(request.as_bytes()).await.unwrap();
        assert_eq!(answer.status, 200, "{over:?}");
        for gone in
            ["x-one", "x-two", "keep-alive", "proxy-connection", "x-forwarded-client-cert", "http2-settings"]
        {
            assert_eq!(answer.sent(gone), None, "{over:?} {gone}");
        }
        let outside = bed.outside.ip().to_string();
        assert_eq!(answer.sent("x-forwarded-for"), Some(outside.as_str()), "{over:?}");
        assert_eq!((answer.sent("host"), answer.sent("x-end")), (Some("a"), Some("3")), "{over:?}");
        assert_eq!(answer.sent("te"), Some("trailers"), "{over:?}");
    }
}

async fn bounded(bed: &Gateways) {
    let edge = Edge::start(bed, "bounded").await;
    let large = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "a".repeat(80 << 10));
    let fields: String = (0..150).map(|at| format!("x-{at}: 1\r\n")).collect();
    let many = format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
    edge.refuses(&[(&large, 431), (&many, 431)]).await;
    let long = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(20 << 10));
    for over in BOTH {
        assert_eq!(edge.client(over).await.send(long.as_bytes()).await.unwrap().status, 414, "{over:?}");
        // Byte by byte, and a body that stops.
        for slow in [
            "GET / HTTP/1.1\r\nhost: a\r\nx",
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        ] {
            let mut client = edge.client(over).await;
            for byte in slow.bytes() {
                client.write(&[byte]).await.unwrap();
            }
            let answer = client.response().await.unwrap();
            assert_eq!(answer.status, 408, "{over:?} {slow:?}");
            assert!(client.is_closed().await, "{over:?} {slow:?}");
        }
    }
    // One that begins no handshake, and one that does not end it.
    for first in [&b""[..], &[0x16, 3, 1, 2, 0, 1]] {
        let mut silent = Client::over(bed.outside.connect(edge.tls).await.unwrap());
        silent.write(first).await.unwrap();
        assert!(silent.is_closed().await, "{first:?}");
    }
    assert_eq!(edge.got(), Vec::<String>::new());
    edge.serves().await;
}

/// Slow reading (RFC 9113 §10.5): each such client would keep a connection to an endpoint.
async fn unread(bed: &Gateways) {
    // More than all buffers on the way hold.
    const LONG: usize = 24 << 20;
    let answer: Answer = Arc::new(|_, head, _| match head.starts_with("GET /long ") {
        true => http::answer("200 OK", "", &"x".repeat(LONG)),
        false => http::answer("200 OK", "", "short"),
    });
    let edge = Edge::serving(bed, "unread", answer).await;
    let cut = async || {
        let mut count = 0;
        for pod in bed.cluster.pods_of("edge", crate::bed::GATEWAY_NAME, "unread-gw") {
            let at = std::net::SocketAddr::new(pod.ip().into(), 15020);
            let metrics = http::get(&pod, at, "/metrics", "").await.unwrap().body;
            count += http::metric(&metrics, "ambit_client_limits_exceeded_total{limit=\"write_timeout\"}");
        }
        count
    };
    for over in BOTH {
        let before = cut().await;
        let mut client = edge.client(over).await;
        client.write(b"GET /long HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        wait::until("the connection is cut", SOON * 2, || async { cut().await > before }).await;
        let rest = client.rest().await.map_or(0, |bytes| bytes.len());
        assert!(rest < LONG, "{over:?}: all of the answer came");
    }
    // In HTTP/2 the connection moves bytes, and the stream's window is not opened.
    for over in BOTH {
        let before = cut().await;
        let mut frames = edge.frames(over).await;
        let fields: [(&[u8], &[u8]); 4] =
            [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/long"), (b":authority", b"a")];
        frames.request(1, &fields, true).await.unwrap();
        assert_eq!(frames.outcome(1).await, Outcome::Status(200), "{over:?}");
        wait::until("the connection is cut", SOON * 2, || async { cut().await > before }).await;
        while frames.outcome(1).await != Outcome::Closed {}
    }
    edge.serves().await;
}

async fn upgrades(bed: &Gateways) {
    let answer: Answer = Arc::new(|name, head, body| match http::header(head, "upgrade") {
        // An endpoint that believes whatever is asked for, but for one.
        Some("refused") | None => http::mirror()(name, head, body),
        Some(protocol) => {
            let head = format!(
                "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: {protocol}\r\n\r\n"
            );
            head.into_bytes()
        }
    });
    let edge = Edge::serving(bed, "upgraded", answer).await;
    for over in BOTH {
        for protocol in ["h2c", "h2", "HTTP/2.0", "TLS/1.2", "websocket, h2c"] {
            let mut client = edge.client(over).await;
            let request = format!(
                "GET / HTTP/1.1\r\nhost: a\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: {protocol}\r\nhttp2-settings: AAMAAABk\r\n\r\n"
            );
            let answer = client.send(request.as_bytes()).await.unwrap();
            assert_eq!((answer.status, answer.sent("upgrade")), (200, None), "{over:?} {protocol}");
        }
        // RFC 9110 §7.8: an upgrade that `Connection` does not name, and one in HTTP/1.0, are none.
        for request in [
            "GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n\r\n",
            "GET / HTTP/1.0\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        ] {
            let answer = edge.client(over).await.send(request.as_bytes()).await.unwrap();
            assert_eq!((answer.status, answer.sent("upgrade")), (200, None), "{over:?} {request}");
        }
        // The endpoint answers without a 101: what follows is a request, which the gateway reads as one.
        edge.got();
        let mut client = edge.client(over).await;
        let asked = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: refused\r\n\r\n";
        let hidden = "GET /.. HTTP/1.1\r\nhost: a\r\n\r\n";
        assert_eq!(client.send(format!("{asked}{hidden}").as_bytes()).await.unwrap().status, 200, "{over:?}");
        assert_eq!(client.response().await.map_or(400, |answer| answer.status), 400, "{over:?}");
        assert_eq!(edge.got(), ["GET / HTTP/1.1"], "{over:?}");
    }
}

async fn trailers(bed: &Gateways) {
    let edge = Edge::start(bed, "trailing").await;
    let sent = "x-sum: 7\r\ncontent-length: 99\r\ntransfer-encoding: gzip\r\nhost: evil\r\nauthorization: Basic a\r\n\
                x-forwarded-for: 192.0.2.1\r\nx-forwarded-client-cert: By=me\r\nconnection: x-sum\r\n";
    let request = format!(
        "POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: te\r\ntrailer: x-sum, host, x-forwarded-for, \
         x-forwarded-client-cert, authorization\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n{sent}\r\n"
    );
    for over in BOTH {
        let answer = edge.client(over).await.send(request.as_bytes()).await.unwrap();
        assert_eq!((answer.status, answer.sent("x-sum")), (200, Some("7")), "{over:?}");
        let count =
            |name: &str| answer.body.lines().filter(|line| line.starts_with(&format!("{name}:"))).count();
        for (name, wanted) in
            [("host", 1), ("x-forwarded-for", 1), ("x-forwarded-client-cert", 0), ("authorization", 0)]
        {
            assert_eq!(count(name), wanted, "{over:?} {name}: {}", answer.body);
        }
        assert!(!answer.body.contains("evil") && !answer.body.contains("192.0.2.1"), "{}", answer.body);
    }
}
