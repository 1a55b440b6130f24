//! Packet captures on the links between the nodes, over AF_PACKET sockets.
//!
//! A capture shows what an eavesdropper on the wire could read. It keeps each frame that entered the fabric once, up to a
//! limit, and counts lost frames.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};

use crate::error::{Error, Result};
use crate::sandbox::Sandbox;

/// Kernel buffer of each socket, bytes: frames that arrive faster than they are read wait here.
const KERNEL_BUFFER: usize = 64 * 1024 * 1024;
/// The largest frame: what segmentation offload hands over between two namespaces, with headers.
const LARGEST_FRAME: usize = 72 * 1024;
/// How much a capture keeps by default, bytes.
pub const DEFAULT_LIMIT: usize = 256 * 1024 * 1024;

/// A running capture. Dropping it ends it and discards the frames.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    listeners: Vec<JoinHandle<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    frames: Vec<Vec<u8>>,
    bytes: usize,
    dropped: u64,
    failure: Option<String>,
}

/// The result of a capture.
#[derive(Debug, Default)]
pub struct Captured {
    /// Packets with a transport payload or without, in the order of each link.
    pub packets: Vec<Packet>,
    /// Frames that were lost because they came too fast or exceeded the limit. The absence of a packet from
    /// [`Captured::packets`] proves something only if this is 0.
    pub dropped: u64,
    /// Frames that are neither TCP nor UDP (ARP, ICMP).
    pub others: u64,
}

/// One TCP segment or UDP datagram.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Whether it is TCP; otherwise it is UDP.
    pub tcp: bool,
    /// Sender.
    pub source: SocketAddr,
    /// Receiver.
    pub destination: SocketAddr,
    /// TCP sequence number of the first payload byte; 0 for UDP.
    pub sequence: u32,
    /// The transport payload.
    pub payload: Vec<u8>,
}

impl Capture {
    /// Starts to listen on the given interfaces of a sandbox, on frames that come in from their far ends.
    ///
    /// # Errors
    /// When the kernel refuses the sockets.
    pub async fn start(sandbox: &Sandbox, links: &[u32], limit: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut listeners = Vec::new();
        for link in links.iter().copied() {
            let attempt = format!("capture on interface {link} of {}", sandbox.name());
            let socket =
                sandbox.on(move || listen_on(link)).await?.map_err(Error::system(attempt.clone()))?;
            let stop = Arc::clone(&stop);
            let share = limit / links.len().max(1);
            let listener = std::thread::Builder::new()
                .name("capture".to_owned())
                .spawn(move || take(&socket, &stop, share))
                .map_err(Error::system(attempt))?;
            listeners.push(listener);
        }
        Ok(Self { stop, listeners })
    }

