//! The client's end of one tunnel connection.
//!
//! [`Pool`](crate::Pool) is the usual entry; [`connect`] and [`open_within`] serve callers that need a separate connection.

use std::future::{Future, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ambit_identity::{ClientTls, PeerCertificate, PeerError, SpiffeId, unnamed_server};
use ambit_tls::TlsStream;
use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{Response, StatusCode};
use rustls::CommonState;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::driver::{Maintenance, Verdict};
use crate::error::is_rejection;
use crate::load::{Lease, Load};
use crate::overhead::{Meter, Tally};
use crate::paced::Paced;
use crate::request::baggage;
use crate::windows::Window;
use crate::{ClientSettings, ConnectRequest, OpenError, Tunnel, WindowBudget};

/// A CONNECT that was given up is left open until it is this old. Servers count those that are reset sooner as an attack
/// (CVE-2023-44487): ours below one second, Envoy as well.
const SHORTEST_REQUEST: Duration = Duration::from_secs(2);

/// The peer of a connection, and the identities that it may have.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The peer's address, for errors only: the caller dials it.
    pub address: SocketAddr,
    /// The address that the connection is made from, whose part of the [`WindowBudget`] it uses.
    pub source: IpAddr,
    /// How our certificate is presented.
    pub tls: &'a Arc<ClientTls>,
    /// The identities that the peer may have. Our certificate is sent to no other peer.
    pub expected: &'a [SpiffeId],
}

/// Opens tunnels on an established connection. Clones share the connection.
///
/// When all clones are dropped and the last tunnel has ended, the connection closes with GOAWAY.
#[derive(Debug, Clone)]
pub struct Connection {
    sender: SendRequest<Bytes>,
    peer: PeerCertificate,
    address: SocketAddr,
    load: Arc<Load>,
    tally: Arc<Tally>,
}

/// The connection itself: a future that moves its frames. It must be polled for tunnels to make
/// progress; dropping it breaks them all.
pub struct Driver<IO> {
    connection: h2::client::Connection<Paced<TlsStream<IO>>, Bytes>,
    maintenance: Maintenance,
}

impl<IO> std::fmt::Debug for Driver<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("maintenance", &self.maintenance).finish_non_exhaustive()
    }
}

/// How a connection ended.
#[derive(Debug)]
pub enum DriverEnd {
    /// All handles were dropped, or the peer closed the connection cleanly.
    Closed,
    /// A PING went unanswered.
    PingTimeout,
    /// The peer sent this many frames that carry nothing within
    /// [`overhead_period`](crate::ConnectionSettings::overhead_period).
    Overhead(u64),
    /// HTTP/2 or the connection below it broke.
    Broken(h2::Error),
}

/// Performs the handshakes of TLS and HTTP/2 over `io`. The caller bounds the time.
///
/// # Errors
///
/// [`OpenError::Tls`], [`OpenError::NoHttp2`], [`OpenError::Identity`].
pub async fn connect<IO>(
    io: IO,
    target: Target<'_>,
    settings: &ClientSettings,
    budget: &WindowBudget,
) -> Result<(Connection, Driver<IO>), OpenError>
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Target { address, source, tls, expected } = target;
    let check = |session: &CommonState| match session.alpn_protocol() {
        Some(b"h2") => {
            PeerCertificate::of_server(session).map_err(|source| OpenError::Identity { address, source })
        }
        _ => Err(OpenError::NoHttp2 { address }),
    };
    let handshake = ambit_tls::connect(io, tls.expecting(expected), unnamed_server(), check).await;
    let (stream, peer) = handshake.map_err(|source| match PeerError::of_handshake(&source) {
        Some(unexpected @ PeerError::Unexpected { .. }) => {
            OpenError::Identity { address, source: unexpected.clone() }
        }
        _ => OpenError::Tls { address, source: Arc::new(source) },
    })?;
    let peer = peer?;
    let meter = Meter::of_server();
    let tally = meter.tally();
    let window = Window::new(&settings.connection, budget.share(source, address.ip()));
    let (sender, mut connection) = settings
        .connection
        .client(window.size())
        .handshake(Paced::new(stream, meter))
        .await
        .map_err(|error| OpenError::Tls { address, source: Arc::new(crate::tunnel::io_error(error)) })?;
    let load = Load::new(Instant::now());
    let ping = connection.ping_pong();
    let maintenance =
        Maintenance::new(&settings.connection, window, ping, Arc::clone(&load), Arc::clone(&tally));
    Ok((Connection { sender, peer, address, load, tally }, Driver { connection, maintenance }))
}

