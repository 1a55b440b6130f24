//! Callers at our certificate authority, and our node proxy as a caller (certificate contract).

use std::time::Duration;

use ambit_net::Netns;
use serde_json::{Value, json};
use time::{Date, Month, OffsetDateTime, PrimitiveDateTime, Time};

use crate::control::{Control, OBJECTS, PROXY, csr, pem_body};
use crate::grpc::{CERTIFICATES, SOON, call};
use crate::zds::{Bed, add};

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const NODE_PROXY: (&str, &str) = ("ambit-system", "ztunnel");
/// A pod that has ended and one on another node.
const OTHERS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: done-1, namespace: shop, uid: u-done}
spec: {nodeName: node-1, serviceAccountName: done, containers: [{name: c, image: c}]}
status: {phase: Succeeded, podIP: 10.0.0.21}
---
apiVersion: v1
kind: Pod
metadata: {name: far-1, namespace: shop, uid: u-far}
spec: {nodeName: node-2, serviceAccountName: far, containers: [{name: c, image: c}]}
status: {phase: Running, podIP: 10.0.0.22}
";

fn request(identity: Option<&str>, seconds: u64) -> Value {
    let mut request = json!({ "csr": csr(), "validity_duration": seconds });
    if let Some(identity) = identity {
        let fields = json!({ "ImpersonatedIdentity": { "string_value": identity } });
        request["metadata"] = json!({ "fields": fields });
    }
    request
}

/// Begin and end of a certificate's validity, read off its DER: the first two UTCTimes (RFC 5280 §4.1.2.5.1).
fn validity(pem: &str) -> [OffsetDateTime; 2] {
    let der = pem_body(pem);
    let times: Vec<OffsetDateTime> = der
        .windows(15)
        .filter(|window| window.starts_with(&[0x17, 13]) && window.ends_with(b"Z"))
        .filter_map(|window| {
            let text = std::str::from_utf8(&window[2..14]).ok()?;
            let part = |at: usize| text.get(at..at + 2)?.parse::<u8>().ok();
            let date = Date::from_calendar_date(
                2000 + i32::from(part(0)?),
                Month::try_from(part(2)?).ok()?,
                part(4)?,
            );
            let time = Time::from_hms(part(6)?, part(8)?, part(10)?).ok()?;
            Some(PrimitiveDateTime::new(date.ok()?, time).assume_utc())
        })
        .collect();
    [times[0], times[1]]
}

#[tokio::test(flavor = "multi_thread")]
async fn lifetimes_have_a_default_a_maximum_and_backdating() {
    let control = Control::start(&[("a.yaml", OBJECTS), ("z.yaml", PROXY)]);
    for (asked, given) in [(0, 24 * 3600), (3600, 3600), (400 * 24 * 3600, 24 * 3600)] {
        let request = request(Some(WEB), asked);
        let before = OffsetDateTime::now_utc();
        let message = Some(("IstioCertificateRequest", &request));
        let mut stream = control.call(CERTIFICATES, NODE_PROXY, message).await;
        let response = stream.receive("IstioCertificateResponse").await.expect("a certificate");
        let [begin, end] = validity(response["cert_chain"][0].as_str().unwrap());
        let slack = 30;
        let backdated = (before - begin).whole_seconds();
        assert!((120 - slack..=120 + slack).contains(&backdated), "{backdated} s before now");
        let lasts = (end - before).whole_seconds();
        assert!((given - slack..=given + slack).contains(&lasts), "asked for {asked} s, given {lasts} s");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_trusted_proxy_gets_live_pods_of_its_node() {
    let control = Control::start(&[("a.yaml", OBJECTS), ("z.yaml", PROXY), ("o.yaml", OTHERS)]);
    let denied = "7";
    for (caller, identity, what) in [
        (NODE_PROXY, "spiffe://cluster.local/ns/shop/sa/done", "its pod has ended"),
        (NODE_PROXY, "spiffe://cluster.local/ns/shop/sa/far", "its pod runs on another node"),
        (NODE_PROXY, "spiffe://cluster.local/ns/shop/sa/nobody", "no pod has it"),
        (NODE_PROXY, "spiffe://other.example/ns/shop/sa/web", "it is of another trust domain"),
        (("shop", "web"), "spiffe://cluster.local/ns/ambit-system/sa/ztunnel", "the caller is no node proxy"),
    ] {
        let request = request(Some(identity), 3600);
        let mut stream =
            control.call(CERTIFICATES, caller, Some(("IstioCertificateRequest", &request))).await;
        assert_eq!(stream.status().await, denied, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_needs_a_token_of_the_authoritys_audience() {
    let control = Control::start(&[("a.yaml", OBJECTS), ("z.yaml", PROXY)]);
    let roots = control.roots();
    let request = request(None, 3600);
    let other = format!("Bearer {}", control.token(NODE_PROXY, "another-audience"));
    for headers in
        [vec![], vec![("authorization", "Bearer nonsense")], vec![("authorization", other.as_str())]]
    {
        let message = Some(("IstioCertificateRequest", &request));
        let target = (roots.as_path(), "istiod.istio-system.svc");
        let mut stream = call(control.address(), target, CERTIFICATES, &headers, message).await;
        assert_eq!(stream.status().await, "16", "UNAUTHENTICATED: {headers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_impersonation_the_callers_own_identity_is_signed() {
    let control = Control::start(&[("a.yaml", OBJECTS), ("z.yaml", PROXY)]);
    let request = request(None, 3600);
    let mut stream =
        control.call(CERTIFICATES, ("shop", "web"), Some(("IstioCertificateRequest", &request))).await;
    let response = stream.receive("IstioCertificateResponse").await.expect("a certificate");
    let der = pem_body(response["cert_chain"][0].as_str().unwrap());
    let text = String::from_utf8_lossy(&der);
    assert_eq!(text.matches("spiffe://").count(), 1, "one URI SAN");
    assert!(text.contains(WEB) && !text.contains("/sa/lie"));
}

/// A renewal comes at half of the lifetime, and one that fails leaves the certificate in use.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_renew_at_half_and_survive_a_failure() {
    let mut bed = Bed::start().await;
    let netns = Netns::create().unwrap();
    let proxy = bed.agent.accept().await;
    assert_eq!(proxy.request(&add("u1", "web"), Some(&netns)).await, "");
    let lifetime = Duration::from_secs(20);
    bed.istiod.sign_for(Duration::ZERO, lifetime).await;
    let signed = tokio::time::Instant::now();
    let dump =
        bed.ztunnel.until("the certificate", |dump| dump["certificates"][0]["state"] == "Available").await;
    let serial = |dump: &Value| dump["certificates"][0]["certChain"][0]["serialNumber"].clone();
    bed.istiod.refuse().await;
    let after = signed.elapsed();
    assert!(after > lifetime.mul_f64(0.4) && after < lifetime.mul_f64(0.7), "renewed after {after:?}");
    let during = bed.ztunnel.dump().await;
    assert_eq!(during["certificates"][0]["state"], "Available", "{:#}", during["certificates"]);
    assert_eq!(serial(&during), serial(&dump), "a failed renewal discards nothing");
    tokio::time::timeout(SOON, bed.istiod.sign_for(Duration::ZERO, Duration::from_secs(3600)))
        .await
        .expect("another attempt");
    bed.ztunnel.until("the new certificate", |dump| serial(dump) != serial(&during)).await;
}
