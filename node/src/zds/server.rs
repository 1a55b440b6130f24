//! The unix socket that node proxies dial, and the session with each of them.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ambit_api::workload::zds::WorkloadInfo;
use ambit_net::seqpacket::{SeqPacket, SeqPacketListener};
use ambit_net::{Netns, NetnsError};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::hub::{Hub, Next, Order, ProxyId, Unsendable, Version};
use super::message::{MAX_PACKET, MessageError, Request, decode_hello, decode_response, encode_request};
use crate::listeners::{ListenerHolder, Listeners};
use crate::redirect::Options;

/// How long a proxy may take to say hello.
const HELLO: Duration = Duration::from_secs(10);
/// How long a proxy may take for an answer: starting a pod's proxy includes its first certificate.
const ANSWER: Duration = Duration::from_secs(60);
/// Proxies that may be connected at a time: two during an upgrade, and what is left of dying ones.
const MAX_PROXIES: usize = 8;
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
#[error("ZDS socket {}: {source}", path.display())]
pub struct ZdsError {
    /// The socket.
    pub path: PathBuf,
    /// The system's answer.
    pub source: io::Error,
}

/// Why a session with a proxy ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{attempt}: {source}")]
    Socket { attempt: &'static str, source: io::Error },
    #[error("no {0} in time")]
    Late(&'static str),
    #[error("{0}")]
    Message(#[from] MessageError),
    #[error("it spoke out of turn")]
    OutOfTurn,
    #[error("it closed the connection")]
    Closed,
}

/// What happened to a pod at a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ZdsEvent {
    /// A proxy serves the pod.
    Served {
        /// The pod.
        uid: String,
    },
    /// A proxy could not start serving the pod; it will be asked again.
    Refused {
        /// The pod.
        uid: String,
        /// The proxy's reason.
        reason: String,
    },
}

/// What is sent to a proxy of a pod.
#[derive(Debug, Clone)]
pub struct ServedPod {
    /// Name, namespace and service account.
    pub info: WorkloadInfo,
    /// Its network namespace; `None` if the descriptor was lost with a restart.
    pub netns: Option<Netns>,
    /// What it asked for.
    pub options: Options,
}

#[derive(Debug, Default)]
struct State {
    hub: Hub,
    pods: HashMap<String, ServedPod>,
    pids: HashMap<ProxyId, i32>,
    /// Whether listeners were given up: nobody came for them, or the last who came binds its own.
    unwanted: bool,
}

/// The pods to be served: the agent's side of the server. Cloning shares.
///
/// The lock guards pods and proxies together for the length of a look-up; no call in it waits.
#[derive(Debug, Clone)]
pub struct ServedPods {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

impl ServedPods {
    fn new() -> Self {
        Self { state: Arc::default(), changed: watch::Sender::new(0) }
    }

    /// Has a pod served. One that is served already is replaced if its namespace, its name or its
    /// options differ.
    pub fn upsert(&self, uid: &str, pod: ServedPod) {
        let mut state = self.state.lock();
        let netns = pod.netns.as_ref().map(Netns::id);
        let same = state.pods.get(uid).is_some_and(|known| {
            known.netns.as_ref().map(Netns::id) == netns
                && known.info == pod.info
                && known.options == pod.options
        });
        if same {
            return;
        }
        let revision = *self.changed.borrow() + 1;
        state.hub.upsert(uid, Version { netns, revision });
        state.pods.insert(uid.into(), pod);
        drop(state);
        self.wake();
    }

    /// Has a pod kept by proxies that serve it, where nothing else is known of it.
    pub fn keep(&self, uid: &str) {
        let mut state = self.state.lock();
        if state.hub.contains(uid) {
            return;
        }
        let revision = *self.changed.borrow() + 1;
        state.hub.upsert(uid, Version { netns: None, revision });
        drop(state);
        self.wake();
    }

    /// Ends the serving of a pod.
    pub fn delete(&self, uid: &str) {
        let mut state = self.state.lock();
        state.hub.delete(uid);
        state.pods.remove(uid);
        drop(state);
        self.wake();
    }

    /// Whether a proxy serves the pod as it is now.
    pub fn is_served(&self, uid: &str) -> bool {
        self.state.lock().hub.is_served(uid)
    }

    /// Proxies that are connected.
    pub fn proxies(&self) -> usize {
        self.state.lock().hub.proxies()
    }

    /// Waits, for at most `limit`, until no proxy knows the pod any more. Says whether that is so.
    pub async fn forgotten(&self, uid: &str, limit: Duration) -> bool {
        let mut changes = self.changed.subscribe();
        timeout(limit, async {
            while self.state.lock().hub.is_known(uid) {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        })
        .await
        .is_ok()
    }

    /// The processes that may hold passed listeners; `None` when listeners are not to be bound now.
    pub(crate) fn takers_of_listeners(&self) -> Option<Vec<i32>> {
        let state = self.state.lock();
        (!state.unwanted).then(|| state.pids.values().copied().collect())
    }

    /// Says whether listeners are wanted from now on.
    fn want_listeners(&self, wanted: bool) {
        self.state.lock().unwanted = !wanted;
    }

    fn wake(&self) {
        self.changed.send_modify(|version| *version += 1);
    }
}

/// The server; [`run`](Self::run) drives it.
#[derive(Debug)]
pub struct Server {
    listener: SeqPacketListener,
    pods: ServedPods,
    listeners: ListenerHolder,
    times: Times,
    events: mpsc::Sender<ZdsEvent>,
}

/// How long the server waits for proxies.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Without a proxy for this long, the pods' listeners are closed.
    pub hold_for: Duration,
    /// How long a proxy's snapshot waits for listeners that another process holds.
    pub handover: Duration,
}

impl Server {
    /// Listens at `path`. Events that nobody takes hold the sessions up.
    pub fn bind(
        path: &Path,
        listeners: ListenerHolder,
        times: Times,
        events: mpsc::Sender<ZdsEvent>,
    ) -> Result<Self, ZdsError> {
        let listener =
            SeqPacketListener::bind(path).map_err(|source| ZdsError { path: path.into(), source })?;
        Ok(Self { listener, pods: ServedPods::new(), listeners, times, events })
    }

    /// The pods to be served.
    pub fn pods(&self) -> ServedPods {
        self.pods.clone()
    }

    /// Serves until dropped, from the moment on that `open` is true. Proxies that connect before wait.
    pub async fn run(self, mut open: watch::Receiver<bool>) {
        if open.wait_for(|open| *open).await.is_err() {
            return;
        }
        let mut sessions = JoinSet::new();
        let mut alone_since = Some(Instant::now());
        let mut released = false;
        loop {
            let close_at = alone_since.map(|since| since + self.times.hold_for);
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok(_) if sessions.len() >= MAX_PROXIES => {
                        tracing::warn!("node proxy turned away: {MAX_PROXIES} are connected");
                    }
                    Ok(socket) => {
                        let session = Session {
                            socket,
                            pods: self.pods.clone(),
                            listeners: self.listeners.clone(),
                            handover: self.times.handover,
                            events: self.events.clone(),
                        };
                        sessions.spawn(session.run());
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a node proxy");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                Some(ended) = sessions.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "session with a node proxy died");
                    }
                }
                () = wait_until(close_at) => {
                    tracing::warn!(hold_for = ?self.times.hold_for, "no node proxy; pods' connections are refused from now on");
                    self.pods.want_listeners(false);
                    self.listeners.release_all().await;
                    alone_since = None;
                    released = true;
                }
            }
            if !sessions.is_empty() {
                alone_since = None;
                released = false;
            } else if !released && alone_since.is_none() {
                alone_since = Some(Instant::now());
            }
        }
    }
}

