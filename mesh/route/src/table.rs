//! All routes, by what they are attached to, in an order in which the first match counts.
//!
//! A look-up costs one hash of the path and one for each of its prefixes by segment, however many routes there are;
//! only patterns are tried one by one.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::l7;
use http::{HeaderMap, Method};

use crate::compile;
use crate::conditions::{Conditions, PathMatch};
use crate::hosts::Hosts;
use crate::rule::Rule;

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
}

type Service = (Box<str>, Box<str>);

/// Every route.
#[derive(Debug, Default)]
pub struct Table {
    services: HashMap<Service, Ports>,
    /// Routes for the clients of one namespace; they come before all others.
    consumers: HashMap<(Box<str>, Service), Ports>,
    /// Routes of the listeners of gateways.
    listeners: HashMap<Box<str>, RouteSet>,
}

/// The routes of one service.
#[derive(Debug, Default)]
struct Ports {
    all: RouteSet,
    /// Ports that routes name, with the routes of all ports too.
    one: HashMap<u16, RouteSet>,
}

impl Table {
    /// Compiles routes. Their order does not matter: of rules that match alike the older route's counts, then the one that
    /// is first by name.
    pub fn new<'a>(routes: impl IntoIterator<Item = &'a l7::Route>) -> Self {
        let mut table = Self::default();
        let compiled: Vec<(Vec<l7::Target>, compile::Compiled)> =
            routes.into_iter().map(|route| (route.targets.clone(), compile::route(route))).collect();
        for (targets, _) in &compiled {
            let of_services = targets.iter().filter(|target| target.listener.is_empty());
            for target in of_services.filter(|target| target.port != 0) {
                if let Ok(port) = u16::try_from(target.port) {
                    table.ports(target).one.entry(port).or_default();
                }
            }
        }
        for (targets, route) in &compiled {
            for target in targets {
                match target.listener.as_str() {
                    "" => table.ports(target).insert(target, route),
                    listener => {
                        table.listeners.entry(listener.into()).or_default().insert(&target.hostnames, route);
                    }
                }
            }
        }
        table.listeners.values_mut().for_each(RouteSet::sort);
        for ports in table.services.values_mut().chain(table.consumers.values_mut()) {
            ports.all.sort();
            ports.one.values_mut().for_each(RouteSet::sort);
        }
        table
    }

    fn ports(&mut self, target: &l7::Target) -> &mut Ports {
        let service = (target.namespace.as_str().into(), target.hostname.to_ascii_lowercase().into());
        match target.client_namespace.as_str() {
            "" => self.services.entry(service).or_default(),
            client => self.consumers.entry((client.into(), service)).or_default(),
        }
    }

    /// The routes for a port of a service, as a client in `client` (empty: unknown) has them; `None` if there are none, and
    /// requests go straight to the service.
    pub fn routes(&self, namespace: &str, hostname: &str, port: u16, client: &str) -> Option<&RouteSet> {
        let service = (Box::from(namespace), Box::from(hostname));
        let all = self.services.get(&service);
        // GEP-1426: a consumer's own routes replace the producer's for its requests.
        let own = match self.consumers.is_empty() || client.is_empty() {
            true => None,
            false => self.consumers.get(&(Box::from(client), service)),
        };
        [own, all].into_iter().flatten().map(|ports| ports.of(port)).find(|routes| !routes.is_empty())
    }
}

impl Table {
    /// The routes of a listener; `None` if there are none.
    pub fn of_listener(&self, listener: &str) -> Option<&RouteSet> {
        self.listeners.get(listener)
    }
}

impl Ports {
    fn of(&self, port: u16) -> &RouteSet {
        self.one.get(&port).unwrap_or(&self.all)
    }

    fn insert(&mut self, target: &l7::Target, route: &compile::Compiled) {
        match u16::try_from(target.port) {
            Ok(0) => {
                self.all.insert(&target.hostnames, route);
                self.one.values_mut().for_each(|port| port.insert(&target.hostnames, route));
            }
            Ok(port) => self.one.entry(port).or_default().insert(&target.hostnames, route),
            // No port at all: no request comes there.
            Err(_) => {}
        }
    }
}

/// The routes for one port of a service.
#[derive(Debug, Default)]
pub struct RouteSet {
    pub(crate) specific: Hosts<Paths>,
    pub(crate) has_specific: bool,
    pub(crate) declared: Hosts<Vec<(PathMatch, Entry)>>,
    has_declared: bool,
}

/// One match of one rule.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) conditions: Conditions,
    pub(crate) rule: Arc<Rule>,
    /// Age and name of the route, then the places of rule and match in it.
    pub(crate) seniority: (i64, Arc<str>, u32, u32),
}

