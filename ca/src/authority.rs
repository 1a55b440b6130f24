//! The authority: what it signs with now, what it publishes, and the driver that follows its store.
//!
//! Reading is lock-free: signing loads the current key. The driver alone changes it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use ambit_identity::{SpiffeId, TrustDomain};
use arc_swap::ArcSwap;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::{Notify, watch};

use crate::material::{Material, MaterialError, OwnRoot, SelfSigned};
use crate::request;
use crate::rotation::{Propagation, Record, RecordError, SigningKey, decide};
use crate::signer::{Issued, SignError, Signer, Validity};
use crate::store::{AuthorityStore, FileStore, StoreError, StoredMaterial};

/// How often the store is read even if no change was reported.
const LONGEST_SLEEP: Duration = Duration::from_secs(10);
/// Shortest pause before a decision that depends on time alone.
const SHORTEST_SLEEP: Duration = Duration::from_millis(100);
/// Attempts to write what was decided while other replicas write too.
const ATTEMPTS: usize = 8;

/// Why the authority cannot start, or not follow its store.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Key or certificates cannot be used.
    #[error("certificate authority in {store}: {reason}")]
    Material {
        /// Where they are.
        store: String,
        /// What is wrong with them.
        reason: MaterialError,
    },
    /// The record of rotations cannot be used.
    #[error("certificate authority in {store}: {reason}")]
    Record {
        /// Where it is.
        store: String,
        /// What is wrong with it.
        reason: RecordError,
    },
    /// The store cannot be used.
    #[error("certificate authority in {store}: {reason}")]
    Store {
        /// Which one.
        store: String,
        /// What is wrong.
        reason: StoreError,
    },
    /// Others change the store all the time.
    #[error("certificate authority in {0}: changed by others in each of {ATTEMPTS} attempts to write to it")]
    Contended(String),
}

/// Settings of an authority.
#[derive(Clone)]
pub struct AuthorityConfig {
    /// Whose identities it signs.
    pub trust_domain: TrustDomain,
    /// Where its key and certificates are. A self-signed root is made there if there is none.
    pub store: Arc<dyn AuthorityStore>,
    /// Lifetime given when the caller asks for none.
    pub default_lifetime: Duration,
    /// Longest lifetime given; longer ones are cut.
    pub max_lifetime: Duration,
    /// How far before now certificates begin, for clocks that are behind.
    pub backdating: Duration,
    /// Lifetime of a self-made root.
    pub root_lifetime: Duration,
    /// How long a new root is published before it signs. None: [`LEAST_PROPAGATION`](Self::LEAST_PROPAGATION), or until
    /// every workload has renewed its certificate, if that takes longer.
    pub root_propagation: Option<Duration>,
}

impl AuthorityConfig {
    /// Default of [`max_lifetime`](Self::max_lifetime), and the most that contracts.md §5 allows.
    pub const MAX_LIFETIME: Duration = Duration::from_secs(90 * 24 * 60 * 60);
    /// The least time for which a new root is published, unless [`root_propagation`](Self::root_propagation) is set.
    pub const LEAST_PROPAGATION: Duration = Duration::from_secs(300);

    /// Defaults of contracts.md §5 for the [files](FileStore) in `directory`.
    pub fn new(trust_domain: TrustDomain, directory: PathBuf) -> Self {
        Self::with_store(trust_domain, Arc::new(FileStore::new(directory)))
    }

    /// Defaults of contracts.md §5 for what `store` keeps.
    pub fn with_store(trust_domain: TrustDomain, store: Arc<dyn AuthorityStore>) -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            trust_domain,
            store,
            default_lifetime: DAY,
            max_lifetime: Self::MAX_LIFETIME,
            backdating: Duration::from_secs(120),
            root_lifetime: DAY * 3650,
            root_propagation: None,
        }
    }
}

impl std::fmt::Debug for AuthorityConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuthorityConfig")
            .field("trust_domain", &self.trust_domain)
            .field("store", &self.store.name())
            .field("max_lifetime", &self.max_lifetime)
            .field("root_propagation", &self.root_propagation)
            .finish_non_exhaustive()
    }
}

/// A certificate to be listed as revoked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevokedCertificate {
    /// Its serial number, big-endian.
    pub serial: Vec<u8>,
    /// Since when.
    pub since: SystemTime,
}

/// A server certificate with its key.
#[derive(Debug)]
pub struct ServerCertificate {
    /// Leaf and intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// End of validity.
    pub not_after: SystemTime,
}

