//! Opening a tunnel, and every way in which it is refused.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ambit_hbone::{
    Baggage, ConnectRequest, Fault, Forwarded, OpenError, PoolSettings, ServeError, ServerSettings,
    TraceParent, WorkloadKind,
};
use ambit_identity::{TlsSettings, unnamed_server};
use http::StatusCode;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::*;

#[tokio::test]
async fn a_tunnel_carries_bytes_both_ways_and_its_headers_arrive() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let request = ConnectRequest {
        baggage: Some(Baggage {
            namespace: "default".into(),
            workload: Some((WorkloadKind::Deployment, "client".into())),
            ..Baggage::default()
        }),
        forwarded: Some(Forwarded { client: "10.1.2.3:4567".parse().unwrap(), host: Some("a.b".into()) }),
        traceparent: TraceParent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ..ConnectRequest::new(echo().await)
    };
    let tunnel = client.request(node.address, &request).await.unwrap();
    assert_eq!(tunnel.peer(), &World::id("server"));
    let mut stream = tunnel.into_stream();
    stream.write_all(b"hello").await.unwrap();
    let mut answer = [0; 5];
    soon("the answer", stream.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"hello");
    stream.shutdown().await.unwrap();
    assert_eq!(soon("the end", stream.read(&mut answer)).await.unwrap(), 0);
    assert_eq!(*node.seen.requests.lock(), [request]);
}

#[tokio::test]
async fn an_application_that_refuses_is_503_and_policy_is_401() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = client.open(node.address, closed).await.unwrap_err();
    assert!(matches!(error, OpenError::Refused { status: StatusCode::SERVICE_UNAVAILABLE, .. }), "{error}");
    assert!(error.another_endpoint_may_help());
    let error = client.open(node.address, "127.0.0.1:1".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, OpenError::Refused { status: StatusCode::UNAUTHORIZED, .. }), "{error}");
    assert_eq!(error.fault(), Fault::Policy);
    assert!(!error.another_endpoint_may_help());
    // Refusals are answers: the connection stays.
    assert_eq!(client.dials(), 1);
}

#[tokio::test]
async fn a_server_that_is_somebody_else_gets_no_request() {
    let world = World::new();
    let node = Node::start(&world, "impostor", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let error = client.open(node.address, echo().await).await.unwrap_err();
    assert!(matches!(error, OpenError::Identity { .. }), "{error}");
    assert_eq!(error.fault(), Fault::Identity);
    until("the connection's end", || node.seen.connections_ended() == 1).await;
    assert!(node.seen.requests.lock().is_empty());
    assert_eq!(client.pool.connections(), 0);
}

#[tokio::test]
async fn clients_without_a_trusted_certificate_are_refused() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let stranger = Client::new(&World::new(), "client", PoolSettings::default());
    // The stranger's own check of the server comes first; with the right root it is the server's turn.
    let error = stranger.open(node.address, echo().await).await.unwrap_err();
    assert_eq!(error.fault(), Fault::Identity, "{error}");

    // No certificate at all: TLS 1.3 lets the client finish first, so the refusal shows on reading.
    let config = rustls::ClientConfig::builder_with_provider(TlsSettings::default().provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(BelievesAll))
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let socket = TcpStream::connect(node.address).await.unwrap();
    let refused = async {
        let mut stream = connector.connect(unnamed_server(), socket).await?;
        stream.read_u8().await
    };
    soon("the refusal", refused).await.unwrap_err();
    until("both ends", || node.seen.connections_ended() == 2).await;
    assert!(node.seen.ended.lock().iter().all(|end| matches!(end, Err(ServeError::Tls(_)))));
}

#[derive(Debug)]
struct BelievesAll;

impl rustls::client::danger::ServerCertVerifier for BelievesAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

#[tokio::test]
async fn a_dial_that_fails_says_where_to() {
    let world = World::new();
    let client = Client::new(&world, "client", PoolSettings::default());
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = client.open(nobody, nobody).await.unwrap_err();
    assert!(matches!(error, OpenError::Dial { address, .. } if address == nobody), "{error}");
    assert_eq!(client.counters.failed_connections.get(), 1);
}

#[tokio::test]
async fn a_peer_that_stops_in_mid_handshake_is_given_up_in_time() {
    let world = World::new();
    let client = Client::new(&world, "client", quick());
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let start = Instant::now();
    let error = client.open(address, address).await.unwrap_err();
    assert!(matches!(error, OpenError::HandshakeTimeout { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5));

    // The other way round, while somebody else is served.
    let node = Node::start(&world, "server", quick_server()).await;
    let mut slow = TcpStream::connect(node.address).await.unwrap();
    slow.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await.unwrap();
    client.open(node.address, echo().await).await.unwrap();
    until("the slow peer's end", || {
        node.seen.ended.lock().iter().any(|end| matches!(end, Err(ServeError::HandshakeTimeout(_))))
    })
    .await;
    let mut rest = Vec::new();
    let closed = soon("the close", slow.read_to_end(&mut rest)).await;
    assert!(closed.is_ok() || closed.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_client_that_sends_nothing_is_given_up_early() {
    let world = World::new();
    let settings =
        ServerSettings { first_byte_timeout: Duration::from_millis(200), ..ServerSettings::default() };
    let node = Node::start(&world, "server", settings).await;
    let mut silent = TcpStream::connect(node.address).await.unwrap();
    assert_eq!(soon("the close", silent.read(&mut [0])).await.unwrap(), 0);
    until("the server's error", || {
        node.seen.ended.lock().iter().any(|end| matches!(end, Err(ServeError::NoFirstByte(_))))
    })
    .await;
}

#[tokio::test]
async fn an_unanswered_connect_times_out_alone() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", quick());
    let error = client.open(node.address, "127.0.0.1:2".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, OpenError::ConnectTimeout { .. }), "{error}");
    until("the server's notice", || node.seen.given_up.load(Ordering::SeqCst) == 1).await;
    client.open(node.address, echo().await).await.unwrap();
    assert_eq!(client.dials(), 1);
}

#[tokio::test]
async fn a_server_gives_an_answer_even_if_the_application_never_does() {
    let world = World::new();
    let node = Node::start(&world, "server", quick_server()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let error = client.open(node.address, "127.0.0.1:2".parse().unwrap()).await.unwrap_err();
    assert!(matches!(error, OpenError::Refused { status: StatusCode::SERVICE_UNAVAILABLE, .. }), "{error}");
}

#[tokio::test]
async fn an_identity_that_is_not_expected_any_more_is_not_reused() {
    let world = World::new();
    let node = Node::start(&world, "server", ServerSettings::default()).await;
    let client = Client::new(&world, "client", PoolSettings::default());
    let target = echo().await;
    client.open(node.address, target).await.unwrap();
    let key = client.key(node.address);
    for expected in [vec![World::id("other")], vec![]] {
        let opened = client.request_as(&key, &expected, &ConnectRequest::new(target)).await;
        assert!(matches!(opened, Err(OpenError::Identity { .. })));
    }
}
