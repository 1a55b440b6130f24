//! Programs as children of this process: started inside a sandbox, logged into a bounded buffer, ended for sure.
//!
//! Pods' containers, `ambit-control` and `ztunnel` are such children. Each is the leader of a process group, so
//! that ending one ends what it started, and gets SIGKILL from the kernel if this process dies first.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Child;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;

use crate::error::{Error, Result};
use crate::sandbox::Sandbox;

/// How much of a program's output is kept, bytes; the oldest lines go first.
const LOG_BYTES: usize = 256 * 1024;
/// Longer lines are cut into pieces, bytes.
const LOG_LINE: u64 = 8 * 1024;
/// How long the output of an ended program is waited for.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// Signals that may wait for delivery.
const PENDING_SIGNALS: usize = 16;

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Command {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    pub(crate) env: BTreeMap<OsString, OsString>,
    pub(crate) directory: Option<PathBuf>,
    pub(crate) log_file: Option<PathBuf>,
    pub(crate) stdio: Option<Arc<[OwnedFd; 3]>>,
}

impl Command {
    /// A command without arguments. `program` is a path, or a name that is looked up in `PATH`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), ..Self::default() }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I, A>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item = A>,
        A: Into<OsString>,
    {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable, over the inherited ones.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Sets the working directory; default is that of this process.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = Some(directory.into());
        self
    }

    /// Sends the output to a file, appended, instead of the buffer in memory: nothing here reads it then.
    #[must_use]
    pub fn log_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.log_file = Some(file.into());
        self
    }

    /// Gives the program these as standard input, output and error; nothing of its output is kept then.
    #[must_use]
    pub fn stdio(mut self, descriptors: [OwnedFd; 3]) -> Self {
        self.stdio = Some(Arc::new(descriptors));
        self
    }
}

/// A running or ended child. The last clone to be dropped kills it with its process group.
#[derive(Debug, Clone)]
pub struct Process {
    name: Arc<str>,
    pid: u32,
    signals: mpsc::Sender<(Signal, oneshot::Sender<()>)>,
    exit: watch::Receiver<Option<ExitStatus>>,
    output: Arc<Output>,
    env: Arc<BTreeMap<OsString, OsString>>,
}

impl Process {
    /// Starts a program inside a sandbox.
    ///
    /// # Errors
    /// When the program can't be executed, or its log file can't be opened.
    pub async fn start(name: impl Into<Arc<str>>, sandbox: &Sandbox, command: Command) -> Result<Self> {
        let name = name.into();
        let log_file = command.log_file.clone();
        let env = Arc::new(command.env.clone());
        let label = Arc::clone(&name);
        // The parent-death signal follows the thread that forks, so this must be the sandbox's own one,
        // which lives as long as the sandbox.
        let mut child = sandbox.on(move || spawn(&label, &command)).await??;
        let pid = child.id().ok_or_else(|| Error::program(&*name, "it ended before it could be watched"))?;
        let output = Arc::new(Output { log_file, ..Output::default() });
        let mut readers = JoinSet::new();
        if let Some(stdout) = child.stdout.take() {
            readers.spawn(keep(stdout, Arc::clone(&output)));
        }
        if let Some(stderr) = child.stderr.take() {
            readers.spawn(keep(stderr, Arc::clone(&output)));
        }
        let (signals, pending) = mpsc::channel(PENDING_SIGNALS);
        let (exited, exit) = watch::channel(None);
        let group = Group { pid, reaped: false };
        tokio::spawn(supervise(child, group, readers, pending, exited));
        Ok(Self { name, pid, signals, exit, output, env })
    }

    /// Process id of the leader.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The name it was started under.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The environment that its command set, without what it inherited.
    #[must_use]
    pub fn environment(&self) -> &BTreeMap<OsString, OsString> {
        &self.env
    }

    /// Whether the leader still runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.exit.borrow().is_none()
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exit_status(&self) -> Option<ExitStatus> {
        *self.exit.borrow()
    }

