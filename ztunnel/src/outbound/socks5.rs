//! The SOCKS5 outbound listener's protocol: greeting, request, reply (RFC 1928).
//!
//! Only CONNECT without authentication: the listener is on the pod's loopback and the pod is its own
//! authority. What the request leads to is `outbound`'s business, as for a captured connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_ACCEPTABLE_METHOD: u8 = 0xFF;
const CONNECT: u8 = 1;

/// Where the client wants to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An address.
    Address(SocketAddr),
    /// A name to be looked up, and a port.
    Name(String, u16),
}

/// What goes back to the client (RFC 1928, section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Reply {
    /// The connection is open.
    Succeeded = 0,
    /// Something failed on our side.
    GeneralFailure = 1,
    /// Policy forbids it.
    NotAllowed = 2,
    /// The name or address is unknown.
    HostUnreachable = 4,
    /// The destination refused.
    ConnectionRefused = 5,
    /// Not CONNECT.
    CommandNotSupported = 7,
    /// An address type that doesn't exist.
    AddressTypeNotSupported = 8,
}

/// Why a client's handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum Socks5Error {
    /// The connection ended or broke.
    #[error("the SOCKS5 client went away")]
    Io(#[from] io::Error),
    /// Another version, or not SOCKS at all.
    #[error("SOCKS version {0} is not 5")]
    Version(u8),
    /// The client insists on authentication.
    #[error("the SOCKS5 client offers no method without authentication")]
    Methods,
    /// BIND and UDP ASSOCIATE are not offered.
    #[error("SOCKS5 command {0} is not CONNECT")]
    Command(u8),
    /// An address type that doesn't exist.
    #[error("SOCKS5 address type {0} is unknown")]
    AddressType(u8),
    /// A name that is no UTF-8.
    #[error("the SOCKS5 target's name is not UTF-8")]
    Name,
}

impl Socks5Error {
    /// The reply to the client, if the protocol got far enough to have one.
    fn reply(&self) -> Option<Reply> {
        match self {
            Self::Io(_) | Self::Version(_) | Self::Methods => None,
            Self::Command(_) => Some(Reply::CommandNotSupported),
            Self::AddressType(_) => Some(Reply::AddressTypeNotSupported),
            Self::Name => Some(Reply::HostUnreachable),
        }
    }
}

/// Reads greeting and request; the caller bounds its time and sends the [`Reply`] with [`answer`].
///
/// Never reads past the request: what follows belongs to the connection.
///
/// # Errors
/// [`Socks5Error`]; the reply was already sent if the protocol has one for it.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<Target, Socks5Error> {
    greet(stream).await?;
    match request(stream).await {
        Ok(target) => Ok(target),
        Err(error) => {
            if let Some(reply) = error.reply() {
                answer(stream, reply).await?;
            }
            Err(error)
        }
    }
}

/// Sends the reply to the request, without the bound address, which clients do not use.
///
/// # Errors
/// The write's.
pub async fn answer<S: AsyncWrite + Unpin>(stream: &mut S, reply: Reply) -> io::Result<()> {
    stream.write_all(&[VERSION, reply as u8, 0, 1, 0, 0, 0, 0, 0, 0]).await
}

async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<(), Socks5Error> {
    let version = stream.read_u8().await?;
    if version != VERSION {
        return Err(Socks5Error::Version(version));
    }
    let count = usize::from(stream.read_u8().await?);
    let mut methods = [0; 255];
    let methods = methods.get_mut(..count).ok_or(Socks5Error::Methods)?;
    stream.read_exact(methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        stream.write_all(&[VERSION, NO_ACCEPTABLE_METHOD]).await?;
        return Err(Socks5Error::Methods);
    }
    Ok(stream.write_all(&[VERSION, NO_AUTHENTICATION]).await?)
}

async fn request<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Target, Socks5Error> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let [version, command, _reserved, address_type] = head;
    if version != VERSION {
        return Err(Socks5Error::Version(version));
    }
    if command != CONNECT {
        return Err(Socks5Error::Command(command));
    }
    let address = |ip: IpAddr, port| Ok(Target::Address(SocketAddr::new(ip.to_canonical(), port)));
    match address_type {
        1 => {
            let ip = Ipv4Addr::from_bits(stream.read_u32().await?);
            address(ip.into(), stream.read_u16().await?)
        }
        4 => {
            let ip = Ipv6Addr::from_bits(stream.read_u128().await?);
            address(ip.into(), stream.read_u16().await?)
        }
        3 => {
            let mut name = vec![0; usize::from(stream.read_u8().await?)];
            stream.read_exact(&mut name).await?;
            let port = stream.read_u16().await?;
            let name = String::from_utf8(name).map_err(|_| Socks5Error::Name)?;
            match name.parse::<IpAddr>() {
                Ok(ip) => address(ip, port),
                Err(_) => Ok(Target::Name(name, port)),
            }
        }
        other => Err(Socks5Error::AddressType(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn exchange(sent: &[u8]) -> (Result<Target, Socks5Error>, Vec<u8>) {
        let (mut client, mut server) = tokio::io::duplex(1024);
        client.write_all(sent).await.unwrap();
        client.shutdown().await.unwrap();
        let result = accept(&mut server).await;
        drop(server);
        let mut answered = Vec::new();
        client.read_to_end(&mut answered).await.unwrap();
        (result, answered)
    }

    #[tokio::test]
    async fn a_connect_request_yields_its_target_in_all_three_forms() {
        let (target, answered) = exchange(b"\x05\x01\x00\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50").await;
        assert_eq!(target.unwrap(), Target::Address("10.0.0.1:80".parse().unwrap()));
        assert_eq!(answered, b"\x05\x00");
        let (target, _) = exchange(b"\x05\x02\x02\x00\x05\x01\x00\x03\x07reviews\x23\x78").await;
        assert_eq!(target.unwrap(), Target::Name("reviews".into(), 9080));
        let (target, _) = exchange(b"\x05\x01\x00\x05\x01\x00\x03\x0810.0.0.2\x00\x01").await;
        assert_eq!(target.unwrap(), Target::Address("10.0.0.2:1".parse().unwrap()));
        let v6 = b"\x05\x01\x00\x05\x01\x00\x04\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x00\x50";
        assert_eq!(exchange(v6).await.0.unwrap(), Target::Address("[fd00::1]:80".parse().unwrap()));
    }

    #[tokio::test]
    async fn what_is_not_offered_is_refused_in_the_protocols_words() {
        let (error, answered) = exchange(b"\x05\x01\x02").await;
        assert!(matches!(error, Err(Socks5Error::Methods)));
        assert_eq!(answered, b"\x05\xff");
        let (error, answered) = exchange(b"\x05\x01\x00\x05\x03\x00\x01\x0a\x00\x00\x01\x00\x50").await;
        assert!(matches!(error, Err(Socks5Error::Command(3))));
        assert_eq!(answered, b"\x05\x00\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00");
        let (error, answered) = exchange(b"\x05\x01\x00\x05\x01\x00\x09").await;
        assert!(matches!(error, Err(Socks5Error::AddressType(9))));
        assert_eq!(answered.get(3), Some(&8));
        assert!(matches!(exchange(b"GET / HTTP/1.1").await.0, Err(Socks5Error::Version(b'G'))));
        assert!(matches!(exchange(b"\x05\x01\x00\x05\x01").await.0, Err(Socks5Error::Io(_))));
    }
}