/// What is in force at one moment.
struct State {
    signer: Arc<Signer>,
    roots_pem: Arc<str>,
    revocations_pem: Option<Arc<str>>,
    /// When time alone changes this.
    next: Option<SystemTime>,
}

struct Shared {
    config: AuthorityConfig,
    state: ArcSwap<State>,
    version: watch::Sender<u64>,
    reload_failures: AtomicU64,
    /// Wakes the driver to record that certificates of a longer lifetime were given.
    wake: Notify,
}

/// The certificate authority. Clones share it.
#[derive(Clone)]
pub struct Authority(Arc<Shared>);

impl Authority {
    /// Reads or makes key and certificates; the future returned follows the store and is run for the process's life.
    ///
    /// # Errors
    /// [`AuthorityError`] if they are incomplete, malformed, or do not fit together.
    pub async fn open(
        config: AuthorityConfig,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), AuthorityError> {
        let mut follower = Follower::new(&config);
        follower.create_root(SystemTime::now()).await?;
        let state = follower.follow().await?;
        let shared = Arc::new(Shared {
            config,
            state: ArcSwap::from_pointee(state),
            version: watch::Sender::new(0),
            reload_failures: AtomicU64::new(0),
            wake: Notify::new(),
        });
        let driver = Driver { shared: Arc::clone(&shared), follower, last_error: None };
        Ok((Self(shared), driver.run()))
    }

    /// Signs the key of `csr_pem` for `identity`; names in the request are ignored.
    ///
    /// `lifetime` none means the default; more than the maximum, or than the CA has left, is cut.
    ///
    /// # Errors
    /// [`SignError::Request`] if the request is not acceptable, others if we cannot sign.
    pub fn sign(
        &self,
        csr_pem: &str,
        identity: &SpiffeId,
        lifetime: Option<Duration>,
    ) -> Result<Issued, SignError> {
        let key = request::read(csr_pem)?;
        let state = self.0.state.load();
        let validity = self.grant(&state.signer, lifetime, SystemTime::now())?;
        state.signer.issue(&key, identity, validity, &state.roots_pem)
    }

    /// Makes a key and a server certificate for `names` (DNS names or addresses); `lifetime` as in [`Authority::sign`].
    ///
    /// # Errors
    /// [`SignError`] if we cannot sign, for instance because a name cannot be written into a certificate.
    pub fn issue_server_certificate(
        &self,
        names: &[String],
        lifetime: Option<Duration>,
    ) -> Result<ServerCertificate, SignError> {
        let state = self.0.state.load();
        let validity = self.grant(&state.signer, lifetime, SystemTime::now())?;
        let (chain, key) = state.signer.issue_server(names, validity)?;
        Ok(ServerCertificate { chain, key, not_after: validity.not_after })
    }

    /// All roots to be published, PEM: the active one first, coming and former ones after it.
    pub fn roots_pem(&self) -> Arc<str> {
        Arc::clone(&self.0.state.load().roots_pem)
    }

    /// The plugged-in revocation list, PEM, if there is one.
    pub fn revocations_pem(&self) -> Option<Arc<str>> {
        self.0.state.load().revocations_pem.clone()
    }

    /// Signs a revocation list, PEM, to be replaced before `next_update`.
    ///
    /// # Errors
    /// [`SignError`] if we cannot sign: a plugged-in CA certificate may not allow it.
    pub fn sign_revocations(
        &self,
        revoked: &[RevokedCertificate],
        next_update: SystemTime,
    ) -> Result<String, SignError> {
        self.0.state.load().signer.sign_revocations(revoked, SystemTime::now(), next_update)
    }

    /// Notified when roots, key or revocations change; the number counts the changes.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// How often changed files could not be used (the last good ones stayed in force).
    pub fn reload_failures(&self) -> u64 {
        self.0.reload_failures.load(Ordering::Relaxed)
    }

    /// Whose identities are signed.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.config.trust_domain
    }

    /// When the certificate that signs now ends.
    pub fn not_after(&self) -> SystemTime {
        self.0.state.load().signer.not_after()
    }

    /// The validity of a certificate that is signed now; its root is published for at least as long.
    fn grant(
        &self,
        signer: &Signer,
        lifetime: Option<Duration>,
        now: SystemTime,
    ) -> Result<Validity, SignError> {
        let config = &self.0.config;
        if signer.not_after() <= now {
            return Err(SignError::Expired);
        }
        let lifetime = lifetime.unwrap_or(config.default_lifetime).min(config.max_lifetime);
        if signer.note_lifetime(lifetime) {
            self.0.wake.notify_one();
        }
        Ok(Validity {
            not_before: now - config.backdating,
            // A certificate that outlives its issuer would not verify.
            not_after: (now + lifetime).min(signer.not_after()),
        })
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("config", &self.0.config).finish_non_exhaustive()
    }
}

