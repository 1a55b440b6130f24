//! TrafficPolicies as resources: for which waypoints and gateways they are, and for what of these.
//!
//! Of two policies for the same part of a target the older one counts (Gateway API, GEP-713). One that can't be read denies what it is
//! for whatever others say; where that can't be read either, everything of its namespace.

use std::collections::BTreeSet;
use std::sync::Arc;

use ambit_api::{l7, security};
use prost::Message;

use super::gateways::object_name;
use super::l4::authorization::{everything, policy_resource};
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, views};
use crate::object::{Kind, NamespacedName, ObjectRef, TrafficPolicy, TrafficTarget};

const ACCEPTED: &str = "Accepted";

/// What a target comes to.
#[derive(Default)]
struct Place {
    targets: Vec<l7::Target>,
    gateways: Vec<String>,
    routes: Vec<l7::RouteTarget>,
    /// The waypoints and gateways that it is for.
    roots: BTreeSet<Arc<str>>,
}

/// Why a policy is not for a target.
struct Refused(&'static str, String);

/// The resource of a policy.
pub(in crate::index) fn of_policy(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(policy) = reader.store.traffic_policies.get(id) else { return Vec::new() };
    let (demands, problem) = match &policy.demands {
        Ok(demands) => (demands.clone(), None),
        Err(reason) => {
            let closed = l7::Traffic { invalid: reason.to_string(), ..l7::Traffic::default() };
            (closed, Some(reason))
        }
    };
    let Some(targets) = &policy.targets else { return closed(reader, id, demands) };
    let mut all = Place::default();
    for target in targets {
        match attach(reader, policy, target) {
            Ok(place) => {
                report(reader, &place.roots, problem);
                all.targets.extend(place.targets);
                all.gateways.extend(place.gateways);
                all.routes.extend(place.routes);
                all.roots.extend(place.roots);
            }
            Err(Refused(reason, message)) => {
                reader.find(about(&target.object, false, reason, message));
            }
        }
    }
    resource(id, all, demands).into_iter().collect()
}

/// The resource of a policy for a place; `None` where no waypoint gets it.
fn resource(id: &NamespacedName, place: Place, demands: l7::Traffic) -> Option<(ResourceType, Resource)> {
    if place.roots.is_empty() {
        return None;
    }
    let message = l7::Policy {
        object: Some(object_name(Kind::TrafficPolicy, id)),
        targets: place.targets,
        gateways: place.gateways,
        traffic: Some(l7::Traffic { routes: place.routes, ..demands }),
        ..l7::Policy::default()
    };
    let resource = Resource {
        name: format!("{}/{id}", Kind::TrafficPolicy).into(),
        aliases: Vec::new(),
        parents: place.roots.into_iter().collect(),
        body: message.encode_to_vec().into(),
        unhealthy: false,
    };
    Some((ResourceType::Policy, resource))
}

/// What stands for a policy of which nobody knows what it is for: everything of its namespace is denied, by node proxies and by its
/// waypoints and gateways. The root namespace is where the mesh itself is: there only requests through its own waypoints are denied.
fn closed(reader: &Reader<'_>, id: &NamespacedName, demands: l7::Traffic) -> Vec<(ResourceType, Resource)> {
    let classes = reader.settings.waypoint_classes.iter().chain(&reader.settings.gateway_classes);
    let mut place = Place::default();
    for gateway in classes.flat_map(|class| reader.gateways_of_class(class)) {
        let name = &gateway.meta.id;
        if name.namespace == id.namespace {
            place.gateways.push(name.to_string());
            place.roots.insert(views::root(name));
        }
    }
    let everywhere = id.namespace != reader.settings.root_namespace;
    let denied = match everywhere {
        true => "everything in its namespace is denied",
        false => "everything through waypoints and gateways of its namespace is denied",
    };
    let namespace = ObjectRef { kind: Kind::Namespace, name: NamespacedName::new("", id.namespace.clone()) };
    let message = format!("{}: {denied}", demands.invalid);
    reader.find(about(&namespace, false, "Invalid", message));
    let mut resources: Vec<_> = resource(id, place, demands).into_iter().collect();
    if everywhere {
        resources.push(policy_resource(&security::Authorization {
            // No AuthorizationPolicy can have such a name.
            name: format!("unreadable_traffic_policy_{}", id.name),
            namespace: id.namespace.to_string(),
            scope: security::Scope::Namespace.into(),
            action: security::Action::Deny.into(),
            rules: vec![everything()],
            dry_run: false,
            extensions: Vec::new(),
        }));
    }
    resources
}

fn attach(reader: &Reader<'_>, policy: &TrafficPolicy, target: &TrafficTarget) -> Result<Place, Refused> {
    let place = match target.object.kind {
        Kind::Gateway => of_gateway(reader, target),
        Kind::HttpRoute | Kind::GrpcRoute => of_route(reader, target),
        Kind::Service => of_service(reader, target),
        _ => of_entry(reader, target),
    }?;
    if policy.demands.is_err() {
        return Ok(place);
    }
    let is_same = |other: &&TrafficTarget| other.object == target.object && other.section == target.section;
    let rivals = reader
        .traffic_policies_of(&target.object)
        .filter(|rival| rival.demands.is_ok() && rival.known_targets().iter().any(|other| is_same(&other)));
    match rivals.min_by_key(|rival| rival.meta.seniority()) {
        Some(first) if first.meta.id != policy.meta.id => {
            let message = format!("TrafficPolicy {} is older and for {target} too", first.meta.id);
            Err(Refused("Conflicted", message))
        }
        _ => Ok(place),
    }
}

fn missing(target: &TrafficTarget) -> Refused {
    Refused("TargetNotFound", format!("{target} does not exist"))
}

fn no_section(target: &TrafficTarget, what: &str) -> Refused {
    let section = target.section.as_deref().unwrap_or_default();
    Refused("TargetNotFound", format!("{target} has no {what} {section}"))
}

fn unbound(target: &TrafficTarget) -> Refused {
    Refused("NoWaypoint", format!("{target} is bound to no waypoint or gateway: nobody enforces it"))
}

fn of_gateway(reader: &Reader<'_>, target: &TrafficTarget) -> Result<Place, Refused> {
    let name = &target.object.name;
    let gateway = reader.gateway(name).ok_or_else(|| missing(target))?;
    if !reader.settings.runs(&gateway.class) {
        let message = format!("{target} of class {} is another controller's", gateway.class);
        return Err(Refused("TargetNotFound", message));
    }
    let mut place = Place { roots: BTreeSet::from([views::root(name)]), ..Place::default() };
    let Some(section) = &target.section else {
        place.gateways.push(name.to_string());
        return Ok(place);
    };
    let listener = gateway.listeners.iter().find(|listener| listener.name == *section);
    let listener = listener.ok_or_else(|| no_section(target, "listener"))?;
    match reader.settings.gateway_classes.contains(&gateway.class) {
        true => place.targets.push(l7::Target {
            listener: super::listeners::Owner::gateway(gateway).resource_name(listener),
            ..l7::Target::default()
        }),
        // A waypoint has one way in.
        false => place.gateways.push(name.to_string()),
    }
    Ok(place)
}

fn of_route(reader: &Reader<'_>, target: &TrafficTarget) -> Result<Place, Refused> {
    let route = reader.route(&target.object).ok_or_else(|| missing(target))?;
    let section = target.section.as_deref().unwrap_or_default();
    if !section.is_empty() && route.rules.iter().all(|rule| rule.own.name != section) {
        return Err(no_section(target, "rule"));
    }
    let roots = views::of_route(reader, route);
    if roots.is_empty() {
        return Err(unbound(target));
    }
    let name = &target.object.name;
    let routes = vec![l7::RouteTarget {
        kind: target.object.kind.as_str().to_owned(),
        namespace: name.namespace.to_string(),
        name: name.name.to_string(),
        rule: section.to_owned(),
    }];
    Ok(Place { routes, roots, ..Place::default() })
}

fn of_service(reader: &Reader<'_>, target: &TrafficTarget) -> Result<Place, Refused> {
    let name = &target.object.name;
    let service = reader.service(name).ok_or_else(|| missing(target))?;
    let ports = service.ports.iter().map(|port| (&*port.name, port.number));
    let roots = views::of_binding(reader, &name.namespace, &service.waypoint);
    of_hosts(target, [reader.settings.host_of_service(name)], ports, roots)
}

fn of_entry(reader: &Reader<'_>, target: &TrafficTarget) -> Result<Place, Refused> {
    let name = &target.object.name;
    let entry = reader.service_entry(name).ok_or_else(|| missing(target))?;
    let ports = entry.ports.iter().map(|port| (&*port.name, port.number));
    let roots = views::of_binding(reader, &name.namespace, &entry.waypoint);
    of_hosts(target, entry.hosts.iter().map(ToString::to_string), ports, roots)
}

fn of_hosts<'p>(
    target: &TrafficTarget,
    hosts: impl IntoIterator<Item = String>,
    mut ports: impl Iterator<Item = (&'p str, u16)>,
    roots: BTreeSet<Arc<str>>,
) -> Result<Place, Refused> {
    let port = match &target.section {
        None => 0,
        Some(section) => {
            let named = ports.find(|(name, _)| *name == &**section);
            named.ok_or_else(|| no_section(target, "port"))?.1
        }
    };
    if roots.is_empty() {
        return Err(unbound(target));
    }
    let namespace = target.object.name.namespace.to_string();
    let of_host = |hostname| l7::Target {
        namespace: namespace.clone(),
        hostname,
        port: port.into(),
        ..l7::Target::default()
    };
    Ok(Place { targets: hosts.into_iter().map(of_host).collect(), roots, ..Place::default() })
}

/// What is said of a policy at its waypoints and gateways.
fn report(reader: &Reader<'_>, roots: &BTreeSet<Arc<str>>, problem: Option<&Arc<str>>) {
    for ancestor in roots.iter().filter_map(|root| views::gateway_of(root)) {
        reader.find(match problem {
            None => about(&ancestor, true, "Accepted", "enforced".to_owned()),
            Some(problem) => {
                about(&ancestor, false, "Invalid", format!("{problem}: everything is denied instead"))
            }
        });
    }
}

fn about(ancestor: &ObjectRef, met: bool, reason: &'static str, message: String) -> Finding {
    Finding::new(ACCEPTED, met, reason, message).relative_to(ancestor.kind, &ancestor.name)
}
