//! TLS 1.3 over any stream of bytes: rustls performs the handshake and derives the keys, this crate moves the records.
//!
//! rustls' own stream makes one receive call per record and copies each record twice after decrypting it, which dominates
//! the cost of a bulk transfer. This crate takes the keys through the interface that rustls has for kernel TLS
//! (`rustls::kernel`) and processes the records itself.
//!
//! - [`connect`], [`FirstBytes`] and [`accept`]: the handshake, which yields a [`TlsStream`];
//! - [`Sealer`], [`Opener`], [`complete`], [`read_message`]: the record layer without I/O, public for its fuzz target.
//!
//! `ambit-hbone` is the main user. Whom to trust is decided by the verifiers in the rustls configurations.

mod buffers;
mod handshake;
mod message;
mod record;
mod stream;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::{ClientConfig, CommonState, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

pub use buffers::trim;
use handshake::Session;
pub use message::{Message, Peer, read as read_message};
pub use record::{MAX_PLAIN, MAX_SEALED, Opened, Opener, RecordError, Sealer, complete};
pub use stream::TlsStream;

/// Performs the client's handshake over `io`, and calls `check` on the session when it is complete.
///
/// `check` runs before any application data is sent. The caller bounds the time.
///
/// # Errors
///
/// A failed handshake is `InvalidData` around the [`rustls::Error`]; other errors are those of `io`.
pub async fn connect<IO, T>(
    io: IO,
    config: Arc<ClientConfig>,
    server: ServerName<'static>,
    check: impl FnOnce(&CommonState) -> T,
) -> io::Result<(TlsStream<IO>, T)>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let session = UnbufferedClientConnection::new(config, server).map_err(invalid)?;
    establish(io, session, Vec::new(), |session| check(session)).await
}

/// What a client sent first, read before anything is allocated for its handshake, so that a client that sends nothing
/// costs little and can be given up early.
#[derive(Debug)]
pub struct FirstBytes(Vec<u8>);

impl FirstBytes {
    /// Waits for the first bytes. The caller bounds the time.
    ///
    /// # Errors
    ///
    /// Those of `io`; its end is `UnexpectedEof`.
    pub async fn read<IO: AsyncRead + Unpin>(io: &mut IO) -> io::Result<FirstBytes> {
        let mut first = [0; 1];
        io.read_exact(&mut first).await?;
        let mut bytes = Vec::with_capacity(handshake::ROOM);
        bytes.extend(first);
        Ok(FirstBytes(bytes))
    }
}

/// Performs the server's handshake over `io`, whose first bytes are `first`, and calls `check` on the session when it
/// is complete.
///
/// # Errors
///
/// As [`connect`].
pub async fn accept<IO, T>(
    io: IO,
    first: FirstBytes,
    config: Arc<ServerConfig>,
    check: impl FnOnce(&CommonState) -> T,
) -> io::Result<(TlsStream<IO>, T)>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let session = UnbufferedServerConnection::new(config).map_err(invalid)?;
    establish(io, session, first.0, |session| check(session)).await
}

async fn establish<IO, S, T>(
    mut io: IO,
    mut session: S,
    received: Vec<u8>,
    check: impl FnOnce(&S) -> T,
) -> io::Result<(TlsStream<IO>, T)>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    S: Session,
{
    let leftover = handshake::run(&mut io, &mut session, received).await?;
    let checked = check(&session);
    let (secrets, keys) = session.into_keys().map_err(invalid)?;
    let stream = TlsStream::new(io, secrets, keys, leftover).map_err(invalid)?;
    Ok((stream, checked))
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
