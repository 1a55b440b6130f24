//! The header of the PROXY protocol that a load balancer puts before a client's bytes: who the client is (versions 1 and 2).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use ppp::{HeaderResult, PartialResult, v1, v2};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Bytes that a header may have. Those of load balancers have less than 300, additional fields included.
const MOST: usize = 4096;
/// What a header of version 1 begins with.
const TEXT: &[u8] = b"PROXY ";
/// Its longest form, the end of its line included (specification, section 2.1).
const LONGEST_TEXT: usize = 107;
/// Bytes looked at at once.
const LOOK: usize = 512;

/// Why a connection has no client.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It broke, ended, or did not bring the header in time.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What it begins with is no header.
    #[error("it does not begin with a header of the PROXY protocol")]
    Malformed,
}

/// Reads the header of a connection and not a byte of what follows. `None` for one that is about the load balancer itself, as its health
/// checks.
///
/// # Errors
/// [`HeaderError`].
pub async fn read(stream: &mut TcpStream, limit: Duration) -> Result<Option<SocketAddr>, HeaderError> {
    let reading = timeout(limit, read_header(stream)).await;
    reading.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}

async fn read_header(stream: &mut TcpStream) -> Result<Option<SocketAddr>, HeaderError> {
    let mut header = Vec::with_capacity(LOOK);
    loop {
        let known = header.len();
        header.resize(known + LOOK, 0);
        let seen = stream.peek(header.get_mut(known..).unwrap_or_default()).await?;
        if seen == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        header.truncate(known + seen);
        let (taken, client) = match parse(&header) {
            Parsed::Header { length, client } => (length.saturating_sub(known), Some(client)),
            Parsed::Incomplete if header.len() < MOST => (seen, None),
            Parsed::Incomplete | Parsed::Malformed => return Err(HeaderError::Malformed),
        };
        let taken = header.get_mut(known..known + taken).ok_or(HeaderError::Malformed)?;
        stream.read_exact(taken).await?;
        if let Some(client) = client {
            return Ok(client);
        }
    }
}

/// What bytes begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parsed {
    /// A header.
    Header {
        /// Its length.
        length: usize,
        /// The client, if it names one.
        client: Option<SocketAddr>,
    },
    /// There are too few.
    Incomplete,
    /// Something else.
    Malformed,
}

/// Reads the first bytes of a connection.
pub fn parse(bytes: &[u8]) -> Parsed {
    // The library takes some beginnings of a text header for malformed.
    let is_text = bytes.starts_with(TEXT) || TEXT.starts_with(bytes);
    if is_text && bytes.len() < LONGEST_TEXT && !bytes.contains(&b'\n') {
        return Parsed::Incomplete;
    }
    let parsed = HeaderResult::parse(bytes);
    if parsed.is_incomplete() {
        return Parsed::Incomplete;
    }
    match parsed {
        HeaderResult::V1(Ok(header)) => {
            let client = match header.addresses {
                v1::Addresses::Tcp4(of) => Some((of.source_address, of.source_port).into()),
                v1::Addresses::Tcp6(of) => Some((of.source_address, of.source_port).into()),
                v1::Addresses::Unknown => None,
            };
            Parsed::Header { length: header.header.len(), client }
        }
        HeaderResult::V2(Ok(header)) => {
            let client = match (header.command, header.addresses) {
                (v2::Command::Proxy, v2::Addresses::IPv4(of)) => {
                    Some((of.source_address, of.source_port).into())
                }
                (v2::Command::Proxy, v2::Addresses::IPv6(of)) => {
                    Some((of.source_address, of.source_port).into())
                }
                // Specification, section 2.2: LOCAL stands for the sender itself, and other families for nobody known.
                (v2::Command::Proxy | v2::Command::Local, _) => None,
            };
            Parsed::Header { length: header.len(), client }
        }
        HeaderResult::V1(Err(_)) | HeaderResult::V2(Err(_)) => Parsed::Malformed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &[u8] = b"PROXY TCP4 192.0.2.1 198.51.100.1 4711 80\r\n";

    fn v2(command: v2::Command, addresses: impl Into<v2::Addresses>) -> Vec<u8> {
        let builder =
            v2::Builder::with_addresses(v2::Version::Two | command, v2::Protocol::Stream, addresses);
        builder.write_tlv(v2::Type::NoOp, &[0; 40]).unwrap().build().unwrap()
    }

    fn of(bytes: &[u8], client: Option<&str>) -> Parsed {
        Parsed::Header { length: bytes.len(), client: client.map(|text| text.parse().unwrap()) }
    }

    #[test]
    fn headers_of_both_versions_say_who_the_client_is() {
        let [one, other]: [SocketAddr; 2] =
            ["[2001:db8::1]:4711", "[2001:db8::2]:80"].map(|text| text.parse().unwrap());
        let binary = v2(v2::Command::Proxy, (one, other));
        let local = v2(v2::Command::Local, (one, other));
        for (header, client) in [
            (V1, Some("192.0.2.1:4711")),
            (b"PROXY TCP6 2001:db8::1 2001:db8::2 4711 80\r\n", Some("[2001:db8::1]:4711")),
            (b"PROXY UNKNOWN\r\n", None),
            (&binary, Some("[2001:db8::1]:4711")),
            (&local, None),
        ] {
            assert_eq!(parse(header), of(header, client));
            let followed = [header, b"GET / HTTP/1.1\r\n"].concat();
            assert_eq!(parse(&followed), of(header, client));
            for end in 1..header.len() {
                assert_eq!(parse(&header[..end]), Parsed::Incomplete, "{end} of {header:?}");
            }
        }
    }

    #[test]
    fn other_beginnings_are_no_header() {
        for bytes in [
            &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..],
            b"\x16\x03\x01\x02\x00\x01\x00\x01",
            b"PROXY TCP4 192.0.2.1 198.51.100.1 4711 http\r\n",
            b"PROXY TCP4 192.0.2.1000 198.51.100.1 4711 80\r\n",
            b"PROXY UDP4 192.0.2.1 198.51.100.1 4711 80\r\n",
        ] {
            assert_eq!(parse(bytes), Parsed::Malformed, "{}", String::from_utf8_lossy(bytes));
        }
        let endless = [b"PROXY UNKNOWN ", &[b'a'; 200][..]].concat();
        assert_eq!(parse(&endless), Parsed::Malformed);
    }
}
