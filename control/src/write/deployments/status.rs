//! The status of a waypoint's Gateway: what it must be, from how its deployment stands. Pure.

use ambit_api::ports::INBOUND_HBONE;
use serde_json::{Value, json};

use crate::api_server::FIELD_MANAGER;
use crate::write::conditions::{self, Condition};

/// The listener of a waypoint.
const HBONE: (&str, u64) = ("HBONE", INBOUND_HBONE as u64);

/// The reason of a condition that no controller has written yet.
const PENDING: &str = "Pending";

/// How the deployment of a waypoint stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DeploymentState {
    /// The Gateway cannot be what it wants to be.
    Invalid(String),
    /// An object of the waypoint could not be made.
    Refused(String),
    /// All objects are there.
    Deployed {
        /// The address of the Service, once it has one.
        address: Option<String>,
        /// Whether a pod serves.
        serves: bool,
    },
}

/// `status` of a Gateway, if it must differ from what it is. Conditions of others stay. An address stays once it was
/// written: that a waypoint serves no longer changes its endpoints alone.
pub(super) fn plan(gateway: &Value, state: &DeploymentState, now: &str) -> Option<Value> {
    let generation = gateway["metadata"]["generation"].as_i64();
    let has_hbone = listeners(gateway).any(is_hbone);
    let accepted = match state {
        DeploymentState::Invalid(message) => Condition::new("Accepted", false, "InvalidParameters", message),
        _ if !has_hbone => Condition::new(
            "Accepted",
            false,
            "ListenersNotValid",
            "a waypoint has a listener with protocol HBONE on port 15008",
        ),
        _ => Condition::new("Accepted", true, "Accepted", "the control plane deploys the waypoint"),
    };
    let is_accepted = accepted.met;
    let present = &gateway["status"]["addresses"];
    let addresses = match state {
        DeploymentState::Deployed { address: Some(address), serves }
            if is_accepted && (*serves || is_address(present, address)) =>
        {
            json!([{ "type": "IPAddress", "value": address }])
        }
        // What runs goes on to serve: neither bad parameters nor a refused write stop it.
        DeploymentState::Invalid(_)
        | DeploymentState::Refused(_)
        | DeploymentState::Deployed { address: None, .. }
            if has_hbone && present.is_array() =>
        {
            present.clone()
        }
        _ => json!([]),
    };
    let programmed = programmed(state, is_accepted);
    let wanted = [accepted, programmed.clone()];
    let present = gateway["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let status = json!({
        "conditions": conditions::merge(present, &wanted, generation, now),
        "addresses": addresses,
        "listeners": listeners(gateway)
            .map(|listener| listener_status(gateway, listener, &programmed, generation, now))
            .collect::<Vec<_>>(),
    });
    let differs = ["conditions", "addresses", "listeners"].into_iter().any(|field| {
        let present = gateway["status"].get(field).cloned().unwrap_or_else(|| json!([]));
        present != status[field]
    });
    differs.then_some(status)
}

/// `status` of a Gateway that is not ours any more, without what this control plane wrote of it; `None` if there is nothing.
/// What another controller has written since is its own.
pub(super) fn without_ours(gateway: &Value, now: &str) -> Option<Value> {
    let managers = gateway["metadata"]["managedFields"].as_array()?;
    let is_ours = |entry: &&Value| entry["manager"] == FIELD_MANAGER && entry["subresource"] == "status";
    let owned = &managers.iter().find(is_ours)?["fieldsV1"]["f:status"];
    let owns = |list: &str, key: &str, value: &Value| {
        let entry = format!("k:{}", json!({ key: value }));
        !owned[list][&entry].is_null()
    };
    let status = &gateway["status"];
    let entries = |list: &str| status[list].as_array().cloned().unwrap_or_default();
    let reset = |condition: Value| {
        if !owns("f:conditions", "type", &condition["type"]) || condition["reason"] == PENDING {
            return condition;
        }
        // As the definition has them.
        json!({
            "type": condition["type"], "status": "Unknown", "reason": PENDING, "message": "Waiting for controller",
            "lastTransitionTime": now,
        })
    };
    let conditions: Vec<Value> = entries("conditions").into_iter().map(reset).collect();
    let listeners: Vec<Value> = entries("listeners")
        .into_iter()
        .filter(|listener| !owns("f:listeners", "name", &listener["name"]))
        .collect();
    let addresses = if owned["f:addresses"].is_null() { entries("addresses") } else { Vec::new() };
    let differs = conditions != entries("conditions")
        || listeners != entries("listeners")
        || addresses != entries("addresses");
    differs.then(|| json!({ "conditions": conditions, "listeners": listeners, "addresses": addresses }))
}

