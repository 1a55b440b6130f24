//! How this waypoint would decide about a request: `/explain/request` of the admin server, for `ambit why`.
//!
//! The steps are those of a real request, by the functions that it meets; nothing is sent, and no authorizer is asked. Connections that are
//! passed on unread are explained alike.

mod connection;
mod endpoints;
mod traffic;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ambit_api::Authority;
use ambit_directory::WorkloadUid;
use ambit_explain::{Considered, Explanation, Next, Workload as Named};
use ambit_identity::SpiffeId;
use ambit_policy::{Action, Content, HttpRequest, Policy, Token};
use ambit_route::{Filter, RequestHead, Rule};
use ambit_telemetry::Admin;
use ambit_telemetry::http::{Query, Reply, reply, text};
use ambit_token::rules;
use http::request::Parts;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode};

use self::endpoints::{split, straight_on};
use self::traffic::Applying;
use crate::accept::{self, Destination};
use crate::failure::Failure;
use crate::matching::Routed;
use crate::policies;
use crate::proxy::{Proxy, Published};
use crate::sanitise::{self, Claims, Sane};
use crate::session::Session;

/// A parameter that is missing or can't be read.
#[derive(Debug, thiserror::Error)]
#[error("parameter {name}: {what}")]
struct ParameterError {
    name: &'static str,
    what: String,
}

/// A request to explain.
struct Inquiry {
    client: SpiffeId,
    source: IpAddr,
    destination: Authority,
    parts: Parts,
}

/// Adds the route.
///
/// `GET /explain/request?from=SPIFFE_ID&source=ADDRESS&to=HOST:PORT&method=GET&path=/&host=HOST&headers=NAME: VALUE`: what would be done with a
/// request; `headers` has one field a line.
/// `GET /explain/connection?from=SPIFFE_ID&source=ADDRESS&to=HOST:PORT&server-name=NAME`: what would be done with a connection on which no HTTP
/// is spoken; with `server-name` it begins with TLS.
pub fn routes(admin: Admin, proxy: &Arc<Proxy>) -> Admin {
    let (of_requests, of_connections) = (proxy.clone(), proxy.clone());
    admin
        .get("/explain/request", move |query| {
            let answer = answer(Inquiry::read(&query).map(|asked| explain(&of_requests, asked)));
            async move { answer }
        })
        .get("/explain/connection", move |query| {
            let answer = answer(connection::explain(&of_connections, &query));
            async move { answer }
        })
}

