//! Step 3: a request is brought into the one form that is matched, authorized and forwarded. Pure, before any decision.

use std::net::IpAddr;

use ambit_identity::SpiffeId;
use ambit_policy::{hides_dots, normal_path};
use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, SEC_WEBSOCKET_KEY, TE,
    TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, Version};
use hyper::ext::Protocol;

use crate::failure::Failure;
use crate::trusted_proxies::{FirstClient, TrustedProxies};

/// Fields of one hop, beside those that `Connection` names (RFC 9110 §7.6.1).
const HOP_BY_HOP: [HeaderName; 5] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TRANSFER_ENCODING,
    UPGRADE,
];
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Envoy's name for the address of the first client.
const X_ENVOY_EXTERNAL_ADDRESS: HeaderName = HeaderName::from_static("x-envoy-external-address");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const XFCC: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// What a request is completed with, and whose claims count.
#[derive(Debug, Clone, Copy)]
pub struct Claims<'a> {
    /// The client.
    pub client: IpAddr,
    /// Its address, as [`address_value`] makes it.
    pub forwarded_for: &'a HeaderValue,
    /// Whether what it says of other clients is kept.
    pub trusted: bool,
    /// At a gateway: the proxies in front of it that are believed, instead of `trusted`.
    pub proxies: Option<&'a TrustedProxies>,
    /// Whether the client speaks TLS, which ends here.
    pub ends_tls: bool,
    /// The host of requests that may name none.
    pub default_host: &'a str,
    /// Longest target, in bytes.
    pub target_size: usize,
}

/// What was found out about a request.
#[derive(Debug, Clone)]
pub struct Sane {
    /// The authority that was asked for, as the client wrote it.
    pub authority: Box<str>,
    /// The host in lower case, without port, brackets or a dot at its end.
    pub host: Box<str>,
    /// What the client wants to change to (RFC 9110 §7.8).
    pub upgrade: Option<HeaderValue>,
    /// The version that the client speaks.
    pub version: Version,
    /// Whether it is a gRPC call.
    pub grpc: bool,
    /// `http`, or what a trusted proxy in front says.
    pub scheme: &'static str,
    /// The address of the first client: the client's own, or what trusted proxies in front say. `None` where that can't be read.
    pub remote: Option<IpAddr>,
}

