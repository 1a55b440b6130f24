//! Rules of AuthorizationPolicies as waypoints enforce them: what L4 sees in the fields of `istio.security`, what only a request shows
//! in one extension of each match.
//!
//! An attribute that nobody knows counts as met by a DENY and as not met by an ALLOW.

use std::sync::Arc;

use ambit_api::l7::attribute_match::Attribute as Key;
use ambit_api::l7::{self as api, RequestAttribute, policy_path};
use ambit_api::{HTTP_MATCH_TYPE_URL, security};
use prost::Message;

use super::l4::authorization::{
    SourceMatch, Translator, addresses, by_source, operation_fields, patterns, string_match,
};
use super::reader::Reader;
use crate::object::{
    Attribute, Condition, HttpAttribute, Operation, PathPattern, Pattern, Rule, Source, TextKey,
};

/// The rules on the wire, and the attributes in them that are not known.
pub(super) fn rules(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    action: security::Action,
    rules: &[Rule],
) -> (Vec<security::Rule>, Vec<String>) {
    let translator = Translator { namespace, action, settings: reader.settings };
    let mut unknown = Vec::new();
    let translated = rules.iter().flat_map(|rule| translated(&translator, rule, &mut unknown)).collect();
    (translated, unknown)
}

/// The rules on the wire that come to the same; none if it can never match.
fn translated(translator: &Translator<'_>, rule: &Rule, unknown: &mut Vec<String>) -> Vec<security::Rule> {
    let mut clauses = Vec::new();
    let denies = translator.action == security::Action::Deny;
    let operations: Vec<security::Match> =
        rule.to.iter().filter_map(|to| operation(to, denies, unknown)).collect();
    if operations.is_empty() && !rule.to.is_empty() {
        return Vec::new();
    }
    let before = unknown.len();
    let to_anything = operations.is_empty() || denies && operations.iter().any(is_empty);
    if !to_anything {
        clauses.push(security::Clause { matches: operations });
    }
    for Condition(attribute) in &rule.when {
        match condition(translator, attribute) {
            Ok(condition) => clauses.push(security::Clause { matches: vec![condition] }),
            Err(key) => unknown.push(key),
        }
    }
    if unknown.len() > before && !denies {
        return Vec::new();
    }
    let sources: Vec<SourceMatch> = rule.from.iter().map(|source| self::source(translator, source)).collect();
    let from_anyone =
        denies && sources.iter().any(|source| is_empty(&source.fields) && source.trust_domains.is_empty());
    if sources.is_empty() || from_anyone {
        return vec![security::Rule { clauses }];
    }
    let by_source = by_source(sources).into_iter();
    by_source
        .map(|from| security::Rule { clauses: from.into_iter().chain(clauses.clone()).collect() })
        .collect()
}

/// What is left of an alternative that asks only for what nobody knows. On the wire it would never match
/// (xDS contract), but a DENY takes it for met.
fn is_empty(fields: &security::Match) -> bool {
    *fields == security::Match::default()
}

fn source(translator: &Translator<'_>, source: &Source) -> SourceMatch {
    let principal = Key::Named(RequestAttribute::RequestPrincipal.into());
    let http = api::HttpMatch {
        attributes: attribute(principal, &source.request_principals, &source.not_request_principals)
            .into_iter()
            .collect(),
        remote_ips: addresses(&source.remote_ip_blocks),
        not_remote_ips: addresses(&source.not_remote_ip_blocks),
        ..api::HttpMatch::default()
    };
    let SourceMatch { fields, trust_domains } = translator.source_fields(source);
    SourceMatch { fields: security::Match { extensions: extensions(&http), ..fields }, trust_domains }
}

/// `None` for an alternative of an ALLOW that never matches.
fn operation(operation: &Operation, denies: bool, unknown: &mut Vec<String>) -> Option<security::Match> {
    let Operation { hosts, not_hosts, ports: _, not_ports: _, methods, not_methods, paths, not_paths } =
        operation;
    let named = |attribute: RequestAttribute| Key::Named(attribute.into());
    let (paths, not_paths) = (PathList::of(paths), PathList::of(not_paths));
    unknown.extend(paths.unmatched.iter().chain(&not_paths.unmatched).cloned());
    let paths = match paths {
        // It is not clear what was meant, so the DENY is for all paths.
        PathList { unmatched, .. } if denies && !unmatched.is_empty() => Vec::new(),
        PathList { known, unmatched } if known.is_empty() && !unmatched.is_empty() => return None,
        PathList { known, .. } => known,
    };
    // An ALLOW that left it out would allow more than was meant.
    if !denies && !not_paths.unmatched.is_empty() {
        return None;
    }
    let attributes = [
        attribute(named(RequestAttribute::Host), hosts, not_hosts),
        attribute(named(RequestAttribute::Method), methods, not_methods),
    ];
    let http = api::HttpMatch {
        attributes: attributes.into_iter().flatten().collect(),
        paths,
        not_paths: not_paths.known,
        ..api::HttpMatch::default()
    };
    Some(security::Match { extensions: extensions(&http), ..operation_fields(operation) })
}

