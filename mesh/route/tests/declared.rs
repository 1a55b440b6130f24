//! Rules in the order in which they are declared, and what only VirtualServices ask for.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a test fails by panicking")]

use std::net::IpAddr;

use ambit_api::l7;
use ambit_route::filter::{Filter, Origin};
use ambit_route::{RequestHead, Table};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};

fn text(kind: l7::string_match::Kind) -> Option<l7::StringMatch> {
    Some(l7::StringMatch { kind: Some(kind) })
}

fn exact(text_: &str) -> Option<l7::StringMatch> {
    text(l7::string_match::Kind::Exact(text_.to_owned()))
}

fn path(kind: l7::path_match::Kind, ignore_case: bool) -> l7::Match {
    let path = Some(l7::PathMatch { kind: Some(kind), ignore_case });
    l7::Match { path, ..l7::Match::default() }
}

fn prefix(path_: &str) -> l7::Match {
    path(l7::path_match::Kind::TextPrefix(path_.to_owned()), false)
}

fn without(name: &str, value: Option<l7::StringMatch>) -> l7::Match {
    let headers = vec![l7::FieldMatch { name: name.to_owned(), value, invert: true }];
    l7::Match { headers, ..l7::Match::default() }
}

/// A table with a rule for each match, named by its number.
fn table(matches: Vec<l7::Match>) -> Table {
    let rule = |(at, one): (usize, l7::Match)| l7::Rule {
        name: at.to_string(),
        matches: vec![one],
        ..l7::Rule::default()
    };
    Table::new([&l7::Route {
        targets: vec![l7::Target { namespace: "n".into(), hostname: "h".into(), ..l7::Target::default() }],
        rules: matches.into_iter().enumerate().map(rule).collect(),
        order: l7::Order::Declared as i32,
        ..l7::Route::default()
    }])
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    let pair = |(name, value): &(&'static str, &'static str)| {
        (HeaderName::from_static(name), HeaderValue::from_static(value))
    };
    pairs.iter().map(pair).collect()
}

fn head<'a>(path: &'a str, headers: &'a HeaderMap) -> RequestHead<'a> {
    RequestHead {
        method: &Method::GET,
        host: "h",
        path,
        query: None,
        headers,
        scheme: "http",
        authority: "h:80",
        port: 80,
        client_namespace: "shop",
        client_address: IpAddr::from([10, 0, 0, 1]),
    }
}

fn found(table: &Table, head: &RequestHead<'_>) -> Option<(String, usize)> {
    let matched = table.routes("n", "h", head.port, "")?.find(head)?;
    Some((matched.rule.name.to_string(), matched.prefix))
}

#[test]
fn the_first_rule_that_matches_counts() {
    let table = table(vec![
        prefix("/a"),
        path(l7::path_match::Kind::Exact("/abc".into()), false),
        path(l7::path_match::Kind::TextPrefix("/B".into()), true),
        path(l7::path_match::Kind::Exact("/C".into()), true),
    ]);
    let none = HeaderMap::new();
    for (path, wanted) in [
        ("/abc", Some(("0", 2))),
        ("/b/x", Some(("2", 2))),
        ("/c", Some(("3", 2))),
        ("/c/", None),
        ("/", None),
    ] {
        let wanted = wanted.map(|(name, prefix)| (name.to_owned(), prefix));
        assert_eq!(found(&table, &head(path, &none)), wanted, "{path}");
    }
}

#[test]
fn conditions_of_virtual_services_are_checked() {
    let present = || text(l7::string_match::Kind::Present(true));
    let address = |octets: [u8; 4]| Some(l7::Clients { addresses: vec![octets.to_vec().into()] });
    let any = l7::Match::default;
    let (none, one) = (headers(&[]), headers(&[("a", "1")]));
    for (wanted, headers, matches) in [
        (without("a", exact("1")), &none, true),
        (without("a", exact("2")), &one, true),
        (without("a", exact("1")), &one, false),
        (without("a", present()), &none, true),
        (without("a", present()), &one, false),
        (l7::Match { scheme: exact("https"), ..any() }, &none, false),
        (l7::Match { authority: exact("h:80"), ..any() }, &none, true),
        (l7::Match { method_match: exact("PUT"), ..any() }, &none, false),
        (l7::Match { port: 80, ..any() }, &none, true),
        (l7::Match { port: 81, ..any() }, &none, false),
        (l7::Match { source_namespace: "shop".into(), ..any() }, &none, true),
        (l7::Match { source_namespace: "other".into(), ..any() }, &none, false),
        (l7::Match { clients: address([10, 0, 0, 1]), ..any() }, &none, true),
        (l7::Match { clients: address([10, 0, 0, 2]), ..any() }, &none, false),
        (l7::Match { clients: Some(l7::Clients::default()), ..any() }, &none, false),
    ] {
        let table = table(vec![wanted.clone()]);
        assert_eq!(found(&table, &head("/", headers)).is_some(), matches, "{wanted:?} {headers:?}");
    }
}

