//! Directories of YAML, watched live.
//!
//! One thread owns everything: it waits for events of the file system, lets each file settle, reads it, and sends
//! what changed. A file settles when its writer closed it or put it in place; a file that is gone, or would
//! take objects away, gets a moment in which its successor may appear, so that editors that replace a file in
//! two steps do not make objects flicker. Only what no one edits goes at once: pods. A slow scan of everything is the net below events that were lost.

mod claims;
mod document;
pub mod inspect;
mod salvage;
mod scan;
mod yaml;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

use super::{Event, Problem, SourceMetrics};
use crate::object::{Change, Object};
use claims::{Content, Effect, FileId, Files};
use document::read_all;
use scan::{Fingerprint, MAX_FILE};

/// After a file was closed, put in place or removed: others of the same edit may follow.
const SETTLED: Duration = Duration::from_millis(2);
/// After a file was found gone or without objects that it had: its successor may follow.
const VANISHED: Duration = Duration::from_millis(25);
/// While a file is being written: at the latest then it is read.
const OPEN: Duration = Duration::from_millis(250);
/// Between two scans of everything.
const SCAN: Duration = Duration::from_secs(30);
/// Events of the file system that wait; when there are more, everything is scanned.
const EVENTS: usize = 4096;
/// Batches that wait for the index; when there are more, reading waits.
const BATCHES: usize = 16;

/// Why directories cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// A directory cannot be read.
    #[error("cannot read source directory {path}")]
    Read {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The system does not give events for a directory.
    #[error("cannot watch source directory {path}")]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: notify::Error,
    },
    /// The thread cannot be started.
    #[error("cannot start the thread that watches source directories")]
    Thread(#[source] std::io::Error),
}

/// Watched directories. Dropping this ends the watch and its thread.
#[derive(Debug)]
pub struct Directories {
    events: SyncSender<Notice>,
    thread: Option<JoinHandle<()>>,
}

impl Directories {
    /// Watches directories; where several have the same object, the first named counts. Everything that
    /// is there is sent first, then [`Event::Synced`], then changes. The receiver ends when the watch does.
    ///
    /// [`Event::Synced`] waits until every file could be read once: what an unreadable file holds, a policy perhaps, is not
    /// known, and nothing is served without it.
    ///
    /// # Errors
    /// When a directory cannot be read or watched.
    pub fn watch(
        roots: Vec<PathBuf>,
        metrics: Arc<SourceMetrics>,
    ) -> Result<(Directories, mpsc::Receiver<Event>), WatchError> {
        let roots: Vec<PathBuf> = roots.into_iter().map(|root| absolute(&root)).collect::<Result<_, _>>()?;
        let (notices, inbox) = sync_channel(EVENTS);
        let lost = Arc::new(AtomicBool::new(false));
        let mut watcher = watcher(notices.clone(), lost.clone()).map_err(|source| WatchError::Watch {
            path: roots.first().cloned().unwrap_or_default(),
            source,
        })?;
        for root in &roots {
            // Watched before it is read, so that nothing falls between.
            watcher
                .watch(root, RecursiveMode::Recursive)
                .map_err(|source| WatchError::Watch { path: root.clone(), source })?;
        }
        let (out, changes) = mpsc::channel(BATCHES);
        let watching = DirectoryWatch {
            roots,
            metrics,
            out,
            lost,
            files: Files::default(),
            seen: HashMap::new(),
            due: BTreeMap::new(),
        };
        let run = move || watching.run(&inbox, watcher);
        let thread =
            std::thread::Builder::new().name("source".to_owned()).spawn(run).map_err(WatchError::Thread)?;
        Ok((Directories { events: notices, thread: Some(thread) }, changes))
    }
}

impl Drop for Directories {
    fn drop(&mut self) {
        // A full channel wakes the thread as well; it then finds that nobody receives.
        let sent = self.events.try_send(Notice::Stop);
        if let (Some(thread), Ok(()) | Err(TrySendError::Disconnected(_))) = (self.thread.take(), sent)
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches source directories panicked");
        }
    }
}

fn absolute(root: &Path) -> Result<PathBuf, WatchError> {
    fs::canonicalize(root).map_err(|source| WatchError::Read { path: root.to_owned(), source })
}

/// Reads the text of one file: its objects, and what of it cannot be taken. A policy that cannot be read is
/// among the objects as one that fails closed.
pub fn parse(file: &Path, text: &str) -> (Vec<Object>, Vec<Problem>) {
    let mut files = Files::default();
    let content = Content::Read(read_all(text));
    let Effect { changes, new_problems } = files.apply(&(0, file.into()), content);
    let objects = changes.into_iter().filter_map(|change| match change {
        Change::Apply(object) => Some(object),
        Change::Delete(_) => None,
    });
    (objects.collect(), new_problems)
}

