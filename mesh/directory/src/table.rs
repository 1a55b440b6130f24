//! A persistent hash map: the indexes of a snapshot.
//!
//! A trie of the hash's bits whose leaves are flat arrays, so that a look-up among 100,000 entries passes a few small inner nodes, which stay in
//! the processor's caches, and then one array. A clone is one reference; a change to a clone copies the leaf and the nodes above it (some
//! hundred pointers), whatever the size of the map. Only the writer changes tables; readers have clones.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

use equivalent::Equivalent;

/// Children of an inner node, as bits of the hash. Few, as a change touches the reference count of each.
const BITS: u32 = 4;
const WIDTH: usize = 1 << BITS;
/// A leaf with more entries becomes an inner node, unless the bits of the hash are used up.
const FULLEST: usize = 32;
/// An inner node of leaves with no more entries becomes a leaf again; well below [`FULLEST`], so that coming and going at the border is cheap.
const SPARSE: usize = 12;

/// A map from keys to values. Cloning is cheap and a clone never changes.
#[derive(Clone, Debug)]
pub(crate) struct Table<K, V> {
    root: Node<K, V>,
    len: usize,
    hasher: RandomState,
}

#[derive(Debug)]
enum Node<K, V> {
    Empty,
    Leaf(Arc<[Slot<K, V>]>),
    Inner(Arc<[Self; WIDTH]>),
}

#[derive(Clone, Debug)]
struct Slot<K, V> {
    hash: u32,
    key: K,
    value: V,
}

impl<K, V> Clone for Node<K, V> {
    fn clone(&self) -> Self {
        match self {
            Self::Empty => Self::Empty,
            Self::Leaf(slots) => Self::Leaf(Arc::clone(slots)),
            Self::Inner(children) => Self::Inner(Arc::clone(children)),
        }
    }
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self { root: Node::Empty, len: 0, hasher: RandomState::new() }
    }
}

impl<K, V> Table<K, V> {
    /// Whether there is no entry.
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All values, in no order.
    pub(crate) fn values(&self) -> Values<'_, K, V> {
        Values { nodes: vec![std::slice::from_ref(&self.root).iter()], slots: [].iter(), left: self.len }
    }

    /// The upper half of the hash: the lower may be spent by whoever made it.
    fn hash(&self, key: &(impl Hash + ?Sized)) -> u32 {
        (self.hasher.hash_one(key) >> 32) as u32
    }

    /// The value of a key.
    pub(crate) fn get<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> Option<&V> {
        if self.len == 0 {
            return None;
        }
        let hash = self.hash(key);
        let (mut node, mut shift) = (&self.root, 0);
        loop {
            match node {
                Node::Empty => return None,
                Node::Inner(children) => node = children.get(child(hash, shift))?,
                Node::Leaf(slots) => {
                    return slots.get(position(slots, hash, key)?).map(|slot| &slot.value);
                }
            }
            shift += BITS;
        }
    }

    /// Whether a key has a value.
    pub(crate) fn contains_key<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> bool {
        self.get(key).is_some()
    }
}

impl<K: Clone + Eq + Hash, V: Clone> Table<K, V> {
    /// The value of a key, to be changed.
    pub(crate) fn get_mut<Q: Hash + Equivalent<K> + ?Sized>(&mut self, key: &Q) -> Option<&mut V> {
        // Nothing is copied for a key that is not there.
        self.get(key)?;
        let hash = self.hash(key);
        let (mut node, mut shift) = (&mut self.root, 0);
        loop {
            match node {
                Node::Empty => return None,
                Node::Inner(children) => node = Arc::make_mut(children).get_mut(child(hash, shift))?,
                Node::Leaf(slots) => {
                    let at = position(slots, hash, key)?;
                    return Arc::make_mut(slots).get_mut(at).map(|slot| &mut slot.value);
                }
            }
            shift += BITS;
        }
    }

    /// Changes the value of a key, made first if it is not there.
    pub(crate) fn change<R>(&mut self, key: &K, change: impl FnOnce(&mut V) -> R) -> R
    where
        V: Default,
    {
        if let Some(value) = self.get_mut(key) {
            return change(value);
        }
        let mut value = V::default();
        let result = change(&mut value);
        self.insert(key.clone(), value);
        result
    }

    /// Enters a value; what the key had before is returned.
    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        if let Some(there) = self.get_mut(&key) {
            return Some(std::mem::replace(there, value));
        }
        let slot = Slot { hash: self.hash(&key), key, value };
        self.root.enter(slot, 0);
        self.len += 1;
        None
    }

    /// Takes a key out; its value is returned.
    pub(crate) fn remove<Q: Hash + Equivalent<K> + ?Sized>(&mut self, key: &Q) -> Option<V> {
        let value = self.get(key)?.clone();
        let hash = self.hash(key);
        self.root.take(hash, key, 0);
        self.len -= 1;
        Some(value)
    }
}

impl<K: Clone, V: Clone> Node<K, V> {
    /// Enters a key that is not there.
    fn enter(&mut self, slot: Slot<K, V>, shift: u32) {
        match self {
            Self::Empty => *self = Self::Leaf(Arc::from([slot])),
            Self::Leaf(slots) if slots.len() < FULLEST || shift >= u32::BITS => {
                *slots = slots.iter().cloned().chain(std::iter::once(slot)).collect();
            }
            Self::Leaf(slots) => {
                *self = Self::split(slots, shift);
                self.enter(slot, shift);
            }
            Self::Inner(children) => {
                if let Some(next) = Arc::make_mut(children).get_mut(child(slot.hash, shift)) {
                    next.enter(slot, shift + BITS);
                }
            }
        }
    }

