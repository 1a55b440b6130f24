//! The store as files of one directory (certificate contract): `ca-cert.pem`, `ca-key.pem`, `cert-chain.pem`,
//! `root-cert.pem`, `ca-crl.pem`; or `tls.crt`, `tls.key`, `ca.crt` of a `kubernetes.io/tls` Secret. The record of
//! rotations is `rotation.json` beside them.
//!
//! Writers take a lock file, so that of two replicas over one directory one learns that it came second.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ambit_identity::files::FileWatch;
use async_trait::async_trait;
use parking_lot::Mutex;

use super::{AuthorityStore, StoreError, StoreWatch, StoredMaterial};

/// A directory with the authority's files. Clones share it.
#[derive(Debug, Clone)]
pub struct FileStore {
    directory: PathBuf,
    /// The record, where the directory cannot be written to, as a mounted Secret: it is lost at a restart.
    unwritten: Arc<Mutex<Option<String>>>,
}

impl FileStore {
    /// The files of `directory`, which is made when something is written to it.
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, unwritten: Arc::default() }
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        // Files may lie on a slow disk.
        match tokio::task::spawn_blocking(move || work(&store)).await {
            Ok(outcome) => outcome,
            Err(error) => Err(StoreError::Task(error.to_string())),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn read_material(&self) -> Result<StoredMaterial, StoreError> {
        let is_tls = self.path("tls.crt").exists();
        let [certificate, key, chain, roots] = match is_tls {
            // The certificate's file holds the chain as well.
            true => [Some("tls.crt"), Some("tls.key"), None, Some("ca.crt")],
            false => [Some("ca-cert.pem"), Some("ca-key.pem"), Some("cert-chain.pem"), Some("root-cert.pem")],
        };
        let read = |name: Option<&str>| name.map_or(Ok(None), |name| read(&self.path(name)));
        Ok(StoredMaterial {
            certificate: read(certificate)?,
            key: read(key)?,
            chain: read(chain)?,
            roots: read(roots)?,
            revocations: read(Some("ca-crl.pem"))?,
        })
    }

    fn read_rotation(&self) -> Result<Option<String>, StoreError> {
        let unwritten = self.unwritten.lock().clone();
        match unwritten {
            Some(record) => Ok(Some(record)),
            None => read(&self.path("rotation.json")),
        }
    }

    /// Keeps other writers out until the file returned is dropped.
    fn lock(&self) -> Result<File, StoreError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |reason| StoreError::File { path, reason }
        };
        std::fs::create_dir_all(&self.directory).map_err(failed(&self.directory))?;
        let path = self.path(".lock");
        let mut options = File::options();
        let file = options.create(true).append(true).mode(0o600).open(&path).map_err(failed(&path))?;
        file.lock().map_err(failed(&path))?;
        Ok(file)
    }

    fn write_rotation(&self, replaced: Option<&str>, record: &str) -> Result<bool, StoreError> {
        let _lock = self.lock()?;
        if self.read_rotation()?.as_deref() != replaced {
            return Ok(false);
        }
        write(&self.path("rotation.json"), record.as_bytes(), 0o600)?;
        *self.unwritten.lock() = None;
        Ok(true)
    }
}

#[async_trait]
impl AuthorityStore for FileStore {
    async fn material(&self) -> Result<StoredMaterial, StoreError> {
        self.run(Self::read_material).await
    }

    async fn replace_material(
        &self,
        replaced: &StoredMaterial,
        certificate: &str,
        key: &str,
    ) -> Result<bool, StoreError> {
        let (replaced, certificate, key) = (replaced.clone(), certificate.to_owned(), key.to_owned());
        let replace = move |store: &Self| {
            let _lock = store.lock()?;
            let present = store.read_material()?;
            if (present.certificate, present.key.as_ref()) != (replaced.certificate, replaced.key.as_ref()) {
                return Ok(false);
            }
            // The key is written first: alone, it is one whose certificate is made again after a crash.
            if present.key.as_ref() != Some(&key) {
                write(&store.path("ca-key.pem"), key.as_bytes(), 0o600)?;
            }
            write(&store.path("ca-cert.pem"), certificate.as_bytes(), 0o644)?;
            Ok(true)
        };
        self.run(replace).await
    }

    async fn rotation(&self) -> Result<Option<String>, StoreError> {
        self.run(Self::read_rotation).await
    }

    async fn replace_rotation(&self, replaced: Option<&str>, record: &str) -> Result<bool, StoreError> {
        let (replaced, record) = (replaced.map(str::to_owned), record.to_owned());
        let replace = move |store: &Self| match store.write_rotation(replaced.as_deref(), &record) {
            Err(StoreError::File { path, reason }) if is_read_only(&reason) => {
                let mut unwritten = store.unwritten.lock();
                if unwritten.is_none() {
                    tracing::warn!(
                        path = %path.display(),
                        %reason,
                        "the record of root rotations cannot be written: a new root is published beside the old one, \
                         but signs only after a restart"
                    );
                }
                *unwritten = Some(record);
                Ok(true)
            }
            outcome => outcome,
        };
        self.run(replace).await
    }

    fn forgets_rotation(&self) -> bool {
        self.unwritten.lock().is_some()
    }

    fn watch(&self) -> StoreWatch {
        StoreWatch::Files(FileWatch::new(std::slice::from_ref(&self.directory)))
    }

    fn name(&self) -> String {
        self.directory.display().to_string()
    }
}

fn is_read_only(reason: &std::io::Error) -> bool {
    matches!(reason.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied)
}

fn read(path: &Path) -> Result<Option<String>, StoreError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(reason) if reason.kind() == ErrorKind::NotFound => Ok(None),
        Err(reason) => Err(StoreError::File { path: path.to_owned(), reason }),
    }
}

/// Writes a whole file or none: beside it, synced, then renamed.
fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), StoreError> {
    let file = |reason| StoreError::File { path: path.to_owned(), reason };
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(mode);
    let mut open = options.open(&beside).map_err(file)?;
    open.write_all(content).and_then(|()| open.sync_all()).map_err(file)?;
    std::fs::rename(&beside, path).map_err(file)
}
