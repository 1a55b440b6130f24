//! The server's end of tunnel connections.
//!
//! [`accept`] authenticates a connection, [`serve`] reads its CONNECTs and hands each to a handler as
//! [`Incoming`]. Deciding and dialling is the handler's; this never opens a socket.

mod abandoned;
mod incoming;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use ambit_identity::{PeerCertificate, SpiffeId};
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

use crate::driver::{Upkeep, Verdict};
use crate::load::Load;
use crate::overhead::{Meter, Tally};
use crate::paced::Paced;
use crate::{ConnectRequest, RequestError, ServeError, Settings, WindowBudget};
use abandoned::Abandoned;

type H2<IO> = h2::server::Connection<Paced<TlsStream<IO>>, Bytes>;

/// A connection whose peer is authentic, and on which nothing has been asked yet.
pub struct Accepted<IO> {
    connection: H2<IO>,
    tally: Arc<Tally>,
    peer: PeerCertificate,
    malformed: Option<OnMalformed>,
}

type OnMalformed = Box<dyn Fn(RequestError) + Send>;

impl<IO> std::fmt::Debug for Accepted<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Accepted").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl<IO> Accepted<IO> {
    /// Who dialled.
    pub fn peer(&self) -> &PeerCertificate {
        &self.peer
    }

    /// Has `tell` hear of every request that is no CONNECT to a destination; it is called on the connection's
    /// task, once a request, just before [`serve`] answers with 400.
    #[must_use]
    pub fn on_malformed(mut self, tell: impl Fn(RequestError) + Send + 'static) -> Self {
        self.malformed = Some(Box::new(tell));
        self
    }
}

/// TLS and the HTTP/2 preface, together at most [`Settings::handshake_timeout`].
///
/// # Errors
///
/// [`ServeError::HandshakeTimeout`], [`ServeError::Tls`], [`ServeError::NoHttp2`], [`ServeError::Identity`],
/// [`ServeError::Http2`].
pub async fn accept<IO>(
    io: IO,
    tls: Arc<ServerConfig>,
    settings: &Settings,
) -> Result<Accepted<IO>, ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    timeout(settings.handshake_timeout, handshake(io, tls, settings))
        .await
        .map_err(|_| ServeError::HandshakeTimeout(settings.handshake_timeout))?
}

async fn handshake<IO>(
    io: IO,
    tls: Arc<ServerConfig>,
    settings: &Settings,
) -> Result<Accepted<IO>, ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let check = |session: &CommonState| match session.alpn_protocol() {
        Some(b"h2") => Ok(PeerCertificate::of_client(session)?),
        _ => Err(ServeError::NoHttp2),
    };
    let (stream, peer) = ambit_tls::accept(io, tls, check).await.map_err(ServeError::Tls)?;
    let peer = peer?;
    let meter = Meter::of_client();
    let tally = meter.tally();
    let connection = settings
        .server()
        .handshake(Paced::new(stream, meter))
        .await
        .map_err(|source| ServeError::Http2 { peer: peer.identity().clone(), source })?;
    Ok(Accepted { connection, tally, peer, malformed: None })
}

/// Serves a connection until it has ended and every handler has returned.
///
/// Each CONNECT is handed to `handler`, which runs as a task beside this one. What is no CONNECT to a
/// destination is answered with 400 here. When `drain` is ready the peer is told by GOAWAY: it opens
/// no more tunnels, those in flight finish. Dropping this future cuts the connection, its tunnels and
/// its handlers.
///
/// # Errors
///
/// [`ServeError::Http2`], [`ServeError::PingTimeout`], [`ServeError::Abandoned`], [`ServeError::Overhead`]. A connection that the peer
/// closed, that was idle, or that was drained, ends well.
pub async fn serve<IO, H, F, D>(
    accepted: Accepted<IO>,
    settings: &Settings,
    budget: WindowBudget,
    drain: D,
    handler: H,
) -> Result<(), ServeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Incoming) -> F,
    F: Future<Output = ()> + Send + 'static,
    D: Future<Output = ()>,
{
    let Accepted { mut connection, tally, peer, malformed } = accepted;
    let load = Load::new(Instant::now());
    let mut serving = Serving {
        upkeep: Upkeep::new(settings, budget, connection.ping_pong(), Arc::clone(&load), tally),
        connection,
        peer: peer.identity().clone(),
        malformed,
        settings,
        abandoned: Abandoned::new(settings.max_abandoned, settings.abandoned_within),
        load,
        closing: false,
    };
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
            Some(ended) = handlers.join_next() => note(ended),
        }
    };
    // The transport is gone; what has arrived is still delivered to applications.
    drop(serving);
    while let Some(ended) = handlers.join_next().await {
        note(ended);
    }
    ended
}

