//! The hash of a request for consistent hashing, and the cookie that keeps a client on its endpoint.

use std::net::IpAddr;
use std::time::Duration;

use ambit_balance::hash;
use http::header::COOKIE;
use http::request::Parts;
use http::{HeaderMap, HeaderValue};

use crate::backend_policies::HashKey;

/// What a request hashes to.
#[derive(Debug, Default)]
pub struct Hashed {
    /// The hash; `None`: the request has nothing to hash, and any endpoint will do.
    pub key: Option<u64>,
    /// A `Set-Cookie` for the answer.
    pub cookie: Option<HeaderValue>,
}

/// Hashes a request of the client at `source`; `random` makes the value of a new cookie.
pub fn of_request(by: &HashKey, parts: &Parts, source: IpAddr, random: impl FnOnce() -> u64) -> Hashed {
    let known = |key: Option<u64>| Hashed { key, cookie: None };
    match by {
        HashKey::SourceIp => known(Some(of_address(source))),
        HashKey::Header(name) => {
            let values = parts.headers.get_all(name).iter().map(HeaderValue::as_bytes);
            known(values.map(hash).reduce(|one, next| one.rotate_left(1) ^ next))
        }
        HashKey::Query(name) => {
            let query = parts.uri.query().unwrap_or_default();
            let value = form_urlencoded::parse(query.as_bytes()).find(|(known, _)| **known == **name);
            known(value.map(|(_, value)| hash(value.as_bytes())))
        }
        HashKey::Cookie { name, path, lifetime } => match (cookies(&parts.headers, name).next(), lifetime) {
            (Some(value), _) => known(Some(hash(value.as_bytes()))),
            (None, None) => Hashed::default(),
            (None, Some(lifetime)) => {
                let value = format!("{:016x}", random());
                Hashed {
                    key: Some(hash(value.as_bytes())),
                    cookie: set_cookie(name, &value, path, *lifetime),
                }
            }
        },
    }
}

/// The hash of a client's address.
pub fn of_address(source: IpAddr) -> u64 {
    match source.to_canonical() {
        IpAddr::V4(v4) => hash(&v4.octets()),
        IpAddr::V6(v6) => hash(&v6.octets()),
    }
}

/// The values of a cookie. RFC 6265 §5.4: one or more lines of `name=value`, separated by semicolons.
pub fn cookies<'p>(headers: &'p HeaderMap, name: &'p str) -> impl Iterator<Item = &'p str> {
    let lines = headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
    let pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.split_once('='));
    pairs.filter(move |(known, _)| known.trim() == name).map(|(_, value)| value.trim().trim_matches('"'))
}

/// RFC 6265 §4.1. `None` if the name or path can't be in a header.
fn set_cookie(name: &str, value: &str, path: &str, lifetime: Duration) -> Option<HeaderValue> {
    let mut text = format!("{name}={value}");
    if !lifetime.is_zero() {
        text.push_str(&format!("; Max-Age={}", lifetime.as_secs()));
    }
    if !path.is_empty() {
        text.push_str(&format!("; Path={path}"));
    }
    text.push_str("; HttpOnly");
    HeaderValue::try_from(text).ok()
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn hashed(by: &HashKey, uri: &str, headers: &[(&str, &str)]) -> Hashed {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        of_request(by, &parts, [10, 0, 0, 1].into(), || 7)
    }

    #[test]
    fn a_request_is_hashed_by_what_the_policy_names() {
        let header = HashKey::Header("x-user".parse().unwrap());
        assert_eq!(hashed(&header, "/", &[("x-user", "a")]).key, Some(hash(b"a")));
        assert_eq!(hashed(&header, "/", &[]).key, None);
        let query = HashKey::Query("user".into());
        assert_eq!(hashed(&query, "/?b=1&user=a%20b", &[]).key, Some(hash(b"a b")));
        assert_eq!(hashed(&query, "/?b=1", &[]).key, None);
        assert_eq!(hashed(&HashKey::SourceIp, "/", &[]).key, Some(hash(&[10, 0, 0, 1])));
    }

    #[test]
    fn a_client_without_cookie_gets_one_that_leads_to_the_same_endpoint() {
        let by = |lifetime| HashKey::Cookie { name: "user".into(), path: "/".into(), lifetime };
        let hour = Some(Duration::from_secs(3600));
        let first = hashed(&by(hour), "/", &[]);
        let cookie = first.cookie.unwrap();
        assert_eq!(cookie, "user=0000000000000007; Max-Age=3600; Path=/; HttpOnly");
        let next = hashed(&by(hour), "/", &[("cookie", "a=b; user=0000000000000007")]);
        assert_eq!((next.key, next.cookie), (first.key, None));
        let session = hashed(&by(Some(Duration::ZERO)), "/", &[]).cookie.unwrap();
        assert_eq!(session, "user=0000000000000007; Path=/; HttpOnly");
        assert!(hashed(&by(None), "/", &[]).cookie.is_none());
    }
}
