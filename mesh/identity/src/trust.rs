//! Trust: roots per trust domain, aliases, revocations; replaced live, read without a lock.
//!
//! One [`Trust`] is shared by every TLS configuration of a process. Several roots of a domain are valid side by
//! side, so a rotation of roots breaks no connection. With no root known, every peer is refused.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use tokio::sync::watch;

use crate::files::FileWatch;
use crate::peer::PeerCertificate;
use crate::revocation::{RevocationError, Revocations};
use crate::spiffe::{SpiffeId, TrustDomain};
use crate::verify::{PeerError, Usage, verify_chain};

/// Roots accepted from one source; a file with more is refused as a mistake.
const MAX_ROOTS: usize = 256;

/// Why roots or revocations cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file is there but cannot be read.
    #[error("cannot read {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// The input is not PEM.
    #[error("root certificates are not PEM: {0}")]
    Pem(rustls::pki_types::pem::Error),
    /// A certificate in it cannot serve as a root.
    #[error("root certificate number {index} cannot be used: {reason}")]
    Root {
        /// Position in the input, from 1.
        index: usize,
        /// What the parser found.
        reason: webpki::Error,
    },
    /// The input has no certificate at all.
    #[error("no root certificate found")]
    Empty,
    /// More roots than are plausible.
    #[error("{0} root certificates are more than {MAX_ROOTS}")]
    TooMany(usize),
    /// The revocation list cannot be used.
    #[error(transparent)]
    Revocation(#[from] RevocationError),
}

/// Sources of roots and revocations.
#[derive(Debug, Clone)]
pub struct TrustConfig {
    /// Our trust domain.
    pub trust_domain: TrustDomain,
    /// Other names of it: identities there are verified against our roots.
    pub aliases: Vec<TrustDomain>,
    /// PEM file of our roots, re-read when it changes. Without one, and until it is there, the roots that come with
    /// our latest certificate are trusted.
    pub roots: Option<PathBuf>,
    /// PEM file of revocation lists, re-read when it changes. Absent means that nothing is revoked.
    pub revocations: Option<PathBuf>,
}

/// Roots and revocations at one moment.
#[derive(Debug)]
pub(crate) struct TrustState {
    trust_domain: TrustDomain,
    /// Number of this set of roots, unique in the process; revocations do not change it.
    roots: u64,
    /// Our domain and its aliases share one list; federated domains have their own.
    anchors: HashMap<TrustDomain, Arc<[TrustAnchor<'static>]>>,
    revocations: Arc<Revocations>,
}

impl TrustState {
    pub(crate) fn anchors(&self, trust_domain: &str) -> Option<&[TrustAnchor<'static>]> {
        self.anchors.get(trust_domain).map(|anchors| &**anchors)
    }

    pub(crate) fn trust_domains(&self) -> Vec<TrustDomain> {
        let mut domains: Vec<_> = self.anchors.keys().cloned().collect();
        domains.sort();
        domains
    }

    pub(crate) fn revocations(&self) -> &Revocations {
        &self.revocations
    }
}

/// Roots by origin. For our domain and its aliases configured roots are in force, or the learned ones if none were
/// configured.
#[derive(Debug, Default)]
struct Sources {
    configured: Option<Vec<CertificateDer<'static>>>,
    learned: Vec<CertificateDer<'static>>,
    federated: HashMap<TrustDomain, Vec<CertificateDer<'static>>>,
}

#[derive(Debug)]
struct Shared {
    aliases: Vec<TrustDomain>,
    state: ArcSwap<TrustState>,
    /// Guards the composition of a new state; never held across an await, never taken by a handshake.
    sources: Mutex<Sources>,
    version: watch::Sender<u64>,
    reload_failures: AtomicU64,
}

/// The roots and revocations of this process. Clones share them.
#[derive(Debug, Clone)]
pub struct Trust(Arc<Shared>);

impl Trust {
    /// A trust without roots: every peer is refused until [`Trust::set_roots`].
    pub fn new(trust_domain: TrustDomain, aliases: Vec<TrustDomain>) -> Self {
        let sources = Sources::default();
        let state =
            compose(&trust_domain, &aliases, &sources, Arc::default()).unwrap_or_else(|_| TrustState {
                trust_domain,
                roots: next_roots(),
                anchors: HashMap::new(),
                revocations: Arc::default(),
            });
        Self(Arc::new(Shared {
            aliases,
            state: ArcSwap::from_pointee(state),
            sources: Mutex::new(sources),
            version: watch::Sender::new(0),
            reload_failures: AtomicU64::new(0),
        }))
    }

