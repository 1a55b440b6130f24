//! Rules that a VirtualService leaves to another: what the root says and what the delegate says, as one rule.
//!
//! As in Istio, what the delegate says counts before what the root says, and a match of the delegate narrows one of the root.

use std::collections::BTreeMap;

use super::virtual_service::ReadRule;
use super::virtual_service_http::{Http, Match, Text};

/// Why two matches are not one.
enum JoinFailure {
    /// No request can match both.
    Disjoint,
    /// A request may match both, which can't be said in one match.
    Inexpressible(String),
}

/// The rules of a delegate below a rule of its root. One that can't be said is kept with its reason: its requests are
/// answered with 500. One that no request can match is left out.
pub fn joined(root: &Http, delegate: &[ReadRule]) -> Vec<ReadRule> {
    let join = |ReadRule { rule, fault }: &ReadRule| {
        let (rule, reason) = match rule.delegate {
            Some(_) => (left_to(root), Some("a delegate can't have a delegate".to_owned())),
            None => join(root, rule)?,
        };
        Some(ReadRule { rule, fault: fault.clone().or(reason) })
    };
    delegate.iter().filter_map(join).collect()
}

/// The root's rule without what it leaves to the delegate.
fn left_to(root: &Http) -> Http {
    Http { delegate: None, ..root.clone() }
}

fn join(root: &Http, leaf: &Http) -> Option<(Http, Option<String>)> {
    let (matches, reason) = match (root.matches.as_slice(), leaf.matches.as_slice()) {
        ([], _) => (leaf.matches.clone(), None),
        (_, []) => (root.matches.clone(), None),
        (roots, leaves) => {
            let (mut matches, mut reason) = (Vec::new(), None);
            for leaf in leaves {
                for root in roots {
                    match both(root, leaf) {
                        Ok(both) => matches.push(both),
                        Err(JoinFailure::Disjoint) => {}
                        Err(JoinFailure::Inexpressible(why)) => {
                            matches.push(root.clone());
                            reason.get_or_insert(why);
                        }
                    }
                }
            }
            if matches.is_empty() {
                return None;
            }
            (matches, reason)
        }
    };
    let name = match (root.name.as_str(), leaf.name.as_str()) {
        (root, "") => root.to_owned(),
        ("", leaf) => leaf.to_owned(),
        (root, leaf) => format!("{root}-{leaf}"),
    };
    let has_mirror = leaf.mirror.is_some();
    let rule = Http {
        name,
        matches,
        rewrite: leaf.rewrite.clone().or_else(|| root.rewrite.clone().filter(|_| !leaf.route.is_empty())),
        timeout: leaf.timeout.clone().or_else(|| root.timeout.clone()),
        retries: leaf.retries.clone().or_else(|| root.retries.clone()),
        fault: leaf.fault.clone().or_else(|| root.fault.clone()),
        mirror: leaf.mirror.clone().or_else(|| root.mirror.clone()),
        mirror_percent: if has_mirror { leaf.mirror_percent } else { root.mirror_percent },
        mirror_percentage: if has_mirror { leaf.mirror_percentage } else { root.mirror_percentage },
        mirrors: if leaf.mirrors.is_empty() { root.mirrors.clone() } else { leaf.mirrors.clone() },
        cors_policy: leaf.cors_policy.clone().or_else(|| root.cors_policy.clone()),
        headers: leaf.headers.clone().or_else(|| root.headers.clone()),
        ..leaf.clone()
    };
    Some((rule, reason))
}

/// A match that holds where both hold.
fn both(root: &Match, leaf: &Match) -> Result<Match, JoinFailure> {
    if root.uri.is_some() && leaf.uri.is_some() && root.ignore_uri_case != leaf.ignore_uri_case {
        return Err(JoinFailure::Inexpressible("root and delegate differ in `ignoreUriCase`".to_owned()));
    }
    let ignores_case = if leaf.uri.is_some() { leaf.ignore_uri_case } else { root.ignore_uri_case };
    Ok(Match {
        name: if leaf.name.is_empty() { root.name.clone() } else { leaf.name.clone() },
        uri: narrow("uri", root.uri.as_ref(), leaf.uri.as_ref(), ignores_case)?,
        ignore_uri_case: ignores_case,
        scheme: narrow("scheme", root.scheme.as_ref(), leaf.scheme.as_ref(), false)?,
        method: narrow("method", root.method.as_ref(), leaf.method.as_ref(), false)?,
        authority: narrow("authority", root.authority.as_ref(), leaf.authority.as_ref(), false)?,
        headers: narrow_all("headers", &root.headers, &leaf.headers)?,
        without_headers: either("withoutHeaders", &root.without_headers, &leaf.without_headers)?,
        query_params: narrow_all("queryParams", &root.query_params, &leaf.query_params)?,
        port: same(root.port, leaf.port, &0)?,
        source_labels: either("sourceLabels", &root.source_labels, &leaf.source_labels)
            .map_err(|_| JoinFailure::Disjoint)?,
        source_namespace: same(root.source_namespace.clone(), leaf.source_namespace.clone(), &String::new())?,
        gateways: common(&root.gateways, &leaf.gateways)?,
        stat_prefix: if leaf.stat_prefix.is_empty() {
            root.stat_prefix.clone()
        } else {
            leaf.stat_prefix.clone()
        },
    })
}

/// The gateways of both; a list without any stands for all.
fn common(root: &[String], leaf: &[String]) -> Result<Vec<String>, JoinFailure> {
    if root.is_empty() || leaf.is_empty() {
        return Ok([root, leaf].concat());
    }
    let both: Vec<String> = root.iter().filter(|gateway| leaf.contains(gateway)).cloned().collect();
    if both.is_empty() { Err(JoinFailure::Disjoint) } else { Ok(both) }
}

