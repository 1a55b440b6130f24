//! The pods that this proxy serves: starting, replacing and stopping their listeners.
//!
//! `zds::client` says which; the data path asks [`LocalPods`] whether a workload is on this node.
//! A pod that can't be started is tried again until it can, is replaced or leaves.

mod listening;
mod pod;
pub mod sockets;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ambit_api::workload::zds::WorkloadInfo;
use ambit_directory::WorkloadUid;
use ambit_hbone::InFlight;
use ambit_identity::{CertificateError, SpiffeId, SpiffeIdError};
use ambit_net::{Netns, NetnsError, NetnsId, PROXY_MARK, SocketStock};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::outbound::ejections::EjectedEndpoints;
use crate::proxy::{Proxy, Worker};
use crate::zds::client::{PodDescriptors, PodSet};
use ambit_runtime::drain::Drain;
use ambit_runtime::shares::PodShares;
use ambit_runtime::workers::Workers;
pub use listening::accept_shortages;
use listening::{ListenerContext, ListenerTask};
pub use pod::Pod;
pub use sockets::Role;
use sockets::{PodSockets, SocketId, SocketsError};

/// First and longest pause between attempts to start serving a pod.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long HBONE connections are still accepted for a deleted pod: peers learn of the deletion a little later.
const LEAVE_GRACE: Duration = Duration::from_secs(10);

/// Descriptors that a served pod takes without a connection: its namespace, up to twelve listeners, connection tracking,
/// and some ready-made sockets.
const POD_DESCRIPTORS: u64 = 20;

/// Which workloads are pods of this node that we serve. Read per connection without a lock.
#[derive(Debug, Default)]
pub struct LocalPods {
    by_workload: ArcSwap<HashMap<WorkloadUid, Arc<Pod>>>,
}

impl LocalPods {
    /// The pod behind a workload, if we serve it.
    pub fn get(&self, workload: &WorkloadUid) -> Option<Arc<Pod>> {
        self.by_workload.load().get(workload).cloned()
    }

    /// All of them, for dumps.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.by_workload.load().values().cloned().collect()
    }

    fn publish(&self, pods: &HashMap<String, Entry>) {
        let mut served: Vec<&Served> = pods
            .values()
            .filter_map(|entry| match entry {
                Entry::Served(served) => Some(served),
                Entry::Failed { .. } => None,
            })
            .collect();
        // A pod that is made again under its name has another uid: until the former one leaves, the later counts.
        served.sort_by_key(|served| served.number);
        let named = served.iter().map(|served| (served.pod.workload.clone(), served.pod.clone()));
        self.by_workload.store(Arc::new(named.collect()));
    }
}

/// Why a pod can't be served.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The descriptor is not of a network namespace.
    #[error("pod {uid}: {source}")]
    Netns {
        /// The pod.
        uid: String,
        /// What is wrong.
        source: NetnsError,
    },
    /// Namespace and service account do not form an identity.
    #[error("pod {uid} has no possible identity: {source}")]
    Identity {
        /// The pod.
        uid: String,
        /// What is wrong.
        source: SpiffeIdError,
    },
    /// Its listeners can't be created or taken over.
    #[error("pod {uid}: {source}")]
    Sockets {
        /// The pod.
        uid: String,
        /// What is wrong.
        source: SocketsError,
    },
    /// There are too many identities.
    #[error("pod {uid}: {source}")]
    Certificate {
        /// The pod.
        uid: String,
        /// What is wrong.
        source: CertificateError,
    },
    /// The agent asks to keep a pod that is not served.
    #[error("pod {uid} is not served here")]
    Unknown {
        /// The pod.
        uid: String,
    },
}

/// The node agent's request to serve a pod, kept so that a failed start can be retried.
#[derive(Debug)]
struct PodRequest {
    uid: String,
    info: WorkloadInfo,
    netns: Netns,
    listeners: Vec<(ambit_api::workload::zds::Listener, std::os::fd::OwnedFd)>,
}

