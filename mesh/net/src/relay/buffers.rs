//! Read buffers that belong to a worker, not to a connection.
//!
//! An idle connection holds none. When bytes arrive, it takes a buffer of its [`Tier`] from the
//! worker, reads, splits off the bytes that it read and returns the rest. When the last piece of a buffer
//! is written, the memory is used again. In steady traffic nothing is allocated.
//!
//! Each worker keeps at most [`KEPT`] buffers per tier (2.6 MiB when all are in use). More are
//! allocated when needed and freed with their pieces. [`trim`] frees large ones that were not
//! used for two seconds.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::Tier;

/// Buffers that a worker keeps for each tier.
pub const KEPT: usize = 8;
/// How long large buffers outlive their last use.
const LARGE_KEPT_FOR: Duration = Duration::from_secs(2);

/// Allocation size: several small reads share one, so that a small piece costs no allocation; one
/// stalled reader then pins no more than this.
const fn allocation(tier: Tier) -> usize {
    match tier {
        Tier::Idle => 16 * 1024,
        Tier::Steady => 64 * 1024,
        Tier::Bulk => 256 * 1024,
    }
}

#[derive(Default)]
struct FreeList {
    idle: Vec<BytesMut>,
    steady: Vec<BytesMut>,
    bulk: Vec<BytesMut>,
    bulk_used: Option<Instant>,
}

impl FreeList {
    fn tier(&mut self, tier: Tier) -> &mut Vec<BytesMut> {
        match tier {
            Tier::Idle => &mut self.idle,
            Tier::Steady => &mut self.steady,
            Tier::Bulk => &mut self.bulk,
        }
    }
}

thread_local! {
    static FREE_LIST: RefCell<FreeList> = RefCell::new(FreeList::default());
}

/// Takes an empty buffer with room for at least one read of `tier`.
pub fn take(tier: Tier) -> BytesMut {
    let size = tier.read_size();
    FREE_LIST.with_borrow_mut(|free_list| {
        let kept = free_list.tier(tier);
        let free = kept
            .iter_mut()
            .rposition(|buffer| buffer.capacity() >= size || buffer.try_reclaim(allocation(tier)));
        match free {
            Some(index) => kept.swap_remove(index),
            None => BytesMut::with_capacity(allocation(tier)),
        }
    })
}

/// Returns the rest of a buffer after its pieces were split off.
///
/// `now` is when it was last used; only the largest tier needs it.
pub fn give_back(tier: Tier, mut buffer: BytesMut, now: Option<Instant>) {
    buffer.clear();
    FREE_LIST.with_borrow_mut(|free_list| {
        if tier == Tier::Bulk && now.is_some() {
            free_list.bulk_used = now;
        }
        let kept = free_list.tier(tier);
        if kept.len() < KEPT {
            kept.push(buffer);
            return;
        }
        // Waiting pieces pin all kept buffers: a buffer with room replaces one without.
        let size = tier.read_size();
        if buffer.capacity() >= size
            && let Some(spent) = kept.iter_mut().find(|kept| kept.capacity() < size)
        {
            *spent = buffer;
        }
    });
}

/// Frees this worker's large buffers if none was used for two seconds. Called from a periodic task
/// of the worker.
pub fn trim(now: Instant) {
    FREE_LIST.with_borrow_mut(|free_list| {
        let stale =
            free_list.bulk_used.is_none_or(|used| now.saturating_duration_since(used) >= LARGE_KEPT_FOR);
        if stale {
            free_list.bulk = Vec::new();
            free_list.bulk_used = None;
        }
    });
}

/// Bytes of memory that this worker keeps allocated for the largest tier.
pub fn bulk_bytes_kept() -> usize {
    FREE_LIST.with_borrow(|free_list| free_list.bulk.len() * allocation(Tier::Bulk))
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, Bytes};

    use super::super::Sizing;
    use super::*;

    fn on_fresh_worker(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(test).join().expect("test thread");
    }

    #[test]
    fn a_written_piece_lets_its_buffer_be_used_again() {
        on_fresh_worker(|| {
            let mut buffer = take(Tier::Bulk);
            buffer.put_bytes(7, 200 * 1024);
            let address = buffer.as_ptr();
            let piece = buffer.split().freeze();
            give_back(Tier::Bulk, buffer, Some(Instant::now()));
            drop(piece);
            assert_eq!(take(Tier::Bulk).as_ptr(), address);
        });
    }

    #[test]
    fn a_piece_that_waits_keeps_its_bytes() {
        on_fresh_worker(|| {
            let mut buffer = take(Tier::Bulk);
            buffer.put_bytes(7, 256 * 1024);
            let piece = buffer.split().freeze();
            give_back(Tier::Bulk, buffer, Some(Instant::now()));
            let mut other = take(Tier::Bulk);
            other.put_bytes(9, 256 * 1024);
            assert!(piece.iter().all(|byte| *byte == 7));
        });
    }

    #[test]
    fn small_reads_share_an_allocation() {
        on_fresh_worker(|| {
            let mut first = take(Tier::Idle);
            let start = first.as_ptr() as usize;
            first.put_bytes(1, 64);
            let one = first.split().freeze();
            give_back(Tier::Idle, first, None);
            let mut second = take(Tier::Idle);
            second.put_bytes(2, 64);
            assert_eq!(second.as_ptr() as usize, start + 64);
            assert_eq!(one.as_ptr() as usize, start);
        });
    }

    #[test]
    fn waiting_small_pieces_share_memory() {
        on_fresh_worker(|| {
            let now = Instant::now();
            let mut sizing = Sizing::new();
            while sizing.record(16 * 1024, now) < Tier::Bulk {}
            let mut allocations = 0;
            let mut waiting: Vec<Bytes> = Vec::new();
            for _ in 0..5000 {
                let tier = sizing.tier();
                let mut buffer = take(tier);
                buffer.put_bytes(7, 100);
                let piece = buffer.split().freeze();
                give_back(tier, buffer, Some(now));
                sizing.record(piece.len(), now);
                let behind = waiting.last().map(|last| last.as_ptr().wrapping_add(last.len()));
                allocations += usize::from(behind != Some(piece.as_ptr()));
                waiting.push(piece);
            }
            assert!(allocations < 40, "{allocations} buffers for half a megabyte");
        });
    }

    #[test]
    fn large_buffers_are_freed_when_the_worker_is_quiet() {
        on_fresh_worker(|| {
            let now = Instant::now();
            let buffers: Vec<_> = (0..2 * KEPT).map(|_| take(Tier::Bulk)).collect();
            for buffer in buffers {
                give_back(Tier::Bulk, buffer, Some(now));
            }
            assert_eq!(bulk_bytes_kept(), KEPT * 256 * 1024);
            trim(now + Duration::from_secs(1));
            assert_eq!(bulk_bytes_kept(), KEPT * 256 * 1024);
            trim(now + LARGE_KEPT_FOR);
            assert_eq!(bulk_bytes_kept(), 0);
        });
    }
}
