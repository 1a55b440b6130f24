//! What is known of this node's pods, and the decision about each. Pure but for the lock of [`Source`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::enrol::{self, Decision, REDIRECTION, Reason, Settings, enrolled};
use crate::redirect::Options;
use crate::{PodSpec, PodStatus};

/// How long a pod that the CNI plugin reported may be missing from the list of pods.
const UNLISTED: Duration = Duration::from_secs(300);

/// How long a namespace that was looked up counts more than an older one of the watch. The watch is expected to catch up
/// sooner; after a restore of etcd, newer objects have lower versions.
const LOOKED_UP: Duration = Duration::from_secs(300);

/// Labels and annotations of a namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its resourceVersion; none if that is no number, and cannot be compared.
    pub version: Option<u64>,
}

impl From<ObjectMeta> for Metadata {
    fn from(object: ObjectMeta) -> Self {
        Self {
            labels: object.labels.unwrap_or_default(),
            annotations: object.annotations.unwrap_or_default(),
            version: object.resource_version.and_then(|version| version.parse().ok()),
        }
    }
}

/// What the agent needs of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodObject {
    /// Its uid.
    pub uid: String,
    /// The uid under which kubelet runs it, if it is a static pod: the object that mirrors it has another.
    pub runtime_uid: Option<String>,
    /// Its name.
    pub name: String,
    /// Its service account.
    pub service_account: String,
    /// Its addresses; none until its sandbox has them, and none of a pod that is ending: its sandbox may be gone.
    pub ips: Vec<IpAddr>,
    /// The name of its RuntimeClass.
    pub runtime_class: Option<String>,
    /// Whether all its containers have ended for good.
    pub is_finished: bool,
    /// What the decision depends on. The namespace's annotations and the runtime's handler are not filled in.
    pub traits: enrol::Pod,
}

impl TryFrom<&Pod> for PodObject {
    type Error = &'static str;

    fn try_from(pod: &Pod) -> Result<Self, Self::Error> {
        /// Annotation: the uid of the static pod.
        const STATIC_UID: &str = "kubernetes.io/config.hash";
        let uid = pod.metadata.uid.clone().ok_or("it has no uid")?;
        let name = pod.metadata.name.clone().ok_or("it has no name")?;
        let namespace = pod.metadata.namespace.clone().ok_or("it has no namespace")?;
        let spec = pod.spec.as_ref().ok_or("it has no spec")?;
        let annotations = pod.metadata.annotations.clone().unwrap_or_default();
        let status = pod.status.as_ref();
        let phase = status.and_then(|status| status.phase.as_deref());
        let is_ending = pod.metadata.deletion_timestamp.is_some();
        let ips =
            status.and_then(|status| status.pod_ips.as_deref()).filter(|_| !is_ending).unwrap_or_default();
        Ok(Self {
            runtime_uid: annotations.get(enrol::MIRROR).and_then(|_| annotations.get(STATIC_UID)).cloned(),
            uid,
            name,
            service_account: spec.service_account_name.clone().unwrap_or_else(|| "default".into()),
            ips: ips.iter().filter_map(|ip| ip.ip.parse().ok()).collect(),
            runtime_class: spec.runtime_class_name.clone(),
            is_finished: matches!(phase, Some("Succeeded" | "Failed")),
            traits: enrol::Pod {
                namespace,
                labels: pod.metadata.labels.clone().unwrap_or_default(),
                annotations,
                host_network: spec.host_network == Some(true),
                ..enrol::Pod::default()
            },
        })
    }
}

/// A pod that is to be enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedPod {
    /// Its uid.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Its addresses; none if it has not started, or nothing is known of it but that it stays as it is.
    pub ips: Vec<IpAddr>,
    /// Its capture options.
    pub options: Options,
}

impl WantedPod {
    /// For the agent, which finds the namespace by itself.
    pub fn spec(&self) -> PodSpec {
        let Self { uid, name, namespace, service_account, ips, options } = self.clone();
        PodSpec {
            uid,
            name,
            namespace,
            service_account,
            ips,
            netns: None,
            netns_path: None,
            sandbox: None,
            options,
        }
    }
}

/// The decision about a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is enrolled.
    In(WantedPod),
    /// It is not.
    Out(Reason),
}

