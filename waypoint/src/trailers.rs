//! Which fields may stand in trailers: none that says how a message is framed, routed or authenticated, or for whom it is sent on.
//!
//! Servers and libraries that merge trailers into the header would believe them there.

use http::header::{
    AUTHORIZATION, CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE,
    COOKIE, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, MAX_FORWARDS, PROXY_AUTHORIZATION, RANGE,
    SET_COOKIE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};

/// Fields that a recipient has to know before the content (RFC 9110 §6.5.1), and fields of one hop.
const HEADER_ONLY: [HeaderName; 19] = [
    AUTHORIZATION,
    CACHE_CONTROL,
    CONNECTION,
    CONTENT_ENCODING,
    CONTENT_LENGTH,
    CONTENT_RANGE,
    CONTENT_TYPE,
    COOKIE,
    EXPECT,
    FORWARDED,
    HOST,
    MAX_FORWARDS,
    PROXY_AUTHORIZATION,
    RANGE,
    SET_COOKIE,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// The same without a constant in the library. What proxies say of clients begins with `x-forwarded-`.
fn is_header_only(name: &HeaderName) -> bool {
    HEADER_ONLY.contains(name)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection" | "http2-settings")
        || name.as_str().starts_with("x-forwarded-")
}

/// The trailers that are passed on. `is_withheld` names further fields that are not.
pub fn permitted(sent: HeaderMap, is_withheld: Option<&(dyn Fn(&HeaderName) -> bool + Send)>) -> HeaderMap {
    let is_kept = |name: &HeaderName| !is_header_only(name) && !is_withheld.is_some_and(|it| it(name));
    if sent.keys().all(is_kept) {
        return sent;
    }
    let mut kept = HeaderMap::with_capacity(sent.len());
    for (name, value) in sent.iter().filter(|(name, _)| is_kept(name)) {
        kept.append(name, value.clone());
    }
    kept
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn trailers_say_nothing_that_belongs_to_a_header() {
        let names = [
            "grpc-status",
            "x-sum",
            "x-sum",
            "content-length",
            "transfer-encoding",
            "host",
            "connection",
            "authorization",
            "cookie",
            "x-forwarded-for",
            "x-forwarded-client-cert",
            "x-mine",
        ];
        let sent: HeaderMap =
            names.iter().map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1"))).collect();
        let mut all = HeaderMap::new();
        for (name, value) in sent.iter() {
            all.append(name, value.clone());
        }
        let kept = permitted(all.clone(), None);
        assert_eq!(
            kept.keys().map(HeaderName::as_str).collect::<Vec<_>>(),
            ["grpc-status", "x-sum", "x-mine"]
        );
        let withheld = |name: &HeaderName| name == "x-mine";
        let kept = permitted(all, Some(&withheld));
        assert_eq!(kept.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["grpc-status", "x-sum"]);
    }
}
