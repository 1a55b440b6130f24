//! Which backend and endpoint a request or connection would get that is explained.

use ambit_explain::{Considered, Explanation, Next};
use ambit_route::Backend;

use super::{answered, failed, named};
use crate::accept::Destination;
use crate::balance;
use crate::balancers::balancer::Host;
use crate::failure::Failure;
use crate::matching::Routed;
use crate::proxy::{Proxy, Published};

/// Where no route is attached.
pub(super) fn straight_on(
    proxy: &Proxy,
    published: &Published,
    destination: &Destination,
    explanation: Explanation,
) -> Explanation {
    match straight(proxy, published, destination) {
        Ok((considered, next)) => endpoints(explanation, considered, next),
        Err(failure) => failed(explanation, "balance", &failure),
    }
}

/// By the rule of a route, or where the client's session is.
pub(super) fn split(
    proxy: &Proxy,
    published: &Published,
    routed: &Routed,
    mut explanation: Explanation,
) -> Explanation {
    let rule = &*routed.rule;
    if let Some(target) = balance::of_session(proxy, published, routed) {
        return of_session(proxy, &target, explanation);
    }
    if let Some(session) = &routed.session {
        let (text, is_lost) = match session.token {
            None => ("the request has no token of a session: its answer will have one", false),
            Some(_) => ("the client's session was at a backend without endpoints: a new one begins", true),
        };
        match is_lost {
            true => explanation.warns("session", text, Vec::new()),
            false => explanation.passes("session", text, Vec::new()),
        }
    }
    let total = rule.backends.total();
    let weighted = rule.backends.weighted();
    let shares: Vec<Considered> =
        weighted.map(|(weight, backend)| share(proxy, published, weight, total, backend)).collect();
    let Some(first) = rule.backends.iter().next() else {
        let reason = "no backend gets requests".to_owned();
        let failure = Failure::InvalidRoute { route: rule.route.to_string(), reason };
        return failed(explanation, "split", &failure);
    };
    let faulty = rule.backends.iter().any(|backend| balance::of_backend(proxy, published, backend).is_err());
    let text =
        format!("{} of {} backends can take it", shares.iter().filter(|it| it.counts).count(), shares.len());
    match faulty {
        true => explanation.warns("split", text, shares),
        false => explanation.passes("split", text, shares),
    }
    let usable = rule.backends.iter().find_map(|backend| balance::of_backend(proxy, published, backend).ok());
    let Some(target) = usable else {
        let reason = balance::of_backend(proxy, published, first).err().unwrap_or_default();
        let failure = Failure::InvalidRoute { route: rule.route.to_string(), reason };
        return failed(explanation, "split", &failure);
    };
    match hosts(proxy, &target) {
        Ok((considered, next)) => endpoints(explanation, considered, next),
        Err(failure) => failed(explanation, "balance", &failure),
    }
}

/// Where the client's session is at a backend that has endpoints.
fn of_session(proxy: &Proxy, target: &balance::Target, mut explanation: Explanation) -> Explanation {
    let (Some(id), Some(balanced)) = (target.session, &target.balanced) else { return explanation };
    explanation.passes(
        "split",
        format!("the client's session is at {}, whatever the weights are", target.authority),
        Vec::new(),
    );
    let balancer = match balanced.current(proxy) {
        Ok(balancer) => balancer,
        Err(failure) => return failed(explanation, "balance", &failure),
    };
    let now = balanced.now();
    let its = balancer.hosts().iter().find(|host| host.endpoint.session_id() == Some(id));
    let lost = match its {
        None => Some("it is gone".to_owned()),
        Some(host) if host.is_terminating => Some(format!("{} terminates", endpoint_name(&host.endpoint))),
        Some(host) if host.state.is_ejected(now) => {
            Some(format!("{} is ejected for its failures", endpoint_name(&host.endpoint)))
        }
        Some(_) => None,
    };
    match (its, lost) {
        (Some(host), None) => {
            let (name, next) = (endpoint_name(&host.endpoint), of_endpoint(proxy, &host.endpoint));
            let others = balancer.hosts().iter().filter(|other| !std::ptr::eq(*other, host));
            let passed = |other: &Host| {
                Considered::passed_over(endpoint_name(&other.endpoint), "the client's session is not there")
            };
            let chosen = Considered::counts(name.clone(), "the client's session is there");
            let considered = std::iter::once(chosen).chain(others.map(passed)).collect();
            explanation.passes("balance", format!("the session's token names {name}"), considered);
            explanation.goes(next)
        }
        (_, lost) => {
            let why = lost.unwrap_or_default();
            let text =
                format!("the session's endpoint can't be used, {why}: another one answers with a new token");
            explanation.warns("session", text, Vec::new());
            match hosts(proxy, target) {
                Ok((considered, next)) => endpoints(explanation, considered, next),
                Err(failure) => failed(explanation, "balance", &failure),
            }
        }
    }
}

