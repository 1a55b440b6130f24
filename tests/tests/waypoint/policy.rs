//! AuthorizationPolicies of services that are bound to the waypoint.

use std::net::{IpAddr, SocketAddr};

use ambit_local::Pod;
use ambit_tests::beds::Trials;
use ambit_tests::wait::{self, SOON};

use crate::bed::{PORT, Waypoints};
use crate::http::{self, Client};
use crate::thin::log_line;

pub(crate) fn add(trials: &mut Trials<Waypoints>) {
    trials.add("a policy that audits reports and decides nothing", async |bed| audits(bed).await);
    trials.add("a policy that can't be enforced denies", async |bed| cannot_be_enforced(bed).await);
    trials.add("a policy denies bytes that are passed on", async |bed| passed_on(bed).await);
    trials.add("what is not recognised as HTTP passes no rules for tokens", async |bed| {
        unrecognised(bed).await;
    });
}

/// A policy of a service, as flow of YAML.
async fn policy(bed: &Waypoints, service: &str, name: &str, spec: &str) {
    bed.apply(&format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: shop}}\n\
         spec: {{targetRefs: [{{group: '', kind: Service, name: {service}}}], {spec}}}\n"
    ))
    .await;
}

async fn status(pod: &Pod, to: SocketAddr, method: &str, path: &str) -> u16 {
    http::request(pod, to, method, path, "", "").await.unwrap().status
}

async fn cannot_be_enforced(bed: &Waypoints) {
    let (to, beside) = (bed.service("custom").await, bed.service("beside").await);
    policy(bed, "custom", "custom", "action: CUSTOM, provider: {name: opa}, rules: [{}]").await;
    let answer = bed.eventually(to, "/denied", "", |answer| answer.status == 403).await;
    assert_eq!(answer.body, "RBAC: access denied\n");
    let line = log_line(bed, "policy shop/custom").await;
    for part in ["response_flags=\"UAEX\"", "response_code=403", "custom.shop.svc.cluster.local"] {
        assert!(line.contains(part), "{part} is missing in {line}");
    }
    let metrics = bed.metrics().await;
    let counted = metrics.lines().any(|line| {
        line.starts_with("istio_requests_total{")
            && line.contains("destination_service_name=\"custom\"")
            && line.contains("response_code=\"403\"")
            && line.contains("response_flags=\"UAEX\"")
    });
    assert!(counted, "{metrics}");
    assert_eq!(status(&bed.cli, beside, "GET", "/").await, 200);
    bed.cluster.delete("AuthorizationPolicy", "shop", "custom").await.unwrap();
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
}

/// A policy with the action AUDIT names what it matches, whether that is allowed or not, and decides nothing.
async fn audits(bed: &Waypoints) {
    let to = bed.service("audited").await;
    let rules = "rules: [{to: [{operation: {paths: [/seen]}}]}]";
    policy(bed, "audited", "audit", &format!("action: AUDIT, {rules}")).await;
    let counted = async || http::metric(&bed.metrics().await, "ambit_policy_audited_requests_total ");
    wait::until("requests are reported", SOON, || async {
        assert_eq!(status(&bed.cli, to, "GET", "/seen").await, 200);
        counted().await > 0
    })
    .await;
    let line = log_line(bed, "audited_by=\"shop/audit\"").await;
    assert!(line.contains("path=\"/seen\"") && line.contains("response_code=200"), "{line}");
    let before = counted().await;
    assert_eq!(status(&bed.cli, to, "GET", "/other").await, 200);
    assert_eq!(counted().await, before);
    policy(bed, "audited", "audited-deny", "action: DENY, rules: [{to: [{operation: {methods: [POST]}}]}]")
        .await;
    wait::until("the denial is in force", SOON, || async {
        status(&bed.cli, to, "POST", "/seen").await == 403
    })
    .await;
    assert!(counted().await > before);
}

async fn passed_on(bed: &Waypoints) {
    bed.server("opaque", "opaque", http::mirror()).await;
    bed.apply(&format!(
        "apiVersion: v1\nkind: Service\n\
         metadata: {{name: opaque, namespace: shop, labels: {{istio.io/use-waypoint: waypoint}}}}\n\
         spec: {{selector: {{app: opaque}}, ports: [{{name: tcp, port: 80, targetPort: {PORT}}}]}}\n"
    ))
    .await;
    let vip = bed.cluster.service_ips("shop", "opaque").into_iter().find(IpAddr::is_ipv4).unwrap();
    let to = SocketAddr::new(vip, 80);
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
    policy(bed, "opaque", "opaque", "action: CUSTOM, provider: {name: opa}, rules: [{}]").await;
    wait::until("connections are refused", SOON, || async {
        http::get(&bed.cli, to, "/", "").await.is_err()
    })
    .await;
    let line = log_line(bed, "policy shop/opaque").await;
    assert!(line.contains("opaque.shop.svc.cluster.local"), "{line}");
    let metrics = bed.metrics().await;
    let counted = metrics.lines().any(|line| {
        line.starts_with("istio_tcp_connections_failed_total{")
            && line.contains("destination_service_name=\"opaque\"")
            && line.contains("response_flags=\"DENY\"")
    });
    assert!(counted, "{metrics}");
    bed.cluster.delete("AuthorizationPolicy", "shop", "opaque").await.unwrap();
    bed.eventually(to, "/", "", |answer| answer.status == 200).await;
}

/// Of a silent client, an empty line and a method in lower case nothing reaches the server.
async fn unrecognised(bed: &Waypoints) {
    bed.server("guarded", "guarded", http::mirror()).await;
    let to = bed.bind("guarded", "any").await;
    bed.apply(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\n\
         metadata: {name: guarded, namespace: shop}\n\
         spec: {targetRefs: [{group: '', kind: Service, name: guarded}],\
           jwtRules: [{issuer: https://a, jwks: '{}', presence: REQUIRED}]}\n",
    )
    .await;
    bed.eventually(to, "/", "", |answer| answer.status == 401).await;
    for start in ["\r\nGET", "get", ""] {
        let mut client = Client::connect(&bed.cli, to).await.unwrap();
        if start.is_empty() {
            // The waypoint takes silence for a server that speaks first.
            assert!(client.is_closed().await, "a silent client was passed on");
            continue;
        }
        client.write(format!("{start} / HTTP/1.1\r\nhost: guarded\r\n\r\n").as_bytes()).await.unwrap();
        let answer = client.response().await;
        assert!(answer.as_ref().map_or(true, |answer| answer.status == 401), "{start:?}: {answer:?}");
    }
    log_line(bed, "a RequestAuthentication applies").await;
    bed.cluster.delete("RequestAuthentication", "shop", "guarded").await.unwrap();
}
