//! The thread of the index: changes of a source in, what they come to out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::{mpsc, oneshot, watch};

use crate::index::{Changes, FetchedKeys, Finding, Index, ResourceType, SessionSecret, Settings};
use crate::keys::Wanted;
use crate::kind::Kind;
use crate::object::{Change, KeyAddress, ObjectRef};
use crate::observe::{Findings, IndexMetrics};
use crate::serve::live_pods::LivePods;
use crate::serve::publish::Published;
use crate::source::Event;
use crate::write::queue::StatusQueue;
use crate::write::roots::Namespaces;
use crate::write::status;

/// Batches of a source that are taken together when they wait.
const TOGETHER: usize = 64;

/// What the index is given.
pub(super) enum Input {
    /// What a source reports.
    Source(Event),
    /// What became of fetching keys.
    Keys(KeyAddress, FetchedKeys),
    /// What keys of sessions are derived from.
    SessionSecret(SessionSecret),
}

/// The index and where its results go; runs on a thread of its own.
pub(super) struct IndexWorker {
    pub(super) published: Published,
    pub(super) live_pods: Arc<LivePods>,
    pub(super) metrics: Arc<IndexMetrics>,
    pub(super) findings: Findings,
    /// The namespaces that there are, for what is written to each.
    pub(super) namespaces: watch::Sender<Namespaces>,
    /// Objects whose status may have to be written.
    pub(super) statuses: Arc<StatusQueue>,
    /// Gateways of waypoints of which something changed.
    pub(super) waypoints: Arc<StatusQueue>,
    /// The keys of token issuers that are to be fetched.
    pub(super) wanted_keys: watch::Sender<Wanted>,
    /// How many of these nobody has tried to fetch yet.
    pub(super) unasked_keys: watch::Sender<usize>,
    pub(super) ready: Option<oneshot::Sender<()>>,
    /// Whether everything that the sources had at the start was taken.
    pub(super) synced: bool,
}

impl IndexWorker {
    pub(super) fn run(mut self, settings: Settings, mut inputs: mpsc::Receiver<Input>) {
        let mut index = Index::new(settings);
        self.apply(&mut index, Vec::new());
        let mut waiting = Vec::with_capacity(TOGETHER);
        while inputs.blocking_recv_many(&mut waiting, TOGETHER) > 0 {
            let mut changes: Vec<Change> = Vec::new();
            let mut is_synced = false;
            for event in waiting.drain(..) {
                match event {
                    Input::Source(Event::Changes(more)) => changes.extend(more),
                    Input::Source(Event::Synced) => is_synced = true,
                    Input::Keys(address, keys) => index.set_keys(address, keys),
                    Input::SessionSecret(secret) => index.set_session_secret(secret),
                }
            }
            self.note_namespaces(&changes);
            let (touched, parts) = (statuses_of(&changes), parts_of_waypoints(&changes));
            // One whose class changes is looked at too: what was made for it goes.
            let were: Vec<bool> = parts.iter().map(|gateway| index.runs_gateway(&gateway.name)).collect();
            self.apply(&mut index, changes);
            self.want_keys(&mut index);
            // After the findings, so that whoever looks at the object finds those of now.
            self.statuses.push(touched);
            let waypoints = parts
                .into_iter()
                .zip(were)
                .filter(|(gateway, was)| *was || index.runs_gateway(&gateway.name));
            self.waypoints.push(waypoints.map(|(gateway, _)| gateway));
            if is_synced && !self.synced {
                self.synced = true;
                self.report(index.findings().clone());
            }
            if let Some(ready) = self.ready.take_if(|_| is_synced) {
                // Nobody waits any more only when the program ends.
                ready.send(()).unwrap_or_default();
            }
        }
    }

    fn want_keys(&self, index: &mut Index) {
        let wanted = index.want_keys();
        let unasked = wanted.keys().filter(|address| !index.has_asked_for_keys(address)).count();
        self.unasked_keys.send_replace(unasked);
        self.wanted_keys.send_if_modified(|known| {
            let differs = *known != wanted;
            *known = wanted;
            differs
        });
    }

