//! The cluster's controller: one task that brings pods, published objects, DNS and VIPs in line with the objects.
//!
//! It is level-triggered: every wake-up is a complete pass over small data, so missed and repeated events make no
//! difference. It does the work of a cluster's controller manager, scheduler and kube-proxy.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ambit_node::enrol;
use ambit_node::redirect::Options;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Pod as PodObject, PodTemplateSpec};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use serde_json::Value;

use crate::addresses::ServiceRange;
use crate::cluster::create::{self, NewPod};
use crate::cluster::objects::Published;
use crate::cluster::publish;
use crate::cluster::shared::Shared;
use crate::cluster::waypoints;
use crate::dns::Zone;
use crate::error::{Error, Result};
use crate::manifest::{Key, Object};
use crate::pod::{Origin, Pod};
use crate::rollout::{self, Bounds, Replica, SAFE_LETTERS};
use crate::services::{self, ServiceView};
use crate::vip;

/// Kinds that run pods in a cluster and are not run here.
const NOT_RUN: &[&str] =
    &["StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob", "ReplicationController"];
/// The longest pause between two passes, so that a fault that has ended without an event is noticed.
const IDLE: Duration = Duration::from_secs(5);

/// The state of the controller.
pub(crate) struct Controller {
    shared: Arc<Shared>,
    services: ServiceRange,
    published: Published,
    programmed: Option<Vec<ServiceView>>,
    /// Environment variables of waypoints; `None` where there is no mesh.
    waypoints: Option<BTreeMap<String, String>>,
}

impl Controller {
    pub(crate) fn new(shared: Arc<Shared>, waypoints: Option<BTreeMap<String, String>>) -> Self {
        let services = ServiceRange::new(shared.plan);
        let published = Published::new(shared.directory.join("objects"));
        Self { shared, services, published, programmed: None, waypoints }
    }

    /// Makes passes until the cluster ends.
    pub(crate) async fn run(mut self) {
        loop {
            let asked = *self.shared.asked.lock();
            let problems = self.pass().await;
            *self.shared.problems.lock() = problems;
            self.shared.passed.send_replace(asked);
            tokio::select! {
                () = self.shared.changed.notified() => {}
                () = tokio::time::sleep(IDLE) => {}
            }
        }
    }

    /// One pass. Returns the faults of single objects, which do not affect others.
    async fn pass(&mut self) -> BTreeMap<String, String> {
        let mut objects = self.shared.objects.lock().all();
        let mut problems = BTreeMap::new();
        if let Some(env) = &self.waypoints {
            waypoints::add(&self.shared, env, &mut objects, &mut problems);
        }
        let namespaces = publish::namespaces(&objects, &self.shared.pods());
        self.enrol(&namespaces);
        self.run_deployments(&objects, &namespaces, &mut problems).await;
        self.run_pods(&objects, &namespaces, &mut problems).await;
        for key in objects.keys().filter(|key| NOT_RUN.contains(&key.kind.as_str())) {
            problems.insert(key.to_string(), format!("kind {} is not run by a local cluster", key.kind));
        }
        publish::check_service_accounts(&objects, &mut problems);
        let services = publish::services(&objects, &mut self.services, self.shared.plan, &mut problems);
        let mut out: BTreeMap<Key, Value> = BTreeMap::new();
        publish::collect(&self.shared, &objects, &namespaces, &services, &mut out);
        if self.waypoints.is_some() {
            out.extend(waypoints::statuses(&objects, &services));
        }
        if let Err(error) = self.published.publish(&out) {
            problems.insert("published objects".to_owned(), error.to_string());
        }
        let mut slices: Vec<EndpointSlice> = publish::typed(&objects, "EndpointSlice", &mut problems);
        let of_dns = publish::dns_slices(self.shared.plan).into_iter();
        slices.extend(of_dns.filter_map(|slice| serde_json::from_value(slice).ok()));
        let backends: Vec<_> = self.shared.pods().iter().map(publish::backend).collect();
        let views = services::views(&services, &slices, &backends);
        if let Err(error) = self.program_services(views, &services::external_names(&services)).await {
            problems.insert("services".to_owned(), error.to_string());
        }
        problems
    }

    /// Sets for every pod whether it should be in the mesh.
    fn enrol(&self, namespaces: &BTreeMap<String, publish::Namespace>) {
        for pod in self.shared.pods() {
            let object = pod.inner.object.read().clone();
            let wanted = membership(&object, namespaces);
            pod.inner.wanted_in_mesh.send_if_modified(|before| {
                let differs = *before != wanted;
                *before = wanted;
                differs
            });
        }
    }

