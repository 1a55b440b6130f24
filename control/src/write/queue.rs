//! Objects whose status may have to be written: each once, and no more than a limit.

use std::collections::BTreeSet;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::object::ObjectRef;

/// Objects that wait; when there are more, all objects are looked at instead.
const CAPACITY: usize = 16 * 1024;

/// The queue between the index and the writer.
#[derive(Debug, Default)]
pub(crate) struct StatusQueue {
    /// Guards the objects and whether they are all; held for one change.
    waiting: Mutex<Waiting>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Nothing is kept while nobody writes.
    is_open: bool,
    objects: BTreeSet<ObjectRef>,
    overflowed: bool,
}

/// What the writer is to look at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// These.
    Objects(Vec<ObjectRef>),
    /// Every object: some were not kept.
    Everything,
}

impl StatusQueue {
    /// Runs what `run_as_leader` gives each time `leads` becomes true, until it is false again; ends with its sender. The queue is open
    /// meanwhile.
    pub(super) async fn while_leading<F: Future<Output = ()>>(
        &self,
        mut leads: watch::Receiver<bool>,
        run_as_leader: impl Fn() -> F,
    ) {
        while leads.wait_for(|leads| *leads).await.is_ok() {
            let mut lost = leads.clone();
            self.open();
            tokio::select! {
                () = run_as_leader() => {}
                _ = lost.wait_for(|leads| !*leads) => {}
            }
            self.close();
        }
    }

    /// Objects that changed, or about which something else was found out.
    pub(crate) fn push(&self, objects: impl IntoIterator<Item = ObjectRef>) {
        let mut waiting = self.waiting.lock();
        if !waiting.is_open {
            return;
        }
        for object in objects {
            if waiting.objects.len() < CAPACITY || waiting.objects.contains(&object) {
                waiting.objects.insert(object);
            } else {
                waiting.overflowed = true;
            }
        }
        self.changed.notify_one();
    }

    /// How many wait.
    pub(crate) fn len(&self) -> usize {
        self.waiting.lock().objects.len()
    }

    /// From now on objects are kept.
    pub(super) fn open(&self) {
        *self.waiting.lock() = Waiting { is_open: true, ..Waiting::default() };
    }

    /// Nobody writes any more.
    pub(super) fn close(&self) {
        *self.waiting.lock() = Waiting::default();
    }

    /// Waits for work and takes at most `limit` objects of it.
    pub(super) async fn take(&self, limit: usize) -> Work {
        loop {
            if let Some(work) = self.waiting.lock().take(limit) {
                return work;
            }
            self.changed.notified().await;
        }
    }
}

impl Waiting {
    fn take(&mut self, limit: usize) -> Option<Work> {
        if std::mem::take(&mut self.overflowed) {
            self.objects.clear();
            return Some(Work::Everything);
        }
        let taken: Vec<ObjectRef> = std::iter::from_fn(|| self.objects.pop_first()).take(limit).collect();
        (!taken.is_empty()).then_some(Work::Objects(taken))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{Kind, NamespacedName};

    fn object(n: usize) -> ObjectRef {
        ObjectRef { kind: Kind::Service, name: NamespacedName::new("shop", n.to_string()) }
    }

    #[tokio::test]
    async fn an_object_waits_once_and_too_many_become_everything() {
        let queue = StatusQueue::default();
        queue.push([object(1)]);
        assert_eq!(queue.len(), 0, "nobody writes yet");
        queue.open();
        queue.push([object(1), object(2), object(1)]);
        assert_eq!(queue.take(1).await, Work::Objects(vec![object(1)]));
        assert_eq!(queue.take(9).await, Work::Objects(vec![object(2)]));
        queue.push((0..=CAPACITY).map(object));
        assert_eq!(queue.len(), CAPACITY);
        assert_eq!(queue.take(1).await, Work::Everything);
        assert_eq!(queue.len(), 0);
    }
}
