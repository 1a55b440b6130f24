//! Services by virtual address: single ones, and networks of them, longest prefix first.

use std::net::IpAddr;
use std::sync::Arc;

use equivalent::Equivalent;
use ipnet::IpNet;

use crate::name::{AddressRef, NamespacedHost, NetworkAddress};
use crate::service::Vip;

/// Services that share an address, in the order of their names.
type Hosts = Arc<[NamespacedHost]>;

/// A network of addresses in a network.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct NetworkNet {
    network: Arc<str>,
    net: IpNet,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct NetRef<'a> {
    network: &'a str,
    net: IpNet,
}

impl Equivalent<NetworkNet> for NetRef<'_> {
    fn equivalent(&self, key: &NetworkNet) -> bool {
        self.net == key.net && self.network == &*key.network
    }
}

/// Virtual addresses. Cloning is cheap and a clone never changes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vips {
    addresses: imbl::HashMap<NetworkAddress, Hosts>,
    nets: imbl::HashMap<NetworkNet, Hosts>,
    /// Prefix lengths in use, longest first, with the number of networks of that length.
    lengths: Arc<Vec<(u8, u32)>>,
}

impl Vips {
    pub(crate) fn insert(&mut self, vip: &Vip, host: &NamespacedHost) {
        match vip {
            Vip::Address(address) => {
                let hosts = with(self.addresses.get(address), host);
                self.addresses.insert(address.clone(), hosts);
            }
            Vip::Net { network, net } => {
                let key = NetworkNet { network: Arc::clone(network), net: *net };
                let known = self.nets.get(&key);
                let hosts = with(known, host);
                if known.is_none() {
                    self.count(net.prefix_len(), true);
                }
                self.nets.insert(key, hosts);
            }
        }
    }

    pub(crate) fn remove(&mut self, vip: &Vip, host: &NamespacedHost) {
        match vip {
            Vip::Address(address) => match without(self.addresses.get(address), host) {
                Some(hosts) => _ = self.addresses.insert(address.clone(), hosts),
                None => _ = self.addresses.remove(address),
            },
            Vip::Net { network, net } => {
                let key = NetworkNet { network: Arc::clone(network), net: *net };
                match without(self.nets.get(&key), host) {
                    Some(hosts) => _ = self.nets.insert(key, hosts),
                    None if self.nets.remove(&key).is_some() => self.count(net.prefix_len(), false),
                    None => {}
                }
            }
        }
    }

    /// The services whose address this is.
    pub(crate) fn at(&self, address: AddressRef<'_>) -> &[NamespacedHost] {
        self.addresses.get(&address).map_or(&[], |hosts| hosts)
    }

    /// The services of the networks that hold this address: longest prefix first.
    pub(crate) fn around<'a>(
        &'a self,
        network: &'a str,
        address: IpAddr,
    ) -> impl Iterator<Item = &'a [NamespacedHost]> {
        self.lengths.iter().filter_map(move |(length, _)| {
            let net = IpNet::new(address, *length).ok()?.trunc();
            self.nets.get(&NetRef { network, net }).map(|hosts| &**hosts)
        })
    }

    fn count(&mut self, length: u8, more: bool) {
        let lengths = Arc::make_mut(&mut self.lengths);
        match lengths.iter_mut().find(|(known, _)| *known == length) {
            Some((_, count)) => *count = if more { count.saturating_add(1) } else { count.saturating_sub(1) },
            None if more => lengths.push((length, 1)),
            None => {}
        }
        lengths.retain(|(_, count)| *count > 0);
        lengths.sort_unstable_by_key(|(length, _)| std::cmp::Reverse(*length));
    }
}

fn with(hosts: Option<&Hosts>, host: &NamespacedHost) -> Hosts {
    let others = hosts.into_iter().flat_map(|hosts| hosts.iter()).filter(|other| *other != host);
    let mut hosts: Vec<NamespacedHost> = others.chain([host]).cloned().collect();
    hosts.sort_unstable();
    hosts.into()
}

fn without(hosts: Option<&Hosts>, host: &NamespacedHost) -> Option<Hosts> {
    let left: Vec<NamespacedHost> = hosts?.iter().filter(|other| *other != host).cloned().collect();
    (!left.is_empty()).then(|| left.into())
}
