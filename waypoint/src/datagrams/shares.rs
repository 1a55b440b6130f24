//! How many sessions there may be, and how many of them one client may have. Pure but for its lock.
//!
//! A client may have as many as are left free (dynamic thresholds: Choudhury and Hahne, 1998), as with the shares of node proxies:
//! one that takes all it can get ends at half of them, and the next one always finds some.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;

/// What a client may always have, while any are free.
const FLOOR: usize = 4;

/// Which bound was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// There are as many sessions as may be.
    #[error("there are as many sessions as may be")]
    Total,
    /// The client has its share of them.
    #[error("its client has its share of the sessions")]
    Client,
}

/// The sessions of all clients.
#[derive(Debug)]
pub struct Shares {
    most: usize,
    /// Held for a look-up, at the begin and end of a session.
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    total: usize,
    by_client: HashMap<IpAddr, usize>,
}

/// One session of a client, until it is dropped.
#[derive(Debug)]
pub struct Share {
    shares: Arc<Shares>,
    client: IpAddr,
}

impl Shares {
    /// At most this many sessions at once.
    pub fn new(most: usize) -> Self {
        Self { most, held: Mutex::default() }
    }

    /// How many there are.
    pub fn total(&self) -> usize {
        self.held.lock().total
    }

    /// Counts one more session of a client.
    ///
    /// # Errors
    /// [`Full`].
    pub fn take(self: &Arc<Self>, client: IpAddr) -> Result<Share, Full> {
        let client = holder(client);
        let mut held = self.held.lock();
        let free = self.most.saturating_sub(held.total);
        if free == 0 {
            return Err(Full::Total);
        }
        let own = held.by_client.get(&client).copied().unwrap_or_default();
        if own >= free.max(FLOOR) {
            return Err(Full::Client);
        }
        held.by_client.insert(client, own + 1);
        held.total += 1;
        Ok(Share { shares: self.clone(), client })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut held = self.shares.held.lock();
        held.total = held.total.saturating_sub(1);
        let own = held.by_client.get(&self.client).copied().unwrap_or_default();
        match own {
            0 | 1 => _ = held.by_client.remove(&self.client),
            more => _ = held.by_client.insert(self.client, more - 1),
        }
    }
}

/// Whose sessions are counted together: an IPv6 host may use every address of its /64 (RFC 4291 §2.5.4).
fn holder(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn one_client_gets_half_and_others_the_rest() {
        let shares = Arc::new(Shares::new(100));
        let take = |client| std::iter::from_fn(|| shares.take(client).ok()).collect::<Vec<_>>();
        let first = take(client(1));
        assert_eq!(first.len(), 50);
        assert_eq!(shares.take(client(1)).unwrap_err(), Full::Client);
        assert_eq!(take(client(2)).len(), 25);
        drop(first);
        assert_eq!(shares.total(), 0);
        assert!(shares.held.lock().by_client.is_empty());
    }

    #[test]
    fn nobody_gets_more_than_there_are() {
        let shares = Arc::new(Shares::new(6));
        let held: Vec<Share> = (0..6).map(|at| shares.take(client(at)).unwrap()).collect();
        assert_eq!(shares.take(client(9)).unwrap_err(), Full::Total);
        drop(held);
        assert!(shares.take(client(9)).is_ok());
    }

    #[test]
    fn the_addresses_of_an_ipv6_network_are_one_client() {
        let shares = Arc::new(Shares::new(10));
        let addresses = (0..10).map(|at| IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, at)));
        let held: Vec<_> = addresses.map(|address| shares.take(address)).collect();
        assert_eq!(held.iter().filter(|share| share.is_ok()).count(), 5);
    }
}
