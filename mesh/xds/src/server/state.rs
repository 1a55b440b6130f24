//! One type's resources and the log of their changes, compacted by name. No I/O, no clock.
//!
//! Every change takes the next position. A name has one place in the log: a live resource or a
//! removal. A subscriber that has seen everything up to a position needs exactly the entries above it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::answer;
use super::store::{Applied, Change, Resource};

/// A place in the change log; 0 is before everything.
pub(crate) type Position = u64;

/// Levels of members that a subscription brings along: workloads of a service, and what they bring in turn.
const MAX_LEVELS: u32 = 4;

/// A live resource.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: Arc<str>,
    pub(crate) aliases: Box<[Arc<str>]>,
    pub(crate) parents: Box<[Arc<str>]>,
    /// The version of the content: equal content has an equal version in every control plane.
    pub(crate) version: Arc<str>,
    /// The `Resource` message as a field of an answer, tag and length included.
    pub(crate) field: Bytes,
    pub(crate) position: Position,
    /// Where the content last changed; later positions changed the parents only.
    pub(crate) changed: Position,
}

impl Entry {
    /// The entry's name and aliases: all names by which it can be subscribed.
    pub(crate) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        std::iter::once(&self.name).chain(self.aliases.iter())
    }
}

/// Resource names by alias or by parent.
type Index<Names> = HashMap<Arc<str>, Names>;
/// Sorted names. An alias is an address, which few resources share.
type Few = SmallVec<[Arc<str>; 1]>;

/// The resources of one type.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) type_url: Arc<str>,
    head: Position,
    entries: HashMap<Arc<str>, Arc<Entry>>,
    live: BTreeMap<Position, Arc<Entry>>,
    removals: BTreeMap<Position, Arc<str>>,
    removed: HashMap<Arc<str>, Position>,
    /// Removals up to this position may have been discarded.
    horizon: Position,
    max_removals: usize,
    by_alias: Index<Few>,
    by_parent: Index<BTreeSet<Arc<str>>>,
}

impl State {
    pub(crate) fn new(type_url: &str, max_removals: usize) -> Self {
        Self {
            type_url: type_url.into(),
            head: 0,
            entries: HashMap::new(),
            live: BTreeMap::new(),
            removals: BTreeMap::new(),
            removed: HashMap::new(),
            horizon: 0,
            max_removals,
            by_alias: Index::new(),
            by_parent: Index::new(),
        }
    }

    pub(crate) fn head(&self) -> Position {
        self.head
    }

