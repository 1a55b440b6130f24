//! Connection windows that grow with proven traffic, within one budget for the process that is divided by address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::ConnectionSettings;
use crate::settings::LARGEST_WINDOW;

/// RFC 9113 §6.9.2: the initial window of every connection, which can't be reduced.
const MINIMUM: u32 = 65_535;
/// Received bytes, in current windows, after which a window doubles.
const PROVEN_WINDOWS: u64 = 4;
/// Held bytes are counted in steps of this, so that a window does not change with every frame.
pub(crate) const HELD_STEP: u64 = 1024 * 1024;

/// The bytes that all connections of a process together may add to the 64 KiB that HTTP/2 gives to each.
///
/// A peer may fill a window while the application does not read, so a window is reserved memory. The bytes of a connection
/// are counted for both of its addresses. A local address (a pod) gets at most as much as remains for all others, a remote
/// one (a peer) half of that. So one pod gets at most half of the budget and one peer a third, and something always remains
/// for the next. Clones share the budget.
#[derive(Debug, Clone)]
pub struct WindowBudget(Arc<Mutex<Budget>>);

/// Locked when a window is made, changed or dropped, not for traffic.
#[derive(Debug)]
struct Budget {
    left: u64,
    used: HashMap<IpAddr, u64>,
    refused: u64,
}

impl WindowBudget {
    /// A budget of `bytes`.
    pub fn new(bytes: u64) -> WindowBudget {
        WindowBudget(Arc::new(Mutex::new(Budget { left: bytes, used: HashMap::new(), refused: 0 })))
    }

    /// Bytes that are not taken.
    pub fn left(&self) -> u64 {
        self.0.lock().left
    }

    /// How often a window did not grow because its share was used up.
    pub fn refused(&self) -> u64 {
        self.0.lock().refused
    }

    /// The share of connections between two addresses.
    pub fn share(&self, local: IpAddr, remote: IpAddr) -> WindowShare {
        WindowShare { budget: self.clone(), local: local.to_canonical(), remote: remote.to_canonical() }
    }
}

impl Default for WindowBudget {
    /// 256 MiB.
    fn default() -> WindowBudget {
        WindowBudget::new(256 * 1024 * 1024)
    }
}

/// The part of a [`WindowBudget`] that connections between two addresses may use.
#[derive(Debug, Clone)]
pub struct WindowShare {
    budget: WindowBudget,
    local: IpAddr,
    remote: IpAddr,
}

impl WindowShare {
    fn take(&self, bytes: u64) -> bool {
        let mut budget = self.budget.0.lock();
        let used_by = |address| budget.used.get(address).copied().unwrap_or(0) + bytes;
        let (local, remote) = (used_by(&self.local), used_by(&self.remote));
        let left = budget.left.checked_sub(bytes).filter(|left| local.max(remote.saturating_mul(2)) <= *left);
        let Some(left) = left else {
            budget.refused += 1;
            return false;
        };
        budget.left = left;
        for address in self.addresses() {
            *budget.used.entry(address).or_default() += bytes;
        }
        true
    }

    /// Each address once.
    fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let remote = Some(self.remote).filter(|remote| *remote != self.local);
        std::iter::once(self.local).chain(remote)
    }

    fn give_back(&self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let mut budget = self.budget.0.lock();
        budget.left += bytes;
        for address in self.addresses() {
            if let Some(used) = budget.used.get_mut(&address) {
                *used = used.saturating_sub(bytes);
                if *used == 0 {
                    budget.used.remove(&address);
                }
            }
        }
    }
}

/// One connection's window; returns what it took to the budget when dropped.
///
/// Its size follows the proven traffic, plus the bytes that tunnels hold for applications that do not read, so that these
/// do not use up the window of the others.
#[derive(Debug)]
pub(crate) struct Window {
    share: WindowShare,
    proven: u32,
    max: u32,
    size: u32,
    /// Received bytes at which it grows next.
    next: u64,
    /// The growth that was refused; it is not asked for again until [`Window::retry`].
    refused: Option<u32>,
}

impl Window {
    pub(crate) fn new(settings: &ConnectionSettings, share: WindowShare) -> Window {
        let wanted = settings.initial_window.clamp(MINIMUM, LARGEST_WINDOW);
        let size = if share.take(u64::from(wanted - MINIMUM)) { wanted } else { MINIMUM };
        let max = settings.max_window.clamp(size, LARGEST_WINDOW);
        Window { share, proven: size, max, size, next: u64::from(size) * PROVEN_WINDOWS, refused: None }
    }

