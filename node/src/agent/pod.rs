//! One pod's way in and out, step by step, in a task of its own.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_api::workload::zds::WorkloadInfo;
use ambit_net::Netns;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{AgentError, PodSpec, PodState, PodStatus, Shared};
use crate::redirect::{self, Fault, FormerSettings, Options, Routing, Stage, connections, is_mesh};
use crate::registry::Record;
use crate::zds::ServedPod;

/// Between two looks whether a leaving pod's last tunnelled connection has ended.
const LEAVE_CHECK: Duration = Duration::from_millis(200);
/// How long proxies may take to let a pod go.
const FORGET: Duration = Duration::from_secs(30);

/// What a pod's task is told. An answer that nobody waits for is lost without harm.
#[derive(Debug)]
pub(super) enum Command {
    Up(Box<PodSpec>, oneshot::Sender<Result<(), AgentError>>),
    Leave(oneshot::Sender<Result<(), AgentError>>),
    Down(oneshot::Sender<Result<(), AgentError>>),
    Repair(oneshot::Sender<Result<Vec<Fault>, AgentError>>),
    Served,
    Refused(String),
}

/// A pod that is in, or leaving.
#[derive(Debug)]
pub(super) struct Pod {
    info: WorkloadInfo,
    record: Record,
    /// `None` if it was lost with a restart.
    netns: Option<Netns>,
    reason: Option<String>,
    older: HashSet<(SocketAddr, SocketAddr)>,
    leaving: Option<Leaving>,
}

/// When a leaving pod may be gone, and when it must be.
#[derive(Debug, Clone, Copy)]
struct Leaving {
    not_before: Instant,
    not_after: Instant,
}

impl Leaving {
    fn from_now(shared: &Shared) -> Self {
        let now = Instant::now();
        Self { not_before: now + shared.config.leave_grace, not_after: now + shared.config.leave_timeout }
    }
}

/// The task.
#[derive(Debug)]
pub(super) struct PodTask {
    shared: Arc<Shared>,
    uid: String,
    commands: mpsc::Receiver<Command>,
    pod: Option<Pod>,
}

/// Takes a pod of the registry up again: with its namespace if that is still found at its path and holds
/// the pod's addresses, else without.
pub(super) async fn restore(shared: &Arc<Shared>, record: Record) -> Result<Option<PodTask>, AgentError> {
    let uid = record.uid.clone();
    let netns = find_namespace(&record).await;
    if netns.is_none() && record.stage == Stage::Leaving {
        shared.registry.remove(&uid)?;
        return Ok(None);
    }
    let info = WorkloadInfo {
        name: record.name.clone(),
        namespace: record.namespace.clone(),
        service_account: record.service_account.clone(),
    };
    let leaving = (record.stage == Stage::Leaving).then(|| Leaving::from_now(shared));
    let pod = Pod { info, record, netns, reason: None, older: HashSet::new(), leaving };
    shared.served.upsert(&uid, pod.to_serve());
    shared.set_status(&uid, pod.status());
    Ok(shared.new_task(&uid, Some(pod)).1)
}

async fn find_namespace(record: &Record) -> Option<Netns> {
    let netns = Netns::open(record.netns_path.as_ref()?).ok()?;
    let id = netns.id();
    if (id.dev, id.ino) != (record.netns_dev, record.netns_ino) {
        return None;
    }
    // An inode is used again, an address in it proves whose it is.
    let held = Routing::open(&netns).await.ok()?.addresses().await.ok()?;
    record.ips.iter().all(|ip| held.contains(ip)).then_some(netns)
}

impl Pod {
    fn status(&self) -> PodStatus {
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
            older_connections: self.older.len(),
        }
    }

    fn to_serve(&self) -> ServedPod {
        ServedPod { info: self.info.clone(), netns: self.netns.clone(), options: self.record.options.clone() }
    }
}

impl PodTask {
    pub(super) fn new(
        shared: Arc<Shared>,
        uid: String,
        commands: mpsc::Receiver<Command>,
        pod: Option<Pod>,
    ) -> Self {
        Self { shared, uid, commands, pod }
    }

