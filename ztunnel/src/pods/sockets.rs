//! The listening sockets of a pod: taken over from the node agent, or bound in its namespace.
//!
//! What is accepted on them is served elsewhere; this says which sockets there are and checks that a
//! passed one is what it claims to be.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use ambit_api::ports;
use ambit_api::workload::zds::Listener;
use ambit_net::listen::{self, Options};
use ambit_net::{Netns, NetnsError, PROXY_MARK};
use socket2::{SockRef, Type};

/// What a listener's connections are for. The ports are those of the redirection contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// 15001: connections that the pod opens.
    Outbound,
    /// 15006: plaintext connections to the pod.
    Passthrough,
    /// 15008: HBONE connections to the pod.
    Inbound,
    /// 15053: the pod's DNS questions over TCP.
    Dns,
    /// 15080: connections that the pod asks for by SOCKS5.
    Socks5,
}

impl Role {
    /// Every role that has a TCP listener.
    pub const ALL: [Self; 5] = [Self::Outbound, Self::Passthrough, Self::Inbound, Self::Dns, Self::Socks5];

    /// The role's port.
    pub const fn port(self) -> u16 {
        match self {
            Self::Outbound => ports::OUTBOUND,
            Self::Passthrough => ports::INBOUND_PLAINTEXT,
            Self::Inbound => ports::INBOUND_HBONE,
            Self::Dns => ports::DNS,
            Self::Socks5 => ports::SOCKS5,
        }
    }

    /// The role as metrics and the log name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Passthrough => "passthrough",
            Self::Inbound => "inbound",
            Self::Dns => "dns",
            Self::Socks5 => "socks5",
        }
    }

    fn of_port(port: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|role| u32::from(role.port()) == port)
    }

    /// Whether only the pod itself may connect.
    const fn is_local(self) -> bool {
        matches!(self, Self::Dns | Self::Socks5)
    }
}

/// The optional listeners of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionalListeners {
    /// DNS over UDP and TCP.
    pub dns: bool,
    /// SOCKS5.
    pub socks5: bool,
}

impl OptionalListeners {
    /// Whether a pod gets the listener of a role.
    pub fn wants(self, role: Role) -> bool {
        match role {
            Role::Dns => self.dns,
            Role::Socks5 => self.socks5,
            Role::Outbound | Role::Passthrough | Role::Inbound => true,
        }
    }
}

/// A pod's listening sockets, non-blocking and bound to no runtime yet.
#[derive(Debug, Default)]
pub struct PodSockets {
    /// TCP listeners.
    pub tcp: Vec<(Role, TcpListener)>,
    /// UDP sockets for DNS.
    pub dns_udp: Vec<UdpSocket>,
}

/// Why a pod's sockets can't be created or taken over.
#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    /// Binding our own failed.
    #[error("bind the pod's listeners: {0}")]
    Bind(#[from] NetnsError),
    /// A passed descriptor is not what the agent announced.
    #[error("the descriptor passed for port {port} is {found}")]
    NotAsAnnounced {
        /// The port that was announced.
        port: u32,
        /// What it is instead.
        found: String,
    },
    /// A passed descriptor can't be used.
    #[error("the descriptor passed for port {port} can't be used: {source}")]
    Unusable {
        /// The port that was announced.
        port: u32,
        /// What the system said.
        source: io::Error,
    },
}

/// Checks the descriptors that the agent passed and returns copies. Those that are not wanted, or whose port has no role
/// here, are left out.
///
/// # Errors
/// [`SocketsError::NotAsAnnounced`] and [`SocketsError::Unusable`], naming the port.
pub fn passed(
    listeners: &[(Listener, OwnedFd)],
    wanted: OptionalListeners,
) -> Result<PodSockets, SocketsError> {
    let mut sockets = PodSockets::default();
    for (Listener { port, udp, ipv6: _ }, fd) in listeners {
        let (port, udp) = (*port, *udp);
        check(port, udp, fd)?;
        let fd = fd.try_clone().map_err(|source| SocketsError::Unusable { port, source })?;
        match Role::of_port(port).filter(|role| wanted.wants(*role)) {
            Some(Role::Dns) if udp => sockets.dns_udp.push(fd.into()),
            Some(role) if !udp => sockets.tcp.push((role, fd.into())),
            _ => tracing::debug!(port, udp, "a passed listener is not wanted"),
        }
    }
    Ok(sockets)
}