    /// The window in force.
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// Lets a growth that was refused be asked for again.
    pub(crate) fn retry(&mut self) {
        self.refused = None;
    }

    /// The new size of the window, if it changes, given the bytes received and those held.
    pub(crate) fn change(&mut self, received: u64, held: u64) -> Option<u32> {
        if received >= self.next && self.proven < self.max {
            self.next = received + u64::from(self.proven) * PROVEN_WINDOWS;
            self.proven = self.proven.saturating_mul(2).min(self.max);
        }
        let held = u32::try_from(held.next_multiple_of(HELD_STEP)).unwrap_or(LARGEST_WINDOW);
        let target = self.proven.saturating_add(held).min(LARGEST_WINDOW);
        if self.refused == Some(target) {
            return None;
        }
        if target > self.size && !self.share.take(u64::from(target - self.size)) {
            self.refused = Some(target);
            return None;
        }
        self.refused = None;
        if target < self.size {
            self.share.give_back(u64::from(self.size - target));
        }
        let changed = target != self.size;
        self.size = target;
        changed.then_some(target)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.share.give_back(u64::from(self.size - MINIMUM));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;
    const MIB: u64 = 1024 * KIB;

    fn share(budget: &WindowBudget, local: u8, remote: u8) -> WindowShare {
        budget.share([10, 0, 0, local].into(), [10, 0, 1, remote].into())
    }

    fn settings() -> ConnectionSettings {
        ConnectionSettings { initial_window: 4 << 20, ..ConnectionSettings::default() }
    }

    #[test]
    fn a_window_doubles_with_proven_traffic_up_to_its_limit() {
        let budget = WindowBudget::default();
        let mut window = Window::new(&settings(), share(&budget, 1, 1));
        assert_eq!(window.size(), 4 << 20);
        assert_eq!(window.change(15 * MIB, 0), None);
        assert_eq!(window.change(16 * MIB, 0), Some(8 << 20));
        assert_eq!(window.change(17 * MIB, 0), None);
        assert_eq!(window.change(48 * MIB, 0), Some(16 << 20));
        assert_eq!(window.change(1000 * MIB, 0), None);
        assert_eq!(budget.left(), (256 - 16) * MIB + u64::from(MINIMUM), "the first window is counted");
        drop(window);
        assert_eq!(budget.left(), 256 * MIB);
        assert!(budget.0.lock().used.is_empty());
    }

    #[test]
    fn held_bytes_are_added_while_they_are_held() {
        let budget = WindowBudget::default();
        let mut window = Window::new(&settings(), share(&budget, 1, 1));
        assert_eq!(window.change(0, 4 * MIB), Some(8 << 20));
        assert_eq!(window.change(0, 4 * MIB - 1), None);
        assert_eq!(window.change(0, 4 * MIB + 1), Some(9 << 20));
        assert_eq!(window.change(0, 0), Some(4 << 20));
    }

    #[test]
    fn without_budget_a_connection_has_the_minimum_of_http2() {
        let budget = WindowBudget::new(0);
        let mut window = Window::new(&settings(), share(&budget, 1, 1));
        assert_eq!(window.size(), MINIMUM);
        assert_eq!(window.change(1000 * MIB, 4 * MIB), None);
        assert!(budget.refused() > 0);
        drop(window);
        assert_eq!(budget.left(), 0);
    }

    #[test]
    fn one_address_cannot_use_up_the_budget_of_others() {
        let budget = WindowBudget::new(64 * MIB);
        let grow = |local, remote, windows: &mut Vec<Window>| {
            for _ in 0..200 {
                let mut window = Window::new(&settings(), share(&budget, local, remote));
                window.change(0, 4 * MIB);
                windows.push(window);
            }
        };
        let mut greedy = Vec::new();
        // From one peer to many pods, and from many peers to one pod.
        (0..20).for_each(|pod| grow(pod, 1, &mut greedy));
        assert!(budget.left() >= 42 * MIB, "{} left", budget.left());
        let beside = Window::new(&settings(), share(&budget, 0, 2));
        assert_eq!(beside.size(), 4 << 20, "another peer of the same pod");
        (0..20).for_each(|peer| grow(99, 100 + peer, &mut greedy));
        assert!(budget.left() >= 19 * MIB, "{} left", budget.left());
        let mut other = Window::new(&settings(), share(&budget, 50, 50));
        assert_eq!(other.change(0, 1), Some(5 << 20));
        drop(beside);
        drop((greedy, other));
        assert_eq!(budget.left(), 64 * MIB);
    }
}
