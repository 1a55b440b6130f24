//! HTTP/2 from client to server through three proxies: gRPC with its trailers, WebSocket by extended CONNECT, and clients
//! that reset their requests or flood the waypoint with frames.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};
use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Method, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use crate::bed::{PORT, Waypoints};
use crate::http as http1;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a gRPC call passes with its trailers", async |bed| grpc(bed).await);
    trials.add("an error of a gRPC call is a grpc-status", async |bed| grpc_error(bed).await);
    trials.add("HTTP/2 from a client reaches an HTTP/1.1 server", async |bed| to_http1(bed).await);
    trials.add("WebSocket over HTTP/2 joins both connections", async |bed| websocket(bed).await);
    trials.add("a connection is idle again after its last WebSocket", async |bed| websocket_ends(bed).await);
    trials.add("an HTTP/2 connection ends after its last request", async |bed| used_up(bed).await);
    trials.add("an endpoint gets no more streams than it allows", async |bed| few_streams(bed).await);
    trials.add("requests that GOAWAY leaves out move to a new connection", async |bed| moved(bed).await);
    trials.add("a client that resets its requests is cut", async |bed| rapid_reset(bed).await);
    trials.add("a flood of CONTINUATION frames ends its connection", async |bed| continuation(bed).await);
}

/// What ends when it is dropped.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A client that speaks HTTP/2 without being asked.
async fn client(pod: &Pod, to: SocketAddr) -> (SendRequest<Bytes>, Task) {
    let stream = pod.connect(to).await.unwrap();
    let (requests, connection) = h2::client::handshake(stream).await.unwrap();
    // How the connection ends is seen by its requests.
    (requests, Task(tokio::spawn(async move { drop(connection.await) })))
}

fn request(method: Method, path: &str, headers: &[(&str, &str)]) -> Request<()> {
    let uri = format!("http://app.example{path}");
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

/// A response, its body and its trailers.
async fn call(
    requests: &SendRequest<Bytes>,
    request: Request<()>,
    body: &'static [u8],
) -> Result<(Response<()>, Vec<u8>, Option<HeaderMap>), h2::Error> {
    let mut requests = requests.clone().ready().await?;
    let (response, mut sending) = requests.send_request(request, body.is_empty())?;
    if !body.is_empty() {
        sending.send_data(Bytes::from_static(body), true)?;
    }
    let reading = async {
        let (head, mut incoming) = response.await?.into_parts();
        let mut whole = Vec::new();
        while let Some(data) = incoming.data().await {
            let data = data?;
            incoming.flow_control().release_capacity(data.len())?;
            whole.extend_from_slice(&data);
        }
        Ok((Response::from_parts(head, ()), whole, incoming.trailers().await?))
    };
    tokio::time::timeout(SOON, reading).await.expect("an answer in time")
}

/// Answers each call with its own body, and a status in the trailers.
async fn serve_grpc(pod: &Pod, address: SocketAddr) -> Task {
    let listener = pod.listen(address).await.unwrap();
    Task(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    tokio::spawn(async move {
                        let mut incoming = request.into_body();
                        let mut whole = Vec::new();
                        while let Some(Ok(data)) = incoming.data().await {
                            whole.extend_from_slice(&data);
                        }
                        let head = Response::builder().header("content-type", "application/grpc");
                        let Ok(mut sending) = respond.send_response(head.body(()).unwrap(), false) else {
                            return;
                        };
                        let mut trailers = HeaderMap::new();
                        trailers.insert("grpc-status", "5".parse().unwrap());
                        // A client that has gone away is the test's business.
                        let sent = sending.send_data(whole.into(), false);
                        drop(sent.and_then(|()| sending.send_trailers(trailers)));
                    });
                }
            });
        }
    }))
}

