//! Accepts connections, and survives a shortage of descriptors.
//!
//! The accepting task hands connections to workers, so they are not registered with a runtime yet:
//! the worker that gets one registers it with [`tokio::net::TcpStream::from_std`].

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::readiness::register;

/// First pause after a failed accept.
const BACKOFF_FIRST: Duration = Duration::from_millis(5);
/// Longest pause between failed accepts.
const BACKOFF_LAST: Duration = Duration::from_secs(1);

/// Why a listener can no longer accept.
#[derive(Debug, thiserror::Error)]
#[error("accept on {address}: {source}")]
pub struct AcceptError {
    /// The listener's address.
    pub address: SocketAddr,
    /// The error of the system.
    pub source: io::Error,
}

/// A listener that survives shortage of descriptors and memory.
#[derive(Debug)]
pub struct Acceptor {
    listener: AsyncFd<TcpListener>,
    address: SocketAddr,
    pause: Duration,
    on_shortage: Option<fn(&io::Error)>,
}

impl Acceptor {
    /// Takes over a non-blocking listener; must be called on the runtime that will accept.
    pub fn new(listener: TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = register(listener, Interest::READABLE)?;
        Ok(Self { listener, address, pause: BACKOFF_FIRST, on_shortage: None })
    }

    /// Calls `hook` for each accept that failed for lack of descriptors or memory.
    #[must_use]
    pub fn on_shortage(mut self, hook: fn(&io::Error)) -> Self {
        self.on_shortage = Some(hook);
        self
    }

    /// The local address.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Returns the listener.
    pub fn into_inner(self) -> TcpListener {
        self.listener.into_inner()
    }

    /// Accepts the next connection, non-blocking, and returns it with its peer. In a shortage it pauses for up
    /// to one second between attempts. Cancel safe: no connection is lost.
    ///
    /// # Errors
    /// Only when the listener itself is unusable.
    pub async fn accept(&mut self) -> Result<(TcpStream, SocketAddr), AcceptError> {
        loop {
            let outcome = self.listener.async_io(Interest::READABLE, accept_now).await;
            match outcome {
                Ok(accepted) => {
                    self.pause = BACKOFF_FIRST;
                    return Ok(accepted);
                }
                Err(source) => match judge(&source) {
                    Failure::OfThatConnection => {}
                    Failure::Shortage => self.wait_out(&source).await,
                    Failure::OfTheListener => {
                        return Err(AcceptError { address: self.address, source });
                    }
                },
            }
        }
    }

    async fn wait_out(&mut self, error: &io::Error) {
        if let Some(hook) = self.on_shortage {
            hook(error);
        }
        if self.pause == BACKOFF_FIRST {
            tracing::warn!(address = %self.address, %error, "cannot accept; pausing");
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(BACKOFF_LAST);
        tokio::time::sleep(pause).await;
    }
}

impl AsFd for Acceptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.get_ref().as_fd()
    }
}

fn accept_now(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let (socket, peer) = SockRef::from(listener).accept4(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK)?;
    let peer = peer.as_socket().ok_or_else(|| io::Error::from_raw_os_error(libc::ECONNABORTED))?;
    Ok((socket.into(), peer))
}

enum Failure {
    OfThatConnection,
    Shortage,
    OfTheListener,
}

/// accept(2): errors of the network are passed on from the pending connection and say nothing about
/// the listener.
fn judge(error: &io::Error) -> Failure {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => Failure::Shortage,
        Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP | libc::EFAULT) => {
            Failure::OfTheListener
        }
        _ => Failure::OfThatConnection,
    }
}
