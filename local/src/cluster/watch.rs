//! Watches the manifest directory: an edited file is applied while the cluster runs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use tokio::sync::Notify;

use crate::cluster::shared::Shared;
use crate::error::{Error, Result};

/// How long a directory must be quiet before it is read: editors write a file in several steps.
const QUIET: Duration = Duration::from_millis(100);

/// Begins to watch a directory and returns the task that reads it again after each change.
///
/// # Errors
/// When the directory can't be watched.
pub(crate) fn watch(
    shared: Arc<Shared>,
    directory: PathBuf,
) -> Result<impl Future<Output = ()> + Send + 'static> {
    let happened = Arc::new(Notify::new());
    let announce = Arc::clone(&happened);
    let fault = |error: notify::Error| Error::System {
        attempt: format!("watch directory {}", directory.display()),
        source: std::io::Error::other(error),
    };
    let handler = move |event: notify::Result<notify::Event>| {
        // An error of the watcher may hide a change, so it counts as one.
        if event.is_ok_and(|event| event.kind.is_access()) {
            return;
        }
        announce.notify_one();
    };
    let mut watcher = notify::recommended_watcher(handler).map_err(fault)?;
    watcher.watch(&directory, RecursiveMode::Recursive).map_err(fault)?;
    Ok(async move {
        // Dropped with the task, which ends the watch.
        let _watcher = watcher;
        loop {
            happened.notified().await;
            while tokio::time::timeout(QUIET, happened.notified()).await.is_ok() {}
            let loaded = shared.objects.lock().load(&directory);
            if let Err(error) = loaded {
                tracing::warn!(%error, "the manifests are left as they were before");
            }
            shared.wake();
        }
    })
}
