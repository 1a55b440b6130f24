//! Which key signs and which roots are published, while they change: decided from what the store keeps and the time.
//! No I/O, no clock, no memory of its own, so every replica and every restart decides alike.
//!
//! A new root is published first and signs only once everybody had the time to learn it. A workload that learns roots only
//! with its certificates learns it at its next renewal, so by default that time depends on the longest lifetime that was
//! given. An old root stays published until the last certificate under it has expired. So a rotation breaks no handshake,
//! even when an operator swaps all files at once.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// How long after a switch a replica may still sign with the former key, before it has noticed.
const SWITCH_DELAY: Duration = Duration::from_secs(15);
/// Part of a certificate's lifetime after which it has been renewed, in tenths: half, and the jitter of renewals.
const RENEWED_AFTER_TENTHS: u64 = 6;
/// The form of a record that this program writes.
const VERSION: u32 = 1;

/// A signing key as it is recorded. Texts are PEM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SigningKey {
    pub(crate) certificate: String,
    pub(crate) key: String,
    /// Between the certificate and its root, both excluded.
    pub(crate) chain: Vec<String>,
    /// All roots that the operator configured with it.
    pub(crate) roots: Vec<String>,
    /// The root that its certificates lead to; one of `roots`.
    pub(crate) active_root: String,
    /// End of its own validity, seconds of the Unix epoch.
    pub(crate) not_after: u64,
}

impl SigningKey {
    /// Whether it signs the same way; its further roots may differ.
    pub(crate) fn is_same_as(&self, other: &Self) -> bool {
        self.certificate == other.certificate
            && self.key == other.key
            && self.chain == other.chain
            && self.active_root == other.active_root
    }
}

impl std::fmt::Debug for SigningKey {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey").field("active_root", &self.active_root).finish_non_exhaustive()
    }
}

/// What is kept of rotations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    version: u32,
    /// The key that signs.
    pub(crate) signing: SigningKey,
    /// Longest lifetime of what it signed, seconds.
    longest_lifetime: u64,
    /// Since when each configured root is published, seconds of the Unix epoch.
    published: BTreeMap<String, u64>,
    /// Roots of former keys, and until when they are published.
    retired: BTreeMap<String, u64>,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It is not one.
    #[error("record of root rotations cannot be read: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A newer program wrote it.
    #[error("record of root rotations has version {0}; this program knows {VERSION}")]
    Version(u32),
}

impl Record {
    pub(crate) fn parse(text: &str) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_str(text)?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        Ok(serde_json::from_str(text)?)
    }

    /// Whether this is what became of `former`, which was last seen at `seen`. It is if it still publishes the root that signed
    /// then, or if the last certificate under that root has expired since.
    pub(crate) fn continues(&self, former: &Record, seen: SystemTime, now: SystemTime) -> bool {
        let root = &former.signing.active_root;
        let expired =
            unix(seen).saturating_add(former.longest_lifetime).saturating_add(SWITCH_DELAY.as_secs());
        self.published.contains_key(root)
            || self.retired.contains_key(root)
            || self.signing.roots.contains(root)
            || expired < unix(now)
    }

    pub(crate) fn to_text(&self) -> Result<String, RecordError> {
        Ok(serde_json::to_string_pretty(self)?)
    }
}

/// The outcome of [`decide`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    /// To be kept before anything else is done.
    pub(crate) record: Record,
    /// All roots to be published, PEM, each once: the one that signs first.
    pub(crate) roots: Vec<String>,
    /// When time alone changes the decision.
    pub(crate) next: Option<SystemTime>,
}

impl Decision {
    /// Publishes roots of which no key is left as well, until the last certificate under them has expired.
    pub(crate) fn publish_former(&mut self, roots: &[String], until: SystemTime, now: SystemTime) {
        if until <= now {
            return;
        }
        for root in roots.iter().filter(|root| !self.record.signing.roots.contains(root)) {
            self.record.retired.insert(root.clone(), unix(until));
            if !self.roots.contains(root) {
                self.roots.push(root.clone());
            }
        }
        self.next = self.next.into_iter().chain([until]).min();
    }
}

/// How long a new root is published before it signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    /// So long.
    Fixed(Duration),
    /// So long, or until every workload has renewed its certificate, if that takes longer.
    UntilRenewed(Duration),
    /// As long as the record is not kept: after a restart nobody would know which root signed before.
    Unkept,
}

impl Propagation {
    fn seconds(self, longest_lifetime: u64) -> u64 {
        match self {
            Propagation::Fixed(duration) => seconds_up(duration),
            Propagation::UntilRenewed(least) => {
                let renewed = longest_lifetime.saturating_mul(RENEWED_AFTER_TENTHS).div_ceil(10);
                renewed.max(seconds_up(least))
            }
            Propagation::Unkept => u64::MAX,
        }
    }
}

/// Decides from the record (none at the very first start), the key that the operator wants, the longest lifetime that
/// this replica gave under the recorded key, and the time.
pub(crate) fn decide(
    record: Option<Record>,
    wanted: &SigningKey,
    longest_lifetime: Duration,
    propagation: Propagation,
    now: SystemTime,
) -> Decision {
    let mut record = record.unwrap_or_else(|| first(wanted));
    record.longest_lifetime = record.longest_lifetime.max(seconds_up(longest_lifetime));
    let seconds = unix(now);
    for root in &wanted.roots {
        record.published.entry(root.clone()).or_insert(seconds);
    }
    let mut pending = None;
    if wanted.is_same_as(&record.signing) {
        record.signing = wanted.clone();
    } else {
        let since = record.published.get(&wanted.active_root).copied().unwrap_or(seconds);
        let wait = propagation.seconds(record.longest_lifetime);
        let due = since.saturating_add(wait).min(record.signing.not_after);
        if due <= seconds {
            switch(&mut record, wanted, seconds);
        } else {
            pending = Some(due);
        }
    }
    let Record { signing, published, retired, .. } = &mut record;
    retired.retain(|root, until| seconds < *until && !signing.roots.contains(root));
    let next = retired.values().copied().chain(pending).min().map(time);
    let signing_first = std::iter::once(&signing.active_root);
    let mut roots: Vec<String> = Vec::new();
    for root in signing_first.chain(&signing.roots).chain(&wanted.roots).chain(retired.keys()) {
        if !roots.contains(root) {
            roots.push(root.clone());
        }
    }
    published.retain(|root, _| roots.contains(root));
    Decision { record, roots, next }
}

/// The first key of all: whoever starts the mesh with it learns its roots with it.
fn first(key: &SigningKey) -> Record {
    Record {
        version: VERSION,
        signing: key.clone(),
        longest_lifetime: 0,
        published: key.roots.iter().map(|root| (root.clone(), 0)).collect(),
        retired: BTreeMap::new(),
    }
}

/// Makes `key` the signing key. Of the former key only the root that it signed under stays published; further roots that
/// the operator removed are no longer published.
fn switch(record: &mut Record, key: &SigningKey, now: u64) {
    let former = std::mem::replace(&mut record.signing, key.clone());
    let last = now.saturating_add(std::mem::take(&mut record.longest_lifetime)).min(former.not_after);
    record.retired.insert(former.active_root, last.saturating_add(SWITCH_DELAY.as_secs()));
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn time(seconds: u64) -> SystemTime {
    // Record texts come from outside; what is beyond the clock's range never comes.
    let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 33);
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(far)
}

fn seconds_up(duration: Duration) -> u64 {
    duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0))
}

#[cfg(test)]
#[path = "rotation_tests.rs"]
mod tests;
