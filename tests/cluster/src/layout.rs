//! Where the test cluster's files lie: sources in the repository, everything else below the target directory.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::error::{Error, Result};

/// The directories of this checkout.
#[derive(Debug, Clone)]
pub struct Layout {
    repository: PathBuf,
    target: PathBuf,
}

impl Layout {
    /// The checkout that this crate was built from; `CARGO_TARGET_DIR` moves the target directory.
    #[must_use]
    pub fn find() -> Self {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let repository = manifest.ancestors().nth(2).unwrap_or(manifest).to_owned();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(target) => repository.join(target),
            None => repository.join("target"),
        };
        Self { repository, target }
    }

    /// The root of the repository.
    #[must_use]
    pub fn repository(&self) -> &Path {
        &self.repository
    }

    /// A file of this crate.
    #[must_use]
    pub fn source(&self, path: &str) -> PathBuf {
        self.repository.join("tests/cluster").join(path)
    }

    /// Cargo's target directory.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Kubernetes' programs, CoreDNS and Helm.
    #[must_use]
    pub fn bin(&self) -> PathBuf {
        self.target.join("cluster/bin")
    }

    /// A program of [`Layout::bin`].
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin().join(name)
    }

    /// Image archives and the files that they are made from.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.target.join("cluster/images")
    }

    /// What a running cluster shows to others: its kubeconfig, logs and the supervisor's socket.
    #[must_use]
    pub fn run(&self, cluster: &str) -> PathBuf {
        self.target.join("cluster/run").join(cluster)
    }

    /// Prefix of a cluster's control groups, which are shared by everything on this machine.
    #[must_use]
    pub fn cgroup_prefix(&self, cluster: &str) -> String {
        let mut hasher = DefaultHasher::new();
        self.run(cluster).hash(&mut hasher);
        format!("ambit-{cluster}-{:08x}", hasher.finish() & 0xffff_ffff)
    }

    /// The lock that a running supervisor holds.
    fn lock_file(&self, cluster: &str) -> PathBuf {
        self.target.join("cluster/run").join(format!("{cluster}.lock"))
    }

    /// Takes a cluster's lock; `None` when its supervisor runs.
    ///
    /// # Errors
    /// When the lock file can't be made.
    pub fn try_lock(&self, cluster: &str) -> Result<Option<Flock<File>>> {
        let path = self.lock_file(cluster);
        match lock(&path, FlockArg::LockExclusiveNonblock) {
            Err(Error::System { source, .. }) if source.raw_os_error() == Some(Errno::EAGAIN as i32) => {
                Ok(None)
            }
            locked => locked.map(Some),
        }
    }

    /// Waits for the lock under which programs and images are built, so that each is built once.
    ///
    /// # Errors
    /// When the lock file can't be made.
    pub fn build_lock(&self) -> Result<Flock<File>> {
        lock(&self.target.join("cluster/build.lock"), FlockArg::LockExclusive)
    }

    /// Names of clusters that have left something below the target directory, running or not.
    #[must_use]
    pub fn clusters(&self) -> Vec<String> {
        let entries = fs::read_dir(self.target.join("cluster/run")).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.path().is_dir())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// Removes the lock file of a cluster that has ended.
    pub fn remove_lock(&self, cluster: &str) {
        // Absent when another process cleaned up too.
        fs::remove_file(self.lock_file(cluster)).ok();
    }
}

/// The directory of the programs that were built with this one.
///
/// # Errors
/// When this program can't be found.
pub fn built() -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(Error::system("find this program"))?;
    let directory = own.parent().unwrap_or(Path::new("/"));
    // Tests lie one directory deeper.
    let directory = if directory.ends_with("deps") { directory.parent() } else { Some(directory) };
    Ok(directory.unwrap_or(Path::new("/")).to_owned())
}

fn lock(path: &Path, kind: FlockArg) -> Result<Flock<File>> {
    let attempt = format!("lock {}", path.display());
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(Error::system(attempt.clone()))?;
    }
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let file = file.map_err(Error::system(attempt.clone()))?;
    Flock::lock(file, kind).map_err(|(_, errno)| Error::system(attempt)(errno))
}
