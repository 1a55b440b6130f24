//! Why a request follows its rule: every rule that could be meant, and what of each is not met. For people; the data path calls
//! [`RouteSet::find`] alone.

use std::cmp::Reverse;
use std::fmt;
use std::sync::Arc;

use crate::conditions::PathMatch;
use crate::field::{FieldMatch, StringMatch};
use crate::hosts::Hosts;
use crate::route_set::{Entry, Paths, RouteSet};
use crate::rule::Rule;
use crate::table::RequestHead;

/// A rule, and what of it a request does not meet.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The rule.
    pub rule: Arc<Rule>,
    /// What is not met; `None` if it matches.
    pub unmet: Option<String>,
}

impl RouteSet {
    /// Every rule of these routes, those first that are asked first. Of a rule with several matches the one counts that matches, else
    /// the first. The rule that the request follows is the first without anything unmet.
    pub fn candidates(&self, request: &RequestHead<'_>) -> Vec<Candidate> {
        let mut found = Found::default();
        each(&self.specific, request.host, |host, paths| {
            for entry in in_order(paths) {
                let unmet = unmet_host(host, request);
                found.add(entry, unmet.or_else(|| unmet_of(entry, request)));
            }
        });
        let hidden = self.has_specific().then(|| "routes of Gateway API are attached to the same".to_owned());
        each(&self.declared, request.host, |host, entries| {
            for entry in entries.iter() {
                let unmet = hidden.clone().or_else(|| unmet_host(host, request));
                found.add(entry, unmet.or_else(|| unmet_of(entry, request)));
            }
        });
        found.0
    }
}

/// Calls `visit` with what is there for each host, the hosts that match first and in their order; those have no name.
fn each<'s, T: Default>(hosts: &'s Hosts<T>, host: &str, mut visit: impl FnMut(Option<&str>, &'s T)) {
    hosts.matching(host).for_each(|found| visit(None, found));
    for (name, other) in hosts.others(host) {
        visit(Some(&name), other);
    }
}

fn unmet_host(host: Option<&str>, request: &RequestHead<'_>) -> Option<String> {
    host.map(|host| format!("hostname: {host} is wanted, not {}", request.host))
}

/// Rules in the order in which they were found.
#[derive(Default)]
struct Found(Vec<Candidate>);

impl Found {
    fn add(&mut self, entry: &Entry, unmet: Option<String>) {
        match self.0.iter_mut().find(|known| Arc::ptr_eq(&known.rule, &entry.rule)) {
            Some(known) if known.unmet.is_some() && unmet.is_none() => known.unmet = None,
            Some(_) => {}
            None => self.0.push(Candidate { rule: entry.rule.clone(), unmet }),
        }
    }
}

/// Entries in the order in which they are tried: exact paths, patterns, then prefixes from the longest.
fn in_order(paths: &Paths) -> Vec<&Entry> {
    let mut exact: Vec<_> = paths.exact.iter().collect();
    exact.sort_by_key(|(path, _)| *path);
    let mut prefix: Vec<_> = paths.prefix.iter().collect();
    prefix.sort_by_key(|(path, _)| (Reverse(path.len()), *path));
    let exact = exact.into_iter().flat_map(|(_, entries)| entries.iter());
    let prefix = prefix.into_iter().flat_map(|(_, entries)| entries.iter());
    exact.chain(&paths.patterns).chain(prefix).map(AsRef::as_ref).collect()
}

/// What of a match is not met.
fn unmet_of(entry: &Entry, request: &RequestHead<'_>) -> Option<String> {
    let Entry { path, conditions, .. } = entry;
    if path.matches(request.path).is_none() {
        return Some(format!("path: {path} is wanted"));
    }
    if let Some(method) = conditions.method.as_ref().filter(|method| *method != request.method) {
        return Some(format!("method: {method} is wanted"));
    }
    let fields = conditions.headers.iter().chain(&conditions.query);
    let mut unmet = fields.filter(|field| !field.matches(request.headers, request.query));
    if let Some(field) = unmet.next() {
        return Some(field.to_string());
    }
    (!conditions.matches(request))
        .then(|| "its port, scheme, authority, client or source namespace".to_owned())
}