#[derive(Debug)]
struct Served {
    /// Grows with each start.
    number: u64,
    pod: Arc<Pod>,
    netns: NetnsId,
    listening: HashMap<SocketId, (Role, ListenerTask)>,
}

#[derive(Debug)]
enum Entry {
    Served(Served),
    /// Being retried. A later entry of the same uid ends the retries of this one.
    Failed {
        attempt: u64,
    },
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<String, Entry>,
    attempts: u64,
}

impl Table {
    fn holds(&self, uid: &str, attempt: u64) -> bool {
        matches!(self.entries.get(uid), Some(Entry::Failed { attempt: held }) if *held == attempt)
    }
}

/// The set of pods. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Pods(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    proxy: Arc<Proxy>,
    workers: Arc<Workers<Worker>>,
    drain: Drain,
    /// Guards the set; held for map operations only, sockets are made outside.
    table: Mutex<Table>,
    runtime: tokio::runtime::Handle,
}

impl Pods {
    /// An empty set. Must be called on the control runtime, where retries will run.
    pub fn new(proxy: Arc<Proxy>, workers: Arc<Workers<Worker>>, drain: Drain) -> Self {
        let runtime = tokio::runtime::Handle::current();
        Self(Arc::new(Inner { proxy, workers, drain, table: Mutex::default(), runtime }))
    }

    /// Creates the pod's sockets and starts accepting, instead of what was served under its uid. An `attempt` is dropped
    /// if the pod was deleted or added again meanwhile.
    async fn start(&self, request: &PodRequest, attempt: Option<u64>) -> Result<(), PodError> {
        let pod = self.pod(request)?;
        let (sockets, is_shared) = self.sockets(request).await?;
        let mut table = self.0.table.lock();
        if attempt.is_some_and(|attempt| !table.holds(&request.uid, attempt)) {
            return Ok(());
        }
        let listening = self.listen(&pod, sockets, is_shared);
        table.attempts += 1;
        let served = Served { number: table.attempts, pod, netns: request.netns.id(), listening };
        let previous = table.entries.insert(request.uid.clone(), Entry::Served(served));
        self.0.proxy.local.publish(&table.entries);
        drop(table);
        if let Some(Entry::Served(previous)) = previous {
            self.retire(previous);
        }
        Ok(())
    }

    fn pod(&self, request: &PodRequest) -> Result<Arc<Pod>, PodError> {
        let PodRequest { uid, info, netns, .. } = request;
        let settings = &self.0.proxy.settings;
        let identity = SpiffeId::new(settings.trust_domain.as_str(), &info.namespace, &info.service_account)
            .map_err(|source| PodError::Identity { uid: uid.clone(), source })?;
        let certificates = self.0.proxy.certificates.clone();
        certificates
            .prefetch(&identity)
            .map_err(|source| PodError::Certificate { uid: uid.clone(), source })?;
        let workload = WorkloadUid::of_pod(&settings.cluster_id, &info.namespace, &info.name);
        let stock = SocketStock::new(netns.clone(), Some(PROXY_MARK));
        let (uid, shares): (Arc<str>, _) = (uid.as_str().into(), PodShares::default());
        let whereabouts = (info.namespace.as_str(), &*settings.network);
        Ok(Arc::new(Pod {
            dns: self.0.proxy.dns.client(&uid, shares.outbound(), whereabouts, stock.clone()),
            uid,
            netns: netns.id(),
            info: info.clone(),
            identity,
            pinned: self.0.proxy.on_demand.as_ref().map(|on_demand| on_demand.pin(workload.as_str())),
            workload,
            stock,
            certificates,
            shares,
            ejected: EjectedEndpoints::default(),
            _descriptors: self.0.proxy.shares.descriptors.reserve(POD_DESCRIPTORS),
            left: watch::Sender::new(false),
        }))
    }