impl Connection {
    /// The verified peer.
    pub fn peer(&self) -> &PeerCertificate {
        &self.peer
    }

    /// The peer's address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn tally(&self) -> &Arc<Tally> {
        &self.tally
    }

    pub(crate) fn load(&self) -> &Arc<Load> {
        &self.load
    }

    /// How many tunnels the peer allows at a time.
    pub(crate) fn peer_limit(&self) -> u32 {
        u32::try_from(self.sender.current_max_send_streams()).unwrap_or(u32::MAX)
    }

    /// Opens a tunnel: sends CONNECT and waits for its answer, at most `settings.connect_timeout`.
    /// Dropping the future cancels the request, at the earliest two seconds after it was sent.
    ///
    /// # Errors
    ///
    /// [`OpenError::Refused`], [`OpenError::ConnectTimeout`], [`OpenError::Silent`], [`OpenError::Lost`],
    /// [`OpenError::NotProcessed`], [`OpenError::Tls`] if the peer rejected our certificate after the handshake.
    pub async fn open(
        &self,
        request: &ConnectRequest,
        settings: &ClientSettings,
    ) -> Result<Tunnel, OpenError> {
        let lease = self.load.enter();
        self.open_leased(request, settings, lease).await
    }

    pub(crate) async fn open_leased(
        &self,
        request: &ConnectRequest,
        settings: &ClientSettings,
        lease: Lease,
    ) -> Result<Tunnel, OpenError> {
        let mut unanswered = Unanswered::new(self.send(request)?, lease);
        let authority = || request.authority.clone();
        let answer = pin!(self.answer(request, settings, &mut unanswered));
        let answered = timeout(settings.connect_timeout, answer).await.map_err(|_| {
            let (address, limit) = (self.address, settings.connect_timeout);
            OpenError::ConnectTimeout { address, authority: authority(), limit }
        })?;
        let (response, send, lease) = answered?;
        let (head, recv) = response.into_parts();
        // HBONE contract: a client treats all but 200 as failure.
        if head.status != StatusCode::OK {
            return Err(OpenError::Refused {
                address: self.address,
                authority: authority(),
                status: head.status,
            });
        }
        let about = baggage(&head.headers);
        Ok(Tunnel::new(send, recv, lease, self.peer.clone(), about))
    }

    /// The answer to CONNECT. It may take as long as the application takes, unless the peer is gone: after
    /// `probe_timeout` the peer must answer a PING.
    async fn answer(
        &self,
        request: &ConnectRequest,
        settings: &ClientSettings,
        unanswered: &mut Unanswered,
    ) -> Result<Answered, OpenError> {
        let limit = settings.probe_timeout;
        let answered = match timeout(limit, &mut *unanswered).await {
            Ok(answered) => answered,
            Err(_) => tokio::select! {
                biased;
                answered = &mut *unanswered => answered,
                probed = timeout(limit, self.load.probe()) => match probed {
                    Ok(()) => unanswered.await,
                    Err(_) => {
                        let (address, authority) = (self.address, request.authority.clone());
                        return Err(OpenError::Silent { address, authority, silent: limit * 2 });
                    }
                },
            },
        };
        answered.map_err(|error| self.failed(request, error))
    }

    fn send(&self, request: &ConnectRequest) -> Result<(ResponseFuture, SendStream<Bytes>), OpenError> {
        let message = request
            .to_http()
            .ok_or_else(|| OpenError::Unsendable { authority: request.authority.clone() })?;
        self.sender.clone().send_request(message, false).map_err(|error| {
            // A request that could not be sent was not processed.
            self.rejected().unwrap_or_else(|| OpenError::NotProcessed {
                address: self.address,
                authority: request.authority.clone(),
                source: Arc::new(error),
            })
        })
    }

    fn failed(&self, request: &ConnectRequest, error: h2::Error) -> OpenError {
        if let Some(rejected) = self.rejected() {
            return rejected;
        }
        // RFC 9113 §6.8, §8.7: streams above a GOAWAY's last one, and those refused, were not processed.
        let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        let going = error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR);
        let (address, authority, source) = (self.address, request.authority.clone(), Arc::new(error));
        if refused || going {
            OpenError::NotProcessed { address, authority, source }
        } else {
            OpenError::Lost { address, authority, source }
        }
    }

    fn rejected(&self) -> Option<OpenError> {
        rejection(self.address, &self.tally)
    }
}

