//! The address plan of a local cluster: a pure numbering of nodes, pods and services.
//!
//! Used by everything that configures a link or writes an object. It never touches the kernel.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::error::{Error, Result};

/// Prefix length of the fabric that joins the nodes, IPv4.
pub(crate) const FABRIC_PREFIX_V4: u8 = 16;
/// Prefix length of the fabric that joins the nodes, IPv6.
pub(crate) const FABRIC_PREFIX_V6: u8 = 64;
/// Prefix length of a node's pod range, IPv4.
pub(crate) const PODS_PREFIX_V4: u8 = 24;
/// Prefix length of a node's pod range, IPv6.
pub(crate) const PODS_PREFIX_V6: u8 = 64;
/// First address of the service range `10.96.0.0/16`.
pub(crate) const SERVICES_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 0);
/// Prefix length of the IPv4 service range.
pub(crate) const SERVICES_PREFIX_V4: u8 = 16;
/// First address of the service range `fd00:10:96::/112`.
pub(crate) const SERVICES_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0);
/// Prefix length of the IPv6 service range.
pub(crate) const SERVICES_PREFIX_V6: u8 = 112;
/// Address of the control plane on the fabric.
pub const CONTROL_V4: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 2);
/// IPv6 address of the control plane on the fabric.
pub const CONTROL_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, 2);
/// VIP of the cluster DNS, where pods' resolv.conf points.
pub const DNS_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Source of kubelet's probes, exempt from capture (redirection contract).
pub const PROBE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
/// Source of kubelet's IPv6 probes.
pub const PROBE_V6: Ipv6Addr = Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);

/// First host number of pods: `.1` is the node's end of every pod link.
const FIRST_POD: u16 = 2;
/// Last host number of pods within a /24.
const LAST_POD: u16 = 254;
/// First VIP that is handed out; lower ones are for fixed services such as DNS.
const FIRST_SERVICE: u16 = 256;

/// An IPv4 address and, in a dual-stack cluster, the IPv6 address that goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Addresses {
    /// The IPv4 address, which is the primary one.
    pub v4: Ipv4Addr,
    /// The IPv6 address, absent in an IPv4-only cluster.
    pub v6: Option<Ipv6Addr>,
}

impl Addresses {
    /// Both addresses, primary first, as `status.podIPs` lists them.
    #[must_use]
    pub fn all(&self) -> Vec<IpAddr> {
        std::iter::once(IpAddr::V4(self.v4)).chain(self.v6.map(IpAddr::V6)).collect()
    }

    /// Whether `ip` is one of these.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => ip == self.v4,
            IpAddr::V6(ip) => Some(ip) == self.v6,
        }
    }
}

/// Numbers nodes; `index` counts from 0.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// Whether IPv6 addresses are given out too.
    pub(crate) ipv6: bool,
}

impl Plan {
    fn dual(self, v4: Ipv4Addr, v6: Ipv6Addr) -> Addresses {
        Addresses { v4, v6: self.ipv6.then_some(v6) }
    }

    /// The control plane's address on the fabric.
    pub(crate) fn control(self) -> Addresses {
        self.dual(CONTROL_V4, CONTROL_V6)
    }

    /// A node's address on the fabric.
    pub(crate) fn node(self, index: u8) -> Addresses {
        let host = 10 + u16::from(index);
        self.dual(
            Ipv4Addr::new(172, 18, 0, host.to_be_bytes()[1]),
            Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, host),
        )
    }

    /// The first address of a node's pod range: the node's end of each pod link.
    pub(crate) fn gateway(self, index: u8) -> Addresses {
        self.pod_number(index, 1)
    }

    /// The network address of a node's pod range.
    pub(crate) fn pods(self, index: u8) -> Addresses {
        self.pod_number(index, 0)
    }

    fn pod_number(self, index: u8, number: u16) -> Addresses {
        let third = index.saturating_add(1);
        self.dual(
            Ipv4Addr::new(10, 244, third, number.to_be_bytes()[1]),
            Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(third), 0, 0, 0, number),
        )
    }

    fn service_number(self, number: u16) -> Addresses {
        let [third, fourth] = number.to_be_bytes();
        self.dual(Ipv4Addr::new(10, 96, third, fourth), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number))
    }

    /// The cluster DNS' VIP.
    pub(crate) fn dns(self) -> Addresses {
        self.service_number(10)
    }
}

/// Allocates pod addresses of one node: the next free one after the last allocated, so that an address is reused as late as
/// possible.
#[derive(Debug)]
pub(crate) struct PodRange {
    plan: Plan,
    node: u8,
    next: u16,
    used: Vec<u16>,
}

impl PodRange {
    pub(crate) fn new(plan: Plan, node: u8) -> Self {
        Self { plan, node, next: FIRST_POD, used: Vec::new() }
    }

