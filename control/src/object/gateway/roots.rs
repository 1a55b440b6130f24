//! Objects that hold roots, for endpoints and for clients of gateways: ConfigMaps and ClusterTrustBundles.

use std::sync::Arc;

use k8s_openapi::api::core::v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use crate::object::meta::{Invalid, namespaced};
use crate::object::{Kind, NamespacedName, ObjectRef};

/// Key of a ConfigMap that holds roots.
const KEY: &str = "ca.crt";

/// An object that may hold roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootsHolder {
    /// Its namespace and name; a ClusterTrustBundle has no namespace.
    pub id: NamespacedName,
    /// Certificates in PEM, as they are written.
    pub roots: Option<Arc<str>>,
}

impl TryFrom<v1::ConfigMap> for RootsHolder {
    type Error = Invalid;

    fn try_from(map: v1::ConfigMap) -> Result<RootsHolder, Invalid> {
        let roots = map.data.and_then(|mut data| data.remove(KEY)).map(Arc::from);
        Ok(RootsHolder { id: namespaced(&map.metadata)?, roots })
    }
}

/// The manifest of a ClusterTrustBundle.
#[derive(Debug, Deserialize)]
pub(crate) struct BundleManifest {
    metadata: ObjectMeta,
    spec: BundleSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BundleSpec {
    trust_bundle: String,
}

impl TryFrom<BundleManifest> for RootsHolder {
    type Error = Invalid;

    fn try_from(BundleManifest { metadata, spec }: BundleManifest) -> Result<RootsHolder, Invalid> {
        let name = metadata.name.ok_or_else(|| Invalid::new("metadata.name", "is missing"))?;
        Ok(RootsHolder { id: NamespacedName::new("", name), roots: Some(spec.trust_bundle.into()) })
    }
}

/// A reference to an object that holds roots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootsRef {
    /// A ConfigMap or ClusterTrustBundle; none for anything else.
    pub object: Option<ObjectRef>,
    /// Its kind and name as written.
    pub text: String,
}

impl RootsRef {
    /// A reference of an object in `namespace`.
    pub(super) fn new(group: &str, kind: &str, namespace: &Arc<str>, name: &str) -> RootsRef {
        let object = match (group, kind) {
            ("" | "core", "ConfigMap") => {
                Some((Kind::ConfigMap, NamespacedName::new(namespace.clone(), name)))
            }
            // Gateway API: the scope follows from the kind.
            ("certificates.k8s.io", "ClusterTrustBundle") => {
                Some((Kind::ClusterTrustBundle, NamespacedName::new("", name)))
            }
            _ => None,
        };
        RootsRef {
            object: object.map(|(kind, name)| ObjectRef { kind, name }),
            text: format!("{kind} {name}"),
        }
    }
}
