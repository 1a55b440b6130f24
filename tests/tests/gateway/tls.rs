//! Listeners for TLS and TCP: certificates by name, requests on the wrong connection, TLS that is passed on.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use ambit_local::PodOptions;
use ambit_tests::apps::{self, App};
use ambit_tests::beds::Trials;
use ambit_tests::http::{self, Client, Response};
use ambit_tests::wait::{self, SOON};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

use crate::bed::Gateways;

pub(crate) fn add(trials: &mut Trials<Gateways>) {
    trials.add("HTTPS listeners show the certificate of the name", async |bed| https(bed).await);
    trials.add("a certificate that changes cuts no connection", async |bed| rotated(bed).await);
    trials.add("TLS is passed on to who has the key", async |bed| passed_on(bed).await);
    trials.add("a TCP listener passes connections on", async |bed| tcp(bed).await);
}

/// A certificate for a name that signs itself.
pub(crate) struct Certificate {
    pub(crate) pem: String,
    key: String,
    der: CertificateDer<'static>,
    key_der: Vec<u8>,
}

impl Certificate {
    pub(crate) fn new(names: &[&str]) -> Certificate {
        let key = rcgen::KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let certificate = rcgen::CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        Certificate {
            pem: certificate.pem(),
            key: key.serialize_pem(),
            der: certificate.der().clone(),
            key_der: key.serialize_der(),
        }
    }

    pub(crate) fn secret(&self, namespace: &str, name: &str) -> String {
        let indented = |text: &str| text.replace('\n', "\n    ");
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: {name}, namespace: {namespace}}}\ntype: kubernetes.io/tls\n\
             stringData:\n  tls.crt: |\n    {}\n  tls.key: |\n    {}\n",
            indented(&self.pem),
            indented(&self.key)
        )
    }
}

/// A connection from outside with TLS that believes these certificates.
pub(crate) async fn dial(
    bed: &Gateways,
    to: SocketAddr,
    name: &str,
    trusted: &[&Certificate],
    alpn: &[&[u8]],
) -> io::Result<TlsStream<TcpStream>> {
    dial_as(bed, to, name, trusted, alpn, None).await
}

/// The same with a certificate of the client's own.
async fn dial_as(
    bed: &Gateways,
    to: SocketAddr,
    name: &str,
    trusted: &[&Certificate],
    alpn: &[&[u8]],
    own: Option<&Certificate>,
) -> io::Result<TlsStream<TcpStream>> {
    let config = client_config(trusted, alpn, own)?;
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    TlsConnector::from(Arc::new(config)).connect(name, bed.outside.connect(to).await?).await
}

