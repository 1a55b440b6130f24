//! Ingresses as resources: routes of the Gateway that serves their class, and listeners for the hosts that they have certificates for.
//!
//! An Ingress becomes a route for each of its hosts, so that hosts and paths take precedence as those of HTTPRoutes do (Gateway API,
//! `HTTPRouteRule`): the most specific host, then the exact or longest path, then the older object. What an Ingress says of its default
//! backend comes after everything else.

use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;
use prost::Message;

use super::gateways::object_name;
use super::listeners::{self, Owner};
use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, attachment, hosts, listener_sets, paths, views};
use crate::object::{
    BackendPort, Gateway, Ingress, IngressBackend, IngressPath, Kind, Listener, ListenerProtocol,
    NamespacedName, Service,
};

/// Whether a Gateway serves it.
const ACCEPTED: &str = "Accepted";
/// Whether all that it refers to is there.
const RESOLVED: &str = "ResolvedRefs";
/// Whether every part of it has an effect.
const HONOURED: &str = "ambit.dev/FieldsHonoured";

/// The Gateway that serves a class without parameters: the control plane makes it.
pub fn default_gateway(namespace: &Arc<str>, class: &str) -> NamespacedName {
    NamespacedName::new(namespace.clone(), format!("{class}-ingress"))
}

/// The resources of an Ingress of a class of the mesh.
pub(in crate::index) fn of_ingress(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(ingress) = reader.store.ingresses.get(id) else { return Vec::new() };
    let name = match reader.gateway_of_class(ingress.class.as_ref()) {
        None => return Vec::new(),
        Some(Err(problem)) => {
            reader.find(Finding::new(ACCEPTED, false, "InvalidParameters", problem));
            return Vec::new();
        }
        Some(Ok(name)) => name,
    };
    let gateway = reader.gateway(&name).filter(|it| reader.settings.gateway_classes.contains(&it.class));
    let Some(gateway) = gateway else {
        let message = format!("Gateway {name}, which serves its class, does not exist yet");
        reader
            .find(Finding::new(ACCEPTED, false, "GatewayMissing", message).relative_to(Kind::Gateway, &name));
        return Vec::new();
    };
    let message = format!("Gateway {name} serves it");
    let accepted = Finding::new(ACCEPTED, true, "Accepted", message).relative_to(Kind::Gateway, &name);
    reader.find(Finding { addresses: gateway.addresses.clone(), ..accepted });
    for fault in &ingress.faults {
        reader.find(Finding::new(HONOURED, false, "NoEffect", fault.clone()));
    }
    let served = Served { reader, ingress, gateway };
    let mut resources = served.listeners();
    resources.extend(served.routes());
    resources
}

/// An Ingress at the Gateway that serves it.
struct Served<'a, 'r> {
    reader: &'r Reader<'a>,
    ingress: &'a Ingress,
    gateway: &'a Gateway,
}

