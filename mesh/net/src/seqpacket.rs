//! Packets with descriptors over unix `SOCK_SEQPACKET` sockets.
//!
//! The node agent listens, the node proxy dials (ZDS contract). A packet arrives completely or not
//! at all. Its descriptors arrive with it, close-on-exec.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::readiness::register;

/// Largest number of descriptors in a packet; the kernel's own limit is 253.
pub const MAX_DESCRIPTORS: usize = 64;
/// Backlog.
const BACKLOG: i32 = 64;

/// A received packet.
#[derive(Debug)]
pub struct Received {
    /// Bytes of the packet; 0 is the end of the connection.
    pub len: usize,
    /// Its descriptors, in the order in which they were sent.
    pub descriptors: Vec<OwnedFd>,
}

/// One connection.
#[derive(Debug)]
pub struct SeqPacket {
    socket: AsyncFd<OwnedFd>,
}

impl SeqPacket {
    /// Connects to the listener at `path`. Must be called on a runtime.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` when nobody listens there; `WouldBlock` when its queue is full.
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        let socket = new_socket()?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path.as_ref())?)?;
        Self::from_fd(socket)
    }

    /// Takes a connected, non-blocking socket.
    pub fn from_fd(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: register(socket, Interest::READABLE | Interest::WRITABLE)? })
    }

    /// Process id of the peer, as it was when it connected.
    pub fn peer_pid(&self) -> io::Result<i32> {
        Ok(getsockopt(self.socket.get_ref(), sockopt::PeerCredentials)?.pid())
    }

    /// Sends one packet with its descriptors. Cancel safe: the packet was sent or was not.
    ///
    /// # Errors
    /// `InvalidInput` for an empty packet or more than [`MAX_DESCRIPTORS`]; `EMSGSIZE` for a packet
    /// beyond the socket's buffer; `BrokenPipe` when the peer is gone.
    pub async fn send(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if packet.is_empty() || descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("packet of {} bytes with {} descriptors", packet.len(), descriptors.len()),
            ));
        }
        let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = self.socket.async_io(Interest::WRITABLE, |socket| send_now(socket, packet, &raw)).await?;
        if sent == packet.len() {
            Ok(())
        } else {
            Err(io::Error::new(io::ErrorKind::WriteZero, format!("{sent} of {} bytes sent", packet.len())))
        }
    }

    /// Receives one packet into `buffer`. Cancel safe.
    ///
    /// # Errors
    /// `InvalidData` when the packet is longer than `buffer` or had more descriptors than
    /// [`MAX_DESCRIPTORS`]; the packet is then lost and its descriptors are closed.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<Received> {
        self.socket.async_io(Interest::READABLE, |socket| recv_now(socket, buffer)).await
    }
}

fn send_now(socket: &OwnedFd, packet: &[u8], descriptors: &[RawFd]) -> io::Result<usize> {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control = if descriptors.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    Ok(sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(packet)], control, flags, None)?)
}

fn recv_now(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut parts = [IoSliceMut::new(buffer)];
    let mut space = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut descriptors = Vec::new();
    let cut = message.flags.contains(MsgFlags::MSG_CTRUNC);
    if !cut {
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                descriptors.extend(raw.into_iter().map(own));
            }
        }
    } else {
        close_all(&message);
    }
    if cut || message.flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "packet longer than the buffer, or with too many descriptors",
        ));
    }
    Ok(Received { len: message.bytes, descriptors })
}

/// Closes the descriptors of a truncated control message, so that a peer cannot use up ours.
fn close_all(message: &nix::sys::socket::RecvMsg<'_, '_, ()>) {
    if let Ok(controls) = message.cmsgs() {
        for control in controls {
            if let ControlMessageOwned::ScmRights(raw) = control {
                raw.into_iter().map(own).for_each(drop);
            }
        }
    }
}

#[allow(unsafe_code, reason = "descriptors out of a control message are plain integers")]
fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just installed this descriptor for us and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

/// A listening socket at `path`, which replaces the file of a dead predecessor. It needs no runtime, so it can be
/// created before the process that will accept is started. The file is readable and writable for its owner only.
///
/// # Errors
/// `AddrInUse` when another process listens there.
pub fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    use std::os::unix::fs::PermissionsExt;
    if path.exists() {
        if is_served(path)? {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!("{} is served by another process", path.display()),
            ));
        }
        std::fs::remove_file(path)?;
    }
    let socket = new_socket()?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

/// The listening side. A file that it created is removed when it is dropped.
#[derive(Debug)]
pub struct SeqPacketListener {
    socket: AsyncFd<OwnedFd>,
    /// `None` if another process created the file and removes it.
    path: Option<PathBuf>,
}

impl SeqPacketListener {
    /// Takes a listening, non-blocking socket, as created by [`listen_at`]. Must be called on a runtime.
    ///
    /// # Errors
    /// The runtime cannot register it.
    pub fn from_fd(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self { socket: register(socket, Interest::READABLE)?, path: None })
    }

    /// Listens at `path`, replacing the file of a dead predecessor. Must be called on a runtime.
    /// The file is readable and writable for its owner only.
    ///
    /// # Errors
    /// `AddrInUse` when another process listens there.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref().to_owned();
        let socket = listen_at(&path)?;
        Ok(Self { socket: register(socket, Interest::READABLE)?, path: Some(path) })
    }

    /// Accepts the next connection. Cancel safe.
    pub async fn accept(&self) -> io::Result<SeqPacket> {
        let accepted = self.socket.async_io(Interest::READABLE, accept_now).await?;
        SeqPacket::from_fd(accepted)
    }

    /// Its path, if it created the socket itself.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }
}

impl Drop for SeqPacketListener {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(path = %path.display(), %error, "socket file not removed");
        }
    }
}

fn accept_now(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let raw = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    Ok(own(raw))
}

/// Whether a process listens at `path`: a full queue means that it does.
fn is_served(path: &Path) -> io::Result<bool> {
    let probe = new_socket()?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) | Err(nix::Error::EAGAIN) => Ok(true),
        Err(_) => Ok(false),
    }
}
