//! What to do about a finding of the control plane, by its reason.

use ambit_control::index::Finding;

/// What to do; empty where the message says it.
pub(super) fn remedy(finding: &Finding) -> String {
    let gateway = finding.parent.as_ref().map(|parent| &parent.name);
    let named = |text: &str| match gateway {
        Some(gateway) => format!("{text} -n {} {}", gateway.namespace, gateway.name),
        None => text.to_owned(),
    };
    match finding.reason {
        "WaypointMissing" => format!("{}, or take the label istio.io/use-waypoint off", named("ambit waypoint apply")),
        "WaypointNotReady" => format!("see {}", named("ambit waypoint status")),
        "NotAllowedByWaypoint" => {
            "set allowedRoutes.namespaces.from of the waypoint's listener to All, or to Selector with the namespace".to_owned()
        }
        "AttachmentNotApplicable" => "set the label istio.io/waypoint-for of the waypoint to all".to_owned(),
        "TargetNotFound" => "name an object that has a waypoint: label it with istio.io/use-waypoint".to_owned(),
        "NoWaypoint" => "label it with istio.io/use-waypoint".to_owned(),
        "ProviderNotFound" => "name it in extensionProviders of the chart's meshConfig".to_owned(),
        "Conflicted" => "join the two, or delete one".to_owned(),
        "WeightInvalid" => "set the annotation to a number from 0 to 100".to_owned(),
        "HostTaken" | "AddressTaken" => "use another host or address, or delete the older object".to_owned(),
        "NoEffectAtL4" => {
            "bind it to a Service or Gateway that has a waypoint, by targetRefs in place of the selector".to_owned()
        }
        "NotForMesh" => "write `mesh` into `gateways` too; for requests from outside, write an HTTPRoute with the Gateway of \
             gateway.networking.k8s.io as parentRef"
            .to_owned(),
        "UnsupportedAction" => "use ALLOW or DENY".to_owned(),
        _ => String::new(),
    }
}
