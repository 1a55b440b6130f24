//! VirtualServices as resources: which services they are for, what their rules refer to, and what their authors should know.
//!
//! Of several for one service one counts: that which names the host itself before one with a wildcard, the longer wildcard
//! before the shorter, one of the service's namespace before others, then the older. Routes of Gateway API come before all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::l7;
use prost::Message;

use super::gateways::object_name;
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, hosts, l4, paths, views};
use crate::object::{
    Destination, Kind, Labels, NamespacedName, ObjectRef, ReadRule, ReadTcp, Referents, Route, RouteProtocol,
    ServiceEntry, VirtualService, Visibility, WaypointBinding, joined,
};

/// Whether it is for services of waypoints, and counts.
const ACCEPTED: &str = "WaypointAccepted";
/// Whether all that its rules refer to is there, and all rules can be followed.
const RESOLVED: &str = "ambit.dev/ResolvedRefs";
/// Whether every field has an effect.
pub(super) const HONOURED: &str = "ambit.dev/FieldsHonoured";

/// The resource of a VirtualService that counts for something.
pub(in crate::index) fn of_virtual_service(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(virtual_service) = reader.store.virtual_services.get(id) else { return Vec::new() };
    for field in &virtual_service.without_effect {
        reader.find(Finding::new(HONOURED, false, "NoEffect", field.clone()));
    }
    if virtual_service.hosts.is_empty() {
        let message = "its rules count where another VirtualService delegates to it".to_owned();
        reader.find(Finding::new(ACCEPTED, true, "Delegate", message));
        return Vec::new();
    }
    if !virtual_service.for_mesh {
        let message = "`gateways` does not name `mesh`: it is not for clients in the mesh".to_owned();
        reader.find(Finding::new(ACCEPTED, false, "NotForMesh", message));
        return Vec::new();
    }
    let mut faults = Vec::new();
    let resources: Vec<(ResourceType, Resource)> = Part::ALL
        .into_iter()
        .filter_map(|part| resource(reader, virtual_service, part, &mut faults))
        .collect();
    if !resources.is_empty() {
        report_faults(reader, faults);
    }
    resources
}

/// The rules of a VirtualService that are decided about together.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Http,
    Tcp,
    Tls,
}

impl Part {
    const ALL: [Part; 3] = [Part::Http, Part::Tcp, Part::Tls];

    fn name(self) -> &'static str {
        match self {
            Part::Http => "http",
            Part::Tcp => "tcp",
            Part::Tls => "tls",
        }
    }

    /// Whether its rules have no effect beside routes of Gateway API for this protocol.
    fn comes_after(self, protocol: RouteProtocol) -> bool {
        match self {
            Part::Http => matches!(protocol, RouteProtocol::Http | RouteProtocol::Grpc),
            Part::Tcp => protocol == RouteProtocol::Tcp,
            Part::Tls => matches!(protocol, RouteProtocol::Tcp | RouteProtocol::Tls),
        }
    }

    fn is_in(self, virtual_service: &VirtualService) -> bool {
        match self {
            Part::Http => !virtual_service.http.is_empty(),
            Part::Tcp => !virtual_service.tcp.is_empty(),
            Part::Tls => !virtual_service.tls.is_empty(),
        }
    }
}

