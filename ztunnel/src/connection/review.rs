//! Reviews of open connections: when policies, workloads or trust change, and when peers' certificates expire.
//!
//! Runs on the control runtime. Closes connections that are no longer allowed, evicts pooled connections to deleted
//! workloads, and counts the bytes of open connections.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use ambit_directory::{Removed, Revision};
use ambit_hbone::InFlight;
use ambit_identity::PeerCertificate;

use crate::inbound::destination;
use crate::proxy::{Proxy, Worker};
use ambit_runtime::cut::CutReason;
use ambit_runtime::tasks::Tasks;
use ambit_runtime::workers::Workers;

/// How often the bytes of open connections are counted in metrics.
const COUNT_EVERY: Duration = Duration::from_secs(5);
/// How often is looked for peers whose certificate has expired.
const EXPIRY_EVERY: Duration = Duration::from_secs(5);
/// How long connections go on whose root was taken out: requests in flight finish, nothing new begins.
const FINISH_TIME: Duration = Duration::from_secs(2);
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

/// Closes connections whose peer is not trusted any more: at once if it was revoked, [`FINISH_TIME`] later if it lost its
/// root, and when its time to renew is over if it expired.
async fn follow_trust(proxy: Arc<Proxy>, workers: Arc<Workers<Worker>>) {
    let mut changes = proxy.trust.subscribe();
    let mut roots_changed: Option<Instant> = None;
    let mut due = tokio::time::interval(EXPIRY_EVERY);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = changes.changed() => match changed {
                Ok(()) => {
                    roots_changed = Some(Instant::now());
                    due.reset_after(FINISH_TIME);
                }
                // Trust lives as long as the proxy.
                Err(_) => return,
            },
            _ = due.tick() => {}
        }
        let may_finish = roots_changed.is_some_and(|since| since.elapsed() < FINISH_TIME);
        review_peers(&proxy, &workers, may_finish);
    }
}

/// With `may_finish`, peers that lost their root keep what they have for now.
fn review_peers(proxy: &Proxy, workers: &Workers<Worker>, may_finish: bool) {
    let now = SystemTime::now();
    let reason = |peer: &PeerCertificate| {
        destination::peer_reason(&proxy.trust, peer, now)
            .filter(|reason| !may_finish || *reason != CutReason::Untrusted)
    };
    let closed = proxy.connections.review(|connection| connection.certificate.as_ref().and_then(reason));
    report(proxy, closed);
    for worker in workers.states() {
        worker.pool.retain(|peer| reason(peer).is_none());
    }
}

fn review(proxy: &Proxy) {
    let snapshot = proxy.directory.snapshot();
    let closed = proxy.connections.review(|connection| {
        connection.subject.as_ref().and_then(|subject| destination::review(&snapshot, subject))
    });
    report(proxy, closed);
}

fn report(proxy: &Proxy, closed: usize) {
    if closed > 0 {
        proxy.tallies.cut.add(closed as u64);
        tracing::info!(closed, "open connections were closed after a change of policy or trust");
    }
}
