//! Which replica writes: the holder of the lease `ambit-control`.
//!
//! As other controllers have it (`coordination.k8s.io`): the holder renews, others take the lease over once it has not
//! changed for its duration by their own clock. A holder that cannot renew stops writing before anybody may take over.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::Instant;

use super::WriteMetrics;
use crate::api_server::{CallError, FIELD_MANAGER, call};

/// Name of the lease.
pub const LEASE: &str = "ambit-control";
/// How long others wait for a holder that does not renew.
const DURATION: Duration = Duration::from_secs(15);
/// How long a holder that cannot renew goes on.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(2);

/// What to do about the lease.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    /// There is none.
    Create,
    /// It is ours, or nobody's.
    Write,
    /// Somebody else has it.
    Wait,
}

/// What one replica has seen of the lease. No I/O, no clock.
#[derive(Debug)]
struct Election {
    me: String,
    /// The version of the lease that was seen last, and when it was new.
    seen: Option<(String, Instant)>,
}

impl Election {
    fn decide(&mut self, lease: Option<&Lease>, now: Instant) -> Action {
        let Some(lease) = lease else { return Action::Create };
        let spec = lease.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.unwrap_or_default();
        if holder.is_empty() || holder == self.me {
            return Action::Write;
        }
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        match &self.seen {
            Some((seen, since)) if *seen == version => {
                // Its own word, within reason: a lease of a year would leave nobody to write.
                let seconds = spec.lease_duration_seconds.and_then(|n| u64::try_from(n).ok());
                let duration = seconds.map_or(DURATION, Duration::from_secs).min(4 * DURATION);
                if now.duration_since(*since) >= duration { Action::Write } else { Action::Wait }
            }
            _ => {
                self.seen = Some((version, now));
                Action::Wait
            }
        }
    }
}

/// Takes part in the election until it is asked to stop.
pub struct Elector {
    leases: Api<Lease>,
    election: Election,
    /// Whether this replica is the holder.
    leads: watch::Sender<bool>,
    /// Until when it may go on without renewing.
    until: Option<Instant>,
    metrics: Arc<WriteMetrics>,
}

impl Elector {
    /// A replica of this name in the system namespace; the receiver says whether it holds the lease.
    pub fn new(
        client: Client,
        namespace: &str,
        me: String,
        metrics: Arc<WriteMetrics>,
    ) -> (Elector, watch::Receiver<bool>) {
        let (leads, is_leader) = watch::channel(false);
        let leases = Api::namespaced(client, namespace);
        (Elector { leases, election: Election { me, seen: None }, leads, until: None, metrics }, is_leader)
    }

