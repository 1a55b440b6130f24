//! Where a connection of a pod of this node would go.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ambit_api::Authority;
use ambit_directory::{
    ClientRole, Dependencies, Expected, GatewayDestination, Plain, Question, Refusal, Route, Service,
    Snapshot, Tunnel, TunnelProtocol, WaypointTunnel, Workload, WorkloadUid, resolve,
};
use ambit_explain::{Client, Considered, Explanation, Next};
use ambit_telemetry::http::Query;

use super::{ExplainError, is_of, named, parameter, parse, pod, workload};
use crate::outbound::{dial, known_name};
use crate::proxy::Proxy;

/// Endpoints of a service that are named, at most.
const ENDPOINTS: usize = 20;

/// Explains `?pod=NAMESPACE/NAME&to=HOST:PORT`. A pod that is not in the mesh is explained by any node's proxy.
///
/// # Errors
/// [`ExplainError`].
pub(super) fn explain(proxy: &Proxy, query: &Query) -> Result<Explanation, ExplainError> {
    let asked: Authority = parse("to", parameter(query, "to")?)?;
    let pod = match pod(proxy, query) {
        Ok(pod) => pod,
        Err(error) => return uncaptured(proxy, query, asked).ok_or(error),
    };
    let mut explanation = Explanation::begin();
    let text =
        format!("this node's proxy serves the pod as {}: its connections are captured", pod.identity());
    explanation.passes("capture", text, Vec::new());
    let client = match workload(proxy, &pod) {
        Ok(client) => client,
        Err(reason) => return Ok(explanation.refuses("resolve", reason, Vec::new())),
    };
    explanation.client = Some(Client {
        name: format!("{}/{}", client.namespace, client.name),
        identity: Some(pod.identity().to_string()),
        address: address(&client),
    });
    let snapshot = proxy.directory.snapshot();
    let destination = by_search_path(proxy, &snapshot, &client, asked);
    let (route, dependencies) = dial::preview(proxy, &pod, &client, destination.clone());
    Ok(of_route(&snapshot, &route, &destination, &open(proxy, &dependencies), explanation))
}

/// Where a connection of a pod outside the mesh goes: no proxy has a part in it, and no waypoint.
fn uncaptured(proxy: &Proxy, query: &Query, asked: Authority) -> Option<Explanation> {
    let wanted = query.get("pod")?;
    let snapshot = proxy.directory.snapshot();
    let is_client =
        |workload: &&Arc<Workload>| workload.tunnel == TunnelProtocol::None && is_of(workload, wanted);
    let client = snapshot.workloads().filter(is_client).min_by_key(|client| client.uid.clone())?;
    let mut explanation = Explanation::begin();
    let text = "the pod is not in the mesh: its connections leave as they are, in plain text";
    explanation.warns("capture", text, Vec::new());
    let destination = by_search_path(proxy, &snapshot, client, asked);
    explanation.client = Some(Client {
        name: format!("{}/{}", client.namespace, client.name),
        identity: None,
        address: address(client),
    });
    let question = Question {
        client,
        role: ClientRole::Waypoint,
        source: address(client),
        destination: destination.clone(),
        exclude: &[],
    };
    let route = match resolve(&snapshot, &question, &|_: &WorkloadUid| 0, &mut rand::rng()) {
        // Without a proxy nothing is tunnelled.
        Route::Tunnel(tunnel) | Route::SameNode(tunnel) => Route::Plain(Plain {
            address: tunnel.address,
            workload: Some(tunnel.workload),
            service: tunnel.service,
            waypoint_bypassed: false,
        }),
        route => route,
    };
    Some(of_route(&snapshot, &route, &destination, &[], explanation))
}

