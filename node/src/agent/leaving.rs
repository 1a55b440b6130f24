//! How a pod leaves: unenrolled while it runs, or ended.

use std::collections::HashSet;
use std::time::Duration;

use ambit_net::Netns;
use tokio::time::Instant;

use super::pod::{Pod, PodTask, RETRY_FIRST, Retry};
use super::search::{Search, find_again};
use super::{AgentError, PodState, PodStatus, Shared};
use crate::redirect::{self, Stage, connections, is_mesh};

/// How long proxies may take to let a pod go.
const FORGET: Duration = Duration::from_secs(30);

/// When a leaving pod may be forgotten, and when it must be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Leaving {
    not_before: Instant,
    not_after: Instant,
}

impl Leaving {
    pub(super) fn from_now(shared: &Shared) -> Self {
        let now = Instant::now();
        Self { not_before: now + shared.config.leave_grace, not_after: now + shared.config.leave_timeout }
    }
}

impl PodTask {
    pub(super) async fn leave_if_older(&mut self, time: Instant) -> Result<bool, AgentError> {
        match &self.pod {
            Some(pod) if pod.leaving.is_some() || pod.since.is_some_and(|since| since > time) => Ok(false),
            Some(_) => self.leave().await.map(|()| true),
            None => {
                self.give_up();
                Ok(false)
            }
        }
    }

    pub(super) async fn leave(&mut self) -> Result<(), AgentError> {
        let Some(pod) = &self.pod else {
            let error = AgentError::NotEnrolled { uid: self.uid.clone() };
            return if self.give_up() { Ok(()) } else { Err(error) };
        };
        self.retry = None;
        if pod.leaving.is_some() {
            return Ok(());
        }
        let (record, options) = (pod.record.clone(), pod.record.options.clone());
        let netns = match pod.netns.clone() {
            Some(netns) => netns,
            None => match find_again(&self.shared, &record).await {
                Search::Found(netns) => netns,
                Search::Gone => return self.forget().await,
                Search::Unknown => return Err(AgentError::NamespaceNotFound { uid: self.uid.clone() }),
            },
        };
        self.program(&netns, &options, Stage::Leaving).await?;
        let leaving = Leaving::from_now(&self.shared);
        let Some(pod) = &mut self.pod else { return Ok(()) };
        pod.record.stage = Stage::Leaving;
        pod.leaving = Some(leaving);
        pod.netns = Some(netns);
        let (record, status) = (pod.record.clone(), pod.status());
        self.shared.set_status(&self.uid, status);
        self.save(&record).await
    }

    /// Ends the attempts to enrol a pod of which nothing is in. Returns whether there were any.
    fn give_up(&mut self) -> bool {
        let Some(Retry { spec, .. }) = self.retry.take() else { return false };
        self.shared.served.delete(&self.uid);
        let status = PodStatus {
            name: spec.name,
            namespace: spec.namespace,
            state: PodState::Out,
            reason: None,
            sandbox: None,
            older_connections: 0,
        };
        self.shared.set_status(&self.uid, status);
        true
    }

    /// Removes what is left of a leaving pod once nothing is tunnelled any more, or its time is up.
    pub(super) async fn finish_leaving(&mut self) {
        let Some(Pod { netns: Some(netns), leaving: Some(leaving), record, .. }) = &self.pod else { return };
        let now = Instant::now();
        if now < leaving.not_before || !self.may_be_cut(netns, now >= leaving.not_after).await {
            return;
        }
        let (netns, former) = (netns.clone(), record.former_settings.clone());
        self.shared.served.delete(&self.uid);
        if !self.shared.served.forgotten(&self.uid, FORGET).await {
            tracing::warn!(uid = self.uid, "a node proxy does not let the pod go");
        }
        self.shared.listeners.release(&self.uid).await;
        if let Err(error) = redirect::remove(&netns, &former).await {
            tracing::warn!(uid = self.uid, %error, "redirection of a pod that left is removed later");
            if let Some(Pod { leaving: Some(leaving), .. }) = &mut self.pod {
                leaving.not_before = Instant::now() + RETRY_FIRST;
            }
            return;
        }
        if let Err(error) = self.forget().await {
            tracing::warn!(uid = self.uid, %error, "pod that left is still in the registry");
        }
    }

    /// Whether nothing is tunnelled any more. When it is late, that is reported and does not matter.
    async fn may_be_cut(&self, netns: &Netns, late: bool) -> bool {
        let uid = &self.uid;
        match connections(netns, is_mesh).await {
            Ok(open) if open.is_empty() => true,
            Ok(open) => {
                if late {
                    tracing::warn!(uid, connections = open.len(), "closing connections of a pod that left");
                }
                late
            }
            Err(error) => {
                if late {
                    tracing::warn!(uid, %error, "connections of a pod that left are not known");
                }
                late
            }
        }
    }

    pub(super) async fn remove(&mut self, sandbox: Option<&str>) -> Result<(), AgentError> {
        let own = match (&self.pod, &self.retry) {
            (Some(pod), _) => Some(pod.record.sandbox.as_deref()),
            (None, Some(retry)) => Some(retry.spec.sandbox.as_deref()),
            (None, None) => None,
        };
        if sandbox.is_some() && self.shared.unreadable.lock().contains(&self.uid) {
            return Ok(());
        }
        // A sandbox that is not known to be the pod's own may be its predecessor.
        if let (Some(ended), Some(own)) = (sandbox, own)
            && own != Some(ended)
        {
            tracing::debug!(uid = self.uid, ended, own, "another sandbox of the pod has ended");
            return Ok(());
        }
        self.give_up();
        self.shared.unreadable.lock().remove(&self.uid);
        self.shared.served.delete(&self.uid);
        self.shared.listeners.release(&self.uid).await;
        self.forget().await
    }

    /// Removes the pod if its sandbox is known, not among `valid`, and its namespace is gone.
    pub(super) async fn collect(&mut self, valid: &HashSet<String>) -> Result<(), AgentError> {
        let Some(Pod { record, .. }) = &self.pod else { return Ok(()) };
        let Some(sandbox) = record.sandbox.clone().filter(|sandbox| !valid.contains(sandbox)) else {
            return Ok(());
        };
        match find_again(&self.shared, &record.clone()).await {
            Search::Gone => self.remove(Some(&sandbox)).await,
            Search::Found(_) | Search::Unknown => Ok(()),
        }
    }

    async fn forget(&mut self) -> Result<(), AgentError> {
        self.retry = None;
        self.shared.probes.set(&self.uid, Vec::new()).await;
        self.shared.served.delete(&self.uid);
        self.shared.release_claims(&self.uid, None);
        if let Some(pod) = self.pod.take() {
            let status = PodStatus { state: PodState::Out, reason: None, ..pod.status() };
            self.shared.set_status(&self.uid, status);
        }
        Ok(self.shared.registry.remove(&self.uid)?)
    }
}
