//! The agent: pods in and out of the mesh, with everything that belongs to it.
//!
//! A source of pods (the API server, the CNI plugin, `local`) calls [`Agent::pod_up`], [`Agent::unenrol`]
//! and [`Agent::pod_down`]; the agent programs redirection, keeps the registry, binds listeners and
//! tells the node proxy. Each pod has a task of its own (`pod`), so that one slow namespace holds
//! nobody up and the steps of one pod never overlap. The agent decides nothing about who is in: see
//! [`enrol`](crate::enrol).

mod pod;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ambit_net::{Netns, NetnsError, NetnsId};
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::listeners::Keeper;
use crate::redirect::{Fault, Options, RedirectError};
use crate::registry::{Registry, RegistryError};
use crate::zds::{Pods, Server, ZdsError, ZdsEvent};
use pod::{Command, PodTask};

/// Status events that a slow subscriber may be behind; beyond, it reads [`Agent::statuses`] again.
const EVENTS: usize = 1024;
/// Commands that one pod's task may have waiting.
const COMMANDS: usize = 16;
/// Pods that are verified at a time.
const REPAIRS: usize = 8;
/// Rounds that a command makes when it meets a pod's task that is just ending.
const ROUNDS: usize = 4;

/// The agent's settings.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The unix socket that node proxies dial.
    pub zds_socket: PathBuf,
    /// The directory of the registry.
    pub registry: PathBuf,
    /// How long pods' listeners are held open without a proxy; then connections are refused.
    pub hold_for: Duration,
    /// How long a leaving pod is served at least: peers learn only after a while that it left, and tunnel
    /// to it until then.
    pub leave_grace: Duration,
    /// How long a leaving pod's tunnelled connections may live on; then they are cut.
    pub leave_timeout: Duration,
    /// Between two verifications of every pod's redirection.
    pub repair_interval: Duration,
}

impl AgentConfig {
    /// The defaults of contracts.md and kubernetes.md, with a socket and a registry of one's own.
    pub fn new(zds_socket: impl Into<PathBuf>, registry: impl Into<PathBuf>) -> Self {
        Self {
            zds_socket: zds_socket.into(),
            registry: registry.into(),
            hold_for: Duration::from_secs(30),
            leave_grace: Duration::from_secs(5),
            leave_timeout: Duration::from_secs(600),
            repair_interval: Duration::from_secs(60),
        }
    }
}

/// A pod that is to be in the mesh.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// Its uid, which no other pod ever has.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Its addresses; the network namespace must hold all of them.
    pub ips: Vec<IpAddr>,
    /// Its network namespace.
    pub netns: Netns,
    /// Where the namespace can be found again after a restart of the agent.
    pub netns_path: Option<PathBuf>,
    /// What it asked for.
    pub options: Options,
}

/// How far a pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodState {
    /// Rules in, proxy not yet: traffic is refused or waits. Annotation `pending`.
    Pending,
    /// Captured and served. Annotation `enabled`. It stays so while a proxy restarts: to say otherwise
    /// would have its peers send in the clear.
    Enabled,
    /// On its way out: nothing new is captured. No annotation.
    Leaving,
    /// Not in.
    Out,
}

/// What is known of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodStatus {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// How far it is.
    pub state: PodState,
    /// Why it is not further, if that is known.
    pub reason: Option<String>,
    /// Connections that are older than its redirection and still open.
    pub older_connections: usize,
}

/// A change of a pod's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatusEvent {
    /// The pod.
    pub uid: String,
    /// What is known of it now.
    pub status: PodStatus,
}

/// Why a pod could not be brought in or out.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The ZDS socket.
    #[error(transparent)]
    Zds(#[from] ZdsError),
    /// The agent's own namespace could not be read.
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    /// Redirection.
    #[error("pod {uid}: {source}")]
    Redirect {
        /// The pod.
        uid: String,
        /// What failed.
        source: RedirectError,
    },
    /// The namespace is the node's own: its rules would capture the node.
    #[error("pod {uid}: its network namespace is the host's")]
    HostNetwork {
        /// The pod.
        uid: String,
    },
    /// The namespace is not that pod's.
    #[error("pod {uid}: network namespace {netns} does not hold its address ({missing:?} missing)")]
    WrongNamespace {
        /// The pod.
        uid: String,
        /// The namespace that was given.
        netns: NetnsId,
        /// The addresses that it should hold; empty if the pod has none.
        missing: Vec<IpAddr>,
    },
    /// The agent has ended.
    #[error("the agent has ended")]
    Ended,
}

/// The handle. Cloning shares the agent.
#[derive(Debug, Clone)]
pub struct Agent(Arc<Shared>);

