//! When to fetch which certificate: a state machine without I/O, clock or tasks of its own.
//!
//! The store feeds it (`hold`, `want`, `handle_*`) and asks it (`poll_*`), with the time as an argument. It
//! orders work by urgency: first identities that a connection waits for, then those without a valid certificate,
//! then renewals. It never discards a certificate that is valid; that a failed renewal leaves the old one in
//! use is a property of its states, not of its callers.
//!
//! Times are of the wall clock, because certificates are valid by it. When the clock is set back, planned times are moved
//! back with it, so that a renewal is not delayed by the jump. A certificate whose validity now begins in the future is
//! replaced at once, because peers may reject it as not yet valid. When the clock is set forward, whatever is due by the new
//! time is started.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, SystemTime};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::spiffe::SpiffeId;

/// Steps back that are not treated as a changed clock: callers read the clock before they get the lock, so that their times
/// may arrive out of order.
const OUT_OF_TURN: Duration = Duration::from_secs(1);

/// Minimum age at which a certificate that peers no longer trust is replaced.
const DISTRUSTED_AFTER: Duration = Duration::from_secs(10);

/// Limits and intervals of renewal.
#[derive(Debug, Clone, PartialEq)]
pub struct RenewalPolicy {
    /// Identities known at once; more are refused. At least 1.
    pub max_identities: usize,
    /// Background requests in flight. At least 1.
    pub max_background: usize,
    /// Requests in flight, besides those, for identities that a connection waits for. At least 1.
    pub max_waited: usize,
    /// First delay after a failure; doubled by each further one.
    pub first_backoff: Duration,
    /// Longest delay after failures.
    pub max_backoff: Duration,
    /// Longest delay after failures while a connection waits.
    pub max_backoff_waited: Duration,
    /// Part of the lifetime after which a certificate is renewed (certificate contract: half).
    pub renew_after: f64,
    /// Jitter around that point and of back-offs, as a part of the whole, 0 to 0.5.
    pub jitter: f64,
}

impl Default for RenewalPolicy {
    fn default() -> Self {
        Self {
            max_identities: 4096,
            max_background: 8,
            max_waited: 16,
            first_backoff: Duration::from_millis(250),
            max_backoff: Duration::from_secs(60),
            max_backoff_waited: Duration::from_secs(1),
            renew_after: 0.5,
            jitter: 0.1,
        }
    }
}

/// Why a request is started, the most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// A connection waits for it.
    Waited,
    /// There is no valid certificate.
    Missing,
    /// There is a valid certificate, which is due for renewal.
    Renewal,
}

/// The limit of identities is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("certificates of {0} identities are kept already, which is the limit")]
pub struct TooManyIdentities(pub usize);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// In `timers` at this time.
    Resting(SystemTime),
    /// In `ready`, under this key.
    Ready(Urgency, SystemTime),
    /// A request is in flight and counts against this limit.
    Running(Urgency),
}

#[derive(Debug)]
struct Slot {
    holds: usize,
    /// A connection asked since the last request started.
    is_wanted: bool,
    /// Released while a request was in flight: the outcome is discarded.
    is_abandoned: bool,
    not_after: Option<SystemTime>,
    /// When the certificate arrived.
    issued: Option<SystemTime>,
    failures: u32,
    phase: Phase,
    /// Earliest next attempt while a connection waits.
    waited_not_before: SystemTime,
}

impl Slot {
    fn is_valid(&self, now: SystemTime) -> bool {
        self.not_after.is_some_and(|end| now < end)
    }
}

/// Identities that are due, in order: by waiting time, and renewals by the end of the certificate to be replaced.
#[derive(Debug, Default)]
struct Ready {
    waited: BTreeSet<(SystemTime, SpiffeId)>,
    missing: BTreeSet<(SystemTime, SpiffeId)>,
    renewal: BTreeSet<(SystemTime, SpiffeId)>,
}

impl Ready {
    fn of(&mut self, urgency: Urgency) -> &mut BTreeSet<(SystemTime, SpiffeId)> {
        match urgency {
            Urgency::Waited => &mut self.waited,
            Urgency::Missing => &mut self.missing,
            Urgency::Renewal => &mut self.renewal,
        }
    }
}

/// The renewal of all identities of a process.
#[derive(Debug)]
pub struct Renewals {
    policy: RenewalPolicy,
    slots: HashMap<SpiffeId, Slot>,
    timers: BTreeSet<(SystemTime, SpiffeId)>,
    ready: Ready,
    running_background: usize,
    running_waited: usize,
    dropped: Vec<SpiffeId>,
    rng: StdRng,
    /// The latest time seen since the clock was last set back.
    latest: SystemTime,
}