    /// Waits until the leader has ended.
    ///
    /// # Errors
    /// [`Error::Ended`] when its watcher is gone, which happens only while the runtime shuts down.
    pub async fn wait(&self) -> Result<ExitStatus> {
        let mut exit = self.exit.clone();
        let status = exit
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Error::Ended(format!("the watcher of {}", self.name)))?;
        status.ok_or_else(|| Error::Ended(format!("the watcher of {}", self.name)))
    }

    /// Waits until the leader has ended, at most for `limit`.
    ///
    /// # Errors
    /// [`Error::Deadline`] when it still runs then.
    pub async fn wait_within(&self, limit: Duration) -> Result<ExitStatus> {
        tokio::time::timeout(limit, self.wait()).await.map_err(|_| Error::Deadline {
            what: format!("the end of {}", self.name),
            after: limit,
            detail: self.last_line(),
        })?
    }

    /// Sends a signal to the whole process group and returns once it is sent. Does nothing after the end.
    pub async fn signal(&self, signal: Signal) {
        let (sent, done) = oneshot::channel();
        if self.signals.send((signal, sent)).await.is_ok() {
            // An error says that the process ended first.
            done.await.ok();
        }
    }

    /// Sends a signal by number, as [`Process::signal`] does; a number that is no signal does nothing.
    pub async fn signal_number(&self, number: i32) {
        if let Ok(signal) = Signal::try_from(number) {
            self.signal(signal).await;
        }
    }

    /// SIGTERM, then SIGKILL if it still runs after `grace`. Returns how it ended.
    ///
    /// # Errors
    /// As for [`Process::wait`].
    pub async fn terminate(&self, grace: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM).await;
        match tokio::time::timeout(grace, self.wait()).await {
            Ok(status) => status,
            Err(_) => self.kill().await,
        }
    }

    /// SIGKILL; returns when the process is gone.
    ///
    /// # Errors
    /// As for [`Process::wait`].
    pub async fn kill(&self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL).await;
        self.wait().await
    }

    /// The last lines of its output, oldest first. Of a log file, its last 256 KiB.
    #[must_use]
    pub fn logs(&self) -> Vec<String> {
        self.output.lines()
    }

    /// The lines of its output from number `from` on, counted from 0, that are still kept, and the number of the next
    /// line. Nothing when the output goes to a log file.
    #[must_use]
    pub fn logs_from(&self, from: u64) -> (Vec<String>, u64) {
        self.output.lines_from(from)
    }

    /// The last line of its output.
    #[must_use]
    pub fn last_line(&self) -> Option<String> {
        self.logs().into_iter().next_back()
    }

    /// Waits until a line of the output satisfies `wanted`, and returns it.
    ///
    /// # Errors
    /// [`Error::Deadline`] when none did within `limit`.
    pub async fn wait_for_line(&self, limit: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let search = async {
            loop {
                let more = self.output.more.notified();
                if let Some(line) = self.logs().into_iter().find(|line| wanted(line)) {
                    return line;
                }
                // A log file is written by the program itself, so nothing notifies of it.
                tokio::time::timeout(Duration::from_millis(50), more).await.ok();
            }
        };
        tokio::time::timeout(limit, search).await.map_err(|_| Error::Deadline {
            what: format!("a line of output of {}", self.name),
            after: limit,
            detail: self.last_line(),
        })
    }
}

/// The last output of a program.
#[derive(Debug, Default)]
struct Output {
    kept: Mutex<Kept>,
    more: Notify,
    log_file: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct Kept {
    lines: VecDeque<String>,
    bytes: usize,
    /// How many lines were dropped before those.
    dropped: u64,
}

impl Output {
    fn push(&self, line: String) {
        let mut kept = self.kept.lock();
        kept.bytes += line.len();
        kept.lines.push_back(line);
        while kept.bytes > LOG_BYTES {
            let Some(oldest) = kept.lines.pop_front() else { break };
            kept.bytes -= oldest.len();
            kept.dropped += 1;
        }
        drop(kept);
        self.more.notify_waiters();
    }

