//! Bringing the node in line with the pods that are to be enrolled.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use ambit_net::{Netns, NetnsId};
use futures_util::StreamExt;
use tokio::time::Instant;

use super::pod::Command;
use super::{Agent, AgentError, CONCURRENCY, PodSpec};
use crate::discovery::{self, Found, Owners, Walk};
use crate::redirect::{self, FormerSettings, RedirectError};

/// The user of a namespace that is being cleaned.
pub(super) const CLEANUP: &str = "the cleaning of namespaces";

/// What [`Agent::reconcile`] did.
#[derive(Debug, Default)]
pub struct Reconciled {
    /// Number of pods that are enrolled as desired.
    pub enrolled: usize,
    /// Pods that are unenrolled since they were not desired.
    pub unenrolled: Vec<String>,
    /// Pods for which that failed. Those that are desired are tried again by the agent itself.
    pub failed: Vec<(String, AgentError)>,
    /// Namespaces of no pod whose rules were removed.
    pub cleaned: Vec<NetnsId>,
}

impl Agent {
    /// Brings the node in line with `desired`, all pods of this node that are to be enrolled, as they were known at
    /// `as_of`: enrols what is missing, unenrols what is not desired and was enrolled before `as_of`, and removes our
    /// rules from namespaces that belong to no pod. A namespace in which processes of pods run belongs to these, also when
    /// they are not desired; our rules are removed from it only if all of them are in `outside`, the pods that run outside
    /// the mesh, by the uid that the container runtime knows. A pod that was deleted while its processes still run is in
    /// neither and stays captured. A pod that cannot be enrolled is tried again by the agent until it
    /// can, or is no longer desired; a proxy that serves it keeps it. A pod without addresses has not started: it stays
    /// as it is. Node proxies are served once the first call has ended. A call waits for the one before it.
    pub async fn reconcile(
        &self,
        mut desired: Vec<PodSpec>,
        outside: &HashSet<String>,
        as_of: Instant,
    ) -> Reconciled {
        // The semaphore is never closed.
        let _one_at_a_time = self.0.reconciling.acquire().await;
        let ips: HashMap<String, Vec<IpAddr>> =
            desired.iter().map(|pod| (pod.uid.clone(), pod.ips.clone())).collect();
        let uids: HashSet<String> = ips.keys().cloned().collect();
        desired.retain(|pod| !pod.ips.is_empty());
        let mut done = Reconciled::default();
        let namespaces = self.namespaces_if_needed(&desired).await;
        self.release_namespaces(&desired, &uids).await;
        let enrolments = futures_util::stream::iter(desired)
            .map(|pod| self.want(pod, &namespaces))
            .buffer_unordered(CONCURRENCY)
            .collect::<Vec<_>>();
        for (uid, outcome) in enrolments.await {
            match outcome {
                Ok(()) => done.enrolled += 1,
                Err(error) => {
                    let kind = error.kind().as_str();
                    tracing::warn!(uid, %error, kind, "pod not enrolled; it is tried again");
                    done.failed.push((uid, error));
                }
            }
        }
        self.unenrol_others(&uids, as_of, &mut done).await;
        // A pod that could not be enrolled this time may have been enrolled before.
        let waiting = done.failed.iter().filter_map(|(uid, _)| ips.get(uid)).flatten().copied().collect();
        let walk = self.0.config.discovery.walk().await;
        let complete = walk.complete;
        done.cleaned = self.clean_namespaces_of_no_pod(walk, outside, &waiting).await;
        self.forget_unreadable(&uids, complete, &mut done);
        self.0.reconciled.send_replace(true);
        self.0.serving.send_replace(true);
        done
    }

    /// Serves node proxies before the first reconciliation, with the pods of the registry: the caller cannot learn which
    /// pods are desired. Nothing is unenrolled or cleaned.
    pub fn serve_registry(&self) {
        self.0.serving.send_replace(true);
    }

    /// Removes our rules from a namespace that is no pod's. Returns whether there were any.
    ///
    /// # Errors
    /// [`AgentError::NamespaceTaken`] when the namespace belongs to an enrolled pod.
    pub async fn cleanup(&self, netns: &Netns) -> Result<bool, AgentError> {
        let failed = |source: RedirectError| AgentError::Redirect { uid: CLEANUP.into(), source };
        self.0.claim(netns.id(), CLEANUP, CLEANUP)?;
        let cleaned = async {
            if !redirect::is_present(netns).await.map_err(|e| failed(e.into()))? {
                return Ok(false);
            }
            redirect::remove(netns, &FormerSettings::default()).await.map_err(failed)?;
            Ok(true)
        };
        let cleaned = cleaned.await;
        self.0.claims.lock().remove(&netns.id());
        if let Ok(true) = cleaned {
            self.0.metrics.cleaned.inc();
            tracing::warn!(netns = %netns.id(), "rules removed from a network namespace of no pod");
        }
        cleaned
    }

