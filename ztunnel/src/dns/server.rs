//! Serves a pod's DNS sockets: answers at once what the directory knows, hands on the rest.
//!
//! One loop a UDP socket and one task a TCP connection; a question that is with a resolver is a task of
//! its own, and there are only so many. Dropping a serve future ends its questions; stopping it does not.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ambit_runtime::shares::Taken;
use hickory_proto::op::ResponseCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::forward::{Forwarder, Transport, framed};
use super::message::{MAX_UDP, Question, Unreadable};
use super::resolver::{Outcome, Resolver};
use super::{Client, DnsProxy, Originals, Shared, wire};

/// How long a TCP connection may be quiet between questions, and a read or write may take.
const TCP_IDLE: Duration = Duration::from_secs(30);
/// Questions of one TCP connection, at most.
const MAX_QUESTIONS: usize = 10_000;
/// Pause after an error of the socket itself.
const RECEIVE_PAUSE: Duration = Duration::from_millis(50);
/// How long connection tracking may take to say where a datagram was going.
const ORIGINAL_LIMIT: Duration = Duration::from_millis(100);

/// What is to be sent for a message.
enum Reaction {
    Send(Vec<u8>),
    Ignore,
    /// To resolvers, with what the client takes by UDP.
    Forward(Box<Question>),
}

/// A datagram as it arrived.
struct ClientQuery {
    client: Arc<Client>,
    query: Vec<u8>,
    original: Option<SocketAddr>,
    peer: SocketAddr,
}

/// A datagram that resolvers are to answer.
struct ForResolvers {
    asked: ClientQuery,
    resolver: ResolverKind,
    permit: ForwardPermit,
}

/// Whose resolvers are asked.
enum ResolverKind {
    /// The cluster's.
    Cluster {
        /// Largest response that the client takes, in bytes.
        limit: usize,
    },
    /// The one that the client chose, outside the cluster.
    Foreign(SocketAddr),
}

impl ForResolvers {
    async fn ask(self, shared: Arc<Shared>, socket: Arc<UdpSocket>) {
        let Self { asked: ClientQuery { client, query, original, peer }, resolver, permit } = self;
        let (response, limit) = match resolver {
            ResolverKind::Cluster { limit } => {
                (shared.forward(&client, &query, original, Transport::Udp).await, limit)
            }
            ResolverKind::Foreign(address) => (shared.pass(&client, &query, address).await, MAX_UDP),
        };
        if let Some(response) = response {
            if response.len() <= limit {
                send(&socket, &response, peer);
            } else if let Some(cut) = wire::truncated(&response) {
                shared.metrics.truncated.inc();
                send(&socket, &cut, peer);
            }
        }
        drop(permit);
    }
}

/// Permit to forward one question: of the pod and of the process, and the socket that it takes.
struct ForwardPermit {
    _of_pod: OwnedSemaphorePermit,
    _of_process: OwnedSemaphorePermit,
    _socket: Taken,
}

/// Whether resolvers of the cluster are asked or others.
#[derive(Clone, Copy)]
enum Limited {
    Cluster,
    Foreign,
}

impl Shared {
    /// `None` if too much is with resolvers, which is counted.
    fn permit_forward(&self, client: &Client, peer: IpAddr, which: Limited) -> Option<ForwardPermit> {
        let (of_pod, of_process) = match which {
            Limited::Cluster => (&client.in_flight, &self.in_flight),
            Limited::Foreign => (&client.foreign, &self.foreign),
        };
        let permit = |of: &Arc<Semaphore>| Arc::clone(of).try_acquire_owned().ok();
        let permit = permit(of_pod).zip(permit(of_process)).and_then(|(of_pod, of_process)| {
            let taken = self.shares.descriptors.take(&client.holder, 1);
            let socket = taken
                .inspect_err(|refusal| {
                    self.shares.report(*refusal, "dns", &client.holder, &client.uid, peer);
                })
                .ok()?;
            Some(ForwardPermit { _of_pod: of_pod, _of_process: of_process, _socket: socket })
        });
        if permit.is_none() {
            self.metrics.refused.inc();
        }
        permit
    }

