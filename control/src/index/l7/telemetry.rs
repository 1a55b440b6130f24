//! Telemetry objects: what they come to for each waypoint and gateway, and findings for their authors.
//!
//! Of the objects of one level (the mesh, a namespace, a class, a gateway, a service) the oldest counts; what it does not say is as the
//! levels above have it. `merge` is the arithmetic of that.

mod merge;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ambit_api::l7;
use ambit_traffic::LogFilter;

use super::outputs::{Resource, ResourceType};
use super::policies::{Bound, report};
use super::reader::Reader;
use super::views;
use crate::mesh_config::Provider;
use crate::object::{Gateway, Labels, Mode, NamespacedName, PolicyTarget, PolicyTargetKind, Telemetry};

/// The label of a gateway's pods that has its name.
const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

/// What a waypoint or gateway reports of requests, and of those to some services otherwise. `None`: as without any Telemetry.
pub(in crate::index) fn of_gateway(
    reader: &Reader<'_>,
    gateway: &Gateway,
) -> (Option<l7::Telemetry>, Vec<l7::ServiceTelemetry>) {
    let mode = mode_of(reader, gateway);
    let levels = levels(reader, gateway);
    let providers = &reader.settings.telemetry;
    let own = merge::merge(&levels, mode, providers);
    let mut services = Vec::new();
    for ((namespace, hostname), of_service) in services_of(reader, gateway) {
        let levels: Vec<&Telemetry> = levels.iter().copied().chain([of_service]).collect();
        let telemetry = Some(merge::merge(&levels, mode, providers));
        services.push(l7::ServiceTelemetry { namespace, hostname, telemetry });
    }
    (Some(own).filter(|own| *own != merge::by_default()), services)
}

/// Waypoints are in front of servers, gateways are clients of them, as in Istio.
fn mode_of(reader: &Reader<'_>, gateway: &Gateway) -> Mode {
    match reader.settings.waypoint_classes.contains(&gateway.class) {
        true => Mode::Server,
        false => Mode::Client,
    }
}

/// The objects in force for a gateway itself, the farthest first.
fn levels<'r>(reader: &Reader<'r>, gateway: &Gateway) -> Vec<&'r Telemetry> {
    let all = reader.telemetries();
    let first = |is_it: &dyn Fn(&Telemetry) -> bool| all.iter().copied().find(|telemetry| is_it(telemetry));
    let (root, own) = (&reader.settings.root_namespace, &gateway.meta.id.namespace);
    let mesh = first(&|it| it.is_wide() && it.meta.id.namespace == *root);
    let namespace = first(&|it| it.is_wide() && it.meta.id.namespace == *own && own != root);
    let class = first(&|it| it.targets.iter().any(|target| is_class(target, it, gateway, root)));
    let by_name = first(&|it| is_for_gateway(reader, it, gateway));
    [mesh, namespace, class, by_name].into_iter().flatten().collect()
}

fn is_class(target: &PolicyTarget, telemetry: &Telemetry, gateway: &Gateway, root: &Arc<str>) -> bool {
    target.kind == PolicyTargetKind::GatewayClass
        && target.name.name == gateway.class
        && telemetry.meta.id.namespace == *root
}

/// Whether it names this gateway, or selects its pods. Waypoints are only named, as in Istio.
fn is_for_gateway(reader: &Reader<'_>, telemetry: &Telemetry, gateway: &Gateway) -> bool {
    let id = &gateway.meta.id;
    if let Some(selector) = &telemetry.selector {
        let labels: Labels = [(GATEWAY_NAME, &*id.name)].into_iter().collect();
        let namespace = &telemetry.meta.id.namespace;
        let is_near = *namespace == id.namespace || *namespace == reader.settings.root_namespace;
        return is_near
            && reader.settings.gateway_classes.contains(&gateway.class)
            && labels.satisfy(selector);
    }
    let names = |target: &PolicyTarget| target.kind == PolicyTargetKind::Gateway && target.name == *id;
    telemetry.meta.id.namespace == id.namespace && telemetry.targets.iter().any(names)
}

/// The oldest object for each service that is bound to a gateway, by namespace and host.
fn services_of<'r>(reader: &Reader<'r>, gateway: &Gateway) -> BTreeMap<(String, String), &'r Telemetry> {
    let root = views::root(&gateway.meta.id);
    let mut services = BTreeMap::new();
    for telemetry in reader.telemetries() {
        for target in telemetry.targets.iter().filter(|target| is_service(target)) {
            let mut bound = Bound::default();
            if bound.add(reader, &telemetry.meta.id, target).is_err() || !bound.roots.contains(&root) {
                continue;
            }
            for l7::Target { namespace, hostname, .. } in bound.targets {
                services.entry((namespace, hostname)).or_insert(telemetry);
            }
        }
    }
    services
}

fn is_service(target: &PolicyTarget) -> bool {
    matches!(target.kind, PolicyTargetKind::Service | PolicyTargetKind::ServiceEntry)
}

/// The waypoints and gateways that send something to a service: it is a collector of theirs.
pub(in crate::index) fn roots_of_collector(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    host: &Arc<str>,
) -> BTreeSet<Arc<str>> {
    let is_it = |it: &l7::Collector| it.hostname == **host && it.namespace == **namespace;
    if !reader.settings.telemetry.collectors().any(is_it) {
        return BTreeSet::new();
    }
    let classes = reader.settings.waypoint_classes.iter().chain(&reader.settings.gateway_classes);
    let gateways = classes.flat_map(|class| reader.gateways_of_class(class));
    let sends = |gateway: &&Gateway| {
        let (own, services) = of_gateway(reader, gateway);
        let all = own.into_iter().chain(services.into_iter().filter_map(|service| service.telemetry));
        all.into_iter().any(|telemetry| {
            let spans = telemetry.tracing.into_iter().filter_map(|tracing| tracing.collector);
            let logs = telemetry.access_logs.into_iter().filter_map(|log| log.collector);
            spans.chain(logs).any(|collector| is_it(&collector))
        })
    };
    gateways.filter(sends).map(|gateway| views::root(&gateway.meta.id)).collect()
}

