//! The pods that this proxy serves: starting, replacing and stopping their listeners.
//!
//! `zds::client` says which; the data path asks [`LocalPods`] whether a workload is on this node.
//! A pod that can't be started is tried again until it can, is replaced or leaves.

mod listening;
pub mod sockets;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ambit_api::workload::zds::WorkloadInfo;
use ambit_directory::WorkloadUid;
use ambit_hbone::InFlight;
use ambit_identity::{CertificateError, CertificateStore, SpiffeId, SpiffeIdError};
use ambit_net::{Netns, NetnsError, NetnsId, PROXY_MARK, SocketStock};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::drain::Drain;
use crate::ondemand::Pinned;
use crate::proxy::{Proxy, Worker};
use crate::shares::{PodShares, Taken};
use crate::workers::Workers;
use crate::zds::client::{PodDescriptors, PodSet};
pub use listening::accept_shortages;
use listening::{Listening, Post};
pub use sockets::Role;
use sockets::{PodSockets, SocketId, SocketsError};

/// First and longest pause between attempts to start a pod.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long HBONE connections are still taken for a pod that left: peers learn of it a little later.
const LEAVE_GRACE: Duration = Duration::from_secs(10);

/// Descriptors that a served pod takes without a connection: its namespace, up to twelve listeners, connection tracking,
/// and some ready-made sockets.
const POD_DESCRIPTORS: u64 = 20;

/// One pod: who it is and where its sockets are made. Lives as long as a connection of it does.
#[derive(Debug)]
pub struct Pod {
    uid: Arc<str>,
    info: WorkloadInfo,
    identity: SpiffeId,
    workload: WorkloadUid,
    /// Where resources come on demand: keeps the pod's own.
    pinned: Option<Pinned>,
    stock: SocketStock,
    certificates: CertificateStore,
    dns: Arc<crate::dns::Client>,
    shares: PodShares,
    /// For the pod's listeners and what else it costs without a connection.
    _descriptors: Taken,
    left: watch::Sender<bool>,
}

impl Pod {
    /// The pod's Kubernetes uid.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// As [`Pod::uid`], to keep.
    pub fn shared_uid(&self) -> &Arc<str> {
        &self.uid
    }

    /// Where resources come on demand: the pod's own.
    pub fn pinned(&self) -> Option<&Pinned> {
        self.pinned.as_ref()
    }

    /// Name, namespace and service account as the node agent gave them.
    pub fn info(&self) -> &WorkloadInfo {
        &self.info
    }

    /// Who the pod is on the wire.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// The pod's name in the directory.
    pub fn workload(&self) -> &WorkloadUid {
        &self.workload
    }

    /// The pod as one that asks DNS questions.
    pub fn dns(&self) -> &Arc<crate::dns::Client> {
        &self.dns
    }

    /// What the pod and its peers hold.
    pub fn shares(&self) -> &PodShares {
        &self.shares
    }

    /// Resolves when the pod has left and peers are to be told so.
    pub async fn leaving(&self) {
        // The sender lives as long as `self`.
        self.left.subscribe().wait_for(|left| *left).await.ok();
    }

    /// Sockets in the pod's namespace.
    pub fn stock(&self) -> &SocketStock {
        &self.stock
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.certificates.release(&self.identity);
    }
}

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
    /// The namespace's descriptor is none.
    #[error("pod {uid}: {source}")]
    Netns {
        /// The pod.
        uid: String,
        /// What is wrong.
        source: NetnsError,
    },
    /// Namespace and service account make no identity.
    #[error("pod {uid} has no possible identity: {source}")]
    Identity {
        /// The pod.
        uid: String,
        /// What is wrong.
        source: SpiffeIdError,
    },
    /// Its listeners can't be had.
    #[error("pod {uid}: {source}")]
    Sockets {
        /// The pod.
        uid: String,
        /// What is wrong.
        source: SocketsError,
    },
    /// No room for another identity.
    #[error("pod {uid}: {source}")]
    Certificate {
        /// The pod.
        uid: String,
        /// What is wrong.
        source: CertificateError,
    },
    /// The agent says to keep a pod that we don't have.
    #[error("pod {uid} is not served here")]
    Unknown {
        /// The pod.
        uid: String,
    },
}