/// The filters of a rule with one, or why it can't be followed.
fn filter(kind: l7::filter::Kind) -> Result<Filter, String> {
    let rule = l7::Rule { filters: vec![l7::Filter { kind: Some(kind) }], ..l7::Rule::default() };
    if let Some(fault) = ambit_route::fault(&rule) {
        return Err(fault);
    }
    let route = l7::Route {
        targets: vec![l7::Target { namespace: "n".into(), hostname: "h".into(), ..l7::Target::default() }],
        rules: vec![rule],
        ..l7::Route::default()
    };
    let (table, none) = (Table::new([&route]), HeaderMap::new());
    let rule = table.routes("n", "h", 80, "").unwrap().find(&head("/", &none)).unwrap().rule.clone();
    Ok(rule.filters[0].clone())
}

fn rewritten(kind: l7::path_change::Kind, uri: &str, prefix: usize) -> Result<String, String> {
    let path = Some(l7::PathChange { kind: Some(kind) });
    let rewrite = l7::filter::Kind::Rewrite(l7::Rewrite { path, ..l7::Rewrite::default() });
    let Filter::Rewrite(rewrite) = filter(rewrite)? else { panic!("another filter") };
    let changed = rewrite.path_and_query(&uri.parse::<Uri>().unwrap(), prefix).unwrap();
    changed.map(|path| path.to_string()).map_err(|error| format!("{error:?}"))
}

#[test]
fn rewrites_replace_letters_and_patterns() {
    use l7::path_change::Kind::{Regex, TextPrefix};
    let by = |pattern: &str, substitution: &str| {
        Regex(l7::RegexRewrite { pattern: pattern.to_owned(), substitution: substitution.to_owned() })
    };
    assert_eq!(rewritten(TextPrefix("/new".into()), "/oldest?q", 4).unwrap(), "/newest?q");
    assert_eq!(rewritten(TextPrefix("/new".into()), "/old..x", 4).unwrap(), "/new..x");
    assert!(rewritten(TextPrefix("/files/".into()), "/static../secret", 7).is_err(), "a step upwards");
    assert_eq!(rewritten(by("^/service/([^/]+)(/.*)$", r"/c\2/\1"), "/service/a/b", 0).unwrap(), "/c/b/a");
    assert_eq!(rewritten(by("(?i)/xxx/", "/$1/"), "/a/XxX/b", 0).unwrap(), "/a/$1/b");
    for wrong in [by("(", "/"), by("/a", r"/\1"), by("/a", r"/\x"), by("/a", "")] {
        assert!(rewritten(wrong.clone(), "/a", 0).is_err(), "{wrong:?}");
    }
}

#[test]
fn redirects_take_the_port_of_their_choice() {
    use l7::PortChoice::{OfAuthority, OfProtocol, OfRequest, OfSchemeOrListener};
    for (choice, scheme, hostname, authority, wanted) in [
        (OfAuthority, "", "", "h:8080", "http://h:8080/"),
        (OfAuthority, "https", "", "h:80", "https://h/"),
        (OfAuthority, "", "x.example:81", "h", "http://x.example:81/"),
        (OfAuthority, "", "x.example", "h:8080", "http://x.example/"),
        (OfProtocol, "https", "", "h:8080", "https://h/"),
        (OfRequest, "", "", "h", "http://h:90/"),
        (OfRequest, "", "x.example:81", "h", "http://x.example:90/"),
        (OfSchemeOrListener, "", "", "h:8080", "http://h:90/"),
        (OfSchemeOrListener, "https", "", "h:8080", "https://h/"),
        (OfAuthority, "", "", "[2001:db8::1]:81", "http://[2001:db8::1]:81/"),
    ] {
        let redirect = l7::Redirect {
            scheme: scheme.to_owned(),
            hostname: hostname.to_owned(),
            status: 301,
            port_choice: choice as i32,
            ..l7::Redirect::default()
        };
        let Ok(Filter::Redirect(redirect)) = filter(l7::filter::Kind::Redirect(redirect)) else {
            panic!("another filter")
        };
        let origin =
            Origin { scheme: "http", host: "h", authority, port: 90, path: "/", query: None, prefix: 0 };
        assert_eq!(redirect.location(&origin).unwrap(), wanted, "{choice:?} {scheme} {hostname} {authority}");
    }
}
