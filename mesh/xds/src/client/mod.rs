//! The delta client: proxies provide one handler for the types that they subscribe to, and get a handle and a driver.
//!
//! [`Client`] is a cheap handle (readiness, demands, metrics); [`Driver`] owns the stream and must be
//! run. Dropping every `Client` ends the driver; dropping the driver leaves what was applied in place
//! and fails demands.

mod driver;
pub(crate) mod handler;
pub(crate) mod session;
#[cfg(test)]
mod session_tests;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use ambit_api::core::Node;
use prost_types::value::Kind;
use tokio::sync::{mpsc, oneshot, watch};

pub use driver::{Connector, Driver};
use handler::Decoders;
pub use handler::{Handler, Rejected, Update};
use session::{Mode, Session};

/// An error of any kind from the connector.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How many demands may wait for the driver.
const COMMAND_QUEUE: usize = 1024;

/// Settings of a client.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Sent with the first request of every stream.
    pub node: Node,
    /// Largest answer accepted, in bytes.
    pub max_message_size: usize,
    /// Limit on connecting and on opening the stream, each.
    pub open_timeout: Duration,
    /// First delay between attempts.
    pub min_delay: Duration,
    /// Longest delay between attempts.
    pub max_delay: Duration,
    /// Most names demanded per type.
    pub max_names: usize,
    /// Most bytes of a batch that wait for its rest; a larger batch is applied in parts.
    pub max_batch: usize,
}

impl ClientConfig {
    /// Defaults: answers up to 200 MiB, 10 s to open, delays of 250 ms to 15 s, 100,000 names a type,
    /// batches up to 256 MiB.
    pub fn new(node: Node) -> Self {
        Self {
            node,
            max_message_size: 200 << 20,
            open_timeout: Duration::from_secs(10),
            min_delay: Duration::from_millis(250),
            max_delay: Duration::from_secs(15),
            max_names: 100_000,
            max_batch: 256 << 20,
        }
    }
}

/// Node metadata by which a client says that it waits for the last part of a state that comes in several answers
/// (xDS contract).
pub const PARTIAL_STATE: &str = "AMBIT_PARTIAL_STATE";

/// The node message of a ztunnel: id `ztunnel~<ip>~<pod>.<ns>~<ns>.svc.cluster.local`.
///
/// `metadata` becomes string fields of the node's metadata (`NAMESPACE`, `NODE_NAME`, `CLUSTER_ID`,
/// `NETWORK`, … as the field knows them); [`PARTIAL_STATE`] is added, as every client of this crate waits.
pub fn ztunnel_node(ip: IpAddr, pod: &str, namespace: &str, metadata: BTreeMap<String, String>) -> Node {
    node("ztunnel", ip, pod, namespace, metadata)
}

/// The node message of a waypoint: as [`ztunnel_node`], with `waypoint` in front.
pub fn waypoint_node(ip: IpAddr, pod: &str, namespace: &str, metadata: BTreeMap<String, String>) -> Node {
    node("waypoint", ip, pod, namespace, metadata)
}

fn node(role: &str, ip: IpAddr, pod: &str, namespace: &str, metadata: BTreeMap<String, String>) -> Node {
    let fields = metadata
        .into_iter()
        .chain(std::iter::once((PARTIAL_STATE.to_owned(), "true".to_owned())))
        .map(|(key, value)| (key, prost_types::Value { kind: Some(Kind::StringValue(value)) }))
        .collect();
    Node {
        id: format!("{role}~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"),
        cluster: String::new(),
        metadata: Some(prost_types::Struct { fields }),
        locality: None,
    }
}

/// Live counters of a client; the program registers them.
#[derive(Debug, Default)]
pub struct ClientMetrics {
    /// Streams opened.
    pub connections: AtomicU64,
    /// Streams that ended and attempts that failed.
    pub disconnections: AtomicU64,
    /// Whether a stream is open now.
    pub connected: AtomicBool,
    /// Answers received.
    pub answers: AtomicU64,
    /// Resources received.
    pub resources: AtomicU64,
    /// Removals received.
    pub removals: AtomicU64,
    /// Resources rejected.
    pub rejected: AtomicU64,
    /// Batches that were too large to be applied at once.
    pub split_batches: AtomicU64,
    terminations: [AtomicU64; Termination::ALL.len()],
    /// Answers by type, in the order in which types were added.
    messages: Vec<(Arc<str>, AtomicU64)>,
}

