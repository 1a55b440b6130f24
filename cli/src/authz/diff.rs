//! Which flows given policies would decide differently. Pure: flows and two worlds in, differences out.
//!
//! Decisions are those of the proxies' policy engine: of the directory for connections to workloads, of the policies of a service and its
//! waypoint for what a waypoint sees. Of requests with paths that vary one example is decided.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ambit_api::l7::HttpMatch;
use ambit_api::l7::attribute_match::Attribute;
use ambit_api::{HTTP_MATCH_TYPE_URL, l7, security};
use ambit_directory::{GatewayDestination, HostRef, Snapshot, Workload};
use ambit_flows::{Flow, Kind, ServiceName};
use ambit_identity::SpiffeId;
use ambit_policy::{Content, Decision, HttpRequest, Peer, Request, evaluate_http};
use http::HeaderMap;
use prost::Message;
use serde::Serialize;

use super::observed::Observed;
use super::suggest::namespace_of;
use super::traffic;
use super::world::{AtWaypoint, World, name_of};
use crate::output::{Palette, aligned};

/// What would be different.
#[derive(Debug, Default, Serialize)]
pub(super) struct Differences {
    /// Flows that were decided about.
    compared: usize,
    /// Those that would be denied and are not now.
    denied: Vec<Difference>,
    /// Those that would be allowed and are denied now.
    allowed: Vec<Difference>,
    /// Those that would be denied as they are now.
    still_denied: usize,
    /// What could not be judged, or is missing.
    notes: BTreeSet<String>,
}

/// A flow that would be decided differently.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Difference {
    /// Who asks.
    source: String,
    /// What is asked for.
    target: String,
    /// How often it was seen.
    count: u64,
    /// The decision now.
    now: String,
    /// The decision with the given policies.
    then: String,
}

/// Compares what two worlds decide about each flow to a namespace, or to all.
pub(super) fn diff(
    observed: &Observed,
    before: &World,
    after: &World,
    namespace: Option<&str>,
) -> Differences {
    let mut found = Differences { notes: observed.gaps.iter().cloned().collect(), ..Differences::default() };
    let wanted = |flow: &&Flow| {
        flow.kind != Kind::Outbound && namespace.is_none_or(|namespace| *namespace_of(flow) == *namespace)
    };
    for flow in observed.flows.iter().filter(wanted) {
        let decisions = Judge::new(before, flow).and_then(|now| Ok((now, Judge::new(after, flow)?)));
        let (now, then) = match decisions {
            Ok((now, then)) => (now, then),
            Err(reason) => {
                found.notes.insert(format!("not judged: {}: {reason}", target(flow)));
                continue;
            }
        };
        found.compared += 1;
        for condition in &then.unseen {
            found.notes.insert(format!(
                "{condition}, which is not among what is observed: judged as if there were none"
            ));
        }
        found.notes.extend(then.left_out.iter().map(|what| format!("left out: {what}")));
        let difference = || Difference {
            source: source(flow),
            target: target(flow),
            count: flow.allowed + flow.denied,
            now: now.to_string(),
            then: then.to_string(),
        };
        match (now.allowed(), then.allowed()) {
            (true, false) => found.denied.push(difference()),
            (false, true) => found.allowed.push(difference()),
            (false, false) => found.still_denied += 1,
            (true, true) => {}
        }
    }
    found.denied.sort();
    found.allowed.sort();
    found
}

/// A decision about a flow.
struct Judge {
    decision: Decision,
    /// Why a TrafficPolicy denies what the decision allows.
    denial: Option<String>,
    /// Policies that look at what flows do not have.
    unseen: BTreeSet<String>,
    /// Parts of TrafficPolicies about which nothing can be said.
    left_out: BTreeSet<String>,
}

impl fmt::Display for Judge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.denial {
            Some(denial) if self.decision.allowed() => f.write_str(denial),
            _ => self.decision.fmt(f),
        }
    }
}

impl Judge {
    fn new(world: &World, flow: &Flow) -> Result<Judge, String> {
        let snapshot = world.snapshot();
        let identity: Option<SpiffeId> = match &*flow.source.identity {
            "" => None,
            text => Some(text.parse().map_err(|error| format!("its identity: {error}"))?),
        };
        match flow.kind {
            Kind::Inbound | Kind::Outbound => Self::at_node(world, &snapshot, flow, identity.as_ref()),
            Kind::Request | Kind::WaypointConnection => {
                Self::at_waypoint(world, &snapshot, flow, identity.as_ref())
            }
        }
    }

