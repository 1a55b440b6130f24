//! Rules of routes that get no request, because others match all that they match and come first. Pure: routes as the control plane
//! makes them, in; rules in the shade, out.
//!
//! Only what shows without trying requests is found: a rule whose matches are each covered by one match of an earlier rule.

use std::collections::BTreeMap;

use ambit_api::l7::{self, path_match};

/// A rule that gets no request.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shadowed {
    /// The rule.
    pub(super) rule: RuleName,
    /// The one that comes first.
    pub(super) by: RuleName,
}

/// A rule of a route.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RuleName {
    /// The route, as `Kind namespace/name`.
    pub(super) route: String,
    /// Its number, from 1.
    pub(super) number: usize,
}

/// Age and name of a route, then the number of the rule: what decides between rules that match alike.
type Seniority = (i64, String, usize);

struct Entry<'a> {
    name: RuleName,
    seniority: Seniority,
    order: l7::Order,
    matches: Vec<&'a l7::Match>,
}

/// The rules of these routes that get no request at any of the places that their route is attached to.
pub(super) fn shadowed(routes: &[l7::Route]) -> Vec<Shadowed> {
    let everything = l7::Match::default();
    let mut places: BTreeMap<Vec<u8>, Vec<&l7::Route>> = BTreeMap::new();
    for route in routes {
        for target in &route.targets {
            places.entry(prost::Message::encode_to_vec(target)).or_default().push(route);
        }
    }
    // For each rule: how many places it is attached to, at how many it is in the shade, and of whom.
    let mut rules: BTreeMap<RuleName, (usize, usize, Option<RuleName>)> = BTreeMap::new();
    for of_place in places.values() {
        let entries: Vec<Entry<'_>> = of_place.iter().flat_map(|route| entries(route, &everything)).collect();
        for entry in &entries {
            let known = rules.entry(entry.name.clone()).or_default();
            known.0 += 1;
            if let Some(by) = shade(entry, &entries) {
                known.1 += 1;
                known.2.get_or_insert_with(|| by.name.clone());
            }
        }
    }
    let in_shade = rules.into_iter().filter(|(_, (places, shaded, _))| places == shaded);
    in_shade.filter_map(|(rule, (_, _, by))| Some(Shadowed { rule, by: by? })).collect()
}

fn entries<'a>(route: &'a l7::Route, everything: &'a l7::Match) -> Vec<Entry<'a>> {
    let object = route.object.clone().unwrap_or_default();
    let created = if route.created == 0 { i64::MAX } else { route.created };
    let name = format!("{}/{}", object.namespace, object.name);
    let entry = |(at, rule): (usize, &'a l7::Rule)| Entry {
        name: RuleName { route: format!("{} {name}", object.kind), number: at + 1 },
        seniority: (created, name.clone(), at),
        order: route.order(),
        matches: if rule.matches.is_empty() { vec![everything] } else { rule.matches.iter().collect() },
    };
    route.rules.iter().enumerate().map(entry).collect()
}

/// The rule that takes all requests of another.
fn shade<'e, 'a>(entry: &Entry<'a>, all: &'e [Entry<'a>]) -> Option<&'e Entry<'a>> {
    let earlier = |other: &&Entry<'_>| other.order == entry.order && other.seniority < entry.seniority;
    let takes = |other: &&Entry<'_>| {
        entry.matches.iter().all(|own| other.matches.iter().any(|it| comes_first(it, own, entry.order)))
    };
    all.iter().filter(earlier).find(takes)
}

/// Whether the match of a senior rule takes every request that another one matches.
fn comes_first(senior: &l7::Match, other: &l7::Match, order: l7::Order) -> bool {
    match order {
        // What asks for more comes first, whatever its age: only what asks for the same is in the shade.
        l7::Order::Specific => covers(senior, other) && covers(other, senior),
        l7::Order::Declared => covers(senior, other),
    }
}

/// Whether every request that `inner` matches is matched by `outer`, as far as that shows by comparing them.
fn covers(outer: &l7::Match, inner: &l7::Match) -> bool {
    let has_all = |outer: &[l7::FieldMatch], inner: &[l7::FieldMatch], in_any_case: bool| {
        outer.iter().all(|wanted| {
            let is_same = |own: &&l7::FieldMatch| {
                let same_name = match in_any_case {
                    true => own.name.eq_ignore_ascii_case(&wanted.name),
                    false => own.name == wanted.name,
                };
                same_name && own.value == wanted.value && own.invert == wanted.invert
            };
            inner.iter().any(|own| is_same(&own))
        })
    };
    covers_path(outer.path.as_ref(), inner.path.as_ref())
        && (outer.method.is_empty() || outer.method == inner.method)
        && has_all(&outer.headers, &inner.headers, true)
        && has_all(&outer.query, &inner.query, false)
        && (outer.scheme.is_none() || outer.scheme == inner.scheme)
        && (outer.authority.is_none() || outer.authority == inner.authority)
        && (outer.method_match.is_none() || outer.method_match == inner.method_match)
        && (outer.port == 0 || outer.port == inner.port)
        && (outer.source_namespace.is_empty() || outer.source_namespace == inner.source_namespace)
        && (outer.clients.is_none() || outer.clients == inner.clients)
}

