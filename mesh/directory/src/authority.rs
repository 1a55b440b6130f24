//! What a client dialled, as it stands in a CONNECT's `:authority`.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

/// `ip:port` or `hostname:port` (contracts.md, section 2).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    /// An address and port.
    Address(SocketAddr),
    /// A host name and port.
    Host {
        /// The name.
        hostname: Arc<str>,
        /// The port.
        port: u16,
    },
}

impl Authority {
    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

impl From<SocketAddr> for Authority {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host { hostname, port } => write!(f, "{hostname}:{port}"),
        }
    }
}

/// A text that is neither `ip:port` nor `hostname:port`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither ip:port nor hostname:port")]
pub struct InvalidAuthority(String);

impl FromStr for Authority {
    type Err = InvalidAuthority;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let invalid = || InvalidAuthority(text.chars().take(300).collect());
        let (hostname, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        // RFC 1035 §2.3.4: names of at most 255 octets.
        let is_name = !hostname.is_empty()
            && hostname.len() <= 255
            && hostname.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
        let port: u16 = port.parse().map_err(|_| invalid())?;
        if !is_name || port == 0 {
            return Err(invalid());
        }
        Ok(Self::Host { hostname: hostname.to_ascii_lowercase().into(), port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_read_as_they_are_written() {
        for text in ["10.0.0.1:80", "[fd00::1]:8080", "reviews.default.svc.cluster.local:9080"] {
            assert_eq!(text.parse::<Authority>().map(|authority| authority.to_string()).as_deref(), Ok(text));
        }
    }

    #[test]
    fn what_is_no_authority_is_refused() {
        for text in
            ["", "host", ":80", "host:", "host:0", "host:65536", "a b:80", "fd00::1:80", "h@st:80", "[::1]"]
        {
            assert!(text.parse::<Authority>().is_err(), "{text:?}");
        }
    }
}