fn programmed(state: &DeploymentState, is_accepted: bool) -> Condition {
    let not = |reason, message: &str| Condition::new("Programmed", false, reason, message);
    match state {
        DeploymentState::Invalid(message) => not("Invalid", message),
        _ if !is_accepted => not("Invalid", "the Gateway is not accepted"),
        DeploymentState::Refused(message) => not("Invalid", message),
        DeploymentState::Deployed { address: None, .. } => {
            not("AddressNotAssigned", "the Service of the waypoint has no address yet")
        }
        DeploymentState::Deployed { serves: false, .. } => not("Pending", "no pod of the waypoint is ready"),
        DeploymentState::Deployed { address: Some(_), serves: true } => {
            Condition::new("Programmed", true, "Programmed", "the waypoint serves")
        }
    }
}

fn listeners(gateway: &Value) -> impl Iterator<Item = &Value> {
    gateway["spec"]["listeners"].as_array().into_iter().flatten()
}

fn is_hbone(listener: &Value) -> bool {
    listener["protocol"] == HBONE.0 && listener["port"].as_u64() == Some(HBONE.1)
}

fn is_address(addresses: &Value, address: &str) -> bool {
    addresses.as_array().into_iter().flatten().any(|known| known["value"] == address)
}

fn listener_status(
    gateway: &Value,
    listener: &Value,
    programmed: &Condition,
    generation: Option<i64>,
    now: &str,
) -> Value {
    let known = gateway["status"]["listeners"].as_array().into_iter().flatten();
    let present = known.into_iter().find(|status| status["name"] == listener["name"]);
    let present = present.and_then(|status| status["conditions"].as_array());
    let present = present.map(Vec::as_slice).unwrap_or_default();
    let supported = is_hbone(listener);
    let accepted = match supported {
        true => Condition::new("Accepted", true, "Accepted", "clients of the mesh reach the waypoint"),
        false => {
            let message = "waypoints serve protocol HBONE on port 15008 alone";
            Condition::new("Accepted", false, "UnsupportedProtocol", message)
        }
    };
    let programmed = match supported {
        true => programmed.clone(),
        false => Condition::new("Programmed", false, "Invalid", "the listener is not accepted"),
    };
    let wanted = [
        accepted,
        programmed,
        Condition::new("ResolvedRefs", true, "ResolvedRefs", "it refers to nothing"),
        Condition::new("Conflicted", false, "NoConflicts", "no other listener is in its way"),
    ];
    json!({
        "name": listener["name"], "attachedRoutes": 0, "supportedKinds": [],
        "conditions": conditions::merge(present, &wanted, generation, now),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateway(protocol: &str, status: &Value) -> Value {
        json!({
            "metadata": { "generation": 2 },
            "spec": { "listeners": [{ "name": "mesh", "protocol": protocol, "port": 15008 }] },
            "status": status,
        })
    }

    fn deployed(address: Option<&str>, serves: bool) -> DeploymentState {
        DeploymentState::Deployed { address: address.map(str::to_owned), serves }
    }

    fn reason(status: &Value, condition: &str) -> String {
        let conditions = status["conditions"].as_array().unwrap();
        let found = conditions.iter().find(|found| found["type"] == condition).unwrap();
        assert_eq!(found["observedGeneration"], 2);
        format!("{} {}", found["status"].as_str().unwrap(), found["reason"].as_str().unwrap())
    }

    #[test]
    fn the_address_comes_with_the_first_pod_and_stays() {
        let plan_of = |status: &Value, state| plan(&gateway("HBONE", status), &state, "t");
        let waiting = plan_of(&json!({}), deployed(Some("10.0.0.1"), false)).unwrap();
        assert_eq!(
            (reason(&waiting, "Programmed"), &waiting["addresses"]),
            ("False Pending".to_owned(), &json!([]))
        );
        let serving = plan_of(&waiting, deployed(Some("10.0.0.1"), true)).unwrap();
        assert_eq!(reason(&serving, "Programmed"), "True Programmed");
        assert_eq!(serving["addresses"][0]["value"], "10.0.0.1");
        assert_eq!(plan_of(&serving, deployed(Some("10.0.0.1"), true)), None);
        let away = plan_of(&serving, deployed(Some("10.0.0.1"), false)).unwrap();
        assert_eq!(
            (reason(&away, "Programmed"), &away["addresses"]),
            ("False Pending".to_owned(), &serving["addresses"])
        );
    }

    #[test]
    fn each_standing_has_its_conditions() {
        for (protocol, state, accepted, programmed) in [
            ("HBONE", deployed(None, false), "True Accepted", "False AddressNotAssigned"),
            ("HBONE", DeploymentState::Refused("r".to_owned()), "True Accepted", "False Invalid"),
            ("HBONE", DeploymentState::Invalid("i".to_owned()), "False InvalidParameters", "False Invalid"),
            ("HTTP", deployed(Some("10.0.0.1"), true), "False ListenersNotValid", "False Invalid"),
        ] {
            let status = plan(&gateway(protocol, &json!({})), &state, "t").unwrap();
            assert_eq!(reason(&status, "Accepted"), accepted, "{state:?}");
            assert_eq!(reason(&status, "Programmed"), programmed, "{state:?}");
            assert_eq!(status["addresses"], json!([]), "{state:?}");
        }
    }

    #[test]
    fn a_gateway_that_is_not_ours_any_more_keeps_what_others_wrote() {
        let mut left = gateway("HBONE", &json!({}));
        left["status"] = plan(&left, &deployed(Some("10.0.0.1"), true), "t").unwrap();
        assert_eq!(without_ours(&left, "t2"), None, "nothing says that it is ours");
        left["metadata"]["managedFields"] = json!([{
            "manager": FIELD_MANAGER, "operation": "Update", "subresource": "status",
            "fieldsV1": { "f:status": {
                "f:addresses": {}, "f:listeners": { "k:{\"name\":\"mesh\"}": {} },
                "f:conditions": { "k:{\"type\":\"Programmed\"}": {} },
            } },
        }]);
        let status = without_ours(&left, "t2").unwrap();
        assert_eq!((&status["addresses"], &status["listeners"]), (&json!([]), &json!([])));
        let conditions = status["conditions"].as_array().unwrap();
        assert_eq!(conditions[0]["status"], "True", "another controller accepts it");
        assert_eq!(
            (&conditions[1]["status"], &conditions[1]["reason"]),
            (&json!("Unknown"), &json!("Pending"))
        );
        left["status"] = status;
        assert_eq!(without_ours(&left, "t3"), None, "once");
    }

    #[test]
    fn conditions_of_others_stay_and_those_of_the_definition_are_replaced() {
        let foreign = json!({ "type": "Other", "status": "True" });
        let initial = json!({ "type": "Accepted", "status": "Unknown", "reason": "Pending" });
        let status = json!({ "conditions": [initial, foreign] });
        let status = plan(&gateway("HBONE", &status), &deployed(None, false), "t").unwrap();
        assert_eq!(status["conditions"][1], foreign);
        assert_eq!(status["conditions"].as_array().unwrap().len(), 3);
        assert_eq!(reason(&status, "Accepted"), "True Accepted");
    }
}
