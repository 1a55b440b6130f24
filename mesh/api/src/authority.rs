//! The destination that a CONNECT names: `ip:port` or `hostname:port`.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

/// Longest host name accepted (RFC 1035 §2.3.4).
const MAX_HOST: usize = 253;

/// The original destination of a tunnelled connection (HBONE contract).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address: of a workload and its target port, or the VIP that the client dialled.
    Address(SocketAddr),
    /// A host name, as sent to gateways of other networks.
    Host {
        /// The name, lower case.
        host: Arc<str>,
        /// The port, not zero.
        port: u16,
    },
}

/// Why a CONNECT's `:authority` is not a destination. The peer is to blame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthorityError {
    /// No port, or not a number from 1 to 65535.
    #[error("authority {0:?} has no valid port")]
    Port(String),
    /// The part before the port is neither an address nor a host name.
    #[error("authority {0:?} names neither an address nor a host")]
    Host(String),
}

impl Authority {
    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Authority::Address(address) => address.port(),
            Authority::Host { port, .. } => *port,
        }
    }

    /// The address, if it is one.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Authority::Address(address) => Some(*address),
            Authority::Host { .. } => None,
        }
    }
}

impl From<SocketAddr> for Authority {
    fn from(address: SocketAddr) -> Authority {
        Authority::Address(address)
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Authority::Address(address) => address.fmt(f),
            Authority::Host { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// RFC 9110 §9.3.6: the request target of CONNECT is host and port, both given, nothing else.
impl FromStr for Authority {
    type Err = AuthorityError;

    fn from_str(text: &str) -> Result<Authority, AuthorityError> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            // A zone would name an interface of the sender's host.
            let zoned = matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0);
            return match address {
                _ if zoned => Err(AuthorityError::Host(text.into())),
                address if address.port() == 0 => Err(AuthorityError::Port(text.into())),
                address => Ok(Authority::Address(address)),
            };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| AuthorityError::Port(text.into()))?;
        let port = match port.parse::<u16>() {
            Ok(number) if number != 0 && port.bytes().all(|byte| byte.is_ascii_digit()) => number,
            _ => return Err(AuthorityError::Port(text.into())),
        };
        if !is_host(host) {
            return Err(AuthorityError::Host(text.into()));
        }
        Ok(Authority::Host { host: host.to_ascii_lowercase().into(), port })
    }
}

/// Labels of letters, digits, `-` and `_`, at most 63 bytes each; not only digits and dots, which
/// would be a malformed address.
fn is_host(host: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    host.len() <= MAX_HOST
        && host.strip_suffix('.').unwrap_or(host).split('.').all(label)
        && !host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_names_no_destination_is_refused() {
        for bad in [
            "",
            ":",
            "10.0.0.1",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:70000",
            "10.0.0.1:+80",
            "10.0.0.256:80",
            "[::1]",
            "::1:80",
            "[fe80::1%3]:80",
            "user@host:80",
            "http://host:80",
            "a..b:80",
            ":80",
            "host:8o",
            "1.2.3:80",
            "host name:80",
        ] {
            assert!(bad.parse::<Authority>().is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn addresses_of_both_families_and_hosts_are_read() {
        assert_eq!("[fd00::7]:9080".parse(), Ok(Authority::Address("[fd00::7]:9080".parse().unwrap())));
        assert_eq!(
            "Reviews.Default.svc:80".parse(),
            Ok(Authority::Host { host: "reviews.default.svc".into(), port: 80 })
        );
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(v4: bool, bits: u128, port in 1u16.., host in "[a-z]([a-z0-9-]{0,20}[a-z0-9])?(\\.[a-z][a-z0-9]{0,8}){0,4}") {
            let ip = if v4 { std::net::IpAddr::V4((bits as u32).into()) } else { std::net::IpAddr::V6(bits.into()) };
            for authority in [Authority::Address((ip, port).into()), Authority::Host { host: host.as_str().into(), port }] {
                prop_assert_eq!(authority.to_string().parse::<Authority>(), Ok(authority));
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,80}") {
            let _ = text.parse::<Authority>();
        }
    }
}
