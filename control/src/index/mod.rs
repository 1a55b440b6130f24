//! Objects in, resources out: pure, synchronous, and recomputing only what a change touches.
//!
//! [`Index::apply`] takes a batch of changes to objects and answers with the changes to resources. A change
//! marks the *producers* that it concerns (the object itself, what depends on it, what its selector or
//! labels relate it to); each marked producer is computed once, and what came out is compared with
//! what stood. No file, socket or task is known here. The same objects always give the same resources, however they came.

mod dependencies;
mod l4;
mod l7;
mod outputs;
mod placements;
mod reader;
mod relations;
mod store;
mod touch;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ambit_api::l7 as l7_api;
use aws_lc_rs::hmac;

use crate::mesh_config::TelemetryProviders;
use crate::object::{
    AddressValue, Change, KeyAddress, Kind, NamespacedName, ObjectRef, ParentRef, Topology, Transport,
};
use dependencies::Dependencies;
pub(crate) use l4::authorization::NO_EFFECT_AT_L4;
use l4::{authentication, authorization, endpoints, entries, services, workloads};
pub use l7::ingresses::default_gateway;
pub use l7::request_authentications::{FetchedKeys, WantedKeys};
pub use l7::views::root_of_view;
use outputs::Outputs;
pub use outputs::{Resource, ResourceChanges, ResourceType};
pub use placements::PodPlacement;
use reader::Reader;
use store::Store;

/// What the index needs to know beside the objects.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Name of the cluster, which begins every workload's uid.
    pub cluster_id: Arc<str>,
    /// Network of workloads that name none; empty if there is just one.
    pub network: Arc<str>,
    /// Trust domain of the mesh.
    pub trust_domain: Arc<str>,
    /// Suffix of service hosts, as `cluster.local`.
    pub cluster_domain: Arc<str>,
    /// Namespace whose policies without selector are for the whole mesh.
    pub root_namespace: Arc<str>,
    /// `gatewayClassName`s of waypoints.
    pub waypoint_classes: Vec<Arc<str>>,
    /// `gatewayClassName`s of gateways for clients outside the mesh.
    pub gateway_classes: Vec<Arc<str>>,
    /// Namespace of the Gateways that serve IngressClasses without parameters.
    pub ingress_namespace: Arc<str>,
    /// What a DENY rule does at L4 that names only what L4 cannot see.
    pub l7_deny_at_l4: L7DenyAtL4,
    /// Whom policies may ask about requests, by name.
    pub authorizers: BTreeMap<Arc<str>, l7_api::ExternalAuthorizer>,
    /// The proxies in front of every gateway that says nothing of them.
    pub gateway_topology: Topology,
    /// Who takes spans and log records, by name.
    pub telemetry: TelemetryProviders,
}

/// What a DENY rule does at L4 that names only what L4 cannot see (xDS contract).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "camelCase")]
pub enum L7DenyAtL4 {
    /// Nothing, as in Istio: the rule is for a waypoint.
    #[default]
    Ignore,
    /// It denies every connection.
    Deny,
}

impl Settings {
    /// Whether Gateways of a class are run by this mesh: as waypoints, or for clients outside of it.
    pub fn runs(&self, class: &Arc<str>) -> bool {
        self.waypoint_classes.contains(class) || self.gateway_classes.contains(class)
    }

    /// The host of a Kubernetes service.
    pub fn host_of_service(&self, id: &NamespacedName) -> String {
        format!("{}.{}.svc.{}", id.name, id.namespace, self.cluster_domain)
    }

    /// The Kubernetes service that a host can only belong to: by its full name, or by one that the search path of pods
    /// completes to it.
    pub fn service_of_host(&self, host: &str) -> Option<NamespacedName> {
        let domain = format!(".{}", self.cluster_domain);
        let short = host.strip_suffix(&domain).unwrap_or(host);
        let short = short.strip_suffix(".svc").unwrap_or(short);
        let (name, namespace) = short.split_once('.')?;
        (!name.is_empty() && !namespace.contains('.')).then(|| NamespacedName::new(namespace, name))
    }

    /// A host in full, as an object in `namespace` means it: a name without dots is that of a Service beside it.
    pub fn full_host(&self, namespace: &str, host: &Arc<str>) -> Arc<str> {
        if host.contains('.') || host.starts_with('*') {
            return host.clone();
        }
        format!("{host}.{namespace}.svc.{}", self.cluster_domain).into()
    }

