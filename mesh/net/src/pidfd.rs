//! Descriptors of another process (pidfd_getfd(2)).
//!
//! A restarted node agent gets back the listeners that it had passed to a proxy.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// The sockets of a process by inode: the numbers of its descriptors.
pub fn sockets(pid: i32) -> io::Result<HashMap<u32, RawFd>> {
    let mut found = HashMap::new();
    for file in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let file = file?;
        // A descriptor may be closed while the list is read.
        let Ok(target) = std::fs::read_link(file.path()) else { continue };
        let inode = target
            .to_str()
            .and_then(|t| t.strip_prefix("socket:["))
            .and_then(|t| t.strip_suffix(']'))
            .and_then(|t| t.parse().ok());
        let number = file.file_name().to_str().and_then(|name| name.parse().ok());
        if let (Some(inode), Some(number)) = (inode, number) {
            found.insert(inode, number);
        }
    }
    Ok(found)
}

/// A duplicate of descriptor `number` of process `pid`. Needs the right to trace it.
pub fn duplicate(pid: i32, number: RawFd) -> io::Result<OwnedFd> {
    let process = owned(call(libc::SYS_pidfd_open, [pid.into(), 0, 0])?);
    Ok(owned(call(libc::SYS_pidfd_getfd, [process.as_raw_fd().into(), number.into(), 0])?))
}

#[allow(unsafe_code, reason = "system calls that the C library does not wrap")]
fn call(number: libc::c_long, [a, b, c]: [libc::c_long; 3]) -> io::Result<RawFd> {
    // SAFETY: both calls take integers only and return a new descriptor or an error.
    let outcome = unsafe { libc::syscall(number, a, b, c) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome as RawFd) }
}

#[allow(unsafe_code, reason = "a system call returns descriptors as integers")]
fn owned(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just created this descriptor for us and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(number) }
}