/// The TLS of a client that believes these certificates.
pub(crate) fn client_config(
    trusted: &[&Certificate],
    alpn: &[&[u8]],
    own: Option<&Certificate>,
) -> io::Result<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in trusted {
        roots.add(certificate.der.clone()).map_err(io::Error::other)?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(io::Error::other)?.with_root_certificates(roots);
    let mut config = match own {
        None => config.with_no_client_auth(),
        Some(own) => {
            let key = PrivateKeyDer::try_from(own.key_der.clone()).map_err(io::Error::other)?;
            config.with_client_auth_cert(vec![own.der.clone()], key).map_err(io::Error::other)?
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

pub(crate) async fn get(
    bed: &Gateways,
    to: SocketAddr,
    names: (&str, &str),
    trusted: &[&Certificate],
) -> io::Result<Response> {
    get_as(bed, to, names, trusted, None).await
}

pub(crate) async fn get_as(
    bed: &Gateways,
    to: SocketAddr,
    (name, host): (&str, &str),
    trusted: &[&Certificate],
    own: Option<&Certificate>,
) -> io::Result<Response> {
    let stream = dial_as(bed, to, name, trusted, &[b"http/1.1"], own).await?;
    Client::over(stream).send(format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n").as_bytes()).await
}

async fn https(bed: &Gateways) {
    let (one, wild) = (Certificate::new(&["one.tls.example"]), Certificate::new(&["*.tls.example"]));
    bed.service("tls-one").await;
    bed.service("tls-wild").await;
    bed.apply(&format!("{}---\n{}", one.secret("edge", "one"), wild.secret("other", "wild"))).await;
    let listeners = "[{name: one, port: 443, protocol: HTTPS, hostname: one.tls.example, tls: {certificateRefs: [{name: one}]}}, \
         {name: wild, port: 443, protocol: HTTPS, hostname: '*.tls.example', \
          tls: {certificateRefs: [{name: wild, namespace: other}]}}]";
    let to = SocketAddr::new(bed.gateway("tls-gw", listeners).await, 443);
    bed.route("tls-one", "[{name: tls-gw, sectionName: one}]", "[]").await;
    bed.route("tls-wild", "[{name: tls-gw, sectionName: wild}]", "[]").await;
    let both = [&one, &wild];
    wait::until("the certificate is shown", SOON, || async {
        let name = "one.tls.example";
        get(bed, to, (name, name), &[&one]).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    let answer = get(bed, to, ("one.tls.example", "one.tls.example"), &[&one]).await.unwrap();
    assert_eq!((answer.server(), answer.sent("x-forwarded-proto")), ("tls-one", Some("https")));
    // The other Secret is in another namespace, and nothing grants the reference yet.
    assert!(get(bed, to, ("two.tls.example", "two.tls.example"), &both).await.is_err());
    bed.apply(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {name: wild, namespace: other}\n\
         spec: {from: [{group: gateway.networking.k8s.io, kind: Gateway, namespace: edge}], \
         to: [{group: '', kind: Secret, name: wild}]}\n",
    )
    .await;
    wait::until("the granted certificate is shown", SOON, || async {
        let name = "two.tls.example";
        get(bed, to, (name, name), &[&wild]).await.is_ok_and(|answer| answer.server() == "tls-wild")
    })
    .await;
    // A request for the host of another listener than that of its connection is misdirected (RFC 9110 §15.5.20).
    let answer = get(bed, to, ("two.tls.example", "one.tls.example"), &both).await.unwrap();
    assert_eq!(answer.status, 421);
    let answer = get(bed, to, ("two.tls.example", "elsewhere.example"), &both).await.unwrap();
    assert_eq!(answer.status, 404);
    // No listener is for this name, and none speaks without TLS.
    assert!(dial(bed, to, "elsewhere.example", &both, &[]).await.is_err());
    assert!(http::get(&bed.outside, to, "/", "").await.is_err());
    let stream = dial(bed, to, "one.tls.example", &both, &[b"h2", b"http/1.1"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    // Nobody finds the key where the gateway shows itself.
    let line = one.key.lines().nth(1).unwrap();
    assert!(!bed.logs("tls-gw").iter().any(|shown| shown.contains(line)));
}

async fn rotated(bed: &Gateways) {
    let (old, new) = (Certificate::new(&["rot.example"]), Certificate::new(&["rot.example"]));
    bed.service("rotated").await;
    bed.apply(&old.secret("edge", "rotated")).await;
    let listeners = "[{name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: rotated}]}}]";
    let to = SocketAddr::new(bed.gateway("rotated-gw", listeners).await, 443);
    bed.route("rotated", "[{name: rotated-gw}]", "[]").await;
    let name = ("rot.example", "rot.example");
    wait::until("the old certificate is shown", SOON, || async {
        get(bed, to, name, &[&old]).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    let stream = dial(bed, to, name.0, &[&old], &[]).await.unwrap();
    let mut kept = Client::over(stream);
    let request = b"GET / HTTP/1.1\r\nhost: rot.example\r\n\r\n";
    assert_eq!(kept.send(request).await.unwrap().status, 200);
    bed.apply(&new.secret("edge", "rotated")).await;
    wait::until("the new certificate is shown", SOON, || async {
        get(bed, to, name, &[&new]).await.is_ok_and(|answer| answer.status == 200)
    })
    .await;
    assert!(get(bed, to, name, &[&old]).await.is_err());
    assert_eq!(kept.send(request).await.unwrap().status, 200);
}

const SPOKEN: u16 = 9090;

async fn passed_on(bed: &Gateways) {
    let certificate = Certificate::new(&["own.passed.example"]);
    let options = PodOptions::new("edge", "passed").service_account("passed").label("app", "passed").node(1);
    let pod = bed.cluster.pod(options).await.unwrap();
    let listener = pod.listen(SocketAddr::new(pod.ip().into(), SPOKEN)).await.unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = PrivateKeyDer::try_from(certificate.key_der.clone()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.unwrap().with_no_client_auth().with_single_cert(vec![certificate.der.clone()], key);
    let acceptor = TlsAcceptor::from(Arc::new(config.unwrap()));
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut stream = acceptor.accept(stream).await?;
                let (mut reader, mut writer) = tokio::io::split(&mut stream);
                tokio::io::copy(&mut reader, &mut writer).await?;
                writer.shutdown().await
            });
        }
    });
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: passed, namespace: edge}}\n\
         spec: {{selector: {{app: passed}}, ports: [{{name: tls, port: 443, targetPort: {SPOKEN}}}]}}\n---\n\
         apiVersion: gateway.networking.k8s.io/v1\nkind: TLSRoute\nmetadata: {{name: passed, namespace: edge}}\n\
         spec: {{hostnames: [own.passed.example], parentRefs: [{{name: passed-gw}}], \
         rules: [{{backendRefs: [{{name: passed, port: 443}}]}}]}}\n"
    ))
    .await;
    let listeners =
        "[{name: tls, port: 443, protocol: TLS, hostname: '*.passed.example', tls: {mode: Passthrough}}]";
    let to = SocketAddr::new(bed.gateway("passed-gw", listeners).await, 443);
    wait::until("the server's own certificate is shown", SOON, || async {
        dial(bed, to, "own.passed.example", &[&certificate], &[]).await.is_ok()
    })
    .await;
    let mut stream = dial(bed, to, "own.passed.example", &[&certificate], &[]).await.unwrap();
    assert_eq!(apps::exchange(&mut stream, b"hello").await.unwrap(), b"hello");
    // No route is for this name.
    assert!(dial(bed, to, "none.passed.example", &[&certificate], &[]).await.is_err());
    server.abort();
}

async fn tcp(bed: &Gateways) {
    let options = PodOptions::new("edge", "plain").service_account("plain").label("app", "plain").node(1);
    let pod = bed.cluster.pod(options).await.unwrap();
    let address = SocketAddr::new(pod.ip().into(), SPOKEN);
    let _running = apps::run(&pod, address, App::ServerFirst("plain".to_owned())).await.unwrap();
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: plain, namespace: edge}}\n\
         spec: {{selector: {{app: plain}}, ports: [{{name: tcp, port: 90, targetPort: {SPOKEN}}}]}}\n---\n\
         apiVersion: gateway.networking.k8s.io/v1\nkind: TCPRoute\nmetadata: {{name: plain, namespace: edge}}\n\
         spec: {{parentRefs: [{{name: plain-gw, sectionName: routed}}], \
         rules: [{{backendRefs: [{{name: plain, port: 90}}]}}]}}\n"
    ))
    .await;
    let listeners = "[{name: routed, port: 5432, protocol: TCP}, {name: alone, port: 5433, protocol: TCP}]";
    let at = bed.gateway("plain-gw", listeners).await;
    let greeted = |port: u16| async move {
        let mut stream = bed.outside.connect(SocketAddr::new(at, port)).await?;
        apps::exchange(&mut stream, b"").await
    };
    wait::until("the server greets", SOON, || async {
        greeted(5432).await.is_ok_and(|bytes| bytes.starts_with(b"220 plain"))
    })
    .await;
    // Without a route a connection is closed.
    assert!(greeted(5433).await.is_ok_and(|bytes| bytes.is_empty()));
}