/// The resource of a part of a VirtualService that counts for something. What of its rules can't be followed goes to `faults`.
fn resource(
    reader: &Reader<'_>,
    virtual_service: &VirtualService,
    part: Part,
    faults: &mut Vec<String>,
) -> Option<(ResourceType, Resource)> {
    if !part.is_in(virtual_service) {
        return None;
    }
    let id = &virtual_service.meta.id;
    let attached = attach(reader, virtual_service, part);
    attached.report(reader);
    if attached.targets.is_empty() {
        return None;
    }
    let object = Some(object_name(Kind::VirtualService, id));
    let created = virtual_service.meta.created.unwrap_or_default();
    let targets = attached.targets.into_values().collect();
    let of_streams = |read: &[ReadTcp], layer: l7::StreamLayer, targets, faults: &mut Vec<String>| {
        let rules = stream_rules(reader, virtual_service, read, &attached.ports);
        let of_rules = rules.iter().map(|(at, rule)| (*at, &rule.invalid, &rule.backends));
        faults.extend(faults_of(part, of_rules, []));
        l7::StreamRoute {
            object: object.clone(),
            created,
            targets,
            rules: rules.into_iter().map(|(_, rule)| rule).collect(),
            order: l7::Order::Declared.into(),
            layer: layer.into(),
        }
    };
    let (kind, suffix, body) = match part {
        Part::Http => {
            let rules = rules(reader, virtual_service, &attached.ports);
            let mirrors = rules.iter().flat_map(|(at, rule)| mirrors(rule).map(|backend| (*at, backend)));
            let of_rules = rules.iter().map(|(at, rule)| (*at, &rule.invalid, &rule.backends));
            faults.extend(faults_of(part, of_rules, mirrors));
            report_paths(reader, &rules);
            let message = l7::Route {
                object,
                created,
                targets,
                rules: rules.into_iter().map(|(_, rule)| rule).collect(),
                order: l7::Order::Declared.into(),
                protocol: l7::Protocol::Http.into(),
            };
            (ResourceType::Route, "", message.encode_to_vec())
        }
        Part::Tcp => {
            let message = of_streams(&virtual_service.tcp, l7::StreamLayer::TcpStream, targets, faults);
            (ResourceType::StreamRoute, "/tcp", message.encode_to_vec())
        }
        Part::Tls => {
            let message = of_streams(&virtual_service.tls, l7::StreamLayer::TlsStream, targets, faults);
            (ResourceType::StreamRoute, "/tls", message.encode_to_vec())
        }
    };
    let resource = Resource {
        name: format!("{}/{id}{suffix}", Kind::VirtualService).into(),
        aliases: Vec::new(),
        parents: attached.roots.into_iter().collect(),
        body: body.into(),
        unhealthy: false,
    };
    Some((kind, resource))
}

/// Names paths that no request has. A rule for several ports is there for each of them.
fn report_paths(reader: &Reader<'_>, rules: &[(usize, l7::Rule)]) {
    let faults = rules.iter().flat_map(|(at, rule)| paths::faults(rule).map(move |fault| (*at, fault)));
    for (at, fault) in faults.collect::<BTreeSet<_>>() {
        reader.find(Finding::new(HONOURED, false, "NeverMatches", format!("http[{at}].match: {fault}")));
    }
}

/// The roots of the waypoints whose requests the VirtualServices that send requests to a host decide about.
pub(in crate::index) fn roots_to(
    reader: &Reader<'_>,
    host: &Arc<str>,
    owner: &Arc<str>,
    visibility: Visibility,
) -> BTreeSet<Arc<str>> {
    let mut roots = BTreeSet::new();
    for from in reader.virtual_services_to(host) {
        if !is_visible(visibility, owner, &from.meta.id.namespace) {
            continue;
        }
        let of = |from: &VirtualService| {
            Part::ALL.into_iter().flat_map(|part| attach(reader, from, part).roots).collect::<Vec<_>>()
        };
        if from.hosts.is_empty() {
            roots.extend(reader.delegators(&from.meta.id).flat_map(of));
        } else {
            roots.extend(of(from));
        }
    }
    roots
}

/// What a VirtualService is for.
#[derive(Default)]
struct Attached {
    /// By namespace and host.
    targets: BTreeMap<(Arc<str>, Arc<str>), l7::Target>,
    /// The waypoints of the targets.
    roots: BTreeSet<Arc<str>>,
    /// The ports of the targets.
    ports: BTreeSet<u16>,
    /// Why it is not for a host.
    faults: Vec<Fault>,
}