impl ClientMetrics {
    fn new<'a>(type_urls: impl Iterator<Item = &'a Arc<str>>) -> Self {
        Self {
            messages: type_urls.map(|url| (Arc::clone(url), AtomicU64::new(0))).collect(),
            ..Self::default()
        }
    }

    /// Streams and attempts that ended for a reason.
    pub fn terminations(&self, reason: Termination) -> u64 {
        self.terminations.get(reason as usize).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// The types that are subscribed.
    pub fn type_urls(&self) -> impl Iterator<Item = &str> {
        self.messages.iter().map(|(url, _)| &**url)
    }

    /// Answers of type number `index`.
    pub fn messages(&self, index: usize) -> u64 {
        self.messages.get(index).map_or(0, |(_, count)| count.load(Ordering::Relaxed))
    }

    fn count_termination(&self, reason: Termination) {
        if let Some(count) = self.terminations.get(reason as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn count_message(&self, type_url: &str) {
        if let Some((_, count)) = self.messages.iter().find(|(url, _)| **url == *type_url) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Why a stream ended or an attempt failed, in the categories of Istio's node proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Termination {
    /// No connection to the server.
    ConnectionError,
    /// The server refused or broke the stream.
    Error,
    /// The server or the transport closed the stream, as for a restart.
    Reconnect,
    /// The server ended the stream without an error.
    Complete,
}

impl Termination {
    /// All reasons.
    pub const ALL: [Self; 4] = [Self::ConnectionError, Self::Error, Self::Reconnect, Self::Complete];

    /// The value of the metric's label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConnectionError => "ConnectionError",
            Self::Error => "Error",
            Self::Reconnect => "Reconnect",
            Self::Complete => "Complete",
        }
    }
}

/// What a demand found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The server sent a resource of that name or alias; the handler has seen it.
    Present,
    /// The server said that there is none now; should it appear, the handler gets it.
    Absent,
}

/// Why a demand was not answered.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum DemandError {
    /// The type is unknown to this client or subscribed as a whole.
    #[error("{type_url} is not subscribed on demand; cannot ask for {name:?}")]
    NotOnDemand {
        /// The type asked for.
        type_url: String,
        /// The name asked for.
        name: String,
    },
    /// The limit on names or on waiting demands is reached.
    #[error("too many names are demanded of {type_url}; cannot ask for {name:?}")]
    TooMany {
        /// The type asked for.
        type_url: String,
        /// The name asked for.
        name: String,
    },
    /// The driver has ended.
    #[error("the discovery client has stopped")]
    Stopped,
}

enum Command {
    Demand { type_url: Arc<str>, name: String, reply: oneshot::Sender<Result<Found, DemandError>> },
    Release { type_url: Arc<str>, name: String },
}

/// The answer to a demand, which is still to come.
#[must_use = "the answer says whether there is such a resource"]
#[derive(Debug)]
pub struct Demanded(oneshot::Receiver<Result<Found, DemandError>>);

impl Demanded {
    /// Waits for the server's answer. The caller sets the time limit; a dropped future leaves the subscription in place.
    ///
    /// # Errors
    /// [`DemandError`], when there will be no answer.
    pub async fn answer(self) -> Result<Found, DemandError> {
        self.0.await.unwrap_or(Err(DemandError::Stopped))
    }
}

/// Handle to a running client. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    commands: mpsc::Sender<Command>,
    ready: watch::Receiver<bool>,
    metrics: Arc<ClientMetrics>,
}

