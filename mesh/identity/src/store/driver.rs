//! The store's driver: sends requests to the issuer in the order that the core decides, and reports the outcomes to it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::{Id, JoinError, JoinSet};

use super::Shared;
use crate::certificate::{CertificateRequest, WorkloadCertificate};
use crate::issuer::IssueError;
use crate::renewal::Urgency;
use crate::spiffe::SpiffeId;
use crate::verify::Usage;

/// The longest sleep of the driver: a wall clock that was set, or a machine that slept, is noticed within it.
const LONGEST_SLEEP: Duration = Duration::from_secs(10);

/// Fails all waiters when the driver drops it.
pub(super) struct StopGuard(pub(super) Arc<Shared>);

impl Drop for StopGuard {
    fn drop(&mut self) {
        self.0.is_stopped.send_replace(true);
    }
}

/// One request that ended.
struct Attempt {
    identity: SpiffeId,
    /// Position among all requests, by when they started.
    number: u64,
    outcome: Result<WorkloadCertificate, IssueError>,
}

/// Starts requests that are due and reports their outcomes to the core. Runs until it is dropped.
pub(super) async fn drive(guard: StopGuard) {
    let shared = &guard.0;
    let mut attempts: JoinSet<Attempt> = JoinSet::new();
    let mut running: HashMap<Id, SpiffeId> = HashMap::new();
    let mut trust = shared.trust.subscribe();
    loop {
        let sleep = start_due(shared, &mut attempts, &mut running);
        tokio::select! {
            () = shared.wake.notified() => {}
            // The sender lives as long as `shared`.
            _ = trust.changed() => shared.replace_distrusted(),
            Some(ended) = attempts.join_next_with_id() => finish(shared, &mut running, ended),
            () = tokio::time::sleep(sleep) => {}
        }
    }
}

/// Starts all requests that are due and returns how long to sleep.
fn start_due(
    shared: &Arc<Shared>,
    attempts: &mut JoinSet<Attempt>,
    running: &mut HashMap<Id, SpiffeId>,
) -> Duration {
    let now = (shared.config.clock)();
    let mut renewals = shared.renewals.lock();
    while let Some((identity, urgency)) = renewals.poll_start(now) {
        let number = shared.metrics.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let attempt = attempts.spawn(attempt(Arc::clone(shared), identity.clone(), urgency, number));
        running.insert(attempt.id(), identity);
    }
    shared.remove_dropped(&mut renewals);
    let deadline = renewals.poll_deadline();
    deadline.map_or(LONGEST_SLEEP, |at| at.duration_since(now).unwrap_or_default()).min(LONGEST_SLEEP)
}

fn finish(shared: &Shared, running: &mut HashMap<Id, SpiffeId>, ended: Result<(Id, Attempt), JoinError>) {
    match ended {
        Ok((id, Attempt { identity, number, outcome })) => {
            running.remove(&id);
            match outcome {
                Ok(certificate) => shared.handle_issued(&identity, certificate, number),
                Err(error) => shared.handle_failed(&identity, error),
            }
        }
        // A panic in an issuer is a failed request, not the end of all renewal.
        Err(error) => {
            if let Some(identity) = running.remove(&error.id()) {
                let reason = format!("request ended abnormally: {error}");
                shared.handle_failed(&identity, IssueError::Unusable { identity: identity.clone(), reason });
            }
        }
    }
}

/// One request: key, signing request, issuer, TLS configurations.
async fn attempt(shared: Arc<Shared>, identity: SpiffeId, urgency: Urgency, number: u64) -> Attempt {
    let waited = shared.config.issue_timeout;
    let outcome = match tokio::time::timeout(waited, issue(&shared, &identity)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(IssueError::Timeout { identity: identity.clone(), waited }),
    };
    if let Ok(certificate) = &outcome {
        let info = certificate.info();
        tracing::info!(%identity, ?urgency, serial = %info.serial, "certificate issued");
    }
    Attempt { identity, number, outcome }
}

async fn issue(shared: &Shared, identity: &SpiffeId) -> Result<WorkloadCertificate, IssueError> {
    let unusable = |error: &dyn std::error::Error| IssueError::Unusable {
        identity: identity.clone(),
        reason: error.to_string(),
    };
    let request = CertificateRequest::new(identity).map_err(|error| unusable(&error))?;
    let chain = shared.issuer.issue(identity, request.csr_pem(), shared.config.lifetime).await?;
    request.complete(&chain, &shared.trust, shared.config.tls).map_err(|error| unusable(&error))
}

impl Shared {
    fn handle_issued(&self, identity: &SpiffeId, certificate: WorkloadCertificate, number: u64) {
        let now = (self.config.clock)();
        let mut renewals = self.renewals.lock();
        // Before the certificate is used, so that this process trusts its root first.
        self.learn_roots(&certificate, number);
        if renewals.handle_issued(identity, certificate.not_after(), now) {
            let entry = self.entry(identity);
            entry.current.store(Some(Arc::new(certificate)));
            entry.outcome.send_modify(|outcome| outcome.last_error = None);
        }
        self.remove_dropped(&mut renewals);
        drop(renewals);
        self.metrics.issued.fetch_add(1, Ordering::Relaxed);
        self.rotated.send_modify(|count| *count += 1);
    }

    fn handle_failed(&self, identity: &SpiffeId, error: IssueError) {
        let now = (self.config.clock)();
        let mut renewals = self.renewals.lock();
        renewals.handle_failed(identity, now);
        let (failures, next) = renewals.progress(identity).unwrap_or_default();
        let retry = next.and_then(|next| next.duration_since(now).ok());
        tracing::warn!(%identity, failures, ?retry, %error, "certificate not issued");
        if let Some(entry) = self.entries.load().get(identity) {
            entry.outcome.send_modify(|outcome| outcome.last_error = Some(Arc::new(error)));
        }
        self.remove_dropped(&mut renewals);
        self.metrics.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Schedules the replacement of certificates that our own roots and revocations no longer verify: peers refuse them.
    fn replace_distrusted(&self) {
        let now = (self.config.clock)();
        let mut renewals = self.renewals.lock();
        for (identity, entry) in &**self.entries.load() {
            let Some(certificate) = entry.current.load_full() else { continue };
            if !certificate.is_valid_at(now) {
                continue;
            }
            if let Err(error) = self.trust.verify(certificate.chain(), Usage::Server, now) {
                tracing::warn!(%identity, %error, "our certificate is no longer trusted and is replaced");
                renewals.handle_distrusted(identity, now);
            }
        }
    }

    /// Trusts the roots that came with a certificate, and no earlier ones: they are what the CA publishes now, received over
    /// the verified channel. If responses arrive out of order, the one to the latest request wins.
    fn learn_roots(&self, certificate: &WorkloadCertificate, number: u64) {
        if certificate.roots().is_empty() || self.learned_from.fetch_max(number, Ordering::Relaxed) > number {
            return;
        }
        if let Err(error) = self.trust.set_learned(certificate.roots().to_vec()) {
            tracing::warn!(%error, "roots that came with a certificate cannot be used");
        }
    }
}
