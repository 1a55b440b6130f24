//! Which platform the cluster is, and whether Ambit was installed for it: CNI paths differ.
//!
//! The paths are those of the chart (`charts/ambit/templates/_platform.tpl`); a test compares them.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;

use super::facts::Facts;
use crate::cluster::Component;
use crate::finding::Finding;

/// Where a platform has its CNI plugins and their configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Platform {
    /// Value of the chart's `platform`; empty for the usual paths.
    pub(super) name: &'static str,
    pub(super) bin_dir: &'static str,
    pub(super) conf_dir: &'static str,
}

const BIN: &str = "/opt/cni/bin";
const CONF: &str = "/etc/cni/net.d";

/// Platforms whose paths are not the usual ones, or that need the chart's value for another reason.
pub(super) const PLATFORMS: [Platform; 5] = [
    Platform { name: "gke", bin_dir: "/home/kubernetes/bin", conf_dir: CONF },
    Platform { name: "openshift", bin_dir: "/var/lib/cni/bin", conf_dir: "/etc/cni/multus/net.d" },
    Platform {
        name: "k3s",
        bin_dir: "/var/lib/rancher/k3s/data/cni",
        conf_dir: "/var/lib/rancher/k3s/agent/etc/cni/net.d",
    },
    Platform {
        name: "microk8s",
        bin_dir: "/var/snap/microk8s/current/opt/cni/bin",
        conf_dir: "/var/snap/microk8s/current/args/cni-network",
    },
    Platform { name: "minikube", bin_dir: BIN, conf_dir: CONF },
];

/// A cluster with the usual paths.
pub(super) const USUAL: Platform = Platform { name: "", bin_dir: BIN, conf_dir: CONF };

/// The platform of a node, from what its kubelet and its cloud say of it.
pub(super) fn of_node(node: &Node) -> Platform {
    let labels = node.labels();
    let version = node.status.as_ref().and_then(|status| status.node_info.as_ref());
    let version = version.map(|info| info.kubelet_version.as_str()).unwrap_or_default();
    let name = if labels.contains_key("cloud.google.com/gke-nodepool") || version.contains("-gke.") {
        "gke"
    } else if labels.contains_key("node.openshift.io/os_id") {
        "openshift"
    } else if version.contains("+k3s") {
        "k3s"
    } else if labels.contains_key("microk8s.io/cluster") {
        "microk8s"
    } else if labels.contains_key("minikube.k8s.io/version") {
        "minikube"
    } else {
        ""
    };
    PLATFORMS.into_iter().find(|platform| platform.name == name).unwrap_or(USUAL)
}

/// Before an installation, what to set; after it, whether the paths are those of the platform.
pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let Some(platform) = facts.nodes.first().map(of_node) else { return Vec::new() };
    let Some(agent) = facts.daemon_set(Component::Node) else {
        if platform.name.is_empty() {
            return Vec::new();
        }
        let finding = Finding::note("cluster", format!("it runs on {}", platform.name))
            .remedy(format!("install with --set platform={}", platform.name));
        return vec![finding];
    };
    let paths = [
        ("cni-bin", "node.cni.binDir", platform.bin_dir),
        ("cni-conf", "node.cni.confDir", platform.conf_dir),
    ];
    let wrong = |(volume, value, expected): (&str, &str, &str)| {
        let installed = host_path(agent, volume)?;
        if installed.trim_end_matches('/') == expected {
            return None;
        }
        let on = if platform.name.is_empty() { "this platform" } else { platform.name };
        let remedy = match platform.name {
            "" => format!("leave `platform` empty, or set {value} if your nodes really use {installed}"),
            name => format!("helm upgrade with --set platform={name}"),
        };
        Some(
            Finding::error("DaemonSet ambit-node", format!("it uses {installed}, where {on} has {expected}"))
                .shows("the CNI plugin is not called: new pods enter the mesh late or not at all")
                .remedy(remedy),
        )
    };
    paths.into_iter().filter_map(wrong).collect()
}

fn host_path<'a>(agent: &'a DaemonSet, volume: &str) -> Option<&'a str> {
    let pod = agent.spec.as_ref()?.template.spec.as_ref()?;
    let volume = pod.volumes.as_ref()?.iter().find(|candidate| candidate.name == volume)?;
    Some(volume.host_path.as_ref()?.path.as_str())
}
