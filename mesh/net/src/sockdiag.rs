//! The sockets of a namespace, as the kernel lists them (sock_diag(7)).
//!
//! The node agent asks which connections still go through the proxy, which are older than a pod's
//! redirection, and who holds a listening port.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use socket2::Socket;

use crate::netlink::{self, Content, NLM_F_DUMP, Request, find};
use crate::netns::{Netns, NetnsError};
use crate::socket::Family;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const INET_DIAG_MARK: u16 = 15;
/// Length of `struct inet_diag_req_v2`.
const REQUEST: usize = 56;
/// Length of `struct inet_diag_msg`.
const MESSAGE: usize = 72;
/// How long the kernel may take for one answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// What kind of socket is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TCP connections that carry or may still carry data: not listening, not closed and not in
    /// TIME_WAIT.
    TcpConnections,
    /// TCP listeners.
    TcpListeners,
    /// UDP sockets.
    Udp,
}

/// A socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its own address.
    pub local: SocketAddr,
    /// Its peer's; unspecified for a listener.
    pub remote: SocketAddr,
    /// Its mark; 0 without `CAP_NET_ADMIN`.
    pub mark: u32,
    /// Its inode, as in `/proc/PID/fd`; 0 when no process holds it.
    pub inode: u32,
}

/// Lists the sockets of one kind and both families in `inside`.
pub async fn list(inside: &Netns, kind: Kind) -> Result<Vec<Entry>, NetnsError> {
    let fail = |source| NetnsError::Socket { attempt: format!("list {kind:?}"), id: inside.id(), source };
    let socket = inside.run(open).await?.map_err(fail)?;
    let listed = tokio::task::spawn_blocking(move || list_with(socket, kind)).await;
    listed.unwrap_or_else(|e| Err(io::Error::other(e))).map_err(fail)
}

fn open() -> io::Result<Socket> {
    let socket = netlink::Family::SockDiag.open()?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn list_with(mut socket: Socket, kind: Kind) -> io::Result<Vec<Entry>> {
    let mut found = Vec::new();
    for (sequence, family) in [(1, Family::V4), (2, Family::V6)] {
        let request = Request { kind: SOCK_DIAG_BY_FAMILY, flags: NLM_F_DUMP, sequence };
        socket.write_all(&request.encode(&wanted(kind, family), &[]))?;
        match receive(&mut socket, sequence, &mut found) {
            // IPv6 may be missing from the kernel.
            Err(error) if family == Family::V6 && error.raw_os_error() == Some(libc::ENOENT) => {}
            other => other?,
        }
    }
    Ok(found)
}

/// `struct inet_diag_req_v2` with an empty socket id.
fn wanted(kind: Kind, family: Family) -> [u8; REQUEST] {
    const ESTABLISHED_LIKE: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
    let (protocol, states) = match kind {
        Kind::TcpConnections => (libc::IPPROTO_TCP, ESTABLISHED_LIKE),
        Kind::TcpListeners => (libc::IPPROTO_TCP, 1 << 10),
        Kind::Udp => (libc::IPPROTO_UDP, u32::MAX),
    };
    let family = match family {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    let mut request = [0; REQUEST];
    let (head, rest) = request.split_at_mut(4);
    head.copy_from_slice(&[family as u8, protocol as u8, 0, 0]);
    rest.split_at_mut(4).0.copy_from_slice(&states.to_ne_bytes());
    request
}

fn receive(socket: &mut Socket, sequence: u32, found: &mut Vec<Entry>) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = socket.read(&mut buffer)?;
        for message in netlink::messages(buffer.get(..n).unwrap_or_default()) {
            if message.sequence != sequence {
                continue;
            }
            match message.content {
                Content::Body(body) => found.extend(entry(body)),
                Content::Refused(error) => return Err(error),
                Content::Done => return Ok(()),
                Content::Acknowledged => {}
            }
        }
    }
}

/// `struct inet_diag_msg`: family, state, timer, retransmits, then the socket id (ports and addresses
/// in network order), expiry, queues, user and inode; attributes follow.
fn entry(message: &[u8]) -> Option<Entry> {
    let family = *message.first()?;
    let port = |at: usize| Some(u16::from_be_bytes(message.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| -> Option<IpAddr> {
        if i32::from(family) == libc::AF_INET {
            Some(Ipv4Addr::from(<[u8; 4]>::try_from(message.get(at..at + 4)?).ok()?).into())
        } else {
            Some(Ipv6Addr::from(<[u8; 16]>::try_from(message.get(at..at + 16)?).ok()?).into())
        }
    };
    let mark = find(message.get(MESSAGE..)?, INET_DIAG_MARK);
    Some(Entry {
        local: SocketAddr::new(address(8)?, port(4)?),
        remote: SocketAddr::new(address(24)?, port(6)?),
        mark: mark.and_then(number).unwrap_or_default(),
        inode: number(message.get(68..MESSAGE)?)?,
    })
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}
