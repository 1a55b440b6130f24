//! Mesh identities as files: a `podCertificate` volume whose signer is the control plane.

use std::time::Duration;

use ambit_cluster::{Cluster, wait};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::apps::ROLLOUT;
use super::{Cases, Outcome};

/// How soon a pod without certificate says why.
const SOON: Duration = Duration::from_secs(240);

pub(crate) fn add(cases: &mut Cases) {
    cases.add("a_pod_gets_its_mesh_identity_as_files", files);
}

async fn files(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    kubectl.apply(&pods()).await?;
    let pod = ["pod", "holder", "--namespace", "files"];
    let pod = kubectl.wait_for(ROLLOUT, &pod, |pod| pod["status"]["phase"] == "Running").await?;
    let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
    let volume = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected/mesh");
    let bundle = read(cluster, &format!("{volume}/credentials.pem")).await?;
    assert!(bundle.contains("PRIVATE KEY"), "the key is beside the certificate");
    let identity = b"spiffe://cluster.local/ns/files/sa/holder";
    let leaf = first_certificate(&bundle).ok_or("no certificate in the bundle")?;
    assert!(leaf.windows(identity.len()).any(|bytes| bytes == identity), "{bundle}");
    let roots = read(cluster, &format!("{volume}/roots.pem")).await?;
    let config_map = ["configmap", "istio-ca-root-cert", "--namespace", "files"];
    let published = kubectl.get(&config_map).await?;
    let published = published["data"]["root-cert.pem"].as_str().and_then(first_certificate);
    assert!(published.is_some() && first_certificate(&roots) == published, "{roots}");

    // The pod with a key that is not signed waits, and its event says what to do.
    wait::until("the reason is known", SOON, async || {
        let requests = ["podcertificaterequests", "--namespace", "files"];
        let requests = kubectl.list(&requests).await.map_err(|error| error.to_string())?;
        let text = serde_json::Value::from(requests).to_string();
        if text.contains("UnsupportedKeyType") { Ok(()) } else { Err(text) }
    })
    .await?;
    kubectl.run(&["delete", "namespace", "files", "--wait"]).await?;
    Ok(())
}

/// A file of a pod on the first node.
async fn read(cluster: &Cluster, path: &str) -> Result<String, Box<dyn std::error::Error>> {
    let ran = cluster.run_on("n1", &["cat", path]).await?;
    match ran.code {
        0 => Ok(ran.output),
        _ => Err(format!("{path}: {ran:?}").into()),
    }
}

/// The first certificate of a text of PEM blocks, as DER.
fn first_certificate(pem: &str) -> Option<Vec<u8>> {
    let (_, rest) = pem.split_once("-----BEGIN CERTIFICATE-----")?;
    let (body, _) = rest.split_once("-----END CERTIFICATE-----")?;
    let body: String = body.split_whitespace().collect();
    BASE64_STANDARD.decode(body).ok()
}

fn pods() -> String {
    let pod = |name: &str, key: &str| {
        format!(
            r#"
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: files}}
spec:
  serviceAccountName: holder
  nodeName: n1
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: wait, image: "local/app:1", imagePullPolicy: IfNotPresent, args: [wait], volumeMounts: [{{name: mesh, mountPath: /mesh}}]}}
  volumes:
  - name: mesh
    projected:
      sources:
      - podCertificate: {{signerName: ambit.dev/workload, keyType: {key}, credentialBundlePath: credentials.pem}}
      - clusterTrustBundle: {{name: "ambit.dev:workload:roots", path: roots.pem}}
"#
        )
    };
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: files}\n---\n\
                     apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: holder, namespace: files}";
    format!("{namespace}{}{}", pod("holder", "ECDSAP256"), pod("refused", "ED25519"))
}
