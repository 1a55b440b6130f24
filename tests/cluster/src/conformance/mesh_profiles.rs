//! The mesh profiles. The suite's namespaces are in the mesh by label, and each has a waypoint: that is where routes of a
//! service take effect. Everything else is as the suite has it.

use std::fs;

use rcgen::{CertificateParams, KeyPair};
use serde_json::Value;

use super::{Arguments, ROLLOUT, announced, echo};
use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::Layout;

/// What is tested. The profiles bring their core features along.
const PROFILES: &str = "MESH-HTTP,MESH-GRPC";
/// Features of routes that some of the suite's mesh tests need beside those of the mesh, which the control plane announces.
const ROUTE_FEATURES: [&str; 7] = [
    "HTTPRoute",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteParentRefPort",
    "HTTPRouteResponseHeaderModification",
    "GRPCRoute",
];
/// The name that the suite's manifests use.
const ECHO: &str = "registry.k8s.io/gateway-api/conformance/echo-advanced:v0.1.0";
const NAMESPACES: [&str; 2] = ["gateway-conformance-mesh", "gateway-conformance-mesh-consumer"];
/// Labels of the suite's namespaces: in the mesh, behind the waypoint.
const LABELS: &str = "istio.io/dataplane-mode=ambient,istio.io/use-waypoint=waypoint";

/// Makes the namespaces with their waypoints.
pub(super) async fn prepare(cluster: &Cluster) -> Result<Arguments> {
    let kubectl = cluster.kubectl();
    kubectl.apply(&NAMESPACES.map(manifests).join("---\n")).await?;
    for namespace in NAMESPACES {
        let gateway = ["gateway", "waypoint", "--namespace", namespace];
        kubectl.wait_for(ROLLOUT, &gateway, is_programmed).await?;
    }
    // The profile brings its core along.
    let mut features = announced(cluster, "ambit-waypoint").await?;
    features.retain(|feature| feature != "Mesh");
    features.extend(ROUTE_FEATURES.map(str::to_owned));
    Ok(Arguments { profiles: PROFILES, features, others: vec![format!("--namespace-labels={LABELS}")] })
}

fn is_programmed(gateway: &Value) -> bool {
    let conditions = gateway["status"]["conditions"].as_array().into_iter().flatten();
    conditions.into_iter().any(|condition| condition["type"] == "Programmed" && condition["status"] == "True")
}

/// A namespace of the suite with its waypoint, which routes of the other namespace may use too.
fn manifests(namespace: &str) -> String {
    format!(
        "apiVersion: v1
kind: Namespace
metadata: {{name: {namespace}, labels: {{istio.io/dataplane-mode: ambient, istio.io/use-waypoint: waypoint}}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {{name: waypoint, namespace: {namespace}}}
spec:
  gatewayClassName: ambit-waypoint
  listeners: [{{name: mesh, port: 15008, protocol: HBONE, allowedRoutes: {{namespaces: {{from: All}}}}}}]
"
    )
}

/// The image of the servers, with a certificate of their own.
pub(super) fn image(layout: &Layout) -> Result<Image> {
    let context = layout.images().join("echo-advanced");
    let attempt = format!("fill {}", context.display());
    fs::create_dir_all(&context).map_err(Error::system(attempt.clone()))?;
    for name in ["client", "server"] {
        fs::copy(layout.program(name), context.join(name)).map_err(Error::system(attempt.clone()))?;
    }
    let certificate = KeyPair::generate().and_then(|key| {
        let parameters = CertificateParams::new(vec!["echo".to_owned()])?;
        Ok((parameters.self_signed(&key)?.pem(), key.serialize_pem()))
    });
    let (certificate, key) = certificate.map_err(|error| Error::program("rcgen", error.to_string()))?;
    for (name, text) in [("cert.crt", certificate), ("cert.key", key)] {
        fs::write(context.join(name), text).map_err(Error::system(attempt.clone()))?;
    }
    let files = ["client", "server", "cert.crt", "cert.key"];
    Ok(echo(layout, ECHO, "echo-advanced", &context, &files))
}