    /// Decides on a message for the cluster's resolvers.
    fn react(&self, client: &Client, bytes: &[u8], transport: Transport) -> Reaction {
        let question = match Question::read(bytes) {
            Ok(question) => question,
            Err(unreadable) => {
                self.metrics.malformed.inc();
                return match unreadable {
                    Unreadable::Ignore => Reaction::Ignore,
                    Unreadable::Refuse(response) => Reaction::Send(response),
                };
            }
        };
        let snapshot = self.directory.load();
        let resolver = Resolver {
            snapshot: &snapshot,
            namespace: &client.namespace,
            network: &client.network,
            cluster_domain: &self.settings.cluster_domain,
        };
        let Outcome::Answer(answer) = resolver.resolve(&question.query, &mut rand::rng()) else {
            return Reaction::Forward(Box::new(question));
        };
        let limit = match transport {
            Transport::Udp => question.udp_limit,
            Transport::Tcp => wire::MAX_MESSAGE,
        };
        match question.answer(answer, limit) {
            Some((response, truncated)) => {
                self.metrics.answered.inc();
                self.metrics.truncated.inc_by(u64::from(truncated));
                Reaction::Send(response)
            }
            None => {
                self.metrics.failed.inc();
                question.fail(ResponseCode::ServFail).map_or(Reaction::Ignore, Reaction::Send)
            }
        }
    }

    /// Answers a datagram at once, or returns it to be forwarded.
    fn handle_datagram(&self, asked: ClientQuery, socket: &UdpSocket) -> Option<ForResolvers> {
        if let Some(resolver) = asked.original.filter(|_| !self.is_own(asked.original)) {
            self.metrics.foreign.inc();
            // Without a permit it is lost, as datagrams may be: nobody but the resolver answers for it.
            let permit = self.permit_forward(&asked.client, asked.peer.ip(), Limited::Foreign)?;
            return Some(ForResolvers { asked, resolver: ResolverKind::Foreign(resolver), permit });
        }
        let limit = match self.react(&asked.client, &asked.query, Transport::Udp) {
            Reaction::Send(response) => {
                send(socket, &response, asked.peer);
                return None;
            }
            Reaction::Ignore => return None,
            Reaction::Forward(question) => question.udp_limit,
        };
        let Some(permit) = self.permit_forward(&asked.client, asked.peer.ip(), Limited::Cluster) else {
            if let Some(response) = failure(&asked.query) {
                send(socket, &response, asked.peer);
            }
            return None;
        };
        Some(ForResolvers { asked, resolver: ResolverKind::Cluster { limit }, permit })
    }

    /// Passes a datagram on to a resolver outside the cluster. `None` if that does not answer: its client waits for as
    /// long as it likes and hears nothing else.
    async fn pass(&self, client: &Client, query: &[u8], resolver: SocketAddr) -> Option<Vec<u8>> {
        let limit = self.settings.foreign_timeout;
        let forwarder = Forwarder { sockets: &client.sockets, metrics: &self.metrics, limit };
        match forwarder.pass(query, resolver).await {
            Ok(response) => {
                self.metrics.forwarded.inc();
                Some(response)
            }
            Err(error) => {
                debug!(%error, "a resolver outside the cluster does not answer");
                self.metrics.failed.inc();
                None
            }
        }
    }

    /// Asks resolvers; always comes back with something to send, if only that it failed.
    async fn forward(
        &self,
        client: &Client,
        query: &[u8],
        original: Option<SocketAddr>,
        transport: Transport,
    ) -> Option<Vec<u8>> {
        let limit = self.settings.attempt_timeout;
        let forwarder = Forwarder { sockets: &client.sockets, metrics: &self.metrics, limit };
        match forwarder.ask(query, &self.upstreams(original), transport).await {
            Ok(response) => {
                self.metrics.forwarded.inc();
                Some(response)
            }
            Err(error) => {
                debug!(%error, "a question stays without answer");
                self.metrics.failed.inc();
                failure(query)
            }
        }
    }
}

