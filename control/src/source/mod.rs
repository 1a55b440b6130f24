//! Where objects come from: typed changes out, in batches, and problems beside them.
//!
//! [`directory`] watches directories of YAML. Whatever a source is, it first gives everything that there
//! is, says so with [`Event::Synced`], and then gives changes as they come.

pub mod directory;
mod document;
mod files;
mod scan;
mod yaml;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::object::{Change, Object, ObjectRef};

/// A source as it is named on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceName {
    /// `dir:PATH`: every `*.yaml`, `*.yml` and `*.json` below a directory.
    Directory(PathBuf),
}

/// A source that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no source: expected dir:PATH")]
pub struct UnknownSource(String);

impl FromStr for SourceName {
    type Err = UnknownSource;

    fn from_str(text: &str) -> Result<SourceName, UnknownSource> {
        match text.split_once(':') {
            Some(("dir", path)) if !path.is_empty() => Ok(SourceName::Directory(path.into())),
            _ => Err(UnknownSource(text.to_owned())),
        }
    }
}

/// What a source tells.
#[derive(Debug)]
pub enum Event {
    /// Objects changed.
    Changes(Vec<Change>),
    /// All that was there at the start has been told.
    Synced,
}

/// Something in a source that cannot be taken. What was there before it stays in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; `None` if the whole file is meant.
    pub line: Option<u64>,
    /// The field, as `spec.ports[0].port`.
    pub field: Option<String>,
    /// The object, if it can be told.
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

/// Reads the text of one file: its objects, and what of it cannot be taken. A policy that cannot be read is
/// among the objects as one that fails closed.
pub fn parse(file: &Path, text: &str) -> (Vec<Object>, Vec<Problem>) {
    let mut files = files::Files::default();
    let content = files::Content::Read(document::read_all(text));
    let files::Effect { changes, new_problems } = files.apply(&(0, file.into()), content);
    let objects = changes.into_iter().filter_map(|change| match change {
        Change::Apply(object) => Some(object),
        Change::Delete(_) => None,
    });
    (objects.collect(), new_problems)
}

/// Live counters of a source.
#[derive(Debug, Default)]
pub struct SourceMetrics {
    /// Problems that there were, each edit counted anew.
    pub malformed: AtomicU64,
    /// Problems that there are.
    pub problems: AtomicU64,
    /// Files that were read.
    pub reads: AtomicU64,
    /// Comparisons of every file, as after events were lost.
    pub scans: AtomicU64,
    /// Objects that there are.
    pub objects: AtomicU64,
}

impl SourceMetrics {
    fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }

    fn set(gauge: &AtomicU64, n: usize) {
        gauge.store(n as u64, Ordering::Relaxed);
    }
}
