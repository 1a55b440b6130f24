//! The enrolled pods on disk, for an agent that is started again.
//!
//! One JSON file for each pod, replaced atomically. Older and newer versions of the form are read: missing fields get
//! their defaults, and fields that this version does not know are kept when the record is written again. A file that
//! cannot be read is never deleted. A record of an earlier boot is, since network namespaces do not survive a reboot.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ambit_net::NetnsId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::redirect::{FormerSettings, Options, OtherProtocols, Stage};

/// The version of the form that this program writes. Version 1 had no version, sandbox and former settings.
const VERSION: u32 = 2;

/// [`OtherProtocols::Allow`] on disk.
const ALLOW: &str = "allow";

/// Why the registry could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("registry: {attempt} {}: {source}", path.display())]
pub struct RegistryError {
    /// What was attempted.
    pub attempt: &'static str,
    /// The file.
    pub path: PathBuf,
    /// The system's answer.
    pub source: io::Error,
}

/// What is kept of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Its capture options.
    pub options: Options,
    /// Whether it is in the mesh or leaving it.
    pub stage: Stage,
    /// Whether a proxy has served it.
    pub served: bool,
    /// Its network namespace.
    pub netns: NetnsId,
    /// Where the namespace can be opened again, if at a path that lasts.
    pub netns_path: Option<PathBuf>,
    /// The id of its sandbox, if known.
    pub sandbox: Option<String>,
    /// The namespace's settings before the enrolment.
    pub former_settings: FormerSettings,
    /// Fields of a newer version, which are written again as they were read.
    pub unknown: Map<String, Value>,
}

/// What [`Registry::load`] found.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The records of this boot.
    pub records: Vec<Record>,
    /// Files that could not be read; they stay where they are.
    pub unreadable: Vec<Unreadable>,
}

/// A file that could not be read.
#[derive(Debug)]
pub struct Unreadable {
    /// The file.
    pub path: PathBuf,
    /// The pod's uid, from the name of the file.
    pub uid: String,
    /// Why.
    pub reason: String,
}

/// A directory of records.
#[derive(Debug)]
pub struct Registry {
    directory: PathBuf,
    boot_id: String,
    /// Files that are put aside instead of being replaced or deleted. Guards the set for the length of a look-up.
    unreadable: Mutex<HashSet<PathBuf>>,
}

impl Registry {
    /// Opens the registry in `directory`, which is made if missing.
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, RegistryError> {
        const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
        let directory = directory.into();
        fs::create_dir_all(&directory).map_err(failed("create", &directory))?;
        let boot_id = fs::read_to_string(BOOT_ID).map_err(failed("read", Path::new(BOOT_ID)))?;
        Ok(Self { directory, boot_id: boot_id.trim().into(), unreadable: Mutex::default() })
    }

    /// The records of this boot, and the files that could not be read. Records of earlier boots are deleted.
    pub fn load(&self) -> Result<Loaded, RegistryError> {
        let mut loaded = Loaded::default();
        let files = fs::read_dir(&self.directory).map_err(failed("list", &self.directory))?;
        for file in files {
            let path = file.map_err(failed("list", &self.directory))?.path();
            let Some(uid) = uid_of(&path) else { continue };
            let read = fs::read(&path).map_err(|e| e.to_string());
            let stored = read.and_then(|bytes| Stored::decode(&bytes, &uid).map_err(|e| e.to_string()));
            match stored {
                Ok(stored) if stored.boot_id.is_empty() || stored.boot_id == self.boot_id => {
                    loaded.records.push(stored.into());
                }
                Ok(_) => {
                    tracing::info!(uid, "registry record of an earlier boot deleted");
                    fs::remove_file(&path).map_err(failed("delete", &path))?;
                }
                Err(reason) => {
                    tracing::error!(path = %path.display(), reason, "registry record cannot be read and is kept");
                    self.unreadable.lock().insert(path.clone());
                    loaded.unreadable.push(Unreadable { path, uid, reason });
                }
            }
        }
        Ok(loaded)
    }

    /// Writes a record; it is on disk when this returns.
    pub fn save(&self, record: &Record) -> Result<(), RegistryError> {
        let path = self.path(&record.uid);
        let next = path.with_extension("next");
        let bytes = serde_json::to_vec_pretty(&Stored::of(record, &self.boot_id))
            .map_err(|e| failed("encode", &path)(io::Error::other(e)))?;
        let write = || {
            let mut file = File::create(&next)?;
            file.write_all(&bytes)?;
            file.sync_all()
        };
        write().map_err(failed("write", &next))?;
        self.put_aside(&path)?;
        fs::rename(&next, &path).map_err(failed("replace", &path))
    }

