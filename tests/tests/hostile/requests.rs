//! Authenticated peers that request what they may not have.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_tests::add_trials;
use ambit_tests::beds::Trials;
use ambit_tests::wait;
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use rustls::ClientConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use crate::{ENEMY, FRIEND, HBONE, Hostile, PORT};

/// HTTP/2 with the server's tunnel port.
pub(crate) struct Session {
    pub(crate) from: SocketAddr,
    requests: SendRequest<Bytes>,
    driver: JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Session {
    pub(crate) async fn open(bed: &Hostile, tls: Arc<ClientConfig>) -> Self {
        let (from, stream) = bed.approach(tls).await;
        let (requests, connection) = h2::client::handshake(stream).await.unwrap();
        let driver = tokio::spawn(async move { drop(connection.await) });
        Self { from, requests, driver }
    }

    /// A request with this method and target, answered with a status.
    async fn ask(&mut self, method: Method, target: &str) -> StatusCode {
        let request = Request::builder().method(method).uri(target).body(()).unwrap();
        self.send(request).await
    }

    /// CONNECT, answered with a status.
    pub(crate) async fn connect(&mut self, target: &str) -> StatusCode {
        self.ask(Method::CONNECT, target).await
    }

    /// Whether a CONNECT to `target` opens a tunnel. The connection may be closing, or gone.
    pub(crate) async fn is_let_in(&mut self, target: SocketAddr) -> bool {
        let requests = &mut self.requests;
        if poll_fn(|cx| requests.poll_ready(cx)).await.is_err() {
            return false;
        }
        let request = Request::builder().method(Method::CONNECT).uri(target.to_string()).body(()).unwrap();
        let Ok((answer, _body)) = requests.send_request(request, false) else { return false };
        let answer = tokio::time::timeout(wait::SOON, answer).await.expect("an answer in time");
        answer.is_ok_and(|answer| answer.status() == StatusCode::OK)
    }

    async fn send(&mut self, request: Request<()>) -> StatusCode {
        let requests = &mut self.requests;
        poll_fn(|cx| requests.poll_ready(cx)).await.unwrap();
        let (answer, _body) = requests.send_request(request, false).unwrap();
        let answer = tokio::time::timeout(wait::SOON, answer).await.expect("an answer in time");
        answer.unwrap().status()
    }
}

/// An open tunnel to an echoing application.
pub(crate) struct Opened {
    pub(crate) from: SocketAddr,
    send: h2::SendStream<Bytes>,
    receive: h2::RecvStream,
    _session: Session,
}

/// CONNECTs to `target` through the server's tunnel port.
pub(crate) async fn tunnel(bed: &Hostile, tls: Arc<ClientConfig>, target: SocketAddr) -> Opened {
    let mut session = Session::open(bed, tls).await;
    let requests = &mut session.requests;
    poll_fn(|cx| requests.poll_ready(cx)).await.unwrap();
    let request = Request::builder().method(Method::CONNECT).uri(target.to_string()).body(()).unwrap();
    let (answer, send) = requests.send_request(request, false).unwrap();
    let answer = tokio::time::timeout(wait::SOON, answer).await.expect("an answer in time").unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    Opened { from: session.from, send, receive: answer.into_body(), _session: session }
}

impl Opened {
    /// Sends bytes and waits until they came back.
    pub(crate) async fn echoes(&mut self, message: &'static [u8]) {
        self.send.send_data(Bytes::from_static(message), false).unwrap();
        let mut back = Vec::new();
        while back.len() < message.len() {
            let data = tokio::time::timeout(wait::SOON, self.receive.data()).await.expect("an echo in time");
            let data = data.expect("an open tunnel").unwrap();
            self.receive.flow_control().release_capacity(data.len()).unwrap();
            back.extend_from_slice(&data);
        }
        assert_eq!(back, message);
    }