async fn grpc(bed: &Waypoints) {
    let options = ambit_local::PodOptions::new("shop", "grpcsvc").service_account("grpcsvc");
    let pod = bed.cluster.pod(options.label("app", "grpcsvc").node(1)).await.unwrap();
    let _serving = serve_grpc(&pod, SocketAddr::new(pod.ip().into(), PORT)).await;
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: grpcsvc, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
         spec: {{selector: {{app: grpcsvc}}, ports: [{{name: grpc, port: 80, targetPort: {PORT}}}]}}\n"
    ))
    .await;
    let vip = bed.cluster.service_ips("shop", "grpcsvc").into_iter().next().unwrap();
    let to = SocketAddr::new(vip, 80);
    let headers = [("content-type", "application/grpc"), ("te", "trailers")];
    wait::for_ok("a call passes", SOON, || async {
        let (requests, _task) = client(&bed.cli, to).await;
        let (response, body, trailers) =
            call(&requests, request(Method::POST, "/shop.Cart/Get", &headers), b"\0\0\0\0\x07message")
                .await?;
        let status = trailers.as_ref().and_then(|trailers| trailers.get("grpc-status").cloned());
        match (response.status().as_u16(), &body[..], status) {
            (200, b"\0\0\0\0\x07message", Some(status)) if status == "5" => Ok(()),
            other => Err(Box::<dyn std::error::Error>::from(format!("{other:?}"))),
        }
    })
    .await;
    let line = crate::thin::log_line(bed, "path=\"/shop.Cart/Get\"").await;
    assert!(line.contains("protocol=\"HTTP/2\""), "{line}");
    // The message is one, and no more: the server repeats what it got.
    let metrics = bed.metrics().await;
    for family in ["istio_request_messages_total{", "istio_response_messages_total{"] {
        let counts =
            |line: &&str| line.starts_with(family) && line.contains("grpcsvc") && line.ends_with("} 1");
        assert!(metrics.lines().any(|line| counts(&line)), "{family} {metrics}");
    }
}

/// A service of HTTP/2 whose endpoint answers through the waypoint.
async fn reached(bed: &Waypoints, name: &str) -> SocketAddr {
    let to = bed.expose(name, "http2").await;
    let path = format!("/reached/{name}");
    wait::until("requests pass the waypoint", SOON, || async {
        let (requests, _task) = client(&bed.cli, to).await;
        let answer = call(&requests, request(Method::GET, &path, &[]), b"").await;
        let passed = |line: &String| line.contains(&path) && line.contains("response_code=200");
        answer.is_ok() && bed.logs().iter().any(passed)
    })
    .await;
    to
}

async fn few_streams(bed: &Waypoints) {
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = connections.clone();
    bed.by_hand("fewstreams", move |stream| {
        counted.fetch_add(1, Ordering::Relaxed);
        async move {
            let mut server = h2::server::Builder::new();
            let Ok(mut connection) = server.max_concurrent_streams(2).handshake::<_, Bytes>(stream).await
            else {
                return Ok(());
            };
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    // A client that has gone away is the test's business.
                    drop(respond.send_response(Response::new(()), true));
                });
            }
            Ok(())
        }
    })
    .await;
    let to = reached(bed, "fewstreams").await;
    let (requests, _task) = client(&bed.cli, to).await;
    let path = |at: usize| format!("/few/{at}");
    let calls = (0..32).map(|at| call(&requests, request(Method::GET, &path(at), &[]), b""));
    for answer in futures_util::future::join_all(calls).await {
        assert_eq!(answer.unwrap().0.status(), 200);
    }
    assert!(connections.load(Ordering::Relaxed) > 1, "all requests waited for one connection");
    let tries = bed.logs().into_iter().filter(|line| line.contains("path=\"/few/"));
    for line in tries {
        assert!(line.contains("attempts=1"), "an endpoint refused a stream: {line}");
    }
}

/// Answers every request; closes the connection after the first one if `once`.
async fn agree(stream: tokio::net::TcpStream, once: bool) -> std::io::Result<()> {
    let Ok(mut connection) = h2::server::handshake(stream).await else { return Ok(()) };
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        // A client that has gone away is the test's business.
        drop(respond.send_response(Response::new(()), true));
        if once {
            connection.graceful_shutdown();
        }
    }
    Ok(())
}

/// Takes no request, and says so in GOAWAY once the first has come.
async fn leave(mut stream: tokio::net::TcpStream) -> std::io::Result<()> {
    let frame = |kind: u8, flags: u8, id: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, id], payload].concat()
    };
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await?;
    stream.write_all(&frame(4, 0, 0, &[])).await?;
    let mut kind = 0;
    while kind != 1 {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await?;
        kind = head[3];
        if kind == 4 && head[4] == 0 {
            stream.write_all(&frame(4, 1, 0, &[])).await?;
        }
    }
    // The last stream that is processed is none.
    stream.write_all(&frame(7, 0, 0, &[0, 0, 0, 0, 0, 0, 0, 0])).await?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.map(drop)
}

