//! The renewal core in virtual time: order, limits, back-off, and that a valid certificate is never given up.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use ambit_identity::SpiffeId;
use ambit_identity::renewal::{RenewalPolicy, Renewals, TooManyIdentities, Urgency};
use proptest::prelude::*;

fn at(seconds: f64) -> SystemTime {
    let zero = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let from_zero = Duration::from_secs_f64(seconds.abs());
    if seconds < 0.0 { zero - from_zero } else { zero + from_zero }
}

fn id(number: usize) -> SpiffeId {
    SpiffeId::new("cluster.local", "shop", &format!("sa-{number}")).unwrap()
}

fn exact() -> RenewalPolicy {
    RenewalPolicy { jitter: 0.0, ..RenewalPolicy::default() }
}

#[test]
fn a_held_identity_is_renewed_at_half_of_its_lifetime() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    assert_eq!(renewals.poll_start(at(0.0)), Some((id(1), Urgency::Missing)));
    assert_eq!(renewals.poll_start(at(0.0)), None);
    assert!(renewals.handle_issued(&id(1), at(1000.0), at(0.0)));
    assert_eq!(renewals.poll_deadline(), Some(at(500.0)));
    assert_eq!(renewals.poll_start(at(499.9)), None);
    assert_eq!(renewals.poll_start(at(500.0)), Some((id(1), Urgency::Renewal)));
}

#[test]
fn renewals_of_many_are_spread_around_half_of_the_lifetime() {
    let policy = RenewalPolicy { max_background: 1000, ..RenewalPolicy::default() };
    let mut renewals = Renewals::new(policy, 7);
    for number in 0..500 {
        renewals.hold(&id(number), at(0.0)).unwrap();
    }
    while let Some((identity, _)) = renewals.poll_start(at(0.0)) {
        renewals.handle_issued(&identity, at(1000.0), at(0.0));
    }
    assert_eq!(renewals.poll_start(at(449.9)), None);
    let mut due = [0; 3];
    for (position, time) in [480.0, 520.0, 550.1].into_iter().enumerate() {
        while renewals.poll_start(at(time)).is_some() {
            due[position] += 1;
        }
    }
    assert_eq!(due.iter().sum::<i32>(), 500);
    assert!(due.iter().all(|count| *count > 50), "{due:?}");
}

#[test]
fn waited_identities_go_first_then_missing_ones() {
    let policy = RenewalPolicy { max_background: 1, max_waited: 1, ..exact() };
    let mut renewals = Renewals::new(policy, 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    renewals.poll_start(at(0.0)).unwrap();
    renewals.handle_issued(&id(1), at(100.0), at(0.0));
    renewals.hold(&id(2), at(40.0)).unwrap();
    renewals.hold(&id(3), at(41.0)).unwrap();
    renewals.want(&id(3), at(60.0)).unwrap();
    assert_eq!(renewals.poll_start(at(60.0)), Some((id(3), Urgency::Waited)));
    assert_eq!(renewals.poll_start(at(60.0)), Some((id(2), Urgency::Missing)));
    assert_eq!(renewals.poll_start(at(60.0)), None, "both limits are reached");
    renewals.handle_issued(&id(2), at(200.0), at(61.0));
    assert_eq!(renewals.poll_start(at(61.0)), Some((id(1), Urgency::Renewal)));
}

#[test]
fn bulk_work_never_takes_the_places_of_those_that_wait() {
    let policy = RenewalPolicy { max_background: 2, max_waited: 1, ..exact() };
    let mut renewals = Renewals::new(policy, 1);
    for number in 0..50 {
        renewals.hold(&id(number), at(0.0)).unwrap();
    }
    while renewals.poll_start(at(0.0)).is_some() {}
    assert_eq!(renewals.running(), (0, 2));
    renewals.want(&id(99), at(0.1)).unwrap();
    assert_eq!(renewals.poll_start(at(0.1)), Some((id(99), Urgency::Waited)));
}

#[test]
fn failures_back_off_exponentially_up_to_the_limit() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    let mut now = 0.0;
    let mut delays = Vec::new();
    for _ in 0..12 {
        renewals.poll_start(at(now)).unwrap();
        renewals.handle_failed(&id(1), at(now));
        let next = renewals.poll_deadline().unwrap();
        let delay = next.duration_since(at(now)).unwrap().as_secs_f64();
        delays.push(delay);
        now += delay;
    }
    assert_eq!(&delays[..5], [0.25, 0.5, 1.0, 2.0, 4.0]);
    assert_eq!(&delays[9..], [60.0, 60.0, 60.0]);
}

#[test]
fn a_waiting_connection_shortens_the_back_off() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    let mut now = at(0.0);
    for _ in 0..8 {
        renewals.poll_start(now).unwrap();
        renewals.handle_failed(&id(1), now);
        now = renewals.poll_deadline().unwrap();
    }
    renewals.poll_start(now).unwrap();
    renewals.handle_failed(&id(1), now);
    renewals.want(&id(1), now).unwrap();
    assert_eq!(renewals.poll_start(now), None);
    let soon = now + Duration::from_secs(1);
    assert_eq!(renewals.poll_deadline(), Some(soon));
    assert_eq!(renewals.poll_start(soon), Some((id(1), Urgency::Waited)));
}

