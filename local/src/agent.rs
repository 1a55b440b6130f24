//! A node's agent, run as a library in this process. Its status events are copied into the pods' views.

use std::collections::{BTreeSet, HashSet};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use ambit_node::redirect::Options;
use ambit_node::{Agent, AgentConfig, AgentError, PodSpec, PodState, StatusEvent};
use parking_lot::Mutex;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio::time::Instant;

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
    /// Pods that the agent was asked to enrol and not yet to unenrol.
    enrolled: Mutex<BTreeSet<String>>,
}

#[derive(Debug)]
struct Running {
    agent: Agent,
    /// The agent's driver and the copying of its events; they end when this is dropped.
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

    /// Starts it with the pods of the node that must be enrolled. It restores those of its registry.
    ///
    /// # Errors
    /// When its socket or registry can't be opened.
    pub(crate) async fn start(&self, shared: &Arc<Shared>, pods: &[(Pod, Options)]) -> Result<()> {
        if self.running.lock().is_some() {
            return Ok(());
        }
        let as_of = Instant::now();
        let (agent, driver) = Agent::start(self.config.clone()).await.map_err(self.fault("start"))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(follow(agent.clone(), Arc::downgrade(shared)));
        let node = self.node.clone();
        tasks.spawn(async move {
            driver.await;
            tracing::error!(node, "the node agent has ended by itself");
        });
        *self.running.lock() = Some(Running { agent: agent.clone(), tasks });
        let specs =
            pods.iter().map(|(pod, options)| self.spec(pod, options.clone())).collect::<Result<_>>()?;
        self.enrolled.lock().extend(pods.iter().map(|(pod, _)| pod.uid().to_owned()));
        for (uid, error) in agent.reconcile(specs, &HashSet::new(), as_of).await.failed {
            tracing::warn!(node = self.node, uid, %error, "pod not enrolled yet");
        }
        Ok(())
    }

    /// Ends it as a crash would, without cleaning up.
    pub(crate) async fn stop(&self) {
        let running = self.running.lock().take();
        if let Some(mut running) = running {
            running.tasks.shutdown().await;
        }
    }

    fn spec(&self, pod: &Pod, options: Options) -> Result<PodSpec> {
        let path = format!("/proc/self/fd/{}", pod.inner.sandbox.network().as_raw_fd());
        Ok(PodSpec {
            uid: pod.uid().to_owned(),
            name: pod.name().to_owned(),
            namespace: pod.namespace().to_owned(),
            service_account: pod.service_account().to_owned(),
            ips: pod.ips(),
            netns: Some(pod.inner.sandbox.netns()?),
            netns_path: Some(PathBuf::from(path)),
            sandbox: None,
            options: Options { socks5: options.socks5 || self.socks5, ..options },
        })
    }

    /// Enrols a pod. Returns when its rules are in place.
    ///
    /// # Errors
    /// When the agent is stopped or refuses.
    pub(crate) async fn enrol(&self, pod: &Pod, options: Options) -> Result<()> {
        let attempt = format!("enrol pod {pod}");
        let agent = self.agent(&attempt)?;
        let spec = self.spec(pod, options)?;
        self.enrolled.lock().insert(pod.uid().to_owned());
        agent.enrol(spec).await.map_err(self.fault(attempt))
    }

    /// Unenrols a running pod. Does nothing for one that was never to be enrolled.
    ///
    /// # Errors
    /// When the agent is stopped or fails.
    pub(crate) async fn unenrol(&self, pod: &Pod) -> Result<()> {
        if !self.enrolled.lock().contains(pod.uid()) {
            return Ok(());
        }
        let attempt = format!("unenrol pod {pod}");
        let agent = self.agent(&attempt)?;
        match agent.unenrol(pod.uid()).await {
            // What a failed enrolment may have left is removed by the namespace.
            Err(AgentError::NotEnrolled { .. } | AgentError::NamespaceNotFound { .. }) => {
                let netns = pod.inner.sandbox.netns()?;
                agent.cleanup(&netns).await.map_err(self.fault(attempt))?;
            }
            outcome => outcome.map_err(self.fault(attempt))?,
        }
        self.enrolled.lock().remove(pod.uid());
        Ok(())
    }

    /// Reports to it that a pod has ended.
    ///
    /// # Errors
    /// When the agent fails. One that is stopped learns of it when it starts.
    pub(crate) async fn remove_pod(&self, uid: &str) -> Result<()> {
        if !self.enrolled.lock().remove(uid) {
            return Ok(());
        }
        let Ok(agent) = self.agent("") else { return Ok(()) };
        agent.remove_pod(uid, None).await.map_err(self.fault(format!("remove pod {uid}")))
    }
}

/// Copies the agent's status events into the pods' views.
async fn follow(agent: Agent, shared: Weak<Shared>) {
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
                PodState::Leaving | PodState::Failed | PodState::Out => None,
            };
            shared.set_redirection(&uid, redirection);
        }
    }
}
