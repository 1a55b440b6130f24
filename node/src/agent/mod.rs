//! The agent: enrols and unenrols pods, with everything that belongs to it.
//!
//! A source of pods (the API server, the CNI plugin, `local`) calls [`Agent::reconcile`] with all pods that are to be
//! enrolled, and [`Agent::enrol`], [`Agent::unenrol`] and [`Agent::remove_pod`] for single ones. The agent programs
//! redirection, keeps the registry, binds listeners and informs the node proxy, which it serves from the first
//! reconciliation on. Each pod has a task of its own (`pod`), so that one slow namespace delays nobody and the steps of
//! one pod never overlap. The agent does not decide which pods are enrolled: see [`enrol`](crate::enrol).

mod driver;
mod error;
mod leaving;
mod metrics;
mod pod;
mod reconcile;
mod search;
mod status;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ambit_net::{Netns, NetnsId};
use ambit_telemetry::Registry as MetricsRegistry;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::capabilities::{self, Weakness};
use crate::discovery::{self, Discovery};
use crate::listeners::ListenerHolder;
use crate::probes::ProbeRules;
use crate::redirect::Options;
use crate::registry::Registry;
use crate::zds::{ServedPods, Server, Times};
use driver::Driver;
pub use error::{AgentError, ErrorKind};
use metrics::Metrics;
use pod::{Command, PodTask};
pub use reconcile::Reconciled;
pub use status::{Health, PodState, PodStatus, StatusEvent};

/// Status events that a slow subscriber may be behind; beyond, it reads [`Agent::statuses`] again.
const EVENTS: usize = 1024;
/// Commands that may wait for one pod's task.
const COMMANDS: usize = 16;
/// Pods that are enrolled or verified at a time.
const CONCURRENCY: usize = 16;
/// Attempts to reach a pod's task that is just ending.
const ATTEMPTS: usize = 4;

/// The agent's settings.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The unix socket that node proxies dial.
    pub zds_socket: PathBuf,
    /// The directory of the registry.
    pub registry: PathBuf,
    /// The host's network namespace, of which no pod is enrolled: that of process 1 of the host.
    pub host_netns: PathBuf,
    /// The user whose connections from the host's namespace to enrolled pods are kubelet's probes. `None`: the host's
    /// namespace gets no rules, and probes are captured as all connections.
    pub kubelet_uid: Option<u32>,
    /// Where namespaces are looked for: those of pods that come without, and those that carry our rules and belong to
    /// no pod, which are cleaned. By default nowhere. An agent that looks at all processes must be the only one.
    pub discovery: Discovery,
    /// How long pods' listeners are held open without a proxy; then connections are refused.
    pub hold_for: Duration,
    /// How long a node proxy that connects, and is not ready before, waits for the predecessor that holds the listeners of
    /// pods and has yet to come back to this agent.
    pub handover: Duration,
    /// How long a leaving pod is served at least: peers learn only after a while that it left, and tunnel to it until
    /// then.
    pub leave_grace: Duration,
    /// How long a leaving pod's tunnelled connections may live on; then they are closed.
    pub leave_timeout: Duration,
    /// Time between two verifications of every pod's redirection.
    pub repair_interval: Duration,
}

impl AgentConfig {
    /// The defaults of the ZDS contract, with the given socket and registry.
    pub fn new(zds_socket: impl Into<PathBuf>, registry: impl Into<PathBuf>) -> Self {
        Self {
            zds_socket: zds_socket.into(),
            registry: registry.into(),
            host_netns: "/proc/1/ns/net".into(),
            kubelet_uid: None,
            discovery: Discovery::default(),
            hold_for: Duration::from_secs(30),
            handover: Duration::from_secs(10),
            leave_grace: Duration::from_secs(5),
            leave_timeout: Duration::from_secs(600),
            repair_interval: Duration::from_secs(60),
        }
    }
}

