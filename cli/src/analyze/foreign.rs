//! What there is to say of objects that the control plane does not read.

use ambit_control::kind::Kind;
use serde_json::Value;

use crate::finding::Finding;
use crate::network_policy;

/// Groups of the kinds of meshes, and of NetworkPolicy.
const GROUPS: [&str; 9] = [
    "networking.istio.io",
    "security.istio.io",
    "telemetry.istio.io",
    "extensions.istio.io",
    "authentication.istio.io",
    "config.istio.io",
    "rbac.istio.io",
    "gateway.networking.k8s.io",
    "networking.k8s.io",
];

/// Whether objects of a group can be of interest.
pub(super) fn is_group(group: &str) -> bool {
    GROUPS.contains(&group)
}

/// Whether objects of a kind that is not read are of interest.
pub(super) fn is_judged(group: &str, kind: &str) -> bool {
    match group {
        "networking.k8s.io" => kind == "NetworkPolicy",
        // The controller's business, without effect on traffic by itself.
        "gateway.networking.k8s.io" => kind != "GatewayClass",
        group => GROUPS.contains(&group),
    }
}

/// What is to be said of an object: that it has no effect, or that it blocks tunnels.
pub(super) fn judge(object: &Value, subject: &str) -> Option<Finding> {
    let api_version = object["apiVersion"].as_str()?;
    let (group, _) = api_version.split_once('/')?;
    let kind = object["kind"].as_str()?;
    if !is_judged(group, kind) {
        return None;
    }
    if group == "networking.k8s.io" {
        let policy = serde_json::from_value(object.clone()).ok()?;
        return Some(network_policy::finding(subject.to_owned(), network_policy::blocked(&policy)?));
    }
    let (problem, remedy) = match (group, kind) {
        (_, "EnvoyFilter") => (
            "it has no effect: Ambit's proxies are not Envoy",
            "say what it does with HTTPRoute, AuthorizationPolicy or a setting of the proxy",
        ),
        (_, "WasmPlugin") => {
            ("it has no effect: waypoints load no plugins", "do it in the application or a gateway in front")
        }
        (_, "Sidecar") => {
            ("it has no effect: there are no sidecars, and proxies learn what they need", "delete it")
        }
        (_, "ProxyConfig") => (
            "it has no effect: proxies have settings of their own",
            "see docs/ztunnel-settings.md and docs/waypoint-settings.md",
        ),
        (_, "Telemetry") => (
            "it has no effect: metrics and access logs are settings of the proxies",
            "see docs/observability.md",
        ),
        ("authentication.istio.io" | "rbac.istio.io" | "config.istio.io", _) => (
            "it has no effect: the kind was removed from Istio too",
            "say it with PeerAuthentication, RequestAuthentication and AuthorizationPolicy",
        ),
        _ => (
            "it has no effect: Ambit does not read this kind",
            "docs/coming-from.md says what takes its place",
        ),
    };
    debug_assert!(!Kind::ALL.iter().any(|read| read.group() == group && read.as_str() == kind));
    Some(Finding::warning(subject, problem).remedy(remedy))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn kinds_without_effect_are_named_and_others_passed_over() {
        let judged = |api_version: &str, kind: &str| {
            judge(&json!({ "apiVersion": api_version, "kind": kind, "metadata": { "name": "x" } }), "it")
                .is_some()
        };
        assert!(judged("networking.istio.io/v1alpha3", "EnvoyFilter"));
        assert!(judged("extensions.istio.io/v1alpha1", "WasmPlugin"));
        assert!(judged("authentication.istio.io/v1alpha1", "Policy"));
        assert!(judged("gateway.networking.k8s.io/v1", "BackendTLSPolicy"));
        assert!(!judged("gateway.networking.k8s.io/v1", "GatewayClass"));
        assert!(!judged("apps/v1", "StatefulSet"));
        assert!(!judged("networking.k8s.io/v1", "Ingress"));
        assert!(!judged("v1", "ConfigMap"));
    }
}
