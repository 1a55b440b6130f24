//! The mesh profiles of Gateway API's conformance suite, run on a cluster of their own with Ambit.
//!
//! The suite's namespaces are in the mesh by label, and each has a waypoint: that is where routes of a service take effect.
//! Everything else is as the suite has it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use serde_json::Value;
use tokio::process::Command;

use crate::cluster::{Cluster, Options};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::Layout;
use crate::{mesh, programs};

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
/// How long a waypoint may take to come up on a busy machine.
const ROLLOUT: Duration = Duration::from_secs(120);
/// How long the suite may take.
const SUITE: Duration = Duration::from_secs(1800);

/// Starts a cluster with the mesh, runs the suite and writes its report to `report`, the tests' log beside it.
///
/// # Errors
/// When something does not come up, or a test of the suite fails.
pub async fn run(program: PathBuf, number: u8, report: &Path) -> Result<()> {
    let layout = Layout::find();
    programs::build_conformance(&layout)?;
    let mut images = mesh::images(&layout)?;
    images.push(echo_image(&layout)?);
    let cluster = Cluster::start(Options { number, images, ..Options::new("conformance", program) }).await?;
    let outcome = run_on(&cluster, report).await;
    cluster.down().await?;
    outcome
}

async fn run_on(cluster: &Cluster, report: &Path) -> Result<()> {
    mesh::install(cluster, &mesh::SETTINGS).await?;
    let kubectl = cluster.kubectl();
    kubectl.apply(&NAMESPACES.map(manifests).join("---\n")).await?;
    for namespace in NAMESPACES {
        let gateway = ["gateway", "waypoint", "--namespace", namespace];
        kubectl.wait_for(ROLLOUT, &gateway, is_programmed).await?;
    }
    let features = features(cluster).await?;
    let report = std::path::absolute(report).map_err(Error::system("find the report"))?;
    if let Some(directory) = report.parent() {
        fs::create_dir_all(directory).map_err(Error::system(format!("make {}", directory.display())))?;
    }
    let log = cluster.layout().target().join("conformance.log");
    let file = File::create(&log).map_err(Error::system(format!("write {}", log.display())))?;
    let errors = file.try_clone().map_err(Error::system(format!("write {}", log.display())))?;
    let mut suite = Command::new(cluster.layout().program("conformance.test"));
    suite.args(["-test.run", "^TestConformance$", "-test.v"]);
    suite.arg(format!("--conformance-profiles={PROFILES}"));
    suite.arg(format!("--supported-features={}", features.join(",")));
    suite.arg(format!("--namespace-labels={LABELS}"));
    // The cluster ends anyway, and a namespace lasts as long as its waypoint's connections drain.
    suite.arg("--cleanup-base-resources=false");
    suite.arg(format!("--report-output={}", report.display()));
    suite.args(["--organization=ambit", "--project=ambit", "--url=https://ambit.dev"]);
    suite.args(["--contact=https://ambit.dev", &format!("--version=v{}", env!("CARGO_PKG_VERSION"))]);
    suite.env("KUBECONFIG", kubectl.kubeconfig()).stdout(file).stderr(errors).kill_on_drop(true);
    let fault = |message: String| Error::program("conformance.test", message);
    let ended = tokio::time::timeout(SUITE, suite.status()).await;
    let status = ended.map_err(|_| fault(format!("still runs after {SUITE:?}")))?;
    let status = status.map_err(|error| fault(error.to_string()))?;
    if status.success() {
        eprintln!("passed; report: {}, log: {}", report.display(), log.display());
        return Ok(());
    }
    let text = fs::read_to_string(&log).unwrap_or_default();
    let failed: Vec<&str> = text.lines().filter(|line| line.trim_start().starts_with("--- FAIL")).collect();
    Err(fault(format!("{status}, log: {}\n{}", log.display(), failed.join("\n"))))
}

/// What is tested: the features of the mesh that the class of waypoints names, and [`ROUTE_FEATURES`].
async fn features(cluster: &Cluster) -> Result<Vec<String>> {
    let class = ["gatewayclass", "ambit-waypoint"];
    let named = |class: &Value| -> Vec<String> {
        let features = class["status"]["supportedFeatures"].as_array().into_iter().flatten();
        let names = features.filter_map(|feature| feature["name"].as_str());
        // The profile brings its core along.
        names.filter(|name| *name != "Mesh").map(str::to_owned).collect()
    };
    let class = cluster.kubectl().wait_for(ROLLOUT, &class, |class| !named(class).is_empty()).await?;
    Ok(named(&class).into_iter().chain(ROUTE_FEATURES.map(str::to_owned)).collect())
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
fn echo_image(layout: &Layout) -> Result<Image> {
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
    let files = ["client", "server", "cert.crt", "cert.key"].map(|file| context.join(file)).to_vec();
    let dockerfile = layout.source("images/echo-advanced/Dockerfile");
    Ok(Image { name: ECHO.to_owned(), dockerfile, context, files })
}
