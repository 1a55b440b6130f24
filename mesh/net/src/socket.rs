//! Single sockets: creating them with the mesh's options, original destinations, resets.
//!
//! Everything here acts in the calling thread's namespace or on an existing socket.

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::LazyLock;
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};

/// First keepalive probe after this much silence.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// Time between unanswered keepalive probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Unanswered probes after which the connection fails: two minutes after the last packet.
const KEEPALIVE_PROBES: u32 = 4;
/// linux/in.h; the libc crate does not have it.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

/// The address family of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6 only.
    V6,
}

impl Family {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    pub(crate) fn domain(self) -> Domain {
        match self {
            Self::V4 => Domain::IPV4,
            Self::V6 => Domain::IPV6,
        }
    }
}

/// Makes a non-blocking TCP socket ready to bind and connect: no delay, keepalive; with a mark also
/// transparent, so that its source address may be foreign. A mark needs `CAP_NET_ADMIN`.
pub fn tcp(family: Family, mark: Option<u32>) -> io::Result<Socket> {
    let socket = Socket::new(family.domain(), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    set_keepalive(&socket)?;
    // The port is chosen at connect, for the whole four-tuple: one source port serves many destinations.
    set_int(&socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    if family == Family::V6 {
        socket.set_only_v6(true)?;
    }
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
        set_transparent(&socket, family)?;
    }
    Ok(socket)
}

/// Turns on keepalive with the mesh's times, so that a peer that vanished is noticed in two minutes.
pub fn set_keepalive(socket: &impl AsFd) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_PROBES);
    SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

/// Turns on keepalive with these times and number of probes; where there is none, the system's count.
pub fn set_probes(
    socket: &impl AsFd,
    idle: Option<Duration>,
    interval: Option<Duration>,
    probes: Option<u32>,
) -> io::Result<()> {
    let mut keepalive = TcpKeepalive::new();
    if let Some(idle) = idle {
        keepalive = keepalive.with_time(idle);
    }
    if let Some(interval) = interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(probes) = probes {
        keepalive = keepalive.with_retries(probes);
    }
    SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

/// Sets the options of an accepted connection: no delay and keepalive.
pub fn prepare_accepted(socket: &impl AsFd) -> io::Result<()> {
    SockRef::from(socket).set_tcp_nodelay(true)?;
    set_keepalive(socket)
}

/// The congestion control for connections that don't leave the machine; `None` if the system's default does not pace.
/// Pacing by timers (BBR: <https://datatracker.ietf.org/doc/draft-ietf-ccwg-bbr/>) costs CPU and delay, and protects
/// network links that such connections do not use.
static UNPACED: LazyLock<Option<&'static [u8]>> = LazyLock::new(|| {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).unwrap_or_default();
    unpaced(&read("tcp_congestion_control"), &read("tcp_available_congestion_control"))
});

fn unpaced(default: &str, available: &str) -> Option<&'static [u8]> {
    let paces = default.trim().starts_with("bbr");
    let has_cubic = available.split_whitespace().any(|name| name == "cubic");
    // Reno is part of every kernel.
    paces.then_some(if has_cubic { b"cubic" } else { b"reno" })
}

/// Turns pacing off for a socket whose connections stay on this machine. Call it before the socket connects or listens.
pub fn stay_local(socket: &impl AsFd) -> io::Result<()> {
    match *UNPACED {
        Some(name) => SockRef::from(socket).set_tcp_congestion(name),
        None => Ok(()),
    }
}

/// Sets the mark of packets that the socket sends. Needs `CAP_NET_ADMIN`.
pub fn set_mark(socket: &impl AsFd, mark: u32) -> io::Result<()> {
    SockRef::from(socket).set_mark(mark)
}

/// Allows the socket to have addresses that are not local (ip(7), `IP_TRANSPARENT`). Needs `CAP_NET_ADMIN`.
pub fn set_transparent(socket: &impl AsFd, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => set_int(socket, libc::SOL_IP, libc::IP_TRANSPARENT, 1),
        Family::V6 => set_int(socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1),
    }
}

/// Makes the kernel choose `port` when the socket connects, if it lies in the range of the namespace (ip(7),
/// `IP_LOCAL_PORT_RANGE`; Linux 6.3). Connecting fails with `EADDRNOTAVAIL` where another connection has the four-tuple.
pub fn choose_port(socket: &impl AsFd, port: u16) -> io::Result<()> {
    let range = (u32::from(port) << 16) | u32::from(port);
    set_int(socket, libc::SOL_IP, IP_LOCAL_PORT_RANGE, range.cast_signed())
}

