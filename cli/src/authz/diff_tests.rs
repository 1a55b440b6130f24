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

/// A TrafficPolicy of the shop with these targets, and conditions of these expressions.
fn conditions(targets: &str, expressions: &[&str]) -> String {
    let conditions: Vec<String> = (0..)
        .zip(expressions)
        .map(|(number, expression)| format!("{{name: c{number}, expression: \"{expression}\"}}"))
        .collect();
    format!(
        "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: conditions, namespace: shop}}\n\
         spec: {{targetRefs: [{targets}], conditions: [{}]}}\n",
        conditions.join(", ")
    )
}

const WEB: &str = "{group: '', kind: Service, name: web}";
const WAYPOINT: &str = "{group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}";

#[test]
fn conditions_of_traffic_policies_are_judged() {
    let reads = "request.method in ['GET', 'HEAD'] && request.path.startsWith('/')";
    let own = "source.namespace == 'shop' && destination.port == 80 && request.host == 'web'";
    let other = ("other", "scan", "scan");
    for (flow, now, given, expected) in [
        (requests(CLI, "GET", "/", (1, 0)), String::new(), conditions(WEB, &[reads]), (0, 0)),
        (requests(CLI, "POST", "/", (1, 0)), String::new(), conditions(WEB, &[reads]), (1, 0)),
        (requests(CLI, "POST", "/", (1, 0)), String::new(), conditions(WAYPOINT, &[reads]), (1, 0)),
        (requests(other, "GET", "/", (1, 0)), String::new(), conditions(WEB, &[reads, own]), (1, 0)),
        (requests(CLI, "GET", "/", (1, 0)), String::new(), conditions(WEB, &[reads, own]), (0, 0)),
        // One of the same name takes the place of the mesh's.
        (requests(CLI, "POST", "/", (0, 1)), conditions(WEB, &[reads]), conditions(WEB, &[own]), (0, 1)),
        // What is not known is left out.
        (
            requests(CLI, "POST", "/", (1, 0)),
            String::new(),
            conditions(WEB, &["request.headers['x'] == 'a'"]),
            (0, 0),
        ),
        // A policy that can't be read denies.
        (requests(CLI, "GET", "/", (1, 0)), String::new(), conditions(WEB, &["request.pth == ''"]), (1, 0)),
        (connections(CLI, "db", 5432, (1, 0)), String::new(), conditions(WAYPOINT, &["false"]), (0, 0)),
    ] {
        let shown = format!("{flow:?} {now} {given}");
        assert_eq!(counts(flow, &now, &given), expected, "{shown}");
    }
}

#[test]
fn what_traffic_policies_ask_for_in_vain_is_named() {
    let flow = || observed(vec![requests(CLI, "GET", "/", (1, 0))]);
    let given = conditions(
        WEB,
        &["request.headers['x'] == 'a' || has(request.auth.claims.sub)", "request.method == 'GET'"],
    );
    let limited =
        given.replace("conditions: [", "rateLimits: [{name: few, requests: 1, interval: 1s}], conditions: [");
    let found = diff(&flow(), &shop("", ""), &shop("", &limited), None);
    assert!(!found.denies_what_was_allowed());
    assert_eq!(
        Vec::from_iter(&found.notes),
        [
            "left out: condition c0 of TrafficPolicy shop/conditions looks at headers, tokens, which is not among what is observed",
            "left out: rate limits of TrafficPolicy shop/conditions",
        ]
    );
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
