//! Checks of an installation.

use std::collections::{BTreeMap, BTreeSet};

use kube::ResourceExt;

use super::facts::{AgentReport, Facts, ROOTS, Weakness};
use crate::cluster::{Component, PodName, is_ready, node_of};
use crate::finding::Finding;

/// Definitions without which a part of the mesh's API is missing, and the value of the chart that adds them.
const DEFINITIONS: [(&str, &str); 8] = [
    ("trafficpolicies.ambit.dev", "crds.ambit"),
    ("gateways.gateway.networking.k8s.io", "crds.gatewayApi"),
    ("gatewayclasses.gateway.networking.k8s.io", "crds.gatewayApi"),
    ("httproutes.gateway.networking.k8s.io", "crds.gatewayApi"),
    ("authorizationpolicies.security.istio.io", "crds.istio"),
    ("peerauthentications.security.istio.io", "crds.istio"),
    ("serviceentries.networking.istio.io", "crds.istio"),
    ("workloadentries.networking.istio.io", "crds.istio"),
];

/// How long a lease that is not renewed counts, in seconds; that of the control plane is 15.
const RENEWED_WITHIN: i64 = 60;

/// The kinds of the mesh's API.
pub(super) fn definitions(facts: &Facts) -> Vec<Finding> {
    if facts.unread.iter().any(|(what, _)| *what == "customresourcedefinitions") {
        return Vec::new();
    }
    let missing = DEFINITIONS.iter().filter(|(name, _)| !facts.definitions.contains_key(*name));
    missing
        .map(|(name, value)| {
            Finding::warning(format!("CustomResourceDefinition {name}"), "it is not there")
                .shows("objects of the kind can't be made, and what they would do is not done")
                .remedy(format!(
                    "helm upgrade with --set {value}=true, or apply it from charts/ambit/files/crds"
                ))
        })
        .collect()
}

/// Whether every pod of every component is there and ready.
pub(super) fn components(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    match facts.deployment(Component::Control) {
        None => findings.push(missing(Component::Control, "Deployment")),
        Some(deployment) => {
            let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
            let ready = deployment.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0);
            if ready < wanted {
                let symptom =
                    "while none is ready, changes do not reach proxies and certificates are not renewed";
                findings.push(unready(facts, Component::Control, "Deployment", ready, wanted).shows(symptom));
            }
        }
    }
    for component in [Component::Node, Component::Ztunnel] {
        let Some(set) = facts.daemon_set(component) else {
            findings.push(missing(component, "DaemonSet"));
            continue;
        };
        let status = set.status.clone().unwrap_or_default();
        if status.number_ready < status.desired_number_scheduled {
            let (ready, wanted) = (status.number_ready, status.desired_number_scheduled);
            let symptom = match component {
                Component::Ztunnel => "connections of pods in the mesh on such a node are refused",
                _ => "new pods in the mesh on such a node stay in ContainerCreating",
            };
            findings.push(unready(facts, component, "DaemonSet", ready, wanted).shows(symptom));
        }
    }
    findings
}

fn missing(component: Component, kind: &str) -> Finding {
    Finding::error(format!("{kind} {}", component.workload()), "it is not there")
        .remedy("helm upgrade --install with the whole chart")
}

fn unready(facts: &Facts, component: Component, kind: &str, ready: i32, wanted: i32) -> Finding {
    let pods: Vec<String> = facts
        .pods_of(component)
        .filter(|pod| !is_ready(pod))
        .map(|pod| match node_of(pod) {
            "" => format!("{} (on no node)", pod.name_any()),
            node => format!("{} on {node}", pod.name_any()),
        })
        .collect();
    let of = if pods.is_empty() { String::new() } else { format!(": {}", pods.join(", ")) };
    let subject = format!("{kind} {}", component.workload());
    Finding::error(subject, format!("{ready} of {wanted} pods are ready{of}")).remedy(format!(
        "kubectl -n {} describe pods -l {}, and `ambit log`",
        facts.system,
        component.selector()
    ))
}

