//! The effect of changing policies on open and new connections.
//!
//! Every test has a cluster of its own with two clients in the mesh, one outside, and a server on each node, so
//! that a connection is handed over on one node, tunnelled to the other, or plain; over both address families.
//! Needs root; fails without.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that can't go on says so and ends"
)]

mod bed;
mod storm;

use std::time::Duration;

use ambit_local::{Pod, SYSTEM_NAMESPACE};
use ambit_tests::wait::{self, SOON};

use bed::{
    Bed, PORTS, Route, authentication, must_be_refused, must_close, must_open, must_work, open, policy,
    policy_in,
};

/// Connections that a rule matches.
struct Side {
    rule: String,
    routes: Vec<Route>,
}

/// Two sides, of which a policy lets in one, then the other, then, deleted, both.
async fn by_turns(bed: Bed, action: &str, one: Side, other: Side) {
    let letting_in = |inside: &Side, outside: &Side| {
        let rule = if action == "ALLOW" { &inside.rule } else { &outside.rule };
        policy("turns", &format!("action: {action}, rules: [{{{rule}}}]"))
    };
    let (mut ones, others) = (open(&one.routes).await, open(&other.routes).await);

    bed.apply(&letting_in(&one, &other)).await;
    must_close(others).await;
    must_be_refused(&other.routes).await;
    must_open(&one.routes).await;
    must_work(&mut ones).await;

    bed.apply(&letting_in(&other, &one)).await;
    must_close(ones).await;
    must_be_refused(&one.routes).await;
    must_open(&other.routes).await;
    let mut others = open(&other.routes).await;

    bed.delete("AuthorizationPolicy", "shop", "turns").await;
    must_work(&mut open(&one.routes).await).await;
    must_work(&mut others).await;
    bed.end().await;
}

async fn alice_and_bob(action: &str, of_alice: &str, of_bob: &str) {
    let bed = Bed::start().await;
    let side = |pod: &Pod, source: &str| Side {
        rule: format!("from: [{{source: {{{source}}}}}]"),
        routes: bed.routes(pod, &PORTS[..1]),
    };
    let (one, other) = (side(&bed.alice, of_alice), side(&bed.bob, of_bob));
    by_turns(bed, action, one, other).await;
}

