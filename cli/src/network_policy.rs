//! Whether a NetworkPolicy keeps tunnels from a pod or in it: port 15008 between pods.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::{Selector, SelectorExt};

use crate::finding::Finding;

/// Where tunnels arrive.
const HBONE: i32 = ambit_api::ports::INBOUND_HBONE as i32;

/// Directions in which a policy lets no tunnel pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Blocked {
    /// None arrives.
    pub(crate) ingress: bool,
    /// None leaves.
    pub(crate) egress: bool,
}

/// What a policy blocks; `None` when it admits port 15008 in every direction that it limits.
pub(crate) fn blocked(policy: &NetworkPolicy) -> Option<Blocked> {
    let spec = policy.spec.as_ref()?;
    let limits = |direction: &str| match &spec.policy_types {
        Some(types) if !types.is_empty() => types.iter().any(|name| name == direction),
        // networking.k8s.io/v1: without policyTypes, Ingress, and Egress where there are egress rules.
        _ => direction == "Ingress" || spec.egress.is_some(),
    };
    // A policy without any rule isolates the pod on purpose, and there is no application traffic to tunnel.
    let admits =
        |rules: &[Option<&[NetworkPolicyPort]>]| rules.is_empty() || rules.iter().any(|ports| admits(*ports));
    let ingress: Vec<_> = spec.ingress.iter().flatten().map(|rule| rule.ports.as_deref()).collect();
    let egress: Vec<_> = spec.egress.iter().flatten().map(|rule| rule.ports.as_deref()).collect();
    let blocked = Blocked {
        ingress: limits("Ingress") && !admits(&ingress),
        egress: limits("Egress") && !admits(&egress),
    };
    (blocked.ingress || blocked.egress).then_some(blocked)
}

/// Whether the ports of a rule include 15008. A rule without ports is for all of them.
fn admits(ports: Option<&[NetworkPolicyPort]>) -> bool {
    ports.is_none_or(|ports| ports.is_empty() || ports.iter().any(admits_hbone))
}

fn admits_hbone(port: &NetworkPolicyPort) -> bool {
    let is_tcp = port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
    is_tcp
        && match &port.port {
            None => true,
            Some(IntOrString::Int(first)) => (*first..=port.end_port.unwrap_or(*first)).contains(&HBONE),
            // The names of an application's ports are not the tunnel's.
            Some(IntOrString::String(_)) => false,
        }
}

/// Whether a policy is for pods with these labels.
pub(crate) fn selects(policy: &NetworkPolicy, labels: &BTreeMap<String, String>) -> bool {
    let selector = policy.spec.as_ref().and_then(|spec| spec.pod_selector.clone()).unwrap_or_default();
    Selector::try_from(selector).is_ok_and(|selector| selector.matches(labels))
}

/// The finding about a policy that blocks tunnels of pods in the mesh.
pub(crate) fn finding(subject: String, blocked: Blocked) -> Finding {
    let (direction, field) = match blocked {
        Blocked { ingress: true, egress: true } => ("to and from", "ingress and egress"),
        Blocked { ingress: true, .. } => ("to", "ingress"),
        Blocked { .. } => ("from", "egress"),
    };
    Finding::error(
        subject,
        format!("it admits the application's ports and not TCP 15008 {direction} its pods"),
    )
    .shows("connections between nodes fail with the flag CONNECT, as they arrive in tunnels on port 15008")
    .remedy(format!("add `- ports: [{{protocol: TCP, port: 15008}}]` to its {field}"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(spec: &Value) -> Option<Blocked> {
        let policy = json!({ "metadata": { "name": "p" }, "spec": spec });
        blocked(&serde_json::from_value(policy).unwrap_or_default())
    }

    #[test]
    fn a_policy_blocks_when_no_rule_admits_15008() {
        const INGRESS: Blocked = Blocked { ingress: true, egress: false };
        const EGRESS: Blocked = Blocked { ingress: false, egress: true };
        let cases = [
            (json!({ "ingress": [{ "ports": [{ "port": 8080 }] }] }), Some(INGRESS)),
            (json!({ "ingress": [{ "ports": [{ "port": "http" }] }] }), Some(INGRESS)),
            (json!({ "ingress": [{ "ports": [{ "port": 15008, "protocol": "UDP" }] }] }), Some(INGRESS)),
            (json!({ "ingress": [{ "ports": [{ "port": 15008 }] }] }), None),
            (json!({ "ingress": [{ "ports": [{ "port": 15000, "endPort": 15010 }] }] }), None),
            (json!({ "ingress": [{ "ports": [{ "protocol": "TCP" }] }] }), None),
            (json!({ "ingress": [{ "from": [{ "podSelector": {} }] }] }), None),
            (json!({ "ingress": [] }), None),
            (json!({ "policyTypes": ["Egress"], "egress": [{ "ports": [{ "port": 53 }] }] }), Some(EGRESS)),
            (json!({ "policyTypes": ["Egress"], "ingress": [{ "ports": [{ "port": 1 }] }] }), None),
        ];
        for (spec, expected) in cases {
            assert_eq!(of(&spec), expected, "{spec}");
        }
    }
}
