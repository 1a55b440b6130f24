//! Rules for HTTP of a VirtualService, and what a waypoint makes of one.
//!
//! Where Envoy and Gateway API differ, these mean what they mean to Envoy: prefixes end anywhere, rewrites replace letters,
//! what the rule says of headers counts after what a destination says.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;
use ambit_api::l7::filter::Kind;
use base64::Engine as _;
use serde::Deserialize;
use serde_json::Value;

use super::NamespacedName;
use super::virtual_service::{Destination, is_for_mesh};

/// A rule as written.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Http {
    pub(super) name: String,
    #[serde(rename = "match")]
    pub(super) matches: Vec<Match>,
    pub(super) route: Vec<Share>,
    pub(super) redirect: Option<Redirect>,
    pub(super) direct_response: Option<DirectResponse>,
    pub(super) delegate: Option<Delegate>,
    pub(super) rewrite: Option<Rewrite>,
    pub(super) timeout: Option<String>,
    pub(super) retries: Option<Retries>,
    pub(super) fault: Option<Fault>,
    pub(super) mirror: Option<Destination>,
    pub(super) mirrors: Vec<Mirror>,
    #[serde(alias = "mirror_percent")]
    pub(super) mirror_percent: Option<u32>,
    pub(super) mirror_percentage: Option<Percent>,
    pub(super) cors_policy: Option<Cors>,
    pub(super) headers: Option<Headers>,
}

/// What a text must be; nothing: anything that is there.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Text {
    pub(super) exact: Option<String>,
    pub(super) prefix: Option<String>,
    pub(super) regex: Option<String>,
}

