//! What the conditions of TrafficPolicies say of a flow, as far as a flow shows what they ask for.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ambit_flows::{Flow, Kind, ServiceName};
use ambit_identity::SpiffeId;
use ambit_traffic::{Condition, DestinationFacts, Facts, RequestFacts, SourceFacts, TrafficPolicy};
use http::HeaderMap;

use super::world::{TrafficAtWaypoint, World};

/// The verdict of all TrafficPolicies that are for a flow.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Why one of them denies it.
    pub(super) denial: Option<String>,
    /// What could not be judged, one sentence each.
    pub(super) left_out: BTreeSet<String>,
}

/// Judges a flow to a service that is bound to the waypoint `gateway`, `NAMESPACE/NAME`.
pub(super) fn judge(
    world: &World,
    flow: &Flow,
    service: &ServiceName,
    gateway: Option<&str>,
    identity: Option<&SpiffeId>,
) -> Verdict {
    let headers = HeaderMap::new();
    let host = flow.example_host.rsplit_once(':').map_or(&*flow.example_host, |(host, _)| host);
    let host = host.to_ascii_lowercase();
    let request = RequestFacts {
        method: &flow.method,
        path: &flow.example_path,
        query: None,
        host: &host,
        scheme: "http",
        headers: &headers,
        principal: None,
        claims: None,
    };
    let facts = Facts {
        request: (flow.kind == Kind::Request).then_some(request),
        source: SourceFacts {
            identity: identity.map(SpiffeId::as_str),
            namespace: identity.map(SpiffeId::namespace),
            address: None,
            peer_address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        },
        destination: DestinationFacts { host: &service.host, namespace: &service.namespace, port: flow.port },
    };
    let mut verdict = Verdict::default();
    for it in world.traffic() {
        if is_for(it, service, flow.port, gateway) {
            verdict.add(&it.policy, &facts);
        } else if it.routes.contains(&*service.namespace) {
            let name = it.policy.name();
            verdict
                .left_out
                .insert(format!("TrafficPolicy {name} is for routes, which are not among what is observed"));
        }
    }
    verdict
}

fn is_for(policy: &TrafficAtWaypoint, service: &ServiceName, port: u16, gateway: Option<&str>) -> bool {
    let is_target = |(namespace, host, own): &(String, String, u32)| {
        **namespace == *service.namespace
            && host.eq_ignore_ascii_case(&service.host)
            && [0, u32::from(port)].contains(own)
    };
    policy.targets.iter().any(is_target)
        || gateway.is_some_and(|gateway| policy.gateways.iter().any(|own| own == gateway))
}

impl Verdict {
    fn add(&mut self, policy: &TrafficPolicy, facts: &Facts<'_>) {
        let name = policy.name();
        if let Some(reason) = policy.closed_reason() {
            self.deny(format!("denied by TrafficPolicy {name}: it can't be enforced: {reason}"));
        }
        for Condition { name: condition, expression } in policy.conditions() {
            let unseen = unseen(&expression.variables());
            if !unseen.is_empty() {
                self.left_out.insert(format!(
                    "condition {condition} of TrafficPolicy {name} looks at {}, which is not among what is observed",
                    Vec::from_iter(unseen).join(", ")
                ));
                continue;
            }
            match expression.holds(facts) {
                Ok(true) => {}
                Ok(false) => {
                    self.deny(format!("denied by TrafficPolicy {name}: condition {condition} does not hold"));
                }
                Err(error) => {
                    self.deny(format!("denied by TrafficPolicy {name}: condition {condition}: {error}"));
                }
            }
        }
        if !policy.limits().is_empty() {
            self.left_out.insert(format!("rate limits of TrafficPolicy {name}"));
        }
    }

    /// The first reason counts, as at a waypoint.
    fn deny(&mut self, reason: String) {
        self.denial.get_or_insert(reason);
    }
}

/// What variables stand for that flows do not show.
fn unseen(variables: &BTreeSet<&'static str>) -> BTreeSet<&'static str> {
    let of_variable = |variable: &&'static str| match *variable {
        "request.headers" => Some("headers"),
        "request.query" => Some("the query"),
        "request.scheme" => Some("the scheme"),
        "request.auth.principal" | "request.auth.claims" => Some("tokens"),
        "source.address" => Some("addresses"),
        _ => None,
    };
    variables.iter().filter_map(of_variable).collect()
}
