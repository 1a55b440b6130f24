//! A node's file system: the machine's own, with layers of the node's above what it changes.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use super::Config;
use crate::cgroup;
use crate::error::{Error, Result};

const CGROUPS: &str = "/sys/fs/cgroup";

/// Directories that get a layer of the node's own: what is written there goes to its disk.
const LAYERED: [&str; 3] = ["/etc", "/opt", "/var"];

/// Makes the node's mounts. They propagate into its containers, as on a machine that systemd booted.
pub(super) fn prepare(config: &Config) -> Result<()> {
    let disk = |path: &str| directory(&config.directory.join(path));
    set(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None)?;
    // The process ids and network devices of this node, the control groups of the machine.
    set(Some(Path::new("proc")), Path::new("/proc"), Some("proc"), MsFlags::empty(), None)?;
    let groups = disk("cgroup")?;
    set(Some(Path::new(CGROUPS)), &groups, None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
    set(Some(Path::new("sysfs")), Path::new("/sys"), Some("sysfs"), MsFlags::empty(), None)?;
    set(Some(&groups), Path::new(CGROUPS), None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
    cgroup::clear(&config.cgroup);
    cgroup::create(&config.cgroup)?;
    for path in LAYERED {
        let name = path.trim_start_matches('/');
        let (upper, work) = (disk(&format!("{name}.upper"))?, disk(&format!("{name}.work"))?);
        let options = format!("lowerdir={path},upperdir={},workdir={}", upper.display(), work.display());
        set(Some(Path::new("overlay")), Path::new(path), Some("overlay"), MsFlags::empty(), Some(&options))?;
    }
    // An overlay can't be the upper layer of containers' overlays, so these are plain directories of the disk.
    for path in ["/var/lib/containerd", "/var/lib/kubelet"] {
        let source = disk(path.rsplit('/').next().unwrap_or_default())?;
        set(Some(&source), &directory(Path::new(path))?, None, MsFlags::MS_BIND, None)?;
    }
    set(Some(Path::new("run")), Path::new("/run"), Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    set(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_SHARED, None)
}

fn directory(path: &Path) -> Result<PathBuf> {
    fs::create_dir_all(path).map_err(Error::system(format!("make {}", path.display())))?;
    Ok(path.to_owned())
}

fn set(
    source: Option<&Path>,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<()> {
    mount(source, target, kind, flags, data)
        .map_err(Error::system(format!("mount {} of a node", target.display())))
}
