//! Pipes for [`splice`](crate::splice), which are reused.
//!
//! Each thread keeps a few empty pipes: a worker's connections share them, and a connection holds one
//! only while bytes are in it.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

/// Empty pipes that a thread keeps.
const KEPT: usize = 32;
/// Size of a pipe for bulk data, in bytes; `/proc/sys/fs/pipe-max-size` by default.
const GROWN: i32 = 1 << 20;

thread_local! {
    static EMPTY: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// Open pipes of all threads, and their limit.
static OPEN: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Sets how many pipes the process may have; each takes two descriptors. Beyond it, bulk data is copied.
pub fn set_limit(pipes: usize) {
    LIMIT.store(pipes, Ordering::Relaxed);
}

/// A pipe and the number of bytes in it.
#[derive(Debug)]
pub(crate) struct Pipe {
    pub(crate) read: OwnedFd,
    pub(crate) write: OwnedFd,
    /// Bytes that the pipe can take when empty, as the kernel accounts it.
    pub(crate) capacity: usize,
    /// Bytes in the pipe.
    pub(crate) held: usize,
    _counted: Counted,
}

/// Counts a pipe for as long as it is open.
#[derive(Debug)]
struct Counted;

impl Counted {
    /// # Errors
    /// `EMFILE` when the limit is reached.
    fn new() -> io::Result<Self> {
        let counted = Self;
        if OPEN.fetch_add(1, Ordering::Relaxed) < LIMIT.load(Ordering::Relaxed) {
            return Ok(counted);
        }
        drop(counted);
        Err(io::Error::from_raw_os_error(libc::EMFILE))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pipe {
    /// Takes an empty pipe that this thread kept, or creates one.
    pub(crate) fn take() -> io::Result<Self> {
        if let Some(pipe) = EMPTY.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let counted = Counted::new()?;
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        // The size can be refused (pipe(7), limits per user): then bulk data moves in smaller pieces.
        let capacity = fcntl(&write, FcntlArg::F_SETPIPE_SZ(GROWN))
            .or_else(|_| fcntl(&write, FcntlArg::F_GETPIPE_SZ))?;
        Ok(Self {
            read,
            write,
            capacity: usize::try_from(capacity).unwrap_or(4096),
            held: 0,
            _counted: counted,
        })
    }

    /// Returns the pipe. One that still holds bytes is closed: they must never reach another connection.
    pub(crate) fn give_back(self) {
        if self.held == 0 {
            EMPTY.with_borrow_mut(|kept| {
                if kept.len() < KEPT {
                    kept.push(self);
                }
            });
        }
    }

    pub(crate) fn write_end(&self) -> i32 {
        self.write.as_raw_fd()
    }

    pub(crate) fn read_end(&self) -> i32 {
        self.read.as_raw_fd()
    }
}
