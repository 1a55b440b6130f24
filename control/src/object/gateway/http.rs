//! HTTPRoutes.

use ambit_api::l7;
use serde::Deserialize;
use serde_json::Value;

use super::route::{self, Reference, Route, RouteFilter, RouteProtocol, RouteRule, RuleBackend, duration};
use super::session::SessionPersistence;
use crate::object::meta::Invalid;

/// Annotation: after how long without an answer a second endpoint is asked too, for requests that are safe.
const HEDGE_AFTER: &str = "ambit.dev/hedge-after";

/// The manifest.
#[derive(Debug, Deserialize)]
#[serde(transparent)]
pub(crate) struct Manifest(route::Manifest);

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    #[serde(default)]
    name: String,
    #[serde(default)]
    matches: Vec<Match>,
    #[serde(default)]
    filters: Vec<Filter>,
    #[serde(default)]
    backend_refs: Vec<Backend>,
    timeouts: Option<Timeouts>,
    retry: Option<Retry>,
    session_persistence: Option<SessionPersistence>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Match {
    path: Option<PathMatch>,
    method: Option<String>,
    #[serde(default)]
    headers: Vec<FieldMatch>,
    #[serde(default)]
    query_params: Vec<FieldMatch>,
}

#[derive(Debug, Deserialize)]
struct PathMatch {
    #[serde(rename = "type", default)]
    kind: PathKind,
    value: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
enum PathKind {
    Exact,
    #[default]
    PathPrefix,
    RegularExpression,
}

#[derive(Debug, Deserialize)]
pub(super) struct FieldMatch {
    #[serde(rename = "type", default)]
    kind: FieldKind,
    name: String,
    value: String,
}

#[derive(Debug, Default, Deserialize)]
pub(super) enum FieldKind {
    #[default]
    Exact,
    RegularExpression,
}

/// A filter of any route. What a type needs beside it is read then.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Filter {
    #[serde(rename = "type")]
    kind: String,
    request_header_modifier: Option<HeaderModifier>,
    response_header_modifier: Option<HeaderModifier>,
    request_redirect: Option<RequestRedirect>,
    url_rewrite: Option<UrlRewrite>,
    request_mirror: Option<RequestMirror>,
    cors: Option<Cors>,
}

