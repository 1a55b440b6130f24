//! Brings the agent in line with the index: wholly at start and each minute, pod by pod on every change.

use std::collections::{BTreeMap, HashSet};
use std::pin::Pin;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use super::index::{Source, WantedPod};
use super::progress::Progress;
use crate::{Agent, AgentError};

/// Time between two whole reconciliations.
const WHOLE: Duration = Duration::from_secs(60);
/// How long the API server may take for the first lists. Then the pods of the registry are served without it, so that a
/// node proxy that starts meanwhile serves them.
const API_AWAY: Duration = Duration::from_secs(15);
/// Changes within this time are taken together.
const TOGETHER: Duration = Duration::from_millis(50);

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
    Sync::new(agent, source).run().await;
}

/// A whole reconciliation, which ends with the pods that it was for.
type FullReconciliation = Pin<Box<dyn Future<Output = Wanted> + Send>>;

/// The pods that are to be enrolled, by uid.
type Wanted = BTreeMap<String, WantedPod>;

/// The loop's state. A pod that takes its time holds up no other: neither changes nor a whole reconciliation are waited
/// for.
struct Sync {
    agent: Agent,
    source: Source,
    /// What was wanted at the last look.
    known: Wanted,
    progress: Progress<Change>,
    running: FuturesUnordered<BoxFuture<'static, String>>,
}

impl Sync {
    fn new(agent: Agent, source: Source) -> Self {
        let (known, progress, running) = (Wanted::new(), Progress::default(), FuturesUnordered::new());
        Self { agent, source, known, progress, running }
    }

    async fn run(mut self) {
        let mut changes = self.source.changes();
        let mut ticks = interval(WHOLE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut whole: Option<FullReconciliation> = None;
        loop {
            tokio::select! {
                _ = ticks.tick(), if whole.is_none() => {
                    changes.mark_unchanged();
                    whole = Some(self.start_whole());
                }
                reconciled = wait_for(&mut whole) => {
                    whole = None;
                    // What changed since it began may have been undone by it.
                    let since = difference(&self.source, &reconciled, &self.known);
                    self.begin(since);
                }
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    sleep(TOGETHER).await;
                    changes.mark_unchanged();
                    let wanted = self.source.with(|index| index.wanted(Instant::now()));
                    let since = difference(&self.source, &self.known, &wanted);
                    self.known = wanted;
                    self.begin(since);
                }
                Some(uid) = self.running.next() => {
                    if let Some(next) = self.progress.end(&uid) {
                        self.running.push(Box::pin(carry_out(self.agent.clone(), next)));
                    }
                }
            }
        }
    }

    /// Begins to bring the whole node in line with the index.
    fn start_whole(&mut self) -> FullReconciliation {
        self.progress.forget_waiting();
        let as_of = Instant::now();
        let (wanted, outside) = self.source.with(|index| (index.wanted(as_of), index.outside()));
        let ended = self.ended(difference(&self.source, &self.known, &wanted).ended);
        self.known.clone_from(&wanted);
        let agent = self.agent.clone();
        Box::pin(async move {
            let removals = ended.into_iter().map(|uid| carry_out(agent.clone(), Change::End(uid)));
            futures_util::future::join_all(removals).await;
            reconcile(&agent, &wanted, &outside, as_of).await;
            wanted
        })
    }

    /// Pods that ended while nobody watched are removed, not unenrolled: whatever is left of them stays captured.
    fn ended(&self, mut ended: Vec<String>) -> Vec<String> {
        let known = self.agent.statuses().into_keys();
        ended.extend(self.source.with(|index| known.filter(|uid| !index.is_alive(uid)).collect::<Vec<_>>()));
        ended.sort();
        ended.dedup();
        ended
    }

    /// Begins changes; one of a pod whose last change is in progress waits for that.
    fn begin(&mut self, Difference { ensured, left, ended }: Difference) {
        let ensured = ensured.into_iter().map(|pod| Change::Ensure(Box::new(pod)));
        let changes =
            ensured.chain(left.into_iter().map(Change::Leave)).chain(ended.into_iter().map(Change::End));
        for change in changes {
            let uid = change.uid().to_owned();
            if let Some(change) = self.progress.begin(&uid, change) {
                self.running.push(Box::pin(carry_out(self.agent.clone(), change)));
            }
        }
    }
}

/// Waits for a reconciliation, for ever where there is none.
async fn wait_for(whole: &mut Option<FullReconciliation>) -> Wanted {
    match whole {
        Some(whole) => whole.await,
        None => std::future::pending().await,
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

/// Carries out a change. Returns the pod's uid.
async fn carry_out(agent: Agent, change: Change) -> String {
    let uid = change.uid().to_owned();
    let (attempt, outcome) = match change {
        Change::Ensure(pod) => ("enrol", agent.ensure(pod.spec()).await),
        Change::Leave(uid) => ("unenrol", agent.unenrol(&uid).await),
        Change::End(uid) => ("remove", agent.remove_pod(&uid, None).await),
    };
    // A pod that was not enrolled has left already.
    if let Err(error) = outcome
        && !(attempt == "unenrol" && matches!(error, AgentError::NotEnrolled { .. }))
    {
        let kind = error.kind().as_str();
        tracing::warn!(uid, attempt, %error, kind, "pod not changed yet; it is tried again");
    }
    uid
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