    /// The Kubernetes service that has this host as its full name.
    pub fn own_service(&self, host: &str) -> Option<NamespacedName> {
        let short = host.strip_suffix(&*self.cluster_domain)?.strip_suffix(".svc.")?;
        let (name, namespace) = short.split_once('.')?;
        (!namespace.contains('.')).then(|| NamespacedName::new(namespace, name))
    }

    /// Whether a wildcard host covers names of the cluster's own domain, which no ServiceEntry may offer.
    pub fn covers_cluster_names(&self, host: &str) -> bool {
        let Some(suffix) = host.strip_prefix('*') else { return false };
        let domain = format!(".{}", self.cluster_domain);
        suffix.ends_with(&domain) || domain.ends_with(suffix)
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            cluster_id: "Kubernetes".into(),
            network: "".into(),
            trust_domain: "cluster.local".into(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "ambit-system".into(),
            waypoint_classes: vec!["ambit-waypoint".into(), "istio-waypoint".into()],
            gateway_classes: vec!["ambit".into()],
            ingress_namespace: "ambit-system".into(),
            l7_deny_at_l4: L7DenyAtL4::default(),
            authorizers: BTreeMap::new(),
            gateway_topology: Topology::default(),
            telemetry: TelemetryProviders::default(),
        }
    }
}

/// Name of the controller that findings are of, as statuses name it.
pub const CONTROLLER: &str = "ambit.dev/mesh-controller";

/// Something that an object's author should know: a condition of its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The condition's type: `ZtunnelAccepted`, `istio.io/WaypointBound`.
    pub condition: &'static str,
    /// Whether the condition holds.
    pub met: bool,
    /// The reason, one word.
    pub reason: &'static str,
    /// The reason, one sentence.
    pub message: String,
    /// The object that the condition is relative to: the Gateway that a Service is bound to, the owner of an address.
    pub parent: Option<ObjectRef>,
    /// The parent of a route that the condition is relative to, as the route refers to it.
    pub parent_ref: Option<ParentRef>,
    /// The listener that the condition is of.
    pub listener: Option<ListenerFacts>,
    /// The ListenerSets of the Gateway that the condition is of.
    pub listener_sets: Option<ListenerSetFacts>,
    /// Where the object is reached that the condition is of.
    pub addresses: Vec<AddressValue>,
    /// The controller that says so.
    pub controller: &'static str,
}

impl Finding {
    fn new(condition: &'static str, met: bool, reason: &'static str, message: String) -> Finding {
        Finding {
            condition,
            met,
            reason,
            message,
            parent: None,
            parent_ref: None,
            listener: None,
            listener_sets: None,
            addresses: Vec::new(),
            controller: CONTROLLER,
        }
    }

    fn relative_to(self, kind: Kind, name: &NamespacedName) -> Finding {
        Finding { parent: Some(ObjectRef { kind, name: name.clone() }), ..self }
    }
}

/// What the status of a listener says beside its conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerFacts {
    /// Its name.
    pub name: Arc<str>,
    /// The kinds of routes that can be attached to it.
    pub kinds: Vec<Kind>,
    /// How many routes are attached to it.
    pub attached: usize,
}

/// What the ListenerSets of a Gateway add to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListenerSetFacts {
    /// Those that name the Gateway, whether they are attached or not.
    pub all: Vec<NamespacedName>,
    /// How many are attached: at least one listener of them is served.
    pub attached: usize,
    /// The ports of their listeners.
    pub ports: BTreeSet<(u16, Transport)>,
}

/// What a batch of changes to objects did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Changes of policies; publish these first, as addresses name policies.
    pub policies: ResourceChanges,
    /// Changes of workloads and services.
    pub addresses: ResourceChanges,
    /// Changes of waypoints.
    pub gateways: ResourceChanges,
    /// Changes of the policies of waypoints.
    pub waypoint_policies: ResourceChanges,
    /// Changes of how waypoints treat endpoints.
    pub backend_policies: ResourceChanges,
    /// Changes of listeners.
    pub listeners: ResourceChanges,
    /// Changes of key pairs.
    pub key_pairs: ResourceChanges,
    /// Changes of routes.
    pub routes: ResourceChanges,
    /// Changes of routes for connections.
    pub stream_routes: ResourceChanges,
    /// Pods that were placed on a node, changed or left it.
    pub placements: Vec<(NamespacedName, Option<PodPlacement>)>,
    /// Objects whose findings changed, with all that there are now.
    pub findings: Vec<(ObjectRef, Vec<Finding>)>,
}