/// What the agent said of a pod, kept so that a failed start can be repeated.
#[derive(Debug)]
struct Order {
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
    listening: HashMap<SocketId, (Role, Listening)>,
}

#[derive(Debug)]
enum Entry {
    Served(Served),
    /// Being retried; an entry made later under the same uid ends the retries of this one.
    Failed {
        ticket: u64,
    },
}

#[derive(Debug, Default)]
struct Table {
    entries: HashMap<String, Entry>,
    tickets: u64,
}

impl Table {
    fn holds(&self, uid: &str, ticket: u64) -> bool {
        matches!(self.entries.get(uid), Some(Entry::Failed { ticket: held }) if *held == ticket)
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

    /// Makes the pod's sockets and starts accepting; replaces what was served under its uid.
    /// With a ticket only if its retry still stands: the pod may have left or come again meanwhile.
    async fn start(&self, order: &Order, ticket: Option<u64>) -> Result<(), PodError> {
        let pod = self.pod(order)?;
        let (sockets, is_shared) = self.sockets(order).await?;
        let mut table = self.0.table.lock();
        if ticket.is_some_and(|ticket| !table.holds(&order.uid, ticket)) {
            return Ok(());
        }
        let listening = self.listen(&pod, sockets, is_shared);
        table.tickets += 1;
        let served = Served { number: table.tickets, pod, netns: order.netns.id(), listening };
        let previous = table.entries.insert(order.uid.clone(), Entry::Served(served));
        self.0.proxy.local.publish(&table.entries);
        drop(table);
        if let Some(Entry::Served(previous)) = previous {
            self.retire(previous);
        }
        Ok(())
    }

    fn pod(&self, order: &Order) -> Result<Arc<Pod>, PodError> {
        let Order { uid, info, netns, .. } = order;
        let settings = &self.0.proxy.settings;
        let identity = SpiffeId::new(settings.trust_domain.as_str(), &info.namespace, &info.service_account)
            .map_err(|source| PodError::Identity { uid: uid.clone(), source })?;
        let certificates = self.0.proxy.certificates.clone();
        certificates
            .prefetch(&identity)
            .map_err(|source| PodError::Certificate { uid: uid.clone(), source })?;
        let workload = WorkloadUid::of_pod(&settings.cluster_id, &info.namespace, &info.name);
        let stock = SocketStock::new(netns.clone(), Some(PROXY_MARK));
        Ok(Arc::new(Pod {
            uid: uid.as_str().into(),
            info: info.clone(),
            identity,
            pinned: self.0.proxy.demander.as_ref().map(|demander| demander.pin(workload.as_str())),
            workload,
            dns: self.0.proxy.dns.client(&info.namespace, &settings.network, stock.clone()),
            stock,
            certificates,
            shares: PodShares::default(),
            _descriptors: self.0.proxy.shares.descriptors.reserve(POD_DESCRIPTORS),
            left: watch::Sender::new(false),
        }))
    }

    async fn sockets(&self, order: &Order) -> Result<(PodSockets, bool), PodError> {
        let wanted = self.0.proxy.settings.listeners;
        let wrong = |source| PodError::Sockets { uid: order.uid.clone(), source };
        if order.listeners.is_empty() {
            return Ok((sockets::own(&order.netns, wanted).await.map_err(wrong)?, false));
        }
        let passed = sockets::passed(&order.listeners, wanted).map_err(wrong)?;
        if wanted.socks5 && !passed.tcp.iter().any(|(role, _)| *role == Role::Socks5) {
            tracing::warn!(
                pod = order.uid,
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
    ) -> HashMap<SocketId, (Role, Listening)> {
        let mut listening = HashMap::new();
        let post = |role| Post {
            pod: pod.clone(),
            role,
            is_shared,
            proxy: self.0.proxy.clone(),
            workers: self.0.workers.clone(),
            drain: self.0.drain.clone(),
        };
        let unusable = |error| tracing::error!(pod = pod.uid(), %error, "a listener can't be used");
        for (role, listener) in sockets.tcp {
            let Some(seat) = self.0.workers.next_seat() else { continue };
            match sockets::socket_id(&listener) {
                Ok(id) => drop(listening.insert(id, (role, listening::start(post(role), seat, listener)))),
                Err(error) => unusable(error),
            }
        }
        for socket in sockets.dns_udp {
            let Some(seat) = self.0.workers.next_seat() else { continue };
            match sockets::socket_id(&socket) {
                Ok(id) => {
                    let task = listening::start_udp(post(Role::Dns), seat, socket);
                    drop(listening.insert(id, (Role::Dns, task)));
                }
                Err(error) => unusable(error),
            }
        }
        listening
    }

    /// Takes over listeners that a restarted agent passes for a pod that is served already.
    fn adopt(&self, served: &mut Served, order: &Order) -> Result<(), PodError> {
        if order.listeners.is_empty() {
            return Ok(());
        }
        let wrong = |source| PodError::Sockets { uid: order.uid.clone(), source };
        let mut sockets =
            sockets::passed(&order.listeners, self.0.proxy.settings.listeners).map_err(wrong)?;
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

    /// Ends accepting for a pod that left; HBONE a little later than the rest.
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
            pods.evict(&pod.uid);
        });
    }

    /// Takes the tunnels that were made for a pod out of all pools; those in use finish. Not before the
    /// grace is over: a connection that was accepted just before may still be waiting for its tunnel.
    fn evict(&self, uid: &str) {
        if self.0.table.lock().entries.contains_key(uid) {
            // It came again under its uid, and uses them.
            return;
        }
        for worker in self.0.workers.states() {
            worker.pool.evict(|key| &*key.origin == uid, InFlight::Finish);
        }
    }

    /// Repeats a failed start until it works or another order for the pod came.
    fn retry(&self, order: Order, ticket: u64) {
        let pods = self.clone();
        self.0.runtime.spawn(async move {
            let mut pause = RETRY.0;
            loop {
                tokio::time::sleep(pause).await;
                if !pods.0.table.lock().holds(&order.uid, ticket) {
                    return;
                }
                match pods.start(&order, Some(ticket)).await {
                    Ok(()) => return tracing::info!(pod = order.uid, "the pod is served now"),
                    Err(error) => tracing::warn!(%error, "the pod still can't be served"),
                }
                pause = (pause * 2).min(RETRY.1);
            }
        });
    }

    /// Whether the pod is served already, in the same namespace and as the same workload; if so, with
    /// the listeners of this order from now on.
    fn continues(&self, order: &Order) -> Option<Result<(), PodError>> {
        let mut table = self.0.table.lock();
        match table.entries.get_mut(&order.uid) {
            Some(Entry::Served(served))
                if served.netns == order.netns.id() && served.pod.info == order.info =>
            {
                Some(self.adopt(served, order))
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
        let order = Order { uid, info, netns, listeners };
        let result = match self.continues(&order) {
            Some(result) => return result.map_err(|error| error.to_string()),
            None => self.start(&order, None).await,
        };
        match result {
            Ok(()) => {
                tracing::info!(
                    pod = order.uid,
                    name = order.info.name,
                    namespace = order.info.namespace,
                    "serving"
                );
                Ok(())
            }
            Err(error) => {
                let ticket = {
                    let mut table = self.0.table.lock();
                    table.tickets += 1;
                    let ticket = table.tickets;
                    let previous = table.entries.insert(order.uid.clone(), Entry::Failed { ticket });
                    self.0.proxy.local.publish(&table.entries);
                    if let Some(Entry::Served(previous)) = previous {
                        self.retire(previous);
                    }
                    ticket
                };
                self.retry(order, ticket);
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
