//! Tests of the index.

use serde_json::json;

use super::*;
use crate::PodState;

fn pod(uid: &str, changes: &serde_json::Value) -> PodObject {
    let mut object = json!({
        "metadata": { "uid": uid, "name": format!("pod-{uid}"), "namespace": "shop" },
        "spec": { "containers": [], "serviceAccountName": "reviews" },
        "status": { "phase": "Running", "podIPs": [{ "ip": "10.0.0.5" }, { "ip": "fd00::5" }] },
    });
    for (part, fields) in changes.as_object().unwrap() {
        object[part].as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    }
    PodObject::try_from(&serde_json::from_value::<Pod>(object).unwrap()).unwrap()
}

fn ambient() -> Metadata {
    let labels = [("istio.io/dataplane-mode".to_owned(), "ambient".to_owned())].into();
    Metadata { labels, ..Metadata::default() }
}

fn index() -> Index {
    let mut index = Index::new(Settings::default());
    index.apply_namespace("shop".into(), ambient());
    index
}

fn status(state: PodState) -> PodStatus {
    PodStatus {
        name: "pod-a".into(),
        namespace: "shop".into(),
        state,
        reason: None,
        sandbox: None,
        older_connections: 0,
    }
}

#[test]
fn a_labelled_namespaces_pods_are_wanted_until_they_finish() {
    let mut index = index();
    index.apply_pod(pod("a", &json!({})));
    let wanted = index.wanted(Instant::now());
    assert_eq!(wanted["a"].ips.len(), 2);
    assert_eq!(wanted["a"].service_account, "reviews");
    index.apply_pod(pod("a", &json!({ "status": { "phase": "Succeeded" } })));
    assert_eq!(index.wanted(Instant::now()), BTreeMap::new());
    assert!(!index.is_alive("a"));
}

#[test]
fn a_pod_of_which_too_little_is_known_stays_as_it_is() {
    let mut index = index();
    let now = Instant::now();
    // Its namespace is not known, it is ending, or it is not listed yet.
    index.apply_pod(pod("a", &json!({ "metadata": { "namespace": "new" } })));
    index.apply_pod(pod("b", &json!({ "metadata": { "deletionTimestamp": "2026-11-28T01:00:00Z" } })));
    index.announce("c", now);
    let wanted = index.wanted(now);
    assert_eq!(wanted.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(wanted.values().all(|pod| pod.ips.is_empty()));
    assert!(index.is_alive("c"));
    let later = index.wanted(now + UNLISTED);
    assert!(!later.contains_key("c"), "the API server never heard of it");
}

#[test]
fn only_live_pods_that_are_out_are_outside() {
    let mut index = Index::new(Settings::default());
    let mirror = json!({ "annotations": {
        "kubernetes.io/config.mirror": "hash-of-b", "kubernetes.io/config.hash": "hash-of-b",
    } });
    index.apply_pod(pod("a", &json!({})));
    index.apply_pod(pod("b", &json!({ "metadata": mirror })));
    assert_eq!(index.outside(), HashSet::new(), "their namespace is not known");
    index.apply_namespace("shop".into(), Metadata::default());
    assert_eq!(index.outside(), ["a".to_owned(), "hash-of-b".to_owned()].into());
    index.delete_pod("a");
    index.apply_pod(pod("b", &json!({ "status": { "phase": "Failed" } })));
    assert_eq!(index.outside(), HashSet::new(), "processes of deleted or failed pods may still run");
    index.apply_namespace("shop".into(), ambient());
    index.apply_pod(pod("c", &json!({})));
    assert_eq!(index.outside(), HashSet::new());
}

#[test]
fn a_namespace_looked_up_counts_until_the_watch_catches_up() {
    let mut index = Index::new(Settings::default());
    let now = Instant::now();
    let at = |version, metadata| Metadata { version: Some(version), ..metadata };
    let is_wanted = |index: &mut Index, now| !index.wanted(now).is_empty();
    index.apply_namespace("shop".into(), at(5, Metadata::default()));
    index.apply_pod(pod("a", &json!({})));
    assert!(!is_wanted(&mut index, now));
    index.look_up_namespace("shop", at(9, ambient()), now);
    assert!(is_wanted(&mut index, now));
    index.apply_namespace("shop".into(), at(7, Metadata::default()));
    assert!(is_wanted(&mut index, now), "the watch is still behind");
    index.apply_namespace("shop".into(), at(10, Metadata::default()));
    assert!(!is_wanted(&mut index, now));
    index.look_up_namespace("shop", at(9, ambient()), now);
    assert!(!is_wanted(&mut index, now), "the answer came late");
    index.look_up_namespace("shop", at(11, ambient()), now);
    assert!(is_wanted(&mut index, now));
    assert!(!is_wanted(&mut index, now + LOOKED_UP));
}

#[test]
fn a_relist_drops_what_is_gone() {
    let mut index = index();
    index.apply_pod(pod("a", &json!({})));
    index.apply_pod(pod("b", &json!({})));
    index.retain_pods(&["b".to_owned()].into());
    assert_eq!(index.wanted(Instant::now()).keys().collect::<Vec<_>>(), ["b"]);
}

#[test]
fn a_runtime_class_is_judged_by_its_handler() {
    let mut index = index();
    index.apply_runtime("sandboxed".into(), "runsc".into());
    index.apply_pod(pod("a", &json!({ "spec": { "runtimeClassName": "sandboxed" } })));
    assert_eq!(index.wanted(Instant::now()), BTreeMap::new());
    let annotations = index.annotations(&BTreeMap::new());
    assert_eq!(annotations[0].value, Some("unsupported-runtime"));
    index.delete_runtime("sandboxed");
    assert_eq!(index.wanted(Instant::now()).len(), 1);
}

#[test]
fn only_annotations_that_differ_are_written() {
    let mut index = index();
    let annotated = |value: &str| pod("a", &json!({ "metadata": { "annotations": { REDIRECTION: value } } }));
    let written = |index: &Index, state| {
        let statuses = [("a".to_owned(), status(state))].into();
        index.annotations(&statuses).into_iter().map(|annotation| annotation.value).collect::<Vec<_>>()
    };
    index.apply_pod(pod("a", &json!({})));
    assert_eq!(written(&index, PodState::Pending), [Some("pending")]);
    index.apply_pod(annotated("pending"));
    assert_eq!(written(&index, PodState::Pending), []);
    assert_eq!(written(&index, PodState::Enabled), [Some("enabled")]);
    index.apply_pod(annotated("enabled"));
    assert_eq!(written(&index, PodState::Enabled), []);
    assert_eq!(written(&index, PodState::Leaving), [None]);
    index.apply_namespace("shop".into(), Metadata::default());
    assert_eq!(index.annotations(&BTreeMap::new()).len(), 1, "a pod that left has none");
}

#[test]
fn a_mirror_pod_is_known_to_the_runtime_by_another_uid() {
    let hash = "f7c1d2e3a4b5968778695a4b3c2d1e0f";
    let annotations = json!({ "kubernetes.io/config.mirror": hash, "kubernetes.io/config.hash": hash });
    let mirror = pod("a", &json!({ "metadata": { "annotations": annotations } }));
    assert_eq!(mirror.runtime_uid.as_deref(), Some(hash));
    let claimed = json!({ "metadata": { "annotations": { "kubernetes.io/config.hash": hash } } });
    assert_eq!(pod("a", &claimed).runtime_uid, None);
}