/// What the handle and the pods' tasks share. Each lock guards the map it wraps for the length of a
/// look-up.
#[derive(Debug)]
struct Shared {
    config: AgentConfig,
    own_netns: NetnsId,
    registry: Registry,
    keeper: Keeper,
    served: Pods,
    tasks: Mutex<HashMap<String, mpsc::Sender<Command>>>,
    statuses: Mutex<BTreeMap<String, PodStatus>>,
    events: broadcast::Sender<StatusEvent>,
    spawn: mpsc::Sender<PodTask>,
}

impl Agent {
    /// Starts an agent: the handle, and the future that drives it, which ends only when it is dropped
    /// and everything stops with it (rules in pods stay). Pods of the registry are taken up again.
    pub async fn start(
        config: AgentConfig,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<>), AgentError> {
        let registry = Registry::open(&config.registry)?;
        let records = registry.load()?;
        let (keeper, holding) = Keeper::new();
        let (zds_events, happened) = mpsc::channel(EVENTS);
        let server = Server::bind(&config.zds_socket, keeper.clone(), config.hold_for, zds_events)?;
        let (spawn, to_spawn) = mpsc::channel(EVENTS);
        let repair_interval = config.repair_interval;
        let agent = Self(Arc::new(Shared {
            own_netns: Netns::current()?.id(),
            registry,
            keeper,
            served: server.pods(),
            tasks: Mutex::default(),
            statuses: Mutex::default(),
            events: broadcast::channel(EVENTS).0,
            spawn,
            config,
        }));
        let mut restored = Vec::new();
        for record in records {
            restored.extend(pod::restore(&agent.0, record).await?);
        }
        let driver = Driver { agent: agent.clone(), to_spawn, happened, repair_interval, restored };
        Ok((agent, driver.run(server, holding)))
    }

    /// Brings a pod in, or renews it: verifies the namespace, binds listeners, puts the rules in, writes
    /// the registry, has the proxy told. Returns when the rules are in; [`wait_enabled`](Self::wait_enabled) waits for
    /// the proxy.
    pub async fn pod_up(&self, spec: PodSpec) -> Result<(), AgentError> {
        let uid = spec.uid.clone();
        self.command(&uid, |answer| Command::Up(Box::new(spec.clone()), answer)).await?
    }

    /// A pod has gone, and its namespace with it: the proxy is told, listeners are closed. The rules
    /// stay in whatever is left of the namespace.
    pub async fn pod_down(&self, uid: &str) -> Result<(), AgentError> {
        self.command(uid, Command::Down).await?
    }

    /// Takes a running pod out. Returns when nothing new is redirected; what is tunnelled goes on until
    /// it ends, or for the leave timeout, and then the rest is cleared away.
    pub async fn unenrol(&self, uid: &str) -> Result<(), AgentError> {
        self.command(uid, Command::Leave).await?
    }

    /// Verifies every pod's redirection, repairs what is not as planned and says what that was. The
    /// agent does the same at its repair interval.
    pub async fn repair(&self) -> Vec<(String, Vec<Fault>)> {
        let uids: Vec<String> = self.0.tasks.lock().keys().cloned().collect();
        futures_util::stream::iter(uids)
            .map(|uid| async move {
                let outcome = self.command(&uid, Command::Repair).await;
                (uid, outcome.flatten())
            })
            .buffer_unordered(REPAIRS)
            .filter_map(|(uid, outcome)| std::future::ready(told(uid, outcome)))
            .collect()
            .await
    }

    /// Waits, for at most `limit`, until a proxy serves the pod. Says whether one does.
    pub async fn wait_enabled(&self, uid: &str, limit: Duration) -> bool {
        let mut events = self.0.events.subscribe();
        let enabled = || self.status(uid).is_some_and(|s| s.state == PodState::Enabled);
        timeout(limit, async {
            while !enabled() {
                if let Err(broadcast::error::RecvError::Closed) = events.recv().await {
                    return;
                }
            }
        })
        .await
        .is_ok_and(|()| enabled())
    }

    /// What is known of a pod; `None` if it is not in.
    pub fn status(&self, uid: &str) -> Option<PodStatus> {
        self.0.statuses.lock().get(uid).cloned()
    }

    /// What is known of every pod that is in.
    pub fn statuses(&self) -> BTreeMap<String, PodStatus> {
        self.0.statuses.lock().clone()
    }

    /// Changes from now on. A receiver that lags reads [`statuses`](Self::statuses) again.
    pub fn events(&self) -> broadcast::Receiver<StatusEvent> {
        self.0.events.subscribe()
    }

