//! The watch of one kind: found, listed, followed, and begun anew.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use kube::core::{ApiResource, GroupVersionKind, PartialObjectMeta};
use kube::runtime::watcher::{self, Config, watcher};
use kube::{Api, Client};
use tokio::sync::mpsc;

use super::Pending;
use super::discovery::{self, Served};
use super::known::{Effect, KnownObjects};
use super::raw::RawObject;
use crate::api_server::{Backoff, code, describe};
use crate::kind::{Kind, KindInfo, Needed};
use crate::source::{Event, SourceMetrics};

/// Events that are taken together when they wait.
const TOGETHER: usize = 256;

/// How long one watch lasts, seconds. The watcher starts the next one itself when nothing arrives for that long, so a dead
/// connection is noticed by then.
const WATCH_SECONDS: u32 = 60;

type Events = BoxStream<'static, watcher::Result<watcher::Event<RawObject>>>;

/// Watches one kind.
pub(super) struct KindWatch {
    kind: Kind,
    client: Client,
    out: mpsc::Sender<Event>,
    metrics: Arc<SourceMetrics>,
    /// Sent once, when everything that is there at the start was sent.
    pending: Option<Arc<Pending>>,
    known: KnownObjects,
    /// Lists as part of the watch (Kubernetes 1.34 and later), until the server refuses that.
    lists_by_watch: bool,
    /// Whether the list of now is complete.
    is_listed: bool,
    /// What the kind contributes to the gauges.
    counted: Counted,
    backoff: Backoff,
    last_error: Option<String>,
}

/// A kind's part of the gauges that all kinds share.
#[derive(Debug, Default)]
struct Counted {
    objects: usize,
    problems: usize,
}

impl Counted {
    fn set(&mut self, metrics: &SourceMetrics, known: &KnownObjects) {
        let replace = |gauge: &AtomicU64, old: &mut usize, new: usize| {
            gauge.fetch_add(new as u64, Ordering::Relaxed);
            gauge.fetch_sub(std::mem::replace(old, new) as u64, Ordering::Relaxed);
        };
        replace(&metrics.objects, &mut self.objects, known.len());
        replace(&metrics.problems, &mut self.problems, known.faults());
    }
}

/// Why following ended.
enum Ended {
    /// The server does not know the kind, or not in this version.
    NotServed,
    /// The server cannot list by a watch.
    NoStreamingLists,
    /// Nobody receives.
    NoReceiver,
}

impl KindWatch {
    pub(super) fn new(
        kind: Kind,
        client: Client,
        out: mpsc::Sender<Event>,
        metrics: Arc<SourceMetrics>,
        pending: Arc<Pending>,
    ) -> Self {
        Self {
            kind,
            client,
            out,
            metrics,
            pending: Some(pending),
            known: KnownObjects::new(kind),
            lists_by_watch: true,
            is_listed: false,
            counted: Counted::default(),
            backoff: Backoff::default(),
            last_error: None,
        }
    }

    /// Runs until nobody receives.
    pub(super) async fn run(mut self) {
        let mut was_absent = false;
        while !self.out.is_closed() {
            let version = match discovery::find(&self.client, self.kind, self.known.len() > 0).await {
                Served::In(version) => version,
                Served::Absent => {
                    if !was_absent {
                        tracing::info!(kind = %self.kind, "the kind is not installed; waiting for its definition");
                    }
                    was_absent = true;
                    let gone = self.known.clear();
                    if !self.take(gone).await {
                        return;
                    }
                    self.synced().await;
                    tokio::time::sleep(discovery::LOOK).await;
                    continue;
                }
            };
            if std::mem::take(&mut was_absent) {
                tracing::info!(kind = %self.kind, version, "the kind is installed now");
            }
            match self.follow(version).await {
                Ended::NoReceiver => return,
                Ended::NoStreamingLists => self.lists_by_watch = false,
                Ended::NotServed => tokio::time::sleep(self.backoff.pause()).await,
            }
        }
    }

    /// Follows the kind in one version. Errors are waited out.
    async fn follow(&mut self, version: &'static str) -> Ended {
        let mut events =
            events(&self.client, &self.kind.info(), version, self.lists_by_watch).ready_chunks(TOGETHER);
        while let Some(chunk) = events.next().await {
            let (mut effect, mut is_listed, mut failure) = (Effect::default(), false, None);
            for event in chunk {
                match event {
                    Ok(event) => {
                        is_listed |= matches!(event, watcher::Event::InitDone);
                        let Effect { changes, new_faults } = self.handle_event(&event);
                        effect.changes.extend(changes);
                        effect.new_faults.extend(new_faults);
                        if is_progress(&event) {
                            self.metrics.last_events.note(self.kind);
                            self.backoff.reset();
                            self.last_error = None;
                        }
                    }
                    Err(error) => failure = Some(error),
                }
            }
            if !self.take(effect).await {
                return Ended::NoReceiver;
            }
            if is_listed {
                self.synced().await;
            }
            if let Some(error) = failure {
                if let Some(ended) = self.judge(&error) {
                    return ended;
                }
                tokio::time::sleep(self.backoff.pause()).await;
            }
        }
        // A watcher never ends by itself; if it did, the kind would be looked for again.
        Ended::NotServed
    }