/// What is said of an object. Its resources are those of gateways.
pub(in crate::index) fn of_telemetry(
    reader: &Reader<'_>,
    id: &NamespacedName,
) -> Vec<(ResourceType, Resource)> {
    let Some(telemetry) = reader.store.telemetries.get(id) else { return Vec::new() };
    let mut problems = of_place(reader, telemetry);
    problems.extend(of_providers(reader, telemetry));
    problems.extend(of_fields(telemetry));
    if problems.is_empty() {
        report(reader, true, "Accepted", "followed by waypoints and gateways".to_owned());
    }
    for (reason, message) in problems {
        report(reader, false, reason, message);
    }
    Vec::new()
}

type Problem = (&'static str, String);

/// What keeps an object from being for what it names.
fn of_place(reader: &Reader<'_>, telemetry: &Telemetry) -> Vec<Problem> {
    let id = &telemetry.meta.id;
    let mut problems = Vec::new();
    let conflict = |first: &Telemetry, what: String| {
        ("Conflicted", format!("Telemetry {} is older and for {what} too", first.meta.id))
    };
    let rival = |is_same: &dyn Fn(&Telemetry) -> bool| {
        let first = reader.telemetries().into_iter().find(|other| is_same(other));
        first.filter(|first| first.meta.id != *id)
    };
    if telemetry.is_wide() {
        let is_same = |other: &Telemetry| other.is_wide() && other.meta.id.namespace == id.namespace;
        problems.extend(rival(&is_same).map(|first| conflict(first, format!("namespace {}", id.namespace))));
    }
    for target in &telemetry.targets {
        if let Err(fault) = Bound::default().add(reader, id, target) {
            problems.push(("TargetNotFound", format!("{fault}: it has no effect there")));
            continue;
        }
        let is_same =
            |other: &Telemetry| other.meta.id.namespace == id.namespace && other.targets.contains(target);
        let what = || format!("{} {}", target.kind_name, target.name.name);
        problems.extend(rival(&is_same).map(|first| conflict(first, what())));
    }
    if telemetry.selector.is_some() {
        let classes = reader.settings.gateway_classes.iter();
        let mut gateways = classes.flat_map(|class| reader.gateways_of_class(class));
        if !gateways.any(|gateway| is_for_gateway(reader, telemetry, gateway)) {
            let message = "its selector selects no gateway: waypoints are named by targetRefs, and node proxies have settings of their own";
            problems.push(("NoEffect", message.to_owned()));
        }
    }
    problems
}

/// What of its providers there is not, or does not take what it is to get.
fn of_providers(reader: &Reader<'_>, telemetry: &Telemetry) -> Vec<Problem> {
    let providers = &reader.settings.telemetry;
    let mut problems = Vec::new();
    let mut check = |name: &Arc<str>, what: &str, takes: &dyn Fn(&Provider) -> bool| match providers.get(name)
    {
        None => {
            let message = format!("there is no extension provider {name} in the mesh's settings");
            problems.push(("ProviderNotFound", message));
        }
        Some(Provider::Unsupported(kind)) => {
            problems.push((
                "NoEffect",
                format!("proxies do not speak to providers of the kind {kind}, as {name} is"),
            ));
        }
        Some(provider) if !takes(provider) => {
            problems.push(("NoEffect", format!("provider {name} takes no {what}")));
        }
        Some(_) => {}
    };
    let takes_spans = |provider: &Provider| matches!(provider, Provider::Spans { .. });
    let takes_logs = |provider: &Provider| matches!(provider, Provider::OwnLog | Provider::Logs { .. });
    let takes_metrics = |provider: &Provider| matches!(provider, Provider::Metrics);
    for name in telemetry.tracing.iter().filter_map(|rule| rule.providers.first()) {
        check(name, "spans", &takes_spans);
    }
    for name in telemetry.access_logs.iter().flat_map(|rule| &rule.providers) {
        check(name, "log records", &takes_logs);
    }
    for name in telemetry.metrics.iter().flat_map(|rule| &rule.providers) {
        check(name, "metrics", &takes_metrics);
    }
    problems
}

/// What of its fields has no effect.
fn of_fields(telemetry: &Telemetry) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut ignored = |field: &str, why: &str| {
        problems.push(("FieldIgnored", format!("{field} has no effect: {why}")));
    };
    for rule in &telemetry.tracing {
        rule.without_effect.iter().for_each(|field| ignored(field, "it is not supported"));
        if rule.providers.len() > 1 {
            ignored("a second provider of tracing", "spans go to the first");
        }
    }
    for filter in telemetry.access_logs.iter().filter_map(|rule| rule.filter.as_deref()) {
        if let Err(error) = LogFilter::compile(filter) {
            ignored("filter.expression", &format!("{error}; everything is logged"));
        }
    }
    for rule in &telemetry.metrics {
        if rule.has_interval {
            ignored("reportingInterval", "metrics are counted when they happen");
        }
        for change in &rule.overrides {
            if change.disabled.is_some() && change.family.is_some() {
                ignored("disabled of one metric", "only ALL_METRICS can be switched off");
            }
            if !(change.removed.is_empty() && change.written.is_empty()) {
                ignored("tagOverrides", "metrics have the labels that Istio's dashboards read");
            }
        }
    }
    problems
}
