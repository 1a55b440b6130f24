//! A change of roots in Secrets: both replicas decide alike, restarts change nothing, and everybody gets the roots.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use serde_json::json;

use crate::api_server::ApiServer;
use crate::replica::Replica;
use crate::{namespace, until, until_true};

/// A Secret with a CA of its own, with the keys that cert-manager writes; the second value is its root.
fn plugged_in() -> (serde_json::Value, String) {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::new(vec![]).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = parameters.self_signed(&key).unwrap().pem();
    let encoded = |text: &str| BASE64_STANDARD.encode(text);
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": { "name": "cacerts", "namespace": "ambit-system" },
        "data": { "tls.crt": encoded(&root), "tls.key": encoded(&key.serialize_pem()), "ca.crt": encoded(&root) },
    });
    (secret, root)
}

/// Whether a root is the one that signs: it is published first.
fn signs(replica: &Replica, root: &str) -> bool {
    replica.roots().replace('\r', "").starts_with(root.replace('\r', "").trim())
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_change_to_a_plugged_in_root_together() {
    let server = ApiServer::start().await;
    server.apply_value(namespace("shop")).await;
    let arguments = ["--root-propagation", "20s"];
    let (first, second) =
        tokio::join!(Replica::start_with(&server, &arguments), Replica::start_with(&server, &arguments));
    let old = first.roots();
    let (secret, root) = plugged_in();
    server.apply_value(secret).await;
    until_true("both publish both roots", || {
        first.roots().len() > old.len() && first.roots() == second.roots()
    })
    .await;
    assert!(first.roots().starts_with(&old), "the old root signs while the new one is propagated");
    until("everybody has both", async || {
        let map = server.get("v1", "ConfigMap", "shop", "istio-ca-root-cert").await?;
        (map["data"]["root-cert.pem"] == *first.roots()).then_some(())
    })
    .await;
    // A replica that starts in the middle decides like the one that goes on.
    second.kill();
    let third = Replica::start_with(&server, &arguments).await;
    assert!(!signs(&third, &root) || signs(&first, &root));
    until_true("both sign under the new root", || signs(&first, &root) && signs(&third, &root)).await;
    assert!(first.roots().contains(old.trim()), "certificates under the old root are still valid");
    until("the bundle has the roots", async || {
        let name = "ambit.dev:workload:roots";
        let bundle = server.get("certificates.k8s.io/v1", "ClusterTrustBundle", "", name).await?;
        (bundle["spec"]["trustBundle"] == *first.roots()).then_some(())
    })
    .await;
}

/// The Secret of the self-signed authority with its keys, once it has them all.
async fn own_secret(server: &ApiServer) -> serde_json::Value {
    until("the Secret has its keys", async || {
        let secret = server.get("v1", "Secret", "ambit-system", "istio-ca-secret").await?;
        let has = |key: &str| secret["data"][key].is_string();
        (has("ca-cert.pem") && has("ca-key.pem") && has("rotation.json")).then_some(secret)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_secret_is_written_back_and_no_new_root_signs() {
    let server = ApiServer::start().await;
    let first = Replica::start(&server).await;
    let roots = first.roots();
    let before = own_secret(&server).await;
    until("the roots are published", async || {
        server.get("v1", "ConfigMap", "ambit-system", "istio-ca-root-cert").await
    })
    .await;
    server.delete("v1", "Secret", "ambit-system", "istio-ca-secret").await;
    // It starts while the Secret is not there, and waits for the one that knows the key.
    let second = Replica::start(&server).await;
    let after = own_secret(&server).await;
    assert_ne!(before["metadata"]["uid"], after["metadata"]["uid"]);
    assert_eq!(before["data"]["ca-key.pem"], after["data"]["ca-key.pem"]);
    assert_eq!((first.roots(), second.roots()), (roots.clone(), roots.clone()));

    // As a chart that is applied again without keys.
    let emptied = json!({ "ca-cert.pem": null, "ca-key.pem": null, "rotation.json": null });
    server.merge("Secret", "ambit-system", "istio-ca-secret", json!({ "data": emptied })).await;
    assert_eq!(own_secret(&server).await["data"]["ca-cert.pem"], before["data"]["ca-cert.pem"]);
    assert_eq!((first.roots(), second.roots()), (roots.clone(), roots.clone()));

    // Nobody is left who knows the key.
    first.kill();
    second.kill();
    server.delete("v1", "Secret", "ambit-system", "istio-ca-secret").await;
    let third = Replica::start(&server).await;
    assert!(!signs(&third, &roots) && third.roots().contains(roots.trim()), "the old root stays published");
}
