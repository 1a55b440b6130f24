//! Watches of the API server that keep the index as it is there: this node's pods, metadata of namespaces, and
//! RuntimeClasses.

use std::collections::HashSet;
use std::pin::pin;

use ambit_runtime::tasks::Tasks;
use ambit_telemetry::{Counter, ReadinessTask, Registry};
use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use tokio::sync::watch;

use super::index::{Index, Metadata, PodObject, Source};

/// How objects of one kind get into the index and out of it.
struct Kind<K> {
    /// The name in logs.
    name: &'static str,
    /// The key in the index.
    key: fn(&K) -> Option<String>,
    apply: fn(&mut Index, K),
    delete: fn(&mut Index, &str),
    retain: fn(&mut Index, &HashSet<String>),
}

/// Starts the watches. The receivers turn true when the first list of each is in the index.
pub fn start(
    client: &Client,
    node: &str,
    source: &Source,
    registry: &Registry,
    readiness: impl Fn(&str) -> ReadinessTask,
    tasks: &mut Tasks,
) -> Vec<watch::Receiver<bool>> {
    let errors = registry.counter("ambit_node_watch_errors", "Errors of watches of the API server");
    let on_node = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let every = watcher::Config::default;
    let pods = watcher(Api::<Pod>::all(client.clone()), on_node);
    let namespaces = watcher(Api::<PartialObjectMeta<Namespace>>::all(client.clone()), every());
    let runtimes = watcher(Api::<RuntimeClass>::all(client.clone()), every());
    let mut listed = Vec::new();
    let mut list = |name: &'static str| {
        let (sender, receiver) = watch::channel(false);
        listed.push(receiver);
        (sender, readiness(name), errors.clone())
    };
    let progress = list(PODS.name);
    tasks.spawn("watch of pods", follow(pods, PODS, source.clone(), progress));
    let progress = list(NAMESPACES.name);
    tasks.spawn("watch of namespaces", follow(namespaces, NAMESPACES, source.clone(), progress));
    let progress = list(RUNTIMES.name);
    tasks.spawn("watch of RuntimeClasses", follow(runtimes, RUNTIMES, source.clone(), progress));
    listed
}

const PODS: Kind<Pod> = Kind {
    name: "pods",
    key: |pod| pod.metadata.uid.clone(),
    apply: |index, pod| match PodObject::try_from(&pod) {
        Ok(pod) => index.apply_pod(pod),
        Err(reason) => tracing::warn!(name = ?pod.metadata.name, reason, "pod passed over"),
    },
    delete: Index::delete_pod,
    retain: Index::retain_pods,
};

const NAMESPACES: Kind<PartialObjectMeta<Namespace>> = Kind {
    name: "namespaces",
    key: |namespace| namespace.metadata.name.clone(),
    apply: |index, namespace| {
        let name = namespace.metadata.name.clone().unwrap_or_default();
        index.apply_namespace(name, Metadata::from(namespace.metadata));
    },
    delete: Index::delete_namespace,
    retain: Index::retain_namespaces,
};

const RUNTIMES: Kind<RuntimeClass> = Kind {
    name: "RuntimeClasses",
    key: |class| class.metadata.name.clone(),
    apply: |index, class| index.apply_runtime(class.metadata.name.unwrap_or_default(), class.handler),
    delete: Index::delete_runtime,
    retain: Index::retain_runtimes,
};

/// Follows one watch for ever; errors are tried again with growing pauses.
async fn follow<K>(
    events: impl Stream<Item = Result<Event<K>, watcher::Error>>,
    kind: Kind<K>,
    source: Source,
    (listed, first_list, errors): (watch::Sender<bool>, ReadinessTask, Counter),
) {
    let mut events = pin!(events.default_backoff());
    let mut relisted = HashSet::new();
    let mut first_list = Some(first_list);
    let apply = |object: K| source.change(|index| (kind.apply)(index, object));
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Apply(object)) => apply(object),
            Ok(Event::Delete(object)) => {
                if let Some(key) = (kind.key)(&object) {
                    source.change(|index| (kind.delete)(index, &key));
                }
            }
            Ok(Event::Init) => relisted.clear(),
            Ok(Event::InitApply(object)) => {
                relisted.extend((kind.key)(&object));
                apply(object);
            }
            Ok(Event::InitDone) => {
                // Deletions that happened while there was no watch.
                source.change(|index| (kind.retain)(index, &relisted));
                relisted.clear();
                listed.send_replace(true);
                if let Some(task) = first_list.take() {
                    task.done();
                }
            }
            Err(error) => {
                errors.inc();
                tracing::warn!(kind = kind.name, %error, "the API server's watch failed; it is tried again");
            }
        }
    }
}
