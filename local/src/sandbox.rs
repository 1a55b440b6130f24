//! A network namespace (and, for pods, a mount namespace) held by a thread of its own.
//!
//! Nodes, pods and the fabric are sandboxes. What must happen inside one (a socket is created, a program is
//! started, a file in `/proc/sys/net` is written) runs on its thread, so a runtime worker never changes its
//! namespace. When the sandbox is dropped the thread ends, the descriptors close, and the kernel takes the
//! namespace with everything in it: nothing is pinned in the file system.

mod root;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use ambit_net::Netns;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::oneshot;

pub(crate) use root::PrivateRoot;

use crate::error::{Error, Result};

type Job = Box<dyn FnOnce() + Send>;

/// What a sandbox's mount namespace shows in place of the system's files.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overlays {
    /// A root file system of the sandbox's own, where it mounts volumes.
    pub(crate) root: Option<PrivateRoot>,
    /// Pairs of a file to show and the path to show it at. The path must exist; a symbolic link is followed.
    pub(crate) files: Vec<(PathBuf, PathBuf)>,
}

/// Handle to a namespace and its thread. Cheap to clone; the last clone ends it.
#[derive(Debug, Clone)]
pub struct Sandbox {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    jobs: mpsc::Sender<Job>,
    network: OwnedFd,
    /// Present when the sandbox has a mount namespace of its own.
    mounts: Option<OwnedFd>,
    netlink: rtnetlink::Handle,
}

/// What the thread hands back once it is inside.
struct Entered {
    network: OwnedFd,
    mounts: Option<OwnedFd>,
    netlink: rtnetlink::Handle,
}

impl Sandbox {
    /// Makes a network namespace, and a mount namespace with `overlays` where some are given.
    ///
    /// # Errors
    /// When the kernel refuses a namespace or a mount (missing privilege), or no thread can be started.
    pub(crate) async fn new(name: impl Into<String>, overlays: Option<Overlays>) -> Result<Self> {
        Self::on_thread(name.into(), move |name| enter_new(name, overlays.as_ref())).await
    }

    /// Makes a network namespace with its own thread and nothing else.
    ///
    /// # Errors
    /// When the kernel refuses the namespace (missing privilege), or no thread can be started.
    pub async fn bare(name: impl Into<String>) -> Result<Self> {
        Self::new(name, None).await
    }

    /// A sandbox of an existing network namespace, which lives as long as others hold it.
    ///
    /// # Errors
    /// When `network` is no network namespace or can't be entered, or no thread can be started.
    pub async fn adopt(name: impl Into<String>, network: OwnedFd) -> Result<Self> {
        Self::on_thread(name.into(), move |name| {
            setns(&network, CloneFlags::CLONE_NEWNET)
                .map_err(Error::errno(format!("enter network namespace {name}")))?;
            entered(name, None)
        })
        .await
    }

    /// Starts the sandbox's thread, which begins with `enter`.
    async fn on_thread<F>(name: String, enter: F) -> Result<Self>
    where
        F: FnOnce(&str) -> Result<Entered> + Send + 'static,
    {
        let runtime = tokio::runtime::Handle::current();
        let (jobs, queue) = mpsc::channel::<Job>();
        let (entered, waiting) = oneshot::channel();
        let label = name.clone();
        thread::Builder::new()
            .name(thread_name(&name))
            .spawn(move || {
                // Sockets and children that are made on this thread belong to the caller's runtime.
                let _runtime = runtime.enter();
                match enter(&label) {
                    Ok(inside) => {
                        if entered.send(Ok(inside)).is_ok() {
                            // Ends when the last handle is dropped.
                            for job in queue {
                                job();
                            }
                        }
                    }
                    // Nobody waits any more when this fails: the creation was cancelled.
                    Err(error) => drop(entered.send(Err(error))),
                }
            })
            .map_err(Error::system(format!("start the thread of namespace {name}")))?;
        let Entered { network, mounts, netlink } =
            waiting.await.map_err(|_| Error::Ended(format!("the thread of namespace {name}")))??;
        Ok(Self { inner: Arc::new(Inner { name, jobs, network, mounts, netlink }) })
    }