/// A word and a sentence.
type Fault = (&'static str, String);

impl Attached {
    fn report(&self, reader: &Reader<'_>) {
        for (reason, message) in &self.faults {
            reader.find(Finding::new(ACCEPTED, false, reason, message.clone()));
        }
        if self.faults.is_empty() {
            reader.find(Finding::new(ACCEPTED, true, "Accepted", "it counts for its hosts".to_owned()));
        }
    }
}

fn attach(reader: &Reader<'_>, virtual_service: &VirtualService, part: Part) -> Attached {
    let mut attached = Attached::default();
    if !virtual_service.for_mesh || !part.is_in(virtual_service) {
        return attached;
    }
    let mut passed_over = false;
    for host in &virtual_service.hosts {
        if **host == *"*" {
            let message = "host * is for gateways only".to_owned();
            attached.faults.push(("HostNotSupported", message));
            continue;
        }
        let services = services_of(reader, virtual_service, host);
        if services.is_empty() {
            attached.faults.push(("NoMatchingHost", format!("no Service or ServiceEntry has host {host}")));
        }
        for service in services {
            match attached.add(reader, virtual_service, part, &service) {
                // Others are more exact, or have no waypoint: a wildcard is for what is left.
                Err(_) if host.starts_with('*') => passed_over = true,
                Err(fault) => attached.faults.push(fault),
                Ok(()) => {}
            }
        }
    }
    if passed_over && attached.targets.is_empty() {
        let message =
            "no Service that its wildcards cover has a waypoint and no VirtualService of its own".to_owned();
        attached.faults.push(("NoMatchingHost", message));
    }
    attached
}

/// Something with a host: a Service, or one host of a ServiceEntry.
struct Offered {
    object: ObjectRef,
    host: Arc<str>,
}

/// What has a host as a VirtualService names it.
fn services_of(reader: &Reader<'_>, virtual_service: &VirtualService, host: &Arc<str>) -> Vec<Offered> {
    if let Some(suffix) = host.strip_prefix('*') {
        let all = reader.offered_hosts().into_iter();
        let all = all.flat_map(|(object, hosts)| {
            hosts.into_iter().map(move |host| Offered { object: object.clone(), host })
        });
        return all.filter(|offered| offered.host.ends_with(suffix)).collect();
    }
    let namespace = &virtual_service.meta.id.namespace;
    let mut found = Vec::new();
    for host in hosts::candidates(reader.settings, host, namespace) {
        let service = reader.settings.service_of_host(&host);
        if let Some(name) = service.filter(|name| reader.service(name).is_some()) {
            let host = reader.settings.host_of_service(&name).into();
            return vec![Offered { object: ObjectRef { kind: Kind::Service, name }, host }];
        }
        found.extend(reader.entries_of_host(&host).map(|entry| {
            let object = ObjectRef { kind: Kind::ServiceEntry, name: entry.meta.id.clone() };
            Offered { object, host: host.clone() }
        }));
    }
    found
}

impl Attached {
    fn add(
        &mut self,
        reader: &Reader<'_>,
        virtual_service: &VirtualService,
        part: Part,
        Offered { object, host }: &Offered,
    ) -> Result<(), Fault> {
        let Some((binding, ports)) = details(reader, object) else { return Ok(()) };
        let gateways = views::gateways_of(reader, &object.name.namespace, binding);
        if gateways.is_empty() {
            return Err(("NoWaypoint", format!("{object} is bound to no waypoint")));
        }
        let sees = |other: &VirtualService| {
            gateways.iter().filter(|gateway| other.export.includes(&gateway.namespace)).count()
        };
        if sees(virtual_service) == 0 {
            let message = format!("`exportTo` leaves out the namespace of the waypoint of {object}");
            return Err(("NotExported", message));
        }
        let first =
            governing(reader, &object.name.namespace, host, |other| part.is_in(other) && sees(other) > 0);
        if let Some(first) = first.filter(|first| first.meta.id != virtual_service.meta.id) {
            let message =
                format!("VirtualService {} is for host {host} too and counts instead", first.meta.id);
            return Err(("Conflicted", message));
        }
        let before = |route: &&Route| {
            route.meta.id.namespace == object.name.namespace && part.comes_after(route.protocol)
        };
        if let Some(route) = reader.routes_of(object).find(before) {
            let message =
                format!("{} {} is attached to {object} and counts instead", route.kind(), route.meta.id);
            self.faults.push(("Conflicted", message));
        }
        let shown = gateways.iter().filter(|gateway| virtual_service.export.includes(&gateway.namespace));
        self.roots.extend(shown.map(|gateway| views::root(gateway)));
        self.ports.extend(ports);
        let target = l7::Target {
            namespace: object.name.namespace.to_string(),
            hostname: host.to_string(),
            ..l7::Target::default()
        };
        self.targets.insert((object.name.namespace.clone(), host.clone()), target);
        Ok(())
    }
}

/// How something with hosts is bound to waypoints, and its ports.
fn details<'a>(reader: &Reader<'a>, object: &ObjectRef) -> Option<(&'a WaypointBinding, Vec<u16>)> {
    match object.kind {
        Kind::ServiceEntry => {
            let entry = reader.service_entry(&object.name)?;
            Some((&entry.waypoint, entry.ports.iter().map(|port| port.number).collect()))
        }
        _ => {
            let service = reader.service(&object.name)?;
            Some((&service.waypoint, service.ports.iter().map(|port| port.number).collect()))
        }
    }
}

/// The VirtualService that counts for a host, of those that `counts` is true for.
fn governing<'a>(
    reader: &Reader<'a>,
    namespace: &Arc<str>,
    host: &Arc<str>,
    counts: impl Fn(&VirtualService) -> bool,
) -> Option<&'a VirtualService> {
    std::iter::once(host.clone()).chain(hosts::wildcards(host).filter(|name| **name != *"*")).find_map(
        |name| {
            let all = reader.virtual_services_for(&name);
            let all = all.filter(|other| counts(other));
            all.min_by_key(|other| (other.meta.id.namespace != *namespace, other.meta.seniority()))
        },
    )
}

