//! Policies on trust domains, and those that name only what L4 cannot see.

use std::net::SocketAddr;

use ambit_tests::beds::Trials;

use crate::bed::{Cases, PORT};

pub(crate) fn add(trials: &mut Trials<Cases>) {
    trials.add("trust_domains_of_a_policy_are_those_of_the_identity", trust_domains);
    trials.add("cluster_local_in_a_principal_is_the_meshs_own_trust_domain", own_trust_domain);
    trials.add("a_deny_of_http_attributes_alone_has_no_effect", http_attributes);
}

/// A policy for the server `app`, which is its only one of that name; `spec` without selector and braces.
async fn apply(bed: &Cases, app: &str, name: &str, spec: &str) {
    bed.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{selector: {{matchLabels: {{app: {app}}}}}, {spec}}}\n"
    ))
    .await;
    bed.knows(1, "workloads", |it| {
        it["name"] == app && it["authorizationPolicies"].to_string().contains(&format!("shop/{name}"))
    })
    .await;
}

/// Case l.
async fn trust_domains(bed: &Cases) {
    let server = bed.server("domains").await;
    let at = SocketAddr::new(server.pod.ip().into(), PORT);
    let source = |action: &str, source: &str| {
        format!("action: {action}, rules: [{{from: [{{source: {{{source}}}}}]}}]")
    };
    apply(bed, "domains", "d-1", &source("ALLOW", "trustDomains: [cluster.local]")).await;
    bed.must_reach(&bed.cli, at, "domains").await;
    bed.will_be_refused(&bed.out, at).await;
    bed.delete("AuthorizationPolicy", "shop", "d-1").await;
    apply(bed, "domains", "d-2", &source("ALLOW", "notTrustDomains: [partner.test], principals: ['*']"))
        .await;
    bed.will_reach(&bed.cli, at, "domains").await;
    bed.will_be_refused(&bed.out, at).await;
    bed.delete("AuthorizationPolicy", "shop", "d-2").await;
    apply(bed, "domains", "d-3", &source("DENY", "trustDomains: [partner.test]")).await;
    bed.will_reach(&bed.out, at, "domains").await;
    bed.must_reach(&bed.cli, at, "domains").await;
    apply(bed, "domains", "d-4", &source("DENY", "trustDomains: [cluster.local]")).await;
    bed.will_be_refused(&bed.cli, at).await;
    bed.must_reach(&bed.out, at, "domains").await;
}

/// Case m.
async fn own_trust_domain(bed: &Cases) {
    let server = bed.server("trusted").await;
    let at = SocketAddr::new(server.pod.ip().into(), PORT);
    let rules = "rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/cli]}}]}]";
    apply(bed, "trusted", "t-allow", &format!("action: ALLOW, {rules}")).await;
    bed.must_reach(&bed.cli, at, "trusted").await;
    bed.will_be_refused(&bed.third, at).await;
    bed.delete("AuthorizationPolicy", "shop", "t-allow").await;
    apply(bed, "trusted", "t-deny", &format!("action: DENY, {rules}")).await;
    bed.will_reach(&bed.third, at, "trusted").await;
    bed.will_be_refused(&bed.cli, at).await;
}

/// Case n.
async fn http_attributes(bed: &Cases) {
    let server = bed.server("unseen").await;
    let at = |port| SocketAddr::new(server.pod.ip().into(), port);
    bed.listen(&server.pod, server.pod.ip().into(), 8081, "beside").await;
    let from = "from: [{source: {notRequestPrincipals: ['*']}}]";
    apply(bed, "unseen", "u-alone", &format!("action: DENY, rules: [{{{from}}}]")).await;
    bed.finding("AuthorizationPolicy shop/u-alone", "has no effect at L4").await;
    bed.must_reach(&bed.cli, at(PORT), "unseen").await;
    let to = "to: [{operation: {ports: ['8081']}}]";
    apply(bed, "unseen", "u-port", &format!("action: DENY, rules: [{{{from}, {to}}}]")).await;
    bed.will_be_refused(&bed.cli, at(8081)).await;
    bed.must_reach(&bed.cli, at(PORT), "unseen").await;
}
