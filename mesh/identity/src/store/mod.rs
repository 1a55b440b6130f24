//! The certificates of all identities that this process serves.
//!
//! Connections read [`CertificateStore::current`], which takes no lock and never waits; only one that finds
//! nothing valid waits in [`CertificateStore::certificate`]. One driver task asks the issuer, in the order that
//! the [`renewal`](crate::renewal) core decides. A failed renewal leaves the certificate in use.
//!
//! Locks: `renewals` and the writers' side of `entries` are held for look-ups and inserts, never across an await.

mod driver;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::certificate::{CertificateInfo, WorkloadCertificate};
use crate::issuer::{IssueError, Issuer};
use crate::renewal::{RenewalPolicy, Renewals, TooManyIdentities};
use crate::spiffe::SpiffeId;
use crate::tls::TlsSettings;
use crate::trust::Trust;

/// Where the store takes the wall-clock time from.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Settings of a store.
#[derive(Clone)]
pub struct StoreConfig {
    /// Lifetime to ask for. The issuer may give less.
    pub lifetime: Duration,
    /// Limits and intervals of renewal.
    pub renewal: RenewalPolicy,
    /// How long one request may take.
    pub issue_timeout: Duration,
    /// How long a connection waits for a certificate.
    pub wait_timeout: Duration,
    /// Connections that may wait at once.
    pub max_waiters: usize,
    /// TLS of the certificates.
    pub tls: TlsSettings,
    /// The wall clock.
    pub clock: Clock,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            lifetime: Duration::from_secs(24 * 60 * 60),
            renewal: RenewalPolicy::default(),
            issue_timeout: Duration::from_secs(10),
            wait_timeout: Duration::from_secs(10),
            max_waiters: 16_384,
            tls: TlsSettings::default(),
            clock: Arc::new(SystemTime::now),
        }
    }
}

impl std::fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { lifetime, renewal, issue_timeout, wait_timeout, max_waiters, tls, clock: _ } = self;
        f.debug_struct("StoreConfig")
            .field("lifetime", lifetime)
            .field("renewal", renewal)
            .field("issue_timeout", issue_timeout)
            .field("wait_timeout", wait_timeout)
            .field("max_waiters", max_waiters)
            .field("tls", tls)
            .finish_non_exhaustive()
    }
}

/// Why there is no certificate for a connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CertificateError {
    /// None came in time.
    #[error("no valid certificate for {identity} after {waited:?}{}", cause(.last))]
    Timeout {
        /// The requested identity.
        identity: SpiffeId,
        /// How long was waited.
        waited: Duration,
        /// Why the last request failed, if one did.
        last: Option<Arc<IssueError>>,
    },
    /// The identity was released while waiting: its last pod is gone.
    #[error("{0} is no longer served here")]
    Released(SpiffeId),
    /// Too many connections wait already.
    #[error("{waiting} connections wait for certificates already; not waiting for {identity}")]
    TooManyWaiters {
        /// The requested identity.
        identity: SpiffeId,
        /// How many wait.
        waiting: usize,
    },
    /// Too many identities.
    #[error("no certificate for {identity}: {reason}")]
    TooManyIdentities {
        /// The requested identity.
        identity: SpiffeId,
        /// The limit.
        reason: TooManyIdentities,
    },
    /// The driver has ended: the process is shutting down.
    #[error("certificates are no longer fetched; none for {0}")]
    Stopped(SpiffeId),
}

fn cause(last: &Option<Arc<IssueError>>) -> String {
    last.as_ref().map(|error| format!(": {error}")).unwrap_or_default()
}

/// Counters of a store; the program registers them.
#[derive(Debug, Default)]
pub struct StoreMetrics {
    /// Requests started.
    pub requests: AtomicU64,
    /// Requests that returned a certificate.
    pub issued: AtomicU64,
    /// Requests that failed.
    pub failed: AtomicU64,
    /// Connections that had to wait.
    pub waits: AtomicU64,
    /// Connections that waited without getting a certificate.
    pub wait_failures: AtomicU64,
    /// Connections that wait now.
    pub waiting: AtomicUsize,
    /// Identities known now.
    pub identities: AtomicUsize,
}

/// The state of one identity, for dumps.
#[derive(Debug, Clone)]
pub struct CertificateState {
    /// The identity.
    pub identity: SpiffeId,
    /// The certificate in use; it may have expired.
    pub certificate: Option<Arc<WorkloadCertificate>>,
    /// Whether it is valid now.
    pub is_valid: bool,
    /// Consecutive failures since the last success.
    pub failures: u32,
    /// When the next attempt or renewal is planned; none while one is due or in flight.
    pub next: Option<SystemTime>,
    /// Why the last request failed; none after a success.
    pub last_error: Option<Arc<IssueError>>,
}