impl<'a> Served<'a, '_> {
    /// Its listeners, with their certificates.
    fn listeners(&self) -> Vec<(ResourceType, Resource)> {
        let owner = Owner::ingress(self.gateway, self.ingress);
        let mut resources: Vec<(ResourceType, Resource)> = Vec::new();
        for listener in &self.ingress.listeners {
            if let Some(conflict) = self.conflict(listener) {
                if !conflict.is_empty() {
                    self.reader.find(Finding::new(HONOURED, false, "HostnameConflict", conflict));
                }
                continue;
            }
            match listeners::served(self.reader, owner, listener) {
                Ok(served) => {
                    let is_new = |new: &(ResourceType, Resource)| {
                        resources.iter().all(|(kind, known)| (*kind, &known.name) != (new.0, &new.1.name))
                    };
                    let served: Vec<_> = served.into_iter().filter(is_new).collect();
                    resources.extend(served);
                }
                Err(problem) => {
                    let message = format!("TLS for {}: {problem}", shown(listener));
                    self.reader.find(Finding::new(RESOLVED, false, "InvalidCertificateRef", message));
                }
            }
        }
        resources
    }

    /// What is in the way of a listener; empty where another Ingress says the same.
    fn conflict(&self, listener: &Listener) -> Option<String> {
        let sets = listener_sets::attached_to(self.reader, self.gateway);
        let own = self.gateway.listeners.iter().chain(sets.into_iter().flat_map(|set| &set.listeners));
        if own.into_iter().any(|other| listeners::clash(listener, other).is_some()) {
            return Some(format!(
                "TLS for {}: a listener of Gateway {} is in the way",
                shown(listener),
                self.gateway.meta.id
            ));
        }
        let host = listener.hostname.as_deref().unwrap_or_default();
        let first =
            self.for_host(host).into_iter().next().filter(|first| first.meta.id != self.ingress.meta.id)?;
        let other = first.listeners.iter().find(|other| other.hostname == listener.hostname)?;
        Some(match other.tls == listener.tls {
            true => String::new(),
            false => format!(
                "TLS for {}: Ingress {} is older and has another Secret",
                shown(listener),
                first.meta.id
            ),
        })
    }

    /// The Ingresses of the Gateway with a certificate for a host that can be used, the senior first.
    fn for_host(&self, host: &str) -> Vec<&'a Ingress> {
        let is_ours = |ingress: &&Ingress| {
            let gateway = self.reader.gateway_of_class(ingress.class.as_ref());
            let owner = Owner::ingress(self.gateway, ingress);
            let mut of_host = ingress
                .listeners
                .iter()
                .filter(|listener| listener.hostname.as_deref().unwrap_or_default() == host);
            gateway.is_some_and(|gateway| gateway.as_ref() == Ok(&self.gateway.meta.id))
                && of_host.any(|listener| listeners::served(self.reader, owner, listener).is_ok())
        };
        self.reader.ingresses_with_tls(host).into_iter().filter(is_ours).collect()
    }

    /// Routes for its rules, and for its default backend.
    fn routes(&self) -> Vec<(ResourceType, Resource)> {
        let mut by_host: BTreeMap<Option<&Arc<str>>, Vec<l7::Rule>> = BTreeMap::new();
        for rule in &self.ingress.rules {
            let rules = by_host.entry(rule.host.as_ref()).or_default();
            rules.extend(rule.paths.iter().map(|path| self.rule(rule.host.as_deref(), path)));
            // Kubernetes: a host without paths sends everything to the default backend.
        }
        self.report(by_host.values().flatten());
        let created = self.ingress.meta.created.unwrap_or_default();
        let hosts: Vec<Option<&Arc<str>>> = by_host.keys().copied().collect();
        let of_rules = by_host.into_iter().filter(|(_, rules)| !rules.is_empty());
        let mut routes: Vec<_> = of_rules
            .map(|(host, rules)| {
                let name = host.map_or("", |host| &**host);
                self.route(&format!("host/{name}"), created, vec![host], rules)
            })
            .collect();
        if let Some(backend) = &self.ingress.default_backend {
            let path = IngressPath { path: "/".to_owned(), is_exact: false, backend: backend.clone() };
            let wildcards = hosts.iter().flatten().filter(|host| host.starts_with("*."));
            let wildcards: Vec<_> = wildcards.copied().collect();
            let plain = hosts.into_iter().flatten().filter(|host| !host.starts_with("*.")).map(Some);
            let everywhere = plain.chain([None]).collect();
            let rule = self.rule(None, &path);
            self.report([&rule]);
            // After every rule of others for the same.
            routes.push(self.route("default", i64::MAX, everywhere, vec![rule]));
            for host in wildcards {
                let rule = self.rule(Some(host), &path);
                routes.push(self.route(&format!("default/{host}"), i64::MAX, vec![Some(host)], vec![rule]));
            }
        }
        routes
    }

    fn report<'x>(&self, rules: impl IntoIterator<Item = &'x l7::Rule>) {
        for rule in rules {
            for fault in rule.backends.iter().map(|backend| &backend.invalid).filter(|text| !text.is_empty())
            {
                let reason = if fault.contains("does not exist") || fault.contains("has no port") {
                    "BackendNotFound"
                } else {
                    "InvalidKind"
                };
                self.reader.find(Finding::new(RESOLVED, false, reason, fault.clone()));
            }
            for fault in paths::faults(rule) {
                self.reader.find(Finding::new(HONOURED, false, "NeverMatches", fault));
            }
        }
    }

    fn route(
        &self,
        part: &str,
        created: i64,
        hosts: Vec<Option<&Arc<str>>>,
        rules: Vec<l7::Rule>,
    ) -> (ResourceType, Resource) {
        let id = &self.ingress.meta.id;
        let message = l7::Route {
            object: Some(object_name(Kind::Ingress, id)),
            created,
            targets: hosts.into_iter().flat_map(|host| self.targets(host)).collect(),
            rules,
            order: l7::Order::Specific.into(),
            protocol: l7::Protocol::Http.into(),
        };
        let resource = Resource {
            name: format!("{}/{id}/{part}", Kind::Ingress).into(),
            aliases: Vec::new(),
            parents: vec![views::root(&self.gateway.meta.id)],
            body: message.encode_to_vec().into(),
            unhealthy: false,
        };
        (ResourceType::Route, resource)
    }

    /// The listeners of the Gateway that take requests for a host: its own, and those of Ingresses with a certificate.
    fn targets(&self, host: Option<&Arc<str>>) -> Vec<l7::Target> {
        let hostnames: Vec<Arc<str>> = host.cloned().into_iter().collect();
        let target = |owner: Owner<'_>, listener: &Listener| {
            let common = attachment::common_hosts(listener.hostname.as_ref(), &hostnames)?;
            Some(l7::Target {
                listener: owner.resource_name(listener),
                hostnames: common.iter().map(ToString::to_string).collect(),
                ..l7::Target::default()
            })
        };
        let takes_requests = |listener: &&Listener| {
            matches!(listener.protocol, ListenerProtocol::Http | ListenerProtocol::Https)
        };
        let own = Owner::gateway(self.gateway);
        let mut targets: Vec<l7::Target> = self
            .gateway
            .listeners
            .iter()
            .filter(takes_requests)
            .filter_map(|listener| target(own, listener))
            .collect();
        // A host that TLS is for may be that of a rule, a wildcard for it, or all of them.
        let mut with_tls: Vec<Arc<str>> = vec!["".into()];
        match host {
            Some(host) => {
                with_tls.push(host.clone());
                with_tls.extend(hosts::wildcards(host).filter(|wildcard| **wildcard != *"*"));
            }
            None => with_tls.extend(self.ingress.tls_hosts().map(Arc::from)),
        }
        with_tls.sort_unstable();
        with_tls.dedup();
        for host in with_tls {
            let Some(first) = self.for_host(&host).into_iter().next() else { continue };
            let owner = Owner::ingress(self.gateway, first);
            let of_host = |listener: &&Listener| listener.hostname.as_deref().unwrap_or_default() == &*host;
            targets.extend(
                first.listeners.iter().filter(of_host).filter_map(|listener| target(owner, listener)),
            );
        }
        targets
    }

    /// A path of a host as a rule.
    fn rule(&self, host: Option<&str>, path: &IngressPath) -> l7::Rule {
        let kind = match path.is_exact {
            true => l7::path_match::Kind::Exact(path.path.clone()),
            false => l7::path_match::Kind::Prefix(path.path.clone()),
        };
        let matches = l7::Match {
            path: Some(l7::PathMatch { kind: Some(kind), ignore_case: false }),
            authority: host.and_then(one_label),
            ..l7::Match::default()
        };
        let backend = match self.backend(&path.backend) {
            Ok(backend) => backend,
            Err(invalid) => l7::Backend { invalid, weight: 1, ..l7::Backend::default() },
        };
        l7::Rule { matches: vec![matches], backends: vec![backend], ..l7::Rule::default() }
    }

    fn backend(&self, backend: &IngressBackend) -> Result<l7::Backend, String> {
        let IngressBackend::Service { name, port } = backend else {
            let IngressBackend::Other(what) = backend else { return Err(String::new()) };
            return Err(format!("requests can't be sent to {what}: backends are Services with a port"));
        };
        let name = NamespacedName::new(self.ingress.meta.id.namespace.clone(), name.clone());
        let service = self.reader.service(&name).ok_or_else(|| format!("Service {name} does not exist"))?;
        let port = number(service, port).ok_or_else(|| match port {
            BackendPort::Number(number) => format!("Service {name} has no port {number}"),
            BackendPort::Name(port) => format!("Service {name} has no port {port}"),
        })?;
        Ok(l7::Backend {
            namespace: name.namespace.to_string(),
            hostname: self.reader.settings.host_of_service(&name),
            port: port.into(),
            weight: 1,
            ..l7::Backend::default()
        })
    }
}

