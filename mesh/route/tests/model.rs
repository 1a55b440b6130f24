//! The table against a naive model: sort all matches by the rules of Gateway API, take the first that matches.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a test fails by panicking")]

use std::net::IpAddr;

use ambit_api::l7;
use ambit_route::{Backend, Backends, RequestHead, Table};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Match {
    path: Path,
    method: bool,
    headers: Vec<&'static str>,
    query: Vec<&'static str>,
}

#[derive(Debug, Clone)]
enum Path {
    Exact(&'static str),
    Prefix(&'static str),
}

const PATHS: [&str; 6] = ["/", "/a", "/a/b", "/a/b/c", "/ab", "/b"];

fn any_match() -> impl Strategy<Value = Match> {
    let path = (any::<bool>(), prop::sample::select(&PATHS[..]));
    let path = path.prop_map(|(exact, path)| if exact { Path::Exact(path) } else { Path::Prefix(path) });
    let names = || prop::sample::subsequence(vec!["x", "y"], 0..=2);
    (path, any::<bool>(), names(), names()).prop_map(|(path, method, headers, query)| Match {
        path,
        method,
        headers,
        query,
    })
}

/// Routes of an age, each with rules, each with matches.
fn any_routes() -> impl Strategy<Value = Vec<(i64, Vec<Vec<Match>>)>> {
    let rules = prop::collection::vec(prop::collection::vec(any_match(), 1..3), 1..4);
    prop::collection::vec((1..3_i64, rules), 1..4)
}

fn exactly(value: &str) -> Option<l7::StringMatch> {
    Some(l7::StringMatch { kind: Some(l7::string_match::Kind::Exact(value.to_owned())) })
}

fn to_wire(name: usize, created: i64, rules: &[Vec<Match>]) -> l7::Route {
    let field = |name: &&str| l7::FieldMatch { name: (*name).to_owned(), value: exactly("1"), invert: false };
    let to_match = |source: &Match| l7::Match {
        path: Some(l7::PathMatch {
            kind: Some(match source.path {
                Path::Exact(path) => l7::path_match::Kind::Exact(path.to_owned()),
                Path::Prefix(path) => l7::path_match::Kind::Prefix(path.to_owned()),
            }),
            ..l7::PathMatch::default()
        }),
        method: if source.method { "PUT".to_owned() } else { String::new() },
        headers: source.headers.iter().map(field).collect(),
        query: source.query.iter().map(field).collect(),
        ..l7::Match::default()
    };
    let rule = |(at, matches): (usize, &Vec<Match>)| l7::Rule {
        name: format!("{name}/{at}"),
        matches: matches.iter().map(to_match).collect(),
        ..l7::Rule::default()
    };
    l7::Route {
        object: Some(l7::ObjectName {
            kind: "HTTPRoute".into(),
            namespace: "n".into(),
            name: format!("r{name}"),
        }),
        created,
        targets: vec![l7::Target { namespace: "n".into(), hostname: "h".into(), ..l7::Target::default() }],
        rules: rules.iter().enumerate().map(rule).collect(),
        ..l7::Route::default()
    }
}

fn head<'a>(path: &'a str, headers: &'a HeaderMap) -> RequestHead<'a> {
    RequestHead {
        method: &Method::GET,
        host: "",
        path,
        query: None,
        headers,
        scheme: "http",
        authority: "",
        port: 80,
        client_namespace: "",
        client_address: IpAddr::from([10, 0, 0, 1]),
    }
}

fn naive(
    routes: &[(i64, Vec<Vec<Match>>)],
    (path, put, headers, query): (&str, bool, &[&str], &[&str]),
) -> Option<String> {
    let mut found = Vec::new();
    for (name, (created, rules)) in routes.iter().enumerate() {
        for (at, matches) in rules.iter().enumerate() {
            for (place, one) in matches.iter().enumerate() {
                let (exact, length, fits) = match one.path {
                    Path::Exact(wanted) => (true, wanted.len(), wanted == path),
                    Path::Prefix(wanted) => {
                        let wanted = wanted.trim_end_matches('/');
                        let fits = path == wanted || path.starts_with(&format!("{wanted}/"));
                        (false, wanted.len(), fits)
                    }
                };
                let fits = fits
                    && (!one.method || put)
                    && one.headers.iter().all(|name| headers.contains(name))
                    && one.query.iter().all(|name| query.contains(name));
                if fits {
                    let length = if exact { 0 } else { length };
                    let rank = (
                        !exact,
                        usize::MAX - length,
                        !one.method,
                        9 - one.headers.len(),
                        9 - one.query.len(),
                    );
                    found.push(((rank, *created, name, at, place), format!("{name}/{at}")));
                }
            }
        }
    }
    found.into_iter().min().map(|(_, rule)| rule)
}

proptest! {
    #[test]
    fn the_table_finds_what_a_sorted_list_would(
        routes in any_routes(),
        path in prop::sample::select(vec!["/", "/a", "/a/", "/a/b", "/a/b/c/d", "/abc", "/b/x"]),
        put in any::<bool>(),
        headers in prop::sample::subsequence(vec!["x", "y"], 0..=2),
        query in prop::sample::subsequence(vec!["x", "y"], 0..=2),
    ) {
        let wire: Vec<l7::Route> =
            routes.iter().enumerate().map(|(name, (created, rules))| to_wire(name, *created, rules)).collect();
        let table = Table::new(&wire);
        let map: HeaderMap = headers
            .iter()
            .map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1")))
            .collect();
        let text = query.iter().map(|name| format!("{name}=1")).collect::<Vec<_>>().join("&");
        let method = if put { Method::PUT } else { Method::GET };
        let head =
            RequestHead { method: &method, host: "any", query: Some(&text), ..head(path, &map) };
        let routes_of = table.routes("n", "h", 80, "").unwrap();
        let found = routes_of.find(&head).map(|matched| matched.rule.name.to_string());
        prop_assert_eq!(found, naive(&routes, (path, put, &headers, &query)));
    }

    #[test]
    fn each_backend_gets_as_many_numbers_as_its_weight(weights in prop::collection::vec(0..20_u32, 1..6)) {
        let backend = |at: usize| Backend {
            subset: None,
            namespace: "n".into(),
            hostname: at.to_string().into(),
            port: 80,
            filters: Box::default(),
            invalid: None,
        };
        let backends = Backends::new(weights.iter().enumerate().map(|(at, weight)| (*weight, backend(at))));
        let total: u32 = weights.iter().sum();
        prop_assert_eq!(backends.total(), u64::from(total));
        let mut counts = vec![0; weights.len()];
        for draw in 0..backends.total() {
            counts[backends.choose(draw).unwrap().hostname.parse::<usize>().unwrap()] += 1;
        }
        prop_assert_eq!(counts, weights);
        prop_assert!(backends.choose(backends.total()).is_none());
    }
}

#[test]
fn a_port_has_the_routes_of_all_ports_too() {
    let everywhere = to_wire(0, 1, &[vec![prefix("/")]]);
    let mut one_port = to_wire(1, 1, &[vec![prefix("/a")]]);
    one_port.targets[0].port = 81;
    let table = Table::new([&everywhere, &one_port]);
    let rule = |port, path| {
        let headers = HeaderMap::new();
        let head = head(path, &headers);
        table.routes("n", "h", port, "").unwrap().find(&head).unwrap().rule.name.to_string()
    };
    assert_eq!((rule(80, "/a"), rule(81, "/a"), rule(81, "/b")), ("0/0".into(), "1/0".into(), "0/0".into()));
}

#[test]
fn a_consumers_routes_replace_those_of_the_producer_for_its_clients() {
    let producer = to_wire(0, 1, &[vec![prefix("/")]]);
    let mut consumer = to_wire(1, 1, &[vec![prefix("/a")]]);
    consumer.targets[0].client_namespace = "c".into();
    let table = Table::new([&producer, &consumer]);
    let headers = HeaderMap::new();
    let head = head("/b", &headers);
    assert!(table.routes("n", "h", 80, "c").unwrap().find(&head).is_none());
    assert!(table.routes("n", "h", 80, "d").unwrap().find(&head).is_some());
}

#[test]
fn what_cant_be_read_answers_and_is_not_passed_by() {
    let mut route = to_wire(0, 1, &[vec![prefix("/")]]);
    route.rules[0].matches[0].path =
        Some(l7::PathMatch { kind: Some(l7::path_match::Kind::Regex("(".to_owned())), ..Default::default() });
    let table = Table::new([&route]);
    let headers = HeaderMap::new();
    let head = head("/b", &headers);
    let found = table.routes("n", "h", 80, "").unwrap().find(&head).unwrap();
    assert!(found.rule.invalid.is_some());
    assert!(ambit_route::fault(&route.rules[0]).is_some());
}

fn prefix(path: &'static str) -> Match {
    Match { path: Path::Prefix(path), method: false, headers: Vec::new(), query: Vec::new() }
}
