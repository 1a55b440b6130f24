//! Which files a directory holds, and whether one is as it was.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Directories deeper than this are not entered.
const MAX_DEPTH: usize = 32;

/// Largest file that is read.
pub(super) const MAX_FILE: u64 = 64 << 20;

/// Properties of a file that differ if its content may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    pub(super) fn of(metadata: &Metadata) -> Fingerprint {
        Fingerprint {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Whether a path names a file of objects; hidden files and editors' leftovers do not.
pub(super) fn is_manifest(path: &Path) -> bool {
    let has_extension =
        path.extension().and_then(|e| e.to_str()).is_some_and(|e| matches!(e, "yaml" | "yml" | "json"));
    has_extension && !is_hidden(path)
}

/// Whether the last part of a path begins with a dot.
pub(super) fn is_hidden(path: &Path) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_none_or(|name| name.starts_with('.'))
}

/// Every manifest below a directory. Symbolic links are followed, as mounted ConfigMaps consist of them.
///
/// # Errors
/// When the directory itself cannot be read. Below it, what vanishes or cannot be entered is left out.
pub(super) fn walk(root: &Path) -> io::Result<BTreeMap<PathBuf, Fingerprint>> {
    let mut found = BTreeMap::new();
    let mut entered = BTreeSet::new();
    enter(root, 0, &mut entered, &mut found)?;
    Ok(found)
}

fn enter(
    directory: &Path,
    depth: usize,
    entered: &mut BTreeSet<(u64, u64)>,
    found: &mut BTreeMap<PathBuf, Fingerprint>,
) -> io::Result<()> {
    let metadata = fs::metadata(directory)?;
    // A link back to a directory above would never end.
    if depth > MAX_DEPTH || !entered.insert((metadata.dev(), metadata.ino())) {
        return Ok(());
    }
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.is_dir() && !is_hidden(&path) {
            if let Err(error) = enter(&path, depth + 1, entered, found) {
                tracing::warn!(directory = %path.display(), %error, "cannot read directory");
            }
        } else if metadata.is_file() && is_manifest(&path) {
            found.insert(path, Fingerprint::of(&metadata));
        }
    }
    Ok(())
}