    /// Runs until the pod is out.
    pub(super) async fn run(mut self) {
        let mut ticks = interval(LEAVE_CHECK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let leaving = self.pod.as_ref().is_some_and(|pod| pod.leaving.is_some());
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => self.handle(command).await,
                    None => return,
                },
                _ = ticks.tick(), if leaving => self.look_whether_left().await,
            }
            // What comes after this meets a new task; whoever waits for an answer asks again.
            if self.pod.is_none() {
                self.shared.tasks.lock().remove(&self.uid);
                return;
            }
        }
    }

    async fn handle(&mut self, command: Command) {
        match command {
            Command::Up(spec, answer) => {
                let outcome = self.up(*spec).await;
                answer.send(outcome).ok();
            }
            Command::Leave(answer) => {
                let outcome = self.leave().await;
                answer.send(outcome).ok();
            }
            Command::Down(answer) => {
                let outcome = self.down().await;
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

    async fn up(&mut self, spec: PodSpec) -> Result<(), AgentError> {
        self.require_own_namespace(&spec).await?;
        let older = match &self.pod {
            Some(pod) if pod.netns.as_ref().map(Netns::id) == Some(spec.netns.id()) => pod.older.clone(),
            _ => connections(&spec.netns, |c| !is_mesh(c)).await.unwrap_or_else(|error| {
                tracing::warn!(uid = self.uid, %error, "connections older than the redirection are not counted");
                HashSet::new()
            }),
        };
        let reason = self.listen(&spec).await;
        // From here on nothing leaves in the clear, whatever fails after this.
        self.program(&spec.netns, &spec.options, Stage::In).await?;
        let pod = Pod {
            info: WorkloadInfo {
                name: spec.name.clone(),
                namespace: spec.namespace.clone(),
                service_account: spec.service_account.clone(),
            },
            record: self.record(&spec),
            netns: Some(spec.netns),
            reason,
            older,
            leaving: None,
        };
        self.save(&pod.record).await?;
        self.shared.served.upsert(&self.uid, pod.to_serve());
        self.shared.set_status(&self.uid, pod.status());
        self.pod = Some(pod);
        Ok(())
    }

    /// Binds the pod's listeners, so that what the rules redirect waits for the proxy instead of being
    /// refused until the proxy is told. Returns why that failed: the pod is captured all the same.
    async fn listen(&self, spec: &PodSpec) -> Option<String> {
        let proxies = self.shared.served.takers_of_listeners()?;
        let bound = self.shared.keeper.acquire(&self.uid, &spec.netns, &spec.options, proxies).await;
        let reason = bound.err()?.to_string();
        tracing::warn!(uid = self.uid, reason, "pod's listeners not bound");
        Some(reason)
    }

    /// kubernetes.md, "The node": a namespace must hold that pod's IP before it is given an identity.
    async fn require_own_namespace(&self, spec: &PodSpec) -> Result<(), AgentError> {
        let uid = self.uid.clone();
        if spec.netns.id() == self.shared.own_netns {
            return Err(AgentError::HostNetwork { uid });
        }
        let held = async { Routing::open(&spec.netns).await?.addresses().await }.await;
        let held = held.map_err(|e| AgentError::Redirect { uid: uid.clone(), source: e.into() })?;
        let missing: Vec<_> = spec.ips.iter().filter(|ip| !held.contains(ip)).copied().collect();
        if spec.ips.is_empty() || !missing.is_empty() {
            return Err(AgentError::WrongNamespace { uid, netns: spec.netns.id(), missing });
        }
        Ok(())
    }

    fn record(&self, spec: &PodSpec) -> Record {
        let id = spec.netns.id();
        // A pod that was served in this namespace is served: its proxy may only be restarting.
        let served = self.pod.as_ref().is_some_and(|pod| {
            pod.record.served && (pod.record.netns_dev, pod.record.netns_ino) == (id.dev, id.ino)
        });
        Record {
            uid: spec.uid.clone(),
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            service_account: spec.service_account.clone(),
            ips: spec.ips.clone(),
            options: spec.options.clone(),
            stage: Stage::In,
            served,
            netns_dev: id.dev,
            netns_ino: id.ino,
            netns_path: spec.netns_path.clone(),
            boot_id: self.shared.registry.boot_id().into(),
        }
    }

    async fn leave(&mut self) -> Result<(), AgentError> {
        let Some(pod) = &self.pod else { return Ok(()) };
        if pod.record.stage == Stage::Leaving {
            return Ok(());
        }
        let Some(netns) = pod.netns.clone() else { return self.down().await };
        let options = pod.record.options.clone();
        self.program(&netns, &options, Stage::Leaving).await?;
        let leaving = Leaving::from_now(&self.shared);
        let Some(pod) = &mut self.pod else { return Ok(()) };
        pod.record.stage = Stage::Leaving;
        pod.leaving = Some(leaving);
        let (record, status) = (pod.record.clone(), pod.status());
        self.shared.set_status(&self.uid, status);
        self.save(&record).await
    }

    /// Clears a leaving pod away once nothing is tunnelled any more, or its time is up.
    async fn look_whether_left(&mut self) {
        let Some(Pod { netns: Some(netns), leaving: Some(leaving), .. }) = &self.pod else { return };
        let now = Instant::now();
        let late = now >= leaving.not_after;
        if now < leaving.not_before && !late {
            return;
        }
        match connections(netns, is_mesh).await {
            Ok(open) if open.is_empty() => {}
            Ok(open) if late => {
                tracing::warn!(
                    uid = self.uid,
                    connections = open.len(),
                    "cutting connections of a pod that left"
                );
            }
            Ok(_) => return,
            Err(error) if late => {
                tracing::warn!(uid = self.uid, %error, "connections of a pod that left are not known");
            }
            Err(_) => return,
        }
        let netns = netns.clone();
        self.shared.served.delete(&self.uid);
        if !self.shared.served.forgotten(&self.uid, FORGET).await {
            tracing::warn!(uid = self.uid, "a node proxy does not let the pod go");
        }
        self.shared.keeper.release(&self.uid).await;
        if let Err(error) = redirect::remove(&netns, &FormerSettings::default()).await {
            tracing::warn!(uid = self.uid, %error, "redirection of a pod that left was not removed");
        }
        if let Err(error) = self.forget() {
            tracing::warn!(uid = self.uid, %error, "pod that left is still in the registry");
        }
    }

    async fn down(&mut self) -> Result<(), AgentError> {
        self.shared.served.delete(&self.uid);
        self.shared.keeper.release(&self.uid).await;
        self.forget()
    }

    fn forget(&mut self) -> Result<(), AgentError> {
        if let Some(pod) = self.pod.take() {
            let status = PodStatus { state: PodState::Out, reason: None, ..pod.status() };
            self.shared.set_status(&self.uid, status);
        }
        Ok(self.shared.registry.remove(&self.uid)?)
    }

    async fn repair(&mut self) -> Result<Vec<Fault>, AgentError> {
        let Some(Pod { netns: Some(netns), record, .. }) = &self.pod else { return Ok(Vec::new()) };
        let faults = self.program(&netns.clone(), &record.options.clone(), record.stage).await?;
        let open = connections(&netns.clone(), |c| !is_mesh(c)).await?;
        if let Some(pod) = &mut self.pod {
            pod.older.retain(|connection| open.contains(connection));
            self.shared.set_status(&self.uid, pod.status());
            // Catches up on a proxy's word that was lost while this task was busy.
            if self.shared.served.is_served(&self.uid) {
                self.note(None);
            }
        }
        Ok(faults)
    }

    /// Notes what a proxy said of the pod: `None` that it serves it, else why not.
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

    async fn program(
        &self,
        netns: &Netns,
        options: &Options,
        stage: Stage,
    ) -> Result<Vec<Fault>, AgentError> {
        let plan = redirect::plan(options, stage);
        redirect::apply(netns, &plan)
            .await
            .map_err(|source| AgentError::Redirect { uid: self.uid.clone(), source })
    }

    /// Writes on a thread that may block: a record is on disk before the caller is told.
    async fn save(&self, record: &Record) -> Result<(), AgentError> {
        let (shared, record) = (Arc::clone(&self.shared), record.clone());
        let written = tokio::task::spawn_blocking(move || shared.registry.save(&record)).await;
        Ok(written.map_err(|_| AgentError::Ended)??)
    }
}