/// The index.
#[derive(Debug)]
pub struct Index {
    settings: Settings,
    store: Store,
    dependencies: Dependencies,
    outputs: Outputs,
    findings: BTreeMap<ObjectRef, Vec<Finding>>,
    /// Producers to compute before the current batch ends.
    touched: BTreeSet<ObjectRef>,
    /// Placements that changed in the current batch.
    placements: BTreeMap<NamespacedName, Option<PodPlacement>>,
    /// Producers computed since the index was made.
    computed: u64,
    /// The keys that were wanted last, by when they came to be wanted.
    key_generations: BTreeMap<KeyAddress, u64>,
    key_generation: u64,
}

/// What keys of sessions are derived from; shown to nobody.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SessionSecret([u8; 32]);

impl SessionSecret {
    /// A secret that all replicas of the control plane have.
    pub fn new(secret: [u8; 32]) -> SessionSecret {
        SessionSecret(secret)
    }

    /// The key of one waypoint or gateway: that of no other can be computed from it.
    fn key_of(self, gateway: &NamespacedName) -> Vec<u8> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.0);
        hmac::sign(&key, format!("sessions of {gateway}").as_bytes()).as_ref().to_vec()
    }
}

impl std::fmt::Debug for SessionSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SessionSecret")
    }
}

impl Index {
    /// An index without objects. It already has the policies that are always there.
    pub fn new(settings: Settings) -> Index {
        let strict = ObjectRef {
            kind: Kind::PeerAuthentication,
            name: NamespacedName::new(settings.root_namespace.clone(), ""),
        };
        Index {
            settings,
            store: Store::default(),
            dependencies: Dependencies::default(),
            outputs: Outputs::default(),
            findings: BTreeMap::new(),
            touched: BTreeSet::from([strict]),
            placements: BTreeMap::new(),
            computed: 0,
            key_generations: BTreeMap::new(),
            key_generation: 0,
        }
    }

    /// Applies changes in their order and answers with what they did together.
    pub fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> Changes {
        for change in changes {
            self.take(change);
        }
        let mut findings = Vec::new();
        for producer in std::mem::take(&mut self.touched) {
            self.compute(&producer, &mut findings);
        }
        let mut resources = self.outputs.take_changes();
        let mut of = |kind| resources.remove(&kind).unwrap_or_default();
        let (policies, addresses) = (of(ResourceType::Authorization), of(ResourceType::Address));
        let (gateways, routes) = (of(ResourceType::Gateway), of(ResourceType::Route));
        let stream_routes = of(ResourceType::StreamRoute);
        let (waypoint_policies, backend_policies) =
            (of(ResourceType::Policy), of(ResourceType::BackendPolicy));
        let (listeners, key_pairs) = (of(ResourceType::Listener), of(ResourceType::KeyPair));
        let placements = std::mem::take(&mut self.placements).into_iter().collect();
        Changes {
            policies,
            addresses,
            gateways,
            waypoint_policies,
            backend_policies,
            listeners,
            key_pairs,
            routes,
            stream_routes,
            placements,
            findings,
        }
    }

    /// Takes what keys of sessions are derived from; what that changes comes with the next batch.
    pub fn set_session_secret(&mut self, secret: SessionSecret) {
        if self.store.session_secret.replace(secret) != Some(secret) {
            let gateways = self.store.gateways.keys();
            self.touched.extend(gateways.map(|name| ObjectRef { kind: Kind::Gateway, name: name.clone() }));
        }
    }

    /// Every resource that is in force, by type and name.
    pub fn resources(&self) -> BTreeMap<(ResourceType, Arc<str>), Resource> {
        self.outputs.all()
    }

    /// The findings about objects.
    pub fn findings(&self) -> &BTreeMap<ObjectRef, Vec<Finding>> {
        &self.findings
    }

