//! The CA's roots in every namespace: ConfigMap `istio-ca-root-cert` (certificate contract).
//!
//! Only the holder of the lease writes. It watches the ConfigMaps of that name, so what others change or delete is put
//! right, and what is right is not written again. One that another controller keeps changing back is written ever more seldom.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ambit_ca::Authority;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher::{self, Config, watcher};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use super::WriteMetrics;
use super::write_backoff::WriteBackoff;
use crate::api_server::{Backoff, FIELD_MANAGER, call};

/// Name of the ConfigMap.
pub const CONFIG_MAP: &str = "istio-ca-root-cert";
/// Its key.
pub const KEY: &str = "root-cert.pem";
/// Writes at the same time.
const CONCURRENT: usize = 8;
/// Writes before the world is looked at again.
const ROUND: usize = 256;

/// The namespaces that there are.
pub type Namespaces = Arc<BTreeSet<Arc<str>>>;

/// Writes the roots.
pub(crate) struct RootsWriter {
    pub(crate) client: Client,
    pub(crate) authority: Authority,
    pub(crate) namespaces: watch::Receiver<Namespaces>,
    pub(crate) metrics: Arc<WriteMetrics>,
}

/// What each namespace has: the text of the ConfigMap's key, empty where it lacks the key.
type Present = BTreeMap<Arc<str>, String>;

/// Namespaces whose ConfigMap must be written.
fn plan(roots: &str, namespaces: &BTreeSet<Arc<str>>, present: &Present) -> Vec<Arc<str>> {
    let is_right = |namespace: &Arc<str>| present.get(namespace).is_some_and(|text| text == roots);
    namespaces.iter().filter(|namespace| !is_right(namespace)).cloned().collect()
}

/// Namespaces that could not be written: each waits by itself, so that none holds up another.
#[derive(Debug, Default)]
struct Failures(BTreeMap<Arc<str>, (Backoff, Instant)>);

impl Failures {
    fn add(&mut self, namespace: Arc<str>) {
        let now = Instant::now();
        let (backoff, at) = self.0.entry(namespace).or_insert_with(|| (Backoff::default(), now));
        *at = now + backoff.pause();
    }

    fn remove(&mut self, namespace: &Arc<str>) {
        self.0.remove(namespace);
    }

    /// Forgets those that need not be written any more. `wrong` is sorted.
    fn retain(&mut self, wrong: &[Arc<str>]) {
        self.0.retain(|namespace, _| wrong.binary_search(namespace).is_ok());
    }

    fn may_be_tried(&self, namespace: &Arc<str>, now: Instant) -> bool {
        self.0.get(namespace).is_none_or(|(_, at)| *at <= now)
    }

    /// When the first of them is tried again.
    fn next(&self) -> Option<Instant> {
        self.0.values().map(|(_, at)| *at).min()
    }
}

impl RootsWriter {
    /// Writes while `leads` is true; ends with its sender.
    pub(crate) async fn run(mut self, mut leads: watch::Receiver<bool>) {
        while leads.wait_for(|leads| *leads).await.is_ok() {
            let mut lost = leads.clone();
            tokio::select! {
                () = self.run_as_leader() => {}
                _ = lost.wait_for(|leads| !*leads) => {}
            }
        }
    }

