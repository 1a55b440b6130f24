//! Namespaces around a whole cluster, so that the kernel cleans up after it in every case.
//!
//! `ambit up` runs in three stages of one program. [`supervise`] is the process that the user sees: it makes a
//! process-id and a mount namespace (and, without root, a user and a network namespace) and starts the next one.
//! [`init`] is the first process in there: it gives the cluster a file system in memory for its files, starts the
//! program proper, and reaps what others leave. When the user's process dies, even by SIGKILL, the kernel kills
//! the first process, with it every process of the namespace, and the files and links go with the namespaces.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use ambit_net::seqpacket::SeqPacket;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid};
use tokio::signal::unix::{SignalKind, signal};

use crate::error::{Error, Result};
use crate::process::die_with_parent;

/// Names the stage to the program that is started again.
const STAGE: &str = "AMBIT_LOCAL_STAGE";
/// Where the cluster's files lie: a file system in memory that only the namespace has.
pub const DIRECTORY: &str = "/dev/shm/ambit";
/// The packet with which descriptors come.
const GREETING: &[u8] = b"ambit";
/// Size limit of that file system.
const DIRECTORY_SIZE: &str = "size=512m,mode=755";

/// Which of the three stages this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The process that the user started.
    Supervisor,
    /// The first process of the namespace.
    Init,
    /// The program proper.
    Program,
}

/// The stage of this process.
#[must_use]
pub fn stage() -> Stage {
    match std::env::var(STAGE).as_deref() {
        Ok("init") => Stage::Init,
        Ok("program") => Stage::Program,
        _ => Stage::Supervisor,
    }
}

/// Makes the namespaces, starts this program again inside, and returns its exit code. The program proper gets
/// `descriptors` from [`inherited`]: sockets of the user's own network namespace.
///
/// Call it before any thread is started: a process of several threads can't make a user namespace.
///
/// # Errors
/// When the kernel refuses a namespace.
pub fn supervise(descriptors: &[OwnedFd]) -> Result<ExitCode> {
    enter_namespaces()?;
    let runtime = runtime()?;
    let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(Error::errno("make the socket that hands descriptors down"))?;
    let sent = runtime.block_on(async {
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        SeqPacket::from_fd(near)?.send(GREETING, &borrowed).await
    });
    sent.map_err(Error::system("hand descriptors down"))?;
    let mut command = again("init")?;
    let child = command.stdin(Stdio::from(far)).spawn();
    let child = child.map_err(Error::system("start the first process of the namespace"))?;
    // The command holds the socket too.
    drop(command);
    runtime.block_on(follow(child.id()))
}

/// The descriptors that the supervisor passed, in its order. Call it once, in the program proper.
///
/// # Errors
/// When this process was not started by a supervisor.
pub async fn inherited() -> Result<Vec<OwnedFd>> {
    let attempt = "take descriptors over";
    let input = io::stdin().as_fd().try_clone_to_owned().map_err(Error::system(attempt))?;
    let socket = SeqPacket::from_fd(input).map_err(Error::system(attempt))?;
    let mut buffer = [0; 16];
    let received = socket.recv(&mut buffer).await.map_err(Error::system(attempt))?;
    Ok(received.descriptors)
}

/// An unconnected IPv4 TCP socket of the network namespace of this moment.
///
/// # Errors
/// When the kernel has no socket left.
pub fn client_socket() -> Result<OwnedFd> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
    socket.map(OwnedFd::from).map_err(Error::system("make a socket"))
}

/// The first process of the namespace: mounts, starts the program proper, reaps, and ends with it.
///
/// # Errors
/// When a mount fails or the program can't be started.
pub fn init() -> Result<ExitCode> {
    prepare_mounts()?;
    let mut command = again("program")?;
    command.stdin(Stdio::inherit());
    let child = command.spawn().map_err(Error::system("start the program in its namespace"))?;
    runtime()?.block_on(follow(child.id()))
}

/// This program with its own arguments, to be started as another stage.
fn again(stage: &str) -> Result<Command> {
    let executable = std::env::current_exe().map_err(Error::system("find the current executable"))?;
    let mut command = Command::new(executable);
    let mut args = std::env::args_os();
    if let Some(name) = args.next() {
        std::os::unix::process::CommandExt::arg0(&mut command, name);
    }
    command.args(args).env(STAGE, stage);
    die_with_parent(&mut command);
    Ok(command)
}

fn enter_namespaces() -> Result<()> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    let mut flags = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS;
    if !uid.is_root() {
        flags |= CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET;
    }
    let hint = if uid.is_root() {
        "root without the right to make namespaces: is this a container without privileges?"
    } else {
        "without root this needs unprivileged user namespaces, which this machine may forbid"
    };
    unshare(flags).map_err(Error::errno(format!("make namespaces for the cluster ({hint})")))?;
    if !uid.is_root() {
        // user_namespaces(7): a process may map its own group only after it gave up setgroups.
        write_own("setgroups", "deny".to_owned())?;
        write_own("uid_map", format!("0 {uid} 1"))?;
        write_own("gid_map", format!("0 {gid} 1"))?;
    }
    Ok(())
}

fn write_own(file: &str, text: String) -> Result<()> {
    let path = Path::new("/proc/self").join(file);
    fs::write(&path, text).map_err(Error::system(format!("write {}", path.display())))
}

fn prepare_mounts() -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(Error::errno("make the cluster's mounts private"))?;
    // Refused where the machine hides parts of its /proc; then the old one serves, with other process ids.
    if let Err(errno) = mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none) {
        tracing::debug!(%errno, "the old /proc stays");
    }
    mount(Some("ambit"), "/dev/shm", Some("tmpfs"), MsFlags::empty(), Some(DIRECTORY_SIZE))
        .map_err(Error::errno("mount a file system in memory on /dev/shm"))?;
    fs::create_dir(DIRECTORY).map_err(Error::system(format!("make {DIRECTORY}")))
}

/// Waits for a child, reaps every other one, and passes SIGTERM, SIGINT and SIGHUP on as SIGTERM.
async fn follow(child: u32) -> Result<ExitCode> {
    let child = Pid::from_raw(i32::try_from(child).unwrap_or(i32::MAX));
    let fault = || Error::system("listen for signals");
    let mut children = signal(SignalKind::child()).map_err(fault())?;
    let mut terminate = signal(SignalKind::terminate()).map_err(fault())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(fault())?;
    let mut hangup = signal(SignalKind::hangup()).map_err(fault())?;
    loop {
        // A child may have ended before the handler was installed.
        if let Some(code) = reap(child) {
            return Ok(code);
        }
        tokio::select! {
            _ = children.recv() => continue,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
        // ESRCH: it has just ended, which the next turn sees.
        kill(child, Signal::SIGTERM).ok();
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(Error::system("start a runtime"))
}

/// Reaps all that have ended; the exit code once `child` is among them.
fn reap(child: Pid) -> Option<ExitCode> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => {
                return Some(ExitCode::from(u8::try_from(code).unwrap_or(1)));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                return Some(ExitCode::from(u8::try_from(128 + signal as i32).unwrap_or(1)));
            }
            Ok(WaitStatus::StillAlive) => return None,
            Ok(_) | Err(Errno::EINTR) => {}
            // No child is left at all, so the one that is waited for is gone too.
            Err(_) => return Some(ExitCode::FAILURE),
        }
    }
}
