//! A node's agent, in this process: the library that a cluster's node runs as a program, with what it says
//! carried into the pods' views.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use ambit_node::redirect::Options;
use ambit_node::{Agent, AgentConfig, AgentError, PodSpec, PodState, StatusEvent};
use parking_lot::Mutex;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;

use crate::cluster::shared::Shared;
use crate::error::{Error, Result};
use crate::kubelet::status::Redirection;
use crate::pod::Pod;

/// The agent of one node, which can be stopped and started again.
#[derive(Debug)]
pub(crate) struct NodeAgent {
    node: String,
    config: AgentConfig,
    /// Whether the node's proxy serves SOCKS5: the agent binds its listeners.
    socks5: bool,
    running: Mutex<Option<Running>>,
    /// Pods that were brought in and not yet out.
    enrolled: Mutex<BTreeSet<String>>,
}

#[derive(Debug)]
struct Running {
    agent: Agent,
    /// The agent's driver and the carrier of its events; they end when this is dropped.
    tasks: JoinSet<()>,
}

impl NodeAgent {
    /// An agent that is not started yet.
    pub(crate) fn new(node: String, config: AgentConfig, socks5: bool) -> Self {
        Self { node, config, socks5, running: Mutex::new(None), enrolled: Mutex::default() }
    }

    fn fault(&self, attempt: impl Into<String>) -> impl FnOnce(AgentError) -> Error {
        let (node, attempt) = (self.node.clone(), attempt.into());
        move |error| Error::Agent { node, attempt, reason: error.to_string() }
    }

    fn agent(&self, attempt: &str) -> Result<Agent> {
        let running = self.running.lock().as_ref().map(|running| running.agent.clone());
        running.ok_or_else(|| Error::Agent {
            node: self.node.clone(),
            attempt: attempt.to_owned(),
            reason: "it is stopped".to_owned(),
        })
    }

    /// Starts it; pods of its registry are taken up again.
    ///
    /// # Errors
    /// When its socket or registry can't be opened.
    pub(crate) async fn start(&self, shared: &Arc<Shared>) -> Result<()> {
        if self.running.lock().is_some() {
            return Ok(());
        }
        let (agent, driver) = Agent::start(self.config.clone()).await.map_err(self.fault("start"))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(carry(agent.clone(), Arc::downgrade(shared)));
        let node = self.node.clone();
        tasks.spawn(async move {
            driver.await;
            tracing::error!(node, "the node agent has ended by itself");
        });
        *self.running.lock() = Some(Running { agent, tasks });
        Ok(())
    }

    /// Ends it as a crash would: nothing is cleared up.
    pub(crate) async fn stop(&self) {
        let running = self.running.lock().take();
        if let Some(mut running) = running {
            running.tasks.shutdown().await;
        }
    }

    /// Brings a pod in. Returns when its rules are in place.
    ///
    /// # Errors
    /// When the agent is stopped or refuses.
    pub(crate) async fn enrol(&self, pod: &Pod, options: Options) -> Result<()> {
        let attempt = format!("bring pod {pod} in");
        let agent = self.agent(&attempt)?;
        let netns = pod.inner.sandbox.netns()?;
        let path = format!("/proc/self/fd/{}", pod.inner.sandbox.network().as_raw_fd());
        let spec = PodSpec {
            uid: pod.uid().to_owned(),
            name: pod.name().to_owned(),
            namespace: pod.namespace().to_owned(),
            service_account: pod.service_account().to_owned(),
            ips: pod.ips(),
            netns,
            netns_path: Some(PathBuf::from(path)),
            options: Options { socks5: options.socks5 || self.socks5, ..options },
        };
        agent.pod_up(spec).await.map_err(self.fault(attempt))?;
        self.enrolled.lock().insert(pod.uid().to_owned());
        Ok(())
    }

    /// Takes a running pod out. Does nothing for one that is not in.
    ///
    /// # Errors
    /// When the agent is stopped or fails.
    pub(crate) async fn unenrol(&self, uid: &str) -> Result<()> {
        if !self.enrolled.lock().contains(uid) {
            return Ok(());
        }
        let attempt = format!("take pod {uid} out");
        self.agent(&attempt)?.unenrol(uid).await.map_err(self.fault(attempt))?;
        self.enrolled.lock().remove(uid);
        Ok(())
    }

    /// Tells it that a pod is gone.
    ///
    /// # Errors
    /// When the agent fails. While it is stopped there is nothing to tell.
    pub(crate) async fn pod_down(&self, uid: &str) -> Result<()> {
        if !self.enrolled.lock().remove(uid) {
            return Ok(());
        }
        let Ok(agent) = self.agent("") else { return Ok(()) };
        agent.pod_down(uid).await.map_err(self.fault(format!("forget pod {uid}")))
    }
}

/// Carries the agent's state changes into the pods' views.
async fn carry(agent: Agent, shared: Weak<Shared>) {
    let mut events = agent.events();
    loop {
        let changed = match events.recv().await {
            Ok(StatusEvent { uid, status }) => vec![(uid, status.state)],
            Err(RecvError::Lagged(_)) => {
                agent.statuses().into_iter().map(|(uid, status)| (uid, status.state)).collect()
            }
            Err(RecvError::Closed) => return,
        };
        let Some(shared) = shared.upgrade() else { return };
        for (uid, state) in changed {
            let redirection = match state {
                PodState::Pending => Some(Redirection::Pending),
                PodState::Enabled => Some(Redirection::Enabled),
                PodState::Leaving | PodState::Out => None,
            };
            shared.set_redirection(&uid, redirection);
        }
    }
}