    async fn run_as_leader(&mut self) {
        let mut events = config_maps(&self.client);
        let mut roots_changed = self.authority.subscribe();
        let (mut present, mut is_listed, mut backoff) = (Present::new(), false, Backoff::default());
        let (mut failures, mut next_round) = (Failures::default(), None);
        let mut write_backoff = WriteBackoff::new(self.metrics.backoffs.clone());
        loop {
            let due = async {
                match next_round {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        is_listed = handle_event(&mut present, event, is_listed);
                        if is_listed {
                            backoff.reset();
                        }
                    }
                    Some(Err(error)) => {
                        tracing::warn!(%error, "ConfigMaps of the roots cannot be watched");
                        tokio::time::sleep(backoff.pause()).await;
                    }
                    None => return,
                },
                changed = roots_changed.changed() => if changed.is_err() { return },
                changed = self.namespaces.changed() => if changed.is_err() { return },
                () = due => next_round = None,
            }
            if !is_listed {
                continue;
            }
            let roots = self.authority.roots_pem();
            let namespaces = self.namespaces.borrow_and_update().clone();
            let mut wrong = plan(&roots, &namespaces, &present);
            failures.retain(&wrong);
            let now = Instant::now();
            // Those that are right again need not be looked at.
            write_backoff.take_due(now);
            wrong.retain(|namespace| {
                failures.may_be_tried(namespace, now) && write_backoff.admits(namespace, now)
            });
            let is_more = wrong.len() > ROUND;
            for namespace in self.write(wrong, &roots, &mut present, &mut failures).await {
                write_backoff.wrote(&namespace, Instant::now());
            }
            let later = failures.next().into_iter().chain(write_backoff.next()).min();
            next_round = if is_more { Some(Instant::now()) } else { later };
        }
    }

    /// Writes the ConfigMaps of some namespaces, and notes those that must be tried again; returns those that were written.
    async fn write(
        &self,
        namespaces: Vec<Arc<str>>,
        roots: &Arc<str>,
        present: &mut Present,
        failures: &mut Failures,
    ) -> Vec<Arc<str>> {
        let writes = namespaces.into_iter().take(ROUND).map(|namespace| async {
            let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &namespace);
            let parameters = PatchParams::apply(FIELD_MANAGER).force();
            let outcome = call(api.patch(CONFIG_MAP, &parameters, &Patch::Apply(manifest(roots)))).await;
            (namespace, outcome)
        });
        let outcomes: Vec<_> = stream::iter(writes).buffer_unordered(CONCURRENT).collect().await;
        let mut written = Vec::new();
        for (namespace, outcome) in outcomes {
            match outcome {
                Ok(_) => {
                    self.metrics.written.fetch_add(1, Ordering::Relaxed);
                    failures.remove(&namespace);
                    present.insert(namespace.clone(), roots.to_string());
                    written.push(namespace);
                }
                // It is being deleted, or is gone: the watch of namespaces says so soon.
                Err(error) if error.is_not_found() || is_terminating(&error.to_string()) => {
                    failures.add(namespace);
                }
                Err(error) => {
                    self.metrics.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%namespace, %error, "roots not written to the namespace");
                    failures.add(namespace);
                }
            }
        }
        written
    }
}

/// The API server's word for a namespace that takes nothing new.
fn is_terminating(message: &str) -> bool {
    message.contains("being terminated")
}

fn config_maps(client: &Client) -> BoxStream<'static, watcher::Result<watcher::Event<ConfigMap>>> {
    let named = Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    watcher(Api::<ConfigMap>::all(client.clone()), named).boxed()
}

/// Takes an event; says whether a list was completed by now.
fn handle_event(present: &mut Present, event: watcher::Event<ConfigMap>, is_listed: bool) -> bool {
    let name = |map: &ConfigMap| map.metadata.namespace.as_deref().map(Arc::from);
    match event {
        watcher::Event::Init => {
            present.clear();
            return false;
        }
        watcher::Event::InitDone => return true,
        watcher::Event::InitApply(map) | watcher::Event::Apply(map) => {
            if let Some(namespace) = name(&map) {
                let text = map.data.and_then(|mut data| data.remove(KEY)).unwrap_or_default();
                present.insert(namespace, text);
            }
        }
        watcher::Event::Delete(map) => {
            if let Some(namespace) = name(&map) {
                present.remove::<Arc<str>>(&namespace);
            }
        }
    }
    is_listed
}

fn manifest(roots: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": CONFIG_MAP,
            "labels": { "istio.io/config": "true", "app.kubernetes.io/managed-by": FIELD_MANAGER },
        },
        "data": { KEY: roots },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_namespace_that_fails_waits_alone() {
        let (bad, good): (Arc<str>, Arc<str>) = ("bad".into(), "good".into());
        let mut failures = Failures::default();
        failures.add(bad.clone());
        let now = Instant::now();
        assert!(!failures.may_be_tried(&bad, now) && failures.may_be_tried(&good, now));
        let first = failures.next().unwrap();
        assert!(failures.may_be_tried(&bad, first));
        tokio::time::advance(first - now).await;
        failures.add(bad.clone());
        failures.add(bad.clone());
        assert!(failures.next().unwrap() - Instant::now() > first - now, "the pause grows");
        failures.retain(&[good]);
        assert_eq!(failures.next(), None);
    }

    #[test]
    fn namespaces_without_the_roots_of_now_are_written() {
        let namespaces = ["a", "b", "c"].map(Arc::from).into();
        let present = [("a", "old"), ("b", "new"), ("gone", "old")];
        let present = present.map(|(namespace, text)| (Arc::from(namespace), text.to_owned())).into();
        assert_eq!(plan("new", &namespaces, &present), [Arc::from("a"), Arc::from("c")]);
    }
}
