//! Connection tracking, asked over netlink: where a redirected datagram was going.
//!
//! TCP has `SO_ORIGINAL_DST`; for UDP only the tracking table knows. The DNS proxy asks it, so that a
//! resolver that an application named explicitly is honoured.

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
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NESTED: u16 = 0x8000;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
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
        self.socket.async_io(Interest::WRITABLE, |socket| socket.send(&request)).await?;
        let mut answer = [0_u8; 4096];
        loop {
            let n = self.socket.async_io(Interest::READABLE, |socket| receive(socket, &mut answer)).await?;
            let message = answer.get(..n).unwrap_or_default();
            // An answer to a question that was given up on is passed over.
            if field_u32(message, 8) == Some(self.sequence) {
                return read_answer(message);
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
    attribute(&mut proto, CTA_PROTO_NUM, &[libc::IPPROTO_UDP as u8]);
    attribute(&mut proto, CTA_PROTO_SRC_PORT, &from.port().to_be_bytes());
    attribute(&mut proto, CTA_PROTO_DST_PORT, &to.port().to_be_bytes());
    let mut tuple = Vec::new();
    attribute(&mut tuple, CTA_TUPLE_IP | NESTED, &ip);
    attribute(&mut tuple, CTA_TUPLE_PROTO | NESTED, &proto);
    let family = if from.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // struct nfgenmsg: family, version, resource id.
    let mut body = vec![family as u8, 0, 0, 0];
    attribute(&mut body, CTA_TUPLE_REPLY | NESTED, &tuple);

    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend_from_slice(&((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend_from_slice(&CT_GET.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message.extend_from_slice(&sequence.to_ne_bytes());
    message.extend_from_slice(&0_u32.to_ne_bytes());
    message.extend_from_slice(&body);
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
    if field_u16(message, 4) == Some(NLMSG_ERROR) {
        let code = field_u32(message, HEADER).map_or(0, |code| (code as i32).wrapping_neg());
        return match code {
            0 | libc::ENOENT => Ok(None),
            code => Err(io::Error::from_raw_os_error(code)),
        };
    }
    Ok(original_destination(message.get(HEADER + GENERIC..).unwrap_or_default()))
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