/// Brings a request into its one form. The URI is left with the normalised path and query only, and there is no `Host`.
///
/// # Errors
/// [`Failure`]: what can't be brought into that form.
pub fn sanitise(parts: &mut Parts, claims: &Claims<'_>) -> Result<Sane, Failure> {
    let extended = extended_connect(parts)?;
    let authority = authority(parts, claims)?;
    let host = host_of(&authority).ok_or(Failure::Malformed("the host is none"))?;
    one_length(&parts.headers)?;
    known_coding(&parts.headers)?;
    let path = normalised(&parts.uri, &parts.method)?;
    if path.as_str().len() > claims.target_size {
        return Err(Failure::TargetTooLong);
    }
    let upgrade = match parts.version {
        Version::HTTP_11 => wanted_upgrade(&parts.headers),
        // RFC 9113 §8.6: there is no Upgrade in HTTP/2; HTTP/1.0 ignores it (RFC 9110 §7.8).
        _ => extended,
    };
    let upgrade = without_http(upgrade, parts.version)?;
    parts.headers.remove(HTTP2_SETTINGS);
    let is_believed = claims.proxies.map_or(claims.trusted, |proxies| proxies.believes(claims.client));
    if is_believed && parts.headers.get_all(X_FORWARDED_FOR).iter().any(|line| line.to_str().is_err()) {
        return Err(Failure::Malformed("X-Forwarded-For is no text"));
    }
    let trailers = accepts_trailers(&parts.headers);
    remove_hop_by_hop(&mut parts.headers)?;
    // RFC 9110 §10.1.1: the client is asked for its body here, as soon as it is wanted.
    if parts.headers.get(EXPECT).is_some_and(|wanted| wanted.as_bytes().eq_ignore_ascii_case(b"100-continue"))
    {
        parts.headers.remove(EXPECT);
    }
    if trailers {
        parts.headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    let (scheme, remote) = forwarding_headers(&mut parts.headers, claims);
    parts.uri = path.into();
    let content_type = parts.headers.get(http::header::CONTENT_TYPE);
    let grpc = content_type.is_some_and(|value| is_grpc(value.as_bytes()));
    Ok(Sane { authority, host, upgrade, version: parts.version, grpc, scheme, remote })
}

/// RFC 8441: in HTTP/2 a change of protocol is a CONNECT with `:protocol`. It is sent on as HTTP/1's upgrade, a GET.
///
/// # Errors
/// A CONNECT without a protocol: it asks for a tunnel to anywhere.
fn extended_connect(parts: &mut Parts) -> Result<Option<HeaderValue>, Failure> {
    if parts.method != Method::CONNECT {
        return Ok(None);
    }
    let protocol = parts.extensions.remove::<Protocol>();
    let protocol = protocol.filter(|_| parts.version == Version::HTTP_2);
    let protocol = protocol.ok_or(Failure::Method(Method::CONNECT))?;
    parts.method = Method::GET;
    if protocol.as_str().eq_ignore_ascii_case("websocket")
        && let Ok(key) = HeaderValue::try_from(websocket_key(rand::random()))
    {
        parts.headers.insert(SEC_WEBSOCKET_KEY, key);
    }
    HeaderValue::try_from(protocol.as_str())
        .map(Some)
        .map_err(|_| Failure::Malformed("the protocol of CONNECT is no text"))
}

/// RFC 6455 §4.1: 16 random bytes in base64. RFC 8441 §5: requests in HTTP/2 bring none.
fn websocket_key(random: u128) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let letter = |bits: u128| LETTERS.get((bits & 0x3f) as usize).copied().map_or('A', char::from);
    // 21 letters of six bits, then one of the last two bits.
    let mut key: String = (0..21).map(|at| letter(random >> (122 - 6 * at))).collect();
    key.push(letter((random & 0x3) << 4));
    key.push_str("==");
    key
}

/// `application/grpc`, alone or with a suffix; not gRPC-web, whose status is in the body.
pub fn is_grpc(content_type: &[u8]) -> bool {
    let Some(rest) = content_type.strip_prefix(b"application/grpc") else { return false };
    matches!(rest.first(), None | Some(b'+' | b';'))
}

fn authority(parts: &mut Parts, claims: &Claims<'_>) -> Result<Box<str>, Failure> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let host = hosts.next().cloned();
    if hosts.next().is_some() {
        return Err(Failure::Malformed("several Host fields"));
    }
    let of_uri = parts.uri.authority().map(|authority| authority.as_str().to_owned());
    parts.headers.remove(HOST);
    let host = host.map(|host| host.to_str().map(str::to_owned)).transpose();
    let host = host.map_err(|_| Failure::Malformed("Host is no text"))?.filter(|host| !host.is_empty());
    let authority = match (of_uri, host, parts.version) {
        // RFC 9113 §8.3.1: they must not differ. RFC 9112 §3.2.2: in HTTP/1.1 the target's wins.
        (Some(authority), Some(host), Version::HTTP_2) if !authority.eq_ignore_ascii_case(&host) => {
            return Err(Failure::Malformed("Host and :authority differ"));
        }
        (Some(authority), _, _) => authority,
        (None, Some(host), _) => host,
        (None, None, Version::HTTP_10) => claims.default_host.to_owned(),
        (None, None, _) => return Err(Failure::Malformed("no host")),
    };
    // RFC 9110 §4.2.4: user information in it is an error.
    if authority.contains('@') || authority.bytes().any(|byte| byte.is_ascii_control() || byte == b' ') {
        return Err(Failure::Malformed("the host is none"));
    }
    Ok(authority.into())
}

/// The host of an authority in lower case, without port, brackets or a dot at its end.
fn host_of(authority: &str) -> Option<Box<str>> {
    let parsed = http::uri::Authority::try_from(authority).ok()?;
    let host = parsed.host();
    // RFC 3986 §3.2.3: a port is digits. The parser takes other text for one too.
    let rest = authority.strip_prefix(host)?;
    let is_port = |port: &str| {
        port.is_empty() || port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok()
    };
    if !(rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port)) {
        return None;
    }
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let host = host.strip_suffix('.').unwrap_or(host);
    (!host.is_empty() && !host.ends_with('.')).then(|| host.to_ascii_lowercase().into())
}

