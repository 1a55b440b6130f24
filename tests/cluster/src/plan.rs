//! Names and addresses of a cluster: pure numbering, chosen by the cluster's number.
//!
//! Clusters share no network, so two with the same number can run side by side. Different numbers are for clusters
//! whose networks are to be joined.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

/// Prefix length of the segment that joins the nodes, and of each node's pod range.
pub const SEGMENT_PREFIX: u8 = 24;
/// Prefix length of the service range.
pub const SERVICES_PREFIX: u8 = 16;

/// The numbering of one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The cluster's number, up to 50.
    pub number: u8,
    /// How many nodes there are, up to 100.
    pub nodes: u8,
}

impl Default for Plan {
    fn default() -> Self {
        Self { number: 0, nodes: 2 }
    }
}

impl Plan {
    /// Names of the nodes: `n1`, `n2`, …
    pub fn node_names(self) -> impl Iterator<Item = String> {
        (1..=self.nodes).map(|index| format!("n{index}"))
    }

    /// The control plane's address.
    #[must_use]
    pub fn control(self) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, self.number, 2)
    }

    /// Address of node `index`, counted from 1.
    #[must_use]
    pub fn node(self, index: u8) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, self.number, 10_u8.saturating_add(index))
    }

    /// First address of the pod range of node `index`, counted from 1.
    #[must_use]
    pub fn pods(self, index: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 200_u8.saturating_add(self.number), index, 0)
    }

    /// All pod ranges, in CIDR notation.
    #[must_use]
    pub fn cluster_cidr(self) -> String {
        format!("{}/16", self.pods(0))
    }

    /// First address of the service range.
    #[must_use]
    pub fn services(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 96_u8.saturating_add(self.number), 0, 0)
    }

    /// The address of service `kubernetes`, which the API server takes by itself.
    #[must_use]
    pub fn api_service(self) -> Ipv4Addr {
        self.service(1)
    }

    /// The address of the cluster's DNS.
    #[must_use]
    pub fn dns(self) -> Ipv4Addr {
        self.service(10)
    }

    /// First address of the range of load balancers.
    #[must_use]
    pub fn load_balancers(self) -> Ipv4Addr {
        self.load_balancer(0)
    }

    /// Addresses that the load balancer gives to Services that ask for none.
    pub fn dynamic_load_balancers(self) -> impl Iterator<Item = Ipv4Addr> {
        (1..200).map(move |host| self.load_balancer(host))
    }

    /// An address that a Service gets only by asking for it.
    #[must_use]
    pub fn static_load_balancer(self) -> Ipv4Addr {
        self.load_balancer(200)
    }

    fn load_balancer(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, self.number, host)
    }

    fn service(self, host: u8) -> Ipv4Addr {
        let [first, second, third, _] = self.services().octets();
        Ipv4Addr::new(first, second, third, host)
    }

    /// Addresses that the API server's certificate names.
    #[must_use]
    pub fn api_addresses(self) -> [IpAddr; 3] {
        [self.api_service().into(), self.control().into(), Ipv4Addr::LOCALHOST.into()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_of_different_numbers_share_no_range() {
        let (first, second) = (Plan::default(), Plan { number: 1, nodes: 2 });
        assert_ne!(first.cluster_cidr(), second.cluster_cidr());
        assert_ne!(first.services(), second.services());
        assert_ne!(first.control(), second.control());
    }

    #[test]
    fn nodes_are_counted_from_one() {
        let plan = Plan::default();
        assert_eq!(plan.node_names().collect::<Vec<_>>(), ["n1", "n2"]);
        assert_eq!(plan.node(1), Ipv4Addr::new(172, 30, 0, 11));
        assert_eq!(plan.pods(1), Ipv4Addr::new(10, 200, 1, 0));
        assert_eq!(plan.dns(), Ipv4Addr::new(10, 96, 0, 10));
    }
}