fn note(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a tunnel's handler panicked");
    }
}

struct Serving<'a, IO> {
    connection: H2<IO>,
    upkeep: Upkeep,
    peer: SpiffeId,
    malformed: Option<OnMalformed>,
    settings: &'a Settings,
    abandoned: Abandoned,
    load: Arc<Load>,
    closing: bool,
}

type Asked = (Request<RecvStream>, SendResponse<Bytes>);

impl<IO> Serving<'_, IO>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    /// The next request; nothing when the connection has ended in order.
    async fn next(&mut self) -> Result<Option<Asked>, ServeError> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Asked>, ServeError>> {
        if let Some(count) = self.abandoned.excess(Instant::now()) {
            self.hang_up(cx);
            let within = self.settings.abandoned_within;
            return Poll::Ready(Err(ServeError::Abandoned { peer: self.peer.clone(), count, within }));
        }
        while let Poll::Ready(verdict) = self.upkeep.poll(cx) {
            match verdict {
                Verdict::Idle => self.close(),
                Verdict::PingTimeout => {
                    let limit = self.settings.ping_timeout;
                    return Poll::Ready(Err(ServeError::PingTimeout { peer: self.peer.clone(), limit }));
                }
                Verdict::Overhead(count) => {
                    self.hang_up(cx);
                    let within = self.settings.overhead_within;
                    return Poll::Ready(Err(ServeError::Overhead { peer: self.peer.clone(), count, within }));
                }
            }
        }
        if let Some(window) = self.upkeep.changed_window(cx) {
            self.connection.set_target_window_size(window);
        }
        match Pin::new(&mut self.connection).poll_accept(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(Ok(None)),
            Poll::Ready(Some(Ok(asked))) => Poll::Ready(Ok(Some(asked))),
            Poll::Ready(Some(Err(source))) => {
                Poll::Ready(Err(ServeError::Http2 { peer: self.peer.clone(), source }))
            }
        }
    }

    /// RFC 9113 §10.5: GOAWAY with ENHANCE_YOUR_CALM, if there is room for it.
    fn hang_up(&mut self, cx: &mut Context<'_>) {
        self.connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
        // The connection is dropped next, whatever became of this.
        let _ = self.connection.poll_closed(cx);
    }

    /// GOAWAY; what is in flight finishes.
    fn close(&mut self) {
        self.closing = true;
        self.upkeep.closing();
        self.connection.graceful_shutdown();
    }

    fn start<H, F>(
        &mut self,
        request: Request<RecvStream>,
        respond: SendResponse<Bytes>,
        handler: &H,
        handlers: &mut JoinSet<()>,
    ) where
        H: Fn(Incoming) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        let (head, recv) = request.into_parts();
        let lease = self.load.enter();
        match ConnectRequest::from_http(&head) {
            Ok(request) => {
                let deadline = tokio::time::Instant::now() + self.settings.connect_timeout;
                let peer = self.peer.clone();
                let incoming =
                    Incoming::new(request, peer, respond, recv, lease, self.abandoned.tally(), deadline);
                handlers.spawn(handler(incoming));
            }
            Err(error) => {
                tracing::debug!(peer = %self.peer, %error, "request refused");
                if let Some(tell) = &self.malformed {
                    tell(error);
                }
                incoming::answer(respond, StatusCode::BAD_REQUEST);
            }
        }
    }
}
