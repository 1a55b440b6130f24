//! Step 4: the rule of a request.

use std::sync::Arc;
use std::time::SystemTime;

use ambit_route::{Backend, ConnectionHead, RequestHead, Rule, StreamMatched};
use http::request::Parts;

use crate::accept::{Destination, Inbound};
use crate::balance::{self, Target};
use crate::client_hello::ClientHello;
use crate::failure::Failure;
use crate::listeners::Listener;
use crate::proxy::Published;
use crate::sanitise::Sane;
use crate::session::Session;

/// The rule that a request follows.
#[derive(Debug, Clone)]
pub struct Routed {
    /// The rule.
    pub rule: Arc<Rule>,
    /// How much of the path matched.
    pub prefix: usize,
    /// The client's session, if the rule keeps clients on their endpoints.
    pub session: Option<Session>,
}

/// Finds the rule; `None` where no route is attached, and the request goes straight to its destination.
///
/// # Errors
/// [`Failure::NoRoute`] where routes are attached and none matches, and where the request came to a gateway, which has no
/// destination of its own; [`Failure::Misdirected`]; [`Failure::InvalidRoute`].
pub fn find(
    published: &Published,
    inbound: &Inbound,
    sane: &Sane,
    parts: &Parts,
) -> Result<Option<Routed>, Failure> {
    let (port, client) = (inbound.destination.port(), inbound.client_namespace());
    let routes = match &inbound.destination {
        Destination::Workload { .. } => return Ok(None),
        Destination::Service { service, .. } => {
            let host = &service.host;
            let routes = published.routes.routes(&host.namespace, &host.hostname, port, client);
            let Some(routes) = routes else { return Ok(None) };
            routes
        }
        Destination::Listener { taken, .. } => {
            let listener = listener(published, inbound, sane).ok_or(Failure::NoRoute)?;
            // Gateway API, GEP-3567: the name that TLS asked for and the request's host lead to the same listener.
            if taken.as_ref().is_some_and(|taken| taken.hostname != listener.hostname) {
                return Err(Failure::Misdirected);
            }
            published.routes.of_listener(&listener.name).ok_or(Failure::NoRoute)?
        }
    };
    let head = RequestHead {
        method: &parts.method,
        host: &sane.host,
        path: parts.uri.path(),
        query: parts.uri.query(),
        headers: &parts.headers,
        scheme: sane.scheme,
        authority: &sane.authority,
        port,
        client_namespace: client,
        client_address: inbound.remote.ip().to_canonical(),
    };
    let matched = routes.find(&head).ok_or(Failure::NoRoute)?;
    if let Some(reason) = &matched.rule.invalid {
        let route = matched.rule.route.to_string();
        return Err(Failure::InvalidRoute { route, reason: reason.to_string() });
    }
    let session = matched.rule.session.as_ref().map(|persistence| {
        let path = (parts.uri.path(), matched.common);
        let keys = published.session_keys.clone();
        Session::read(persistence, keys, &parts.headers, path, sane.scheme, SystemTime::now())
    });
    Ok(Some(Routed { rule: matched.rule.clone(), prefix: matched.prefix, session }))
}

/// The listener of a gateway that a request is for.
pub fn listener<'p>(published: &'p Published, inbound: &Inbound, sane: &Sane) -> Option<&'p Arc<Listener>> {
    match &inbound.destination {
        Destination::Service { .. } | Destination::Workload { .. } => None,
        Destination::Listener { address, .. } => published.listeners.find(address.port(), &sane.host),
    }
}

/// Whether the name that a client's TLS asks for decides where its connection goes, or whether it may.
pub fn needs_client_hello(inbound: &Inbound) -> bool {
    let published = inbound.worker.proxy.published.load();
    if published.policies.needs_server_name(&inbound.destination) {
        return true;
    }
    let Some(service) = inbound.destination.service() else { return false };
    let (host, port) = (&service.host, inbound.destination.port());
    if service.resolves_dynamically {
        return true;
    }
    published.streams.needs_client_hello(&host.namespace, &host.hostname, port)
}

/// Where a connection goes that is passed on unread: by a rule for connections, else straight to its destination.
///
/// # Errors
/// [`Failure::NoRoute`], [`Failure::InvalidRoute`].
pub fn connection(
    published: &Published,
    inbound: &Inbound,
    tls: Option<&ClientHello>,
) -> Result<Target, Failure> {
    let rule = match of_connection(published, inbound, tls) {
        StreamMatched::Rule(rule) => rule,
        StreamMatched::Straight => return balance::split(published, None, inbound),
        StreamMatched::Closed => return Err(Failure::NoRoute),
    };
    if let Some(reason) = &rule.invalid {
        return Err(Failure::InvalidRoute { route: rule.route.to_string(), reason: reason.to_string() });
    }
    balance::split(published, Some(&Routed { rule, prefix: 0, session: None }), inbound)
}

/// Whether new sessions of a client's datagrams may go to a backend still.
pub fn leads_to(published: &Published, inbound: &Inbound, backend: &Backend) -> bool {
    match of_connection(published, inbound, None) {
        StreamMatched::Rule(rule) if rule.invalid.is_none() => rule.backends.iter().any(|other| {
            let name = |it: &Backend| (it.namespace.clone(), it.hostname.clone(), it.port, it.subset.clone());
            other.invalid.is_none() && name(other) == name(backend)
        }),
        StreamMatched::Rule(_) | StreamMatched::Straight | StreamMatched::Closed => false,
    }
}

fn of_connection(published: &Published, inbound: &Inbound, tls: Option<&ClientHello>) -> StreamMatched {
    let head = ConnectionHead {
        port: inbound.destination.port(),
        destination: inbound.destination.address(),
        client_namespace: inbound.client_namespace(),
        client_address: inbound.remote.ip().to_canonical(),
        tls: tls.map(|hello| ambit_route::ClientHello { server_name: hello.server_name.as_deref() }),
    };
    match &inbound.destination {
        Destination::Service { service, .. } => {
            published.streams.find(&service.host.namespace, &service.host.hostname, &head)
        }
        Destination::Workload { .. } => StreamMatched::Straight,
        Destination::Listener { taken: Some(listener), .. } => {
            published.streams.find_of_listener(&listener.name, &head)
        }
        Destination::Listener { taken: None, .. } => StreamMatched::Closed,
    }
}
