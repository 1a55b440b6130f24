//! Each line of "Hardening" that a request's head can break.

use http::{Request, StatusCode};
use proptest::prelude::*;

use super::*;

fn claims(trusted: bool) -> Claims<'static> {
    static CLIENT: HeaderValue = HeaderValue::from_static("10.0.0.1");
    let client = [10, 0, 0, 1].into();
    Claims {
        client,
        forwarded_for: &CLIENT,
        trusted,
        proxies: None,
        ends_tls: false,
        default_host: "svc.example",
        target_size: 100,
    }
}

fn request(version: Version, uri: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::builder().version(version).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn http11(uri: &str, headers: &[(&str, &str)]) -> (Parts, Result<Sane, Failure>) {
    let mut parts = request(Version::HTTP_11, uri, headers);
    let sane = sanitise(&mut parts, &claims(false));
    (parts, sane)
}

fn status(result: Result<Sane, Failure>) -> Option<StatusCode> {
    result.err().map(|failure| failure.status())
}

/// What a request from 10.0.0.1 with these headers says of its client after sanitising: the chain, the scheme, Envoy's header, and the
/// address that policies see.
fn forwarded(claims: &Claims<'_>, headers: &[(&str, &str)]) -> [String; 4] {
    let headers: Vec<_> = headers.iter().copied().chain([("host", "a")]).collect();
    let mut parts = request(Version::HTTP_11, "/", &headers);
    let sane = sanitise(&mut parts, claims).unwrap();
    let text = |name: &str| parts.headers.get(name).map_or("-", |value| value.to_str().unwrap()).to_owned();
    let remote = sane.remote.map_or_else(|| "-".to_owned(), |address| address.to_string());
    [text("x-forwarded-for"), sane.scheme.to_owned(), text("x-envoy-external-address"), remote]
}

const CLAIMED: [(&str, &str); 4] = [
    ("x-forwarded-for", "198.51.100.1, 203.0.113.7"),
    ("x-forwarded-proto", "https"),
    ("x-envoy-external-address", "198.51.100.1"),
    ("forwarded", "for=198.51.100.1"),
];

#[test]
fn a_forwarders_claim_counts_only_if_it_is_trusted() {
    assert_eq!(forwarded(&claims(false), &CLAIMED), ["10.0.0.1", "http", "-", "10.0.0.1"]);
    let chain = "198.51.100.1, 203.0.113.7, 10.0.0.1";
    assert_eq!(forwarded(&claims(true), &CLAIMED), [chain, "https", "198.51.100.1", "203.0.113.7"]);
    assert_eq!(forwarded(&claims(true), &[]), ["10.0.0.1", "http", "-", "10.0.0.1"]);
    let unreadable = [("x-forwarded-for", "unknown")];
    assert_eq!(forwarded(&claims(true), &unreadable), ["unknown, 10.0.0.1", "http", "-", "-"]);
}

#[test]
fn a_gateway_believes_its_trusted_proxies_and_nobody_else() {
    let at_gateway = |hops: u32, networks: &[&str], headers: &[(&str, &str)]| {
        let networks = networks.iter().map(ToString::to_string).collect();
        let source = ambit_api::l7::TrustedProxies { hops, networks, proxy_protocol: false };
        let proxies = TrustedProxies::new(&source);
        forwarded(&Claims { proxies: Some(&proxies), ..claims(false) }, headers)
    };
    let own = ["10.0.0.1", "http", "10.0.0.1", "10.0.0.1"];
    assert_eq!(at_gateway(0, &[], &CLAIMED), own);
    // What comes before the first client is its own claim.
    let first = ["203.0.113.7, 10.0.0.1", "https", "203.0.113.7", "203.0.113.7"];
    assert_eq!(at_gateway(1, &[], &CLAIMED), first);
    assert_eq!(at_gateway(0, &["10.0.0.0/8"], &CLAIMED), first);
    assert_eq!(at_gateway(0, &["172.16.0.0/12"], &CLAIMED), own);
    let both = ["198.51.100.1, 203.0.113.7, 10.0.0.1", "https", "198.51.100.1", "198.51.100.1"];
    assert_eq!(at_gateway(2, &[], &CLAIMED), both);
    // A proxy that names fewer than it should says nothing of the client.
    assert_eq!(at_gateway(3, &[], &CLAIMED), ["10.0.0.1", "https", "10.0.0.1", "10.0.0.1"]);
}

#[test]
fn a_host_is_needed_once_and_must_be_one() {
    for headers in [
        &[][..],
        &[("host", "")],
        &[("host", "a"), ("host", "b")],
        &[("host", "a"), ("host", "a")],
        &[("host", "user@a")],
        &[("host", "a b")],
        &[("host", "a:b:c")],
        &[("host", "a:x.internal")],
        &[("host", "a:65536")],
        &[("host", "[::1].internal")],
        &[("host", "a..")],
    ] {
        assert_eq!(status(http11("/", headers).1), Some(StatusCode::BAD_REQUEST), "{headers:?}");
    }
    let sane = http11("/", &[("host", "A.Example.:80")]).1.unwrap();
    assert_eq!((&*sane.host, &*sane.authority), ("a.example", "A.Example.:80"));
    assert_eq!(&*http11("/", &[("host", "[fd00::1]:80")]).1.unwrap().host, "fd00::1");
}

/// After such a change requests would pass that no policy has seen.
#[test]
fn an_upgrade_to_http2_or_tls_is_ignored() {
    for (wanted, kept) in [
        ("h2c", false),
        ("websocket, h2c", false),
        ("TLS/1.0, HTTP/1.1", false),
        ("websocket", true),
        ("custom/2", true),
    ] {
        let headers =
            [("host", "a"), ("connection", "upgrade"), ("upgrade", wanted), ("http2-settings", "AA")];
        let (parts, sane) = http11("/", &headers);
        assert_eq!(sane.unwrap().upgrade.is_some(), kept, "{wanted}");
        assert_eq!(parts.headers.get("http2-settings"), None, "{wanted}");
    }
    let mut parts = request(Version::HTTP_2, "http://a/", &[]);
    parts.method = Method::CONNECT;
    parts.extensions.insert(Protocol::from_static("h2c"));
    assert_eq!(status(sanitise(&mut parts, &claims(false))), Some(StatusCode::METHOD_NOT_ALLOWED));
}

#[test]
fn letters_that_are_not_ascii_have_one_form() {
    for path in ["/caf\u{e9}", "/caf%C3%A9", "/caf%c3%a9"] {
        assert_eq!(normal_path(path).as_deref(), Some("/caf%C3%A9"), "{path}");
    }
}

#[test]
fn a_chain_that_is_no_text_is_malformed_from_a_trusted_client() {
    for (trusted, wanted) in [(true, Some(StatusCode::BAD_REQUEST)), (false, None)] {
        let mut parts = request(Version::HTTP_11, "/", &[("host", "a")]);
        let line = HeaderValue::from_bytes(b"\xff, 203.0.113.7").unwrap();
        parts.headers.insert("x-forwarded-for", line);
        assert_eq!(status(sanitise(&mut parts, &claims(trusted))), wanted);
    }
}

#[test]
fn an_absolute_target_wins_over_host() {
    let (parts, sane) = http11("http://b.example/x?y", &[("host", "a.example")]);
    assert_eq!(&*sane.unwrap().host, "b.example");
    assert_eq!((parts.uri.to_string(), parts.headers.get("host")), ("/x?y".to_owned(), None));
}

#[test]
fn http2_with_two_hosts_is_malformed() {
    let mut parts = request(Version::HTTP_2, "http://a.example/", &[("host", "b.example")]);
    assert_eq!(status(sanitise(&mut parts, &claims(false))), Some(StatusCode::BAD_REQUEST));
    let mut parts = request(Version::HTTP_2, "http://a.example/", &[("host", "A.example")]);
    assert!(sanitise(&mut parts, &claims(false)).is_ok());
}

#[test]
fn http10_without_host_gets_the_default_one() {
    let mut parts = request(Version::HTTP_10, "/", &[]);
    assert_eq!(&*sanitise(&mut parts, &claims(false)).unwrap().host, "svc.example");
}

#[test]
fn connect_is_not_for_clients_inside() {
    let mut parts = request(Version::HTTP_11, "a.example:443", &[("host", "a.example:443")]);
    parts.method = Method::CONNECT;
    assert_eq!(status(sanitise(&mut parts, &claims(false))), Some(StatusCode::METHOD_NOT_ALLOWED));
}

#[test]
fn fields_of_one_hop_stay_behind_over_all_lines_of_connection() {
    let (parts, sane) = http11(
        "/",
        &[
            ("host", "a"),
            ("connection", "x-one, keep-alive"),
            ("connection", "X-Two"),
            ("x-one", "1"),
            ("x-two", "2"),
            ("keep-alive", "timeout=1"),
            ("proxy-connection", "close"),
            ("transfer-encoding", "chunked"),
            ("te", "gzip, trailers"),
            ("x-three", "3"),
        ],
    );
    sane.unwrap();
    for gone in ["connection", "x-one", "x-two", "keep-alive", "proxy-connection", "transfer-encoding"] {
        assert!(!parts.headers.contains_key(gone), "{gone}");
    }
    assert_eq!(parts.headers["te"], "trailers");
    assert_eq!(parts.headers["x-three"], "3");
}

#[test]
fn an_upgrade_needs_its_connection_field() {
    let upgrade = |headers: &[(&str, &str)]| http11("/", headers).1.unwrap().upgrade;
    assert_eq!(upgrade(&[("host", "a"), ("upgrade", "websocket")]), None);
    let wanted = upgrade(&[("host", "a"), ("upgrade", "websocket"), ("connection", "Upgrade")]);
    assert_eq!(wanted.unwrap(), "websocket");
}

#[test]
fn lengths_that_differ_or_are_none_are_malformed() {
    for lengths in [&["1", "2"][..], &["-1"], &["1a"], &[""]] {
        let mut headers = vec![("host", "a")];
        headers.extend(lengths.iter().map(|length| ("content-length", *length)));
        assert_eq!(status(http11("/", &headers).1), Some(StatusCode::BAD_REQUEST), "{lengths:?}");
    }
}

#[test]
fn claims_of_other_clients_are_kept_from_trusted_peers_only() {
    let headers = [
        ("host", "a"),
        ("x-forwarded-for", "1.2.3.4"),
        ("x-forwarded-proto", "https"),
        ("forwarded", "for=1.2.3.4"),
        ("x-forwarded-client-cert", "Hash=1"),
    ];
    let (parts, sane) = http11("/", &headers);
    assert_eq!(sane.unwrap().scheme, "http");
    assert_eq!(parts.headers["x-forwarded-for"], "10.0.0.1");
    assert_eq!(parts.headers["x-forwarded-proto"], "http");
    assert!(!parts.headers.contains_key("forwarded"));
    assert!(!parts.headers.contains_key("x-forwarded-client-cert"));
    let mut parts = request(Version::HTTP_11, "/", &headers);
    assert_eq!(sanitise(&mut parts, &claims(true)).unwrap().scheme, "https");
    assert_eq!(parts.headers["x-forwarded-for"], "1.2.3.4, 10.0.0.1");
    assert!(!parts.headers.contains_key("x-forwarded-client-cert"));
}

#[test]
fn a_request_has_one_id() {
    let (parts, _) = http11("/", &[("host", "a")]);
    let id = parts.headers["x-request-id"].to_str().unwrap();
    let lengths: Vec<usize> = id.split('-').map(str::len).collect();
    assert_eq!(lengths, [8, 4, 4, 4, 12]);
    let (parts, _) = http11("/", &[("host", "a"), ("x-request-id", "mine")]);
    assert_eq!(parts.headers["x-request-id"], "mine");
}

#[test]
fn paths_are_normalised_once() {
    for (path, normal) in [
        ("/", Some("/")),
        ("/a/b/", Some("/a/b/")),
        ("//a///b", Some("/a/b")),
        ("/a/./b", Some("/a/b")),
        ("/a/../b", Some("/b")),
        ("/a/b/..", Some("/a/")),
        ("/a/.", Some("/a/")),
        ("/a/%2e%2E/b", Some("/b")),
        ("/%61%2d", Some("/a-")),
        ("/a%2fb", Some("/a%2Fb")),
        ("/a%252e", Some("/a%252e")),
        ("/a%3ab;c", Some("/a%3Ab;c")),
        ("/{a|b}", Some("/%7Ba%7Cb%7D")),
        ("/%e4%bd%a0", Some("/%E4%BD%A0")),
        ("/.hidden/..x", Some("/.hidden/..x")),
        ("/..", None),
        ("/a/../../b", None),
        ("/%zz", None),
        ("/%2", None),
        ("/%00", None),
        ("/a\\b", None),
        ("a", None),
    ] {
        assert_eq!(normal_path(path).as_deref(), normal, "{path}");
    }
}

#[test]
fn dots_that_only_some_applications_see_are_refused() {
    for path in ["/a/..;/b", "/a/..%2fb", "/a/..%5Cb", "/a/.;x=1/b", "/a%2f..%2fb"] {
        assert_eq!(status(http11(path, &[("host", "a")]).1), Some(StatusCode::BAD_REQUEST), "{path}");
    }
    assert!(http11("/a;v=1/b..;c", &[("host", "a")]).1.is_ok());
}

#[test]
fn only_chunked_alone_is_a_known_transfer_coding() {
    for (codings, wanted) in [
        (&["chunked"][..], None),
        (&["Chunked"], None),
        (&["gzip, chunked"], Some(StatusCode::NOT_IMPLEMENTED)),
        (&["gzip", "chunked"], Some(StatusCode::NOT_IMPLEMENTED)),
        (&["chunked, chunked"], Some(StatusCode::NOT_IMPLEMENTED)),
        (&["chunked;a"], Some(StatusCode::NOT_IMPLEMENTED)),
        (&[""], Some(StatusCode::NOT_IMPLEMENTED)),
    ] {
        let mut headers = vec![("host", "a")];
        headers.extend(codings.iter().map(|coding| ("transfer-encoding", *coding)));
        assert_eq!(status(http11("/", &headers).1), wanted, "{codings:?}");
    }
}

#[test]
fn a_target_that_is_too_long_is_414() {
    let long = format!("/{}", "a".repeat(200));
    assert_eq!(status(http11(&long, &[("host", "a")]).1), Some(StatusCode::URI_TOO_LONG));
}

#[test]
fn gzip_of_grpc_web_is_not_grpc() {
    assert!(
        is_grpc(b"application/grpc") && is_grpc(b"application/grpc+proto") && is_grpc(b"application/grpc; x")
    );
    assert!(!is_grpc(b"application/grpc-web") && !is_grpc(b"application/json"));
}

proptest! {
    #[test]
    fn a_normal_path_stays_as_it_is(path in "/([a-c./%2eEfF0\\\\{|^\"]|%2e|%2F|//){0,12}") {
        if let Some(normal) = normal_path(&path) {
            prop_assert_eq!(normal_path(&normal), Some(normal.clone()));
            prop_assert!(normal.starts_with('/') && !normal.contains("//"));
            prop_assert!(normal.split('/').all(|segment| segment != "." && segment != ".."));
            prop_assert!(is_normal(&normal) || normal.contains('%'));
        }
    }
}

/// Sixteen bytes in base64 are 22 letters, of which the last carries two bits, and two signs of padding.
#[test]
fn a_websocket_key_is_base64_of_sixteen_bytes() {
    assert_eq!(websocket_key(0), "AAAAAAAAAAAAAAAAAAAAAA==");
    assert_eq!(websocket_key(u128::MAX), "/////////////////////w==");
    // The example of RFC 6455 §1.3.
    assert_eq!(websocket_key(u128::from_be_bytes(*b"the sample nonce")), "dGhlIHNhbXBsZSBub25jZQ==");
}
