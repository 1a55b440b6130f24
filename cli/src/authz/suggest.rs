//! From flows to policies: what was seen is allowed, and nothing else. Pure.
//!
//! For connections to workloads, as their nodes' proxies saw them, a policy selects the pods; for what a waypoint saw, it names the
//! service. What no policy can say, or what was not seen, is noted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use ambit_flows::{ANY_PATH, Flow, Kind};
use ambit_policy::Template;

use super::observed::Observed;
use super::rules::{Allow, Deed, For, operations};
use super::world::{Pods, WorkloadName, World};

/// Labels by which people select pods, the most common first.
const PREFERRED: [&str; 5] = [
    "app.kubernetes.io/name",
    "app",
    "k8s-app",
    "app.kubernetes.io/instance",
    "service.istio.io/canonical-name",
];
/// Labels that controllers give anew to each generation or pod.
const GENERATED: [&str; 8] = [
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/controller-uid",
    "batch.kubernetes.io/job-name",
    "controller-uid",
];

/// What is suggested.
#[derive(Debug, Default)]
pub(super) struct Suggestion {
    /// Policies, by name.
    pub(super) policies: Vec<Allow>,
    /// What they do not cover, one sentence each.
    pub(super) notes: BTreeSet<String>,
}

/// What clients did to one workload or service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    clients: BTreeMap<String, BTreeSet<Deed>>,
    count: u64,
}

impl Seen {
    fn add(&mut self, principal: &str, deed: Deed, count: u64) {
        self.clients.entry(principal.to_owned()).or_default().insert(deed);
        self.count += count;
    }

    fn evidence(&self, what: &str, place: &str) -> String {
        let clients = counted(self.clients.len() as u64, "clients");
        format!("{}{place} of {clients}", counted(self.count, what))
    }

    fn operations(&self) -> BTreeMap<String, BTreeSet<super::rules::Operation>> {
        self.clients.iter().map(|(client, deeds)| (client.clone(), operations(deeds, ANY_PATH))).collect()
    }
}

/// The policies for a namespace.
pub(super) fn suggest(observed: &Observed, world: &World, namespace: &str) -> Suggestion {
    let mut suggestion =
        Suggestion { notes: observed.gaps.iter().cloned().collect(), ..Suggestion::default() };
    let mut workloads: BTreeMap<WorkloadName, Seen> = BTreeMap::new();
    let mut services: BTreeMap<String, (Seen, bool)> = BTreeMap::new();
    for flow in observed.flows.iter().filter(|flow| *namespace_of(flow) == *namespace) {
        match flow.kind {
            // Access is decided where connections arrive.
            Kind::Outbound => {}
            Kind::Inbound => suggestion.add_connection(flow, &mut workloads),
            Kind::Request | Kind::WaypointConnection => suggestion.add_at_waypoint(flow, &mut services),
        }
    }
    suggestion.note_unseen(world, namespace, &workloads);
    suggestion.policies_of_workloads(world, namespace, workloads);
    suggestion.policies_of_services(world, namespace, services);
    suggestion.policies.sort_by(|a, b| a.name.cmp(&b.name));
    suggestion
}

/// The namespace of what is reached.
pub(super) fn namespace_of(flow: &Flow) -> &str {
    match (&flow.kind, &flow.service) {
        (Kind::Request | Kind::WaypointConnection, Some(service)) => &service.namespace,
        _ => &flow.destination.namespace,
    }
}

