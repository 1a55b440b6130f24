//! Pipes for [`splice`](crate::splice), kept for use again.
//!
//! Each thread keeps a few empty pipes: a worker's connections share them, and a connection holds one
//! only while bytes are in it.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;

/// Empty pipes that a thread keeps.
const KEPT: usize = 32;
/// What a pipe for bulk data is grown to, in bytes; `/proc/sys/fs/pipe-max-size` by default.
const GROWN: i32 = 1 << 20;

thread_local! {
    static EMPTY: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe and what is in it.
#[derive(Debug)]
pub(crate) struct Pipe {
    pub(crate) read: OwnedFd,
    pub(crate) write: OwnedFd,
    /// Bytes that the pipe can take when empty, as the kernel accounts it.
    pub(crate) capacity: usize,
    /// Bytes in it now.
    pub(crate) held: usize,
}

impl Pipe {
    /// An empty pipe: one that this thread kept, or a new one.
    pub(crate) fn take() -> io::Result<Self> {
        if let Some(pipe) = EMPTY.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        // Growth can be refused (pipe(7), limits per user): then bulk data moves in smaller pieces.
        let capacity = fcntl(&write, FcntlArg::F_SETPIPE_SZ(GROWN))
            .or_else(|_| fcntl(&write, FcntlArg::F_GETPIPE_SZ))?;
        Ok(Self { read, write, capacity: usize::try_from(capacity).unwrap_or(4096), held: 0 })
    }

    /// Gives the pipe back. One that still holds bytes is closed: they must never meet another connection.
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