fn covers_path(outer: Option<&l7::PathMatch>, inner: Option<&l7::PathMatch>) -> bool {
    use path_match::Kind::{Exact, Prefix, Regex, TextPrefix};
    let Some(outer) = outer else { return true };
    let is_everything = match &outer.kind {
        None => true,
        Some(Prefix(prefix) | TextPrefix(prefix)) => prefix.trim_end_matches('/').is_empty(),
        Some(Exact(_) | Regex(_)) => false,
    };
    if is_everything || Some(outer) == inner {
        return true;
    }
    let Some(inner) = inner.filter(|inner| !outer.ignore_case && !inner.ignore_case) else { return false };
    let by_segments = |prefix: &str, path: &str| {
        let rest = path.strip_prefix(prefix.trim_end_matches('/'));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    match (&outer.kind, &inner.kind) {
        (Some(Prefix(prefix)), Some(Exact(path) | Prefix(path))) => by_segments(prefix, path),
        (Some(TextPrefix(prefix)), Some(Exact(path) | TextPrefix(path))) => path.starts_with(prefix),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(kind: path_match::Kind) -> l7::Match {
        l7::Match {
            path: Some(l7::PathMatch { kind: Some(kind), ignore_case: false }),
            ..l7::Match::default()
        }
    }

    fn prefix(text: &str) -> l7::Match {
        path(path_match::Kind::Prefix(text.to_owned()))
    }

    fn header(name: &str) -> l7::Match {
        let value = l7::StringMatch { kind: Some(l7::string_match::Kind::Exact("jason".to_owned())) };
        let field = l7::FieldMatch { name: name.to_owned(), value: Some(value), invert: false };
        l7::Match { headers: vec![field], ..l7::Match::default() }
    }

    fn route(
        name: &str,
        order: l7::Order,
        created: i64,
        hosts: &[&str],
        rules: &[Vec<l7::Match>],
    ) -> l7::Route {
        let target = |host: &&str| l7::Target { hostname: (*host).to_owned(), ..l7::Target::default() };
        l7::Route {
            object: Some(l7::ObjectName {
                kind: "HTTPRoute".to_owned(),
                namespace: "shop".to_owned(),
                name: name.to_owned(),
            }),
            created,
            targets: hosts.iter().map(target).collect(),
            rules: rules
                .iter()
                .map(|matches| l7::Rule { matches: matches.clone(), ..l7::Rule::default() })
                .collect(),
            order: order.into(),
            ..l7::Route::default()
        }
    }

    /// The rules in the shade, and of which.
    fn found(routes: &[l7::Route]) -> Vec<String> {
        let name =
            |it: &RuleName| format!("{}.{}", it.route.trim_start_matches("HTTPRoute shop/"), it.number);
        shadowed(routes).iter().map(|it| format!("{} by {}", name(&it.rule), name(&it.by))).collect()
    }

    #[test]
    fn of_routes_by_precedence_only_the_same_matches_shade() {
        let specific = |name: &str, created, hosts: &[&str], rules: &[Vec<l7::Match>]| {
            route(name, l7::Order::Specific, created, hosts, rules)
        };
        let both = [
            specific("a", 0, &["web"], &[vec![header("user")]]),
            specific("b", 0, &["web"], &[vec![header("User")], vec![]]),
        ];
        assert_eq!(found(&both), ["b.1 by a.1"]);
        // The older one comes first, whatever its name.
        let older =
            [specific("a", 20, &["web"], &[vec![prefix("/")]]), specific("b", 10, &["web"], &[vec![]])];
        assert_eq!(found(&older), ["a.1 by b.1"]);
        // What asks for more comes first, and a rule with another match beside is not in the shade.
        let less =
            [specific("a", 0, &["web"], &[vec![]]), specific("b", 0, &["web"], &[vec![header("user")]])];
        assert_eq!(found(&less), Vec::<String>::new());
        let more = [
            specific("a", 0, &["web"], &[vec![prefix("/a")]]),
            specific("b", 0, &["web"], &[vec![prefix("/a"), prefix("/b")]]),
        ];
        assert_eq!(found(&more), Vec::<String>::new());
        // At another host it gets requests.
        let hosts = [specific("a", 0, &["web"], &[vec![]]), specific("b", 0, &["web", "api"], &[vec![]])];
        assert_eq!(found(&hosts), Vec::<String>::new());
    }

    #[test]
    fn of_rules_by_declaration_what_an_earlier_one_covers_is_in_the_shade() {
        use path_match::Kind::{Exact, Regex, TextPrefix};
        let of = |rules: &[Vec<l7::Match>]| found(&[route("r", l7::Order::Declared, 0, &["web"], rules)]);
        assert_eq!(of(&[vec![], vec![header("user")]]), ["r.2 by r.1"]);
        assert_eq!(of(&[vec![header("user")], vec![]]), Vec::<String>::new());
        assert_eq!(of(&[vec![prefix("/a")], vec![prefix("/a/b"), path(Exact("/a".into()))]]), ["r.2 by r.1"]);
        assert_eq!(of(&[vec![prefix("/a")], vec![prefix("/ab")]]), Vec::<String>::new());
        assert_eq!(
            of(&[vec![path(TextPrefix("/a".into()))], vec![path(Exact("/ab".into()))]]),
            ["r.2 by r.1"]
        );
        assert_eq!(of(&[vec![path(Regex("/.*".into()))], vec![prefix("/a")]]), Vec::<String>::new());
        assert_eq!(of(&[vec![header("user")], vec![header("team")]]), Vec::<String>::new());
    }
}
