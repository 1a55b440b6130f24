//! Takes the taint `ambit.dev/not-ready` off this node once pods of the mesh can start on it: the agent has reconciled, a
//! node proxy is connected, and the CNI plugin is installed.
//!
//! Whoever makes nodes puts the taint on, so that no pod starts on a node before the mesh is there. The agent never puts
//! it on.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use crate::Agent;

/// The taint's key.
pub const NOT_READY: &str = "ambit.dev/not-ready";
/// Time between two looks whether the node is ready.
const LOOK: Duration = Duration::from_secs(1);
/// Time between two looks at the taints of a node that is ready: it may be registered again.
const RECHECK: Duration = Duration::from_secs(60);
/// Pause after a failure.
const AGAIN: Duration = Duration::from_secs(5);
/// How long the API server may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Runs for ever.
pub async fn run(client: Client, node: String, agent: Agent, installed: watch::Receiver<bool>) {
    let nodes: Api<Node> = Api::all(client);
    let mut check_at = Instant::now();
    loop {
        sleep(LOOK).await;
        let is_ready = agent.health().is_ready() && *installed.borrow();
        if !is_ready || Instant::now() < check_at {
            continue;
        }
        let outcome = timeout(LIMIT, remove_taint(&nodes, &node)).await;
        check_at = Instant::now() + if matches!(outcome, Ok(Ok(_))) { RECHECK } else { AGAIN };
        match outcome {
            Ok(Ok(true)) => tracing::info!(node, "taint {NOT_READY} taken off"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                tracing::warn!(node, %error, "taint {NOT_READY} not taken off; it is tried again");
            }
            Err(_) => {
                tracing::warn!(node, "taint {NOT_READY} not taken off: the API server does not answer");
            }
        }
    }
}

/// Returns whether the taint was on.
async fn remove_taint(nodes: &Api<Node>, name: &str) -> kube::Result<bool> {
    let node = nodes.get(name).await?;
    let Some(patch) = plan(&node) else { return Ok(false) };
    nodes.patch(name, &PatchParams::default(), &Patch::Merge(&patch)).await?;
    Ok(true)
}

/// The patch that takes the taint off; `None` if it is not on. A node that has changed meanwhile refuses it.
fn plan(node: &Node) -> Option<Value> {
    let taints = node.spec.as_ref()?.taints.as_ref()?;
    let others: Vec<&Taint> = taints.iter().filter(|taint| taint.key != NOT_READY).collect();
    let version = node.metadata.resource_version.as_ref();
    (others.len() != taints.len())
        .then(|| json!({ "metadata": { "resourceVersion": version }, "spec": { "taints": others } }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_taints_stay_and_a_changed_node_refuses_the_patch() {
        let node = |taints: Value| -> Node {
            serde_json::from_value(
                json!({ "metadata": { "resourceVersion": "7" }, "spec": { "taints": taints } }),
            )
            .unwrap()
        };
        let other = json!({ "key": "gpu", "effect": "NoSchedule" });
        let ours = json!({ "key": NOT_READY, "effect": "NoSchedule" });
        assert_eq!(plan(&node(json!([other]))), None);
        let patch = plan(&node(json!([ours, other]))).unwrap();
        assert_eq!(patch, json!({ "metadata": { "resourceVersion": "7" }, "spec": { "taints": [other] } }));
    }
}
