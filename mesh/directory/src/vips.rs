//! Services by virtual address: single ones, and networks of them, longest prefix first.

use std::net::IpAddr;
use std::sync::Arc;

use equivalent::Equivalent;
use ipnet::IpNet;

use smallvec::SmallVec;

use crate::endpoints::Known;
use crate::name::{AddressRef, NamespacedHost, NetworkAddress};
use crate::service::Vip;
use crate::table::Table;

/// Services that share an address, in the order of their names.
type Sharing = SmallVec<[Arc<Known>; 1]>;

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
    addresses: Table<NetworkAddress, Sharing>,
    nets: Table<NetworkNet, Sharing>,
    /// Prefix lengths in use, longest first, with the number of networks of that length.
    lengths: Arc<Vec<(u8, u32)>>,
    /// Those of `addresses` that are a pod's own and lead to the pod: nearly always none.
    of_pods: Table<NetworkAddress, ()>,
}

impl Vips {
    /// Enters `known` at `vip`, in place of an earlier state of the same service. `is_pods` says whether an address is a pod's own.
    pub(crate) fn insert(
        &mut self,
        vip: &Vip,
        known: &Arc<Known>,
        is_pods: impl Fn(&NetworkAddress) -> bool,
    ) {
        match vip {
            Vip::Address(address) => {
                self.addresses.change(address, |sharing| put(sharing, known));
                self.set_pod(address, is_pods(address));
            }
            Vip::Net { network, net } => {
                let key = NetworkNet { network: Arc::clone(network), net: *net };
                if !self.nets.contains_key(&key) {
                    self.count(net.prefix_len(), true);
                }
                self.nets.change(&key, |sharing| put(sharing, known));
            }
        }
    }

    pub(crate) fn remove(&mut self, vip: &Vip, host: &NamespacedHost) {
        match vip {
            Vip::Address(address) => {
                if self.addresses.get_mut(address).is_some_and(|sharing| take(sharing, host)) {
                    self.addresses.remove(address);
                    self.set_pod(address, false);
                }
            }
            Vip::Net { network, net } => {
                let key = NetworkNet { network: Arc::clone(network), net: *net };
                if self.nets.get_mut(&key).is_some_and(|sharing| take(sharing, host)) {
                    self.nets.remove(&key);
                    self.count(net.prefix_len(), false);
                }
            }
        }
    }

    /// Notes whether an address is a pod's own, which then no service has.
    pub(crate) fn set_pod(&mut self, address: &NetworkAddress, is_pods: bool) {
        if is_pods && self.addresses.contains_key(address) {
            self.of_pods.insert(address.clone(), ());
        } else if !self.of_pods.is_empty() {
            self.of_pods.remove(address);
        }
    }

    /// The services whose address this is.
    pub(crate) fn at(&self, address: AddressRef<'_>) -> &[Arc<Known>] {
        if !self.of_pods.is_empty() && self.of_pods.contains_key(&address) {
            return &[];
        }
        self.addresses.get(&address).map_or(&[], |sharing| sharing)
    }

    /// The services of the networks that hold this address: longest prefix first.
    pub(crate) fn around<'a, 'n>(
        &'a self,
        network: &'n str,
        address: IpAddr,
    ) -> impl Iterator<Item = &'a [Arc<Known>]> + use<'a, 'n> {
        self.lengths.iter().filter_map(move |(length, _)| {
            let net = IpNet::new(address, *length).ok()?.trunc();
            self.nets.get(&NetRef { network, net }).map(|sharing| &**sharing)
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

fn put(sharing: &mut Sharing, known: &Arc<Known>) {
    match sharing.binary_search_by(|other| other.service.host.cmp(&known.service.host)) {
        Ok(at) => {
            if let Some(earlier) = sharing.get_mut(at) {
                *earlier = Arc::clone(known);
            }
        }
        Err(at) => sharing.insert(at, Arc::clone(known)),
    }
}

/// Takes the service out; whether none is left.
fn take(sharing: &mut Sharing, host: &NamespacedHost) -> bool {
    sharing.retain(|other| other.service.host != *host);
    sharing.is_empty()
}
