//! Subscribers that count what they get without keeping it: one TLS connection and one delta stream each, every answer acknowledged.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ambit_api::core::Node;
use ambit_api::discovery::DeltaDiscoveryRequest;
use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_identity::ControlPlaneConfig;
use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;
use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use tokio::net::TcpSocket;
use tokio::sync::Notify;
use tokio_rustls::TlsConnector;

const PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// As `ambit_identity::ControlPlane` has it.
const WINDOW: u32 = 1 << 20;

/// What all subscribers see together.
#[derive(Debug, Default)]
pub(crate) struct Crowd {
    /// Subscribers that have the whole snapshot.
    complete: AtomicUsize,
    /// What a change brings, and how many subscribers have seen it.
    wanted: Mutex<Wanted>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Wanted {
    name: String,
    seen: usize,
    last: Option<Instant>,
}

impl Crowd {
    /// Waits until so many have the whole snapshot.
    pub(crate) async fn complete(&self, subscribers: usize) {
        while self.complete.load(Ordering::Acquire) < subscribers {
            self.changed.notified().await;
        }
    }

    /// Waits for a resource of this name, there or gone, from now on.
    pub(crate) fn expect(&self, name: &str) {
        *self.wanted.lock() = Wanted { name: name.to_owned(), ..Wanted::default() };
    }

    /// When the last of so many subscribers saw what is expected.
    pub(crate) async fn seen(&self, subscribers: usize) -> Instant {
        loop {
            if let Wanted { seen, last: Some(last), .. } = &*self.wanted.lock()
                && *seen >= subscribers
            {
                return *last;
            }
            self.changed.notified().await;
        }
    }

    fn handle(&self, answer: &Answer<'_>) {
        let mut wanted = self.wanted.lock();
        if !wanted.name.is_empty() && answer.name == wanted.name.as_bytes() {
            wanted.seen += 1;
            wanted.last = Some(Instant::now());
            self.changed.notify_one();
        }
    }
}

/// How to reach the control plane.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) tls: TlsConnector,
    /// Resources that the snapshot holds.
    pub(crate) resources: usize,
}

/// Who subscribes: a node proxy with an address of its own, since the port's limits count by address.
pub(crate) struct Caller {
    pub(crate) address: Ipv4Addr,
    pub(crate) node: String,
    pub(crate) token: String,
}

/// Subscribes and reads until the stream ends, which is an error.
pub(crate) async fn subscribe(target: Target, caller: Caller, crowd: Arc<Crowd>) -> Result<()> {
    let Caller { address, node, token } = caller;
    let socket = TcpSocket::new_v4()?;
    socket.bind((address, 0).into()).with_context(|| format!("binding {address}"))?;
    let socket = socket.connect(target.address).await.context("connecting")?;
    socket.set_nodelay(true)?;
    let name = rustls_pki_types::ServerName::try_from(ControlPlaneConfig::DEFAULT_SERVER_NAME)?;
    let stream = target.tls.connect(name, socket).await.context("shaking hands")?;
    let (client, connection) = h2::client::Builder::new()
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .handshake::<_, Bytes>(stream)
        .await?;
    let mut client = client.ready().await?;
    let driver = tokio::spawn(connection);
    let request = http::Request::post(format!("https://{}{PATH}", ControlPlaneConfig::DEFAULT_SERVER_NAME))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("clusterid", "Kubernetes")
        .header("authorization", format!("Bearer {token}"))
        .body(())?;
    let (response, mut requests) = client.send_request(request, false)?;
    for type_url in [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL] {
        let node = Some(Node { id: format!("ztunnel~10.0.0.1~{node}"), ..Node::default() });
        let ask = DeltaDiscoveryRequest { type_url: type_url.to_owned(), node, ..Default::default() };
        requests.send_data(frame(&ask), false)?;
    }
    let response = response.await.context("waiting for the answer")?;
    ensure!(response.status() == http::StatusCode::OK, "answered {}", response.status());
    ensure!(!response.headers().contains_key("grpc-status"), "refused: {:?}", response.headers());
    read(response.into_body(), requests, target.resources, &crowd).await?;
    driver.await??;
    bail!("the stream ended")
}

async fn read(
    mut body: h2::RecvStream,
    mut requests: h2::SendStream<Bytes>,
    resources: usize,
    crowd: &Crowd,
) -> Result<()> {
    let (mut buffer, mut received) = (BytesMut::new(), 0);
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        buffer.extend_from_slice(&chunk);
        while let Some(message) = next_message(&mut buffer) {
            let answer = Answer::read(&message)?;
            let ack = DeltaDiscoveryRequest {
                type_url: String::from_utf8_lossy(answer.type_url).into_owned(),
                response_nonce: String::from_utf8_lossy(answer.nonce).into_owned(),
                ..DeltaDiscoveryRequest::default()
            };
            requests.send_data(frame(&ack), false)?;
            let before = received;
            received += answer.resources;
            if before < resources && received >= resources {
                crowd.complete.fetch_add(1, Ordering::AcqRel);
                crowd.changed.notify_one();
            }
            if before >= resources {
                crowd.handle(&answer);
            }
        }
    }
    Ok(())
}

fn frame(message: &impl Message) -> Bytes {
    let body = message.encode_to_vec();
    let mut frame = BytesMut::with_capacity(5 + body.len());
    frame.extend_from_slice(&[0]);
    frame.extend_from_slice(&(body.len() as u32).to_be_bytes());
    frame.extend_from_slice(&body);
    frame.freeze()
}

fn next_message(buffer: &mut BytesMut) -> Option<BytesMut> {
    let length = u32::from_be_bytes(buffer.get(1..5)?.try_into().ok()?) as usize;
    if buffer.len() < 5 + length {
        return None;
    }
    buffer.advance(5);
    Some(buffer.split_to(length))
}

/// What a subscriber looks at of a `DeltaDiscoveryResponse`. Decoding the whole would cost more than serving it.
#[derive(Debug, Default)]
struct Answer<'a> {
    resources: usize,
    type_url: &'a [u8],
    nonce: &'a [u8],
    /// The name of the last resource, sent or removed.
    name: &'a [u8],
}

impl<'a> Answer<'a> {
    fn read(message: &'a [u8]) -> Result<Self> {
        let mut answer = Self::default();
        fields(message, |tag, value| {
            match tag {
                2 => {
                    answer.resources += 1;
                    fields(value, |tag, value| {
                        if tag == 3 {
                            answer.name = value;
                        }
                        Ok(())
                    })?;
                }
                4 => answer.type_url = value,
                5 => answer.nonce = value,
                6 => answer.name = value,
                _ => {}
            }
            Ok(())
        })?;
        Ok(answer)
    }
}

/// Calls back for each field of a message that has a length: texts, bytes, messages.
fn fields<'a>(mut message: &'a [u8], mut handle: impl FnMut(u32, &'a [u8]) -> Result<()>) -> Result<()> {
    while !message.is_empty() {
        let (tag, wire_type) = decode_key(&mut message)?;
        if wire_type != WireType::LengthDelimited {
            skip_field(wire_type, tag, &mut message, DecodeContext::default())?;
            continue;
        }
        let length = usize::try_from(decode_varint(&mut message)?)?;
        let (value, rest) = message.split_at_checked(length).context("a field is longer than its message")?;
        message = rest;
        handle(tag, value)?;
    }
    Ok(())
}
