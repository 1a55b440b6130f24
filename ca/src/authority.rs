//! The authority: what it signs with now, what it publishes, and the driver that follows its files.
//!
//! Reading is lock-free: signing loads the current key. The driver alone changes it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use ambit_identity::files::FileWatch;
use ambit_identity::{SpiffeId, TrustDomain};
use arc_swap::ArcSwap;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;

use crate::material::{self, MaterialError, SelfSigned, to_pem};
use crate::request;
use crate::rotation::{Key, Rotation};
use crate::signer::{Issued, SignError, Signer, Validity};

/// How often files are looked at even if nobody says that they changed, and self-made roots for renewal.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// Why the authority cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Its files cannot be used.
    #[error("certificate authority in {directory}: {reason}")]
    Material {
        /// Where its files are.
        directory: PathBuf,
        /// What is wrong with them.
        reason: MaterialError,
    },
    /// The task that read the files ended abnormally.
    #[error("reading the certificate authority's files in {directory} ended abnormally: {reason}")]
    Reader {
        /// Where its files are.
        directory: PathBuf,
        /// How it ended.
        reason: String,
    },
}

/// Settings of an authority.
#[derive(Debug, Clone)]
pub struct AuthorityConfig {
    /// Whose identities it signs.
    pub trust_domain: TrustDomain,
    /// Its files; see contracts.md §5 for their names. A self-signed root is made there if there is none.
    pub directory: PathBuf,
    /// Lifetime given when the caller asks for none.
    pub default_lifetime: Duration,
    /// Longest lifetime given; longer ones are cut.
    pub max_lifetime: Duration,
    /// How far before now certificates begin, for clocks that are behind.
    pub backdating: Duration,
    /// Lifetime of a self-made root.
    pub root_lifetime: Duration,
    /// How long a new root is published before it signs.
    pub root_propagation: Duration,
}

impl AuthorityConfig {
    /// Default of [`max_lifetime`](Self::max_lifetime), and the most that contracts.md §5 allows.
    pub const MAX_LIFETIME: Duration = Duration::from_secs(90 * 24 * 60 * 60);
    /// Default of [`root_propagation`](Self::root_propagation).
    pub const ROOT_PROPAGATION: Duration = Duration::from_secs(300);

