//! What flows meet: workloads, services and policies, as the control plane makes them of the objects.
//!
//! The control plane's index turns objects into resources and the proxies' directory takes them, so that what is decided here is decided
//! by the code that decides in the mesh.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ambit_api::{l7, security, workload};
use ambit_control::index::{Index, ResourceType, Settings};
use ambit_control::object::{Change, Kind, NamespacedName, Object, ObjectRef};
use ambit_control::source::files::inspect::Content;
use ambit_directory::{Directory, Reader, Snapshot, Update, Workload};
use ambit_policy::Policy;
use ambit_traffic::TrafficPolicy;
use anyhow::Context;
use prost::Message;

use crate::analyze::Item;

/// A workload as flows name it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct WorkloadName {
    /// Its namespace.
    pub(super) namespace: String,
    /// What its pods belong to.
    pub(super) name: String,
}

/// The pods of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pods {
    /// The labels of each.
    pub(super) labels: Vec<BTreeMap<String, String>>,
    /// The Gateway that they belong to, as `NAMESPACE/NAME`, where they are pods of a waypoint.
    pub(super) gateway: Option<String>,
}

/// What a policy's `targetRef` names for a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// API group; empty for a Service.
    pub(super) group: &'static str,
    /// Service or ServiceEntry.
    pub(super) kind: &'static str,
    /// Its name.
    pub(super) name: String,
}

/// A policy at waypoints.
#[derive(Debug)]
pub(super) struct AtWaypoint {
    /// The policy.
    pub(super) policy: Policy,
    /// What it is made of.
    pub(super) source: security::Authorization,
    /// Namespaces and hosts of the services that it is for.
    pub(super) targets: Vec<(String, String)>,
    /// Gateways, `NAMESPACE/NAME`: it is for all that is reached through them.
    pub(super) gateways: Vec<String>,
    /// Whether it asks an external authorizer.
    pub(super) is_external: bool,
}

/// A TrafficPolicy at waypoints.
#[derive(Debug)]
pub(super) struct TrafficAtWaypoint {
    /// The policy.
    pub(super) policy: TrafficPolicy,
    /// Namespaces, hosts and ports of the services that it is for; port 0: all.
    pub(super) targets: Vec<(String, String, u32)>,
    /// Gateways, `NAMESPACE/NAME`: it is for all that is reached through them.
    pub(super) gateways: Vec<String>,
    /// Namespaces of the routes that it is for.
    pub(super) routes: BTreeSet<String>,
}

/// A mesh, its objects applied.
pub(super) struct World {
    directory: Reader,
    pods: BTreeMap<WorkloadName, Pods>,
    targets: BTreeMap<(String, String), Target>,
    at_waypoints: Vec<AtWaypoint>,
    traffic: Vec<TrafficAtWaypoint>,
    /// Policies of node proxies, as they came.
    sources: BTreeMap<String, security::Authorization>,
    given: usize,
}

impl World {
    /// Applies the objects of a mesh, then `given` ones, whose AuthorizationPolicies are enforced even where they are dry runs.
    ///
    /// # Errors
    /// When a resource of the control plane can't be read.
    pub(super) fn new(objects: Vec<Item>, given: Vec<Item>, settings: Settings) -> anyhow::Result<World> {
        let cluster_domain = settings.cluster_domain.to_string();
        let cluster_id = settings.cluster_id.clone();
        let given: Vec<Object> = given.into_iter().filter_map(object).collect();
        let enforced: BTreeSet<NamespacedName> = given.iter().filter_map(policy_name).collect();
        let traffic_policies = given.iter().filter(|it| it.reference().kind == Kind::TrafficPolicy).count();
        let objects: Vec<Object> = objects.into_iter().filter_map(object).chain(given).collect();
        let mut index = Index::new(settings);
        index.apply(objects.iter().cloned().map(Change::Apply));
        let mut world = World {
            directory: Directory::new().1,
            pods: BTreeMap::new(),
            targets: targets(&objects, &cluster_domain),
            at_waypoints: Vec::new(),
            traffic: Vec::new(),
            sources: BTreeMap::new(),
            given: enforced.len() + traffic_policies,
        };
        let mut updates = Vec::new();
        for ((kind, name), resource) in index.resources() {
            let body = resource.body.as_ref();
            let read = || format!("read resource {name}");
            match kind {
                ResourceType::Address => {
                    let address = workload::Address::decode(body).with_context(read)?;
                    updates.push(Update::Address { name: name.to_string(), address });
                }
                ResourceType::Authorization => {
                    let mut policy = security::Authorization::decode(body).with_context(read)?;
                    enforce(&mut policy, &enforced);
                    world.sources.insert(name.to_string(), policy.clone());
                    updates.push(Update::Policy { name: name.to_string(), policy });
                }
                ResourceType::Policy => {
                    let policy = l7::Policy::decode(body).with_context(read)?;
                    world.traffic.extend(traffic(&policy));
                    world.at_waypoints.extend(at_waypoint(policy, &enforced));
                }
                _ => {}
            }
        }
        let (mut directory, reader) = Directory::new();
        for rejected in directory.apply(updates) {
            tracing::debug!(?rejected, "the directory does not take a resource");
        }
        world.directory = reader;
        world.pods = pods(&objects, &world.directory.load(), &cluster_id);
        Ok(world)
    }

    /// How many AuthorizationPolicies and TrafficPolicies were given.
    pub(super) fn given(&self) -> usize {
        self.given
    }

    /// Workloads, services and the policies of node proxies.
    pub(super) fn snapshot(&self) -> Arc<Snapshot> {
        self.directory.snapshot()
    }

    /// The pods of a workload.
    pub(super) fn pods(&self, name: &WorkloadName) -> Option<&Pods> {
        self.pods.get(name)
    }