    pub(crate) fn horizon(&self) -> Position {
        self.horizon
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<Entry>> {
        self.entries.get(name)
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.values()
    }

    /// Live resources that changed after `from`, oldest first.
    pub(crate) fn live_after(&self, from: Position) -> impl Iterator<Item = (Position, &Arc<Entry>)> {
        self.live.range((Bound::Excluded(from), Bound::Unbounded)).map(|(position, entry)| (*position, entry))
    }

    /// Live resources whose content changed after `from`, oldest first: what a subscriber to everything needs.
    pub(crate) fn changed_after(&self, from: Position) -> impl Iterator<Item = (Position, &Arc<Entry>)> {
        self.live_after(from).filter(move |(_, entry)| entry.changed > from)
    }

    /// The live resource at exactly this position, unless it has changed since.
    pub(crate) fn live_at(&self, position: Position) -> Option<&Arc<Entry>> {
        self.live.get(&position)
    }

    /// Removals after `from`, oldest first.
    pub(crate) fn removed_after(&self, from: Position) -> impl Iterator<Item = (Position, &Arc<str>)> {
        self.removals
            .range((Bound::Excluded(from), Bound::Unbounded))
            .map(|(position, name)| (*position, name))
    }

    /// Resources that a subscription to `name` means: by name and by alias.
    pub(crate) fn named<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Arc<Entry>> {
        let aliased = self.by_alias.get(name).into_iter().flatten().filter_map(|name| self.get(name));
        self.get(name).into_iter().chain(aliased)
    }

    /// Resources that name `parent` as theirs, which need not be there itself.
    pub(crate) fn members(&self, parent: &str) -> impl Iterator<Item = &Arc<Entry>> {
        self.by_parent.get(parent).into_iter().flatten().filter_map(|name| self.get(name))
    }

    /// These resources and all below them: members, their members, and so on.
    pub(crate) fn with_members<'a>(
        &'a self,
        roots: impl Iterator<Item = &'a Arc<Entry>>,
    ) -> Vec<&'a Arc<Entry>> {
        let mut seen: HashSet<&str> = HashSet::new();
        let mut found: Vec<&Arc<Entry>> = roots.filter(|entry| seen.insert(&entry.name)).collect();
        let mut level = 0..found.len();
        for _ in 0..MAX_LEVELS {
            let parents: Vec<&Arc<Entry>> = found.get(level.clone()).unwrap_or_default().to_vec();
            let members = parents.into_iter().flat_map(|parent| self.members(&parent.name));
            found.extend(members.filter(|entry| seen.insert(&entry.name)));
            level = level.end..found.len();
            if level.is_empty() {
                break;
            }
        }
        found
    }

    /// Whether `asked` holds for a name of the entry, or of a live resource above it, or `root` is above it.
    pub(crate) fn is_within(&self, entry: &Entry, root: Option<&str>, asked: &impl Fn(&str) -> bool) -> bool {
        self.is_within_levels(entry, root, asked, MAX_LEVELS)
    }

    fn is_within_levels(
        &self,
        entry: &Entry,
        root: Option<&str>,
        asked: &impl Fn(&str) -> bool,
        levels: u32,
    ) -> bool {
        let above = |parent: &Arc<str>| {
            root == Some(&**parent)
                || self
                    .get(parent)
                    .is_some_and(|parent| self.is_within_levels(parent, root, asked, levels - 1))
        };
        entry.names().any(|name| asked(name)) || (levels > 0 && entry.parents.iter().any(above))
    }

    /// Applies changes in order. A change to equal content takes no position.
    pub(crate) fn apply(&mut self, changes: Vec<Change>, applied: &mut Applied) {
        for change in changes {
            match change {
                Change::Upsert(resource) => self.upsert(resource, applied),
                Change::Remove(name) => self.remove(&name, applied),
            }
        }
    }

    fn upsert(&mut self, resource: Resource, applied: &mut Applied) {
        let version = version(&resource);
        let same = self.entries.get(&resource.name).filter(|old| *old.version == *version);
        if same.is_some_and(|old| *old.parents == *resource.parents) {
            applied.unchanged += 1;
            return;
        }
        // Only the parents differ: subscribers to everything hold the content already.
        let unchanged = same.map(|old| (old.field.clone(), old.changed));
        applied.urgent |= resource.urgent;
        applied.changed += 1;
        self.forget(&resource.name);
        self.head += 1;
        let (field, changed) = unchanged
            .unwrap_or_else(|| (answer::resource_field(&self.type_url, &resource, &version), self.head));
        let entry = Arc::new(Entry {
            field,
            name: resource.name,
            aliases: resource.aliases.into(),
            parents: resource.parents.into(),
            version: version.into(),
            position: self.head,
            changed,
        });
        for alias in &entry.aliases {
            let names = self.by_alias.entry(Arc::clone(alias)).or_default();
            if let Err(at) = names.binary_search(&entry.name) {
                names.insert(at, Arc::clone(&entry.name));
            }
        }
        for parent in &entry.parents {
            self.by_parent.entry(Arc::clone(parent)).or_default().insert(Arc::clone(&entry.name));
        }
        self.live.insert(self.head, Arc::clone(&entry));
        self.entries.insert(Arc::clone(&entry.name), entry);
    }

    fn remove(&mut self, name: &str, applied: &mut Applied) {
        let Some(entry) = self.entries.get(name).cloned() else {
            applied.unchanged += 1;
            return;
        };
        applied.urgent = true;
        applied.removed += 1;
        self.forget(name);
        self.head += 1;
        self.removals.insert(self.head, Arc::clone(&entry.name));
        self.removed.insert(Arc::clone(&entry.name), self.head);
        while self.removals.len() > self.max_removals {
            let Some((position, name)) = self.removals.pop_first() else { break };
            self.removed.remove(&name);
            self.horizon = position;
        }
    }

    /// Takes a name out of log and indexes.
    fn forget(&mut self, name: &str) {
        if let Some(position) = self.removed.remove(name) {
            self.removals.remove(&position);
        }
        let Some(old) = self.entries.remove(name) else { return };
        self.live.remove(&old.position);
        for alias in &old.aliases {
            if let Some(names) = self.by_alias.get_mut(alias) {
                names.retain(|other| **other != *name);
                if names.is_empty() {
                    self.by_alias.remove(alias);
                }
            }
        }
        for parent in &old.parents {
            if let Some(names) = self.by_parent.get_mut(parent) {
                names.remove(name);
                if names.is_empty() {
                    self.by_parent.remove(parent);
                }
            }
        }
    }
}

/// A version derived from the bytes that subscribers get, so that it is the same in every control plane and after a restart.
/// Parents are not sent, so they are not part of it.
fn version(resource: &Resource) -> String {
    let mut hasher = DefaultHasher::new();
    resource.aliases.hash(&mut hasher);
    resource.body.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
