//! Routes for connections whose bytes are passed on unread, by what they are attached to.

mod explain;

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::{l7, security};
use ipnet::IpNet;

use crate::compile;
use crate::conditions::address;
use crate::rule::{RouteName, Rule};

/// What of a connection decides about its rule.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionHead<'a> {
    /// The port of the service that it came to.
    pub port: u16,
    /// The address that was dialled.
    pub destination: IpAddr,
    /// The client's namespace, by its identity; empty if it has none.
    pub client_namespace: &'a str,
    /// The client's address.
    pub client_address: IpAddr,
    /// What its first bytes say, if they are TLS.
    pub tls: Option<ClientHello<'a>>,
}

/// The beginning of TLS.
#[derive(Debug, Clone, Copy)]
pub struct ClientHello<'a> {
    /// The name that it asks for, lower case.
    pub server_name: Option<&'a str>,
}

/// Where a connection goes.
#[derive(Debug, Clone)]
pub enum StreamMatched {
    /// By this rule.
    Rule(Arc<Rule>),
    /// Straight to the service.
    Straight,
    /// Nowhere: routes are attached, and none matches.
    Closed,
}

/// Every route for connections.
#[derive(Debug, Default)]
pub struct StreamTable {
    /// The first that matches counts.
    services: HashMap<(Box<str>, Box<str>), Vec<Entry>>,
    /// Those of the listeners of gateways.
    listeners: HashMap<Box<str>, Vec<Entry>>,
}

#[derive(Debug, Clone)]
struct Entry {
    /// The port of the target; `None`: all.
    port: Option<u16>,
    /// GEP-1426: a consumer's route is for its own namespace.
    consumer: Option<Box<str>>,
    tls_only: bool,
    /// Whether a connection that it is for, and that no rule matches, is closed.
    closes: bool,
    conditions: Conditions,
    rule: Arc<Rule>,
    /// Age and name of the route, then the places of rule and match in it.
    seniority: (i64, Arc<str>, u32, u32),
}

impl StreamTable {
    /// Compiles routes. Their order does not matter.
    pub fn new<'a>(routes: impl IntoIterator<Item = &'a l7::StreamRoute>) -> Self {
        let mut table = Self::default();
        for route in routes {
            let entries = entries(route);
            for target in &route.targets {
                if !target.listener.is_empty() {
                    let listener = table.listeners.entry(target.listener.as_str().into()).or_default();
                    listener.extend(entries.iter().cloned());
                    continue;
                }
                let Ok(port) = u16::try_from(target.port) else { continue };
                let service = (target.namespace.as_str().into(), target.hostname.to_ascii_lowercase().into());
                let client = target.client_namespace.as_str();
                let of_target = entries.iter().map(|entry| Entry {
                    port: (port != 0).then_some(port),
                    consumer: (!client.is_empty()).then(|| client.into()),
                    ..entry.clone()
                });
                table.services.entry(service).or_default().extend(of_target);
            }
        }
        for entries in table.services.values_mut().chain(table.listeners.values_mut()) {
            entries.sort_by_cached_key(Entry::precedence);
        }
        table
    }

    /// Whether a client's first bytes matter for connections to a port of a service.
    pub fn needs_client_hello(&self, namespace: &str, hostname: &str, port: u16) -> bool {
        self.of(namespace, hostname).iter().any(|entry| entry.tls_only && entry.is_for_port(port))
    }

    /// Where a connection to a service goes.
    pub fn find(&self, namespace: &str, hostname: &str, head: &ConnectionHead<'_>) -> StreamMatched {
        first(self.of(namespace, hostname), head)
    }

    /// Where a connection to a listener of a gateway goes; without routes it goes nowhere.
    pub fn find_of_listener(&self, listener: &str, head: &ConnectionHead<'_>) -> StreamMatched {
        match first(self.listeners.get(listener).map_or(&[], Vec::as_slice), head) {
            StreamMatched::Straight => StreamMatched::Closed,
            found => found,
        }
    }

    fn of(&self, namespace: &str, hostname: &str) -> &[Entry] {
        if self.services.is_empty() {
            return &[];
        }
        self.services.get(&(namespace.into(), hostname.into())).map_or(&[], Vec::as_slice)
    }
}

