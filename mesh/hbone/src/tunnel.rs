//! An open tunnel: one HTTP/2 stream, both directions.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use ambit_identity::{PeerCertificate, SpiffeId};
use ambit_net::relay::{Sizing, Tier, buffers};
use bytes::{Buf, BufMut, Bytes};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use crate::Baggage;
use crate::load::Lease;

/// Largest piece that one write takes over.
const PIECE: usize = Tier::Bulk.read_size();

/// An application connection inside a tunnel connection, accepted by both proxies.
///
/// Given to [`relay`](crate::relay()), or turned into a byte stream by [`Tunnel::into_stream`]. Dropped
/// before both directions have ended, it resets its stream, so the other end sees a reset and not
/// an end.
#[derive(Debug)]
pub struct Tunnel {
    pub(crate) send: SendStream<Bytes>,
    pub(crate) recv: RecvStream,
    pub(crate) lease: Lease,
    peer: PeerCertificate,
    /// Boxed to keep an idle tunnel small.
    baggage: Option<Box<Baggage>>,
}

impl Tunnel {
    pub(crate) fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        lease: Lease,
        peer: PeerCertificate,
        baggage: Option<Baggage>,
    ) -> Tunnel {
        Tunnel { send, recv, lease, peer, baggage: baggage.map(Box::new) }
    }

    /// The other proxy's verified identity: at a client the destination's, at a server the client's.
    pub fn peer(&self) -> &SpiffeId {
        self.peer.identity()
    }

    /// The certificate that proved it. Of a tunnel inside another one it is the inner peer's, which no [`Pool`](crate::Pool)
    /// rechecks.
    pub fn certificate(&self) -> &PeerCertificate {
        &self.peer
    }

    /// At a client, the description of the destination's workload from the answer, which is not authenticated. `None` at a
    /// server: the client's description is in its request.
    pub fn baggage(&self) -> Option<&Baggage> {
        self.baggage.as_deref()
    }

    /// The tunnel as a byte stream, to run another protocol in it.
    pub fn into_stream(self) -> TunnelStream {
        TunnelStream {
            tunnel: self,
            sent: Sizing::new(),
            received: Sizing::new(),
            unread: Bytes::new(),
            closed: false,
        }
    }

    /// The tunnel as the transport of another connection, such as a tunnel connection inside it.
    pub fn into_transport(self) -> TunnelTransport {
        self.into_stream().into_transport()
    }

    /// Signals to the other side that the application's connection failed.
    ///
    /// RFC 9113 §8.5: a TCP connection error is signalled with `CONNECT_ERROR`.
    pub fn reset(mut self) {
        self.send.send_reset(Reason::CONNECT_ERROR);
    }
}

/// An HTTP/2 failure as the error of a byte stream.
pub(crate) fn io_error(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionAborted.into());
    }
    let kind =
        if error.is_reset() { io::ErrorKind::ConnectionReset } else { io::ErrorKind::ConnectionAborted };
    io::Error::new(kind, error)
}

/// Waits until the stream can take another piece: fewer bytes wait than may, and the peer's window is
/// open. A piece may be larger than the window; HTTP/2 then holds its rest.
pub(crate) fn poll_room(send: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
    if send.capacity() == 0 {
        send.reserve_capacity(1);
    }
    while send.capacity() == 0 {
        match ready!(send.poll_capacity(cx)) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }
    Poll::Ready(Ok(()))
}

/// A [`Tunnel`] as a byte stream. Shutdown ends our direction only.
///
/// [`poll_data`](TunnelStream::poll_data), [`poll_ready`](TunnelStream::poll_ready) and [`send`](TunnelStream::send) move
/// whole pieces without a copy; [`AsyncRead`] and [`AsyncWrite`] copy.
#[derive(Debug)]
pub struct TunnelStream {
    tunnel: Tunnel,
    sent: Sizing,
    received: Sizing,
    unread: Bytes,
    closed: bool,
}

impl TunnelStream {
    /// The tunnel as the transport of a protocol that closes it as a whole.
    pub fn into_transport(self) -> TunnelTransport {
        TunnelTransport { stream: self, limit: None }
    }

    /// The tunnel's peer.
    pub fn peer(&self) -> &SpiffeId {
        self.tunnel.peer()
    }