async fn wait_until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The session with one proxy.
struct Session {
    socket: SeqPacket,
    pods: ServedPods,
    listeners: ListenerHolder,
    handover: Duration,
    events: mpsc::Sender<ZdsEvent>,
}

/// Why an order cannot be sent.
struct Unsent {
    why: Unsendable,
    reason: String,
}

impl Unsent {
    fn failed(reason: &(impl ToString + ?Sized)) -> Self {
        Self { why: Unsendable::Failed, reason: reason.to_string() }
    }
}

impl From<Arc<NetnsError>> for Unsent {
    fn from(error: Arc<NetnsError>) -> Self {
        let is_held = error.raw_os_error() == Some(libc::EADDRINUSE);
        let why = if is_held { Unsendable::Held } else { Unsendable::Failed };
        Self { why, reason: error.to_string() }
    }
}

/// Reports to the hub that a proxy is gone, however its session ends.
struct Connected {
    id: ProxyId,
    pods: ServedPods,
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut state = self.pods.state.lock();
        state.hub.disconnect(self.id);
        state.pids.remove(&self.id);
        drop(state);
        self.pods.wake();
    }
}

impl Session {
    async fn run(self) {
        let reason = match self.talk().await {
            Ok(never) => match never {},
            Err(reason) => reason,
        };
        tracing::info!(%reason, "node proxy disconnected");
    }

    async fn talk(&self) -> Result<std::convert::Infallible, Ended> {
        let mut buffer = [0; MAX_PACKET];
        let hello = timeout(HELLO, self.receive(&mut buffer)).await.map_err(|_| Ended::Late("hello"))??;
        let hello = decode_hello(buffer.get(..hello).unwrap_or_default())?;
        let pid = self
            .socket
            .peer_pid()
            .map_err(|source| Ended::Socket { attempt: "ask for its process", source })?;
        tracing::info!(pid, takes_listeners = hello.takes_listeners, "node proxy connected");
        self.pods.want_listeners(hello.takes_listeners);
        if !hello.takes_listeners {
            // It binds its own, which it cannot while we hold them.
            self.listeners.release_all().await;
        }
        let mut changes = self.pods.changed.subscribe();
        let connected = self.register(pid);
        loop {
            changes.mark_unchanged();
            let next = self.pods.state.lock().hub.poll_next(connected.id, Instant::now());
            match next {
                Next::Send(order) => {
                    self.carry_out(connected.id, order, hello.takes_listeners, &mut buffer).await?;
                }
                Next::WaitUntil(at) => self.idle(&mut changes, Some(at), &mut buffer).await?,
                Next::Wait => self.idle(&mut changes, None, &mut buffer).await?,
            }
        }
    }

