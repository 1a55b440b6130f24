//! A worker's connections to other proxies, shared by its tunnels.
//!
//! The pool hands out tunnels; a task for each connection drives it, and another makes it, so that a
//! caller that goes away breaks nothing for those who wait beside it. Dropping the last [`Pool`]
//! leaves open tunnels alone; their connections close when they have ended.
//!
//! One lock guards the index. It is held for look-ups only, never across an await, and since each
//! worker has a pool of its own nobody contends for it but evictions.

mod choice;
mod counters;
mod state;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_identity::{ClientTls, PeerCertificate, SpiffeId};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;

pub use counters::PoolCounters;

use crate::client::{self, Connection, Driver, DriverEnd};
use crate::load::Lease;
use crate::{ConnectRequest, OpenError, Settings, Tunnel, WindowBudget};
use state::{Flight, Outcome, State, Step, Waiter};

/// How often one `open` may find that its connection was just going away.
const ATTEMPTS: usize = 4;
/// How long a tunnel waits for a quieter connection before it takes a busy one.
const SPREAD_WAIT: Duration = Duration::from_millis(100);

/// What a connection may be shared by: one source workload with one identity to one workload at one
/// address. An address that is used again by another workload has another key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// Uid of the source pod. Pods of one identity do not share connections: each leaves from its own
    /// namespace and address, and goes with it.
    pub origin: Arc<str>,
    /// The identity that our side presents.
    pub source: SpiffeId,
    /// Uid of the destination workload (of the waypoint or gateway, if there is one).
    pub destination: Arc<str>,
    /// Where its proxy listens.
    pub address: SocketAddr,
}

/// What eviction does to tunnels that are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InFlight {
    /// They go on until they end; only new ones are kept off.
    Finish,
    /// They are cut.
    Cut,
}

/// The connections of one worker. Clones share them.
///
/// Shutting down: [`Pool::drain`] refuses new tunnels and closes what is idle; what is in flight goes
/// on until its end, or until [`Pool::cut`].
#[derive(Debug, Clone)]
pub struct Pool {
    shared: Arc<Shared>,
    /// The drivers hold `shared` as well, so its own drop would come too late.
    _last: Arc<DrainOnDrop>,
}

#[derive(Debug)]
struct DrainOnDrop(Arc<Shared>);

impl Drop for DrainOnDrop {
    fn drop(&mut self) {
        self.0.state.lock().drain();
    }
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    budget: WindowBudget,
    state: Mutex<State>,
    counters: Arc<PoolCounters>,
}

impl Pool {
    /// An empty pool. `budget` is the process's, shared by all workers.
    pub fn new(settings: Settings, budget: WindowBudget, counters: Arc<PoolCounters>) -> Pool {
        let state = Mutex::new(State::default());
        let shared = Arc::new(Shared { settings, budget, state, counters });
        Pool { _last: Arc::new(DrainOnDrop(Arc::clone(&shared))), shared }
    }

