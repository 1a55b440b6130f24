//! Writes the annotation `ambient.istio.io/redirection` of this node's pods, when it differs from what it should be.

use std::collections::HashMap;
use std::time::Duration;

use ambit_telemetry::{Counter, Registry};
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until, timeout};

use super::index::{Annotation, Source};
use crate::Agent;
use crate::enrol::REDIRECTION;

/// Patches at a time.
const CONCURRENCY: usize = 8;
/// How long one may take.
const LIMIT: Duration = Duration::from_secs(10);
/// First pause before a pod's annotation that failed, or was written and is not shown by the watch yet, is written again.
const AGAIN: Duration = Duration::from_secs(1);
/// Longest pause.
const AGAIN_LAST: Duration = Duration::from_secs(60);
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

/// What was attempted for pods whose annotation still differs, by uid.
#[derive(Debug, Default)]
struct Attempts(HashMap<String, Attempt>);

#[derive(Debug)]
struct Attempt {
    value: Option<&'static str>,
    pause: Duration,
    not_before: Instant,
}

impl Attempts {
    /// Those of `differing` that are to be written now, and when the next one is. Forgets all other pods.
    fn due(&mut self, differing: Vec<Annotation>, now: Instant) -> (Vec<Annotation>, Option<Instant>) {
        let mut known = std::mem::take(&mut self.0);
        let mut due = Vec::new();
        for annotation in differing {
            let attempt = known.remove(&annotation.uid);
            match attempt.filter(|attempt| attempt.value == annotation.value) {
                Some(attempt) => {
                    if attempt.not_before <= now {
                        due.push(annotation.clone());
                    }
                    self.0.insert(annotation.uid, attempt);
                }
                None => due.push(annotation),
            }
        }
        (due, self.0.values().map(|attempt| attempt.not_before).min())
    }

    fn note(&mut self, annotation: &Annotation, now: Instant) {
        let pause = self.0.get(&annotation.uid).map_or(AGAIN, |last| (last.pause * 2).min(AGAIN_LAST));
        let attempt = Attempt { value: annotation.value, pause, not_before: now + pause };
        self.0.insert(annotation.uid.clone(), attempt);
    }
}

/// Runs for ever, from the agent's first reconciliation on: until then it does not know which pods are enrolled.
pub async fn run(client: Client, agent: Agent, source: Source, metrics: Metrics) {
    agent.wait_reconciled().await;
    let mut events = agent.events();
    let mut changes = source.changes();
    let mut attempts = Attempts::default();
    loop {
        let statuses = agent.statuses();
        let differing = source.with(|index| index.annotations(&statuses));
        let (due, next) = attempts.due(differing, Instant::now());
        if !due.is_empty() {
            futures_util::stream::iter(&due)
                .for_each_concurrent(CONCURRENCY, |annotation| write(&client, annotation, &metrics))
                .await;
            // What was written comes back by the watch.
            due.iter().for_each(|annotation| attempts.note(annotation, Instant::now()));
            continue;
        }
        tokio::select! {
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
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

async fn write(client: &Client, annotation: &Annotation, metrics: &Metrics) {
    let failure = match timeout(LIMIT, patch(client, annotation)).await {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn annotation(uid: &str, value: &'static str) -> Annotation {
        Annotation { uid: uid.into(), namespace: "shop".into(), name: uid.into(), value: Some(value) }
    }

    #[test]
    fn each_pod_is_written_again_after_growing_pauses() {
        let (a, b) = (annotation("a", "pending"), annotation("b", "enabled"));
        let mut attempts = Attempts::default();
        let mut now = Instant::now();
        assert_eq!(attempts.due(vec![a.clone()], now), (vec![a.clone()], None));
        attempts.note(&a, now);
        for pause in [1, 2, 4, 8, 16, 32, 60, 60].map(Duration::from_secs) {
            let next = now + pause;
            let early = next - Duration::from_millis(1);
            assert_eq!(attempts.due(vec![a.clone()], early), (vec![], Some(next)));
            assert_eq!(attempts.due(vec![a.clone()], next).0, std::slice::from_ref(&a));
            attempts.note(&a, next);
            now = next;
        }
        assert_eq!(attempts.due(vec![a.clone(), b.clone()], now).0, [b], "the others do not wait");
        let newer = annotation("a", "enabled");
        assert_eq!(attempts.due(vec![newer.clone()], now).0, [newer], "another value does not wait");
        attempts.note(&a, now);
        attempts.due(vec![], now);
        assert_eq!(attempts.due(vec![a.clone()], now).0, [a], "it was as it should be meanwhile");
    }
}
