//! Addresses for the hosts of ServiceEntries that have none, so that their names resolve and their ports don't collide.
//!
//! Pure: what is allocated is in the status of the entries themselves, so nothing is kept elsewhere. Each host gets one
//! address of each family. An entry keeps what it has as long as it has the host.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use crate::object::NamespacedName;

/// First address of 240.240.0.0/16, the range that Istio allocates from.
const IPV4: u32 = u32::from_be_bytes([240, 240, 0, 0]);
/// First address of the range of 2001:2::/48 in which the low bits are those of the IPv4 address.
const IPV6: u128 = 0x2001_0002 << 96;
/// Addresses of a family; the first and the last are left out.
const SIZE: u32 = 1 << 16;
/// Label by which an entry asks for no address.
const OPT_OUT: &str = "networking.istio.io/enable-autoallocate-ip";

/// Who has which address.
#[derive(Debug, Default)]
pub(super) struct Allocator {
    owners: HashMap<IpAddr, NamespacedName>,
}

impl Allocator {
    /// What `status.addresses` of an entry must be, if that differs from what it is. The entry owns those addresses then.
    pub(super) fn plan(&mut self, id: &NamespacedName, entry: &Value) -> Option<Vec<Value>> {
        let present: Vec<Value> =
            entry.pointer("/status/addresses").and_then(Value::as_array).cloned().unwrap_or_default();
        let hosts = hosts_without_address(entry);
        let kept = present.iter().filter(|address| self.keeps(id, address, &hosts)).cloned();
        let mut wanted: Vec<Value> = kept.collect();
        self.release(id);
        for address in &wanted {
            if let Some(ip) = ip_of(address) {
                self.owners.insert(ip, id.clone());
            }
        }
        for host in hosts {
            if !wanted.iter().any(|address| address["host"] == *host) {
                wanted.extend(self.allocate(id, &host));
            }
        }
        (wanted != present).then_some(wanted)
    }

    /// An entry is gone, and with it its addresses.
    pub(super) fn release(&mut self, id: &NamespacedName) {
        self.owners.retain(|_, owner| owner != id);
    }

    /// Whether an address stays: its host is still the entry's, and no other entry has it.
    fn keeps(&self, id: &NamespacedName, address: &Value, hosts: &[String]) -> bool {
        let host = address["host"].as_str().unwrap_or_default();
        let ip = ip_of(address);
        let is_free = |ip: IpAddr| self.owners.get(&ip).is_none_or(|owner| owner == id);
        hosts.iter().any(|own| own == host) && ip.is_some_and(is_free)
    }

    /// An address of each family, or none when the range is used up.
    fn allocate(&mut self, id: &NamespacedName, host: &str) -> Vec<Value> {
        let mut hasher = DefaultHasher::new();
        (id, host).hash(&mut hasher);
        // The same entry gets the same address in most cases, also when its status was lost.
        let start = u32::try_from(hasher.finish() % u64::from(SIZE)).unwrap_or_default();
        let pairs =
            (0..SIZE).map(|step| (start + step) % SIZE).filter(|n| (1..SIZE - 1).contains(n)).map(|n| {
                let (v4, v6) = (IPV4 | n, IPV6 | u128::from(IPV4 | n));
                [IpAddr::from(Ipv4Addr::from_bits(v4)), IpAddr::from(Ipv6Addr::from_bits(v6))]
            });
        let free = pairs.into_iter().find(|pair| pair.iter().all(|ip| !self.owners.contains_key(ip)));
        let pair = free.into_iter().flatten().collect::<Vec<_>>();
        for ip in &pair {
            self.owners.insert(*ip, id.clone());
        }
        pair.into_iter().map(|ip| json!({ "host": host, "value": ip.to_string() })).collect()
    }
}

fn ip_of(address: &Value) -> Option<IpAddr> {
    address["value"].as_str()?.parse().ok()
}