    fn handle_event(&mut self, event: &watcher::Event<RawObject>) -> Effect {
        match event {
            watcher::Event::Init => {
                self.is_listed = false;
                self.known.begin_list();
                SourceMetrics::add(&self.metrics.scans, 1);
                Effect::default()
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => self.known.apply(object),
            watcher::Event::InitDone => {
                self.is_listed = true;
                self.known.end_list()
            }
            watcher::Event::Delete(object) => self.known.delete(object),
        }
    }

    /// Counts and reports an error, and says whether following must end for it.
    fn judge(&mut self, error: &watcher::Error) -> Option<Ended> {
        let status = match error {
            watcher::Error::InitialListFailed(error)
            | watcher::Error::WatchStartFailed(error)
            | watcher::Error::WatchFailed(error) => code(error),
            watcher::Error::WatchError(status) => Some(status.code),
            watcher::Error::NoResourceVersion => None,
        };
        match status {
            Some(404) => return Some(Ended::NotServed),
            // Servers before 1.34 refuse to list by a watch (422), those over an older etcd break it off (500).
            Some(400 | 422 | 500) if self.lists_by_watch && !self.is_listed => {
                return Some(Ended::NoStreamingLists);
            }
            // The history that the watch was at is gone: it lists anew.
            Some(410) => return None,
            _ => {}
        }
        SourceMetrics::add(&self.metrics.watch_failures, 1);
        let text = match error {
            watcher::Error::InitialListFailed(error)
            | watcher::Error::WatchStartFailed(error)
            | watcher::Error::WatchFailed(error) => describe(error),
            error => error.to_string(),
        };
        if self.last_error.as_ref() != Some(&text) {
            tracing::warn!(kind = %self.kind, error = text, "watch failed; what is known stays, and it is tried again");
            self.last_error = Some(text);
        }
        None
    }

    /// Sends changes and reports faults; `false` when nobody receives.
    async fn take(&mut self, effect: Effect) -> bool {
        let Effect { changes, new_faults } = effect;
        SourceMetrics::add(&self.metrics.reads, changes.len());
        SourceMetrics::add(&self.metrics.malformed, new_faults.len());
        for (object, fault) in &new_faults {
            tracing::error!(%object, field = fault.field.as_deref(), "object cannot be taken: {}", fault.message);
        }
        self.counted.set(&self.metrics, &self.known);
        changes.is_empty() || self.out.send(Event::Changes(changes)).await.is_ok()
    }

    async fn synced(&mut self) {
        if let Some(pending) = self.pending.take() {
            pending.kind_synced().await;
        }
    }
}

/// Whether an event shows that the watch works. Every attempt begins with `Init`, also one whose list then fails.
fn is_progress<T>(event: &watcher::Event<T>) -> bool {
    match event {
        watcher::Event::Apply(_) | watcher::Event::Delete(_) | watcher::Event::InitDone => true,
        watcher::Event::Init | watcher::Event::InitApply(_) => false,
    }
}

/// The events of a kind in one version.
fn events(client: &Client, info: &KindInfo, version: &str, lists_by_watch: bool) -> Events {
    let gvk = GroupVersionKind::gvk(info.group, version, info.name);
    let resource = ApiResource::from_gvk_with_plural(&gvk, info.plural);
    let config = Config::default().timeout(WATCH_SECONDS);
    let config = match info.field_selector() {
        Some(selector) => config.fields(selector),
        None => config,
    };
    let config = if lists_by_watch { config.streaming_lists() } else { config };
    match info.needed {
        Needed::Everything => watcher(Api::<RawObject>::all_with(client.clone(), &resource), config).boxed(),
        Needed::Metadata => {
            let api = Api::<PartialObjectMeta<RawObject>>::all_with(client.clone(), &resource);
            watcher(api, config).map_ok(whole).boxed()
        }
    }
}

fn whole<T: Into<RawObject>>(event: watcher::Event<T>) -> watcher::Event<RawObject> {
    match event {
        watcher::Event::Apply(object) => watcher::Event::Apply(object.into()),
        watcher::Event::Delete(object) => watcher::Event::Delete(object.into()),
        watcher::Event::Init => watcher::Event::Init,
        watcher::Event::InitApply(object) => watcher::Event::InitApply(object.into()),
        watcher::Event::InitDone => watcher::Event::InitDone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_only_began_is_no_progress() {
        assert!(!is_progress(&watcher::Event::<()>::Init));
        assert!(!is_progress(&watcher::Event::InitApply(())));
        assert!(is_progress(&watcher::Event::<()>::InitDone));
        assert!(is_progress(&watcher::Event::Apply(())));
        assert!(is_progress(&watcher::Event::Delete(())));
    }
}
