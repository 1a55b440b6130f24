//! The control plane's findings about objects, as lines for a person: pure, from its configuration dump.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::manifest::{Key, Object};

/// A line for every condition that does not hold, in the order of the dump: the object's file, the object, the message.
pub(super) fn unmet(findings: &Value, objects: &BTreeMap<Key, Object>) -> Vec<String> {
    let mut lines = Vec::new();
    for object in findings.as_array().into_iter().flatten() {
        let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
        let key = Key::new(&text(object, "kind"), &text(object, "namespace"), &text(object, "name"));
        let place = objects.get(&key).map(|object| format!("{}: ", object.file.display()));
        let place = place.unwrap_or_default();
        for condition in object["conditions"].as_array().into_iter().flatten() {
            // Unreadable objects are already among the problems, with their line.
            let is_problem = condition["reason"] == "Unreadable";
            if condition["status"].as_bool() == Some(false) && !is_problem {
                lines.push(format!("{place}{key}: {}", text(condition, "message")));
            }
        }
    }
    lines.dedup();
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_conditions_that_do_not_hold_become_lines() {
        let yaml =
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: a, namespace: shop}\n";
        let objects =
            crate::manifest::parse(std::path::Path::new("DIR/a.yaml"), yaml).expect("a sound manifest");
        let objects = objects.into_iter().map(|object| (object.key.clone(), object)).collect();
        let condition =
            |status: bool, message: &str| json!({ "type": "T", "status": status, "message": message });
        let findings = json!([
            { "kind": "ServiceEntry", "namespace": "shop", "name": "a",
              "conditions": [condition(true, "fine"), condition(false, "an older entry has this host")] },
        ]);
        let expected = "DIR/a.yaml: ServiceEntry shop/a: an older entry has this host";
        assert_eq!(unmet(&findings, &objects), [expected]);
        assert_eq!(unmet(&Value::Null, &objects), Vec::<String>::new());
    }
}
