//! What stands for a document that is no YAML: policies in it fail closed.
//!
//! Which objects such a document holds can only be guessed from its text, and the guess depends on the text alone: a file
//! with a syntax error means the same before and after a restart. An object that the text names is absent, unless it is
//! a policy; that one is there and refuses. A policy without a readable name refuses in every namespace that the text
//! names. A document that mentions no policy has no effect.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::kind::Kind;
use crate::object::{AuthorizationPolicy, DEFAULT_NAMESPACE, Object, PeerAuthentication};

/// The kinds that have a stand-in.
const POLICIES: [Kind; 2] = [Kind::AuthorizationPolicy, Kind::PeerAuthentication];
/// Namespaces of one document that are looked at; nobody writes so many by hand.
const MOST_NAMESPACES: usize = 1000;

/// The policies that stand for a document whose text is at `line` of its file and cannot be read because of `reason`.
pub(super) fn policies(text: &str, line: u64, reason: &str) -> Vec<Object> {
    if !POLICIES.iter().any(|kind| text.contains(kind.as_str())) {
        return Vec::new();
    }
    let metadata = metadata(text);
    let named = || Some((first_value(text, "kind")?, first_value(metadata, "name")?));
    let objects = match named() {
        Some((kind, name)) if POLICIES.iter().any(|policy| policy.as_str() == kind) => {
            let namespace = first_value(metadata, "namespace").unwrap_or(DEFAULT_NAMESPACE);
            vec![policy(kind, name, namespace, action(text), reason)]
        }
        _ => {
            let mut namespaces: Vec<&str> = values(text, "namespace").take(MOST_NAMESPACES).collect();
            namespaces.push(DEFAULT_NAMESPACE);
            namespaces.sort_unstable();
            namespaces.dedup();
            let (kind, name) = (Kind::AuthorizationPolicy.as_str(), format!("unreadable-line-{line}"));
            namespaces.into_iter().map(|namespace| policy(kind, &name, namespace, "DENY", reason)).collect()
        }
    };
    objects.into_iter().flatten().collect()
}

fn policy(kind: &str, name: &str, namespace: &str, action: &str, reason: &str) -> Option<Object> {
    let object: Value = json!({
        "metadata": { "name": name, "namespace": namespace },
        "spec": { "action": action },
    });
    if kind == Kind::PeerAuthentication.as_str() {
        let stand_in = PeerAuthentication::unreadable(&object).ok()?;
        return Some(Object::PeerAuthentication(Arc::new(stand_in)));
    }
    let stand_in = AuthorizationPolicy::unreadable(&object, reason.to_owned()).ok()?;
    Some(Object::AuthorizationPolicy(Arc::new(stand_in)))
}

/// The action of a policy: ALLOW where the text says so or mentions no action, else DENY.
fn action(text: &str) -> &str {
    match first_value(text, "action") {
        None if !text.contains("action") => "ALLOW",
        Some("ALLOW") if !text.contains("DENY") => "ALLOW",
        _ => "DENY",
    }
}

/// The text from `metadata` to the next key at the start of a line.
fn metadata(text: &str) -> &str {
    let Some((_, rest)) = text.split_once("metadata") else { return "" };
    let ends = rest.match_indices('\n').map(|(at, _)| at);
    let end = ends.into_iter().find(|at| {
        let next = rest.get(at + 1..).and_then(|line| line.chars().next());
        next.is_some_and(|first| first.is_ascii_alphabetic())
    });
    end.and_then(|end| rest.get(..end)).unwrap_or(rest)
}

fn first_value<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    values(text, key).next()
}

/// The plain or quoted scalars that follow `key:`, in block style, flow style or JSON.
fn values<'t>(text: &'t str, key: &str) -> impl Iterator<Item = &'t str> {
    text.match_indices(key).filter_map(move |(at, _)| {
        let before = text.get(..at)?.chars().next_back();
        if before.is_some_and(|before| before.is_alphanumeric() || "-_./".contains(before)) {
            return None;
        }
        let rest =
            text.get(at + key.len()..)?.trim_start_matches(['"', '\'']).trim_start_matches([' ', '\t']);
        let rest = rest.strip_prefix(':')?.trim_start_matches([' ', '\t']).trim_start_matches(['"', '\'']);
        let end = rest.find(|c: char| c.is_whitespace() || "\"',{}[]#".contains(c)).unwrap_or(rest.len());
        rest.get(..end).filter(|value| !value.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::{Action, PolicyBody};

    /// Namespace, name and action of each stand-in.
    fn found(text: &str) -> Vec<(String, String, Option<Action>)> {
        let of = |object: &Object| {
            let id = object.reference().name;
            let action = match object {
                Object::AuthorizationPolicy(policy) => match &policy.body {
                    PolicyBody::Unreadable { action, .. } => Some(*action),
                    body => panic!("{body:?}"),
                },
                Object::PeerAuthentication(authentication) => {
                    assert!(authentication.unreadable);
                    None
                }
                other => panic!("{other:?}"),
            };
            (id.namespace.to_string(), id.name.to_string(), action)
        };
        policies(text, 7, "broken").iter().map(of).collect()
    }

    fn one(namespace: &str, name: &str, action: Option<Action>) -> Vec<(String, String, Option<Action>)> {
        vec![(namespace.to_owned(), name.to_owned(), action)]
    }

    #[test]
    fn a_policy_with_a_readable_name_refuses_under_it() {
        let block = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  labels: {a: b}\n  \
                     name: p # mine\n  namespace: \"shop\"\nspec:\n  action: DENY\n  rules: [\n";
        assert_eq!(found(block), one("shop", "p", Some(Action::Deny)));
        assert_eq!(found(&block.replace("DENY", "ALLOW")), one("shop", "p", Some(Action::Allow)));
        assert_eq!(found(&block.replace("  action: DENY\n", "")), one("shop", "p", Some(Action::Allow)));
        assert_eq!(found(&block.replace("DENY", "DE")), one("shop", "p", Some(Action::Deny)));
        let flow = "{kind: AuthorizationPolicy, metadata: {namespace: shop, name: p}, spec: {action: DENY";
        assert_eq!(found(flow), one("shop", "p", Some(Action::Deny)));
        let json = "{\"kind\": \"PeerAuthentication\", \"metadata\": {\"name\": \"p\"}, \"spec\": {";
        assert_eq!(found(json), one("default", "p", None));
    }

    #[test]
    fn policies_without_a_readable_name_refuse_everywhere() {
        let list = "apiVersion: v1\nkind: List\nitems:\n- kind: AuthorizationPolicy\n  metadata: {name: p, namespace: a}\n\
                    - kind: Service\n  metadata: {name: s, namespace: b}\n  spec: [\n";
        let names =
            |namespace: &str| (namespace.to_owned(), "unreadable-line-7".to_owned(), Some(Action::Deny));
        assert_eq!(found(list), [names("a"), names("b"), names("default")]);
    }

    #[test]
    fn a_document_without_policies_has_no_stand_in() {
        assert_eq!(found("kind: Service\nmetadata: {name: AuthorizationPolic\n"), []);
        assert_eq!(found("kind: [Service\n"), []);
        assert_eq!(found(""), []);
    }
}
