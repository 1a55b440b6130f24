//! The DNS proxy: what pods ask on port 53 arrives here, through 15053 in the pod's namespace.
//!
//! Names that the directory knows are answered from it; everything else goes to the resolver that the
//! application asked, or to the configured ones. A resolver that is not one of the cluster's, asked
//! explicitly by UDP, gets the datagram as it is; a TCP connection to one is an outbound connection like others.
//! `resolver` decides and does no I/O; `server` and `forward` carry messages. `pods` makes one [`Client`] a pod and runs [`DnsProxy::serve_udp`] and
//! [`DnsProxy::serve_tcp`] on its sockets.

mod forward;
pub mod message;
mod metrics;
mod names;
mod originals;
pub mod resolver;
#[cfg(test)]
mod resolver_tests;
mod server;
#[cfg(test)]
mod server_tests;
pub mod wire;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ambit_directory::Reader;
use ambit_net::SocketStock;
use ambit_runtime::shares::{Holder, Shares};
use tokio::sync::Semaphore;

pub use metrics::Metrics;
pub use originals::{Originals, Tracked};

/// How the DNS proxy behaves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The domain of the cluster's names: `cluster.local`.
    pub cluster_domain: String,
    /// The cluster's resolvers. Questions to them are answered from the directory where it can; what it
    /// cannot goes to the one that was asked, else to these in turn. With none, every resolver counts as
    /// the cluster's.
    pub upstreams: Vec<SocketAddr>,
    /// How long one resolver may take to answer.
    pub attempt_timeout: Duration,
    /// Questions that may be with resolvers at the same time, of the process and of one pod.
    pub max_in_flight: usize,
    /// As `max_in_flight`, of one pod.
    pub max_in_flight_per_pod: usize,
    /// How long a resolver outside the cluster may take to answer; its client sets its own limit.
    pub foreign_timeout: Duration,
    /// Datagrams that may be with resolvers outside the cluster at the same time, of the process.
    pub max_foreign: usize,
    /// As `max_foreign`, of one pod.
    pub max_foreign_per_pod: usize,
}

impl Settings {
    /// 2 s an attempt, 4,096 questions at the same time, 512 a pod; 10 s, 1,024 and 64 outside the cluster.
    pub fn new(cluster_domain: &str, upstreams: Vec<SocketAddr>) -> Self {
        Self {
            cluster_domain: cluster_domain.trim_matches('.').to_ascii_lowercase(),
            upstreams,
            attempt_timeout: Duration::from_secs(2),
            max_in_flight: 4096,
            max_in_flight_per_pod: 512,
            foreign_timeout: Duration::from_secs(10),
            max_foreign: 1024,
            max_foreign_per_pod: 64,
        }
    }
}

/// The pod that asks.
#[derive(Debug)]
pub struct Client {
    uid: Arc<str>,
    /// On resolvers_of account sockets towards resolvers are.
    holder: Holder,
    namespace: Arc<str>,
    network: Arc<str>,
    /// Makes the sockets that questions are forwarded with: marked, in the pod's namespace.
    sockets: SocketStock,
    in_flight: Arc<Semaphore>,
    foreign: Arc<Semaphore>,
}

/// The DNS proxy of the process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DnsProxy {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    settings: Settings,
    directory: Reader,
    shares: Shares,
    metrics: Metrics,
    in_flight: Arc<Semaphore>,
    foreign: Arc<Semaphore>,
}

impl DnsProxy {
    /// Answers from `directory`. What is asked of resolvers takes a descriptor each of `shares`.
    pub fn new(settings: Settings, directory: Reader, shares: Shares, metrics: Metrics) -> Self {
        let in_flight = Arc::new(Semaphore::new(settings.max_in_flight));
        let foreign = Arc::new(Semaphore::new(settings.max_foreign));
        Self { shared: Arc::new(Shared { settings, directory, shares, metrics, in_flight, foreign }) }
    }

    /// The pod `uid` in `namespace` and `network`, resolvers_of questions are forwarded with `sockets` on the account of `holder`.
    pub fn client(
        &self,
        uid: &Arc<str>,
        holder: Holder,
        (namespace, network): (&str, &str),
        sockets: SocketStock,
    ) -> Arc<Client> {
        let uid = Arc::clone(uid);
        let in_flight = Arc::new(Semaphore::new(self.shared.settings.max_in_flight_per_pod));
        let foreign = Arc::new(Semaphore::new(self.shared.settings.max_foreign_per_pod));
        let (namespace, network) = (namespace.into(), network.into());
        Arc::new(Client { uid, holder, namespace, network, sockets, in_flight, foreign })
    }

    /// Whether a TCP connection to `resolver` is one of DNS questions for the cluster: `None` is one to this proxy
    /// itself. Where the cluster's resolvers are not known, no other connection is.
    pub fn is_for_cluster(&self, resolver: Option<SocketAddr>) -> bool {
        let knows_none = self.shared.settings.upstreams.is_empty();
        resolver.is_none() || (!knows_none && self.shared.is_own(resolver))
    }
}

impl Shared {
    /// Whether a question was for the cluster's resolvers, as far as is known. Link-local addresses are
    /// node-local caches in front of them.
    fn is_own(&self, original: Option<SocketAddr>) -> bool {
        let Some(original) = original else { return true };
        let link_local = match original.ip() {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        let upstreams = &self.settings.upstreams;
        link_local || upstreams.is_empty() || upstreams.iter().any(|known| known.ip() == original.ip())
    }

    /// Whom to ask, in turn.
    fn upstreams(&self, original: Option<SocketAddr>) -> Vec<SocketAddr> {
        /// Resolvers asked for one question, at most.
        const MAX_ATTEMPTS: usize = 3;
        if !self.is_own(original) {
            return original.into_iter().collect();
        }
        let mut upstreams: Vec<SocketAddr> = original.into_iter().collect();
        upstreams.extend(self.settings.upstreams.iter().filter(|known| Some(**known) != original));
        upstreams.truncate(MAX_ATTEMPTS);
        upstreams
    }
}