    /// Takes the next free address.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when every address of the node's range is in use.
    pub(crate) fn take(&mut self) -> Result<Addresses> {
        for _ in FIRST_POD..=LAST_POD {
            let candidate = self.next;
            self.next = if candidate >= LAST_POD { FIRST_POD } else { candidate + 1 };
            if !self.used.contains(&candidate) {
                self.used.push(candidate);
                return Ok(self.plan.pod_number(self.node, candidate));
            }
        }
        Err(Error::Exhausted(format!("the pod range of node {}", self.node)))
    }

    /// Takes one particular address: a test that gives a deleted pod's address to another pod.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when it is in use or not of this range.
    pub(crate) fn take_exactly(&mut self, wanted: Ipv4Addr) -> Result<Addresses> {
        let number = u16::from(wanted.octets()[3]);
        let addresses = self.plan.pod_number(self.node, number);
        let free = (FIRST_POD..=LAST_POD).contains(&number) && !self.used.contains(&number);
        if addresses.v4 != wanted || !free {
            return Err(Error::Exhausted(format!("the pod range of node {} at {wanted}", self.node)));
        }
        self.used.push(number);
        Ok(addresses)
    }

    /// Gives an address back.
    pub(crate) fn give_back(&mut self, addresses: Addresses) {
        let number = u16::from(addresses.v4.octets()[3]);
        self.used.retain(|used| *used != number);
    }
}

/// Hands out service VIPs by object key; a key keeps its VIP for the cluster's life.
#[derive(Debug)]
pub(crate) struct ServiceRange {
    plan: Plan,
    next: u16,
    given: BTreeMap<(String, String), Addresses>,
}

impl ServiceRange {
    pub(crate) fn new(plan: Plan) -> Self {
        Self { plan, next: FIRST_SERVICE, given: BTreeMap::new() }
    }

    /// The VIPs of a service, made at the first call.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when the range is used up.
    pub(crate) fn of(&mut self, namespace: &str, name: &str) -> Result<Addresses> {
        let key = (namespace.to_owned(), name.to_owned());
        if let Some(addresses) = self.given.get(&key) {
            return Ok(*addresses);
        }
        let number = self.next;
        self.next = number
            .checked_add(1)
            .ok_or_else(|| Error::Exhausted("the service range 10.96.0.0/16".to_owned()))?;
        let addresses = self.plan.service_number(number);
        self.given.insert(key, addresses);
        Ok(addresses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan { ipv6: true };

    #[test]
    fn an_address_given_back_is_used_again_only_after_all_others() {
        let mut range = PodRange::new(PLAN, 0);
        let first = range.take().expect("an empty range has addresses");
        range.give_back(first);
        let second = range.take().expect("the range has addresses");
        assert_ne!(first, second);
        assert_eq!(first.v4, Ipv4Addr::new(10, 244, 1, 2));
    }

    #[test]
    fn a_full_range_says_so_and_recovers() {
        let mut range = PodRange::new(PLAN, 1);
        let mut taken = Vec::new();
        while let Ok(addresses) = range.take() {
            taken.push(addresses);
        }
        assert_eq!(taken.len(), usize::from(LAST_POD - FIRST_POD + 1));
        let back = taken[40];
        range.give_back(back);
        assert_eq!(range.take().expect("one is free again"), back);
    }

    #[test]
    fn a_wanted_address_is_given_only_when_free_and_of_this_node() {
        let mut range = PodRange::new(PLAN, 0);
        let wanted = Ipv4Addr::new(10, 244, 1, 77);
        assert_eq!(range.take_exactly(wanted).expect("it is free").v4, wanted);
        assert!(range.take_exactly(wanted).is_err());
        assert!(range.take_exactly(Ipv4Addr::new(10, 244, 2, 78)).is_err());
        assert!(range.take_exactly(Ipv4Addr::new(10, 244, 1, 1)).is_err());
    }

    #[test]
    fn a_service_keeps_its_vip() {
        let mut range = ServiceRange::new(PLAN);
        let reviews = range.of("default", "reviews").expect("the range is empty");
        let ratings = range.of("default", "ratings").expect("the range is nearly empty");
        assert_ne!(reviews, ratings);
        assert_eq!(range.of("default", "reviews").expect("it was given before"), reviews);
        assert_eq!(reviews.v4, Ipv4Addr::new(10, 96, 1, 0));
        assert_eq!(reviews.v6, Some("fd00:10:96::100".parse().expect("a valid address")));
    }

    #[test]
    fn an_ipv4_only_cluster_has_no_ipv6_addresses() {
        assert_eq!(Plan { ipv6: false }.node(1).all(), [IpAddr::from([172, 18, 0, 11])]);
        assert_eq!(PLAN.node(1).all().len(), 2);
    }
}
