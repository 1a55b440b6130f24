//! Brings the agent in line with the index: wholly at start and each minute, pod by pod on every change.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::index::{Source, WantedPod};
use crate::Agent;

/// Time between two whole reconciliations.
const WHOLE: Duration = Duration::from_secs(60);
/// How long the API server may take for the first lists. Then the pods of the registry are served without it, so that a
/// node proxy that starts meanwhile serves them.
const API_AWAY: Duration = Duration::from_secs(15);
/// Changes within this time are taken together.
const TOGETHER: Duration = Duration::from_millis(50);
/// Pods that are changed at a time.
const CONCURRENCY: usize = 32;

/// What changed between two looks at the index.
#[derive(Debug, Default, PartialEq, Eq)]
struct Difference {
    /// Pods that are new or differ.
    ensured: Vec<WantedPod>,
    /// Pods that run on and leave the mesh.
    left: Vec<String>,
    /// Pods that have ended.
    ended: Vec<String>,
}

/// Runs for ever, once all `listed` are true.
pub async fn run(agent: Agent, source: Source, listed: Vec<watch::Receiver<bool>>) {
    let all_listed = async {
        for mut list in listed {
            list.wait_for(|listed| *listed).await?;
        }
        Ok::<_, watch::error::RecvError>(())
    };
    let mut all_listed = std::pin::pin!(all_listed);
    let outcome = match timeout(API_AWAY, &mut all_listed).await {
        Ok(outcome) => outcome,
        Err(_) => {
            tracing::warn!("the API server does not answer; the pods of the registry are served");
            agent.serve_registry();
            all_listed.await
        }
    };
    if outcome.is_err() {
        return;
    }
    let mut changes = source.changes();
    let mut ticks = interval(WHOLE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut known = BTreeMap::new();
    loop {
        let whole = tokio::select! {
            _ = ticks.tick() => true,
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                sleep(TOGETHER).await;
                false
            }
        };
        changes.mark_unchanged();
        let as_of = Instant::now();
        let (wanted, outside) = source.with(|index| (index.wanted(as_of), index.outside()));
        let difference = difference(&source, &known, &wanted);
        if whole {
            remove_ended(&agent, &source, difference.ended).await;
            reconcile(&agent, &wanted, &outside, as_of).await;
        } else {
            carry_out(&agent, difference).await;
        }
        known = wanted;
    }
}

fn difference(
    source: &Source,
    known: &BTreeMap<String, WantedPod>,
    wanted: &BTreeMap<String, WantedPod>,
) -> Difference {
    let ensured = wanted.values().filter(|pod| known.get(&pod.uid) != Some(pod)).cloned().collect();
    let gone = known.keys().filter(|uid| !wanted.contains_key(*uid)).cloned();
    let (left, ended) = source.with(|index| gone.partition(|uid| index.is_alive(uid)));
    Difference { ensured, left, ended }
}

async fn reconcile(
    agent: &Agent,
    wanted: &BTreeMap<String, WantedPod>,
    outside: &HashSet<String>,
    as_of: Instant,
) {
    let done = agent.reconcile(wanted.values().map(WantedPod::spec).collect(), outside, as_of).await;
    tracing::debug!(
        enrolled = done.enrolled,
        unenrolled = done.unenrolled.len(),
        failed = done.failed.len(),
        cleaned = done.cleaned.len(),
        "reconciled"
    );
}

/// Pods that ended while nobody watched are removed, not unenrolled: whatever is left of them stays captured.
async fn remove_ended(agent: &Agent, source: &Source, mut ended: Vec<String>) {
    let known = agent.statuses();
    ended.extend(
        source.with(|index| known.into_keys().filter(|uid| !index.is_alive(uid)).collect::<Vec<_>>()),
    );
    carry_out(agent, Difference { ended, ..Difference::default() }).await;
}

async fn carry_out(agent: &Agent, Difference { ensured, left, ended }: Difference) {
    let ensured = ensured.into_iter().map(|pod| Change::Ensure(Box::new(pod)));
    let changes =
        ensured.chain(left.into_iter().map(Change::Leave)).chain(ended.into_iter().map(Change::End));
    futures_util::stream::iter(changes)
        .for_each_concurrent(CONCURRENCY, |change| async move {
            let uid = change.uid().to_owned();
            let (attempt, outcome) = match change {
                Change::Ensure(pod) => ("enrol", agent.ensure(pod.spec()).await),
                Change::Leave(uid) => ("unenrol", agent.unenrol(&uid).await),
                Change::End(uid) => ("remove", agent.remove_pod(&uid, None).await),
            };
            if let Err(error) = outcome {
                let kind = error.kind().as_str();
                tracing::warn!(uid, attempt, %error, kind, "pod not changed yet; it is tried again");
            }
        })
        .await;
}

/// A change of one pod.
enum Change {
    Ensure(Box<WantedPod>),
    Leave(String),
    End(String),
}

impl Change {
    fn uid(&self) -> &str {
        match self {
            Self::Ensure(pod) => &pod.uid,
            Self::Leave(uid) | Self::End(uid) => uid,
        }
    }
}
