//! Turns of token reviews: how many are asked for at the same time, in all and by one address.
//!
//! Anybody who reaches the port can send tokens that nobody signed. The first turn of an address is one of those that no address
//! has two of, so that a few addresses cannot take all, and tokens that were accepted before have turns of their own, so that
//! proxies of the mesh are not kept waiting.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Reviews at the same time of tokens that are not known, one for each address.
const FIRST: usize = 24;
/// Further reviews at the same time of tokens that are not known.
const FURTHER: usize = 8;
/// Reviews at the same time of tokens that were accepted before.
const ACCEPTED: usize = 8;
/// Reviews at the same time that one address asks for.
const PER_ADDRESS: usize = 4;

/// The turns of each address, and by how many they are used or awaited.
type Addresses = HashMap<Option<IpAddr>, (usize, OwnTurns)>;

/// The turns.
#[derive(Debug)]
pub(super) struct Turns {
    /// Of tokens that are not known.
    unknown: Pair,
    /// Of tokens that were accepted before.
    accepted: Arc<Semaphore>,
    /// Turns of the addresses that use or await one. Guards the map alone; never held across an await.
    addresses: Arc<Mutex<Addresses>>,
}

/// First turns, and further ones.
#[derive(Debug, Clone)]
struct Pair {
    first: Arc<Semaphore>,
    further: Arc<Semaphore>,
}

impl Pair {
    fn new(first: usize, further: usize) -> Self {
        Self { first: Arc::new(Semaphore::new(first)), further: Arc::new(Semaphore::new(further)) }
    }
}

/// The turns of one address.
#[derive(Debug, Clone)]
struct OwnTurns {
    unknown: Pair,
    accepted: Arc<Semaphore>,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            unknown: Pair::new(FIRST, FURTHER),
            accepted: Arc::new(Semaphore::new(ACCEPTED)),
            addresses: Arc::default(),
        }
    }
}

/// A turn, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _permits: [Option<OwnedSemaphorePermit>; 2],
    _address: AddressTurns,
}

/// The turns of an address, held by each that uses or awaits one of them.
#[derive(Debug)]
struct AddressTurns {
    address: Option<IpAddr>,
    turns: OwnTurns,
    addresses: Arc<Mutex<Addresses>>,
}

impl Drop for AddressTurns {
    fn drop(&mut self) {
        let mut addresses = self.addresses.lock();
        let Some((holders, _)) = addresses.get_mut(&self.address) else { return };
        *holders -= 1;
        if *holders == 0 {
            addresses.remove(&self.address);
        }
    }
}

impl Turns {
    /// Waits for a turn of this address. One that gives up waiting leaves nothing behind.
    pub(super) async fn take(&self, address: Option<IpAddr>, was_accepted: bool) -> Turn {
        let address = self.of(address);
        let OwnTurns { unknown, accepted } = address.turns.clone();
        let permits = if was_accepted {
            both(accepted, &self.accepted).await
        } else {
            tokio::select! {
                biased;
                permits = both(unknown.first, &self.unknown.first) => permits,
                permits = both(unknown.further, &self.unknown.further) => permits,
            }
        };
        Turn { _permits: permits, _address: address }
    }

    fn of(&self, address: Option<IpAddr>) -> AddressTurns {
        let address = address.map(|address| address.to_canonical());
        let mut addresses = self.addresses.lock();
        let (holders, turns) = addresses.entry(address).or_insert_with(|| {
            let accepted = Arc::new(Semaphore::new(PER_ADDRESS));
            (0, OwnTurns { unknown: Pair::new(1, PER_ADDRESS - 1), accepted })
        });
        *holders += 1;
        AddressTurns { address, turns: turns.clone(), addresses: Arc::clone(&self.addresses) }
    }
}

/// Waits for a turn of an address's own, then for one of those that all share. The semaphores are never closed.
async fn both(own: Arc<Semaphore>, shared: &Arc<Semaphore>) -> [Option<OwnedSemaphorePermit>; 2] {
    let own = own.acquire_owned().await.ok();
    [own, Arc::clone(shared).acquire_owned().await.ok()]
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn address(n: u8) -> Option<IpAddr> {
        Some([10, 0, 0, n].into())
    }

    #[tokio::test]
    async fn one_address_cannot_take_all_turns() {
        let turns = Turns::default();
        let mut held = Vec::new();
        for _ in 0..PER_ADDRESS {
            held.push(turns.take(address(1), false).await);
        }
        assert!(turns.take(address(1), false).now_or_never().is_none());
        assert!(turns.take(address(2), false).now_or_never().is_some());
        held.pop();
        assert!(turns.take(address(1), false).now_or_never().is_some());
        drop(held);
        assert!(turns.addresses.lock().is_empty(), "an address without turns is forgotten");
    }

    #[tokio::test]
    async fn a_few_addresses_cannot_take_the_turns_of_others() {
        let turns = Turns::default();
        let mut held = Vec::new();
        for _ in 0..PER_ADDRESS {
            for n in 1..FIRST {
                held.extend(turns.take(address(u8::try_from(n).unwrap()), false).now_or_never());
            }
        }
        assert_eq!(held.len(), FIRST - 1 + FURTHER);
        assert!(turns.take(address(99), false).now_or_never().is_some());
    }

    #[tokio::test]
    async fn accepted_tokens_have_turns_of_their_own() {
        let turns = Turns::default();
        let mut held = Vec::new();
        for n in 0..FIRST + FURTHER {
            held.extend(turns.take(address(u8::try_from(n).unwrap()), false).now_or_never());
        }
        assert!(turns.take(address(99), false).now_or_never().is_none());
        assert!(turns.take(address(99), true).now_or_never().is_some());
    }
}
