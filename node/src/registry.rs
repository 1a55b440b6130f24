//! The pods that are in, on disk: what a restarted agent knows before anybody tells it.
//!
//! One JSON file a pod, replaced atomically. An entry of an earlier boot is worthless, since namespaces
//! do not survive one, and is dropped.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::redirect::{Options, Stage};

/// Why the registry could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("registry: {attempt} {}: {source}", path.display())]
pub struct RegistryError {
    /// What was tried.
    pub attempt: &'static str,
    /// With which file.
    pub path: PathBuf,
    /// The system's answer.
    pub source: io::Error,
}

/// What is kept of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    /// The pod's uid.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Its addresses.
    pub ips: Vec<IpAddr>,
    /// What it asked for.
    pub options: Options,
    /// How far it is in.
    pub stage: Stage,
    /// Whether a proxy has served it.
    pub served: bool,
    /// Device of its network namespace.
    pub netns_dev: u64,
    /// Inode of its network namespace.
    pub netns_ino: u64,
    /// Where the namespace was found, if at a path that lasts.
    pub netns_path: Option<PathBuf>,
    /// The boot that the namespace belongs to.
    pub boot_id: String,
}

/// A directory of records.
#[derive(Debug)]
pub struct Registry {
    directory: PathBuf,
    boot_id: String,
}

impl Registry {
    /// Opens the registry in `directory`, which is made if missing.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, RegistryError> {
        const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
        let directory = directory.into();
        fs::create_dir_all(&directory).map_err(failed("create", &directory))?;
        let boot_id = fs::read_to_string(BOOT_ID).map_err(failed("read", Path::new(BOOT_ID)))?;
        Ok(Self { directory, boot_id: boot_id.trim().into() })
    }

    /// The boot that records of now belong to.
    pub fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// The records of this boot. Those of earlier ones and unreadable ones are removed, with a warning.
    pub fn load(&self) -> Result<Vec<Record>, RegistryError> {
        let mut records = Vec::new();
        let files = fs::read_dir(&self.directory).map_err(failed("list", &self.directory))?;
        for file in files {
            let path = file.map_err(failed("list", &self.directory))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let bytes = fs::read(&path).map_err(failed("read", &path))?;
            match serde_json::from_slice::<Record>(&bytes) {
                Ok(record) if record.boot_id == self.boot_id => records.push(record),
                Ok(_) => self.discard(&path, "it is of an earlier boot")?,
                Err(error) => self.discard(&path, &error.to_string())?,
            }
        }
        Ok(records)
    }

    /// Writes a record; it is on disk when this returns.
    pub fn save(&self, record: &Record) -> Result<(), RegistryError> {
        let path = self.path(&record.uid);
        let next = path.with_extension("next");
        let bytes =
            serde_json::to_vec_pretty(record).map_err(|e| failed("encode", &path)(io::Error::other(e)))?;
        let write = || {
            let mut file = File::create(&next)?;
            file.write_all(&bytes)?;
            file.sync_all()
        };
        write().map_err(failed("write", &next))?;
        fs::rename(&next, &path).map_err(failed("replace", &path))
    }

    /// Removes a record. One that is not there is no error.
    pub fn remove(&self, uid: &str) -> Result<(), RegistryError> {
        let path = self.path(uid);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    fn discard(&self, path: &Path, reason: &str) -> Result<(), RegistryError> {
        tracing::warn!(path = %path.display(), reason, "registry entry dropped");
        fs::remove_file(path).map_err(failed("remove", path))
    }

    /// A file's name never leaves the directory, whatever the uid is made of.
    fn path(&self, uid: &str) -> PathBuf {
        let name: String = uid
            .bytes()
            .map(|b| match b {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => char::from(b).to_string(),
                other => format!("%{other:02x}"),
            })
            .collect();
        self.directory.join(format!("{name}.json"))
    }
}

fn failed(attempt: &'static str, path: &Path) -> impl Fn(io::Error) -> RegistryError + use<> {
    let path = path.to_owned();
    move |source| RegistryError { attempt, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(registry: &Registry, uid: &str) -> Record {
        Record {
            uid: uid.into(),
            name: "reviews".into(),
            namespace: "shop".into(),
            service_account: "reviews".into(),
            ips: vec!["10.0.0.1".parse().unwrap()],
            options: Options::default(),
            stage: Stage::In,
            served: false,
            netns_dev: 4,
            netns_ino: 99,
            netns_path: None,
            boot_id: registry.boot_id().into(),
        }
    }

    #[test]
    fn what_was_saved_is_loaded_until_it_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::open(directory.path().join("pods")).unwrap();
        let first = record(&registry, "../../etc/passwd");
        registry.save(&first).unwrap();
        registry.save(&Record { served: true, ..first.clone() }).unwrap();
        assert_eq!(registry.load().unwrap(), [Record { served: true, ..first }]);
        registry.remove("../../etc/passwd").unwrap();
        registry.remove("../../etc/passwd").unwrap();
        assert_eq!(registry.load().unwrap(), []);
    }

    #[test]
    fn entries_of_another_boot_and_damaged_ones_are_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::open(directory.path()).unwrap();
        registry.save(&Record { boot_id: "earlier".into(), ..record(&registry, "a") }).unwrap();
        fs::write(directory.path().join("b.json"), b"{\"uid\": \"b\"").unwrap();
        assert_eq!(registry.load().unwrap(), []);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