fn number(service: &Service, port: &BackendPort) -> Option<u16> {
    let is_meant = |known: &&crate::object::ServicePort| match port {
        BackendPort::Number(number) => known.number == *number,
        BackendPort::Name(name) => known.name == *name,
    };
    service.ports.iter().find(is_meant).map(|known| known.number)
}

/// Kubernetes, "Hostname wildcards": a star stands for one label, while that of Gateway API stands for any number.
fn one_label(host: &str) -> Option<l7::StringMatch> {
    let suffix = host.strip_prefix("*.")?;
    let pattern = format!("(?i)[^.:]+\\.{}\\.?(:[0-9]*)?", suffix.replace('.', "\\."));
    Some(l7::StringMatch { kind: Some(l7::string_match::Kind::Regex(pattern)) })
}

fn shown(listener: &Listener) -> &str {
    listener.hostname.as_deref().unwrap_or("all hosts")
}

/// Whether some Ingress that a Gateway serves has a certificate, so that the Gateway needs the port of HTTPS.
pub(super) fn has_tls(reader: &Reader<'_>, gateway: &NamespacedName) -> bool {
    reader.ingresses_of(gateway).iter().any(|ingress| !ingress.listeners.is_empty())
}

/// Below what a Service is by the Ingresses that send requests to it: the Gateways that serve these.
pub(super) fn roots_to(reader: &Reader<'_>, service: &NamespacedName) -> Vec<Arc<str>> {
    let gateway = |ingress: &Ingress| reader.gateway_of_class(ingress.class.as_ref())?.ok();
    reader
        .ingresses_to(service)
        .into_iter()
        .filter_map(gateway)
        .map(|gateway| views::root(&gateway))
        .collect()
}
