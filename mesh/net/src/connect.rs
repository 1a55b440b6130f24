//! Connections out of a pod's namespace, from its own or from a foreign source address.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use socket2::Socket;
use tokio::net::{TcpSocket, TcpStream};

use crate::netns::NetnsError;
use crate::socket::{Family, stay_local};
use crate::stock::SocketStock;

/// Why a connection could not be made. In every case no byte was sent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No socket could be had in the namespace.
    #[error("connect to {destination}: {source}")]
    Namespace {
        /// Where the connection was to go.
        destination: SocketAddr,
        /// What the namespace said.
        source: NetnsError,
    },
    /// The source address could not be taken.
    #[error("connect to {destination}: bind to source {address}: {source}")]
    Bind {
        /// Where the connection was to go.
        destination: SocketAddr,
        /// The source that was asked for.
        address: IpAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The peer, or the way to it, refused.
    #[error("connect to {destination}: {source}")]
    Refused {
        /// Where the connection was to go.
        destination: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// No answer in time.
    #[error("connect to {destination}: no answer within {limit:?}")]
    TimedOut {
        /// Where the connection was to go.
        destination: SocketAddr,
        /// The time that was allowed.
        limit: Duration,
    },
}

/// Connects to `destination` with a socket of `stock`, on the calling worker's runtime. `source`, when
/// given, becomes the connection's source address; it need not be local if the stock bears a mark.
///
/// # Errors
/// See [`ConnectError`]; a `source` of another family than `destination` fails as `Bind`.
pub async fn connect(
    stock: &SocketStock,
    source: Option<IpAddr>,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    let socket = take(stock, destination).await?;
    connect_with(socket, source, destination, limit).await
}

/// As [`connect`], to a `destination` in the namespace of `stock` itself.
///
/// # Errors
/// As [`connect`].
pub async fn connect_local(
    stock: &SocketStock,
    source: Option<IpAddr>,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    let socket = take(stock, destination).await?;
    if let Err(error) = stay_local(&socket) {
        tracing::debug!(%error, %destination, "a local connection keeps the system's congestion control");
    }
    connect_with(socket, source, destination, limit).await
}

async fn take(stock: &SocketStock, destination: SocketAddr) -> Result<Socket, ConnectError> {
    let family = Family::of(destination.ip());
    stock.take(family).await.map_err(|source| ConnectError::Namespace { destination, source })
}

async fn connect_with(
    socket: Socket,
    source: Option<IpAddr>,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    let socket = TcpSocket::from_std_stream(socket.into());
    if let Some(address) = source {
        socket.bind(SocketAddr::new(address, 0)).map_err(|source| ConnectError::Bind {
            destination,
            address,
            source,
        })?;
    }
    match tokio::time::timeout(limit, socket.connect(destination)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(ConnectError::Refused { destination, source }),
        Err(_) => Err(ConnectError::TimedOut { destination, limit }),
    }
}