fn endpoint_name(endpoint: &balance::Endpoint) -> String {
    let uid = endpoint.workload.as_ref().map(|workload| workload.uid.to_string());
    format!("endpoint {} ({})", uid.unwrap_or_default(), endpoint.address)
}

fn share(proxy: &Proxy, published: &Published, weight: u64, total: u64, backend: &Backend) -> Considered {
    let subset = backend.subset.as_deref().map(|subset| format!(", subset {subset}")).unwrap_or_default();
    let object = format!("{}:{}{subset}", backend.hostname, backend.port);
    let part = format!("{weight} of {total}");
    match balance::of_backend(proxy, published, backend) {
        Ok(_) => Considered::counts(object, part),
        Err(reason) => Considered::passed_over(object, format!("{part}, answered with 500: {reason}")),
    }
}

type Hosts = (Vec<Considered>, Option<Next>);

/// The endpoints of a destination without routes.
fn straight(proxy: &Proxy, published: &Published, destination: &Destination) -> Result<Hosts, Failure> {
    match destination {
        Destination::Workload { workload, address } => {
            let next = Next::Workload {
                workload: named(&workload.uid, &workload.namespace, &workload.name, &workload.node),
                address: *address,
                tunnel: true,
                identity: Some(proxy.identity.to_string()),
            };
            Ok((Vec::new(), Some(next)))
        }
        // A gateway sends on what a route sends, and nothing else.
        Destination::Listener { .. } => Err(Failure::NoRoute),
        Destination::Service { service, port, .. } => {
            let target = balance::of_service(proxy, published, service, *port)?;
            hosts(proxy, &target)
        }
    }
}

/// The endpoints of a target, and the first that may get the request now.
fn hosts(proxy: &Proxy, target: &balance::Target) -> Result<Hosts, Failure> {
    let Some(balanced) = &target.balanced else { return Ok((Vec::new(), None)) };
    let balancer = balanced.current(proxy)?;
    let now = balanced.now();
    let some_ready = balancer.hosts().iter().any(|host| !host.is_terminating && !host.state.is_ejected(now));
    let mut next = None;
    let mut all: Vec<_> = balancer.hosts().iter().collect();
    all.sort_by_key(|host| (host.is_terminating, host.level, host.endpoint.address));
    let considered = all.into_iter().map(|host| {
        let object = endpoint_name(&host.endpoint);
        if host.is_terminating && some_ready {
            return Considered::passed_over(object, "it terminates: only while nothing else is left");
        }
        if host.state.is_ejected(now) && some_ready {
            return Considered::passed_over(object, "it is ejected for its failures");
        }
        next.get_or_insert_with(|| of_endpoint(proxy, &host.endpoint));
        let level = if host.level > 0 { format!(", {} levels away", host.level) } else { String::new() };
        Considered::counts(object, format!("{} requests in progress{level}", host.state.active()))
    });
    let considered = considered.collect();
    Ok((considered, next))
}

fn of_endpoint(proxy: &Proxy, endpoint: &balance::Endpoint) -> Next {
    match &endpoint.workload {
        Some(workload) => Next::Workload {
            workload: named(&workload.uid, &workload.namespace, &workload.name, &workload.node),
            address: endpoint.address,
            tunnel: endpoint.tunnel.is_some(),
            identity: endpoint.tunnel.is_some().then(|| proxy.identity.to_string()),
        },
        None => Next::Outside { address: endpoint.address.to_string() },
    }
}

fn endpoints(mut explanation: Explanation, considered: Vec<Considered>, next: Option<Next>) -> Explanation {
    match next {
        Some(next) => {
            let usable = considered.iter().filter(|it| it.counts).count();
            explanation.passes("balance", format!("{usable} endpoints may get it"), considered);
            explanation.goes(next)
        }
        None => {
            let failure = Failure::NoEndpoint("none is known, or none is ready".to_owned());
            explanation.refuses("balance", failure.to_string(), considered).goes(answered(&failure))
        }
    }
}
