//! Listening sockets, created inside a namespace and used from any thread.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use socket2::{Protocol, Socket, Type};

use crate::netns::{Netns, NetnsError};
use crate::socket::{self, Family};

/// Backlog, which the kernel caps at `net.core.somaxconn`. Long enough
/// for the restart of a proxy under load.
pub const BACKLOG: i32 = 4096;

/// How a socket is bound.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// The mark of the socket and of what it accepts. Needs `CAP_NET_ADMIN`.
    pub mark: Option<u32>,
    /// Whether it receives packets for addresses that are not local (`IP_TRANSPARENT`).
    pub transparent: bool,
    /// Whether other sockets of the same user may bind the same address (`SO_REUSEPORT`).
    pub reuse_port: bool,
}

impl Options {
    /// A socket of the node proxy in a pod.
    pub fn marked(mark: u32) -> Self {
        Self { mark: Some(mark), ..Self::default() }
    }
}

/// A non-blocking TCP listener in `inside`. An IPv6 listener accepts IPv6 only.
pub async fn listen_tcp(
    inside: &Netns,
    address: SocketAddr,
    options: Options,
) -> Result<TcpListener, NetnsError> {
    let made = inside.run(move || listen_tcp_here(address, options)).await?;
    made.map_err(|source| NetnsError::Socket {
        attempt: format!("listen on TCP {address}"),
        id: inside.id(),
        source,
    })
}

/// A non-blocking UDP socket in `inside`. An IPv6 socket receives IPv6 only.
pub async fn bind_udp(
    inside: &Netns,
    address: SocketAddr,
    options: Options,
) -> Result<UdpSocket, NetnsError> {
    let made = inside.run(move || bind_udp_here(address, options)).await?;
    made.map_err(|source| NetnsError::Socket {
        attempt: format!("bind UDP {address}"),
        id: inside.id(),
        source,
    })
}

/// As [`listen_tcp`], in the calling thread's namespace.
pub fn listen_tcp_here(address: SocketAddr, options: Options) -> io::Result<TcpListener> {
    let socket = bound(address, options, Type::STREAM, Protocol::TCP)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// As [`bind_udp`], in the calling thread's namespace.
pub fn bind_udp_here(address: SocketAddr, options: Options) -> io::Result<UdpSocket> {
    Ok(bound(address, options, Type::DGRAM, Protocol::UDP)?.into())
}

fn bound(address: SocketAddr, options: Options, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let Options { mark, transparent, reuse_port } = options;
    let family = Family::of(address.ip());
    let socket = Socket::new(family.domain(), kind.nonblocking().cloexec(), Some(protocol))?;
    if kind == Type::STREAM {
        // A restart must not wait for old connections to leave TIME_WAIT.
        socket.set_reuse_address(true)?;
        if address.ip().is_loopback() {
            // Inherited by what is accepted.
            socket::stay_local(&socket)?;
        }
    }
    if family == Family::V6 {
        socket.set_only_v6(true)?;
    }
    if reuse_port {
        socket.set_reuse_port(true)?;
    }
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    if transparent {
        socket::set_transparent(&socket, family)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}
