//! Filters as data, and what they make of a request or response.

use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use bytes::Bytes;
use http::header::{HOST, HeaderMap};
use http::uri::{Authority, PathAndQuery};
use http::{HeaderName, HeaderValue, StatusCode, Uri};
use regex::Regex;

use crate::backend::Backend;
use crate::compile::{header_name, status, string_match};
use crate::field::{StringMatch, pattern};

/// What is done with a request or its response.
#[derive(Debug, Clone)]
pub enum Filter {
    /// Changes the request's headers.
    RequestHeaders(HeaderChange),
    /// Changes the response's headers.
    ResponseHeaders(HeaderChange),
    /// Answers with a redirection.
    Redirect(Redirect),
    /// Changes host and path.
    Rewrite(Rewrite),
    /// Sends a copy elsewhere, whose answer nobody waits for.
    Mirror(Mirror),
    /// Answers for other origins.
    Cors(Cors),
    /// Delays or answers some requests.
    Fault(Fault),
    /// Answers.
    Respond(StatusCode, Bytes),
}

/// A change of headers: what is set replaces, what is added stays beside what is there.
#[derive(Debug, Clone, Default)]
pub struct HeaderChange {
    set: Box<[(HeaderName, HeaderValue)]>,
    add: Box<[(HeaderName, HeaderValue)]>,
    remove: Box<[HeaderName]>,
}

impl HeaderChange {
    /// Changes headers. `Host` is left alone: it is the URI's.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for (name, value) in self.set.iter() {
            headers.insert(name.clone(), value.clone());
        }
        for (name, value) in self.add.iter() {
            headers.append(name.clone(), value.clone());
        }
        for name in self.remove.iter() {
            headers.remove(name);
        }
    }

    /// The host that it sets, if it sets one.
    pub fn host(&self) -> Option<&HeaderValue> {
        self.set.iter().find(|(name, _)| name == HOST).map(|(_, value)| value)
    }
}

/// Another path.
#[derive(Debug, Clone)]
pub enum PathChange {
    /// This one.
    Full(Box<str>),
    /// This in place of the prefix that matched, joined with one slash.
    Prefix(Box<str>),
    /// This in place of the letters that matched.
    TextPrefix(Box<str>),
    /// This, in the notation of [`Regex::replace_all`], in place of each match.
    Regex(Regex, Box<str>),
}

impl PathChange {
    /// The path of a request of which `prefix` bytes matched.
    ///
    /// Joins with exactly one slash (Gateway API, HTTPPathModifier).
    pub fn apply(&self, path: &str, prefix: usize) -> String {
        match self {
            Self::Full(path) => path.to_string(),
            Self::TextPrefix(new) => format!("{new}{}", path.get(prefix..).unwrap_or_default()),
            Self::Regex(pattern, new) => pattern.replace_all(path, &**new).into_owned(),
            Self::Prefix(new) => {
                let rest = path.get(prefix..).unwrap_or_default().trim_start_matches('/');
                let new = new.trim_end_matches('/');
                // `/xyz` alone: nothing is appended, unless the path went on after the prefix.
                match (new, rest) {
                    (new, "") if !new.is_empty() && !path.ends_with('/') => new.to_owned(),
                    (new, rest) => format!("{new}/{rest}"),
                }
            }
        }
    }
}

/// An answer that sends the client elsewhere.
#[derive(Debug, Clone)]
pub struct Redirect {
    scheme: Option<Box<str>>,
    hostname: Option<Box<str>>,
    path: Option<PathChange>,
    port: Option<u16>,
    port_choice: l7::PortChoice,
    /// The answer's status.
    pub status: StatusCode,
}

/// A request as it came, for a redirection.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// `http` or `https`.
    pub scheme: &'a str,
    /// The host, without port.
    pub host: &'a str,
    /// The host as the client wrote it, with the port if it wrote one.
    pub authority: &'a str,
    /// The port of the listener or service that it came to.
    pub port: u16,
    /// The path.
    pub path: &'a str,
    /// The query.
    pub query: Option<&'a str>,
    /// How much of the path matched.
    pub prefix: usize,
}

impl Redirect {
    /// The value of `Location`; `None` if it would be none.
    pub fn location(&self, origin: &Origin<'_>) -> Option<HeaderValue> {
        let scheme = self.scheme.as_deref().unwrap_or(origin.scheme);
        let authority = self.authority(scheme, origin);
        let path = match &self.path {
            Some(change) => change.apply(origin.path, origin.prefix),
            None => origin.path.to_owned(),
        };
        // A path that brings a query replaces that of the request.
        let query = origin.query.filter(|_| !path.contains('?'));
        let query = query.map(|query| format!("?{query}")).unwrap_or_default();
        HeaderValue::try_from(format!("{scheme}://{authority}{path}{query}")).ok()
    }

