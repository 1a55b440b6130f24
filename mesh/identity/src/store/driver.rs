//! The store's driver: asks the issuer in the order that the core decides and reports what came of it.

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

/// The longest sleep of the driver: a wall clock that was set, or a machine that slept, is noticed within it.
const LONGEST_SLEEP: Duration = Duration::from_secs(10);

/// Held by the driver; when it goes, those who wait are told.
pub(super) struct StopGuard(pub(super) Arc<Shared>);

impl Drop for StopGuard {
    fn drop(&mut self) {
        self.0.is_stopped.send_replace(true);
    }
}

type Attempt = (SpiffeId, Result<WorkloadCertificate, IssueError>);

/// Starts what the core says is due and reports what came of it. Ends only by being dropped.
pub(super) async fn drive(guard: StopGuard) {
    let shared = &guard.0;
    let mut attempts: JoinSet<Attempt> = JoinSet::new();
    let mut running: HashMap<Id, SpiffeId> = HashMap::new();
    loop {
        let sleep = start_due(shared, &mut attempts, &mut running);
        tokio::select! {
            () = shared.wake.notified() => {}
            Some(ended) = attempts.join_next_with_id() => finish(shared, &mut running, ended),
            () = tokio::time::sleep(sleep) => {}
        }
    }
}

/// Starts all requests that are due and tells how long to sleep.
fn start_due(
    shared: &Arc<Shared>,
    attempts: &mut JoinSet<Attempt>,
    running: &mut HashMap<Id, SpiffeId>,
) -> Duration {
    let now = (shared.config.clock)();
    let mut renewals = shared.renewals.lock();
    while let Some((identity, urgency)) = renewals.poll_start(now) {
        shared.metrics.requests.fetch_add(1, Ordering::Relaxed);
        let attempt = attempts.spawn(attempt(Arc::clone(shared), identity.clone(), urgency));
        running.insert(attempt.id(), identity);
    }
    shared.remove_dropped(&mut renewals);
    let deadline = renewals.poll_deadline();
    deadline.map_or(LONGEST_SLEEP, |at| at.duration_since(now).unwrap_or_default()).min(LONGEST_SLEEP)
}

fn finish(shared: &Shared, running: &mut HashMap<Id, SpiffeId>, ended: Result<(Id, Attempt), JoinError>) {
    match ended {
        Ok((id, (identity, outcome))) => {
            running.remove(&id);
            match outcome {
                Ok(certificate) => shared.handle_issued(&identity, certificate),
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
async fn attempt(shared: Arc<Shared>, identity: SpiffeId, urgency: Urgency) -> Attempt {
    let waited = shared.config.issue_timeout;
    let outcome = match tokio::time::timeout(waited, issue(&shared, &identity)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(IssueError::Timeout { identity: identity.clone(), waited }),
    };
    if let Ok(certificate) = &outcome {
        let info = certificate.info();
        tracing::info!(%identity, ?urgency, serial = %info.serial, "certificate issued");
    }
    (identity, outcome)
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
    fn handle_issued(&self, identity: &SpiffeId, certificate: WorkloadCertificate) {
        let now = (self.config.clock)();
        let mut renewals = self.renewals.lock();
        if renewals.handle_issued(identity, certificate.not_after(), now) {
            let entry = self.entry(identity);
            entry.current.store(Some(Arc::new(certificate)));
            entry.outcome.send_modify(|outcome| outcome.last_error = None);
            self.learn_roots();
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

    /// Believes the roots that came with the certificates in use: they arrived over the verified channel to
    /// the CA, perhaps before the root file did. A root goes when the last certificate that brought it goes.
    fn learn_roots(&self) {
        let mut roots = Vec::new();
        for entry in self.entries.load().values() {
            if let Some(certificate) = entry.current.load().as_ref() {
                for root in certificate.roots() {
                    if !roots.contains(root) {
                        roots.push(root.clone());
                    }
                }
            }
        }
        // In an order of their own, as that of the entries means nothing.
        roots.sort_by(|a, b| a.as_ref().cmp(b.as_ref()));
        if let Err(error) = self.trust.set_learned(roots) {
            tracing::warn!(%error, "roots that came with certificates cannot be used");
        }
    }
}
