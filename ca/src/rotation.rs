//! Which key signs and which roots are published, while they change: a core without I/O or clock.
//!
//! A new root is published first and signs only once everybody had the time to learn it; an old root stays
//! published until the last certificate under it has expired. So a rotation breaks no handshake, even when an
//! operator swaps all files at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;

/// What the core needs to know of a signing key.
pub(crate) trait Key {
    fn roots(&self) -> &[CertificateDer<'static>];
    fn active_root(&self) -> &CertificateDer<'static>;
    /// End of its own validity.
    fn not_after(&self) -> SystemTime;
    /// Latest end of what it signed.
    fn latest_issued(&self) -> SystemTime;
    /// Whether it signs the same way; its further roots may differ.
    fn is_same_as(&self, other: &Self) -> bool;
}

/// The state of rotation.
pub(crate) struct Rotation<K> {
    active: Arc<K>,
    /// Signs from then on.
    pending: Option<(Arc<K>, SystemTime)>,
    /// Roots of former keys, and until when they are published.
    retired: Vec<(CertificateDer<'static>, SystemTime)>,
    published_since: HashMap<CertificateDer<'static>, SystemTime>,
    propagation: Duration,
}

impl<K: Key> Rotation<K> {
    /// Starts with a key whose roots count as known to everybody.
    pub(crate) fn new(active: Arc<K>, propagation: Duration) -> Self {
        let published_since =
            active.roots().iter().map(|root| (root.clone(), SystemTime::UNIX_EPOCH)).collect();
        Self { active, pending: None, retired: Vec::new(), published_since, propagation }
    }

    /// The files hold this key now. Returns whether anything changed.
    pub(crate) fn handle_loaded(&mut self, key: Arc<K>, now: SystemTime) -> bool {
        let before = self.roots();
        let was_pending = self.pending.is_some();
        for root in key.roots() {
            self.published_since.entry(root.clone()).or_insert(now);
        }
        if key.is_same_as(&self.active) {
            self.pending = None;
            let latest = self.active.latest_issued().max(key.latest_issued());
            self.replace_active(key, latest);
        } else {
            let known_since = self.published_since.get(key.active_root()).copied().unwrap_or(now);
            self.pending = Some((key, known_since + self.propagation));
        }
        let switched = self.poll(now);
        switched || was_pending != self.pending.is_some() || before != self.roots()
    }

    /// Lets due changes happen. Returns whether anything changed.
    pub(crate) fn poll(&mut self, now: SystemTime) -> bool {
        let mut changed = false;
        let is_due = |at: SystemTime| at <= now || self.active.not_after() <= now;
        if let Some((key, _)) = self.pending.take_if(|(_, at)| is_due(*at)) {
            let latest = self.active.latest_issued();
            self.replace_active(key, latest);
            changed = true;
        }
        let retired = self.retired.len();
        self.retired.retain(|(_, until)| *until > now);
        changed |= retired != self.retired.len();
        if changed {
            let roots = self.roots();
            self.published_since.retain(|root, _| roots.contains(root));
        }
        changed
    }

    /// When [`poll`](Self::poll) has something to do by itself.
    pub(crate) fn poll_deadline(&self) -> Option<SystemTime> {
        let pending = self.pending.as_ref().map(|(_, at)| (*at).min(self.active.not_after()));
        self.retired.iter().map(|(_, until)| *until).chain(pending).min()
    }

    /// The key that signs now.
    pub(crate) fn active(&self) -> &Arc<K> {
        &self.active
    }

    /// All roots to be published, each once: of the active key, of the coming one, of former ones.
    pub(crate) fn roots(&self) -> Vec<CertificateDer<'static>> {
        let pending = self.pending.iter().flat_map(|(key, _)| key.roots());
        let retired = self.retired.iter().map(|(root, _)| root);
        let mut roots: Vec<CertificateDer<'static>> = Vec::new();
        for root in self.active.roots().iter().chain(pending).chain(retired) {
            if !roots.contains(root) {
                roots.push(root.clone());
            }
        }
        roots
    }

