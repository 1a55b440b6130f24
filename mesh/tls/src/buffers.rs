//! Buffers for TLS records. They belong to the worker: an idle connection holds none.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use crate::record::{MAX_RECORD, MAX_SEALED};

/// Room for any one record.
const SMALL: usize = MAX_RECORD.next_multiple_of(1024);
/// Room for a large piece of a relay and its framing, sealed: 257 KiB of plaintext.
const LARGE: usize = (17 * MAX_SEALED).next_multiple_of(1024);
/// Buffers of each size that a worker keeps.
const KEPT: usize = 4;
/// How long large buffers outlive their last use.
const LARGE_KEPT_FOR: Duration = Duration::from_secs(2);

/// How large a buffer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// For one record.
    Small,
    /// For many.
    Large,
}

impl Size {
    const fn bytes(self) -> usize {
        match self {
            Size::Small => SMALL,
            Size::Large => LARGE,
        }
    }
}

#[derive(Default)]
struct FreeList {
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
    large_used: Option<Instant>,
}

impl FreeList {
    fn of(&mut self, size: Size) -> &mut Vec<Box<[u8]>> {
        match size {
            Size::Small => &mut self.small,
            Size::Large => &mut self.large,
        }
    }
}

thread_local! {
    static FREE_LIST: RefCell<FreeList> = RefCell::new(FreeList::default());
}

/// A first-in, first-out buffer whose memory returns to its worker when it is dropped.
pub(crate) struct Buffer {
    bytes: Box<[u8]>,
    size: Size,
    start: usize,
    end: usize,
}

impl Buffer {
    /// Takes an empty buffer from the worker, or allocates one.
    pub(crate) fn take(size: Size) -> Buffer {
        let kept = FREE_LIST.with_borrow_mut(|free_list| free_list.of(size).pop());
        let bytes = kept.unwrap_or_else(|| vec![0; size.bytes()].into_boxed_slice());
        Buffer { bytes, size, start: 0, end: 0 }
    }

    pub(crate) fn size(&self) -> Size {
        self.size
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The bytes in it.
    pub(crate) fn filled(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    pub(crate) fn filled_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.end).unwrap_or_default()
    }

    /// The room behind them. Its content is left over from earlier uses.
    pub(crate) fn spare(&mut self) -> &mut [u8] {
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// Marks the first `n` bytes of the room as filled.
    pub(crate) fn fill(&mut self, n: usize) {
        self.end = (self.end + n).min(self.bytes.len());
    }

    /// Removes the first `n` bytes.
    pub(crate) fn consume(&mut self, n: usize) {
        self.start = (self.start + n).min(self.end);
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Moves the bytes to the front, so that all the room is behind them.
    pub(crate) fn compact(&mut self) {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Appends as much of `bytes` as fits.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let room = self.spare();
        let fits = bytes.len().min(room.len());
        if let (Some(room), Some(bytes)) = (room.get_mut(..fits), bytes.get(..fits)) {
            room.copy_from_slice(bytes);
        }
        self.fill(fits);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        // A thread that is ending keeps no buffers.
        let _ = FREE_LIST.try_with(|free_list| {
            let mut free_list = free_list.borrow_mut();
            if self.size == Size::Large {
                free_list.large_used = Some(Instant::now());
            }
            let kept = free_list.of(self.size);
            if kept.len() < KEPT {
                kept.push(bytes);
            }
        });
    }
}

/// Frees this worker's large buffers if none was used for two seconds. Called from a periodic task of the worker.
pub fn trim(now: Instant) {
    FREE_LIST.with_borrow_mut(|free_list| {
        if free_list.large_used.is_none_or(|used| now.saturating_duration_since(used) >= LARGE_KEPT_FOR) {
            free_list.large = Vec::new();
            free_list.large_used = None;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_and_make_room() {
        let mut buffer = Buffer::take(Size::Small);
        buffer.push(&vec![1; SMALL - 2]);
        buffer.push(b"abc");
        assert_eq!(buffer.filled().len(), SMALL);
        assert!(buffer.spare().is_empty());
        buffer.consume(SMALL - 2);
        assert_eq!(buffer.filled(), b"ab");
        buffer.compact();
        buffer.push(b"d");
        assert_eq!(buffer.filled(), b"abd");
        buffer.consume(3);
        assert_eq!(buffer.spare().len(), SMALL);
    }

    #[test]
    fn a_worker_keeps_few_buffers_and_large_ones_only_while_used() {
        std::thread::spawn(|| {
            let all: Vec<_> = (0..2 * KEPT).map(|_| Buffer::take(Size::Large)).collect();
            drop(all);
            let kept = || FREE_LIST.with_borrow(|free_list| free_list.large.len());
            assert_eq!(kept(), KEPT);
            trim(Instant::now());
            assert_eq!(kept(), KEPT);
            trim(Instant::now() + LARGE_KEPT_FOR);
            assert_eq!(kept(), 0);
        })
        .join()
        .unwrap();
    }
}
