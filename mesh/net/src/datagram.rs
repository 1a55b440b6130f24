//! A socket that takes datagrams at every address of its namespace and answers from the address that each one came to.
//!
//! A socket that is bound to no address answers from the one that the kernel prefers. A client behind connection tracking, or
//! one that has connected its socket, takes answers only from the address that it sent to.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use nix::libc;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg, send,
    sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;

/// The largest payload of a datagram.
pub const LARGEST: usize = 65_535;

/// A bound socket of the calling thread's namespace that is not in a runtime yet.
#[derive(Debug)]
pub struct BoundDatagrams {
    socket: UdpSocket,
    family: Domain,
}

/// The socket in a runtime.
#[derive(Debug)]
pub struct DatagramSocket {
    socket: tokio::net::UdpSocket,
    family: Domain,
}

/// Where a datagram came from and to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Its bytes.
    pub length: usize,
    /// The sender, in canonical form.
    pub from: SocketAddr,
    /// The address that it was sent to, in canonical form.
    pub to: IpAddr,
}

impl BoundDatagrams {
    /// Binds `port` of all addresses, of IPv4 alone where there is no IPv6. Several sockets of one user may be bound to one
    /// port; the kernel gives each the datagrams of a part of the clients, and those of one client to the same one.
    ///
    /// # Errors
    /// The port is taken, or there are no descriptors.
    pub fn bind(port: u16) -> io::Result<Self> {
        match Self::bind_family(Domain::IPV6, SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)) {
            Err(error) if has_no_family(&error) => {
                Self::bind_family(Domain::IPV4, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port))
            }
            bound => bound,
        }
    }

    fn bind_family(family: Domain, address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(family, Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
        if family == Domain::IPV6 {
            socket.set_only_v6(false)?;
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        }
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        Ok(Self { socket: socket.into(), family })
    }

    /// The port.
    ///
    /// # Errors
    /// What the system says.
    pub fn port(&self) -> io::Result<u16> {
        self.socket.local_addr().map(|address| address.port())
    }

    /// The socket in the current runtime.
    ///
    /// # Errors
    /// It can't be registered.
    pub fn register(self) -> io::Result<DatagramSocket> {
        let Self { socket, family } = self;
        Ok(DatagramSocket { socket: tokio::net::UdpSocket::from_std(socket)?, family })
    }
}

impl DatagramSocket {
    /// Waits for a datagram. Cancel safe.
    ///
    /// # Errors
    /// What the system says; the socket can be used further.
    pub async fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        let socket = self.socket.as_raw_fd();
        self.socket.async_io(Interest::READABLE, || receive(socket, buffer)).await
    }

    /// Sends a datagram from the address `from`, at once.
    ///
    /// # Errors
    /// `WouldBlock` while the kernel has no room; others as the system says them.
    pub fn send(&self, bytes: &[u8], from: IpAddr, to: SocketAddr) -> io::Result<()> {
        let (socket, bytes) = (self.socket.as_raw_fd(), [IoSlice::new(bytes)]);
        if self.family == Domain::IPV6 {
            let to = SockaddrIn6::from(match to {
                SocketAddr::V6(to) => to,
                SocketAddr::V4(to) => std::net::SocketAddrV6::new(to.ip().to_ipv6_mapped(), to.port(), 0, 0),
            });
            let address = match from {
                IpAddr::V6(from) => from,
                IpAddr::V4(from) => from.to_ipv6_mapped(),
            };
            let from = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr { s6_addr: address.octets() },
                ipi6_ifindex: 0,
            };
            sendmsg(socket, &bytes, &[ControlMessage::Ipv6PacketInfo(&from)], MsgFlags::empty(), Some(&to))?;
            return Ok(());
        }
        let (SocketAddr::V4(to), IpAddr::V4(from)) = (to, from) else {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        };
        let any = libc::in_addr { s_addr: 0 };
        let source = libc::in_addr { s_addr: u32::from_ne_bytes(from.octets()) };
        let from = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: source, ipi_addr: any };
        let (from, to) = ([ControlMessage::Ipv4PacketInfo(&from)], SockaddrIn::from(to));
        sendmsg(socket, &bytes, &from, MsgFlags::empty(), Some(&to))?;
        Ok(())
    }
}

/// Sends a datagram by a connected socket, at once. The runtime is not asked: it does not know yet that a new socket can be written to.
///
/// # Errors
/// What the system says, also of a datagram that was sent before: `ConnectionRefused` where nothing took that.
pub fn send_connected(socket: &impl AsRawFd, bytes: &[u8]) -> io::Result<usize> {
    Ok(send(socket.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?)
}

fn has_no_family(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn receive(socket: RawFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = [0; 128];
    let mut bytes = [IoSliceMut::new(buffer)];
    let flags = MsgFlags::empty();
    let message = recvmsg::<SockaddrStorage>(socket, &mut bytes, Some(&mut control), flags)?;
    let from = message.address.and_then(|address| {
        let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
    });
    let to = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into()),
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(IpAddr::V4(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes())))
        }
        _ => None,
    });
    let missing = || io::Error::new(io::ErrorKind::InvalidData, "a datagram without addresses");
    let (from, to): (SocketAddr, IpAddr) = from.zip(to).ok_or_else(missing)?;
    let from = match (from, from.ip().to_canonical()) {
        (from, IpAddr::V4(ip)) => SocketAddr::new(ip.into(), from.port()),
        // The zone of a link-local address stays.
        (from, IpAddr::V6(_)) => from,
    };
    Ok(Received { length: message.bytes, from, to: to.to_canonical() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 127.0.0.2 is an address of this host that the kernel never prefers.
    #[tokio::test]
    async fn answers_come_from_the_address_that_was_asked() {
        let socket = BoundDatagrams::bind(0).unwrap();
        let port = socket.port().unwrap();
        let socket = socket.register().unwrap();
        let mut buffer = vec![0; LARGEST];
        for address in [Ipv4Addr::new(127, 0, 0, 2).into(), IpAddr::V4(Ipv4Addr::LOCALHOST)] {
            let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            client.connect((address, port)).unwrap();
            client.send(b"question").unwrap();
            let received = socket.receive(&mut buffer).await.unwrap();
            assert_eq!((received.from, received.to), (client.local_addr().unwrap(), address));
            assert_eq!(buffer.get(..received.length), Some(&b"question"[..]));
            socket.send(b"answer", received.to, received.from).unwrap();
            let mut answer = [0; 16];
            client.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
            assert_eq!(client.recv(&mut answer).unwrap(), 6);
        }
    }

    #[tokio::test]
    async fn a_port_can_be_bound_for_each_worker() {
        let first = BoundDatagrams::bind(0).unwrap();
        let port = first.port().unwrap();
        assert_eq!(BoundDatagrams::bind(port).unwrap().port().unwrap(), port);
    }
}