    /// Ends the capture and returns everything that was sent before this call.
    ///
    /// # Errors
    /// When a link could not be read to the end.
    pub async fn stop(mut self) -> Result<Captured> {
        self.stop.store(true, Ordering::Release);
        let listeners = std::mem::take(&mut self.listeners);
        let join = move || -> Result<Captured> {
            let mut captured = Captured::default();
            for listener in listeners {
                let taken = listener.join().map_err(|_| Error::Ended("a capture".to_owned()))?;
                if let Some(failure) = taken.failure {
                    return Err(Error::Ended(format!("a capture ({failure})")));
                }
                captured.dropped += taken.dropped;
                for frame in taken.frames {
                    match Packet::parse(&frame) {
                        Some(packet) => captured.packets.push(packet),
                        None => captured.others += 1,
                    }
                }
            }
            Ok(captured)
        };
        tokio::task::spawn_blocking(join).await.map_err(|_| Error::Ended("a capture".to_owned()))?
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

impl Captured {
    /// Sum of the transport payloads, bytes.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.packets.iter().map(|packet| packet.payload.len()).sum()
    }

    /// Flows whose payload contains `needle`, also where it is split over segments.
    #[must_use]
    pub fn find(&self, needle: &[u8]) -> Vec<(SocketAddr, SocketAddr)> {
        if needle.is_empty() {
            return Vec::new();
        }
        let found = |payload: &[u8]| payload.windows(needle.len()).any(|window| window == needle);
        self.flows().into_iter().filter(|(_, payload)| found(payload)).map(|(flow, _)| flow).collect()
    }

    /// Payload sent per flow (sender, receiver), TCP put in order of sequence numbers, repeats left out.
    #[must_use]
    pub fn flows(&self) -> BTreeMap<(SocketAddr, SocketAddr), Vec<u8>> {
        let mut segments: BTreeMap<_, Vec<&Packet>> = BTreeMap::new();
        for packet in self.packets.iter().filter(|packet| !packet.payload.is_empty()) {
            segments.entry((packet.source, packet.destination)).or_default().push(packet);
        }
        segments.into_iter().map(|(flow, packets)| (flow, in_order(packets))).collect()
    }

    /// Destination ports of the TCP segments that carried payload, with payload bytes.
    #[must_use]
    pub fn tcp_ports(&self) -> BTreeMap<u16, usize> {
        let mut ports = BTreeMap::new();
        for packet in self.packets.iter().filter(|packet| packet.tcp && !packet.payload.is_empty()) {
            *ports.entry(packet.destination.port()).or_default() += packet.payload.len();
        }
        ports
    }
}

/// Puts a flow's segments together. Sequence numbers wrap, so they are compared to the first one seen.
fn in_order(mut packets: Vec<&Packet>) -> Vec<u8> {
    let Some(first) = packets.first().map(|packet| packet.sequence) else { return Vec::new() };
    let offset = |packet: &Packet| packet.sequence.wrapping_sub(first).cast_signed();
    if packets.iter().all(|packet| packet.tcp) {
        packets.sort_by_key(|packet| offset(packet));
    }
    let mut stream = Vec::new();
    let mut last: Option<(i32, usize)> = None;
    for packet in packets {
        let key = (offset(packet), packet.payload.len());
        if !packet.tcp || last != Some(key) {
            stream.extend_from_slice(&packet.payload);
        }
        last = Some(key);
    }
    stream
}

impl Packet {
    /// Reads an Ethernet frame with IPv4 or IPv6 and TCP or UDP; anything else is `None`.
    fn parse(frame: &[u8]) -> Option<Self> {
        let ethertype = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
        let packet = frame.get(14..)?;
        let (source, destination, protocol, segment) = match ethertype {
            0x0800 => ipv4(packet)?,
            0x86dd => ipv6(packet)?,
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes([*segment.get(at)?, *segment.get(at + 1)?]));
        let source = SocketAddr::new(source, port(0)?);
        let destination = SocketAddr::new(destination, port(2)?);
        match protocol {
            6 => {
                let sequence = u32::from_be_bytes(segment.get(4..8)?.try_into().ok()?);
                let header = usize::from(segment.get(12)? >> 4) * 4;
                let payload = segment.get(header..)?.to_vec();
                Some(Self { tcp: true, source, destination, sequence, payload })
            }
            17 => {
                let payload = segment.get(8..)?.to_vec();
                Some(Self { tcp: false, source, destination, sequence: 0, payload })
            }
            _ => None,
        }
    }
}

type Parts<'a> = (IpAddr, IpAddr, u8, &'a [u8]);

fn ipv4(packet: &[u8]) -> Option<Parts<'_>> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    let destination: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    // A short frame is padded to 60 bytes, and a total length of 0 stands for one above 65,535.
    let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
    Some((source.into(), destination.into(), *packet.get(9)?, packet.get(header..end)?))
}

fn ipv6(packet: &[u8]) -> Option<Parts<'_>> {
    let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
    let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
    let destination: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
    let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
    Some((source.into(), destination.into(), *packet.get(6)?, packet.get(40..end)?))
}

/// Reads one link until the capture is stopped and the socket is empty.
fn take(socket: &OwnedFd, stop: &AtomicBool, limit: usize) -> Taken {
    let mut taken = Taken::default();
    let mut buffer = vec![0; LARGEST_FRAME];
    loop {
        // Read before the socket, so that what was sent before the stop is still taken.
        let stopping = stop.load(Ordering::Acquire);
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) if taken.bytes + length <= limit => {
                taken.bytes += length;
                taken.frames.push(buffer.get(..length).unwrap_or_default().to_vec());
            }
            Ok(_) => taken.dropped += 1,
            Err(Errno::EAGAIN) if stopping => break,
            Err(Errno::EAGAIN) => {
                let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                // After EINTR, the loop continues.
                poll(&mut ready, PollTimeout::from(20_u8)).ok();
            }
            Err(Errno::EINTR) => {}
            Err(errno) => {
                taken.failure = Some(errno.to_string());
                break;
            }
        }
    }
    match lost(socket) {
        Ok(lost) => taken.dropped += u64::from(lost),
        Err(error) => taken.failure = Some(error.to_string()),
    }
    taken
}

