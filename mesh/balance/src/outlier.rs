//! Ejection of endpoints that fail: a state for each endpoint, fed with how requests ended.

use std::time::Duration;

/// When an endpoint is ejected, and for how long. A count of 0 is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutlierSettings {
    /// Failures in a row of any kind, answers from 500 on.
    pub consecutive_5xx: u32,
    /// Answers 502, 503 and 504 in a row, and failures without an answer.
    pub consecutive_gateway_errors: u32,
    /// Failures in a row without an answer. Only with `split_local_origin`.
    pub consecutive_local_origin: u32,
    /// Whether failures without an answer count apart from answers.
    pub split_local_origin: bool,
    /// After each such time without ejection, the next one is shorter by one `base_ejection`.
    pub interval: Duration,
    /// The first ejection lasts so long, the second twice that, and so on.
    pub base_ejection: Duration,
    /// Per cent of the endpoints that may be ejected at once.
    pub max_ejection_percent: u32,
}

/// The longest ejection, unless the base is longer.
const MAX_EJECTION: Duration = Duration::from_secs(300);

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With this status.
    Answer(u16),
    /// Without an answer: no connection, a reset, a timeout.
    LocalFailure,
    /// In a way that says nothing of the endpoint: the client gave it too little time.
    ClientDeadline,
}

impl Outcome {
    /// Whether it counts as a failure of the endpoint.
    pub fn is_failure(self) -> bool {
        match self {
            Self::Answer(status) => status >= 500,
            Self::LocalFailure => true,
            Self::ClientDeadline => false,
        }
    }
}

/// What is known of an endpoint's failures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ejection {
    failures: u32,
    gateway_errors: u32,
    local_failures: u32,
    /// Multiples of the base time that the next ejection lasts, less one.
    ejections: u32,
    until: Option<Duration>,
    /// Since when an interval without ejection is counted.
    calm_since: Duration,
}

impl Ejection {
    /// Takes the end of a request at `now`; true if the endpoint should be ejected. Nothing counts while it is: those are requests that
    /// were under way before, or that had no other endpoint.
    pub fn handle_outcome(&mut self, settings: &OutlierSettings, now: Duration, outcome: Outcome) -> bool {
        if self.is_ejected(now) {
            return false;
        }
        let count = |counter: &mut u32, fails: bool, limit: u32| {
            *counter = if fails { counter.saturating_add(1) } else { 0 };
            limit > 0 && *counter >= limit
        };
        match outcome {
            Outcome::ClientDeadline => false,
            Outcome::LocalFailure if settings.split_local_origin => {
                count(&mut self.local_failures, true, settings.consecutive_local_origin)
            }
            Outcome::LocalFailure => {
                let any = count(&mut self.failures, true, settings.consecutive_5xx);
                count(&mut self.gateway_errors, true, settings.consecutive_gateway_errors) || any
            }
            Outcome::Answer(status) => {
                // A connection that yields an answer is a success of its own.
                self.local_failures = 0;
                let any = count(&mut self.failures, status >= 500, settings.consecutive_5xx);
                let gateway = matches!(status, 502..=504);
                count(&mut self.gateway_errors, gateway, settings.consecutive_gateway_errors) || any
            }
        }
    }

    /// Ejects the endpoint from `now` on; says until when.
    pub fn eject(&mut self, settings: &OutlierSettings, now: Duration) -> Duration {
        self.settle(settings, now);
        self.ejections = self.ejections.saturating_add(1);
        let time = settings.base_ejection.saturating_mul(self.ejections);
        let until = now.saturating_add(time.min(MAX_EJECTION.max(settings.base_ejection)));
        (self.failures, self.gateway_errors, self.local_failures) = (0, 0, 0);
        self.until = Some(until);
        self.calm_since = until;
        until
    }

