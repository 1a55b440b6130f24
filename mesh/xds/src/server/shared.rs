//! Answers for wildcard subscribers, encoded once for all that are at the same position of the change log.

use std::collections::VecDeque;

use parking_lot::Mutex;

use super::answer::{Answer, Builder};
use super::state::{Position, State};
use crate::batch_mark::BatchMark;

/// Maximum number of bytes of kept answers, in addition to the newest.
const MAX_BYTES: usize = 8 << 20;

/// The positions of a wildcard subscriber: one for removals and one for live resources, because removals are sent
/// first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) removed: Position,
    pub(crate) live: Position,
}

/// What an answer depends on besides the resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Number of the store's last batch.
    pub(crate) batch: u64,
    /// Removals are held back as long as another type may still refer to the removed resources.
    pub(crate) hold_removals: bool,
    /// Resources of another type are due on the same stream.
    pub(crate) more_elsewhere: bool,
    /// Largest answer, in bytes.
    pub(crate) limit: usize,
}

/// An answer for all subscribers at the same position, and the position after it.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) answer: Answer,
    pub(crate) to: Cursor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Start {
    /// The state's own number among those of its store.
    state: usize,
    from: Cursor,
    turn: Turn,
}

/// The most recent answers, by position.
#[derive(Debug)]
pub(crate) struct SharedAnswers {
    kept: Mutex<VecDeque<(Start, Step)>>,
    capacity: usize,
}

impl SharedAnswers {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { kept: Mutex::default(), capacity }
    }

    /// The next answer of type number `index` for a wildcard subscriber, made at most once for all of them.
    pub(crate) fn step(&self, index: usize, state: &State, from: Cursor, turn: Turn) -> Option<Step> {
        let head = state.head();
        if from.removed >= head && from.live >= head {
            return None;
        }
        let start = Start { state: index, from, turn };
        let known =
            self.kept.lock().iter().rev().find(|(known, _)| *known == start).map(|(_, step)| step.clone());
        if known.is_some() {
            return known;
        }
        let step = make_step(state, from, turn)?;
        let mut kept = self.kept.lock();
        if self.capacity > 0 {
            kept.push_back((start, step.clone()));
        }
        let mut bytes: usize = kept.iter().map(|(_, step)| step.answer.frame.len()).sum();
        while kept.len() > 1 && (kept.len() > self.capacity || bytes > MAX_BYTES) {
            bytes -= kept.pop_front().map_or(0, |(_, step)| step.answer.frame.len());
        }
        Some(step)
    }
}

/// Removals first unless they are held, then live resources, until the answer is full.
fn make_step(state: &State, from: Cursor, turn: Turn) -> Option<Step> {
    let Turn { batch, hold_removals, more_elsewhere, limit } = turn;
    let head = state.head();
    let mut builder = Builder::new(limit, &state.type_url);
    let mut to = from;
    let mut full = false;
    if !hold_removals {
        for (position, name) in state.removed_after(from.removed) {
            if !builder.remove(name) {
                full = true;
                break;
            }
            to.removed = position;
        }
    }
    if !full {
        for (position, entry) in state.changed_after(from.live) {
            if !builder.resource(&entry.field) {
                full = true;
                break;
            }
            to.live = position;
        }
        if !hold_removals {
            to.removed = head;
        }
    }
    if !full {
        to.live = head;
    }
    if builder.is_empty() {
        return None;
    }
    let more = full || more_elsewhere || state.removed_after(to.removed).next().is_some();
    let nonce = format!("{}-{}", to.removed, to.live);
    Some(Step { answer: builder.finish(&nonce, BatchMark { number: batch, more }), to })
}