    /// The sandbox's name, for messages.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The network namespace.
    pub fn network(&self) -> BorrowedFd<'_> {
        self.inner.network.as_fd()
    }

    /// The network namespace as the mesh's own libraries take it.
    ///
    /// # Errors
    /// When this process has no descriptor left.
    pub fn netns(&self) -> Result<Netns> {
        let attempt = format!("duplicate namespace {}", self.name());
        let descriptor = self.inner.network.try_clone().map_err(Error::system(attempt.clone()))?;
        Netns::from_fd(descriptor)
            .map_err(|error| Error::System { attempt, source: std::io::Error::other(error) })
    }

    /// A routing-netlink handle whose socket lives in the namespace.
    pub(crate) fn netlink(&self) -> &rtnetlink::Handle {
        &self.inner.netlink
    }

    /// Runs a short closure on the sandbox's thread. Closures run one after another, so none may block for
    /// long: [`Sandbox::run`] is for those.
    ///
    /// # Errors
    /// [`Error::Ended`] when the thread has ended or the closure panicked.
    pub async fn on<T, F>(&self, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let ended = || Error::Ended(format!("a task in namespace {}", self.inner.name));
        let (answer, waiting) = oneshot::channel();
        let guarded = move || {
            // A panic is reported to the caller by the dropped channel; the thread lives on for others.
            if let Ok(value) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)) {
                drop(answer.send(value));
            }
        };
        self.inner.jobs.send(Box::new(guarded)).map_err(|_| ended())?;
        waiting.await.map_err(|_| ended())
    }

    /// Runs a closure, which may block, on a fresh thread inside the sandbox's namespaces.
    ///
    /// # Errors
    /// When the thread can't be started or can't enter; [`Error::Ended`] when the closure panicked.
    pub async fn run<T, F>(&self, job: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> T + Send + 'static,
    {
        let name = self.inner.name.clone();
        let sandbox = self.clone();
        let runtime = tokio::runtime::Handle::current();
        let (answer, waiting) = oneshot::channel();
        thread::Builder::new()
            .name(thread_name(&name))
            .spawn(move || {
                let _runtime = runtime.enter();
                let result = sandbox.enter_on_this_thread().map(|()| job());
                // Fails only when the caller stopped waiting.
                drop(answer.send(result));
            })
            .map_err(Error::system(format!("start a thread in namespace {name}")))?;
        waiting.await.map_err(|_| Error::Ended(format!("a closure in namespace {name}")))?
    }

    /// Moves the calling thread into the sandbox's namespaces, for good. Never call it on a runtime worker.
    fn enter_on_this_thread(&self) -> Result<()> {
        let name = &self.inner.name;
        setns(self.inner.network.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(Error::errno(format!("enter network namespace {name}")))?;
        if let Some(mounts) = &self.inner.mounts {
            // setns(2): a thread that shares its working directory with others can't change mount namespace.
            unshare(CloneFlags::CLONE_FS)
                .map_err(Error::errno(format!("unshare the working directory for {name}")))?;
            setns(mounts.as_fd(), CloneFlags::CLONE_NEWNS)
                .map_err(Error::errno(format!("enter mount namespace {name}")))?;
        }
        Ok(())
    }

    /// Writes a network setting below `/proc/sys/net`, as `sysctl` would.
    ///
    /// # Errors
    /// When the file can't be written.
    pub async fn sysctl(&self, key: &'static str, value: &'static str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(key);
        let attempt = format!("write {value} to {} in namespace {}", path.display(), self.inner.name);
        self.on(move || std::fs::write(path, value)).await?.map_err(Error::system(attempt))
    }
}

/// Thread names have at most 15 bytes (prctl(2), PR_SET_NAME).
fn thread_name(name: &str) -> String {
    name.chars().filter(char::is_ascii).rev().take(15).collect::<Vec<_>>().into_iter().rev().collect()
}

/// Gives the calling thread its new namespaces and opens what others need to reach them.
fn enter_new(name: &str, overlays: Option<&Overlays>) -> Result<Entered> {
    let mut flags = CloneFlags::CLONE_NEWNET;
    if overlays.is_some() {
        flags |= CloneFlags::CLONE_NEWNS;
    }
    unshare(flags).map_err(Error::errno(format!(
        "make the namespaces of {name} (this needs root, or a user namespace of one's own)"
    )))?;
    let mounts = match overlays {
        Some(overlays) => {
            lay_over(name, overlays)?;
            Some(open_namespace("mnt")?)
        }
        None => None,
    };
    without_address_detection(name)?;
    entered(name, mounts)
}

/// Opens what others need to reach the calling thread's namespaces.
fn entered(name: &str, mounts: Option<OwnedFd>) -> Result<Entered> {
    let (connection, netlink, _) =
        rtnetlink::new_connection().map_err(Error::system(format!("open a netlink socket in {name}")))?;
    // Ends by itself when the last handle is dropped.
    tokio::spawn(connection);
    Ok(Entered { network: open_namespace("net")?, mounts, netlink })
}

/// Links get their link-local address at once. While the kernel looks for duplicates of it, up to two seconds, it
/// asks for no neighbour from there, so that the first packets to a new pod are lost.
fn without_address_detection(name: &str) -> Result<()> {
    let path = "/proc/sys/net/ipv6/conf/default/accept_dad";
    match std::fs::write(path, "0") {
        // A kernel without IPv6.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        written => written.map_err(Error::system(format!("write 0 to {path} in {name}"))),
    }
}

fn open_namespace(kind: &str) -> Result<OwnedFd> {
    let path = format!("/proc/thread-self/ns/{kind}");
    File::open(&path).map(OwnedFd::from).map_err(Error::system(format!("open {path}")))
}

fn lay_over(name: &str, overlays: &Overlays) -> Result<()> {
    let none: Option<&str> = None;
    // What is mounted here must not be seen outside.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .map_err(Error::errno(format!("make the mounts of {name} private")))?;
    if let Some(root) = &overlays.root {
        root::enter(name, root)?;
    }
    for (shown, path) in &overlays.files {
        let target = path
            .canonicalize()
            .map_err(Error::system(format!("find {} to lay a pod's own over it", path.display())))?;
        mount(Some(shown), &target, none, MsFlags::MS_BIND, none).map_err(Error::errno(format!(
            "show {} as {} in {name}",
            shown.display(),
            target.display()
        )))?;
    }
    Ok(())
}
