//! Turns of token reviews: how many are asked for at the same time, in all and by one address.
//!
//! Anybody who reaches the port can send tokens that nobody signed. An address has few turns, so that it cannot take all
//! of them, and tokens that were accepted before have turns of their own, so that proxies of the mesh are not kept waiting.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Reviews at the same time of tokens that are not known.
const UNKNOWN: usize = 24;
/// Reviews at the same time of tokens that were accepted before.
const ACCEPTED: usize = 8;
/// Reviews at the same time that one address asks for.
const PER_ADDRESS: usize = 4;

/// The turns of each address, and by how many they are used or awaited.
type Addresses = HashMap<Option<IpAddr>, (usize, Arc<Semaphore>)>;

/// The turns.
#[derive(Debug)]
pub(super) struct Turns {
    unknown: Arc<Semaphore>,
    accepted: Arc<Semaphore>,
    /// Turns of the addresses that use or await one. Guards the map alone; never held across an await.
    addresses: Arc<Mutex<Addresses>>,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            unknown: Arc::new(Semaphore::new(UNKNOWN)),
            accepted: Arc::new(Semaphore::new(ACCEPTED)),
            addresses: Arc::default(),
        }
    }
}

/// A turn, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _own: Option<OwnedSemaphorePermit>,
    _shared: Option<OwnedSemaphorePermit>,
    _address: AddressTurns,
}

/// The turns of an address, held by each that uses or awaits one of them.
#[derive(Debug)]
struct AddressTurns {
    address: Option<IpAddr>,
    turns: Arc<Semaphore>,
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
        // The semaphores are never closed.
        let own = Arc::clone(&address.turns).acquire_owned().await.ok();
        let shared = if was_accepted { &self.accepted } else { &self.unknown };
        let shared = Arc::clone(shared).acquire_owned().await.ok();
        Turn { _own: own, _shared: shared, _address: address }
    }

    fn of(&self, address: Option<IpAddr>) -> AddressTurns {
        let address = address.map(|address| address.to_canonical());
        let mut addresses = self.addresses.lock();
        let (holders, turns) =
            addresses.entry(address).or_insert_with(|| (0, Arc::new(Semaphore::new(PER_ADDRESS))));
        *holders += 1;
        AddressTurns { address, turns: Arc::clone(turns), addresses: Arc::clone(&self.addresses) }
    }
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
    async fn accepted_tokens_have_turns_of_their_own() {
        let turns = Turns::default();
        let mut held = Vec::new();
        for n in 0..UNKNOWN {
            held.push(turns.take(address(u8::try_from(n / PER_ADDRESS).unwrap()), false).await);
        }
        assert!(turns.take(address(99), false).now_or_never().is_none());
        assert!(turns.take(address(99), true).now_or_never().is_some());
    }
}