    /// A trust read from files, and the future that keeps it up to date; run that for the process's life.
    ///
    /// # Errors
    /// [`TrustError`] if a file is there but cannot be used. A root file that is not there yet is waited for.
    pub async fn from_files(
        config: TrustConfig,
    ) -> Result<(Self, impl Future<Output = ()> + Send), TrustError> {
        let TrustConfig { trust_domain, aliases, roots, revocations } = config;
        let trust = Self::new(trust_domain, aliases);
        let paths: Vec<PathBuf> = roots.iter().chain(&revocations).cloned().collect();
        // Watching begins before the first read, so that no change falls between.
        let watch = FileWatch::new(&paths);
        let mut files = TrustFiles { trust: trust.clone(), roots, revocations, seen: <_>::default() };
        files.reload().await?;
        Ok((trust, files.run(watch)))
    }

    /// Our trust domain.
    pub fn trust_domain(&self) -> TrustDomain {
        self.0.state.load().trust_domain.clone()
    }

    /// Replaces the configured roots of our domain (and its aliases). From then on roots that come with certificates
    /// are ignored, so a root that is removed here is no longer trusted, even if a certificate in use came with it.
    ///
    /// # Errors
    /// [`TrustError`] if `pem` holds none, too many, or one that cannot be used; the roots then stay.
    pub fn set_roots(&self, pem: &[u8]) -> Result<(), TrustError> {
        let roots = parse_roots(pem)?;
        self.update(|sources| sources.configured = Some(roots))
    }

    /// Replaces the roots of a federated trust domain, which is verified against its own roots.
    ///
    /// # Errors
    /// As [`Trust::set_roots`].
    pub fn set_federated(&self, trust_domain: TrustDomain, pem: &[u8]) -> Result<(), TrustError> {
        let roots = parse_roots(pem)?;
        self.update(|sources| {
            sources.federated.insert(trust_domain, roots);
        })
    }

    /// Replaces the roots that came with our latest certificate over the authenticated channel to the CA. They are in
    /// force unless roots are [configured](Trust::set_roots).
    pub(crate) fn set_learned(&self, roots: Vec<CertificateDer<'static>>) -> Result<(), TrustError> {
        if self.0.sources.lock().learned == roots {
            return Ok(());
        }
        self.update(|sources| sources.learned = roots)
    }

    /// Replaces the revocation lists; [subscribers](Trust::subscribe) recheck their peers.
    pub fn set_revocations(&self, revocations: Revocations) {
        let _sources = self.0.sources.lock();
        let state = self.0.state.load();
        self.0.state.store(Arc::new(TrustState {
            trust_domain: state.trust_domain.clone(),
            roots: state.roots,
            anchors: state.anchors.clone(),
            revocations: Arc::new(revocations),
        }));
        self.0.version.send_modify(|version| *version += 1);
    }

    /// Whether a handshake with the peer of an established connection would still succeed at `now`: not expired, not
    /// revoked, and issued under a root that is still trusted.
    ///
    /// Cheap enough for every request: signatures are verified again only when the set of roots has changed since
    /// the last call for this peer (and in the first call), or a revocation list names a certificate of its chain.
    ///
    /// # Errors
    /// The [`PeerError`] that a handshake would fail with; [`PeerError::is_expiry`] identifies expiry.
    pub fn recheck(&self, peer: &PeerCertificate, now: SystemTime) -> Result<(), PeerError> {
        let state = self.state();
        let now = unix_time(now);
        if peer.is_verified_under(state.roots, now.as_secs()) && !state.revocations.lists(peer) {
            return Ok(());
        }
        let (leaf, intermediates) = peer.chain().split_first().ok_or(PeerError::NoCertificate)?;
        verify_chain(&state, leaf, intermediates, peer.usage(), now)?;
        peer.set_verified_under(state.roots, now.as_secs());
        Ok(())
    }

    /// Whether what is open with a peer may stay open at `now`: as [`recheck`](Self::recheck), but expiry of the peer's own
    /// certificate counts only from [`PeerCertificate::open_until`] on. Nothing new may be accepted on the word of this.
    ///
    /// # Errors
    /// As for [`recheck`](Self::recheck).
    pub fn recheck_open(&self, peer: &PeerCertificate, now: SystemTime) -> Result<(), PeerError> {
        let expiry = peer.not_after();
        let in_grace = now > expiry && now <= peer.open_until();
        self.recheck(peer, if in_grace { expiry } else { now })
    }

    /// Notified of every change of roots or revocations; the number counts changes. Expiry does not count as a change of trust:
    /// see [`PeerCertificate::not_after`].
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }

    /// How often a changed file could not be used (the last good content stayed in force).
    pub fn reload_failures(&self) -> u64 {
        self.0.reload_failures.load(Ordering::Relaxed)
    }

    /// How many roots are in force for our trust domain.
    pub fn root_count(&self) -> usize {
        let state = self.0.state.load();
        state.anchors(state.trust_domain.as_str()).map_or(0, <[_]>::len)
    }