    /// Node proxies that are connected.
    pub fn proxies(&self) -> usize {
        self.0.served.proxies()
    }

    /// Hands a command to the pod's task, which is made if there is none, and waits for the answer.
    async fn command<T>(
        &self,
        uid: &str,
        command: impl Fn(oneshot::Sender<T>) -> Command,
    ) -> Result<T, AgentError> {
        for _ in 0..ROUNDS {
            let known = self.0.tasks.lock().get(uid).cloned();
            let task = match known {
                Some(task) => task,
                None => self.0.add_task(uid, None).await?,
            };
            let (answer, result) = oneshot::channel();
            if task.send(command(answer)).await.is_ok()
                && let Ok(result) = result.await
            {
                return Ok(result);
            }
        }
        Err(AgentError::Ended)
    }
}

/// Logs what a repair came to, and returns what was not as planned.
fn told(uid: String, outcome: Result<Vec<Fault>, AgentError>) -> Option<(String, Vec<Fault>)> {
    match outcome {
        Ok(faults) => {
            for fault in &faults {
                tracing::warn!(uid, %fault, "redirection repaired");
            }
            (!faults.is_empty()).then_some((uid, faults))
        }
        Err(error) => {
            tracing::warn!(uid, %error, "redirection not repaired");
            None
        }
    }
}

impl Shared {
    /// Makes a pod's task and hands it to the driver, unless there is one already.
    async fn add_task(
        self: &Arc<Self>,
        uid: &str,
        pod: Option<pod::Pod>,
    ) -> Result<mpsc::Sender<Command>, AgentError> {
        let (commands, task) = self.new_task(uid, pod);
        if let Some(task) = task {
            self.spawn.send(task).await.map_err(|_| AgentError::Ended)?;
        }
        Ok(commands)
    }

    fn new_task(
        self: &Arc<Self>,
        uid: &str,
        pod: Option<pod::Pod>,
    ) -> (mpsc::Sender<Command>, Option<PodTask>) {
        let mut tasks = self.tasks.lock();
        if let Some(known) = tasks.get(uid) {
            return (known.clone(), None);
        }
        let (commands, queue) = mpsc::channel(COMMANDS);
        tasks.insert(uid.into(), commands.clone());
        (commands, Some(PodTask::new(Arc::clone(self), uid.into(), queue, pod)))
    }

    /// Publishes what is known of a pod, if it is news.
    fn set_status(&self, uid: &str, status: PodStatus) {
        let news = {
            let mut statuses = self.statuses.lock();
            let known = if status.state == PodState::Out {
                statuses.remove(uid)
            } else {
                statuses.insert(uid.into(), status.clone())
            };
            known.as_ref() != Some(&status)
        };
        if news {
            // Nobody has to listen.
            self.events.send(StatusEvent { uid: uid.into(), status }).ok();
        }
    }
}

/// Everything that runs on the agent's behalf.
struct Driver {
    agent: Agent,
    to_spawn: mpsc::Receiver<PodTask>,
    happened: mpsc::Receiver<ZdsEvent>,
    repair_interval: Duration,
    restored: Vec<PodTask>,
}

impl Driver {
    async fn run(mut self, server: Server, holding: impl Future<Output = ()> + Send) {
        let mut tasks = JoinSet::new();
        for task in self.restored.drain(..) {
            tasks.spawn(task.run());
        }
        let agent = self.agent.clone();
        let repairs = async move {
            // The first round is at once: the node may have changed while no agent ran.
            let mut ticks = interval(self.repair_interval);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                agent.repair().await;
            }
        };
        let agent = self.agent.clone();
        let pods = async move {
            loop {
                tokio::select! {
                    Some(task) = self.to_spawn.recv() => drop(tasks.spawn(task.run())),
                    Some(event) = self.happened.recv() => agent.pass_on(event),
                    Some(ended) = tasks.join_next() => if let Err(error) = ended {
                        tracing::error!(%error, "a pod's task died");
                    },
                }
            }
        };
        tokio::select! {
            () = server.run() => {}
            () = holding => {}
            () = repairs => {}
            () = pods => {}
        }
    }
}

impl Agent {
    /// Tells a pod's task what a proxy said.
    fn pass_on(&self, event: ZdsEvent) {
        let (uid, command) = match event {
            ZdsEvent::Served { uid } => (uid, Command::Served),
            ZdsEvent::Refused { uid, reason } => (uid, Command::Refused(reason)),
        };
        let task = self.0.tasks.lock().get(&uid).cloned();
        if let Some(task) = task
            && task.try_send(command).is_err()
        {
            tracing::debug!(uid, "the pod's task is ending or busy");
        }
    }
}
