//! The authority: what it signs with now, what it publishes, and the driver that keeps it up to date.
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

use crate::follower::Follower;
use crate::material::MaterialError;
use crate::request;
use crate::rotation::RecordError;
use crate::signer::{Issued, SignError, Signer, Validity};
use crate::store::{AuthorityStore, FileStore, StoreError};

/// How often the store is read even if no change was reported.
const LONGEST_SLEEP: Duration = Duration::from_secs(10);
/// Shortest pause before a decision that depends on time alone.
const SHORTEST_SLEEP: Duration = Duration::from_millis(100);
/// Attempts to write what was decided while other replicas write too.
pub(crate) const ATTEMPTS: usize = 8;

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
    /// Roots were published, but their key is not in the store any more.
    #[error("certificate authority in {0}: the key of the published roots is not there any more")]
    Lost(String),
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
    /// Whether a new root is made where the key of published roots is lost; otherwise opening fails with
    /// [`AuthorityError::Lost`].
    pub replace_lost_root: bool,
}

impl AuthorityConfig {
    /// Default of [`max_lifetime`](Self::max_lifetime). A change of roots takes at least the longest lifetime that was given.
    pub const DEFAULT_MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
    /// The most that [`max_lifetime`](Self::max_lifetime) may be (certificate contract).
    pub const MAX_LIFETIME: Duration = Duration::from_secs(90 * 24 * 60 * 60);
    /// The least time for which a new root is published, unless [`root_propagation`](Self::root_propagation) is set.
    pub const LEAST_PROPAGATION: Duration = Duration::from_secs(300);

    /// Defaults of the certificate contract for the [files](FileStore) in `directory`.
    pub fn new(trust_domain: TrustDomain, directory: PathBuf) -> Self {
        Self::with_store(trust_domain, Arc::new(FileStore::new(directory)))
    }

    /// Defaults of the certificate contract for what `store` keeps.
    pub fn with_store(trust_domain: TrustDomain, store: Arc<dyn AuthorityStore>) -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            trust_domain,
            store,
            default_lifetime: DAY,
            max_lifetime: Self::DEFAULT_MAX_LIFETIME,
            backdating: Duration::from_secs(120),
            root_lifetime: DAY * 3650,
            root_propagation: None,
            replace_lost_root: false,
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
pub(crate) struct State {
    pub(crate) signer: Arc<Signer>,
    pub(crate) roots_pem: Arc<str>,
    pub(crate) revocations_pem: Option<Arc<str>>,
    /// When time alone changes this.
    pub(crate) next: Option<SystemTime>,
}

struct Shared {
    config: AuthorityConfig,
    state: ArcSwap<State>,
    version: watch::Sender<u64>,
    reload_failures: AtomicU64,
    restorations: Arc<AtomicU64>,
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
            restorations: Arc::clone(&follower.restorations),
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
        self.sign_key(&request::read(csr_pem)?, identity, lifetime)
    }

    /// The same for a request in DER.
    ///
    /// # Errors
    /// As [`Authority::sign`].
    pub fn sign_der(
        &self,
        csr_der: &[u8],
        identity: &SpiffeId,
        lifetime: Option<Duration>,
    ) -> Result<Issued, SignError> {
        self.sign_key(&request::read_der(csr_der)?, identity, lifetime)
    }

    /// The same for a public key (SubjectPublicKeyInfo, DER) whose possession a trusted party has verified.
    ///
    /// # Errors
    /// As [`Authority::sign`].
    pub fn sign_verified_key(
        &self,
        key_der: &[u8],
        identity: &SpiffeId,
        lifetime: Option<Duration>,
    ) -> Result<Issued, SignError> {
        self.sign_key(&request::read_verified_key(key_der)?, identity, lifetime)
    }

    fn sign_key(
        &self,
        key: &request::RequestedKey,
        identity: &SpiffeId,
        lifetime: Option<Duration>,
    ) -> Result<Issued, SignError> {
        let state = self.0.state.load();
        let validity = self.grant(&state.signer, lifetime, SystemTime::now())?;
        state.signer.issue(key, identity, validity, &state.roots_pem)
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

    /// A secret that every holder of the signing key derives alike, and that says nothing of it (RFC 5869). `purpose` keeps secrets of
    /// different uses apart. It changes with the signing key.
    pub fn derive(&self, purpose: &str) -> [u8; 32] {
        self.0.state.load().signer.derive(purpose)
    }

    /// Notified when roots, key or revocations change; the number counts the changes.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// How often changed files could not be used (the last good ones stayed in force).
    pub fn reload_failures(&self) -> u64 {
        self.0.reload_failures.load(Ordering::Relaxed)
    }

    /// How often something was written back that the store had lost.
    pub fn restorations(&self) -> u64 {
        self.0.restorations.load(Ordering::Relaxed)
    }

    /// Whose identities are signed.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.0.config.trust_domain
    }

    /// How far before now certificates begin.
    pub fn backdating(&self) -> Duration {
        self.0.config.backdating
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
