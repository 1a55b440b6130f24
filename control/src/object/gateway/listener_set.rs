//! ListenerSets: listeners that are added to a Gateway from outside of it.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use super::listener;
use super::route::Parent;
use crate::object::meta::{Invalid, Meta};
use crate::object::{Listener, NamespacedName, TargetKind};

/// Listeners for a Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerSet {
    /// Name, labels and age.
    pub meta: Meta,
    /// The Gateway that they are for; `None`: its parent is none.
    pub gateway: Option<NamespacedName>,
    /// The listeners.
    pub listeners: Vec<Listener>,
}

/// The manifest.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    parent_ref: Parent,
    #[serde(default)]
    listeners: Vec<listener::Manifest>,
}

impl TryFrom<Manifest> for ListenerSet {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<ListenerSet, Invalid> {
        let Manifest { metadata, spec: Spec { parent_ref, listeners } } = manifest;
        let meta = Meta::read(&metadata)?;
        let namespace: &Arc<str> = &meta.id.namespace;
        let parent = parent_ref.read(namespace);
        Ok(ListenerSet {
            gateway: (parent.kind == TargetKind::Gateway).then_some(parent.name),
            listeners: listeners.into_iter().filter_map(|listener| listener.read(namespace)).collect(),
            meta,
        })
    }
}