fn address(client: &Workload) -> IpAddr {
    client.addresses.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// What was asked for, as the client's namespace and DNS search path complete it.
fn by_search_path(proxy: &Proxy, snapshot: &Snapshot, client: &Workload, asked: Authority) -> Authority {
    match asked {
        Authority::Host { host, port } => {
            let found = known_name(snapshot, &client.namespace, &proxy.settings.cluster_domain, &host);
            Authority::Host { host: found.map_or(host, Into::into), port }
        }
        address @ Authority::Address(_) => address,
    }
}

/// Names that the control plane would be asked for first.
fn open(proxy: &Proxy, dependencies: &Dependencies) -> Vec<String> {
    if proxy.on_demand.is_none() {
        return Vec::new();
    }
    let unknown = dependencies.iter().filter(|dependency| !dependency.is_known);
    unknown.map(|dependency| dependency.demand.to_string()).collect()
}

fn of_route(
    snapshot: &Snapshot,
    route: &Route,
    destination: &Authority,
    unknown: &[String],
    mut explanation: Explanation,
) -> Explanation {
    if !unknown.is_empty() {
        let text = format!("the control plane would be asked for {} first", unknown.join(", "));
        explanation.warns("resolve", text, Vec::new());
    }
    let service = route.service();
    if let Some(service) = service {
        let text = format!("{destination} is service {}", service.host);
        explanation.passes("resolve", text, endpoints(snapshot, service, destination.port()));
    }
    match route {
        Route::Refuse(refusal) => {
            let waypoint = waypoint_of(snapshot, refusal).map(|name| format!("waypoint {name} is missing: "));
            explanation.refuses("resolve", format!("{}{refusal}", waypoint.unwrap_or_default()), Vec::new())
        }
        Route::Unknown(unknown) => outside(unknown.passthrough().is_some(), destination, explanation),
        Route::Waypoint(tunnel) => through_waypoint(tunnel, explanation),
        Route::Tunnel(tunnel) => to_workload(tunnel, "through HBONE", explanation),
        Route::SameNode(tunnel) => to_workload(tunnel, "handed over on this node", explanation),
        Route::Own(plain) => {
            explanation.passes("connect", "the pod dials itself: no policy applies", Vec::new());
            explanation.goes(Next::Outside { address: plain.address.to_string() })
        }
        Route::Plain(plain) => {
            bypassed(plain.waypoint_bypassed, &mut explanation);
            let text = match &plain.workload {
                Some(workload) => {
                    format!("to {} at {}, in plain text, without identity", workload.uid, plain.address)
                }
                None => format!("{} is outside the mesh: in plain text, without identity", plain.address),
            };
            explanation.warns("connect", text, Vec::new());
            explanation.goes(match &plain.workload {
                Some(workload) => Next::Workload {
                    workload: named(workload),
                    address: plain.address,
                    tunnel: false,
                    identity: None,
                },
                None => Next::Outside { address: plain.address.to_string() },
            })
        }
        Route::Lookup(lookup) => {
            bypassed(lookup.waypoint_bypassed, &mut explanation);
            let hostname = &lookup.workload.hostname;
            explanation.passes("connect", format!("DNS is asked for the address of {hostname}"), Vec::new());
            explanation.goes(Next::Outside { address: format!("{hostname}:{}", lookup.port) })
        }
        Route::DoubleHbone(tunnel) => {
            bypassed(tunnel.waypoint_bypassed, &mut explanation);
            let text = format!(
                "network {} is reached through its gateway {}, which must prove {}; who answers inside must prove {}",
                tunnel.workload.network,
                tunnel.hbone,
                identities(&tunnel.expected),
                identities(&tunnel.inner_expected)
            );
            explanation.passes("connect", text, Vec::new());
            explanation.goes(Next::Outside { address: tunnel.hbone.to_string() })
        }
    }
}

fn outside(is_address: bool, destination: &Authority, mut explanation: Explanation) -> Explanation {
    if !is_address {
        let text =
            format!("the mesh knows no service and no workload {destination}; an application would ask DNS");
        return explanation.refuses("resolve", text, Vec::new());
    }
    let text = format!("the mesh knows nothing at {destination}: it is passed through in plain text");
    explanation.warns("resolve", text, Vec::new());
    explanation.goes(Next::Outside { address: destination.to_string() })
}

/// The service of the waypoint whose lack is the reason of a refusal.
fn waypoint_of(snapshot: &Snapshot, refusal: &Refusal) -> Option<String> {
    let (Refusal::WaypointUnknown { waypoint } | Refusal::WaypointUnavailable { waypoint, .. }) = refusal
    else {
        return None;
    };
    match waypoint {
        GatewayDestination::Hostname(host) => Some(host.to_string()),
        GatewayDestination::Address(at) => {
            snapshot.service_at(&at.network, at.address, "").map(|service| service.host.to_string())
        }
    }
}

fn through_waypoint(tunnel: &WaypointTunnel, mut explanation: Explanation) -> Explanation {
    let WaypointTunnel { waypoint, authority, hbone, expected, .. } = tunnel;
    let text = format!(
        "a waypoint is in front: {}/{} at {hbone}, which must prove {}",
        waypoint.namespace,
        waypoint.name,
        identities(expected)
    );
    explanation.passes("waypoint", text, Vec::new());
    explanation.goes(Next::Waypoint { pod: named(waypoint), authority: authority.to_string() })
}

fn to_workload(tunnel: &Tunnel, how: &str, mut explanation: Explanation) -> Explanation {
    bypassed(tunnel.waypoint_bypassed, &mut explanation);
    if !tunnel.waypoint_bypassed {
        explanation.passes("waypoint", "no waypoint is in front", Vec::new());
    }
    let Tunnel { workload, address, expected, .. } = tunnel;
    let text = format!("to {} at {address}, {how}; it must prove {}", workload.uid, identities(expected));
    explanation.passes("connect", text, Vec::new());
    explanation.goes(Next::Workload {
        workload: named(workload),
        address: *address,
        tunnel: true,
        identity: None,
    })
}

fn bypassed(waypoint_bypassed: bool, explanation: &mut Explanation) {
    if waypoint_bypassed {
        let text = "its waypoint is missing, and its owner allows the direct route: ambit.dev/waypoint-failure: open";
        explanation.warns("waypoint", text, Vec::new());
    }
}

/// The endpoints of a service, and why each may be chosen or not.
fn endpoints(snapshot: &Snapshot, service: &Service, port: u16) -> Vec<Considered> {
    let Some(endpoints) = snapshot.endpoints(service.host.as_ref()) else { return Vec::new() };
    let mut all: Vec<Considered> = endpoints
        .iter()
        .map(|endpoint| {
            let Workload { uid, status, serving_while_terminating, .. } = &*endpoint.workload;
            let object = format!("endpoint {uid}");
            match endpoint.target_port(service, port) {
                None => Considered::passed_over(object, format!("it has no port for {port}")),
                Some(_) if *serving_while_terminating => {
                    Considered::passed_over(object, "it terminates: only while nothing else is left")
                }
                Some(_) if !endpoint.workload.is_healthy() => {
                    Considered::passed_over(object, format!("it is not ready: {status:?}"))
                }
                Some(target) => Considered::counts(object, format!("ready, port {target}")),
            }
        })
        .collect();
    all.sort_by(|one, other| one.object.cmp(&other.object));
    let more = all.len().saturating_sub(ENDPOINTS);
    all.truncate(ENDPOINTS);
    if more > 0 {
        all.push(Considered::passed_over("endpoints", format!("{more} more")));
    }
    all
}

fn identities(expected: &Expected) -> String {
    let all: Vec<&str> = expected.iter().map(|identity| identity.as_str()).collect();
    all.join(" or ")
}