impl Renewals {
    /// No identities yet. `seed` determines all jitter.
    pub fn new(policy: RenewalPolicy, seed: u64) -> Self {
        Self {
            policy,
            slots: HashMap::new(),
            timers: BTreeSet::new(),
            ready: Ready::default(),
            running_background: 0,
            running_waited: 0,
            dropped: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
            latest: SystemTime::UNIX_EPOCH,
        }
    }

    /// Keeps a certificate for `identity` until it was [released](Self::release) as often as held.
    ///
    /// # Errors
    /// [`TooManyIdentities`] at the limit.
    pub fn hold(&mut self, identity: &SpiffeId, now: SystemTime) -> Result<(), TooManyIdentities> {
        self.observe(now);
        let slot = self.slot(identity, Urgency::Missing, now)?;
        slot.holds += 1;
        slot.is_abandoned = false;
        // A certificate fetched for a single connection had no renewal planned.
        if let (1, Phase::Resting(_), Some(not_after)) = (slot.holds, slot.phase, slot.not_after) {
            let renewal = self.renewal_time(now, not_after);
            self.rest(identity, renewal);
        }
        Ok(())
    }

    /// Undoes one [`hold`](Self::hold); the last one forgets the identity, certificate included.
    pub fn release(&mut self, identity: &SpiffeId) {
        let Some(slot) = self.slots.get_mut(identity) else { return };
        slot.holds = slot.holds.saturating_sub(1);
        if slot.holds > 0 {
            return;
        }
        if matches!(slot.phase, Phase::Running(_)) {
            slot.is_abandoned = true;
        } else {
            self.forget(identity);
        }
    }

    /// A connection waits for `identity`, which has no valid certificate.
    ///
    /// # Errors
    /// [`TooManyIdentities`] at the limit.
    pub fn want(&mut self, identity: &SpiffeId, now: SystemTime) -> Result<(), TooManyIdentities> {
        self.observe(now);
        let slot = self.slot(identity, Urgency::Waited, now)?;
        if slot.is_valid(now) {
            return Ok(());
        }
        slot.is_wanted = true;
        slot.is_abandoned = false;
        match slot.phase {
            Phase::Running(_) | Phase::Ready(Urgency::Waited, _) => {}
            Phase::Ready(..) => self.make_ready(identity, Urgency::Waited, now),
            Phase::Resting(until) => {
                let earliest = slot.waited_not_before;
                if earliest <= now {
                    self.make_ready(identity, Urgency::Waited, now);
                } else if earliest < until {
                    self.rest(identity, earliest);
                }
            }
        }
        Ok(())
    }

    /// A request succeeded with a certificate that is valid until `not_after`.
    ///
    /// Returns false if the identity was released meanwhile; the certificate is then dropped.
    pub fn handle_issued(&mut self, identity: &SpiffeId, not_after: SystemTime, now: SystemTime) -> bool {
        self.observe(now);
        if !self.finish(identity) {
            return false;
        }
        let renewal = self.renewal_time(now, not_after);
        let Some(slot) = self.slots.get_mut(identity) else { return false };
        slot.not_after = Some(not_after);
        slot.issued = Some(now);
        if not_after <= now {
            // Expired on arrival (the clocks are far apart): an immediate retry would only load the CA.
            self.back_off(identity, now);
            return true;
        }
        slot.failures = 0;
        slot.waited_not_before = now;
        // Without a hold, the certificate was fetched for a single connection: it is kept while valid, but not renewed.
        let next = if slot.holds == 0 { not_after } else { renewal };
        self.rest(identity, next);
        true
    }

    /// Peers no longer trust the certificate although it has not expired: its root was removed, or it was revoked. It is
    /// replaced at once, but not within a few seconds of its issue, which bounds the requests to an authority whose
    /// answers contradict each other.
    pub fn handle_distrusted(&mut self, identity: &SpiffeId, now: SystemTime) {
        self.observe(now);
        let Some(slot) = self.slots.get(identity) else { return };
        let (Phase::Resting(until), Some(issued)) = (slot.phase, slot.issued) else { return };
        if slot.holds > 0 && slot.failures == 0 {
            self.rest(identity, until.min(issued + DISTRUSTED_AFTER));
        }
    }

