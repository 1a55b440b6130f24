//! Session persistence of a rule (Gateway API, GEP-1619): how clients bring the token back that leads to their endpoint.

use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use http::HeaderName;

use crate::compile::header_name;

/// How the clients of a rule keep their endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionPersistence {
    /// Where the token is.
    pub carrier: SessionCarrier,
    /// How long a session lasts.
    pub absolute_timeout: Option<Duration>,
    /// How long it lasts without a request.
    pub idle_timeout: Option<Duration>,
}

/// Where the token of a session is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionCarrier {
    /// In a cookie.
    Cookie {
        /// Its name.
        name: Arc<str>,
        /// Whether it outlives the client's own session.
        permanent: bool,
    },
    /// In a header of requests and responses.
    Header(HeaderName),
}

/// Fields that mean something else to clients, endpoints or proxies.
const RESERVED: [&str; 22] = [
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "date",
    "expect",
    "forwarded",
    "host",
    "keep-alive",
    "location",
    "proxy-authorization",
    "proxy-connection",
    "set-cookie",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-forwarded-client-cert",
    "x-forwarded-for",
    "x-forwarded-proto",
];

/// # Errors
/// What can't be followed.
pub(crate) fn compile(source: &l7::SessionPersistence) -> Result<SessionPersistence, String> {
    let span = |nanos: u64| (nanos > 0).then(|| Duration::from_nanos(nanos));
    // RFC 6265 §4.1.1: the name of a cookie is a token, as that of a header is.
    let name = header_name(&source.name).map_err(|_| format!("no session name: {:?}", source.name))?;
    let carrier = match source.in_header {
        true if RESERVED.contains(&name.as_str()) => {
            return Err(format!("the header {name} can't carry a session"));
        }
        true => SessionCarrier::Header(name),
        false => SessionCarrier::Cookie { name: source.name.as_str().into(), permanent: source.permanent },
    };
    Ok(SessionPersistence {
        carrier,
        absolute_timeout: span(source.absolute_nanos),
        idle_timeout: span(source.idle_nanos),
    })
}

/// How much of a pattern is text that every path begins with that it matches, up to the end of a segment.
pub(crate) fn literal_prefix(pattern: &str) -> usize {
    let pattern = pattern.trim_start_matches('^');
    if pattern.contains('|') {
        return 0;
    }
    let is_special = |letter: char| r"\.+*?()[]{}^$".contains(letter);
    match pattern.find(is_special) {
        None => pattern.len(),
        // What repeats the last letter makes it optional; the segment that it is in is left out in any case.
        Some(end) => pattern.get(..end).and_then(|literal| literal.rfind('/')).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_carry_nothing_else_are_taken() {
        for (name, in_header, fine) in [
            ("JSESSIONID", false, true),
            ("cart", true, true),
            ("cookie", false, true),
            ("cookie", true, false),
            ("Content-Length", true, false),
            ("a b", false, false),
            ("a=b", false, false),
            ("", false, false),
        ] {
            let source = l7::SessionPersistence { name: name.into(), in_header, ..Default::default() };
            assert_eq!(compile(&source).is_ok(), fine, "{name} {in_header}");
        }
    }

    #[test]
    fn patterns_begin_with_text() {
        for (pattern, literal) in [
            ("/p1/p2/[^/]+/p3", "/p1/p2"),
            ("/p1/p2/.*", "/p1/p2"),
            ("^/a/b", "/a/b"),
            ("/a/b+", "/a"),
            ("/a/b?/c", "/a"),
            ("/a/x|/b", ""),
            (".*", ""),
            ("/", "/"),
            (r"/v1\.0/x", ""),
        ] {
            let text = pattern.trim_start_matches('^');
            assert_eq!(&text[..literal_prefix(pattern)], literal, "{pattern}");
        }
    }
}