impl CertificateState {
    /// Summary of the certificate in use.
    pub fn info(&self) -> Option<&CertificateInfo> {
        self.certificate.as_ref().map(|certificate| certificate.info())
    }
}

/// One identity: its certificate, and the outcome that waiters receive.
struct Entry {
    current: ArcSwapOption<WorkloadCertificate>,
    outcome: watch::Sender<Outcome>,
}

#[derive(Debug, Clone, Default)]
struct Outcome {
    is_gone: bool,
    last_error: Option<Arc<IssueError>>,
}

type Entries = HashMap<SpiffeId, Arc<Entry>>;

struct Shared {
    config: StoreConfig,
    issuer: Arc<dyn Issuer>,
    trust: Trust,
    entries: ArcSwap<Entries>,
    /// Guards the core and serialises changes of `entries`.
    renewals: Mutex<Renewals>,
    wake: Notify,
    /// Number of the request whose response brought the roots in force.
    learned_from: AtomicU64,
    rotated: watch::Sender<u64>,
    is_stopped: watch::Sender<bool>,
    metrics: StoreMetrics,
}

/// Handle to the certificates. Clones share them; dropping the last one does not end the driver.
#[derive(Clone)]
pub struct CertificateStore(Arc<Shared>);

impl CertificateStore {
    /// Returns the store and its driver, which the caller must run until the process ends. Dropping the driver stops all
    /// renewal and fails the waiting connections.
    pub fn new(
        config: StoreConfig,
        issuer: Arc<dyn Issuer>,
        trust: Trust,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let renewals = Renewals::new(config.renewal.clone(), rand::random());
        let shared = Arc::new(Shared {
            config,
            issuer,
            trust,
            entries: ArcSwap::default(),
            renewals: Mutex::new(renewals),
            wake: Notify::new(),
            learned_from: AtomicU64::new(0),
            rotated: watch::Sender::new(0),
            is_stopped: watch::Sender::new(false),
            metrics: StoreMetrics::default(),
        });
        (Self(Arc::clone(&shared)), driver::drive(driver::StopGuard(shared)))
    }

    /// The valid certificate of `identity`, if there is one now. Takes no lock and never waits, so that every connection can
    /// call it.
    pub fn current(&self, identity: &SpiffeId) -> Option<Arc<WorkloadCertificate>> {
        let entries = self.0.entries.load();
        let certificate = entries.get(identity)?.current.load_full()?;
        certificate.is_valid_at((self.0.config.clock)()).then_some(certificate)
    }

    /// The valid certificate of `identity`. Waits for one if necessary; its request goes before all others.
    ///
    /// The certificate of an identity that was not [prefetched](Self::prefetch) is kept while valid, and not renewed.
    ///
    /// # Errors
    /// [`CertificateError`] if none comes within the configured time, or too many wait already.
    pub async fn certificate(
        &self,
        identity: &SpiffeId,
    ) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        if let Some(certificate) = self.current(identity) {
            return Ok(certificate);
        }
        let _waiting = self.start_waiting(identity)?;
        let outcome = self.wait(identity).await;
        if outcome.is_err() {
            self.0.metrics.wait_failures.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    /// Fetches the certificate of `identity` in advance and keeps it renewed. Pair with [`release`](Self::release).
    ///
    /// # Errors
    /// [`CertificateError::TooManyIdentities`] at the limit.
    pub fn prefetch(&self, identity: &SpiffeId) -> Result<(), CertificateError> {
        self.with_renewals(identity, |renewals, now| renewals.hold(identity, now)).map(drop)
    }

    /// Undoes one [`prefetch`](Self::prefetch); the last one forgets the certificate.
    pub fn release(&self, identity: &SpiffeId) {
        let mut renewals = self.0.renewals.lock();
        renewals.release(identity);
        self.0.remove_dropped(&mut renewals);
        drop(renewals);
        self.0.wake.notify_one();
    }

    /// All identities, sorted, for dumps.
    pub fn list(&self) -> Vec<CertificateState> {
        let now = (self.0.config.clock)();
        let renewals = self.0.renewals.lock();
        let mut states: Vec<_> = self
            .0
            .entries
            .load()
            .iter()
            .map(|(identity, entry)| {
                let certificate = entry.current.load_full();
                let (failures, next) = renewals.progress(identity).unwrap_or_default();
                CertificateState {
                    identity: identity.clone(),
                    is_valid: certificate.as_ref().is_some_and(|c| c.is_valid_at(now)),
                    certificate,
                    failures,
                    next,
                    last_error: entry.outcome.borrow().last_error.clone(),
                }
            })
            .collect();
        drop(renewals);
        states.sort_by(|a, b| a.identity.cmp(&b.identity));
        states
    }

    /// Notified of every certificate that arrives; the number counts them.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.rotated.subscribe()
    }

