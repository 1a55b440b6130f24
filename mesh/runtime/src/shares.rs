//! Shares of what all pods use together: descriptors, handshakes in progress, and look-ups of host names.
//!
//! A pod may hold as much of a [`Budget`] as it leaves free, and a peer as much of its pod's share as it leaves
//! free there (dynamic thresholds: Choudhury and Hahne, 1998). One pod that takes all it can get ends at half of
//! the budget, two end at a third each, and the next one always finds something. Nothing is set aside for pods that
//! need nothing. A few relaxed atomics a connection; no lock but for the look-up of a peer.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ambit_telemetry::{Counter, Registry};
use parking_lot::RwLock;
use prometheus_client::metrics::family::Family;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What every holder gets while anything is free: this part of the capacity, within [`FLOOR`].
const FLOOR_PART: u64 = 1024;
/// Smallest and largest floor.
const FLOOR: (u64, u64) = (4, 64);
/// Peers of a pod below which unused ones are kept.
const SWEEP_FLOOR: usize = 1024;
/// Time between two log lines about refusals of one holder.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// What is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Open files of the process.
    Descriptors,
    /// TLS handshakes of clients that are not finished.
    Handshakes,
    /// Look-ups of host names that are not finished.
    Lookups,
}

impl Resource {
    const COUNT: usize = 3;

    /// The value of the metric's label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Descriptors => "descriptors",
            Self::Handshakes => "handshakes",
            Self::Lookups => "lookups",
        }
    }
}

/// Which limit was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Nothing is left for anybody.
    Total,
    /// The pod's share.
    Pod,
    /// The peer's share of the pod's.
    Peer,
}

impl Limit {
    /// The value of the metric's label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Pod => "pod",
            Self::Peer => "peer",
        }
    }
}

/// Why a connection was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{} limit of {} reached", limit.as_str(), resource.as_str())]
pub struct LimitExceeded {
    /// Of what there is no more.
    pub resource: Resource,
    /// For whom.
    pub limit: Limit,
}

/// What one pod or peer holds.
#[derive(Debug, Default)]
pub struct Share {
    held: [AtomicU64; Resource::COUNT],
    /// Milliseconds since the first refusal of the process, plus one; 0 for never.
    warned_at: AtomicU64,
    refused_since: AtomicU64,
}

impl Share {
    /// How much of a resource is held.
    pub fn held(&self, resource: Resource) -> u64 {
        self.counter(resource).load(Ordering::Relaxed)
    }

    fn counter(&self, resource: Resource) -> &AtomicU64 {
        let [descriptors, handshakes, lookups] = &self.held;
        match resource {
            Resource::Descriptors => descriptors,
            Resource::Handshakes => handshakes,
            Resource::Lookups => lookups,
        }
    }

    /// Counts a refusal. Returns how many there were since the last log line, if another one is due.
    fn note_refusal(&self) -> Option<u64> {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        let count = self.refused_since.fetch_add(1, Ordering::Relaxed) + 1;
        let now = START.elapsed().as_millis() as u64 + 1;
        let before = self.warned_at.load(Ordering::Relaxed);
        let due = before == 0 || now.saturating_sub(before) >= WARN_EVERY.as_millis() as u64;
        if !due || self.warned_at.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_err()
        {
            return None;
        }
        self.refused_since.store(0, Ordering::Relaxed);
        Some(count)
    }
}

/// On whose account something is taken: a pod's, and within it a peer's.
#[derive(Debug, Clone)]
pub struct Holder {
    pod: Arc<Share>,
    peer: Option<Arc<Share>>,
}

impl Holder {
    /// A pod itself.
    pub fn pod(share: &Arc<Share>) -> Self {
        Self { pod: share.clone(), peer: None }
    }

    /// A peer of a pod.
    pub fn peer(pod: &Arc<Share>, peer: Arc<Share>) -> Self {
        Self { pod: pod.clone(), peer: Some(peer) }
    }

    fn innermost(&self) -> &Share {
        self.peer.as_ref().unwrap_or(&self.pod)
    }
}

/// An amount of a resource that all pods share.
#[derive(Debug)]
pub struct Budget {
    resource: Resource,
    capacity: u64,
    used: AtomicU64,
}

