//! PROXY protocol v2 header of an application tunnel (HBONE contract).
//!
//! Written once, before the first byte to an application that asked for it. Ambit never reads one.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The header's first twelve bytes (PROXY protocol specification, section 2.2).
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// The TLV that carries the client's SPIFFE id (HBONE contract).
const TLV_PEER_IDENTITY: u8 = 0xD0;

/// Encodes the header: `source` is the client's address, `destination` the HBONE target, `identity`
/// the client's SPIFFE id if it is known.
///
/// Addresses of different families are both written as IPv6, the IPv4 one mapped (RFC 4291, 2.5.5.2):
/// the header has one family for both. An identity longer than 65,000 bytes is left out; certificates
/// that long are refused before.
pub fn header(source: SocketAddr, destination: SocketAddr, identity: Option<&str>) -> Vec<u8> {
    let identity = identity.filter(|id| id.len() <= 65_000);
    let mut body = Vec::with_capacity(36 + identity.map_or(0, |id| id.len() + 3));
    let family = match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            body.extend_from_slice(&source.octets());
            body.extend_from_slice(&destination.octets());
            TCP_OVER_IPV4
        }
        (source, destination) => {
            body.extend_from_slice(&as_v6(source).octets());
            body.extend_from_slice(&as_v6(destination).octets());
            TCP_OVER_IPV6
        }
    };
    body.extend_from_slice(&source.port().to_be_bytes());
    body.extend_from_slice(&destination.port().to_be_bytes());
    if let Some(identity) = identity {
        body.push(TLV_PEER_IDENTITY);
        body.extend_from_slice(&length(identity.len()));
        body.extend_from_slice(identity.as_bytes());
    }
    let mut header = Vec::with_capacity(16 + body.len());
    header.extend_from_slice(&SIGNATURE);
    header.extend_from_slice(&[VERSION_PROXY, family]);
    header.extend_from_slice(&length(body.len()));
    header.append(&mut body);
    header
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

fn length(n: usize) -> [u8; 2] {
    u16::try_from(n).unwrap_or(u16::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_header_is_byte_for_byte_what_the_specification_says() {
        let header = header(
            "10.0.0.1:4660".parse().unwrap(),
            "10.0.0.2:80".parse().unwrap(),
            Some("spiffe://td/ns/a/sa/b"),
        );
        let mut expected = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\x00\x24".to_vec();
        expected.extend_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2, 0x12, 0x34, 0, 80]);
        expected.extend_from_slice(b"\xD0\x00\x15spiffe://td/ns/a/sa/b");
        assert_eq!(header, expected);
    }

    #[test]
    fn mixed_families_are_written_as_ipv6() {
        let header = header("10.0.0.1:1".parse().unwrap(), "[fd00::2]:2".parse().unwrap(), None);
        assert_eq!(header[13], TCP_OVER_IPV6);
        assert_eq!(&header[14..16], &[0, 36]);
        assert_eq!(&header[16..32], &"::ffff:10.0.0.1".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(header.len(), 52);
    }
}