/// Entries by path.
#[derive(Debug, Default)]
pub(crate) struct Paths {
    pub(crate) exact: HashMap<Box<str>, Vec<Entry>>,
    /// Those that are tried one by one.
    pub(crate) patterns: Vec<(PathMatch, Entry)>,
    pub(crate) prefix: HashMap<Box<str>, Vec<Entry>>,
    /// The longest prefix: no longer part of a path needs a look.
    longest: usize,
}

impl Entry {
    fn matches(&self, request: &RequestHead<'_>) -> bool {
        self.conditions.matches(request)
    }

    /// Gateway API, HTTPRouteMatch: after the path a method counts, then the number of headers, then that of query
    /// parameters, then the route's age, its name, and the order of its rules.
    fn precedence(&self) -> impl Ord + use<> {
        let Conditions { method, headers, query, .. } = &self.conditions;
        let specific = (method.is_none(), Reverse(headers.len()), Reverse(query.len()));
        (specific, self.seniority.clone())
    }
}

impl RouteSet {
    fn is_empty(&self) -> bool {
        // Routes without rules are routes: they answer 404.
        !self.has_specific && !self.has_declared
    }

    fn insert(&mut self, hostnames: &[String], route: &compile::Compiled) {
        let hosts: Vec<&str> = match hostnames {
            [] => vec!["*"],
            hosts => hosts.iter().map(String::as_str).collect(),
        };
        for host in hosts {
            match route.order {
                l7::Order::Specific => {
                    self.has_specific = true;
                    let paths = self.specific.entry(host);
                    route.entries.iter().for_each(|(path, entry)| paths.insert(path, entry));
                }
                l7::Order::Declared => {
                    self.has_declared = true;
                    self.declared.entry(host).extend(route.entries.iter().cloned());
                }
            }
        }
    }

    fn sort(&mut self) {
        self.specific.values_mut().for_each(Paths::sort);
        for declared in self.declared.values_mut() {
            declared.sort_by(|(_, one), (_, other)| one.seniority.cmp(&other.seniority));
        }
    }

    /// The rule that a request follows; `None`: no rule matches, and the answer is 404.
    ///
    /// Routes of Gateway API come first. Where there is one, routes that go by declaration have no effect.
    pub fn find(&self, request: &RequestHead<'_>) -> Option<Matched<'_>> {
        if self.has_specific {
            return self.specific.matching(request.host).find_map(|paths| paths.find(request));
        }
        self.declared.matching(request.host).flatten().find_map(|(path, entry)| {
            let prefix = path.matches(request.path)?;
            entry.matches(request).then_some(Matched { rule: &entry.rule, prefix })
        })
    }
}

impl Paths {
    fn insert(&mut self, path: &PathMatch, entry: &Entry) {
        let entry = entry.clone();
        match path {
            PathMatch::Exact(path) => self.exact.entry(path.clone()).or_default().push(entry),
            PathMatch::Regex(_)
            | PathMatch::TextPrefix(_)
            | PathMatch::ExactIgnoringCase(_)
            | PathMatch::TextPrefixIgnoringCase(_) => self.patterns.push((path.clone(), entry)),
            PathMatch::Prefix(prefix) => {
                self.longest = self.longest.max(prefix.len());
                self.prefix.entry(prefix.clone()).or_default().push(entry);
            }
        }
    }

    fn sort(&mut self) {
        for entries in self.exact.values_mut().chain(self.prefix.values_mut()) {
            entries.sort_by_cached_key(Entry::precedence);
        }
        self.patterns.sort_by_cached_key(|(path, entry)| (Reverse(path.length()), entry.precedence()));
    }

    fn find(&self, request: &RequestHead<'_>) -> Option<Matched<'_>> {
        let path = request.path;
        let first = |entries: &'_ Vec<Entry>, prefix: usize| {
            let at = entries.iter().position(|entry| entry.matches(request))?;
            Some((at, prefix))
        };
        // Gateway API: an exact path comes before all others. Patterns are left to the implementation: they come next.
        if let Some(entries) = self.exact.get(path)
            && let Some((at, prefix)) = first(entries, path.len())
        {
            return entries.get(at).map(|entry| Matched { rule: &entry.rule, prefix });
        }
        let by_pattern = self.patterns.iter().find_map(|(pattern, entry)| {
            let prefix = pattern.matches(path)?;
            entry.matches(request).then_some(Matched { rule: &entry.rule, prefix })
        });
        if by_pattern.is_some() {
            return by_pattern;
        }
        if self.prefix.is_empty() {
            return None;
        }
        segments(path).skip_while(|prefix| prefix.len() > self.longest).find_map(|prefix| {
            let entries = self.prefix.get(prefix)?;
            let (at, prefix) = first(entries, prefix.len())?;
            entries.get(at).map(|entry| Matched { rule: &entry.rule, prefix })
        })
    }
}

/// The prefixes of a path that end with a segment, the longest first, without the slash at their end; last the empty one.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    let whole = std::iter::once(path);
    whole.chain(path.rmatch_indices('/').filter_map(move |(at, _)| path.get(..at)))
}
