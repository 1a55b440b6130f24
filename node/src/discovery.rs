//! Finding the network namespaces of a node: those of its processes, and those that container runtimes name by a path.
//!
//! [`Agent::reconcile`](crate::Agent::reconcile) uses it for pods whose namespace its caller does not know, and to find
//! namespaces that carry our rules and belong to no pod. It reads only.
//!
//! Any process may make a namespace and give it any address, so an address alone proves nothing. A namespace is believed
//! to be a pod's if it holds the pod's addresses and a process of the pod's own control group is in it, or the container
//! runtime made it and no process is in it yet. What the container runtime made is preferred.

mod cgroup;

use std::collections::{BTreeSet, HashMap, HashSet};
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
    /// Whether the path is in a directory of the container runtime.
    pub by_runtime: bool,
    /// Who has processes in it.
    pub owners: Owners,
}

/// Who has processes in a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owners {
    /// Processes were not looked at.
    Unknown,
    /// The pods of these uids. Processes of no pod are left out.
    Pods(BTreeSet<String>),
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
        let mut places = HashMap::new();
        for directory in &self.directories {
            for path in walk.entries(directory) {
                if let Err(error) = walk.add(path, true, &mut places) {
                    walk.complete &= has_vanished(&error);
                }
            }
        }
        if let Some(proc) = &self.proc {
            walk.complete &= !is_first_process(proc);
            for process in walk.entries(proc).into_iter().filter(|path| is_process(path)) {
                if let Err(error) = walk.add_process(&process, &mut places) {
                    // The links of a process that has just ended may answer "permission denied".
                    walk.complete &= has_vanished(&error) || !process.exists();
                }
            }
        }
        if self.proc.is_none() {
            walk.namespaces.iter_mut().for_each(|found| found.owners = Owners::Unknown);
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

/// Whether this is the first process that `proc` shows. Then these are the processes of one container, not of the node: the
/// agent runs without `hostPID`.
fn is_first_process(proc: &Path) -> bool {
    std::fs::read_link(proc.join("self")).is_ok_and(|own| own == Path::new("1"))
}

/// The addresses of a namespace's interfaces.
pub(crate) async fn addresses(inside: &Netns) -> Result<Vec<IpAddr>, crate::redirect::RoutingError> {
    Routing::open(inside).await?.addresses().await
}

/// The one of `namespaces` that belongs to the pod that the container runtime knows by `uid` and has the addresses `ips`.
///
/// # Errors
/// [`Ambiguous`] when several do.
pub fn of_pod<'a>(
    namespaces: &'a [(Found, Vec<IpAddr>)],
    uid: &str,
    ips: &[IpAddr],
) -> Result<Option<&'a Found>, Ambiguous> {
    if ips.is_empty() {
        return Ok(None);
    }
    let holders = namespaces.iter().filter(|(_, held)| ips.iter().all(|ip| held.contains(ip)));
    let mut believed: Vec<(Proof, &Found)> =
        holders.filter_map(|(found, _)| Some((proof(found, uid)?, found))).collect();
    believed.sort_by_key(|(proof, _)| *proof);
    let Some((best, first)) = believed.first().copied() else { return Ok(None) };
    let paths: Vec<PathBuf> = believed
        .iter()
        .take_while(|(proof, _)| *proof == best)
        .map(|(_, found)| found.path.clone())
        .collect();
    if paths.len() == 1 { Ok(Some(first)) } else { Err(Ambiguous { paths }) }
}

/// Why a namespace is believed to be a pod's; the best comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Proof {
    /// The runtime made it, and a process of the pod is in it.
    RuntimeAndProcess,
    /// A process of the pod is in it.
    Process,
    /// The runtime made it, and no process of another pod is known to be in it.
    Runtime,
}

fn proof(found: &Found, uid: &str) -> Option<Proof> {
    match &found.owners {
        Owners::Pods(pods) if pods.contains(uid) && found.by_runtime => Some(Proof::RuntimeAndProcess),
        Owners::Pods(pods) if pods.contains(uid) => Some(Proof::Process),
        Owners::Pods(pods) => (found.by_runtime && pods.is_empty()).then_some(Proof::Runtime),
        Owners::Unknown => found.by_runtime.then_some(Proof::Runtime),
    }
}

impl Walk {
    /// What is in `directory`: nothing if it does not exist.
    fn entries(&mut self, directory: &Path) -> Vec<PathBuf> {
        let list = || std::fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>();
        list().unwrap_or_else(|error| {
            self.complete &= has_vanished(&error);
            Vec::new()
        })
    }

    /// Notes the namespace of a process, and the pod that the process belongs to.
    fn add_process(&mut self, process: &Path, places: &mut HashMap<NetnsId, usize>) -> io::Result<()> {
        let Some(index) = self.add(process.join("ns/net"), false, places)? else { return Ok(()) };
        let pod = cgroup::pod(&std::fs::read_to_string(process.join("cgroup"))?);
        if let (Some(found), Some(pod)) = (self.namespaces.get_mut(index), pod)
            && let Owners::Pods(pods) = &mut found.owners
        {
            pods.insert(pod);
        }
        Ok(())
    }

    /// Notes the namespace at `path`, unless it is known, and returns its place. Runtimes leave files behind that are no
    /// namespaces.
    fn add(
        &mut self,
        path: PathBuf,
        by_runtime: bool,
        places: &mut HashMap<NetnsId, usize>,
    ) -> io::Result<Option<usize>> {
        let metadata = std::fs::metadata(&path)?;
        if let Some(place) = places.get(&NetnsId { dev: metadata.dev(), ino: metadata.ino() }) {
            return Ok(Some(*place));
        }
        match Netns::open(&path) {
            Ok(netns) => {
                let place = *places.entry(netns.id()).or_insert(self.namespaces.len());
                if place == self.namespaces.len() {
                    let owners = Owners::Pods(BTreeSet::new());
                    self.namespaces.push(Found { netns, path, by_runtime, owners });
                }
                Ok(Some(place))
            }
            Err(NetnsError::Open { source, .. }) => Err(source),
            Err(_) => Ok(None),
        }
    }
}

/// Whether the error only says that a file, directory or process does not exist any more.
fn has_vanished(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

fn is_process(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()))
}