    /// Whether the endpoint is ejected at `now`.
    pub fn is_ejected(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// Forgets one ejection for each calm interval.
    fn settle(&mut self, settings: &OutlierSettings, now: Duration) {
        let calm = now.saturating_sub(self.calm_since);
        let intervals = calm.as_nanos().checked_div(settings.interval.as_nanos()).unwrap_or_default();
        self.ejections = self.ejections.saturating_sub(u32::try_from(intervals).unwrap_or(u32::MAX));
    }
}

/// Whether one more of `total` endpoints may be ejected while `ejected` are. The first one always may, unless none may.
pub fn may_eject(settings: &OutlierSettings, ejected: usize, total: usize) -> bool {
    let most = settings.max_ejection_percent as usize;
    most > 0 && (ejected == 0 || (ejected + 1) * 100 <= total * most)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: OutlierSettings = OutlierSettings {
        consecutive_5xx: 3,
        consecutive_gateway_errors: 2,
        consecutive_local_origin: 2,
        split_local_origin: false,
        interval: Duration::from_secs(10),
        base_ejection: Duration::from_secs(30),
        max_ejection_percent: 10,
    };

    fn ejects(settings: &OutlierSettings, outcomes: &[Outcome]) -> bool {
        let mut state = Ejection::default();
        outcomes.iter().fold(false, |_, outcome| state.handle_outcome(settings, Duration::ZERO, *outcome))
    }

    #[test]
    fn failures_in_a_row_eject_and_an_answer_between_them_does_not() {
        use Outcome::{Answer, ClientDeadline, LocalFailure};
        let split = OutlierSettings { split_local_origin: true, ..SETTINGS };
        let off = OutlierSettings { consecutive_5xx: 0, consecutive_gateway_errors: 0, ..SETTINGS };
        assert!(ejects(&SETTINGS, &[Answer(500), Answer(501), Answer(500)]));
        assert!(!ejects(&SETTINGS, &[Answer(500), Answer(500), Answer(200), Answer(500)]));
        assert!(ejects(&SETTINGS, &[Answer(503), LocalFailure]));
        assert!(!ejects(&SETTINGS, &[Answer(503), Answer(500)]));
        assert!(!ejects(&split, &[Answer(503), LocalFailure]));
        assert!(ejects(&split, &[Answer(503), LocalFailure, LocalFailure]));
        assert!(!ejects(&split, &[LocalFailure, Answer(404), LocalFailure]));
        assert!(!ejects(&off, &[LocalFailure; 50]));
        // It neither counts nor ends a series.
        assert!(!ejects(&SETTINGS, &[ClientDeadline; 50]));
        let mut state = Ejection::default();
        let ejected = [Answer(500), Answer(500), ClientDeadline, Answer(500)]
            .map(|outcome| state.handle_outcome(&SETTINGS, Duration::ZERO, outcome));
        assert_eq!(ejected, [false, false, false, true]);
    }

    #[test]
    fn failures_during_an_ejection_do_not_count() {
        let at = Duration::from_secs;
        let mut state = Ejection::default();
        state.eject(&SETTINGS, at(0));
        for second in 1..30 {
            assert!(!state.handle_outcome(&SETTINGS, at(second), Outcome::Answer(500)));
        }
        assert!(!state.handle_outcome(&SETTINGS, at(30), Outcome::Answer(500)));
        assert!(!state.handle_outcome(&SETTINGS, at(31), Outcome::Answer(500)));
        assert!(state.handle_outcome(&SETTINGS, at(32), Outcome::Answer(500)));
    }

    #[test]
    fn each_ejection_is_longer_until_it_was_calm() {
        let mut state = Ejection::default();
        let at = Duration::from_secs;
        assert_eq!(state.eject(&SETTINGS, at(0)), at(30));
        assert!(state.is_ejected(at(29)) && !state.is_ejected(at(30)));
        assert_eq!(state.eject(&SETTINGS, at(31)), at(91));
        assert_eq!(state.eject(&SETTINGS, at(91)), at(181));
        // Three intervals later it is as if it had never been.
        assert_eq!(state.eject(&SETTINGS, at(215)), at(245));
        for _ in 0..100 {
            state.eject(&SETTINGS, at(300));
        }
        assert_eq!(state.eject(&SETTINGS, at(300)), at(600));
    }

    #[test]
    fn only_a_part_may_be_ejected_at_once() {
        assert!(may_eject(&SETTINGS, 0, 1));
        assert!(!may_eject(&SETTINGS, 1, 10));
        assert!(!may_eject(&SETTINGS, 1, 19));
        assert!(may_eject(&SETTINGS, 1, 20));
        let none = OutlierSettings { max_ejection_percent: 0, ..SETTINGS };
        assert!(!may_eject(&none, 0, 10));
    }
}
