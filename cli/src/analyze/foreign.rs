//! What there is to say of objects that the control plane does not read.

use serde_json::Value;

use crate::finding::Finding;
use crate::network_policy;

/// What is to be said of kinds: the group, its kinds (none: all others of the group), what is wrong and what to do.
type Row = (&'static str, &'static [&'static str], &'static str, &'static str);

/// Kinds of meshes that are not read, by group; the first row of a kind counts.
const TABLE: [Row; 27] = [
    (
        "networking.istio.io",
        &["EnvoyFilter"],
        "it has no effect: Ambit's proxies are not Envoy",
        "say what it does with HTTPRoute, AuthorizationPolicy or a setting of the proxy",
    ),
    (
        "networking.istio.io",
        &["Sidecar"],
        "it has no effect: there are no sidecars, and proxies learn what they need",
        "delete it",
    ),
    (
        "networking.istio.io",
        &["ProxyConfig"],
        "it has no effect: proxies have settings of their own",
        "see docs/ztunnel-settings.md and docs/waypoint-settings.md",
    ),
    (
        "networking.istio.io",
        &["Gateway"],
        "it has no effect: gateways are those of Gateway API",
        "write a Gateway of gateway.networking.k8s.io and name it as parentRef of HTTPRoutes",
    ),
    (
        "networking.istio.io",
        &["WorkloadGroup"],
        "it has no effect: workloads outside of Kubernetes do not register themselves",
        "write a WorkloadEntry for each",
    ),
    ("networking.istio.io", &[], NOT_READ, COMING_FROM),
    (
        "extensions.istio.io",
        &[],
        "it has no effect: waypoints load no plugins",
        "do it in the application or a gateway in front",
    ),
    ("security.istio.io", &[], NOT_READ, COMING_FROM),
    (
        "authentication.istio.io",
        &["MeshPolicy"],
        "it has no effect: the kind was removed from Istio too",
        "write a PeerAuthentication (security.istio.io/v1) without selector in the root namespace for `peers`, a \
         RequestAuthentication for `origins`",
    ),
    (
        "authentication.istio.io",
        &[],
        "it has no effect: the kind was removed from Istio too",
        "write a PeerAuthentication (security.istio.io/v1) in its namespace for `peers`, with a selector for `targets`, and a \
         RequestAuthentication for `origins`",
    ),
    (
        "rbac.istio.io",
        &["ServiceRole", "ServiceRoleBinding"],
        "it has no effect, and limits nobody: the kind was removed from Istio too",
        "write an AuthorizationPolicy (security.istio.io/v1) for role and binding together: `to` from the role's methods, paths \
         and ports, `from` from the binding's subjects (`user` is `principals`)",
    ),
    (
        "rbac.istio.io",
        &["RbacConfig", "ClusterRbacConfig"],
        "it has no effect, and limits nobody: the kind was removed from Istio too",
        "write an AuthorizationPolicy (security.istio.io/v1) with an empty spec, which allows nothing by itself, in each \
         namespace that it includes",
    ),
    (
        "rbac.istio.io",
        &[],
        "it has no effect, and limits nobody: the kind was removed from Istio too",
        "write an AuthorizationPolicy (security.istio.io/v1)",
    ),
    (
        "authorization.istio.io",
        &[],
        "it has no effect, and limits nobody: Istio never had this group",
        "write an AuthorizationPolicy (security.istio.io/v1)",
    ),
    (
        "config.istio.io",
        &["RouteRule"],
        "it has no effect: the kind was removed from Istio too",
        "write an HTTPRoute, or a VirtualService (networking.istio.io/v1)",
    ),
    (
        "config.istio.io",
        &["DestinationPolicy"],
        "it has no effect: the kind was removed from Istio too",
        "write a DestinationRule (networking.istio.io/v1)",
    ),
    (
        "config.istio.io",
        &["EgressRule"],
        "it has no effect: the kind was removed from Istio too",
        "write a ServiceEntry (networking.istio.io/v1)",
    ),
    (
        "config.istio.io",
        &[],
        "it has no effect: Mixer and its kinds were removed from Istio too",
        "see docs/observability.md for metrics and logs; write AuthorizationPolicies for its checks",
    ),
    (
        "policy.linkerd.io",
        &[
            "Server",
            "ServerAuthorization",
            "AuthorizationPolicy",
            "MeshTLSAuthentication",
            "NetworkAuthentication",
        ],
        "it limits nobody in this mesh: it is read by Linkerd alone",
        "write an AuthorizationPolicy (security.istio.io/v1) with `principals` or `ipBlocks`, and `ports`",
    ),
    (
        "policy.linkerd.io",
        &["EgressNetwork"],
        "it limits nobody in this mesh: it is read by Linkerd alone",
        "write a ServiceEntry (networking.istio.io/v1) for what may be reached outside",
    ),
    (
        "policy.linkerd.io",
        &["HTTPRoute"],
        "it has no effect in this mesh: it is read by Linkerd alone",
        "write an HTTPRoute of gateway.networking.k8s.io with the same rules",
    ),
    ("policy.linkerd.io", &[], "it has no effect in this mesh: it is read by Linkerd alone", COMING_FROM),
    (
        "linkerd.io",
        &["ServiceProfile"],
        "it has no effect in this mesh: it is read by Linkerd alone",
        "write an HTTPRoute with `timeouts` and `retry`",
    ),
    (
        "linkerd.io",
        &["ServiceEntry"],
        "it has no effect: Linkerd never had this kind",
        "write a ServiceEntry of networking.istio.io/v1 with `hosts`, `ports`, `location: MESH_EXTERNAL` and `resolution`",
    ),
    (
        "workload.linkerd.io",
        &["ExternalWorkload"],
        "it has no effect in this mesh: it is read by Linkerd alone",
        "write a WorkloadEntry (networking.istio.io/v1), and a ServiceEntry that selects it",
    ),
    (
        "split.smi-spec.io",
        &[],
        "it has no effect: no kind of SMI is read",
        "write an HTTPRoute whose backendRefs have weights",
    ),
    (
        "access.smi-spec.io",
        &[],
        "it limits nobody: no kind of SMI is read",
        "write an AuthorizationPolicy (security.istio.io/v1)",
    ),
];
const NOT_READ: &str = "it has no effect: Ambit does not read this kind";
const COMING_FROM: &str = "docs/coming-from.md says what takes its place";
/// Kinds of Gateway API that say nothing about traffic by themselves.
const GATEWAY_API: &str = "gateway.networking.k8s.io";
const KUBERNETES: &str = "networking.k8s.io";

/// Whether objects of a group can be of interest.
pub(super) fn is_group(group: &str) -> bool {
    matches!(group, GATEWAY_API | KUBERNETES) || TABLE.iter().any(|(of, ..)| *of == group)
}

/// Whether objects of a kind that is not read are of interest.
pub(super) fn is_judged(group: &str, kind: &str) -> bool {
    match group {
        KUBERNETES => kind == "NetworkPolicy",
        // The controller's business, without effect on traffic by itself.
        GATEWAY_API => kind != "GatewayClass",
        _ => row(group, kind).is_some(),
    }
}

fn row(group: &str, kind: &str) -> Option<&'static Row> {
    TABLE.iter().find(|(of, kinds, ..)| *of == group && (kinds.is_empty() || kinds.contains(&kind)))
}

/// What is to be said of an object: that it has no effect, or that it blocks tunnels.
pub(super) fn judge(object: &Value, subject: &str) -> Option<Finding> {
    let api_version = object["apiVersion"].as_str()?;
    let (group, _) = api_version.split_once('/')?;
    let kind = object["kind"].as_str()?;
    if !is_judged(group, kind) {
        return None;
    }
    if group == KUBERNETES {
        let policy = serde_json::from_value(object.clone()).ok()?;
        return Some(network_policy::finding(subject.to_owned(), network_policy::blocked(&policy)?));
    }
    let (problem, remedy) = row(group, kind).map_or((NOT_READ, COMING_FROM), |row| (row.2, row.3));
    Some(Finding::warning(subject, problem).remedy(remedy))
}

#[cfg(test)]
mod tests {
    use ambit_control::kind::Kind;
    use serde_json::json;

    use super::*;

    fn found(api_version: &str, kind: &str) -> Option<Finding> {
        judge(&json!({ "apiVersion": api_version, "kind": kind, "metadata": { "name": "x" } }), "it")
    }

    #[test]
    fn kinds_without_effect_are_named_and_others_passed_over() {
        let judged = |api_version: &str, kind: &str| found(api_version, kind).is_some();
        assert!(judged("networking.istio.io/v1alpha3", "EnvoyFilter"));
        assert!(judged("extensions.istio.io/v1alpha1", "WasmPlugin"));
        assert!(!judged("linkerd.io/v1alpha2", "Other"));
        assert!(judged("gateway.networking.k8s.io/v1", "BackendTLSPolicy"));
        assert!(!judged("gateway.networking.k8s.io/v1", "GatewayClass"));
        assert!(!judged("apps/v1", "StatefulSet"));
        assert!(!judged("networking.k8s.io/v1", "Ingress"));
        assert!(!judged("v1", "ConfigMap"));
    }
    #[test]
    fn withdrawn_kinds_and_those_of_linkerd_have_their_modern_form_named() {
        for (api_version, kind, form) in [
            ("authentication.istio.io/v1alpha1", "Policy", "PeerAuthentication"),
            ("authentication.istio.io/v1alpha1", "MeshPolicy", "in the root namespace"),
            ("rbac.istio.io/v1alpha1", "ServiceRole", "AuthorizationPolicy"),
            ("rbac.istio.io/v1alpha1", "ClusterRbacConfig", "empty spec"),
            ("authorization.istio.io/v1alpha1", "AuthorizationPolicy", "security.istio.io/v1"),
            ("linkerd.io/v1alpha1", "ServiceEntry", "networking.istio.io/v1"),
            ("config.istio.io/v1alpha2", "EgressRule", "ServiceEntry"),
            ("networking.istio.io/v1alpha3", "Gateway", "gateway.networking.k8s.io"),
            ("policy.linkerd.io/v1beta3", "Server", "AuthorizationPolicy"),
            ("policy.linkerd.io/v1alpha1", "EgressNetwork", "ServiceEntry"),
            ("workload.linkerd.io/v1beta1", "ExternalWorkload", "WorkloadEntry"),
            ("linkerd.io/v1alpha2", "ServiceProfile", "HTTPRoute"),
            ("split.smi-spec.io/v1alpha2", "TrafficSplit", "weights"),
        ] {
            let remedy = found(api_version, kind).map(|finding| finding.remedy).unwrap_or_default();
            assert!(remedy.contains(form), "{kind}: {remedy}");
        }
    }

    #[test]
    fn no_kind_that_is_read_is_in_the_table() {
        for read in Kind::ALL {
            let row = row(read.group(), read.as_str()).filter(|(_, kinds, ..)| !kinds.is_empty());
            assert_eq!(row, None, "{read}");
        }
    }
}