    /// Verifies a presented chain, leaf first, as a handshake at `now` would.
    ///
    /// # Errors
    /// [`PeerError`] saying what is wrong with the chain.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        usage: Usage,
        now: SystemTime,
    ) -> Result<SpiffeId, PeerError> {
        let (leaf, intermediates) = chain.split_first().ok_or(PeerError::NoCertificate)?;
        verify_chain(&self.state(), leaf, intermediates, usage, unix_time(now))
    }

    pub(crate) fn state(&self) -> Guard<Arc<TrustState>> {
        self.0.state.load()
    }

    fn update(&self, change: impl FnOnce(&mut Sources)) -> Result<(), TrustError> {
        let mut sources = self.0.sources.lock();
        change(&mut sources);
        let state = self.0.state.load();
        let next = compose(&state.trust_domain, &self.0.aliases, &sources, Arc::clone(&state.revocations))?;
        self.0.state.store(Arc::new(next));
        self.0.version.send_modify(|version| *version += 1);
        Ok(())
    }
}

fn compose(
    trust_domain: &TrustDomain,
    aliases: &[TrustDomain],
    sources: &Sources,
    revocations: Arc<Revocations>,
) -> Result<TrustState, TrustError> {
    let own = to_anchors(sources.configured.as_ref().unwrap_or(&sources.learned))?;
    let mut anchors: HashMap<TrustDomain, Arc<[TrustAnchor<'static>]>> = HashMap::new();
    for (domain, roots) in &sources.federated {
        anchors.insert(domain.clone(), to_anchors(roots)?);
    }
    for domain in std::iter::once(trust_domain).chain(aliases) {
        anchors.insert(domain.clone(), Arc::clone(&own));
    }
    Ok(TrustState { trust_domain: trust_domain.clone(), roots: next_roots(), anchors, revocations })
}

fn next_roots() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

fn unix_time(time: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

fn to_anchors(roots: &[CertificateDer<'static>]) -> Result<Arc<[TrustAnchor<'static>]>, TrustError> {
    roots
        .iter()
        .enumerate()
        .map(|(position, der)| match webpki::anchor_from_trusted_cert(der) {
            Ok(anchor) => Ok(anchor.to_owned()),
            Err(reason) => Err(TrustError::Root { index: position + 1, reason }),
        })
        .collect()
}

/// Reads root certificates and checks that each can serve as one.
pub(crate) fn parse_roots(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let mut roots: Vec<CertificateDer<'static>> = Vec::new();
    for root in CertificateDer::pem_slice_iter(pem) {
        let root = root.map_err(TrustError::Pem)?;
        if !roots.contains(&root) {
            roots.push(root);
        }
    }
    match roots.len() {
        0 => Err(TrustError::Empty),
        count if count > MAX_ROOTS => Err(TrustError::TooMany(count)),
        _ => to_anchors(&roots).map(|_| roots),
    }
}

/// The files behind a [`Trust`] and what was last read from them.
struct TrustFiles {
    trust: Trust,
    roots: Option<PathBuf>,
    revocations: Option<PathBuf>,
    seen: [Option<Vec<u8>>; 2],
}

impl TrustFiles {
    async fn run(mut self, mut watch: FileWatch) {
        loop {
            watch.changed().await;
            if let Err(error) = self.reload().await {
                self.trust.0.reload_failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "trust not reloaded; the last good one stays in force");
            }
        }
    }

    /// Applies what changed. Each file is applied even when the other is unusable. Contents that fail are remembered too,
    /// so that each is reported once.
    async fn reload(&mut self) -> Result<(), TrustError> {
        let revocations = self.reload_revocations().await;
        let roots = self.reload_roots().await;
        revocations.and(roots)
    }

    async fn reload_revocations(&mut self) -> Result<(), TrustError> {
        let [_, seen] = &mut self.seen;
        let Some(path) = &self.revocations else { return Ok(()) };
        if let Some(pem) = read_changed(path, seen).await? {
            self.trust.set_revocations(Revocations::from_pem(&pem)?);
            tracing::info!(lists = self.trust.state().revocations().len(), "revocation lists loaded");
        }
        Ok(())
    }

    async fn reload_roots(&mut self) -> Result<(), TrustError> {
        let [seen, _] = &mut self.seen;
        let Some(path) = &self.roots else { return Ok(()) };
        if let Some(pem) = read_changed(path, seen).await? {
            self.trust.set_roots(&pem)?;
            tracing::info!(roots = self.trust.root_count(), "root certificates loaded");
        }
        Ok(())
    }
}

/// The file's content if it differs from `seen`; a missing file changes nothing.
async fn read_changed(path: &PathBuf, seen: &mut Option<Vec<u8>>) -> Result<Option<Vec<u8>>, TrustError> {
    match tokio::fs::read(path).await {
        Ok(content) if seen.as_ref() == Some(&content) => Ok(None),
        Ok(content) => {
            *seen = Some(content.clone());
            Ok(Some(content))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if seen.is_none() {
                tracing::info!(path = %path.display(), "file not there yet");
            }
            Ok(None)
        }
        Err(reason) => Err(TrustError::Read { path: path.clone(), reason }),
    }
}