    /// A request failed.
    pub fn handle_failed(&mut self, identity: &SpiffeId, now: SystemTime) {
        self.observe(now);
        if self.finish(identity) {
            self.back_off(identity, now);
        }
    }

    /// The next request to start, if one is due and a limit allows it. Call until it returns none.
    pub fn poll_start(&mut self, now: SystemTime) -> Option<(SpiffeId, Urgency)> {
        self.observe(now);
        self.wake_due(now);
        let may_waited = self.running_waited < self.policy.max_waited;
        let may_background = self.running_background < self.policy.max_background;
        let (urgency, (since, identity)) = [Urgency::Waited, Urgency::Missing, Urgency::Renewal]
            .into_iter()
            .filter(|urgency| if *urgency == Urgency::Waited { may_waited } else { may_background })
            .find_map(|urgency| Some((urgency, self.ready.of(urgency).first()?.clone())))?;
        self.ready.of(urgency).remove(&(since, identity.clone()));
        match urgency {
            Urgency::Waited => self.running_waited += 1,
            Urgency::Missing | Urgency::Renewal => self.running_background += 1,
        }
        if let Some(slot) = self.slots.get_mut(&identity) {
            slot.phase = Phase::Running(urgency);
            slot.is_wanted = false;
        }
        Some((identity, urgency))
    }

    /// When the next timer expires. Completed requests and new demands can make something due earlier.
    pub fn poll_deadline(&self) -> Option<SystemTime> {
        self.timers.first().map(|(time, _)| *time)
    }

    /// An identity that was forgotten: its certificate is no longer kept. Call until it returns none.
    pub fn poll_dropped(&mut self) -> Option<SpiffeId> {
        self.dropped.pop()
    }

    /// How many identities are known.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether none is known.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Requests in flight, for waiters and in the background.
    pub fn running(&self) -> (usize, usize) {
        (self.running_waited, self.running_background)
    }

    /// Consecutive failures and the time of the next attempt or renewal (none while one is due or in flight).
    pub fn progress(&self, identity: &SpiffeId) -> Option<(u32, Option<SystemTime>)> {
        let slot = self.slots.get(identity)?;
        let next = match slot.phase {
            Phase::Resting(until) => Some(until),
            Phase::Ready(..) | Phase::Running(_) => None,
        };
        Some((slot.failures, next))
    }

    fn slot(
        &mut self,
        identity: &SpiffeId,
        urgency: Urgency,
        now: SystemTime,
    ) -> Result<&mut Slot, TooManyIdentities> {
        if !self.slots.contains_key(identity) && self.slots.len() >= self.policy.max_identities {
            return Err(TooManyIdentities(self.slots.len()));
        }
        let ready = &mut self.ready;
        Ok(self.slots.entry(identity.clone()).or_insert_with(|| {
            ready.of(urgency).insert((now, identity.clone()));
            Slot {
                holds: 0,
                is_wanted: false,
                is_abandoned: false,
                not_after: None,
                issued: None,
                failures: 0,
                phase: Phase::Ready(urgency, now),
                waited_not_before: now,
            }
        }))
    }

    /// Detects that the clock was set back, and moves planned times with it.
    fn observe(&mut self, now: SystemTime) {
        match self.latest.duration_since(now) {
            Ok(back) if back > OUT_OF_TURN => {
                self.latest = now;
                self.move_back(back, now);
            }
            _ => self.latest = self.latest.max(now),
        }
    }

    fn move_back(&mut self, by: Duration, now: SystemTime) {
        self.timers.clear();
        let mut unusable = Vec::new();
        for (identity, slot) in &mut self.slots {
            slot.waited_not_before = moved(slot.waited_not_before, by);
            let Phase::Resting(until) = &mut slot.phase else { continue };
            let is_of_the_future = slot.issued.is_some_and(|issued| issued > now);
            if slot.holds == 0 && !slot.is_wanted && slot.not_after == Some(*until) {
                // Without a hold, the planned time is the end of validity, which does not move.
                if is_of_the_future {
                    unusable.push(identity.clone());
                }
            } else if is_of_the_future && slot.failures == 0 {
                *until = now;
            } else {
                *until = moved(*until, by);
            }
            self.timers.insert((*until, identity.clone()));
        }
        for identity in unusable {
            self.forget(&identity);
        }
    }