fn first(entries: &[Entry], head: &ConnectionHead<'_>) -> StreamMatched {
    let mut closes = false;
    for entry in entries {
        let is_for_client = entry.consumer.as_deref().is_none_or(|client| client == head.client_namespace);
        if !entry.is_for_port(head.port) || !is_for_client {
            continue;
        }
        closes |= entry.closes;
        if (head.tls.is_some() || !entry.tls_only) && entry.conditions.match_head(head) {
            return StreamMatched::Rule(entry.rule.clone());
        }
    }
    if closes { StreamMatched::Closed } else { StreamMatched::Straight }
}

impl Entry {
    fn is_for_port(&self, port: u16) -> bool {
        self.port.is_none_or(|own| own == port)
    }

    /// Routes of Gateway API come before others, those of consumers before those of producers, TLS before any connection, the
    /// more exact name first; then the older, as with requests.
    fn precedence(&self) -> impl Ord + use<> {
        let name = self.conditions.server_names.first();
        let exact = name.filter(|_| self.closes).map(|name| (!name.starts_with('*'), name.len()));
        (!self.closes, self.consumer.is_none(), !self.tls_only, Reverse(exact), self.seniority.clone())
    }
}

/// One entry for each match of each rule; with the order of Gateway API one for each name.
fn entries(route: &l7::StreamRoute) -> Vec<Entry> {
    let (name, created, order_by) = compile::name_and_age(route.object.as_ref(), route.created);
    let closes = route.order() == l7::Order::Specific;
    let mut entries = Vec::new();
    for (at, source) in (0_u32..).zip(&route.rules) {
        let (conditions, rule) = read(&name, at, source);
        for (place, conditions) in (0_u32..).zip(conditions) {
            for conditions in if closes { conditions.by_name() } else { vec![conditions] } {
                entries.push(Entry {
                    port: None,
                    consumer: None,
                    tls_only: route.layer() == l7::StreamLayer::TlsStream,
                    closes,
                    conditions,
                    rule: rule.clone(),
                    seniority: (created, order_by.clone(), at, place),
                });
            }
        }
    }
    entries
}

fn read(route: &Arc<RouteName>, at: u32, source: &l7::StreamRule) -> (Vec<Conditions>, Arc<Rule>) {
    let everything = [l7::StreamMatch::default()];
    let matches = if source.matches.is_empty() { &everything[..] } else { &source.matches };
    let mut faults = Vec::new();
    let conditions = matches.iter().map(|source| Conditions::read(source, &mut faults)).collect();
    let of_requests = l7::Rule {
        name: source.name.clone(),
        backends: source.backends.clone(),
        invalid: source.invalid.clone(),
        ..l7::Rule::default()
    };
    (conditions, Arc::new(compile::rule(route, at, &of_requests, faults)))
}

/// What of a rule for connections can't be read, if anything.
pub fn stream_fault(rule: &l7::StreamRule) -> Option<String> {
    let nobody = Arc::new(RouteName { kind: "".into(), namespace: "".into(), name: "".into() });
    read(&nobody, 0, rule).1.invalid.as_ref().map(ToString::to_string)
}

/// What a connection must be. What can't be read counts as met; the rule closes its connections then.
#[derive(Debug, Clone, Default)]
struct Conditions {
    port: Option<u16>,
    server_names: Box<[Box<str>]>,
    destinations: Box<[IpNet]>,
    source_namespace: Option<Box<str>>,
    clients: Option<HashSet<IpAddr>>,
}

impl Conditions {
    fn read(source: &l7::StreamMatch, faults: &mut Vec<String>) -> Self {
        let port = u16::try_from(source.port).unwrap_or_else(|_| {
            faults.push(format!("no port: {}", source.port));
            0
        });
        let destinations = source.destination_subnets.iter();
        let destinations = destinations.filter_map(|it| subnet(it).map_err(|fault| faults.push(fault)).ok());
        let destinations = destinations.collect();
        let clients = source.clients.as_ref().map(|clients| {
            let read = clients.addresses.iter().map(|bytes| address(bytes));
            read.filter_map(|address| address.map_err(|fault| faults.push(fault)).ok()).collect()
        });
        let namespace = source.source_namespace.as_str();
        Self {
            port: (port != 0).then_some(port),
            server_names: source.server_names.iter().map(|name| name.to_ascii_lowercase().into()).collect(),
            destinations,
            source_namespace: (!namespace.is_empty()).then(|| namespace.into()),
            clients,
        }
    }