    /// Whether there is a Gateway of this name that the mesh runs.
    pub fn runs_gateway(&self, id: &NamespacedName) -> bool {
        self.store.gateways.get(id).is_some_and(|gateway| self.settings.runs(&gateway.class))
    }

    /// The keys of token issuers that are to be fetched: those of objects that are bound to something. Those that are not
    /// wanted any more are forgotten.
    pub fn want_keys(&mut self) -> BTreeMap<KeyAddress, WantedKeys> {
        let mut wanted: BTreeMap<KeyAddress, WantedKeys> = BTreeMap::new();
        for (id, authentication) in &self.store.request_authentications {
            let producer = ObjectRef { kind: Kind::RequestAuthentication, name: id.clone() };
            if !self.outputs.has(&producer) {
                continue;
            }
            for (address, timeout) in authentication.remote_keys() {
                let keys = wanted.entry(address.clone()).or_default();
                keys.timeout = timeout.max(keys.timeout);
                keys.namespaces.insert(id.namespace.clone());
            }
        }
        self.key_generation = self.key_generation.wrapping_add(1);
        for (address, keys) in &mut wanted {
            keys.generation = *self.key_generations.get(address).unwrap_or(&self.key_generation);
        }
        self.key_generations =
            wanted.iter().map(|(address, keys)| (address.clone(), keys.generation)).collect();
        self.store.keys.retain(|address, _| wanted.contains_key(address));
        wanted
    }

    /// Whether it was given what became of fetching these keys.
    pub fn has_asked_for_keys(&self, address: &KeyAddress) -> bool {
        self.store.keys.contains_key(address)
    }

    /// How many producers were computed since the index was made: the work done.
    pub fn computed(&self) -> u64 {
        self.computed
    }

    fn compute(&mut self, producer: &ObjectRef, changed: &mut Vec<(ObjectRef, Vec<Finding>)>) {
        self.computed += 1;
        let reader = Reader::new(&self.store, &self.settings);
        let id = &producer.name;
        let resources = match producer.kind {
            Kind::Pod => workloads::of_pod(&reader, id),
            Kind::Service => services::of_service(&reader, id),
            Kind::EndpointSlice => endpoints::of_slice(&reader, id),
            Kind::ServiceEntry => entries::of_service_entry(&reader, id),
            Kind::WorkloadEntry => entries::of_workload_entry(&reader, id),
            Kind::AuthorizationPolicy => authorization::of_policy(&reader, id),
            Kind::PeerAuthentication => authentication::of_authentication(&reader, id),
            Kind::Gateway => {
                let remote = entries::of_remote_gateway(&reader, id);
                remote.into_iter().chain(l7::gateways::of_gateway(&reader, id)).collect()
            }
            Kind::ListenerSet => l7::listener_sets::of_set(&reader, id),
            Kind::Ingress => l7::ingresses::of_ingress(&reader, id),
            Kind::HttpRoute | Kind::GrpcRoute | Kind::TcpRoute | Kind::TlsRoute | Kind::UdpRoute => {
                l7::routes::of_route(&reader, producer)
            }
            Kind::VirtualService => l7::virtual_services::of_virtual_service(&reader, id),
            Kind::DestinationRule => l7::backend_policies::of_rule(&reader, id),
            Kind::RequestAuthentication => l7::request_authentications::of_authentication(&reader, id),
            Kind::BackendTlsPolicy => l7::backend_tls::of_policy(&reader, id),
            Kind::TrafficPolicy => l7::traffic_policies::of_policy(&reader, id),
            Kind::Telemetry => l7::telemetry::of_telemetry(&reader, id),
            // What a gateway gets of a Secret comes with the Gateway.
            Kind::ReferenceGrant
            | Kind::Secret
            | Kind::Namespace
            | Kind::Node
            | Kind::ServiceAccount
            | Kind::ConfigMap
            | Kind::ClusterTrustBundle
            | Kind::Deployment
            | Kind::IngressClass
            | Kind::ReplicaSet => Vec::new(),
        };
        let (dependencies, findings) = reader.finish();
        self.dependencies.set(producer, dependencies);
        self.outputs.set(producer, resources);
        let before = match findings.is_empty() {
            true => self.findings.remove(producer),
            false => self.findings.insert(producer.clone(), findings.clone()),
        };
        if before.unwrap_or_default() != findings {
            changed.push((producer.clone(), findings));
        }
    }
}