    /// Moves due identities from `timers` to `ready`, and renewals whose certificate has expired to [`Urgency::Missing`].
    fn wake_due(&mut self, now: SystemTime) {
        while let Some((not_after, identity)) = self.ready.renewal.first().cloned() {
            if not_after > now {
                break;
            }
            self.make_ready(&identity, Urgency::Missing, now);
        }
        while let Some((time, identity)) = self.timers.first().cloned() {
            if time > now {
                return;
            }
            let Some(slot) = self.slots.get(&identity) else {
                self.timers.remove(&(time, identity));
                continue;
            };
            // An identity without a hold or a waiter is not requested. Connections that still wait have called `want` again.
            let is_unused = slot.holds == 0 && !slot.is_wanted;
            if is_unused && !slot.is_valid(now) {
                self.forget(&identity);
            } else if slot.is_valid(now) {
                self.make_ready(&identity, Urgency::Renewal, slot.not_after.unwrap_or(now));
            } else {
                let urgency = if slot.is_wanted { Urgency::Waited } else { Urgency::Missing };
                self.make_ready(&identity, urgency, now);
            }
        }
    }

    /// Removes a request from the counts. Returns false if the identity was released meanwhile.
    fn finish(&mut self, identity: &SpiffeId) -> bool {
        let Some(slot) = self.slots.get(identity) else { return false };
        let Phase::Running(urgency) = slot.phase else { return false };
        match urgency {
            Urgency::Waited => self.running_waited = self.running_waited.saturating_sub(1),
            Urgency::Missing | Urgency::Renewal => {
                self.running_background = self.running_background.saturating_sub(1);
            }
        }
        let is_abandoned = slot.is_abandoned;
        if is_abandoned {
            self.forget(identity);
        }
        !is_abandoned
    }

    fn back_off(&mut self, identity: &SpiffeId, now: SystemTime) {
        let spread = self.spread();
        let policy = &self.policy;
        let Some(slot) = self.slots.get_mut(identity) else { return };
        let doublings = slot.failures.min(20);
        slot.failures = slot.failures.saturating_add(1);
        let mut delay = policy.first_backoff.saturating_mul(1 << doublings).min(policy.max_backoff);
        if let Some(remaining) = slot.not_after.and_then(|end| end.duration_since(now).ok()) {
            // Leaves time for several attempts before a valid certificate expires.
            delay = delay.min(remaining / 4).max(policy.first_backoff);
        }
        slot.waited_not_before = now + delay.min(policy.max_backoff_waited).mul_f64(spread);
        self.rest(identity, now + delay.mul_f64(spread));
    }

    fn renewal_time(&mut self, now: SystemTime, not_after: SystemTime) -> SystemTime {
        let remaining = not_after.duration_since(now).unwrap_or_default();
        let part = (self.policy.renew_after * self.spread()).clamp(0.0, 1.0);
        now + remaining.mul_f64(part)
    }

    /// A factor around 1.
    fn spread(&mut self) -> f64 {
        let jitter = self.policy.jitter.clamp(0.0, 0.5);
        if jitter == 0.0 { 1.0 } else { self.rng.random_range(1.0 - jitter..=1.0 + jitter) }
    }

    fn rest(&mut self, identity: &SpiffeId, until: SystemTime) {
        self.unschedule(identity);
        if let Some(slot) = self.slots.get_mut(identity) {
            slot.phase = Phase::Resting(until);
            self.timers.insert((until, identity.clone()));
        }
    }

    fn make_ready(&mut self, identity: &SpiffeId, urgency: Urgency, since: SystemTime) {
        self.unschedule(identity);
        if let Some(slot) = self.slots.get_mut(identity) {
            slot.phase = Phase::Ready(urgency, since);
            self.ready.of(urgency).insert((since, identity.clone()));
        }
    }

    fn unschedule(&mut self, identity: &SpiffeId) {
        match self.slots.get(identity).map(|slot| slot.phase) {
            Some(Phase::Resting(until)) => {
                self.timers.remove(&(until, identity.clone()));
            }
            Some(Phase::Ready(urgency, since)) => {
                self.ready.of(urgency).remove(&(since, identity.clone()));
            }
            Some(Phase::Running(_)) | None => {}
        }
    }

    fn forget(&mut self, identity: &SpiffeId) {
        self.unschedule(identity);
        if self.slots.remove(identity).is_some() {
            self.dropped.push(identity.clone());
        }
    }
}

/// A time earlier by `by`, or as it was where there is none.
fn moved(time: SystemTime, by: Duration) -> SystemTime {
    time.checked_sub(by).unwrap_or(time)
}
