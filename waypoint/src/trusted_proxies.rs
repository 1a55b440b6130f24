//! Who the first client of a request is where proxies stand between it and a gateway. Pure.

use std::net::{IpAddr, SocketAddr};

use ambit_api::l7;
use ipnet::IpNet;

/// The proxies in front of a gateway that are believed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedProxies {
    /// How many there are between the client and the gateway; counts where no networks are given.
    hops: usize,
    /// Where they are.
    networks: Vec<IpNet>,
    /// Whether every connection begins with a header of the PROXY protocol.
    pub proxy_protocol: bool,
}

/// Who the first client is, and how much of the chain says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstClient {
    /// Its address.
    pub address: IpAddr,
    /// Entries at the end of the chain that are believed.
    pub believed: usize,
}

impl TrustedProxies {
    /// Those of a gateway. A network that can't be read is none.
    pub fn new(source: &l7::TrustedProxies) -> Self {
        Self {
            hops: usize::try_from(source.hops).unwrap_or(usize::MAX),
            networks: source.networks.iter().filter_map(|text| text.parse().ok()).collect(),
            proxy_protocol: source.proxy_protocol,
        }
    }

    /// Whether it is said where the proxies are, and this is one of the addresses.
    pub fn has_network_of(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.networks.iter().any(|network| network.contains(&address))
    }

    /// Whether it is said where the proxies are, and this is none of the addresses.
    pub fn excludes(&self, address: IpAddr) -> bool {
        !self.networks.is_empty() && !self.has_network_of(address)
    }

    /// Whether a peer is a proxy that is believed.
    pub fn believes(&self, peer: IpAddr) -> bool {
        match self.networks.is_empty() {
            true => self.hops > 0,
            false => self.has_network_of(peer),
        }
    }

    /// The first client of a request that comes from `peer` with these entries of `X-Forwarded-For`.
    ///
    /// Envoy, `xff_num_trusted_hops`: the client is the entry that the outermost proxy has added; where there are too few entries it is
    /// the peer. `xff_trusted_cidrs`: it is the last entry that no proxy has, as long as each one after it is a proxy's.
    pub fn first_client(&self, peer: IpAddr, chain: &[&str]) -> FirstClient {
        let nobody = FirstClient { address: peer, believed: 0 };
        if !self.networks.is_empty() {
            let mut first = nobody;
            for entry in chain.iter().rev() {
                if !self.has_network_of(first.address) {
                    break;
                }
                let Some(address) = address_of(entry) else { break };
                first = FirstClient { address, believed: first.believed + 1 };
            }
            return first;
        }
        if self.hops == 0 {
            return nobody;
        }
        let entry = chain.len().checked_sub(self.hops).and_then(|at| chain.get(at));
        let address = entry.and_then(|entry| address_of(entry));
        address.map_or(nobody, |address| FirstClient { address, believed: self.hops })
    }
}

/// The address in an entry of `X-Forwarded-For`; some proxies add the port.
fn address_of(entry: &str) -> Option<IpAddr> {
    let entry = entry.trim();
    let with_port = || entry.parse().ok().map(|address: SocketAddr| address.ip());
    entry.parse().ok().or_else(with_port).map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trusted(hops: u32, networks: &[&str]) -> TrustedProxies {
        let networks = networks.iter().map(ToString::to_string).collect();
        TrustedProxies::new(&l7::TrustedProxies { hops, networks, proxy_protocol: false })
    }

    #[test]
    fn the_first_client_is_what_the_outermost_believed_proxy_says() {
        let peer = "10.0.0.9";
        for (hops, networks, chain, first, believed) in [
            (0, &[][..], &["192.0.2.1"][..], peer, 0),
            (1, &[], &["192.0.2.1"], "192.0.2.1", 1),
            (1, &[], &["198.51.100.1", "192.0.2.1"], "192.0.2.1", 1),
            (2, &[], &["203.0.113.1", "198.51.100.1", "192.0.2.1"], "198.51.100.1", 2),
            // Too few, or what is no address: nothing is believed.
            (2, &[], &["192.0.2.1"], peer, 0),
            (1, &[], &[], peer, 0),
            (1, &[], &["unknown"], peer, 0),
            (1, &[], &["192.0.2.1:4711"], "192.0.2.1", 1),
            (1, &[], &["[2001:db8::1]:4711"], "2001:db8::1", 1),
            (1, &[], &["::ffff:192.0.2.1"], "192.0.2.1", 1),
            // With networks the number does not count.
            (5, &["10.0.0.0/8"], &["198.51.100.1", "192.0.2.1"], "192.0.2.1", 1),
            (0, &["10.0.0.0/8", "192.0.2.0/24"], &["198.51.100.1", "192.0.2.1"], "198.51.100.1", 2),
            (0, &["10.0.0.0/8"], &["10.0.0.1", "10.0.0.2"], "10.0.0.1", 2),
            (0, &["10.0.0.0/8"], &["198.51.100.1", "unknown", "10.0.0.2"], "10.0.0.2", 1),
            (0, &["172.16.0.0/12"], &["192.0.2.1"], peer, 0),
        ] {
            let found = trusted(hops, networks).first_client(peer.parse().unwrap(), chain);
            let wanted = FirstClient { address: first.parse().unwrap(), believed };
            assert_eq!(found, wanted, "{hops} {networks:?} {chain:?}");
        }
    }

    #[test]
    fn peers_are_believed_by_number_or_network() {
        let [inside, outside] = ["10.0.0.9", "192.0.2.1"].map(|text| text.parse().unwrap());
        assert!(!trusted(0, &[]).believes(inside));
        assert!(trusted(1, &[]).believes(outside));
        assert!(trusted(0, &["10.0.0.0/8"]).believes(inside));
        assert!(!trusted(1, &["10.0.0.0/8"]).believes(outside));
        assert!(trusted(0, &["10.0.0.0/8"]).excludes(outside) && !trusted(1, &[]).excludes(outside));
    }
}