    fn at_node(
        world: &World,
        snapshot: &Snapshot,
        flow: &Flow,
        identity: Option<&SpiffeId>,
    ) -> Result<Judge, String> {
        let is_it = |workload: &&std::sync::Arc<Workload>| {
            let name = name_of(workload);
            *name.namespace == *flow.destination.namespace && *name.name == *flow.destination.workload
        };
        let workload = snapshot.workloads().find(is_it).ok_or("the workload is gone")?;
        let address = workload.addresses.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let destination = SocketAddr::new(address, flow.port);
        let verdict = snapshot.authorize(workload, identity, IpAddr::V4(Ipv4Addr::UNSPECIFIED), destination);
        let applying = snapshot.policies().applying(&workload.namespace, &workload.policies);
        let sources = applying.filter_map(|policy| world.source(policy.name().as_str()));
        Ok(Judge {
            decision: verdict.decision,
            denial: None,
            unseen: sources.filter_map(unseen_at_node).collect(),
            left_out: BTreeSet::new(),
        })
    }

    fn at_waypoint(
        world: &World,
        snapshot: &Snapshot,
        flow: &Flow,
        identity: Option<&SpiffeId>,
    ) -> Result<Judge, String> {
        let service = flow.service.as_ref().ok_or("it names no service")?;
        let gateway = gateway_of(snapshot, service);
        let applying: Vec<&AtWaypoint> =
            world.at_waypoints().iter().filter(|it| applies(it, gateway.as_deref(), service)).collect();
        let headers = HeaderMap::new();
        let host = flow.example_host.rsplit_once(':').map_or(&*flow.example_host, |(host, _)| host);
        let http = HttpRequest {
            authority: &flow.example_host,
            host: &host.to_ascii_lowercase(),
            method: &flow.method,
            path: &flow.example_path,
            headers: &headers,
            remote_ip: None,
            server_name: None,
            token: None,
        };
        let request = Request {
            peer: identity.map(|id| Peer {
                principal: id.principal(),
                namespace: id.namespace(),
                service_account: id.service_account(),
            }),
            source_ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            destination_ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            destination_port: flow.port,
        };
        let content = match flow.kind == Kind::Request {
            true => Content::Request(&http),
            false => Content::Unread,
        };
        let (external, own): (Vec<_>, Vec<_>) = applying.into_iter().partition(|it| it.is_external);
        let mut unseen: BTreeSet<String> = own.iter().filter_map(|it| unseen_in(&it.source)).collect();
        unseen.extend(external.iter().map(|it| {
            format!(
                "AuthorizationPolicy {}/{} asks an external authorizer",
                it.source.namespace, it.source.name
            )
        }));
        let verdict = evaluate_http(own.iter().map(|it| &it.policy), &request, content);
        let traffic = traffic::judge(world, flow, service, gateway.as_deref(), identity);
        Ok(Judge { decision: verdict.decision, denial: traffic.denial, unseen, left_out: traffic.left_out })
    }

    fn allowed(&self) -> bool {
        self.decision.allowed() && self.denial.is_none()
    }
}

/// Whether a waypoint's policy is for a service: by name, or because it is for the waypoint that the service is bound to.
fn applies(policy: &AtWaypoint, gateway: Option<&str>, service: &ServiceName) -> bool {
    let is_target = |(namespace, host): &(String, String)| {
        **namespace == *service.namespace && host.eq_ignore_ascii_case(&service.host)
    };
    policy.targets.iter().any(is_target)
        || gateway.is_some_and(|gateway| policy.gateways.iter().any(|own| own == gateway))
}

/// The waypoint that a service is bound to, `NAMESPACE/NAME`.
fn gateway_of(snapshot: &Snapshot, service: &ServiceName) -> Option<String> {
    let bound = snapshot.service(HostRef { namespace: &service.namespace, hostname: &service.host })?;
    match &bound.waypoint.as_ref()?.destination {
        GatewayDestination::Hostname(host) => {
            let name = host.hostname.split('.').next().unwrap_or_default();
            Some(format!("{}/{name}", host.namespace))
        }
        GatewayDestination::Address(address) => {
            let service = snapshot.service_at(&address.network, address.address, "")?;
            Some(format!("{}/{}", service.host.namespace, service.name))
        }
    }
}

