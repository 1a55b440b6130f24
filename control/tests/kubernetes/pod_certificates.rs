//! PodCertificateRequests: a pod gets the identity of its service account, and nothing else.

use ambit_identity::{Trust, TrustDomain, Usage};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use k8s_openapi::api::core::v1::Pod;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SignatureAlgorithm};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};

use crate::api_server::ApiServer;
use crate::replica::Replica;
use crate::{namespace, until};

const KIND: (&str, &str) = ("certificates.k8s.io/v1", "PodCertificateRequest");
/// The version of Kubernetes 1.35 and 1.36.
const BETA: &str = "certificates.k8s.io/v1beta1";

/// A request as kubelet makes it, for a key of this kind.
fn request(name: &str, pod: &Pod, algorithm: &'static SignatureAlgorithm) -> Value {
    let key = KeyPair::generate_for(algorithm).unwrap();
    let mut parameters = CertificateParams::new(vec![]).unwrap();
    parameters.distinguished_name = DistinguishedName::new();
    let stub = parameters.serialize_request(&key).unwrap();
    let spec = pod.spec.as_ref().unwrap();
    json!({
        "apiVersion": KIND.0, "kind": KIND.1,
        "metadata": { "name": name, "namespace": "shop" },
        "spec": {
            "signerName": "ambit.dev/workload", "podName": pod.metadata.name, "podUID": pod.metadata.uid,
            "serviceAccountName": spec.service_account_name, "serviceAccountUID": "account",
            "nodeName": spec.node_name, "nodeUID": "node", "maxExpirationSeconds": 3600,
            "stubPKCS10Request": BASE64_STANDARD.encode(stub.der()),
        },
    })
}

/// The status of a request, once it has an answer.
async fn answered(server: &ApiServer, name: &str) -> Value {
    until(&format!("an answer to {name}"), async || {
        let object = server.get(KIND.0, KIND.1, "shop", name).await?;
        object["status"]["conditions"].is_array().then(|| object["status"].clone())
    })
    .await
}

/// An API server as of Kubernetes 1.36, which serves these kinds only where they are turned on, and as beta.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_api_server_is_asked_in_beta_versions() {
    let server = ApiServer::start_with(&[
        "--emulated-version=1.36",
        "--feature-gates=PodCertificateRequest=true,ClusterTrustBundle=true",
        "--runtime-config=certificates.k8s.io/v1beta1=true",
    ])
    .await;
    server.apply_value(namespace("shop")).await;
    let replica = Replica::start(&server).await;
    let bundle = until("the roots as a ClusterTrustBundle", async || {
        server.get(BETA, "ClusterTrustBundle", "", "ambit.dev:workload:roots").await
    })
    .await;
    assert_eq!(bundle["spec"]["trustBundle"].as_str().unwrap().trim(), replica.roots().trim());
    let pod = server.run_pod("shop", "reviews-1", "reviews", "n1", "10.9.0.1").await;
    let mut asked = request("good", &pod, &rcgen::PKCS_ECDSA_P256_SHA256);
    asked["apiVersion"] = BETA.into();
    server.apply_value(asked).await;
    let issued = until("an answer", async || {
        let object = server.get(BETA, KIND.1, "shop", "good").await?;
        object["status"]["conditions"][0]["type"].as_str().map(str::to_owned)
    })
    .await;
    assert_eq!(issued, "Issued");
}

/// The oldest API server that this one's program can be: it has neither kind, and the mesh does without.
#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_without_certificate_kinds_serves_the_mesh() {
    let server = ApiServer::start_with(&["--emulated-version=1.34"]).await;
    server.apply_value(namespace("shop")).await;
    server.run_pod("shop", "reviews-1", "reviews", "n1", "10.9.0.1").await;
    let proxy = server.run_pod("ambit-system", "ztunnel-1", "ztunnel", "n1", "10.9.0.2").await;
    let token = server.token("ambit-system", "ztunnel", "istio-ca", Some(&proxy)).await;
    let replica = Replica::start(&server).await;
    let (_client, held) = replica.subscribe(&token);
    until("the first state", async || held.workload("shop", "reviews-1")).await;
    until("the roots", async || server.get("v1", "ConfigMap", "shop", "istio-ca-root-cert").await).await;
    replica.ask(&token, "spiffe://cluster.local/ns/shop/sa/reviews").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_its_identity_and_others_a_reason() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    let replica = Replica::start(&server).await;
    let pod = server.run_pod("shop", "reviews-1", "reviews", "n1", "10.9.0.1").await;

    server.apply_value(request("good", &pod, &rcgen::PKCS_ECDSA_P256_SHA256)).await;
    let status = answered(&server, "good").await;
    assert_eq!(status["conditions"][0]["type"], "Issued", "{status}");
    let chain = status["certificateChain"].as_str().unwrap();
    let chain: Vec<_> = CertificateDer::pem_slice_iter(chain.as_bytes()).map(Result::unwrap).collect();
    let trust = Trust::new(TrustDomain::new("cluster.local").unwrap(), Vec::new());
    trust.set_roots(replica.roots().as_bytes()).unwrap();
    let identity = trust.verify(&chain, Usage::Server, std::time::SystemTime::now()).unwrap();
    assert_eq!(identity.as_str(), "spiffe://cluster.local/ns/shop/sa/reviews");

    server.apply_value(request("other-key", &pod, &rcgen::PKCS_ED25519)).await;
    let mut mistaken = request("other-account", &pod, &rcgen::PKCS_ECDSA_P256_SHA256);
    mistaken["spec"]["serviceAccountName"] = json!("admin");
    server.apply_value(mistaken).await;
    for (name, reason) in [("other-key", "UnsupportedKeyType"), ("other-account", "PodMismatch")] {
        let status = answered(&server, name).await;
        let condition = &status["conditions"][0];
        assert_eq!(
            (&condition["type"], &condition["reason"]),
            (&json!("Denied"), &json!(reason)),
            "{status}"
        );
        assert!(status.get("certificateChain").is_none());
    }
    // Those of other signers are left alone.
    let mut foreign = request("foreign", &pod, &rcgen::PKCS_ECDSA_P256_SHA256);
    foreign["spec"]["signerName"] = json!("example.com/other");
    server.apply_value(foreign).await;
    server.apply_value(request("later", &pod, &rcgen::PKCS_ECDSA_P384_SHA384)).await;
    assert_eq!(answered(&server, "later").await["conditions"][0]["type"], "Issued");
    let foreign = server.get(KIND.0, KIND.1, "shop", "foreign").await.unwrap();
    assert!(foreign["status"]["conditions"].is_null(), "{foreign}");
    assert_eq!(replica.metric("ambit_control_pod_certificates_issued_total"), 2.0);
    assert_eq!(replica.metric("ambit_control_pod_certificates_refused_total"), 2.0);
}
