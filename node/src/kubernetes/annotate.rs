//! Writes the annotation `ambient.istio.io/redirection` of this node's pods, when it differs from what it should be.

use std::time::Duration;

use ambit_telemetry::{Counter, Registry};
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{sleep, timeout};

use super::index::{Annotation, Source};
use crate::Agent;
use crate::enrol::REDIRECTION;

/// Patches at a time.
const CONCURRENCY: usize = 8;
/// How long one may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Pause after a round in which one failed, and the time after which a written annotation that the watch has not shown
/// yet is looked at again.
const AGAIN: Duration = Duration::from_secs(1);
/// HTTP status of a patch of a pod that is another one by now, or is gone.
const OTHER_POD: [u16; 2] = [404, 409];

/// Counters of written annotations.
#[derive(Debug, Clone)]
pub struct Metrics {
    written: Counter,
    failed: Counter,
}

impl Metrics {
    /// Registers them.
    pub fn new(registry: &Registry) -> Self {
        let counter = |name, help| registry.counter(name, help);
        Self {
            written: counter("ambit_node_annotations", "Redirection annotations written"),
            failed: counter(
                "ambit_node_annotation_failures",
                "Redirection annotations that could not be written",
            ),
        }
    }
}

/// Runs for ever, from the agent's first reconciliation on: until then it does not know which pods are enrolled.
pub async fn run(client: Client, agent: Agent, source: Source, metrics: Metrics) {
    agent.wait_reconciled().await;
    let mut events = agent.events();
    let mut changes = source.changes();
    loop {
        let statuses = agent.statuses();
        let differing = source.with(|index| index.annotations(&statuses));
        let waits_for_more = differing.is_empty();
        futures_util::stream::iter(differing)
            .for_each_concurrent(CONCURRENCY, |annotation| write(&client, annotation, &metrics))
            .await;
        if !waits_for_more {
            // What was written comes back by the watch.
            timeout(AGAIN, changes.changed()).await.ok();
            continue;
        }
        tokio::select! {
            event = events.recv() => match event {
                // All statuses are read again anyway.
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            changed = changes.changed() => if changed.is_err() {
                return;
            },
        }
    }
}

async fn write(client: &Client, annotation: Annotation, metrics: &Metrics) {
    let failure = match timeout(LIMIT, patch(client, &annotation)).await {
        Ok(Ok(written)) => {
            if written {
                metrics.written.inc();
                let Annotation { namespace, name, value, .. } = annotation;
                tracing::info!(namespace, name, value, "redirection annotation written");
            }
            return;
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "the API server did not answer".into(),
    };
    metrics.failed.inc();
    let Annotation { namespace, name, .. } = annotation;
    tracing::warn!(namespace, name, failure, "redirection annotation not written; it is tried again");
    sleep(AGAIN).await;
}

/// Writes an annotation. Returns whether the pod is still there.
pub(crate) async fn patch(client: &Client, annotation: &Annotation) -> kube::Result<bool> {
    let Annotation { uid, namespace, name, value } = annotation;
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    // The uid is a condition: a pod of the same name that is another one is left alone.
    let patch = Patch::Merge(json!({ "metadata": { "uid": uid, "annotations": { REDIRECTION: value } } }));
    match pods.patch_status(name, &PatchParams::default(), &patch).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if OTHER_POD.contains(&status.code) => Ok(false),
        Err(error) => Err(error),
    }
}
