//! Who selects whom, answered from both sides without looking at everybody.
//!
//! Both indices look up one label pair and verify the rest, so their cost follows the number of objects
//! that share a pair, not the number of objects.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::object::{Kind, Labels, NamespacedName};

type Pair = (Arc<str>, Arc<str>);

/// Something that selectors select: a pod or a WorkloadEntry. Ordered by namespace.
pub(super) type Member = (NamespacedName, Kind);

/// What can be selected, by its labels.
#[derive(Debug, Default)]
pub(super) struct Members {
    labels: BTreeMap<Member, Labels>,
    by_pair: HashMap<Pair, BTreeSet<Member>>,
}

impl Members {
    /// Adds a member or changes its labels.
    pub(super) fn apply(&mut self, member: Member, labels: Labels) {
        self.delete(&member);
        for (key, value) in labels.iter() {
            self.by_pair.entry((key.clone(), value.clone())).or_default().insert(member.clone());
        }
        self.labels.insert(member, labels);
    }

    /// Removes a member.
    pub(super) fn delete(&mut self, member: &Member) {
        let Some(labels) = self.labels.remove(member) else { return };
        for (key, value) in labels.iter() {
            let pair = (key.clone(), value.clone());
            if let Some(set) = self.by_pair.get_mut(&pair) {
                set.remove(member);
                if set.is_empty() {
                    self.by_pair.remove(&pair);
                }
            }
        }
    }

    /// The members that a selector selects, in one namespace or (`None`) in all; an empty selector selects all.
    pub(super) fn selected(&self, namespace: Option<&Arc<str>>, selector: &Labels) -> Vec<Member> {
        let mut rarest: Option<&BTreeSet<Member>> = None;
        for (key, value) in selector.iter() {
            let Some(set) = self.by_pair.get(&(key.clone(), value.clone())) else { return Vec::new() };
            if rarest.is_none_or(|r| set.len() < r.len()) {
                rarest = Some(set);
            }
        }
        let within = |member: &&Member| namespace.is_none_or(|n| member.0.namespace == *n);
        let start = match namespace {
            Some(namespace) => Bound::Included((NamespacedName::new(namespace.clone(), ""), Kind::ALL[0])),
            None => Bound::Unbounded,
        };
        match rarest {
            Some(set) => set
                .range((start, Bound::Unbounded))
                .take_while(within)
                .filter(|member| self.labels.get(*member).is_some_and(|labels| labels.satisfy(selector)))
                .cloned()
                .collect(),
            None => self
                .labels
                .range((start, Bound::Unbounded))
                .map(|(m, _)| m)
                .take_while(within)
                .cloned()
                .collect(),
        }
    }
}

#[derive(Debug)]
struct Entry {
    selector: Labels,
    /// Where the selector is filed: its namespace or all of them, and its pair that fewest others share.
    place: Place,
}

/// `None` for the namespace means all namespaces.
type Place = (Option<Arc<str>>, Pair);

/// Selectors of one kind of object, by what they select.
#[derive(Debug, Default)]
pub(super) struct Selectors {
    entries: HashMap<NamespacedName, Entry>,
    filed: HashMap<Place, BTreeSet<NamespacedName>>,
}

impl Selectors {
    /// Adds the selector of an object, or changes it; an empty one is removed, as it has nothing to select by.
    /// `everywhere` makes it select beyond the object's namespace.
    pub(super) fn apply(&mut self, id: &NamespacedName, selector: &Labels, everywhere: bool) {
        self.delete(id);
        let namespace = (!everywhere).then(|| id.namespace.clone());
        let places = selector.iter().map(|(k, v)| (namespace.clone(), (k.clone(), v.clone())));
        let Some(place) = places.min_by_key(|place| self.filed.get(place).map_or(0, BTreeSet::len)) else {
            return;
        };
        self.filed.entry(place.clone()).or_default().insert(id.clone());
        self.entries.insert(id.clone(), Entry { selector: selector.clone(), place });
    }

    /// Removes the selector of an object.
    pub(super) fn delete(&mut self, id: &NamespacedName) {
        let Some(entry) = self.entries.remove(id) else { return };
        if let Some(set) = self.filed.get_mut(&entry.place) {
            set.remove(id);
            if set.is_empty() {
                self.filed.remove(&entry.place);
            }
        }
    }

    /// The objects whose selectors select labels in a namespace, in order.
    pub(super) fn selecting(&self, namespace: &Arc<str>, labels: &Labels) -> BTreeSet<NamespacedName> {
        let mut found = BTreeSet::new();
        for (key, value) in labels.iter() {
            for scope in [Some(namespace.clone()), None] {
                let Some(filed) = self.filed.get(&(scope, (key.clone(), value.clone()))) else { continue };
                let selecting = filed
                    .iter()
                    .filter(|id| self.entries.get(*id).is_some_and(|entry| labels.satisfy(&entry.selector)));
                found.extend(selecting.cloned());
            }
        }
        found
    }
}

/// A many-to-many relation kept from one side and read from the other, in order. To most keys one refers.
#[derive(Debug)]
pub(super) struct Reverse<K, V = NamespacedName>(HashMap<K, SmallVec<[V; 1]>>);

impl<K, V> Default for Reverse<K, V> {
    fn default() -> Self {
        Reverse(HashMap::new())
    }
}

impl<K: Eq + std::hash::Hash, V: Ord> Reverse<K, V> {
    /// Notes that `id` refers to `key`.
    pub(super) fn insert(&mut self, key: K, id: V) {
        let ids = self.0.entry(key).or_default();
        if let Err(at) = ids.binary_search(&id) {
            ids.insert(at, id);
        }
    }

    /// Notes that `id` refers to `key` no longer.
    pub(super) fn remove(&mut self, key: &K, id: &V) {
        if let Some(set) = self.0.get_mut(key) {
            if let Ok(at) = set.binary_search(id) {
                set.remove(at);
            }
            if set.is_empty() {
                self.0.remove(key);
            }
        }
    }

    /// Everything that refers to `key`, in order.
    pub(super) fn of<'s>(&'s self, key: &K) -> impl Iterator<Item = &'s V> + use<'s, K, V> {
        self.0.get(key).into_iter().flatten()
    }
}