    /// Deletes a record. A missing one is not an error.
    pub fn remove(&self, uid: &str) -> Result<(), RegistryError> {
        let path = self.path(uid);
        self.put_aside(&path)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("delete", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Renames a file that could not be read, so that another can take its place.
    fn put_aside(&self, path: &Path) -> Result<(), RegistryError> {
        if !self.unreadable.lock().contains(path) {
            return Ok(());
        }
        fs::rename(path, path.with_extension("unreadable")).map_err(failed("put aside", path))?;
        self.unreadable.lock().remove(path);
        Ok(())
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

/// The uid that a file is named after; `None` if it is no record's file.
fn uid_of(path: &Path) -> Option<String> {
    if path.extension()? != "json" {
        return None;
    }
    let mut rest = path.file_stem()?.to_str()?.as_bytes();
    let mut uid = Vec::new();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            uid.push(*first);
            continue;
        }
        let (digits, after) = after.split_at_checked(2)?;
        uid.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
        rest = after;
    }
    String::from_utf8(uid).ok()
}

/// A record as it is on disk.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Stored {
    version: u32,
    uid: String,
    name: String,
    namespace: String,
    service_account: String,
    ips: Vec<IpAddr>,
    options: StoredOptions,
    stage: String,
    served: bool,
    netns_dev: u64,
    netns_ino: u64,
    netns_path: Option<PathBuf>,
    sandbox: Option<String>,
    former_settings: FormerSettings,
    boot_id: String,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

/// [`Options`] on disk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct StoredOptions {
    dns_capture: bool,
    inbound_capture: bool,
    virtual_interfaces: Vec<String>,
    socks5: bool,
    other_protocols: String,
}

impl Default for StoredOptions {
    fn default() -> Self {
        Self::from(&Options::default())
    }
}

impl From<&Options> for StoredOptions {
    fn from(options: &Options) -> Self {
        let Options { dns_capture, inbound_capture, virtual_interfaces, socks5, other_protocols } =
            options.clone();
        let other_protocols = match other_protocols {
            OtherProtocols::Allow => ALLOW.into(),
            OtherProtocols::Deny => "deny".into(),
        };
        Self { dns_capture, inbound_capture, virtual_interfaces, socks5, other_protocols }
    }
}

impl From<StoredOptions> for Options {
    fn from(stored: StoredOptions) -> Self {
        let StoredOptions { dns_capture, inbound_capture, virtual_interfaces, socks5, other_protocols } =
            stored;
        // A value that is not known is stricter than none.
        let allowed = other_protocols == ALLOW;
        let other_protocols = if allowed { OtherProtocols::Allow } else { OtherProtocols::Deny };
        Self { dns_capture, inbound_capture, virtual_interfaces, socks5, other_protocols }
    }
}

impl Stored {
    fn decode(bytes: &[u8], uid: &str) -> serde_json::Result<Self> {
        let mut stored: Self = serde_json::from_slice(bytes)?;
        if stored.uid.is_empty() {
            stored.uid = uid.to_owned();
        }
        Ok(stored)
    }

