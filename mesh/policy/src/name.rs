//! Names of policies, and the lists of them that workloads carry.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

/// `<namespace>/<name>`: the resource name of a policy (xDS contract).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct PolicyName(Arc<str>);

impl PolicyName {
    /// The name of policy `name` of `namespace`.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(format!("{namespace}/{name}").into())
    }

    /// The whole, `<namespace>/<name>`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The namespace; the whole name if it has no slash.
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or(&self.0, |(namespace, _)| namespace)
    }
}

impl From<&str> for PolicyName {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl From<Arc<str>> for PolicyName {
    fn from(name: Arc<str>) -> Self {
        Self(name)
    }
}

impl Borrow<str> for PolicyName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for PolicyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// The policies that a workload lists by name: sorted, without duplicates, cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct PolicyList(Arc<Listed>);

#[derive(PartialEq, Eq, Hash, Default)]
struct Listed {
    names: Box<[PolicyName]>,
    /// Where each namespace's names end; sorted, they come namespace by namespace.
    ends: Box<[usize]>,
}

impl PolicyList {
    /// The names, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, PolicyName> {
        self.0.names.iter()
    }

    /// How many names.
    pub fn len(&self) -> usize {
        self.0.names.len()
    }

    /// Whether no policy is listed.
    pub fn is_empty(&self) -> bool {
        self.0.names.is_empty()
    }

    /// Whether `name` is listed.
    pub fn contains(&self, name: &PolicyName) -> bool {
        self.0.names.binary_search(name).is_ok()
    }

    /// The names of each namespace.
    pub(crate) fn by_namespace(&self) -> impl Iterator<Item = &[PolicyName]> {
        let starts = std::iter::once(0).chain(self.0.ends.iter().copied());
        starts.zip(self.0.ends.iter()).filter_map(|(start, end)| self.0.names.get(start..*end))
    }
}

impl FromIterator<PolicyName> for PolicyList {
    fn from_iter<I: IntoIterator<Item = PolicyName>>(names: I) -> Self {
        let mut names: Vec<PolicyName> = names.into_iter().collect();
        names.sort_unstable();
        names.dedup();
        let chunks = names.chunk_by(|one, next| one.namespace() == next.namespace());
        let ends = chunks.scan(0, |end, chunk| {
            *end += chunk.len();
            Some(*end)
        });
        Self(Arc::new(Listed { ends: ends.collect(), names: names.into() }))
    }
}

impl Serialize for PolicyList {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self)
    }
}

impl<'a> IntoIterator for &'a PolicyList {
    type Item = &'a PolicyName;
    type IntoIter = std::slice::Iter<'a, PolicyName>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Debug for PolicyList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