/// A part of a budget that is held until this is dropped.
#[derive(Debug)]
#[must_use = "what is taken is given back when this is dropped"]
pub struct Taken {
    budget: Arc<Budget>,
    holder: Option<Holder>,
    amount: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Self { budget, holder, amount } = self;
        budget.used.fetch_sub(*amount, Ordering::Relaxed);
        if let Some(holder) = holder {
            holder.pod.counter(budget.resource).fetch_sub(*amount, Ordering::Relaxed);
            if let Some(peer) = &holder.peer {
                peer.counter(budget.resource).fetch_sub(*amount, Ordering::Relaxed);
            }
        }
    }
}

impl Budget {
    /// A budget of which nothing is held.
    pub fn new(resource: Resource, capacity: u64) -> Arc<Self> {
        Arc::new(Self { resource, capacity, used: AtomicU64::new(0) })
    }

    /// The whole amount.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// What is held now.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes `amount` on the account of `holder`.
    ///
    /// Workers that take at the same moment may exceed a limit by what each of them takes.
    ///
    /// # Errors
    /// [`LimitExceeded`], if a share would become larger than what it leaves free.
    pub fn take(self: &Arc<Self>, holder: &Holder, amount: u64) -> Result<Taken, LimitExceeded> {
        let resource = self.resource;
        let pod = holder.pod.counter(resource);
        let peer = holder.peer.as_ref().map(|peer| peer.counter(resource));
        let held = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        admit(self.capacity, self.used(), held(pod), peer.map(held), amount)
            .map_err(|limit| LimitExceeded { resource, limit })?;
        self.used.fetch_add(amount, Ordering::Relaxed);
        pod.fetch_add(amount, Ordering::Relaxed);
        if let Some(peer) = peer {
            peer.fetch_add(amount, Ordering::Relaxed);
        }
        Ok(Taken { budget: self.clone(), holder: Some(holder.clone()), amount })
    }

    /// Takes `amount` for the proxy itself, which is not refused.
    pub fn reserve(self: &Arc<Self>, amount: u64) -> Taken {
        self.used.fetch_add(amount, Ordering::Relaxed);
        Taken { budget: self.clone(), holder: None, amount }
    }
}

/// A connection that is on somebody's account until it is closed.
#[derive(Debug)]
pub struct Counted<IO> {
    io: IO,
    _taken: Taken,
}

