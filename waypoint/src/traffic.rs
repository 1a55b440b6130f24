//! TrafficPolicies of what is bound here: conditions, which belong to step 5, and rate limits, which belong to step 6.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ambit_api::l7;
use ambit_directory::{AppProtocol, NamespacedHost};
use ambit_policy::Token;
use ambit_route::{RouteName, Rule};
use ambit_traffic::{
    Denial, DestinationFacts, Facts, RefusalReason, RequestFacts, RouteId, SourceFacts, TrafficPolicy,
};

use crate::accept::{Destination, Inbound};
use crate::authorize::Head;
use crate::failure::Failure;
use crate::proxy::Published;
use crate::sanitise::Sane;

/// A policy at one of its targets. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Applied {
    /// The policy.
    pub policy: Arc<TrafficPolicy>,
    /// The number of the target: each has buckets of its own.
    pub target: u32,
}

/// TrafficPolicies by what they are for. Immutable; built anew when one changes.
#[derive(Debug, Default)]
pub struct TrafficPolicies {
    /// For everything that is reached through this waypoint or gateway.
    everywhere: Vec<Applied>,
    /// By service; port 0: all of them.
    services: HashMap<NamespacedHost, Vec<(u32, Applied)>>,
    /// By listener of the gateway.
    listeners: HashMap<Box<str>, Vec<Applied>>,
    /// By route; an empty name of a rule: all of them.
    routes: HashMap<RouteName, Vec<(Box<str>, Applied)>>,
}

impl TrafficPolicies {
    /// Adds a policy for what `source` says that it is for.
    pub fn add(
        &mut self,
        source: &l7::Policy,
        traffic: &l7::Traffic,
        policy: &Arc<TrafficPolicy>,
        is_own: &impl Fn(&str) -> bool,
    ) {
        let mut number = 0;
        let mut applied = || {
            number += 1;
            Applied { policy: policy.clone(), target: number }
        };
        for gateway in &source.gateways {
            let applied = applied();
            if is_own(gateway) {
                self.everywhere.push(applied);
            }
        }
        for target in &source.targets {
            let applied = applied();
            if !target.listener.is_empty() {
                self.listeners.entry(target.listener.as_str().into()).or_default().push(applied);
                continue;
            }
            let hostname = target.hostname.to_ascii_lowercase().into();
            let service = NamespacedHost { namespace: target.namespace.as_str().into(), hostname };
            self.services.entry(service).or_default().push((target.port, applied));
        }
        for route in &traffic.routes {
            let name = RouteName {
                kind: route.kind.as_str().into(),
                namespace: route.namespace.as_str().into(),
                name: route.name.as_str().into(),
            };
            self.routes.entry(name).or_default().push((route.rule.as_str().into(), applied()));
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        let Self { everywhere, services, listeners, routes } = self;
        [everywhere.is_empty(), services.is_empty(), listeners.is_empty(), routes.is_empty()]
            .iter()
            .all(|it| *it)
    }

    /// The policies for what goes to a destination, by a listener of a gateway and by a rule of a route.
    pub fn applying<'a>(
        &'a self,
        destination: &Destination,
        listener: Option<&str>,
        rule: Option<&'a Rule>,
    ) -> impl Iterator<Item = &'a Applied> {
        let port = u32::from(destination.port());
        let of_service = destination.service().and_then(|service| self.services.get(&service.host));
        let of_service = of_service.into_iter().flatten();
        let of_service =
            of_service.filter(move |(own, _)| [0, port].contains(own)).map(|(_, applied)| applied);
        let of_listener = listener.and_then(|listener| self.listeners.get(listener)).into_iter().flatten();
        let of_route = rule.and_then(|rule| Some((rule, self.routes.get(&*rule.route)?)));
        let of_route = of_route.into_iter().flat_map(|(rule, all)| {
            let is_its = move |(own, _): &&(Box<str>, Applied)| own.is_empty() || **own == *rule.name;
            all.iter().filter(is_its).map(|(_, applied)| applied)
        });
        self.everywhere.iter().chain(of_listener).chain(of_service).chain(of_route)
    }
}

/// Counts of requests that TrafficPolicies refused.
#[derive(Debug, Default)]
pub struct Refusals {
    /// Over a rate limit.
    pub rate_limited: AtomicU64,
    /// A rate limit had no room for another client.
    pub table_full: AtomicU64,
    /// A condition does not hold.
    pub condition: AtomicU64,
    /// A policy or an expression could not be evaluated.
    pub failed: AtomicU64,
}