async fn by_principal(action: &str) {
    alice_and_bob(
        action,
        "principals: [cluster.local/ns/east/sa/alice]",
        "principals: ['spiffe://cluster.local/ns/west/sa/b*']",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allow_by_principal_closes_and_opens_as_it_changes() {
    by_principal("ALLOW").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deny_by_principal_closes_and_opens_as_it_changes() {
    by_principal("DENY").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allow_by_namespace_closes_and_opens_as_it_changes() {
    alice_and_bob("ALLOW", "namespaces: [east]", "notNamespaces: [east]").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deny_by_namespace_closes_and_opens_as_it_changes() {
    alice_and_bob("DENY", "namespaces: [east]", "notNamespaces: [east]").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allow_by_service_account_closes_and_opens_as_it_changes() {
    alice_and_bob("ALLOW", "serviceAccounts: [east/alice]", "serviceAccounts: [west/bob]").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deny_by_service_account_closes_and_opens_as_it_changes() {
    alice_and_bob("DENY", "serviceAccounts: [east/alice]", "serviceAccounts: [west/bob]").await;
}

/// Addresses are those of the clients, also of one whose connections are tunnelled.
async fn by_ip_block(action: &str) {
    let bed = Bed::start().await;
    let rule = |pods: &[&Pod]| {
        let blocks: Vec<String> = pods.iter().flat_map(|pod| pod.ips()).map(|ip| format!("'{ip}'")).collect();
        format!("from: [{{source: {{ipBlocks: [{}]}}}}]", blocks.join(", "))
    };
    let mut routes = bed.routes(&bed.alice, &PORTS[..1]);
    routes.extend(bed.routes(&bed.stranger, &PORTS[..1]));
    let one = Side { rule: rule(&[&bed.alice, &bed.stranger]), routes };
    let other = Side { rule: rule(&[&bed.bob]), routes: bed.routes(&bed.bob, &PORTS[..1]) };
    by_turns(bed, action, one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allow_by_ip_block_closes_and_opens_as_it_changes() {
    by_ip_block("ALLOW").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deny_by_ip_block_closes_and_opens_as_it_changes() {
    by_ip_block("DENY").await;
}

async fn by_port(action: &str) {
    let bed = Bed::start().await;
    let side = |port: u16| {
        let mut routes = bed.routes(&bed.alice, &[port]);
        routes.extend(bed.routes(&bed.stranger, &[port]));
        Side { rule: format!("to: [{{operation: {{ports: ['{port}']}}}}]"), routes }
    };
    let (one, other) = (side(PORTS[0]), side(PORTS[1]));
    by_turns(bed, action, one, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allow_by_port_closes_and_opens_as_it_changes() {
    by_port("ALLOW").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deny_by_port_closes_and_opens_as_it_changes() {
    by_port("DENY").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_identity_is_none_of_all_principals() {
    let bed = Bed::start().await;
    let (known, unknown) = (bed.routes(&bed.alice, &PORTS[..1]), bed.routes(&bed.stranger, &PORTS[..1]));
    let (mut alices, strangers) = (open(&known).await, open(&unknown).await);
    bed.apply(&policy("all", "action: ALLOW, rules: [{from: [{source: {principals: ['*']}}]}]")).await;
    must_close(strangers).await;
    must_be_refused(&unknown).await;
    must_open(&known).await;
    must_work(&mut alices).await;
    bed.apply(&policy("all", "action: DENY, rules: [{from: [{source: {principals: ['*']}}]}]")).await;
    must_close(alices).await;
    must_be_refused(&known).await;
    must_open(&unknown).await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_allow_admits_nobody_and_deny_overrides_allow() {
    let bed = Bed::start().await;
    let (alice, bob) = (bed.routes(&bed.alice, &PORTS[..1]), bed.routes(&bed.bob, &PORTS[..1]));
    let lines = open(&alice).await;
    bed.apply(&policy("nobody", "")).await;
    must_close(lines).await;
    must_be_refused(&alice).await;
    // A second ALLOW adds to the first.
    bed.apply(&policy("everybody", "rules: [{}]")).await;
    let (mut alices, bobs) = (open(&alice).await, open(&bob).await);
    bed.apply(&policy("not-bob", "action: DENY, rules: [{from: [{source: {namespaces: [west]}}]}]")).await;
    must_close(bobs).await;
    must_be_refused(&bob).await;
    must_open(&alice).await;
    must_work(&mut alices).await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_applies_to_its_namespace_or_from_the_root_to_all() {
    let bed = Bed::start().await;
    let (alice, bob) = (bed.routes(&bed.alice, &PORTS[..1]), bed.routes(&bed.bob, &PORTS[..1]));
    let (mut alices, bobs) = (open(&alice).await, open(&bob).await);
    let no_alice = "action: DENY, rules: [{from: [{source: {namespaces: [east]}}]}]";
    let no_bob = "action: DENY, rules: [{from: [{source: {namespaces: [west]}}]}]";
    // The clients' own namespaces have no say in what the servers take.
    bed.apply(&policy_in("east", "elsewhere", no_alice)).await;
    bed.wait_policy("elsewhere", |_| true).await;
    bed.apply(&policy_in(SYSTEM_NAMESPACE, "everywhere", no_bob)).await;
    must_close(bobs).await;
    must_be_refused(&bob).await;
    must_open(&alice).await;
    must_work(&mut alices).await;
    bed.delete("AuthorizationPolicy", SYSTEM_NAMESPACE, "everywhere").await;
    drop(open(&bob).await);
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_refuses_and_closes_plaintext_until_permissive() {
    let bed = Bed::start().await;
    let (known, unknown) = (bed.routes(&bed.alice, &PORTS), bed.routes(&bed.stranger, &PORTS));
    let (mut alices, strangers) = (open(&known).await, open(&unknown).await);
    bed.apply(&authentication("shop", "default", "mtls: {mode: STRICT}")).await;
    must_close(strangers).await;
    must_be_refused(&unknown).await;
    must_open(&known).await;
    must_work(&mut alices).await;
    bed.apply(&authentication("shop", "default", "mtls: {mode: PERMISSIVE}")).await;
    let strangers = open(&unknown).await;
    must_work(&mut alices).await;
    // The mesh is strict now, but the namespace says otherwise, until it says nothing.
    bed.apply(&authentication(SYSTEM_NAMESPACE, "default", "mtls: {mode: STRICT}")).await;
    bed.apply(&authentication("shop", "default", "mtls: {mode: UNSET}")).await;
    must_close(strangers).await;
    must_be_refused(&unknown).await;
    must_work(&mut alices).await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_on_one_port_refuses_plaintext_on_that_port_alone() {
    let bed = Bed::start().await;
    let server = &bed.servers[1];
    let [free, strict] = PORTS.map(|port| bed.routes_to(&bed.stranger, server, &[port]));
    let beside = bed.routes_to(&bed.stranger, &bed.servers[0], &PORTS);
    let known = bed.routes(&bed.alice, &PORTS);
    let (mut alices, mut frees, stricts) = (open(&known).await, open(&free).await, open(&strict).await);
    let mut besides = open(&beside).await;
    let spec = "selector: {matchLabels: {app: far}}, portLevelMtls: {8081: {mode: STRICT}}";
    bed.apply(&authentication("shop", "one-port", spec)).await;
    must_close(stricts).await;
    must_be_refused(&strict).await;
    must_open(&free).await;
    must_open(&beside).await;
    must_open(&known).await;
    for lines in [&mut alices, &mut frees, &mut besides] {
        must_work(lines).await;
    }
    bed.delete("PeerAuthentication", "shop", "one-port").await;
    drop(open(&strict).await);
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permissive_port_of_a_strict_workload_takes_plaintext() {
    let bed = Bed::start().await;
    let [strict, free] = PORTS.map(|port| bed.routes(&bed.stranger, &[port]));
    let (stricts, mut frees) = (open(&strict).await, open(&free).await);
    let of = |app: &str| {
        format!(
            "selector: {{matchLabels: {{app: {app}}}}}, mtls: {{mode: STRICT}}, portLevelMtls: {{8081: {{mode: PERMISSIVE}}}}"
        )
    };
    bed.apply(&authentication("shop", "near", &of("near"))).await;
    bed.apply(&authentication("shop", "far", &of("far"))).await;
    must_close(stricts).await;
    must_be_refused(&strict).await;
    must_open(&free).await;
    must_work(&mut frees).await;
    // The policy of the workload overrides the one of its namespace.
    bed.apply(&authentication("shop", "default", "mtls: {mode: STRICT}")).await;
    let whole = "selector: {matchLabels: {app: far}}, mtls: {mode: PERMISSIVE}";
    bed.apply(&authentication("shop", "far", whole)).await;
    drop(open(&bed.routes_to(&bed.stranger, &bed.servers[1], &PORTS)).await);
    must_be_refused(&bed.routes_to(&bed.stranger, &bed.servers[0], &PORTS[..1])).await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_policy_is_counted_and_not_enforced() {
    let bed = Bed::start().await;
    let mut routes = bed.routes(&bed.bob, &PORTS[..1]);
    routes.extend(bed.routes(&bed.stranger, &PORTS[..1]));
    let mut lines = open(&routes).await;
    let enforced = policy("trial", "action: DENY, rules: [{to: [{operation: {ports: ['8080']}}]}]");
    let dry =
        enforced.replace("namespace: shop}", "namespace: shop, annotations: {istio.io/dry-run: 'true'}}");
    assert_ne!(dry, enforced);
    let differing = async |node: usize| {
        let metrics = bed.cluster.ztunnel(node).unwrap().metrics().await.unwrap();
        metrics.sum("ambit_policy_dry_run_differs_total", &[])
    };
    bed.apply(&dry).await;
    bed.wait_policy("trial", |policy| policy["dryRun"] == true).await;
    must_open(&routes).await;
    must_work(&mut lines).await;
    for node in 0..2 {
        // Two clients, two families.
        wait::until("it is counted", SOON, || async { (differing(node).await - 4.0).abs() < 0.5 }).await;
    }
    bed.apply(&enforced).await;
    must_close(lines).await;
    must_be_refused(&routes).await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_l4_cannot_see_never_matches_in_an_allow() {
    let bed = Bed::start().await;
    let (alice, bob) = (bed.routes(&bed.alice, &PORTS[..1]), bed.routes(&bed.bob, &PORTS[..1]));
    let (mut alices, bobs) = (open(&alice).await, open(&bob).await);
    let rules = [
        "{from: [{source: {namespaces: [east]}}]}",
        "{to: [{operation: {methods: [GET]}}]}",
        "{from: [{source: {namespaces: [west]}}], to: [{operation: {paths: ['/*'], ports: ['8080']}}]}",
        "{from: [{source: {namespaces: [west]}}], when: [{key: 'request.headers[x]', values: ['*']}]}",
        "{from: [{source: {requestPrincipals: ['*']}}]}",
    ];
    bed.apply(&policy("seen", &format!("action: ALLOW, rules: [{}]", rules.join(", ")))).await;
    must_close(bobs).await;
    must_be_refused(&bob).await;
    must_open(&alice).await;
    must_work(&mut alices).await;
    // With nothing else in it, the policy still is an ALLOW, and lets nobody in.
    bed.apply(&policy("seen", &format!("action: ALLOW, rules: [{}]", rules[1]))).await;
    must_close(alices).await;
    must_be_refused(&alice).await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_l4_cannot_see_is_dropped_from_a_deny() {
    let bed = Bed::start().await;
    let (alice, bob) = (bed.routes(&bed.alice, &PORTS[..1]), bed.routes(&bed.bob, &PORTS[..1]));
    let (mut alices, bobs) = (open(&alice).await, open(&bob).await);
    let rule = "{from: [{source: {namespaces: [west]}}], to: [{operation: {methods: [POST]}}]}";
    bed.apply(&policy("unseen", &format!("action: DENY, rules: [{rule}]"))).await;
    must_close(bobs).await;
    must_be_refused(&bob).await;
    must_open(&alice).await;
    must_work(&mut alices).await;
    let rule = "{to: [{operation: {methods: [POST], ports: ['8081']}}]}";
    bed.apply(&policy("unseen", &format!("action: DENY, rules: [{rule}]"))).await;
    let mut bobs = open(&bob).await;
    must_be_refused(&bed.routes(&bed.alice, &PORTS[1..])).await;
    must_work(&mut alices).await;
    must_work(&mut bobs).await;
    // Nothing is left of it, so it has no effect.
    bed.apply(&policy("unseen", "action: DENY, rules: [{to: [{operation: {methods: [POST]}}]}]")).await;
    drop(open(&bed.routes(&bed.alice, &PORTS[1..])).await);
    must_work(&mut alices).await;
    must_work(&mut bobs).await;
    bed.end().await;
}

/// What the control plane has counted as unreadable.
async fn malformed(bed: &Bed) -> f64 {
    let metrics = bed.cluster.control().unwrap().metrics().await.unwrap();
    metrics.sum("ambit_control_source_malformed_total", &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_policy_fails_closed_until_it_is_corrected() {
    let bed = Bed::start().await;
    let routes = bed.routes(&bed.alice, &PORTS[..1]);
    for action in ["ALLOW", "DENY"] {
        let lines = open(&routes).await;
        let before = malformed(&bed).await;
        let spec = format!(
            "action: {action}, rules: [{{from: [{{source: {{principles: [cluster.local/ns/west/sa/bob]}}}}]}}]"
        );
        bed.apply(&policy("misspelt", &spec)).await;
        must_close(lines).await;
        must_be_refused(&routes).await;
        assert!(malformed(&bed).await > before, "it is counted");
        let corrected =
            spec.replace("principles", if action == "ALLOW" { "notPrincipals" } else { "principals" });
        bed.apply(&policy("misspelt", &corrected)).await;
        drop(open(&routes).await);
        bed.delete("AuthorizationPolicy", "shop", "misspelt").await;
        drop(open(&bed.routes(&bed.bob, &PORTS[..1])).await);
    }
    let unknown = bed.routes(&bed.stranger, &PORTS[..1]);
    let lines = open(&unknown).await;
    bed.apply(&authentication("shop", "default", "mtls: {mode: STRIKT}")).await;
    must_close(lines).await;
    must_be_refused(&unknown).await;
    must_open(&routes).await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_becomes_unreadable_fails_closed() {
    let bed = Bed::start().await;
    let (alice, bob) = (bed.routes(&bed.alice, &PORTS[..1]), bed.routes(&bed.bob, &PORTS[..1]));
    let (alices, bobs) = (open(&alice).await, open(&bob).await);
    let sound = policy("guard", "action: ALLOW, rules: [{from: [{source: {namespaces: [east]}}]}]");
    bed.apply(&sound).await;
    must_close(bobs).await;
    // What it was before is not remembered: it is what a control plane that starts now makes of it.
    bed.apply(&sound.replace("namespaces", "namespace_s")).await;
    must_close(alices).await;
    must_be_refused(&alice).await;
    must_be_refused(&bob).await;
    bed.apply(&sound).await;
    drop(open(&alice).await);
    must_be_refused(&bob).await;
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_that_selects_a_running_pod_closes_its_connections() {
    let bed = Bed::start().await;
    let [near, far] = [0, 1].map(|at| {
        let server = &bed.servers[at];
        let of = |client: &Pod| bed.routes_to(client, server, &PORTS[..1]);
        (of(&bed.alice), of(&bed.bob))
    });
    let selector = "selector: {matchLabels: {guarded: 'yes'}}";
    for (name, spec) in [
        ("deny", "action: DENY, rules: [{from: [{source: {namespaces: [west]}}]}]"),
        ("allow", "action: ALLOW, rules: [{from: [{source: {namespaces: [east]}}]}]"),
    ] {
        bed.apply(&policy(name, &format!("{selector}, {spec}"))).await;
        bed.wait_policy(name, |_| true).await;
        for (guarded, (mine, his), free) in [(&bed.servers[0], &near, &far), (&bed.servers[1], &far, &near)] {
            let (mut mines, hiss) = (open(mine).await, open(his).await);
            let (mut of_free, mut his_of_free) = (open(&free.0).await, open(&free.1).await);
            bed.cluster.label_pod(guarded, "guarded", Some("yes")).await.unwrap();
            must_close(hiss).await;
            must_be_refused(his).await;
            must_open(mine).await;
            must_open(&free.1).await;
            for lines in [&mut mines, &mut of_free, &mut his_of_free] {
                must_work(lines).await;
            }
            bed.cluster.label_pod(guarded, "guarded", None).await.unwrap();
            drop(open(his).await);
            must_work(&mut mines).await;
        }
        bed.delete("AuthorizationPolicy", "shop", name).await;
    }
    bed.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_and_cuts_are_logged_with_their_policy() {
    let bed = Bed::start().await;
    let routes = bed.routes(&bed.bob, &PORTS[..1]);
    let lines = open(&routes).await;
    bed.apply(&policy("named", "action: DENY, rules: [{from: [{source: {namespaces: [west]}}]}]")).await;
    must_close(lines).await;
    must_be_refused(&routes).await;
    for node in 0..2 {
        let ztunnel = bed.cluster.ztunnel(node).unwrap();
        let is_logged = |what: &str| {
            ztunnel.logs().iter().any(|line| line.contains(what) && line.contains("ns/west/sa/bob"))
        };
        wait::until("the access log has both", Duration::from_secs(10), || async {
            is_logged("closed by policy: denied by policy shop/named")
                && is_logged("denied by policy shop/named")
        })
        .await;
        let metrics = ztunnel.metrics().await.unwrap();
        let denied = [("reporter", "destination"), ("response_flags", "DENY"), ("source_workload", "bob")];
        assert!(metrics.sum("istio_tcp_connections_failed_total", &denied) >= 2.0, "refusals are counted");
    }
    bed.end().await;
}