    /// Runs until `stop` turns true, then gives the lease back.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut last_error = None;
        loop {
            let outcome = match self.until {
                // Whoever waits for an answer past the deadline would write beside the next holder.
                Some(until) => {
                    let attempt = tokio::time::timeout_at(until, self.attempt()).await;
                    attempt.unwrap_or(Err(CallError::TimedOut))
                }
                None => self.attempt().await,
            };
            self.handle_outcome(&outcome, Instant::now());
            let error = outcome.err().map(|error| error.to_string());
            if error != last_error
                && let Some(error) = &error
            {
                tracing::warn!(lease = LEASE, error, "lease neither taken nor renewed");
            }
            last_error = error;
            let pause = INTERVAL.mul_f64(rand::random_range(0.8..1.2));
            // A sender that is gone is the end of the program, too.
            if tokio::time::timeout(pause, stop.wait_for(|stop| *stop)).await.is_ok() {
                break;
            }
        }
        if self.until.is_some() {
            self.leads.send_replace(false);
            if let Err(error) = self.release().await {
                tracing::warn!(lease = LEASE, %error, "lease not given back; the next holder waits {DURATION:?}");
            }
        }
    }

    /// Looks and does what is to be done; the time is that before the write, if this replica holds the lease now.
    async fn attempt(&mut self) -> Result<Option<Instant>, CallError> {
        let present = call(self.leases.get_opt(LEASE)).await?;
        let started = Instant::now();
        let written = match self.election.decide(present.as_ref(), started) {
            Action::Wait => return Ok(None),
            Action::Create => {
                let lease = Lease {
                    metadata: ObjectMeta { name: Some(LEASE.to_owned()), ..ObjectMeta::default() },
                    spec: Some(held_by(&self.election.me, None)),
                };
                call(self.leases.create(&parameters(), &lease)).await
            }
            Action::Write => {
                let present = present.unwrap_or_default();
                let spec = held_by(&self.election.me, present.spec.as_ref());
                // The version that was read goes along, so that only one of two takes it.
                let lease = Lease { metadata: present.metadata, spec: Some(spec) };
                call(self.leases.replace(LEASE, &parameters(), &lease)).await
            }
        };
        match written {
            Ok(_) => Ok(Some(started)),
            Err(error) if error.is_conflict() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn handle_outcome(&mut self, outcome: &Result<Option<Instant>, CallError>, now: Instant) {
        match outcome {
            Ok(Some(renewed)) => self.until = Some(*renewed + DEADLINE),
            Ok(None) => self.until = None,
            Err(_) => self.until = self.until.filter(|until| now < *until),
        }
        let leads = self.until.is_some();
        self.metrics.leads.store(leads.into(), Ordering::Relaxed);
        if self.leads.send_replace(leads) != leads {
            match leads {
                true => tracing::info!(lease = LEASE, "this replica writes"),
                false => tracing::info!(lease = LEASE, "this replica no longer writes"),
            }
        }
    }

    async fn release(&self) -> Result<(), CallError> {
        let Some(mut lease) = call(self.leases.get_opt(LEASE)).await? else { return Ok(()) };
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_ref() == Some(&self.election.me) {
            spec.holder_identity = Some(String::new());
            call(self.leases.replace(LEASE, &parameters(), &lease)).await?;
        }
        Ok(())
    }
}

fn parameters() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() }
}

/// The lease as its holder writes it.
fn held_by(me: &str, before: Option<&LeaseSpec>) -> LeaseSpec {
    let now = MicroTime(Timestamp::now());
    let was_mine = before.is_some_and(|spec| spec.holder_identity.as_deref() == Some(me));
    let since = before.and_then(|spec| spec.acquire_time.clone()).filter(|_| was_mine);
    let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or_default();
    LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        acquire_time: Some(since.unwrap_or_else(|| now.clone())),
        lease_transitions: Some(transitions.saturating_add(i32::from(!was_mine))),
        renew_time: Some(now),
        ..LeaseSpec::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(holder: &str, version: &str) -> Lease {
        Lease {
            metadata: ObjectMeta { resource_version: Some(version.to_owned()), ..ObjectMeta::default() },
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.to_owned()),
                lease_duration_seconds: Some(15),
                ..LeaseSpec::default()
            }),
        }
    }

    #[tokio::test]
    async fn a_lease_is_taken_over_only_once_it_stands_still() {
        let mut election = Election { me: "b".to_owned(), seen: None };
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(election.decide(None, start), Action::Create);
        assert_eq!(election.decide(Some(&lease("a", "1")), start), Action::Wait);
        assert_eq!(election.decide(Some(&lease("a", "1")), after(14)), Action::Wait);
        assert_eq!(election.decide(Some(&lease("a", "2")), after(15)), Action::Wait);
        assert_eq!(election.decide(Some(&lease("a", "2")), after(29)), Action::Wait);
        assert_eq!(election.decide(Some(&lease("a", "2")), after(30)), Action::Write);
        assert_eq!(election.decide(Some(&lease("b", "3")), after(31)), Action::Write);
        assert_eq!(election.decide(Some(&lease("", "4")), after(32)), Action::Write);
    }

    #[test]
    fn a_new_holder_counts_as_a_transition() {
        let first = held_by("a", None);
        assert_eq!(first.lease_transitions, Some(1));
        let renewed = held_by("a", Some(&first));
        assert_eq!((renewed.lease_transitions, &renewed.acquire_time), (Some(1), &first.acquire_time));
        assert_eq!(held_by("b", Some(&renewed)).lease_transitions, Some(2));
    }
}