#[test]
fn several_attempts_fit_into_the_remaining_validity() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    renewals.poll_start(at(0.0)).unwrap();
    renewals.handle_issued(&id(1), at(80.0), at(0.0));
    let mut attempts = 0;
    let mut now = at(40.0);
    while now < at(80.0) {
        renewals.poll_start(now).unwrap();
        renewals.handle_failed(&id(1), now);
        attempts += 1;
        now = renewals.poll_deadline().unwrap();
    }
    assert!(attempts >= 8, "{attempts}");
}

#[test]
fn an_expired_state_recovers_as_soon_as_the_issuer_does() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    renewals.poll_start(at(0.0)).unwrap();
    renewals.handle_issued(&id(1), at(100.0), at(0.0));
    // Asleep (suspended, or the issuer gone) far beyond expiry.
    assert_eq!(renewals.poll_start(at(5000.0)), Some((id(1), Urgency::Missing)));
    renewals.handle_failed(&id(1), at(5000.0));
    assert_eq!(renewals.poll_start(at(5000.25)), Some((id(1), Urgency::Missing)));
    assert!(renewals.handle_issued(&id(1), at(5100.25), at(5000.25)));
    assert_eq!(renewals.poll_deadline(), Some(at(5050.25)));
}

#[test]
fn a_clock_set_back_delays_neither_renewal_nor_retry() {
    let mut renewals = Renewals::new(exact(), 1);
    for number in [1, 2] {
        renewals.hold(&id(number), at(0.0)).unwrap();
        assert!(renewals.poll_start(at(0.0)).is_some());
    }
    assert!(renewals.handle_issued(&id(1), at(10_000.0), at(0.0)));
    renewals.handle_failed(&id(2), at(4000.0));
    let retry = renewals.progress(&id(2)).unwrap().1.unwrap().duration_since(at(4000.0)).unwrap();
    // Most of an hour back: 1000 seconds are left to the renewal, as before.
    assert_eq!(renewals.poll_start(at(500.0)), None);
    assert_eq!(renewals.progress(&id(2)).unwrap().1, Some(at(500.0) + retry));
    assert_eq!(renewals.poll_start(at(500.0) + retry), Some((id(2), Urgency::Missing)));
    assert_eq!(renewals.poll_deadline(), Some(at(1500.0)));
    assert_eq!(renewals.poll_start(at(1499.9)), None);
    assert_eq!(renewals.poll_start(at(1500.0)), Some((id(1), Urgency::Renewal)));
}

#[test]
fn a_certificate_from_the_future_is_replaced_at_once() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    renewals.poll_start(at(0.0)).unwrap();
    assert!(renewals.handle_issued(&id(1), at(10_000.0), at(0.0)));
    assert_eq!(renewals.poll_start(at(-3600.0)), Some((id(1), Urgency::Renewal)));
    renewals.handle_failed(&id(1), at(-3600.0));
    assert_eq!(renewals.poll_start(at(-3600.0)), None, "with the pauses of any failure");
}

#[test]
fn a_clock_set_past_the_end_makes_a_certificate_missing() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    renewals.poll_start(at(0.0)).unwrap();
    assert!(renewals.handle_issued(&id(1), at(1000.0), at(0.0)));
    assert_eq!(renewals.poll_start(at(90_000.0)), Some((id(1), Urgency::Missing)));
}

#[test]
fn a_clock_set_back_renews_nothing_that_nobody_holds() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.want(&id(1), at(0.0)).unwrap();
    renewals.poll_start(at(0.0)).unwrap();
    assert!(renewals.handle_issued(&id(1), at(1000.0), at(0.0)));
    assert_eq!(renewals.poll_start(at(900.0)), None);
    assert_eq!(renewals.poll_start(at(100.0)), None);
    assert_eq!(renewals.poll_start(at(999.0)), None);
    assert_eq!(renewals.poll_dropped(), None);
    assert_eq!(renewals.poll_start(at(-100.0)), None);
    assert_eq!(
        renewals.poll_dropped(),
        Some(id(1)),
        "issued in the future, it is fetched anew when it is needed"
    );
}

#[test]
fn a_released_identity_is_forgotten_even_in_flight() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    renewals.hold(&id(1), at(0.0)).unwrap();
    renewals.release(&id(1));
    assert_eq!(renewals.poll_start(at(0.0)), Some((id(1), Urgency::Missing)));
    renewals.release(&id(1));
    assert_eq!(renewals.poll_dropped(), None);
    assert!(!renewals.handle_issued(&id(1), at(100.0), at(1.0)));
    assert_eq!(renewals.poll_dropped(), Some(id(1)));
    assert!(renewals.is_empty());
    assert_eq!(renewals.running(), (0, 0));
    assert_eq!(renewals.poll_deadline(), None);
}