/// A pod that is to be enrolled.
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
    /// Its network namespace. `None`: the one that the agent knows, else it is looked for by the addresses.
    pub netns: Option<Netns>,
    /// Where the namespace can be opened again after a restart of the agent.
    pub netns_path: Option<PathBuf>,
    /// The id of its sandbox, as the container runtime gives it to the CNI plugin.
    pub sandbox: Option<String>,
    /// Its capture options.
    pub options: Options,
}

/// The handle. Cloning shares the agent.
#[derive(Debug, Clone)]
pub struct Agent(Arc<Shared>);

/// What the handle and the pods' tasks share. Each lock guards the map it wraps for the length of a look-up.
#[derive(Debug)]
struct Shared {
    config: AgentConfig,
    /// Namespaces that are never a pod's: the host's and the agent's own.
    host_netns: HashSet<NetnsId>,
    registry: Registry,
    listeners: ListenerHolder,
    probes: ProbeRules,
    served: ServedPods,
    tasks: Mutex<HashMap<String, mpsc::Sender<Command>>>,
    statuses: Mutex<BTreeMap<String, PodStatus>>,
    /// Who uses a namespace: a pod's uid, or [`reconcile::CLEANUP`].
    claims: Mutex<HashMap<NetnsId, String>>,
    /// Pods whose record could not be read, until they are enrolled again.
    unreadable: Mutex<HashSet<String>>,
    /// Limits how many enrolments run at a time.
    enrolling: Semaphore,
    /// Has one reconciliation run at a time.
    reconciling: Semaphore,
    events: broadcast::Sender<StatusEvent>,
    spawn: mpsc::Sender<PodTask>,
    reconciled: watch::Sender<bool>,
    /// Whether node proxies are served.
    serving: watch::Sender<bool>,
    weaknesses: Vec<Weakness>,
    metrics: Metrics,
}

impl Agent {
    /// Starts an agent: the handle, and the future that drives it. The future never ends by itself; when it is dropped
    /// everything stops, and rules in pods stay. Pods of the registry are taken up again.
    pub async fn start(
        config: AgentConfig,
    ) -> Result<(Self, impl Future<Output = ()> + Send + use<>), AgentError> {
        let registry = Registry::open(&config.registry)?;
        let loaded = registry.load()?;
        let mut weaknesses = capabilities::probe().await;
        let mut host_netns = HashSet::from([Netns::current()?.id()]);
        let mut host = None;
        match Netns::open(&config.host_netns) {
            Ok(netns) => {
                host_netns.insert(netns.id());
                host = config.kubelet_uid.map(|uid| (netns, uid));
            }
            Err(error) => weaknesses.push(capabilities::host_unknown(&error)),
        }
        let addresses = loaded.records.iter().map(|record| (record.uid.clone(), record.ips.clone()));
        let (probes, keeping) = ProbeRules::new(host, addresses.collect());
        for weakness in &weaknesses {
            tracing::warn!("{weakness}");
        }
        let (listeners, holding) = ListenerHolder::new();
        let (zds_events, happened) = mpsc::channel(EVENTS);
        let times = Times { hold_for: config.hold_for, handover: config.handover };
        let server = Server::bind(&config.zds_socket, listeners.clone(), times, zds_events)?;
        let (spawn, to_spawn) = mpsc::channel(EVENTS);
        let agent = Self(Arc::new(Shared {
            host_netns,
            registry,
            listeners,
            probes,
            served: server.pods(),
            tasks: Mutex::default(),
            statuses: Mutex::default(),
            claims: Mutex::default(),
            unreadable: Mutex::default(),
            enrolling: Semaphore::new(CONCURRENCY),
            reconciling: Semaphore::new(1),
            events: broadcast::channel(EVENTS).0,
            spawn,
            reconciled: watch::Sender::new(false),
            serving: watch::Sender::new(false),
            weaknesses,
            metrics: Metrics::default(),
            config,
        }));
        let restored = agent.restore(loaded).await;
        let driver = Driver { agent: agent.clone(), to_spawn, happened, restored };
        Ok((agent, driver.run(server, holding, keeping)))
    }