/// What a policy of node proxies looks at that flows do not have. Attributes of requests are none of its business.
fn unseen_at_node(policy: &security::Authorization) -> Option<String> {
    let matches = policy.rules.iter().flat_map(|rule| &rule.clauses).flat_map(|clause| &clause.matches);
    let has_addresses = |it: &security::Match| {
        !it.source_ips.is_empty()
            || !it.not_source_ips.is_empty()
            || !it.destination_ips.is_empty()
            || !it.not_destination_ips.is_empty()
    };
    named(policy, matches.filter(|it| has_addresses(it)).map(|_| "addresses").collect())
}

/// The same for a policy of waypoints.
fn unseen_in(policy: &security::Authorization) -> Option<String> {
    let matches = policy.rules.iter().flat_map(|rule| &rule.clauses).flat_map(|clause| &clause.matches);
    let mut unseen = BTreeSet::new();
    for it in matches {
        if [&it.source_ips, &it.not_source_ips, &it.destination_ips, &it.not_destination_ips]
            .iter()
            .any(|addresses| !addresses.is_empty())
        {
            unseen.insert("addresses");
        }
        let configs = it.extensions.iter().filter_map(|extension| extension.config.as_ref());
        for config in configs.filter(|config| config.type_url == HTTP_MATCH_TYPE_URL) {
            let Ok(http) = HttpMatch::decode(config.value.as_slice()) else { continue };
            unseen.extend(http.attributes.iter().filter_map(|it| unseen_attribute(it.attribute.as_ref()?)));
            if !http.remote_ips.is_empty() || !http.not_remote_ips.is_empty() {
                unseen.insert("addresses");
            }
        }
    }
    named(policy, unseen)
}

fn unseen_attribute(attribute: &Attribute) -> Option<&'static str> {
    match attribute {
        Attribute::Header(_) => Some("headers"),
        Attribute::Claim(_) => Some("tokens"),
        Attribute::Named(name) => match l7::RequestAttribute::try_from(*name) {
            Ok(l7::RequestAttribute::Host | l7::RequestAttribute::Method) => None,
            Ok(l7::RequestAttribute::ServerName) => Some("server names"),
            _ => Some("tokens"),
        },
    }
}

fn named(policy: &security::Authorization, unseen: BTreeSet<&'static str>) -> Option<String> {
    if unseen.is_empty() {
        return None;
    }
    let what: Vec<&str> = unseen.into_iter().collect();
    Some(format!("AuthorizationPolicy {}/{} looks at {}", policy.namespace, policy.name, what.join(", ")))
}

fn source(flow: &Flow) -> String {
    let ambit_flows::Side { namespace, workload, identity } = &flow.source;
    match (&**namespace, &**workload, &**identity) {
        ("", _, "") => "unknown client in plain text".to_owned(),
        ("", _, identity) => identity.to_owned(),
        (namespace, workload, "") => format!("{namespace}/{workload} in plain text"),
        (namespace, workload, _) => format!("{namespace}/{workload}"),
    }
}

fn target(flow: &Flow) -> String {
    let place = match (&flow.kind, &flow.service) {
        (Kind::Request | Kind::WaypointConnection, Some(service)) => service.host.to_string(),
        _ => format!("{}/{}", flow.destination.namespace, flow.destination.workload),
    };
    match flow.kind {
        Kind::Request => format!("{} {place}:{}{}", flow.method, flow.port, flow.path),
        Kind::Inbound | Kind::Outbound | Kind::WaypointConnection => format!("{place}:{}", flow.port),
    }
}

impl Differences {
    /// Whether something that is allowed now would be denied.
    pub(super) fn denies_what_was_allowed(&self) -> bool {
        !self.denied.is_empty()
    }

    /// For people.
    pub(super) fn render(&self, paint: Palette) -> String {
        let Self { compared, denied, allowed, still_denied, notes } = self;
        let mut text = format!(
            "{compared} flows: {} would be denied, {} would be allowed, {still_denied} are denied either way\n",
            denied.len(),
            allowed.len()
        );
        for (title, rows) in [
            (paint.red("would be denied, and is allowed now"), denied),
            (paint.green("would be allowed, and is denied now"), allowed),
        ] {
            if rows.is_empty() {
                continue;
            }
            let _ = writeln!(text, "\n{title}");
            let cells: Vec<[String; 4]> = rows
                .iter()
                .map(|row| {
                    [row.source.clone(), row.target.clone(), format!("{}×", row.count), row.then.clone()]
                })
                .collect();
            for line in aligned(&cells) {
                let _ = writeln!(text, "  {line}");
            }
        }
        if !notes.is_empty() {
            let _ = writeln!(text, "\n{}", paint.yellow("to keep in mind"));
            for note in notes {
                let _ = writeln!(text, "  {note}");
            }
        }
        text
    }
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