fn answer(explained: Result<Explanation, ParameterError>) -> Reply {
    match explained.map(|explanation| serde_json::to_vec(&explanation)) {
        Ok(Ok(body)) => reply(StatusCode::OK, "application/json", body.into()),
        Ok(Err(error)) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        Err(error) => text(StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

impl Inquiry {
    fn read(query: &Query) -> Result<Self, ParameterError> {
        let client = parse("from", parameter(query, "from")?)?;
        let source = parse("source", query.get("source").unwrap_or("0.0.0.0"))?;
        let destination: Authority = parse("to", parameter(query, "to")?)?;
        let method: Method = parse("method", query.get("method").unwrap_or("GET"))?;
        let path = query.get("path").unwrap_or("/");
        let host = query.get("host").map_or_else(|| destination.to_string(), str::to_owned);
        let wrong = |error: http::Error| ParameterError { name: "path", what: format!("{path:?}: {error}") };
        let request = Request::builder().method(method).uri(path).header(http::header::HOST, host);
        let (mut parts, ()) = request.body(()).map_err(wrong)?.into_parts();
        for line in query.get("headers").unwrap_or_default().lines() {
            let wrong = |what: String| ParameterError { name: "headers", what: format!("{line:?}: {what}") };
            let (name, value) = line.split_once(':').ok_or_else(|| wrong("it has no colon".to_owned()))?;
            let name: HeaderName = name
                .trim()
                .parse()
                .map_err(|error: http::header::InvalidHeaderName| wrong(error.to_string()))?;
            let value: HeaderValue = value
                .trim()
                .parse()
                .map_err(|error: http::header::InvalidHeaderValue| wrong(error.to_string()))?;
            parts.headers.append(name, value);
        }
        Ok(Self { client, source, destination, parts })
    }
}

fn parameter<'q>(query: &'q Query, name: &'static str) -> Result<&'q str, ParameterError> {
    query.get(name).ok_or_else(|| ParameterError { name, what: "it is missing".to_owned() })
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(
    name: &'static str,
    value: &str,
) -> Result<T, ParameterError> {
    value.parse().map_err(|error: T::Err| ParameterError { name, what: format!("{value:?}: {error}") })
}

fn explain(proxy: &Proxy, asked: Inquiry) -> Explanation {
    let published = proxy.published.load_full();
    let Inquiry { client, source, destination, mut parts } = asked;
    let mut explanation = Explanation::begin();
    let network = &proxy.settings.network;
    let Some(found) = accept::find(&published, network, client.namespace(), &destination) else {
        let text = format!("{destination} is nothing that is bound to this waypoint");
        return failed(explanation, "accept", &Failure::Unavailable(text));
    };
    explanation.passes(
        "accept",
        format!("{destination} is bound to this waypoint: {}", found.host()),
        Vec::new(),
    );
    let host = found.host();
    let claims = Claims {
        client: source,
        forwarded_for: &sanitise::address_value(source),
        trusted: false,
        proxies: None,
        ends_tls: false,
        default_host: &host,
        target_size: proxy.settings.limits.target_size,
    };
    let written = parts.uri.path().to_owned();
    let sane = match sanitise::sanitise(&mut parts, &claims) {
        Ok(sane) => sane,
        Err(failure) => return failed(explanation, "sanitise", &failure),
    };
    if parts.uri.path() != written {
        explanation.warns("sanitise", format!("the path is read as {}", parts.uri.path()), Vec::new());
    }
    let request = Seen { published: &published, destination: &found, client: &client, source, sane: &sane };
    let matched = request.matched(&parts);
    let token = match request.token(&mut parts) {
        Ok(token) => token,
        Err(failure) => return failed(explanation, "authenticate", &failure),
    };
    let explanation = request.authorize(explanation, &parts, token.as_ref());
    if explanation.refusal().is_some() {
        return explanation;
    }
    let found = matched.rule().cloned();
    let applying = Applying::find(&request, &parts, token.as_ref(), found.as_deref());
    let explanation = applying.conditions(explanation);
    if explanation.refusal().is_some() {
        return explanation;
    }
    let rule = match matched {
        Matched::Straight => None,
        Matched::None(considered) => {
            let text = Failure::NoRoute.to_string();
            return explanation.refuses("match", text, considered).goes(answered(&Failure::NoRoute));
        }
        Matched::Rule(routed, considered) => Some((*routed, considered)),
    };
    forward(proxy, &request, rule, &applying, explanation)
}

/// A request in the form in which it is decided about.
struct Seen<'a> {
    published: &'a Published,
    destination: &'a Destination,
    client: &'a SpiffeId,
    source: IpAddr,
    sane: &'a Sane,
}

enum Matched {
    /// No route is attached.
    Straight,
    /// Routes are attached, and none matches.
    None(Vec<Considered>),
    Rule(Box<Routed>, Vec<Considered>),
}

impl Matched {
    fn rule(&self) -> Option<&Arc<Rule>> {
        match self {
            Self::Rule(routed, _) => Some(&routed.rule),
            Self::Straight | Self::None(_) => None,
        }
    }
}

impl Seen<'_> {
    fn matched(&self, parts: &Parts) -> Matched {
        let Some(service) = self.destination.service() else { return Matched::Straight };
        let (host, port) = (&service.host, self.destination.port());
        let client = self.client.namespace();
        let Some(routes) = self.published.routes.routes(&host.namespace, &host.hostname, port, client) else {
            return Matched::Straight;
        };
        let head = RequestHead {
            method: &parts.method,
            host: &self.sane.host,
            path: parts.uri.path(),
            query: parts.uri.query(),
            headers: &parts.headers,
            scheme: self.sane.scheme,
            authority: &self.sane.authority,
            port,
            client_namespace: client,
            client_address: self.source.to_canonical(),
        };
        let matched = routes.find(&head);
        let session = matched.as_ref().and_then(|matched| {
            let path = (parts.uri.path(), matched.common);
            let persistence = matched.rule.session.as_ref()?;
            let (keys, scheme) = (self.published.session_keys.clone(), self.sane.scheme);
            Some(Session::read(persistence, keys, &parts.headers, path, scheme, SystemTime::now()))
        });
        let found = matched.map(|matched| matched.rule.clone());
        let considered = routes.candidates(&head).into_iter().map(|candidate| {
            let object = rule_name(&candidate.rule);
            let counts = found.as_ref().is_some_and(|rule| Arc::ptr_eq(rule, &candidate.rule));
            match candidate.unmet {
                None if counts => Considered::counts(object, "matches and comes first"),
                None => Considered::passed_over(object, "matches too, and comes later"),
                Some(unmet) => Considered::passed_over(object, unmet),
            }
        });
        let considered = considered.collect();
        match found {
            Some(rule) => Matched::Rule(Box::new(Routed { rule, prefix: 0, session }), considered),
            None => Matched::None(considered),
        }
    }

    fn token(&self, parts: &mut Parts) -> Result<Option<Token>, Failure> {
        let mut tokens = self.published.policies.tokens(self.destination).peekable();
        if tokens.peek().is_none() {
            return Ok(None);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        rules::authenticate(tokens, &mut parts.headers, &mut parts.uri, now).map_err(Failure::Unauthenticated)
    }

    fn authorize(&self, mut explanation: Explanation, parts: &Parts, token: Option<&Token>) -> Explanation {
        let Self { published, destination, client, source, sane } = *self;
        let http = HttpRequest {
            authority: &sane.authority,
            host: &sane.host,
            method: parts.method.as_str(),
            path: parts.uri.path(),
            headers: &parts.headers,
            remote_ip: Some(source),
            server_name: None,
            token,
        };
        if let Some(principal) = token.and_then(Token::principal) {
            explanation.passes("authenticate", format!("the token of {principal} is valid"), Vec::new());
        }
        for dry_run in [false, true] {
            let effect = if dry_run { ", and its answer would not count (dry run)" } else { "" };
            let asked = published.policies.authorizers(destination, Some(client), source, &http, dry_run);
            for authorizer in asked {
                let text = format!("the external authorizer {} would be asked{effect}", authorizer.name());
                explanation.warns("authorize", text, Vec::new());
            }
        }
        for policy in published.policies.audits(destination, Some(client), source, &http) {
            let text = format!("AuthorizationPolicy/{} (AUDIT) matches: logged and counted", policy.name());
            explanation.passes("authorize", text, Vec::new());
        }
        decided(published, destination, (client, source), Content::Request(&http), explanation)
    }
}

/// The decision of the policies about a request, or about a connection that is passed on.
fn decided(
    published: &Published,
    destination: &Destination,
    (client, source): (&SpiffeId, IpAddr),
    content: Content<'_>,
    mut explanation: Explanation,
) -> Explanation {
    let verdict = published.policies.decide(destination, Some(client), source, content);
    let request = policies::request(destination, Some(client), source);
    let mut applying: Vec<&Policy> = published.policies.applying(destination).collect();
    applying.sort_by_key(|policy| (policy.action() == Action::Allow, policy.name().clone()));
    let considered = applying.iter().map(|policy| {
        let object = policy_name(policy);
        match policy.unmet(&request, content) {
            None if verdict.by() == Some(policy.name()) => Considered::counts(object, "matches and decides"),
            None => Considered::passed_over(object, "matches"),
            Some(unmet) if unmet.is_empty() => {
                Considered::passed_over(object, "has no rule, so it matches nothing")
            }
            Some(unmet) => Considered::passed_over(object, format!("does not match: {}", unmet.join(", "))),
        }
    });
    let considered = considered.collect();
    let text = format!("{client}: {}", verdict.decision);
    if !verdict.allowed() {
        let failure = Failure::Denied(text);
        return explanation.refuses("authorize", failure.to_string(), considered).goes(answered(&failure));
    }
    if verdict.dry_run_differs() {
        explanation.warns("authorize", format!("{text}; a dry-run policy would deny it"), considered);
    } else {
        explanation.passes("authorize", text, considered);
    }
    explanation
}

/// Filters, backends and endpoints.
fn forward(
    proxy: &Proxy,
    request: &Seen<'_>,
    routed: Option<(Routed, Vec<Considered>)>,
    applying: &Applying<'_>,
    mut explanation: Explanation,
) -> Explanation {
    let Some((routed, considered)) = routed else {
        explanation.passes("match", "no route is attached: the request goes straight on", Vec::new());
        let explanation = applying.limits(explanation);
        if explanation.refusal().is_some() {
            return explanation;
        }
        return straight_on(proxy, request.published, request.destination, explanation);
    };
    let rule = &routed.rule;
    let name = rule_name(rule);
    if let Some(reason) = &rule.invalid {
        let failure = Failure::InvalidRoute { route: rule.route.to_string(), reason: reason.to_string() };
        return explanation.refuses("match", failure.to_string(), considered).goes(answered(&failure));
    }
    explanation.passes("match", name, considered);
    let mut explanation = applying.limits(explanation);
    if explanation.refusal().is_some() {
        return explanation;
    }
    for filter in &rule.filters {
        match filter_effect(filter) {
            (text, Some(status)) => {
                return explanation
                    .refuses("filters", text, Vec::new())
                    .goes(Next::Answer { status: status.as_u16() });
            }
            (text, None) => explanation.passes("filters", text, Vec::new()),
        }
    }
    split(proxy, request.published, &routed, explanation)
}

/// What a filter does, and the answer if it answers.
fn filter_effect(filter: &Filter) -> (String, Option<StatusCode>) {
    match filter {
        Filter::RequestHeaders(_) => ("changes headers of the request".to_owned(), None),
        Filter::ResponseHeaders(_) => ("changes headers of the response".to_owned(), None),
        Filter::Redirect(redirect) => ("answers with a redirection".to_owned(), Some(redirect.status)),
        Filter::Rewrite(_) => ("rewrites host or path".to_owned(), None),
        Filter::Mirror(_) => ("sends a copy elsewhere".to_owned(), None),
        Filter::Cors(_) => ("answers for other origins (CORS)".to_owned(), None),
        Filter::Fault(_) => ("delays or answers a share of the requests (fault)".to_owned(), None),
        Filter::Respond(status, _) => (format!("answers {status}"), Some(*status)),
    }
}

fn named(uid: &WorkloadUid, namespace: &str, name: &str, node: &str) -> Named {
    Named {
        uid: uid.to_string(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        node: node.to_owned(),
    }
}

/// A rule by its route, and by its name or number there.
fn rule_name(rule: &Rule) -> String {
    match &*rule.name {
        "" => format!("{}, rule {}", rule.route, rule.index + 1),
        name => format!("{}, rule {name}", rule.route),
    }
}

fn policy_name(policy: &Policy) -> String {
    let action = match policy.action() {
        Action::Allow => "ALLOW",
        Action::Deny => "DENY",
    };
    let dry_run = if policy.dry_run() { ", dry run" } else { "" };
    format!("AuthorizationPolicy/{} ({action}{dry_run})", policy.name())
}

fn failed(explanation: Explanation, step: &str, failure: &Failure) -> Explanation {
    explanation.refuses(step, failure.to_string(), Vec::new()).goes(answered(failure))
}

fn answered(failure: &Failure) -> Next {
    Next::Answer { status: failure.status().as_u16() }
}