async fn moved(bed: &Waypoints) {
    // Connections from the one that is left on.
    let (leaving, connections) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (left, counted) = (leaving.clone(), connections.clone());
    bed.by_hand("moved", move |stream| {
        let number = left.load(Ordering::Relaxed).then(|| counted.fetch_add(1, Ordering::Relaxed));
        async move {
            match number {
                Some(0) => leave(stream).await,
                _ => agree(stream, number.is_none()).await,
            }
        }
    })
    .await;
    let to = reached(bed, "moved").await;
    wait::until("the first connections are gone", SOON, || async { bed.connections_to("/moved").await == 0 })
        .await;
    leaving.store(true, Ordering::Relaxed);
    let (requests, _task) = client(&bed.cli, to).await;
    let answer = call(&requests, request(Method::POST, "/moved/1", &[]), b"body").await;
    assert_eq!(answer.unwrap().0.status(), 200);
    assert_eq!(connections.load(Ordering::Relaxed), 2);
    let line = crate::thin::log_line(bed, "path=\"/moved/1\"").await;
    assert!(line.contains("attempts=1"), "a request that was not processed counts as tried: {line}");
}

async fn grpc_error(bed: &Waypoints) {
    let to = bed.bind("grpcempty", "grpc").await;
    let (requests, _task) = client(&bed.cli, to).await;
    let headers = [("content-type", "application/grpc"), ("te", "trailers")];
    let call = call(&requests, request(Method::POST, "/shop.Cart/Get", &headers), b"message").await;
    let (response, _, trailers) = call.unwrap();
    assert_eq!(response.status(), 200);
    let trailers = trailers.unwrap_or_default();
    let status = response.headers().get("grpc-status").or(trailers.get("grpc-status"));
    assert_eq!(status.unwrap(), "14");
}

async fn to_http1(bed: &Waypoints) {
    let to = bed.service("downgraded").await;
    let (requests, _task) = client(&bed.cli, to).await;
    // Many at once on one connection, each with its own answer.
    let paths: Vec<String> = (0..50).map(|at| format!("/h2/{at}")).collect();
    let calls = paths.iter().map(|path| call(&requests, request(Method::POST, path, &[]), b"body"));
    for (path, answer) in paths.iter().zip(futures_util::future::join_all(calls).await) {
        let (response, body, _) = answer.unwrap();
        let body = String::from_utf8(body).unwrap();
        assert_eq!(response.status(), 200);
        assert!(body.contains(&format!("POST {path} HTTP/1.1\r\n")) && body.ends_with("body"), "{body}");
        assert!(response.headers().get("connection").is_none());
    }
}

async fn used_up(bed: &Waypoints) {
    let to = bed.service("usedup2").await;
    let stream = bed.cli.connect(to).await.unwrap();
    let (requests, connection) = h2::client::handshake(stream).await.unwrap();
    let ended = tokio::spawn(connection);
    for count in 0..crate::limits::LAST {
        let answer = call(&requests, request(Method::GET, "/", &[]), b"").await;
        assert_eq!(answer.unwrap().0.status(), 200, "{count}");
    }
    // GOAWAY ends it without an error.
    let ended = tokio::time::timeout(SOON, ended).await.expect("an end in time").unwrap();
    assert!(ended.is_ok(), "{ended:?}");
    let more = call(&requests, request(Method::GET, "/", &[]), b"").await;
    assert!(more.is_err(), "a request beyond the last one was answered");
}

/// A server of WebSockets that says that it is ready.
fn chat() -> http1::Answer {
    Arc::new(|_, head, body| match http1::header(head, "sec-websocket-key") {
        Some(key) if key.len() == 24 && head.starts_with("GET /chat ") => {
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
              sec-websocket-accept: x\r\n\r\nready"
                .to_vec()
        }
        _ => http1::mirror()("chat", head, body),
    })
}

/// Requests on a connection that offers extended CONNECT.
async fn with_upgrades(requests: SendRequest<Bytes>) -> SendRequest<Bytes> {
    let requests = requests.ready().await.unwrap();
    wait::until("extended CONNECT is offered", SOON, || async {
        requests.is_extended_connect_protocol_enabled()
    })
    .await;
    requests
}

