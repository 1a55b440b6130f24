//! `status.ancestors` of a policy: what it must be, from what was found out about it at each Gateway. Pure.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::conditions::{self, Condition};
use crate::index::{CONTROLLER, Finding};
use crate::object::ObjectRef;

/// Most ancestors that the API server takes.
const MOST: usize = 16;

/// `status.ancestors` of a policy, if it must differ from what it is. Entries of other controllers stay where they are; ours that
/// nothing speaks for any more go.
pub(super) fn plan(policy: &Value, findings: &[Finding], now: &str) -> Option<Vec<Value>> {
    let present = policy.pointer("/status/ancestors").and_then(Value::as_array).cloned().unwrap_or_default();
    let generation = policy.pointer("/metadata/generation").and_then(Value::as_i64);
    let mut planned: Vec<Value> =
        present.iter().filter(|entry| entry["controllerName"] != CONTROLLER).cloned().collect();
    let mut by_ancestor: BTreeMap<&ObjectRef, Vec<Condition>> = BTreeMap::new();
    for finding in findings {
        let Some(ancestor) = &finding.parent else { continue };
        let conditions = by_ancestor.entry(ancestor).or_default();
        // Of several targets below one Gateway, one that is not followed counts.
        match conditions.iter_mut().find(|known| known.name == finding.condition) {
            Some(known) if known.met && !finding.met => *known = finding.into(),
            Some(_) => {}
            None => conditions.push(finding.into()),
        }
    }
    for (ancestor, wanted) in by_ancestor {
        let mut reference = json!({
            "group": ancestor.kind.group(), "kind": ancestor.kind.as_str(), "name": &*ancestor.name.name,
        });
        if ancestor.kind.is_namespaced() {
            reference["namespace"] = (*ancestor.name.namespace).into();
        }
        let is_present =
            |entry: &&Value| entry["controllerName"] == CONTROLLER && entry["ancestorRef"] == reference;
        let known = present.iter().find(is_present).and_then(|entry| entry["conditions"].as_array());
        let names = |condition: &Value| wanted.iter().any(|wanted| condition["type"] == wanted.name);
        let known: Vec<Value> = known.into_iter().flatten().filter(|known| names(known)).cloned().collect();
        planned.push(json!({
            "ancestorRef": reference, "controllerName": CONTROLLER,
            "conditions": conditions::merge(&known, &wanted, generation, now),
        }));
    }
    planned.truncate(MOST);
    (planned != present).then_some(planned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kind::Kind;
    use crate::object::NamespacedName;

    fn finding(gateway: &str, condition: &'static str, met: bool) -> Finding {
        Finding {
            condition,
            met,
            reason: "Why",
            message: "because".to_owned(),
            parent: Some(ObjectRef { kind: Kind::Gateway, name: NamespacedName::new("shop", gateway) }),
            parent_ref: None,
            listener: None,
            listener_sets: None,
            addresses: Vec::new(),
            controller: CONTROLLER,
        }
    }

    #[test]
    fn each_gateway_has_its_own_entry_and_foreign_ones_stay() {
        let foreign = json!({ "ancestorRef": { "name": "g" }, "controllerName": "other", "conditions": [] });
        let stale = json!({ "ancestorRef": { "name": "x" }, "controllerName": CONTROLLER, "conditions": [] });
        let policy = |ancestors: &[Value]| json!({ "metadata": { "generation": 4 }, "status": { "ancestors": ancestors } });
        let findings = [
            finding("a", "Accepted", true),
            finding("a", "ResolvedRefs", true),
            finding("b", "Accepted", true),
            finding("b", "Accepted", false),
        ];
        let planned = plan(&policy(&[foreign.clone(), stale]), &findings, "t").unwrap();
        assert_eq!((planned.len(), &planned[0]), (3, &foreign));
        let gateway = json!({
            "group": "gateway.networking.k8s.io", "kind": "Gateway", "namespace": "shop", "name": "a",
        });
        assert_eq!(planned[1]["ancestorRef"], gateway);
        assert_eq!(planned[1]["conditions"].as_array().map(Vec::len), Some(2));
        assert_eq!(planned[2]["conditions"][0]["status"], "False");
        assert_eq!(planned[2]["conditions"][0]["observedGeneration"], 4);
        assert_eq!(plan(&policy(&planned), &findings, "t2"), None);
        assert_eq!(plan(&policy(&planned), &[], "t2"), Some(vec![foreign]));
    }
}
