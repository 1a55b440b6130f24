//! The handle by which tests and `ambit up` use a running cluster.

mod builder;
mod controller;
mod create;
mod findings;
mod ignored;
pub(crate) mod mesh;
mod objects;
mod parts;
mod program;
mod publish;
mod restart;
pub(crate) mod shared;
mod watch;
mod waypoints;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinSet;

pub use builder::ClusterBuilder;
pub use mesh::{CLUSTER_ID, SYSTEM_NAMESPACE, Ztunnel};
pub use program::Program;

use crate::cluster::create::NewPod;
use crate::cluster::mesh::MeshOptions;
use crate::cluster::shared::Shared;
use crate::error::{Error, Result};
use crate::kubelet::status::Redirection;
use crate::manifest::{self, Key};
use crate::pod::{DATAPLANE_MODE, Pod, PodOptions};

/// How long [`Cluster::pod`] and the waits without a limit of their own wait.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Interval between two tests of a condition that has no event.
const POLL: Duration = Duration::from_millis(10);

/// A running cluster. Dropping it ends everything in it; [`Cluster::shutdown`] also waits for that.
#[derive(Debug)]
pub struct Cluster {
    shared: Arc<Shared>,
    mesh: Option<(MeshOptions, Program)>,
    /// The controller, the watch of the manifests, the renewal of tokens.
    tasks: JoinSet<()>,
    /// Holds the work directory, if it is the cluster's own.
    _directory: Option<tempfile::TempDir>,
    extra: Mutex<Vec<Ztunnel>>,
}