    /// The workloads of a namespace.
    pub(super) fn workloads<'a>(
        &'a self,
        namespace: &'a str,
    ) -> impl Iterator<Item = (&'a WorkloadName, &'a Pods)> {
        self.pods.iter().filter(move |(name, _)| name.namespace == namespace)
    }

    /// What a policy names for a service's host.
    pub(super) fn target(&self, namespace: &str, host: &str) -> Option<&Target> {
        self.targets.get(&(namespace.to_owned(), host.to_owned()))
    }

    /// The policies at waypoints.
    pub(super) fn at_waypoints(&self) -> &[AtWaypoint] {
        &self.at_waypoints
    }

    /// The TrafficPolicies at waypoints.
    pub(super) fn traffic(&self) -> &[TrafficAtWaypoint] {
        &self.traffic
    }

    /// What a node proxy's policy is made of.
    pub(super) fn source(&self, name: &str) -> Option<&security::Authorization> {
        self.sources.get(name)
    }
}

fn object(item: Item) -> Option<Object> {
    match item.content {
        Content::Object(object) => Some(object),
        Content::Fault { stand_in, .. } => stand_in.map(|object| *object),
        Content::Foreign(_) => None,
    }
}

fn policy_name(object: &Object) -> Option<NamespacedName> {
    let ObjectRef { kind, name } = object.reference();
    (kind == Kind::AuthorizationPolicy).then_some(name)
}

fn enforce(policy: &mut security::Authorization, enforced: &BTreeSet<NamespacedName>) {
    if enforced.contains(&NamespacedName::new(policy.namespace.as_str(), policy.name.as_str())) {
        policy.dry_run = false;
    }
}

fn at_waypoint(policy: l7::Policy, enforced: &BTreeSet<NamespacedName>) -> Option<AtWaypoint> {
    let l7::Policy { targets, gateways, authorization, authentication, external, object, traffic, audit } =
        policy;
    // Tokens are not among what is observed, TrafficPolicies are kept apart, and audits decide nothing.
    if authentication.is_some() || traffic.is_some() || audit.is_some() {
        return None;
    }
    let object = object.unwrap_or_default();
    let mut source = authorization.clone().unwrap_or_else(|| security::Authorization {
        name: object.name,
        namespace: object.namespace,
        action: security::Action::Deny.into(),
        ..security::Authorization::default()
    });
    enforce(&mut source, enforced);
    let compiled = authorization.is_some().then(|| Policy::compile_http(&source).ok()).flatten();
    let is_external = external.is_some() && !source.dry_run;
    Some(AtWaypoint {
        policy: compiled.unwrap_or_else(|| Policy::closed(&source)),
        source,
        targets: targets.into_iter().map(|it| (it.namespace, it.hostname.to_ascii_lowercase())).collect(),
        gateways,
        is_external,
    })
}

fn traffic(policy: &l7::Policy) -> Option<TrafficAtWaypoint> {
    let source = policy.traffic.as_ref()?;
    let object = policy.object.clone().unwrap_or_default();
    let name = format!("{}/{}", object.namespace, object.name);
    let targets = policy.targets.iter().filter(|target| target.listener.is_empty());
    Some(TrafficAtWaypoint {
        policy: TrafficPolicy::compile(name.into(), source, None),
        targets: targets
            .map(|it| (it.namespace.clone(), it.hostname.to_ascii_lowercase(), it.port))
            .collect(),
        gateways: policy.gateways.clone(),
        routes: source.routes.iter().map(|route| route.namespace.clone()).collect(),
    })
}

/// Services and ServiceEntries by the namespace and host that flows name.
fn targets(objects: &[Object], cluster_domain: &str) -> BTreeMap<(String, String), Target> {
    let mut targets = BTreeMap::new();
    for object in objects {
        match object {
            Object::Service(service) => {
                let NamespacedName { namespace, name } = &service.meta.id;
                let host = format!("{name}.{namespace}.svc.{cluster_domain}");
                let target = Target { group: "", kind: "Service", name: name.to_string() };
                targets.insert((namespace.to_string(), host), target);
            }
            Object::ServiceEntry(entry) => {
                let NamespacedName { namespace, name } = &entry.meta.id;
                for host in &entry.hosts {
                    let target =
                        Target { group: "networking.istio.io", kind: "ServiceEntry", name: name.to_string() };
                    let key = (namespace.to_string(), host.to_ascii_lowercase());
                    targets.entry(key).or_insert(target);
                }
            }
            _ => {}
        }
    }
    targets
}

fn pods(objects: &[Object], snapshot: &Snapshot, cluster_id: &str) -> BTreeMap<WorkloadName, Pods> {
    const GATEWAY_NAME: &str = ambit_control::object::Pod::GATEWAY_NAME;
    let mut pods: BTreeMap<WorkloadName, Pods> = BTreeMap::new();
    for object in objects {
        let Object::Pod(pod) = object else { continue };
        let NamespacedName { namespace, name } = &pod.meta.id;
        let uid = format!("{cluster_id}//Pod/{namespace}/{name}");
        let Some(workload) = snapshot.workload(&uid) else { continue };
        let known = pods.entry(name_of(workload)).or_default();
        known.labels.push(
            pod.meta.labels.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        );
        let gateway = pod.meta.labels.get(GATEWAY_NAME).map(|gateway| format!("{namespace}/{gateway}"));
        known.gateway = known.gateway.take().or(gateway);
    }
    pods
}

/// A workload as flows name it.
pub(super) fn name_of(workload: &Workload) -> WorkloadName {
    WorkloadName { namespace: workload.namespace.to_string(), name: workload.workload_name.to_string() }
}
