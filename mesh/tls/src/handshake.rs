//! Drives rustls through the handshake, and extracts what the record layer needs.

use std::io;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::invalid;
use crate::message::Peer;
use crate::record::RecordError;

/// First room for what the peer sends; most handshakes fit.
pub(crate) const ROOM: usize = 4 * 1024;
/// The most that may wait for the rest of a handshake message, which is 64 KiB at most, and a record.
const MOST: usize = 96 * 1024;

/// The part of a session that outlives the handshake: it derives the next secrets.
pub(crate) enum Keys {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Keys {
    pub(crate) fn peer(&self) -> Peer {
        match self {
            Keys::Client(_) => Peer::Server,
            Keys::Server(_) => Peer::Client,
        }
    }

    pub(crate) fn next_sending(&mut self) -> Result<(u64, ConnectionTrafficSecrets), RecordError> {
        match self {
            Keys::Client(session) => session.update_tx_secret(),
            Keys::Server(session) => session.update_tx_secret(),
        }
        .map_err(|_| RecordError::Secrets)
    }

    pub(crate) fn next_receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), RecordError> {
        match self {
            Keys::Client(session) => session.update_rx_secret(),
            Keys::Server(session) => session.update_rx_secret(),
        }
        .map_err(|_| RecordError::Secrets)
    }
}

/// The common interface of client and server sessions.
pub(crate) trait Session: Sized {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn into_keys(self) -> Result<(ExtractedSecrets, Keys), rustls::Error>;
}

impl Session for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, Keys), rustls::Error> {
        let (secrets, session) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Keys::Client(session)))
    }
}

impl Session for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, Keys), rustls::Error> {
        let (secrets, session) = self.dangerous_into_kernel_connection()?;
        Ok((secrets, Keys::Server(session)))
    }
}

/// Bytes received with the end of the handshake that belong to what follows it.
pub(crate) struct Leftover {
    /// Decrypted by rustls.
    pub(crate) plain: Vec<u8>,
    /// Encrypted records; the last one may be incomplete.
    pub(crate) sealed: Vec<u8>,
}

/// Runs the handshake of `session` over `io` to its end, beginning with `received`, which came from `io` already. The
/// caller bounds the time.
///
/// # Errors
///
/// A failure of the handshake is `InvalidData`, and the peer gets an alert; others are those of `io`.
pub(crate) async fn run<IO, S>(io: &mut IO, session: &mut S, received: Vec<u8>) -> io::Result<Leftover>
where
    IO: AsyncRead + AsyncWrite + Unpin,
    S: Session,
{
    let mut incoming = Incoming { filled: received.len(), bytes: received };
    let mut outgoing = Vec::new();
    let mut plain = Vec::new();
    loop {
        match step(session, &mut incoming, &mut outgoing, &mut plain) {
            Ok(Step::On) => {}
            Ok(Step::Read) => {
                send(io, &mut outgoing).await?;
                incoming.read(io).await?;
            }
            Ok(Step::Done) => {
                send(io, &mut outgoing).await?;
                incoming.bytes.truncate(incoming.filled);
                return Ok(Leftover { plain, sealed: incoming.bytes });
            }
            Err(error) => {
                // One step encodes the alert; another one would process the refused bytes again. Whether the alert arrives
                // does not change what is reported.
                if step(session, &mut incoming, &mut outgoing, &mut plain).is_ok() {
                    let _ = send(io, &mut outgoing).await;
                }
                return Err(invalid(error));
            }
        }
    }
}

async fn send<IO: AsyncWrite + Unpin>(io: &mut IO, outgoing: &mut Vec<u8>) -> io::Result<()> {
    if !outgoing.is_empty() {
        io.write_all(outgoing).await?;
        io.flush().await?;
        outgoing.clear();
    }
    Ok(())
}

struct Incoming {
    /// All of it can be written to; what is filled is in front.
    bytes: Vec<u8>,
    filled: usize,
}

impl Incoming {
    fn discard(&mut self, n: usize) {
        let n = n.min(self.filled);
        self.bytes.copy_within(n..self.filled, 0);
        self.filled -= n;
    }

    async fn read<IO: AsyncRead + Unpin>(&mut self, io: &mut IO) -> io::Result<()> {
        if self.filled == self.bytes.len() {
            if self.filled >= MOST {
                return Err(invalid("a TLS handshake message is too large"));
            }
            self.bytes.resize((self.filled * 2).clamp(ROOM, MOST), 0);
        }
        let room = self.bytes.get_mut(self.filled..).unwrap_or_default();
        match io.read(room).await? {
            0 => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the peer closed the connection during the TLS handshake",
            )),
            n => {
                self.filled += n;
                Ok(())
            }
        }
    }
}

enum Step {
    /// More can be done without the network.
    On,
    /// The peer has to send something.
    Read,
    Done,
}

fn step<S: Session>(
    session: &mut S,
    incoming: &mut Incoming,
    outgoing: &mut Vec<u8>,
    plain: &mut Vec<u8>,
) -> Result<Step, rustls::Error> {
    let filled = incoming.bytes.get_mut(..incoming.filled).unwrap_or_default();
    let UnbufferedStatus { mut discard, state } = session.process(filled);
    let next = match state {
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            encode(&mut data, outgoing)?;
            Ok(Step::On)
        }
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // It is sent before the next read.
            data.done();
            Ok(Step::On)
        }
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                plain.extend_from_slice(record.payload);
            }
            Ok(Step::On)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Read),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Done),
        Ok(_) => Err(rustls::Error::General("the peer ended the connection with its handshake".to_owned())),
        Err(error) => Err(error),
    };
    incoming.discard(discard);
    next
}

fn encode<Data>(data: &mut EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) -> Result<(), rustls::Error> {
    let start = outgoing.len();
    let mut room = 0;
    loop {
        outgoing.resize(start + room, 0);
        match data.encode(outgoing.get_mut(start..).unwrap_or_default()) {
            Ok(written) => {
                outgoing.truncate(start + written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(need)) => room = need.required_size,
            Err(EncodeError::AlreadyEncoded) => {
                return Err(rustls::Error::General("a TLS record was to be encoded twice".to_owned()));
            }
        }
    }
}