/// RFC 9110 §8.6: several lengths that differ are an error; hyper checks it in HTTP/1, not in HTTP/2.
fn one_length(headers: &HeaderMap) -> Result<(), Failure> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let Some(first) = lengths.next() else { return Ok(()) };
    let differs = lengths.any(|other| other != first);
    if differs || !first.as_bytes().iter().all(u8::is_ascii_digit) || first.is_empty() {
        return Err(Failure::Malformed("Content-Length is no single number"));
    }
    Ok(())
}

/// RFC 9112 §6.1: a body in a transfer coding that is not known is answered with 501, and §7.1: chunked is applied once only. hyper looks
/// at the last coding, and the field is not sent on: the endpoint would take what is coded for the content.
fn known_coding(headers: &HeaderMap) -> Result<(), Failure> {
    if !headers.contains_key(TRANSFER_ENCODING) {
        return Ok(());
    }
    let is_text = headers.get_all(TRANSFER_ENCODING).iter().all(|line| line.to_str().is_ok());
    let mut codings = tokens(headers, &TRANSFER_ENCODING);
    let is_chunked = codings.next().is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
    match is_text && is_chunked && codings.next().is_none() {
        true => Ok(()),
        false => Err(Failure::TransferCoding),
    }
}

/// A change to HTTP/2 or TLS would let requests pass unread, without a policy asked: in HTTP/1 it is ignored (RFC 9110 §7.8).
///
/// # Errors
/// The same in an extended CONNECT, which can't be ignored.
fn without_http(upgrade: Option<HeaderValue>, version: Version) -> Result<Option<HeaderValue>, Failure> {
    match upgrade {
        Some(protocols) if carries_http(&protocols) => match version {
            Version::HTTP_2 => Err(Failure::Method(Method::CONNECT)),
            _ => Ok(None),
        },
        upgrade => Ok(upgrade),
    }
}

/// Whether one of the listed protocols is HTTP, or TLS, in which it may be hidden; also where the list is no text.
fn carries_http(protocols: &HeaderValue) -> bool {
    let is_http = |protocol: &str| {
        let name = protocol.split('/').next().unwrap_or_default().trim();
        ["h2c", "h2", "http", "tls"].iter().any(|known| name.eq_ignore_ascii_case(known))
    };
    protocols.to_str().map_or(true, |list| list.split(',').any(is_http))
}

fn wanted_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asks = tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    headers.get(UPGRADE).filter(|_| asks).cloned()
}

/// RFC 9110 §10.1.4: of `TE` only `trailers` concerns more than one hop's coding.
fn accepts_trailers(headers: &HeaderMap) -> bool {
    tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"))
}

/// The items of a list over all lines of a field; lines that are no text are left out.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> + use<'a> {
    let lines = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

/// Removes what concerns one hop only, over all lines of `Connection`.
///
/// # Errors
/// `Connection` is no text.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) -> Result<(), Failure> {
    if headers.get_all(CONNECTION).iter().any(|value| value.to_str().is_err()) {
        return Err(Failure::Malformed("Connection is no text"));
    }
    let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
        .filter_map(|token| HeaderName::from_bytes(token.as_bytes()).ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    headers.remove(TE);
    Ok(())
}

