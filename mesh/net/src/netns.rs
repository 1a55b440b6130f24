//! Network namespaces: naming them, and running code inside them.
//!
//! A thread belongs to one namespace at a time, and a runtime worker must never leave its own. So
//! code that has to run inside (mostly the creation of sockets) is sent to one helper thread that does
//! nothing else. Code that may block gets a thread of its own with [`Netns::thread`]. A socket keeps the
//! namespace that it was created in, wherever it is used.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use parking_lot::Mutex;
use tokio::sync::oneshot;

/// Jobs that may wait for the helper thread; a job takes microseconds.
const QUEUE: usize = 4096;
/// How often the helper looks for stocks of sockets that are not used.
const TICK: Duration = Duration::from_secs(15);

/// Errors of network namespaces.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The file of the namespace could not be opened.
    #[error("open network namespace {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The descriptor is not a network namespace.
    #[error("descriptor is not a network namespace: {0}")]
    NotANamespace(io::Error),
    /// The thread could not be moved into the namespace.
    #[error("enter network namespace {id}: {source}")]
    Enter {
        /// The namespace.
        id: NetnsId,
        /// The error of the system.
        source: io::Error,
    },
    /// A new namespace could not be created.
    #[error("create a network namespace: {0}")]
    Create(io::Error),
    /// The thread that enters namespaces could not be started.
    #[error("start the namespace thread: {0}")]
    Thread(io::Error),
    /// Too many jobs are waiting.
    #[error("namespace thread is busy: {QUEUE} jobs are waiting")]
    Busy,
    /// The code that ran inside panicked.
    #[error("code inside network namespace {0} panicked")]
    Panicked(NetnsId),
    /// A socket could not be created or configured inside.
    #[error("{attempt} in network namespace {id}: {source}")]
    Socket {
        /// What was attempted, as a verb phrase.
        attempt: String,
        /// The namespace.
        id: NetnsId,
        /// The error of the system.
        source: io::Error,
    },
}

impl NetnsError {
    /// The system's error code, if there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Open { source, .. }
            | Self::NotANamespace(source)
            | Self::Enter { source, .. }
            | Self::Create(source)
            | Self::Thread(source)
            | Self::Socket { source, .. } => source.raw_os_error(),
            Self::Busy | Self::Panicked(_) => None,
        }
    }
}

/// The identity of a namespace: two descriptors with equal ids are one namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    /// Device of the namespace file system.
    pub dev: u64,
    /// Inode on that device. It may be used again once the namespace is gone.
    pub ino: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.dev, self.ino)
    }
}

/// A network namespace, kept alive by this handle. Cloning shares the descriptor.
#[derive(Clone)]
pub struct Netns(Arc<Inner>);

