//! All routes, by what they are attached to, in an order in which the first match counts.
//!
//! A look-up costs one hash of the path and one for each of its prefixes by segment, however many routes there are;
//! only patterns are tried one by one. A change of a route compiles that route alone: a copy of a table shares all that the
//! change does not concern.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::l7;
use http::{HeaderMap, Method};

use crate::compile::{self, Compiled};
use crate::route_set::RouteSet;
use crate::rule::{RouteName, Rule};

/// What of a request decides about its rule.
#[derive(Debug, Clone, Copy)]
pub struct RequestHead<'a> {
    /// The method.
    pub method: &'a Method,
    /// The host without its port, lower case.
    pub host: &'a str,
    /// The normalised path.
    pub path: &'a str,
    /// The query, if there is one.
    pub query: Option<&'a str>,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// The authority as the client wrote it.
    pub authority: &'a str,
    /// The port of the service that it came to.
    pub port: u16,
    /// The client's namespace, by its identity; empty if it has none.
    pub client_namespace: &'a str,
    /// The client's address.
    pub client_address: IpAddr,
}

/// The rule of a request.
#[derive(Debug, Clone, Copy)]
pub struct Matched<'a> {
    /// The rule.
    pub rule: &'a Arc<Rule>,
    /// Length of the prefix of the path that matched, without a slash at its end; the whole path unless it was a prefix.
    pub prefix: usize,
    /// How much of the path all paths share that match in this way, by whole segments.
    pub common: usize,
}

/// Something for each service, by namespace and host.
type Services<T> = HashMap<Arc<str>, HashMap<Arc<str>, T>>;

/// Every route. A copy is cheap.
#[derive(Debug, Clone, Default)]
pub struct Table {
    services: Services<Arc<Ports>>,
    /// Routes for the clients of one namespace, by that; they come before all others.
    consumers: HashMap<Arc<str>, Services<Arc<Ports>>>,
    /// Routes of the listeners of gateways.
    listeners: HashMap<Arc<str>, Arc<RouteSet>>,
    /// Every route by the name of its resource.
    routes: HashMap<Arc<str>, Arc<Compiled>>,
}

/// A route of a table, for people.
#[derive(Debug, Clone, Copy)]
pub struct Listed<'a> {
    /// The object.
    pub route: &'a RouteName,
    /// What it is attached to.
    pub targets: &'a [l7::Target],
    /// Number of rules.
    pub rules: usize,
}

/// The routes of one service.
#[derive(Debug, Clone, Default)]
struct Ports {
    all: RouteSet,
    /// Ports that routes name, with the routes of all ports too.
    one: HashMap<u16, Port>,
}

#[derive(Debug, Clone)]
struct Port {
    routes: RouteSet,
    /// Targets that name the port.
    targets: usize,
}

