//! TLS connections for the control plane's gRPC server: handshakes side by side, each with an end.
//!
//! A client that is slow or hostile in its handshake holds up nobody: handshakes run in tasks of their own, a
//! bounded number at a time. Failed ones are logged and never reach the server.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes at once; further connections wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 512;
/// Pause after a failed accept, as when descriptors have run out.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// The accepted connections of `listener`, for tonic's `serve_with_incoming`.
pub fn incoming(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
) -> impl Stream<Item = Result<ServedConnection, Infallible>> + Send + 'static {
    let acceptor = TlsAcceptor::from(tls);
    stream::unfold(listener, async |listener| Some((accept(&listener).await, listener)))
        .map(move |socket| tokio::spawn(handshake(acceptor.clone(), socket)))
        .buffer_unordered(MAX_HANDSHAKES)
        .filter_map(async |ended| match ended {
            Ok(connection) => connection.map(Ok),
            Err(error) => {
                tracing::error!(%error, "handshake ended abnormally");
                None
            }
        })
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => return socket,
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

async fn handshake(acceptor: TlsAcceptor, socket: TcpStream) -> Option<ServedConnection> {
    let peer = socket.peer_addr().ok();
    let outcome = async {
        socket.set_nodelay(true)?;
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(socket)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    };
    match outcome.await {
        Ok(stream) => Some(ServedConnection(stream)),
        Err(error) => {
            tracing::debug!(?peer, %error, "TLS handshake failed");
            None
        }
    }
}

/// A TLS connection that gives tonic its addresses.
#[derive(Debug)]
pub struct ServedConnection(TlsStream<TcpStream>);

impl Connected for ServedConnection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.0.get_ref().0.connect_info()
    }
}

impl AsyncRead for ServedConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl AsyncWrite for ServedConnection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
