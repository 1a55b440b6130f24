//! From a route as it comes over the wire to entries of the table.
//!
//! A rule of which a part can't be read is kept and answers 500: to leave it out would send its requests to the next rule.
//! A condition that can't be read counts as met ([`crate::conditions`]).

use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use http::{HeaderName, StatusCode};

use crate::backend::{Backend, Backends};
use crate::conditions::Conditions;
use crate::field::StringMatch;
use crate::filter::{self, Filter};
use crate::route_set::Entry;
use crate::rule::{Retry, RouteName, Rule, Timeouts};
use crate::session;

/// A route, ready for the table.
#[derive(Debug)]
pub(crate) struct Compiled {
    pub(crate) name: Arc<RouteName>,
    pub(crate) order: l7::Order,
    pub(crate) targets: Box<[l7::Target]>,
    /// Number of rules.
    pub(crate) rules: usize,
    pub(crate) entries: Box<[Arc<Entry>]>,
}

/// What of a rule can't be read, if anything.
pub fn fault(rule: &l7::Rule) -> Option<String> {
    let mut faults = Vec::new();
    rule.matches.iter().for_each(|source| drop(Conditions::read(source, &mut faults)));
    let nobody = Arc::new(RouteName { kind: "".into(), namespace: "".into(), name: "".into() });
    self::rule(&nobody, 0, rule, faults).invalid.map(|reason| reason.to_string())
}

/// The name of a route, and what orders it among others of the same precedence: when it was created, unknown last; then
/// namespace and name.
pub(crate) fn name_and_age(object: Option<&l7::ObjectName>, created: i64) -> (Arc<RouteName>, i64, Arc<str>) {
    let object = object.cloned().unwrap_or_default();
    let name = Arc::new(RouteName {
        kind: object.kind.into(),
        namespace: object.namespace.into(),
        name: object.name.into(),
    });
    let created = if created == 0 { i64::MAX } else { created };
    let order_by = format!("{}/{}", name.namespace, name.name).into();
    (name, created, order_by)
}

/// Compiles a route.
pub(crate) fn route(route: &l7::Route) -> Compiled {
    let (name, created, order_by) = name_and_age(route.object.as_ref(), route.created);
    let mut entries = Vec::new();
    for (at, source) in (0_u32..).zip(&route.rules) {
        let everything = [l7::Match::default()];
        let matches = if source.matches.is_empty() { &everything[..] } else { &source.matches };
        let mut faults = Vec::new();
        let conditions: Vec<_> = matches.iter().map(|source| Conditions::read(source, &mut faults)).collect();
        let rule = Arc::new(rule(&name, at, source, faults));
        for (place, (path, conditions)) in (0_u32..).zip(conditions) {
            let seniority = (created, order_by.clone(), at, place);
            entries.push(Arc::new(Entry { path, conditions, rule: rule.clone(), seniority }));
        }
    }
    Compiled {
        name,
        order: route.order(),
        targets: route.targets.clone().into(),
        rules: route.rules.len(),
        entries: entries.into(),
    }
}

fn noted<T>(result: Result<T, String>, faults: &mut Vec<String>) -> Option<T> {
    result.map_err(|fault| faults.push(fault)).ok()
}

pub(crate) fn header_name(name: &str) -> Result<HeaderName, String> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("no header name: {name:?}"))
}

pub(crate) fn string_match(source: Option<&l7::StringMatch>) -> Result<StringMatch, String> {
    match source.and_then(|value| value.kind.as_ref()) {
        Some(l7::string_match::Kind::Exact(text)) => Ok(StringMatch::Exact(text.as_str().into())),
        Some(l7::string_match::Kind::Prefix(text)) => Ok(StringMatch::Prefix(text.as_str().into())),
        Some(l7::string_match::Kind::Regex(pattern)) => StringMatch::regex(pattern),
        Some(l7::string_match::Kind::Present(wanted)) => Ok(StringMatch::Present(*wanted)),
        None => Err("a match without a value".to_owned()),
    }
}

pub(crate) fn rule(route: &Arc<RouteName>, index: u32, source: &l7::Rule, mut faults: Vec<String>) -> Rule {
    let backends = source.backends.iter().map(|backend| (backend.weight, self::backend(backend)));
    let backends = Backends::new(backends);
    let filters = source.filters.iter().map(|filter| filter::compile(filter, &backend));
    let filters: Vec<Result<Filter, String>> = filters.collect();
    let filters = filters.into_iter().filter_map(|filter| noted(filter, &mut faults)).collect();
    let retry = source.retry.as_ref().and_then(|source| noted(retry(source), &mut faults));
    let session = source.session.as_ref().and_then(|source| noted(session::compile(source), &mut faults));
    let invalid = match source.invalid.as_str() {
        "" => faults.into_iter().next(),
        reason => Some(reason.to_owned()),
    };
    let timeouts = source.timeouts.unwrap_or_default();
    let span = |nanos: u64| (nanos > 0).then(|| Duration::from_nanos(nanos));
    Rule {
        route: route.clone(),
        name: source.name.as_str().into(),
        index,
        filters,
        backends,
        timeouts: Timeouts {
            request: span(timeouts.request_nanos),
            backend: span(timeouts.backend_nanos),
            hedge: span(timeouts.hedge_nanos),
        },
        retry,
        session: session.map(Box::new),
        invalid: invalid.map(Into::into),
    }
}

fn backend(source: &l7::Backend) -> Backend {
    let filters: Result<Box<[Filter]>, String> =
        source.filters.iter().map(|filter| filter::compile(filter, &backend)).collect();
    let (filters, fault) = match filters {
        Ok(filters) => (filters, None),
        Err(fault) => (Box::default(), Some(fault)),
    };
    let port = u16::try_from(source.port).ok().filter(|port| *port != 0);
    let fault = fault.or_else(|| port.is_none().then(|| "a backend without a port".to_owned()));
    let invalid = if source.invalid.is_empty() { fault } else { Some(source.invalid.clone()) };
    Backend {
        namespace: source.namespace.as_str().into(),
        hostname: source.hostname.to_ascii_lowercase().into(),
        port: port.unwrap_or_default(),
        subset: (!source.subset.is_empty()).then(|| source.subset.as_str().into()),
        filters,
        invalid: invalid.map(Into::into),
    }
}

fn retry(source: &l7::Retry) -> Result<Retry, String> {
    /// More tries than this only make things worse.
    const MOST: u32 = 10;
    let codes = source.codes.iter().map(|code| status(*code));
    let mut retry = Retry {
        attempts: source.attempts.min(MOST),
        codes: codes.collect::<Result<_, _>>()?,
        backoff: (source.backoff_nanos > 0).then(|| Duration::from_nanos(source.backoff_nanos)),
        conditions: crate::rule::RetryConditions::default(),
    };
    for name in &source.on {
        if !retry.conditions.add(name) {
            return Err(format!("no retry condition: {name:?}"));
        }
    }
    Ok(retry)
}

pub(crate) fn status(code: u32) -> Result<StatusCode, String> {
    let known = u16::try_from(code).ok().and_then(|code| StatusCode::from_u16(code).ok());
    known.ok_or_else(|| format!("no status code: {code}"))
}