    /// Waits until the tunnel is reset: cut, not finished.
    pub(crate) async fn is_cut(&mut self) {
        let ended = tokio::time::timeout(wait::SOON, self.receive.data()).await.expect("it is cut in time");
        assert!(matches!(ended, Some(Err(_))), "it ended in order: {ended:?}");
    }
}

async fn session(bed: &Hostile, identity: &str) -> Session {
    Session::open(bed, bed.credentials.certificate(identity).client_tls().dangerous_expecting_anyone()).await
}

/// CONNECT to `target` is answered with `status`, counted as `flags` and logged with `reason`, and others are not affected.
async fn is_answered(bed: &Hostile, target: &str, status: u16, flags: &str, reason: &str) {
    let before = bed.failures(flags).await;
    let mut session = session(bed, FRIEND).await;
    assert_eq!(session.ask(Method::CONNECT, target).await.as_u16(), status);
    let line = bed.logged(session.from).await;
    assert_eq!(line["dst.hbone_addr"], target.to_ascii_lowercase().as_str(), "{line}");
    assert_eq!(line["src.identity"], FRIEND, "{line}");
    assert!(line["error"].as_str().unwrap_or_default().contains(reason), "{reason:?} is not why: {line}");
    bed.counted(flags, before).await;
    // A refused request does not end the connection.
    let application = bed.application().to_string();
    assert_eq!(session.ask(Method::CONNECT, &application).await, StatusCode::OK);
    bed.goes_on().await;
}

async fn is_not_here(bed: &Hostile, target: &str) {
    is_answered(bed, target, 400, "CONNECT", "").await;
}

async fn what_is_no_request_for_a_tunnel_is_answered_with_400(
    bed: &Hostile,
    request: Request<()>,
    reason: &str,
) {
    let before = bed.failures("CONNECT").await;
    let mut session = session(bed, FRIEND).await;
    assert_eq!(session.send(request).await, StatusCode::BAD_REQUEST);
    let line = bed.logged(session.from).await;
    assert_eq!(line["src.identity"], FRIEND, "{line}");
    assert!(line["error"].as_str().unwrap_or_default().contains(reason), "{reason:?} is not why: {line}");
    bed.counted("CONNECT", before).await;
    let application = bed.application().to_string();
    assert_eq!(session.ask(Method::CONNECT, &application).await, StatusCode::OK);
    bed.goes_on().await;
}

fn request(method: Method, target: &str) -> Request<()> {
    Request::builder().method(method).uri(target).version(http::Version::HTTP_2).body(()).unwrap()
}

async fn a_friend_is_let_in_and_an_enemy_is_answered_with_401(bed: &Hostile) {
    let application = bed.application().to_string();
    let mut friend = session(bed, FRIEND).await;
    assert_eq!(friend.ask(Method::CONNECT, &application).await, StatusCode::OK);
    let before = bed.failures("DENY").await;
    let mut enemy = session(bed, ENEMY).await;
    assert_eq!(enemy.ask(Method::CONNECT, &application).await, StatusCode::UNAUTHORIZED);
    let line = bed.logged(enemy.from).await;
    assert_eq!(line["src.identity"], ENEMY, "{line}");
    assert!(line["error"].as_str().unwrap_or_default().contains("no-enemies"), "{line}");
    bed.counted("DENY", before).await;
    bed.goes_on().await;
}

/// HTTP/2 frames (RFC 9113 §4.1) of a CONNECT and of its end right after it.
fn opened_and_reset(stream: u32, authority: &str) -> Vec<u8> {
    // RFC 7541 §6.2.2: literals without indexing, named by the static table (2 is :method, 1 is :authority).
    let literal =
        |name: u8, value: &str| [&[name, u8::try_from(value.len()).unwrap()], value.as_bytes()].concat();
    let head = [literal(2, "CONNECT"), literal(1, authority)].concat();
    let frame = |kind: u8, flags: u8, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
    };
    // HEADERS with END_HEADERS, RST_STREAM with CANCEL.
    [frame(1, 4, &head), frame(3, 0, &8u32.to_be_bytes())].concat()
}

