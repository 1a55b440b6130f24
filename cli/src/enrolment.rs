//! Whether a pod is in the mesh, by the node agent's own rules, from the objects of the API server.

use std::collections::BTreeMap;

use ambit_node::enrol::{self, Decision};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::ResourceExt;

/// Namespaces by name.
pub(crate) type Namespaces = BTreeMap<String, Namespace>;

/// The agent's settings as the chart has them by default, with Ambit's own namespace.
pub(crate) fn settings(system: &str) -> enrol::Settings {
    let mut settings = enrol::Settings::default();
    settings.excluded_namespaces.insert(system.to_owned());
    settings
}

/// What the agent decides about a pod. A handler is that of the pod's RuntimeClass.
pub(crate) fn decide(
    pod: &Pod,
    namespaces: &Namespaces,
    handler: Option<String>,
    settings: &enrol::Settings,
) -> Decision {
    let namespace = pod.namespace().unwrap_or_default();
    let of_namespace = namespaces.get(&namespace);
    let facts = enrol::Pod {
        labels: pod.labels().clone(),
        annotations: pod.annotations().clone(),
        namespace_annotations: of_namespace.map(|n| n.annotations().clone()).unwrap_or_default(),
        host_network: pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false),
        runtime_handler: handler,
        namespace,
    };
    let labels = of_namespace.map(|namespace| namespace.labels().clone()).unwrap_or_default();
    enrol::enrolled(&facts, &labels, settings)
}

/// Whether the pod belongs into the mesh.
pub(crate) fn is_enrolled(pod: &Pod, namespaces: &Namespaces, settings: &enrol::Settings) -> bool {
    matches!(decide(pod, namespaces, None, settings), Decision::In(_))
}

/// Namespaces of a list by their names.
pub(crate) fn by_name(namespaces: Vec<Namespace>) -> Namespaces {
    namespaces.into_iter().map(|namespace| (namespace.name_any(), namespace)).collect()
}