/// # Errors
/// The key of an attribute that is not known.
fn condition(translator: &Translator<'_>, attribute: &Attribute) -> Result<security::Match, String> {
    let Attribute::Http(of_request) = attribute else { return Ok(translator.condition(attribute)) };
    let http = match of_request {
        HttpAttribute::RemoteIp { values, not_values } => api::HttpMatch {
            remote_ips: addresses(values),
            not_remote_ips: addresses(not_values),
            ..api::HttpMatch::default()
        },
        HttpAttribute::Text { key, values, not_values } => api::HttpMatch {
            attributes: self::attribute(text_key(key)?, values, not_values).into_iter().collect(),
            ..api::HttpMatch::default()
        },
        HttpAttribute::Unknown(key) => return Err(key.clone()),
    };
    Ok(security::Match { extensions: extensions(&http), ..security::Match::default() })
}

/// Headers that a waypoint removes before policies are asked.
const OF_ONE_HOP: [&str; 8] = [
    "connection",
    "http2-settings",
    "keep-alive",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
    "x-forwarded-client-cert",
];

fn text_key(key: &TextKey) -> Result<Key, String> {
    match key {
        TextKey::Header(name) if name == "host" => Ok(Key::Named(RequestAttribute::Host.into())),
        TextKey::Header(name) if OF_ONE_HOP.contains(&name.as_str()) => {
            Err(format!("request.headers[{name}]"))
        }
        TextKey::Header(name) => Ok(Key::Header(name.clone())),
        TextKey::ServerName => Ok(Key::Named(RequestAttribute::ServerName.into())),
        TextKey::Claim(path) => {
            let names = path.iter().map(ToString::to_string).collect();
            Ok(Key::Claim(api::ClaimPath { names }))
        }
        TextKey::RequestPrincipal => Ok(Key::Named(RequestAttribute::RequestPrincipal.into())),
        TextKey::RequestAudience => Ok(Key::Named(RequestAttribute::RequestAudience.into())),
        TextKey::RequestPresenter => Ok(Key::Named(RequestAttribute::RequestPresenter.into())),
    }
}

fn attribute(key: Key, values: &[Pattern], not_values: &[Pattern]) -> Option<api::AttributeMatch> {
    (!values.is_empty() || !not_values.is_empty()).then(|| api::AttributeMatch {
        attribute: Some(key),
        values: patterns(values),
        not_values: patterns(not_values),
    })
}

/// Paths of an operation in the form that requests have.
#[derive(Default)]
struct PathList {
    known: Vec<api::PolicyPath>,
    /// Those that no request can have, as findings name them.
    unmatched: Vec<String>,
}

impl PathList {
    fn of(paths: &[PathPattern]) -> Self {
        let mut list = Self::default();
        for written in paths {
            match path(written) {
                Some(path) => list.known.push(path),
                None => list.unmatched.push(format!("the path {written}, which no request can have")),
            }
        }
        list
    }
}

fn path(path: &PathPattern) -> Option<api::PolicyPath> {
    let kind = match path {
        PathPattern::Text(pattern) => {
            policy_path::Kind::Text(ambit_policy::normal_text(&string_match(pattern))?)
        }
        PathPattern::Template(template) => {
            policy_path::Kind::Template(ambit_policy::normal_template(template)?)
        }
    };
    Some(api::PolicyPath { kind: Some(kind) })
}

fn extensions(http: &api::HttpMatch) -> Vec<security::Extension> {
    if *http == api::HttpMatch::default() {
        return Vec::new();
    }
    let config = prost_types::Any { type_url: HTTP_MATCH_TYPE_URL.to_owned(), value: http.encode_to_vec() };
    vec![security::Extension { name: "http".to_owned(), config: Some(config) }]
}
