//! What a request to an endpoint is expected to cost, learned from the requests before it.

use std::time::Duration;

/// Time in which what was learned loses about two thirds of its weight.
const DECAY: f64 = 10.0;
/// Latency of endpoints that nothing is known of: low, so that they are tried.
const UNKNOWN: f64 = 0.001;

/// Exponentially weighted latency and error rate of an endpoint. A slower answer counts at once (peak), a faster one with time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Seconds.
    latency: f64,
    /// Mean of latencies without peaks, in seconds.
    mean: f64,
    /// Share of requests that failed, from 0 to 1.
    errors: f64,
    updated: Duration,
    samples: u32,
}

/// A cost at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Expected latency in seconds, peaks included.
    pub peak: f64,
    /// Expected latency in seconds.
    pub mean: f64,
    /// Expected share of failures, from 0 to 1.
    pub errors: f64,
    /// How much is known: 0 (nothing) to 1 (learned just now from many).
    pub confidence: f64,
}

impl Default for Cost {
    fn default() -> Self {
        Self { latency: UNKNOWN, mean: UNKNOWN, errors: 0.0, updated: Duration::ZERO, samples: 0 }
    }
}

impl Cost {
    /// Learns from a request that ended at `now`.
    pub fn observe(&mut self, now: Duration, latency: Duration, failed: bool) {
        let latency = latency.as_secs_f64();
        let age = now.saturating_sub(self.updated).as_secs_f64();
        if self.samples == 0 {
            *self = Self { latency, mean: latency, errors: 0.0, updated: now, samples: 0 };
        }
        let kept = (-age / DECAY).exp();
        if latency > self.latency {
            self.latency = latency;
        } else {
            self.latency = self.latency * kept + latency * (1.0 - kept);
        }
        // A sample weighs a tenth at least, so that a burst within the decay is learned from too.
        let kept = kept.min(1.0 - 1.0 / f64::from(self.samples.saturating_add(1).min(10)));
        self.mean = self.mean * kept + latency * (1.0 - kept);
        self.errors = self.errors * kept + f64::from(u8::from(failed)) * (1.0 - kept);
        self.updated = self.updated.max(now);
        self.samples = self.samples.saturating_add(1);
    }

    /// What is expected at `now`: the less was heard since, the nearer to that of an unknown endpoint.
    pub fn estimate(&self, now: Duration) -> Estimate {
        let age = now.saturating_sub(self.updated).as_secs_f64();
        let kept = if self.samples == 0 { 0.0 } else { (-age / DECAY).exp() };
        Estimate {
            peak: self.latency * kept + UNKNOWN * (1.0 - kept),
            mean: self.mean * kept + UNKNOWN * (1.0 - kept),
            errors: self.errors * kept,
            confidence: kept * f64::from(self.samples.min(10)) / 10.0,
        }
    }
}

impl Estimate {
    /// The cost that peak EWMA goes by, with `active` requests in progress.
    pub fn peak_cost(&self, active: u32) -> f64 {
        self.peak * (f64::from(active) + 1.0)
    }

    /// The cost that [`Algorithm::Adaptive`](crate::Algorithm::Adaptive) goes by: a failed request has to be paid for several times, and little
    /// knowledge makes an endpoint cheaper, so that it is tried again (optimism in the face of uncertainty).
    pub fn adaptive_cost(&self, active: u32) -> f64 {
        const FAILURE: f64 = 20.0;
        let optimism = 0.5 + 0.5 * self.confidence;
        self.mean.max(1e-6) * (f64::from(active) + 1.0) * (1.0 + FAILURE * self.errors) * optimism
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_slow_answer_counts_at_once_and_a_fast_one_with_time() {
        let mut cost = Cost::default();
        let at = |seconds| Duration::from_secs(seconds);
        cost.observe(at(1), 10 * MS, false);
        cost.observe(at(1), 500 * MS, false);
        assert!((cost.estimate(at(1)).peak - 0.5).abs() < 1e-9);
        cost.observe(at(2), 10 * MS, false);
        assert!(cost.estimate(at(2)).peak > 0.4);
        for second in 3..60 {
            cost.observe(at(second), 10 * MS, false);
        }
        assert!(cost.estimate(at(60)).peak < 0.02);
    }

    #[test]
    fn what_was_learned_is_forgotten() {
        let mut cost = Cost::default();
        for _ in 0..20 {
            cost.observe(Duration::from_secs(1), 900 * MS, true);
        }
        let fresh = cost.estimate(Duration::from_secs(1));
        let stale = cost.estimate(Duration::from_secs(120));
        assert!(fresh.errors > 0.8 && fresh.confidence > 0.9, "{fresh:?}");
        assert!(stale.errors < 0.01 && stale.confidence < 0.01 && stale.peak < 0.01, "{stale:?}");
    }
}