impl Suggestion {
    /// Whether there is no policy.
    pub(super) fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// The client of a flow that a policy can allow.
    fn principal<'a>(&mut self, flow: &'a Flow, target: &str, what: &str) -> Option<&'a str> {
        let client = match (&*flow.source.namespace, &*flow.source.workload) {
            ("", _) => "a client that is not known".to_owned(),
            (namespace, workload) => format!("{namespace}/{workload}"),
        };
        if flow.allowed == 0 {
            let denied = counted(flow.denied, what);
            self.notes.insert(format!("left out, as denied: {denied} from {client} to {target}"));
            return None;
        }
        if flow.denied > 0 {
            let (allowed, denied) = (flow.allowed, flow.denied);
            self.notes.insert(format!(
                "allowed, although {denied} of {} {what} from {client} to {target} were denied",
                allowed + denied
            ));
        }
        let principal = flow.source.identity.strip_prefix("spiffe://");
        if principal.is_none() {
            let allowed = counted(flow.allowed, what);
            self.notes.insert(format!(
                "no principal: {allowed} from {client} to {target} came in plain text or from outside the mesh; \
                 enforced, the policies deny them"
            ));
        }
        principal
    }

    fn add_connection(&mut self, flow: &Flow, workloads: &mut BTreeMap<WorkloadName, Seen>) {
        let (namespace, name) =
            (flow.destination.namespace.to_string(), flow.destination.workload.to_string());
        let target = format!("{name}:{}", flow.port);
        let Some(principal) = self.principal(flow, &target, "connections") else { return };
        let deed = (flow.port, String::new(), String::new());
        workloads.entry(WorkloadName { namespace, name }).or_default().add(principal, deed, flow.allowed);
    }

    fn add_at_waypoint(&mut self, flow: &Flow, services: &mut BTreeMap<String, (Seen, bool)>) {
        let is_request = flow.kind == Kind::Request;
        let what = if is_request { "requests" } else { "connections" };
        let Some(service) = &flow.service else {
            let workload = &flow.destination.workload;
            self.notes.insert(format!(
                "{what} to {workload} that name a pod or a gateway and no service: a policy for them has to be written by hand"
            ));
            return;
        };
        let target = format!("{}:{}", service.host, flow.port);
        let Some(principal) = self.principal(flow, &target, what) else { return };
        let (method, path) = match is_request {
            true => (self.method(flow, &target), self.path(flow, &target)),
            false => (String::new(), String::new()),
        };
        let seen = services.entry(service.host.to_string()).or_default();
        seen.0.add(principal, (flow.port, method, path), flow.allowed);
        seen.1 |= is_request;
    }

    fn method(&mut self, flow: &Flow, target: &str) -> String {
        if &*flow.method == "OTHER" {
            self.notes
                .insert(format!("any method: requests to {target} have methods that HTTP does not name"));
            return String::new();
        }
        flow.method.to_string()
    }

    fn path(&mut self, flow: &Flow, target: &str) -> String {
        let is_written = !Template::is_template(&flow.path) || Template::parse(&flow.path).is_ok();
        if *flow.path == *ANY_PATH || !is_written {
            self.notes
                .insert(format!("any path: {} requests to {target} have too many or odd paths", flow.method));
            return ANY_PATH.to_owned();
        }
        flow.path.to_string()
    }

    fn note_unseen(&mut self, world: &World, namespace: &str, seen: &BTreeMap<WorkloadName, Seen>) {
        for (name, pods) in world.workloads(namespace) {
            // Everybody who uses a waypoint connects to it.
            if !seen.contains_key(name) && pods.gateway.is_none() {
                self.notes.insert(format!(
                    "no policy for {}: no connection to it was allowed, so it stays as open as it is",
                    name.name
                ));
            }
        }
    }

    fn policies_of_workloads(
        &mut self,
        world: &World,
        namespace: &str,
        mut workloads: BTreeMap<WorkloadName, Seen>,
    ) {
        workloads.retain(|name, _| world.pods(name).is_none_or(|pods| pods.gateway.is_none()));
        while let Some((name, seen)) = workloads.pop_first() {
            let Some(pods) = world.pods(&name) else {
                self.notes.insert(format!("no policy for {}: it has no pods any more", name.name));
                continue;
            };
            let alike: BTreeSet<WorkloadName> = workloads
                .iter()
                .filter(|(_, other)| other.clients == seen.clients)
                .map(|(name, _)| name.clone())
                .chain([name.clone()])
                .collect();
            let Some((labels, selected)) = selector(world, namespace, &name, pods, &alike) else {
                self.notes.insert(format!("no policy for {}: no labels select its pods alone", name.name));
                continue;
            };
            let mut all = seen;
            for other in selected.iter().filter(|other| **other != name) {
                all.count += workloads.remove(other).map_or(0, |seen| seen.count);
            }
            let title = if selected.len() > 1 { labels.values().next().cloned() } else { None };
            let title = title.unwrap_or_else(|| name.name.clone());
            self.policies.push(Allow {
                name: object_name(&title, "connections"),
                clients: all.operations(),
                evidence: all.evidence("connections", ""),
                target: For::Pods(labels),
            });
        }
    }

    fn policies_of_services(
        &mut self,
        world: &World,
        namespace: &str,
        services: BTreeMap<String, (Seen, bool)>,
    ) {
        for (host, (seen, has_requests)) in services {
            let Some(target) = world.target(namespace, &host) else {
                self.notes.insert(format!(
                    "no policy for {host}: no Service or ServiceEntry has this host any more"
                ));
                continue;
            };
            let what = if has_requests { "requests" } else { "connections" };
            self.policies.push(Allow {
                name: object_name(&target.name, "requests"),
                clients: seen.operations(),
                evidence: seen.evidence(what, " at the waypoint"),
                target: For::Service(target.clone()),
            });
        }
    }

    /// The policies as manifests, below what they do not cover.
    ///
    /// # Errors
    /// When a policy can't be written as YAML.
    pub(super) fn render(&self, namespace: &str, enforce: bool) -> anyhow::Result<String> {
        let mut text =
            format!("# Policies that allow what was observed in namespace {namespace}, and nothing else.\n");
        if enforce {
            text.push_str("# Try them first with `ambit authz diff -f`: what was not observed is denied.\n");
        } else {
            text.push_str("# They are dry runs: proxies log and count what they would decide (ambit_policy_dry_run_differs_total).\n");
        }
        for note in &self.notes {
            let _ = writeln!(text, "# - {note}");
        }
        if self.policies.is_empty() {
            text.push_str("# Nothing was observed that a policy could allow.\n");
        }
        for policy in &self.policies {
            let _ = write!(text, "---\n{}", policy.render(namespace, enforce)?);
        }
        Ok(text)
    }
}

