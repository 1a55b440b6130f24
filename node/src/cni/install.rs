//! The plugin and its entry on the host: put there, kept there while the agent runs, and left there when it ends.
//!
//! Other tools own the directory of network configurations and may rewrite it at any time. The entry belongs into the
//! file that the container runtime reads: the first by name, or a list of our own that sorts before it. Files are replaced
//! atomically, because the runtime reads them at any time too.

use std::collections::VecDeque;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::PLUGIN;
use super::conflist::{self, ConfigError, Entry};

/// Time between two looks at the directories where no change was noticed.
const LOOK: Duration = Duration::from_secs(5);
/// Another tool that undoes our changes more often than this in [`WINDOW`] does not want them: after that, changes are
/// no longer answered at once, and the plugin does not count as installed.
const REWRITES: usize = 10;
/// The time over which rewrites are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// The main network's list with the entry, as a file of its own that sorts before others.
const OWN_LIST: &str = "00-ambit.conflist";
/// The configuration of its own, which sorts after others: a runtime must not take it for its main network.
const STANDALONE: &str = "zzz-ambit-cni.conf";
/// Added to the name of a single plugin's configuration that became a list, so that runtimes pass over it.
const CONVERTED: &str = "ambit-converted";
/// The files that container runtimes read.
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// Where the plugin's entry goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Into the main network's configuration, which its owner may rewrite without it.
    Chained,
    /// Into a copy of the main network's configuration that the runtime reads instead. What the owner of the main network
    /// writes, at a boot before the agent runs above all, takes the entry from no pod.
    OwnList,
    /// Into a configuration of its own, for a meta plugin.
    Standalone,
}

/// Where the plugin and its entry go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// The plugin's program in the agent's image.
    pub program: PathBuf,
    /// The host's directory of plugins.
    pub bin_dir: PathBuf,
    /// The host's directory of network configurations.
    pub conf_dir: PathBuf,
    /// Where the entry goes.
    pub placement: Placement,
    /// The plugin's settings.
    pub entry: Entry,
}

/// Why the plugin could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file or directory.
    #[error("{attempt} {}: {source}", path.display())]
    File {
        /// What was attempted.
        attempt: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file that the runtime reads first is not one that the plugin can be chained into.
    #[error("network configuration {}: {source}", path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The files are in place and do not stay.
    #[error("another tool undoes it: more than {REWRITES} times within {WINDOW:?}")]
    Contested,
    /// The runtime reads another file before the list of our own.
    #[error("{} sorts before {OWN_LIST}: the container runtime reads that", .0.display())]
    NotFirst(PathBuf),
    /// There is nothing to chain into.
    #[error("no network configuration in {} yet", .0.display())]
    NoNetwork(PathBuf),
}

/// When files had to be written, as far as that is within [`WINDOW`].
#[derive(Debug, Default)]
struct Rewrites(VecDeque<Instant>);

impl Rewrites {
    /// Notes whether files had to be written. Returns whether that is too often.
    fn note(&mut self, written: bool, now: Instant) -> bool {
        self.0.extend(written.then_some(now));
        while self.0.front().is_some_and(|time| now.duration_since(*time) >= WINDOW) {
            self.0.pop_front();
        }
        self.0.len() > REWRITES
    }
}

/// The file that the runtime reads.
struct Main {
    path: PathBuf,
    text: String,
    chained: String,
}

impl Installation {
    /// Puts in place what is missing or differs. Returns the paths that were written.
    ///
    /// # Errors
    /// [`InstallError::NoNetwork`] until the main plugin is installed. [`InstallError::File`] and
    /// [`InstallError::Configuration`] when the main plugin's configuration cannot be read, or has a version that the
    /// plugin does not speak: no other file gets the entry, which would have no effect there.
    pub fn install(&self) -> Result<Vec<PathBuf>, InstallError> {
        let mut written = Vec::new();
        // The program comes before the entry that has it called.
        let target = self.bin_dir.join(PLUGIN);
        let program = read(&self.program)?;
        if fs::read(&target).ok().as_ref() != Some(&program) || !is_executable(&target) {
            replace(&target, &program, 0o755)?;
            written.push(target);
        }
        written.extend(match self.placement {
            Placement::Chained => self.chain()?,
            Placement::OwnList => self.own_list()?,
            Placement::Standalone => self.stand_alone()?,
        });
        // Last, so that the runtime finds the entry at any time.
        written.extend(self.delete_files_of_other_placements()?);
        Ok(written)
    }

