//! Checks that need nothing of Ambit: what the cluster must be like.

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt;

use super::facts::Facts;
use crate::enrolment;
use crate::finding::{Finding, Level};
use crate::network_policy;

/// The oldest minor version of Kubernetes 1 that is supported.
const OLDEST: u32 = 33;
/// The oldest kernel: nftables with what the rules of pods use.
const KERNEL: (u32, u32) = (5, 9);
/// Seconds by which clocks may differ, as certificates are dated back (certificate contract).
const SKEW: i64 = 120;
/// Seconds from which a difference is worth a warning.
const DRIFT: i64 = 10;

/// The version of the API server.
pub(super) fn version(facts: &Facts) -> Vec<Finding> {
    let (major, minor) = facts.version;
    if (major, minor) >= (1, OLDEST) {
        return Vec::new();
    }
    let finding =
        Finding::error("API server", format!("Kubernetes {major}.{minor} is older than 1.{OLDEST}"))
            .shows("kinds that Ambit uses are not served, and its pods do not start")
            .remedy(format!("upgrade the cluster to 1.{OLDEST} or newer"));
    vec![finding]
}

/// Operating system and kernel of nodes.
pub(super) fn nodes(facts: &Facts) -> Vec<Finding> {
    facts.nodes.iter().filter_map(node).collect()
}

fn node(node: &Node) -> Option<Finding> {
    let info = node.status.as_ref()?.node_info.as_ref()?;
    let subject = format!("node {}", node.name_any());
    if info.operating_system != "linux" {
        let problem = format!("its pods can't be in the mesh: it runs {}", info.operating_system);
        return Some(Finding::note(subject, problem));
    }
    let mut numbers = info.kernel_version.split(|letter: char| !letter.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse::<u32>().ok()).unwrap_or(0);
    let kernel = (next(), next());
    (kernel < KERNEL).then(|| {
        Finding::error(
            subject,
            format!("its kernel {} is older than {}.{}", info.kernel_version, KERNEL.0, KERNEL.1),
        )
        .shows("the node agent can't write the rules of pods, and no pod of the node is enrolled")
        .remedy("use a newer node image")
    })
}

/// Clocks of nodes against that of the API server: kubelets write their own time into their leases, and the API server
/// writes its own beside it.
pub(super) fn clocks(facts: &Facts) -> Vec<Finding> {
    facts.node_leases.iter().filter_map(clock).collect()
}

fn clock(lease: &Lease) -> Option<Finding> {
    let renewed = lease.spec.as_ref()?.renew_time.as_ref()?.0.as_second();
    let entries = lease.metadata.managed_fields.as_ref()?.iter();
    let written = entries.filter_map(|entry| entry.time.as_ref()).map(|time| time.0.as_second()).max()?;
    let skew = renewed - written;
    if skew.abs() < DRIFT {
        return None;
    }
    let (seconds, direction) = (skew.abs(), if skew > 0 { "ahead of" } else { "behind" });
    let problem = format!("its clock is {seconds} s {direction} that of the API server");
    let subject = format!("node {}", lease.name_any());
    let finding =
        if seconds >= SKEW { Finding::error(subject, problem) } else { Finding::warning(subject, problem) };
    let symptom = "certificates count as not valid yet or as expired: connections fail with the flag TLS_FAILURE, \
                   from a difference of two minutes on";
    Some(finding.shows(symptom).remedy("synchronise the clocks of the nodes (chrony, systemd-timesyncd)"))
}