    /// The same for each name by itself.
    fn by_name(self) -> Vec<Self> {
        if self.server_names.len() < 2 {
            return vec![self];
        }
        let of = |name: &str| Self { server_names: Box::new([name.into()]), ..self.clone() };
        self.server_names.iter().map(|name| of(name)).collect()
    }

    fn match_head(&self, head: &ConnectionHead<'_>) -> bool {
        let server_name = head.tls.and_then(|hello| hello.server_name);
        self.port.is_none_or(|port| port == head.port)
            && (self.server_names.is_empty()
                || self.server_names.iter().any(|name| is_named(name, server_name)))
            && (self.destinations.is_empty()
                || self.destinations.iter().any(|net| net.contains(&head.destination)))
            && self.source_namespace.as_ref().is_none_or(|wanted| **wanted == *head.client_namespace)
            && self.clients.as_ref().is_none_or(|clients| clients.contains(&head.client_address))
    }
}

fn is_named(wanted: &str, server_name: Option<&str>) -> bool {
    match (wanted.strip_prefix('*'), server_name) {
        (Some(""), _) => true,
        (Some(suffix), Some(name)) => name.len() > suffix.len() && name.ends_with(suffix),
        (None, Some(name)) => wanted == name,
        (_, None) => false,
    }
}

fn subnet(source: &security::Address) -> Result<IpNet, String> {
    let address = address(&source.address)?;
    let length =
        u8::try_from(source.length).map_err(|_| format!("no length of a network: {}", source.length))?;
    IpNet::new(address, length).map_err(|error| format!("no network: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(order: l7::Order, layer: l7::StreamLayer, matches: Vec<l7::StreamMatch>) -> l7::StreamRoute {
        let rule = |(at, one): (usize, l7::StreamMatch)| l7::StreamRule {
            name: at.to_string(),
            matches: vec![one],
            ..l7::StreamRule::default()
        };
        l7::StreamRoute {
            targets: vec![l7::Target {
                namespace: "n".into(),
                hostname: "h".into(),
                port: 80,
                ..Default::default()
            }],
            rules: matches.into_iter().enumerate().map(rule).collect(),
            order: order.into(),
            layer: layer.into(),
            ..l7::StreamRoute::default()
        }
    }

    fn names(names: &[&str]) -> l7::StreamMatch {
        l7::StreamMatch {
            server_names: names.iter().map(ToString::to_string).collect(),
            ..Default::default()
        }
    }

    fn head(port: u16, server_name: Option<&str>) -> ConnectionHead<'_> {
        ConnectionHead {
            port,
            destination: [10, 96, 0, 1].into(),
            client_namespace: "a",
            client_address: [10, 0, 0, 1].into(),
            tls: server_name
                .map(|name| ClientHello { server_name: Some(name).filter(|name| !name.is_empty()) }),
        }
    }

    fn found(table: &StreamTable, head: &ConnectionHead<'_>) -> String {
        match table.find("n", "h", head) {
            StreamMatched::Rule(rule) => rule.name.to_string(),
            StreamMatched::Straight => "straight".to_owned(),
            StreamMatched::Closed => "closed".to_owned(),
        }
    }

    #[test]
    fn the_most_exact_name_counts_with_the_order_of_gateway_api() {
        let specific = names(&["*.b.c", "a.b.c"]);
        let table = StreamTable::new([&route(
            l7::Order::Specific,
            l7::StreamLayer::TlsStream,
            vec![names(&["*.c"]), specific, names(&["x.b.c"])],
        )]);
        for (name, wanted) in
            [("a.b.c", "1"), ("x.b.c", "2"), ("y.b.c", "1"), ("y.c", "0"), ("c", "closed"), ("", "closed")]
        {
            assert_eq!(found(&table, &head(80, Some(name))), wanted, "{name}");
        }
        assert_eq!(found(&table, &head(80, None)), "closed");
        assert_eq!(found(&table, &head(81, None)), "straight");
        assert!(table.needs_client_hello("n", "h", 80) && !table.needs_client_hello("n", "h", 81));
    }

    #[test]
    fn a_listener_closes_what_none_of_its_routes_matches() {
        let mut passed = route(l7::Order::Specific, l7::StreamLayer::TlsStream, vec![names(&["*.b"])]);
        passed.targets = vec![l7::Target { listener: "n/g/tls".into(), ..Default::default() }];
        let table = StreamTable::new([&passed]);
        let is_sent =
            |listener: &str, name: Option<&str>| match table.find_of_listener(listener, &head(443, name)) {
                StreamMatched::Rule(_) => true,
                StreamMatched::Closed => false,
                StreamMatched::Straight => panic!("a listener has no service of its own"),
            };
        assert!(is_sent("n/g/tls", Some("a.b")));
        assert!(!is_sent("n/g/tls", Some("a.c")) && !is_sent("n/g/tls", None));
        assert!(!is_sent("n/g/other", Some("a.b")));
        assert_eq!(found(&table, &head(443, Some("a.b"))), "straight");
    }

    #[test]
    fn the_first_rule_counts_as_declared() {
        let subnet = security::Address { address: vec![10, 96, 0, 0].into(), length: 16 };
        let other = security::Address { address: vec![10, 97, 0, 0].into(), length: 16 };
        let to = |subnet| l7::StreamMatch { destination_subnets: vec![subnet], ..Default::default() };
        let of =
            |namespace: &str| l7::StreamMatch { source_namespace: namespace.into(), ..Default::default() };
        let (tcp, tls) = (l7::StreamLayer::TcpStream, l7::StreamLayer::TlsStream);
        let both = [
            route(l7::Order::Declared, tcp, vec![to(other), of("b"), to(subnet)]),
            route(l7::Order::Declared, tls, vec![names(&["*.c"]), names(&["a.c"])]),
        ];
        let table = StreamTable::new(&both);
        assert_eq!(found(&table, &head(80, Some("a.c"))), "0");
        assert_eq!(found(&table, &head(80, Some("other"))), "2");
        assert_eq!(found(&table, &head(80, None)), "2");
        assert_eq!(found(&StreamTable::new(&both[1..]), &head(80, Some("other"))), "straight");
    }

    /// Every condition alone, and both orders.
    #[test]
    fn the_first_candidate_without_anything_unmet_is_the_one_that_is_found() {
        let subnet = security::Address { address: vec![10, 97, 0, 0].into(), length: 16 };
        let matches = vec![
            l7::StreamMatch { port: 90, ..Default::default() },
            l7::StreamMatch { destination_subnets: vec![subnet], ..Default::default() },
            l7::StreamMatch { source_namespace: "b".into(), ..Default::default() },
            l7::StreamMatch { clients: Some(l7::Clients::default()), ..Default::default() },
            names(&["*.c", "a.b.c"]),
            l7::StreamMatch::default(),
        ];
        for order in [l7::Order::Declared, l7::Order::Specific] {
            for layer in [l7::StreamLayer::TcpStream, l7::StreamLayer::TlsStream] {
                let table = StreamTable::new([&route(order, layer, matches.clone())]);
                for (port, name) in [(80, None), (80, Some("x.c")), (80, Some("other")), (81, Some("x.c"))] {
                    let candidates = table.candidates("n", "h", &head(port, name));
                    let first = candidates.iter().find(|candidate| candidate.unmet.is_none());
                    let first = first.map(|candidate| candidate.rule.name.to_string());
                    let wanted = Some(found(&table, &head(port, name)));
                    let wanted = wanted.filter(|name| !["straight", "closed"].contains(&name.as_str()));
                    assert_eq!(first, wanted, "{candidates:?}");
                }
            }
        }
    }

    #[test]
    fn what_a_candidate_lacks_is_named() {
        let tls = route(l7::Order::Specific, l7::StreamLayer::TlsStream, vec![names(&["a.b"])]);
        let table = StreamTable::new([&tls]);
        for (port, name, wanted) in [
            (80, None, Some("TLS is wanted, and the client does not begin with it")),
            (80, Some("c.d"), Some("server name: a.b is wanted, not c.d")),
            (80, Some(""), Some("server name: a.b is wanted, not none")),
            (81, Some("a.b"), Some("port 80 is wanted")),
            (80, Some("a.b"), None),
        ] {
            let candidates = table.candidates("n", "h", &head(port, name));
            assert_eq!(candidates[0].unmet.as_deref(), wanted);
        }
    }
}