    /// The inner node with the entries of a leaf.
    fn split(slots: &[Slot<K, V>], shift: u32) -> Self {
        let leaves = std::array::from_fn(|at| {
            let mine = slots.iter().filter(|slot| child(slot.hash, shift) == at);
            let mine: Arc<[Slot<K, V>]> = mine.cloned().collect();
            if mine.is_empty() { Self::Empty } else { Self::Leaf(mine) }
        });
        Self::Inner(Arc::new(leaves))
    }

    /// Takes out a key that is there.
    fn take<Q: Equivalent<K> + ?Sized>(&mut self, hash: u32, key: &Q, shift: u32) {
        match self {
            Self::Empty => {}
            Self::Leaf(slots) => match position(slots, hash, key) {
                Some(_) if slots.len() == 1 => *self = Self::Empty,
                Some(at) => {
                    let (before, after) = (slots.iter().take(at), slots.iter().skip(at + 1));
                    *slots = before.chain(after).cloned().collect();
                }
                None => {}
            },
            Self::Inner(children) => {
                let children = Arc::make_mut(children);
                if let Some(next) = children.get_mut(child(hash, shift)) {
                    next.take(hash, key, shift + BITS);
                }
                if let Some(slots) = joined(children) {
                    *self = if slots.is_empty() { Self::Empty } else { Self::Leaf(slots) };
                }
            }
        }
    }
}

/// The entries of an inner node that is too sparse to be one.
fn joined<K: Clone, V: Clone>(children: &[Node<K, V>; WIDTH]) -> Option<Arc<[Slot<K, V>]>> {
    let mut count = 0;
    for child in children {
        count += match child {
            Node::Empty => 0,
            Node::Leaf(slots) => slots.len(),
            Node::Inner(_) => return None,
        };
    }
    let slots = children.iter().flat_map(|child| match child {
        Node::Leaf(slots) => &**slots,
        Node::Empty | Node::Inner(_) => &[],
    });
    (count <= SPARSE).then(|| slots.cloned().collect())
}

fn child(hash: u32, shift: u32) -> usize {
    // No leaf is split once the bits are used up, so that the shift is within them.
    (hash.checked_shr(shift).unwrap_or(0) as usize) % WIDTH
}

fn position<K, V, Q: Equivalent<K> + ?Sized>(slots: &[Slot<K, V>], hash: u32, key: &Q) -> Option<usize> {
    slots.iter().position(|slot| slot.hash == hash && key.equivalent(&slot.key))
}

/// The values of a table.
#[derive(Debug)]
pub(crate) struct Values<'a, K, V> {
    nodes: Vec<std::slice::Iter<'a, Node<K, V>>>,
    slots: std::slice::Iter<'a, Slot<K, V>>,
    left: usize,
}

impl<'a, K, V> Iterator for Values<'a, K, V> {
    type Item = &'a V;

    fn next(&mut self) -> Option<&'a V> {
        loop {
            if let Some(slot) = self.slots.next() {
                self.left = self.left.saturating_sub(1);
                return Some(&slot.value);
            }
            match self.nodes.last_mut()?.next() {
                None => drop(self.nodes.pop()),
                Some(Node::Empty) => {}
                Some(Node::Leaf(slots)) => self.slots = slots.iter(),
                Some(Node::Inner(children)) => self.nodes.push(children.iter()),
            }
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<K, V> ExactSizeIterator for Values<'_, K, V> {}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Few keys and many changes, so that leaves split and join; clones taken on the way must stay as they were.
        #[test]
        fn a_table_is_a_map_and_its_clones_never_change(
            changes in prop::collection::vec((0_u16..300, any::<Option<u8>>()), 0..1500)
        ) {
            let (mut table, mut model) = (Table::default(), HashMap::new());
            let mut kept: Vec<(Table<u16, u8>, HashMap<u16, u8>)> = Vec::new();
            for (at, (key, value)) in changes.into_iter().enumerate() {
                match value {
                    Some(value) => prop_assert_eq!(table.insert(key, value), model.insert(key, value)),
                    None => prop_assert_eq!(table.remove(&key), model.remove(&key)),
                }
                if at % 100 == 0 {
                    kept.push((table.clone(), model.clone()));
                }
            }
            kept.push((table, model));
            for (table, model) in kept {
                prop_assert_eq!(table.len, model.len());
                prop_assert_eq!(table.values().len(), model.len());
                prop_assert_eq!(table.values().count(), model.len());
                for key in 0..300 {
                    prop_assert_eq!(table.get(&key), model.get(&key));
                }
            }
        }
    }

    /// A key whose hash is that of every other.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Colliding(u16);

    impl Hash for Colliding {
        fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
            state.write_u8(0);
        }
    }

    #[test]
    fn keys_of_one_hash_are_distinguished_and_removed() {
        let mut table = Table::default();
        for number in 0..200 {
            table.insert(Colliding(number), number);
        }
        assert_eq!(table.get(&Colliding(77)), Some(&77));
        for number in 0..200 {
            assert_eq!(table.remove(&Colliding(number)), Some(number));
        }
        assert!(table.len == 0 && matches!(table.root, Node::Empty));
    }

    #[test]
    fn a_table_that_shrank_is_as_flat_as_a_small_one() {
        let mut table = Table::default();
        for number in 0..10_000 {
            table.insert(number, number);
        }
        for number in 5..10_000 {
            table.remove(&number);
        }
        assert!(matches!(&table.root, Node::Leaf(slots) if slots.len() == 5));
    }
}
