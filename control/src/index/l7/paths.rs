//! Paths of routes that no request has. Waypoints bring the path of a request into its normal form before they match it, so a
//! path in another form never matches.

use ambit_api::l7;
use ambit_api::l7::path_match::Kind;
use ambit_api::security::{StringMatch, string_match::MatchType};
use ambit_policy::{normal_path, normal_text};

/// What is wrong with the paths of a rule, one sentence each.
pub(super) fn faults(rule: &l7::Rule) -> impl Iterator<Item = String> {
    rule.matches.iter().filter_map(|one| fault(one.path.as_ref()?))
}

fn fault(path: &l7::PathMatch) -> Option<String> {
    let (written, normal) = match path.kind.as_ref()? {
        // RFC 9110 §9.3.7: `*` is the target of an OPTIONS.
        Kind::Exact(written) if written == "*" => return None,
        Kind::Exact(written) => (written.as_str(), exact(written)),
        // Slashes at its end mean nothing.
        Kind::Prefix(written) => match written.trim_end_matches('/') {
            "" => return None,
            trimmed => (trimmed, exact(trimmed)),
        },
        Kind::TextPrefix(written) => (written.as_str(), prefix(written)),
        Kind::Regex(_) => return None,
    };
    let is_same = |normal: &String| match path.ignore_case {
        true => normal.eq_ignore_ascii_case(written),
        false => normal == written,
    };
    match normal {
        Some(normal) if is_same(&normal) => None,
        Some(normal) => Some(format!(
            "no request has the path {written:?}: paths take their normal form before they are matched; write {normal:?}"
        )),
        None => Some(format!("no request has the path {written:?}: it is no path")),
    }
}

fn exact(path: &str) -> Option<String> {
    // What follows these is no part of the path.
    normal_path(path).filter(|_| !path.contains(['?', '#']))
}

fn prefix(path: &str) -> Option<String> {
    let text = StringMatch { match_type: Some(MatchType::Prefix(path.to_owned())) };
    match normal_text(&text)?.match_type {
        Some(MatchType::Prefix(normal)) => Some(normal),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_never_match_are_named_with_what_does() {
        let exact = |path: &str| Kind::Exact(path.to_owned());
        let prefix = |path: &str| Kind::Prefix(path.to_owned());
        let text = |path: &str| Kind::TextPrefix(path.to_owned());
        let never = Some("it is no path");
        for (kind, ignore_case, wanted) in [
            (exact("/a/b"), false, None),
            (exact("/a/b/"), false, None),
            (exact("*"), false, None),
            (exact("/a//b"), false, Some("write \"/a/b\"")),
            (exact("/a/../b"), false, Some("write \"/b\"")),
            (exact("/%7Ea"), false, Some("write \"/~a\"")),
            (exact("/a%2fb"), false, Some("write \"/a%2Fb\"")),
            (exact("/a%2fb"), true, None),
            (exact("/ä"), false, Some("write \"/%C3%A4\"")),
            (exact("/a?b=c"), false, never),
            (exact("/a#b"), false, never),
            (exact("a"), false, never),
            (exact("/a\\b"), false, never),
            (prefix("/"), false, None),
            (prefix("/a/"), false, None),
            (prefix("/a/."), false, Some("write \"/a/\"")),
            (text("/"), false, None),
            (text("/a/."), false, None),
            (text("/a//"), false, Some("write \"/a/\"")),
            (text("/a?b"), false, never),
            (Kind::Regex("/a//b".to_owned()), false, None),
        ] {
            let found = fault(&l7::PathMatch { kind: Some(kind.clone()), ignore_case });
            let is_wanted = match (&found, wanted) {
                (None, None) => true,
                (Some(found), Some(wanted)) => found.ends_with(wanted),
                _ => false,
            };
            assert!(is_wanted, "{kind:?}: {found:?}");
        }
    }
}
