//! Where objects come from: typed changes out, in batches, and problems beside them.
//!
//! [`files`] watches directories of YAML, [`kubernetes`] an API server. Whatever a source is, it first gives everything that there
//! is, says so with [`Event::Synced`], and then gives changes as they come.

pub mod files;
pub mod kubernetes;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::kind::Kind;
use crate::object::{Change, ObjectRef};
pub use files::parse;

/// A source as it is named on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceName {
    /// `dir:PATH`: every `*.yaml`, `*.yml` and `*.json` below a directory.
    Directory(PathBuf),
    /// `kubernetes`, or `kubernetes:KUBECONFIG`: an API server.
    Kubernetes {
        /// The file that says how to reach it; `None` in a pod of its cluster.
        kubeconfig: Option<PathBuf>,
    },
}

/// A source that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no source: expected dir:PATH, kubernetes or kubernetes:KUBECONFIG")]
pub struct UnknownSource(String);

impl FromStr for SourceName {
    type Err = UnknownSource;

    fn from_str(text: &str) -> Result<SourceName, UnknownSource> {
        match text.split_once(':') {
            Some(("dir", path)) if !path.is_empty() => Ok(SourceName::Directory(path.into())),
            Some(("kubernetes", path)) if !path.is_empty() => {
                Ok(SourceName::Kubernetes { kubeconfig: Some(path.into()) })
            }
            None if text == "kubernetes" => Ok(SourceName::Kubernetes { kubeconfig: None }),
            _ => Err(UnknownSource(text.to_owned())),
        }
    }
}

/// What a source reports.
#[derive(Debug)]
pub enum Event {
    /// Objects changed.
    Changes(Vec<Change>),
    /// Everything that was there at the start was sent.
    Synced,
}

/// Something in a source that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; `None` if the whole file is meant.
    pub line: Option<u64>,
    /// The field, as `spec.ports[0].port`.
    pub field: Option<String>,
    /// The object, if its identity is known.
    pub object: Option<ObjectRef>,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(object) = &self.object {
            write!(f, ": {object}")?;
        }
        if let Some(field) = &self.field {
            write!(f, ": {field}")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Live counters of a source.
#[derive(Debug, Default)]
pub struct SourceMetrics {
    /// Problems that there were, each edit counted anew.
    pub malformed: AtomicU64,
    /// Problems that there are.
    pub problems: AtomicU64,
    /// Files, or objects of an API server, that were read.
    pub reads: AtomicU64,
    /// Comparisons of everything: of every file, as after events were lost, or of all objects of a kind.
    pub scans: AtomicU64,
    /// Watches of an API server that broke or could not begin.
    pub watch_failures: AtomicU64,
    /// Objects that there are.
    pub objects: AtomicU64,
    /// When something last came by each watch of an API server.
    pub last_events: LastEvents,
}

/// When something last came by the watch of each kind.
#[derive(Debug)]
pub struct LastEvents {
    start: Instant,
    /// Seconds since the start, and one more; zero before the first event. By the kind's place in [`Kind::ALL`].
    seconds: [AtomicU64; Kind::ALL.len()],
}

impl Default for LastEvents {
    fn default() -> Self {
        Self { start: Instant::now(), seconds: Default::default() }
    }
}

impl LastEvents {
    /// Something came by the watch of this kind.
    pub fn note(&self, kind: Kind) {
        if let Some(seconds) = self.of(kind) {
            seconds.store(self.start.elapsed().as_secs().saturating_add(1), Ordering::Relaxed);
        }
    }

    /// Seconds since something last came by the watch of this kind; since the start if nothing did.
    pub fn age(&self, kind: Kind) -> u64 {
        let noted = self.of(kind).map_or(0, |seconds| seconds.load(Ordering::Relaxed));
        self.start.elapsed().as_secs().saturating_sub(noted.saturating_sub(1))
    }

    fn of(&self, kind: Kind) -> Option<&AtomicU64> {
        self.seconds.get(Kind::ALL.iter().position(|one| *one == kind)?)
    }
}

impl SourceMetrics {
    fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }

    fn set(gauge: &AtomicU64, n: usize) {
        gauge.store(n as u64, Ordering::Relaxed);
    }
}
