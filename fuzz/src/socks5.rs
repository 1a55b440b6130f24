//! The SOCKS5 handshake, beside a reading of RFC 1928 without a stream.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use futures_util::FutureExt;
use tokio::io::{AsyncReadExt, join};
use ztunnel::outbound::socks5::{Target, accept};

/// The target is the one that was asked for; nothing behind the request is taken.
pub(crate) fn handshake(data: &[u8]) {
    let mut stream = join(data, Vec::new());
    let result = accept(&mut stream).now_or_never().expect("nothing to wait for");
    let (mut left, answered) = stream.into_inner();
    match read(data) {
        Some((target, length)) => {
            assert_eq!(result.expect("a target"), target);
            assert_eq!(answered, [5, 0]);
            let mut rest = Vec::new();
            left.read_to_end(&mut rest).now_or_never().expect("nothing to wait for").expect("bytes");
            assert_eq!(rest, &data[length..]);
        }
        None => {
            assert!(result.is_err(), "{result:?}");
            assert!(answered.len() <= 12 && answered.first().is_none_or(|version| *version == 5));
        }
    }
}

/// RFC 1928, sections 3 to 5: the target of a CONNECT without authentication, and the length of what asks for it.
fn read(data: &[u8]) -> Option<(Target, usize)> {
    let methods = usize::from(*data.get(1)?);
    if data[0] != 5 || !data.get(2..2 + methods)?.contains(&0) {
        return None;
    }
    let request = &data[2 + methods..];
    let (&[5, 1, _, kind], rest) = request.split_first_chunk::<4>()? else { return None };
    let (host, after) = match kind {
        1 => rest.split_at_checked(4)?,
        4 => rest.split_at_checked(16)?,
        3 => rest.get(1..)?.split_at_checked(usize::from(rest[0]))?,
        _ => return None,
    };
    let port = u16::from_be_bytes(*after.first_chunk::<2>()?);
    let length = data.len() - after.len() + 2;
    let ip: IpAddr = match kind {
        1 => Ipv4Addr::from(<[u8; 4]>::try_from(host).unwrap()).into(),
        4 => Ipv6Addr::from(<[u8; 16]>::try_from(host).unwrap()).to_canonical(),
        _ => {
            let name = String::from_utf8(host.to_vec()).ok()?;
            match name.parse::<IpAddr>() {
                Ok(ip) => ip.to_canonical(),
                Err(_) => return Some((Target::Name(name, port), length)),
            }
        }
    };
    Some((Target::Address(SocketAddr::new(ip, port)), length))
}
