//! ReferenceGrants: who may refer to objects of a namespace from outside it.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use crate::object::meta::{Invalid, namespaced};
use crate::object::{Kind, NamespacedName, ObjectRef};

/// A grant, for objects of its own namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReferenceGrant {
    /// Its namespace and name.
    pub id: NamespacedName,
    from: Vec<From>,
    to: Vec<To>,
}

impl ReferenceGrant {
    /// Whether objects of `kind` in namespace `from` may refer to `to`.
    pub fn allows(&self, kind: Kind, from: &Arc<str>, to: &ObjectRef) -> bool {
        let is_from = |grant: &From| {
            grant.group == kind.group() && grant.kind == kind.as_str() && *grant.namespace == **from
        };
        let is_to = |grant: &To| {
            let name = grant.name.as_deref().filter(|name| !name.is_empty());
            grant.group == to.kind.group()
                && grant.kind == to.kind.as_str()
                && name.is_none_or(|name| name == &*to.name.name)
        };
        self.id.namespace == to.name.namespace && self.from.iter().any(is_from) && self.to.iter().any(is_to)
    }
}

/// The manifest.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Debug, Deserialize)]
struct Spec {
    #[serde(default)]
    from: Vec<From>,
    #[serde(default)]
    to: Vec<To>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct From {
    #[serde(default)]
    group: String,
    kind: String,
    namespace: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct To {
    #[serde(default)]
    group: String,
    kind: String,
    name: Option<String>,
}

impl TryFrom<Manifest> for ReferenceGrant {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<ReferenceGrant, Invalid> {
        let Manifest { metadata, spec: Spec { from, to } } = manifest;
        Ok(ReferenceGrant { id: namespaced(&metadata)?, from, to })
    }
}
