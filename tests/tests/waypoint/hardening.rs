//! Hostile and odd requests: each gets the answer that the rules of HTTP ask for, and the next one is served.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;

use crate::bed::{WAYPOINT, Waypoints};
use crate::http::{self, Client};

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("malformed requests are refused and end their connection", async |bed| malformed(bed).await);
    trials.add("a request has one framing when it is sent on", async |bed| framing(bed).await);
    trials.add("fields of one hop stay behind in both directions", async |bed| hops(bed).await);
    trials.add("an oversized target is refused", async |bed| oversized(bed).await);
    trials.add("a client's claims of other clients are removed", async |bed| claims(bed).await);
    trials.add("an upgrade joins both connections", async |bed| upgrades(bed).await);
    trials.add("bytes of an undeclared protocol are passed on", async |bed| passes_bytes(bed).await);
}

async fn malformed(bed: &Waypoints) {
    let to = bed.service("malformed").await;
    for request in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nhost:\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        "GET /../.. HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET /%zz HTTP/1.1\r\nhost: a\r\n\r\n",
    ] {
        let mut client = Client::connect(&bed.cli, to).await.unwrap();
        let answer = client.send(request.as_bytes()).await.unwrap();
        assert_eq!(answer.status, 400, "{request:?}: {answer:?}");
        assert!(client.is_closed().await, "{request:?}");
    }
    assert_eq!(http::get(&bed.cli, to, "/", "").await.unwrap().status, 200);
    let before = malformed_count(bed).await;
    // What hyper itself refuses.
    let requests = [
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx: a\r\n b\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx: a\rb\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nx : b\r\n\r\n",
        "GET / HTTP/9.9\r\nhost: a\r\n\r\n",
        "GET  / HTTP/1.1\r\nhost: a\r\n\r\n",
    ];
    let mut problems = Vec::new();
    for request in requests {
        let mut client = Client::connect(&bed.cli, to).await.unwrap();
        let answer = client.send(request.as_bytes()).await;
        let status = answer.as_ref().map_or(0, |answer| answer.status);
        if status != 400 || !client.is_closed().await {
            problems.push((request, answer));
        }
    }
    assert!(problems.is_empty(), "{problems:#?}\n{:#?}", bed.logs());
    let counted = malformed_count(bed).await - before;
    assert!(counted >= requests.len() as u64, "{counted}");
    assert_eq!(http::get(&bed.cli, to, "/", "").await.unwrap().status, 200);
}

/// The waypoint's count of malformed requests.
async fn malformed_count(bed: &Waypoints) -> u64 {
    let metrics = bed.metrics().await;
    http::metric(&metrics, "ambit_requests_malformed_total ")
}

async fn framing(bed: &Waypoints) {
    let to = bed.service("framing").await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    let smuggling = "POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n\
                     5\r\nhello\r\n0\r\n\r\n";
    let answer = client.send(smuggling.as_bytes()).await.unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.body.ends_with("hello"), "{}", answer.body);
    assert!(answer.sent("content-length").is_none() || answer.sent("transfer-encoding").is_none());
}

async fn hops(bed: &Waypoints) {
    let response = "connection: x-hop\r\nx-hop: 1\r\nkeep-alive: timeout=1\r\nx-end: 2\r\n";
    let mirror = http::mirror();
    let answer: http::Answer = std::sync::Arc::new(move |name, head, body| {
        let body = String::from_utf8(mirror(name, head, body)).unwrap();
        let body = body.split_once("\r\n\r\n").unwrap().1.to_owned();
        http::answer("200 OK", response, &body)
    });
    let to = bed.service_with("hops", answer).await;
    let headers = "connection: x-mine, close\r\nconnection: X-Too\r\nx-mine: 1\r\nx-too: 2\r\nte: trailers\r\nx-end: 3\r\n";
    let answer = http::get(&bed.cli, to, "/", headers).await.unwrap();
    for gone in ["x-mine", "x-too", "keep-alive"] {
        assert_eq!(answer.sent(gone), None, "{gone}");
    }
    assert_eq!((answer.sent("te"), answer.sent("x-end")), (Some("trailers"), Some("3")));
    assert_eq!((answer.header("x-hop"), answer.header("keep-alive")), (None, None));
    assert_eq!(answer.header("x-end"), Some("2"));
}

