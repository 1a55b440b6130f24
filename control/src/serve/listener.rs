//! The TLS port: accepts, shakes hands within limits, and hands connections to gRPC.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// A TLS handshake must be through by then.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at the same time; further connections wait in the kernel's queue.
const HANDSHAKES: usize = 256;
/// Connections with a finished handshake that wait for gRPC.
const ACCEPTED: usize = 64;
/// Pause after a failed accept, as when file descriptors have run out.
const PAUSE: Duration = Duration::from_millis(50);

/// Live counters of the port.
#[derive(Debug, Default)]
pub struct ListenerMetrics {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Accepts that failed.
    pub accept_failures: AtomicU64,
    /// Handshakes that failed or took too long.
    pub handshake_failures: AtomicU64,
}

/// Connections ready for gRPC.
pub type Incoming = ReceiverStream<io::Result<Connection>>;

/// Accepts connections; the future returned does the work and ends when nobody takes connections any more.
pub fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    metrics: Arc<ListenerMetrics>,
) -> (Incoming, impl Future<Output = ()> + Send + 'static) {
    let (out, connections) = mpsc::channel(ACCEPTED);
    (ReceiverStream::new(connections), run(listener, TlsAcceptor::from(tls), metrics, out))
}

async fn run(
    listener: TcpListener,
    tls: TlsAcceptor,
    metrics: Arc<ListenerMetrics>,
    out: mpsc::Sender<io::Result<Connection>>,
) {
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    let mut handshakes = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = out.closed() => return,
        };
        while let Some(ended) = handshakes.try_join_next() {
            if let Err(error) = ended {
                tracing::error!(%error, "a handshake's task died");
            }
        }
        match accepted {
            Ok((stream, peer)) => {
                metrics.accepted.fetch_add(1, Ordering::Relaxed);
                let (tls, metrics, out) = (tls.clone(), metrics.clone(), out.clone());
                handshakes.spawn(async move {
                    if let Some(connection) = shake_hands(stream, peer, tls, &metrics).await {
                        // Nobody takes connections any more: the peer sees it closed.
                        drop(out.send(Ok(connection)).await);
                    }
                    drop(place);
                });
            }
            Err(error) => {
                metrics.accept_failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn shake_hands(
    stream: TcpStream,
    peer: SocketAddr,
    tls: TlsAcceptor,
    metrics: &ListenerMetrics,
) -> Option<Connection> {
    // Small answers must not wait for acknowledgements of others.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "cannot set TCP_NODELAY");
    }
    let local = stream.local_addr().ok();
    let failure = match tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await {
        Ok(Ok(stream)) => {
            let info = TcpConnectInfo { local_addr: local, remote_addr: Some(peer) };
            return Some(Connection { stream, info });
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("not finished within {HANDSHAKE:?}"),
    };
    metrics.handshake_failures.fetch_add(1, Ordering::Relaxed);
    tracing::debug!(%peer, failure, "TLS handshake failed");
    None
}

/// A connection after its handshake.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    info: TcpConnectInfo,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.info.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