/// The rules in order, each with its number in the manifest.
fn rules(
    reader: &Reader<'_>,
    virtual_service: &VirtualService,
    ports: &BTreeSet<u16>,
) -> Vec<(usize, l7::Rule)> {
    let own = &virtual_service.meta.id.namespace;
    let mut rules = Vec::new();
    for (at, read) in virtual_service.http.iter().enumerate() {
        if !read.rule.is_for_mesh() {
            continue;
        }
        let Some(id) = read.rule.delegate(own).filter(|_| read.fault.is_none()) else {
            rules.extend(lowered(reader, own, read, ports).into_iter().map(|rule| (at, rule)));
            continue;
        };
        let delegated = match delegate(reader, own, &id) {
            Ok(delegate) => joined(&read.rule, &delegate.http),
            Err(fault) => vec![ReadRule { rule: read.rule.clone(), fault: Some(fault) }],
        };
        let for_mesh = delegated.iter().filter(|read| read.rule.is_for_mesh());
        for rule in for_mesh.flat_map(|read| lowered(reader, &id.namespace, read, ports)) {
            rules.push((at, rule));
        }
    }
    rules
}

/// The delegate of a VirtualService in `own`.
fn delegate<'a>(
    reader: &Reader<'a>,
    own: &Arc<str>,
    id: &NamespacedName,
) -> Result<&'a VirtualService, String> {
    let delegate = reader.virtual_service(id).ok_or_else(|| format!("delegate {id} does not exist"))?;
    if !delegate.hosts.is_empty() {
        return Err(format!("VirtualService {id} has hosts, so it can't be a delegate"));
    }
    if !delegate.export.includes(own) {
        return Err(format!("delegate {id} is not exported to {own}"));
    }
    Ok(delegate)
}

/// What a rule comes to. One with a destination of several ports, none of which it names, is one for each port of the
/// service that it is for: requests keep their port.
fn lowered(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    read: &ReadRule,
    ports: &BTreeSet<u16>,
) -> Vec<l7::Rule> {
    let lower = |port: u16| {
        let mut rule = read.rule.lower(port, &Lowering { reader, namespace, port });
        if let Some(fault) = &read.fault {
            rule.invalid.clone_from(fault);
        }
        rule
    };
    let lowering = Lowering { reader, namespace, port: 0 };
    if read.fault.is_some() || !read.rule.destinations().any(|to| lowering.keeps_port(to)) {
        return vec![lower(0)];
    }
    ports.iter().filter(|port| read.rule.is_for_port(**port)).map(|port| lower(*port)).collect()
}

/// The rules for connections in order, each with its number in the manifest.
fn stream_rules(
    reader: &Reader<'_>,
    virtual_service: &VirtualService,
    read: &[ReadTcp],
    ports: &BTreeSet<u16>,
) -> Vec<(usize, l7::StreamRule)> {
    let namespace = &virtual_service.meta.id.namespace;
    let mut rules = Vec::new();
    for (at, read) in read.iter().enumerate() {
        let all = Lowering { reader, namespace, port: 0 };
        let each = read.fault.is_none() && read.rule.destinations().any(|to| all.keeps_port(to));
        let ports = if each { ports.iter().copied().collect() } else { vec![0] };
        for port in ports.into_iter().filter(|port| read.rule.is_for_port(*port)) {
            let mut rule = read.rule.lower(port, &Lowering { reader, namespace, port });
            if let Some(fault) = &read.fault {
                rule.invalid.clone_from(fault);
            }
            rules.push((at, rule));
        }
    }
    rules
}

/// Where copies of a rule's requests go.
fn mirrors(rule: &l7::Rule) -> impl Iterator<Item = &l7::Backend> {
    rule.filters.iter().filter_map(|filter| match &filter.kind {
        Some(l7::filter::Kind::Mirror(mirror)) => mirror.backend.as_ref(),
        _ => None,
    })
}

/// What of the rules can't be followed: each rule with its number, fault and backends, and what else is sent to.
fn faults_of<'a>(
    part: Part,
    rules: impl IntoIterator<Item = (usize, &'a String, &'a Vec<l7::Backend>)>,
    others: impl IntoIterator<Item = (usize, &'a l7::Backend)>,
) -> Vec<String> {
    let of_rules = rules.into_iter().flat_map(|(at, fault, backends)| {
        std::iter::once(fault).chain(backends.iter().map(|it| &it.invalid)).map(move |fault| (at, fault))
    });
    let of_others = others.into_iter().map(|(at, backend)| (at, &backend.invalid));
    let mut faults: Vec<(usize, &String)> =
        of_rules.chain(of_others).filter(|(_, fault)| !fault.is_empty()).collect();
    faults.sort_by_key(|(at, _)| *at);
    faults.iter().map(|(at, fault)| format!("{}[{at}]: {fault}", part.name())).collect()
}

