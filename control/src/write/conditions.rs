//! Conditions of a status: what they must be, from what was found out about the object and what they are. Pure.

use serde_json::{Value, json};

use crate::index::Finding;

/// Conditions of other names are other controllers'.
fn is_ours(condition: &str) -> bool {
    matches!(condition, "istio.io/WaypointBound" | "ZtunnelAccepted" | "WaypointAccepted")
        || condition.starts_with("ambit.dev/")
}

/// `status.conditions` of an object, if it must differ from what it is. Foreign conditions stay where they are; ours that
/// nothing speaks for any more go. `now` is the time of transitions, RFC 3339.
pub(super) fn plan(object: &Value, findings: &[Finding], now: &str) -> Option<Vec<Value>> {
    let present: Vec<Value> =
        object.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let generation = object.pointer("/metadata/generation").and_then(Value::as_i64);
    let mut wanted = merged(findings);
    let mut planned = Vec::with_capacity(present.len() + wanted.len());
    for condition in &present {
        let name = condition["type"].as_str().unwrap_or_default();
        if !is_ours(name) {
            planned.push(condition.clone());
        } else if let Some(at) = wanted.iter().position(|finding| finding.condition == name) {
            let finding = wanted.remove(at);
            planned.push(updated(condition, &Condition::from(&finding), generation, now));
        }
    }
    let new = wanted.iter().map(|finding| updated(&Value::Null, &Condition::from(finding), generation, now));
    planned.extend(new);
    (planned != present).then_some(planned)
}

/// A condition that this control plane writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) name: &'static str,
    pub(super) met: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

impl Condition {
    pub(super) fn new(
        name: &'static str,
        met: bool,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Condition {
        Condition { name, met, reason, message: message.into() }
    }
}

impl From<&Finding> for Condition {
    fn from(finding: &Finding) -> Condition {
        Condition::new(finding.condition, finding.met, finding.reason, finding.message.clone())
    }
}

/// A list of conditions in which those of `wanted` are as they must be, and the others as they are.
pub(super) fn merge(
    present: &[Value],
    wanted: &[Condition],
    generation: Option<i64>,
    now: &str,
) -> Vec<Value> {
    let mut merged = present.to_vec();
    for condition in wanted {
        match merged.iter_mut().find(|known| known["type"] == condition.name) {
            Some(known) => *known = updated(known, condition, generation, now),
            None => merged.push(updated(&Value::Null, condition, generation, now)),
        }
    }
    merged
}

/// One finding for each condition: of several the unmet ones count, with all that they say.
fn merged(findings: &[Finding]) -> Vec<Finding> {
    let mut merged: Vec<Finding> = Vec::new();
    for finding in findings.iter().filter(|finding| is_ours(finding.condition)) {
        match merged.iter_mut().find(|known| known.condition == finding.condition) {
            None => merged.push(finding.clone()),
            Some(known) if known.met && !finding.met => *known = finding.clone(),
            Some(known) if known.met == finding.met => {
                known.message = format!("{}; {}", known.message, finding.message);
            }
            Some(_) => {}
        }
    }
    merged
}

/// The condition as it is now; the time of its transition stays while its status does.
fn updated(present: &Value, wanted: &Condition, generation: Option<i64>, now: &str) -> Value {
    /// What the API server takes of a message.
    const LONGEST: usize = 4096;
    let status = if wanted.met { "True" } else { "False" };
    let since = present["lastTransitionTime"].as_str().filter(|_| present["status"] == status);
    let message: String = wanted.message.chars().take(LONGEST).collect();
    let mut condition = json!({
        "type": wanted.name, "status": status, "reason": wanted.reason, "message": message,
        "lastTransitionTime": since.unwrap_or(now),
    });
    if let Some(generation) = generation {
        condition["observedGeneration"] = generation.into();
    }
    condition
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::CONTROLLER;

    fn finding(condition: &'static str, met: bool, message: &str) -> Finding {
        let (reason, message) = ("Why", message.to_owned());
        let (parent, parent_ref, listener) = (None, None, None);
        Finding {
            condition,
            met,
            reason,
            message,
            parent,
            parent_ref,
            listener,
            listener_sets: None,
            addresses: Vec::new(),
            controller: CONTROLLER,
        }
    }

    fn object(conditions: &[Value]) -> Value {
        json!({ "metadata": { "generation": 3 }, "status": { "conditions": conditions } })
    }

    const BOUND: &str = "istio.io/WaypointBound";

    #[test]
    fn foreign_conditions_stay_and_a_written_one_is_not_written_again() {
        let foreign = json!({ "type": "Other", "status": "True" });
        let bound = [finding(BOUND, true, "bound")];
        let first = plan(&object(std::slice::from_ref(&foreign)), &bound, "t1").unwrap();
        assert_eq!(first[0], foreign);
        assert_eq!((&first[1]["status"], &first[1]["observedGeneration"]), (&json!("True"), &json!(3)));
        assert_eq!(plan(&object(&first), &bound, "t2"), None);
        assert_eq!(plan(&object(&first), &[], "t2"), Some(vec![foreign]));
    }

    #[test]
    fn the_time_of_transition_changes_with_the_status_alone() {
        let first = plan(&object(&[]), &[finding(BOUND, false, "missing")], "t1").unwrap();
        let reworded = plan(&object(&first), &[finding(BOUND, false, "not ready")], "t2").unwrap();
        assert_eq!(reworded[0]["lastTransitionTime"], "t1");
        let bound = plan(&object(&reworded), &[finding(BOUND, true, "bound")], "t3").unwrap();
        assert_eq!(bound[0]["lastTransitionTime"], "t3");
        let mut newer = object(&bound);
        newer["metadata"]["generation"] = 4.into();
        let observed = plan(&newer, &[finding(BOUND, true, "bound")], "t4").unwrap();
        assert_eq!(
            (&observed[0]["observedGeneration"], &observed[0]["lastTransitionTime"]),
            (&json!(4), &json!("t3"))
        );
    }

    #[test]
    fn several_findings_of_one_condition_are_one() {
        let found =
            ["met", "first", "second"].map(|text| finding("ambit.dev/HostsAccepted", text == "met", text));
        let planned = plan(&object(&[]), &found, "t").unwrap();
        assert_eq!(planned.len(), 1);
        assert_eq!(
            (&planned[0]["status"], &planned[0]["message"]),
            (&json!("False"), &json!("first; second"))
        );
    }
}