/// A message of the file system, or of the owner, to the thread.
enum Notice {
    File(notify::Event),
    Stop,
}

fn watcher(notices: SyncSender<Notice>, lost: Arc<AtomicBool>) -> notify::Result<RecommendedWatcher> {
    notify::recommended_watcher(move |event: notify::Result<notify::Event>| match event {
        Ok(event) if is_reading(&event.kind) => {}
        Ok(event) => {
            if notices.try_send(Notice::File(event)).is_err() {
                lost.store(true, Ordering::Release);
            }
        }
        Err(error) => {
            tracing::warn!(%error, "watching source directories failed; scanning them");
            lost.store(true, Ordering::Release);
        }
    })
}

/// Opening and reading changes nothing; our own reading would otherwise wake us.
fn is_reading(kind: &EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if *access != AccessKind::Close(AccessMode::Write))
}

/// A file that waits to be read.
#[derive(Clone, Copy, Debug)]
struct Due {
    at: Instant,
    /// At the latest then, however often it changes meanwhile.
    latest: Instant,
    /// What it loses was seen once already.
    confirmed: bool,
}

struct DirectoryWatch {
    roots: Vec<PathBuf>,
    metrics: Arc<SourceMetrics>,
    out: mpsc::Sender<Event>,
    lost: Arc<AtomicBool>,
    files: Files,
    seen: HashMap<FileId, Fingerprint>,
    due: BTreeMap<FileId, Due>,
}

impl DirectoryWatch {
    /// The watcher is held for as long as the thread runs.
    fn run(mut self, inbox: &Receiver<Notice>, watcher: RecommendedWatcher) {
        self.scan(Instant::now());
        let first = self.read_due(None);
        let mut is_open = self.send(first);
        let mut is_synced = false;
        let mut next_scan = Instant::now() + SCAN;
        while is_open && !self.out.is_closed() {
            if !is_synced && self.files.unread() == 0 {
                is_synced = true;
                if self.out.blocking_send(Event::Synced).is_err() {
                    break;
                }
            }
            let wake = self.due.values().map(|due| due.at).chain([next_scan]).min().unwrap_or(next_scan);
            match inbox.recv_timeout(wake.saturating_duration_since(Instant::now())) {
                Ok(Notice::File(event)) => self.notice(&event, Instant::now()),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Notice::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            }
            let now = Instant::now();
            if self.lost.swap(false, Ordering::AcqRel) || now >= next_scan {
                self.scan(now);
                next_scan = now + SCAN;
            }
            let changes = self.read_due(Some(now));
            is_open = self.send(changes);
        }
        drop(watcher);
    }

    /// Sends changes; `false` when nobody receives.
    fn send(&self, changes: Vec<Change>) -> bool {
        changes.is_empty() || self.out.blocking_send(Event::Changes(changes)).is_ok()
    }

