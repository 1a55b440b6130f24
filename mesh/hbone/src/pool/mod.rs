//! A worker's connections to other proxies, shared by its tunnels.
//!
//! The pool returns tunnels. Each connection is dialled in one task and driven by another, so that a caller that is dropped
//! does not affect others that wait for the same connection. Dropping the last [`Pool`] leaves open tunnels alone; their
//! connections close when they have ended.
//!
//! The pool never sends a CONNECT twice: its caller owns retries. [`OpenError::never_processed`] says whether a request
//! certainly had no effect.
//!
//! One lock guards the index. It is held for lookups only, never across an await. Each worker has a separate pool, so
//! only evictions contend for it.

mod choice;
mod counters;
mod state;

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ambit_identity::{ClientTls, PeerCertificate, SpiffeId, Trust};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::timeout;

pub use counters::{Count, PoolCounters};
pub use state::Key;

use crate::client::{self, Connection, Driver, DriverEnd, Target};
use crate::load::Lease;
use crate::overhead::Tally;
use crate::{ConnectRequest, OpenError, PoolSettings, Tunnel, WindowBudget};
use state::{DialId, DialOutcome, DialWaiter, Selected, State, Step};

/// How many connections one `open` waits for if it cannot use them.
const DIALS: usize = 4;
/// How long a tunnel waits for a less busy connection before it uses a busy one.
const SPREAD_WAIT: Duration = Duration::from_millis(100);

/// What eviction does to open tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InFlight {
    /// They go on until they end; the connection takes no new ones.
    Finish,
    /// They are cut.
    Cut,
}

/// The connections of one worker. Clones share them.
///
/// `K` decides what may share a connection: two callers with equal keys do. A key should name the workload, not only its
/// address, so that an address that is used again by another workload has another key.
///
/// Shutting down: [`Pool::drain`] refuses new tunnels and closes idle connections; what is in flight goes
/// on until its end, or until [`Pool::cut`].
#[derive(Debug, Clone)]
pub struct Pool<K: Key> {
    shared: Arc<Shared<K>>,
    /// The drivers hold `shared` as well, so its own drop would come too late.
    _last: Arc<DrainOnDrop<K>>,
}

#[derive(Debug)]
struct DrainOnDrop<K: Key>(Arc<Shared<K>>);

impl<K: Key> Drop for DrainOnDrop<K> {
    fn drop(&mut self) {
        self.0.state.lock().drain();
    }
}

#[derive(Debug)]
struct Shared<K: Key> {
    settings: PoolSettings,
    trust: Trust,
    budget: WindowBudget,
    state: Mutex<State<K>>,
    counters: Arc<PoolCounters>,
}

impl<K: Key> Pool<K> {
    /// An empty pool. `budget` is the process's, shared by all workers. Connections whose peer `trust` no longer believes
    /// carry no new tunnels.
    pub fn new(
        settings: PoolSettings,
        trust: Trust,
        budget: WindowBudget,
        counters: Arc<PoolCounters>,
    ) -> Pool<K> {
        let state = Mutex::new(State::default());
        let shared = Arc::new(Shared { settings, trust, budget, state, counters });
        Pool { _last: Arc::new(DrainOnDrop(Arc::clone(&shared))), shared }
    }

    /// The settings of the pool.
    pub fn settings(&self) -> &PoolSettings {
        &self.shared.settings
    }