#[derive(Debug, Deserialize)]
struct HeaderModifier {
    #[serde(default)]
    set: Vec<Header>,
    #[serde(default)]
    add: Vec<Header>,
    #[serde(default)]
    remove: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Header {
    name: String,
    value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RequestRedirect {
    scheme: Option<String>,
    hostname: Option<String>,
    path: Option<PathModifier>,
    port: Option<u16>,
    status_code: Option<u16>,
}

#[derive(Debug, Deserialize)]
struct UrlRewrite {
    hostname: Option<String>,
    path: Option<PathModifier>,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
enum PathModifier {
    ReplaceFullPath { replace_full_path: String },
    ReplacePrefixMatch { replace_prefix_match: String },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RequestMirror {
    backend_ref: Reference,
    percent: Option<u32>,
    fraction: Option<Fraction>,
}

#[derive(Debug, Deserialize)]
struct Fraction {
    numerator: u32,
    denominator: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cors {
    #[serde(default)]
    allow_origins: Vec<String>,
    allow_credentials: Option<bool>,
    #[serde(default)]
    allow_methods: Vec<String>,
    #[serde(default)]
    allow_headers: Vec<String>,
    #[serde(default)]
    expose_headers: Vec<String>,
    max_age: Option<u32>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Backend {
    #[serde(flatten)]
    to: Reference,
    weight: Option<u32>,
    #[serde(default)]
    filters: Vec<Filter>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Timeouts {
    request: Option<String>,
    backend_request: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Retry {
    #[serde(default)]
    codes: Vec<u32>,
    attempts: Option<u32>,
    backoff: Option<String>,
}

impl TryFrom<Manifest> for Route {
    type Error = Invalid;

    fn try_from(Manifest(manifest): Manifest) -> Result<Route, Invalid> {
        // Gateway API: no rules are one that matches everything, and has no backend.
        let default = vec![Value::Object(serde_json::Map::new())];
        let hedge = manifest.annotation(HEDGE_AFTER).map(duration).transpose();
        let mut route = manifest.read(RouteProtocol::Http, default, Rule::lower)?;
        for rule in route.rules.iter_mut().filter(|rule| rule.own.invalid.is_empty()) {
            match &hedge {
                Ok(None) => {}
                Ok(Some(nanos)) => rule.own.timeouts.get_or_insert_default().hedge_nanos = *nanos,
                Err(reason) => rule.own.invalid = format!("annotation {HEDGE_AFTER}: {reason}"),
            }
        }
        Ok(route)
    }
}

impl Rule {
    fn lower(self) -> Result<RouteRule, String> {
        let Rule { name, matches, filters, backend_refs, timeouts, retry, session_persistence } = self;
        let own = l7::Rule {
            name,
            matches: matches.into_iter().map(Match::lower).collect(),
            timeouts: timeouts.map(Timeouts::lower).transpose()?,
            retry: retry.map(Retry::lower).transpose()?,
            session: session_persistence.map(SessionPersistence::lower).transpose()?,
            ..l7::Rule::default()
        };
        let filters = lower_filters(filters)?;
        Ok(RouteRule { own, filters, backends: lower_backends(backend_refs)? })
    }
}

/// Filters of a rule or backend.
pub(super) fn lower_filters(filters: Vec<Filter>) -> Result<Vec<RouteFilter>, String> {
    filters.into_iter().map(Filter::lower).collect()
}

/// Backends of a rule.
pub(super) fn lower_backends(backends: Vec<Backend>) -> Result<Vec<RuleBackend>, String> {
    let lower = |Backend { to, weight, filters }| {
        Ok(RuleBackend { to: to.into(), weight: weight.unwrap_or(1), filters: lower_filters(filters)? })
    };
    backends.into_iter().map(lower).collect()
}

impl Match {
    fn lower(self) -> l7::Match {
        let path = self.path.map(|PathMatch { kind, value }| {
            let value = value.unwrap_or_else(|| "/".to_owned());
            let kind = match kind {
                PathKind::Exact => l7::path_match::Kind::Exact(value),
                PathKind::PathPrefix => l7::path_match::Kind::Prefix(value),
                PathKind::RegularExpression => l7::path_match::Kind::Regex(value),
            };
            l7::PathMatch { kind: Some(kind), ..l7::PathMatch::default() }
        });
        l7::Match {
            path,
            method: self.method.unwrap_or_default(),
            headers: lower_fields(self.headers, str::to_ascii_lowercase),
            query: lower_fields(self.query_params, str::to_owned),
            ..l7::Match::default()
        }
    }
}

/// Of several conditions on one name the first counts (Gateway API, HTTPHeaderMatch.name).
pub(super) fn lower_fields(fields: Vec<FieldMatch>, name: impl Fn(&str) -> String) -> Vec<l7::FieldMatch> {
    let mut lowered: Vec<l7::FieldMatch> = Vec::with_capacity(fields.len());
    for field in fields {
        let name = name(&field.name);
        if lowered.iter().any(|before| before.name == name) {
            continue;
        }
        let kind = match field.kind {
            FieldKind::Exact => l7::string_match::Kind::Exact(field.value),
            FieldKind::RegularExpression => l7::string_match::Kind::Regex(field.value),
        };
        let value = Some(l7::StringMatch { kind: Some(kind) });
        lowered.push(l7::FieldMatch { name, value, invert: false });
    }
    lowered
}

impl Filter {
    fn lower(self) -> Result<RouteFilter, String> {
        use l7::filter::Kind;
        let missing = |field: &str| format!("a filter of type {} without {field}", self.kind);
        let own = match self.kind.as_str() {
            "RequestHeaderModifier" => Kind::RequestHeaders(
                self.request_header_modifier.ok_or_else(|| missing("requestHeaderModifier"))?.lower(),
            ),
            "ResponseHeaderModifier" => Kind::ResponseHeaders(
                self.response_header_modifier.ok_or_else(|| missing("responseHeaderModifier"))?.lower(),
            ),
            "RequestRedirect" => {
                Kind::Redirect(self.request_redirect.ok_or_else(|| missing("requestRedirect"))?.lower())
            }
            "URLRewrite" => {
                let UrlRewrite { hostname, path } = self.url_rewrite.ok_or_else(|| missing("urlRewrite"))?;
                let path = path.map(PathModifier::lower);
                Kind::Rewrite(l7::Rewrite { hostname: hostname.unwrap_or_default(), path })
            }
            "CORS" => Kind::Cors(self.cors.ok_or_else(|| missing("cors"))?.lower()),
            "RequestMirror" => return self.request_mirror.ok_or_else(|| missing("requestMirror"))?.lower(),
            other => return Err(format!("filters of type {other} are not supported")),
        };
        Ok(RouteFilter::Own(own))
    }
}

impl HeaderModifier {
    fn lower(self) -> l7::HeaderChange {
        let header = |Header { name, value }| l7::Header { name, value };
        l7::HeaderChange {
            set: self.set.into_iter().map(header).collect(),
            add: self.add.into_iter().map(header).collect(),
            remove: self.remove,
        }
    }
}

impl RequestRedirect {
    fn lower(self) -> l7::Redirect {
        l7::Redirect {
            scheme: self.scheme.unwrap_or_default(),
            hostname: self.hostname.unwrap_or_default(),
            path: self.path.map(PathModifier::lower),
            port: self.port.map(u32::from).unwrap_or_default(),
            status: self.status_code.map_or(302, u32::from),
            port_choice: l7::PortChoice::OfSchemeOrListener as i32,
        }
    }
}

impl PathModifier {
    fn lower(self) -> l7::PathChange {
        let kind = match self {
            PathModifier::ReplaceFullPath { replace_full_path } => {
                l7::path_change::Kind::Full(replace_full_path)
            }
            PathModifier::ReplacePrefixMatch { replace_prefix_match } => {
                l7::path_change::Kind::Prefix(replace_prefix_match)
            }
        };
        l7::PathChange { kind: Some(kind) }
    }
}

impl RequestMirror {
    fn lower(self) -> Result<RouteFilter, String> {
        let (numerator, denominator) = match (self.fraction, self.percent) {
            (Some(_), Some(_)) => return Err("a mirror with both percent and fraction".to_owned()),
            (Some(Fraction { numerator, denominator }), None) => (numerator, denominator.unwrap_or(100)),
            (None, percent) => (percent.unwrap_or(100), 100),
        };
        Ok(RouteFilter::Mirror { backend: self.backend_ref.into(), denominator, numerator })
    }
}

impl Cors {
    fn lower(self) -> l7::Cors {
        let origin = |origin: String| {
            let kind = match origin.split_once('*') {
                // `*` alone is all origins; elsewhere it stands for any part of a host.
                Some((before, after)) if origin != "*" => {
                    l7::string_match::Kind::Regex(format!("{}.*{}", escape(before), escape(after)))
                }
                _ => l7::string_match::Kind::Exact(origin),
            };
            l7::StringMatch { kind: Some(kind) }
        };
        l7::Cors {
            origins: self.allow_origins.into_iter().map(origin).collect(),
            methods: self.allow_methods,
            headers: self.allow_headers,
            expose: self.expose_headers,
            credentials: self.allow_credentials.unwrap_or_default(),
            // Gateway API: 5 by default.
            max_age: self.max_age.unwrap_or(5),
            forward_unmatched: false,
        }
    }
}

/// A text as a pattern that matches it alone.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_ascii_punctuation() {
            escaped.push('\\');
        }
        escaped.push(letter);
    }
    escaped
}

impl Timeouts {
    fn lower(self) -> Result<l7::Timeouts, String> {
        let nanos = |text: Option<String>| text.map_or(Ok(0), |text| duration(&text));
        let (request, backend) = (nanos(self.request)?, nanos(self.backend_request)?);
        if request > 0 && backend > request {
            return Err("timeouts.backendRequest is longer than timeouts.request".to_owned());
        }
        Ok(l7::Timeouts { request_nanos: request, backend_nanos: backend, hedge_nanos: 0 })
    }
}

impl Retry {
    fn lower(self) -> Result<l7::Retry, String> {
        // Gateway API, HTTPRouteRetry: connection errors and timeouts of a try are retried whatever the codes.
        let on = ["connect-failure", "refused-stream", "reset"].map(str::to_owned).to_vec();
        Ok(l7::Retry {
            attempts: self.attempts.unwrap_or(1),
            codes: self.codes,
            backoff_nanos: self.backoff.map_or(Ok(0), |text| duration(&text))?,
            on,
        })
    }
}