/// Says of all parts together whether they can be followed: a condition has one value.
fn report_faults(reader: &Reader<'_>, faults: Vec<String>) {
    if faults.is_empty() {
        reader.find(Finding::new(RESOLVED, true, "ResolvedRefs", "every rule can be followed".to_owned()));
    }
    for fault in faults {
        reader.find(Finding::new(RESOLVED, false, "Invalid", fault));
    }
}

/// Whether an object in `from` may send requests to something of `owner`.
fn is_visible(visibility: Visibility, owner: &Arc<str>, from: &Arc<str>) -> bool {
    match visibility {
        Visibility::Public => true,
        Visibility::Namespace => owner == from,
        Visibility::Hidden => false,
    }
}

struct Lowering<'a, 'r> {
    reader: &'r Reader<'a>,
    /// That of the rule.
    namespace: &'r Arc<str>,
    /// The port of requests, where it is known.
    port: u16,
}

/// A service that a destination names.
struct Named {
    namespace: Arc<str>,
    host: Arc<str>,
    ports: Vec<u16>,
}

impl Lowering<'_, '_> {
    /// Whether requests to a destination go to the port that they came to.
    fn keeps_port(&self, to: &Destination) -> bool {
        to.port.is_none() && self.named(to).is_ok_and(|named| named.ports.len() > 1)
    }

    fn named(&self, to: &Destination) -> Result<Named, String> {
        let reader = self.reader;
        for host in hosts::candidates(reader.settings, &to.host, self.namespace) {
            if let Some(name) = reader.settings.service_of_host(&host)
                && let Some(service) = reader.service(&name)
            {
                if !is_visible(service.visibility, &name.namespace, self.namespace) {
                    return Err(format!("Service {name} is not visible in {}", self.namespace));
                }
                let ports = service.ports.iter().map(|port| port.number).collect();
                return Ok(Named { namespace: name.namespace, host, ports });
            }
            let seen = |entry: &&ServiceEntry| {
                is_visible(entry.visibility, &entry.meta.id.namespace, self.namespace)
            };
            let entries = reader.entries_of_host(&host).filter(seen);
            let own = |entry: &&ServiceEntry| entry.meta.id.namespace != *self.namespace;
            if let Some(entry) = entries.min_by_key(|entry| (own(entry), entry.meta.seniority())) {
                let ports = entry.ports.iter().map(|port| port.number).collect();
                return Ok(Named { namespace: entry.meta.id.namespace.clone(), host, ports });
            }
        }
        Err(format!("no Service or ServiceEntry has host {}", to.host))
    }

    fn resolve(&self, to: &Destination) -> Result<l7::Backend, String> {
        let Named { namespace, host, ports } = self.named(to)?;
        let port = match (to.port, ports.as_slice()) {
            (Some(port), _) => port.number,
            (None, [sole]) => *sole,
            (None, _) => self.port,
        };
        if !ports.contains(&port) {
            return Err(format!("{host} has no port {port}"));
        }
        Ok(l7::Backend {
            namespace: namespace.to_string(),
            hostname: host.to_string(),
            port: port.into(),
            subset: to.subset.clone(),
            ..l7::Backend::default()
        })
    }
}

impl Referents for Lowering<'_, '_> {
    fn backend(&self, to: &Destination) -> l7::Backend {
        self.resolve(to).unwrap_or_else(|invalid| l7::Backend {
            namespace: self.namespace.to_string(),
            hostname: to.host.clone(),
            port: to.port.map(|port| port.number.into()).unwrap_or_default(),
            subset: to.subset.clone(),
            invalid,
            ..l7::Backend::default()
        })
    }

    fn clients(&self, labels: &BTreeMap<String, String>, namespace: &str) -> Result<l7::Clients, String> {
        /// More make a route too large to send.
        const MOST: usize = 2_000;
        let labels: Labels = labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let namespace = (!namespace.is_empty()).then(|| Arc::from(namespace));
        let addresses: Vec<IpAddr> = self.reader.addresses_of_pods(namespace.as_ref(), &labels);
        if addresses.len() > MOST {
            return Err(format!("`sourceLabels` select more than {MOST} addresses"));
        }
        Ok(l7::Clients { addresses: addresses.into_iter().map(l4::wire::octets).collect() })
    }
}