/// Says for whom the request is sent on; returns the scheme that the client used, and the address of the first client.
fn forwarding_headers(headers: &mut HeaderMap, claims: &Claims<'_>) -> (&'static str, Option<IpAddr>) {
    // Never believed from outside: it would be a certificate that nobody has seen.
    headers.remove(XFCC);
    let is_believed = claims.proxies.map_or(claims.trusted, |proxies| proxies.believes(claims.client));
    if !is_believed {
        headers.remove(X_FORWARDED_FOR);
        headers.remove(X_FORWARDED_PROTO);
    }
    // At a gateway nobody can say how much of it proxies have written.
    if !is_believed || claims.proxies.is_some() {
        headers.remove(FORWARDED);
        headers.remove(X_ENVOY_EXTERNAL_ADDRESS);
    }
    let before: Vec<&str> = tokens(headers, &X_FORWARDED_FOR).collect();
    let (remote, kept) = match claims.proxies {
        // What comes before the first client is that one's own claim.
        Some(proxies) => {
            let FirstClient { address, believed } = proxies.first_client(claims.client, &before);
            (Some(address), before.len().saturating_sub(believed))
        }
        // A forwarder's last entry is its own client.
        None => (before.last().map_or(Some(claims.client), |entry| entry.parse().ok()), 0),
    };
    let mut chain = String::new();
    for before in before.into_iter().skip(kept) {
        chain.push_str(before);
        chain.push_str(", ");
    }
    let chain = match chain.is_empty() {
        true => Ok(claims.forwarded_for.clone()),
        false => HeaderValue::try_from(chain + claims.forwarded_for.to_str().unwrap_or_default()),
    };
    if let Ok(chain) = chain {
        headers.insert(X_FORWARDED_FOR, chain);
    }
    if let (Some(_), Some(remote)) = (claims.proxies, remote)
        && let Ok(remote) = HeaderValue::try_from(remote.to_string())
    {
        headers.insert(X_ENVOY_EXTERNAL_ADDRESS, remote);
    }
    let claimed = headers.get(X_FORWARDED_PROTO).is_some_and(|value| value.as_bytes() == b"https");
    let secure = claims.ends_tls || claimed;
    let scheme = if secure { "https" } else { "http" };
    headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(scheme));
    if !headers.contains_key(X_REQUEST_ID)
        && let Ok(id) = HeaderValue::from_bytes(&request_id(rand::random()))
    {
        headers.insert(X_REQUEST_ID, id);
    }
    (scheme, remote)
}

/// Says to the endpoint who the client is, in the form of Envoy: the proxy's own identity, and the client's.
pub fn forward_identity(headers: &mut HeaderMap, own: &SpiffeId, client: &SpiffeId) {
    if let Ok(certificate) = HeaderValue::try_from(format!("By={own};URI={client}")) {
        headers.insert(XFCC, certificate);
    }
}

/// A client's address as a value of `X-Forwarded-For`.
pub fn address_value(address: IpAddr) -> HeaderValue {
    // Digits, dots, letters and colons are always a value.
    HeaderValue::try_from(address.to_string()).unwrap_or(HeaderValue::from_static("unknown"))
}

/// RFC 9562 §5.4: a UUID of random bits.
fn request_id(random: u128) -> [u8; 36] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut bits = random & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let mut text = [b'-'; 36];
    let digits = text.iter_mut().enumerate().filter(|(at, _)| !matches!(at, 8 | 13 | 18 | 23));
    for (_, place) in digits {
        // From the first digit to the last one.
        bits = bits.rotate_left(4);
        *place = DIGITS.get((bits & 0xf) as usize).copied().unwrap_or(b'0');
    }
    text
}

/// The path in normal form, with the query as it is.
fn normalised(uri: &http::Uri, method: &Method) -> Result<PathAndQuery, Failure> {
    let (path, query) = (uri.path(), uri.query());
    if path == "*" && *method == Method::OPTIONS {
        return Ok(PathAndQuery::from_static("*"));
    }
    let wrong = Failure::Malformed("the path can't be normalised");
    if path.is_empty() {
        return Ok(match query {
            Some(query) => PathAndQuery::try_from(format!("/?{query}")).map_err(|_| wrong)?,
            None => PathAndQuery::from_static("/"),
        });
    }
    if is_normal(path) {
        return uri.path_and_query().cloned().ok_or(wrong);
    }
    let path = normal_path(path).ok_or(wrong.clone())?;
    let text = match query {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    PathAndQuery::try_from(text).map_err(|_| wrong)
}

/// Whether nothing is to be done, as with nearly all paths.
fn is_normal(path: &str) -> bool {
    let dots = || path.split('/').any(|segment| matches!(segment, "." | "..") || hides_dots(segment));
    path.starts_with('/')
        && !path.contains("//")
        && path.bytes().all(|byte| byte.is_ascii() && !b"%\\\"^{|}".contains(&byte))
        && (!path.contains("/.") || !dots())
}

#[cfg(test)]
#[path = "sanitise_tests.rs"]
mod tests;