/// The answer to a CONNECT, and what its tunnel is made of.
type Answered = (Response<RecvStream>, SendStream<Bytes>, Lease);

/// A CONNECT that waits for its answer. Dropped too early for a reset, it waits on in a task of its own.
struct Unanswered {
    since: Instant,
    /// Taken when it is answered.
    request: Option<(ResponseFuture, SendStream<Bytes>, Lease)>,
}

impl Unanswered {
    fn new((answer, send): (ResponseFuture, SendStream<Bytes>), lease: Lease) -> Self {
        Self { since: Instant::now(), request: Some((answer, send, lease)) }
    }
}

impl Future for Unanswered {
    type Output = Result<Answered, h2::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some((mut answer, send, lease)) = self.request.take() else { return Poll::Pending };
        match Pin::new(&mut answer).poll(cx) {
            Poll::Ready(answered) => Poll::Ready(answered.map(|response| (response, send, lease))),
            Poll::Pending => {
                self.request = Some((answer, send, lease));
                Poll::Pending
            }
        }
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        let left = SHORTEST_REQUEST.saturating_sub(self.since.elapsed());
        if let (Some((answer, send, lease)), Ok(runtime)) = (self.request.take(), Handle::try_current())
            && !left.is_zero()
        {
            runtime.spawn(async move {
                let _too_late = timeout(left, answer).await;
                drop((send, lease));
            });
        }
    }
}

/// Whether the connection failed because the server rejected our certificate.
///
/// RFC 8446 §4.4.2.4: a server verifies it after our side of the handshake is complete, so its refusal arrives as an alert,
/// usually in answer to the first request.
pub(crate) fn rejection(address: SocketAddr, tally: &Tally) -> Option<OpenError> {
    let source = tally.failure().filter(|failure| is_rejection(failure))?;
    Some(OpenError::Tls { address, source: Arc::clone(source) })
}

impl<IO> Driver<IO>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    /// Moves frames until the connection has ended. When no tunnel was open for the idle time,
    /// `on_idle` is called once. It must drop the [`Connection`]s, which closes the connection.
    pub async fn run(mut self, on_idle: impl FnOnce()) -> DriverEnd {
        let mut on_idle = Some(on_idle);
        poll_fn(|cx| {
            while let Poll::Ready(verdict) = self.maintenance.poll(cx) {
                match verdict {
                    Verdict::Tick => {}
                    Verdict::PingTimeout => return Poll::Ready(DriverEnd::PingTimeout),
                    Verdict::Overhead(count) => return Poll::Ready(DriverEnd::Overhead(count)),
                    Verdict::Idle => {
                        self.maintenance.closing(None);
                        if let Some(on_idle) = on_idle.take() {
                            on_idle();
                        }
                    }
                }
            }
            if let Some(window) = self.maintenance.changed_window(cx) {
                self.connection.set_target_window_size(window);
            }
            Pin::new(&mut self.connection).poll(cx).map(|ended| match ended {
                Ok(()) => DriverEnd::Closed,
                Err(error) => DriverEnd::Broken(error),
            })
        })
        .await
    }
}

/// Opens a tunnel inside another one (double HBONE): a second TLS and a second CONNECT, for a destination in another
/// network (HBONE contract).
///
/// The inner connection carries this tunnel only; it runs as a task of the current runtime, ends
/// with the tunnel, and otherwise with an unanswered PING. For a connection that several tunnels share, give
/// [`Pool::open`](crate::Pool::open) a dial that yields [`Tunnel::into_transport`].
///
/// # Errors
///
/// As [`connect`] and [`Connection::open`], and [`OpenError::HandshakeTimeout`].
pub async fn open_within(
    outer: Tunnel,
    target: Target<'_>,
    request: &ConnectRequest,
    settings: &ClientSettings,
) -> Result<Tunnel, OpenError> {
    let (address, limit) = (target.address, settings.handshake_timeout);
    // An inner window of the same size adds nothing: the outer one already holds the peer back.
    let budget = WindowBudget::new(0);
    let connected = connect(outer.into_transport(), target, settings, &budget);
    let (connection, driver) =
        timeout(limit, connected).await.map_err(|_| OpenError::HandshakeTimeout { address, limit })??;
    tokio::spawn(async move {
        let end = driver.run(|| ()).await;
        tracing::trace!(?end, %address, "inner tunnel connection ended");
    });
    connection.open(request, settings).await
}