/// Follows the store: reads it, decides, writes the decision back.
struct Follower {
    store: Arc<dyn AuthorityStore>,
    self_signed: SelfSigned,
    propagation: Propagation,
    /// The key that the operator wants, as last read.
    wanted: Option<Known>,
    /// Why what the operator wants cannot be used, until the driver has reported it.
    wanted_error: Option<String>,
    /// The key that signs.
    active: Option<Known>,
}

/// A key that was proven to work.
#[derive(Clone)]
struct Known {
    record: SigningKey,
    signer: Arc<Signer>,
}

impl Follower {
    fn new(config: &AuthorityConfig) -> Self {
        let self_signed = SelfSigned {
            organization: config.trust_domain.to_string(),
            lifetime: config.root_lifetime,
            backdating: config.backdating,
        };
        let store = Arc::clone(&config.store);
        Self {
            store,
            self_signed,
            propagation: config
                .root_propagation
                .map_or(Propagation::UntilRenewed(AuthorityConfig::LEAST_PROPAGATION), Propagation::Fixed),
            wanted: None,
            wanted_error: None,
            active: None,
        }
    }

    /// Makes a self-signed root if there is nothing. Only at the start: what is missing later is being replaced.
    async fn create_root(&self, now: SystemTime) -> Result<(), AuthorityError> {
        let stored = self.store.material().await.map_err(|reason| self.store_error(reason))?;
        if let Some(root) = self.self_signed.create(&stored, now).map_err(|reason| self.unusable(reason))? {
            let OwnRoot { certificate, key } = root;
            let made = self.store.replace_material(&stored, &certificate, &key).await;
            if made.map_err(|reason| self.store_error(reason))? {
                tracing::info!(store = self.store.name(), "self-signed root made");
            }
        }
        Ok(())
    }

    /// What is in force now, as the store has it.
    async fn follow(&mut self) -> Result<State, AuthorityError> {
        let mut may_renew = true;
        for _ in 0..ATTEMPTS {
            let now = SystemTime::now();
            self.wanted_error = None;
            // First the record: what it says was decided on material that is as old or older.
            let text = self.store.rotation().await.map_err(|reason| self.store_error(reason))?;
            let record = text.as_deref().map(Record::parse).transpose();
            let record = record.map_err(|reason| self.unreadable(reason))?;
            let stored = self.store.material().await.map_err(|reason| self.store_error(reason))?;
            let wanted = self.read_wanted(&stored, record.as_ref(), now)?;
            let longest = self.longest_lifetime(record.as_ref());
            let propagation =
                if self.store.forgets_rotation() { Propagation::Unkept } else { self.propagation };
            let decision = decide(record, &wanted.record, longest, propagation, now);
            let written = decision.record.to_text().map_err(|reason| self.unreadable(reason))?;
            if text.as_ref() != Some(&written) {
                let replaced = self.store.replace_rotation(text.as_deref(), &written).await;
                if !replaced.map_err(|reason| self.store_error(reason))? {
                    continue;
                }
            }
            let active = self.activate(&wanted, &decision.record.signing, now)?;
            if std::mem::take(&mut may_renew) && self.renew_root(&stored, now).await? {
                continue;
            }
            let roots_pem = decision.roots.concat().into();
            let revocations_pem = stored.revocations.map(Arc::from);
            return Ok(State { signer: active.signer, roots_pem, revocations_pem, next: decision.next });
        }
        Err(AuthorityError::Contended(self.store.name()))
    }

    /// The key that the operator wants. While that cannot be used, the last good one is wanted; after a restart, the one
    /// that signs.
    fn read_wanted(
        &mut self,
        stored: &StoredMaterial,
        record: Option<&Record>,
        now: SystemTime,
    ) -> Result<Known, AuthorityError> {
        let read = Material::parse(stored).and_then(|material| prove(&material, self.wanted.as_ref(), now));
        let known = match (read, &self.wanted, record) {
            (Ok(known), _, _) => known,
            (Err(error), Some(last), _) => {
                // Reported by the driver, as the store's state and not as an end of following it.
                self.wanted_error = Some(error.to_string());
                last.clone()
            }
            (Err(error), None, Some(record)) => {
                self.wanted_error = Some(error.to_string());
                let material =
                    Material::of_record(&record.signing).map_err(|reason| self.unusable(reason))?;
                prove(&material, None, now).map_err(|reason| self.unusable(reason))?
            }
            (Err(reason), None, None) => return Err(self.unusable(reason)),
        };
        self.wanted = Some(known.clone());
        Ok(known)
    }

