//! Connection windows that grow with proven traffic, under one cap for the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Settings;
use crate::settings::LARGEST_WINDOW;

/// Received bytes, in current windows, after which a window doubles.
const PROVEN_WINDOWS: u64 = 4;
/// Held bytes are counted in steps of this, so that a window does not change with every frame.
pub(crate) const HELD_STEP: u64 = 1024 * 1024;

/// What all connections of a process together may add to their starting windows.
///
/// A window is a promise of memory: a peer may fill it while the application does not read. Clones
/// share the budget.
#[derive(Debug, Clone)]
pub struct WindowBudget {
    left: Arc<AtomicU64>,
}

impl WindowBudget {
    /// A budget of `bytes`.
    pub fn new(bytes: u64) -> WindowBudget {
        WindowBudget { left: Arc::new(AtomicU64::new(bytes)) }
    }

    /// Bytes that can still be promised.
    pub fn left(&self) -> u64 {
        self.left.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Default for WindowBudget {
    /// 256 MiB.
    fn default() -> WindowBudget {
        WindowBudget::new(256 * 1024 * 1024)
    }
}

/// One connection's window; gives what it took back when dropped.
///
/// It is what traffic has proven, plus what tunnels hold for applications that do not read: those few
/// must not use up the window that all others need.
#[derive(Debug)]
pub(crate) struct Window {
    budget: WindowBudget,
    start: u32,
    proven: u32,
    max: u32,
    now: u32,
    /// Received bytes at which it grows next.
    next: u64,
}

impl Window {
    pub(crate) fn new(settings: &Settings, budget: WindowBudget) -> Window {
        let start = settings.connection_window.min(LARGEST_WINDOW);
        let max = settings.max_connection_window.clamp(start, LARGEST_WINDOW);
        Window { budget, start, proven: start, max, now: start, next: u64::from(start) * PROVEN_WINDOWS }
    }

    /// The window to set, if it is to be another one, given the bytes received and those held.
    pub(crate) fn change(&mut self, received: u64, held: u64) -> Option<u32> {
        if received >= self.next && self.proven < self.max {
            self.next = received + u64::from(self.proven) * PROVEN_WINDOWS;
            self.proven = self.proven.saturating_mul(2).min(self.max);
        }
        let held = u32::try_from(held.next_multiple_of(HELD_STEP)).unwrap_or(LARGEST_WINDOW);
        let target = self.proven.saturating_add(held).min(LARGEST_WINDOW);
        if target > self.now && !self.budget.take(u64::from(target - self.now)) {
            return None;
        }
        if target < self.now {
            self.budget.give_back(u64::from(self.now - target));
        }
        let changed = target != self.now;
        self.now = target;
        changed.then_some(target)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.budget.give_back(u64::from(self.now - self.start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    #[test]
    fn a_window_doubles_with_proven_traffic_up_to_its_limit() {
        let budget = WindowBudget::default();
        let mut window = Window::new(&Settings::default(), budget.clone());
        assert_eq!(window.change(15 * MIB, 0), None);
        assert_eq!(window.change(16 * MIB, 0), Some(8 * 1024 * 1024));
        assert_eq!(window.change(17 * MIB, 0), None);
        assert_eq!(window.change(48 * MIB, 0), Some(16 * 1024 * 1024));
        assert_eq!(window.change(1000 * MIB, 0), None);
        assert_eq!(budget.left(), (256 - 12) * MIB);
        drop(window);
        assert_eq!(budget.left(), 256 * MIB);
    }

    #[test]
    fn what_is_held_is_added_while_it_is_held() {
        let budget = WindowBudget::default();
        let mut window = Window::new(&Settings::default(), budget.clone());
        assert_eq!(window.change(0, 4 * MIB), Some(8 * 1024 * 1024));
        assert_eq!(window.change(0, 4 * MIB - 1), None);
        assert_eq!(window.change(0, 4 * MIB + 1), Some(9 * 1024 * 1024));
        assert_eq!(window.change(0, 0), Some(4 * 1024 * 1024));
        assert_eq!(budget.left(), 256 * MIB);
    }

    #[test]
    fn the_process_never_promises_more_than_its_budget() {
        let budget = WindowBudget::new(5 * MIB);
        let mut one = Window::new(&Settings::default(), budget.clone());
        let mut two = Window::new(&Settings::default(), budget);
        assert!(one.change(100 * MIB, 0).is_some());
        assert!(two.change(100 * MIB, 0).is_none());
        drop(one);
        assert!(two.change(100 * MIB, 0).is_some());
    }
}
