//! The server's end of tunnel connections.
//!
//! [`Server::accept`] authenticates a connection, [`Server::serve`] reads its CONNECTs and hands each to a handler as
//! [`Incoming`]. The handler decides and dials; the server never opens a socket.
//!
//! A connection takes new tunnels only while its peer's certificate is valid: once that has expired, is revoked, or its root
//! is no longer trusted, the connection gets GOAWAY and a CONNECT on it is refused as unprocessed, so that the client opens
//! it on another connection. The caller must close tunnels that are open then.

mod abandoned;
mod incoming;

use std::future::Future;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

use ambit_identity::{PeerCertificate, SpiffeId, Trust};
use ambit_tls::TlsStream;
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{Request, StatusCode};
use rustls::{CommonState, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;

pub use incoming::{Incoming, NotAnswered};

use crate::driver::{Maintenance, Verdict};
use crate::load::Load;
use crate::overhead::{Meter, Tally};
use crate::paced::Paced;
use crate::windows::Window;
use crate::{ConnectRequest, RequestError, ServeError, ServerSettings, WindowBudget};
use abandoned::Abandoned;

type H2<IO> = h2::server::Connection<Paced<TlsStream<IO>>, Bytes>;

/// The peer of an accepted connection, shared by its CONNECTs.
#[derive(Debug)]
pub struct Peer {
    /// The client's certificate. [`Trust::recheck`] says whether it is still trusted.
    pub certificate: PeerCertificate,
    /// The addresses of the connection.
    pub endpoints: Endpoints,
}

/// The two addresses of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoints {
    /// Our own.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
}

/// A connection whose peer is authenticated, and on which nothing has been requested yet.
pub struct Accepted<IO> {
    connection: H2<IO>,
    tally: Arc<Tally>,
    window: Window,
    peer: Arc<Peer>,
    malformed: Option<OnMalformed>,
}

type OnMalformed = Box<dyn Fn(RequestError) + Send>;

impl<IO> std::fmt::Debug for Accepted<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accepted").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl<IO> Accepted<IO> {
    /// The client.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Calls `report` for every request that is not a CONNECT to a destination, on the connection's task, just before
    /// it is answered with 400.
    #[must_use]
    pub fn on_malformed(mut self, report: impl Fn(RequestError) + Send + 'static) -> Self {
        self.malformed = Some(Box::new(report));
        self
    }
}

/// Accepts and serves connections. Its caller limits how many handshakes are in progress. Clones share settings.
#[derive(Debug, Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: ServerSettings,
    trust: Trust,
    budget: WindowBudget,
}

impl Server {
    /// A server that accepts peers that `trust` accepts, with windows of `budget`.
    pub fn new(settings: ServerSettings, trust: Trust, budget: WindowBudget) -> Server {
        Server { shared: Arc::new(Shared { settings, trust, budget }) }
    }

