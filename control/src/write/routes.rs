//! `status.parents` of a route: what it must be, from what was found out about each of its parents. Pure.

use std::sync::Arc;

use serde_json::{Value, json};

use super::conditions::{self, Condition};
use crate::index::{CONTROLLER, Finding};
use crate::object::ParentRef;

/// Most parents that the API server takes.
const MOST: usize = 32;

/// `status.parents` of a route in `namespace`, if it must differ from what it is. Entries of other controllers stay where
/// they are; ours of parents that the route no longer names, or that are not the mesh's, go.
pub(super) fn plan(
    route: &Value,
    namespace: &Arc<str>,
    findings: &[Finding],
    now: &str,
) -> Option<Vec<Value>> {
    let entries =
        |pointer: &str| route.pointer(pointer).and_then(Value::as_array).cloned().unwrap_or_default();
    let present = entries("/status/parents");
    let generation = route.pointer("/metadata/generation").and_then(Value::as_i64);
    let mut planned: Vec<Value> =
        present.iter().filter(|entry| entry["controllerName"] != CONTROLLER).cloned().collect();
    for reference in entries("/spec/parentRefs") {
        let Some(parent) = ParentRef::of_value(&reference, namespace) else { continue };
        let found = findings.iter().filter(|finding| finding.parent_ref.as_ref() == Some(&parent));
        let found: Vec<Condition> = found.map(Condition::from).collect();
        if found.is_empty() {
            continue;
        }
        let is_present =
            |entry: &&Value| entry["controllerName"] == CONTROLLER && entry["parentRef"] == reference;
        let known = present.iter().find(is_present).and_then(|entry| entry["conditions"].as_array());
        // All conditions of an entry are its controller's, so those that nothing speaks for any more go.
        let names = |condition: &Value| found.iter().any(|found| condition["type"] == found.name);
        let known: Vec<Value> = known.into_iter().flatten().filter(|known| names(known)).cloned().collect();
        planned.push(json!({
            "parentRef": reference, "controllerName": CONTROLLER,
            "conditions": conditions::merge(&known, &found, generation, now),
        }));
    }
    planned.truncate(MOST);
    (planned != present).then_some(planned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(parents: &[Value], status: &[Value]) -> Value {
        json!({
            "metadata": { "generation": 2 }, "spec": { "parentRefs": parents }, "status": { "parents": status },
        })
    }

    fn service(name: &str, port: u16) -> Value {
        json!({ "group": "", "kind": "Service", "name": name, "port": port })
    }

    fn finding(parent: &Value, condition: &'static str, met: bool) -> Finding {
        Finding {
            condition,
            met,
            reason: "Why",
            message: "because".to_owned(),
            parent: None,
            parent_ref: ParentRef::of_value(parent, &"shop".into()),
            listener: None,
            listener_sets: None,
            addresses: Vec::new(),
            controller: CONTROLLER,
        }
    }

    #[test]
    fn each_parent_has_its_own_entry_and_foreign_ones_stay() {
        let [first, second] = [service("a", 80), service("a", 81)];
        let foreign = json!({ "parentRef": second, "controllerName": "other", "conditions": [] });
        let stale =
            json!({ "parentRef": service("gone", 1), "controllerName": CONTROLLER, "conditions": [] });
        let findings = [
            finding(&first, "Accepted", true),
            finding(&first, "ResolvedRefs", false),
            finding(&second, "Accepted", false),
        ];
        let parents = [first.clone(), second.clone(), json!({ "name": "gateway-of-others" })];
        let object = route(&parents, &[foreign.clone(), stale]);
        let planned = plan(&object, &"shop".into(), &findings, "t").unwrap();
        assert_eq!((planned.len(), &planned[0]), (3, &foreign));
        assert_eq!(
            (&planned[1]["parentRef"], &planned[1]["conditions"][1]["status"]),
            (&first, &json!("False"))
        );
        assert_eq!(
            (&planned[2]["parentRef"], &planned[2]["conditions"][0]["status"]),
            (&second, &json!("False"))
        );
        assert_eq!(planned[1]["conditions"][0]["observedGeneration"], 2);
        assert_eq!(plan(&route(&parents, &planned), &"shop".into(), &findings, "t2"), None);
        let without = plan(&route(&[], &planned), &"shop".into(), &[], "t2").unwrap();
        assert_eq!(without, [foreign]);
    }
}