    async fn run_deployments(
        &self,
        objects: &BTreeMap<Key, Object>,
        namespaces: &BTreeMap<String, publish::Namespace>,
        problems: &mut BTreeMap<String, String>,
    ) {
        let mut wanted = BTreeSet::new();
        let mut new = Vec::new();
        for (key, object) in objects.iter().filter(|(key, _)| key.kind == "Deployment") {
            wanted.insert((key.namespace.clone(), key.name.clone()));
            match object.read::<Deployment>() {
                Ok(deployment) => self.run_deployment(key, &deployment, namespaces, &mut new),
                Err(error) => drop(problems.insert(key.to_string(), error.to_string())),
            }
        }
        for pod in self.shared.pods() {
            if let Origin::Deployment { namespace, name, .. } = &pod.inner.origin
                && !wanted.contains(&(namespace.clone(), name.clone()))
            {
                pod.begin_stop();
            }
        }
        self.create_all(new, problems).await;
    }

    fn run_deployment(
        &self,
        key: &Key,
        deployment: &Deployment,
        namespaces: &BTreeMap<String, publish::Namespace>,
        new: &mut Vec<NewPod>,
    ) {
        let Some(spec) = &deployment.spec else { return };
        let hash = rollout::template_hash(&spec.template);
        let mut replicas = Vec::new();
        let mut terminating = 0;
        for pod in self.shared.pods() {
            let Origin::Deployment { namespace, name, hash } = &pod.inner.origin else { continue };
            if *namespace != key.namespace || *name != key.name {
                continue;
            }
            let view = pod.view();
            if view.terminating.is_some() {
                terminating += 1;
            } else {
                replicas.push(Replica {
                    name: pod.name().to_owned(),
                    hash: hash.clone(),
                    ready: view.is_ready(),
                });
            }
        }
        let step = rollout::step(Bounds::of(deployment), &hash, &replicas, terminating);
        for name in step.delete {
            if let Some(pod) = self.shared.pod(&key.namespace, &name) {
                pod.begin_stop();
            }
        }
        for _ in 0..step.create {
            let object = from_template(key, &hash, &spec.template);
            let origin = Origin::Deployment {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                hash: hash.clone(),
            };
            let mesh = membership(&object, namespaces);
            new.push(NewPod { object, origin, node: usize::MAX, address: None, run: true, mesh });
        }
    }

    async fn run_pods(
        &self,
        objects: &BTreeMap<Key, Object>,
        namespaces: &BTreeMap<String, publish::Namespace>,
        problems: &mut BTreeMap<String, String>,
    ) {
        let mut new = Vec::new();
        for (key, object) in objects.iter().filter(|(key, _)| key.kind == "Pod") {
            let wanted = match object.read::<PodObject>() {
                Ok(wanted) => wanted,
                Err(error) => {
                    problems.insert(key.to_string(), error.to_string());
                    continue;
                }
            };
            match self.shared.pod(&key.namespace, &key.name) {
                None => {
                    let mesh = membership(&wanted, namespaces);
                    let origin = Origin::Manifest;
                    new.push(NewPod {
                        object: wanted,
                        origin,
                        node: usize::MAX,
                        address: None,
                        run: true,
                        mesh,
                    });
                }
                Some(pod) if pod.inner.origin == Origin::Manifest => update(&pod, wanted),
                Some(_) => {
                    problems.insert(key.to_string(), "another pod has that name".to_owned());
                }
            }
        }
        for pod in self.shared.pods() {
            let key = Key::new("Pod", pod.namespace(), pod.name());
            if pod.inner.origin == Origin::Manifest && !objects.contains_key(&key) {
                pod.begin_stop();
            }
        }
        self.create_all(new, problems).await;
    }

    /// Places and makes pods, all at once.
    async fn create_all(&self, mut new: Vec<NewPod>, problems: &mut BTreeMap<String, String>) {
        let mut placed = vec![0_usize; self.shared.nodes.len()];
        for pod in &mut new {
            pod.node = self.place(&pod.object, &mut placed);
        }
        let names: Vec<String> = new.iter().map(|pod| described(&pod.object)).collect();
        let made =
            futures_util::future::join_all(new.into_iter().map(|pod| create::create(&self.shared, pod)));
        for (name, made) in names.into_iter().zip(made.await) {
            if let Err(error) = made {
                tracing::warn!(pod = name, %error, "a pod can't be made");
                problems.insert(format!("Pod {name}"), error.to_string());
            }
        }
    }