    fn authority(&self, scheme: &str, origin: &Origin<'_>) -> String {
        use l7::PortChoice::{OfAuthority, OfProtocol, OfRequest, OfSchemeOrListener};
        let (host, of_authority) = match (&self.hostname, self.port_choice) {
            (Some(host), OfAuthority | OfProtocol | OfRequest) => host_and_port(host),
            (None, OfAuthority) => host_and_port(origin.authority),
            (Some(host), OfSchemeOrListener) => (&**host, None),
            (None, OfProtocol | OfRequest | OfSchemeOrListener) => (origin.host, None),
        };
        // The port of another scheme stays behind.
        let of_authority = of_authority.filter(|port| {
            self.hostname.is_some() || self.scheme.is_none() || *port != well_known(origin.scheme)
        });
        let port = match (self.port, self.port_choice) {
            (Some(port), _) => Some(port),
            (None, OfAuthority) => of_authority,
            (None, OfProtocol) => None,
            (None, OfRequest) => Some(origin.port),
            // Gateway API, HTTPRequestRedirectFilter.port: without one, the well-known port of a scheme that is named, else
            // the port of the listener.
            (None, OfSchemeOrListener) => self.scheme.is_none().then_some(origin.port),
        };
        let host =
            if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
        match port.filter(|port| *port != well_known(scheme)) {
            Some(port) => format!("{host}:{port}"),
            None => host,
        }
    }
}

fn well_known(scheme: &str) -> u16 {
    if scheme == "https" { 443 } else { 80 }
}

/// The parts of `host:port`; an IPv6 address with a port has brackets.
fn host_and_port(authority: &str) -> (&str, Option<u16>) {
    let parts = authority.rsplit_once(':').filter(|(host, _)| !host.contains(':') || host.ends_with(']'));
    let port = parts.and_then(|(host, port)| Some((host, port.parse().ok()?)));
    port.map_or((authority, None), |(host, port)| (host, Some(port)))
}

/// Another host or path for the backend.
#[derive(Debug, Clone)]
pub struct Rewrite {
    host: Option<Authority>,
    path: Option<PathChange>,
}

impl Rewrite {
    /// The host that the backend sees.
    pub fn host(&self) -> Option<&Authority> {
        self.host.as_ref()
    }

    /// The path and query of a request of which `prefix` bytes matched; `None` if nothing changes.
    pub fn path_and_query(&self, uri: &Uri, prefix: usize) -> Option<Result<PathAndQuery, NoPath>> {
        let path = self.path.as_ref()?.apply(uri.path(), prefix);
        if !path.starts_with('/') {
            return Some(Err(NoPath));
        }
        // Joined with what the client sent, `/a..` may become a step upwards that no policy has seen.
        let is_joined = !matches!(self.path, Some(PathChange::Full(_)));
        let only_path = path.split('?').next().unwrap_or_default();
        if is_joined && only_path.split('/').any(|segment| matches!(segment, "." | "..")) {
            return Some(Err(NoPath));
        }
        let text = match uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        Some(PathAndQuery::try_from(text).map_err(|_| NoPath))
    }
}

/// What a rewrite comes to is no path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoPath;

/// A copy for another backend.
#[derive(Debug, Clone)]
pub struct Mirror {
    /// Where it goes.
    pub backend: Arc<Backend>,
    /// Whether the host of the copy ends with `-shadow`.
    pub shadow_host: bool,
    numerator: u32,
    denominator: u32,
}

impl Mirror {
    /// Whether the request that drew this number is copied.
    pub fn applies(&self, draw: u32) -> bool {
        self.denominator > 0 && draw % self.denominator < self.numerator
    }
}

/// Which other origins may read answers (the Fetch standard, "HTTP extensions").
#[derive(Debug, Clone)]
pub struct Cors {
    origins: Box<[StringMatch]>,
    any_origin: bool,
    methods: Option<HeaderValue>,
    any_method: bool,
    headers: Option<HeaderValue>,
    any_header: bool,
    expose: Option<HeaderValue>,
    credentials: bool,
    max_age: Option<HeaderValue>,
    /// Whether requests of other origins go to the backend as they are.
    pub forward_unmatched: bool,
}

const ALLOW_ORIGIN: HeaderName = http::header::ACCESS_CONTROL_ALLOW_ORIGIN;

impl Cors {
    /// Whether this origin may read answers.
    pub fn allows(&self, origin: &HeaderValue) -> bool {
        let text = origin.to_str().ok();
        self.any_origin || self.origins.iter().any(|wanted| wanted.matches(text))
    }