type Texts = BTreeMap<String, Text>;

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Match {
    pub(super) name: String,
    pub(super) uri: Option<Text>,
    pub(super) ignore_uri_case: bool,
    pub(super) scheme: Option<Text>,
    pub(super) method: Option<Text>,
    pub(super) authority: Option<Text>,
    pub(super) headers: Texts,
    pub(super) without_headers: Texts,
    pub(super) query_params: Texts,
    pub(super) port: u32,
    pub(super) source_labels: BTreeMap<String, String>,
    pub(super) source_namespace: String,
    pub(super) gateways: Vec<String>,
    pub(super) stat_prefix: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Share {
    pub(super) destination: Destination,
    #[serde(default)]
    pub(super) weight: u32,
    #[serde(default)]
    pub(super) headers: Option<Headers>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Redirect {
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
pub(super) struct DirectResponse {
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

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Delegate {
    name: String,
    #[serde(default)]
    namespace: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Rewrite {
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
pub(super) struct Retries {
    attempts: u32,
    per_try_timeout: Option<String>,
    retry_on: String,
    backoff: Option<String>,
    retry_remote_localities: Option<bool>,
    retry_ignore_previous_hosts: Option<bool>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Fault {
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
pub(super) struct Percent {
    value: f64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Mirror {
    destination: Destination,
    #[serde(default)]
    percentage: Option<Percent>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Cors {
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

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Headers {
    request: HeaderChanges,
    response: HeaderChanges,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
struct HeaderChanges {
    set: BTreeMap<String, String>,
    add: BTreeMap<String, String>,
    remove: Vec<String>,
}

/// What a rule refers to, as the index knows it.
pub trait Referents {
    /// The backend that a destination is, or one with the reason why it is none.
    fn backend(&self, destination: &Destination) -> l7::Backend;

    /// The clients with these labels, in a namespace or (empty) in all.
    ///
    /// # Errors
    /// Why they can't be listed.
    fn clients(&self, labels: &BTreeMap<String, String>, namespace: &str) -> Result<l7::Clients, String>;
}

/// A percentage in millionths.
const MILLION: u32 = 1_000_000;

impl Http {
    /// The matches of a rule of which something else can't be read; all requests if they can't be read either.
    pub(super) fn with_matches_of(value: &Value) -> Http {
        let matches = value.get("match").cloned().and_then(|matches| serde_json::from_value(matches).ok());
        Http { matches: matches.unwrap_or_default(), ..Http::default() }
    }

    /// Every destination that it names.
    pub fn destinations(&self) -> impl Iterator<Item = &Destination> {
        let shares = self.route.iter().map(|share| &share.destination);
        shares.chain(&self.mirror).chain(self.mirrors.iter().map(|mirror| &mirror.destination))
    }

    /// The VirtualService whose rules it takes over.
    pub fn delegate(&self, own: &Arc<str>) -> Option<NamespacedName> {
        let Delegate { name, namespace } = self.delegate.as_ref()?;
        let namespace = if namespace.is_empty() { own.clone() } else { namespace.as_str().into() };
        Some(NamespacedName::new(namespace, name.as_str()))
    }

    /// Whether it is for clients in the mesh.
    pub fn is_for_mesh(&self) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|one| is_for_mesh(&one.gateways))
    }

    /// Fields that are read and change nothing.
    pub(super) fn without_effect(&self) -> impl Iterator<Item = String> {
        let mut found = Vec::new();
        for (at, one) in self.matches.iter().enumerate() {
            if !one.stat_prefix.is_empty() {
                found.push(format!(
                    "match[{at}].statPrefix has no effect: requests are counted by service and client"
                ));
            }
        }
        let fault = self.fault.as_ref();
        let delay =
            fault.and_then(|fault| fault.delay.as_ref()).map(|it| ("delay", it.percentage, it.percent));
        let abort =
            fault.and_then(|fault| fault.abort.as_ref()).map(|it| ("abort", it.percentage, it.percent));
        for (name, percentage, percent) in delay.into_iter().chain(abort) {
            if percentage.is_none() && percent.is_none() {
                found.push(format!("fault.{name} has no effect without `percentage: {{value}}`"));
            }
        }
        if let Some(retries) = &self.retries {
            if retries.retry_remote_localities == Some(false) {
                found.push(
                    "retries.retryRemoteLocalities has no effect: a retry goes to an endpoint of any locality".to_owned(),
                );
            }
            if retries.retry_ignore_previous_hosts == Some(false) {
                found.push(
                    "retries.retryIgnorePreviousHosts has no effect: a retry goes to another endpoint where there is one"
                        .to_owned(),
                );
            }
            for condition in ["envoy-ratelimited", "retriable-headers", "http3-post-connect-failure"] {
                if retries.conditions().any(|known| known == condition) {
                    found
                        .push(format!("retries.retryOn: {condition} has no effect: it does not happen here"));
                }
            }
        }
        found.into_iter()
    }

    /// The rule as a waypoint follows it; `port` is the port of the service that it is for, or 0 for all of them. A part
    /// that can't be followed makes it answer 500.
    pub fn lower(&self, port: u16, referents: &dyn Referents) -> l7::Rule {
        let own = self.try_lower(port, referents);
        let mut rule = own.unwrap_or_else(|reason| l7::Rule {
            name: self.name.clone(),
            // Its requests are still its own.
            matches: self.matches(port, referents, &mut Vec::new()),
            invalid: reason,
            ..l7::Rule::default()
        });
        if rule.invalid.is_empty() {
            rule.invalid = ambit_route::fault(&rule).unwrap_or_default();
        }
        rule
    }

    fn try_lower(&self, port: u16, referents: &dyn Referents) -> Result<l7::Rule, String> {
        let mut faults = Vec::new();
        let matches = self.matches(port, referents, &mut faults);
        if let Some(fault) = faults.into_iter().next() {
            return Err(fault);
        }
        let headers = self.headers.as_ref().map(Headers::lower).transpose()?.unwrap_or_default();
        let by_destination = self.route.iter().any(|share| share.headers.is_some());
        let filters = self.filters(&headers, by_destination, referents)?;
        let (timeouts, retry) = self.resilience()?;
        Ok(l7::Rule {
            name: self.name.clone(),
            matches,
            filters,
            backends: self.backends(&headers, by_destination, referents)?,
            timeouts: Some(timeouts),
            retry,
            invalid: String::new(),
        })
    }

    fn matches(&self, port: u16, referents: &dyn Referents, faults: &mut Vec<String>) -> Vec<l7::Match> {
        let mut matches: Vec<l7::Match> = Vec::new();
        for one in self.matches.iter().filter(|one| is_for_mesh(&one.gateways)) {
            if port == 0 || one.port == 0 || one.port == u32::from(port) {
                let mut lowered = one.lower(referents, faults);
                if port != 0 {
                    lowered.port = port.into();
                }
                matches.push(lowered);
            }
        }
        if self.matches.is_empty() && port != 0 {
            matches.push(l7::Match { port: port.into(), ..l7::Match::default() });
        }
        matches
    }

    /// Whether requests to a port of a service can match at all.
    pub fn is_for_port(&self, port: u16) -> bool {
        let fits = |one: &Match| one.port == 0 || one.port == u32::from(port);
        self.matches.is_empty() || self.matches.iter().any(|one| is_for_mesh(&one.gateways) && fits(one))
    }

    /// In the order of a request: what answers, then what changes it.
    fn filters(
        &self,
        headers: &[Kind],
        by_destination: bool,
        referents: &dyn Referents,
    ) -> Result<Vec<l7::Filter>, String> {
        let actions = [
            !self.route.is_empty(),
            self.redirect.is_some(),
            self.direct_response.is_some(),
            self.delegate.is_some(),
        ];
        if actions.iter().filter(|given| **given).count() != 1 {
            return Err(
                "one of `route`, `redirect`, `directResponse` and `delegate` must be given".to_owned()
            );
        }
        let mut filters = Vec::new();
        filters.extend(self.fault.as_ref().map(Fault::lower).transpose()?.flatten());
        filters.extend(self.cors_policy.as_ref().map(Cors::lower).transpose()?);
        for kind in headers {
            // With destinations that change headers too, the rule's own changes come after theirs.
            if !by_destination || matches!(kind, Kind::ResponseHeaders(_)) {
                filters.push(kind.clone());
            }
        }
        filters.extend(self.redirect.as_ref().map(|redirect| redirect.lower(self)).transpose()?);
        filters.extend(self.direct_response.as_ref().map(DirectResponse::lower).transpose()?);
        filters.extend(self.rewrite.as_ref().map(Rewrite::lower).transpose()?.flatten());
        if self.rewrite.is_some() && self.route.is_empty() {
            return Err("`rewrite` goes with `route` only".to_owned());
        }
        filters.extend(self.mirrors(referents)?);
        Ok(filters.into_iter().map(|kind| l7::Filter { kind: Some(kind) }).collect())
    }

    fn mirrors(&self, referents: &dyn Referents) -> Result<Vec<Kind>, String> {
        let whole = self.mirror_percent.map(|percent| Percent { value: percent.into() });
        let first = self.mirror.iter().map(|destination| (destination, self.mirror_percentage.or(whole)));
        let more = self.mirrors.iter().map(|mirror| (&mirror.destination, mirror.percentage));
        let lower = |(destination, percentage): (&Destination, Option<Percent>)| {
            Ok(Kind::Mirror(l7::Mirror {
                backend: Some(l7::Backend { weight: 1, ..referents.backend(destination) }),
                denominator: MILLION,
                // Istio, HTTPRoute.mirrorPercentage: without one all requests.
                numerator: share(
                    "the percentage of a mirror",
                    percentage.unwrap_or(Percent { value: 100.0 }),
                )?,
                // As Envoy marks copies.
                shadow_host: true,
            }))
        };
        first.chain(more).map(lower).collect()
    }

    fn backends(
        &self,
        headers: &[Kind],
        by_destination: bool,
        referents: &dyn Referents,
    ) -> Result<Vec<l7::Backend>, String> {
        let lower = |one: &Share| {
            let mut filters = one.headers.as_ref().map(Headers::lower).transpose()?.unwrap_or_default();
            if by_destination {
                let of_requests = |kind: &&Kind| matches!(kind, Kind::RequestHeaders(_));
                filters.extend(headers.iter().filter(of_requests).cloned());
            }
            Ok(l7::Backend {
                // Istio, HTTPRouteDestination.weight: a sole destination gets everything.
                weight: if self.route.len() == 1 { 1 } else { one.weight },
                filters: filters.into_iter().map(|kind| l7::Filter { kind: Some(kind) }).collect(),
                ..referents.backend(&one.destination)
            })
        };
        let backends: Vec<l7::Backend> = self.route.iter().map(lower).collect::<Result<_, String>>()?;
        if !backends.is_empty() && backends.iter().all(|backend| backend.weight == 0) {
            return Err("no destination has a weight".to_owned());
        }
        Ok(backends)
    }

    fn resilience(&self) -> Result<(l7::Timeouts, Option<l7::Retry>), String> {
        let request_nanos = self.timeout.as_deref().map_or(Ok(0), |text| duration("timeout", text))?;
        let of_try = self.retries.as_ref().and_then(|retries| retries.per_try_timeout.as_deref());
        let backend_nanos = of_try.map_or(Ok(0), |text| duration("retries.perTryTimeout", text))?;
        let retry = self.retries.as_ref().map(Retries::lower).transpose()?;
        Ok((l7::Timeouts { request_nanos, backend_nanos }, retry))
    }
}

impl Text {
    /// The match; presence where nothing is asked of the text. A prefix of nothing and a pattern of anything ask nothing.
    fn lower(&self) -> Result<l7::StringMatch, String> {
        use l7::string_match::Kind::{Exact, Prefix, Present, Regex};
        let kind = match (&self.exact, &self.prefix, &self.regex) {
            (None, None, None) => Present(true),
            (Some(text), None, None) | (None, Some(text), None) | (None, None, Some(text))
                if text.is_empty() =>
            {
                Present(true)
            }
            (None, None, Some(text)) if text == "*" => Present(true),
            (Some(text), None, None) => Exact(text.clone()),
            (None, Some(text), None) => Prefix(text.clone()),
            (None, None, Some(text)) => Regex(text.clone()),
            _ => return Err("one of `exact`, `prefix` and `regex` must be given".to_owned()),
        };
        Ok(l7::StringMatch { kind: Some(kind) })
    }

    fn lower_path(&self, ignore_case: bool) -> Result<l7::PathMatch, String> {
        use l7::path_match::Kind::{Exact, Regex, TextPrefix};
        use l7::string_match::Kind as Of;
        let kind = match self.lower()?.kind {
            Some(Of::Exact(path)) => Exact(path),
            Some(Of::Regex(path)) => Regex(path),
            Some(Of::Prefix(path)) => TextPrefix(path),
            Some(Of::Present(_)) | None => TextPrefix("/".to_owned()),
        };
        Ok(l7::PathMatch { kind: Some(kind), ignore_case })
    }
}

impl Match {
    /// The match; what can't be read of it is added to `faults` and counts as met.
    fn lower(&self, referents: &dyn Referents, faults: &mut Vec<String>) -> l7::Match {
        let mut lowered = l7::Match {
            port: self.port,
            source_namespace: self.source_namespace.clone(),
            ..l7::Match::default()
        };
        let mut note = |fault: String| faults.push(fault);
        // Envoy: a match without a path is one of the prefix `/`.
        let path = self
            .uri
            .as_ref()
            .map_or_else(|| Text::default().lower_path(false), |uri| uri.lower_path(self.ignore_uri_case));
        lowered.path = path.map_err(&mut note).ok();
        let mut text = |text: &Option<Text>| {
            let text = text.as_ref().filter(|text| **text != Text::default())?;
            text.lower().map_err(&mut note).ok()
        };
        lowered.scheme = text(&self.scheme);
        lowered.authority = text(&self.authority);
        lowered.method_match = text(&self.method);
        let mut fields = |texts: &Texts, invert: bool| {
            let lower = |(name, text): (&String, &Text)| {
                let value = text.lower().map_err(&mut note).ok();
                value.map(|value| l7::FieldMatch { name: name.clone(), value: Some(value), invert })
            };
            texts.iter().filter_map(lower).collect::<Vec<_>>()
        };
        lowered.headers = fields(&self.headers, false);
        lowered.headers.extend(fields(&self.without_headers, true));
        // Istio, HTTPMatchRequest.headers: these keys are ignored.
        lowered
            .headers
            .retain(|field| !["uri", "scheme", "method", "authority"].contains(&field.name.as_str()));
        lowered.query = fields(&self.query_params, false);
        if !self.source_labels.is_empty() {
            let clients = referents.clients(&self.source_labels, &self.source_namespace);
            lowered.clients = clients.map_err(&mut note).ok();
        }
        lowered
    }
}

impl Redirect {
    fn lower(&self, rule: &Http) -> Result<Kind, String> {
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
    fn lower(&self) -> Result<Kind, String> {
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
    fn lower(&self) -> Result<Option<Kind>, String> {
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
    fn conditions(&self) -> impl Iterator<Item = &str> {
        self.retry_on.split(',').map(str::trim).filter(|condition| !condition.is_empty())
    }

    fn lower(&self) -> Result<l7::Retry, String> {
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
    fn lower(&self) -> Result<Option<Kind>, String> {
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
fn share(field: &str, Percent { value }: Percent) -> Result<u32, String> {
    if !(0.0..=100.0).contains(&value) {
        return Err(format!("{field} {value} is not between 0 and 100"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and a million")]
    Ok((value * 10_000.0).round() as u32)
}

impl Cors {
    fn lower(&self) -> Result<Kind, String> {
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

impl Headers {
    fn lower(&self) -> Result<Vec<Kind>, String> {
        let mut kinds = Vec::new();
        if self.request != HeaderChanges::default() {
            kinds.push(Kind::RequestHeaders(self.request.lower()?));
        }
        if self.response != HeaderChanges::default() {
            kinds.push(Kind::ResponseHeaders(self.response.lower()?));
        }
        Ok(kinds)
    }
}

impl HeaderChanges {
    /// Envoy removes first: what is removed and added is set, and what is removed and set is set.
    fn lower(&self) -> Result<l7::HeaderChange, String> {
        let removed = |name: &str| self.remove.iter().any(|gone| gone.eq_ignore_ascii_case(name));
        let known =
            |name: &str, all: &BTreeMap<String, String>| all.keys().any(|key| key.eq_ignore_ascii_case(name));
        let mut change = l7::HeaderChange::default();
        for (name, value) in &self.set {
            change.set.push(header(name, value)?);
        }
        for (name, value) in &self.add {
            let list = if removed(name) { &mut change.set } else { &mut change.add };
            list.push(header(name, value)?);
        }
        let gone = self.remove.iter().filter(|name| !known(name, &self.set) && !known(name, &self.add));
        change.remove = gone.cloned().collect();
        Ok(change)
    }
}

fn header(name: &str, value: &str) -> Result<l7::Header, String> {
    // Envoy's operators stand between percent signs.
    if value.replace("%%", "").contains('%') {
        return Err(format!("the value {value:?} of header {name} has operators, which are not supported"));
    }
    let name = if name.eq_ignore_ascii_case(":authority") { "host" } else { name };
    Ok(l7::Header { name: name.to_owned(), value: value.replace("%%", "%") })
}

/// A length of time as Go and protobuf write it: `1.5s`, `1h30m`, `500ms`. In nanoseconds.
pub(super) fn duration(field: &str, text: &str) -> Result<u64, String> {
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