impl Client {
    /// Starts to describe a client whose changes go to `handler`.
    pub fn builder<C: 'static>(config: ClientConfig, handler: impl Handler<C>) -> ClientBuilder<C> {
        ClientBuilder { config, types: Vec::new(), decoders: Decoders::new(handler) }
    }

    /// Whether the first state of every type has been applied. Never returns to false: a proxy keeps
    /// serving from what it knows while the control plane is away.
    pub fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Waits for [`is_ready`](Self::is_ready); false if the driver ended before that.
    pub async fn ready(&self) -> bool {
        self.ready.clone().wait_for(|ready| *ready).await.is_ok()
    }

    /// Subscribes to one name of an on-demand type and waits for the server's answer.
    /// Returns at once for a name that was answered before. The caller sets the time limit;
    /// a dropped future leaves the subscription in place.
    ///
    /// # Errors
    /// [`DemandError`], when there will be no answer. It says nothing of whether there is such a resource.
    pub async fn demand(&self, type_url: &str, name: &str) -> Result<Found, DemandError> {
        self.start_demand(type_url, name)?.answer().await
    }

    /// As [`demand`](Self::demand), without waiting. Demands and releases take effect in the order of the calls.
    ///
    /// # Errors
    /// [`DemandError`], when too many calls wait for the driver, or it has ended.
    pub fn start_demand(&self, type_url: &str, name: &str) -> Result<Demanded, DemandError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Demand { type_url: type_url.into(), name: name.to_owned(), reply };
        self.send(type_url, name, command)?;
        Ok(Demanded(answer))
    }

    /// Unsubscribes from a demanded name, and drops the resources that were there only because of it.
    ///
    /// # Errors
    /// [`DemandError`], when too many calls wait for the driver, or it has ended; the name is still subscribed then.
    pub fn release(&self, type_url: &str, name: &str) -> Result<(), DemandError> {
        self.send(type_url, name, Command::Release { type_url: type_url.into(), name: name.to_owned() })
    }

    fn send(&self, type_url: &str, name: &str, command: Command) -> Result<(), DemandError> {
        self.commands.try_send(command).map_err(|failed| match failed {
            mpsc::error::TrySendError::Full(_) => {
                DemandError::TooMany { type_url: type_url.to_owned(), name: name.to_owned() }
            }
            mpsc::error::TrySendError::Closed(_) => DemandError::Stopped,
        })
    }

    /// Live counters.
    pub fn metrics(&self) -> &Arc<ClientMetrics> {
        &self.metrics
    }
}

/// Collects the types that a client subscribes to.
pub struct ClientBuilder<C> {
    config: ClientConfig,
    types: Vec<session::Subscription>,
    decoders: Decoders<C>,
}

impl<C: 'static> ClientBuilder<C> {
    /// Subscribes to all resources of a type; `change` makes the handler's kind of change of an update. Types are
    /// requested in the order of these calls.
    #[must_use]
    pub fn wildcard<M>(self, type_url: &str, change: impl Fn(Update<M>) -> C + Send + 'static) -> Self
    where
        M: prost::Message + Default + 'static,
    {
        self.add(type_url, Mode::Wildcard, change)
    }

    /// Subscribes to those resources of a type that are demanded ([`Client::demand`]).
    #[must_use]
    pub fn on_demand<M>(self, type_url: &str, change: impl Fn(Update<M>) -> C + Send + 'static) -> Self
    where
        M: prost::Message + Default + 'static,
    {
        self.add(type_url, Mode::OnDemand(HashMap::new()), change)
    }

    fn add<M>(mut self, type_url: &str, mode: Mode, change: impl Fn(Update<M>) -> C + Send + 'static) -> Self
    where
        M: prost::Message + Default + 'static,
    {
        self.decoders.add(type_url, change);
        self.types.push(session::Subscription::new(type_url, mode));
        self
    }

    /// Makes handle and driver; nothing is sent until the driver runs.
    pub fn build<S: Connector>(self, connector: S) -> (Client, Driver<S>) {
        let (commands, queue) = mpsc::channel(COMMAND_QUEUE);
        let (ready_sender, ready) = watch::channel(false);
        let metrics = Arc::new(ClientMetrics::new(self.types.iter().map(session::Subscription::type_url)));
        let limits = session::Limits { names: self.config.max_names, batch: self.config.max_batch };
        let session = Session::new(self.config.node.clone(), self.types, Box::new(self.decoders), limits);
        let driver = Driver::new(self.config, session, connector, queue, ready_sender, Arc::clone(&metrics));
        (Client { commands, ready, metrics }, driver)
    }
}
