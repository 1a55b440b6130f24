//! An open tunnel: one HTTP/2 stream, both directions.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use ambit_identity::SpiffeId;
use ambit_net::relay::{Tier, buffers};
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
    peer: SpiffeId,
    /// Boxed: a tunnel at rest is to be small.
    baggage: Option<Box<Baggage>>,
}

impl Tunnel {
    pub(crate) fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        lease: Lease,
        peer: SpiffeId,
        baggage: Option<Baggage>,
    ) -> Tunnel {
        Tunnel { send, recv, lease, peer, baggage: baggage.map(Box::new) }
    }

    /// The other proxy's verified identity: at a client the destination's, at a server the client's.
    pub fn peer(&self) -> &SpiffeId {
        &self.peer
    }

    /// At a client, what the answer said about the destination's workload; not authenticated. At a
    /// server, nothing: the client's is in its request.
    pub fn baggage(&self) -> Option<&Baggage> {
        self.baggage.as_deref()
    }

    /// The tunnel as a byte stream, to run another protocol in it.
    pub fn into_stream(self) -> TunnelStream {
        TunnelStream { tunnel: self, received: Bytes::new(), closed: false }
    }

    /// Tells the other side that the application's connection failed.
    ///
    /// RFC 9113 §8.5: a TCP connection error is signalled with `CONNECT_ERROR`.
    pub fn reset(mut self) {
        self.send.send_reset(Reason::CONNECT_ERROR);
    }
}

/// What an HTTP/2 failure means to somebody who reads or writes bytes.
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

/// A [`Tunnel`] read and written as bytes. Shutdown ends our direction only.
#[derive(Debug)]
pub struct TunnelStream {
    tunnel: Tunnel,
    received: Bytes,
    closed: bool,
}

impl TunnelStream {
    /// The tunnel's peer.
    pub fn peer(&self) -> &SpiffeId {
        &self.tunnel.peer
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.received.is_empty() {
            match ready!(this.tunnel.recv.poll_data(cx)) {
                Some(Ok(data)) => this.received = data,
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let taken = this.received.len().min(buf.remaining());
        buf.put_slice(this.received.get(..taken).unwrap_or_default());
        this.received.advance(taken);
        this.tunnel.lease.add_received(taken);
        this.tunnel.recv.flow_control().release_capacity(taken).map_err(io_error)?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(poll_room(&mut self.tunnel.send, cx))?;
        let piece = buf.get(..PIECE).unwrap_or(buf);
        let tier = match piece.len() {
            ..=1024 => Tier::Idle,
            1025..=16_384 => Tier::Steady,
            _ => Tier::Bulk,
        };
        let mut buffer = buffers::take(tier);
        buffer.put_slice(piece);
        let data = buffer.split().freeze();
        buffers::give_back(tier, buffer, None);
        self.tunnel.send.send_data(data, false).map_err(io_error)?;
        Poll::Ready(Ok(piece.len()))
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

/// A [`TunnelStream`] that is closed as a whole: shutdown also waits for the peer's end, at most
/// [`LINGER`]. Dropped right after its own end, HTTP/2 would send a reset that overtakes it.
#[derive(Debug)]
pub(crate) struct Lingering {
    stream: TunnelStream,
    limit: Option<Pin<Box<Sleep>>>,
}

/// How long a peer may take to answer an end with its own.
const LINGER: Duration = Duration::from_secs(2);

impl Lingering {
    pub(crate) fn new(stream: TunnelStream) -> Lingering {
        Lingering { stream, limit: None }
    }
}

impl AsyncRead for Lingering {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Lingering {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Lingering { stream, limit } = &mut *self;
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
