//! Connection tracking over netlink: original destinations of datagrams, and TCP connections entered and removed.
//!
//! TCP has `SO_ORIGINAL_DST`; for UDP the destination is only in the tracking table. The DNS proxy looks it up there to
//! reach the resolver that an application named explicitly. The node agent enters connections that are older than tracking.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use socket2::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::netlink::{self, Attribute, Content, Family, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Request, find};
use crate::netns::{Netns, NetnsError};
use crate::readiness::register;

/// `NFNL_SUBSYS_CTNETLINK`, in the high byte of message types.
const SUBSYSTEM: u16 = 1 << 8;
/// `IPCTNL_MSG_CT_NEW`.
const NEW: u16 = SUBSYSTEM;
/// `IPCTNL_MSG_CT_GET`.
const GET: u16 = SUBSYSTEM | 1;
/// `IPCTNL_MSG_CT_DELETE`.
const DELETE: u16 = SUBSYSTEM | 2;
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
/// `IP_CT_TCP_FLAG_SACK_PERM | IP_CT_TCP_FLAG_BE_LIBERAL`, which the kernel also sets for connections
/// that it picks up midway: no packet is invalid because its window was not seen.
const TCP_LIBERAL: u8 = 0x02 | 0x08;
/// Lifetime of an entry until its first packet, in seconds; from then on the kernel's own timeout applies, which is as long.
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
/// Length of `struct nfgenmsg`: family, version, resource id.
const FIXED: usize = 4;

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
            let socket = Family::Netfilter.open()?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        let socket = made.await?.map_err(fail)?;
        Ok(Self {
            socket: register(socket, Interest::READABLE | Interest::WRITABLE).map_err(fail)?,
            sequence: 0,
        })
    }

    /// The destination of the datagram from `client` that arrived at `local` before it was redirected.
    /// `None` when the table does not know it.
    pub async fn original_udp_destination(
        &mut self,
        client: SocketAddr,
        local: SocketAddr,
    ) -> io::Result<Option<SocketAddr>> {
        let reply = tuple(CTA_TUPLE_REPLY, libc::IPPROTO_UDP, local, client);
        match self.ask(GET, 0, client, &[reply]).await {
            Ok(attributes) => Ok(original_destination(&attributes)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Enters an established TCP connection that `client` began to `server`, untranslated, as if its packets had been
    /// seen. Returns whether the entry is new; an existing one is not changed. Fails with `ENOMEM` when the table is full.
    pub async fn enter_tcp(&mut self, client: SocketAddr, server: SocketAddr) -> io::Result<bool> {
        let entry = established_tcp(client, server);
        match self.ask(NEW, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, client, &entry).await {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes the entry of a TCP connection that `client` began to `server`. Returns whether there was one.
    pub async fn delete_tcp(&mut self, client: SocketAddr, server: SocketAddr) -> io::Result<bool> {
        let original = tuple(CTA_TUPLE_ORIG, libc::IPPROTO_TCP, client, server);
        match self.ask(DELETE, NLM_F_ACK, client, &[original]).await {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sends a request about addresses of the family of `like`. Returns the attributes of the answer; none for an
    /// acknowledgement.
    async fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        like: SocketAddr,
        attributes: &[Attribute],
    ) -> io::Result<Vec<u8>> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let family = if like.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let request = Request { kind, flags, sequence }.encode(&[family as u8, 0, 0, 0], attributes);
        self.socket.async_io(Interest::WRITABLE, |socket| socket.send(&request)).await?;
        let mut answer = [0_u8; 4096];
        loop {
            let n = self.socket.async_io(Interest::READABLE, |socket| receive(socket, &mut answer)).await?;
            let mut messages = netlink::messages(answer.get(..n).unwrap_or_default());
            // Skips answers to earlier requests that were abandoned.
            match messages.find(|message| message.sequence == sequence).map(|message| message.content) {
                None => {}
                Some(Content::Body(body)) => return Ok(body.get(FIXED..).unwrap_or_default().to_vec()),
                Some(Content::Acknowledged | Content::Done) => return Ok(Vec::new()),
                Some(Content::Refused(error)) => return Err(error),
            }
        }
    }
}

fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    use std::io::Read;
    let mut socket = socket;
    socket.read(buffer)
}

fn established_tcp(client: SocketAddr, server: SocketAddr) -> [Attribute; 5] {
    let tcp = vec![
        Attribute::bytes(CTA_PROTOINFO_TCP_STATE, [TCP_ESTABLISHED]),
        // struct nf_ct_tcp_flags: flags, and which of them are meant.
        Attribute::bytes(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, [TCP_LIBERAL; 2]),
        Attribute::bytes(CTA_PROTOINFO_TCP_FLAGS_REPLY, [TCP_LIBERAL; 2]),
    ];
    [
        tuple(CTA_TUPLE_ORIG, libc::IPPROTO_TCP, client, server),
        tuple(CTA_TUPLE_REPLY, libc::IPPROTO_TCP, server, client),
        Attribute::number(CTA_STATUS, ESTABLISHED_STATUS),
        Attribute::number(CTA_TIMEOUT, TRACKED_FOR),
        Attribute::tree(CTA_PROTOINFO, vec![Attribute::tree(CTA_PROTOINFO_TCP, tcp)]),
    ]
}

/// Addresses, ports and protocol of one direction.
fn tuple(kind: u16, protocol: i32, from: SocketAddr, to: SocketAddr) -> Attribute {
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            vec![Attribute::bytes(CTA_IP_V4_SRC, from.octets()), Attribute::bytes(CTA_IP_V4_DST, to.octets())]
        }
        (from, to) => vec![
            Attribute::bytes(CTA_IP_V6_SRC, v6(from).octets()),
            Attribute::bytes(CTA_IP_V6_DST, v6(to).octets()),
        ],
    };
    let proto = vec![
        Attribute::bytes(CTA_PROTO_NUM, [protocol as u8]),
        Attribute::bytes(CTA_PROTO_SRC_PORT, from.port().to_be_bytes()),
        Attribute::bytes(CTA_PROTO_DST_PORT, to.port().to_be_bytes()),
    ];
    Attribute::tree(kind, vec![Attribute::tree(CTA_TUPLE_IP, ip), Attribute::tree(CTA_TUPLE_PROTO, proto)])
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
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
