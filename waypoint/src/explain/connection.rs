//! How this waypoint would decide about a connection on which no HTTP is spoken.

use std::net::IpAddr;

use ambit_api::Authority;
use ambit_directory::AppProtocol;
use ambit_explain::{Considered, Explanation, Next};
use ambit_identity::SpiffeId;
use ambit_policy::Content;
use ambit_route::{ClientHello, ConnectionHead, StreamMatched};
use ambit_telemetry::http::Query;

use super::endpoints::{split, straight_on};
use super::{ParameterError, decided, failed, parameter, parse, rule_name};
use crate::accept::{self, Destination};
use crate::failure::Failure;
use crate::matching::Routed;
use crate::proxy::{Proxy, Published};

/// A connection to explain.
struct Inquiry<'q> {
    client: SpiffeId,
    source: IpAddr,
    to: Authority,
    /// The name that its TLS asks for; `None` if it does not begin with TLS.
    server_name: Option<&'q str>,
}

/// What would be done with the connection that the parameters describe.
pub(super) fn explain(proxy: &Proxy, query: &Query) -> Result<Explanation, ParameterError> {
    let asked = Inquiry {
        client: parse("from", parameter(query, "from")?)?,
        source: parse("source", query.get("source").unwrap_or("0.0.0.0"))?,
        to: parse("to", parameter(query, "to")?)?,
        server_name: query.get("server-name"),
    };
    let published = proxy.published.load_full();
    let explanation = Explanation::begin();
    let network = &proxy.settings.network;
    let Some(found) = accept::find(&published, network, asked.client.namespace(), &asked.to) else {
        let text = format!("{} is nothing that is bound to this waypoint", asked.to);
        return Ok(closed(explanation, "accept", text, Vec::new()));
    };
    Ok(of_destination(proxy, &published, &found, &asked, explanation))
}

fn of_destination(
    proxy: &Proxy,
    published: &Published,
    found: &Destination,
    asked: &Inquiry<'_>,
    mut explanation: Explanation,
) -> Explanation {
    let text = format!("{} is bound to this waypoint: {}", asked.to, found.host());
    explanation.passes("accept", text, Vec::new());
    match found.protocol() {
        AppProtocol::Http11 | AppProtocol::Http2 | AppProtocol::Grpc => {
            let text =
                "the port is declared as HTTP, so only requests are served: ask for http://".to_owned();
            return closed(explanation, "protocol", text, Vec::new());
        }
        AppProtocol::Unknown => {
            let text = "the port declares no protocol: what is not HTTP is passed on unread";
            explanation.passes("protocol", text, Vec::new());
        }
        AppProtocol::Tcp | AppProtocol::Tls => {
            explanation.passes(
                "protocol",
                "the port is declared as TCP or TLS: passed on unread",
                Vec::new(),
            );
        }
    }
    if published.policies.needs_requests(found) {
        let text = "a RequestAuthentication applies, and what is sent is not HTTP".to_owned();
        return closed(explanation, "authenticate", text, Vec::new());
    }
    // As on the data path: on a port of plain TCP nobody waits for the client's first bytes.
    let name = asked.server_name.map(str::to_ascii_lowercase);
    let content = match found.protocol() {
        AppProtocol::Tcp => Content::Unread,
        _ => Content::Passed(name.as_deref().filter(|name| !name.is_empty())),
    };
    let explanation = decided(published, found, (&asked.client, asked.source), content, explanation);
    if explanation.refusal().is_some() {
        // There is no answer to a connection.
        return explanation.goes(Next::Nowhere);
    }
    matched(proxy, published, found, asked, explanation)
}

fn matched(
    proxy: &Proxy,
    published: &Published,
    found: &Destination,
    asked: &Inquiry<'_>,
    mut explanation: Explanation,
) -> Explanation {
    let name = asked.server_name.map(str::to_ascii_lowercase);
    let head = ConnectionHead {
        port: found.port(),
        destination: found.address(),
        client_namespace: asked.client.namespace(),
        client_address: asked.source.to_canonical(),
        // As on the data path: on a port of plain TCP nobody waits for the client's first bytes.
        tls: name
            .as_deref()
            .filter(|_| found.protocol() != AppProtocol::Tcp)
            .map(|name| ClientHello { server_name: Some(name).filter(|name| !name.is_empty()) }),
    };
    let Some(service) = found.service() else {
        explanation.passes("match", "no route is attached: the connection goes straight on", Vec::new());
        return refused_without_answer(straight_on(proxy, published, found, explanation));
    };
    let (namespace, hostname) = (&service.host.namespace, &service.host.hostname);
    let matched = published.streams.find(namespace, hostname, &head);
    let candidates = published.streams.candidates(namespace, hostname, &head);
    let mut is_first = true;
    let considered: Vec<Considered> = candidates
        .into_iter()
        .map(|candidate| {
            let object = rule_name(&candidate.rule);
            match candidate.unmet {
                None if std::mem::replace(&mut is_first, false) => {
                    Considered::counts(object, "matches and comes first")
                }
                None => Considered::passed_over(object, "matches too, and comes later"),
                Some(unmet) => Considered::passed_over(object, unmet),
            }
        })
        .collect();
    let explained = match matched {
        StreamMatched::Closed => {
            return closed(explanation, "match", Failure::NoRoute.to_string(), considered);
        }
        StreamMatched::Straight => {
            explanation.passes("match", "no route takes it: the connection goes straight on", considered);
            straight_on(proxy, published, found, explanation)
        }
        StreamMatched::Rule(rule) => match &rule.invalid {
            Some(reason) => {
                let (route, reason) = (rule.route.to_string(), reason.to_string());
                failed(explanation, "match", &Failure::InvalidRoute { route, reason })
            }
            None => {
                explanation.passes("match", rule_name(&rule), considered);
                split(proxy, published, &Routed { rule, prefix: 0, session: None }, explanation)
            }
        },
    };
    refused_without_answer(explained)
}

/// The connection is closed.
fn closed(explanation: Explanation, step: &str, text: String, considered: Vec<Considered>) -> Explanation {
    explanation.refuses(step, text, considered).goes(Next::Nowhere)
}

/// A connection that is refused is closed: there is no status to answer with.
fn refused_without_answer(explanation: Explanation) -> Explanation {
    match explanation.refusal() {
        Some(_) => explanation.goes(Next::Nowhere),
        None => explanation,
    }
}