    fn notice(&mut self, event: &notify::Event, now: Instant) {
        if event.need_rescan() {
            self.lost.store(true, Ordering::Release);
            return;
        }
        let delay = match event.kind {
            EventKind::Create(_) | EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any) => OPEN,
            _ => SETTLED,
        };
        for path in &event.paths {
            let Some(source) = self.source_of(path) else { continue };
            let is_hidden = self.is_below_hidden(path, source);
            if scan::is_manifest(path) && !is_hidden && !path.is_dir() {
                // A link is complete as it is created: no writer will close it.
                let delay = if path.is_symlink() { SETTLED } else { delay };
                self.schedule((source, path.as_path().into()), now, delay);
            } else if self.is_structure(path, source) {
                // A directory or link to one came, went or was exchanged: everything below may differ.
                self.lost.store(true, Ordering::Release);
            }
        }
    }

    fn source_of(&self, path: &Path) -> Option<usize> {
        self.roots.iter().position(|root| path.starts_with(root))
    }

    /// Whether a directory on the way from the source to the path is hidden; a scan would not enter it.
    fn is_below_hidden(&self, path: &Path, source: usize) -> bool {
        let root = self.roots.get(source).map_or(Path::new(""), PathBuf::as_path);
        let below = path.parent().and_then(|parent| parent.strip_prefix(root).ok());
        below.is_some_and(|below| {
            below.ancestors().any(|part| !part.as_os_str().is_empty() && scan::is_hidden(part))
        })
    }

    fn is_structure(&self, path: &Path, source: usize) -> bool {
        match fs::symlink_metadata(path) {
            Ok(metadata) => metadata.is_dir() || metadata.is_symlink(),
            Err(_) => self.files.below(source, path).next().is_some(),
        }
    }

    fn schedule(&mut self, id: FileId, now: Instant, delay: Duration) {
        let latest = self.due.get(&id).map_or(now + 4 * OPEN, |due| due.latest);
        self.due.insert(id, Due { at: (now + delay).min(latest), latest, confirmed: false });
    }

    /// Schedules every file that is not as it was seen last.
    fn scan(&mut self, now: Instant) {
        SourceMetrics::add(&self.metrics.scans, 1);
        for source in 0..self.roots.len() {
            let Some(root) = self.roots.get(source).cloned() else { continue };
            let found = match scan::walk(&root) {
                Ok(found) => found,
                Err(error) => {
                    // The last good state stays: a directory that cannot be read says nothing about its objects.
                    tracing::error!(directory = %root.display(), %error, "cannot read source directory; keeping what it had");
                    SourceMetrics::add(&self.metrics.malformed, 1);
                    continue;
                }
            };
            let known = self.files.below(source, &root);
            let gone: Vec<FileId> = known.filter(|(_, path)| !found.contains_key(&**path)).cloned().collect();
            gone.into_iter().for_each(|id| self.schedule(id, now, SETTLED));
            for (path, fingerprint) in found {
                let id = (source, path.into());
                if self.seen.get(&id) != Some(&fingerprint) && !self.due.contains_key(&id) {
                    self.schedule(id, now, SETTLED);
                }
            }
        }
    }

    /// Reads files whose time has come, or all that wait.
    fn read_due(&mut self, now: Option<Instant>) -> Vec<Change> {
        let is_due = |due: &Due| now.is_none_or(|now| due.at <= now);
        let ready: Vec<(FileId, Due)> =
            self.due.iter().filter(|(_, d)| is_due(d)).map(|(id, d)| (id.clone(), *d)).collect();
        let mut changes = Vec::new();
        for (id, due) in ready {
            self.due.remove(&id);
            let (content, fingerprint) = self.read(&id.1);
            let must_confirm = now.is_some() && !due.confirmed && self.files.would_lose(&id, &content);
            if let Some(now) = now.filter(|_| must_confirm) {
                // An empty file is one whose writer has truncated it and was held up before it wrote.
                let at = now + if content.is_empty() { OPEN } else { VANISHED };
                self.due.insert(id, Due { at, latest: due.latest.max(at), confirmed: true });
                continue;
            }
            match fingerprint {
                Some(fingerprint) => self.seen.insert(id.clone(), fingerprint),
                None => self.seen.remove(&id),
            };
            changes.extend(self.take(&id, content));
        }
        changes
    }

    fn read(&self, path: &Path) -> (Content, Option<Fingerprint>) {
        SourceMetrics::add(&self.metrics.reads, 1);
        let metadata = match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => return (Content::Gone, None),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return (Content::Gone, None),
            Err(error) => return (Content::Unreadable(format!("cannot be read: {error}")), None),
        };
        // Taken before the content: a change meanwhile makes the next scan see a difference.
        let fingerprint = Some(Fingerprint::of(&metadata));
        let content = match read_text(path) {
            Ok(text) => Content::Read(read_all(&text)),
            Err(ReadError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => Content::Gone,
            Err(error) => Content::Unreadable(error.to_string()),
        };
        (content, fingerprint)
    }

    fn take(&mut self, id: &FileId, content: Content) -> Vec<Change> {
        let Effect { changes, new_problems } = self.files.apply(id, content);
        SourceMetrics::add(&self.metrics.malformed, new_problems.len());
        SourceMetrics::set(&self.metrics.problems, self.files.problems());
        SourceMetrics::set(&self.metrics.objects, self.files.len());
        new_problems.iter().for_each(report);
        changes
    }
}

/// Why a file's text cannot be had.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("cannot be read: {0}")]
    Io(#[from] std::io::Error),
    #[error("is larger than {} MiB", MAX_FILE >> 20)]
    TooLarge,
    #[error("is not UTF-8 (byte {0})")]
    NotUtf8(usize),
}

fn read_text(path: &Path) -> Result<String, ReadError> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(ReadError::TooLarge);
    }
    String::from_utf8(bytes).map_err(|error| ReadError::NotUtf8(error.utf8_error().valid_up_to()))
}

fn report(problem: &Problem) {
    tracing::error!(
        file = %problem.file.display(),
        line = problem.line,
        field = problem.field.as_deref(),
        object = problem.object.as_ref().map(tracing::field::display),
        "{problem}"
    );
}
