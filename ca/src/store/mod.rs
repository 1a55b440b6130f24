//! Where the authority keeps its key, and what it must remember about a change of roots.
//!
//! A seam: files ([`FileStore`]), or Secrets of Kubernetes, which the control plane implements. Several replicas may share
//! one store, and any of them may restart at any time, so nothing that decides who signs or which roots are published is
//! kept elsewhere.

mod files;

use std::path::PathBuf;

use ambit_identity::files::FileWatch;
use async_trait::async_trait;

pub use files::FileStore;

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be read or written.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// A server that keeps it cannot be reached, or refuses.
    #[error("{object}: {reason}")]
    Server {
        /// What was read or written.
        object: String,
        /// What the server, or the connection to it, said.
        reason: String,
    },
    /// What is there was put in place by others and is not ours to replace.
    #[error("{0} was plugged in and is replaced by whoever did that")]
    PluggedIn(String),
    /// The task that used the store ended abnormally.
    #[error("using the store ended abnormally: {0}")]
    Task(String),
}

/// Key and certificates of the authority as PEM texts.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StoredMaterial {
    /// The signing certificate; further ones in it belong to the chain.
    pub certificate: Option<String>,
    /// Its private key.
    pub key: Option<String>,
    /// From the signing certificate up to the root.
    pub chain: Option<String>,
    /// One or several roots. Without them the signing certificate is its own root.
    pub roots: Option<String>,
    /// The revocation list.
    pub revocations: Option<String>,
}

impl StoredMaterial {
    /// Whether there is neither key nor certificate.
    pub fn is_empty(&self) -> bool {
        let Self { certificate, key, chain, roots, revocations: _ } = self;
        [certificate, key, chain, roots].into_iter().all(Option::is_none)
    }
}

impl std::fmt::Debug for StoredMaterial {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredMaterial")
            .field("certificate", &self.certificate)
            .field("roots", &self.roots)
            .finish_non_exhaustive()
    }
}

/// Notices that a store may have changed.
#[derive(Debug)]
pub enum StoreWatch {
    /// By its files.
    Files(FileWatch),
    /// Not at all: the store is read at intervals, every ten seconds at the latest.
    Intervals,
}

impl StoreWatch {
    /// Returns when something may have changed. Cancel-safe.
    pub async fn changed(&mut self) {
        match self {
            Self::Files(files) => files.changed().await,
            Self::Intervals => std::future::pending().await,
        }
    }
}

/// What is kept by an authority. Reads must give what is there now, not what was there a while ago.
#[async_trait]
pub trait AuthorityStore: Send + Sync + 'static {
    /// Key and certificates as they are now.
    ///
    /// # Errors
    /// [`StoreError`] if they cannot be read.
    async fn material(&self) -> Result<StoredMaterial, StoreError>;

    /// Puts a self-signed certificate with its key in place of `replaced`. Returns false, and changes nothing, if
    /// certificate or key are no longer those.
    ///
    /// # Errors
    /// [`StoreError`] if they cannot be written.
    async fn replace_material(
        &self,
        replaced: &StoredMaterial,
        certificate: &str,
        key: &str,
    ) -> Result<bool, StoreError>;

    /// The record of rotations; it holds a private key.
    ///
    /// # Errors
    /// [`StoreError`] if it cannot be read.
    async fn rotation(&self) -> Result<Option<String>, StoreError>;

    /// Puts a record in place of `replaced`. Returns false, and changes nothing, if that is no longer what is there.
    ///
    /// # Errors
    /// [`StoreError`] if it cannot be written.
    async fn replace_rotation(&self, replaced: Option<&str>, record: &str) -> Result<bool, StoreError>;

    /// Roots that were published to workloads before, PEM, where that is known beside the store. `None` if none were.
    ///
    /// # Errors
    /// [`StoreError`] if they cannot be read.
    async fn published_roots(&self) -> Result<Option<String>, StoreError> {
        Ok(None)
    }

    /// Whether a self-made root that is missing was lost, and is written back by whoever knows it. Files may be missing because
    /// an operator is about to replace them.
    fn restores_material(&self) -> bool {
        false
    }

    /// Whether the record is lost at a restart, because it could not be written. Then no other root begins to sign.
    fn forgets_rotation(&self) -> bool {
        false
    }

    /// Notices when any of it may have changed.
    fn watch(&self) -> StoreWatch;

    /// Names the store in messages.
    fn name(&self) -> String;
}