/// What a text must be to be like both.
fn narrow(
    field: &str,
    root: Option<&Text>,
    leaf: Option<&Text>,
    ignores_case: bool,
) -> Result<Option<Text>, JoinFailure> {
    let (root, leaf) = match (root, leaf) {
        (None, other) | (other, None) => return Ok(other.cloned()),
        (Some(root), Some(leaf)) => (root, leaf),
    };
    if root == leaf || *root == Text::default() {
        return Ok(Some(leaf.clone()));
    }
    if *leaf == Text::default() {
        return Ok(Some(root.clone()));
    }
    let fold = |text: &str| if ignores_case { text.to_ascii_lowercase() } else { text.to_owned() };
    let narrower = match ((&root.exact, &root.prefix), (&leaf.exact, &leaf.prefix)) {
        ((Some(one), _), (Some(other), _)) => (fold(one) == fold(other)).then_some(leaf),
        ((Some(exact), _), (_, Some(prefix))) => fold(exact).starts_with(&fold(prefix)).then_some(root),
        ((_, Some(prefix)), (Some(exact), _)) => fold(exact).starts_with(&fold(prefix)).then_some(leaf),
        ((_, Some(outer)), (_, Some(inner))) if fold(inner).starts_with(&fold(outer)) => Some(leaf),
        ((_, Some(inner)), (_, Some(outer))) => fold(inner).starts_with(&fold(outer)).then_some(root),
        _ => {
            let why = format!("root and delegate both match `{field}`, one of them by a pattern");
            return Err(JoinFailure::Inexpressible(why));
        }
    };
    narrower.cloned().map(Some).ok_or(JoinFailure::Disjoint)
}

fn narrow_all(
    field: &str,
    root: &BTreeMap<String, Text>,
    leaf: &BTreeMap<String, Text>,
) -> Result<BTreeMap<String, Text>, JoinFailure> {
    let mut all = root.clone();
    for (name, text) in leaf {
        let narrowed = narrow(field, root.get(name), Some(text), false)?;
        all.extend(narrowed.map(|narrowed| (name.clone(), narrowed)));
    }
    Ok(all)
}

/// What both say, where they don't say different things of one name.
fn either<T: Clone + PartialEq>(
    field: &str,
    root: &BTreeMap<String, T>,
    leaf: &BTreeMap<String, T>,
) -> Result<BTreeMap<String, T>, JoinFailure> {
    let mut all = root.clone();
    for (name, value) in leaf {
        if root.get(name).is_some_and(|known| known != value) {
            return Err(JoinFailure::Inexpressible(format!(
                "root and delegate differ in `{field}` of {name}"
            )));
        }
        all.insert(name.clone(), value.clone());
    }
    Ok(all)
}

fn same<T: PartialEq>(root: T, leaf: T, none: &T) -> Result<T, JoinFailure> {
    if root == *none || root == leaf {
        return Ok(leaf);
    }
    if leaf == *none { Ok(root) } else { Err(JoinFailure::Disjoint) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rule(value: Value) -> Http {
        serde_json::from_value(value).unwrap_or_else(|error| panic!("{error}"))
    }

    fn uris(root: &Value, leaf: &Value) -> Option<(Vec<Text>, bool)> {
        let root = rule(json!({ "match": [{ "uri": root }], "delegate": { "name": "d" } }));
        let leaf = rule(json!({ "match": [{ "uri": leaf }], "route": [] }));
        let joined = joined(&root, &[ReadRule { rule: leaf, fault: None }]).pop()?;
        let uris = joined.rule.matches.into_iter().filter_map(|one| one.uri);
        Some((uris.collect(), joined.fault.is_some()))
    }

    #[test]
    fn a_match_of_the_delegate_narrows_the_roots() {
        let exact = |text: &str| Text { exact: Some(text.to_owned()), ..Text::default() };
        let prefix = |text: &str| Text { prefix: Some(text.to_owned()), ..Text::default() };
        for (root, leaf, wanted) in [
            (json!({ "prefix": "/a" }), json!({ "prefix": "/a/b" }), Some(prefix("/a/b"))),
            (json!({ "prefix": "/a/b" }), json!({ "prefix": "/a" }), Some(prefix("/a/b"))),
            (json!({ "prefix": "/a" }), json!({ "exact": "/ab" }), Some(exact("/ab"))),
            (json!({ "exact": "/a" }), json!({ "prefix": "/" }), Some(exact("/a"))),
            (json!({ "prefix": "/a" }), json!({ "exact": "/b" }), None),
            (json!({ "exact": "/a" }), json!({ "exact": "/b" }), None),
        ] {
            let wanted = wanted.map(|text| (vec![text], false));
            assert_eq!(uris(&root, &leaf), wanted, "{root} {leaf}");
        }
        let by_pattern = uris(&json!({ "prefix": "/a" }), &json!({ "regex": "/.*" }));
        assert_eq!(by_pattern, Some((vec![prefix("/a")], true)), "its requests are answered with 500");
    }

    #[test]
    fn the_root_says_what_the_delegate_leaves_out() {
        let root = rule(json!({ "name": "r", "timeout": "1s", "delegate": { "name": "d" },
            "retries": { "attempts": 1 } }));
        let leaf = rule(
            json!({ "name": "l", "retries": { "attempts": 2 }, "route": [{ "destination": { "host": "a" } }] }),
        );
        let joined = joined(&root, &[ReadRule { rule: leaf.clone(), fault: None }]).remove(0).rule;
        assert_eq!((joined.name.as_str(), joined.timeout.as_deref()), ("r-l", Some("1s")));
        assert_eq!((joined.retries, joined.route, joined.delegate), (leaf.retries, leaf.route, None));
    }
}
