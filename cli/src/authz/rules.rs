//! AuthorizationPolicies that are written: who may do what, in as few rules as say it exactly.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::world::Target;

/// What a policy is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum For {
    /// The pods with all of these labels: connections, by their nodes' proxies.
    Pods(BTreeMap<String, String>),
    /// A service behind a waypoint: requests.
    Service(Target),
}

/// An operation that is allowed. Empty lists leave open what they are of.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Operation {
    /// Ports.
    pub(super) ports: BTreeSet<u16>,
    /// Methods.
    pub(super) methods: BTreeSet<String>,
    /// Paths and templates of paths.
    pub(super) paths: BTreeSet<String>,
}

/// A policy that allows what its rules say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Allow {
    /// Its name.
    pub(super) name: String,
    /// What it is for.
    pub(super) target: For,
    /// What each principal may do.
    pub(super) clients: BTreeMap<String, BTreeSet<Operation>>,
    /// What it rests on, one line for people.
    pub(super) evidence: String,
}

/// What one client did: port, method and path; the last two empty for connections.
pub(super) type Deed = (u16, String, String);

/// The operations that allow exactly these deeds; `any_path` is the path of which nothing is known.
pub(super) fn operations(deeds: &BTreeSet<Deed>, any_path: &str) -> BTreeSet<Operation> {
    let mut methods: BTreeMap<(u16, &str), BTreeSet<String>> = BTreeMap::new();
    for (port, method, path) in deeds {
        methods.entry((*port, path)).or_default().extend((!method.is_empty()).then(|| method.clone()));
    }
    let mut paths: BTreeMap<(u16, BTreeSet<String>), BTreeSet<String>> = BTreeMap::new();
    for ((port, path), methods) in methods {
        paths.entry((port, methods)).or_default().insert(path.to_owned());
    }
    let mut ports: BTreeMap<(BTreeSet<String>, BTreeSet<String>), BTreeSet<u16>> = BTreeMap::new();
    for ((port, methods), paths) in paths {
        let is_any = paths.contains(any_path) || paths.iter().all(String::is_empty);
        let paths = if is_any { BTreeSet::new() } else { paths };
        ports.entry((methods, paths)).or_default().insert(port);
    }
    ports.into_iter().map(|((methods, paths), ports)| Operation { ports, methods, paths }).collect()
}

impl Allow {
    /// The object.
    pub(super) fn object(&self, namespace: &str, enforce: bool) -> Value {
        let mut metadata = json!({ "name": self.name, "namespace": namespace });
        if !enforce {
            metadata["annotations"] = json!({ "istio.io/dry-run": "true" });
        }
        let mut spec = json!({ "action": "ALLOW", "rules": self.rules() });
        match &self.target {
            For::Pods(labels) => spec["selector"] = json!({ "matchLabels": labels }),
            For::Service(Target { group, kind, name }) => {
                spec["targetRefs"] = json!([{ "group": group, "kind": kind, "name": name }]);
            }
        }
        json!({
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": metadata,
            "spec": spec,
        })
    }

    /// Clients that may do the same share a rule.
    fn rules(&self) -> Vec<Value> {
        let mut alike: BTreeMap<&BTreeSet<Operation>, Vec<&str>> = BTreeMap::new();
        for (client, operations) in &self.clients {
            alike.entry(operations).or_default().push(client);
        }
        let mut rules: Vec<(Vec<&str>, &BTreeSet<Operation>)> =
            alike.into_iter().map(|(operations, clients)| (clients, operations)).collect();
        rules.sort();
        let rule = |(clients, operations): (Vec<&str>, &BTreeSet<Operation>)| {
            let to: Vec<Value> =
                operations.iter().map(|operation| json!({ "operation": operation.object() })).collect();
            json!({ "from": [{ "source": { "principals": clients } }], "to": to })
        };
        rules.into_iter().map(rule).collect()
    }

    /// The object as YAML, with what it rests on above it.
    pub(super) fn render(&self, namespace: &str, enforce: bool) -> anyhow::Result<String> {
        let mut text = format!("# {}\n", self.evidence);
        let yaml = serde_saphyr::to_string(&self.object(namespace, enforce))?;
        let _ = write!(text, "{yaml}");
        Ok(text)
    }
}

impl Operation {
    fn object(&self) -> Value {
        let mut object = json!({});
        let Self { ports, methods, paths } = self;
        if !ports.is_empty() {
            object["ports"] = ports.iter().map(u16::to_string).collect();
        }
        if !methods.is_empty() {
            object["methods"] = methods.iter().cloned().collect();
        }
        if !paths.is_empty() {
            object["paths"] = paths.iter().cloned().collect();
        }
        object
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deeds_become_as_few_operations_as_say_them_exactly() {
        let deed = |port, method: &str, path: &str| (port, method.to_owned(), path.to_owned());
        let operation = |ports: &[u16], methods: &[&str], paths: &[&str]| Operation {
            ports: ports.iter().copied().collect(),
            methods: methods.iter().map(ToString::to_string).collect(),
            paths: paths.iter().map(ToString::to_string).collect(),
        };
        for (deeds, expected) in [
            (vec![deed(80, "", ""), deed(81, "", "")], vec![operation(&[80, 81], &[], &[])]),
            (
                vec![deed(80, "GET", "/a"), deed(80, "GET", "/b"), deed(80, "POST", "/b")],
                vec![operation(&[80], &["GET"], &["/a"]), operation(&[80], &["GET", "POST"], &["/b"])],
            ),
            (
                vec![deed(80, "GET", "/a"), deed(81, "GET", "/a")],
                vec![operation(&[80, 81], &["GET"], &["/a"])],
            ),
            (vec![deed(80, "GET", "/{**}"), deed(80, "GET", "/a")], vec![operation(&[80], &["GET"], &[])]),
        ] {
            let found = operations(&deeds.iter().cloned().collect(), "/{**}");
            assert_eq!(found, expected.into_iter().collect(), "{deeds:?}");
        }
    }
}