impl<IO> Counted<IO> {
    /// Keeps `taken` for as long as `io` is open.
    pub fn new(io: IO, taken: Taken) -> Self {
        Self { io, _taken: taken }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Counted<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Counted<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

/// Decides whether a pod, or a peer of it, may take `amount` more.
fn admit(capacity: u64, used: u64, pod: u64, peer: Option<u64>, amount: u64) -> Result<(), Limit> {
    let floor = (capacity / FLOOR_PART).clamp(FLOOR.0, FLOOR.1);
    let free = capacity.saturating_sub(used);
    if amount > free {
        return Err(Limit::Total);
    }
    let of_pod = free.max(floor);
    if pod.saturating_add(amount) > of_pod {
        return Err(Limit::Pod);
    }
    let of_peer = of_pod.saturating_sub(pod).max(floor);
    match peer {
        Some(peer) if peer.saturating_add(amount) > of_peer => Err(Limit::Peer),
        _ => Ok(()),
    }
}

/// What the peers of a pod hold, by address.
#[derive(Debug)]
pub struct Peers {
    /// Guards the map, not the shares: only a peer's first connection writes.
    table: RwLock<PeerTable>,
}

#[derive(Debug)]
struct PeerTable {
    shares: HashMap<IpAddr, Arc<Share>>,
    sweep_at: usize,
}

impl Default for Peers {
    fn default() -> Self {
        Self { table: RwLock::new(PeerTable { shares: HashMap::new(), sweep_at: SWEEP_FLOOR }) }
    }
}

impl Peers {
    /// The share of the peer at `address`.
    pub fn share(&self, address: IpAddr) -> Arc<Share> {
        if let Some(share) = self.table.read().shares.get(&address) {
            return share.clone();
        }
        let mut table = self.table.write();
        if table.shares.len() >= table.sweep_at {
            // Shares are cloned under this lock only: one that nobody else has now is unused.
            table.shares.retain(|_, share| Arc::strong_count(share) > 1);
            table.sweep_at = (table.shares.len() * 2).max(SWEEP_FLOOR);
        }
        table.shares.entry(address).or_default().clone()
    }

    /// Peers that are remembered.
    pub fn len(&self) -> usize {
        self.table.read().shares.len()
    }

    /// Whether no peer is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The shares of one pod.
#[derive(Debug, Default)]
pub struct PodShares {
    outbound: Arc<Share>,
    /// Of connections to the pod, apart: peers that use it up don't keep the pod from dialling.
    inbound: Arc<Share>,
    peers: Peers,
}

impl PodShares {
    /// The account of connections that the pod opens.
    pub fn outbound(&self) -> Holder {
        Holder::pod(&self.outbound)
    }

    /// The account of connections that the peer at `address` opens to the pod.
    pub fn inbound(&self, address: IpAddr) -> Holder {
        Holder::peer(&self.inbound, self.peers.share(address))
    }
}

type RefusalLabels = [(&'static str, &'static str); 3];

/// The budgets of the process, and what was refused. Clones share them.
#[derive(Debug, Clone)]
pub struct Shares {
    /// Open files that connections may take.
    pub descriptors: Arc<Budget>,
    /// Handshakes of clients that may be in progress.
    pub handshakes: Arc<Budget>,
    /// Look-ups of host names that may be in progress.
    pub lookups: Arc<Budget>,
    refused: Family<RefusalLabels, Counter>,
}

impl Shares {
    /// Budgets of these capacities.
    pub fn new(descriptors: u64, handshakes: u64, lookups: u64) -> Self {
        Self {
            descriptors: Budget::new(Resource::Descriptors, descriptors),
            handshakes: Budget::new(Resource::Handshakes, handshakes),
            lookups: Budget::new(Resource::Lookups, lookups),
            refused: Family::default(),
        }
    }

    /// Registers what is held and what was refused.
    pub fn register(&self, registry: &Registry) {
        let help = "Connections and questions refused because a share of descriptors, handshakes or look-ups was used up";
        registry.register("ambit_connections_refused", help, self.refused.clone());
        let gauge = |name: &str, help: &str, budget: &Arc<Budget>, read: fn(&Budget) -> u64| {
            let budget = budget.clone();
            registry.gauge_from(name, help, move || i64::try_from(read(&budget)).unwrap_or(i64::MAX));
        };
        let Self { descriptors, handshakes, lookups, refused: _ } = self;
        gauge(
            "ambit_descriptors_limit",
            "Descriptors that connections may take",
            descriptors,
            Budget::capacity,
        );
        gauge(
            "ambit_descriptors_used",
            "Descriptors counted for connections and pods",
            descriptors,
            Budget::used,
        );
        gauge("ambit_handshakes_limit", "Handshakes that may be in progress", handshakes, Budget::capacity);
        gauge("ambit_handshakes_used", "Handshakes in progress", handshakes, Budget::used);
        gauge(
            "ambit_lookups_limit",
            "Look-ups of host names that may be in progress",
            lookups,
            Budget::capacity,
        );
        gauge("ambit_lookups_used", "Look-ups of host names in progress", lookups, Budget::used);
    }

    /// Counts a refusal, and logs it unless the same holder was logged a moment ago.
    pub fn report(
        &self,
        refusal: LimitExceeded,
        listener: &'static str,
        holder: &Holder,
        pod: &str,
        peer: IpAddr,
    ) {
        let LimitExceeded { resource, limit } = refusal;
        let labels = [("listener", listener), ("reason", limit.as_str()), ("resource", resource.as_str())];
        self.refused.get_or_create(&labels).inc();
        if let Some(refused) = holder.innermost().note_refusal() {
            tracing::warn!(pod, %peer, listener, reason = limit.as_str(), refused, "connections refused: {refusal}");
        }
    }
}

#[cfg(test)]
#[path = "shares_tests.rs"]
mod tests;
