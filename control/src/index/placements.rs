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
    /// The placement of a pod that has not finished and is bound to a node (certificate contract).
    pub(super) fn of(pod: &Pod) -> Option<PodPlacement> {
        (pod.is_live() && !pod.node.is_empty()).then(|| PodPlacement {
            node: pod.node.clone(),
            service_account: pod.service_account.clone(),
            uid: pod.meta.uid.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1;
    use serde_json::json;

    use super::*;

    fn placement(metadata: &serde_json::Value, spec: &serde_json::Value) -> Option<PodPlacement> {
        let object = json!({"metadata": metadata, "spec": spec, "status": {"phase": "Running"}});
        PodPlacement::of(&Pod::try_from(serde_json::from_value::<v1::Pod>(object).unwrap()).unwrap())
    }

    #[test]
    fn mirror_pods_have_no_identity() {
        let mirror = json!({"name": "p", "namespace": "payments", "uid": "u",
            "annotations": {"kubernetes.io/config.mirror": "hash"}});
        assert_eq!(placement(&mirror, &json!({"nodeName": "n"})), None);
        assert_eq!(placement(&mirror, &json!({"nodeName": "n", "serviceAccountName": "payments"})), None);
        let unmarked = json!({"name": "p", "namespace": "payments", "uid": "u"});
        assert_eq!(
            placement(&unmarked, &json!({"nodeName": "n"})),
            None,
            "an API server fills in the account"
        );
    }

    #[test]
    fn pods_of_files_without_an_account_have_the_default_one() {
        let placed =
            placement(&json!({"name": "p", "namespace": "shop"}), &json!({"nodeName": "n"})).unwrap();
        assert_eq!(&*placed.service_account, "default");
    }
}
