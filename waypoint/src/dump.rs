//! How routes and endpoints show in the admin server's `/config_dump`: of routes what they are for, not what they say.

use std::time::Duration;

use ambit_api::l7;
use ambit_route::RouteName;
use serde::Serialize;

use crate::backend_policies::PoolPolicy;
use crate::balancers::circuit::CircuitSummary;
use crate::balancers::host::HostState;
use crate::balancers::{Balancers, Slot};
use crate::proxy::Published;
use crate::upstream::Upstreams;

/// A route as it shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteSummary {
    kind: String,
    namespace: String,
    name: String,
    targets: Vec<TargetSummary>,
    /// Number of rules.
    rules: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct TargetSummary {
    namespace: String,
    hostname: String,
    /// 0: all.
    port: u32,
    /// Hosts of requests that it is for; none: all.
    hostnames: Vec<String>,
    /// Only requests of clients in this namespace; empty: of all.
    client_namespace: String,
}

/// A port of a service, or a subset of it, with its endpoints.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BalancerSummary {
    service: String,
    port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    subset: Option<String>,
    /// The object that says how endpoints are treated.
    #[serde(skip_serializing_if = "Option::is_none")]
    policy: Option<String>,
    algorithm: String,
    /// What is under way, and what was refused.
    circuit: CircuitSummary,
    /// Limits of connections and requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<PoolPolicy>,
    endpoints: Vec<EndpointSummary>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct EndpointSummary {
    workload: String,
    address: String,
    /// How far it is; the nearest have 0.
    level: usize,
    terminating: bool,
    /// Requests in progress.
    active: u32,
    latency_milliseconds: f64,
    /// Share of requests that failed, from 0 to 1.
    failures: f64,
    ejections: u64,
    /// Seconds until it is used again, if it is ejected.
    #[serde(skip_serializing_if = "Option::is_none")]
    ejected_for_seconds: Option<f64>,
}

/// The connections of one worker to an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolSummary {
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<String>,
    address: String,
    protocol: &'static str,
    worker: usize,
    /// Connections without a request that wait for one.
    idle: usize,
    /// Connections that are used.
    used: usize,
    /// Requests in progress.
    requests: usize,
}

/// The connections of a worker as they show; keys without any are left out.
pub fn pools(worker: usize, upstreams: &Upstreams) -> impl Iterator<Item = PoolSummary> + use<> {
    let pools = upstreams.pools().into_iter().map(move |(key, connections)| PoolSummary {
        workload: key.workload.map(|uid| uid.to_string()),
        address: key.address.to_string(),
        protocol: if key.http2 { "HTTP/2" } else { "HTTP/1.1" },
        worker,
        idle: connections.idle,
        used: connections.busy + connections.shared,
        requests: connections.busy + connections.streams,
    });
    pools.filter(|pool| pool.idle + pool.used > 0)
}

/// Endpoints as they show, by service.
pub fn balancers(balancers: &Balancers) -> Vec<BalancerSummary> {
    let mut all: Vec<BalancerSummary> = balancers.all().iter().map(|slot| balancer(slot)).collect();
    all.sort_by(|one, other| {
        (&one.service, one.port, &one.subset).cmp(&(&other.service, other.port, &other.subset))
    });
    all
}

fn balancer(slot: &Slot) -> BalancerSummary {
    let (now, built, key) = (slot.now(), slot.last_built(), slot.key());
    let known = built.hosts().iter().map(|host| {
        let workload = host.endpoint.workload.as_ref();
        EndpointSummary {
            workload: workload.map(|workload| workload.uid.to_string()).unwrap_or_default(),
            address: host.endpoint.address.to_string(),
            level: host.level,
            terminating: host.is_terminating,
            ..endpoint(&host.state, now)
        }
    });
    let mut asked = slot.asked();
    asked.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
    let asked = asked.into_iter().map(|(host, state)| EndpointSummary {
        address: format!("{host}:{}", key.port),
        ..endpoint(&state, now)
    });
    let endpoints = known.chain(asked);
    BalancerSummary {
        service: key.host.to_string(),
        port: key.port,
        subset: key.subset.as_deref().map(str::to_owned),
        policy: built.policy().object.as_deref().map(str::to_owned),
        algorithm: format!("{:?}", built.algorithm()),
        circuit: slot.circuit().summary(),
        limits: Some(built.policy().pool).filter(|pool| *pool != PoolPolicy::default()),
        endpoints: endpoints.collect(),
    }
}

/// What is known of an endpoint, wherever it is.
fn endpoint(state: &HostState, now: Duration) -> EndpointSummary {
    let estimate = state.estimate(now);
    let ejected = state.ejected_until(now);
    EndpointSummary {
        workload: String::new(),
        address: String::new(),
        level: 0,
        terminating: false,
        active: state.active(),
        latency_milliseconds: estimate.mean * 1000.0,
        failures: estimate.errors,
        ejections: state.ejections(),
        ejected_for_seconds: ejected.map(|until| until.saturating_sub(now).as_secs_f64()),
    }
}

/// Every route as it shows, those for requests first.
pub fn routes(published: &Published) -> Vec<RouteSummary> {
    let routes = published.routes.listed().into_iter().map(|it| route(it.route, it.targets, it.rules));
    routes.chain(published.streams_dump.iter().cloned()).collect()
}

/// Routes for connections as they show.
pub fn stream_routes<'a>(streams: impl IntoIterator<Item = &'a l7::StreamRoute>) -> Vec<RouteSummary> {
    let summary = |it: &l7::StreamRoute| {
        let object = it.object.clone().unwrap_or_default();
        let name = RouteName {
            kind: object.kind.into(),
            namespace: object.namespace.into(),
            name: object.name.into(),
        };
        route(&name, &it.targets, it.rules.len())
    };
    streams.into_iter().map(summary).collect()
}

fn route(route: &RouteName, targets: &[l7::Target], rules: usize) -> RouteSummary {
    let target = |target: &l7::Target| TargetSummary {
        namespace: target.namespace.clone(),
        hostname: target.hostname.clone(),
        port: target.port,
        hostnames: target.hostnames.clone(),
        client_namespace: target.client_namespace.clone(),
    };
    RouteSummary {
        kind: route.kind.to_string(),
        namespace: route.namespace.to_string(),
        name: route.name.to_string(),
        targets: targets.iter().map(target).collect(),
        rules,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ambit_route::Table;

    use super::*;

    #[test]
    fn a_route_shows_what_it_is_for() {
        let target =
            l7::Target { namespace: "shop".into(), hostname: "web".into(), port: 80, ..Default::default() };
        let object =
            l7::ObjectName { kind: "HTTPRoute".into(), namespace: "shop".into(), name: "split".into() };
        let route = l7::Route {
            object: Some(object),
            targets: vec![target],
            rules: vec![l7::Rule::default()],
            ..Default::default()
        };
        let published = Published { routes: Arc::new(Table::new([&route])), ..Published::default() };
        let shown = serde_json::to_value(routes(&published)).unwrap();
        assert_eq!((&shown[0]["kind"], &shown[0]["rules"]), (&"HTTPRoute".into(), &1.into()));
        assert_eq!(shown[0]["targets"][0]["port"], 80);
    }
}
