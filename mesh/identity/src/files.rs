//! Waits for files to change: inotify where available, else polling every few seconds.
//!
//! Used for roots, revocation lists, CA keys and key sets. Directories are watched rather than files, because
//! mounted ConfigMaps and careful writers replace a file by renaming. The caller reads and compares contents.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// Longest interval between two checks.
const POLL: Duration = Duration::from_secs(10);
/// The same when there is no inotify watch, or the directory does not exist yet.
const UNWATCHED_POLL: Duration = Duration::from_secs(1);
/// Writers touch several files in a row; one wake-up is enough for all.
const SETTLE: Duration = Duration::from_millis(50);

/// A watch over some files. Dropping it ends the watch.
#[derive(Debug)]
pub struct FileWatch {
    events: mpsc::Receiver<()>,
    /// Keeps the kernel's watch alive. Without one, only the poll interval applies.
    _watcher: Option<RecommendedWatcher>,
}

impl FileWatch {
    /// Watches the directories of `paths`; a path that is a directory is watched itself.
    pub fn new(paths: &[PathBuf]) -> Self {
        let (notify, events) = mpsc::channel(1);
        let directories: BTreeSet<&Path> = paths.iter().filter_map(|path| directory_of(path)).collect();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let is_read = matches!(&event, Ok(event) if event.kind.is_access());
            if !is_read {
                // A full channel already holds a wake-up.
                notify.try_send(()).ok();
            }
        });
        let watcher = watcher.and_then(|mut watcher| {
            for directory in &directories {
                watcher.watch(directory, RecursiveMode::NonRecursive)?;
            }
            Ok(watcher)
        });
        match watcher {
            Ok(watcher) => Self { events, _watcher: Some(watcher) },
            Err(error) => {
                tracing::warn!(%error, ?paths, "files cannot be watched; checking them every {UNWATCHED_POLL:?}");
                Self { events, _watcher: None }
            }
        }
    }

    /// Returns when a file may have changed, and after ten seconds at the latest. Cancel-safe.
    pub async fn changed(&mut self) {
        match tokio::time::timeout(POLL, self.events.recv()).await {
            Ok(Some(())) => {
                tokio::time::sleep(SETTLE).await;
                while self.events.try_recv().is_ok() {}
            }
            // Without a watcher the channel is closed and would return at once.
            Ok(None) => tokio::time::sleep(UNWATCHED_POLL).await,
            Err(_) => {}
        }
    }
}

fn directory_of(path: &Path) -> Option<&Path> {
    if path.is_dir() {
        return Some(path);
    }
    let parent = path.parent()?;
    Some(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
}