    fn headers_for(&self, origin: &HeaderValue, headers: &mut HeaderMap) {
        // A wildcard does not count where credentials are sent, so the origin itself is named then.
        let value = match self.any_origin && !self.credentials {
            true => HeaderValue::from_static("*"),
            false => origin.clone(),
        };
        headers.insert(ALLOW_ORIGIN, value);
        headers.append(http::header::VARY, HeaderValue::from_static("origin"));
        if self.credentials {
            headers.insert(http::header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
    }

    /// The headers of the answer to a preflight request from `origin`, none for an origin that is not allowed.
    pub fn preflight(&self, request: &HeaderMap, origin: &HeaderValue) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if !self.allows(origin) {
            return headers;
        }
        self.headers_for(origin, &mut headers);
        let asked = |name: HeaderName| request.get(name).cloned();
        let chosen = |any: bool, listed: &Option<HeaderValue>, asked: Option<HeaderValue>| match any {
            true => asked.or(Some(HeaderValue::from_static("*"))),
            false => listed.clone(),
        };
        let methods =
            chosen(self.any_method, &self.methods, asked(http::header::ACCESS_CONTROL_REQUEST_METHOD));
        let fields =
            chosen(self.any_header, &self.headers, asked(http::header::ACCESS_CONTROL_REQUEST_HEADERS));
        for (name, value) in [
            (http::header::ACCESS_CONTROL_ALLOW_METHODS, methods),
            (http::header::ACCESS_CONTROL_ALLOW_HEADERS, fields),
            (http::header::ACCESS_CONTROL_MAX_AGE, self.max_age.clone()),
            // Browsers ignore it here; Gateway API's conformance suite asks for it.
            (http::header::ACCESS_CONTROL_EXPOSE_HEADERS, self.expose.clone()),
        ] {
            if let Some(value) = value {
                headers.insert(name, value);
            }
        }
        headers
    }

    /// Adds what the answer to a request from `origin` must say. What the backend said itself is replaced.
    pub fn apply(&self, origin: &HeaderValue, response: &mut HeaderMap) {
        for name in [
            ALLOW_ORIGIN,
            http::header::ACCESS_CONTROL_ALLOW_CREDENTIALS,
            http::header::ACCESS_CONTROL_EXPOSE_HEADERS,
        ] {
            response.remove(name);
        }
        if !self.allows(origin) {
            return;
        }
        self.headers_for(origin, response);
        if let Some(expose) = &self.expose {
            response.insert(http::header::ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
        }
    }
}

/// Requests that are delayed or answered here, in millionths.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    delay: Option<(u32, Duration)>,
    abort: Option<(u32, Abort)>,
}

/// How a request is answered instead of its backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    /// With this status.
    Http(StatusCode),
    /// With this status of gRPC.
    Grpc(u8),
}

impl Fault {
    /// How long the request that drew this number waits.
    pub fn delay(&self, draw: u32) -> Option<Duration> {
        self.delay.filter(|(share, _)| draw % MILLION < *share).map(|(_, delay)| delay)
    }

    /// How the request that drew this number is answered.
    pub fn abort(&self, draw: u32) -> Option<Abort> {
        self.abort.filter(|(share, _)| draw % MILLION < *share).map(|(_, abort)| abort)
    }
}

const MILLION: u32 = 1_000_000;

/// Compiles a filter; `backend` compiles that of a mirror.
pub(crate) fn compile(
    source: &l7::Filter,
    backend: &dyn Fn(&l7::Backend) -> Backend,
) -> Result<Filter, String> {
    use l7::filter::Kind;
    match source.kind.as_ref().ok_or("a filter of an unknown kind")? {
        Kind::RequestHeaders(change) => header_change(change).map(Filter::RequestHeaders),
        Kind::ResponseHeaders(change) => header_change(change).map(Filter::ResponseHeaders),
        Kind::Redirect(redirect) => Ok(Filter::Redirect(Redirect {
            scheme: text(&redirect.scheme),
            hostname: text(&redirect.hostname),
            path: path_change(redirect.path.as_ref())?,
            port_choice: redirect.port_choice(),
            port: u16::try_from(redirect.port).ok().filter(|port| *port != 0),
            status: status(redirect.status)?,
        })),
        Kind::Rewrite(rewrite) => {
            let host = text(&rewrite.hostname).map(|host| Authority::try_from(&*host));
            let host = host.transpose().map_err(|_| format!("no host: {:?}", rewrite.hostname))?;
            Ok(Filter::Rewrite(Rewrite { host, path: path_change(rewrite.path.as_ref())? }))
        }
        Kind::Mirror(mirror) => Ok(Filter::Mirror(Mirror {
            backend: Arc::new(backend(mirror.backend.as_ref().ok_or("a mirror without a backend")?)),
            shadow_host: mirror.shadow_host,
            numerator: mirror.numerator,
            denominator: mirror.denominator,
        })),
        Kind::Cors(source) => cors(source).map(Filter::Cors),
        Kind::Fault(fault) => Ok(Filter::Fault(Fault {
            delay: (fault.delay_ppm > 0).then(|| (fault.delay_ppm, Duration::from_nanos(fault.delay_nanos))),
            abort: (fault.abort_ppm > 0)
                .then(|| Ok::<_, String>((fault.abort_ppm, abort(fault)?)))
                .transpose()?,
        })),
        Kind::Respond(answer) => Ok(Filter::Respond(status(answer.status)?, answer.body.clone())),
    }
}

