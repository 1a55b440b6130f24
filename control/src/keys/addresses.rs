//! Which addresses keys are fetched from. Whoever may write a RequestAuthentication names the server, and must not reach
//! through the control plane what only that reaches.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::vec;

use ambit_api::is_local;
use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use ipnet::IpNet;
use tower::Service;

/// The addresses that connections may be made to.
#[derive(Clone, Debug)]
pub(super) struct Addresses {
    /// `None` in tests alone, whose servers are on the loopback interface.
    blocked: Option<Arc<[IpNet]>>,
}

impl Addresses {
    /// All but those of `blocked`, and those that are never allowed.
    pub(super) fn without(blocked: &[IpNet]) -> Self {
        Self { blocked: Some(blocked.into()) }
    }

    /// Every address.
    #[cfg(test)]
    pub(super) fn all() -> Self {
        Self { blocked: None }
    }

    /// Whether a connection may be made to an address.
    pub(super) fn allow(&self, address: IpAddr) -> bool {
        let Some(blocked) = &self.blocked else { return true };
        let meant = meant(address);
        let is_blocked =
            |address: &IpAddr| is_local(*address) || blocked.iter().any(|block| block.contains(address));
        ![address, meant].iter().any(is_blocked)
    }

    /// Whether the host of a URL may be used, as far as it says an address itself. Names are looked at when they are resolved.
    pub(super) fn allow_host(&self, host: &str) -> bool {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        bare.parse().map_or(true, |address| self.allow(address))
    }
}

/// The IPv4 address that an IPv6 address stands for: mapped or compatible (RFC 4291 §2.5.5), or by NAT64 (RFC 6052 §2.1).
fn meant(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let embedded = || {
        let [.., a, b, c, d] = v6.octets();
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match v6.segments() {
        [0, 0, 0, 0, 0, 0 | 0xffff, ..] if v6 != Ipv6Addr::LOCALHOST && !v6.is_unspecified() => embedded(),
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => embedded(),
        _ => address,
    }
}

/// Resolves names to addresses that are allowed. The connection is made to one of these, so no second look-up can differ.
#[derive(Clone, Debug)]
pub(super) struct Resolver {
    system: GaiResolver,
    addresses: Addresses,
}

impl Resolver {
    pub(super) fn new(addresses: Addresses) -> Self {
        Self { system: GaiResolver::new(), addresses }
    }
}

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.system.poll_ready(context)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (found, addresses) = (self.system.call(name), self.addresses.clone());
        Box::pin(async move {
            let allowed: Vec<SocketAddr> =
                found.await?.filter(|address| addresses.allow(address.ip())).collect();
            match allowed.is_empty() {
                true => Err(io::Error::other("it has no address that keys may be fetched from")),
                false => Ok(allowed.into_iter()),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_and_blocked_addresses_are_refused() {
        let blocked = ["10.96.0.0/12", "fd00:ec2::254/128"].map(|text| text.parse().unwrap());
        let addresses = Addresses::without(&blocked);
        for (address, allowed) in [
            ("127.0.0.1", false),
            ("127.9.9.9", false),
            ("169.254.169.254", false),
            ("0.0.0.0", false),
            ("0.1.2.3", false),
            ("224.0.0.1", false),
            ("255.255.255.255", false),
            ("10.96.0.1", false),
            ("::1", false),
            ("::", false),
            ("fe80::1", false),
            ("febf::1", false),
            ("ff02::1", false),
            ("fd00:ec2::254", false),
            ("::ffff:127.0.0.1", false),
            ("::ffff:10.96.0.1", false),
            ("::127.0.0.1", false),
            ("64:ff9b::a9fe:a9fe", false),
            ("10.0.0.1", true),
            ("192.0.2.1", true),
            ("2001:db8::1", true),
            ("64:ff9b::192.0.2.1", true),
            ("fd00::1", true),
        ] {
            assert_eq!(addresses.allow(address.parse().unwrap()), allowed, "{address}");
        }
        for (host, allowed) in [("[::1]", false), ("127.0.0.1", false), ("[2001:db8::1]", true), ("a", true)]
        {
            assert_eq!(addresses.allow_host(host), allowed, "{host}");
        }
    }

    #[tokio::test]
    async fn a_name_of_this_host_is_not_resolved() {
        let mut resolver = Resolver::new(Addresses::without(&[]));
        for name in ["localhost", "127.1"] {
            assert!(resolver.call(name.parse().unwrap()).await.is_err(), "{name}");
        }
    }
}