    /// Opens a tunnel on an existing connection of `key`, or on a new one over what `dial` yields: [`reserve`](Pool::reserve),
    /// then [`Reserved::open`].
    ///
    /// # Errors
    ///
    /// [`OpenError`]; no byte of the application has been sent then.
    pub async fn open<D, F, IO>(
        &self,
        key: &K,
        target: Target<'_>,
        request: &ConnectRequest,
        dial: D,
    ) -> Result<Tunnel, OpenError>
    where
        D: FnMut() -> F,
        F: Future<Output = io::Result<IO>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        self.reserve(key, target, dial).await?.open(request).await
    }

    /// Reserves a place for one tunnel on an existing connection of `key`, or on a new one over what `dial` yields. What
    /// fails here is the way to the peer; what fails later is the request.
    ///
    /// Callers that find a connection being dialled for their key wait for it and share its failure.
    /// A connection takes no more tunnels once `target` has another certificate (after a renewal), does not expect its
    /// peer any more, or its peer is no longer trusted. `dial` runs in a task of the pool and is bounded, with the
    /// handshakes, by [`handshake_timeout`](crate::ClientSettings::handshake_timeout). Must be called on the worker's
    /// runtime.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; nothing has been requested then.
    pub async fn reserve<D, F, IO>(
        &self,
        key: &K,
        target: Target<'_>,
        mut dial: D,
    ) -> Result<Reserved<K>, OpenError>
    where
        D: FnMut() -> F,
        F: Future<Output = io::Result<IO>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let shared = &self.shared;
        let mut may_spread = true;
        let mut dialled: Option<Arc<Tally>> = None;
        for _ in 0..=DIALS {
            // The server's verdict on our certificate may come before the connection was used; the next would meet the same.
            if let Some(rejected) = dialled.and_then(|tally| client::rejection(target.address, &tally)) {
                return Err(rejected);
            }
            let step = {
                let believed = |peer: &PeerCertificate| shared.is_believed(peer);
                shared.state.lock().step(key, target, believed, &shared.settings, may_spread)?
            };
            let waiter = match step {
                Step::Use(selected, lease) => {
                    return Ok(Reserved { shared: Arc::clone(shared), key: key.clone(), selected, lease });
                }
                Step::Wait(waiter) => {
                    shared.counters.shared.add(1);
                    waiter
                }
                Step::Dial(permit) => {
                    let dialling = Dialling {
                        key: key.clone(),
                        address: target.address,
                        source: target.source,
                        tls: Arc::clone(target.tls),
                        expected: target.expected.to_vec(),
                        id: permit.id,
                    };
                    let task = tokio::spawn(dialling.run(Arc::clone(shared), dial(), permit.report));
                    shared.state.lock().hold_dial(key, permit.id, task.abort_handle());
                    permit.waiter
                }
            };
            (may_spread, dialled) = shared.join_dial(waiter, may_spread, key, target).await?;
        }
        Err(OpenError::Abandoned { address: target.address })
    }

    /// Takes the connections of matching keys out of the pool, those being dialled included.
    pub fn evict(&self, matches: impl Fn(&K) -> bool, in_flight: InFlight) {
        let evicted = self.shared.state.lock().evict(matches, in_flight);
        self.shared.counters.evicted.add(evicted as u64);
    }

    /// Cuts connections whose peer `keep` does not accept any more (revocation, changed trust).
    pub fn retain(&self, keep: impl Fn(&PeerCertificate) -> bool) {
        // Verified without the lock, because verification takes long and tunnels wait for the lock.
        let peers = self.shared.state.lock().peers();
        let ids: Vec<_> = peers.into_iter().filter(|(_, peer)| !keep(peer)).map(|(id, _)| id).collect();
        if ids.is_empty() {
            return;
        }
        let cut = self.shared.state.lock().cut_these(&ids);
        self.shared.counters.evicted.add(cut as u64);
    }

    /// Refuses new tunnels and closes each connection when its last tunnel has ended.
    pub fn drain(&self) {
        self.shared.state.lock().drain();
    }

    /// Cuts all connections, and so all tunnels.
    pub fn cut(&self) {
        let mut state = self.shared.state.lock();
        state.drain();
        state.cut();
    }

    /// Open connections, including those that take no more tunnels.
    pub fn connections(&self) -> usize {
        self.shared.state.lock().connections()
    }

    /// Tunnels that are open, or being opened, on all connections.
    pub fn tunnels(&self) -> usize {
        self.shared.state.lock().tunnels()
    }

    /// Connections of `key` that take tunnels.
    pub fn connections_of(&self, key: &K) -> usize {
        self.shared.state.lock().connections_of(key)
    }
}

/// A place for one tunnel on a connection of a [`Pool`]. Dropping it gives the place up.
#[derive(Debug)]
pub struct Reserved<K: Key> {
    shared: Arc<Shared<K>>,
    key: K,
    selected: Selected,
    lease: Lease,
}

impl<K: Key> Reserved<K> {
    /// Requests the tunnel, and waits at most [`connect_timeout`](crate::ClientSettings::connect_timeout) for the answer.
    ///
    /// # Errors
    ///
    /// As [`Connection::open`].
    pub async fn open(self, request: &ConnectRequest) -> Result<Tunnel, OpenError> {
        let Self { shared, key, selected, lease } = self;
        let failed = FailedUnlessOpened(&shared.counters);
        let opened = selected.connection.open_leased(request, &shared.settings.client, lease).await;
        match &opened {
            Ok(_) => {
                failed.disarm();
                shared.counters.tunnels.add(1);
            }
            Err(error) => {
                if let OpenError::Silent { .. } = error {
                    shared.counters.silent.add(1);
                }
                if is_of_connection(error) {
                    shared.state.lock().retire(&key, selected.id);
                }
            }
        }
        opened
    }
}

/// Counts a failed tunnel when dropped: a caller that stops waiting counts as one too.
struct FailedUnlessOpened<'a>(&'a PoolCounters);

impl FailedUnlessOpened<'_> {
    fn disarm(self) {
        std::mem::forget(self);
    }
}

impl Drop for FailedUnlessOpened<'_> {
    fn drop(&mut self) {
        self.0.failed_tunnels.add(1);
    }
}

impl<K: Key> Shared<K> {
    fn is_believed(&self, peer: &PeerCertificate) -> bool {
        let rechecked = self.trust.recheck(peer, std::time::SystemTime::now());
        if let Err(error) = &rechecked {
            tracing::info!(%error, "a pooled connection takes no more tunnels");
        }
        rechecked.is_ok()
    }