    async fn sockets(&self, request: &PodRequest) -> Result<(PodSockets, bool), PodError> {
        let wanted = self.0.proxy.settings.listeners;
        let wrong = |source| PodError::Sockets { uid: request.uid.clone(), source };
        if request.listeners.is_empty() {
            return Ok((sockets::own(&request.netns, wanted).await.map_err(wrong)?, false));
        }
        let passed = sockets::passed(&request.listeners, wanted).map_err(wrong)?;
        if wanted.socks5 && !passed.tcp.iter().any(|(role, _)| *role == Role::Socks5) {
            tracing::warn!(
                pod = request.uid,
                "no SOCKS5: the node agent binds the listeners, but not this one"
            );
        }
        Ok((passed, true))
    }

    fn listen(
        &self,
        pod: &Arc<Pod>,
        sockets: PodSockets,
        is_shared: bool,
    ) -> HashMap<SocketId, (Role, ListenerTask)> {
        let mut listening = HashMap::new();
        let context = |role| ListenerContext {
            pod: pod.clone(),
            role,
            is_shared,
            proxy: self.0.proxy.clone(),
            workers: self.0.workers.clone(),
            drain: self.0.drain.clone(),
        };
        let unusable = |error| tracing::error!(pod = pod.uid(), %error, "a listener can't be used");
        for (role, listener) in sockets.tcp {
            let Some(handle) = self.0.workers.in_turn() else { continue };
            match sockets::socket_id(&listener) {
                Ok(id) => {
                    let task = listening::start(context(role), handle, listener);
                    drop(listening.insert(id, (role, task)));
                }
                Err(error) => unusable(error),
            }
        }
        for socket in sockets.dns_udp {
            let Some(handle) = self.0.workers.in_turn() else { continue };
            match sockets::socket_id(&socket) {
                Ok(id) => {
                    let task = listening::start_udp(context(Role::Dns), handle, socket);
                    drop(listening.insert(id, (Role::Dns, task)));
                }
                Err(error) => unusable(error),
            }
        }
        listening
    }

    /// Takes over the listeners that a restarted agent passes for a pod that is already served.
    fn adopt(&self, served: &mut Served, request: &PodRequest) -> Result<(), PodError> {
        if request.listeners.is_empty() {
            return Ok(());
        }
        let wrong = |source| PodError::Sockets { uid: request.uid.clone(), source };
        let mut sockets =
            sockets::passed(&request.listeners, self.0.proxy.settings.listeners).map_err(wrong)?;
        let mut passed = HashSet::new();
        let mut is_fresh = |id: std::io::Result<SocketId>| {
            id.is_ok_and(|id| passed.insert(id) && !served.listening.contains_key(&id))
        };
        sockets.tcp.retain(|(_, listener)| is_fresh(sockets::socket_id(listener)));
        sockets.dns_udp.retain(|socket| is_fresh(sockets::socket_id(socket)));
        let fresh = self.listen(&served.pod, sockets, true);
        served.listening.retain(|id, (_, listening)| {
            let stays = passed.contains(id);
            if !stays {
                listening.stop();
            }
            stays
        });
        served.listening.extend(fresh);
        Ok(())
    }

    /// Stops accepting for a deleted pod; HBONE a little later than the rest.
    fn retire(&self, served: Served) {
        let (inbound, rest): (Vec<_>, Vec<_>) =
            served.listening.into_values().partition(|(role, _)| *role == Role::Inbound);
        for (_, listening) in rest {
            listening.stop();
        }
        let pod = served.pod;
        let pods = self.clone();
        self.0.runtime.spawn(async move {
            tokio::time::sleep(LEAVE_GRACE).await;
            pod.left.send_replace(true);
            drop(inbound);
            pods.evict(&pod);
        });
    }

    /// Evicts the pod's connections from all pools; open tunnels finish. Called after the grace time: a connection that was
    /// accepted just before may still wait for its tunnel.
    fn evict(&self, pod: &Pod) {
        if let Some(Entry::Served(served)) = self.0.table.lock().entries.get(&*pod.uid)
            && served.netns == pod.netns
        {
            // It came again in the same namespace, and uses them.
            return;
        }
        for worker in self.0.workers.states() {
            worker.pool.evict(|key| key.origin == pod.uid && key.netns == pod.netns, InFlight::Finish);
        }
    }