/// Decides about a pod of which everything is known. A RuntimeClass that is not known is taken for its handler's name.
pub fn verdict(
    pod: &PodObject,
    namespace: &Metadata,
    handlers: &BTreeMap<String, String>,
    settings: &Settings,
) -> Verdict {
    let class = pod.runtime_class.as_ref();
    let traits = enrol::Pod {
        namespace_annotations: namespace.annotations.clone(),
        runtime_handler: class.map(|class| handlers.get(class).unwrap_or(class).clone()),
        ..pod.traits.clone()
    };
    match enrolled(&traits, &namespace.labels, settings) {
        Decision::Out(reason) => Verdict::Out(reason),
        Decision::In(options) => Verdict::In(WantedPod {
            uid: pod.uid.clone(),
            name: pod.name.clone(),
            namespace: traits.namespace,
            service_account: pod.service_account.clone(),
            ips: pod.ips.clone(),
            options,
        }),
    }
}

/// A pod's annotation that is to be written: `None` removes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotation {
    /// The pod's uid.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The value.
    pub value: Option<&'static str>,
}

/// The pods of this node, the namespaces of the cluster, and its runtimes.
#[derive(Debug)]
pub struct Index {
    settings: Settings,
    pods: HashMap<String, PodObject>,
    namespaces: HashMap<String, Metadata>,
    /// Namespaces that were looked up and that the watch still shows as they were before.
    looked_up: HashMap<String, (Metadata, Instant)>,
    handlers: BTreeMap<String, String>,
    /// Pods that the CNI plugin reported and that are not listed yet.
    unlisted: HashMap<String, Instant>,
}

