//! Requests to the authority for certificates of others, and malformed manifests.

use std::path::PathBuf;
use std::time::Duration;

use ambit_identity::{
    CertificateRequest, ControlPlane, ControlPlaneConfig, GrpcIssuer, IssueError, Issuer, SpiffeId,
};
use ambit_local::token::{AUDIENCE, Subject, TokenSigner};
use ambit_tests::add_trials;
use ambit_tests::beds::Trials;
use ambit_tests::wait;

use crate::{Hostile, requests};

const LIFETIME: Duration = Duration::from_secs(600);

/// Asks the cluster's authority, from a node, for a certificate: of `identity`, or of the bearer itself.
async fn ask(bed: &Hostile, token: Option<&str>, identity: Option<&str>) -> Result<(), IssueError> {
    let directory = tempfile::tempdir().unwrap();
    let token_file: Option<PathBuf> = token.map(|token| {
        let file = directory.path().join("token");
        std::fs::write(&file, token).unwrap();
        file
    });
    let config = ControlPlaneConfig {
        address: "172.18.0.2:15012".to_owned(),
        root_file: bed.cluster.root_cert(),
        server_name: ControlPlaneConfig::DEFAULT_SERVER_NAME.to_owned(),
        token_file,
        cluster_id: ambit_local::CLUSTER_ID.to_owned(),
    };
    let wanted: SpiffeId = identity.unwrap_or(crate::FRIEND).parse().unwrap();
    let impersonates = identity.is_some();
    let asking = bed.cluster.on_node(0, move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let channel = ControlPlane::new(config).unwrap();
            let issuer = if impersonates {
                GrpcIssuer::impersonating(channel)
            } else {
                GrpcIssuer::own_identity(channel)
            };
            let request = CertificateRequest::new(&wanted).unwrap();
            issuer.issue(&wanted, request.csr_pem(), LIFETIME).await.map(drop)
        })
    });
    tokio::time::timeout(wait::SOON, asking).await.expect("an answer in time").unwrap()
}

/// The authority says no for `reason`, counts it in `counter`, and goes on.
async fn is_denied(bed: &Hostile, token: Option<&str>, identity: Option<&str>, reason: &str, counter: &str) {
    let count = || async { bed.cluster.control().unwrap().metrics().await.unwrap().sum(counter, &[]) };
    let before = count().await;
    match ask(bed, token, identity).await {
        Err(IssueError::Denied { reason: said, .. }) => assert!(said.contains(reason), "{reason:?}: {said}"),
        other => panic!("{other:?}"),
    }
    assert!(count().await > before, "{counter} does not count it");
    let own = bed.cluster.token(&bed.node_proxy(1), LIFETIME).unwrap();
    ask(bed, Some(&own), Some(&bed.server.spiffe_id()))
        .await
        .expect("the pod's own node gets its certificate");
}

const DENIED: &str = "ambit_control_ca_denied_total";
const UNBELIEVED: &str = "ambit_control_ca_unauthenticated_total";

async fn a_node_gets_no_certificate_of_another_nodes_pod(bed: &Hostile) {
    let token = bed.cluster.token(&bed.node_proxy(0), LIFETIME).unwrap();
    is_denied(bed, Some(&token), Some(&bed.server.spiffe_id()), "PermissionDenied", DENIED).await;
}

async fn a_token_that_claims_another_node_than_its_pods_gets_nothing(bed: &Hostile) {
    let subject = Subject { node: bed.node_proxy(1).node, ..bed.node_proxy(0) };
    let token = bed.cluster.token(&subject, LIFETIME).unwrap();
    is_denied(bed, Some(&token), Some(&bed.server.spiffe_id()), "PermissionDenied", DENIED).await;
}

async fn a_pods_own_token_gets_no_other_identity(bed: &Hostile) {
    let subject = Subject {
        namespace: bed.server.namespace().to_owned(),
        service_account: bed.server.service_account().to_owned(),
        pod: Some((bed.server.name().to_owned(), bed.server.uid().to_owned())),
        node: Some(bed.server.node_name().to_owned()),
    };
    let token = bed.cluster.token(&subject, LIFETIME).unwrap();
    is_denied(bed, Some(&token), Some(&bed.other.spiffe_id()), "PermissionDenied", DENIED).await;
}

async fn an_identity_of_another_trust_domain_is_not_signed(bed: &Hostile) {
    let token = bed.cluster.token(&bed.node_proxy(1), LIFETIME).unwrap();
    let foreign = "spiffe://elsewhere.local/ns/shop/sa/server";
    is_denied(bed, Some(&token), Some(foreign), "PermissionDenied", DENIED).await;
}

async fn an_expired_token_is_refused(bed: &Hostile) {
    let token = bed.cluster.token(&bed.node_proxy(1), Duration::ZERO).unwrap();
    let identity = bed.server.spiffe_id();
    // The authority allows clocks to differ by half a minute; the token is older than that once it says so.
    let refused = async || ask(bed, Some(&token), Some(&identity)).await.is_err();
    wait::until("the token has expired", Duration::from_secs(45), refused).await;
    is_denied(bed, Some(&token), Some(&identity), "Unauthenticated", UNBELIEVED).await;
}

async fn a_token_of_a_key_that_is_not_the_clusters_is_refused(bed: &Hostile) {
    let forged = TokenSigner::new().unwrap().sign(&bed.node_proxy(1), AUDIENCE, LIFETIME).unwrap();
    is_denied(bed, Some(&forged), Some(&bed.server.spiffe_id()), "Unauthenticated", UNBELIEVED).await;
}

