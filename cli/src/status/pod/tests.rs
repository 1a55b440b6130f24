//! What is said of a pod, from labels to certificate.

use ambit_node::redirect::Options;
use serde_json::json;
use time::macros::datetime;

use super::*;

fn pod(annotation: Option<&str>) -> Pod {
    let annotations = annotation.map(|value| json!({ REDIRECTION: value })).unwrap_or_default();
    let pod = json!({
        "metadata": { "namespace": "shop", "name": "web-0", "annotations": annotations },
        "spec": { "nodeName": "n1", "containers": [] },
        "status": { "phase": "Running", "podIPs": [{ "ip": "10.0.0.1" }] },
    });
    serde_json::from_value(pod).unwrap_or_default()
}

fn ztunnel() -> Pod {
    let pod = json!({
        "metadata": { "namespace": "ambit-system", "name": "ztunnel-x" },
        "spec": { "nodeName": "n1", "containers": [] },
        "status": { "conditions": [{ "type": "Ready", "status": "True" }] },
    });
    serde_json::from_value(pod).unwrap_or_default()
}

fn dump() -> Value {
    let identity = "spiffe://cluster.local/ns/shop/sa/web";
    json!({
        "workloads": [{
            "uid": "Kubernetes//Pod/shop/web-0", "identity": identity, "protocol": "HBONE",
            "services": [{ "host": "shop/web.shop.svc.cluster.local" }],
            "authorizationPolicies": ["shop/allow-cart", "ambit-system/istio_converted_static_strict"],
        }],
        "services": [{ "namespace": "shop", "hostname": "web.shop.svc.cluster.local",
                       "waypoint": { "destination": "shop/waypoint.shop.svc.cluster.local" } }],
        "policies": [
            { "namespace": "shop", "name": "allow-cart", "scope": "workloadSelector", "action": "allow" },
            { "namespace": "shop", "name": "other", "scope": "workloadSelector", "action": "allow" },
            { "namespace": "ambit-system", "name": "no-intruders", "scope": "global", "action": "deny" },
            { "namespace": "ambit-system", "name": "istio_converted_static_strict", "scope": "workloadSelector",
              "action": "deny" },
        ],
        "certificates": [{ "identity": identity, "state": "Available",
                           "certChain": [{ "expirationTime": "2026-01-02T11:00:00Z" }] }],
    })
}

/// A pod of which everything is well.
fn facts() -> Facts {
    Facts {
        pod: pod(Some("enabled")),
        decision: Decision::In(Options::default()),
        by_namespace: true,
        ztunnels: vec![ztunnel()],
        dump: Ok(dump()),
        agent: Some(json!({ "state": "enabled", "reason": null, "olderConnections": 2 })),
    }
}

fn shown(facts: &Facts) -> String {
    render(&explain(facts), datetime!(2026-01-01 12:00 UTC), Palette::new(false))
}

#[test]
fn a_protected_pod_is_explained_in_one_screen() {
    let status = explain(&facts());
    assert!(!status.is_failure());
    insta::assert_snapshot!(shown(&facts()));
}

#[test]
fn a_pod_outside_is_explained() {
    let facts = Facts {
        pod: pod(None),
        decision: Decision::Out(Reason::NotLabelled),
        dump: Ok(json!({})),
        agent: None,
        ..facts()
    };
    assert!(!explain(&facts).is_failure());
    insta::assert_snapshot!(shown(&facts));
}

#[test]
fn what_keeps_a_pod_from_being_protected_is_named() {
    let mut unknown = dump();
    unknown["workloads"] = json!([]);
    let mut clear = dump();
    clear["workloads"][0]["protocol"] = json!("TCP");
    let mut expired = dump();
    expired["certificates"][0]["state"] = json!("Unavailable: expired");
    expired["certificates"][0]["lastError"] = json!("no answer within 10s");
    let mut none = dump();
    none["certificates"] = json!([]);
    let failed = Some(json!({ "state": "failed", "reason": "the pod's network namespace was not found" }));
    let cases = [
        Facts { pod: pod(None), agent: failed, ..facts() },
        Facts { pod: pod(Some("pending")), agent: None, ..facts() },
        Facts { ztunnels: Vec::new(), ..facts() },
        Facts { dump: Err("none is ready".into()), ..facts() },
        Facts { dump: Ok(unknown), ..facts() },
        Facts { dump: Ok(clear), ..facts() },
        Facts { dump: Ok(expired), ..facts() },
        Facts { dump: Ok(none), ..facts() },
    ];
    let verdicts = cases.iter().map(|case| {
        let status = explain(case);
        assert!(status.is_failure());
        match status.verdict {
            Verdict::Failing { reason, remedy } => format!("{reason}\n  → {remedy}\n"),
            other => format!("{other:?}"),
        }
    });
    insta::assert_snapshot!(verdicts.collect::<String>());
}
