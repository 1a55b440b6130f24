//! The beginning of a client's TLS, read for the name that it asks for and passed on as it is.

use std::time::Duration;

use ambit_policy::Content;
use bytes::BytesMut;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

/// RFC 8446 §5.1: the type of a record with a handshake.
const HANDSHAKE: u8 = 22;
/// Bytes that a beginning may have. One with several keys and post-quantum shares has a few thousand.
const MOST: usize = 32 << 10;
/// Bytes read at once.
const READ: usize = 4 << 10;

/// What a client's TLS begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientHello {
    /// The name that it asks for, lower case (RFC 6066 §3).
    pub server_name: Option<Box<str>>,
    /// Whether it was understood: one that was not may ask for a name all the same.
    pub is_understood: bool,
}

/// How a connection begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opening {
    /// Nobody has read it, or not far enough.
    Unread,
    /// Not with TLS.
    NoTls,
    /// With TLS.
    Tls(ClientHello),
}

impl Opening {
    /// What its TLS begins with.
    pub fn hello(&self) -> Option<&ClientHello> {
        match self {
            Self::Tls(hello) => Some(hello),
            Self::Unread | Self::NoTls => None,
        }
    }

    /// What policies see of it.
    pub fn content(&self) -> Content<'_> {
        match self {
            Self::Tls(hello) if hello.is_understood => Content::Passed(hello.server_name.as_deref()),
            Self::NoTls => Content::Passed(None),
            Self::Unread | Self::Tls(_) => Content::Unread,
        }
    }
}

/// Reads on until the beginning is whole, or does not come in time; `first` has what was read before and gets the rest.
pub async fn read(stream: &mut (impl AsyncRead + Unpin), first: &mut BytesMut, limit: Duration) -> Opening {
    let reading = async {
        loop {
            match parse(first) {
                Parsed::Hello(hello) => return Opening::Tls(hello),
                Parsed::NoTls => return Opening::NoTls,
                Parsed::Incomplete if first.len() >= MOST => return Opening::Unread,
                Parsed::Incomplete => first.reserve(READ),
            }
            match stream.read_buf(first).await {
                Ok(0) | Err(_) => return Opening::Unread,
                Ok(_) => {}
            }
        }
    };
    timeout(limit, reading).await.unwrap_or(Opening::Unread)
}

/// What bytes are the beginning of.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Of TLS, and its beginning is whole.
    Hello(ClientHello),
    /// Of something else.
    NoTls,
    /// There are too few.
    Incomplete,
}

/// Reads the first bytes of a connection.
pub fn parse(first: &[u8]) -> Parsed {
    match first.first() {
        None => return Parsed::Incomplete,
        Some(&HANDSHAKE) => {}
        Some(_) => return Parsed::NoTls,
    }
    let mut acceptor = Acceptor::default();
    let mut rest = first;
    while !rest.is_empty() {
        match acceptor.read_tls(&mut rest) {
            Ok(0) | Err(_) => return Parsed::NoTls,
            Ok(_) => {}
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let server_name = hello.server_name().map(|name| name.to_ascii_lowercase().into());
                return Parsed::Hello(ClientHello { server_name, is_understood: true });
            }
            Ok(None) => {}
            // What rustls would not serve may still be served by the endpoint; no rule by name is for it.
            Err(_) => return Parsed::Hello(ClientHello { server_name: None, is_understood: false }),
        }
    }
    Parsed::Incomplete
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A beginning of TLS 1.3 that asks for a name.
    fn hello(name: &str) -> Vec<u8> {
        let name_length = u16::try_from(name.len()).unwrap();
        let mut list = vec![0];
        list.extend(name_length.to_be_bytes());
        list.extend(name.as_bytes());
        let mut server_name = u16::try_from(list.len()).unwrap().to_be_bytes().to_vec();
        server_name.extend(list);
        let mut extensions = Vec::new();
        for (kind, body) in [
            (0_u16, server_name),
            // Versions, groups, signatures: one each.
            (43, vec![2, 3, 4]),
            (10, vec![0, 2, 0, 29]),
            (13, vec![0, 2, 4, 3]),
        ] {
            extensions.extend(kind.to_be_bytes());
            extensions.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
            extensions.extend(body);
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([0, 0, 2, 0x13, 1, 1, 0]);
        body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
        body.extend(extensions);
        let mut message = vec![1, 0];
        message.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        message.extend(body);
        let mut record = vec![HANDSHAKE, 3, 1];
        record.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
        record.extend(message);
        record
    }

    #[test]
    fn the_name_is_read_once_the_beginning_is_whole() {
        let whole = hello("A.Example");
        let named = Parsed::Hello(ClientHello { server_name: Some("a.example".into()), is_understood: true });
        assert_eq!(parse(&whole), named);
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), Parsed::Incomplete, "{length}");
        }
        let mut with_more = whole;
        with_more.extend(b"early data");
        assert_eq!(parse(&with_more), named);
    }

    /// A client must not get around a policy by a beginning that is slow or strange.
    #[tokio::test(start_paused = true)]
    async fn what_was_not_read_to_its_end_may_ask_for_any_name() {
        let whole = hello("a.example");
        let limit = Duration::from_secs(1);
        let opening = async |bytes: &[u8], closes: bool| {
            let (mut client, mut server) = tokio::io::duplex(4096);
            tokio::io::AsyncWriteExt::write_all(&mut client, bytes).await.unwrap();
            let held = (!closes).then_some(client);
            let opening = read(&mut server, &mut BytesMut::new(), limit).await;
            drop(held);
            opening
        };
        let strange = &[HANDSHAKE, 3, 1, 0, 4, 9, 9, 9, 9];
        assert!(matches!(opening(&whole, false).await.content(), Content::Passed(Some("a.example"))));
        assert!(matches!(opening(b"hello", false).await.content(), Content::Passed(None)));
        for (bytes, closes) in
            [(&whole[..20], false), (&whole[..20], true), (&whole[..0], false), (strange, false)]
        {
            assert!(matches!(opening(bytes, closes).await.content(), Content::Unread), "{bytes:?}");
        }
    }

    #[test]
    fn other_bytes_are_no_tls() {
        assert_eq!(parse(b"GET / HTTP/1.1\r\n"), Parsed::NoTls);
        assert_eq!(
            parse(&[HANDSHAKE, 3, 1, 0, 4, 9, 9, 9, 9]),
            Parsed::Hello(ClientHello { server_name: None, is_understood: false })
        );
    }
}
