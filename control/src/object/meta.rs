//! What all objects have in common: name, labels, owner, and the error of one that cannot be read.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use super::{DEFAULT_NAMESPACE, NamespacedName};

/// Why an object, well-formed as it is, cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    /// Path of the field within the object.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

impl Invalid {
    /// A problem with a field.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Invalid {
        Invalid { field: field.into(), problem: problem.into() }
    }
}

/// A manifest of which only the metadata must be there.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest<S> {
    /// Name, labels and what else all objects have.
    pub(crate) metadata: ObjectMeta,
    /// What the kind is about.
    #[serde(default)]
    pub(crate) spec: S,
}

/// Labels, or a selector by equality; cheap to clone. In the order of their keys, and no larger than they are: every pod has some.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels(Arc<[(Arc<str>, Arc<str>)]>);

impl Labels {
    /// The value of a label.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.value(key).map(AsRef::as_ref)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All labels in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    fn value(&self, key: &str) -> Option<&Arc<str>> {
        let at = self.0.binary_search_by(|(known, _)| (**known).cmp(key)).ok()?;
        self.0.get(at).map(|(_, value)| value)
    }

    /// Whether every label of `selector` is among these with the same value; an empty selector selects all.
    pub fn satisfy(&self, selector: &Labels) -> bool {
        selector.iter().all(|(key, value)| self.value(key) == Some(value))
    }
}

impl<K: Into<Arc<str>>, V: Into<Arc<str>>> FromIterator<(K, V)> for Labels {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Labels {
        // The last value of a repeated key counts.
        let sorted: BTreeMap<Arc<str>, Arc<str>> =
            pairs.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        Labels(sorted.into_iter().collect())
    }
}

/// Name, labels and age of a namespaced object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Namespace and name.
    pub id: NamespacedName,
    /// Labels.
    pub labels: Labels,
    /// Seconds since the epoch; `None` where no API server set it. Older objects win conflicts.
    pub created: Option<i64>,
    /// What distinguishes it from others that had its name; empty where no API server gave one.
    pub uid: Arc<str>,
    /// Grows with every change of what its author wants; `None` where no API server counts.
    pub generation: Option<i64>,
}

impl Meta {
    /// Reads the metadata of a namespaced object; the namespace defaults to `default`.
    ///
    /// # Errors
    /// When the object has no name.
    pub fn read(meta: &ObjectMeta) -> Result<Meta, Invalid> {
        let id = namespaced(meta)?;
        Ok(Meta {
            id,
            labels: labels(meta),
            created: created(meta),
            uid: meta.uid.as_deref().unwrap_or_default().into(),
            generation: meta.generation,
        })
    }

    /// The metadata of an object that cannot be read otherwise, as much of it as can be.
    ///
    /// # Errors
    /// When the object has no name.
    pub(in crate::object) fn salvage(object: &Value) -> Result<Meta, Invalid> {
        let whole = object.get("metadata").map(ObjectMeta::deserialize).and_then(Result::ok);
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        let named = || ObjectMeta {
            name: text("/metadata/name"),
            namespace: text("/metadata/namespace"),
            ..ObjectMeta::default()
        };
        Meta::read(&whole.unwrap_or_else(named))
    }

    /// What orders objects of a kind when only one can be in force: the older first, then by name.
    /// Objects of unknown age come after all of known age.
    pub fn seniority(&self) -> (i64, NamespacedName) {
        (self.created.unwrap_or(i64::MAX), self.id.clone())
    }
}

/// Name and namespace of a namespaced object.
pub(in crate::object) fn namespaced(meta: &ObjectMeta) -> Result<NamespacedName, Invalid> {
    let namespace = meta.namespace.as_deref().filter(|n| !n.is_empty()).unwrap_or(DEFAULT_NAMESPACE);
    Ok(NamespacedName::new(namespace, name(meta)?))
}

/// The name of an object.
pub(in crate::object) fn name(meta: &ObjectMeta) -> Result<Arc<str>, Invalid> {
    match meta.name.as_deref() {
        Some(name) if !name.is_empty() => Ok(name.into()),
        _ => Err(Invalid::new("metadata.name", "is missing")),
    }
}

/// The labels of an object.
pub(in crate::object) fn labels(meta: &ObjectMeta) -> Labels {
    meta.labels.iter().flatten().map(|(k, v)| (k.as_str(), v.as_str())).collect()
}

/// The value of an annotation.
pub(in crate::object) fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

/// When the object was created, in seconds since the epoch.
pub(in crate::object) fn created(meta: &ObjectMeta) -> Option<i64> {
    meta.creation_timestamp.as_ref().map(|time| time.0.as_second())
}

/// What kind of thing owns a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerKind {
    /// Between a pod and its deployment.
    ReplicaSet,
    /// A deployment itself.
    Deployment,
    /// A run-to-completion job.
    Job,
    /// A scheduled job.
    CronJob,
    /// Anything else, as a StatefulSet or DaemonSet.
    Other,
}

/// The controlling owner of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its kind.
    pub kind: OwnerKind,
    /// Its name, in the same namespace.
    pub name: Arc<str>,
}

impl Owner {
    /// The owner that controls the object; a sole owner counts as controlling.
    pub(in crate::object) fn of(meta: &ObjectMeta) -> Option<Owner> {
        let owners = meta.owner_references.as_deref().unwrap_or_default();
        let owner = owners.iter().find(|o| o.controller == Some(true)).or(match owners {
            [sole] => Some(sole),
            _ => None,
        })?;
        let kind = match owner.kind.as_str() {
            "ReplicaSet" => OwnerKind::ReplicaSet,
            "Deployment" => OwnerKind::Deployment,
            "Job" => OwnerKind::Job,
            "CronJob" => OwnerKind::CronJob,
            _ => OwnerKind::Other,
        };
        Some(Owner { kind, name: owner.name.as_str().into() })
    }
}
