//! gRPC over HTTP/2 and TLS, as far as two methods need it, without the stack that the programs are built with.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::wire::{decode, encode};

/// By then whatever a test waits for has happened.
pub(crate) const SOON: Duration = Duration::from_secs(20);
pub(crate) const DISCOVERY: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
pub(crate) const CERTIFICATES: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// Both directions of one call.
pub(crate) struct Call {
    pub(crate) headers: HeaderMap,
    send: SendStream<Bytes>,
    receive: RecvStream,
    buffer: BytesMut,
    /// Received but not of the type that a test waited for.
    waiting: VecDeque<Value>,
}

impl Call {
    fn new(headers: HeaderMap, send: SendStream<Bytes>, receive: RecvStream) -> Self {
        Self { headers, send, receive, buffer: BytesMut::new(), waiting: VecDeque::new() }
    }

    /// Sends one message.
    pub(crate) fn send(&mut self, message: &str, value: &Value) {
        self.send.send_data(framed(message, value), false).unwrap();
    }

    /// Ends our direction with success, as a server.
    pub(crate) fn finish(mut self) {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        self.send.send_trailers(trailers).unwrap();
    }

    /// Ends the call with a status, as a server.
    pub(crate) fn fail(mut self, status: &str) {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", status.parse().unwrap());
        self.send.send_trailers(trailers).unwrap();
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) async fn receive(&mut self, message: &str) -> Option<Value> {
        if let Some(waiting) = self.waiting.pop_front() {
            return Some(waiting);
        }
        loop {
            if let Some(head) = self.buffer.first_chunk::<5>() {
                let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                assert_eq!(head[0], 0, "not compressed");
                if self.buffer.len() >= 5 + length {
                    self.buffer.advance(5);
                    return Some(decode(message, &self.buffer.split_to(length)));
                }
            }
            let data =
                tokio::time::timeout(SOON, self.receive.data()).await.expect("a message in time")?.ok()?;
            self.receive.flow_control().release_capacity(data.len()).unwrap();
            self.buffer.extend_from_slice(&data);
        }
    }

    /// The next message for which `wanted` holds; others wait for their turn.
    pub(crate) async fn until(&mut self, message: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let mut passed = VecDeque::new();
        let found = loop {
            let received = self.receive(message).await.expect("the stream goes on");
            if wanted(&received) {
                break received;
            }
            passed.push_back(received);
        };
        passed.append(&mut self.waiting);
        self.waiting = passed;
        found
    }

    /// The status of a call that ended.
    pub(crate) async fn status(&mut self) -> String {
        let trailers = tokio::time::timeout(SOON, self.receive.trailers()).await.unwrap().ok().flatten();
        let status = trailers.as_ref().or(Some(&self.headers)).and_then(|it| it.get("grpc-status"));
        status.map_or_else(String::new, |status| status.to_str().unwrap().to_owned())
    }
}

fn framed(message: &str, value: &Value) -> Bytes {
    let body = encode(message, value);
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[0][..], &length, &body].concat().into()
}

/// Opens a call as a client whose roots are in a file. A call with a message sends that one only.
pub(crate) async fn call(
    address: SocketAddr,
    (roots, name): (&Path, &str),
    method: &str,
    headers: &[(&str, &str)],
    message: Option<(&str, &Value)>,
) -> Call {
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(roots).unwrap() {
        store.add(root.unwrap()).unwrap();
    }
    let mut config = ClientConfig::builder().with_root_certificates(store).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let server = ServerName::try_from(name.to_owned()).unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(server, stream).await.unwrap();
    let (client, connection) = h2::client::Builder::new()
        .initial_window_size(16 << 20)
        .initial_connection_window_size(16 << 20)
        .handshake(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    let mut request = Request::post(format!("https://{name}{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (header, value) in headers {
        request = request.header(*header, *value);
    }
    let mut client = client.ready().await.unwrap();
    let (response, mut send) = client.send_request(request.body(()).unwrap(), false).unwrap();
    if let Some((kind, value)) = message {
        send.send_data(framed(kind, value), true).unwrap();
    }
    let (head, receive) = tokio::time::timeout(SOON, response).await.unwrap().unwrap().into_parts();
    assert_eq!(head.status, 200);
    Call::new(head.headers, send, receive)
}

/// Accepts calls as a server with a certificate of its own root.
pub(crate) struct Server {
    listener: TcpListener,
    tls: TlsAcceptor,
    calls: VecDeque<(String, Call)>,
    incoming: tokio::sync::mpsc::UnboundedReceiver<(String, Call)>,
    arrived: tokio::sync::mpsc::UnboundedSender<(String, Call)>,
}

impl Server {
    pub(crate) async fn start(chain: Vec<CertificateDer<'static>>, key: Vec<u8>) -> Self {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let mut config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (arrived, incoming) = tokio::sync::mpsc::unbounded_channel();
        Self { listener, tls: TlsAcceptor::from(Arc::new(config)), calls: VecDeque::new(), incoming, arrived }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// The next call of a method.
    pub(crate) async fn accept(&mut self, method: &str) -> Call {
        let wanted = async {
            loop {
                if let Some(at) = self.calls.iter().position(|(path, _)| path == method) {
                    return self.calls.remove(at).unwrap().1;
                }
                tokio::select! {
                    call = self.incoming.recv() => self.calls.push_back(call.unwrap()),
                    accepted = self.listener.accept() => {
                        let (stream, _) = accepted.unwrap();
                        tokio::spawn(serve(self.tls.clone(), stream, self.arrived.clone()));
                    }
                }
            }
        };
        tokio::time::timeout(SOON, wanted).await.unwrap_or_else(|_| panic!("nobody calls {method}"))
    }
}

async fn serve(
    tls: TlsAcceptor,
    stream: TcpStream,
    arrived: tokio::sync::mpsc::UnboundedSender<(String, Call)>,
) {
    let Ok(stream) = tls.accept(stream).await else { return };
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let response = Response::builder().header("content-type", "application/grpc").body(()).unwrap();
        let Ok(send) = respond.send_response(response, false) else { continue };
        let (head, receive) = request.into_parts();
        arrived.send((head.uri.path().to_owned(), Call::new(head.headers, send, receive))).ok();
    }
}
