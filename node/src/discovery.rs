//! Finding the network namespaces of a node: those of its processes, and those that container runtimes name by a path.
//!
//! [`Agent::reconcile`](crate::Agent::reconcile) uses it for pods whose namespace its caller does not know, and to find
//! namespaces that carry our rules and belong to no pod. It reads only; it decides nothing.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ambit_net::{Netns, NetnsError, NetnsId};

use crate::redirect::Routing;

/// Directories in which container runtimes keep network namespaces (containerd and CRI-O: `/run/netns`).
const DIRECTORIES: [&str; 3] = ["/run/netns", "/var/run/netns", "/run/docker/netns"];

/// Where to look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Discovery {
    /// A mount of procfs that shows the processes of the node; `None`: processes are not looked at.
    pub proc: Option<PathBuf>,
    /// Directories whose files are network namespaces. One that does not exist is skipped.
    pub directories: Vec<PathBuf>,
}

/// A network namespace and the path at which it was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// The namespace.
    pub netns: Netns,
    /// The path; one in a directory lasts longer than one of a process.
    pub path: PathBuf,
}

/// What a walk over the node found.
#[derive(Debug, Clone, Default)]
pub struct Walk {
    /// The namespaces, each once.
    pub namespaces: Vec<Found>,
    /// Whether a namespace that was not found has neither a process nor a path: all processes were looked at.
    pub complete: bool,
}

/// Several namespaces hold the same addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("several network namespaces hold its addresses: {}", paths.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))]
pub struct Ambiguous {
    /// Where they were found.
    pub paths: Vec<PathBuf>,
}

impl Discovery {
    /// Looks at all processes and the usual directories of a node.
    pub fn of_node() -> Self {
        Self { proc: Some("/proc".into()), directories: DIRECTORIES.map(PathBuf::from).into() }
    }

    /// Looks everywhere. What vanishes meanwhile is left out.
    pub async fn walk(&self) -> Walk {
        let this = self.clone();
        // Thousands of processes take milliseconds.
        tokio::task::spawn_blocking(move || this.walk_blocking()).await.unwrap_or_default()
    }

    fn walk_blocking(&self) -> Walk {
        let mut walk = Walk { namespaces: Vec::new(), complete: self.proc.is_some() };
        let mut seen = HashSet::new();
        let in_directories = self.directories.iter().flat_map(|directory| entries(directory));
        let of_processes = self
            .proc
            .iter()
            .flat_map(|proc| entries(proc).filter(|path| is_process(path)).map(|path| path.join("ns/net")));
        for path in in_directories.chain(of_processes) {
            match open_new(path, &mut seen) {
                Ok(found) => walk.namespaces.extend(found),
                Err(error) => walk.complete &= error.kind() != io::ErrorKind::PermissionDenied,
            }
        }
        walk
    }

    /// Every namespace with the addresses of its interfaces, but those of `except`.
    pub async fn addresses(&self, except: &HashSet<NetnsId>) -> Vec<(Found, Vec<IpAddr>)> {
        let mut all = Vec::new();
        for found in self.walk().await.namespaces {
            if except.contains(&found.netns.id()) {
                continue;
            }
            match addresses(&found.netns).await {
                Ok(held) => all.push((found, held)),
                Err(error) => {
                    tracing::debug!(path = %found.path.display(), %error, "network namespace not read");
                }
            }
        }
        all
    }
}

/// The addresses of a namespace's interfaces.
pub(crate) async fn addresses(inside: &Netns) -> Result<Vec<IpAddr>, crate::redirect::RoutingError> {
    Routing::open(inside).await?.addresses().await
}

/// The one of `namespaces` that holds all of `ips`.
///
/// # Errors
/// [`Ambiguous`] when several do.
pub fn holding<'a>(
    namespaces: &'a [(Found, Vec<IpAddr>)],
    ips: &[IpAddr],
) -> Result<Option<&'a Found>, Ambiguous> {
    if ips.is_empty() {
        return Ok(None);
    }
    let mut holders = namespaces.iter().filter(|(_, held)| ips.iter().all(|ip| held.contains(ip)));
    let Some((first, _)) = holders.next() else { return Ok(None) };
    let others: Vec<PathBuf> = holders.map(|(found, _)| found.path.clone()).collect();
    if others.is_empty() {
        return Ok(Some(first));
    }
    Err(Ambiguous { paths: std::iter::once(first.path.clone()).chain(others).collect() })
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(directory).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

fn is_process(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()))
}

/// Opens the namespace at `path` unless it has been seen. Runtimes leave files behind that are no namespaces.
fn open_new(path: PathBuf, seen: &mut HashSet<NetnsId>) -> io::Result<Option<Found>> {
    let metadata = std::fs::metadata(&path)?;
    if seen.contains(&NetnsId { dev: metadata.dev(), ino: metadata.ino() }) {
        return Ok(None);
    }
    match Netns::open(&path) {
        Ok(netns) => Ok(seen.insert(netns.id()).then_some(Found { netns, path })),
        Err(NetnsError::Open { source, .. }) => Err(source),
        Err(_) => Ok(None),
    }
}
