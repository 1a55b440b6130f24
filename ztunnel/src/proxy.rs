//! What all connections share ([`Proxy`]) and what each worker has of its own ([`Worker`]).
//!
//! Built once by `app`; read everywhere on the data path. Nothing here changes but through the
//! snapshots, stores and tables that it holds.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ambit_directory::{Reader, Snapshot, Workload, WorkloadUid};
use ambit_hbone::{Pool, Server};
use ambit_identity::{CertificateStore, Trust, TrustDomain};
use tokio::sync::watch;

use crate::config::SameNode;
use crate::connection::error::ConnectionError;
use crate::connection::report::Reporter;
use crate::directory::ondemand::OnDemandClient;
use crate::dns::DnsProxy;
use crate::outbound::tunnels::TunnelKey;
use crate::pods::sockets::OptionalListeners;
use crate::pods::{LocalPods, Pod};
use ambit_runtime::connections::Connections;
use ambit_runtime::drain::Drain;
use ambit_runtime::hostnames::{Addresses, Hostnames, LOOKUP_DESCRIPTORS};
use ambit_runtime::loads::Loads;
use ambit_runtime::shares::Shares;

/// Bounds of the data path; see [`crate::config::Limits`].
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From accept to an open upstream, over all attempts.
    pub connect_timeout: Duration,
    /// One attempt on one endpoint.
    pub attempt_timeout: Duration,
    /// Endpoints tried for one connection.
    pub connect_attempts: u8,
    /// How long a connection may move no byte; zero: for ever.
    pub connection_idle: Duration,
    /// Wait for the directory to know something.
    pub directory_wait: Duration,
}

/// What the data path needs of the configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The network that this node is in.
    pub network: Arc<str>,
    /// The cluster's name.
    pub cluster_id: Arc<str>,
    /// The trust domain of this node's pods.
    pub trust_domain: TrustDomain,
    /// The domain of the cluster's service names.
    pub cluster_domain: Arc<str>,
    /// How two pods of this node are connected.
    pub same_node: SameNode,
    /// Which optional listeners pods get.
    pub listeners: OptionalListeners,
    /// Bounds.
    pub limits: Limits,
}

/// Decisions that are to be counted but fail nothing.
#[derive(Debug, Default)]
pub struct ProxyMetrics {
    /// Connections that dry-run policies would have decided otherwise.
    pub dry_run_differs: Tally,
    /// Connections that went past a missing waypoint because its owner allows that.
    pub waypoint_bypassed: Tally,
    /// Attempts on another endpoint after one failed.
    pub retries: Tally,
    /// Live connections ended by policy or revocation.
    pub cut: Tally,
    /// Live connections closed because they moved no byte for too long.
    pub idle: Tally,
    /// Endpoints and nodes left out for a while because they could not be reached.
    pub ejected: Tally,
    /// Connections handed over on this node.
    pub handed_over: Tally,
    /// Connections of pods from addresses that are not their own.
    pub foreign_sources: Tally,
    /// Tunnel connections of other proxies that were given up because a PING was not answered.
    pub silent_clients: Tally,
}

/// A count.
#[derive(Debug, Default)]
pub struct Tally(AtomicU64);

impl Tally {
    /// Counts `n` more.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What all connections share.
#[derive(Debug)]
pub struct Proxy {
    /// Configuration.
    pub settings: Settings,
    /// Who is where.
    pub directory: Reader,
    /// The certificates of this node's pods.
    pub certificates: CertificateStore,
    /// Whom we believe.
    pub trust: Trust,
    /// The pods of this node.
    pub local: LocalPods,
    /// Open connections.
    pub connections: Connections,
    /// Open connections by workload.
    pub loads: Loads<WorkloadUid>,
    /// What pods and peers may hold.
    pub shares: Shares,
    /// Where resources come on demand: whom to ask.
    pub on_demand: Option<OnDemandClient>,
    /// Whether the control plane's first state was applied. Before that nothing is let in or out: an
    /// empty directory knows neither policies nor who must be reached through a tunnel.
    pub synced: watch::Receiver<bool>,
    /// Notifies when nothing new is to be taken.
    pub drain: Drain,
    /// Accepts and serves the tunnel connections of other proxies.
    pub server: Server,
    /// Finds the addresses of names outside the mesh.
    pub hostnames: Hostnames,
    /// Answers pods' DNS questions.
    pub dns: DnsProxy,
    /// Counts.
    pub tallies: ProxyMetrics,
}

/// What one worker has of its own.
#[derive(Debug)]
pub struct Worker {
    /// What it shares with the others.
    pub proxy: Arc<Proxy>,
    /// Its number, from 0.
    pub index: usize,
    /// Its tunnels.
    pub pool: Pool<TunnelKey>,
    /// Its memory of metrics.
    pub reporter: Arc<Reporter>,
}

impl Proxy {
    /// The addresses of a name outside the mesh, as the pod would find them, on the pod's account.
    ///
    /// # Errors
    /// [`ConnectionError::Limit`], [`ConnectionError::Lookup`].
    pub async fn lookup(
        &self,
        pod: &Pod,
        name: &str,
        like: IpAddr,
        limit: Duration,
    ) -> Result<Addresses, ConnectionError> {
        let (shares, holder) = (&self.shares, pod.shares().outbound());
        let held = shares
            .lookups
            .take(&holder, 1)
            .and_then(|lookup| Ok((lookup, shares.descriptors.take(&holder, LOOKUP_DESCRIPTORS)?)));
        let held = held.inspect_err(|refusal| shares.report(*refusal, "lookup", &holder, pod.uid(), like))?;
        Ok(self.hostnames.lookup(name, &pod.info().namespace, like, limit, held).await?)
    }

    /// The pod's own workload in the newest snapshot; waits a bounded time for the first state of the
    /// control plane, and for a pod that is newer than its last update.
    ///
    /// # Errors
    /// [`ConnectionError::NotSynced`], [`ConnectionError::UnknownPod`].
    pub async fn workload_of(&self, pod: &Pod) -> Result<Arc<Workload>, ConnectionError> {
        let limit = self.settings.limits.directory_wait;
        if !*self.synced.borrow() {
            let mut synced = self.synced.clone();
            match tokio::time::timeout(limit, synced.wait_for(|synced| *synced)).await {
                Ok(Ok(_)) => {}
                _ => return Err(ConnectionError::NotSynced),
            }
        }
        if let Some(workload) = own(&self.directory.load(), pod) {
            return Ok(workload);
        }
        if let (Some(on_demand), Some(pinned)) = (&self.on_demand, pod.pinned()) {
            // What is waited for below is the same.
            if let Err(error) = on_demand.demand_pinned(pinned, limit).await {
                tracing::warn!(pod = pod.uid(), %error, "the control plane can't be asked for a pod of this node");
            }
        }
        let mut changes = self.directory.changes();
        let found = tokio::time::timeout(limit, async {
            loop {
                changes.borrow_and_update();
                if let Some(workload) = own(&self.directory.load(), pod) {
                    return Some(workload);
                }
                changes.changed().await.ok()?;
            }
        });
        found.await.ok().flatten().ok_or_else(|| ConnectionError::UnknownPod(pod.workload().clone()))
    }
}

/// The pod's workload, if the directory has it and it is the one that the node agent named.
fn own(snapshot: &Snapshot, pod: &Pod) -> Option<Arc<Workload>> {
    let workload = snapshot.workload(pod.workload().as_str())?;
    (workload.identity == *pod.identity()).then(|| workload.clone())
}