impl Index {
    /// Empty.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            pods: HashMap::new(),
            namespaces: HashMap::new(),
            looked_up: HashMap::new(),
            handlers: BTreeMap::new(),
            unlisted: HashMap::new(),
        }
    }

    /// A pod is new or has changed.
    pub fn apply_pod(&mut self, pod: PodObject) {
        self.unlisted.remove(&pod.uid);
        self.pods.insert(pod.uid.clone(), pod);
    }

    /// A pod is gone.
    pub fn delete_pod(&mut self, uid: &str) {
        self.unlisted.remove(uid);
        self.pods.remove(uid);
    }

    /// Only these pods are left.
    pub fn retain_pods(&mut self, uids: &HashSet<String>) {
        self.pods.retain(|uid, _| uids.contains(uid));
    }

    /// A namespace is new or has changed.
    pub fn apply_namespace(&mut self, name: String, metadata: Metadata) {
        self.looked_up.retain(|known, (looked_up, _)| *known != name || metadata.version < looked_up.version);
        self.namespaces.insert(name, metadata);
    }

    /// A namespace was looked up. The answer counts until the watch shows the same version or a later one.
    pub fn look_up_namespace(&mut self, name: &str, metadata: Metadata, now: Instant) {
        let shown = self.namespaces.get(name).and_then(|shown| shown.version);
        if metadata.version > shown {
            self.looked_up.insert(name.into(), (metadata, now));
        }
    }

    fn namespace(&self, name: &str) -> Option<&Metadata> {
        self.looked_up.get(name).map(|(metadata, _)| metadata).or_else(|| self.namespaces.get(name))
    }

    /// A namespace is gone.
    pub fn delete_namespace(&mut self, name: &str) {
        self.looked_up.remove(name);
        self.namespaces.remove(name);
    }

    /// Only these namespaces are left.
    pub fn retain_namespaces(&mut self, names: &HashSet<String>) {
        self.namespaces.retain(|name, _| names.contains(name));
    }

    /// A RuntimeClass is new or has changed.
    pub fn apply_runtime(&mut self, class: String, handler: String) {
        self.handlers.insert(class, handler);
    }

    /// A RuntimeClass is gone.
    pub fn delete_runtime(&mut self, class: &str) {
        self.handlers.remove(class);
    }

    /// Only these RuntimeClasses are left.
    pub fn retain_runtimes(&mut self, classes: &HashSet<String>) {
        self.handlers.retain(|class, _| classes.contains(class));
    }

    /// The CNI plugin reported the pod at that time.
    pub fn announce(&mut self, uid: &str, now: Instant) {
        if !self.pods.contains_key(uid) {
            self.unlisted.insert(uid.into(), now);
        }
    }

    /// Decides about a pod that was looked up.
    pub fn verdict(&self, pod: &PodObject, namespace: &Metadata) -> Verdict {
        verdict(pod, namespace, &self.handlers, &self.settings)
    }

    /// The pods that are to be enrolled, by uid. A pod whose namespace is not known stays as it is.
    pub fn wanted(&mut self, now: Instant) -> BTreeMap<String, WantedPod> {
        self.unlisted.retain(|_, since| now.duration_since(*since) < UNLISTED);
        self.looked_up.retain(|_, (_, since)| now.duration_since(*since) < LOOKED_UP);
        let unlisted = self.unlisted.keys().map(|uid| unchanged(uid));
        let listed = self.pods.values().filter(|pod| !pod.is_finished).filter_map(|pod| {
            let Some(namespace) = self.namespace(&pod.traits.namespace) else {
                return Some(unchanged(&pod.uid));
            };
            match self.verdict(pod, namespace) {
                Verdict::In(wanted) => Some(wanted),
                Verdict::Out(_) => None,
            }
        });
        unlisted.chain(listed).map(|pod| (pod.uid.clone(), pod)).collect()
    }

    /// The pods that exist, have not finished and run outside the mesh, by the uid that the container runtime knows.
    pub fn outside(&self) -> HashSet<String> {
        let is_out = |pod: &&PodObject| {
            let namespace = self.namespace(&pod.traits.namespace);
            !pod.is_finished
                && namespace.is_some_and(|namespace| matches!(self.verdict(pod, namespace), Verdict::Out(_)))
        };
        let outside = self.pods.values().filter(is_out);
        outside.map(|pod| pod.runtime_uid.clone().unwrap_or_else(|| pod.uid.clone())).collect()
    }

    /// Whether the pod exists and has not finished.
    pub fn is_alive(&self, uid: &str) -> bool {
        self.unlisted.contains_key(uid) || self.pods.get(uid).is_some_and(|pod| !pod.is_finished)
    }

    /// The annotations that differ from what they should be.
    pub fn annotations(&self, statuses: &BTreeMap<String, PodStatus>) -> Vec<Annotation> {
        let differing = self.pods.values().filter(|pod| !pod.is_finished).filter_map(|pod| {
            let namespace = self.namespace(&pod.traits.namespace)?;
            let value = match (self.verdict(pod, namespace), statuses.get(&pod.uid)) {
                (Verdict::Out(reason), None) => reason.annotation(),
                (Verdict::In(_), None) => None,
                (_, Some(status)) => status.state.annotation(),
            };
            let present = pod.traits.annotations.get(REDIRECTION).map(String::as_str);
            let annotation = || Annotation {
                uid: pod.uid.clone(),
                namespace: pod.traits.namespace.clone(),
                name: pod.name.clone(),
                value,
            };
            (present != value).then(annotation)
        });
        differing.collect()
    }
}

/// A pod that stays as it is.
fn unchanged(uid: &str) -> WantedPod {
    WantedPod {
        uid: uid.into(),
        name: String::new(),
        namespace: String::new(),
        service_account: String::new(),
        ips: Vec::new(),
        options: Options::default(),
    }
}

/// The index, shared, with a notice of changes. The lock is held for the length of a look-up or a change.
#[derive(Debug, Clone)]
pub struct Source {
    index: Arc<Mutex<Index>>,
    changed: watch::Sender<u64>,
}

impl Source {
    /// An empty index.
    pub fn new(settings: Settings) -> Self {
        Self { index: Arc::new(Mutex::new(Index::new(settings))), changed: watch::Sender::new(0) }
    }

    /// Reads the index.
    pub fn with<T>(&self, read: impl FnOnce(&mut Index) -> T) -> T {
        read(&mut self.index.lock())
    }

    /// Changes the index and says so.
    pub fn change(&self, change: impl FnOnce(&mut Index)) {
        change(&mut self.index.lock());
        self.changed.send_modify(|count| *count += 1);
    }

    /// Changes from now on.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests;