    /// The configuration that the plugin would be chained into.
    ///
    /// # Errors
    /// As for [`Installation::install`], of the configuration.
    pub fn find_network(&self) -> Result<PathBuf, InstallError> {
        self.main_network().map(|main| main.path)
    }

    /// Takes the entry, wherever it is, and the program off the host. Returns the paths that were changed.
    pub fn remove(&self) -> Result<Vec<PathBuf>, InstallError> {
        let mut changed = Vec::new();
        for path in configurations(&self.conf_dir)? {
            let Ok(text) = fs::read_to_string(&path) else { continue };
            if conflist::is_standalone(&text) || is_own_list(&path) {
                delete(&path)?;
            } else if let Ok(Some(without)) = conflist::unchain(&text) {
                self.restore(&path, &without)?;
            } else {
                continue;
            }
            changed.push(path);
        }
        // The program goes last: an entry without its program fails every pod.
        let program = self.bin_dir.join(PLUGIN);
        if program.exists() {
            delete(&program)?;
            changed.push(program);
        }
        Ok(changed)
    }

    /// Puts the owner's configuration back in place of the list at `path`, which is `without` when our entry is taken out.
    fn restore(&self, path: &Path, without: &str) -> Result<(), InstallError> {
        let mut singles = ["conf", "json"].map(|extension| path.with_extension(extension)).into_iter();
        let Some(single) = singles.find(|single| with_suffix(single, CONVERTED).exists()) else {
            return replace(path, without.as_bytes(), mode_of(path));
        };
        let converted = with_suffix(&single, CONVERTED);
        let made = conflist::chain(&String::from_utf8_lossy(&read(&converted)?), &self.entry);
        let is_made = made.is_ok_and(|made| {
            conflist::unchain(&made).is_ok_and(|made| made.is_some_and(|made| conflist::same(&made, without)))
        });
        if is_made {
            rename(&converted, &single)?;
            return delete(path);
        }
        // The owner has written a list of its own since; the single configuration is out of date.
        replace(path, without.as_bytes(), mode_of(path))?;
        delete(&converted)
    }