    /// Enrols a pod, or renews its enrolment: verifies the namespace, writes the registry, binds listeners, puts the
    /// rules in, informs the proxy. Returns when the rules are in; [`wait_enabled`](Self::wait_enabled) waits for the
    /// proxy.
    ///
    /// # Errors
    /// Nothing is left in a pod whose first enrolment fails. One that was enrolled before stays captured.
    pub async fn enrol(&self, spec: PodSpec) -> Result<(), AgentError> {
        let uid = spec.uid.clone();
        self.command(&uid, |answer| Command::Enrol(Box::new(spec.clone()), answer)).await?
    }

    /// Unenrols a running pod. Returns when nothing new is redirected; what is tunnelled goes on until it ends, or for
    /// the leave timeout, and then the rest is removed.
    ///
    /// # Errors
    /// [`AgentError::NotEnrolled`] and [`AgentError::NamespaceNotFound`] when there is no namespace to remove rules
    /// from; [`cleanup`](Self::cleanup) takes one.
    pub async fn unenrol(&self, uid: &str) -> Result<(), AgentError> {
        if !self.0.tasks.lock().contains_key(uid) {
            return Err(AgentError::NotEnrolled { uid: uid.into() });
        }
        self.command(uid, Command::Leave).await?
    }

    /// A pod's sandbox has ended, and its namespace with it: the proxy is informed, listeners are closed. The rules
    /// stay in whatever is left of the namespace. Does nothing when the pod is in another sandbox by now. Without a
    /// `sandbox` the pod itself has ended.
    pub async fn remove_pod(&self, uid: &str, sandbox: Option<&str>) -> Result<(), AgentError> {
        let sandbox = sandbox.map(String::from);
        self.command(uid, |answer| Command::Remove(sandbox.clone(), answer)).await?
    }

    /// A sandbox has ended: as [`remove_pod`](Self::remove_pod) for the pod that is in it, if one is.
    pub async fn remove_sandbox(&self, sandbox: &str) -> Result<(), AgentError> {
        let is_in = |status: &PodStatus| status.sandbox.as_deref() == Some(sandbox);
        let found = self.statuses().into_iter().find(|(_, status)| is_in(status));
        match found {
            Some((uid, _)) => self.remove_pod(&uid, Some(sandbox)).await,
            None => Ok(()),
        }
    }

    /// All sandboxes but these have ended. A pod in another one is removed once its namespace is gone too: a list of
    /// one network leaves out the pods of others.
    pub async fn collect(&self, valid: HashSet<String>) {
        let valid = Arc::new(valid);
        for uid in self.known() {
            let outcome = self.command(&uid, |answer| Command::Collect(Arc::clone(&valid), answer)).await;
            if let Err(error) = outcome.flatten() {
                tracing::warn!(uid, %error, "pod of an ended sandbox not removed");
            }
        }
    }

    /// The uids of the pods that have a task.
    fn known(&self) -> Vec<String> {
        self.0.tasks.lock().keys().cloned().collect()
    }

    /// Waits, for at most `limit`, until a proxy serves the pod. Returns whether one does.
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

    /// The status of a pod; `None` if it is not enrolled and not to be.
    pub fn status(&self, uid: &str) -> Option<PodStatus> {
        self.0.statuses.lock().get(uid).cloned()
    }

    /// The status of every pod that is enrolled or to be.
    pub fn statuses(&self) -> BTreeMap<String, PodStatus> {
        self.0.statuses.lock().clone()
    }

    /// Changes from now on. A receiver that lags reads [`statuses`](Self::statuses) again.
    pub fn events(&self) -> broadcast::Receiver<StatusEvent> {
        self.0.events.subscribe()
    }