/// A number of things; `what` is their plural.
fn counted(count: u64, what: &str) -> String {
    match (count, what.strip_suffix('s')) {
        (1, Some(one)) => format!("1 {one}"),
        _ => format!("{count} {what}"),
    }
}

/// A name of an object, from a name that may be a host.
fn object_name(title: &str, what: &str) -> String {
    let title: String =
        title.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    let title = title.trim_matches('-');
    let title = title.get(..title.len().min(40)).unwrap_or_default();
    format!("allow-{}-{what}", title.trim_end_matches('-'))
}

type Selector = BTreeMap<String, String>;

/// Labels that select pods of `alike` workloads, `name` among them, and no others; with the workloads that they select. Few labels,
/// and such as people use, come first.
fn selector(
    world: &World,
    namespace: &str,
    name: &WorkloadName,
    pods: &Pods,
    alike: &BTreeSet<WorkloadName>,
) -> Option<(Selector, BTreeSet<WorkloadName>)> {
    let common = common_labels(pods);
    let mut keys: Vec<&String> = common.keys().collect();
    let rank =
        |key: &str| PREFERRED.iter().position(|preferred| *preferred == key).unwrap_or(PREFERRED.len());
    keys.sort_by_key(|key| (rank(key), key.as_str()));
    let pick = |chosen: &[&String]| -> Selector {
        common
            .iter()
            .filter(|(key, _)| chosen.contains(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    let singles = keys.iter().map(|key| pick(&[key]));
    let pairs = keys.iter().enumerate().flat_map(|(at, first)| {
        keys.iter().skip(at + 1).map(|second| pick(&[first, second])).collect::<Vec<_>>()
    });
    let candidates = singles.chain(pairs).chain([common.clone()]).filter(|labels| !labels.is_empty());
    candidates.into_iter().find_map(|labels| {
        let selected = selected_by(world, namespace, &labels);
        (selected.contains(name) && selected.is_subset(alike)).then_some((labels, selected))
    })
}

/// Labels that all pods of a workload have, of those that stay.
fn common_labels(pods: &Pods) -> Selector {
    let Some((first, rest)) = pods.labels.split_first() else { return Selector::new() };
    let stays = |key: &str| !GENERATED.contains(&key);
    first
        .iter()
        .filter(|(key, value)| stays(key) && rest.iter().all(|labels| labels.get(*key) == Some(value)))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// The workloads of a namespace of which labels select a pod.
fn selected_by(world: &World, namespace: &str, labels: &Selector) -> BTreeSet<WorkloadName> {
    let has = |pod: &Selector| labels.iter().all(|(key, value)| pod.get(key) == Some(value));
    let selected = world.workloads(namespace).filter(|(_, pods)| pods.labels.iter().any(has));
    selected.map(|(name, _)| name.clone()).collect()
}

#[cfg(test)]
#[path = "suggest_tests.rs"]
mod tests;