    /// Retries a failed start until it succeeds or there is another request for the pod.
    fn retry(&self, request: PodRequest, attempt: u64) {
        let pods = self.clone();
        self.0.runtime.spawn(async move {
            let mut pause = RETRY.0;
            loop {
                tokio::time::sleep(pause).await;
                if !pods.0.table.lock().holds(&request.uid, attempt) {
                    return;
                }
                match pods.start(&request, Some(attempt)).await {
                    Ok(()) => return tracing::info!(pod = request.uid, "the pod is served now"),
                    Err(error) => tracing::warn!(%error, "the pod still can't be served"),
                }
                pause = (pause * 2).min(RETRY.1);
            }
        });
    }

    /// Whether the pod is served already, in the same namespace and as the same workload; if so, with
    /// the listeners of this request from now on.
    fn continues(&self, request: &PodRequest) -> Option<Result<(), PodError>> {
        let mut table = self.0.table.lock();
        match table.entries.get_mut(&request.uid) {
            Some(Entry::Served(served))
                if served.netns == request.netns.id() && served.pod.info == request.info =>
            {
                Some(self.adopt(served, request))
            }
            _ => None,
        }
    }

    fn remove(&self, leaves: impl Fn(&str) -> bool) {
        let mut table = self.0.table.lock();
        let gone: Vec<String> = table.entries.keys().filter(|uid| leaves(uid)).cloned().collect();
        let removed: Vec<Entry> = gone.iter().filter_map(|uid| table.entries.remove(uid)).collect();
        if removed.is_empty() {
            return;
        }
        self.0.proxy.local.publish(&table.entries);
        drop(table);
        for entry in removed {
            if let Entry::Served(served) = entry {
                tracing::info!(pod = served.pod.uid(), workload = %served.pod.workload, "the pod left");
                self.retire(served);
            }
        }
    }

    /// How many pods are served, and how many wait for a retry.
    pub fn counts(&self) -> (usize, usize) {
        let table = self.0.table.lock();
        let served = table.entries.values().filter(|e| matches!(e, Entry::Served(_))).count();
        (served, table.entries.len() - served)
    }
}

impl PodSet for Pods {
    async fn add(&self, uid: String, info: WorkloadInfo, with: PodDescriptors) -> Result<(), String> {
        let PodDescriptors { netns, listeners } = with;
        let netns = Netns::from_fd(netns)
            .map_err(|source| PodError::Netns { uid: uid.clone(), source }.to_string())?;
        let request = PodRequest { uid, info, netns, listeners };
        let result = match self.continues(&request) {
            Some(result) => return result.map_err(|error| error.to_string()),
            None => self.start(&request, None).await,
        };
        match result {
            Ok(()) => {
                tracing::info!(
                    pod = request.uid,
                    name = request.info.name,
                    namespace = request.info.namespace,
                    "serving"
                );
                Ok(())
            }
            Err(error) => {
                let attempt = {
                    let mut table = self.0.table.lock();
                    table.attempts += 1;
                    let attempt = table.attempts;
                    let previous = table.entries.insert(request.uid.clone(), Entry::Failed { attempt });
                    self.0.proxy.local.publish(&table.entries);
                    if let Some(Entry::Served(previous)) = previous {
                        self.retire(previous);
                    }
                    attempt
                };
                self.retry(request, attempt);
                Err(error.to_string())
            }
        }
    }

    async fn keep(&self, uid: &str) -> Result<(), String> {
        match self.0.table.lock().entries.get(uid) {
            Some(Entry::Served(_)) => Ok(()),
            _ => Err(PodError::Unknown { uid: uid.to_owned() }.to_string()),
        }
    }

    async fn delete(&self, uid: &str) {
        self.remove(|other| other == uid);
    }

    async fn retain(&self, uids: &HashSet<String>) {
        self.remove(|uid| !uids.contains(uid));
    }
}