#[test]
fn a_certificate_that_nobody_holds_is_not_renewed() {
    let mut renewals = Renewals::new(exact(), 1);
    renewals.want(&id(1), at(0.0)).unwrap();
    assert_eq!(renewals.poll_start(at(0.0)), Some((id(1), Urgency::Waited)));
    renewals.handle_issued(&id(1), at(100.0), at(0.0));
    assert_eq!(renewals.poll_start(at(99.0)), None);
    assert_eq!(renewals.poll_dropped(), None);
    assert_eq!(renewals.poll_start(at(100.0)), None);
    assert_eq!(renewals.poll_dropped(), Some(id(1)));
}

#[test]
fn identities_beyond_the_limit_are_refused() {
    let mut renewals = Renewals::new(RenewalPolicy { max_identities: 2, ..exact() }, 1);
    renewals.hold(&id(1), at(0.0)).unwrap();
    renewals.want(&id(2), at(0.0)).unwrap();
    assert_eq!(renewals.hold(&id(3), at(0.0)), Err(TooManyIdentities(2)));
    assert_eq!(renewals.want(&id(3), at(0.0)), Err(TooManyIdentities(2)));
    assert!(renewals.hold(&id(2), at(0.0)).is_ok());
}

#[derive(Debug, Clone)]
enum Step {
    Hold(usize),
    Release(usize),
    Want(usize),
    Succeed(u64),
    Fail,
    Pass(u64),
    SetBack(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..6usize).prop_map(Step::Hold),
        2 => (0..6usize).prop_map(Step::Release),
        3 => (0..6usize).prop_map(Step::Want),
        4 => (1..400u64).prop_map(Step::Succeed),
        3 => Just(Step::Fail),
        4 => (0..200u64).prop_map(Step::Pass),
        1 => (0..100_000u64).prop_map(Step::SetBack),
    ]
}

proptest! {
    /// Against a naive model: what is held is never lost; limits hold; what has no certificate is always on its
    /// way (due, in flight, or with an attempt planned within the longest back-off).
    #[test]
    fn whatever_happens_held_identities_are_pursued_and_limits_hold(steps in prop::collection::vec(step(), 1..120)) {
        let policy = RenewalPolicy { max_background: 2, max_waited: 1, ..RenewalPolicy::default() };
        let longest = policy.max_backoff.mul_f64(1.0 + policy.jitter);
        let mut renewals = Renewals::new(policy, 42);
        let (mut now, mut was_set_back) = (at(0.0), false);
        let mut holds: HashMap<usize, usize> = HashMap::new();
        let mut in_flight: Vec<SpiffeId> = Vec::new();
        let mut valid: HashMap<SpiffeId, SystemTime> = HashMap::new();
        for step in steps {
            match step {
                Step::Hold(number) => {
                    renewals.hold(&id(number), now).unwrap();
                    *holds.entry(number).or_default() += 1;
                }
                Step::Release(number) => {
                    renewals.release(&id(number));
                    if let Some(count) = holds.get_mut(&number) {
                        *count -= 1;
                        if *count == 0 {
                            holds.remove(&number);
                        }
                    }
                }
                Step::Want(number) => renewals.want(&id(number), now).unwrap(),
                Step::Succeed(lifetime) => if let Some(identity) = in_flight.pop() {
                    let end = now + Duration::from_secs(lifetime);
                    if renewals.handle_issued(&identity, end, now) {
                        valid.insert(identity, end);
                    }
                }
                Step::Fail => if let Some(identity) = in_flight.pop() {
                    renewals.handle_failed(&identity, now);
                }
                Step::Pass(seconds) => now += Duration::from_secs(seconds),
                Step::SetBack(seconds) => {
                    now -= Duration::from_secs(seconds);
                    was_set_back = true;
                }
            }
            while let Some((identity, urgency)) = renewals.poll_start(now) {
                prop_assert!(!in_flight.contains(&identity), "{identity} is asked for twice at once");
                let is_valid = valid.get(&identity).is_some_and(|end| *end > now);
                // What had expired when it became due may be valid again by a clock that was set back.
                prop_assert!(is_valid == (urgency == Urgency::Renewal) || (is_valid && was_set_back));
                in_flight.push(identity);
            }
            while let Some(identity) = renewals.poll_dropped() {
                let number: usize = identity.service_account()[3..].parse().unwrap();
                prop_assert!(!holds.contains_key(&number), "{identity} is held and was dropped");
                valid.remove(&identity);
            }
            let (waited, background) = renewals.running();
            prop_assert!(waited <= 1 && background <= 2);
            prop_assert_eq!(waited + background, in_flight.len());
            for number in holds.keys() {
                let (_, next) = renewals.progress(&id(*number)).expect("a held identity is known");
                let is_valid = valid.get(&id(*number)).is_some_and(|end| *end > now);
                if let (Some(next), false) = (next, is_valid) {
                    prop_assert!(next <= now + longest, "{next:?} is too far from {now:?}");
                }
            }
        }
    }
}