fn check(port: u32, udp: bool, fd: &OwnedFd) -> Result<(), SocketsError> {
    let unusable = |source| SocketsError::Unusable { port, source };
    let socket = SockRef::from(fd);
    let kind = socket.r#type().map_err(unusable)?;
    let local = socket.local_addr().map_err(unusable)?.as_socket();
    let wrong = |found: String| Err(SocketsError::NotAsAnnounced { port, found });
    if kind != if udp { Type::DGRAM } else { Type::STREAM } {
        return wrong(format!("of type {kind:?}"));
    }
    if local.map(|address| u32::from(address.port())) != Some(port) {
        return wrong(format!("bound to {local:?}"));
    }
    if !udp && !socket.is_listener().map_err(unusable)? {
        return wrong("not listening".to_owned());
    }
    socket.set_nonblocking(true).map_err(unusable)
}

/// Binds a pod's listeners in its namespace, IPv4 and, where the namespace has it, IPv6.
///
/// # Errors
/// [`SocketsError::Bind`], naming address and namespace. Missing IPv6 support is not an error.
pub async fn own(netns: &Netns, wanted: OptionalListeners) -> Result<PodSockets, SocketsError> {
    let options = Options { reuse_port: true, ..Options::marked(PROXY_MARK) };
    let mut sockets = PodSockets::default();
    for role in Role::ALL.into_iter().filter(|role| wanted.wants(*role)) {
        for ip in addresses(role) {
            let address = SocketAddr::new(ip, role.port());
            match listen::listen_tcp(netns, address, options).await {
                Ok(listener) => sockets.tcp.push((role, listener)),
                Err(error) if lacks_ipv6(ip, &error) => {}
                Err(error) => return Err(error.into()),
            }
            if role == Role::Dns {
                match listen::bind_udp(netns, address, options).await {
                    Ok(socket) => sockets.dns_udp.push(socket),
                    Err(error) if lacks_ipv6(ip, &error) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
    Ok(sockets)
}

fn addresses(role: Role) -> [IpAddr; 2] {
    if role.is_local() {
        [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
    } else {
        [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]
    }
}

fn lacks_ipv6(ip: IpAddr, error: &NetnsError) -> bool {
    let code = error.raw_os_error().map(nix::errno::Errno::from_raw);
    ip.is_ipv6() && matches!(code, Some(nix::errno::Errno::EAFNOSUPPORT | nix::errno::Errno::EADDRNOTAVAIL))
}

/// Identifies a socket: descriptors with equal ids refer to one socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SocketId(u64);

/// The socket behind a descriptor.
///
/// # Errors
/// fstat's; there is none for a descriptor that is open.
pub fn socket_id(socket: &impl AsFd) -> io::Result<SocketId> {
    let file = std::fs::File::from(socket.as_fd().try_clone_to_owned()?);
    Ok(SocketId(file.metadata()?.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: OptionalListeners = OptionalListeners { dns: true, socks5: true };

    fn announced(port: u16, udp: bool) -> Listener {
        Listener { port: port.into(), udp, ipv6: false }
    }

    #[test]
    fn a_descriptor_that_is_not_what_was_announced_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let client_port = client.local_addr().unwrap().port();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let udp_port = udp.local_addr().unwrap().port();
        let file = std::fs::File::open("/dev/null").unwrap();
        let copy = |fd: &dyn AsFdObject| fd.copy();
        for (announced, fd) in [
            (announced(15001, false), copy(&listener)),
            (announced(port, true), copy(&listener)),
            (announced(client_port, false), copy(&client)),
            (announced(udp_port, false), copy(&udp)),
            (announced(1, false), copy(&file)),
        ] {
            assert!(passed(&[(announced, fd)], ALL).is_err(), "{announced:?}");
        }
        assert!(passed(&[(announced(port, false), copy(&listener))], ALL).unwrap().tcp.is_empty());
    }

    trait AsFdObject {
        fn copy(&self) -> OwnedFd;
    }
    impl<T: AsFd> AsFdObject for T {
        fn copy(&self) -> OwnedFd {
            self.as_fd().try_clone_to_owned().unwrap()
        }
    }

    #[test]
    fn copies_of_a_descriptor_are_one_socket() {
        let one = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(socket_id(&one).unwrap(), socket_id(&one.try_clone().unwrap()).unwrap());
        assert_ne!(socket_id(&one).unwrap(), socket_id(&other).unwrap());
    }
}
