//! The status of a Gateway that is deployed: what it must be, from how its deployment stands and, for gateways, from what the
//! index says of their listeners. Pure.

use std::net::IpAddr;

use ambit_api::ports::INBOUND_HBONE;
use serde_json::{Value, json};

use super::plan::Role;
use crate::api_server::FIELD_MANAGER;
use crate::index::Finding;
use crate::kind::Kind;
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
        /// The addresses of the Service, once it has some.
        addresses: Vec<String>,
        /// Whether a pod serves.
        serves: bool,
    },
}

/// `status` of a Gateway, if it must differ from what it is. Conditions of others stay. An address stays once it was
/// written: that a waypoint serves no longer changes its endpoints alone.
pub(super) fn plan(
    gateway: &Value,
    role: Role,
    state: &DeploymentState,
    findings: &[Finding],
    now: &str,
) -> Option<Value> {
    let generation = gateway["metadata"]["generation"].as_i64();
    let accepted = match (state, role) {
        (DeploymentState::Invalid(message), _) => {
            Condition::new("Accepted", false, "InvalidParameters", message)
        }
        (_, Role::Waypoint) => accepted_waypoint(gateway),
        (_, Role::Gateway) => accepted_gateway(findings),
    };
    let is_accepted = accepted.met;
    let can_serve = match role {
        Role::Waypoint => listeners(gateway).any(is_hbone),
        Role::Gateway => accepted_gateway(findings).met,
    };
    let present = &gateway["status"]["addresses"];
    let addresses = match state {
        DeploymentState::Deployed { addresses, serves }
            if is_accepted
                && !addresses.is_empty()
                && (*serves || addresses.iter().all(|address| is_address(present, address))) =>
        {
            addresses.iter().map(|address| address_status(address)).collect()
        }
        // What runs goes on to serve: neither bad parameters nor a refused write stop it.
        DeploymentState::Deployed { addresses, .. } if !addresses.is_empty() => json!([]),
        _ if can_serve && present.is_array() => present.clone(),
        _ => json!([]),
    };
    let programmed = programmed(state, is_accepted);
    let wanted = [accepted, programmed.clone()];
    let present = gateway["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let status = json!({
        "conditions": conditions::merge(present, &wanted, generation, now),
        "addresses": addresses,
        "listeners": listeners(gateway)
            .map(|listener| {
                let found = match role {
                    Role::Waypoint => of_waypoint(listener, &programmed),
                    Role::Gateway => of_gateway(listener, findings, &programmed),
                };
                listener_status(gateway, listener, found, generation, now)
            })
            .collect::<Vec<_>>(),
    });
    let differs = ["conditions", "addresses", "listeners"].into_iter().any(|field| {
        let present = gateway["status"].get(field).cloned().unwrap_or_else(|| json!([]));
        present != status[field]
    });
    differs.then_some(status)
}

fn accepted_waypoint(gateway: &Value) -> Condition {
    match listeners(gateway).any(is_hbone) {
        true => Condition::new("Accepted", true, "Accepted", "the control plane deploys the waypoint"),
        false => {
            let message = "a waypoint has a listener with protocol HBONE on port 15008";
            Condition::new("Accepted", false, "ListenersNotValid", message)
        }
    }
}

/// Gateway API: a Gateway whose listeners are valid in part is accepted, with a reason that says so.
fn accepted_gateway(findings: &[Finding]) -> Condition {
    let of_listeners = || findings.iter().filter(|f| f.listener.is_some() && f.condition == "Accepted");
    let refused = of_listeners().find(|finding| !finding.met);
    let some_can = of_listeners().any(|finding| finding.met);
    match refused {
        Some(finding) => Condition::new("Accepted", some_can, "ListenersNotValid", &finding.message),
        None if some_can => {
            Condition::new("Accepted", true, "Accepted", "the control plane deploys the gateway")
        }
        None => Condition::new("Accepted", false, "ListenersNotValid", "it has no listener"),
    }
}