    /// Defaults of contracts.md §5 for the files in `directory`.
    pub fn new(trust_domain: TrustDomain, directory: PathBuf) -> Self {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        Self {
            trust_domain,
            directory,
            default_lifetime: DAY,
            max_lifetime: Self::MAX_LIFETIME,
            backdating: Duration::from_secs(120),
            root_lifetime: DAY * 3650,
            root_propagation: Self::ROOT_PROPAGATION,
        }
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
}

struct Shared {
    config: AuthorityConfig,
    state: ArcSwap<State>,
    version: watch::Sender<u64>,
    reload_failures: AtomicU64,
}

/// The certificate authority. Clones share it.
#[derive(Clone)]
pub struct Authority(Arc<Shared>);

impl Authority {
    /// Reads or makes its files; the future returned follows them and is run for the process's life.
    ///
    /// # Errors
    /// [`AuthorityError`] if the files are incomplete, malformed, or do not fit together.
    pub async fn open(
        config: AuthorityConfig,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), AuthorityError> {
        let watch = FileWatch::new(std::slice::from_ref(&config.directory));
        let loaded = load(&config, material::load_or_create).await?;
        let signer = Arc::new(loaded.signer);
        let rotation = Rotation::new(Arc::clone(&signer), config.root_propagation);
        let state = State {
            signer,
            roots_pem: roots_pem(&rotation.roots()),
            revocations_pem: loaded.revocations.map(Arc::from),
        };
        let shared = Arc::new(Shared {
            config,
            state: ArcSwap::from_pointee(state),
            version: watch::Sender::new(0),
            reload_failures: AtomicU64::new(0),
        });
        let driver = Driver { shared: Arc::clone(&shared), rotation, last_error: None };
        Ok((Self(shared), driver.run(watch)))
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
        let validity = self.validity(&state.signer, lifetime, SystemTime::now())?;
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
        let validity = self.validity(&state.signer, lifetime, SystemTime::now())?;
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

    /// Tells when roots, key or revocations changed; the number counts changes.
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

    fn validity(
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

impl Key for Signer {
    fn roots(&self) -> &[CertificateDer<'static>] {
        Signer::roots(self)
    }

    fn active_root(&self) -> &CertificateDer<'static> {
        Signer::active_root(self)
    }

    fn not_after(&self) -> SystemTime {
        Signer::not_after(self)
    }

    fn latest_issued(&self) -> SystemTime {
        Signer::latest_issued(self)
    }

    fn is_same_as(&self, other: &Self) -> bool {
        Signer::is_same_as(self, other)
    }
}

struct Loaded {
    signer: Signer,
    revocations: Option<String>,
}

type Read = fn(&Path, &SelfSigned, SystemTime) -> Result<material::Material, MaterialError>;

/// Reads the files off the runtime, as they may lie on a slow disk.
async fn load(config: &AuthorityConfig, read: Read) -> Result<Loaded, AuthorityError> {
    let directory = config.directory.clone();
    let self_signed = SelfSigned {
        organization: config.trust_domain.to_string(),
        lifetime: config.root_lifetime,
        backdating: config.backdating,
    };
    let prove = move || -> Result<Loaded, MaterialError> {
        let now = SystemTime::now();
        let material = read(&directory, &self_signed, now)?;
        let signer = Signer::new(&material, now)?;
        Ok(Loaded { signer, revocations: material.revocations })
    };
    match tokio::task::spawn_blocking(prove).await {
        Ok(Ok(loaded)) => Ok(loaded),
        Ok(Err(reason)) => Err(AuthorityError::Material { directory: config.directory.clone(), reason }),
        Err(error) => {
            Err(AuthorityError::Reader { directory: config.directory.clone(), reason: error.to_string() })
        }
    }
}

fn roots_pem(roots: &[CertificateDer<'static>]) -> Arc<str> {
    roots.iter().map(|root| to_pem("CERTIFICATE", root)).collect::<String>().into()
}

struct Driver {
    shared: Arc<Shared>,
    rotation: Rotation<Signer>,
    /// So that a lasting failure is reported once, not every minute.
    last_error: Option<String>,
}

impl Driver {
    async fn run(mut self, mut watch: FileWatch) {
        loop {
            let now = SystemTime::now();
            let due = self.rotation.poll_deadline().map(|at| at.duration_since(now).unwrap_or_default());
            let sleep = due.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP);
            tokio::select! {
                () = watch.changed() => {}
                () = tokio::time::sleep(sleep) => {}
            }
            self.turn().await;
        }
    }

    async fn turn(&mut self) {
        let mut revocations = self.shared.state.load().revocations_pem.clone();
        let mut changed = false;
        match load(&self.shared.config, material::reload).await {
            Ok(loaded) => {
                self.last_error = None;
                let read: Option<Arc<str>> = loaded.revocations.map(Arc::from);
                changed |= read != revocations;
                revocations = read;
                changed |= self.rotation.handle_loaded(Arc::new(loaded.signer), SystemTime::now());
            }
            Err(error) => {
                self.shared.reload_failures.fetch_add(1, Ordering::Relaxed);
                let text = error.to_string();
                if self.last_error.as_ref() != Some(&text) {
                    tracing::warn!(%error, "certificate authority not reloaded; the last good one stays in force");
                    self.last_error = Some(text);
                }
                changed |= self.rotation.poll(SystemTime::now());
            }
        }
        if changed {
            self.publish(revocations);
        }
    }

    fn publish(&self, revocations_pem: Option<Arc<str>>) {
        let roots = self.rotation.roots();
        let state = State {
            signer: Arc::clone(self.rotation.active()),
            roots_pem: roots_pem(&roots),
            revocations_pem,
        };
        tracing::info!(roots = roots.len(), "certificate authority reloaded");
        self.shared.state.store(Arc::new(state));
        self.shared.version.send_modify(|version| *version += 1);
    }
}
