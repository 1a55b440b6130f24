//! Asks the control plane for what pods dial, where resources come on demand.
//!
//! `upstream` asks before it takes a route. Only the control plane's word that there is no such resource lets a
//! connection pass by the mesh; a control plane that is silent, or one of our own limits, refuses it.

mod table;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_api::ADDRESS_TYPE_URL;
use ambit_xds::{Client, DemandError, Found};
use parking_lot::Mutex;

use table::Names;
pub use table::{Bounds, Full};

use crate::proxy::Tally;

/// How often unused names are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(15);

/// Why it isn't known whether there is a resource of a name.
#[derive(Debug, thiserror::Error)]
pub enum DemandFailure {
    /// The control plane is silent.
    #[error("the control plane did not answer within {0:?}")]
    Silent(Duration),
    /// Too many names are demanded already.
    #[error(transparent)]
    Full(#[from] Full),
    /// The discovery client can't ask.
    #[error(transparent)]
    Client(#[from] DemandError),
}

/// What is counted.
#[derive(Debug, Default)]
pub struct ProxyMetrics {
    /// Times that the control plane was asked, or had been.
    pub demands: Tally,
    /// Demands without an answer in time.
    pub unanswered: Tally,
    /// Demands beyond a limit.
    pub refused: Tally,
    /// Names given up because they were not used, or their pod used too many.
    pub given_up: Tally,
}

/// Asks through a client that has subscribed to addresses on demand. Clones share what is asked for.
#[derive(Clone)]
pub struct OnDemandClient(Arc<Shared>);

struct Shared {
    client: Client,
    state: Mutex<State>,
    tallies: ProxyMetrics,
}

/// Guarded by one lock, which is held while the client is called, so that both see demands and releases in the same order.
#[derive(Default)]
struct State {
    names: Names,
    /// Names that pods of this node have themselves, with the number of those; never given up while a pod has it.
    own: HashMap<String, OwnName>,
    /// Names that the client could not release yet.
    to_release: Vec<String>,
}

#[derive(Debug, Default)]
struct OwnName {
    pods: usize,
    is_demanded: bool,
}

/// Keeps the resource of a pod of this node subscribed until it is dropped.
pub struct Pinned {
    on_demand: OnDemandClient,
    name: String,
}

impl std::fmt::Debug for OnDemandClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnDemandClient")
    }
}

impl std::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinned").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.on_demand.unpin(&self.name);
    }
}

impl OnDemandClient {
    /// Nothing is demanded yet.
    pub fn new(client: Client, bounds: Bounds) -> Self {
        let state = State { names: Names::new(bounds), ..State::default() };
        Self(Arc::new(Shared { client, state: Mutex::new(state), tallies: ProxyMetrics::default() }))
    }

    /// Waits for the control plane's word on a name that `pod` dials, at most `limit`. The directory has what it gave
    /// when this returns.
    ///
    /// # Errors
    /// [`DemandFailure`]: it is not known whether there is such a resource.
    pub async fn demand(&self, pod: &Arc<str>, name: &str, limit: Duration) -> Result<Found, DemandFailure> {
        self.0.tallies.demands.add(1);
        let demanded = self.start(pod, name).inspect_err(|_| self.0.tallies.refused.add(1))?;
        let waiting = Waiting { on_demand: self, pod, name };
        let answered = tokio::time::timeout(limit, demanded.answer()).await;
        drop(waiting);
        let found = answered.map_err(|_| {
            self.0.tallies.unanswered.add(1);
            DemandFailure::Silent(limit)
        })??;
        tracing::debug!(name, ?found, "asked the control plane");
        Ok(found)
    }

    fn start(&self, pod: &Arc<str>, name: &str) -> Result<ambit_xds::Demanded, DemandFailure> {
        let mut state = self.0.state.lock();
        let given_up = state.names.handle_demand(pod, name, Instant::now())?;
        self.release(&mut state, given_up);
        let started = self.0.client.start_demand(ADDRESS_TYPE_URL, name);
        if started.is_err() {
            state.names.handle_answered(pod, name);
        }
        Ok(started?)
    }

    /// Notes that `pod` uses a name, so that it is not given up.
    pub fn note_use(&self, pod: &Arc<str>, name: &str) {
        let mut state = self.0.state.lock();
        let given_up = state.names.handle_use(pod, name, Instant::now());
        self.release(&mut state, given_up);
    }

    /// Demands the resource of a pod of this node, and keeps it.
    pub fn pin(&self, name: &str) -> Pinned {
        let mut state = self.0.state.lock();
        let own = state.own.entry(name.to_owned()).or_default();
        own.pods += 1;
        self.demand_own(name, own);
        Pinned { on_demand: self.clone(), name: name.to_owned() }
    }

    /// Waits for the control plane's word on the resource of a pod of this node, at most `limit`.
    ///
    /// # Errors
    /// [`DemandFailure`]: it is not known whether there is such a resource.
    pub async fn demand_pinned(&self, pinned: &Pinned, limit: Duration) -> Result<Found, DemandFailure> {
        let demanded = self.0.client.demand(ADDRESS_TYPE_URL, &pinned.name);
        Ok(tokio::time::timeout(limit, demanded).await.map_err(|_| DemandFailure::Silent(limit))??)
    }

    fn demand_own(&self, name: &str, own: &mut OwnName) {
        if !own.is_demanded {
            own.is_demanded = self.0.client.start_demand(ADDRESS_TYPE_URL, name).is_ok();
        }
    }

    fn unpin(&self, name: &str) {
        let mut state = self.0.state.lock();
        let Some(own) = state.own.get_mut(name) else { return };
        own.pods -= 1;
        if own.pods == 0 {
            state.own.remove(name);
            self.release(&mut state, Some(name.to_owned()));
        }
    }

    /// Gives names up that nobody uses. Runs as long as the program.
    pub async fn expire(self) {
        loop {
            tokio::time::sleep(EXPIRE_EVERY).await;
            let mut state = self.0.state.lock();
            let unused = state.names.expire(Instant::now());
            let late = std::mem::take(&mut state.to_release);
            self.release(&mut state, unused.into_iter().chain(late));
            for (name, own) in &mut state.own {
                self.demand_own(name, own);
            }
        }
    }

    /// Releases names at the client, unless they are in use again or are those of our own pods.
    fn release(&self, state: &mut State, names: impl IntoIterator<Item = String>) {
        for name in names {
            if state.names.is_used(&name) || state.own.contains_key(&name) {
                continue;
            }
            match self.0.client.release(ADDRESS_TYPE_URL, &name) {
                Ok(()) => self.0.tallies.given_up.add(1),
                Err(_) => state.to_release.push(name),
            }
        }
    }

    /// Number of names that are demanded for pods.
    pub fn names(&self) -> usize {
        self.0.state.lock().names.len()
    }

    /// What is counted.
    pub fn tallies(&self) -> &ProxyMetrics {
        &self.0.tallies
    }
}

/// A connection that waits; also one that is dropped while it does.
struct Waiting<'a> {
    on_demand: &'a OnDemandClient,
    pod: &'a Arc<str>,
    name: &'a str,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.on_demand.0.state.lock().names.handle_answered(self.pod, self.name);
    }
}
