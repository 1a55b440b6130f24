//! One agent on a node at a time.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::time::sleep;

/// Pause between two attempts.
const AGAIN: Duration = Duration::from_millis(200);

/// Waits until no other process has the lock, and takes it. The kernel gives it up with the process.
pub(super) async fn acquire(path: &Path) -> anyhow::Result<Flock<File>> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
    }
    let open = || OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let mut file = open().with_context(|| format!("open {}", path.display()))?;
    let mut reported = false;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((again, Errno::EWOULDBLOCK)) => file = again,
            Err((_, error)) => return Err(error).with_context(|| format!("lock {}", path.display())),
        }
        if !reported {
            tracing::info!("another agent runs on this node; waiting until it has ended");
            reported = true;
        }
        sleep(AGAIN).await;
    }
}
