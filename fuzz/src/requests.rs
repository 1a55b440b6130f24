//! What a waypoint reads of a client: the first bytes, a request's head, and routes and policies over such a head.

use std::net::{IpAddr, Ipv4Addr};

use ambit_api::{l7, security};
use ambit_policy::{
    Action, Content, HttpRequest, Peer, Policy, Request as Connection, evaluate_http, normal_path,
};
use ambit_route::filter::{Filter, Origin};
use ambit_route::{Backends, RequestHead, Table};
use ambit_waypoint::protocol::{Spoken, classify};
use ambit_waypoint::sanitise::{Claims, Sane, sanitise};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, Uri, Version};
use hyper::ext::Protocol;
use prost::Message;

use crate::pieces::cut;

pub(crate) const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3));
/// The service that routes are looked up for.
pub(crate) const SERVICE: (&str, &str) = ("shop", "web.shop.svc.cluster.local");
/// Longest target that is let through.
const TARGET_SIZE: usize = 8192;
/// What a request may not keep: it concerns one hop, or is a claim of the client.
const REMOVED: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "x-forwarded-client-cert",
    "host",
];

/// A head as lines: the version, the method, the target, and headers as `name: value`.
fn head(data: &[u8]) -> Option<Parts> {
    let mut lines = data.split(|byte| *byte == b'\n');
    let mut request = Request::new(());
    let version = lines.next()?;
    *request.version_mut() = match version {
        b"0" => Version::HTTP_10,
        b"2" | b"websocket" => Version::HTTP_2,
        _ => Version::HTTP_11,
    };
    if version == b"websocket" {
        request.extensions_mut().insert(Protocol::from_static("websocket"));
    }
    *request.method_mut() = Method::from_bytes(lines.next()?).ok()?;
    *request.uri_mut() = Uri::try_from(lines.next()?).ok()?;
    for line in lines {
        let at = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..at]).ok()?;
        let value = HeaderValue::from_bytes(line[at + 1..].trim_ascii()).ok()?;
        request.headers_mut().try_append(name, value).ok()?;
    }
    Some(request.into_parts().0)
}

fn claims(trusted: bool) -> Claims<'static> {
    static FORWARDED: HeaderValue = HeaderValue::from_static("10.1.2.3");
    Claims {
        client: CLIENT,
        forwarded_for: &FORWARDED,
        trusted,
        proxies: None,
        ends_tls: false,
        default_host: "web.shop.svc",
        target_size: TARGET_SIZE,
    }
}

/// A head and the form that it was brought into.
pub(crate) fn sane(data: &[u8], trusted: bool) -> Option<(Sane, Parts)> {
    let mut parts = head(data)?;
    let sane = sanitise(&mut parts, &claims(trusted)).ok()?;
    Some((sane, parts))
}

/// The form of a request is one: to bring it into that form again changes nothing that routes and policies see.
pub(crate) fn request(data: &[u8]) {
    for trusted in [false, true] {
        let Some((sane, parts)) = sane(data, trusted) else { continue };
        is_sane(&sane, &parts);
        let mut again = parts.clone();
        again.headers.insert("host", HeaderValue::try_from(&*sane.authority).expect("a host is a value"));
        let twice = sanitise(&mut again, &claims(trusted)).expect("a sane request");
        assert_eq!(again.uri, parts.uri);
        assert_eq!((twice.authority, twice.host, twice.grpc), (sane.authority, sane.host, sane.grpc));
    }
}

fn is_sane(sane: &Sane, parts: &Parts) {
    assert!(parts.uri.scheme().is_none() && parts.uri.authority().is_none(), "{}", parts.uri);
    assert_ne!(parts.method, Method::CONNECT);
    assert!(
        !sane.host.is_empty() && !sane.host.bytes().any(|byte| byte.is_ascii_uppercase()),
        "{}",
        sane.host
    );
    assert!(parts.uri.path().len() <= TARGET_SIZE);
    if parts.uri.path() != "*" {
        is_normal(parts.uri.path());
    }
    for name in REMOVED {
        assert!(!parts.headers.contains_key(name), "{name} is left");
    }
    let te: Vec<_> = parts.headers.get_all("te").iter().collect();
    assert!(te.is_empty() || te == ["trailers"], "{te:?}");
    assert!(parts.headers.get_all("content-length").iter().count() <= 1);
    assert!(parts.headers.contains_key("x-request-id"));
}

/// A normal path has no second form: no dot segments, no empty ones, no escapes of plain letters.
fn is_normal(path: &str) {
    assert_eq!(normal_path(path).as_deref(), Some(path));
    assert!(path.starts_with('/') && !path.contains("//") && !path.contains(['\\', '\0']), "{path}");
    assert!(!path.split('/').any(|segment| matches!(segment, "." | "..")), "{path}");
    let lower = path.to_ascii_lowercase();
    assert!(!lower.contains("%2e") && !lower.contains("%00") && !lower.contains("%41"), "{path}");
}

/// Whatever is normalised is normal.
pub(crate) fn path(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Some(normal) = normal_path(text) {
        is_normal(&normal);
    }
}