impl Cluster {
    /// A builder for two nodes with both address families and a mesh.
    #[must_use]
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder::new()
    }

    /// Applies objects, as `kubectl apply` would; returns after the controller has acted on them.
    ///
    /// # Errors
    /// When the text is not understood; then none of its objects is applied.
    pub async fn apply(&self, yaml: &str) -> Result<()> {
        let objects = manifest::parse(Path::new("applied"), yaml)?;
        for object in &objects {
            controller::may_apply(object)?;
        }
        {
            let mut desired = self.shared.objects.lock();
            for object in objects {
                desired.put(object);
            }
        }
        self.shared.settle().await
    }

    /// Deletes an object that was applied; returns after the controller has acted on it.
    ///
    /// # Errors
    /// [`Error::Unknown`] when none of that name was applied.
    pub async fn delete(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        let key = Key::new(kind, namespace, name);
        if !self.shared.objects.lock().remove(&key) {
            return Err(Error::Unknown(key.to_string()));
        }
        self.shared.settle().await
    }

    /// Makes a namespace, in the mesh or not. An existing one keeps its other labels.
    ///
    /// # Errors
    /// When the controller does not act on it.
    pub async fn namespace(&self, name: &str, ambient: bool) -> Result<()> {
        self.label_namespace(name, DATAPLANE_MODE, ambient.then_some("ambient")).await
    }

    /// Sets or removes a label of a namespace; running pods follow.
    ///
    /// # Errors
    /// When the controller does not act on it.
    pub async fn label_namespace(&self, name: &str, key: &str, value: Option<&str>) -> Result<()> {
        {
            let mut objects = self.shared.objects.lock();
            let of_namespace = Key::new("Namespace", "", name);
            let mut object = match objects.get(&of_namespace) {
                Some(object) => object.clone(),
                None => manifest::Object {
                    key: of_namespace,
                    file: PathBuf::from("applied"),
                    body: serde_json::json!({
                        "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name },
                    }),
                },
            };
            match (value, object.body["metadata"]["labels"].as_object_mut()) {
                (Some(value), Some(labels)) => drop(labels.insert(key.to_owned(), value.into())),
                (Some(value), None) => object.body["metadata"]["labels"] = serde_json::json!({ key: value }),
                (None, Some(labels)) => drop(labels.remove(key)),
                (None, None) => {}
            }
            objects.put(object);
        }
        self.shared.settle().await
    }

    /// Sets or removes a label of a running pod.
    ///
    /// # Errors
    /// When the controller does not act on it.
    pub async fn label_pod(&self, pod: &Pod, key: &str, value: Option<&str>) -> Result<()> {
        {
            let mut object = pod.inner.object.write();
            let labels = object.metadata.labels.get_or_insert_default();
            match value {
                Some(value) => labels.insert(key.to_owned(), value.to_owned()),
                None => labels.remove(key),
            };
        }
        self.shared.settle().await
    }

    /// Makes an empty pod: namespaces and addresses without any container, ready at once. Returns when it is
    /// published and, if it is to be in the mesh, captured and served.
    ///
    /// # Errors
    /// When it can't be made, or is not served within 20 s.
    pub async fn pod(&self, options: PodOptions) -> Result<Pod> {
        let node = options.node.unwrap_or_else(|| {
            create::schedule(&self.shared.pods(), self.shared.nodes.len(), &options.labels)
        });
        let mut new = NewPod::of(&options, node);
        let objects = self.shared.objects.lock().all();
        let namespaces = publish::namespaces(&objects, &self.shared.pods());
        new.mesh = controller::membership(&new.object, &namespaces);
        let meshed = new.mesh.is_some() && self.mesh.is_some();
        let pod = Box::pin(create::create(&self.shared, new)).await?;
        if meshed {
            self.wait_enrolled(&pod).await?;
        }
        self.shared.settle().await?;
        Ok(pod)
    }

    /// All pods, those of the mesh itself included.
    #[must_use]
    pub fn pods(&self) -> Vec<Pod> {
        self.shared.pods()
    }

    /// A pod by name.
    #[must_use]
    pub fn find_pod(&self, namespace: &str, name: &str) -> Option<Pod> {
        self.shared.pod(namespace, name)
    }

    /// Pods of a namespace with a label.
    #[must_use]
    pub fn pods_of(&self, namespace: &str, key: &str, value: &str) -> Vec<Pod> {
        let mut pods = self.shared.pods();
        pods.retain(|pod| {
            pod.namespace() == namespace && pod.labels().get(key).map(String::as_str) == Some(value)
        });
        pods
    }

    /// Deletes a pod as `kubectl delete` would, and waits until it is gone. A Deployment makes another.
    ///
    /// # Errors
    /// [`Error::Deadline`] when it is still there after its grace period and some seconds.
    pub async fn delete_pod(&self, pod: &Pod) -> Result<()> {
        let grace = crate::kubelet::lifecycle::grace(&pod.inner.object.read());
        pod.begin_stop();
        pod.wait_for("its end", grace + PATIENCE, |view| view.gone).await?;
        self.shared.settle().await
    }

    /// Waits until a Deployment's wanted number of pods of its current template is ready, and no other is left.
    ///
    /// # Errors
    /// [`Error::Unknown`] when there is no such Deployment, [`Error::Deadline`] after `limit`.
    pub async fn wait_ready(&self, namespace: &str, deployment: &str, limit: Duration) -> Result<()> {
        let key = Key::new("Deployment", namespace, deployment);
        let object = self.shared.objects.lock().get(&key).cloned();
        let object = object.ok_or_else(|| Error::Unknown(key.to_string()))?;
        let object: k8s_openapi::api::apps::v1::Deployment = object.read()?;
        let wanted = crate::rollout::Bounds::of(&object).replicas;
        let template = object.spec.as_ref().map(|spec| &spec.template);
        let current = template.map(crate::rollout::template_hash).unwrap_or_default();
        let rolled_out = || {
            let pods: Vec<Pod> = self
                .shared
                .pods()
                .into_iter()
                .filter(|pod| match &pod.inner.origin {
                    crate::pod::Origin::Deployment { namespace: ns, name, .. } => {
                        ns == namespace && name == deployment
                    }
                    _ => false,
                })
                .collect();
            let ready = |pod: &Pod| {
                let hash = match &pod.inner.origin {
                    crate::pod::Origin::Deployment { hash, .. } => hash.as_str(),
                    _ => "",
                };
                pod.is_ready() && hash == current
            };
            pods.len() == wanted && pods.iter().all(ready)
        };
        self.wait_until(&format!("{key} is ready"), limit, async || rolled_out()).await
    }

    /// Waits until a pod is captured and served.
    ///
    /// # Errors
    /// [`Error::Deadline`] after 20 s.
    pub async fn wait_enrolled(&self, pod: &Pod) -> Result<()> {
        pod.wait_for("enrolment", PATIENCE, |view| view.redirection == Some(Redirection::Enabled)).await
    }

    /// Waits until a pod is out of the mesh.
    ///
    /// # Errors
    /// [`Error::Deadline`] after 20 s.
    pub async fn wait_unenrolled(&self, pod: &Pod) -> Result<()> {
        pod.wait_for("leaving the mesh", PATIENCE, |view| view.redirection.is_none()).await
    }

    /// Waits until a condition holds, asked every 10 ms.
    ///
    /// # Errors
    /// [`Error::Deadline`] after `limit`.
    pub async fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        mut holds: impl AsyncFnMut() -> bool,
    ) -> Result<()> {
        let waiting = async {
            while !holds().await {
                tokio::time::sleep(POLL).await;
            }
        };
        let deadline = |_| Error::Deadline { what: what.to_owned(), after: limit, detail: None };
        tokio::time::timeout(limit, waiting).await.map_err(deadline)
    }

    /// All objects of the manifests, as they were written. What the cluster completes of them is in [`Cluster::directory`].
    #[must_use]
    pub fn manifests(&self) -> Vec<serde_json::Value> {
        let all = self.shared.objects.lock().all();
        all.into_values().map(|object| object.body).collect()
    }

    /// All objects of a kind, as they were written.
    #[must_use]
    pub fn objects(&self, kind: &str) -> Vec<serde_json::Value> {
        let all = self.shared.objects.lock().all();
        all.into_iter().filter(|(key, _)| key.kind == kind).map(|(_, object)| object.body).collect()
    }

    /// Ready pods behind a service, with the port that its port leads to.
    #[must_use]
    pub fn backends(&self, namespace: &str, service: &str, port: Option<u16>) -> Vec<(Pod, u16)> {
        self.backends_of("TCP", namespace, service, port)
    }

    /// The same for a port of this protocol, `TCP` or `UDP`.
    #[must_use]
    pub fn backends_of(
        &self,
        protocol: &str,
        namespace: &str,
        service: &str,
        port: Option<u16>,
    ) -> Vec<(Pod, u16)> {
        let file = self.shared.directory.join("objects").join(format!("Service_{namespace}_{service}.json"));
        let text = std::fs::read(file).unwrap_or_default();
        let Ok(object) = serde_json::from_slice::<k8s_openapi::api::core::v1::Service>(&text) else {
            return Vec::new();
        };
        let pods = self.shared.pods();
        let backends: Vec<_> = pods.iter().map(publish::backend).collect();
        let views = crate::services::views(std::slice::from_ref(&object), &[], &backends);
        let ports = views.iter().flat_map(|view| &view.ports);
        let mut ports = ports.into_iter().filter(|view| view.protocol == protocol);
        let chosen = ports.find(|view| port.is_none_or(|port| view.port == port));
        let targets = chosen.map(|port| port.targets.clone()).unwrap_or_default();
        let pod_at = |ip: IpAddr| pods.iter().find(|pod| pod.inner.addresses.contains(ip)).cloned();
        let v4 = targets.iter().filter(|target| target.is_ipv4());
        v4.filter_map(|target| Some((pod_at(target.ip())?, target.port()))).collect()
    }

    /// Faults of manifests and objects, one sentence each.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.shared.objects.lock().problems();
        let of_objects = self.shared.problems.lock();
        problems.extend(of_objects.iter().map(|(object, problem)| {
            if problem.contains(object) { problem.clone() } else { format!("{object}: {problem}") }
        }));
        problems
    }

    /// Parts of the manifests that have no effect in a local cluster, one sentence each.
    #[must_use]
    pub fn ignored(&self) -> Vec<String> {
        let nodes: Vec<String> = self.shared.nodes.iter().map(|node| node.name.clone()).collect();
        ignored::ignored(&self.shared.objects.lock().all(), &nodes)
    }

    /// Ends everything: pods' programs with SIGTERM and their grace period (at most 5 s here), then the mesh.
    pub async fn shutdown(mut self) {
        // Must be first; otherwise the controller replaces the ended pods.
        self.tasks.shutdown().await;
        let pods = self.shared.pods();
        for pod in &pods {
            pod.inner.stop.send_replace(Some(Duration::from_secs(5)));
        }
        let gone = pods.iter().map(|pod| pod.wait_for("its end", PATIENCE, |view| view.gone));
        for ended in futures_util::future::join_all(gone).await {
            if let Err(error) = ended {
                tracing::warn!(%error, "a pod is killed with the cluster");
            }
        }
        drop(self);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.tasks.abort_all();
        // The tasks of pods hold the shared state, so it is dropped only after they have ended.
        for pod in self.shared.pods() {
            pod.inner.stop.send_replace(Some(Duration::ZERO));
        }
        for node in &self.shared.nodes {
            node.ztunnels.lock().clear();
        }
    }
}