/// Requests that are opened and reset without end: the connection is closed (CVE-2023-44487).
async fn a_peer_that_opens_and_resets_without_end_is_disconnected(bed: &Hostile) {
    let authority = bed.application().to_string();
    let (from, stream) =
        bed.approach(bed.credentials.certificate(FRIEND).client_tls().dangerous_expecting_anyone()).await;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let flood = async {
        writer.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await?;
        for stream in (1..2_000_000).step_by(2) {
            writer.write_all(&opened_and_reset(stream, &authority)).await?;
            writer.flush().await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let hung_up = async {
        let mut said = [0; 4096];
        while reader.read(&mut said).await.is_ok_and(|length| length > 0) {}
    };
    let ended = async {
        tokio::select! {
            () = hung_up => {}
            // The server reads no more.
            flooded = flood => assert!(flooded.is_err(), "a million resets were taken"),
        }
    };
    tokio::time::timeout(wait::SOON * 2, ended).await.expect("an end in time");
    let _line = bed.logged(from).await;
    bed.goes_on().await;
}

/// A head far beyond what is accepted, a thousand times: the requests fail, the memory does not grow.
async fn a_flood_of_headers_is_refused(bed: &Hostile) {
    let mut session = session(bed, FRIEND).await;
    let application = bed.application().to_string();
    let large = "x".repeat(8 * 1024);
    let flood = async {
        for _ in 0..1_000 {
            if poll_fn(|cx| session.requests.poll_ready(cx)).await.is_err() {
                return;
            }
            let mut connect =
                Request::builder().method(Method::CONNECT).uri(application.as_str()).body(()).unwrap();
            for number in 0..32 {
                let name = http::HeaderName::try_from(format!("x-{number}")).unwrap();
                connect.headers_mut().insert(name, large.parse().unwrap());
            }
            let Ok((answer, _send)) = session.requests.send_request(connect, false) else { return };
            if let Ok(answer) = answer.await {
                assert_ne!(answer.status(), StatusCode::OK, "a head of 256 KiB was accepted");
            }
        }
    };
    tokio::time::timeout(wait::SOON * 2, flood).await.expect("an end in time");
    bed.goes_on().await;
}

async fn a_peer_that_never_asks_is_no_burden(bed: &Hostile) {
    let mut quiet = Vec::new();
    for _ in 0..50 {
        quiet.push(session(bed, FRIEND).await);
    }
    tokio::time::timeout(Duration::from_secs(10), bed.goes_on()).await.expect("in time");
    drop(quiet);
}

pub(crate) fn add(trials: &mut Trials<Hostile>) {
    add_trials!(
        trials, "requests":
        a_friend_is_let_in_and_an_enemy_is_answered_with_401,
        a_peer_that_opens_and_resets_without_end_is_disconnected,
        a_flood_of_headers_is_refused,
        a_peer_that_never_asks_is_no_burden,
    );
    trials.add("requests::connect_to_another_pod_is_answered_with_400", async |bed: &Hostile| {
        is_not_here(bed, &format!("{}:{PORT}", bed.other.ip())).await;
    });
    trials.add("requests::connect_to_the_client_is_answered_with_400", async |bed: &Hostile| {
        is_not_here(bed, &format!("{}:{PORT}", bed.client.ip())).await;
    });
    trials.add("requests::connect_to_a_virtual_address_is_answered_with_400", async |bed: &Hostile| {
        is_not_here(bed, &format!("{}:80", bed.vip())).await;
    });
    trials.add("requests::connect_to_the_other_family_is_answered_with_400", async |bed: &Hostile| {
        is_not_here(bed, &format!("[{}]:{PORT}", bed.server.ipv6().unwrap())).await;
    });
    for target in ["127.0.0.1:8080", "[::1]:8080", "0.0.0.0:8080", "[::]:8080", "169.254.169.254:80"] {
        let name = format!("requests::connect_to_{target}_is_answered_with_400");
        trials.add(name, async move |bed: &Hostile| is_not_here(bed, target).await);
    }
    for host in ["localhost:8080", "other.shop.svc.cluster.local:80", "www.example.com:443", "Kubernetes:443"]
    {
        let name = format!("requests::connect_to_the_host_{host}_is_answered_with_400");
        trials.add(name, async move |bed: &Hostile| is_not_here(bed, host).await);
    }
    for port in [15001, 15006, HBONE, 15053, 15080] {
        let name = format!("requests::connect_to_the_proxys_own_port_{port}_is_answered_with_400");
        trials.add(name, async move |bed: &Hostile| {
            is_not_here(bed, &format!("{}:{port}", bed.server.ip())).await;
        });
    }
    trials.add("requests::connect_to_a_closed_port_is_answered_with_503", async |bed: &Hostile| {
        is_answered(bed, &format!("{}:9", bed.server.ip()), 503, "CONNECT", "refused").await;
    });
    for method in [Method::GET, Method::POST, Method::OPTIONS] {
        let name = format!("requests::{method}_is_answered_with_400");
        trials.add(name, async move |bed: &Hostile| {
            let target = format!("https://{}/", bed.application());
            what_is_no_request_for_a_tunnel_is_answered_with_400(
                bed,
                request(method, &target),
                "not CONNECT",
            )
            .await;
        });
    }
    for target in ["localhost", "127.1:8080", "user@localhost:8080"] {
        let name = format!("requests::connect_to_{target}_which_is_no_destination_is_answered_with_400");
        trials.add(name, async move |bed: &Hostile| {
            let request = request(Method::CONNECT, target);
            what_is_no_request_for_a_tunnel_is_answered_with_400(bed, request, "authority").await;
        });
    }
}