/// What is spoken is decided once: more bytes don't change it, and what HTTP was declared for is never passed on unread.
pub(crate) fn sniff(data: &[u8]) {
    for http_declared in [false, true] {
        let mut decided = None;
        for length in 0..=data.len().min(64) {
            let spoken = classify(&data[..length], http_declared);
            if decided.is_some() {
                assert_eq!(spoken, decided, "after {length} bytes");
            }
            decided = spoken;
        }
        assert!(!(http_declared && decided == Some(Spoken::Other)));
        assert!(data.len() < 64 || decided.is_some(), "it waits for ever");
    }
}

/// The head that routes see.
fn request_head<'a>(sane: &'a Sane, parts: &'a Parts) -> RequestHead<'a> {
    RequestHead {
        method: &parts.method,
        host: &sane.host,
        path: parts.uri.path(),
        query: parts.uri.query(),
        headers: &parts.headers,
        scheme: sane.scheme,
        authority: &sane.authority,
        port: 80,
        client_namespace: "shop",
        client_address: CLIENT,
    }
}

/// A route from the wire, over a head: where it is for the service, it answers or leaves the request to the next; its filters can be applied.
pub(crate) fn route(data: &[u8]) {
    let parts = cut(data);
    let Some((bytes, head)) = parts.first().zip(parts.get(1)) else { return };
    let Ok(mut route) = l7::Route::decode(*bytes) else { return };
    let Some((sane, mut parts)) = sane(head, true) else { return };
    for target in &mut route.targets {
        SERVICE.0.clone_into(&mut target.namespace);
        SERVICE.1.clone_into(&mut target.hostname);
    }
    let table = Table::new([&route]);
    let Some(routes) = table.routes(SERVICE.0, SERVICE.1, 80, "shop") else { return };
    let (rule, prefix) = match routes.find(&request_head(&sane, &parts)) {
        Some(matched) => (matched.rule.clone(), matched.prefix),
        None => return,
    };
    assert!(prefix <= parts.uri.path().len());
    each_draw_chooses(&rule.backends);
    for filter in rule.filters.iter() {
        apply(filter, &sane, &mut parts, prefix);
    }
}

/// Every draw below the total of the weights chooses a backend.
pub(crate) fn each_draw_chooses(backends: &Backends) {
    let Some(last) = backends.total().checked_sub(1) else { return };
    for draw in [0, last / 2, last] {
        assert!(backends.choose(draw).is_some(), "{draw} of {last} chooses nothing");
    }
}

fn apply(filter: &Filter, sane: &Sane, parts: &mut Parts, prefix: usize) {
    match filter {
        Filter::RequestHeaders(change) => change.apply(&mut parts.headers),
        Filter::Redirect(redirect) => {
            let origin = Origin {
                scheme: sane.scheme,
                host: &sane.host,
                authority: &sane.authority,
                port: 80,
                path: parts.uri.path(),
                query: parts.uri.query(),
                prefix,
            };
            let _ = redirect.location(&origin);
        }
        Filter::Rewrite(rewrite) => {
            if let Some(Ok(changed)) = rewrite.path_and_query(&parts.uri, prefix) {
                assert!(changed.as_str().starts_with('/'), "{changed}");
            }
        }
        Filter::Cors(cors) => {
            let origin = HeaderValue::from_static("http://a");
            if cors.allows(&origin) {
                cors.preflight(&parts.headers, &origin);
            }
        }
        _ => {}
    }
}

/// A policy from the wire, over a head: what can't be read fails closed, and no DENY is a reason to allow.
pub(crate) fn policy(data: &[u8]) {
    let pieces = cut(data);
    let Some((bytes, head)) = pieces.first().zip(pieces.get(1)) else { return };
    let Ok(source) = security::Authorization::decode(*bytes) else { return };
    let Some((sane, parts)) = sane(head, false) else { return };
    let policy = match Policy::compile_http(&source) {
        Ok(policy) => policy,
        Err(_) => Policy::closed(&source),
    };
    let http = HttpRequest {
        authority: &sane.authority,
        host: &sane.host,
        method: parts.method.as_str(),
        path: parts.uri.path(),
        headers: &parts.headers,
        remote_ip: Some(CLIENT),
        server_name: None,
        token: None,
    };
    let peer = Peer { principal: "cluster.local/ns/shop/sa/cli", namespace: "shop", service_account: "cli" };
    let request = Connection {
        peer: Some(peer),
        source_ip: CLIENT,
        destination_ip: IpAddr::V4(Ipv4Addr::new(10, 9, 9, 9)),
        destination_port: 80,
    };
    for content in [Content::Request(&http), Content::Passed(Some("a.example")), Content::Unread] {
        let verdict = evaluate_http([&policy].into_iter(), &request, content);
        if policy.dry_run() {
            assert!(verdict.allowed(), "a policy that is tried only decides nothing");
            continue;
        }
        let matches = policy.matches_http(&request, content);
        let expected = match policy.action() {
            Action::Allow => matches,
            Action::Deny => !matches,
        };
        assert_eq!(verdict.allowed(), expected);
    }
    let closed = Policy::closed(&source);
    assert!(
        closed.dry_run()
            || !evaluate_http([&closed].into_iter(), &request, Content::Request(&http)).allowed()
    );
}