    /// Keeps everything in place. Reports whether it is, and stays.
    pub async fn keep(self, installed: watch::Sender<bool>, problem: watch::Sender<String>) {
        let changed = Arc::new(Notify::new());
        let _watching = self.watch(&changed);
        let mut rewrites = Rewrites::default();
        loop {
            let this = self.clone();
            let outcome = tokio::task::spawn_blocking(move || this.install()).await;
            let outcome = outcome.unwrap_or_else(|error| {
                Err(InstallError::File {
                    attempt: "install",
                    path: self.bin_dir.clone(),
                    source: io::Error::other(error),
                })
            });
            let written = outcome.as_ref().is_ok_and(|written| !written.is_empty());
            let contested = rewrites.note(written, Instant::now());
            let outcome = outcome.and_then(|written| {
                for path in written {
                    tracing::info!(path = %path.display(), "CNI plugin installed");
                }
                if contested { Err(InstallError::Contested) } else { Ok(()) }
            });
            match &outcome {
                Ok(()) => {
                    problem.send_replace(String::new());
                }
                Err(error) => {
                    let error = error.to_string();
                    if error != *problem.borrow() {
                        tracing::warn!(error, "CNI plugin not installed; it is tried again");
                        problem.send_replace(error);
                    }
                }
            }
            installed.send_if_modified(|was| std::mem::replace(was, outcome.is_ok()) != outcome.is_ok());
            tokio::select! {
                () = changed.notified(), if !contested => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Notifies of changes in the directories. Where that is not possible, [`LOOK`] has to do.
    fn watch(&self, changed: &Arc<Notify>) -> Option<notify::RecommendedWatcher> {
        let changed = Arc::clone(changed);
        let on_event = move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !event.kind.is_access()) {
                changed.notify_one();
            }
        };
        let mut watcher = notify::recommended_watcher(on_event)
            .inspect_err(|error| tracing::warn!(%error, "changes of CNI configurations are noticed late"))
            .ok()?;
        for directory in [&self.conf_dir, &self.bin_dir] {
            if let Err(error) = watcher.watch(directory, RecursiveMode::NonRecursive) {
                tracing::warn!(directory = %directory.display(), %error, "changes are noticed late");
            }
        }
        Some(watcher)
    }

    fn chain(&self) -> Result<Vec<PathBuf>, InstallError> {
        let Main { path, text, chained } = self.main_network()?;
        if conflist::same(&text, &chained) {
            return Ok(Vec::new());
        }
        if is_list(&path) {
            replace(&path, chained.as_bytes(), mode_of(&path))?;
            return Ok(vec![path]);
        }
        // The list is there before the single configuration goes. Its name sorts after that of the other.
        let list = path.with_extension("conflist");
        replace(&list, chained.as_bytes(), mode_of(&path))?;
        rename(&path, &with_suffix(&path, CONVERTED))?;
        Ok(vec![list])
    }

    fn own_list(&self) -> Result<Vec<PathBuf>, InstallError> {
        let Main { path, chained, .. } = self.main_network()?;
        let own = self.conf_dir.join(OWN_LIST);
        if path < own {
            return Err(InstallError::NotFirst(path));
        }
        if fs::read_to_string(&own).is_ok_and(|present| conflist::same(&present, &chained)) {
            return Ok(Vec::new());
        }
        replace(&own, chained.as_bytes(), mode_of(&path))?;
        Ok(vec![own])
    }

    fn delete_files_of_other_placements(&self) -> Result<Vec<PathBuf>, InstallError> {
        let others: &[&str] = match self.placement {
            Placement::Chained => &[OWN_LIST, STANDALONE],
            Placement::OwnList => &[STANDALONE],
            Placement::Standalone => &[OWN_LIST],
        };
        let present = others.iter().map(|name| self.conf_dir.join(name)).filter(|path| path.exists());
        present.map(|path| delete(&path).map(|()| path)).collect()
    }

    fn stand_alone(&self) -> Result<Vec<PathBuf>, InstallError> {
        let path = self.conf_dir.join(STANDALONE);
        let text = self.entry.standalone();
        if fs::read_to_string(&path).is_ok_and(|present| conflist::same(&present, &text)) {
            return Ok(Vec::new());
        }
        replace(&path, text.as_bytes(), 0o644)?;
        Ok(vec![path])
    }

    /// The first file that is a network configuration, as runtimes choose it, our own list apart.
    fn main_network(&self) -> Result<Main, InstallError> {
        for path in configurations(&self.conf_dir)?.into_iter().filter(|path| !is_own_list(path)) {
            let text = match fs::read_to_string(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                text => text.map_err(failed("read", &path))?,
            };
            match conflist::chain(&text, &self.entry) {
                // Runtimes read lists from files with the extension for lists only, and nothing else from these.
                Ok(chained) if conflist::is_list(&text) == is_list(&path) => {
                    return Ok(Main { path, text, chained });
                }
                Ok(_) | Err(ConfigError::Missing(_)) => {
                    tracing::debug!(path = %path.display(), "no network configuration");
                }
                Err(source) => return Err(InstallError::Configuration { path, source }),
            }
        }
        Err(InstallError::NoNetwork(self.conf_dir.clone()))
    }
}

fn is_own_list(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == OWN_LIST)
}

fn is_list(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "conflist")
}

/// The files in `directory` that runtimes read, in their order.
fn configurations(directory: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed("list", directory))? {
        let path = entry.map_err(failed("list", directory))?.path();
        if path.extension().and_then(|e| e.to_str()).is_some_and(|e| EXTENSIONS.contains(&e)) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Writes a file beside its place and renames it.
fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), InstallError> {
    let next = with_suffix(path, "ambit-next");
    let write = || {
        let mut file = File::create(&next)?;
        file.write_all(content)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()
    };
    write().map_err(failed("write", &next))?;
    rename(&next, path)
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).map_or(0o644, |metadata| metadata.permissions().mode() & 0o777)
}

fn is_executable(path: &Path) -> bool {
    mode_of(path) & 0o111 == 0o111
}

fn read(path: &Path) -> Result<Vec<u8>, InstallError> {
    fs::read(path).map_err(failed("read", path))
}

fn rename(from: &Path, to: &Path) -> Result<(), InstallError> {
    fs::rename(from, to).map_err(failed("replace", to))
}

fn delete(path: &Path) -> Result<(), InstallError> {
    fs::remove_file(path).map_err(failed("delete", path))
}

fn failed(attempt: &'static str, path: &Path) -> impl Fn(io::Error) -> InstallError + use<> {
    let path = path.to_owned();
    move |source| InstallError::File { attempt, path: path.clone(), source }
}

#[cfg(test)]
#[path = "install_tests.rs"]
mod tests;