struct Inner {
    fd: OwnedFd,
    id: NetnsId,
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netns({})", self.0.id)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl Netns {
    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// The namespace of a file: `/run/netns/NAME`, `/proc/PID/ns/net`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, NetnsError> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| NetnsError::Open { path: path.to_owned(), source })?;
        Self::from_fd(file.into())
    }

    /// Wraps a descriptor, for example one received from a peer. Fails unless it is a network namespace.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NetnsError> {
        let file = File::from(fd);
        let metadata = file.metadata().map_err(NetnsError::NotANamespace)?;
        let fd = OwnedFd::from(file);
        require_network_namespace(fd.as_fd()).map_err(NetnsError::NotANamespace)?;
        let id = NetnsId { dev: metadata.dev(), ino: metadata.ino() };
        Ok(Self(Arc::new(Inner { fd, id })))
    }

    /// Creates an empty namespace without a name. It exists as long as a handle, a process or a
    /// socket in it. Its loopback device is down.
    pub fn create() -> Result<Self, NetnsError> {
        let worker = std::thread::Builder::new().name("netns-create".into()).spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| NetnsError::Create(e.into()))?;
            Self::current()
        });
        match worker.map_err(NetnsError::Thread)?.join() {
            Ok(made) => made,
            Err(_) => Err(NetnsError::Create(io::Error::other("thread panicked"))),
        }
    }

    /// The identity of this namespace.
    pub fn id(&self) -> NetnsId {
        self.0.id
    }

    /// Runs `work` inside, on the helper thread that all namespaces share. `work` must not block:
    /// it creates a socket, sets options, reads an address. For anything longer use
    /// [`thread`](Self::thread).
    pub async fn run<T, F>(&self, work: F) -> Result<T, NetnsError>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let (answer, result) = oneshot::channel();
        let id = self.id();
        self.submit(move |entered| {
            let outcome = entered
                .and_then(|()| catch_unwind(AssertUnwindSafe(work)).map_err(|_| NetnsError::Panicked(id)));
            // The caller may have been dropped.
            drop(answer.send(outcome));
        })?;
        result.await.unwrap_or(Err(NetnsError::Panicked(id)))
    }

    /// Runs `work` inside on a new thread and waits. For program start, tests and tools;
    /// on a runtime worker use [`run`](Self::run).
    pub fn run_blocking<T, F>(&self, work: F) -> Result<T, NetnsError>
    where
        F: FnOnce() -> T + Send,
        T: Send,
    {
        std::thread::scope(|scope| {
            let inside = std::thread::Builder::new().name("netns-run".into()).spawn_scoped(scope, || {
                self.enter()?;
                Ok(work())
            });
            match inside.map_err(NetnsError::Thread)?.join() {
                Ok(result) => result,
                Err(_) => Err(NetnsError::Panicked(self.id())),
            }
        })
    }

    /// Starts a thread that lives inside this namespace: for blocking clients and servers.
    pub fn thread<T, F>(&self, name: &str, work: F) -> Result<JoinHandle<Result<T, NetnsError>>, NetnsError>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let inside = self.clone();
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                inside.enter()?;
                Ok(work())
            })
            .map_err(NetnsError::Thread)
    }

    /// Sends `job` to the helper thread without waiting. The job gets the result of entering.
    pub(crate) fn submit(
        &self,
        job: impl FnOnce(Result<(), NetnsError>) + Send + 'static,
    ) -> Result<(), NetnsError> {
        let mut job = Job { inside: self.clone(), work: Box::new(job) };
        let mut helper = HELPER.lock();
        // A second attempt only if the thread has ended, which no job can cause: panics are caught.
        for _ in 0..2 {
            let queue = match helper.take() {
                Some(queue) => queue,
                None => start_helper()?,
            };
            match queue.try_send(job) {
                Ok(()) => {
                    *helper = Some(queue);
                    return Ok(());
                }
                Err(TrySendError::Full(_)) => {
                    *helper = Some(queue);
                    return Err(NetnsError::Busy);
                }
                Err(TrySendError::Disconnected(back)) => job = back,
            }
        }
        Err(NetnsError::Busy)
    }

    fn enter(&self) -> Result<(), NetnsError> {
        setns(self.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|e| NetnsError::Enter { id: self.id(), source: e.into() })
    }
}

struct Job {
    inside: Netns,
    work: Box<dyn FnOnce(Result<(), NetnsError>) + Send>,
}

/// The queue of the helper thread. Guards the sender only, for the length of a push.
static HELPER: Mutex<Option<SyncSender<Job>>> = Mutex::new(None);

fn start_helper() -> Result<SyncSender<Job>, NetnsError> {
    let (queue, jobs) = sync_channel(QUEUE);
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(move || serve(&jobs))
        .map_err(NetnsError::Thread)?;
    Ok(queue)
}

/// The helper's loop. It ends when the queue's last sender is dropped.
fn serve(jobs: &Receiver<Job>) {
    let mut inside: Option<Netns> = None;
    let mut trimmed = Instant::now();
    loop {
        if trimmed.elapsed() >= TICK {
            trimmed = Instant::now();
            crate::stock::trim_idle();
        }
        match jobs.recv_timeout(TICK) {
            Ok(Job { inside: wanted, work }) => {
                // Holding the handle keeps the inode from being used again, so ids may be compared.
                let entered = if inside.as_ref().is_some_and(|at| at.id() == wanted.id()) {
                    Ok(())
                } else {
                    wanted.enter()
                };
                inside = entered.is_ok().then_some(wanted);
                if catch_unwind(AssertUnwindSafe(|| work(entered))).is_err() {
                    tracing::error!("a job of the namespace thread panicked");
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                // An idle helper must not keep a pod's namespace alive by its handle.
                inside = None;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Fails unless `fd` is a namespace of the network kind.
#[allow(unsafe_code, reason = "an ioctl that takes no argument and returns an integer")]
fn require_network_namespace(fd: BorrowedFd<'_>) -> io::Result<()> {
    // ioctl_ns(2): NS_GET_NSTYPE is _IO(0xb7, 0x3).
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: the descriptor is open for the borrow's length, and the request reads and writes no memory.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    if kind < 0 {
        return Err(io::Error::last_os_error());
    }
    if kind != libc::CLONE_NEWNET {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("namespace of kind {kind:#x}")));
    }
    Ok(())
}
