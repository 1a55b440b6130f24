//! The `forwarded` header: the client for which a tunnel was opened (RFC 7239).

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use http::HeaderValue;

/// Longest header that is looked at.
const MAX_LENGTH: usize = 1024;

/// `for="ip:port"`, and `;host=<service host>` when it is known (HBONE contract).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forwarded {
    /// The application's client. Port 0 if the header gave none.
    pub client: SocketAddr,
    /// The service that the client dialled.
    pub host: Option<String>,
}

impl Forwarded {
    /// Reads the first element of a header: the first proxy that saw the client. `None` if it has
    /// no address (RFC 7239 §6 also allows `unknown` and obfuscated names).
    pub fn parse(header: &str) -> Option<Forwarded> {
        if header.len() > MAX_LENGTH {
            return None;
        }
        let (mut client, mut host) = (None, None);
        let mut rest = header;
        loop {
            let (name, value, after) = pair(rest)?;
            if name.eq_ignore_ascii_case("for") && client.is_none() {
                client = Some(node(&value)?);
            } else if name.eq_ignore_ascii_case("host") && host.is_none() && !value.is_empty() {
                host = Some(value);
            }
            match after.trim_start().strip_prefix(';') {
                Some(next) => rest = next,
                None if after.trim_start().is_empty() || after.trim_start().starts_with(',') => break,
                None => return None,
            }
        }
        Some(Forwarded { client: client?, host })
    }

    /// The header's value. A host that cannot stand in a header is left out.
    pub fn header(&self) -> Option<HeaderValue> {
        HeaderValue::try_from(self.to_string()).ok()
    }
}

impl fmt::Display for Forwarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "for=\"{}\"", self.client)?;
        match &self.host {
            Some(host) if !host.is_empty() && host.bytes().all(is_token) => write!(f, ";host={host}"),
            Some(host) if !host.is_empty() && host.bytes().all(is_quotable) => {
                write!(f, ";host=\"{}\"", host.replace('\\', "\\\\").replace('"', "\\\""))
            }
            _ => Ok(()),
        }
    }
}

/// RFC 9110 §5.6.4: what may stand between quotes, some of it escaped.
fn is_quotable(byte: u8) -> bool {
    byte == b'\t' || (0x20..0x7f).contains(&byte)
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// RFC 7239 §4: `forwarded-pair = token "=" value`; returns name, value, and the rest.
fn pair(text: &str) -> Option<(&str, String, &str)> {
    let (name, value) = text.trim_start().split_once('=')?;
    if name.is_empty() || !name.bytes().all(is_token) {
        return None;
    }
    if let Some(quoted) = value.strip_prefix('"') {
        let mut text = String::new();
        let mut characters = quoted.char_indices();
        while let Some((index, character)) = characters.next() {
            match character {
                '"' => return Some((name, text, quoted.get(index + 1..)?)),
                '\\' => text.push(characters.next()?.1),
                _ => text.push(character),
            }
        }
        return None;
    }
    // Senders leave the port's colon unquoted, against the grammar.
    let end = value.bytes().position(|byte| !is_token(byte) && byte != b':').unwrap_or(value.len());
    let (value, rest) = value.split_at_checked(end)?;
    Some((name, value.into(), rest))
}

/// RFC 7239 §6: an address, IPv6 in brackets, and perhaps a port.
fn node(text: &str) -> Option<SocketAddr> {
    if let Ok(address) = text.parse() {
        return Some(address);
    }
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, 0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn forms_that_others_send_are_read() {
        let read = |header| Forwarded::parse(header).map(|f| (f.client.to_string(), f.host));
        assert_eq!(read("for=\"10.0.0.1:5\""), Some(("10.0.0.1:5".into(), None)));
        assert_eq!(read("for=10.0.0.1:5;host=a.b"), Some(("10.0.0.1:5".into(), Some("a.b".into()))));
        assert_eq!(
            read("For=\"[::1]\" ; HOST=\"a\\\"b\", for=9.9.9.9"),
            Some(("[::1]:0".into(), Some("a\"b".into())))
        );
        assert_eq!(read("proto=http;for=192.0.2.43"), Some(("192.0.2.43:0".into(), None)));
        for bad in
            ["", "for", "for=unknown", "for=_x", "for=\"10.0.0.1", "host=a", "for=1.2.3.4 x", "=1.1.1.1"]
        {
            assert_eq!(read(bad), None, "{bad:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(v4: bool, bits: u128, port: u16, host in proptest::option::of("[\t -~]{1,30}")) {
            let ip = if v4 { IpAddr::V4((bits as u32).into()) } else { IpAddr::V6(bits.into()) };
            let forwarded = Forwarded { client: (ip, port).into(), host };
            prop_assert_eq!(Forwarded::parse(&forwarded.to_string()), Some(forwarded));
        }

        #[test]
        fn any_header_is_read_or_refused(header in "\\PC{0,200}") {
            let _ = Forwarded::parse(&header);
        }
    }
}