    /// The settings that its connections follow.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// Opens a tunnel to the workload of `key`: on a connection that is there, or on one made by
    /// `dial`, TLS with `tls`, and the check that the peer is one of `expected`.
    ///
    /// Callers that find a connection being made for their key wait for it and share its failure.
    /// A connection made with an older `tls` configuration (before a certificate was renewed) takes
    /// no more tunnels. `dial` runs in a task of the pool and is bounded, with the handshakes, by
    /// [`Settings::handshake_timeout`]; it is called again only if the connection it made was gone
    /// before the tunnel was answered. Must be called on the worker's runtime.
    ///
    /// # Errors
    ///
    /// [`OpenError`]; no byte of the application has been sent then.
    pub async fn open<D, F>(
        &self,
        key: &PoolKey,
        tls: &Arc<ClientTls>,
        expected: &[SpiffeId],
        request: &ConnectRequest,
        mut dial: D,
    ) -> Result<Tunnel, OpenError>
    where
        D: FnMut() -> F,
        F: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        let shared = &self.shared;
        let mut may_spread = true;
        let mut attempts = 0;
        loop {
            let step = shared.state.lock().step(key, tls, expected, &shared.settings, may_spread)?;
            match step {
                Step::Use(connection, lease) => {
                    let opened = shared.open_on(key, &connection, request, lease).await;
                    attempts += 1;
                    match opened {
                        Err(error) if may_repeat(&error) && attempts < ATTEMPTS => {}
                        opened => return opened,
                    }
                }
                Step::Wait(waiter) => {
                    shared.counters.shared.add(1);
                    may_spread = shared.landing(waiter, may_spread, key, tls, expected).await?;
                }
                Step::Dial(ticket) => {
                    let establish = Establish {
                        key: key.clone(),
                        tls: Arc::clone(tls),
                        expected: expected.to_vec(),
                        flight: ticket.flight,
                    };
                    let task = establish.run(Arc::clone(shared), dial(), ticket.report);
                    let task = tokio::spawn(task);
                    shared.state.lock().watch(key, ticket.flight, task.abort_handle());
                    may_spread = shared.landing(ticket.waiter, may_spread, key, tls, expected).await?;
                }
            }
        }
    }

    /// Takes the connections of a workload that is gone out of the pool, those being made included.
    pub fn evict(&self, destination: &str, in_flight: InFlight) {
        let evicted = self.shared.state.lock().evict(destination, in_flight);
        self.shared.counters.evicted.add(evicted as u64);
    }

    /// Takes the connections out that were made for a source pod that has left. Open tunnels finish.
    pub fn evict_origin(&self, origin: &str) {
        let evicted = self.shared.state.lock().evict_origin(origin);
        self.shared.counters.evicted.add(evicted as u64);
    }

    /// Cuts connections whose peer `keep` does not accept any more (revocation, changed trust).
    pub fn retain(&self, keep: impl Fn(&PeerCertificate) -> bool) {
        let cut = self.shared.state.lock().retain(keep);
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

    /// Connections that are open, including those that take no more tunnels.
    pub fn connections(&self) -> usize {
        self.shared.state.lock().connections()
    }

    /// Tunnels that are open, or being opened, on all connections.
    pub fn tunnels(&self) -> usize {
        self.shared.state.lock().tunnels()
    }

    /// Connections to the workload of `key` that take tunnels.
    pub fn connections_of(&self, key: &PoolKey) -> usize {
        self.shared.state.lock().connections_of(key)
    }
}

impl Shared {
    async fn open_on(
        &self,
        key: &PoolKey,
        connection: &state::Handle,
        request: &ConnectRequest,
        lease: Lease,
    ) -> Result<Tunnel, OpenError> {
        let opened = connection.connection.open_leased(request, &self.settings, lease).await;
        match &opened {
            Ok(_) => self.counters.tunnels.add(1),
            Err(error) => {
                self.counters.failed_tunnels.add(1);
                if let OpenError::Silent { .. } = error {
                    self.counters.silent.add(1);
                }
                if unfit(error) {
                    self.state.lock().retire(key, connection.id);
                }
            }
        }
        opened
    }

    /// Waits for a connection that is being made; yields whether the tunnel may wait for one again.
    ///
    /// If it is only to spread the load, the wait is short and its failure is nobody's: what is there
    /// carries the tunnel as well.
    async fn landing(
        &self,
        waiter: Waiter,
        may_spread: bool,
        key: &PoolKey,
        tls: &Arc<ClientTls>,
        expected: &[SpiffeId],
    ) -> Result<bool, OpenError> {
        let outcome = waiter.outcome(key.address);
        if may_spread && self.state.lock().has_usable(key, tls, expected) {
            return Ok(matches!(timeout(SPREAD_WAIT, outcome).await, Ok(Ok(()))));
        }
        outcome.await.map(|()| may_spread)
    }
}

/// Whether a failure says that the connection is of no use to other tunnels either.
fn unfit(error: &OpenError) -> bool {
    matches!(error, OpenError::NotProcessed { .. } | OpenError::Lost { .. } | OpenError::Silent { .. })
}

