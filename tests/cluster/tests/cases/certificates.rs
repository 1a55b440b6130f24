//! Roots that proxies read from files, and mesh identities as files: a `podCertificate` volume whose signer is the control plane.

use std::error::Error;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit_cluster::{Cluster, mesh, wait};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use serde_json::json;

use super::apps::{Apps, ROLLOUT};
use super::mesh::set_mode;
use super::waypoint::put_behind_waypoint;
use super::{Cases, Outcome};

/// How soon a pod without certificate says why.
const SOON: Duration = Duration::from_secs(240);

pub(crate) fn add(cases: &mut Cases) {
    cases.add("a_pod_gets_its_mesh_identity_as_files", files);
    cases.add("a_second_root_reaches_every_proxy_by_its_file", second_root);
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

/// A root that is published beside the one that signs is trusted by running proxies soon, long before they renew, and one that
/// is taken back is not any more.
async fn second_root(cluster: &Cluster) -> Outcome {
    let kubectl = cluster.kubectl();
    let apps = Apps::start(cluster, "rooted", ("n1", "n2")).await?;
    set_mode(cluster, "rooted", true).await?;
    put_behind_waypoint(cluster, &apps).await?;
    expect_roots(cluster, 1).await?;
    // The mesh's own authority as a plugged-in one, with another root beside it.
    let secret = kubectl.get(&["secret", "istio-ca-secret", "--namespace", mesh::NAMESPACE]).await?;
    let decoded = |key: &str| -> Result<String, Box<dyn Error>> {
        let encoded = secret["data"][key].as_str().ok_or_else(|| format!("no {key} in istio-ca-secret"))?;
        Ok(String::from_utf8(BASE64_STANDARD.decode(encoded)?)?)
    };
    let (certificate, key) = (decoded("ca-cert.pem")?, decoded("ca-key.pem")?);
    let mut parameters = CertificateParams::new(vec![])?;
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let second = parameters.self_signed(&KeyPair::generate()?)?.pem();
    let cacerts = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "cacerts", "namespace": mesh::NAMESPACE },
        "stringData": {
            "ca-cert.pem": certificate, "ca-key.pem": key, "cert-chain.pem": certificate,
            "root-cert.pem": format!("{certificate}\n{second}"),
        },
    });
    kubectl.apply(&cacerts.to_string()).await?;
    expect_roots(cluster, 2).await?;
    apps.request(cluster).await?;
    kubectl.run(&["delete", "secret", "cacerts", "--namespace", mesh::NAMESPACE]).await?;
    expect_roots(cluster, 1).await?;
    apps.request(cluster).await?;
    Ok(apps.stop(cluster).await?)
}

/// Waits until every node proxy and waypoint trusts as many roots.
async fn expect_roots(cluster: &Cluster, wanted: usize) -> Outcome {
    let kubectl = cluster.kubectl();
    wait::until(&format!("every proxy trusts {wanted} roots"), SOON, async || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let poke = format!("test/poke={}", now / 5);
        for (namespace, selector) in
            [(mesh::NAMESPACE, "app=ztunnel"), ("rooted", "gateway.networking.k8s.io/gateway-name=waypoint")]
        {
            let selected = ["pods", "--namespace", namespace, "--selector", selector];
            // Kubelet brings a changed ConfigMap to a pod within a minute or so, or when the pod changes.
            let annotate = [&["annotate", "--overwrite"], &selected[..], &[poke.as_str()]].concat();
            kubectl.run(&annotate).await.map_err(|error| error.to_string())?;
            let pods = kubectl.list(&selected).await.map_err(|error| error.to_string())?;
            if pods.is_empty() {
                return Err(format!("no pods {selector}"));
            }
            for pod in pods {
                let address = pod["status"]["podIP"].as_str().unwrap_or_default();
                let get = format!(
                    "busybox wget -qO- http://{address}:15020/metrics | grep '^ambit_trusted_roots '"
                );
                let ran =
                    cluster.run_on("n1", &["sh", "-c", &get]).await.map_err(|error| error.to_string())?;
                if ran.output.trim() != format!("ambit_trusted_roots {wanted}") {
                    return Err(format!("{}: {}", pod["metadata"]["name"], ran.output));
                }
            }
        }
        Ok(())
    })
    .await?;
    Ok(())
}

/// A file of a pod on the first node.
async fn read(cluster: &Cluster, path: &str) -> Result<String, Box<dyn Error>> {
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
