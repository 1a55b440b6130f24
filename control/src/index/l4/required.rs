//! Services that are reached through their waypoint only (`ambit.dev/require-waypoint`): a policy of each pod behind them denies
//! what does not come from the waypoint's identity, so that every node proxy enforces it.
//!
//! Fails closed: where no waypoint is bound, or nobody knows its identity, the policy denies everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ambit_api::security as api;
use ambit_api::security::string_match::MatchType;

use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::workloads::Memberships;
use super::{Finding, authorization, waypoints};
use crate::object::{Choice, Labels, NamespacedName, Pod, Service, WaypointBinding};

/// Who may connect to what requires a waypoint: principals of the waypoint and its canary.
type Principals = BTreeSet<String>;

/// Why nobody may: a reason and one sentence.
type Closed = (&'static str, String);

/// Whether something in `namespace` requires its waypoint, and who may connect then.
fn demanded(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    labels: &Labels,
    binding: &WaypointBinding,
) -> Option<Result<Principals, Closed>> {
    let defaults = reader.namespace(namespace).map(|namespace| &namespace.waypoint);
    let required = binding.required.or(defaults.and_then(|defaults| defaults.required));
    if !required.unwrap_or(false) || waypoints::is_waypoint(reader, namespace, labels) {
        return None;
    }
    let in_force = if binding.choice.is_some() { Some(binding) } else { defaults };
    let Some(Choice::Named(primary)) = in_force.and_then(|binding| binding.choice.as_ref()) else {
        return Some(Err(("NoWaypoint", "it is bound to no waypoint".to_owned())));
    };
    let canary = binding.canary.as_ref().or(in_force.and_then(|binding| binding.canary.as_ref()));
    let gateways = std::iter::once(primary).chain(canary.map(|canary| &canary.gateway));
    let mut principals = Principals::new();
    let mut first_fault = None;
    for gateway in gateways {
        match of_gateway(reader, namespace, gateway) {
            Ok(accounts) => principals.extend(accounts),
            Err(fault) => _ = first_fault.get_or_insert(fault),
        }
    }
    Some(match first_fault {
        Some(fault) if principals.is_empty() => Err(fault),
        _ => Ok(principals),
    })
}

/// The principals of a waypoint's pods.
fn of_gateway(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    gateway: &NamespacedName,
) -> Result<Principals, Closed> {
    waypoints::usable(reader, namespace, gateway).map_err(|fault| ("WaypointNotReady", fault))?;
    let labels: Labels = [(Pod::GATEWAY_NAME, &*gateway.name)].into_iter().collect();
    let accounts = reader.accounts_of_pods(&gateway.namespace, &labels);
    if accounts.is_empty() {
        let message = format!("no pod shows the identity of waypoint {gateway}");
        return Err(("IdentityUnknown", message));
    }
    let domain = &reader.settings.trust_domain;
    let principal = |account: Arc<str>| format!("{domain}/ns/{}/sa/{account}", gateway.namespace);
    Ok(accounts.into_iter().map(principal).collect())
}

/// Says what a demand of a Service comes to.
pub(in crate::index) fn report(reader: &Reader<'_>, service: &Service) {
    const CONDITION: &str = "ambit.dev/WaypointRequired";
    let (namespace, binding) = (&service.meta.id.namespace, &service.waypoint);
    let demanded = demanded(reader, namespace, &service.meta.labels, binding);
    // Policies of workloads are enforced by their proxies.
    let uncaptured = || reader.uncaptured_member(namespace, service.selector.as_ref()?);
    match demanded.map(|demanded| (demanded, uncaptured())) {
        None => {}
        Some((_, Some(member))) => {
            let message =
                format!("{member} is not captured: nothing keeps others from connecting to its ports");
            reader.find(Finding::new(CONDITION, false, "NotCaptured", message));
        }
        Some((Ok(principals), None)) => {
            let from = principals.into_iter().collect::<Vec<_>>().join(", ");
            let message = format!("pods accept connections to its ports from {from} only");
            reader.find(Finding::new(CONDITION, true, "Enforced", message));
        }
        Some((Err((reason, message)), None)) => {
            let message = format!("{message}: pods accept no connection to its ports");
            reader.find(Finding::new(CONDITION, false, reason, message));
        }
    }
    if binding.required_unreadable {
        let message = "ambit.dev/require-waypoint is neither true nor false: taken for true".to_owned();
        reader.find(Finding::new(CONDITION, false, "InvalidValue", message));
    }
}

/// The policy of a workload behind services that require their waypoints, with the name that the workload lists it by.
pub(in crate::index) fn policy(
    reader: &Reader<'_>,
    workload: &NamespacedName,
    services: &Memberships,
) -> Option<(String, (ResourceType, Resource))> {
    // A port may belong to several services: it is reached through the waypoint of each that requires one.
    let mut ports: BTreeMap<u32, Principals> = BTreeMap::new();
    for (name, list) in services {
        let host = name.split_once('/').map_or(name.as_str(), |(_, host)| host);
        let id = reader.settings.own_service(host);
        let Some(service) = id.and_then(|id| reader.store.services.get(&id)) else { continue };
        let demanded = demanded(reader, &service.meta.id.namespace, &service.meta.labels, &service.waypoint);
        let Some(principals) = demanded.map(Result::unwrap_or_default) else { continue };
        for port in &list.ports {
            ports.entry(port.target_port).or_default().extend(principals.iter().cloned());
        }
    }
    let mut by_principals: BTreeMap<Principals, Vec<u32>> = BTreeMap::new();
    ports.into_iter().for_each(|(port, principals)| by_principals.entry(principals).or_default().push(port));
    if by_principals.is_empty() {
        return None;
    }
    // No object's name has an underscore.
    let name = format!("ambit_require_waypoint_{}", workload.name);
    let message = api::Authorization {
        name: name.clone(),
        namespace: workload.namespace.to_string(),
        scope: api::Scope::WorkloadSelector.into(),
        action: api::Action::Deny.into(),
        rules: by_principals.into_iter().map(rule).collect(),
        dry_run: false,
        extensions: Vec::new(),
    };
    Some((format!("{}/{name}", workload.namespace), authorization::policy_resource(&message)))
}

/// Matches connections to these ports of everybody else, peers without identity included.
fn rule((principals, ports): (Principals, Vec<u32>)) -> api::Rule {
    let exact = |principal| api::StringMatch { match_type: Some(MatchType::Exact(principal)) };
    let to = api::Match {
        destination_ports: ports,
        not_principals: principals.into_iter().map(exact).collect(),
        ..api::Match::default()
    };
    api::Rule { clauses: vec![api::Clause { matches: vec![to] }] }
}
