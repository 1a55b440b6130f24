//! Looking at live connections again: when policies, workloads or trust change.
//!
//! Runs on the control runtime. Ends what may no longer be, takes tunnels of workloads that are gone out
//! of the pools, and counts the bytes of connections that live long.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ambit_directory::{Removed, Revision};
use ambit_hbone::InFlight;

use crate::cut::CutReason;
use crate::destination;
use crate::proxy::{Proxy, Worker};
use crate::tasks::Tasks;
use crate::workers::Workers;

/// How often the bytes of open connections are counted in metrics.
const COUNT_EVERY: Duration = Duration::from_secs(5);
/// Changes that come within this time are looked at together.
const GATHER: Duration = Duration::from_millis(5);

/// Starts the reviews.
pub fn start(proxy: &Arc<Proxy>, workers: &Arc<Workers<Worker>>, tasks: &mut Tasks) {
    tasks.spawn("review by the directory", follow_directory(proxy.clone(), workers.clone()));
    tasks.spawn("review by trust", follow_trust(proxy.clone(), workers.clone()));
    tasks.spawn("counting of open connections", count(proxy.clone()));
}

/// Counts the bytes of connections before they end, and closes those that move none for too long.
async fn count(proxy: Arc<Proxy>) {
    let limit = proxy.settings.limits.connection_idle;
    loop {
        tokio::time::sleep(COUNT_EVERY).await;
        let now = Instant::now();
        let closed = proxy.connections.review(|connection| {
            connection.report_bytes();
            let quiet = connection.quiet_for(now);
            (!limit.is_zero() && quiet >= limit).then_some(CutReason::Idle(limit))
        });
        proxy.tallies.idle.add(closed as u64);
    }
}

async fn follow_directory(proxy: Arc<Proxy>, workers: Arc<Workers<Worker>>) {
    let mut changes = proxy.directory.changes();
    let mut seen = Revision::default();
    // The directory's writer lives as long as its driver, an essential task too.
    while changes.changed().await.is_ok() {
        tokio::time::sleep(GATHER).await;
        changes.borrow_and_update();
        let snapshot = proxy.directory.snapshot();
        let now = snapshot.revision();
        if now.authorization != seen.authorization {
            review(&proxy);
        }
        if let Removed::These(gone) = snapshot.removed_since(seen.snapshot) {
            let gone: HashSet<&str> = gone.iter().map(|uid| uid.as_str()).collect();
            if !gone.is_empty() {
                for worker in workers.states() {
                    worker.pool.evict(|key| gone.contains(&*key.destination), InFlight::Finish);
                }
            }
        } else {
            tracing::info!(
                "too many workloads went at once to close their tunnels one by one; they close when idle"
            );
        }
        seen = now;
    }
}

async fn follow_trust(proxy: Arc<Proxy>, workers: Arc<Workers<Worker>>) {
    let mut changes = proxy.trust.subscribe();
    while changes.changed().await.is_ok() {
        review(&proxy);
        for worker in workers.states() {
            worker.pool.retain(|peer| proxy.trust.recheck(peer, SystemTime::now()).is_ok());
        }
    }
}

fn review(proxy: &Proxy) {
    let snapshot = proxy.directory.snapshot();
    let cut = proxy.connections.review(|connection| {
        connection.subject.as_ref().and_then(|subject| destination::review(proxy, &snapshot, subject))
    });
    if cut > 0 {
        proxy.tallies.cut.add(cut as u64);
        tracing::info!(cut, "live connections were closed after a change of policy or trust");
    }
}