    /// The trust that the certificates' TLS configurations read.
    pub fn trust(&self) -> &Trust {
        &self.0.trust
    }

    /// Counters.
    pub fn metrics(&self) -> &StoreMetrics {
        &self.0.metrics
    }

    fn start_waiting(&self, identity: &SpiffeId) -> Result<WaitGuard<'_>, CertificateError> {
        let metrics = &self.0.metrics;
        let waiting = metrics.waiting.fetch_add(1, Ordering::Relaxed);
        let guard = WaitGuard(metrics);
        metrics.waits.fetch_add(1, Ordering::Relaxed);
        if waiting >= self.0.config.max_waiters {
            metrics.wait_failures.fetch_add(1, Ordering::Relaxed);
            return Err(CertificateError::TooManyWaiters { identity: identity.clone(), waiting });
        }
        Ok(guard)
    }

    async fn wait(&self, identity: &SpiffeId) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        let entry = self.with_renewals(identity, |renewals, now| renewals.want(identity, now))?;
        let waited = self.0.config.wait_timeout;
        let mut outcome = entry.outcome.subscribe();
        let mut stopped = self.0.is_stopped.subscribe();
        let deadline = tokio::time::sleep(waited);
        tokio::pin!(deadline);
        loop {
            let now = (self.0.config.clock)();
            if let Some(certificate) = entry.current.load_full().filter(|c| c.is_valid_at(now)) {
                return Ok(certificate);
            }
            if outcome.borrow_and_update().is_gone {
                return Err(CertificateError::Released(identity.clone()));
            }
            tokio::select! {
                changed = outcome.changed() => {
                    if changed.is_err() {
                        return Err(CertificateError::Released(identity.clone()));
                    }
                    // After a failure the ordinary back-off applies, which waiting connections shorten.
                    let _entry = self.with_renewals(identity, |renewals, now| renewals.want(identity, now))?;
                }
                _ = stopped.wait_for(|stopped| *stopped) => {
                    return Err(CertificateError::Stopped(identity.clone()));
                }
                () = &mut deadline => {
                    let last = outcome.borrow().last_error.clone();
                    return Err(CertificateError::Timeout { identity: identity.clone(), waited, last });
                }
            }
        }
    }

    /// Changes the core, makes sure that the identity has an entry, and wakes the driver.
    fn with_renewals(
        &self,
        identity: &SpiffeId,
        change: impl FnOnce(&mut Renewals, SystemTime) -> Result<(), TooManyIdentities>,
    ) -> Result<Arc<Entry>, CertificateError> {
        let now = (self.0.config.clock)();
        let mut renewals = self.0.renewals.lock();
        change(&mut renewals, now)
            .map_err(|reason| CertificateError::TooManyIdentities { identity: identity.clone(), reason })?;
        let entry = self.0.entry(identity);
        self.0.metrics.identities.store(renewals.len(), Ordering::Relaxed);
        drop(renewals);
        self.0.wake.notify_one();
        Ok(entry)
    }
}

impl std::fmt::Debug for CertificateStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateStore")
            .field("identities", &self.0.entries.load().len())
            .finish_non_exhaustive()
    }
}

/// Counts one waiter for as long as it waits.
struct WaitGuard<'a>(&'a StoreMetrics);

impl Drop for WaitGuard<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// The entry of `identity`, made if absent. The caller holds `renewals`.
    fn entry(&self, identity: &SpiffeId) -> Arc<Entry> {
        let entries = self.entries.load();
        if let Some(entry) = entries.get(identity) {
            return Arc::clone(entry);
        }
        let entry = Arc::new(Entry {
            current: ArcSwapOption::empty(),
            outcome: watch::Sender::new(Outcome::default()),
        });
        let mut next = Entries::clone(&entries);
        next.insert(identity.clone(), Arc::clone(&entry));
        self.entries.store(Arc::new(next));
        entry
    }

    /// Removes the entries of identities that the core has dropped. The caller holds `renewals`.
    fn remove_dropped(&self, renewals: &mut Renewals) {
        let mut next: Option<Entries> = None;
        while let Some(identity) = renewals.poll_dropped() {
            let next = next.get_or_insert_with(|| Entries::clone(&self.entries.load()));
            if let Some(entry) = next.remove(&identity) {
                entry.outcome.send_modify(|outcome| outcome.is_gone = true);
            }
        }
        if let Some(next) = next {
            self.entries.store(Arc::new(next));
        }
        self.metrics.identities.store(renewals.len(), Ordering::Relaxed);
    }
}
