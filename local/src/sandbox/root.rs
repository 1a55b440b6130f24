//! A root file system of a pod's own: the machine's files with the pod's volumes on top.
//!
//! A volume may be mounted where the machine has no directory, and what a container writes beside its volumes stays in
//! the pod. So the root is an overlay (kernel documentation, filesystems/overlayfs) whose lower layer is the machine's.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

use crate::error::{Error, Result};
use crate::kubelet::volumes::Bind;

const NONE: Option<&str> = None;

/// How a sandbox's root is made.
#[derive(Debug, Clone)]
pub(crate) struct PrivateRoot {
    /// A directory for the overlay's layers.
    pub(crate) directory: PathBuf,
    /// What is mounted in the root, parents before children.
    pub(crate) binds: Vec<Bind>,
}

/// Makes the root and moves the calling thread's mount namespace into it.
pub(super) fn enter(name: &str, root: &PrivateRoot) -> Result<()> {
    let fault = |attempt: &str| Error::errno(format!("{attempt} of {name}"));
    let layer = |layer: &str| root.directory.join(layer);
    let (upper, work, merged) = (layer("upper"), layer("work"), layer("merged"));
    for directory in [&upper, &work, &merged] {
        fs::create_dir_all(directory)
            .map_err(Error::system(format!("make directory {}", directory.display())))?;
    }
    let others = mounts_below_root()?;
    // `userxattr`: an overlay in a user namespace cannot use trusted attributes.
    let options = format!("lowerdir=/,upperdir={},workdir={},userxattr", upper.display(), work.display());
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(fault("mount the root file system"))?;
    for mounted in &others {
        let target = below(&merged, mounted);
        mount(Some(mounted), &target, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
            .map_err(fault(&format!("show {} in the root file system", mounted.display())))?;
    }
    for bind in &root.binds {
        show(name, &merged, bind)?;
    }
    chdir(&merged).map_err(fault("enter the root file system"))?;
    // pivot_root(2), "pivot_root(".", ".")": the old root lies over the new one until it is unmounted.
    pivot_root(".", ".").map_err(fault("change the root file system"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(fault("unmount the former root file system"))?;
    chdir("/").map_err(fault("enter the root directory"))
}

fn show(name: &str, root: &Path, bind: &Bind) -> Result<()> {
    let Bind { source, target, read_only } = bind;
    let inside = below(root, target);
    let prepared = if source.is_dir() {
        fs::create_dir_all(&inside)
    } else {
        let parent = inside.parent().map_or(Ok(()), fs::create_dir_all);
        parent.and_then(|()| if inside.exists() { Ok(()) } else { fs::write(&inside, "") })
    };
    prepared.map_err(Error::system(format!("make the mount point {} of {name}", target.display())))?;
    let fault = || Error::errno(format!("mount a volume of {name} at {}", target.display()));
    mount(Some(source), &inside, NONE, MsFlags::MS_BIND, NONE).map_err(fault())?;
    if *read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(NONE, &inside, NONE, flags, NONE).map_err(fault())?;
    }
    Ok(())
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// The mounts directly on the root mount; those below them come along when they are bound recursively.
fn mounts_below_root() -> Result<Vec<PathBuf>> {
    let path = "/proc/thread-self/mountinfo";
    let text = fs::read_to_string(path).map_err(Error::system(format!("read {path}")))?;
    Ok(children_of_root(&text))
}

/// proc(5), `/proc/pid/mountinfo`: id, parent's id, device, root, mount point.
fn children_of_root(mountinfo: &str) -> Vec<PathBuf> {
    let entries: Vec<Vec<&str>> = mountinfo.lines().map(|line| line.split(' ').collect()).collect();
    let field = |entry: &[&str], index: usize| entry.get(index).copied().unwrap_or_default().to_owned();
    // The last mount at a place is the one that is seen.
    let root = entries.iter().rev().find(|entry| field(entry, 4) == "/").map(|entry| field(entry, 0));
    let Some(root) = root else { return Vec::new() };
    let mut children: Vec<PathBuf> = entries
        .iter()
        .filter(|entry| field(entry, 1) == root && field(entry, 4) != "/")
        // Octal escapes stand for blanks; such mounts are left out.
        .filter(|entry| !field(entry, 4).contains('\\'))
        .map(|entry| PathBuf::from(field(entry, 4)))
        .collect();
    children.dedup();
    children
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_on_the_root_mount_are_listed() {
        let text = "20 1 8:1 / / rw - ext4 /dev/sda rw\n21 20 0:5 / /proc rw - proc proc rw\n22 20 0:6 / /dev rw - devtmpfs none rw\n23 22 0:7 / /dev/shm rw - tmpfs none rw\n";
        assert_eq!(children_of_root(text), [PathBuf::from("/proc"), PathBuf::from("/dev")]);
    }
}
