//! How much a connection carries. Written by its tunnels, read by the pool and by the connection's task.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::Context;
use std::time::{Duration, Instant};

use ambit_net::relay::{Sizing, Tier};
use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use crate::windows::HELD_STEP;

/// How long a connection counts as carrying bulk after the last large piece.
const BULK_FOR: Duration = Duration::from_millis(200);

/// The load of one connection. All of it is advisory, so relaxed counters suffice.
#[derive(Debug)]
pub(crate) struct Load {
    epoch: Instant,
    open: AtomicU32,
    opened: AtomicU64,
    received: AtomicU64,
    held: AtomicU64,
    /// The connection's task, which adjusts the window to what is held.
    driver: AtomicWaker,
    /// Milliseconds after the epoch; 0 for never.
    last_bulk: AtomicU64,
    /// A CONNECT waits for the answer to a PING.
    probe_requested: AtomicBool,
    alive: Notify,
}

impl Load {
    pub(crate) fn new(now: Instant) -> Arc<Load> {
        Arc::new(Load {
            epoch: now,
            open: AtomicU32::new(0),
            opened: AtomicU64::new(0),
            received: AtomicU64::new(0),
            held: AtomicU64::new(0),
            driver: AtomicWaker::new(),
            last_bulk: AtomicU64::new(0),
            probe_requested: AtomicBool::new(false),
            alive: Notify::new(),
        })
    }

    /// Counts one more tunnel, until the lease is dropped.
    pub(crate) fn enter(self: &Arc<Load>) -> Lease {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.opened.fetch_add(1, Ordering::Relaxed);
        Lease { load: Arc::clone(self), held: 0 }
    }

    /// Tunnels that are open, or being opened.
    pub(crate) fn open(&self) -> u32 {
        self.open.load(Ordering::Relaxed)
    }

    /// Tunnels that were ever opened.
    pub(crate) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Bytes that tunnels received from the connection and delivered.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes that tunnels received and could not deliver yet.
    pub(crate) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Has the connection's task send a PING, and waits until the peer answers one.
    pub(crate) async fn probe(&self) {
        let answered = self.alive.notified();
        self.probe_requested.store(true, Ordering::Release);
        self.driver.wake();
        answered.await;
    }

    /// Whether [`probe`](Load::probe) was called since this was called last.
    pub(crate) fn take_probe_request(&self) -> bool {
        self.probe_requested.load(Ordering::Acquire) && self.probe_requested.swap(false, Ordering::AcqRel)
    }

    /// The peer answered a PING.
    pub(crate) fn note_alive(&self) {
        self.alive.notify_waiters();
    }

    /// Wakes `cx` when what is held has grown by a step, or a probe is requested.
    pub(crate) fn watch(&self, cx: &Context<'_>) {
        self.driver.register(cx.waker());
    }

    /// Whether one of its tunnels carries bulk.
    pub(crate) fn is_bulk(&self, now: Instant) -> bool {
        let last = self.last_bulk.load(Ordering::Relaxed);
        last != 0 && self.millis(now).saturating_sub(last) < BULK_FOR.as_millis() as u64
    }

    fn millis(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_millis() as u64
    }
}

/// One tunnel's part in the load; ends with it.
#[derive(Debug)]
pub(crate) struct Lease {
    load: Arc<Load>,
    held: u64,
}

impl Lease {
    /// Records `bytes` that moved in one direction, whose read sizes are `sizing`.
    pub(crate) fn record(&self, sizing: &mut Sizing, bytes: usize, now: Instant) {
        if sizing.record(bytes, now) == Tier::Bulk {
            self.mark_bulk(now);
        }
    }

    fn mark_bulk(&self, now: Instant) {
        self.load.last_bulk.store(self.load.millis(now).max(1), Ordering::Relaxed);
    }

    /// Counts bytes that were received from the connection and delivered.
    pub(crate) fn add_received(&self, bytes: usize) {
        self.load.received.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Sets how many received bytes the tunnel holds.
    pub(crate) fn set_held(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        if bytes == self.held {
            return;
        }
        let change = bytes.wrapping_sub(self.held);
        self.held = bytes;
        let before = self.load.held.fetch_add(change, Ordering::Relaxed);
        let after = before.wrapping_add(change);
        if after > before && after.div_ceil(HELD_STEP) > before.div_ceil(HELD_STEP) {
            self.load.driver.wake();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.set_held(0);
        self.load.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_counts_until_it_is_dropped() {
        let load = Load::new(Instant::now());
        let (one, two) = (load.enter(), load.enter());
        assert_eq!((load.open(), load.opened()), (2, 2));
        drop((one, two));
        assert_eq!((load.open(), load.opened()), (0, 2));
    }

    #[test]
    fn held_bytes_are_the_sum_over_the_leases() {
        let load = Load::new(Instant::now());
        let (mut one, mut two) = (load.enter(), load.enter());
        one.set_held(10);
        two.set_held(5);
        one.set_held(3);
        assert_eq!(load.held(), 8);
        drop((one, two));
        assert_eq!(load.held(), 0);
    }

    #[test]
    fn bulk_is_forgotten_when_it_pauses() {
        let now = Instant::now();
        let load = Load::new(now);
        assert!(!load.is_bulk(now));
        load.enter().mark_bulk(now);
        assert!(load.is_bulk(now + Duration::from_millis(100)));
        assert!(!load.is_bulk(now + Duration::from_millis(300)));
    }
}