impl fmt::Display for PathMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(path) => write!(f, "exactly {path}"),
            Self::Prefix(prefix) if prefix.is_empty() => f.write_str("prefix /"),
            Self::Prefix(prefix) | Self::TextPrefix(prefix) => write!(f, "prefix {prefix}"),
            Self::Regex(regex, _) => write!(f, "pattern {}", regex.as_str()),
            Self::ExactIgnoringCase(path) => write!(f, "{path} in either case"),
            Self::TextPrefixIgnoringCase(prefix) => write!(f, "prefix {prefix} in either case"),
        }
    }
}

impl fmt::Display for FieldMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(name, wanted) => write!(f, "header {name}: {wanted} is wanted"),
            Self::WithoutHeader(name, unwanted) => write!(f, "header {name}: {unwanted} is not wanted"),
            Self::Query(name, wanted) => write!(f, "query parameter {name}: {wanted} is wanted"),
        }
    }
}

impl fmt::Display for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(text) => write!(f, "{text:?}"),
            Self::Prefix(prefix) => write!(f, "prefix {prefix:?}"),
            Self::Regex(regex) => write!(f, "pattern {:?}", regex.as_str()),
            Self::Present(true) => f.write_str("any value"),
            Self::Present(false) => f.write_str("no value"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use ambit_api::l7;
    use http::{HeaderMap, Method};

    use crate::Table;

    use super::*;

    fn route(name: &str, hostname: &str, matches: Vec<l7::Match>) -> l7::Route {
        let target = l7::Target {
            namespace: "shop".into(),
            hostname: "web.shop".into(),
            hostnames: if hostname.is_empty() { Vec::new() } else { vec![hostname.into()] },
            ..l7::Target::default()
        };
        l7::Route {
            object: Some(l7::ObjectName {
                kind: "HTTPRoute".into(),
                namespace: "shop".into(),
                name: name.into(),
            }),
            targets: vec![target],
            rules: vec![l7::Rule { matches, ..l7::Rule::default() }],
            ..l7::Route::default()
        }
    }

    fn path(kind: l7::path_match::Kind) -> Option<l7::PathMatch> {
        Some(l7::PathMatch { kind: Some(kind), ..l7::PathMatch::default() })
    }

    #[test]
    fn every_rule_says_what_is_not_met_and_the_first_without_counts() {
        use l7::path_match::Kind;
        let by_method = l7::Match { method: "POST".into(), ..l7::Match::default() };
        let by_header = l7::Match {
            headers: vec![l7::FieldMatch {
                name: "end-user".into(),
                value: Some(l7::StringMatch { kind: Some(l7::string_match::Kind::Exact("jason".into())) }),
                ..l7::FieldMatch::default()
            }],
            ..l7::Match::default()
        };
        let routes = [
            route(
                "exact",
                "",
                vec![l7::Match { path: path(Kind::Exact("/other".into())), ..l7::Match::default() }],
            ),
            route(
                "prefix",
                "",
                vec![l7::Match { path: path(Kind::Prefix("/api".into())), ..l7::Match::default() }],
            ),
            route("post", "", vec![by_method]),
            route("header", "", vec![by_header]),
            route("all", "", vec![l7::Match::default()]),
            route("host", "other.example.com", vec![l7::Match::default()]),
        ];
        let table = Table::new(&routes);
        let routes = table.routes("shop", "web.shop", 80, "shop").map(|routes| {
            let head = RequestHead {
                method: &Method::GET,
                host: "web.shop",
                path: "/api/x",
                query: None,
                headers: &HeaderMap::new(),
                scheme: "http",
                authority: "web.shop",
                port: 80,
                client_namespace: "shop",
                client_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            };
            let found = routes.find(&head).map(|matched| matched.rule.route.name.to_string());
            let candidates = routes.candidates(&head);
            let first = candidates.iter().find(|candidate| candidate.unmet.is_none());
            assert_eq!(found, first.map(|candidate| candidate.rule.route.name.to_string()));
            candidates
        });
        let shown: Vec<String> = routes
            .into_iter()
            .flatten()
            .map(|it| format!("{}: {}", it.rule.route.name, it.unmet.unwrap_or_else(|| "matches".to_owned())))
            .collect();
        assert_eq!(
            shown,
            [
                "exact: path: exactly /other is wanted",
                "prefix: matches",
                "post: method: POST is wanted",
                "header: header end-user: \"jason\" is wanted",
                "all: matches",
                "host: hostname: other.example.com is wanted, not web.shop",
            ]
        );
    }
}
