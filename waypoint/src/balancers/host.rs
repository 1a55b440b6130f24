//! What is learned of one endpoint from the requests that went to it. It outlives the balancers that choose by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use ambit_balance::{Cost, Ejection, Estimate, Outcome, OutlierSettings};
use parking_lot::Mutex;

use super::circuit::Guard;

/// How slow an endpoint seems that gave no answer: one that refuses at once must not look fast.
const NO_ANSWER: Duration = Duration::from_secs(1);
/// The share that a new endpoint begins with.
const FIRST_SHARE: f64 = 0.1;

/// What is known of an endpoint.
#[derive(Debug, Default)]
pub struct HostState {
    active: AtomicU32,
    /// The lock is held for a few sums, never across an await.
    learned: Mutex<Learned>,
    /// Nanoseconds of the balancers' clock; 0: never.
    ejected_until: AtomicU64,
    /// When it came; `None`: it was there from the start.
    since: Option<Duration>,
}

#[derive(Debug, Default)]
struct Learned {
    cost: Cost,
    ejection: Ejection,
    ejections: u64,
}

impl HostState {
    /// Of an endpoint that came at this time, if it was not there from the start.
    pub fn new(since: Option<Duration>) -> Arc<Self> {
        Arc::new(Self { since, ..Self::default() })
    }

    /// Requests in progress.
    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    /// What a request is expected to cost.
    pub fn estimate(&self, now: Duration) -> Estimate {
        self.learned.lock().cost.estimate(now)
    }

    /// How often it was ejected.
    pub fn ejections(&self) -> u64 {
        self.learned.lock().ejections
    }

    /// When its ejection ends, if it is ejected.
    pub fn ejected_until(&self, now: Duration) -> Option<Duration> {
        let until = Duration::from_nanos(self.ejected_until.load(Ordering::Relaxed));
        (now < until).then_some(until)
    }

    /// Whether it is ejected.
    pub fn is_ejected(&self, now: Duration) -> bool {
        self.ejected_until(now).is_some()
    }

    /// The part of its share that it gets, while its share grows for `warmup`.
    pub fn warmth(&self, now: Duration, warmup: Duration) -> f64 {
        let Some(since) = self.since.filter(|_| !warmup.is_zero()) else { return 1.0 };
        let age = now.saturating_sub(since);
        if age >= warmup {
            return 1.0;
        }
        (age.as_secs_f64() / warmup.as_secs_f64()).max(FIRST_SHARE)
    }

    /// Counts a request until the guard is dropped.
    pub fn open(self: &Arc<Self>) -> Active {
        self.active.fetch_add(1, Ordering::Relaxed);
        Active { host: self.clone(), counted: None }
    }

    /// Learns from a request that took so long.
    pub fn observe(&self, now: Duration, took: Duration, outcome: Outcome) {
        let took = match outcome {
            Outcome::Answer(_) | Outcome::ClientDeadline => took,
            Outcome::LocalFailure => took.max(NO_ANSWER),
        };
        self.learned.lock().cost.observe(now, took, outcome.is_failure());
    }

    /// Takes the end of a request; true if the endpoint should be ejected.
    pub fn handle_outcome(&self, settings: &OutlierSettings, now: Duration, outcome: Outcome) -> bool {
        self.learned.lock().ejection.handle_outcome(settings, now, outcome)
    }

    /// Ejects it; says until when.
    pub fn eject(&self, settings: &OutlierSettings, now: Duration) -> Duration {
        let mut learned = self.learned.lock();
        learned.ejections += 1;
        let until = learned.ejection.eject(settings, now);
        self.ejected_until.store(u64::try_from(until.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        until
    }

    /// Ends its ejection, and forgets its failures.
    pub fn readmit(&self) {
        let mut learned = self.learned.lock();
        learned.ejection = Ejection::default();
        self.ejected_until.store(0, Ordering::Relaxed);
    }
}

/// A request in progress at an endpoint.
#[derive(Debug)]
pub struct Active {
    host: Arc<HostState>,
    /// Its place among the requests of the port or subset.
    counted: Option<Guard>,
}

impl Active {
    /// Keeps its place among the requests of the port or subset.
    pub fn hold(&mut self, counted: Guard) {
        self.counted = Some(counted);
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.host.active.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_endpoint_gets_its_share_little_by_little() {
        let (minute, second) = (Duration::from_secs(60), Duration::from_secs(1));
        let new = HostState::new(Some(10 * second));
        let shares = [10, 12, 40, 70, 100].map(|at| new.warmth(at * second, minute));
        assert_eq!(shares, [0.1, 0.1, 0.5, 1.0, 1.0]);
        assert_eq!(new.warmth(10 * second, Duration::ZERO), 1.0);
        assert_eq!(HostState::new(None).warmth(Duration::ZERO, minute), 1.0);
    }

    #[test]
    fn an_endpoint_that_refuses_at_once_does_not_look_fast() {
        let (refusing, slow) = (HostState::new(None), HostState::new(None));
        refusing.observe(Duration::ZERO, Duration::from_micros(50), Outcome::LocalFailure);
        slow.observe(Duration::ZERO, Duration::from_millis(200), Outcome::Answer(200));
        let cost = |host: &HostState| host.estimate(Duration::ZERO).peak_cost(0);
        assert!(cost(&slow) < cost(&refusing));
    }
}