    /// What this replica gave under the key that signs by the record.
    fn longest_lifetime(&self, record: Option<&Record>) -> Duration {
        match (&self.active, record) {
            (Some(active), Some(record)) if active.record.is_same_as(&record.signing) => {
                active.signer.longest_lifetime()
            }
            _ => Duration::ZERO,
        }
    }

    fn activate(
        &mut self,
        wanted: &Known,
        signing: &SigningKey,
        now: SystemTime,
    ) -> Result<Known, AuthorityError> {
        let known = match &self.active {
            Some(active) if active.record.is_same_as(signing) => active.clone(),
            _ if wanted.record.is_same_as(signing) => wanted.clone(),
            _ => {
                let material = Material::of_record(signing).map_err(|reason| self.unusable(reason))?;
                prove(&material, None, now).map_err(|reason| self.unusable(reason))?
            }
        };
        self.active = Some(known.clone());
        Ok(known)
    }

    /// Renews a self-made root that is near its end; true if the store has another one now.
    async fn renew_root(&self, stored: &StoredMaterial, now: SystemTime) -> Result<bool, AuthorityError> {
        let renewed = match self.self_signed.renew(stored, now) {
            Ok(None) => return Ok(false),
            Ok(Some(renewed)) => renewed,
            Err(reason) => return Err(self.unusable(reason)),
        };
        match self.store.replace_material(stored, &renewed.certificate, &renewed.key).await {
            Ok(true) => {
                tracing::info!(store = self.store.name(), "self-signed root renewed with the same key");
                Ok(true)
            }
            Ok(false) => Ok(true),
            Err(error) => {
                tracing::warn!(%error, "self-signed root is about to expire and cannot be renewed");
                Ok(false)
            }
        }
    }

    fn store_error(&self, reason: StoreError) -> AuthorityError {
        AuthorityError::Store { store: self.store.name(), reason }
    }

    fn unusable(&self, reason: MaterialError) -> AuthorityError {
        AuthorityError::Material { store: self.store.name(), reason }
    }

    fn unreadable(&self, reason: RecordError) -> AuthorityError {
        AuthorityError::Record { store: self.store.name(), reason }
    }
}

/// Proves that a key works; one that is known already is not proven again and keeps what it counted.
fn prove(material: &Material, known: Option<&Known>, now: SystemTime) -> Result<Known, MaterialError> {
    let signer = Signer::new(material, now)?;
    let record = material.to_record(signer.active_root(), signer.not_after());
    match known {
        Some(known) if known.record.is_same_as(&record) => {
            Ok(Known { record, signer: Arc::clone(&known.signer) })
        }
        _ => Ok(Known { record, signer: Arc::new(signer) }),
    }
}

struct Driver {
    shared: Arc<Shared>,
    follower: Follower,
    /// The last failure that was reported, so that a lasting one is reported once.
    last_error: Option<String>,
}

impl Driver {
    async fn run(mut self) {
        let mut watch = self.follower.store.watch();
        loop {
            // At once: something may have changed before the watch began.
            self.turn().await;
            let now = SystemTime::now();
            let next = self.shared.state.load().next;
            let due = next.map(|at| at.duration_since(now).unwrap_or_default());
            tokio::select! {
                () = watch.changed() => {}
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep(due.unwrap_or(LONGEST_SLEEP).clamp(SHORTEST_SLEEP, LONGEST_SLEEP)) => {}
            }
        }
    }

    async fn turn(&mut self) {
        let followed = self.follower.follow().await;
        let error = match &followed {
            Ok(_) => self.follower.wanted_error.take(),
            Err(error) => Some(error.to_string()),
        };
        if let Some(error) = &error {
            self.shared.reload_failures.fetch_add(1, Ordering::Relaxed);
            if self.last_error.as_ref() != Some(error) {
                tracing::warn!(error, "certificate authority not reloaded; the last good one stays in force");
            }
        }
        self.last_error = error;
        if let Ok(state) = followed {
            self.publish(state);
        }
    }

    fn publish(&self, state: State) {
        let is_same = {
            let present = self.shared.state.load();
            Arc::ptr_eq(&present.signer, &state.signer)
                && present.roots_pem == state.roots_pem
                && present.revocations_pem == state.revocations_pem
        };
        self.shared.state.store(Arc::new(state));
        if !is_same {
            tracing::info!("certificate authority reloaded");
            self.shared.version.send_modify(|version| *version += 1);
        }
    }
}
