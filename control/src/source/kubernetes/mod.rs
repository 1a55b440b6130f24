//! A Kubernetes API server, watched live.
//!
//! One task a kind, by the table of [`crate::kind`]: it finds the version that is served, lists, watches, and begins anew
//! where the server says so. A kind that is not served has no objects, and is picked up when its definition appears. An
//! object that cannot be taken is reported and skipped. While the server is away everything stays as it was.

mod discovery;
mod known;
mod raw;
mod watch;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kube::Client;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Event, SourceMetrics};
use crate::api_server::CallError;
use crate::kind::{Kind, KindInfo};
use watch::KindWatch;

/// Batches that wait for the index; when there are more, watches wait.
const BATCHES: usize = 64;

/// Kinds that nothing but gateways needs.
pub(crate) const OF_GATEWAYS: [Kind; 3] = [Kind::Secret, Kind::IngressClass, Kind::Ingress];

/// A watched API server. Dropping this ends the watches.
#[derive(Debug)]
pub struct ApiServer {
    _watches: JoinSet<()>,
}

impl ApiServer {
    /// Watches every kind; those that only gateways need where there may be some, as the right to read them is given only then. Everything
    /// that is there is sent first, then [`Event::Synced`], then changes.
    pub fn watch(
        client: &Client,
        metrics: &Arc<SourceMetrics>,
        gateways: bool,
    ) -> (ApiServer, mpsc::Receiver<Event>) {
        let (out, changes) = mpsc::channel(BATCHES);
        let kinds: Vec<Kind> =
            Kind::ALL.into_iter().filter(|kind| gateways || !OF_GATEWAYS.contains(kind)).collect();
        let pending = Arc::new(Pending { kinds: AtomicUsize::new(kinds.len()), out: out.clone() });
        let mut watches = JoinSet::new();
        for kind in kinds {
            watches.spawn(
                KindWatch::new(kind, client.clone(), out.clone(), metrics.clone(), pending.clone()).run(),
            );
        }
        (ApiServer { _watches: watches }, changes)
    }
}

/// The version in which the API server serves a kind, of those in the table; `None` where it serves none.
///
/// # Errors
/// When the server does not say.
pub async fn served_version(client: &Client, info: &KindInfo) -> Result<Option<&'static str>, CallError> {
    Ok(match discovery::look(client, info).await? {
        discovery::Served::In(version) => Some(version),
        discovery::Served::Absent => None,
    })
}

/// The kinds whose objects have not all been sent yet.
#[derive(Debug)]
struct Pending {
    kinds: AtomicUsize,
    out: mpsc::Sender<Event>,
}

impl Pending {
    /// All objects of one more kind were sent.
    async fn kind_synced(&self) {
        if self.kinds.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Without a receiver the program ends.
            self.out.send(Event::Synced).await.ok();
        }
    }
}
