//! TLS 1.3 of the tunnel: rustls makes the handshake and derives the keys, this moves the records.
//!
//! rustls' own stream takes one receive call a record, and copies each twice after it was opened: with bulk in a tunnel
//! a good part of all its time. So records are moved here, by the interface that rustls has for kernels that do the same
//! (`rustls::kernel`). Nothing here decides whom to trust.

mod buffers;
mod handshake;
mod message;
mod record;
mod stream;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use ambit_identity::unnamed_server;
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};

pub(crate) use buffers::trim;
use handshake::Session;
pub use message::{Message, Peer, read as read_message};
pub use record::{MAX_PLAIN, MAX_SEALED, Opened, Opener, RecordError, Sealer, complete};
pub(crate) use stream::TlsStream;

/// The dialling side's handshake, and what `check` makes of the peer; nothing was sent to it yet but the handshake.
///
/// # Errors
///
/// What is wrong with the handshake is `InvalidData`; the rest is the connection's.
pub(crate) async fn connect<IO, T>(
    io: IO,
    config: Arc<ClientConfig>,
    check: impl FnOnce(&CommonState) -> T,
) -> io::Result<(TlsStream<IO>, T)>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let session = UnbufferedClientConnection::new(config, unnamed_server()).map_err(invalid)?;
    establish(io, session, |session| check(session)).await
}

/// The accepting side's. As [`connect`].
///
/// # Errors
///
/// As [`connect`].
pub(crate) async fn accept<IO, T>(
    io: IO,
    config: Arc<ServerConfig>,
    check: impl FnOnce(&CommonState) -> T,
) -> io::Result<(TlsStream<IO>, T)>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let session = UnbufferedServerConnection::new(config).map_err(invalid)?;
    establish(io, session, |session| check(session)).await
}

async fn establish<IO, S, T>(
    mut io: IO,
    mut session: S,
    check: impl FnOnce(&S) -> T,
) -> io::Result<(TlsStream<IO>, T)>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    S: Session,
{
    let leftover = handshake::run(&mut io, &mut session).await?;
    let checked = check(&session);
    let (secrets, keys) = session.into_keys().map_err(invalid)?;
    let stream = TlsStream::new(io, secrets, keys, leftover).map_err(invalid)?;
    Ok((stream, checked))
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
