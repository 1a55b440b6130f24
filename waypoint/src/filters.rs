//! Step 6: the filters of the rule, in order, on the way to the backend; and what of them waits for the response.

use std::sync::Arc;

use ambit_policy::Token;
use ambit_route::filter::{Abort, Cors, HeaderChange, Mirror, NoPath, Origin};
use ambit_route::{Filter, Rule};
use bytes::Bytes;
use http::header::{ACCESS_CONTROL_REQUEST_METHOD, LOCATION, ORIGIN};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};

use crate::accept::Inbound;
use crate::authorize::Head;
use crate::body::ResponseBody;
use crate::exchange::Answered;
use crate::failure::Failure;
use crate::matching::Routed;
use crate::proxy::Published;
use crate::sanitise::Sane;
use crate::traffic::{self, RequestView};

/// What filters leave to be done.
#[derive(Debug, Default)]
pub struct OnResponse {
    /// The rule, whose response filters are applied.
    rule: Option<Arc<Rule>>,
    /// The backend's place among those of the rule, whose response filters come first.
    pub backend: Option<ambit_route::Backend>,
    /// Where the request came from, if the rule answers for other origins.
    origin: Option<HeaderValue>,
    /// The host that the backend sees, if a filter changed it.
    pub host: Option<Authority>,
    /// Copies to be sent.
    pub mirrors: Vec<Mirror>,
}

/// What became of a request.
#[derive(Debug)]
pub enum Filtered {
    /// It goes on.
    Goes(OnResponse),
    /// A filter answered.
    Answered(Box<Answered>),
}

/// What rate limits are asked with beside the request.
#[derive(Clone, Copy)]
pub struct Limits<'a> {
    /// What is in force.
    pub published: &'a Published,
    /// The request's token.
    pub token: Option<&'a Token>,
}

impl Limits<'_> {
    fn take(
        &self,
        routed: Option<&Routed>,
        inbound: &Inbound,
        sane: &Sane,
        parts: &Parts,
    ) -> Result<(), Failure> {
        let rule = routed.map(|routed| &*routed.rule);
        traffic::limit(
            self.published,
            inbound,
            RequestView { sane, head: Head::of(parts), token: self.token, rule },
        )
    }
}

/// Applies rate limits and the filters of the rule. Faults at the beginning of the rule come before the limits, so that limits see the
/// request as it came.
///
/// # Errors
/// [`Failure::Fault`], [`Failure::FaultGrpc`], [`Failure::InvalidRoute`]; [`Failure::RateLimited`], [`Failure::Denied`].
pub async fn on_request(
    routed: Option<&Routed>,
    inbound: &Inbound,
    sane: &Sane,
    parts: &mut Parts,
    limits: Limits<'_>,
) -> Result<Filtered, Failure> {
    let mut on_response = OnResponse::default();
    let filters = routed.map_or(&[][..], |routed| &routed.rule.filters);
    let faults = filters.iter().take_while(|filter| matches!(filter, Filter::Fault(_))).count();
    let (faults, filters) = filters.split_at(faults);
    for filter in faults {
        fault(filter).await?;
    }
    limits.take(routed, inbound, sane, parts)?;
    let Some(routed) = routed else { return Ok(Filtered::Goes(on_response)) };
    on_response.rule = Some(routed.rule.clone());
    // Each filter sees what the ones before it made; a redirection refers to the request as it came.
    let mut prefix = routed.prefix;
    for filter in filters {
        match filter {
            Filter::Fault(_) => fault(filter).await?,
            Filter::Cors(cors) => {
                let Some(origin) = parts.headers.get(ORIGIN).cloned() else { continue };
                if cors.forward_unmatched && !cors.allows(&origin) {
                    continue;
                }
                // The Fetch standard: a preflight is an OPTIONS that says what it is before.
                if parts.method == Method::OPTIONS
                    && parts.headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
                {
                    let headers = cors.preflight(&parts.headers, &origin);
                    return Ok(Filtered::Answered(answered(
                        StatusCode::OK,
                        headers,
                        Bytes::new(),
                        on_response,
                    )));
                }
                on_response.origin = Some(origin);
            }
            Filter::Redirect(redirect) => {
                let origin = Origin {
                    scheme: sane.scheme,
                    host: &sane.host,
                    authority: &sane.authority,
                    port: inbound.destination.port(),
                    path: parts.uri.path(),
                    query: parts.uri.query(),
                    prefix,
                };
                let location = redirect.location(&origin).ok_or_else(|| invalid(routed, "no location"))?;
                let headers = HeaderMap::from_iter([(LOCATION, location)]);
                let status = redirect.status;
                return Ok(Filtered::Answered(answered(status, headers, Bytes::new(), on_response)));
            }
            Filter::Respond(status, body) => {
                let headers = HeaderMap::new();
                return Ok(Filtered::Answered(answered(*status, headers, body.clone(), on_response)));
            }
            Filter::Mirror(mirror) => on_response.mirrors.push(mirror.clone()),
            Filter::RequestHeaders(_) | Filter::Rewrite(_) | Filter::ResponseHeaders(_) => {
                change(filter, &mut on_response, &mut prefix, parts)
                    .map_err(|reason| invalid(routed, reason))?;
            }
        }
    }
    Ok(Filtered::Goes(on_response))
}