    fn register(&self, pid: i32) -> Connected {
        let mut state = self.pods.state.lock();
        let id = state.hub.connect(Instant::now() + self.handover);
        state.pids.insert(id, pid);
        drop(state);
        self.pods.wake();
        Connected { id, pods: self.pods.clone() }
    }

    /// Waits for a change or a time; a proxy says nothing meanwhile.
    async fn idle(
        &self,
        changes: &mut watch::Receiver<u64>,
        until: Option<Instant>,
        buffer: &mut [u8],
    ) -> Result<(), Ended> {
        tokio::select! {
            _ = changes.changed() => Ok(()),
            () = wait_until(until) => Ok(()),
            received = self.receive(buffer) => received.and(Err(Ended::OutOfTurn)),
        }
    }

    /// Sends one order and takes its answer.
    async fn carry_out(
        &self,
        id: ProxyId,
        order: Order,
        takes_listeners: bool,
        buffer: &mut [u8],
    ) -> Result<(), Ended> {
        let mut unsendable = None;
        let outcome = match self.prepare(order, takes_listeners).await {
            Ok((packet, netns, listeners)) => {
                let mut descriptors: Vec<BorrowedFd<'_>> = netns.iter().map(AsFd::as_fd).collect();
                descriptors.extend(listeners.iter().flat_map(|all| all.iter().map(AsFd::as_fd)));
                self.socket
                    .send(&packet, &descriptors)
                    .await
                    .map_err(|source| Ended::Socket { attempt: "send", source })?;
                drop(listeners);
                let n = timeout(ANSWER, self.receive(buffer)).await.map_err(|_| Ended::Late("answer"))??;
                decode_response(buffer.get(..n).unwrap_or_default())?
            }
            Err(Unsent { why, reason }) => {
                unsendable = Some(why);
                Err(reason)
            }
        };
        let now = Instant::now();
        let acked = {
            let hub = &mut self.pods.state.lock().hub;
            match unsendable {
                None => hub.handle_ack(id, outcome.is_ok(), now),
                Some(why) => hub.handle_unsent(id, why, now),
            }
        };
        self.pods.wake();
        let event = match (acked, outcome) {
            (Some(uid), Ok(())) => Some(ZdsEvent::Served { uid }),
            (Some(uid), Err(reason)) => {
                tracing::warn!(uid, reason, "pod not served yet");
                Some(ZdsEvent::Refused { uid, reason })
            }
            (None, Err(reason)) if unsendable.is_some() => {
                tracing::debug!(reason, "pod not sent yet");
                None
            }
            (None, Err(reason)) => {
                tracing::warn!(reason, "node proxy refused an order");
                None
            }
            (None, Ok(())) => None,
        };
        if let Some(event) = event {
            // Without a listener for events the agent is ending.
            self.events.send(event).await.ok();
        }
        Ok(())
    }

    /// The packet of an order with what travels beside it; or why it cannot be sent.
    async fn prepare(
        &self,
        order: Order,
        takes_listeners: bool,
    ) -> Result<(Vec<u8>, Option<Netns>, Option<Listeners>), Unsent> {
        let encode = |request| encode_request(request).map_err(|error| Unsent::failed(&error));
        match order {
            Order::Add(uid, _) => {
                let (pod, pids) = {
                    let state = self.pods.state.lock();
                    (state.pods.get(&uid).cloned(), state.pids.values().copied().collect::<Vec<_>>())
                };
                let Some(ServedPod { info, netns: Some(netns), options }) = pod else {
                    return Err(Unsent::failed("the pod has gone"));
                };
                let listeners = if takes_listeners {
                    Some(self.listeners.acquire(&uid, &netns, &options, pids).await?)
                } else {
                    None
                };
                let announced =
                    listeners.iter().flat_map(|all| all.iter().map(|l| l.announcement())).collect();
                Ok((encode(Request::Add(uid, info, announced))?, Some(netns), listeners))
            }
            Order::Keep(uid, _) => Ok((encode(Request::Keep(uid))?, None, None)),
            Order::Del(uid) => Ok((encode(Request::Del(uid))?, None, None)),
            Order::SnapshotSent => Ok((encode(Request::SnapshotSent)?, None, None)),
        }
    }

    async fn receive(&self, buffer: &mut [u8]) -> Result<usize, Ended> {
        let received =
            self.socket.recv(buffer).await.map_err(|source| Ended::Socket { attempt: "receive", source })?;
        if received.len == 0 { Err(Ended::Closed) } else { Ok(received.len) }
    }
}
