//! Who runs where: what a node proxy may ask certificates for.

use std::sync::Arc;

use crate::object::Pod;

/// A live pod's place on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlacement {
    /// The node.
    pub node: Arc<str>,
    /// The pod's service account, in its namespace.
    pub service_account: Arc<str>,
    /// The pod's uid; empty if unknown.
    pub uid: Arc<str>,
}

impl PodPlacement {
    /// The placement of a pod that has not finished and is bound to a node (contracts.md, section 5).
    pub(super) fn of(pod: &Pod) -> Option<PodPlacement> {
        (pod.is_live() && !pod.node.is_empty()).then(|| PodPlacement {
            node: pod.node.clone(),
            service_account: pod.service_account.clone(),
            uid: pod.meta.uid.clone(),
        })
    }
}