    /// Waits until the first reconciliation is done.
    pub async fn wait_reconciled(&self) {
        // An agent that ended never reconciles.
        self.0.reconciled.subscribe().wait_for(|reconciled| *reconciled).await.ok();
    }

    /// Number of connected node proxies.
    pub fn proxies(&self) -> usize {
        self.0.served.proxies()
    }

    /// The agent's own state.
    pub fn health(&self) -> Health {
        let unserved = |status: &&PodStatus| matches!(status.state, PodState::Pending | PodState::Failed);
        Health {
            reconciled: *self.0.reconciled.borrow(),
            proxies: self.proxies(),
            unserved_pods: self.0.statuses.lock().values().filter(unserved).count(),
            weaknesses: self.0.weaknesses.clone(),
        }
    }

    /// Registers the agent's metrics.
    pub fn register_metrics(&self, registry: &MetricsRegistry) {
        metrics::register(&self.0, registry);
    }

    /// Sends a command to the pod's task, which is made if there is none, and waits for the answer.
    async fn command<T>(
        &self,
        uid: &str,
        command: impl Fn(oneshot::Sender<T>) -> Command,
    ) -> Result<T, AgentError> {
        for _ in 0..ATTEMPTS {
            let (commands, task) = self.0.task(uid, None);
            if let Some(task) = task {
                self.0.spawn.send(task).await.map_err(|_| AgentError::Ended)?;
            }
            let (answer, result) = oneshot::channel();
            if commands.send(command(answer)).await.is_ok()
                && let Ok(result) = result.await
            {
                return Ok(result);
            }
        }
        Err(AgentError::Ended)
    }
}

impl Shared {
    /// The way to a pod's task, and the task itself if it is new and has to be started.
    fn task(self: &Arc<Self>, uid: &str, pod: Option<pod::Pod>) -> (mpsc::Sender<Command>, Option<PodTask>) {
        let mut tasks = self.tasks.lock();
        if let Some(known) = tasks.get(uid) {
            return (known.clone(), None);
        }
        let (commands, queue) = mpsc::channel(COMMANDS);
        tasks.insert(uid.into(), commands.clone());
        (commands, Some(PodTask::new(Arc::clone(self), uid.into(), queue, pod)))
    }

    /// Publishes the status of a pod, if it differs.
    fn set_status(&self, uid: &str, status: PodStatus) {
        let changed = {
            let mut statuses = self.statuses.lock();
            let before = if status.state == PodState::Out {
                statuses.remove(uid)
            } else {
                statuses.insert(uid.into(), status.clone())
            };
            before.as_ref() != Some(&status)
        };
        if changed {
            // Nobody has to listen.
            self.events.send(StatusEvent { uid: uid.into(), status }).ok();
        }
    }

    /// Reserves a namespace for one user, so that no two change its rules at a time.
    fn claim(&self, netns: NetnsId, uid: &str, user: &str) -> Result<(), AgentError> {
        let mut claims = self.claims.lock();
        match claims.get(&netns) {
            Some(holder) if holder != user => {
                Err(AgentError::NamespaceTaken { uid: uid.into(), netns, holder: holder.clone() })
            }
            _ => {
                claims.insert(netns, user.into());
                Ok(())
            }
        }
    }

    /// Gives up the namespaces of `user`, but `except`.
    fn release_claims(&self, user: &str, except: Option<NetnsId>) {
        self.claims.lock().retain(|netns, holder| holder != user || Some(*netns) == except);
    }

    /// Looks for the pod's namespace.
    async fn find_namespace(&self, pod: &PodSpec) -> Result<discovery::Found, AgentError> {
        let known = self.config.discovery.addresses(&self.host_netns).await;
        let uid = || pod.uid.clone();
        let found = discovery::of_pod(&known, &pod.uid, &pod.ips)
            .map_err(|source| AgentError::Ambiguous { uid: uid(), source })?;
        found.cloned().ok_or_else(|| AgentError::NamespaceNotFound { uid: uid() })
    }
}
