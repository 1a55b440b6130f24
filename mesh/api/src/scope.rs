//! Addresses that name another host for each that dials them.

use std::net::IpAddr;

/// Whether an address means something of whoever dials it, or no single host: loopback, unspecified, link-local, broadcast
/// and multicast. Nothing in a cluster can have such an address for others.
pub fn is_local(address: IpAddr) -> bool {
    match address.to_canonical() {
        // RFC 1122 §3.2.1.3: all of 0.0.0.0/8 is this host.
        IpAddr::V4(ip) => {
            let of_this_host = ip.is_loopback() || ip.octets().starts_with(&[0]);
            of_this_host || ip.is_link_local() || ip.is_broadcast() || ip.is_multicast()
        }
        IpAddr::V6(ip) => {
            ip.is_loopback() || ip.is_unspecified() || ip.is_unicast_link_local() || ip.is_multicast()
        }
    }
}