async fn oversized(bed: &Waypoints) {
    let to = bed.service("oversized").await;
    let target = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(20 << 10));
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    assert_eq!(client.send(target.as_bytes()).await.unwrap().status, 414);
    assert_eq!(http::get(&bed.cli, to, "/", "").await.unwrap().status, 200);
}

async fn claims(bed: &Waypoints) {
    let to = bed.service("claims").await;
    let headers =
        "x-forwarded-for: 1.2.3.4\r\nx-forwarded-proto: https\r\nx-forwarded-client-cert: By=me\r\n";
    let answer = http::get(&bed.cli, to, "/", headers).await.unwrap();
    assert_eq!(answer.sent("x-forwarded-for"), Some(bed.cli.ip().to_string().as_str()));
    assert_eq!(answer.sent("x-forwarded-proto"), Some("http"));
    assert_eq!(answer.sent("x-forwarded-client-cert"), None);
    assert!(answer.sent("x-request-id").is_some());
    // Endpoints of a Gateway that asks for it learn who the client is.
    let asked = "{name: waypoint, namespace: shop, annotations: {ambient.istio.io/xfcc-include-client-identity: 'true'}}";
    bed.apply(&WAYPOINT.replace("{name: waypoint, namespace: shop}", asked)).await;
    let id = |account: &str| format!("spiffe://cluster.local/ns/shop/sa/{account}");
    let claimed = format!("By={};URI={}", id("waypoint"), id("cli"));
    let xfcc = |answer: &http::Response| answer.sent("x-forwarded-client-cert").map(str::to_owned);
    bed.eventually(to, "/", headers, |answer| xfcc(answer).as_ref() == Some(&claimed)).await;
    bed.apply(WAYPOINT).await;
    bed.eventually(to, "/", headers, |answer| xfcc(answer).is_none()).await;
}

async fn upgrades(bed: &Waypoints) {
    let answer: http::Answer = std::sync::Arc::new(|_, head, body| match http::header(head, "upgrade") {
        Some("echo") => {
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\nready".to_vec()
        }
        Some(_) => {
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: other\r\n\r\n".to_vec()
        }
        None => http::mirror()("upgrades", head, body),
    });
    let to = bed.service_with("upgrades", answer).await;
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    let asked = "GET / HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: echo\r\n\r\n";
    let answer = client.send(asked.as_bytes()).await.unwrap();
    assert_eq!((answer.status, answer.header("upgrade")), (101, Some("echo")));
    assert_eq!(client.bytes(5).await.unwrap(), b"ready");
    // One that changes to something else is not believed.
    let mut client = Client::connect(&bed.cli, to).await.unwrap();
    let asked = asked.replace("upgrade: echo", "upgrade: foo");
    assert_eq!(client.send(asked.as_bytes()).await.unwrap().status, 503);
}

async fn passes_bytes(bed: &Waypoints) {
    let pod = bed.server("bytes", "bytes", http::mirror()).await;
    let address = SocketAddr::new(pod.ip().into(), 9090);
    let _running =
        ambit_tests::apps::run(&pod, address, ambit_tests::apps::App::ServerFirst("bytes".to_owned()))
            .await
            .unwrap();
    bed.apply(
        "apiVersion: v1\nkind: Service\n\
         metadata: {name: bytes, namespace: shop, labels: {istio.io/use-waypoint: waypoint}}\n\
         spec: {selector: {app: bytes}, ports: [{name: tcp, port: 90, targetPort: 9090}, {name: any, port: 91, targetPort: 9090}]}\n",
    )
    .await;
    let vip = bed.cluster.service_ips("shop", "bytes").into_iter().next().unwrap();
    for port in [90, 91] {
        let to = SocketAddr::new(vip, port);
        ambit_tests::wait::for_ok("bytes pass", ambit_tests::wait::SOON, || async {
            let mut stream = bed.cli.connect(to).await?;
            let answer = ambit_tests::apps::exchange(&mut stream, b"").await?;
            match answer == b"220 bytes\r\n" {
                true => Ok(()),
                false => Err(std::io::Error::other(format!("{answer:?}"))),
            }
        })
        .await;
    }
}
