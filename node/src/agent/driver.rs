//! Everything that runs on the agent's behalf: the pods' tasks, the ZDS server, regular verification.

use std::sync::Arc;

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::pod::{self, Command, PodTask};
use super::{Agent, AgentError, CONCURRENCY};
use crate::redirect::Fault;
use crate::registry::Loaded;
use crate::zds::{Server, ZdsEvent};

/// What [`Agent::start`] returns as a future.
pub(super) struct Driver {
    pub(super) agent: Agent,
    pub(super) to_spawn: mpsc::Receiver<PodTask>,
    pub(super) happened: mpsc::Receiver<ZdsEvent>,
    pub(super) restored: Vec<PodTask>,
}

impl Driver {
    pub(super) async fn run(
        mut self,
        server: Server,
        holding_listeners: impl Future<Output = ()> + Send,
        keeping_probes: impl Future<Output = ()> + Send,
    ) {
        let mut tasks = JoinSet::new();
        for task in self.restored.drain(..) {
            tasks.spawn(task.run());
        }
        let repairs = repair_regularly(self.agent.clone());
        let serving = self.agent.0.serving.subscribe();
        let pods = async move {
            loop {
                tokio::select! {
                    Some(task) = self.to_spawn.recv() => drop(tasks.spawn(task.run())),
                    Some(event) = self.happened.recv() => self.agent.pass_on(event),
                    Some(ended) = tasks.join_next() => if let Err(error) = ended {
                        tracing::error!(%error, "a pod's task died");
                    },
                }
            }
        };
        tokio::select! {
            () = server.run(serving) => {}
            () = holding_listeners => {}
            () = keeping_probes => {}
            () = repairs => {}
            () = pods => {}
        }
    }
}

async fn repair_regularly(agent: Agent) {
    // The first round is at once: the node may have changed while no agent ran, and rules of an older version are
    // replaced.
    let mut ticks = interval(agent.0.config.repair_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        agent.0.probes.repair().await;
        agent.repair().await;
    }
}

impl Agent {
    /// Takes up the pods of the registry.
    pub(super) async fn restore(&self, loaded: Loaded) -> Vec<PodTask> {
        let shared = &self.0;
        for file in loaded.unreadable {
            shared.metrics.unreadable.inc();
            // Its rules are in place, and a proxy may serve it.
            shared.served.keep(&file.uid);
            shared.unreadable.lock().insert(file.uid);
        }
        let restored = futures_util::stream::iter(loaded.records)
            .map(|record| pod::restore(Arc::clone(shared), record))
            .buffer_unordered(CONCURRENCY);
        restored.filter_map(std::future::ready).collect().await
    }

    /// Verifies every pod's redirection, repairs what is not as planned and returns what that was. The agent does the
    /// same at its repair interval.
    pub async fn repair(&self) -> Vec<(String, Vec<Fault>)> {
        let uids = self.known();
        futures_util::stream::iter(uids)
            .map(|uid| async move {
                let outcome = self.command(&uid, Command::Repair).await;
                (uid, outcome.flatten())
            })
            .buffer_unordered(CONCURRENCY)
            .filter_map(|(uid, outcome)| std::future::ready(self.report_repair(uid, outcome)))
            .collect()
            .await
    }

    /// Logs the outcome of a repair, and returns what was not as planned.
    fn report_repair(
        &self,
        uid: String,
        outcome: Result<Vec<Fault>, AgentError>,
    ) -> Option<(String, Vec<Fault>)> {
        match outcome {
            Ok(faults) => {
                for fault in &faults {
                    self.0.metrics.repairs.inc();
                    tracing::warn!(uid, %fault, "redirection repaired");
                }
                (!faults.is_empty()).then_some((uid, faults))
            }
            Err(error) => {
                tracing::warn!(uid, %error, kind = error.kind().as_str(), "redirection not repaired");
                None
            }
        }
    }

    /// Passes a proxy's answer on to the pod's task.
    fn pass_on(&self, event: ZdsEvent) {
        let (uid, command) = match event {
            ZdsEvent::Served { uid } => (uid, Command::Served),
            ZdsEvent::Refused { uid, reason } => {
                self.0.metrics.refusals.inc();
                (uid, Command::Refused(reason))
            }
        };
        let task = self.0.tasks.lock().get(&uid).cloned();
        if let Some(task) = task
            && task.try_send(command).is_err()
        {
            tracing::debug!(uid, "the pod's task is ending or busy");
        }
    }
}