    fn lines_from(&self, from: u64) -> (Vec<String>, u64) {
        let kept = self.kept.lock();
        let skip = usize::try_from(from.saturating_sub(kept.dropped)).unwrap_or(usize::MAX);
        let next = kept.dropped + u64::try_from(kept.lines.len()).unwrap_or_default();
        (kept.lines.iter().skip(skip).cloned().collect(), next)
    }

    fn lines(&self) -> Vec<String> {
        let Some(file) = &self.log_file else {
            return self.kept.lock().lines.iter().cloned().collect();
        };
        let text = std::fs::read(file).unwrap_or_default();
        let tail = text.get(text.len().saturating_sub(LOG_BYTES)..).unwrap_or_default();
        String::from_utf8_lossy(tail).lines().map(str::to_owned).collect()
    }
}

async fn keep(stream: impl AsyncRead + Unpin, output: Arc<Output>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(LOG_LINE).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => output.push(String::from_utf8_lossy(&line).trim_end().to_owned()),
        }
    }
}

/// Kills the rest of a process group when its watcher ends in any way.
struct Group {
    pid: u32,
    reaped: bool,
}

impl Group {
    fn send(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.pid) {
            // ESRCH: every process of the group has ended already, which is what is wanted.
            killpg(Pid::from_raw(pid), signal).ok();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.reaped {
            self.send(Signal::SIGKILL);
        }
    }
}

async fn supervise(
    mut child: Child,
    mut group: Group,
    mut readers: JoinSet<()>,
    mut pending: mpsc::Receiver<(Signal, oneshot::Sender<()>)>,
    exited: watch::Sender<Option<ExitStatus>>,
) {
    let mut abandoned = false;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            signal = pending.recv(), if !abandoned => match signal {
                Some((signal, sent)) => {
                    group.send(signal);
                    // The sender may have stopped waiting.
                    sent.send(()).ok();
                }
                None => {
                    abandoned = true;
                    group.send(Signal::SIGKILL);
                }
            },
        }
    };
    // As in a container, nothing outlives the leader.
    group.send(Signal::SIGKILL);
    group.reaped = true;
    // Reads the last lines before the end is reported. The wait is bounded, because a process that left the group may hold the
    // pipes open.
    let last_words = async { while readers.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_WORDS, last_words).await.is_err() {
        readers.detach_all();
    }
    match status {
        Ok(status) => drop(exited.send(Some(status))),
        Err(error) => tracing::error!(pid = group.pid, %error, "cannot wait for a child"),
    }
}

/// Runs on the sandbox's thread.
fn spawn(name: &str, command: &Command) -> Result<Child> {
    let Command { program, args, env, directory, log_file, stdio } = command;
    let mut spawning = tokio::process::Command::new(program);
    spawning.args(args).envs(env).stdin(Stdio::null()).process_group(0);
    if let Some(directory) = directory {
        spawning.current_dir(directory);
    }
    match (stdio, log_file) {
        (Some(stdio), _) => {
            let again = |descriptor: &OwnedFd| {
                let attempt = format!("hand a descriptor to {name}");
                descriptor.try_clone().map(Stdio::from).map_err(Error::system(attempt))
            };
            let [input, output, error] = &**stdio;
            spawning.stdin(again(input)?).stdout(again(output)?).stderr(again(error)?);
        }
        (None, None) => {
            spawning.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        (None, Some(path)) => {
            let attempt = format!("open the log file {} of {name}", path.display());
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
            let file = file.map_err(Error::system(attempt.clone()))?;
            spawning.stderr(file.try_clone().map_err(Error::system(attempt))?).stdout(file);
        }
    }
    die_with_parent(spawning.as_std_mut());
    spawning
        .spawn()
        .map_err(|error| Error::program(name, format!("cannot execute {}: {error}", program.display())))
}

/// Has the kernel send SIGKILL to the program when the thread that started it ends.
#[allow(unsafe_code, reason = "there is no safe way to ask for the parent-death signal in a child")]
pub fn die_with_parent(command: &mut std::process::Command) {
    let signal = || nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from);
    // SAFETY: the closure runs between fork and exec and makes one system call, which is async-signal-safe;
    // it neither allocates nor takes a lock.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(command, signal);
    }
}