    /// The node's namespaces, if one of `desired` comes without.
    async fn namespaces_if_needed(&self, desired: &[PodSpec]) -> Vec<(Found, Vec<IpAddr>)> {
        if desired.iter().all(|pod| pod.netns.is_some()) {
            return Vec::new();
        }
        self.0.config.discovery.addresses(&self.0.host_netns).await
    }

    /// Has pods that are not desired give up the namespaces of those that are: they are predecessors under another uid.
    async fn release_namespaces(&self, desired: &[PodSpec], uids: &HashSet<String>) {
        let holders: HashMap<NetnsId, String> = self.0.claims.lock().clone();
        let wanted = desired.iter().filter_map(|pod| pod.netns.as_ref());
        for holder in wanted.filter_map(|netns| holders.get(&netns.id())) {
            if !uids.contains(holder)
                && holder != CLEANUP
                && let Err(error) = self.remove_pod(holder, None).await
            {
                tracing::warn!(uid = holder, %error, "predecessor of a pod not removed");
            }
        }
    }

    /// Enrols one pod as [`reconcile`](Self::reconcile) does: its namespace is looked for if it is not known, and a
    /// failure is tried again by the agent. A pod without addresses stays as it is.
    pub async fn ensure(&self, pod: PodSpec) -> Result<(), AgentError> {
        if pod.ips.is_empty() {
            return Ok(());
        }
        self.want(pod, &[]).await.1
    }

    async fn want(
        &self,
        pod: PodSpec,
        namespaces: &[(Found, Vec<IpAddr>)],
    ) -> (String, Result<(), AgentError>) {
        let uid = pod.uid.clone();
        // Ambiguity is reported by the pod's task, which looks again.
        let found = discovery::of_pod(namespaces, &pod.uid, &pod.ips).ok().flatten();
        let command = |answer| Command::Want(Box::new(pod.clone()), found.cloned(), answer);
        let outcome = self.command(&uid, command).await;
        (uid, outcome.flatten())
    }

    async fn unenrol_others(&self, desired: &HashSet<String>, as_of: Instant, done: &mut Reconciled) {
        let others: Vec<String> = self.known().into_iter().filter(|uid| !desired.contains(uid)).collect();
        let outcomes: Vec<_> = futures_util::stream::iter(others)
            .map(|uid| async move {
                let outcome = self.command(&uid, |answer| Command::LeaveIfOlder(as_of, answer)).await;
                (uid, outcome.flatten())
            })
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        for (uid, outcome) in outcomes {
            match outcome {
                Ok(true) => done.unenrolled.push(uid),
                Ok(false) => {}
                Err(error) => done.failed.push((uid, error)),
            }
        }
    }

    /// Forgets pods that are not desired and of which only an unreadable record is known: their rules were removed with
    /// those of all namespaces of no pod, if these were all found.
    fn forget_unreadable(&self, desired: &HashSet<String>, complete: bool, done: &mut Reconciled) {
        let unreadable: Vec<String> = self.0.unreadable.lock().iter().cloned().collect();
        for uid in unreadable.into_iter().filter(|uid| !desired.contains(uid)) {
            if complete {
                self.0.served.delete(&uid);
                self.0.unreadable.lock().remove(&uid);
            } else {
                done.failed.push((uid.clone(), AgentError::NamespaceNotFound { uid }));
            }
        }
    }

    async fn clean_namespaces_of_no_pod(
        &self,
        walk: Walk,
        outside: &HashSet<String>,
        waiting: &HashSet<IpAddr>,
    ) -> Vec<NetnsId> {
        let claimed: HashSet<NetnsId> = self.0.claims.lock().keys().copied().collect();
        let mut cleaned = Vec::new();
        for found in walk.namespaces {
            let id = found.netns.id();
            if self.0.host_netns.contains(&id)
                || claimed.contains(&id)
                || !may_be_cleaned(&found.owners, walk.complete, outside)
                || holds_one_of(&found.netns, waiting).await
            {
                continue;
            }
            match self.cleanup(&found.netns).await {
                Ok(true) => cleaned.push(id),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(path = %found.path.display(), %error, "network namespace not cleaned");
                }
            }
        }
        cleaned
    }
}

/// Whether no process of a pod needs the rules in a namespace. A walk that is not `complete` may have missed one.
fn may_be_cleaned(owners: &Owners, complete: bool, outside: &HashSet<String>) -> bool {
    match owners {
        Owners::Unknown => true,
        Owners::Pods(pods) if pods.is_empty() => complete,
        Owners::Pods(pods) => pods.iter().all(|uid| outside.contains(uid)),
    }
}

/// Whether the namespace holds one of the addresses, or cannot be read.
async fn holds_one_of(netns: &Netns, ips: &HashSet<IpAddr>) -> bool {
    if ips.is_empty() {
        return false;
    }
    discovery::addresses(netns).await.map_or(true, |held| held.iter().any(|ip| ips.contains(ip)))
}