    fn of(record: &Record, boot_id: &str) -> Self {
        let record = record.clone();
        Self {
            version: VERSION,
            uid: record.uid,
            name: record.name,
            namespace: record.namespace,
            service_account: record.service_account,
            ips: record.ips,
            options: StoredOptions::from(&record.options),
            stage: match record.stage {
                Stage::In => "in".into(),
                Stage::Leaving => "leaving".into(),
            },
            served: record.served,
            netns_dev: record.netns.dev,
            netns_ino: record.netns.ino,
            netns_path: record.netns_path,
            sandbox: record.sandbox,
            former_settings: record.former_settings,
            boot_id: boot_id.to_owned(),
            unknown: record.unknown,
        }
    }
}

impl From<Stored> for Record {
    fn from(stored: Stored) -> Self {
        Self {
            uid: stored.uid,
            name: stored.name,
            namespace: stored.namespace,
            service_account: stored.service_account,
            ips: stored.ips,
            options: stored.options.into(),
            // A stage that is not known keeps the pod captured.
            stage: if stored.stage == "leaving" { Stage::Leaving } else { Stage::In },
            served: stored.served,
            netns: NetnsId { dev: stored.netns_dev, ino: stored.netns_ino },
            netns_path: stored.netns_path,
            sandbox: stored.sandbox,
            former_settings: stored.former_settings,
            unknown: stored.unknown,
        }
    }
}

fn failed(attempt: &'static str, path: &Path) -> impl Fn(io::Error) -> RegistryError + use<> {
    let path = path.to_owned();
    move |source| RegistryError { attempt, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: &str) -> Record {
        Record {
            uid: uid.into(),
            name: "reviews".into(),
            namespace: "shop".into(),
            service_account: "reviews".into(),
            ips: vec!["10.0.0.1".parse().unwrap()],
            options: Options { dns_capture: false, ..Options::default() },
            stage: Stage::Leaving,
            served: false,
            netns: NetnsId { dev: 4, ino: 99 },
            netns_path: None,
            sandbox: Some("s1".into()),
            former_settings: FormerSettings::default(),
            unknown: Map::new(),
        }
    }

    fn open() -> (tempfile::TempDir, Registry) {
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::open(directory.path()).unwrap();
        (directory, registry)
    }

    #[test]
    fn a_saved_record_is_loaded_until_it_is_removed() {
        let (_directory, registry) = open();
        let first = record("../../etc/passwd");
        registry.save(&first).unwrap();
        registry.save(&Record { served: true, ..first.clone() }).unwrap();
        assert_eq!(registry.load().unwrap().records, [Record { served: true, ..first }]);
        registry.remove("../../etc/passwd").unwrap();
        registry.remove("../../etc/passwd").unwrap();
        assert_eq!(registry.load().unwrap().records, []);
    }

    #[test]
    fn an_older_record_gets_defaults_for_missing_fields() {
        let (directory, registry) = open();
        let older = serde_json::json!({
            "uid": "a", "name": "reviews", "namespace": "shop", "serviceAccount": "reviews", "ips": ["10.0.0.1"],
            "options": { "dnsCapture": false, "inboundCapture": true, "virtualInterfaces": [] },
            "stage": "leaving", "netnsDev": 4, "netnsIno": 99, "netnsPath": null, "bootId": registry.boot_id,
        });
        fs::write(directory.path().join("a.json"), older.to_string()).unwrap();
        assert_eq!(registry.load().unwrap().records, [Record { sandbox: None, ..record("a") }]);
    }

    #[test]
    fn fields_of_a_newer_record_are_ignored_and_kept() {
        let (directory, registry) = open();
        registry.save(&record("a")).unwrap();
        let path = directory.path().join("a.json");
        let mut newer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        newer["version"] = 7.into();
        newer["cgroup"] = serde_json::json!({ "path": "/kubepods" });
        newer["options"]["udp"] = true.into();
        newer["stage"] = "draining".into();
        fs::write(&path, newer.to_string()).unwrap();
        let loaded = registry.load().unwrap();
        assert_eq!(loaded.unreadable.len(), 0);
        assert_eq!(loaded.records[0].stage, Stage::In, "an unknown stage keeps the pod captured");
        registry.save(&loaded.records[0]).unwrap();
        let written: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!((&written["cgroup"], &written["version"]), (&newer["cgroup"], &VERSION.into()));
    }

    #[test]
    fn an_unreadable_record_is_never_deleted() {
        let (directory, registry) = open();
        for uid in ["a%2fb", "c"] {
            fs::write(directory.path().join(format!("{uid}.json")), b"{\"uid\": \"b\"").unwrap();
        }
        let loaded = registry.load().unwrap();
        let mut uids: Vec<_> = loaded.unreadable.iter().map(|file| file.uid.as_str()).collect();
        uids.sort_unstable();
        assert_eq!((uids, loaded.records), (vec!["a/b", "c"], vec![]));
        registry.save(&record("a/b")).unwrap();
        registry.remove("c").unwrap();
        assert_eq!(registry.load().unwrap().records, [record("a/b")]);
        for uid in ["a%2fb", "c"] {
            let kept = fs::read(directory.path().join(format!("{uid}.unreadable"))).unwrap();
            assert_eq!(kept, b"{\"uid\": \"b\"");
        }
    }

    #[test]
    fn records_of_another_boot_are_deleted() {
        let (directory, registry) = open();
        registry.save(&record("a")).unwrap();
        let rebooted = Registry { boot_id: "later".into(), ..Registry::open(directory.path()).unwrap() };
        assert_eq!(rebooted.load().unwrap().records, []);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
