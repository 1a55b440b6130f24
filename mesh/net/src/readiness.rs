//! Registering sockets of our own with the runtime's event loop.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};

use socket2::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Types that own one descriptor and never exchange it.
pub(crate) trait OneDescriptor: AsRawFd {}

impl OneDescriptor for OwnedFd {}
impl OneDescriptor for TcpListener {}
impl OneDescriptor for Socket {}

/// Registers a non-blocking socket. Must be called on a runtime.
#[allow(unsafe_code, reason = "tokio asks for a promise about the descriptor's lifetime")]
pub(crate) fn register<T: OneDescriptor>(socket: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: the types of `OneDescriptor` own their descriptor, close it only when dropped and always
    // name the same one; the crate hands out no mutable access to the registered object.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(io::Error::from)
}