    /// Performs the handshakes of TLS and HTTP/2 over `io`, together at most
    /// [`handshake_timeout`](ServerSettings::handshake_timeout) after the first byte.
    ///
    /// # Errors
    ///
    /// [`ServeError::NoFirstByte`], [`ServeError::HandshakeTimeout`], [`ServeError::Tls`], [`ServeError::NoHttp2`],
    /// [`ServeError::Identity`], [`ServeError::Http2`].
    pub async fn accept<IO>(
        &self,
        mut io: IO,
        endpoints: Endpoints,
        tls: Arc<ServerConfig>,
    ) -> Result<Accepted<IO>, ServeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let limit = self.shared.settings.first_byte_timeout;
        let first = timeout(limit, ambit_tls::FirstBytes::read(&mut io))
            .await
            .map_err(|_| ServeError::NoFirstByte(limit))?
            .map_err(ServeError::Tls)?;
        let limit = self.shared.settings.handshake_timeout;
        timeout(limit, self.handshake(io, first, endpoints, tls))
            .await
            .map_err(|_| ServeError::HandshakeTimeout(limit))?
    }

    async fn handshake<IO>(
        &self,
        io: IO,
        first: ambit_tls::FirstBytes,
        endpoints: Endpoints,
        tls: Arc<ServerConfig>,
    ) -> Result<Accepted<IO>, ServeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let check = |session: &CommonState| match session.alpn_protocol() {
            Some(b"h2") => Ok(PeerCertificate::of_client(session)?),
            _ => Err(ServeError::NoHttp2),
        };
        let (stream, certificate) =
            ambit_tls::accept(io, first, tls, check).await.map_err(ServeError::Tls)?;
        let peer = Peer { certificate: certificate?, endpoints };
        let meter = Meter::of_client();
        let tally = meter.tally();
        let settings = &self.shared.settings;
        let share = self.shared.budget.share(endpoints.local.ip(), endpoints.remote.ip());
        let window = Window::new(&settings.connection, share);
        let connection = settings
            .server(window.size())
            .handshake(Paced::new(stream, meter))
            .await
            .map_err(|source| ServeError::Http2 { peer: peer.certificate.identity().clone(), source })?;
        Ok(Accepted { connection, tally, window, peer: Arc::new(peer), malformed: None })
    }

    /// Serves a connection until it has ended and every handler has returned.
    ///
    /// Each CONNECT is handed to `handler`, which runs as a task of its own. A request that is not a CONNECT to a
    /// destination is answered with 400 here. When `drain` is ready the peer gets GOAWAY: it opens
    /// no more tunnels, those in flight finish; a peer that does not answer is waited for only
    /// [`drain_idle`](crate::ConnectionSettings::drain_idle) after the last. Dropping this future cuts the connection, its
    /// tunnels and its handlers.
    ///
    /// # Errors
    ///
    /// [`ServeError::Http2`], [`ServeError::PingTimeout`], [`ServeError::Abandoned`], [`ServeError::Overhead`]. A
    /// connection that the peer closed, that was idle, or that was drained, ends with `Ok`.
    pub async fn serve<IO, H, F, D>(
        &self,
        accepted: Accepted<IO>,
        drain: D,
        handler: H,
    ) -> Result<(), ServeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
        H: Fn(Incoming) -> F,
        F: Future<Output = ()> + Send + 'static,
        D: Future<Output = ()>,
    {
        let mut serving = Serving::new(&self.shared, accepted);
        let mut drain = pin!(drain);
        let mut handlers = JoinSet::new();
        let ended = loop {
            tokio::select! {
                biased;
                next = serving.next() => match next {
                    Ok(Some((request, respond))) => serving.start(request, respond, &handler, &mut handlers),
                    Ok(None) => break Ok(()),
                    Err(error) => break Err(error),
                },
                () = &mut drain, if !serving.closing => serving.close(),
                Some(ended) = handlers.join_next() => log_panic(ended),
            }
        };
        // The transport has ended; received bytes are still delivered to applications.
        drop(serving);
        while let Some(ended) = handlers.join_next().await {
            log_panic(ended);
        }
        ended
    }
}

fn log_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a tunnel's handler panicked");
    }
}

struct Serving<'a, IO> {
    connection: H2<IO>,
    maintenance: Maintenance,
    peer: Arc<Peer>,
    malformed: Option<OnMalformed>,
    shared: &'a Shared,
    abandoned: Abandoned,
    load: Arc<Load>,
    closing: bool,
}

type Requested = (Request<RecvStream>, SendResponse<Bytes>);

