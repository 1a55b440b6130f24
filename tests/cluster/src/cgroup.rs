//! Control groups of the nodes, in both versions of the interface. They belong to the whole machine, so they are the
//! one thing that the kernel does not remove with a cluster's namespaces.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

const ROOT: &str = "/sys/fs/cgroup";
/// How long processes of a crashed node may take to die.
const DYING: Duration = Duration::from_secs(20);
/// Pause between two attempts.
const POLL: Duration = Duration::from_millis(20);

/// Makes a node's group in every hierarchy.
///
/// # Errors
/// When the kernel refuses.
pub fn create(name: &str) -> Result<()> {
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        // cgroup v2: children get only what the parent hands on.
        let handed_on = "+cpu +cpuset +memory +pids";
        fs::write(Path::new(ROOT).join("cgroup.subtree_control"), handed_on)
            .map_err(Error::system("hand controllers on to control groups"))?;
    }
    for hierarchy in hierarchies() {
        let group = hierarchy.join(name);
        let attempt = format!("make control group {}", group.display());
        fs::create_dir_all(&group).map_err(Error::system(attempt.clone()))?;
        // cgroup v1: a cpuset without cpus and memory takes no process.
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let inherited = hierarchy.join(file);
            if inherited.exists() && !hierarchy.join("cgroup.controllers").exists() {
                let value = fs::read(&inherited).map_err(Error::system(attempt.clone()))?;
                fs::write(group.join(file), value).map_err(Error::system(attempt.clone()))?;
            }
        }
    }
    Ok(())
}

/// Removes every group whose name begins with `prefix`, with all below it. Groups with processes stay.
/// Returns what stayed.
#[must_use]
pub fn remove(prefix: &str) -> Vec<PathBuf> {
    let mut left = Vec::new();
    for group in hierarchies().iter().flat_map(|hierarchy| children(hierarchy)) {
        let named = group.file_name().and_then(|name| name.to_str());
        if named.is_some_and(|name| name.starts_with(prefix)) && !remove_tree(&group) {
            left.push(group);
        }
    }
    left
}

/// Removes what is below a node's group: a machine boots without the groups of its last run, for each of which kubelet would
/// ask the container runtime for seconds. Waits for processes that are still dying.
pub fn clear(name: &str) {
    let deadline = Instant::now() + DYING;
    let is_clear = || {
        let groups = hierarchies().into_iter().flat_map(|hierarchy| children(&hierarchy.join(name)));
        // Not `all`: each hierarchy is gone through.
        groups.filter(|group| !remove_tree(group)).count() == 0
    };
    while !is_clear() && Instant::now() < deadline {
        thread::sleep(POLL);
    }
}

fn remove_tree(group: &Path) -> bool {
    let left = children(group).iter().filter(|child| !remove_tree(child)).count();
    left == 0 && fs::remove_dir(group).is_ok()
}

/// Every hierarchy: the one of version 2, or those of version 1.
fn hierarchies() -> Vec<PathBuf> {
    if Path::new(ROOT).join("cgroup.procs").exists() {
        vec![PathBuf::from(ROOT)]
    } else {
        children(Path::new(ROOT))
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    // Symbolic links are second names of a hierarchy.
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}
