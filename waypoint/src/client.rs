//! A client's byte stream, whether it comes through a tunnel of the mesh or from outside.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use ambit_hbone::{TunnelStream, TunnelTransport};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};
use tokio_rustls::server::TlsStream;

use crate::io::ReadAhead;

/// How long a client may take to answer an end with its own.
const LINGER: Duration = Duration::from_secs(2);

/// A client's byte stream, closed as a whole: shutdown also waits for the client's end, for a short time.
#[derive(Debug)]
pub enum Client {
    /// Through HBONE.
    Tunnel(TunnelTransport),
    /// From outside the mesh.
    Plain(Lingering<TcpStream>),
    /// From outside the mesh, with TLS that ends here.
    Tls(Box<Lingering<TlsStream<ReadAhead<TcpStream>>>>),
}

impl Client {
    /// The stream of a tunnel.
    pub fn tunnel(stream: TunnelStream) -> Self {
        Self::Tunnel(stream.into_transport())
    }

    /// A connection from outside the mesh.
    pub fn plain(stream: TcpStream) -> Self {
        Self::Plain(Lingering { io: stream, limit: None, is_shut_down: false })
    }

    /// A connection from outside the mesh after its handshake.
    pub fn tls(stream: TlsStream<ReadAhead<TcpStream>>) -> Self {
        Self::Tls(Box::new(Lingering { io: stream, limit: None, is_shut_down: false }))
    }
}

/// A stream whose shutdown waits for the peer's end. If it were closed with bytes unread, TCP would send a reset, which
/// overtakes what was written last.
#[derive(Debug)]
pub struct Lingering<IO> {
    io: IO,
    limit: Option<Pin<Box<Sleep>>>,
    /// Whether our own end was written.
    is_shut_down: bool,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Lingering<IO> {
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let limit = self.limit.get_or_insert_with(|| Box::pin(sleep(LINGER)));
        if !self.is_shut_down {
            // A client that takes nothing is not waited for longer either: the end of TLS has to be written.
            match Pin::new(&mut self.io).poll_shutdown(cx) {
                Poll::Ready(outcome) => outcome?,
                Poll::Pending => return limit.as_mut().poll(cx).map(Ok),
            }
            self.is_shut_down = true;
        }
        let mut unwanted = [0; 1024];
        loop {
            let mut buffer = ReadBuf::new(&mut unwanted);
            match Pin::new(&mut self.io).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => break,
            }
            // A client that sends without end is not waited for longer.
            if limit.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
        }
        limit.as_mut().poll(cx).map(Ok)
    }
}

macro_rules! each {
    ($self:ident, $io:ident => $call:expr) => {
        match $self.get_mut() {
            Client::Tunnel($io) => $call,
            Client::Plain(Lingering { io: $io, .. }) => $call,
            Client::Tls(tls) => {
                let $io = &mut tls.io;
                $call
            }
        }
    };
}

impl AsyncRead for Client {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_read(cx, buf))
    }
}

impl AsyncWrite for Client {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, io => Pin::new(io).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tunnel(io) => Pin::new(io).poll_shutdown(cx),
            Self::Plain(io) => io.poll_close(cx),
            Self::Tls(io) => io.poll_close(cx),
        }
    }
}