/// Settings of CNI plugins that bypass or remove Ambit's.
pub(super) fn cni(facts: &Facts) -> Vec<Finding> {
    let Some(cilium) = &facts.cilium else { return Vec::new() };
    let is = |key: &str, value: &str| cilium.get(key).is_some_and(|set| set == value);
    let mut findings = Vec::new();
    if (is("kube-proxy-replacement", "true") || is("bpf-lb-sock", "true"))
        && !is("bpf-lb-sock-hostns-only", "true")
    {
        findings.push(
            Finding::error("Cilium", "its socket load balancer rewrites destinations inside pods")
                .shows("connections to services reach the mesh as connections to pods: no waypoint, no policy of a service")
                .remedy("set socketLB.hostNamespaceOnly=true in Cilium's chart and restart its agents"),
        );
    }
    if !is("cni-exclusive", "false") {
        findings.push(
            Finding::error("Cilium", "it removes other plugins from the CNI configuration (cni-exclusive)")
                .shows("the node agent counts the CNI plugin as not installed, and new pods stay outside the mesh")
                .remedy("set cni.exclusive=false in Cilium's chart and restart its agents"),
        );
    }
    findings
}

/// NetworkPolicies that keep tunnels out. One that selects no pod in the mesh is only noted.
pub(super) fn network_policies(facts: &Facts) -> Vec<Finding> {
    let settings = enrolment::settings(&facts.system);
    let in_mesh: Vec<_> =
        facts.pods.iter().filter(|pod| enrolment::is_enrolled(pod, &facts.namespaces, &settings)).collect();
    let finding = |policy| {
        let blocked = network_policy::blocked(policy)?;
        let namespace = policy.namespace();
        let concerns = in_mesh
            .iter()
            .any(|pod| pod.namespace() == namespace && network_policy::selects(policy, pod.labels()));
        let namespace = namespace.unwrap_or_default();
        if namespace == facts.system || settings.excluded_namespaces.contains(&namespace) {
            return None;
        }
        let finding =
            network_policy::finding(format!("NetworkPolicy {namespace}/{}", policy.name_any()), blocked);
        let level = if concerns { Level::Error } else { Level::Note };
        Some(Finding { level, ..finding })
    };
    facts.network_policies.iter().filter_map(finding).collect()
}

/// Whether the namespace admits ztunnel and the node agent, which need privileges.
pub(super) fn pod_security(facts: &Facts) -> Vec<Finding> {
    let namespace = facts.namespaces.get(&facts.system);
    let label = namespace.and_then(|n| n.labels().get("pod-security.kubernetes.io/enforce"));
    let Some(level) = label.filter(|level| *level != "privileged") else { return Vec::new() };
    let subject = format!("namespace {}", facts.system);
    let remedy = format!(
        "kubectl label --overwrite namespace {} pod-security.kubernetes.io/enforce=privileged",
        facts.system
    );
    let finding = Finding::error(subject, format!("its Pod Security Standard is {level}"))
        .shows("the DaemonSets ztunnel and ambit-node have no pods: violates PodSecurity")
        .remedy(remedy);
    vec![finding]
}

/// Other meshes, which capture the same pods.
pub(super) fn other_meshes(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for set in &facts.daemon_sets {
        let (namespace, name) = (set.namespace().unwrap_or_default(), set.name_any());
        let is_ours = set.labels().get("app.kubernetes.io/part-of").is_some_and(|part| part == "ambit");
        if is_ours || !matches!(name.as_str(), "ztunnel" | "istio-cni-node") {
            continue;
        }
        let finding = Finding::warning(format!("DaemonSet {namespace}/{name}"), "Istio's ambient mode is installed")
            .shows("its node agent and Ambit's enrol the same pods, as both go by istio.io/dataplane-mode")
            .remedy("`ambit migrate check` says what would change; remove Istio's DaemonSets before Ambit serves their nodes");
        findings.push(finding);
    }
    for deployment in &facts.deployments {
        let (namespace, name) = (deployment.namespace().unwrap_or_default(), deployment.name_any());
        let problem = match name.as_str() {
            name if name.starts_with("istiod") => "Istio's control plane is installed",
            "linkerd-destination" => "Linkerd is installed",
            _ => continue,
        };
        let finding = Finding::note(format!("Deployment {namespace}/{name}"), problem).remedy(
            "pods with a sidecar stay outside Ambit; a namespace can move once its sidecars are gone",
        );
        findings.push(finding);
    }
    findings
}
