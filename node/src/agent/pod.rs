//! One pod's task: its enrolment, step by step. How it leaves is in `leaving`.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_api::workload::zds::WorkloadInfo;
use ambit_net::{Netns, NetnsId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::leaving::Leaving;
use super::search::{Search, find_again, holds_all};
use super::{AgentError, PodSpec, PodState, PodStatus, Shared};
use crate::discovery::{self, Found};
use crate::redirect::{self, Fault, FormerSettings, Options, Stage, connections, is_mesh};
use crate::registry::Record;
use crate::zds::ServedPod;

/// Time between two checks whether a leaving pod's last tunnelled connection has ended.
const LEAVE_CHECK: Duration = Duration::from_millis(200);
/// First pause before a failed enrolment, or a failed removal of rules, is tried again.
pub(super) const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest pause.
const RETRY_LAST: Duration = Duration::from_secs(60);

/// Why a pod of the registry is only kept.
const NOT_FOUND: &str = "its network namespace was not found again";

type Answer<T> = oneshot::Sender<Result<T, AgentError>>;

/// What a pod's task is asked for. Losing an answer that nobody waits for does no harm.
#[derive(Debug)]
pub(super) enum Command {
    /// Enrol it; a failure is the caller's to retry.
    Enrol(Box<PodSpec>, Answer<()>),
    /// Enrol it, in the namespace that was found if its own is not known; a failure is retried here.
    Want(Box<PodSpec>, Option<Found>, Answer<()>),
    /// Unenrol it.
    Leave(Answer<()>),
    /// Unenrol it if it was enrolled before that time. The answer is whether it was.
    LeaveIfOlder(Instant, Answer<bool>),
    /// The sandbox has ended; `None`: the pod has.
    Remove(Option<String>, Answer<()>),
    /// Only these sandboxes have not ended.
    Collect(Arc<HashSet<String>>, Answer<()>),
    /// Verify and repair the redirection.
    Repair(Answer<Vec<Fault>>),
    /// A proxy serves it.
    Served,
    /// A proxy cannot serve it, for that reason.
    Refused(String),
}

/// An enrolled pod, or one that is leaving.
#[derive(Debug)]
pub(super) struct Pod {
    info: WorkloadInfo,
    pub(super) record: Record,
    /// `None` if it was not found again after a restart.
    pub(super) netns: Option<Netns>,
    reason: Option<String>,
    older: HashSet<(SocketAddr, SocketAddr)>,
    pub(super) leaving: Option<Leaving>,
    /// When it was enrolled, or confirmed; `None`: by an earlier agent.
    pub(super) since: Option<Instant>,
}

/// A failed enrolment that is tried again.
#[derive(Debug)]
pub(super) struct Retry {
    pub(super) spec: PodSpec,
    at: Instant,
    pause: Duration,
}

/// The task.
#[derive(Debug)]
pub(super) struct PodTask {
    pub(super) shared: Arc<Shared>,
    pub(super) uid: String,
    commands: mpsc::Receiver<Command>,
    pub(super) pod: Option<Pod>,
    pub(super) retry: Option<Retry>,
}

/// Takes up a pod of the registry: with its namespace if that is found again, else without.
pub(super) async fn restore(shared: Arc<Shared>, record: Record) -> Option<PodTask> {
    let uid = record.uid.clone();
    let netns = find_again(&shared, &record).await.found();
    let pod = Pod {
        info: WorkloadInfo {
            name: record.name.clone(),
            namespace: record.namespace.clone(),
            service_account: record.service_account.clone(),
        },
        leaving: (record.stage == Stage::Leaving).then(|| Leaving::from_now(&shared)),
        record,
        reason: netns.is_none().then(|| NOT_FOUND.to_owned()),
        netns,
        older: HashSet::new(),
        since: None,
    };
    if let Some(netns) = &pod.netns
        && let Err(error) = shared.claim(netns.id(), &uid, &uid)
    {
        tracing::warn!(uid, %error, "registry record of a namespace that has another pod");
    }
    shared.served.upsert(&uid, pod.to_serve());
    shared.set_status(&uid, pod.status());
    shared.task(&uid, Some(pod)).1
}

impl Pod {
    pub(super) fn status(&self) -> PodStatus {
        let state = match (self.record.stage, self.record.served) {
            (Stage::Leaving, _) => PodState::Leaving,
            (Stage::In, true) => PodState::Enabled,
            (Stage::In, false) => PodState::Pending,
        };
        PodStatus {
            name: self.record.name.clone(),
            namespace: self.record.namespace.clone(),
            state,
            reason: self.reason.clone(),
            sandbox: self.record.sandbox.clone(),
            older_connections: self.older.len(),
        }
    }

    fn to_serve(&self) -> ServedPod {
        ServedPod { info: self.info.clone(), netns: self.netns.clone(), options: self.record.options.clone() }
    }

    fn is_in(&self, netns: NetnsId) -> bool {
        self.netns.as_ref().map(Netns::id) == Some(netns)
    }
}

impl PodTask {
    pub(super) fn new(
        shared: Arc<Shared>,
        uid: String,
        commands: mpsc::Receiver<Command>,
        pod: Option<Pod>,
    ) -> Self {
        Self { shared, uid, commands, pod, retry: None }
    }

    /// Runs until the pod is neither enrolled nor to be.
    pub(super) async fn run(mut self) {
        let mut ticks = interval(LEAVE_CHECK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let leaving = self.pod.as_ref().is_some_and(|pod| pod.leaving.is_some());
            let retry_at = self.retry.as_ref().map_or_else(Instant::now, |retry| retry.at);
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.handle(command).await,
                    None => return,
                },
                () = sleep_until(retry_at), if self.retry.is_some() => self.try_again().await,
                _ = ticks.tick(), if leaving => self.finish_leaving().await,
            }
            // Later commands go to a new task; a caller that waits for an answer asks again.
            if self.pod.is_none() && self.retry.is_none() {
                self.shared.tasks.lock().remove(&self.uid);
                return;
            }
        }
    }

    async fn handle(&mut self, command: Command) {
        match command {
            Command::Enrol(spec, answer) => {
                let outcome = self.enrol(*spec, None).await;
                answer.send(outcome).ok();
            }
            Command::Want(spec, found, answer) => {
                let outcome = self.want(*spec, found).await;
                answer.send(outcome).ok();
            }
            Command::Leave(answer) => {
                let outcome = self.leave().await;
                answer.send(outcome).ok();
            }
            Command::LeaveIfOlder(time, answer) => {
                let outcome = self.leave_if_older(time).await;
                answer.send(outcome).ok();
            }
            Command::Remove(sandbox, answer) => {
                let outcome = self.remove(sandbox.as_deref()).await;
                answer.send(outcome).ok();
            }
            Command::Collect(valid, answer) => {
                let outcome = self.collect(&valid).await;
                answer.send(outcome).ok();
            }
            Command::Repair(answer) => {
                let outcome = self.repair().await;
                answer.send(outcome).ok();
            }
            Command::Served => self.note(None),
            Command::Refused(reason) => self.note(Some(reason)),
        }
    }

    async fn want(&mut self, mut spec: PodSpec, found: Option<Found>) -> Result<(), AgentError> {
        if let Some(Pod { record, leaving: None, .. }) = &self.pod
            && record.sandbox.is_some()
            && spec.sandbox.is_none()
            && spec.netns.is_none()
        {
            // The CNI plugin reported this sandbox. What the caller knows may be of the sandbox before.
            spec.ips = record.ips.clone();
        }
        let pause = self.retry.as_ref().map_or(RETRY_FIRST, |retry| retry.pause);
        let outcome = self.enrol(spec.clone(), found).await;
        if let Err(error) = &outcome {
            self.retry_later(spec, error, pause);
        }
        outcome
    }

    async fn try_again(&mut self) {
        let Some(Retry { spec, pause, .. }) = self.retry.take() else { return };
        if let Err(error) = self.enrol(spec.clone(), None).await {
            tracing::debug!(uid = self.uid, %error, "pod still not enrolled");
            self.retry_later(spec, &error, (pause * 2).min(RETRY_LAST));
        }
    }

    fn retry_later(&mut self, spec: PodSpec, error: &AgentError, pause: Duration) {
        let reason = format!("{error} ({})", error.kind().as_str());
        match &mut self.pod {
            Some(pod) => {
                pod.reason = Some(reason);
                let status = pod.status();
                self.shared.set_status(&self.uid, status);
            }
            None => {
                // A proxy may serve it from before, and drops what a snapshot does not name.
                self.shared.served.keep(&self.uid);
                let status = PodStatus {
                    name: spec.name.clone(),
                    namespace: spec.namespace.clone(),
                    state: PodState::Failed,
                    reason: Some(reason),
                    sandbox: spec.sandbox.clone(),
                    older_connections: 0,
                };
                self.shared.set_status(&self.uid, status);
            }
        }
        self.retry = Some(Retry { spec, at: Instant::now() + pause, pause });
    }

    async fn enrol(&mut self, spec: PodSpec, found: Option<Found>) -> Result<(), AgentError> {
        let outcome = self.try_enrol(spec, found).await;
        match &outcome {
            Ok(()) => {
                self.retry = None;
                self.shared.unreadable.lock().remove(&self.uid);
                self.shared.metrics.enrolments.inc();
            }
            Err(error) => self.shared.metrics.failed(error),
        }
        outcome
    }

    async fn try_enrol(&mut self, mut spec: PodSpec, found: Option<Found>) -> Result<(), AgentError> {
        let shared = Arc::clone(&self.shared);
        let _permit = shared.enrolling.acquire().await.map_err(|_| AgentError::Ended)?;
        let netns = self.namespace(&mut spec, found).await?;
        self.require_own_namespace(&netns, &spec).await?;
        self.shared.claim(netns.id(), &self.uid, &self.uid)?;
        let outcome = self.enrol_in(spec, &netns).await;
        let keep = self.pod.as_ref().and_then(|pod| pod.netns.as_ref()).map(Netns::id);
        self.shared.release_claims(&self.uid, keep);
        outcome
    }

    /// Where the pod is: as its caller says, else where it was, else where it was found.
    async fn namespace(&self, spec: &mut PodSpec, found: Option<Found>) -> Result<Netns, AgentError> {
        if let Some(netns) = spec.netns.take() {
            return Ok(netns);
        }
        if let Some(pod) = &self.pod
            && let Some(netns) = &pod.netns
            && holds_all(netns, &pod.record).await
        {
            spec.netns_path = spec.netns_path.take().or_else(|| pod.record.netns_path.clone());
            return Ok(netns.clone());
        }
        let found = match found {
            Some(found) => found,
            None => self.shared.find_namespace(spec).await?,
        };
        spec.netns_path = Some(found.path);
        Ok(found.netns)
    }

    /// A namespace is paired with a pod only if it holds that pod's addresses.
    async fn require_own_namespace(&self, netns: &Netns, spec: &PodSpec) -> Result<(), AgentError> {
        let uid = self.uid.clone();
        if self.shared.host_netns.contains(&netns.id()) {
            return Err(AgentError::HostNetwork { uid });
        }
        let held = discovery::addresses(netns).await;
        let held = held.map_err(|e| AgentError::Redirect { uid: uid.clone(), source: e.into() })?;
        let missing: Vec<_> = spec.ips.iter().filter(|ip| !held.contains(ip)).copied().collect();
        if spec.ips.is_empty() || !missing.is_empty() {
            return Err(AgentError::WrongNamespace { uid, netns: netns.id(), missing });
        }
        Ok(())
    }

    async fn enrol_in(&mut self, spec: PodSpec, netns: &Netns) -> Result<(), AgentError> {
        let known = self.pod.as_ref().filter(|pod| pod.is_in(netns.id()));
        let older = match known {
            Some(pod) => pod.older.clone(),
            None => self.older_connections(netns).await,
        };
        // Rules that are in already stay, whatever fails from here on: the pod may be one that a proxy serves.
        let captured = match known {
            Some(_) => true,
            None => redirect::is_present(netns).await.map_err(|e| self.redirect_error(e.into()))?,
        };
        // The record comes before the rules: an agent that is killed between the two knows of them.
        let record = self.record(spec, netns, captured).await?;
        if let Err(error) = self.save(&record).await {
            if !captured {
                return Err(error);
            }
            tracing::warn!(uid = self.uid, %error, "registry not written");
        }
        let (options, former) = (record.options.clone(), record.former_settings.clone());
        // Probes must not be captured for a moment.
        self.shared.probes.set(&self.uid, record.ips.clone()).await;
        let reason = self.bind_listeners(netns, &options).await;
        let outcome = self.program(netns, &options, Stage::In).await;
        if outcome.is_err() && !captured && self.roll_back(netns, &former).await {
            return outcome.map(drop);
        }
        let pod = Pod {
            info: WorkloadInfo {
                name: record.name.clone(),
                namespace: record.namespace.clone(),
                service_account: record.service_account.clone(),
            },
            record,
            netns: Some(netns.clone()),
            reason: outcome.as_ref().err().map(ToString::to_string).or(reason),
            older,
            leaving: None,
            since: Some(Instant::now()),
        };
        self.shared.served.upsert(&self.uid, pod.to_serve());
        self.shared.set_status(&self.uid, pod.status());
        self.pod = Some(pod);
        outcome.map(drop)
    }

    /// They are only counted: an enrolment does not depend on knowing them.
    async fn older_connections(&self, netns: &Netns) -> HashSet<(SocketAddr, SocketAddr)> {
        connections(netns, |c| !is_mesh(c)).await.unwrap_or_else(|error| {
            tracing::warn!(uid = self.uid, %error, "connections older than the redirection are not counted");
            HashSet::new()
        })
    }

    /// Binds the pod's listeners, so that what the rules redirect waits for the proxy instead of being refused until the
    /// proxy is informed. Returns why that failed: the pod is captured all the same.
    async fn bind_listeners(&self, netns: &Netns, options: &Options) -> Option<String> {
        let proxies = self.shared.served.takers_of_listeners()?;
        let error = self.shared.listeners.acquire(&self.uid, netns, options, proxies).await.err()?;
        if error.raw_os_error() == Some(libc::EADDRINUSE) && !*self.shared.serving.borrow() {
            // The proxy holds them from an earlier agent. They are taken back when it connects.
            return None;
        }
        let reason = error.to_string();
        tracing::warn!(uid = self.uid, reason, "pod's listeners not bound");
        Some(reason)
    }

    /// Removes what a failed enrolment put in. Returns whether nothing is left; if not, the pod counts as captured, so
    /// that the proxy serves it and the rest is tried again.
    async fn roll_back(&self, netns: &Netns, former: &FormerSettings) -> bool {
        if let Err(error) = redirect::remove(netns, former).await {
            tracing::error!(uid = self.uid, %error, "rules of a failed enrolment not removed");
            return false;
        }
        self.shared.listeners.release(&self.uid).await;
        self.shared.probes.set(&self.uid, Vec::new()).await;
        if let Err(error) = self.shared.registry.remove(&self.uid) {
            tracing::warn!(uid = self.uid, %error, "record of a failed enrolment not removed");
        }
        true
    }

    async fn record(&self, spec: PodSpec, netns: &Netns, captured: bool) -> Result<Record, AgentError> {
        let id = netns.id();
        let before = self.pod.as_ref().map(|pod| &pod.record).filter(|record| record.netns == id);
        let former_settings = match before {
            Some(record) => record.former_settings.clone(),
            // Our own values would pass for former ones.
            None if captured => FormerSettings::default(),
            None => redirect::current_settings(netns).await?,
        };
        // A pod that was served in this namespace is served: its proxy may only be restarting.
        let served = match before {
            Some(record) => record.served,
            None => captured && self.shared.unreadable.lock().contains(&self.uid),
        };
        let unknown = before.map(|record| record.unknown.clone()).unwrap_or_default();
        let sandbox = spec.sandbox.or_else(|| before.and_then(|record| record.sandbox.clone()));
        Ok(Record {
            uid: spec.uid,
            name: spec.name,
            namespace: spec.namespace,
            service_account: spec.service_account,
            ips: spec.ips,
            options: spec.options,
            stage: Stage::In,
            served,
            netns: id,
            netns_path: spec.netns_path,
            sandbox,
            former_settings,
            unknown,
        })
    }

    async fn repair(&mut self) -> Result<Vec<Fault>, AgentError> {
        self.look_for_namespace().await;
        let Some(Pod { netns: Some(netns), record, .. }) = &self.pod else { return Ok(Vec::new()) };
        let netns = netns.clone();
        let faults = self.program(&netns, &record.options.clone(), record.stage).await?;
        let open = connections(&netns, |c| !is_mesh(c)).await;
        if let Some(pod) = &mut self.pod {
            if let Ok(open) = open {
                pod.older.retain(|connection| open.contains(connection));
            }
            self.shared.set_status(&self.uid, pod.status());
            // Catches up on a proxy's answer that was lost while this task was busy.
            if self.shared.served.is_served(&self.uid) {
                self.note(None);
            }
        }
        Ok(faults)
    }

    /// Looks again for a namespace that was not found after a restart.
    async fn look_for_namespace(&mut self) {
        let Some(Pod { netns: None, record, .. }) = &self.pod else { return };
        let record = record.clone();
        let Search::Found(netns) = find_again(&self.shared, &record).await else { return };
        if self.shared.claim(netns.id(), &self.uid, &self.uid).is_err() {
            return;
        }
        if let Some(pod) = &mut self.pod {
            pod.netns = Some(netns);
            pod.reason = None;
            self.shared.served.upsert(&self.uid, pod.to_serve());
        }
    }

    /// Notes a proxy's answer: `None` that it serves the pod, else why not.
    fn note(&mut self, refused: Option<String>) {
        let Some(pod) = &mut self.pod else { return };
        let first = refused.is_none() && !pod.record.served;
        // The event may be older than the latest namespace; the hub knows.
        if first && self.shared.served.is_served(&self.uid) {
            pod.record.served = true;
            if let Err(error) = self.shared.registry.save(&pod.record) {
                tracing::warn!(uid = self.uid, %error, "registry not written");
            }
        }
        pod.reason = refused;
        self.shared.set_status(&self.uid, pod.status());
    }

    pub(super) async fn program(
        &self,
        netns: &Netns,
        options: &Options,
        stage: Stage,
    ) -> Result<Vec<Fault>, AgentError> {
        let plan = redirect::plan(options, stage);
        redirect::apply(netns, &plan).await.map_err(|source| self.redirect_error(source))
    }

    fn redirect_error(&self, source: redirect::RedirectError) -> AgentError {
        AgentError::Redirect { uid: self.uid.clone(), source }
    }

    /// Writes on a thread that may block: a record is on disk before the rules are in.
    pub(super) async fn save(&self, record: &Record) -> Result<(), AgentError> {
        let (shared, record) = (Arc::clone(&self.shared), record.clone());
        let written = tokio::task::spawn_blocking(move || shared.registry.save(&record)).await;
        Ok(written.map_err(|_| AgentError::Ended)??)
    }
}