/// Delays or ends a request where the filter is a fault.
async fn fault(filter: &Filter) -> Result<(), Failure> {
    let Filter::Fault(fault) = filter else { return Ok(()) };
    if let Some(delay) = fault.delay(rand::random()) {
        tokio::time::sleep(delay).await;
    }
    match fault.abort(rand::random()) {
        Some(Abort::Http(status)) => Err(Failure::Fault(status)),
        Some(Abort::Grpc(status)) => Err(Failure::FaultGrpc(status)),
        None => Ok(()),
    }
}

/// Applies the filters of the backend that was drawn. Those that answer have no place there.
///
/// # Errors
/// [`Failure::InvalidRoute`].
pub fn on_backend(
    routed: &Routed,
    backend: &ambit_route::Backend,
    on_response: &mut OnResponse,
    parts: &mut Parts,
) -> Result<(), Failure> {
    let mut prefix = routed.prefix;
    for filter in &backend.filters {
        match filter {
            Filter::RequestHeaders(_) | Filter::Rewrite(_) | Filter::ResponseHeaders(_) => {
                change(filter, on_response, &mut prefix, parts).map_err(|reason| invalid(routed, reason))?;
            }
            Filter::Mirror(mirror) => on_response.mirrors.push(mirror.clone()),
            Filter::Fault(_) | Filter::Cors(_) | Filter::Redirect(_) | Filter::Respond(..) => {
                return Err(invalid(routed, "a filter that answers, at a backend"));
            }
        }
    }
    if !backend.filters.is_empty() {
        on_response.backend = Some(backend.clone());
    }
    Ok(())
}

/// Changes headers, host and path; or says why a path can't be what the filter makes of it.
fn change(
    filter: &Filter,
    on_response: &mut OnResponse,
    prefix: &mut usize,
    parts: &mut Parts,
) -> Result<(), &'static str> {
    match filter {
        Filter::RequestHeaders(change) => {
            change.apply(&mut parts.headers);
            if parts.headers.remove(http::header::HOST).is_some() {
                let host = change.host().and_then(|host| Authority::try_from(host.as_bytes()).ok());
                on_response.host = host.or(on_response.host.take());
            }
        }
        Filter::Rewrite(rewrite) => {
            if let Some(host) = rewrite.host() {
                on_response.host = Some(host.clone());
            }
            if let Some(path) = rewrite.path_and_query(&parts.uri, *prefix) {
                parts.uri = path.map_err(|NoPath| "the rewritten path is no path")?.into();
                // A later filter would find nothing of the prefix any more.
                *prefix = parts.uri.path().len();
            }
        }
        _ => {}
    }
    Ok(())
}

fn invalid(routed: &Routed, reason: &str) -> Failure {
    Failure::InvalidRoute { route: routed.rule.route.to_string(), reason: reason.to_owned() }
}

fn answered(status: StatusCode, headers: HeaderMap, body: Bytes, filters: OnResponse) -> Box<Answered> {
    let mut response = Response::new(ResponseBody::full(body));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    Box::new(Answered { response, filters, upgrade: None })
}

impl OnResponse {
    /// Applies what waits for the response.
    pub fn apply(&self, headers: &mut HeaderMap) {
        if let Some(backend) = &self.backend {
            response_headers(&backend.filters).for_each(|change| change.apply(headers));
        }
        let Some(rule) = &self.rule else { return };
        response_headers(&rule.filters).for_each(|change| change.apply(headers));
        if let Some(origin) = &self.origin {
            cors(&rule.filters).for_each(|cors| cors.apply(origin, headers));
        }
    }
}

fn response_headers(filters: &[Filter]) -> impl Iterator<Item = &HeaderChange> {
    filters.iter().filter_map(|filter| match filter {
        Filter::ResponseHeaders(change) => Some(change),
        _ => None,
    })
}

fn cors(filters: &[Filter]) -> impl Iterator<Item = &Cors> {
    filters.iter().filter_map(|filter| match filter {
        Filter::Cors(cors) => Some(cors),
        _ => None,
    })
}
