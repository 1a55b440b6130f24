//! PeerAuthentication: whether a workload accepts peers without identity.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::authorization::Selector;
use super::meta::{self, Invalid, Labels, Meta};

/// A mutual TLS mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum MutualTls {
    /// Inherits from the wider policy.
    #[default]
    Unset,
    /// Plaintext only at a sidecar; in the mesh of node proxies as [`MutualTls::Permissive`].
    Disable,
    /// Plaintext is accepted.
    Permissive,
    /// Peers without identity are refused.
    Strict,
}

/// A PeerAuthentication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAuthentication {
    /// Namespace and name.
    pub id: super::NamespacedName,
    /// Labels, age: the oldest of a level is in force.
    pub meta: Meta,
    /// The workloads that it is for; `None` is all of its namespace, or of the mesh.
    pub selector: Option<Labels>,
    /// Its mode.
    pub mode: MutualTls,
    /// Whether it stands for one that could not be read, and refuses plaintext for that reason.
    pub unreadable: bool,
    /// Modes of single ports of the workload; only with a selector.
    pub ports: BTreeMap<u16, MutualTls>,
}

/// The manifest, strictly.
pub(crate) type Manifest = meta::Manifest<Spec>;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Spec {
    selector: Option<Selector>,
    mtls: Option<Mtls>,
    port_level_mtls: BTreeMap<u16, Mtls>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Mtls {
    mode: MutualTls,
}

impl TryFrom<Manifest> for PeerAuthentication {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<PeerAuthentication, Invalid> {
        let Manifest { metadata, spec: Spec { selector, mtls, port_level_mtls } } = manifest;
        let meta = Meta::read(&metadata)?;
        let selector = selector.and_then(Selector::labels);
        if selector.is_none() && !port_level_mtls.is_empty() {
            return Err(Invalid::new(
                "spec.portLevelMtls",
                "needs a selector: ports are those of a workload",
            ));
        }
        if port_level_mtls.contains_key(&0) {
            return Err(Invalid::new("spec.portLevelMtls", "0 is no port (1 to 65535)"));
        }
        Ok(PeerAuthentication {
            id: meta.id.clone(),
            meta,
            selector,
            unreadable: false,
            mode: mtls.unwrap_or_default().mode,
            ports: port_level_mtls.into_iter().map(|(port, mtls)| (port, mtls.mode)).collect(),
        })
    }
}

impl PeerAuthentication {
    /// What stands for one that could not be read: plaintext is refused, on every port.
    ///
    /// # Errors
    /// When it has no name, so that it cannot stand for anything.
    pub(crate) fn unreadable(object: &serde_json::Value) -> Result<PeerAuthentication, Invalid> {
        let meta = Meta::salvage(object)?;
        let selector = object.pointer("/spec/selector").cloned().map(serde_json::from_value::<Selector>);
        Ok(PeerAuthentication {
            id: meta.id.clone(),
            meta,
            // A selector that cannot be read selects everything: that is the closed side.
            selector: selector.and_then(Result::ok).and_then(Selector::labels),
            mode: MutualTls::Strict,
            unreadable: true,
            ports: BTreeMap::new(),
        })
    }
}