    /// Waits for a connection that is being dialled. Returns whether the tunnel may wait for another one, and a handle to
    /// the dialled one's failure.
    ///
    /// If it is dialled only to spread the load, the wait is short and a failure is ignored: the existing connections
    /// carry the tunnel as well.
    async fn join_dial(
        &self,
        waiter: DialWaiter,
        may_spread: bool,
        key: &K,
        target: Target<'_>,
    ) -> Result<(bool, Option<Arc<Tally>>), OpenError> {
        let outcome = waiter.outcome(target.address);
        if may_spread && self.state.lock().has_usable(key, target) {
            return Ok((matches!(timeout(SPREAD_WAIT, outcome).await, Ok(Ok(_))), None));
        }
        outcome.await.map(|tally| (may_spread, Some(tally)))
    }
}

/// Whether a failure concerns the connection and not only the request.
fn is_of_connection(error: &OpenError) -> bool {
    matches!(
        error,
        OpenError::NotProcessed { .. }
            | OpenError::Lost { .. }
            | OpenError::Silent { .. }
            | OpenError::Tls { .. }
    )
}

/// The dialling of one connection.
struct Dialling<K> {
    key: K,
    address: SocketAddr,
    source: IpAddr,
    tls: Arc<ClientTls>,
    expected: Vec<SpiffeId>,
    id: DialId,
}

impl<K: Key> Dialling<K> {
    /// Makes the connection, adds it to the pool and reports to the waiters. If this is aborted or
    /// panics, `report` is dropped, and the waiters see that the dial has ended.
    async fn run<F, IO>(self, shared: Arc<Shared<K>>, dial: F, report: watch::Sender<Option<DialOutcome>>)
    where
        F: Future<Output = io::Result<IO>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let guard = DialGuard { shared: Arc::clone(&shared), key: self.key.clone(), id: self.id };
        let limit = shared.settings.client.handshake_timeout;
        let connected = match timeout(limit, self.connect(&shared, dial)).await {
            Ok(connected) => connected,
            Err(_) => Err(OpenError::HandshakeTimeout { address: self.address, limit }),
        };
        let outcome = match connected {
            Ok((connection, driver)) => self.add(&shared, connection, driver),
            Err(error) => Err(error),
        };
        match &outcome {
            Ok(_) => shared.counters.connections.add(1),
            Err(_) => shared.counters.failed_connections.add(1),
        }
        drop(guard);
        report.send_replace(Some(outcome));
    }

    async fn connect<F, IO>(&self, shared: &Shared<K>, dial: F) -> Result<(Connection, Driver<IO>), OpenError>
    where
        F: Future<Output = io::Result<IO>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let address = self.address;
        let io = dial.await.map_err(|source| OpenError::Dial { address, source: Arc::new(source) })?;
        let target = Target { address, source: self.source, tls: &self.tls, expected: &self.expected };
        client::connect(io, target, &shared.settings.client, &shared.budget).await
    }

    /// Adds the connection to the pool and starts its driver.
    fn add<IO>(&self, shared: &Arc<Shared<K>>, connection: Connection, driver: Driver<IO>) -> DialOutcome
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let tally = Arc::clone(connection.tally());
        let mut state = shared.state.lock();
        let id = state.add(&self.key, self.id, connection, Arc::clone(&self.tls))?;
        let drive = drive(Arc::clone(shared), self.key.clone(), self.address, id, driver);
        state.hold_driver(&self.key, id, tokio::spawn(drive).abort_handle());
        Ok(tally)
    }
}

/// Ends a dial in whatever way its task ends.
struct DialGuard<K: Key> {
    shared: Arc<Shared<K>>,
    key: K,
    id: DialId,
}

impl<K: Key> Drop for DialGuard<K> {
    fn drop(&mut self) {
        self.shared.state.lock().end_dial(&self.key, self.id);
    }
}

/// Removes a connection from the pool in whatever way its task ends.
struct ConnectionGuard<K: Key> {
    shared: Arc<Shared<K>>,
    key: K,
    id: u64,
}

impl<K: Key> Drop for ConnectionGuard<K> {
    fn drop(&mut self) {
        self.shared.state.lock().remove(&self.key, self.id);
    }
}

/// The task of one connection.
async fn drive<K: Key, IO>(shared: Arc<Shared<K>>, key: K, address: SocketAddr, id: u64, driver: Driver<IO>)
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let guard = ConnectionGuard { shared, key, id };
    let end = driver.run(|| guard.shared.state.lock().retire(&guard.key, id)).await;
    match end {
        DriverEnd::Closed => tracing::debug!(%address, "tunnel connection closed"),
        DriverEnd::PingTimeout => {
            guard.shared.counters.ping_timeouts.add(1);
            tracing::info!(%address, key = ?guard.key, "peer did not answer a PING");
        }
        DriverEnd::Overhead(frames) => {
            tracing::warn!(%address, frames, "peer floods the connection with frames that carry nothing");
        }
        DriverEnd::Broken(error) => tracing::debug!(%address, %error, "tunnel connection broke"),
    }
}
