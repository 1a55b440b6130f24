//! Number of open connections of this node to each workload: the load that the choice of an endpoint compares.
//!
//! Written when a connection opens and when it ends, read twice per choice. All workers share it, because choices are only
//! fair if they see the same counts.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::RwLock;

/// Number of entries below which nothing is swept.
const SWEEP_FLOOR: usize = 1024;

/// Connection counts by key. Grows with the workloads in use and is swept when half of it is unused.
#[derive(Debug)]
pub struct Loads<K> {
    /// Guards the map, not the counts: readers look up, only a key's first connection writes.
    counts: RwLock<Table<K>>,
}

#[derive(Debug)]
struct Table<K> {
    counts: HashMap<K, Arc<AtomicU32>>,
    sweep_at: usize,
}

/// Counts one open connection until it is dropped.
#[derive(Debug)]
pub struct LoadGuard(Arc<AtomicU32>);

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<K> Default for Loads<K> {
    fn default() -> Self {
        Self { counts: RwLock::new(Table { counts: HashMap::new(), sweep_at: SWEEP_FLOOR }) }
    }
}

impl<K: Eq + Hash + Clone> Loads<K> {
    /// Open connections to `key`.
    pub fn get(&self, key: &K) -> u32 {
        self.counts.read().counts.get(key).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Counts one more connection until the guard is dropped.
    pub fn open(&self, key: &K) -> LoadGuard {
        if let Some(count) = self.counts.read().counts.get(key) {
            count.fetch_add(1, Ordering::Relaxed);
            return LoadGuard(count.clone());
        }
        let mut table = self.counts.write();
        if table.counts.len() >= table.sweep_at {
            // Counts only rise under this lock or its shared form, so zero stays zero here.
            table.counts.retain(|_, count| count.load(Ordering::Relaxed) > 0);
            table.sweep_at = (table.counts.len() * 2).max(SWEEP_FLOOR);
        }
        let count = table.counts.entry(key.clone()).or_default();
        count.fetch_add(1, Ordering::Relaxed);
        LoadGuard(count.clone())
    }

    /// Number of keys, used or not.
    pub fn len(&self) -> usize {
        self.counts.read().counts.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_follows_its_guards() {
        let loads = Loads::default();
        let first = loads.open(&"a");
        let second = loads.open(&"a");
        assert_eq!((loads.get(&"a"), loads.get(&"b")), (2, 0));
        drop(first);
        assert_eq!(loads.get(&"a"), 1);
        drop(second);
        assert_eq!(loads.get(&"a"), 0);
    }

    #[test]
    fn unused_keys_do_not_pile_up_and_used_ones_keep_their_count() {
        let loads = Loads::default();
        let kept = loads.open(&u64::MAX);
        for key in 0..100_000 {
            drop(loads.open(&key));
        }
        assert!(loads.len() <= SWEEP_FLOOR + 1, "{}", loads.len());
        assert_eq!(loads.get(&u64::MAX), 1);
        drop(kept);
    }
}