/// The hosts that an address is to be allocated for: none where the author gave addresses or wants none, where the
/// destination of connections is kept (resolution NONE), and for wildcards, which cannot be resolved unless a waypoint does that (DYNAMIC_DNS).
fn hosts_without_address(entry: &Value) -> Vec<String> {
    let spec = &entry["spec"];
    let opted_out = entry["metadata"]["labels"][OPT_OUT].as_str() == Some("false");
    let has_addresses = spec["addresses"].as_array().is_some_and(|addresses| !addresses.is_empty());
    let resolves = !matches!(spec["resolution"].as_str(), None | Some("NONE"));
    if opted_out || has_addresses || !resolves {
        return Vec::new();
    }
    let hosts = spec["hosts"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let mut named: Vec<String> = Vec::new();
    let by_waypoint = spec["resolution"].as_str() == Some("DYNAMIC_DNS");
    for host in hosts.filter(|host| by_waypoint || !host.contains('*')) {
        if !named.iter().any(|known| known == host) {
            named.push(host.to_owned());
        }
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> NamespacedName {
        NamespacedName::new("shop", name)
    }

    fn entry(hosts: &[&str], status: &[Value]) -> Value {
        json!({ "spec": { "hosts": hosts, "resolution": "DNS" }, "status": { "addresses": status } })
    }

    #[test]
    fn a_host_gets_one_address_of_each_family_and_keeps_it() {
        let mut allocator = Allocator::default();
        let first = allocator.plan(&id("a"), &entry(&["a.example"], &[])).unwrap();
        let ips: Vec<IpAddr> = first.iter().filter_map(ip_of).collect();
        assert!(
            matches!(ips[..], [IpAddr::V4(v4), IpAddr::V6(v6)]
            if v4.octets()[..2] == [240, 240] && v6.segments()[..3] == [0x2001, 2, 0]),
            "{ips:?}"
        );
        assert_eq!(allocator.plan(&id("a"), &entry(&["a.example"], &first)), None);
        let more = allocator.plan(&id("a"), &entry(&["a.example", "b.example"], &first)).unwrap();
        assert_eq!((&more[..2], more.len()), (&first[..], 4));
        let fewer = allocator.plan(&id("a"), &entry(&["b.example"], &more)).unwrap();
        assert_eq!(fewer, more[2..]);
    }

    #[test]
    fn no_two_entries_have_one_address() {
        let mut allocator = Allocator::default();
        let first = allocator.plan(&id("a"), &entry(&["x.example"], &[])).unwrap();
        // The second claims what the first has, as two writers at a time could leave it.
        let second = allocator.plan(&id("b"), &entry(&["x.example"], &first)).unwrap();
        assert!(first.iter().all(|address| !second.contains(address)), "{first:?} {second:?}");
        allocator.release(&id("a"));
        assert_eq!(allocator.plan(&id("c"), &entry(&["x.example"], &first)), None);
    }

    #[test]
    fn entries_that_need_no_address_lose_theirs() {
        let mut allocator = Allocator::default();
        let had = allocator.plan(&id("a"), &entry(&["a.example"], &[])).unwrap();
        for (pointer, value) in [
            ("/spec", json!({ "hosts": ["a.example"], "addresses": ["10.0.0.1"], "resolution": "DNS" })),
            ("/spec", json!({ "hosts": ["a.example"], "resolution": "NONE" })),
            ("/spec", json!({ "hosts": ["*.example"], "resolution": "DNS" })),
        ] {
            let mut changed = entry(&["a.example"], &had);
            *changed.pointer_mut(pointer).unwrap() = value;
            assert_eq!(allocator.plan(&id("a"), &changed), Some(Vec::new()), "{changed}");
        }
        let wildcard = json!({ "spec": { "hosts": ["*.example"], "resolution": "DYNAMIC_DNS" } });
        assert_eq!(allocator.plan(&id("c"), &wildcard).map(|addresses| addresses.len()), Some(2));
        let mut out = entry(&["a.example"], &[]);
        out["metadata"] = json!({ "labels": { OPT_OUT: "false" } });
        assert_eq!(allocator.plan(&id("b"), &out), None);
    }
}
