//! Which sockets may be in their handshake at the same time. No I/O, no clock.
//!
//! When there are too many, of one address or in total, a new socket evicts the oldest one that has not sent anything
//! yet, or else the oldest. A proxy sends its ClientHello at once and completes within milliseconds, so it is not
//! evicted in practice.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};

/// Number of a socket, in the order of arrival.
pub(crate) type SocketId = u64;

/// How many sockets may be in their handshake.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HandshakeLimits {
    /// Of one address. At least 1.
    pub(crate) per_address: usize,
    /// Of all addresses. At least 1.
    pub(crate) total: usize,
}

/// Who counts as one: an IPv4 address, or an IPv6 network of 64 bits, which one host can use up alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Origin(IpAddr);

impl From<IpAddr> for Origin {
    fn from(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        })
    }
}

#[derive(Debug)]
struct Socket {
    origin: Origin,
    has_sent: bool,
}

/// The sockets that are in their handshake.
#[derive(Debug)]
pub(crate) struct Handshakes {
    limits: HandshakeLimits,
    sockets: BTreeMap<SocketId, Socket>,
    by_origin: HashMap<Origin, Vec<SocketId>>,
    next: SocketId,
}

impl Handshakes {
    pub(crate) fn new(limits: HandshakeLimits) -> Self {
        Self { limits, sockets: BTreeMap::new(), by_origin: HashMap::new(), next: 0 }
    }

    /// Adds a new socket; the second value is the socket that it evicts.
    pub(crate) fn begin(&mut self, origin: Origin) -> (SocketId, Option<SocketId>) {
        let evicted = self.evict(origin);
        let id = self.next;
        self.next += 1;
        self.sockets.insert(id, Socket { origin, has_sent: false });
        self.by_origin.entry(origin).or_default().push(id);
        (id, evicted)
    }

    /// The socket has sent its first byte.
    pub(crate) fn handle_first_byte(&mut self, id: SocketId) {
        if let Some(socket) = self.sockets.get_mut(&id) {
            socket.has_sent = true;
        }
    }

    /// The handshake is over, whatever came of it.
    pub(crate) fn end(&mut self, id: SocketId) {
        let Some(Socket { origin, .. }) = self.sockets.remove(&id) else { return };
        if let Some(ids) = self.by_origin.get_mut(&origin) {
            ids.retain(|other| *other != id);
            if ids.is_empty() {
                self.by_origin.remove(&origin);
            }
        }
    }

    fn evict(&mut self, origin: Origin) -> Option<SocketId> {
        let of_origin = self.by_origin.get(&origin).map_or(&[][..], Vec::as_slice);
        let evicted = if of_origin.len() >= self.limits.per_address {
            self.first_to_go(of_origin.iter().copied())
        } else if self.sockets.len() >= self.limits.total {
            self.first_to_go(self.sockets.keys().copied())
        } else {
            None
        }?;
        self.end(evicted);
        Some(evicted)
    }

    /// Of sockets in the order of their arrival: the first that is silent, else the first.
    fn first_to_go(&self, mut ids: impl Iterator<Item = SocketId> + Clone) -> Option<SocketId> {
        let is_silent = |id: &SocketId| self.sockets.get(id).is_some_and(|socket| !socket.has_sent);
        ids.clone().find(is_silent).or_else(|| ids.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(text: &str) -> Origin {
        text.parse::<IpAddr>().unwrap().into()
    }

    fn handshakes(per_address: usize, total: usize) -> Handshakes {
        Handshakes::new(HandshakeLimits { per_address, total })
    }

    #[test]
    fn an_address_takes_places_from_nobody_but_itself() {
        let mut handshakes = handshakes(2, 100);
        let hostile = origin("10.0.0.1");
        let (other, _) = handshakes.begin(origin("10.0.0.2"));
        let (first, _) = handshakes.begin(hostile);
        handshakes.begin(hostile);
        assert_eq!(handshakes.begin(hostile).1, Some(first));
        assert_eq!(handshakes.sockets.len(), 3);
        handshakes.end(other);
        assert_eq!(handshakes.sockets.len(), 2);
    }

    #[test]
    fn the_oldest_silent_socket_gives_way_first() {
        let mut handshakes = handshakes(10, 3);
        let (first, _) = handshakes.begin(origin("10.0.0.1"));
        let (second, _) = handshakes.begin(origin("10.0.0.2"));
        let (third, _) = handshakes.begin(origin("10.0.0.3"));
        handshakes.handle_first_byte(first);
        assert_eq!(handshakes.begin(origin("10.0.0.4")).1, Some(second));
        for id in 0..10 {
            handshakes.handle_first_byte(id);
        }
        assert_eq!(handshakes.begin(origin("10.0.0.5")).1, Some(first));
        handshakes.end(third);
        assert_eq!(handshakes.begin(origin("10.0.0.6")).1, None);
    }

    #[test]
    fn a_network_of_ipv6_is_one_origin() {
        assert_eq!(origin("2001:db8::1"), origin("2001:db8::2:0:0:1"));
        assert_ne!(origin("2001:db8::1"), origin("2001:db8:0:1::1"));
        assert_eq!(origin("::ffff:10.0.0.1"), origin("10.0.0.1"));
    }

    #[test]
    fn what_has_ended_leaves_nothing_behind() {
        let mut handshakes = handshakes(2, 2);
        for _ in 0..100 {
            handshakes.begin(origin("10.0.0.1"));
        }
        for id in 0..100 {
            handshakes.end(id);
        }
        assert!(handshakes.sockets.is_empty());
        assert!(handshakes.by_origin.is_empty());
    }
}