    fn note_namespaces(&self, changes: &[Change]) {
        let of_namespaces = changes.iter().filter(|change| change.kind() == Kind::Namespace);
        let of_namespaces: Vec<&Change> = of_namespaces.collect();
        if of_namespaces.is_empty() {
            return;
        }
        self.namespaces.send_modify(|namespaces| {
            let namespaces = Arc::make_mut(namespaces);
            for change in of_namespaces {
                let name = change.reference().name.name;
                match change {
                    Change::Apply(_) => namespaces.insert(name),
                    Change::Delete(_) => namespaces.remove(&name),
                };
            }
        });
    }

    fn apply(&self, index: &mut Index, changes: Vec<Change>) {
        let started = Instant::now();
        let before = index.computed();
        let Changes {
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
        } = index.apply(changes);
        // A proxy that learns of a pod may ask for its certificate at once.
        self.live_pods.apply(placements);
        self.published.publish([
            (ResourceType::Authorization, policies),
            (ResourceType::Address, addresses),
            (ResourceType::Gateway, gateways),
            (ResourceType::Policy, waypoint_policies),
            (ResourceType::BackendPolicy, backend_policies),
            (ResourceType::KeyPair, key_pairs),
            (ResourceType::Listener, listeners),
            (ResourceType::Route, routes),
            (ResourceType::StreamRoute, stream_routes),
        ]);
        // Before everything that is there was read, an object that another depends on may only be late.
        if self.synced {
            self.report(findings);
        }
        self.metrics.batches.fetch_add(1, Ordering::Relaxed);
        self.metrics.computed.fetch_add(index.computed() - before, Ordering::Relaxed);
        let micros = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.metrics.micros.fetch_add(micros, Ordering::Relaxed);
    }

    fn report(&self, changed: impl IntoIterator<Item = (ObjectRef, Vec<Finding>)>) {
        let changed: Vec<_> = changed.into_iter().collect();
        let objects: Vec<ObjectRef> = changed.iter().map(|(object, _)| object.clone()).collect();
        let mut all = self.findings.lock();
        for (object, findings) in changed {
            for finding in findings.iter().filter(|f| !f.met) {
                let Finding { condition, reason, message, parent, controller, .. } = finding;
                let parent = parent.as_ref().map(tracing::field::display);
                tracing::warn!(%object, condition, reason, parent, controller, "{message}");
            }
            match findings.is_empty() {
                true => all.remove(&object),
                false => all.insert(object, findings),
            };
        }
        drop(all);
        let of_gateways = |object: &&ObjectRef| matches!(object.kind, Kind::Gateway | Kind::ListenerSet);
        self.waypoints.push(objects.iter().filter(of_gateways).cloned());
        self.statuses.push(objects.into_iter().filter(|object| status::KINDS.contains(&object.kind)));
    }
}

/// The objects among those that changed whose status may have to be written: their generation may have changed.
fn statuses_of(changes: &[Change]) -> Vec<ObjectRef> {
    let has_status = |change: &&Change| status::KINDS.contains(&change.kind());
    changes.iter().filter(has_status).map(Change::reference).collect()
}

/// The Gateways whose deployment may have to be looked at, if they are waypoints: those that changed, and those of whose
/// name something changed that a waypoint consists of; and the ListenerSets that changed.
fn parts_of_waypoints(changes: &[Change]) -> Vec<ObjectRef> {
    let is_part = |change: &&Change| {
        matches!(change.kind(), Kind::Gateway | Kind::Service | Kind::ServiceAccount | Kind::Deployment)
    };
    let parts = changes.iter().filter(is_part);
    let gateways = parts.map(|change| ObjectRef { kind: Kind::Gateway, name: change.reference().name });
    let sets = changes.iter().filter(|change| change.kind() == Kind::ListenerSet).map(Change::reference);
    gateways.chain(sets).collect()
}
