//! Ambit's own pods, and how a pod is named on the command line.

use std::fmt;
use std::str::FromStr;

use ambit_control::api_server::CallError;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

use super::Cluster;

/// A pod by namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub(crate) struct PodName {
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
}

impl PodName {
    /// The name of an object of the API server.
    pub(crate) fn of(pod: &Pod) -> PodName {
        PodName { namespace: pod.namespace().unwrap_or_default(), name: pod.name_any() }
    }

    /// `NAMESPACE/NAME`, or a name in a namespace that is given otherwise.
    pub(crate) fn parse(text: &str, namespace: &str) -> PodName {
        let text = text.strip_prefix("pod/").unwrap_or(text);
        let (namespace, name) = text.split_once('/').unwrap_or((namespace, text));
        PodName { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A part of Ambit, each a workload of the chart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Component {
    /// The control plane.
    Control,
    /// The node agent.
    Node,
    /// The node proxy.
    Ztunnel,
}

impl Component {
    /// Every component.
    pub(crate) const ALL: [Component; 3] = [Component::Control, Component::Node, Component::Ztunnel];

    /// Name of its workload and value of its pods' label `app.kubernetes.io/name`.
    pub(crate) fn workload(self) -> &'static str {
        match self {
            Component::Control => "ambit-control",
            Component::Node => "ambit-node",
            Component::Ztunnel => "ztunnel",
        }
    }

    /// Selects its pods.
    pub(crate) fn selector(self) -> String {
        format!("app.kubernetes.io/name={}", self.workload())
    }
}

impl FromStr for Component {
    type Err = ();

    /// `control`, `node`, `ztunnel`, or the name of the workload.
    fn from_str(text: &str) -> Result<Component, ()> {
        let is_named =
            |c: &Component| c.workload() == text || c.workload().strip_prefix("ambit-") == Some(text);
        Component::ALL.into_iter().find(is_named).ok_or(())
    }
}

/// The pods of a component, by node and name.
///
/// # Errors
/// What the API server says.
pub(crate) async fn pods_of(cluster: &Cluster, component: Component) -> Result<Vec<Pod>, CallError> {
    let mut pods: Vec<Pod> = cluster.list(Some(&cluster.system), &component.selector()).await?;
    pods.sort_by_key(|pod| (node_of(pod).to_owned(), pod.name_any()));
    Ok(pods)
}

/// The node of a pod; empty before it is scheduled.
pub(crate) fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

/// Whether a pod is ready.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_named_with_or_without_its_namespace() {
        assert_eq!(PodName::parse("shop/web-0", "default").to_string(), "shop/web-0");
        assert_eq!(PodName::parse("web-0", "default").to_string(), "default/web-0");
        assert_eq!(PodName::parse("pod/web-0", "default").to_string(), "default/web-0");
    }

    #[test]
    fn components_go_by_two_names() {
        assert_eq!("control".parse(), Ok(Component::Control));
        assert_eq!("ambit-node".parse(), Ok(Component::Node));
        assert_eq!("ztunnel".parse(), Ok(Component::Ztunnel));
        assert_eq!("envoy".parse::<Component>(), Err(()));
    }
}
