//! What a rule does with a request besides choosing a destination and changing headers: redirections, answers of its own,
//! rewrites, retries, faults, CORS.

use ambit_api::l7;
use ambit_api::l7::filter::Kind;
use base64::Engine as _;
use serde::Deserialize;

use super::Http;
use super::matches::{Match, Text};

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(in super::super) struct Redirect {
    uri: String,
    authority: String,
    port: u16,
    derive_port: Option<DerivePort>,
    scheme: String,
    redirect_code: u32,
    prefix_rewrite: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum DerivePort {
    FromProtocolDefault,
    FromRequestPort,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(in super::super) struct DirectResponse {
    status: u32,
    #[serde(default)]
    body: Option<Body>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Body {
    string: Option<String>,
    bytes: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(in super::super) struct Rewrite {
    uri: String,
    authority: String,
    uri_regex_rewrite: Option<RegexRewrite>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct RegexRewrite {
    #[serde(rename = "match")]
    pattern: String,
    rewrite: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(in super::super) struct Retries {
    attempts: u32,
    pub(super) per_try_timeout: Option<String>,
    retry_on: String,
    backoff: Option<String>,
    retry_remote_localities: Option<bool>,
    retry_ignore_previous_hosts: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(in super::super) struct Fault {
    delay: Option<Delay>,
    abort: Option<Abort>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Delay {
    fixed_delay: Option<String>,
    percentage: Option<Percent>,
    percent: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Abort {
    http_status: Option<u32>,
    grpc_status: Option<String>,
    percentage: Option<Percent>,
    percent: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(in super::super) struct Percent {
    pub(super) value: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(in super::super) struct Cors {
    allow_origins: Vec<Text>,
    allow_origin: Vec<String>,
    allow_methods: Vec<String>,
    allow_headers: Vec<String>,
    expose_headers: Vec<String>,
    max_age: Option<String>,
    allow_credentials: Option<bool>,
    unmatched_preflights: Option<UnmatchedPreflights>,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum UnmatchedPreflights {
    Unspecified,
    Forward,
    Ignore,
}

impl Redirect {
    pub(super) fn lower(&self, rule: &Http) -> Result<Kind, String> {
        use l7::path_change::Kind::{Full, TextPrefix};
        let path = match (self.uri.as_str(), self.prefix_rewrite.as_str()) {
            ("", "") => None,
            (uri, "") => Some(Full(uri.to_owned())),
            ("", new) => {
                let is_prefix = |one: &Match| one.uri.as_ref().is_none_or(|uri| uri.prefix.is_some());
                if !rule.matches.iter().all(is_prefix) {
                    return Err("`prefixRewrite` goes with a match of a prefix".to_owned());
                }
                Some(TextPrefix(new.to_owned()))
            }
            _ => return Err("`uri` and `prefixRewrite` exclude each other".to_owned()),
        };
        let port_choice = match self.derive_port {
            None => l7::PortChoice::OfAuthority,
            Some(_) if self.port != 0 => return Err("`port` and `derivePort` exclude each other".to_owned()),
            Some(DerivePort::FromProtocolDefault) => l7::PortChoice::OfProtocol,
            Some(DerivePort::FromRequestPort) => l7::PortChoice::OfRequest,
        };
        let status = if self.redirect_code == 0 { 301 } else { self.redirect_code };
        if !matches!(status, 301 | 302 | 303 | 307 | 308) {
            return Err(format!("`redirectCode` {status} is no redirection"));
        }
        Ok(Kind::Redirect(l7::Redirect {
            scheme: self.scheme.clone(),
            hostname: self.authority.clone(),
            path: path.map(|kind| l7::PathChange { kind: Some(kind) }),
            port: self.port.into(),
            status,
            port_choice: port_choice as i32,
        }))
    }
}

impl DirectResponse {
    pub(super) fn lower(&self) -> Result<Kind, String> {
        /// As much as Istio takes.
        const LONGEST: usize = 1 << 20;
        let body = match &self.body {
            None => Vec::new(),
            Some(Body { string: Some(text), bytes: None }) => text.clone().into_bytes(),
            Some(Body { string: None, bytes: Some(text) }) => {
                let decoded = base64::engine::general_purpose::STANDARD.decode(text);
                decoded.map_err(|error| format!("`directResponse.body.bytes` is no base64: {error}"))?
            }
            Some(_) => return Err("`directResponse.body` needs one of `string` and `bytes`".to_owned()),
        };
        if body.len() > LONGEST {
            return Err(format!("`directResponse.body` is longer than {LONGEST} bytes"));
        }
        if !(200..600).contains(&self.status) {
            return Err(format!("`directResponse.status` {} is no status of an answer", self.status));
        }
        Ok(Kind::Respond(l7::DirectResponse { status: self.status, body: body.into() }))
    }
}

impl Rewrite {
    pub(super) fn lower(&self) -> Result<Option<Kind>, String> {
        use l7::path_change::Kind::{Regex, TextPrefix};
        let path = match (self.uri.as_str(), &self.uri_regex_rewrite) {
            ("", None) => None,
            (uri, None) if uri.starts_with('/') => Some(TextPrefix(uri.to_owned())),
            (_, None) => return Err("`rewrite.uri` must begin with a slash".to_owned()),
            ("", Some(RegexRewrite { pattern, rewrite })) => {
                Some(Regex(l7::RegexRewrite { pattern: pattern.clone(), substitution: rewrite.clone() }))
            }
            _ => return Err("`rewrite.uri` and `rewrite.uriRegexRewrite` exclude each other".to_owned()),
        };
        if path.is_none() && self.authority.is_empty() {
            return Ok(None);
        }
        let path = path.map(|kind| l7::PathChange { kind: Some(kind) });
        Ok(Some(Kind::Rewrite(l7::Rewrite { hostname: self.authority.clone(), path })))
    }
}

impl Retries {
    /// Settings that change nothing, and why.
    pub(super) fn without_effect(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.retry_remote_localities == Some(false) {
            found.push(
                "retries.retryRemoteLocalities has no effect: a retry goes to an endpoint of any locality"
                    .to_owned(),
            );
        }
        if self.retry_ignore_previous_hosts == Some(false) {
            found.push(
                "retries.retryIgnorePreviousHosts has no effect: a retry goes to another endpoint where there is one"
                    .to_owned(),
            );
        }
        for condition in ["envoy-ratelimited", "retriable-headers", "http3-post-connect-failure"] {
            if self.conditions().any(|known| known == condition) {
                found.push(format!("retries.retryOn: {condition} has no effect: it does not happen here"));
            }
        }
        found
    }

    fn conditions(&self) -> impl Iterator<Item = &str> {
        self.retry_on.split(',').map(str::trim).filter(|condition| !condition.is_empty())
    }

    pub(super) fn lower(&self) -> Result<l7::Retry, String> {
        /// Istio's, where a rule names none.
        const DEFAULT: [&str; 4] = ["connect-failure", "refused-stream", "unavailable", "cancelled"];
        let (mut on, mut codes) = (Vec::new(), Vec::new());
        for condition in self.conditions() {
            match condition.parse::<u32>() {
                Ok(code) => codes.push(code),
                Err(_) => on.push(condition.to_owned()),
            }
        }
        if on.is_empty() && codes.is_empty() {
            on = DEFAULT.map(str::to_owned).to_vec();
        }
        Ok(l7::Retry {
            attempts: self.attempts,
            codes,
            backoff_nanos: self.backoff.as_deref().map_or(Ok(0), |text| duration("retries.backoff", text))?,
            on,
        })
    }
}

impl Fault {
    /// Settings that change nothing, and why.
    pub(super) fn without_effect(&self) -> Vec<String> {
        let delay = self.delay.as_ref().map(|it| ("delay", it.percentage, it.percent));
        let abort = self.abort.as_ref().map(|it| ("abort", it.percentage, it.percent));
        let never = |(name, percentage, percent): (&str, Option<Percent>, Option<u32>)| {
            let is_never = percentage.is_none() && percent.is_none();
            is_never.then(|| format!("fault.{name} has no effect without `percentage: {{value}}`"))
        };
        delay.into_iter().chain(abort).filter_map(never).collect()
    }

    pub(super) fn lower(&self) -> Result<Option<Kind>, String> {
        let mut fault = l7::Fault::default();
        if let Some(delay) = &self.delay {
            let text = delay.fixed_delay.as_deref().ok_or("`fault.delay` needs a `fixedDelay`")?;
            fault.delay_nanos = duration("fault.delay.fixedDelay", text)?;
            fault.delay_ppm = share("fault.delay.percentage", of_fault(delay.percentage, delay.percent))?;
        }
        if let Some(abort) = &self.abort {
            fault.abort_ppm = share("fault.abort.percentage", of_fault(abort.percentage, abort.percent))?;
            match (abort.http_status, &abort.grpc_status) {
                (Some(status), None) if (200..600).contains(&status) => fault.abort_status = status,
                (Some(status), None) => {
                    return Err(format!("`fault.abort.httpStatus` {status} is no status of an answer"));
                }
                (None, Some(name)) => fault.abort_grpc = grpc_status(name)?,
                _ => return Err("`fault.abort` needs one of `httpStatus` and `grpcStatus`".to_owned()),
            }
        }
        Ok((fault != l7::Fault::default()).then_some(Kind::Fault(fault)))
    }
}

/// Istio, HTTPFaultInjection: without a percentage no request.
fn of_fault(percentage: Option<Percent>, percent: Option<u32>) -> Percent {
    percentage.or(percent.map(|percent| Percent { value: percent.into() })).unwrap_or_default()
}

/// The number of a status of gRPC (`google.rpc.Code`).
fn grpc_status(name: &str) -> Result<u32, String> {
    const NAMES: [&str; 16] = [
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    ];
    let numbered = (1_u32..).zip(NAMES).find(|(_, known)| *known == name).map(|(number, _)| number);
    let number = numbered.or_else(|| name.parse().ok().filter(|number| (1..=16).contains(number)));
    number.ok_or_else(|| format!("`fault.abort.grpcStatus` {name:?} is no status of gRPC"))
}

/// Millionths.
pub(super) fn share(field: &str, Percent { value }: Percent) -> Result<u32, String> {
    if !(0.0..=100.0).contains(&value) {
        return Err(format!("{field} {value} is not between 0 and 100"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and a million")]
    Ok((value * 10_000.0).round() as u32)
}

impl Cors {
    pub(super) fn lower(&self) -> Result<Kind, String> {
        let mut origins: Vec<l7::StringMatch> =
            self.allow_origins.iter().map(Text::lower).collect::<Result<_, _>>()?;
        let exact =
            |origin: &String| l7::StringMatch { kind: Some(l7::string_match::Kind::Exact(origin.clone())) };
        origins.extend(self.allow_origin.iter().map(exact));
        let max_age = self.max_age.as_deref().map_or(Ok(0), |text| duration("corsPolicy.maxAge", text))?;
        Ok(Kind::Cors(l7::Cors {
            origins,
            methods: self.allow_methods.clone(),
            headers: self.allow_headers.clone(),
            expose: self.expose_headers.clone(),
            credentials: self.allow_credentials.unwrap_or_default(),
            max_age: u32::try_from(max_age / 1_000_000_000).unwrap_or(u32::MAX),
            forward_unmatched: self.unmatched_preflights != Some(UnmatchedPreflights::Ignore),
        }))
    }
}

/// A length of time as Go and protobuf write it: `1.5s`, `1h30m`, `500ms`. In nanoseconds.
pub(in super::super) fn duration(field: &str, text: &str) -> Result<u64, String> {
    const UNITS: [(&str, f64); 7] =
        [("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("h", 3.6e12), ("m", 6e10), ("s", 1e9)];
    let wrong = || format!("`{field}` {text:?} is no duration");
    let (mut rest, mut nanos) = (text, 0.0_f64);
    while !rest.is_empty() {
        let end = rest.find(|letter: char| !letter.is_ascii_digit() && letter != '.').ok_or_else(wrong)?;
        let (number, tail) = rest.split_at_checked(end).ok_or_else(wrong)?;
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let unit = UNITS.iter().find_map(|(unit, scale)| Some((tail.strip_prefix(unit)?, *scale)));
        let (tail, scale) = unit.ok_or_else(wrong)?;
        nanos += number * scale;
        rest = tail;
    }
    // A century is as good as for ever, and is exact enough.
    if text.is_empty() || !(0.0..=3.2e18).contains(&nanos) {
        return Err(wrong());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within the bounds above")]
    Ok(nanos.round() as u64)
}
