//! Hand-made packets, and what passes on a wire.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};

use ambit_net::Netns;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const URG: u8 = 0x20;

/// RFC 2385: a signature that nobody asked for. TCP drops such a segment without an answer.
pub(crate) const MD5: &[u8] = &[1, 1, 19, 18, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7];
/// RFC 5925: the same for the authentication option.
pub(crate) const AO: &[u8] = &[29, 16, 1, 1, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7];

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A TCP segment with valid checksums.
pub(crate) fn tcp(from: SocketAddr, to: SocketAddr, flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    assert!(options.len().is_multiple_of(4), "options are padded");
    let mut segment = Vec::new();
    segment.extend_from_slice(&from.port().to_be_bytes());
    segment.extend_from_slice(&to.port().to_be_bytes());
    segment.extend_from_slice(&1000_u32.to_be_bytes());
    segment.extend_from_slice(&2000_u32.to_be_bytes());
    segment.extend_from_slice(&[(5 + options.len() as u8 / 4) << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend_from_slice(options);
    segment.extend_from_slice(payload);
    let sum = transport_checksum(from.ip(), to.ip(), TCP, &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// A UDP datagram with a valid checksum.
pub(crate) fn udp(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend_from_slice(&from.port().to_be_bytes());
    datagram.extend_from_slice(&to.port().to_be_bytes());
    datagram.extend_from_slice(&(8 + payload.len() as u16).to_be_bytes());
    datagram.extend_from_slice(&[0, 0]);
    datagram.extend_from_slice(payload);
    let sum = transport_checksum(from.ip(), to.ip(), UDP, &datagram);
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    datagram
}

/// A TCP segment in one packet.
pub(crate) fn whole(from: IpAddr, to: IpAddr, segment: &[u8]) -> Vec<u8> {
    packet(from, to, TCP, 0, segment)
}

/// Any payload in one packet.
pub(crate) fn of_protocol(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    packet(from, to, protocol, 0, payload)
}

/// A TCP segment in two fragments, the second first.
pub(crate) fn fragments(from: IpAddr, to: IpAddr, segment: &[u8]) -> Vec<Vec<u8>> {
    let (first, second) = segment.split_at(16);
    if from.is_ipv4() {
        return vec![packet(from, to, TCP, 2, second), packet(from, to, TCP, 0x2000, first)];
    }
    // RFC 8200 §4.5.
    let fragment = |offset_and_more: u16, data: &[u8]| {
        let mut header = vec![TCP, 0];
        header.extend_from_slice(&offset_and_more.to_be_bytes());
        header.extend_from_slice(&77_u32.to_be_bytes());
        header.extend_from_slice(data);
        packet(from, to, 44, 0, &header)
    };
    vec![fragment(2 << 3, second), fragment(1, first)]
}

/// A TCP segment behind a header of destination options (IPv6) or an IP option (IPv4: no operation).
pub(crate) fn with_ip_options(from: IpAddr, to: IpAddr, segment: &[u8]) -> Vec<u8> {
    if from.is_ipv4() {
        let mut packet = packet(from, to, TCP, 0, segment);
        packet.splice(20..20, [1, 1, 1, 1]);
        packet[0] = 0x46;
        return finish_v4(packet);
    }
    // RFC 8200 §4.6, with a PadN option of six bytes.
    let mut payload = vec![TCP, 0, 1, 4, 0, 0, 0, 0];
    payload.extend_from_slice(segment);
    packet(from, to, 60, 0, &payload)
}

/// An ICMP error about a segment that `to` is to have sent to `from`: port unreachable.
pub(crate) fn icmp_error(from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let quoted = whole(to.ip(), from.ip(), &tcp(to, from, ACK, &[], b""));
    let (kind, code, protocol) = if from.is_ipv4() { (3, 3, 1) } else { (1, 4, 58) };
    let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(&quoted);
    let sum = if from.is_ipv4() {
        checksum(&message)
    } else {
        transport_checksum(from.ip(), to.ip(), protocol, &message)
    };
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    packet(from.ip(), to.ip(), protocol, 0, &message)
}

fn packet(from: IpAddr, to: IpAddr, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut packet = vec![0x45, 0, 0, 0, 0, 77];
            packet.extend_from_slice(&fragment.to_be_bytes());
            packet.extend_from_slice(&[64, protocol, 0, 0]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
            packet.extend_from_slice(payload);
            finish_v4(packet)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut packet = vec![0x60, 0, 0, 0];
            packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
            packet.extend_from_slice(&[protocol, 64]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
            packet.extend_from_slice(payload);
            packet
        }
        _ => panic!("addresses of two families"),
    }
}

fn finish_v4(mut packet: Vec<u8>) -> Vec<u8> {
    let header = usize::from(packet[0] & 0x0f) * 4;
    let len = packet.len() as u16;
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet[10..12].copy_from_slice(&[0, 0]);
    let sum = checksum(&packet[..header]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn transport_checksum(from: IpAddr, to: IpAddr, protocol: u8, data: &[u8]) -> u16 {
    let mut pseudo = Vec::new();
    for ip in [from, to] {
        match ip {
            IpAddr::V4(ip) => pseudo.extend_from_slice(&ip.octets()),
            IpAddr::V6(ip) => pseudo.extend_from_slice(&ip.octets()),
        }
    }
    pseudo.extend_from_slice(&(data.len() as u32).to_be_bytes());
    pseudo.extend_from_slice(&u32::from(protocol).to_be_bytes());
    pseudo.extend_from_slice(data);
    checksum(&pseudo)
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Sends packets, whole with their IP headers, from a namespace.
pub(crate) async fn send(inside: &Netns, to: IpAddr, packets: Vec<Vec<u8>>) {
    const WITH_HEADER: i32 = 255;
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let open = move || Socket::new(domain, Type::RAW, Some(Protocol::from(WITH_HEADER)));
    let socket = inside.run(open).await.unwrap().unwrap();
    for packet in packets {
        match socket.send_to(&packet, &SockAddr::from(SocketAddr::new(to, 0))) {
            // What the sender's own rules drop.
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {}
            sent => assert_eq!(sent.unwrap(), packet.len()),
        }
    }
}

/// A packet that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) protocol: u8,
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    /// TCP's flags.
    pub(crate) flags: u8,
    /// Bytes after the TCP header.
    pub(crate) payload: usize,
}

impl Seen {
    pub(crate) fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    pub(crate) fn is_udp(&self) -> bool {
        self.protocol == UDP
    }
}

/// Everything that a namespace's interfaces send and receive.
pub(crate) struct Wire(Socket);

impl Wire {
    pub(crate) async fn open(inside: &Netns) -> Self {
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        let open = move || Socket::new(Domain::PACKET, Type::DGRAM.nonblocking(), Some(Protocol::from(all)));
        let socket = inside.run(open).await.unwrap().unwrap();
        socket.set_recv_buffer_size(16 << 20).unwrap();
        Self(socket)
    }

    /// What passed since the last call.
    pub(crate) fn seen(&mut self) -> Vec<Seen> {
        let mut seen = Vec::new();
        let mut packet = vec![0; 1 << 17];
        while let Ok(len) = self.0.read(&mut packet) {
            seen.extend(parse(&packet[..len]));
        }
        seen
    }
}

fn parse(packet: &[u8]) -> Option<Seen> {
    let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap());
    let v6 = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap());
    let (protocol, header, from, to) = match packet.first()? >> 4 {
        4 => (packet[9], usize::from(packet[0] & 0x0f) * 4, v4(12), v4(16)),
        6 if packet.len() >= 40 => (packet[6], 40, v6(8), v6(24)),
        _ => return None,
    };
    let rest = packet.get(header..)?;
    let port = |at: usize| rest.get(at..at + 2).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    let data = rest.get(12).map_or(0, |b| usize::from(b >> 4) * 4);
    Some(Seen {
        protocol,
        from: SocketAddr::new(from, port(0)),
        to: SocketAddr::new(to, port(2)),
        flags: rest.get(13).copied().unwrap_or_default(),
        payload: rest.len().saturating_sub(data),
    })
}

/// The TCP segments that the kernel hands to sockets of one family, after translation.
pub(crate) struct Delivered {
    socket: Socket,
    v4: bool,
}

impl Delivered {
    pub(crate) async fn open(inside: &Netns, like: IpAddr) -> Self {
        let v4 = like.is_ipv4();
        let domain = if v4 { Domain::IPV4 } else { Domain::IPV6 };
        let open = move || Socket::new(domain, Type::RAW.nonblocking(), Some(Protocol::TCP));
        Self { socket: inside.run(open).await.unwrap().unwrap(), v4 }
    }

    /// Number of segments to a port since the last call.
    pub(crate) fn count(&mut self, port: u16) -> usize {
        let mut count = 0;
        let mut packet = vec![0; 1 << 16];
        while let Ok(len) = self.socket.read(&mut packet) {
            // Only IPv4 comes with its header (raw(7)).
            let header = if self.v4 { usize::from(packet[0] & 0x0f) * 4 } else { 0 };
            let segment = &packet[header..len];
            count += usize::from(segment.get(2..4) == Some(&port.to_be_bytes()));
        }
        count
    }
}