fn text(text: &str) -> Option<Box<str>> {
    (!text.is_empty()).then(|| text.into())
}

fn abort(source: &l7::Fault) -> Result<Abort, String> {
    match source.abort_status {
        0 => u8::try_from(source.abort_grpc)
            .ok()
            .filter(|code| (1..=16).contains(code))
            .map(Abort::Grpc)
            .ok_or_else(|| format!("no status of gRPC for an abort: {}", source.abort_grpc)),
        code => status(code).map(Abort::Http),
    }
}

fn path_change(source: Option<&l7::PathChange>) -> Result<Option<PathChange>, String> {
    use l7::path_change::Kind;
    let Some(kind) = source.and_then(|source| source.kind.as_ref()) else { return Ok(None) };
    Ok(Some(match kind {
        Kind::Full(path) => PathChange::Full(path.as_str().into()),
        Kind::Prefix(path) => PathChange::Prefix(path.as_str().into()),
        Kind::TextPrefix(path) => PathChange::TextPrefix(path.as_str().into()),
        Kind::Regex(rewrite) => {
            let pattern = pattern(&rewrite.pattern)?;
            let new = replacement(&rewrite.substitution, pattern.captures_len())?;
            PathChange::Regex(pattern, new.into())
        }
    }))
}

/// A substitution of RE2 in the notation of [`Regex::replace_all`].
fn replacement(substitution: &str, groups: usize) -> Result<String, String> {
    let mut replacement = String::with_capacity(substitution.len());
    let mut letters = substitution.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '$' => replacement.push_str("$$"),
            '\\' => match letters.next() {
                Some('\\') => replacement.push('\\'),
                Some(digit @ '0'..='9') => {
                    let group = usize::from(u8::try_from(digit).unwrap_or(b'0') - b'0');
                    if group >= groups {
                        return Err(format!("{substitution:?} names a group that the pattern has not"));
                    }
                    replacement.push_str(&format!("${{{group}}}"));
                }
                _ => return Err(format!("{substitution:?} is no substitution of a pattern")),
            },
            other => replacement.push(other),
        }
    }
    Ok(replacement)
}

fn header_change(source: &l7::HeaderChange) -> Result<HeaderChange, String> {
    let pairs = |headers: &[l7::Header]| {
        let pair = |header: &l7::Header| {
            let value = HeaderValue::try_from(&header.value)
                .map_err(|_| format!("no value of {}: {:?}", header.name, header.value))?;
            Ok((header_name(&header.name)?, value))
        };
        headers.iter().map(pair).collect::<Result<Box<[_]>, String>>()
    };
    Ok(HeaderChange {
        set: pairs(&source.set)?,
        add: pairs(&source.add)?,
        remove: source.remove.iter().map(|name| header_name(name)).collect::<Result<_, _>>()?,
    })
}

fn cors(source: &l7::Cors) -> Result<Cors, String> {
    let list = |items: &[String]| -> Result<Option<HeaderValue>, String> {
        let joined = items.join(", ");
        let value = HeaderValue::try_from(&joined).map_err(|_| format!("no header value: {joined:?}"))?;
        Ok((!items.is_empty()).then_some(value))
    };
    let any = |items: &[String]| items.iter().any(|item| item == "*");
    let is_any = |origin: &l7::StringMatch| matches!(&origin.kind, Some(l7::string_match::Kind::Exact(text)) if text == "*");
    Ok(Cors {
        any_origin: source.origins.iter().any(is_any),
        origins: source.origins.iter().map(|origin| string_match(Some(origin))).collect::<Result<_, _>>()?,
        any_method: any(&source.methods),
        methods: list(&source.methods)?,
        any_header: any(&source.headers),
        headers: list(&source.headers)?,
        expose: list(&source.expose)?,
        credentials: source.credentials,
        max_age: (source.max_age > 0).then(|| HeaderValue::from(source.max_age)),
        forward_unmatched: source.forward_unmatched,
    })
}
