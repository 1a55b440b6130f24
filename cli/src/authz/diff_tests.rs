//! Flows and policies in, differences out.

use super::super::fixtures::{connections, day, observed, requests, shop};
use super::*;

const READERS: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: readers, namespace: shop, annotations: {istio.io/dry-run: 'true'}}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/cli]}}]
    to: [{operation: {methods: [GET]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-scans, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  action: DENY
  rules: [{from: [{source: {notNamespaces: [shop]}}]}]
";

const NOW: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-delete, namespace: shop}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}]
  action: DENY
  rules: [{to: [{operation: {methods: [DELETE]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-scans, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  action: DENY
  rules: [{from: [{source: {namespaces: [other, legacy]}}]}]
";

const CLI: (&str, &str, &str) = ("shop", "cli", "cli");

#[test]
fn a_day_shows_what_policies_would_change() {
    let differences = diff(&day(), &shop(NOW, ""), &shop(NOW, READERS), Some("shop"));
    assert!(differences.denies_what_was_allowed());
    let text = differences.render(Palette::new(false));
    let page = include_str!("../../../docs/authorization.md");
    assert!(page.contains(&text), "docs/authorization.md shows it");
    insta::assert_snapshot!("differences", text);
}

/// How many would be denied and allowed.
fn counts(flow: Flow, now: &str, given: &str) -> (usize, usize) {
    let found = diff(&observed(vec![flow]), &shop(now, ""), &shop(now, given), None);
    (found.denied.len(), found.allowed.len())
}

#[test]
fn flows_are_decided_as_the_proxies_would() {
    let other = ("other", "scan", "scan");
    let nobody = NOW.replace("action: DENY", "action: ALLOW");
    for (flow, now, given, expected) in [
        (requests(CLI, "GET", "/", (1, 0)), "", READERS, (0, 0)),
        (requests(CLI, "POST", "/", (1, 0)), "", READERS, (1, 0)),
        (requests(other, "GET", "/", (1, 0)), "", READERS, (1, 0)),
        (requests(CLI, "DELETE", "/", (0, 1)), NOW, READERS, (0, 0)),
        // A policy of the waypoint is one of the service behind it.
        (requests(CLI, "DELETE", "/", (0, 1)), NOW, &nobody, (0, 1)),
        (connections(CLI, "db", 5432, (1, 0)), "", READERS, (0, 0)),
        (connections(other, "db", 5432, (1, 0)), "", READERS, (1, 0)),
        (connections(("shop", "old", ""), "db", 5432, (1, 0)), "", READERS, (1, 0)),
        (connections(other, "web-v1", 8080, (1, 0)), "", READERS, (0, 0)),
        (connections(other, "gone", 8080, (1, 0)), "", READERS, (0, 0)),
    ] {
        let shown = format!("{flow:?}");
        assert_eq!(counts(flow, now, given), expected, "{shown}");
    }
}

#[test]
fn conditions_that_flows_do_not_show_are_named() {
    let given = READERS.replace("methods: [GET]", "methods: [GET]}}]\n    when: [{key: 'request.headers[x-role]', values: [admin]}]\n  - to: [{operation: {methods: [HEAD]");
    let found =
        diff(&observed(vec![requests(CLI, "GET", "/", (1, 0))]), &shop("", ""), &shop("", &given), None);
    let wanted = "AuthorizationPolicy shop/readers looks at headers";
    assert!(found.notes.iter().any(|note| note.contains(wanted)), "{:?}", found.notes);
    let gone = diff(&observed(vec![connections(CLI, "gone", 1, (1, 0))]), &shop("", ""), &shop("", ""), None);
    assert!(gone.notes.iter().any(|note| note.contains("the workload is gone")), "{:?}", gone.notes);
}
