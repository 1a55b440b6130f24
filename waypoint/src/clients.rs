//! How many connections clients outside the mesh may have at a gateway, by their address, so that none uses up what others need.
//!
//! A connection is counted among the open ones until it ends, and among the pending ones until its client has begun with TLS and a
//! request, or with what its listener passes on. The tables have an address for as long as it has a connection. A lock is held to
//! count, once when a connection begins and once when it ends.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::config::Limits;

/// An address that has fewer connections than this may use the last eighth of all places.
const FEW: usize = 8;

/// Who counts as one: an IPv4 address, or an IPv6 network of 64 bits, which one host can use up alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Origin(IpAddr);

impl From<IpAddr> for Origin {
    fn from(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        })
    }
}

/// Which limit refuses a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// That of its address.
    Address,
    /// That of all addresses.
    Total,
}

/// Connections that were refused, by what refused them.
#[derive(Debug, Default)]
pub struct Refusals {
    /// The limit of one address.
    pub address: AtomicU64,
    /// The limit of all addresses.
    pub total: AtomicU64,
    /// The limit of one address for connections that have not begun.
    pub pending_address: AtomicU64,
    /// The limit of all addresses for connections that have not begun.
    pub pending_total: AtomicU64,
    /// They came without a header of the PROXY protocol, or from where none is believed.
    pub proxy_protocol: AtomicU64,
}

/// Connections of one kind, by address.
#[derive(Debug)]
pub struct Counts {
    per_address: usize,
    total: usize,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    by_origin: HashMap<Origin, usize>,
    total: usize,
}

impl Counts {
    fn new(per_address: usize, total: usize) -> Arc<Self> {
        Arc::new(Self { per_address, total, held: Mutex::default() })
    }

    /// How many there are.
    pub fn open(&self) -> usize {
        self.held.lock().total
    }

    /// Why an address that has `own` of `open` connections may not have one more.
    fn refuses(&self, own: usize, open: usize) -> Option<Refused> {
        let for_all = self.total - self.total / 8;
        if own >= self.per_address {
            return Some(Refused::Address);
        }
        let has_room = open < for_all || (open < self.total && own < FEW);
        (!has_room).then_some(Refused::Total)
    }

    fn take(self: &Arc<Self>, address: IpAddr, is_limited: bool) -> Result<Place, Refused> {
        let origin = Origin::from(address);
        let mut held = self.held.lock();
        let own = held.by_origin.get(&origin).copied().unwrap_or_default();
        let own_limited = if is_limited { own } else { 0 };
        if let Some(refused) = self.refuses(own_limited, held.total) {
            return Err(refused);
        }
        held.by_origin.insert(origin, own + 1);
        held.total += 1;
        Ok(Place { counts: Arc::clone(self), origin })
    }
}

/// A connection's place in a table; given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    counts: Arc<Counts>,
    origin: Origin,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.counts.held.lock();
        held.total = held.total.saturating_sub(1);
        if let Some(own) = held.by_origin.get_mut(&self.origin) {
            *own -= 1;
            if *own == 0 {
                held.by_origin.remove(&self.origin);
            }
        }
    }
}

/// The connections of clients outside the mesh.
#[derive(Debug)]
pub struct Clients {
    /// All.
    pub open: Arc<Counts>,
    /// Those whose client has not begun.
    pub pending: Arc<Counts>,
}

/// The places of a connection whose client has not begun.
#[derive(Debug)]
pub struct Places {
    /// Until its end.
    pub open: Place,
    /// Until its client has begun.
    pub pending: Place,
}

impl Clients {
    /// Nobody is connected.
    pub fn new(limits: &Limits) -> Self {
        Self {
            open: Counts::new(limits.connections_per_client, limits.client_connections),
            pending: Counts::new(limits.pending_per_client, limits.pending_connections),
        }
    }

    /// Counts a connection of an address. One of a proxy, which has many clients, is limited only with all others.
    ///
    /// # Errors
    /// There are too many; that is counted.
    pub fn take(&self, address: IpAddr, is_proxy: bool, refusals: &Refusals) -> Result<Places, Refused> {
        let count = |refused: Refused, of_address: &AtomicU64, of_all: &AtomicU64| {
            match refused {
                Refused::Address => of_address.fetch_add(1, Ordering::Relaxed),
                Refused::Total => of_all.fetch_add(1, Ordering::Relaxed),
            };
            refused
        };
        let open = self.open.take(address, !is_proxy);
        let open = open.map_err(|refused| count(refused, &refusals.address, &refusals.total))?;
        let pending = self.pending.take(address, !is_proxy);
        let pending =
            pending.map_err(|refused| count(refused, &refusals.pending_address, &refusals.pending_total))?;
        Ok(Places { open, pending })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn an_address_has_its_limit_and_places_come_back() {
        let counts = Counts::new(2, 100);
        let first = counts.take(address(1), true).unwrap();
        let _second = counts.take(address(1), true).unwrap();
        assert_eq!(counts.take(address(1), true).unwrap_err(), Refused::Address);
        let _other = counts.take(address(2), true).unwrap();
        let _proxy = counts.take(address(1), false).unwrap();
        assert_eq!(counts.open(), 4);
        drop(first);
        assert_eq!(counts.take(address(1), true).unwrap_err(), Refused::Address);
        drop(_proxy);
        assert!(counts.take(address(1), true).is_ok());
    }

    #[test]
    fn an_ipv6_network_is_one_client() {
        let counts = Counts::new(1, 100);
        let _first = counts.take("2001:db8::1".parse().unwrap(), true).unwrap();
        assert!(counts.take("2001:db8::2".parse().unwrap(), true).is_err());
        assert!(counts.take("2001:db8:0:1::1".parse().unwrap(), true).is_ok());
        let _mapped = counts.take("::ffff:192.0.2.1".parse().unwrap(), true).unwrap();
        assert!(counts.take(address(1), true).is_err());
    }

    #[test]
    fn the_last_places_are_for_addresses_with_few_connections() {
        let counts = Counts::new(60, 64);
        assert_eq!(counts.refuses(59, 55), None);
        assert_eq!(counts.refuses(60, 0), Some(Refused::Address));
        assert_eq!(counts.refuses(8, 56), Some(Refused::Total));
        assert_eq!(counts.refuses(7, 63), None);
        assert_eq!(counts.refuses(0, 64), Some(Refused::Total));
    }

    #[test]
    fn nothing_is_kept_of_an_address_that_has_left() {
        let clients = Clients::new(&Limits { pending_per_client: 1, ..Limits::default() });
        let refusals = Refusals::default();
        let places = clients.take(address(1), false, &refusals).unwrap();
        // What is refused as pending is not left among the open ones.
        assert!(clients.take(address(1), false, &refusals).is_err());
        assert_eq!((clients.open.open(), refusals.pending_address.load(Ordering::Relaxed)), (1, 1));
        drop(places);
        assert!(clients.open.held.lock().by_origin.is_empty());
        assert!(clients.pending.held.lock().by_origin.is_empty());
    }
}
