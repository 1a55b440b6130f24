//! Merging a partial manifest into a whole one, and which fields the author of a Gateway may set. Pure.

use serde_json::Value;

/// Fields by which the entries of a list are distinguished, as in Kubernetes' strategic merge: containers, variables and
/// volumes by name, mounts by path.
const LIST_KEYS: [&str; 2] = ["name", "mountPath"];

/// Merges `patch` into `base`: objects field by field, lists of named entries entry by entry, anything else is replaced.
/// `null` removes a field.
pub(super) fn overlay(base: &mut Value, patch: &Value) {
    match (base, patch) {
        (Value::Object(base), Value::Object(patch)) => {
            for (key, value) in patch {
                if value.is_null() {
                    base.remove(key);
                } else {
                    overlay(base.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
        }
        (Value::Array(base), Value::Array(patch)) => match list_key(base, patch) {
            Some(key) => merge_entries(base, patch, key),
            None => base.clone_from(patch),
        },
        (base, patch) => *base = without_nulls(patch),
    }
}

/// The field that names every entry of both lists.
fn list_key(base: &[Value], patch: &[Value]) -> Option<&'static str> {
    let names_all = |key: &&str| base.iter().chain(patch).all(|entry| entry[*key].is_string());
    LIST_KEYS.into_iter().find(names_all).filter(|_| !patch.is_empty())
}

fn merge_entries(base: &mut Vec<Value>, patch: &[Value], key: &str) {
    for entry in patch {
        match base.iter_mut().find(|known| known[key] == entry[key]) {
            Some(known) => overlay(known, entry),
            None => base.push(without_nulls(entry)),
        }
    }
}

fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(_, value)| !value.is_null());
            kept.map(|(key, value)| (key.clone(), without_nulls(value))).collect()
        }
        other => other.clone(),
    }
}

/// The first field of `patch` that no pattern of `allowed` covers. A pattern is a path of fields separated by dots and
/// covers everything below it; entries of a list of named entries are written `[NAME]`.
pub(super) fn first_not_allowed(patch: &Value, allowed: &[&str]) -> Option<String> {
    find_not_allowed(patch, String::new(), allowed)
}

fn find_not_allowed(value: &Value, path: String, allowed: &[&str]) -> Option<String> {
    if allowed.contains(&path.as_str()) {
        return None;
    }
    let leads_on = |prefix: &str| allowed.iter().any(|pattern| pattern.starts_with(prefix));
    match value {
        Value::Object(fields) if path.is_empty() || leads_on(&format!("{path}.")) => {
            let join = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
            fields.iter().find_map(|(key, value)| find_not_allowed(value, join(key), allowed))
        }
        Value::Array(entries) if leads_on(&format!("{path}[")) => entries.iter().find_map(|entry| {
            let name = entry["name"].as_str().unwrap_or_default();
            let mut fields = entry.clone();
            // The name of an entry only says which one is meant.
            fields.as_object_mut().and_then(|fields| fields.remove("name"));
            find_not_allowed(&fields, format!("{path}[{name}]"), allowed)
        }),
        _ => Some(if path.is_empty() { "the document itself".to_owned() } else { path }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn named_entries_are_merged_and_null_removes() {
        let mut base = json!({ "replicas": 2, "containers": [
            { "name": "a", "image": "x", "env": [{ "name": "A", "value": "1" }] }], "tolerations": [{ "key": "k" }] });
        overlay(
            &mut base,
            &json!({ "replicas": null, "containers": [
                { "name": "a", "env": [{ "name": "B", "value": "2" }, { "name": "A", "value": "3" }] },
                { "name": "b", "image": null }], "tolerations": [] }),
        );
        assert_eq!(
            base,
            json!({ "containers": [
                { "name": "a", "image": "x", "env": [{ "name": "A", "value": "3" }, { "name": "B", "value": "2" }] },
                { "name": "b" }], "tolerations": [] })
        );
    }

    #[test]
    fn only_listed_fields_are_allowed() {
        let allowed = ["metadata.labels", "spec.replicas", "spec.containers[waypoint].resources"];
        for (patch, refused) in [
            (json!({ "metadata": { "labels": { "a": "b" } }, "spec": { "replicas": 3 } }), None),
            (json!({ "spec": { "replicas": null } }), None),
            (
                json!({ "spec": { "containers": [{ "name": "waypoint", "resources": { "limits": {} } }] } }),
                None,
            ),
            (
                json!({ "spec": { "containers": [{ "name": "waypoint", "image": "x" }] } }),
                Some("spec.containers[waypoint].image"),
            ),
            (
                json!({ "spec": { "containers": [{ "name": "other", "resources": {} }] } }),
                Some("spec.containers[other]"),
            ),
            (json!({ "spec": { "containers": null } }), Some("spec.containers")),
            (json!({ "spec": { "hostNetwork": true } }), Some("spec.hostNetwork")),
            (json!({ "metadata": { "ownerReferences": [] } }), Some("metadata.ownerReferences")),
            (json!({ "metadata": "x" }), Some("metadata")),
            (json!([1]), Some("the document itself")),
        ] {
            assert_eq!(first_not_allowed(&patch, &allowed).as_deref(), refused, "{patch}");
        }
    }
}