async fn a_token_whose_claims_were_changed_is_refused(bed: &Hostile) {
    let own = bed.cluster.token(&bed.node_proxy(0), LIFETIME).unwrap();
    let other = bed.cluster.token(&bed.node_proxy(1), LIFETIME).unwrap();
    let part = |token: &str, index: usize| token.split('.').nth(index).unwrap().to_owned();
    let mixed = [part(&own, 0), part(&other, 1), part(&own, 2)].join(".");
    is_denied(bed, Some(&mixed), Some(&bed.server.spiffe_id()), "Unauthenticated", UNBELIEVED).await;
    // {"alg":"none"}
    let unsigned = format!("eyJhbGciOiJub25lIn0.{}.", part(&other, 1));
    is_denied(bed, Some(&unsigned), Some(&bed.server.spiffe_id()), "Unauthenticated", UNBELIEVED).await;
}

async fn who_has_no_token_gets_nothing(bed: &Hostile) {
    is_denied(bed, None, Some(&bed.server.spiffe_id()), "Unauthenticated", UNBELIEVED).await;
    is_denied(bed, None, None, "Unauthenticated", UNBELIEVED).await;
    is_denied(bed, Some("nonsense"), None, "Unauthenticated", UNBELIEVED).await;
}

fn policy(accounts: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{namespace: shop, name: from-file}}\n\
         spec:\n  action: DENY\n  rules:\n  - from:\n    - source: {{principals: {accounts}}}\n"
    )
}

async fn status_of(bed: &Hostile, identity: &str) -> u16 {
    let tls = bed.credentials.certificate(identity).client_tls().dangerous_expecting_anyone();
    let mut session = requests::Session::open(bed, tls).await;
    session.connect(&bed.application().to_string()).await.as_u16()
}

/// A file becomes malformed: a policy that its text still names fails closed, a text that names no policy has no effect, the log
/// names the place, and other files are followed as before.
async fn a_malformed_manifest_counts_by_its_text_and_is_reported(bed: &Hostile) {
    const SUSPECT: &str = "spiffe://cluster.local/ns/shop/sa/suspect";
    let control = bed.cluster.control().unwrap();
    let problems = || async { control.metrics().await.unwrap().sum("ambit_control_source_problems", &[]) };
    let write = |name: &str, text: &str| std::fs::write(bed.manifests.join(name), text).unwrap();
    let comes_to = async |identity: &str, status: u16| {
        let what = format!("{identity} is answered with {status}");
        wait::until(&what, wait::SOON, || async { status_of(bed, identity).await == status }).await;
    };
    let before = problems().await;
    comes_to(SUSPECT, 200).await;
    write("policy.yaml", &policy("[cluster.local/ns/shop/sa/suspect]"));
    comes_to(SUSPECT, 401).await;
    let broken = [
        (policy("7"), "principals", 401),
        (policy("[cluster.local/ns/shop/sa/suspect"), "policy.yaml", 401),
        (format!("{}    nonsense: [\n", policy("[x]")), "policy.yaml", 401),
        ("\u{0}\u{1}\u{2}".to_owned(), "policy.yaml", 200),
        (policy("[a]").replace("DENY", "PERHAPS"), "action", 401),
        (
            policy("[a]").replace("metadata: {namespace: shop, name: from-file}", "metadata: 3"),
            "metadata",
            200,
        ),
        ("[".repeat(100_000), "policy.yaml", 200),
    ];
    for (text, reported, status) in broken {
        write("policy.yaml", &text);
        wait::until("the problem is counted", wait::SOON, || async { problems().await > before }).await;
        let is_logged =
            || async { control.logs().iter().any(|l| l.contains("policy.yaml") && l.contains(reported)) };
        wait::until(&format!("{reported:?} is logged"), wait::SOON, is_logged).await;
        // A change of another file has arrived, so that of the first has arrived too.
        write("other.yaml", &policy("[cluster.local/ns/shop/sa/bystander]").replace("from-file", "also"));
        comes_to("spiffe://cluster.local/ns/shop/sa/bystander", 401).await;
        assert_eq!(status_of(bed, SUSPECT).await, status, "{reported:?}");
        std::fs::remove_file(bed.manifests.join("other.yaml")).unwrap();
        write("policy.yaml", &policy("[cluster.local/ns/shop/sa/suspect]"));
        comes_to("spiffe://cluster.local/ns/shop/sa/bystander", 200).await;
        wait::until("the problem is gone", wait::SOON, || async { problems().await <= before }).await;
    }
    std::fs::remove_file(bed.manifests.join("policy.yaml")).unwrap();
    comes_to(SUSPECT, 200).await;
    bed.goes_on().await;
}

pub(crate) fn add(trials: &mut Trials<Hostile>) {
    add_trials!(
        trials, "control":
        a_node_gets_no_certificate_of_another_nodes_pod,
        a_token_that_claims_another_node_than_its_pods_gets_nothing,
        a_pods_own_token_gets_no_other_identity,
        an_identity_of_another_trust_domain_is_not_signed,
        an_expired_token_is_refused,
        a_token_of_a_key_that_is_not_the_clusters_is_refused,
        a_token_whose_claims_were_changed_is_refused,
        who_has_no_token_gets_nothing,
        a_malformed_manifest_counts_by_its_text_and_is_reported,
    );
}
