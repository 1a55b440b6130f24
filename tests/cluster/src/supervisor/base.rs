//! What every cluster has beside its programs: CoreDNS.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use ambit_local::isolate;

use super::RunningCluster;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::wait;

const COREDNS: &str = include_str!("../../manifests/coredns.yaml");
/// How long nodes and CoreDNS may take on a busy machine.
const START: Duration = Duration::from_secs(240);

/// Applies the manifest.
pub(crate) async fn apply(supervisor: &RunningCluster, plan: Plan) -> Result<()> {
    let file = PathBuf::from(isolate::DIRECTORY).join("coredns.yaml");
    let manifest = COREDNS.replace("CLUSTER_DNS", &plan.dns().to_string());
    fs::write(&file, manifest).map_err(Error::system(format!("write {}", file.display())))?;
    let path = file.display().to_string();
    kubectl(supervisor, &["apply", "--server-side", "--filename", &path]).await.map(drop)
}

/// Waits until every node is ready and names are resolved.
pub(crate) async fn wait_until_ready(supervisor: &RunningCluster, plan: Plan) -> Result<()> {
    let wanted = usize::from(plan.nodes);
    wait::until("all nodes are ready", START, async || {
        let args = ["get", "nodes", "--no-headers"];
        let nodes = kubectl(supervisor, &args).await.map_err(|error| error.to_string())?;
        let ready = nodes.lines().filter(|line| line.split_whitespace().nth(1) == Some("Ready")).count();
        if ready == wanted { Ok(()) } else { Err(nodes) }
    })
    .await?;
    let patience = format!("--timeout={}s", START.as_secs());
    let args = ["rollout", "status", "--namespace", "kube-system", "deployment/coredns", &patience];
    // Only the call ends after a shorter time, so that it can be tried again.
    wait::until("CoreDNS is ready", START, async || {
        kubectl(supervisor, &args).await.map(drop).map_err(|error| error.to_string())
    })
    .await
}

async fn kubectl(supervisor: &RunningCluster, args: &[&str]) -> Result<String> {
    supervisor.control_plane.kubectl(supervisor.network.control(), args).await
}