impl<'a, IO> Serving<'a, IO>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    fn new(shared: &'a Shared, accepted: Accepted<IO>) -> Serving<'a, IO> {
        let Accepted { mut connection, tally, window, peer, malformed } = accepted;
        let settings = &shared.settings;
        let load = Load::new(Instant::now());
        let ping = connection.ping_pong();
        Serving {
            maintenance: Maintenance::new(&settings.connection, window, ping, Arc::clone(&load), tally),
            connection,
            peer,
            malformed,
            shared,
            abandoned: Abandoned::new(settings.max_abandoned, settings.abandoned_period),
            load,
            closing: false,
        }
    }

    /// Whether the peer's certificate is still trusted. Once it is not, the connection closes.
    fn check_peer(&mut self) -> bool {
        let rechecked = self.shared.trust.recheck(&self.peer.certificate, SystemTime::now());
        if let (Err(error), false) = (&rechecked, self.closing) {
            tracing::info!(peer = %self.peer.endpoints.remote, %error, "a connection takes no more tunnels");
            self.close();
        }
        rechecked.is_ok()
    }

    /// The next request; `None` when the connection has ended in order.
    async fn next(&mut self) -> Result<Option<Requested>, ServeError> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Requested>, ServeError>> {
        if let Some(count) = self.abandoned.excess(Instant::now()) {
            self.hang_up(cx);
            let within = self.shared.settings.abandoned_period;
            return Poll::Ready(Err(ServeError::Abandoned { peer: self.identity(), count, within }));
        }
        while let Poll::Ready(verdict) = self.maintenance.poll(cx) {
            match verdict {
                Verdict::Tick => {
                    self.check_peer();
                }
                // The peer has not answered GOAWAY. What ended tunnels still have to send is waited for.
                Verdict::Idle if self.closing && !self.connection.has_streams() => {
                    return Poll::Ready(Ok(None));
                }
                Verdict::Idle if self.closing => self.wait_for_peer(),
                Verdict::Idle => self.close(),
                Verdict::PingTimeout => {
                    let limit = self.shared.settings.connection.ping_timeout;
                    return Poll::Ready(Err(ServeError::PingTimeout { peer: self.identity(), limit }));
                }
                Verdict::Overhead(count) => {
                    self.hang_up(cx);
                    let within = self.shared.settings.connection.overhead_period;
                    return Poll::Ready(Err(ServeError::Overhead { peer: self.identity(), count, within }));
                }
            }
        }
        if let Some(window) = self.maintenance.changed_window(cx) {
            self.connection.set_target_window_size(window);
        }
        match Pin::new(&mut self.connection).poll_accept(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(Ok(None)),
            Poll::Ready(Some(Ok(requested))) => Poll::Ready(Ok(Some(requested))),
            Poll::Ready(Some(Err(source))) => {
                Poll::Ready(Err(ServeError::Http2 { peer: self.identity(), source }))
            }
        }
    }

    fn identity(&self) -> SpiffeId {
        self.peer.certificate.identity().clone()
    }

    /// RFC 9113 §10.5: GOAWAY with ENHANCE_YOUR_CALM, if there is room for it.
    fn hang_up(&mut self, cx: &mut Context<'_>) {
        self.connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
        // The connection is dropped next, whether this succeeded or not.
        let _ = self.connection.poll_closed(cx);
    }

    /// Sends GOAWAY; requests in flight finish.
    fn close(&mut self) {
        self.closing = true;
        self.wait_for_peer();
        self.connection.graceful_shutdown();
    }

    fn wait_for_peer(&mut self) {
        self.maintenance.closing(Some(self.shared.settings.connection.drain_idle));
    }

    fn start<H, F>(
        &mut self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        handler: &H,
        handlers: &mut JoinSet<()>,
    ) where
        H: Fn(Incoming) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        if !self.check_peer() {
            // RFC 9113 §8.7: not processed, so the client may send it on a connection with a certificate that is good.
            return respond.send_reset(Reason::REFUSED_STREAM);
        }
        let (head, recv) = request.into_parts();
        let lease = self.load.enter();
        match ConnectRequest::from_http(&head) {
            Ok(request) => {
                let limit = self.shared.settings.connect_timeout;
                let peer = Arc::clone(&self.peer);
                let incoming =
                    Incoming::new(request, peer, respond, recv, lease, self.abandoned.tally(), limit);
                handlers.spawn(handler(incoming));
            }
            Err(error) => {
                tracing::debug!(peer = %self.peer.endpoints.remote, %error, "request refused");
                if let Some(report) = &self.malformed {
                    report(error);
                }
                incoming::answer(respond, StatusCode::BAD_REQUEST);
            }
        }
    }
}
