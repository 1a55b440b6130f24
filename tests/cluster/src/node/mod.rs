//! A node: what runs inside its namespaces, from its first process on.
//!
//! `ambit-cluster node FILE` is started in the node's network namespace. It makes the other namespaces and starts
//! `ambit-cluster node-first FILE` as the first process of them: the node's `init`. Killing it is a power cut; the
//! files of `containerd` and kubelet stay, as a disk would, and what lies in `/run` goes.

mod files;
mod first;
mod mounts;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The configuration of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Config {
    /// Its name, which is its host name too.
    pub name: String,
    /// Its address on the cluster's segment.
    pub address: Ipv4Addr,
    /// Its pods' range, in CIDR notation.
    pub pods: String,
    /// All pods' ranges.
    pub cluster_cidr: String,
    /// The cluster's DNS.
    pub dns: Ipv4Addr,
    /// Labels of the node object, `KEY=VALUE` with commas.
    pub labels: String,
    /// Its control group.
    pub cgroup: String,
    /// Kubernetes' programs.
    pub bin: PathBuf,
    /// Where its programs log to.
    pub log: PathBuf,
    /// Image archives to import at the first boot.
    pub images: Vec<PathBuf>,
    /// The cluster's authority.
    pub ca: String,
    /// Kubelet's serving certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
    /// Its disk.
    pub directory: PathBuf,
}

impl Config {
    /// Reads the configuration that the supervisor wrote.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn read(file: &Path) -> Result<Self> {
        let attempt = format!("read {}", file.display());
        let text = std::fs::read(file).map_err(Error::system(attempt.clone()))?;
        serde_json::from_slice(&text).map_err(|error| Error::system(attempt)(std::io::Error::from(error)))
    }
}

/// The node's outer process: makes the namespaces, starts the first process, and ends with it. Call it before any
/// thread is started.
///
/// # Errors
/// When the kernel refuses a namespace.
pub fn enter(file: &Path) -> Result<ExitCode> {
    let flags = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    unshare(flags).map_err(Error::system("make a node's namespaces"))?;
    let own = std::env::current_exe().map_err(Error::system("find this program"))?;
    let mut command = Command::new(own);
    command.arg("node-first").arg(file);
    ambit_local::die_with_parent(&mut command);
    let status = command.status().map_err(Error::system("start a node's first process"))?;
    Ok(ExitCode::from(u8::try_from(ambit_local::exit_code(status)).unwrap_or(1)))
}

/// The node's first process.
///
/// # Errors
/// When a mount is refused or a program can't be started.
pub fn run_first(file: &Path) -> Result<ExitCode> {
    first::run(&Config::read(file)?)
}
