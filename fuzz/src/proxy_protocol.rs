//! The PROXY header that an application gets, read by a reader that knows the specification only.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Whatever the addresses and the identity, the header says them.
pub(crate) fn header(data: &[u8]) {
    let Some((flags, rest)) = data.split_first() else { return };
    let Some((numbers, identity)) = rest.split_at_checked(36) else { return };
    let address = |wide: bool, at: usize, port: usize| {
        let bits = u128::from_be_bytes(numbers[at..at + 16].try_into().unwrap());
        let ip: IpAddr =
            if wide { Ipv6Addr::from_bits(bits).into() } else { Ipv4Addr::from_bits(bits as u32).into() };
        SocketAddr::new(ip, u16::from_be_bytes(numbers[port..port + 2].try_into().unwrap()))
    };
    let (source, destination) = (address(flags & 1 != 0, 0, 32), address(flags & 2 != 0, 16, 34));
    let identity = (flags & 4 != 0).then(|| {
        let text = String::from_utf8_lossy(identity);
        // Long enough, now and then, for what does not fit.
        let times = if flags & 8 == 0 { 1 } else { 70_000 / text.len().max(1) };
        text.repeat(times)
    });
    let header = ztunnel::inbound::proxy_protocol::header(source, destination, identity.as_deref());
    let read = read(&header).expect("a header by the specification");
    let canonical = |it: SocketAddr| SocketAddr::new(it.ip().to_canonical(), it.port());
    assert_eq!(canonical(read.0), canonical(source));
    assert_eq!(canonical(read.1), canonical(destination));
    assert_eq!(read.2, identity.filter(|identity| identity.len() <= 65_000).map(String::into_bytes));
}

/// The PROXY protocol, section 2.2, word for word: source, destination and the TLV 0xD0.
fn read(header: &[u8]) -> Option<(SocketAddr, SocketAddr, Option<Vec<u8>>)> {
    let rest = header.strip_prefix(b"\x0D\x0A\x0D\x0A\x00\x0D\x0A\x51\x55\x49\x54\x0A")?;
    let (&[version_command, family, high, low], body) = rest.split_first_chunk::<4>()?;
    if version_command != 0x21 || body.len() != usize::from(u16::from_be_bytes([high, low])) {
        return None;
    }
    let width = match family {
        0x11 => 4,
        0x21 => 16,
        _ => return None,
    };
    let ip = |bytes: &[u8]| -> Option<IpAddr> {
        Some(match <[u8; 4]>::try_from(bytes) {
            Ok(octets) => IpAddr::from(octets),
            Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        })
    };
    let port = |at: usize| Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?));
    let source = SocketAddr::new(ip(body.get(..width)?)?, port(2 * width)?);
    let destination = SocketAddr::new(ip(body.get(width..2 * width)?)?, port(2 * width + 2)?);
    let mut tlvs = body.get(2 * width + 4..)?;
    let mut identity = None;
    while let Some((&[kind, high, low], rest)) = tlvs.split_first_chunk::<3>() {
        let (value, after) = rest.split_at_checked(usize::from(u16::from_be_bytes([high, low])))?;
        if kind == 0xD0 && identity.replace(value.to_vec()).is_some() {
            return None;
        }
        tlvs = after;
    }
    tlvs.is_empty().then_some((source, destination, identity))
}