#[allow(unsafe_code, reason = "packet sockets have no safe binding for sockaddr_ll and their options")]
fn listen_on(link: u32) -> io::Result<OwnedFd> {
    let protocol = i32::from(u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?.to_be());
    // SAFETY: socket(2) with constant arguments; the result is checked before it is owned.
    let socket = unsafe {
        // Protocol 0: nothing is delivered until the socket is bound to one link.
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // Refused without privilege in the first user namespace; the smaller buffer shows in `dropped` if at all.
    setsockopt(&socket, sockopt::RcvBufForce, &KERNEL_BUFFER).ok();
    let incoming_only: libc::c_int = 1;
    // SAFETY: the pointer and the length describe one live c_int.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            std::ptr::from_ref(&incoming_only).cast(),
            size_of_option(&incoming_only),
        )
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: sockaddr_ll is plain data for which all zeroes is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    address.sll_protocol = u16::try_from(protocol).map_err(io::Error::other)?;
    address.sll_ifindex = i32::try_from(link).map_err(io::Error::other)?;
    // SAFETY: the pointer and the length describe one live sockaddr_ll.
    let bound = unsafe {
        libc::bind(socket.as_raw_fd(), std::ptr::from_ref(&address).cast(), size_of_option(&address))
    };
    if bound < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

/// Frames that the kernel dropped since the socket was opened.
#[allow(unsafe_code, reason = "PACKET_STATISTICS has no safe binding")]
fn lost(socket: &OwnedFd) -> io::Result<u32> {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of_option(&statistics);
    // SAFETY: the pointer and the length describe one live tpacket_stats, which the kernel fills.
    let read = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            std::ptr::from_mut(&mut statistics).cast(),
            &raw mut length,
        )
    };
    if read < 0 { Err(io::Error::last_os_error()) } else { Ok(statistics.tp_drops) }
}

/// Length of a socket option or address as the kernel takes it; all of them are a few bytes.
fn size_of_option<T>(_: &T) -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or(libc::socklen_t::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(sequence: u32, payload: &[u8]) -> Packet {
        Packet {
            tcp: true,
            source: "10.0.0.1:1000".parse().expect("a valid address"),
            destination: "10.0.0.2:80".parse().expect("a valid address"),
            sequence,
            payload: payload.to_vec(),
        }
    }

    fn captured(packets: Vec<Packet>) -> Captured {
        Captured { packets, dropped: 0, others: 0 }
    }

    #[test]
    fn text_is_found_across_reordered_and_repeated_segments() {
        let packets =
            vec![segment(u32::MAX - 1, b"se"), segment(2, b"et"), segment(0, b"cr"), segment(0, b"cr")];
        assert_eq!(captured(packets).find(b"secret").len(), 1);
    }

    #[test]
    fn text_split_over_two_flows_is_not_found() {
        let mut other = segment(4, b"ret");
        other.source.set_port(1001);
        assert!(captured(vec![segment(1, b"sec"), other]).find(b"secret").is_empty());
    }

    #[test]
    fn padding_of_a_short_frame_is_not_payload() {
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14] = 0x45;
        frame[16..18].copy_from_slice(&41_u16.to_be_bytes());
        frame[23] = 6;
        frame[26..30].copy_from_slice(&[10, 0, 0, 1]);
        frame[30..34].copy_from_slice(&[10, 0, 0, 2]);
        frame[34..38].copy_from_slice(&[0, 80, 31, 144]);
        frame[46] = 0x50;
        frame[54] = b'x';
        let packet = Packet::parse(&frame).expect("a complete frame");
        assert_eq!(packet.payload, b"x");
        assert_eq!(packet.source, "10.0.0.1:80".parse().expect("a valid address"));
        assert_eq!(packet.destination.port(), 8080);
    }

    #[test]
    fn a_truncated_frame_is_no_packet() {
        for length in 0..50 {
            let mut frame = vec![0x45; length];
            if let Some(ethertype) = frame.get_mut(12..14) {
                ethertype.copy_from_slice(&[0x08, 0x00]);
            }
            assert!(Packet::parse(&frame).is_none_or(|packet| packet.payload.len() <= length));
        }
    }
}
