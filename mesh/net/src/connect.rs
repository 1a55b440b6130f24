//! Connections out of a pod's namespace, from its own or from a foreign source address.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use socket2::Socket;
use tokio::net::{TcpSocket, TcpStream};

use crate::netns::NetnsError;
use crate::socket::{Family, choose_port, stay_local};
use crate::stock::SocketStock;

/// Why a connection failed. No byte was sent.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No socket could be created in the namespace.
    #[error("connect to {destination}: {source}")]
    Namespace {
        /// The destination.
        destination: SocketAddr,
        /// The error of the namespace.
        source: NetnsError,
    },
    /// The source address could not be bound.
    #[error("connect to {destination}: bind to source {address}: {source}")]
    Bind {
        /// The destination.
        destination: SocketAddr,
        /// The requested source.
        address: IpAddr,
        /// The error of the system.
        source: io::Error,
    },
    /// The peer, or the network, refused the connection.
    #[error("connect to {destination}: {source}")]
    Refused {
        /// The destination.
        destination: SocketAddr,
        /// The error of the system.
        source: io::Error,
    },
    /// The peer did not answer in time.
    #[error("connect to {destination}: no answer within {limit:?}")]
    TimedOut {
        /// The destination.
        destination: SocketAddr,
        /// The time limit.
        limit: Duration,
    },
}

/// Source ports of clients that [`connect_local`] keeps: those that systems assign to clients (Linux: 32768 to 60999;
/// RFC 6335 §6: 49152 and up). Others stay free for applications of the namespace to listen on.
const EPHEMERAL: RangeInclusive<u16> = 32768..=65535;

/// Connects to `destination` with a socket of `stock`, on the calling worker's runtime, from an address and a port that
/// the kernel chooses.
///
/// # Errors
/// See [`ConnectError`].
pub async fn connect(
    stock: &SocketStock,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    let socket = take(stock, destination).await?;
    connect_with(socket, destination, limit).await
}

/// As [`connect`], from the address `source` if it is of the family of `destination`.
///
/// A marked socket may have a source address that the namespace no longer has; then no answer arrives.
///
/// # Errors
/// See [`ConnectError`].
pub async fn connect_from(
    stock: &SocketStock,
    source: IpAddr,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    let socket = take(stock, destination).await?;
    if source.is_ipv4() == destination.is_ipv4() {
        bind(&socket, SocketAddr::new(source, 0), destination)?;
    }
    connect_with(socket, destination, limit).await
}

/// As [`connect`], to a `destination` in the namespace of `stock` itself, from `source`.
///
/// The connection has the address of `source`, which need not be local if the sockets of the stock are marked. It has the
/// port of `source` too if that is an ephemeral port and free towards `destination`; otherwise the kernel chooses one. With
/// the client's own port, the destination can distinguish the client's connections, and the kernel need not search for a
/// port, which takes long once a client has had many.
///
/// # Errors
/// See [`ConnectError`]; a `source` of another family than `destination` fails as `Bind`.
pub async fn connect_local(
    stock: &SocketStock,
    source: Option<SocketAddr>,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    let Some(source) = source else {
        return connect_with(take_local(stock, destination).await?, destination, limit).await;
    };
    let foreign = SocketAddr::new(source.ip(), 0);
    let mut socket = take_local(stock, destination).await?;
    // A bind would reserve the port in the whole namespace, and for a minute after the connection has ended. A port chosen
    // at connect is in use for this four-tuple only. Kernels before 6.3 ignore our choice and choose a port themselves.
    if EPHEMERAL.contains(&source.port()) && choose_port(&socket, source.port()).is_ok() {
        bind(&socket, foreign, destination)?;
        match connect_with(socket, destination, limit).await {
            // Another connection has it, or has had it until a moment ago.
            Err(ConnectError::Refused { source, .. }) if is_taken(&source) => {}
            ended => return ended,
        }
        socket = take_local(stock, destination).await?;
    }
    bind(&socket, foreign, destination)?;
    connect_with(socket, destination, limit).await
}

fn is_taken(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
}

fn bind(socket: &Socket, source: SocketAddr, destination: SocketAddr) -> Result<(), ConnectError> {
    socket.bind(&source.into()).map_err(|error| ConnectError::Bind {
        destination,
        address: source.ip(),
        source: error,
    })
}

async fn take(stock: &SocketStock, destination: SocketAddr) -> Result<Socket, ConnectError> {
    let family = Family::of(destination.ip());
    stock.take(family).await.map_err(|source| ConnectError::Namespace { destination, source })
}

async fn take_local(stock: &SocketStock, destination: SocketAddr) -> Result<Socket, ConnectError> {
    let socket = take(stock, destination).await?;
    if let Err(error) = stay_local(&socket).and_then(|()| socket.set_reuse_address(true)) {
        tracing::debug!(%error, %destination, "a local connection has not all of its options");
    }
    Ok(socket)
}

async fn connect_with(
    socket: Socket,
    destination: SocketAddr,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    let socket = TcpSocket::from_std_stream(socket.into());
    match tokio::time::timeout(limit, socket.connect(destination)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(ConnectError::Refused { destination, source }),
        Err(_) => Err(ConnectError::TimedOut { destination, limit }),
    }
}