/// Whether all components are of one version, that of this command too.
pub(super) fn versions(facts: &Facts) -> Vec<Finding> {
    let mut found: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
    for component in Component::ALL {
        for pod in facts.pods_of(component) {
            let version = pod.labels().get("app.kubernetes.io/version").cloned().unwrap_or_default();
            found.entry(version).or_default().insert(component.workload());
        }
    }
    let list = |found: &BTreeMap<String, BTreeSet<&str>>| {
        let one = |(version, names): (&String, &BTreeSet<&str>)| {
            format!("{version} ({})", names.iter().copied().collect::<Vec<_>>().join(", "))
        };
        found.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    if found.len() > 1 {
        let finding =
            Finding::warning("components", format!("they are of several versions: {}", list(&found)))
                .shows("new settings and kinds have an effect on some nodes only")
                .remedy("wait for the rollout, or see with kubectl rollout status why it does not go on");
        return vec![finding];
    }
    let own = env!("CARGO_PKG_VERSION");
    let other = found.keys().next().filter(|version| *version != own);
    let finding = |version: &String| {
        Finding::note("this command", format!("it is of version {own}, the mesh of {version}"))
            .remedy(format!("use ambit {version}"))
    };
    other.map(finding).into_iter().collect()
}

/// Whether a replica holds the lease.
pub(super) fn leader(facts: &Facts) -> Vec<Finding> {
    let spec = facts.lease.as_ref().and_then(|lease| lease.spec.as_ref());
    let holder = spec.and_then(|spec| spec.holder_identity.as_deref()).filter(|holder| !holder.is_empty());
    let age = spec.and_then(|spec| spec.renew_time.as_ref()).map(|time| facts.now - time.0.as_second());
    let problem = match (holder, age) {
        (None, _) => "nobody holds it".to_owned(),
        (Some(holder), Some(age)) if age > RENEWED_WITHIN => {
            format!("{holder} has not renewed it for {age} s")
        }
        _ => return Vec::new(),
    };
    let lease = ambit_control::write::lease::LEASE;
    let finding = Finding::error(format!("Lease {lease}"), problem)
        .shows("no status is written, no waypoint is deployed, and new namespaces get no roots")
        .remedy(
            "`ambit log control` says why; its service account needs to get, create and update the lease",
        );
    vec![finding]
}

/// Whether each namespace has the same roots as Ambit's own.
pub(super) fn roots(facts: &Facts) -> Vec<Finding> {
    if facts.unread.iter().any(|(what, _)| *what == "configmaps") {
        return Vec::new();
    }
    let Some(own) = facts.roots.get(&facts.system) else {
        let finding = Finding::error(format!("ConfigMap {}/{ROOTS}", facts.system), "it is not there")
            .shows("ztunnel does not start: configmap \"istio-ca-root-cert\" not found")
            .remedy("`ambit log control` says why it is not written");
        return vec![finding];
    };
    let is_active = |name: &&String| {
        let namespace = facts.namespaces.get(*name);
        namespace.and_then(|n| n.metadata.deletion_timestamp.as_ref()).is_none()
    };
    let (mut missing, mut other) = (Vec::new(), Vec::new());
    for namespace in facts.namespaces.keys().filter(is_active) {
        match facts.roots.get(namespace) {
            None => missing.push(namespace.as_str()),
            Some(roots) if roots.trim() != own.trim() => other.push(namespace.as_str()),
            Some(_) => {}
        }
    }
    let finding = |names: &[&str], problem: &str| {
        Finding::warning(format!("ConfigMap {ROOTS}"), format!("{problem} {}", names.join(", ")))
            .shows("waypoints of these namespaces do not start or trust nobody")
            .remedy("if it stays so: `ambit log control`; is another mesh writing the same ConfigMap?")
    };
    let mut findings = Vec::new();
    if !missing.is_empty() {
        findings.push(finding(&missing, "it is missing in"));
    }
    if !other.is_empty() {
        findings.push(finding(&other, "it has other roots in"));
    }
    findings
}

/// What node agents report of themselves.
pub(super) fn agents(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut weaknesses: BTreeMap<&Weakness, Vec<String>> = BTreeMap::new();
    for (pod, report) in &facts.agents {
        let node = node(facts, pod);
        match report {
            Err(error) => findings.push(
                Finding::warning(format!("node {node}"), format!("its agent does not answer: {error}"))
                    .remedy("its guarantees are not known; port-forwards need the right to create pods/portforward"),
            ),
            Ok(report) => {
                findings.extend(of_report(&node, report));
                for weakness in &report.health.weaknesses {
                    weaknesses.entry(weakness).or_default().push(node.clone());
                }
            }
        }
    }
    findings.extend(self::weaknesses(weaknesses));
    findings
}

/// Findings about guarantees that do not hold, each with the nodes where it does not.
pub(super) fn weaknesses(found: BTreeMap<&Weakness, Vec<String>>) -> Vec<Finding> {
    let finding = |(weakness, nodes): (&Weakness, Vec<String>)| {
        let Weakness { missing, guarantee, remedy } = weakness;
        let subject = format!("node {}", nodes.join(", "));
        let problem = format!("not guaranteed: {guarantee}");
        let finding = if guarantee == "pods can be enrolled" {
            Finding::error(subject, problem)
        } else {
            Finding::warning(subject, problem)
        };
        finding.shows(format!("missing: {missing}")).remedy(format!("needed: {remedy}"))
    };
    found.into_iter().map(finding).collect()
}

fn of_report(node: &str, report: &AgentReport) -> Vec<Finding> {
    let AgentReport { health, cni, pods } = report;
    let subject = format!("node {node}");
    let mut findings = Vec::new();
    if !cni.installed {
        let why = cni.problem.as_deref().unwrap_or("no reason is known");
        findings.push(
            Finding::error(&subject, format!("the CNI plugin is not installed: {why}"))
                .shows("new pods enter the mesh only once the agent sees them run, and the node's agent is not ready")
                .remedy("set `platform`, or node.cni.binDir and node.cni.confDir, to where the node's kubelet looks"),
        );
    }
    if health.proxies == 0 {
        findings.push(
            Finding::error(&subject, "no node proxy is connected to its agent")
                .shows("pods in the mesh are pending: their connections are refused")
                .remedy("kubectl describe the pod of ztunnel on the node, and `ambit log ztunnel`"),
        );
    }
    let unserved = pods.values().filter(|pod| matches!(pod.state.as_str(), "failed" | "pending"));
    findings.extend(unserved.map(|pod| {
        let reason = pod.reason.as_deref().unwrap_or("no reason is known yet");
        Finding::warning(
            format!("pod {}/{}", pod.namespace, pod.name),
            format!("its enrolment is {}: {reason}", pod.state),
        )
        .remedy(format!("`ambit status {}/{}` says more", pod.namespace, pod.name))
    }));
    findings
}

fn node(facts: &Facts, name: &PodName) -> String {
    let pod = facts.pods_of(Component::Node).find(|pod| PodName::of(pod) == *name);
    pod.map(|pod| node_of(pod).to_owned()).unwrap_or_else(|| name.to_string())
}