/// SERVFAIL for a message that was not necessarily read.
fn failure(query: &[u8]) -> Option<Vec<u8>> {
    Question::read(query).ok()?.fail(ResponseCode::ServFail)
}

impl DnsProxy {
    /// Answers the datagrams of a pod until `stop` resolves, then what is still with resolvers.
    pub async fn serve_udp(
        &self,
        client: Arc<Client>,
        socket: UdpSocket,
        mut originals: impl Originals,
        stop: impl Future<Output = ()> + Send,
    ) {
        let socket = Arc::new(socket);
        let mut with_resolvers = JoinSet::new();
        let mut buffer = vec![0; MAX_UDP];
        let mut stop = std::pin::pin!(stop);
        loop {
            let received = tokio::select! {
                biased;
                () = &mut stop => break,
                Some(ended) = with_resolvers.join_next() => {
                    note_end(ended);
                    continue;
                }
                received = socket.recv_from(&mut buffer) => received,
            };
            let (length, peer) = match received {
                Ok(received) => received,
                Err(error) => {
                    // An ICMP error of an earlier response is no fault of the socket; a shortage passes.
                    debug!(%error, "cannot receive a DNS question");
                    tokio::time::sleep(RECEIVE_PAUSE).await;
                    continue;
                }
            };
            let query = buffer.get(..length).unwrap_or_default();
            let original = timeout(ORIGINAL_LIMIT, originals.original(peer)).await.ok().flatten();
            let asked = ClientQuery { client: Arc::clone(&client), query: query.to_vec(), original, peer };
            if let Some(question) = self.shared.handle_datagram(asked, &socket) {
                with_resolvers.spawn(question.ask(Arc::clone(&self.shared), Arc::clone(&socket)));
            }
        }
        // Each ends by itself: every attempt has a limit.
        while let Some(ended) = with_resolvers.join_next().await {
            note_end(ended);
        }
    }

    /// Answers the questions of one TCP connection [for the cluster](Self::is_for_cluster) until it ends. `original` is
    /// the resolver that the client dialled.
    pub async fn serve_tcp(&self, client: Arc<Client>, stream: TcpStream, original: Option<SocketAddr>) {
        let peer = stream.peer_addr().map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.ip());
        let Some(permit) = self.shared.permit_forward(&client, peer, Limited::Cluster) else { return };
        self.converse(&client, stream, original).await;
        drop(permit);
    }

    async fn converse(&self, client: &Client, mut stream: TcpStream, original: Option<SocketAddr>) {
        for _ in 0..MAX_QUESTIONS {
            let query = match timeout(TCP_IDLE, read(&mut stream)).await {
                Ok(Ok(query)) => query,
                Ok(Err(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => return,
                Ok(Err(error)) => return debug!(%error, "a DNS connection broke"),
                Err(_) => return,
            };
            let response = match self.shared.react(client, &query, Transport::Tcp) {
                Reaction::Send(response) => Some(response),
                Reaction::Ignore => return,
                Reaction::Forward(_) => self.shared.forward(client, &query, original, Transport::Tcp).await,
            };
            let Some(response) = response else { return };
            match timeout(TCP_IDLE, stream.write_all(&framed(&response))).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return debug!(%error, "a DNS connection broke"),
                Err(_) => return,
            }
        }
    }
}

fn note_end(ended: Result<(), JoinError>) {
    if let Err(error) = ended {
        warn!(%error, "a DNS question died");
    }
}

async fn read(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Sends what fits now: a client that does not take its answers asks again.
fn send(socket: &UdpSocket, response: &[u8], peer: SocketAddr) {
    if let Err(error) = socket.try_send_to(response, peer) {
        debug!(%error, %peer, "a DNS answer could not be sent");
    }
}
