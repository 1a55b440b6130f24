//! Balancing under simulated load, in virtual time: one endpoint is slow, one fails, one recovers halfway.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a test fails by panicking")]

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use ambit_balance::{Algorithm, Cost, Members, Pool, hash};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Endpoints; requests a second; requests.
const ENDPOINTS: usize = 6;
const RATE: u64 = 400;
const REQUESTS: u64 = 40_000;
/// What a client waits before it sends a failed request again.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

struct Endpoints {
    now: Duration,
    costs: Vec<Cost>,
    active: Vec<u32>,
}

impl Members for Endpoints {
    fn is_usable(&self, _: usize) -> bool {
        true
    }
    fn peak_cost(&self, at: usize) -> f64 {
        self.costs[at].estimate(self.now).peak_cost(self.active[at])
    }
    fn adaptive_cost(&self, at: usize) -> f64 {
        self.costs[at].estimate(self.now).adaptive_cost(self.active[at])
    }
    fn active(&self, at: usize) -> u32 {
        self.active[at]
    }
    fn warmth(&self, _: usize) -> f64 {
        1.0
    }
}

/// How long an endpoint takes, and whether it fails.
fn served(at: usize, now: Duration, rng: &mut StdRng) -> (Duration, bool) {
    let half = Duration::from_secs(REQUESTS / RATE / 2);
    let base = match at {
        0 => 80.0,
        // Recovers.
        1 if now < half => 60.0,
        _ => 10.0,
    };
    let tail: f64 = rng.random();
    let milliseconds = base * (0.5 - 0.5 * (1.0 - tail).ln());
    // Fails half of the time, and quickly.
    match at == 2 && rng.random_bool(0.5) {
        true => (Duration::from_millis(2), true),
        false => (Duration::from_secs_f64(milliseconds / 1000.0), false),
    }
}

struct Result {
    mean: Duration,
    p99: Duration,
    /// Share of the requests of the last quarter that went to the endpoint that recovered.
    recovered: f64,
}

/// A request as it ends: when, where, since when in this try, whether it fails, since when in all.
type End = Reverse<(Duration, usize, Duration, bool, Duration)>;

fn simulate(algorithm: Algorithm) -> Result {
    let mut rng = StdRng::seed_from_u64(11);
    let endpoints = Endpoints {
        now: Duration::ZERO,
        costs: vec![Cost::default(); ENDPOINTS],
        active: vec![0; ENDPOINTS],
    };
    let endpoints = RefCell::new(endpoints);
    let names: Vec<(u64, u32)> = (0..ENDPOINTS).map(|at| (hash(&at.to_le_bytes()), 1)).collect();
    let pool = Pool::new(algorithm, &names);
    let (mut turn, mut late) = (0, (0_u64, 0_u64));
    let mut ends: BinaryHeap<End> = BinaryHeap::new();
    let mut starts: BinaryHeap<Reverse<(Duration, Duration)>> = (0..REQUESTS)
        .map(|request| Duration::from_secs_f64(request as f64 / RATE as f64))
        .map(|at| Reverse((at, at)))
        .collect();
    let last_quarter = Duration::from_secs(REQUESTS / RATE * 3 / 4);
    let mut took = Vec::new();
    loop {
        let next_end = ends.peek().map(|Reverse(end)| end.0);
        let next_start = starts.peek().map(|Reverse(start)| start.0);
        let is_end = match (next_end, next_start) {
            (None, None) => break,
            (Some(end), Some(start)) => end <= start,
            (end, _) => end.is_some(),
        };
        let mut endpoints = endpoints.borrow_mut();
        if is_end {
            let Reverse((now, at, since, failed, first)) = ends.pop().unwrap();
            endpoints.now = now;
            endpoints.active[at] -= 1;
            endpoints.costs[at].observe(now, now - since, failed);
            match failed {
                true => starts.push(Reverse((now + AFTER_FAILURE, first))),
                false => took.push(now - first),
            }
        } else {
            let Reverse((now, first)) = starts.pop().unwrap();
            endpoints.now = now;
            turn += 1;
            let at = pool.choose(&*endpoints, turn, None, &mut rng).unwrap();
            endpoints.active[at] += 1;
            if now > last_quarter {
                late = (late.0 + u64::from(at == 1), late.1 + 1);
            }
            let (time, failed) = served(at, now, &mut rng);
            ends.push(Reverse((now + time, at, now, failed, first)));
        }
    }
    took.sort_unstable();
    let sum: Duration = took.iter().sum();
    Result {
        mean: sum / u32::try_from(took.len()).unwrap(),
        p99: took[took.len() * 99 / 100],
        recovered: late.0 as f64 / late.1 as f64,
    }
}

/// Adaptive balancing has the lower mean and p99, failed tries included, and comes back to an endpoint that recovers.
#[test]
fn adaptive_balancing_beats_round_robin_and_peak_ewma() {
    let adaptive = simulate(Algorithm::Adaptive);
    for other in [Algorithm::RoundRobin, Algorithm::PeakEwma] {
        let result = simulate(other);
        let figures = format!(
            "adaptive {:?} {:?}, {other:?} {:?} {:?}",
            adaptive.mean, adaptive.p99, result.mean, result.p99
        );
        assert!(adaptive.mean < result.mean && adaptive.p99 < result.p99, "{figures}");
    }
    assert!(adaptive.recovered > 0.1, "{}", adaptive.recovered);
}