    /// Puts `key` in charge and retires the root of the former until `latest`, the end of its last certificate.
    ///
    /// Only the root that it signed under is kept: others that the operator took away are to go.
    fn replace_active(&mut self, key: Arc<K>, latest: SystemTime) {
        let former = std::mem::replace(&mut self.active, key);
        let root = former.active_root();
        self.retired.retain(|(retired, _)| !self.active.roots().contains(retired));
        if !self.active.roots().contains(root) {
            self.retired.push((root.clone(), latest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Fake {
        name: u8,
        roots: Vec<CertificateDer<'static>>,
        not_after: SystemTime,
        latest: SystemTime,
    }

    impl Key for Fake {
        fn roots(&self) -> &[CertificateDer<'static>] {
            &self.roots
        }
        fn active_root(&self) -> &CertificateDer<'static> {
            &self.roots[0]
        }
        fn not_after(&self) -> SystemTime {
            self.not_after
        }
        fn latest_issued(&self) -> SystemTime {
            self.latest
        }
        fn is_same_as(&self, other: &Self) -> bool {
            self.name == other.name
        }
    }

    const PROPAGATION: Duration = Duration::from_secs(300);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + seconds)
    }

    fn root(name: u8) -> CertificateDer<'static> {
        CertificateDer::from(vec![name])
    }

    fn key(name: u8, further: &[u8], latest: u64) -> Arc<Fake> {
        let roots = std::iter::once(name).chain(further.iter().copied()).map(root).collect();
        Arc::new(Fake { name, roots, not_after: at(1_000_000), latest: at(latest) })
    }

    #[test]
    fn a_root_swapped_at_once_is_published_before_it_signs_and_the_old_one_until_its_last_certificate_ends() {
        let mut rotation = Rotation::new(key(1, &[], 5_000), PROPAGATION);
        assert!(rotation.handle_loaded(key(2, &[], 0), at(10)));
        assert_eq!(rotation.active().name, 1);
        assert_eq!(rotation.roots(), [root(1), root(2)]);
        assert_eq!(rotation.poll_deadline(), Some(at(310)));
        assert!(!rotation.poll(at(309)));
        assert!(rotation.poll(at(310)));
        assert_eq!(rotation.active().name, 2);
        assert_eq!(rotation.roots(), [root(2), root(1)]);
        assert_eq!(rotation.poll_deadline(), Some(at(5_000)));
        assert!(rotation.poll(at(5_000)));
        assert_eq!(rotation.roots(), [root(2)]);
    }

    #[test]
    fn a_root_that_was_published_long_enough_signs_at_once() {
        let mut rotation = Rotation::new(key(1, &[], 5_000), PROPAGATION);
        assert!(rotation.handle_loaded(key(1, &[2], 0), at(0)));
        assert_eq!(rotation.roots(), [root(1), root(2)]);
        assert!(rotation.handle_loaded(key(2, &[1], 0), at(400)));
        assert_eq!(rotation.active().name, 2);
        assert_eq!(rotation.roots(), [root(2), root(1)]);
    }

    #[test]
    fn an_expired_key_gives_way_at_once() {
        let expired = Arc::new(Fake { name: 1, roots: vec![root(1)], not_after: at(5), latest: at(5) });
        let mut rotation = Rotation::new(expired, PROPAGATION);
        assert!(rotation.handle_loaded(key(2, &[], 0), at(10)));
        assert_eq!(rotation.active().name, 2);
        assert_eq!(rotation.roots(), [root(2)]);
    }

    #[test]
    fn going_back_before_the_switch_leaves_the_old_key_in_charge() {
        let mut rotation = Rotation::new(key(1, &[], 5_000), PROPAGATION);
        rotation.handle_loaded(key(2, &[], 0), at(10));
        assert!(rotation.handle_loaded(key(1, &[], 0), at(20)));
        assert!(!rotation.poll(at(400)));
        assert_eq!(rotation.active().name, 1);
        assert_eq!(rotation.roots(), [root(1)]);
    }

    #[test]
    fn loading_the_same_files_again_changes_nothing() {
        let mut rotation = Rotation::new(key(1, &[3], 5_000), PROPAGATION);
        assert!(!rotation.handle_loaded(key(1, &[3], 0), at(10)));
    }
}