impl Table {
    /// Compiles routes. Their order does not matter: of rules that match alike the older route's counts, then the one that
    /// is first by name.
    pub fn new<'a>(routes: impl IntoIterator<Item = &'a l7::Route>) -> Self {
        let mut table = Self::default();
        for (at, route) in routes.into_iter().enumerate() {
            table.insert(&at.to_string(), route);
        }
        table
    }

    /// Puts a route into the table, in place of the one that had the name of its resource before.
    pub fn insert(&mut self, name: &str, route: &l7::Route) {
        self.remove(name);
        let compiled = Arc::new(compile::route(route));
        for target in &compiled.targets {
            self.attach(target, &compiled);
        }
        self.routes.insert(name.into(), compiled);
    }

    /// Takes the route with this name of its resource out of the table, if it is there.
    pub fn remove(&mut self, name: &str) {
        let Some(compiled) = self.routes.remove(name) else { return };
        for target in &compiled.targets {
            self.detach(target, &compiled);
        }
    }

    /// Every route, in the order of their objects.
    pub fn listed(&self) -> Vec<Listed<'_>> {
        let routes = self.routes.values();
        let listed = routes.map(|it| Listed { route: &it.name, targets: &it.targets, rules: it.rules });
        let mut listed: Vec<_> = listed.collect();
        listed.sort_by(|one, other| one.route.cmp(other.route));
        listed
    }

    fn attach(&mut self, target: &l7::Target, route: &Compiled) {
        if !target.listener.is_empty() {
            let routes = self.listeners.entry(target.listener.as_str().into()).or_default();
            Arc::make_mut(routes).insert(&target.hostnames, route);
            return;
        }
        let services = match target.client_namespace.as_str() {
            "" => &mut self.services,
            client => self.consumers.entry(client.into()).or_default(),
        };
        let of_namespace = services.entry(target.namespace.as_str().into()).or_default();
        let ports = of_namespace.entry(target.hostname.to_ascii_lowercase().into()).or_default();
        Arc::make_mut(ports).insert(target, route);
    }

    fn detach(&mut self, target: &l7::Target, route: &Compiled) {
        if !target.listener.is_empty() {
            change(
                &mut self.listeners,
                &target.listener,
                |routes| routes.is_empty(),
                |routes| {
                    Arc::make_mut(routes).remove(&target.hostnames, route);
                },
            );
            return;
        }
        let of_services = |services: &mut Services<Arc<Ports>>| {
            change(services, &target.namespace, HashMap::is_empty, |of_namespace| {
                let host = target.hostname.to_ascii_lowercase();
                change(
                    of_namespace,
                    &host,
                    |ports| ports.is_empty(),
                    |ports| {
                        Arc::make_mut(ports).remove(target, route);
                    },
                );
            });
        };
        match target.client_namespace.as_str() {
            "" => of_services(&mut self.services),
            client => change(&mut self.consumers, client, HashMap::is_empty, of_services),
        }
    }

    /// The routes for a port of a service, as a client in `client` (empty: unknown) has them; `None` if there are none, and
    /// requests go straight to the service.
    pub fn routes(&self, namespace: &str, hostname: &str, port: u16, client: &str) -> Option<&RouteSet> {
        // GEP-1426: a consumer's own routes replace the producer's for its requests.
        let own = self.consumers.get(client).filter(|_| !client.is_empty());
        let own = own.and_then(|services| services.get(namespace)?.get(hostname));
        let all = self.services.get(namespace).and_then(|hosts| hosts.get(hostname));
        [own, all].into_iter().flatten().map(|ports| ports.of(port)).find(|routes| !routes.is_empty())
    }

    /// The routes of a listener; `None` if there are none.
    pub fn of_listener(&self, listener: &str) -> Option<&RouteSet> {
        self.listeners.get(listener).map(AsRef::as_ref)
    }
}

/// Changes what a map has for `key`, and forgets it when it is empty.
fn change<T>(
    map: &mut HashMap<Arc<str>, T>,
    key: &str,
    is_empty: impl FnOnce(&T) -> bool,
    change: impl FnOnce(&mut T),
) {
    let Some(value) = map.get_mut(key) else { return };
    change(value);
    if is_empty(value) {
        map.remove(key);
    }
}

impl Ports {
    fn of(&self, port: u16) -> &RouteSet {
        self.one.get(&port).map_or(&self.all, |port| &port.routes)
    }

    fn is_empty(&self) -> bool {
        self.all.is_empty() && self.one.is_empty()
    }

    fn insert(&mut self, target: &l7::Target, route: &Compiled) {
        match u16::try_from(target.port) {
            Ok(0) => {
                self.all.insert(&target.hostnames, route);
                self.one.values_mut().for_each(|port| port.routes.insert(&target.hostnames, route));
            }
            Ok(port) => {
                let of_all = || Port { routes: self.all.clone(), targets: 0 };
                let port = self.one.entry(port).or_insert_with(of_all);
                port.targets += 1;
                port.routes.insert(&target.hostnames, route);
            }
            // No port at all: no request comes there.
            Err(_) => {}
        }
    }

    fn remove(&mut self, target: &l7::Target, route: &Compiled) {
        match u16::try_from(target.port) {
            Ok(0) => {
                self.all.remove(&target.hostnames, route);
                self.one.values_mut().for_each(|port| port.routes.remove(&target.hostnames, route));
            }
            Ok(number) => {
                let Some(port) = self.one.get_mut(&number) else { return };
                port.targets -= 1;
                if port.targets == 0 {
                    self.one.remove(&number);
                } else {
                    port.routes.remove(&target.hostnames, route);
                }
            }
            Err(_) => {}
        }
    }
}