/// Whether a CONNECT may be sent again on another connection. One that was lost with its connection may have
/// reached the peer, but no byte of the application has been sent, and none of its answer was relayed.
fn may_repeat(error: &OpenError) -> bool {
    error.never_processed() || matches!(error, OpenError::Lost { .. })
}

/// The making of one connection.
struct Establish {
    key: PoolKey,
    tls: Arc<ClientTls>,
    expected: Vec<SpiffeId>,
    flight: Flight,
}

impl Establish {
    /// Makes the connection, puts it into the pool and tells those who wait. If this is aborted or
    /// panics, `report` is dropped and they see that nobody is making it any more.
    async fn run<F>(self, shared: Arc<Shared>, dial: F, report: watch::Sender<Option<Outcome>>)
    where
        F: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        let landing = Landing { shared: Arc::clone(&shared), key: self.key.clone(), flight: self.flight };
        let limit = shared.settings.handshake_timeout;
        let made = match timeout(limit, self.connect(&shared, dial)).await {
            Ok(made) => made,
            Err(_) => Err(OpenError::HandshakeTimeout { address: self.key.address, limit }),
        };
        let outcome = match made {
            Ok((connection, driver)) => self.board(&shared, connection, driver),
            Err(error) => Err(error),
        };
        match &outcome {
            Ok(()) => shared.counters.connections.add(1),
            Err(_) => shared.counters.failed_connections.add(1),
        }
        drop(landing);
        report.send_replace(Some(outcome));
    }

    async fn connect<F>(&self, shared: &Shared, dial: F) -> Result<(Connection, Driver<TcpStream>), OpenError>
    where
        F: Future<Output = io::Result<TcpStream>> + Send + 'static,
    {
        let address = self.key.address;
        let socket = dial.await.map_err(|source| OpenError::Dial { address, source: Arc::new(source) })?;
        // Latency: a CONNECT must not wait for the acknowledgement of what went before.
        socket.set_nodelay(true).map_err(|source| OpenError::Dial { address, source: Arc::new(source) })?;
        let (tls, budget) = (Arc::clone(&self.tls), shared.budget.clone());
        client::connect(socket, address, tls, &self.expected, &shared.settings, budget).await
    }

    /// Adds the connection to the pool and starts its driver.
    fn board(
        &self,
        shared: &Arc<Shared>,
        connection: Connection,
        driver: Driver<TcpStream>,
    ) -> Result<(), OpenError> {
        let mut state = shared.state.lock();
        let id = state.add(&self.key, self.flight, connection, Arc::clone(&self.tls))?;
        let drive = drive(Arc::clone(shared), self.key.clone(), id, driver);
        state.hold(&self.key, id, tokio::spawn(drive).abort_handle());
        Ok(())
    }
}

/// Ends a flight however its task ends.
struct Landing {
    shared: Arc<Shared>,
    key: PoolKey,
    flight: Flight,
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.shared.state.lock().landed(&self.key, self.flight);
    }
}

/// Takes a connection out of the pool however its task ends.
struct Departure {
    shared: Arc<Shared>,
    key: PoolKey,
    id: u64,
}

impl Drop for Departure {
    fn drop(&mut self) {
        self.shared.state.lock().remove(&self.key, self.id);
    }
}

/// The task of one connection.
async fn drive(shared: Arc<Shared>, key: PoolKey, id: u64, driver: Driver<TcpStream>) {
    let departure = Departure { shared, key, id };
    let end = driver.run(|| departure.shared.state.lock().retire(&departure.key, id)).await;
    let (key, counters) = (&departure.key, &departure.shared.counters);
    match end {
        DriverEnd::Closed => tracing::debug!(address = %key.address, "tunnel connection closed"),
        DriverEnd::PingTimeout => {
            counters.ping_timeouts.add(1);
            tracing::info!(address = %key.address, destination = %key.destination, "peer did not answer a PING");
        }
        DriverEnd::Overhead(frames) => {
            tracing::warn!(address = %key.address, frames, "peer floods with frames that move nothing");
        }
        DriverEnd::Broken(error) => {
            tracing::debug!(address = %key.address, %error, "tunnel connection broke");
        }
    }
}