    /// The next piece that arrived; `None` at the end. The sender may replace it as soon as it is returned.
    pub fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        match ready!(self.poll_piece(cx)) {
            Ok(piece) if piece.is_empty() => Poll::Ready(None),
            Ok(piece) => Poll::Ready(Some(self.delivered(piece.len()).map(|()| piece))),
            Err(error) => Poll::Ready(Some(Err(error))),
        }
    }

    /// Waits until [`send`](TunnelStream::send) may be called.
    pub fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        poll_room(&mut self.tunnel.send, cx)
    }

    /// Sends one piece. Pieces above 256 KiB delay other tunnels.
    ///
    /// # Errors
    ///
    /// The peer reset the tunnel, or our direction was shut down.
    pub fn send(&mut self, piece: Bytes) -> io::Result<()> {
        let length = piece.len();
        self.tunnel.send.send_data(piece, false).map_err(io_error)?;
        self.tunnel.lease.record(&mut self.sent, length, Instant::now());
        Ok(())
    }

    /// A piece that is not counted as delivered yet; an empty one is the end.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        if !self.unread.is_empty() {
            return Poll::Ready(Ok(std::mem::take(&mut self.unread)));
        }
        loop {
            match ready!(self.tunnel.recv.poll_data(cx)) {
                Some(Ok(piece)) if piece.is_empty() => {}
                Some(Ok(piece)) => return Poll::Ready(Ok(piece)),
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                None => return Poll::Ready(Ok(Bytes::new())),
            }
        }
    }

    /// Counts delivered bytes and lets the sender replace them.
    fn delivered(&mut self, bytes: usize) -> io::Result<()> {
        self.tunnel.lease.record(&mut self.received, bytes, Instant::now());
        self.tunnel.lease.add_received(bytes);
        self.tunnel.recv.flow_control().release_capacity(bytes).map_err(io_error)
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut piece = ready!(self.poll_piece(cx))?;
        let taken = piece.len().min(buf.remaining());
        buf.put_slice(piece.get(..taken).unwrap_or_default());
        piece.advance(taken);
        self.unread = piece;
        if taken > 0 {
            self.delivered(taken)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let total: usize = bufs.iter().map(|buf| buf.len()).sum();
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        ready!(self.poll_ready(cx))?;
        let piece = gather(bufs, total.min(PIECE));
        let length = piece.len();
        self.send(piece)?;
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's task writes as soon as it can.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.closed {
            self.closed = true;
            self.tunnel.send.send_data(Bytes::new(), true).map_err(io_error)?;
        }
        Poll::Ready(Ok(()))
    }
}

/// The first `length` bytes of `bufs` in one piece, in memory of the worker.
fn gather(bufs: &[IoSlice<'_>], length: usize) -> Bytes {
    let tier = match length {
        ..=1024 => Tier::Idle,
        1025..=16_384 => Tier::Steady,
        _ => Tier::Bulk,
    };
    let mut buffer = buffers::take(tier);
    let mut left = length;
    for buf in bufs {
        let part = buf.get(..left).unwrap_or(buf);
        buffer.put_slice(part);
        left -= part.len();
    }
    let piece = buffer.split().freeze();
    buffers::give_back(tier, buffer, None);
    piece
}

/// A [`TunnelStream`] that carries another connection and is closed as a whole: shutdown also waits for the peer's end,
/// at most `LINGER`. If it were dropped right after its own end, HTTP/2 would send a reset that overtakes that.
#[derive(Debug)]
pub struct TunnelTransport {
    stream: TunnelStream,
    limit: Option<Pin<Box<Sleep>>>,
}

/// How long a peer may take to answer an end with its own.
const LINGER: Duration = Duration::from_secs(2);

impl AsyncRead for TunnelTransport {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TunnelTransport {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let TunnelTransport { stream, limit } = &mut *self;
        ready!(Pin::new(&mut *stream).poll_shutdown(cx))?;
        let limit = limit.get_or_insert_with(|| Box::pin(sleep(LINGER)));
        loop {
            match stream.tunnel.recv.poll_data(cx) {
                Poll::Ready(Some(Ok(data))) => {
                    stream.tunnel.recv.flow_control().release_capacity(data.len()).map_err(io_error)?;
                }
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => return limit.as_mut().poll(cx).map(Ok),
            }
        }
    }
}
