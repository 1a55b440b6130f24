//! A server of HBONE at our node proxy, by hand: what a CONNECT of it looks like (HBONE contract).

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::sync::Arc;

use ambit_net::Netns;
use http::Request;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::ADDRESS;
use crate::grpc::SOON;
use crate::istiod::Istiod;
use crate::wire::resource;
use crate::zds::{Bed, add, bind_listeners};

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 8);

/// A namespace with the addresses of both pods, so that neither needs a network.
fn namespace() -> Netns {
    let netns = Netns::create().unwrap();
    let up = || {
        let ip = |arguments: &[&str]| std::process::Command::new("ip").args(arguments).status();
        let done = [
            ip(&["link", "set", "lo", "up"])?,
            ip(&["address", "add", "10.0.0.7/32", "dev", "lo"])?,
            ip(&["address", "add", "10.0.0.8/32", "dev", "lo"])?,
        ];
        Ok::<_, std::io::Error>(done.iter().all(std::process::ExitStatus::success))
    };
    assert!(netns.run_blocking(up).unwrap().unwrap());
    netns
}

/// TLS of a workload: it wants a client's certificate of the mesh.
fn tls(istiod: &Istiod, account: &str) -> TlsAcceptor {
    let (chain, key) = istiod.workload_certificate(account);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(istiod.root_der())).unwrap();
    let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
    let mut config =
        ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

/// Dials by the proxy's SOCKS5 listener inside of the namespace.
async fn dial(netns: &Netns, to: SocketAddr) -> TcpStream {
    let connect = || std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, 15080));
    let stream = netns.run_blocking(connect).unwrap().unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut stream = TcpStream::from_std(stream).unwrap();
    // RFC 1928 §3 and §4: no authentication; CONNECT to an IPv4 address.
    stream.write_all(&[5, 1, 0]).await.unwrap();
    let mut chosen = [0; 2];
    stream.read_exact(&mut chosen).await.unwrap();
    assert_eq!(chosen, [5, 0]);
    let SocketAddr::V4(v4) = to else { panic!("{to}") };
    let port = v4.port().to_be_bytes();
    stream.write_all(&[&[5, 1, 0, 1][..], &v4.ip().octets(), &port].concat()).await.unwrap();
    stream
}

async fn succeeded(stream: &mut TcpStream) -> bool {
    let mut reply = [0; 10];
    tokio::time::timeout(SOON, stream.read_exact(&mut reply)).await.expect("a reply").unwrap();
    reply[1] == 0
}

/// The connection as TLS sees it.
fn assert_tls(stream: &TlsStream<TcpStream>) {
    let connection = stream.get_ref().1;
    assert_eq!(connection.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(connection.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(connection.server_name(), None, "no SNI");
    let leaf = connection.peer_certificates().unwrap()[0].clone();
    let text = String::from_utf8_lossy(&leaf).into_owned();
    assert!(text.contains("spiffe://cluster.local/ns/shop/sa/web"), "the client's own identity");
}

fn assert_head(request: &Request<h2::RecvStream>) {
    assert_eq!(request.method(), http::Method::CONNECT);
    assert!(request.extensions().get::<h2::ext::Protocol>().is_none(), "no extended CONNECT");
    let uri = request.uri();
    assert_eq!((uri.scheme_str(), uri.path_and_query()), (None, None), "neither :scheme nor :path");
    assert_eq!(uri.authority().unwrap().as_str(), "10.0.0.8:8080", "the original destination");
    let header = |name: &str| request.headers()[name].to_str().unwrap().to_owned();
    let baggage = header("baggage");
    let items: Vec<(&str, &str)> = baggage.split(',').filter_map(|item| item.split_once('=')).collect();
    for expected in [
        ("k8s.cluster.name", "Kubernetes"),
        ("k8s.namespace.name", "shop"),
        ("k8s.deployment.name", "web"),
        ("service.name", "web"),
        ("service.version", "latest"),
    ] {
        assert!(items.contains(&expected), "{expected:?} is not in {baggage}");
    }
    let forwarded = header("forwarded");
    let client = forwarded.split(';').next().unwrap();
    let client = client.strip_prefix("for=\"").and_then(|rest| rest.strip_suffix('"')).unwrap();
    client.parse::<SocketAddr>().unwrap_or_else(|error| panic!("{error}: {forwarded}"));
    // W3C Trace Context §3.2.2: version, trace id, parent id, flags.
    let traceparent = header("traceparent");
    let parts: Vec<usize> = traceparent.split('-').map(str::len).collect();
    assert_eq!(parts, [2, 32, 16, 2], "{traceparent}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connect_bears_what_peers_read() {
    let far = json!({ "workload": {
        "uid": "Kubernetes//Pod/shop/peer", "name": "peer", "namespace": "shop", "service_account": "peer",
        "addresses": [crate::wire::hex(&SERVER.octets())], "tunnel_protocol": "HBONE", "node": "node-2",
        "cluster_id": "Kubernetes", "trust_domain": "cluster.local",
    } });
    let far = resource("Address", ADDRESS, "Kubernetes//Pod/shop/peer", "1", &far);
    let mut bed = Bed::with(&[("ZTUNNEL_SOCKS5", "true")], vec![far]).await;
    let netns = namespace();
    // Our server listens beside the proxy, which has its listeners at the client's address only.
    let own = bind_listeners(&netns, CLIENT);
    let listener = netns.run_blocking(|| TcpListener::bind((SERVER, 15008))).unwrap().unwrap();
    let mut request = add("u1", "web");
    request["add"]["listeners"] = own.iter().map(|(_, named)| named.clone()).collect();
    let descriptors = std::iter::once(netns.as_fd()).chain(own.iter().map(|(socket, _)| socket.as_fd()));
    let proxy = bed.agent.accept().await;
    assert_eq!(proxy.request_with(&request, descriptors.collect()).await, "");
    bed.istiod.sign().await;
    proxy.snapshot_sent().await;
    bed.ztunnel.until("the certificate", |dump| dump["certificates"][0]["state"] == "Available").await;

    let mut application = dial(&netns, (SERVER, 8080).into()).await;
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    let (socket, _) = tokio::time::timeout(SOON, listener.accept()).await.expect("the proxy dials").unwrap();
    let stream = tls(&bed.istiod, "peer").accept(socket).await.unwrap();
    assert_tls(&stream);
    let mut connection = h2::server::handshake(stream).await.unwrap();
    let (request, mut respond) = connection.accept().await.unwrap().unwrap();
    assert_head(&request);
    let mut answer = respond.send_response(http::Response::new(()), false).unwrap();
    let driver = tokio::spawn(async move {
        let next = connection.accept().await;
        (connection, next)
    });
    assert!(succeeded(&mut application).await, "200: the tunnel is open");
    answer.send_data(bytes::Bytes::from_static(b"hello"), false).unwrap();
    let mut heard = [0; 5];
    tokio::time::timeout(SOON, application.read_exact(&mut heard)).await.expect("bytes").unwrap();
    assert_eq!(&heard, b"hello");

    // Everything but 200 is a failure.
    let mut refused = dial(&netns, (SERVER, 8080).into()).await;
    let (mut connection, next) = tokio::time::timeout(SOON, driver).await.expect("another CONNECT").unwrap();
    let (_, mut respond) = next.unwrap().unwrap();
    respond.send_response(http::Response::builder().status(401).body(()).unwrap(), true).unwrap();
    let driver = tokio::spawn(async move { while connection.accept().await.is_some() {} });
    assert!(!succeeded(&mut refused).await);
    driver.abort();
}