    /// The node of a new pod: the named one, or the one with the fewest pods like it, then the fewest at all.
    fn place(&self, object: &PodObject, placed: &mut [usize]) -> usize {
        let spec = object.spec.as_ref();
        let selector = spec.and_then(|spec| spec.node_selector.as_ref());
        let named = spec
            .and_then(|spec| spec.node_name.as_ref())
            .or_else(|| selector.and_then(|selector| selector.get("kubernetes.io/hostname")));
        let index = named.and_then(|name| self.shared.nodes.iter().position(|node| node.name == *name));
        let chosen = index.unwrap_or_else(|| {
            let pods = self.shared.pods();
            let labels = object.metadata.labels.clone().unwrap_or_default();
            let least = create::schedule(&pods, self.shared.nodes.len(), &labels);
            // Pods that are made in one go are spread over the nodes too.
            (0..placed.len())
                .min_by_key(|node| (placed.get(*node).copied(), usize::from(*node != least)))
                .unwrap_or(0)
        });
        if let Some(count) = placed.get_mut(chosen) {
            *count += 1;
        }
        chosen
    }

    /// Puts names and VIPs in place, if they changed.
    async fn program_services(
        &mut self,
        views: Vec<ServiceView>,
        external: &[(String, String, String)],
    ) -> Result<()> {
        let zone = Zone::new(&views, &self.shared.records.lock()).with_external_names(external);
        self.shared.dns.publish(zone);
        if self.programmed.as_ref() == Some(&views) {
            return Ok(());
        }
        let table = vip::plan(&views);
        let apply = self.shared.nodes.iter().map(|node| vip::apply(&node.attached.sandbox, table.clone()));
        for applied in futures_util::future::join_all(apply).await {
            applied?;
        }
        self.programmed = Some(views);
        Ok(())
    }
}

fn described(object: &PodObject) -> String {
    let metadata = &object.metadata;
    format!(
        "{}/{}",
        metadata.namespace.as_deref().unwrap_or_default(),
        metadata.name.as_deref().unwrap_or_default()
    )
}

/// Whether labels and annotations want a pod in the mesh, and with which options.
pub(crate) fn membership(
    object: &PodObject,
    namespaces: &BTreeMap<String, publish::Namespace>,
) -> Option<Options> {
    let metadata = &object.metadata;
    let name = metadata.namespace.clone().unwrap_or_default();
    let unknown = publish::Namespace::default();
    let publish::Namespace { labels: namespace_labels, annotations: namespace_annotations } =
        namespaces.get(&name).unwrap_or(&unknown);
    let pod = enrol::Pod {
        namespace: name,
        labels: metadata.labels.clone().unwrap_or_default(),
        annotations: metadata.annotations.clone().unwrap_or_default(),
        namespace_annotations: namespace_annotations.clone(),
        host_network: object.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true)),
        // A local cluster runs every pod the same way.
        runtime_handler: None,
    };
    match enrol::enrolled(&pod, namespace_labels, &enrol::Settings::default()) {
        enrol::Decision::In(options) => Some(options),
        enrol::Decision::Out(_) => None,
    }
}

/// A pod of a template, named and owned as a ReplicaSet's pods are.
fn from_template(deployment: &Key, hash: &str, template: &PodTemplateSpec) -> PodObject {
    let set = format!("{}-{hash}", deployment.name);
    let metadata = template.metadata.clone().unwrap_or_default();
    let mut labels = metadata.labels.unwrap_or_default();
    labels.insert("pod-template-hash".to_owned(), hash.to_owned());
    let suffix: String = (0..5)
        .filter_map(|_| SAFE_LETTERS.get(rand::random_range(0..SAFE_LETTERS.len())))
        .map(|letter| char::from(*letter))
        .collect();
    PodObject {
        metadata: ObjectMeta {
            name: Some(format!("{set}-{suffix}")),
            generate_name: Some(format!("{set}-")),
            namespace: Some(deployment.namespace.clone()),
            labels: Some(labels),
            annotations: metadata.annotations,
            owner_references: Some(vec![OwnerReference {
                api_version: "apps/v1".to_owned(),
                kind: "ReplicaSet".to_owned(),
                name: set.clone(),
                uid: set,
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

/// Labels and annotations of a running pod follow its manifest; a changed specification makes another pod, since
/// a running one can't be changed.
fn update(pod: &Pod, wanted: PodObject) {
    let mut object = pod.inner.object.write();
    let mut comparable = wanted.spec.clone().unwrap_or_default();
    let current = object.spec.clone().unwrap_or_default();
    comparable.node_name.clone_from(&current.node_name);
    comparable.service_account_name.get_or_insert_with(|| "default".to_owned());
    if comparable != current {
        drop(object);
        pod.begin_stop();
        return;
    }
    object.metadata.labels = wanted.metadata.labels;
    object.metadata.annotations = wanted.metadata.annotations;
}

/// Refuses a key that the cluster itself publishes.
///
/// # Errors
/// [`Error::Manifest`] for pods of Deployments and nodes.
pub(crate) fn may_apply(object: &Object) -> Result<()> {
    if object.key.kind == "Node" {
        return Err(Error::manifest(&object.file, format!("{}: the cluster makes its nodes", object.key)));
    }
    Ok(())
}
