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

/// Conditions of a gateway that the index finds.
const OF_FINDINGS: [&str; 3] = ["ResolvedRefs", "InsecureFrontendValidationMode", "ambit.dev/FieldsHonoured"];

/// The reason of a condition that no controller has written yet.
const PENDING: &str = "Pending";

/// How the deployment of a waypoint stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DeploymentState {
    /// The Gateway cannot be what it wants to be.
    Invalid(String),
    /// It asks for addresses that it can't have.
    Unaddressable(String),
    /// An object of the waypoint could not be made.
    Refused(String),
    /// All objects are there.
    Deployed {
        /// The addresses of the Service, once it has some.
        addresses: Vec<ServiceAddress>,
        /// An address that it asks for and has not got.
        withheld: Option<String>,
        /// Whether a pod serves.
        serves: bool,
    },
}

/// An address of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceAddress {
    /// An IP address or a host name.
    pub(super) value: String,
    /// Whether it is a cluster IP that the Gateway asks for as such.
    pub(super) in_cluster: bool,
}

impl<T: Into<String>> From<T> for ServiceAddress {
    fn from(value: T) -> Self {
        Self { value: value.into(), in_cluster: false }
    }
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
        (DeploymentState::Unaddressable(message), _) => {
            Condition::new("Accepted", false, "UnsupportedAddress", message)
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
        DeploymentState::Deployed { addresses, serves, .. }
            if is_accepted
                && !addresses.is_empty()
                && (*serves || addresses.iter().all(|address| is_address(present, address))) =>
        {
            addresses.iter().map(address_status).collect()
        }
        // What runs goes on to serve: neither bad parameters nor a refused write stop it.
        DeploymentState::Deployed { addresses, .. } if !addresses.is_empty() => json!([]),
        _ if can_serve && present.is_array() => present.clone(),
        _ => json!([]),
    };
    let programmed = programmed(state, is_accepted);
    let mut wanted = vec![accepted, programmed.clone()];
    let of_gateway_itself =
        |finding: &&Finding| finding.listener.is_none() && OF_FINDINGS.contains(&finding.condition);
    wanted.extend(findings.iter().filter(of_gateway_itself).map(Condition::from));
    let mut present =
        gateway["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default().to_vec();
    // Those that nothing speaks for any more go.
    let is_stale = |condition: &Value| {
        let is_it = |name: &&str| condition["type"] == **name && wanted.iter().all(|it| it.name != *name);
        OF_FINDINGS.iter().any(is_it)
    };
    present.retain(|condition| !is_stale(condition));
    let mut status = json!({
        "conditions": conditions::merge(&present, &wanted, generation, now),
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
    let sets = findings.iter().find_map(|finding| finding.listener_sets.as_ref());
    let attached = sets.map_or(0, |sets| sets.attached);
    let known = gateway["status"]["attachedListenerSets"].as_u64().unwrap_or_default();
    let counts_differ = u64::try_from(attached) != Ok(known);
    if counts_differ {
        status["attachedListenerSets"] = attached.into();
    }
    (differs || counts_differ).then_some(status)
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

/// The addresses at which a Service is reached: those of its load balancer, else its own. With `in_cluster` its own are asked for as
/// such.
pub(super) fn addresses(service: &Value, in_cluster: bool) -> Vec<ServiceAddress> {
    let text =
        |value: &Value| value.as_str().filter(|text| !text.is_empty() && *text != "None").map(str::to_owned);
    let own = text(&service["spec"]["clusterIP"]).map(|value| ServiceAddress { value, in_cluster });
    if service["spec"]["type"] == "LoadBalancer" {
        let ingress = service["status"]["loadBalancer"]["ingress"].as_array().into_iter().flatten();
        let ingress = ingress.filter_map(|it| text(&it["ip"]).or_else(|| text(&it["hostname"])));
        return ingress.map(ServiceAddress::from).chain(own.filter(|_| in_cluster)).collect();
    }
    own.into_iter().collect()
}

fn address_status(ServiceAddress { value, in_cluster }: &ServiceAddress) -> Value {
    let kind = if value.parse::<IpAddr>().is_ok() { "IPAddress" } else { "Hostname" };
    match in_cluster {
        // A field of Gateway API's experimental channel: who asks has its definition.
        true => json!({ "type": kind, "value": value, "routability": "Cluster" }),
        false => json!({ "type": kind, "value": value }),
    }
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
        DeploymentState::Invalid(message) | DeploymentState::Unaddressable(message) => {
            not("Invalid", message)
        }
        _ if !is_accepted => not("Invalid", "the Gateway is not accepted"),
        DeploymentState::Refused(message) => not("Invalid", message),
        DeploymentState::Deployed { withheld: Some(address), .. } => {
            not("AddressNotUsable", &format!("the Service of the Gateway has not got address {address}"))
        }
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

fn is_address(addresses: &Value, address: &ServiceAddress) -> bool {
    addresses.as_array().into_iter().flatten().any(|known| known["value"] == address.value)
}

/// What the status of a listener says: its conditions, the kinds of routes that can be attached, how many are.
struct Found {
    conditions: [Condition; 4],
    kinds: Vec<Value>,
    attached: usize,
}

/// `status` of a ListenerSet, if it must differ from what it is. `programmed` is the condition of its Gateway.
pub(super) fn of_set(set: &Value, findings: &[Finding], programmed: &Condition, now: &str) -> Option<Value> {
    let accepted = findings.iter().find(|finding| finding.listener.is_none()).map(Condition::from)?;
    let generation = set["metadata"]["generation"].as_i64();
    let own = match (accepted.met, programmed.met) {
        (true, true) => Condition::new("Programmed", true, "Programmed", "the gateway serves its listeners"),
        (true, false) => Condition::new("Programmed", false, "ParentNotProgrammed", &programmed.message),
        (false, _) => Condition::new("Programmed", false, accepted.reason, &accepted.message),
    };
    let present = set["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_attached = findings.iter().any(|finding| finding.listener.is_some());
    let listeners = listeners(set).filter(|_| is_attached).map(|listener| {
        let found = of_gateway(listener, findings, programmed);
        listener_status(set, listener, found, generation, now)
    });
    let status = json!({
        "listeners": listeners.collect::<Vec<_>>(),
        "conditions": conditions::merge(present, &[accepted, own], generation, now),
    });
    let differs = ["conditions", "listeners"].into_iter().any(|field| {
        let present = set["status"].get(field).cloned().unwrap_or_else(|| json!([]));
        present != status[field]
    });
    differs.then_some(status)
}

/// Whether a Gateway says of itself that it serves.
pub(super) fn is_programmed(gateway: &Value) -> Condition {
    let conditions = gateway["status"]["conditions"].as_array().into_iter().flatten();
    let own = conditions.into_iter().find(|condition| condition["type"] == "Programmed");
    let met = own.is_some_and(|own| own["status"] == "True");
    Condition::new("Programmed", met, "Pending", "the Gateway does not serve yet")
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
#[path = "status_tests.rs"]
mod tests;