/// Sets the send buffer beyond the system's limit (socket(7), `SO_SNDBUFFORCE`), in bytes. Needs
/// `CAP_NET_ADMIN`.
pub fn force_send_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, i32::try_from(bytes).unwrap_or(i32::MAX))
}

/// Makes the kernel answer with RST instead of FIN when `socket` is closed.
///
/// RFC 9293 §3.10.5: the peer must see an abort when the other half of a relay failed; a FIN would let it believe that it
/// had received everything. If the option can't be set, the socket closes in the ordinary way, and the log says so.
pub fn reset_on_close(socket: &impl AsFd) {
    if let Err(error) = SockRef::from(socket).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "a socket could not be set to reset on close");
    }
}

/// The destination of a redirected connection before the redirect (`SO_ORIGINAL_DST`).
///
/// # Errors
/// `ENOENT` when connection tracking does not know the connection, `ENOPROTOOPT` when the
/// namespace tracks none. For a connection that was not redirected, this is its own local address.
pub fn original_dst(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let local = SockRef::from(socket).local_addr()?.as_socket();
    match local {
        Some(SocketAddr::V6(local)) if local.ip().to_ipv4_mapped().is_none() => original_dst_v6(socket),
        Some(_) => original_dst_v4(socket),
        None => Err(io::Error::new(io::ErrorKind::InvalidInput, "not an internet socket")),
    }
}

fn original_dst_v4(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let raw: libc::sockaddr_in = get_option(socket, libc::SOL_IP, libc::SO_ORIGINAL_DST)?;
    let ip = u32::from_be(raw.sin_addr.s_addr).into();
    Ok(SocketAddrV4::new(ip, u16::from_be(raw.sin_port)).into())
}

fn original_dst_v6(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let raw: libc::sockaddr_in6 = get_option(socket, libc::SOL_IPV6, libc::IP6T_SO_ORIGINAL_DST)?;
    let ip = raw.sin6_addr.s6_addr.into();
    Ok(SocketAddrV6::new(ip, u16::from_be(raw.sin6_port), 0, raw.sin6_scope_id).into())
}

/// Plain old address structures that a socket option fills in.
trait OptionValue: Copy {
    fn zeroed() -> Self;
}

impl OptionValue for libc::sockaddr_in {
    fn zeroed() -> Self {
        Self { sin_family: 0, sin_port: 0, sin_addr: libc::in_addr { s_addr: 0 }, sin_zero: [0; 8] }
    }
}

impl OptionValue for libc::sockaddr_in6 {
    fn zeroed() -> Self {
        Self {
            sin6_family: 0,
            sin6_port: 0,
            sin6_flowinfo: 0,
            sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
            sin6_scope_id: 0,
        }
    }
}

#[allow(unsafe_code, reason = "getsockopt for options that neither nix nor socket2 read in both families")]
fn get_option<T: OptionValue>(socket: &impl AsFd, level: i32, name: i32) -> io::Result<T> {
    let mut value = T::zeroed();
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is writable for `length` bytes and valid for every bit pattern; the descriptor is open.
    let outcome = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length)
    };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

#[allow(unsafe_code, reason = "setsockopt for options that socket2 sets in one family only")]
pub(crate) fn set_int(socket: &impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the option's value is one readable integer; the descriptor is open.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_congestion_control_that_paces_is_replaced() {
        for (default, available, expected) in [
            ("cubic\n", "reno cubic\n", None),
            ("reno\n", "reno\n", None),
            ("bbr\n", "reno bbr cubic\n", Some(&b"cubic"[..])),
            ("bbr3\n", "reno bbr3\n", Some(&b"reno"[..])),
            ("", "", None),
        ] {
            assert_eq!(unpaced(default, available), expected, "{default:?}");
        }
    }

    #[test]
    fn a_local_socket_does_not_pace() {
        let socket = tcp(Family::V4, None).unwrap();
        stay_local(&socket).unwrap();
        let used = socket.tcp_congestion().unwrap();
        assert!(!used.starts_with(b"bbr"), "{}", String::from_utf8_lossy(&used));
    }
}
