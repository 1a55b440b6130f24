//! Connection tracking over netlink: where a redirected datagram was going, and connections that the kernel is to know.
//!
//! TCP has `SO_ORIGINAL_DST`; for UDP only the tracking table knows. The DNS proxy asks it, so that a
//! resolver that an application named explicitly is honoured. The node agent enters what is older than tracking.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::netns::{Netns, NetnsError};
use crate::readiness::register;

const NETLINK_NETFILTER: i32 = 12;
/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`.
const CT_GET: u16 = (1 << 8) | 1;
/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW`.
const CT_NEW: u16 = 1 << 8;
/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE`.
const CT_DELETE: u16 = (1 << 8) | 2;
const NLM_F_REQUEST: u16 = 1;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const NLM_F_REQUEST_ACK: u16 = 0x5;
/// `NLM_F_REQUEST | NLM_F_ACK | NLM_F_EXCL | NLM_F_CREATE`.
const NLM_F_REQUEST_NEW: u16 = 0x605;
const NLMSG_ERROR: u16 = 2;
const NESTED: u16 = 0x8000;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_TIMEOUT: u16 = 7;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
/// `IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED` of linux/netfilter/nf_conntrack_common.h.
const ESTABLISHED_STATUS: u32 = 0x0e;
/// `TCP_CONNTRACK_ESTABLISHED` of linux/netfilter/nf_conntrack_tcp.h.
const TCP_ESTABLISHED: u8 = 3;
/// `IP_CT_TCP_FLAG_SACK_PERM | IP_CT_TCP_FLAG_BE_LIBERAL`, as the kernel itself has it for what it picks up in
/// the middle: no packet is invalid for a window that was not seen.
const TCP_LIBERAL: u8 = 0x02 | 0x08;
/// Until the first packet, in seconds; then the kernel's own time counts, which is as long.
const TRACKED_FOR: u32 = 5 * 24 * 60 * 60;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const HEADER: usize = 16;
const GENERIC: usize = 4;

/// A socket to the connection tracking of one namespace.
#[derive(Debug)]
pub struct Conntrack {
    socket: AsyncFd<Socket>,
    sequence: u32,
}

impl Conntrack {
    /// Opens one in `inside`. Must be called on a runtime. Needs `CAP_NET_ADMIN` there.
    pub async fn open(inside: &Netns) -> Result<Self, NetnsError> {
        let fail = |source| NetnsError::Socket {
            attempt: "open a conntrack socket".into(),
            id: inside.id(),
            source,
        };
        let made = inside.run(|| {
            Socket::new(
                Domain::from(libc::AF_NETLINK),
                Type::RAW.nonblocking().cloexec(),
                Some(Protocol::from(NETLINK_NETFILTER)),
            )
        });
        let socket = made.await?.map_err(fail)?;
        Ok(Self {
            socket: register(socket, Interest::READABLE | Interest::WRITABLE).map_err(fail)?,
            sequence: 0,
        })
    }

    /// Where the datagram from `client` that arrived at `local` was going before it was redirected.
    /// `None` when the table does not know it.
    pub async fn original_udp_destination(
        &mut self,
        client: SocketAddr,
        local: SocketAddr,
    ) -> io::Result<Option<SocketAddr>> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = get_by_reply(self.sequence, local, client);
        let mut answer = [0_u8; 4096];
        read_answer(self.ask(&request, &mut answer).await?)
    }

    /// Enters an established TCP connection that `client` began to `server`, untranslated, as if its packets had been
    /// seen. Says whether it was unknown; what the table knows stays as it is. Fails with `ENOMEM` when the table is
    /// full.
    pub async fn enter_tcp(&mut self, client: SocketAddr, server: SocketAddr) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = new_tcp(self.sequence, client, server);
        let mut answer = [0_u8; 4096];
        match error_code(self.ask(&request, &mut answer).await?) {
            Some(0) => Ok(true),
            Some(libc::EEXIST) => Ok(false),
            Some(code) => Err(io::Error::from_raw_os_error(code)),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Removes the entry of a TCP connection that `client` began to `server`. Says whether there was one.
    pub async fn delete_tcp(&mut self, client: SocketAddr, server: SocketAddr) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = delete_tcp(self.sequence, client, server);
        let mut answer = [0_u8; 4096];
        match error_code(self.ask(&request, &mut answer).await?) {
            Some(0) => Ok(true),
            Some(libc::ENOENT) => Ok(false),
            Some(code) => Err(io::Error::from_raw_os_error(code)),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Sends the request that bears the current number and returns its answer.
    async fn ask<'a>(&self, request: &[u8], answer: &'a mut [u8]) -> io::Result<&'a [u8]> {
        self.socket.async_io(Interest::WRITABLE, |socket| socket.send(request)).await?;
        loop {
            let n = self.socket.async_io(Interest::READABLE, |socket| receive(socket, answer)).await?;
            // An answer to a question that was given up on is passed over.
            if field_u32(answer, 8) == Some(self.sequence) {
                return Ok(answer.get(..n).unwrap_or_default());
            }
        }
    }
}

fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    use std::io::Read;
    let mut socket = socket;
    socket.read(buffer)
}

/// The request for the entry whose replies go from `from` to `to`.
fn get_by_reply(sequence: u32, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut body = Vec::new();
    attribute(&mut body, CTA_TUPLE_REPLY | NESTED, &tuple(libc::IPPROTO_UDP, from, to));
    message(CT_GET, NLM_F_REQUEST, sequence, from, &body)
}

/// The request to make an entry.
fn new_tcp(sequence: u32, client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let mut tcp = Vec::new();
    attribute(&mut tcp, CTA_PROTOINFO_TCP_STATE, &[TCP_ESTABLISHED]);
    // struct nf_ct_tcp_flags: flags, and which of them are meant.
    attribute(&mut tcp, CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &[TCP_LIBERAL; 2]);
    attribute(&mut tcp, CTA_PROTOINFO_TCP_FLAGS_REPLY, &[TCP_LIBERAL; 2]);
    let mut protocol = Vec::new();
    attribute(&mut protocol, CTA_PROTOINFO_TCP | NESTED, &tcp);
    let mut body = Vec::new();
    attribute(&mut body, CTA_TUPLE_ORIG | NESTED, &tuple(libc::IPPROTO_TCP, client, server));
    attribute(&mut body, CTA_TUPLE_REPLY | NESTED, &tuple(libc::IPPROTO_TCP, server, client));
    attribute(&mut body, CTA_STATUS, &ESTABLISHED_STATUS.to_be_bytes());
    attribute(&mut body, CTA_TIMEOUT, &TRACKED_FOR.to_be_bytes());
    attribute(&mut body, CTA_PROTOINFO | NESTED, &protocol);
    message(CT_NEW, NLM_F_REQUEST_NEW, sequence, client, &body)
}

/// The request to remove an entry.
fn delete_tcp(sequence: u32, client: SocketAddr, server: SocketAddr) -> Vec<u8> {
    let mut body = Vec::new();
    attribute(&mut body, CTA_TUPLE_ORIG | NESTED, &tuple(libc::IPPROTO_TCP, client, server));
    message(CT_DELETE, NLM_F_REQUEST_ACK, sequence, client, &body)
}

/// Addresses, ports and protocol of one direction.
fn tuple(protocol: i32, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut ip = Vec::new();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            attribute(&mut ip, CTA_IP_V4_SRC, &from.octets());
            attribute(&mut ip, CTA_IP_V4_DST, &to.octets());
        }
        (from, to) => {
            attribute(&mut ip, CTA_IP_V6_SRC, &v6(from).octets());
            attribute(&mut ip, CTA_IP_V6_DST, &v6(to).octets());
        }
    }
    let mut proto = Vec::new();
    attribute(&mut proto, CTA_PROTO_NUM, &[protocol as u8]);
    attribute(&mut proto, CTA_PROTO_SRC_PORT, &from.port().to_be_bytes());
    attribute(&mut proto, CTA_PROTO_DST_PORT, &to.port().to_be_bytes());
    let mut tuple = Vec::new();
    attribute(&mut tuple, CTA_TUPLE_IP | NESTED, &ip);
    attribute(&mut tuple, CTA_TUPLE_PROTO | NESTED, &proto);
    tuple
}

/// `struct nlmsghdr` and `struct nfgenmsg` (family as `like`, version, resource id), then the attributes.
fn message(kind: u16, flags: u16, sequence: u32, like: SocketAddr, attributes: &[u8]) -> Vec<u8> {
    let len = HEADER + GENERIC + attributes.len();
    let family = if like.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut message = Vec::with_capacity(len);
    message.extend_from_slice(&(len as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&sequence.to_ne_bytes());
    message.extend_from_slice(&0_u32.to_ne_bytes());
    message.extend_from_slice(&[family as u8, 0, 0, 0]);
    message.extend_from_slice(attributes);
    message
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    out.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn field_u32(message: &[u8], at: usize) -> Option<u32> {
    message.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn field_u16(message: &[u8], at: usize) -> Option<u16> {
    message.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn read_answer(message: &[u8]) -> io::Result<Option<SocketAddr>> {
    match error_code(message) {
        None => Ok(original_destination(message.get(HEADER + GENERIC..).unwrap_or_default())),
        Some(0 | libc::ENOENT) => Ok(None),
        Some(code) => Err(io::Error::from_raw_os_error(code)),
    }
}

/// The error that an answer bears, 0 for an acknowledgement; `None` when it is neither.
fn error_code(message: &[u8]) -> Option<i32> {
    (field_u16(message, 4) == Some(NLMSG_ERROR))
        .then(|| field_u32(message, HEADER).map_or(0, |code| (code as i32).wrapping_neg()))
}

fn original_destination(attributes: &[u8]) -> Option<SocketAddr> {
    let tuple = find(attributes, CTA_TUPLE_ORIG)?;
    let ip = find(tuple, CTA_TUPLE_IP)?;
    let port = find(find(tuple, CTA_TUPLE_PROTO)?, CTA_PROTO_DST_PORT)?;
    let port = u16::from_be_bytes(port.try_into().ok()?);
    let ip = match (find(ip, CTA_IP_V4_DST), find(ip, CTA_IP_V6_DST)) {
        (Some(octets), _) => IpAddr::V4(Ipv4Addr::from(<[u8; 4]>::try_from(octets).ok()?)),
        (None, Some(octets)) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(octets).ok()?)),
        (None, None) => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    while attributes.len() >= 4 {
        let len = usize::from(field_u16(attributes, 0)?);
        let value = attributes.get(4..len)?;
        if field_u16(attributes, 2)? & !NESTED == kind {
            return Some(value);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
    None
}