impl Refusals {
    /// Counts a denial.
    fn count(&self, denial: &Denial) {
        let count = if denial.failed { &self.failed } else { &self.condition };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// A request as TrafficPolicies are asked about it.
#[derive(Clone, Copy)]
pub struct RequestView<'a> {
    /// Its form.
    pub sane: &'a Sane,
    /// Method, path, query and headers.
    pub head: Head<'a>,
    /// Its token.
    pub token: Option<&'a Token>,
    /// The rule that it follows.
    pub rule: Option<&'a Rule>,
}

/// What policies see of a request, or of a connection that is passed on unread.
pub fn facts<'a>(
    source: SourceFacts<'a>,
    destination: &'a Destination,
    asked: Option<RequestView<'a>>,
) -> Facts<'a> {
    let request = asked.map(|RequestView { sane, head, token, .. }| RequestFacts {
        method: head.method.as_str(),
        path: head.path,
        query: head.query,
        host: &sane.host,
        scheme: sane.scheme,
        headers: head.headers,
        principal: token.and_then(Token::principal),
        claims: token.map(Token::claims),
    });
    let (host, namespace): (&str, &str) = match destination {
        Destination::Service { service, .. } => (&service.host.hostname, &service.host.namespace),
        Destination::Workload { workload, .. } => ("", &workload.namespace),
        Destination::Listener { .. } => ("", ""),
    };
    Facts { request, source, destination: DestinationFacts { host, namespace, port: destination.port() } }
}

fn of_inbound<'a>(inbound: &'a Inbound, asked: Option<RequestView<'a>>) -> Facts<'a> {
    let peer_address = inbound.source.ip();
    let address = match &asked {
        Some(asked) => asked.sane.remote,
        None => Some(inbound.remote.ip()),
    };
    let identity = inbound.identity();
    let source = SourceFacts {
        identity: identity.map(|identity| identity.as_str()),
        namespace: identity.map(|identity| identity.namespace()),
        address,
        peer_address,
    };
    facts(source, &inbound.destination, asked)
}

/// The listener of the gateway that takes a request or connection.
pub fn listener<'a>(
    published: &'a Published,
    destination: &'a Destination,
    host: Option<&str>,
) -> Option<&'a str> {
    match destination {
        Destination::Listener { taken: Some(taken), .. } => Some(&taken.name),
        Destination::Listener { taken: None, .. } => {
            published.listeners.find(destination.port(), host?).map(|listener| &*listener.name)
        }
        Destination::Service { .. } | Destination::Workload { .. } => None,
    }
}

/// Checks that the conditions hold for a request; `None` for bytes that are passed on unread. Of such a connection expressions see no
/// request; where a rate limit applies and nothing is declared, what is passed on may be requests that were not recognised, so it is
/// denied.
///
/// # Errors
/// [`Failure::Denied`].
pub fn check(
    published: &Published,
    inbound: &Inbound,
    asked: Option<RequestView<'_>>,
) -> Result<(), Failure> {
    let traffic = published.policies.traffic();
    if traffic.is_empty() {
        return Ok(());
    }
    let facts = of_inbound(inbound, asked);
    let listener = listener(published, &inbound.destination, asked.map(|asked| &*asked.sane.host));
    let is_undeclared = asked.is_none() && inbound.destination.protocol() == AppProtocol::Unknown;
    let rule = asked.and_then(|asked| asked.rule);
    for Applied { policy, .. } in traffic.applying(&inbound.destination, listener, rule) {
        if is_undeclared && !policy.limits().is_empty() {
            let name = policy.name();
            return Err(Failure::Denied(format!(
                "rate limits of TrafficPolicy {name} apply, and what was sent is not HTTP"
            )));
        }
        policy.check(&facts).map_err(|denial| denied(inbound, &denial))?;
    }
    Ok(())
}

/// Takes a token of each rate limit that concerns a request.
///
/// # Errors
/// [`Failure::RateLimited`]; [`Failure::Denied`] where it can't be said whether a limit concerns the request.
pub fn limit(published: &Published, inbound: &Inbound, asked: RequestView<'_>) -> Result<(), Failure> {
    let traffic = published.policies.traffic();
    if traffic.is_empty() {
        return Ok(());
    }
    let facts = of_inbound(inbound, Some(asked));
    let listener = listener(published, &inbound.destination, Some(&asked.sane.host));
    let route = asked.rule.map(route_id);
    let now = now();
    for Applied { policy, target } in traffic.applying(&inbound.destination, listener, asked.rule) {
        for limit in policy.limits() {
            if !policy.concerns(limit, &facts).map_err(|denial| denied(inbound, &denial))? {
                continue;
            }
            let taken = limit.take(&facts, route.as_ref(), *target, now);
            if let Err(refusal) = policy.granted(limit, taken) {
                let refusals = &inbound.worker.proxy.tallies.traffic;
                let count = match refusal.reason {
                    RefusalReason::TooMany => &refusals.rate_limited,
                    RefusalReason::Full => &refusals.table_full,
                };
                count.fetch_add(1, Ordering::Relaxed);
                return Err(Failure::RateLimited(Box::new(refusal)));
            }
        }
    }
    Ok(())
}

fn denied(inbound: &Inbound, denial: &Denial) -> Failure {
    inbound.worker.proxy.tallies.traffic.count(denial);
    Failure::Denied(denial.to_string())
}

/// A rule as rate limits distinguish it.
pub fn route_id(rule: &Rule) -> RouteId<'_> {
    let RouteName { kind, namespace, name } = &*rule.route;
    RouteId { kind, namespace, name, rule: rule.index }
}

/// Nanoseconds since the first request that a rate limit was asked about.
pub fn now() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
