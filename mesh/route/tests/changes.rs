//! A table that routes come to and go from against one that is made of what is left.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::net::IpAddr;

use ambit_api::l7;
use ambit_route::{RequestHead, RouteSet, Table};
use http::{HeaderMap, HeaderValue, Method};
use proptest::prelude::*;

const PATHS: [&str; 4] = ["/", "/a", "/a/b", "/b"];
const HOSTS: [&str; 3] = ["a.test", "*.test", "other"];

#[derive(Debug, Clone)]
enum Step {
    Insert(usize, Box<l7::Route>),
    Remove(usize),
}

fn any_match() -> impl Strategy<Value = l7::Match> {
    use l7::path_match::Kind;
    let kind = (0..4_usize, prop::sample::select(&PATHS[..])).prop_map(|(kind, path)| match kind {
        0 => Kind::Exact(path.to_owned()),
        1 => Kind::Prefix(path.to_owned()),
        2 => Kind::TextPrefix(path.to_owned()),
        _ => Kind::Regex(format!("{path}.*")),
    });
    (kind, any::<bool>()).prop_map(|(kind, has_header)| {
        let value = l7::StringMatch { kind: Some(l7::string_match::Kind::Exact("1".to_owned())) };
        let header = l7::FieldMatch { name: "x".to_owned(), value: Some(value), invert: false };
        l7::Match {
            path: Some(l7::PathMatch { kind: Some(kind), ignore_case: false }),
            headers: has_header.then_some(header).into_iter().collect(),
            ..l7::Match::default()
        }
    })
}

fn any_target() -> impl Strategy<Value = l7::Target> {
    let hosts = prop::sample::subsequence(HOSTS.map(str::to_owned).to_vec(), 0..=2);
    let port = prop::sample::select(vec![0, 80, 81, 100_000]);
    (any::<bool>(), port, prop::sample::select(vec!["", "c"]), hosts).prop_map(
        |(at_listener, port, client, hostnames)| match at_listener {
            true => l7::Target { listener: "l".to_owned(), hostnames, ..l7::Target::default() },
            false => l7::Target {
                namespace: "n".to_owned(),
                hostname: "H".to_owned(),
                port,
                client_namespace: client.to_owned(),
                hostnames,
                ..l7::Target::default()
            },
        },
    )
}

fn any_route() -> impl Strategy<Value = l7::Route> {
    let rules = prop::collection::vec(prop::collection::vec(any_match(), 0..3), 0..3);
    (0..3_i64, prop::collection::vec(any_target(), 0..3), rules, any::<bool>()).prop_map(
        |(created, targets, rules, declared)| l7::Route {
            created,
            targets,
            rules: rules.into_iter().map(|matches| l7::Rule { matches, ..l7::Rule::default() }).collect(),
            order: if declared { l7::Order::Declared } else { l7::Order::Specific }.into(),
            ..l7::Route::default()
        },
    )
}

fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (0..4_usize, prop::option::weighted(0.7, any_route())).prop_map(|(name, route)| match route {
        None => Step::Remove(name),
        Some(route) => {
            let object =
                l7::ObjectName { kind: "HTTPRoute".into(), namespace: "n".into(), name: format!("r{name}") };
            Step::Insert(name, Box::new(l7::Route { object: Some(object), ..route }))
        }
    });
    prop::collection::vec(step, 1..12)
}

/// What a table answers to every request that the routes above distinguish.
fn answers(table: &Table) -> Vec<String> {
    let mut answers = Vec::new();
    let mut with_header = HeaderMap::new();
    with_header.insert("x", HeaderValue::from_static("1"));
    let mut ask = |routes: Option<&RouteSet>, port: u16| {
        let Some(routes) = routes else { return answers.push("straight".to_owned()) };
        for path in PATHS.into_iter().chain(["/a/b/c", "/ab"]) {
            for host in ["a.test", "b.test", "elsewhere"] {
                for headers in [&HeaderMap::new(), &with_header] {
                    let head = RequestHead {
                        method: &Method::GET,
                        host,
                        path,
                        query: None,
                        headers,
                        scheme: "http",
                        authority: host,
                        port,
                        client_namespace: "",
                        client_address: IpAddr::from([10, 0, 0, 1]),
                    };
                    let found = routes.find(&head);
                    let found = found.map(|it| (it.rule.route.to_string(), it.rule.index, it.prefix));
                    answers.push(format!("{found:?}"));
                }
            }
        }
    };
    for (port, client) in [(80, ""), (81, ""), (82, ""), (80, "c"), (82, "c")] {
        ask(table.routes("n", "h", port, client), port);
    }
    ask(table.of_listener("l"), 80);
    let listed = table.listed().into_iter();
    answers.extend(listed.map(|it| format!("{} {} {:?}", it.route, it.rules, it.targets)));
    answers
}

proptest! {
    #[test]
    fn a_table_answers_by_what_is_in_it_whatever_was_before(steps in any_steps()) {
        let mut table = Table::default();
        let mut left = BTreeMap::new();
        for step in steps {
            let (before, expected) = (table.clone(), answers(&table));
            match step {
                Step::Insert(name, route) => {
                    table.insert(&name.to_string(), &route);
                    left.insert(name, *route);
                }
                Step::Remove(name) => {
                    table.remove(&name.to_string());
                    left.remove(&name);
                }
            }
            prop_assert_eq!(answers(&table), answers(&Table::new(left.values())));
            // Requests in flight go by the copy that they began with.
            prop_assert_eq!(answers(&before), expected);
        }
        for name in left.into_keys() {
            table.remove(&name.to_string());
        }
        prop_assert_eq!(answers(&table), answers(&Table::default()));
    }
}
