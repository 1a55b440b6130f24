//! Follows the authority's store: reads it, decides, writes the decision back. The driver in `authority` calls it.
//!
//! What the store held last is kept in memory as well. When the store loses it, it is written back, so that an emptied store
//! makes no new root sign that nobody has learnt.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::authority::{ATTEMPTS, AuthorityConfig, AuthorityError, State};
use crate::material::{Material, MaterialError, OwnRoot, SelfSigned, is_own, split_certificates};
use crate::rotation::{Propagation, Record, RecordError, SigningKey, decide};
use crate::signer::Signer;
use crate::store::{AuthorityStore, StoreError, StoredMaterial};

/// Follows the store.
pub(crate) struct Follower {
    pub(crate) store: Arc<dyn AuthorityStore>,
    self_signed: SelfSigned,
    propagation: Propagation,
    replace_lost_root: bool,
    /// The key that the operator wants, as last read.
    wanted: Option<Known>,
    /// Why what the operator wants cannot be used, until the driver has reported it.
    pub(crate) wanted_error: Option<String>,
    /// The key that signs.
    active: Option<Known>,
    /// The record that was last in force here.
    kept: Option<Kept>,
    /// Roots whose key is lost, and until when certificates under them may be valid.
    lost: Option<(Vec<String>, SystemTime)>,
    max_lifetime: Duration,
    /// How often something was written back that the store had lost.
    pub(crate) restorations: Arc<AtomicU64>,
}

/// A record, and when the store was last seen to hold it.
struct Kept {
    record: Record,
    seen: SystemTime,
}

/// A key that was proven to work.
#[derive(Clone)]
struct Known {
    record: SigningKey,
    signer: Arc<Signer>,
}

impl Follower {
    pub(crate) fn new(config: &AuthorityConfig) -> Self {
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
            replace_lost_root: config.replace_lost_root,
            wanted: None,
            wanted_error: None,
            active: None,
            kept: None,
            lost: None,
            max_lifetime: config.max_lifetime,
            restorations: Arc::default(),
        }
    }

    /// Makes a self-signed root if there is nothing. Only at the start: what is missing later is being replaced.
    ///
    /// A store that is empty although roots were published has lost its key. Another replica writes it back; a new root is
    /// made only where the settings say that none does.
    pub(crate) async fn create_root(&mut self, now: SystemTime) -> Result<(), AuthorityError> {
        let stored = self.store.material().await.map_err(|reason| self.store_error(reason))?;
        if stored.is_empty() && self.store.restores_material() {
            match self.store.rotation().await.map_err(|reason| self.store_error(reason))? {
                None => self.check_lost_roots(now).await?,
                Some(text) => {
                    let record = Record::parse(&text).map_err(|reason| self.unreadable(reason))?;
                    if is_own(&record.signing.certificate) {
                        // The record has the key; it is restored from there.
                        return Ok(());
                    }
                    // A plugged-in authority was taken away. A root of our own follows it, once it is propagated.
                }
            }
        }
        if let Some(root) = self.self_signed.create(&stored, now).map_err(|reason| self.unusable(reason))? {
            let OwnRoot { certificate, key } = root;
            let made = self.store.replace_material(&stored, &certificate, &key).await;
            if made.map_err(|reason| self.store_error(reason))? {
                tracing::info!(store = self.store.name(), "self-signed root made");
            }
        }
        Ok(())
    }

    async fn check_lost_roots(&mut self, now: SystemTime) -> Result<(), AuthorityError> {
        let published = self.store.published_roots().await.map_err(|reason| self.store_error(reason))?;
        let Some(published) = published else { return Ok(()) };
        let roots = split_certificates(&published).map_err(|reason| self.unusable(reason))?;
        if !self.replace_lost_root {
            return Err(AuthorityError::Lost(self.store.name()));
        }
        tracing::error!(
            store = self.store.name(),
            "the key of the published roots is lost: a new root is made and signs at once; workloads trust it once they \
             have renewed their certificates"
        );
        self.lost = Some((roots, now + self.max_lifetime));
        Ok(())
    }

    /// What is in force now, as the store has it.
    pub(crate) async fn follow(&mut self) -> Result<State, AuthorityError> {
        let (mut may_renew, mut may_restore) = (true, true);
        for _ in 0..ATTEMPTS {
            let now = SystemTime::now();
            self.wanted_error = None;
            // First the record: what it says was decided on material that is as old or older.
            let text = self.store.rotation().await.map_err(|reason| self.store_error(reason))?;
            let record = text.as_deref().map(Record::parse).transpose();
            let record = self.continued(record.map_err(|reason| self.unreadable(reason))?, now);
            let stored = self.store.material().await.map_err(|reason| self.store_error(reason))?;
            let wanted = self.read_wanted(&stored, record.as_ref(), now)?;
            let longest = self.longest_lifetime(record.as_ref());
            let propagation =
                if self.store.forgets_rotation() { Propagation::Unkept } else { self.propagation };
            let mut decision = decide(record, &wanted.record, longest, propagation, now);
            if let Some((roots, until)) = &self.lost {
                decision.publish_former(roots, *until, now);
            }
            let written = decision.record.to_text().map_err(|reason| self.unreadable(reason))?;
            if text.as_ref() != Some(&written) {
                let replaced = self.store.replace_rotation(text.as_deref(), &written).await;
                if !replaced.map_err(|reason| self.store_error(reason))? {
                    continue;
                }
            }
            self.kept = Some(Kept { record: decision.record.clone(), seen: now });
            self.lost = None;
            let active = self.activate(&wanted, &decision.record.signing, now)?;
            if std::mem::take(&mut may_restore) && self.restore_root(&stored, &wanted.record).await {
                continue;
            }
            if std::mem::take(&mut may_renew) && self.renew_root(&stored, now).await? {
                continue;
            }
            let roots_pem = decision.roots.concat().into();
            let revocations_pem = stored.revocations.map(Arc::from);
            return Ok(State { signer: active.signer, roots_pem, revocations_pem, next: decision.next });
        }
        Err(AuthorityError::Contended(self.store.name()))
    }

    /// The record to go on from: the store's, unless it has forgotten a root under which certificates may still be valid. Then
    /// it was emptied, or another program began it anew, and the one that was in force here is written back.
    fn continued(&self, found: Option<Record>, now: SystemTime) -> Option<Record> {
        let Some(Kept { record, seen }) = &self.kept else { return found };
        if found.as_ref().is_some_and(|found| found.continues(record, *seen, now)) {
            return found;
        }
        tracing::warn!(
            store = self.store.name(),
            "the record of root rotations was lost or begun anew; the one in force is written back"
        );
        self.restorations.fetch_add(1, Ordering::Relaxed);
        Some(record.clone())
    }

    /// Puts a self-made root back into a store that was emptied; true if the store may hold something else now.
    async fn restore_root(&self, stored: &StoredMaterial, wanted: &SigningKey) -> bool {
        if !stored.is_empty() || !self.store.restores_material() || !is_own(&wanted.certificate) {
            return false;
        }
        match self.store.replace_material(stored, &wanted.certificate, &wanted.key).await {
            Ok(_) => {
                tracing::warn!(
                    store = self.store.name(),
                    "the self-signed root was lost and is written back"
                );
                self.restorations.fetch_add(1, Ordering::Relaxed);
                true
            }
            // The plugged-in authority is being replaced.
            Err(StoreError::PluggedIn(_)) => false,
            Err(error) => {
                tracing::warn!(%error, "the self-signed root is not in its store and cannot be written back");
                false
            }
        }
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