async fn websocket_ends(bed: &Waypoints) {
    let to = bed.service_with("chatidle", chat()).await;
    let stream = bed.cli.connect(to).await.unwrap();
    let (requests, connection) = h2::client::handshake(stream).await.unwrap();
    let mut ended = tokio::spawn(connection);
    let mut requests = with_upgrades(requests).await;
    let mut asked = request(Method::CONNECT, "/chat", &[("sec-websocket-version", "13")]);
    asked.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let (response, mut sending) = requests.send_request(asked, false).unwrap();
    let response = tokio::time::timeout(SOON, response).await.unwrap().unwrap();
    // Longer than a connection may be idle.
    let early = tokio::time::timeout(Duration::from_secs(8), &mut ended).await;
    assert!(early.is_err(), "a connection was closed for being idle while a WebSocket was open");
    sending.send_reset(h2::Reason::CANCEL);
    drop(response);
    let ended = tokio::time::timeout(Duration::from_secs(20), ended).await;
    assert!(ended.is_ok(), "a connection stays open without a request after its WebSocket has ended");
}

async fn websocket(bed: &Waypoints) {
    let to = bed.service_with("chat", chat()).await;
    let (requests, _task) = client(&bed.cli, to).await;
    let mut requests = with_upgrades(requests).await;
    let mut asked = request(Method::CONNECT, "/chat", &[("sec-websocket-version", "13")]);
    asked.extensions_mut().insert(h2::ext::Protocol::from_static("websocket"));
    let (response, _sending) = requests.send_request(asked, false).unwrap();
    let response = tokio::time::timeout(SOON, response).await.unwrap().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers().get("sec-websocket-accept"), None);
    let mut incoming = response.into_body();
    let first = tokio::time::timeout(SOON, incoming.data()).await.unwrap().unwrap().unwrap();
    assert_eq!(&first[..], b"ready");
    // A CONNECT without a protocol asks for a tunnel to anywhere.
    let plain = Request::builder().method(Method::CONNECT).uri("other.example:443").body(()).unwrap();
    let (response, _sending) = requests.send_request(plain, true).unwrap();
    assert_eq!(tokio::time::timeout(SOON, response).await.unwrap().unwrap().status(), 405);
}

async fn rapid_reset(bed: &Waypoints) {
    let to = bed.service("resets").await;
    let before = crate::limits::exceeded(bed, "abandoned_requests").await;
    let (mut requests, _task) = client(&bed.cli, to).await;
    let hostile = async {
        // Far more than may be abandoned; the connection ends before the last.
        for _ in 0..20_000 {
            requests = requests.clone().ready().await?;
            let (response, mut sending) = requests.send_request(request(Method::POST, "/", &[]), false)?;
            tokio::task::yield_now().await;
            sending.send_reset(h2::Reason::CANCEL);
            drop(response);
        }
        Ok::<(), h2::Error>(())
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), hostile).await.expect("an end in time");
    assert!(ended.is_err(), "20,000 requests were reset on one connection");
    assert_eq!(http1::get(&bed.cli, to, "/", "").await.unwrap().status, 200);
    // hyper has a limit of its own for what is reset before it was looked at; either of them may be first.
    let after = crate::limits::exceeded(bed, "abandoned_requests").await;
    assert!(after >= before);
}

async fn continuation(bed: &Waypoints) {
    let to = bed.service("continuation").await;
    let mut stream = bed.cli.connect(to).await.unwrap();
    let mut start = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    // Empty SETTINGS, then HEADERS of stream 1 that do not end.
    start.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    start.extend([0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82]);
    stream.write_all(&start).await.unwrap();
    // A literal field that is not indexed: name and value of one letter.
    let field = [0x00, 1, b'x', 1, b'y'].repeat(200);
    let length = u16::try_from(field.len()).unwrap().to_be_bytes();
    let mut frame = vec![0, length[0], length[1], 9, 0, 0, 0, 0, 1];
    frame.extend(&field);
    let flood = async {
        let (mut reading, mut writing) = stream.split();
        let writing = async {
            for _ in 0..20_000 {
                writing.write_all(&frame).await?;
            }
            Ok::<(), std::io::Error>(())
        };
        let ended = async {
            let mut sink = Vec::new();
            reading.read_to_end(&mut sink).await
        };
        tokio::select! {
            written = writing => written.is_err(),
            _ = ended => true,
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(60), flood).await.expect("an end in time");
    assert!(ended, "20 MB of one header block were accepted");
    assert_eq!(http1::get(&bed.cli, to, "/", "").await.unwrap().status, 200);
}