/// The addresses at which a Service is reached: those of its load balancer, else its own.
pub(super) fn addresses(service: &Value) -> Vec<String> {
    let text =
        |value: &Value| value.as_str().filter(|text| !text.is_empty() && *text != "None").map(str::to_owned);
    if service["spec"]["type"] == "LoadBalancer" {
        let ingress = service["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten();
        return ingress
            .filter_map(|ingress| text(&ingress["ip"]).or_else(|| text(&ingress["hostname"])))
            .collect();
    }
    text(&service["spec"]["clusterIP"]).into_iter().collect()
}

fn address_status(address: &str) -> Value {
    let kind = if address.parse::<IpAddr>().is_ok() { "IPAddress" } else { "Hostname" };
    json!({ "type": kind, "value": address })
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
        DeploymentState::Deployed { addresses, .. } if addresses.is_empty() => {
            not("AddressNotAssigned", "the Service of the Gateway has no address yet")
        }
        DeploymentState::Deployed { serves: false, .. } => not("Pending", "no pod of the Gateway is ready"),
        DeploymentState::Deployed { serves: true, .. } => {
            Condition::new("Programmed", true, "Programmed", "a pod of the Gateway serves")
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

/// What the status of a listener says: its conditions, the kinds of routes that can be attached, how many are.
struct Found {
    conditions: [Condition; 4],
    kinds: Vec<Value>,
    attached: usize,
}

/// The condition of a listener that nothing is in the way of.
fn no_conflict() -> Condition {
    Condition::new("Conflicted", false, "NoConflicts", "no other listener is in its way")
}

fn of_gateway(listener: &Value, findings: &[Finding], programmed: &Condition) -> Found {
    let of_listener = |finding: &&Finding| {
        let facts = finding.listener.as_ref();
        facts.is_some_and(|facts| listener["name"] == *facts.name)
    };
    let find = |condition: &str| {
        let found = findings.iter().filter(of_listener).find(|finding| finding.condition == condition);
        found.map(|Finding { condition, met, reason, message, .. }| {
            Condition::new(condition, *met, reason, message)
        })
    };
    let unread = |name| Condition::new(name, false, "Invalid", "the listener can't be read");
    let pending = !programmed.met;
    let of_pods = || Condition::new("Programmed", false, programmed.reason, &programmed.message);
    let programmed = match find("Programmed") {
        Some(own) if own.met && pending => of_pods(),
        own => own.unwrap_or_else(|| unread("Programmed")),
    };
    let facts = findings.iter().find(of_listener).and_then(|finding| finding.listener.as_ref());
    let kind = |kind: &Kind| json!({ "group": kind.group(), "kind": kind.as_str() });
    Found {
        conditions: [
            find("Accepted").unwrap_or_else(|| unread("Accepted")),
            programmed,
            find("ResolvedRefs").unwrap_or_else(|| unread("ResolvedRefs")),
            find("Conflicted").unwrap_or_else(no_conflict),
        ],
        kinds: facts.map(|facts| facts.kinds.iter().map(kind).collect()).unwrap_or_default(),
        attached: facts.map_or(0, |facts| facts.attached),
    }
}

fn of_waypoint(listener: &Value, programmed: &Condition) -> Found {
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
    let refs = Condition::new("ResolvedRefs", true, "ResolvedRefs", "it refers to nothing");
    Found { conditions: [accepted, programmed, refs, no_conflict()], kinds: Vec::new(), attached: 0 }
}

fn listener_status(
    gateway: &Value,
    listener: &Value,
    found: Found,
    generation: Option<i64>,
    now: &str,
) -> Value {
    let Found { conditions, kinds, attached } = found;
    let known = gateway["status"]["listeners"].as_array().into_iter().flatten();
    let present = known.into_iter().find(|status| status["name"] == listener["name"]);
    let present = present.and_then(|status| status["conditions"].as_array());
    let present = present.map(Vec::as_slice).unwrap_or_default();
    json!({
        "name": listener["name"], "attachedRoutes": attached, "supportedKinds": kinds,
        "conditions": conditions::merge(present, &conditions, generation, now),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{CONTROLLER, ListenerFacts};

    fn gateway(protocol: &str, status: &Value) -> Value {
        json!({
            "metadata": { "generation": 2 },
            "spec": { "listeners": [{ "name": "mesh", "protocol": protocol, "port": 15008 }] },
            "status": status,
        })
    }

    fn deployed(address: Option<&str>, serves: bool) -> DeploymentState {
        DeploymentState::Deployed { addresses: address.map(str::to_owned).into_iter().collect(), serves }
    }

    fn plan(gateway: &Value, state: &DeploymentState, now: &str) -> Option<Value> {
        super::plan(gateway, Role::Waypoint, state, &[], now)
    }

    #[test]
    fn listeners_of_a_gateway_say_what_the_index_found() {
        let facts = |name: &str, attached| ListenerFacts {
            name: name.into(),
            kinds: vec![Kind::HttpRoute],
            attached,
        };
        let finding = |name: &str, condition, met, reason| Finding {
            condition,
            met,
            reason,
            message: "because".to_owned(),
            parent: None,
            parent_ref: None,
            listener: Some(facts(name, 3)),
            controller: CONTROLLER,
        };
        let findings = [
            finding("good", "Accepted", true, "Accepted"),
            finding("good", "ResolvedRefs", true, "ResolvedRefs"),
            finding("good", "Programmed", true, "Programmed"),
            finding("bad", "Accepted", false, "HostnameConflict"),
            finding("bad", "Programmed", false, "Invalid"),
            finding("bad", "Conflicted", true, "HostnameConflict"),
        ];
        let gateway = json!({
            "metadata": { "generation": 2 },
            "spec": { "listeners": [{ "name": "good" }, { "name": "bad" }] },
        });
        let of = |status: &Value, at: usize, condition: &str| reason(&status["listeners"][at], condition);
        let waiting = deployed(Some("10.0.0.1"), false);
        let status = super::plan(&gateway, Role::Gateway, &waiting, &findings, "t").unwrap();
        assert_eq!(reason(&status, "Accepted"), "True ListenersNotValid");
        assert_eq!(of(&status, 0, "Programmed"), "False Pending");
        let serving = DeploymentState::Deployed {
            addresses: vec!["10.0.0.1".into(), "lb.example".into()],
            serves: true,
        };
        let status = super::plan(&gateway, Role::Gateway, &serving, &findings, "t").unwrap();
        assert_eq!(status["addresses"][1], json!({ "type": "Hostname", "value": "lb.example" }));
        assert_eq!(
            (&status["listeners"][0]["attachedRoutes"], of(&status, 0, "Programmed")),
            (&json!(3), "True Programmed".into())
        );
        assert_eq!(status["listeners"][0]["supportedKinds"][0]["kind"], "HTTPRoute");
        assert_eq!(of(&status, 0, "Conflicted"), "False NoConflicts");
        assert_eq!(of(&status, 1, "Accepted"), "False HostnameConflict");
        assert_eq!(
            (of(&status, 1, "Programmed"), of(&status, 1, "Conflicted")),
            ("False Invalid".into(), "True HostnameConflict".into())
        );
        let none = super::plan(&gateway, Role::Gateway, &serving, &findings[3..], "t").unwrap();
        assert_eq!(
            (reason(&none, "Accepted"), &none["addresses"]),
            ("False ListenersNotValid".into(), &json!([]))
        );
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
    fn each_state_has_its_conditions() {
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
