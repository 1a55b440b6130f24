//! The sockets of running meshes: one for each `ambit up`, in a directory that only its user can enter.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use ambit_net::seqpacket;
use anyhow::{Context, ensure};

/// The socket of this `ambit up`. Dropping it removes the file, and the directory after the last one.
#[derive(Debug)]
pub(crate) struct Endpoint {
    path: PathBuf,
}

impl Endpoint {
    /// Listens on a socket named by this process's id. Returns the socket for the process that will accept.
    ///
    /// # Errors
    /// When the directory is not this user's own, or the socket cannot be made.
    pub(crate) fn listen() -> anyhow::Result<(Self, OwnedFd)> {
        let path = directory()?.join(format!("{}.sock", std::process::id()));
        let socket = seqpacket::listen_at(&path).with_context(|| format!("listen on {}", path.display()))?;
        Ok((Self { path }, socket))
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "socket file not removed");
        }
        // Fails as intended while another mesh has a socket there.
        self.path.parent().map(fs::remove_dir).transpose().ok();
    }
}

/// The sockets of this user's meshes by process id. Removes sockets of processes that have ended.
pub(super) fn meshes() -> anyhow::Result<Vec<(u32, PathBuf)>> {
    let directory = directory()?;
    let entries = fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))?;
    let mut meshes = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("read {}", directory.display()))?.path();
        let Some(pid) = path.file_stem().and_then(|name| name.to_str()?.parse().ok()) else { continue };
        if Path::new("/proc").join(format!("{pid}")).exists() {
            meshes.push((pid, path));
        } else if let Err(error) = fs::remove_file(&path) {
            tracing::debug!(path = %path.display(), %error, "socket file of a dead process not removed");
        }
    }
    meshes.sort();
    Ok(meshes)
}

/// The directory of the sockets, which is created if it is missing.
fn directory() -> anyhow::Result<PathBuf> {
    let uid = fs::metadata("/proc/self").context("read the user's id")?.uid();
    let path = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) if !runtime.is_empty() => Path::new(&runtime).join("ambit"),
        _ => std::env::temp_dir().join(format!("ambit-{uid}")),
    };
    let made = fs::DirBuilder::new().mode(0o700).create(&path);
    if let Err(error) = made
        && error.kind() != ErrorKind::AlreadyExists
    {
        return Err(error).with_context(|| format!("make directory {}", path.display()));
    }
    // Another user who can write here could impersonate a mesh.
    let attributes = fs::symlink_metadata(&path).with_context(|| format!("read {}", path.display()))?;
    let own = attributes.is_dir() && attributes.uid() == uid && attributes.mode() & 0o077 == 0;
    ensure!(own, "{} is not a directory that only this user can enter", path.display());
    Ok(path)
}
