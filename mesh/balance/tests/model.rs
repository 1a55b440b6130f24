//! Choices against naive models, and under simulated load.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::collections::HashMap;

use ambit_balance::{Algorithm, Members, Pool, TableKind, hash};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

struct Fixed {
    usable: Vec<bool>,
    cost: Vec<f64>,
}

impl Members for Fixed {
    fn is_usable(&self, at: usize) -> bool {
        self.usable[at]
    }
    fn peak_cost(&self, at: usize) -> f64 {
        self.cost[at]
    }
    fn adaptive_cost(&self, at: usize) -> f64 {
        self.cost[at]
    }
    fn active(&self, at: usize) -> u32 {
        self.cost[at] as u32
    }
    fn warmth(&self, _: usize) -> f64 {
        1.0
    }
}

fn all_usable(count: usize) -> Fixed {
    Fixed { usable: vec![true; count], cost: vec![1.0; count] }
}

fn named(weights: &[u32]) -> Vec<(u64, u32)> {
    weights.iter().enumerate().map(|(at, weight)| (hash(&at.to_le_bytes()), *weight)).collect()
}

fn algorithms() -> impl Strategy<Value = Algorithm> {
    prop::sample::select(vec![
        Algorithm::PeakEwma,
        Algorithm::RoundRobin,
        Algorithm::LeastRequest,
        Algorithm::Random,
        Algorithm::ConsistentHash(TableKind::Ring(64)),
        Algorithm::ConsistentHash(TableKind::Maglev(101)),
        Algorithm::Adaptive,
    ])
}

proptest! {
    /// There is a choice exactly if something with a weight is usable, and only such is chosen.
    #[test]
    fn only_usable_endpoints_are_chosen(
        algorithm in algorithms(),
        endpoints in prop::collection::vec((1_u32..5, any::<bool>()), 0..20),
        key in any::<Option<u64>>(),
        turn in any::<u64>(),
        seed in any::<u64>(),
    ) {
        let weights: Vec<u32> = endpoints.iter().map(|(weight, _)| *weight).collect();
        let pool = Pool::new(algorithm, &named(&weights));
        let members = Fixed {
            usable: endpoints.iter().map(|(_, usable)| *usable).collect(),
            cost: vec![1.0; weights.len()],
        };
        let chosen = pool.choose(&members, turn, key, &mut StdRng::seed_from_u64(seed));
        prop_assert_eq!(chosen.is_some(), members.usable.contains(&true));
        if let Some(at) = chosen {
            prop_assert!(members.usable[at]);
        }
    }

    /// A round of turns is each endpoint as often as its weight says.
    #[test]
    fn turns_are_in_proportion_to_weights(weights in prop::collection::vec(1_u32..6, 1..8)) {
        let pool = Pool::new(Algorithm::RoundRobin, &named(&weights));
        let members = all_usable(weights.len());
        let total: u32 = weights.iter().sum();
        let mut counts = vec![0; weights.len()];
        let mut rng = StdRng::seed_from_u64(1);
        for turn in 0..u64::from(total) {
            counts[pool.choose(&members, turn, None, &mut rng).unwrap()] += 1;
        }
        prop_assert_eq!(counts, weights);
    }

    /// The same key has the same endpoint in whatever order endpoints are listed; and keeps it when another one goes.
    #[test]
    fn a_key_keeps_its_endpoint(
        count in 2_usize..12,
        gone in any::<prop::sample::Index>(),
        keys in prop::collection::vec(any::<u64>(), 1..40),
        maglev in any::<bool>(),
    ) {
        let kind = if maglev { TableKind::Maglev(2003) } else { TableKind::Ring(1024) };
        let endpoints = named(&vec![1; count]);
        let reversed: Vec<_> = endpoints.iter().rev().copied().collect();
        let choose = |endpoints: &[(u64, u32)], members: &Fixed, key| {
            let pool = Pool::new(Algorithm::ConsistentHash(kind), endpoints);
            let at = pool.choose(members, 0, Some(key), &mut StdRng::seed_from_u64(0)).unwrap();
            endpoints[at].0
        };
        let all = all_usable(count);
        let gone = gone.index(count);
        let mut less = all_usable(count);
        less.usable[gone] = false;
        for key in keys {
            let before = choose(&endpoints, &all, key);
            prop_assert_eq!(before, choose(&reversed, &all, key));
            let after = choose(&endpoints, &less, key);
            if before != endpoints[gone].0 {
                prop_assert_eq!(before, after);
            }
        }
    }
}

#[test]
fn draws_are_in_proportion_to_weights() {
    for algorithm in [
        Algorithm::Random,
        Algorithm::ConsistentHash(TableKind::Ring(4096)),
        Algorithm::ConsistentHash(TableKind::Maglev(65_537)),
    ] {
        let pool = Pool::new(algorithm, &named(&[1, 2, 5]));
        let members = all_usable(3);
        let mut rng = StdRng::seed_from_u64(7);
        let mut counts = [0_u32; 3];
        for key in 0..40_000_u64 {
            counts[pool.choose(&members, key, Some(hash(&key.to_le_bytes())), &mut rng).unwrap()] += 1;
        }
        for (count, weight) in counts.iter().zip([1, 2, 5]) {
            let expected = 5000 * weight;
            assert!(count.abs_diff(expected) < expected / 5, "{algorithm:?}: {counts:?}");
        }
    }
}

/// Endpoints that count how often they are asked, and of which one, if any, is usable.
struct Counting {
    asked: Cell<usize>,
    usable: Option<usize>,
}

impl Members for Counting {
    fn is_usable(&self, at: usize) -> bool {
        self.asked.set(self.asked.get() + 1);
        Some(at) == self.usable
    }
    fn peak_cost(&self, _: usize) -> f64 {
        1.0
    }
    fn adaptive_cost(&self, _: usize) -> f64 {
        1.0
    }
    fn active(&self, _: usize) -> u32 {
        0
    }
    fn warmth(&self, _: usize) -> f64 {
        1.0
    }
}

/// However large the table is.
#[test]
fn a_hashed_choice_asks_each_endpoint_a_few_times_at_most() {
    for kind in [TableKind::Ring(1 << 20), TableKind::Maglev(1 << 20)] {
        let pool = Pool::new(Algorithm::ConsistentHash(kind), &named(&[1, 3, 1000, 1]));
        for usable in [None, Some(0), Some(3)] {
            let members = Counting { asked: Cell::new(0), usable };
            assert_eq!(pool.choose(&members, 0, Some(hash(b"key")), &mut StdRng::seed_from_u64(0)), usable);
            assert!(members.asked.get() <= 40, "{kind:?} {usable:?}: {}", members.asked.get());
        }
    }
}

/// Little moves when an endpoint comes.
#[test]
fn few_keys_move_to_other_endpoints() {
    for (kind, most) in [(TableKind::Ring(8192), 0.13), (TableKind::Maglev(65_537), 0.16)] {
        let owner = |count: usize| {
            let endpoints = named(&vec![1; count]);
            let pool = Pool::new(Algorithm::ConsistentHash(kind), &endpoints);
            let mut rng = StdRng::seed_from_u64(0);
            let owners: Vec<u64> = (0..10_000_u64)
                .map(|key| {
                    endpoints[pool
                        .choose(&all_usable(count), 0, Some(hash(&key.to_le_bytes())), &mut rng)
                        .unwrap()]
                    .0
                })
                .collect();
            owners
        };
        let (before, after) = (owner(9), owner(10));
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count() as f64 / 10_000.0;
        assert!(moved < most, "{kind:?}: {moved}");
    }
}

#[test]
fn the_cheaper_of_two_is_chosen() {
    let members = Fixed { usable: vec![true; 2], cost: vec![5.0, 1.0] };
    for algorithm in [Algorithm::PeakEwma, Algorithm::LeastRequest] {
        let pool = Pool::new(algorithm, &named(&[1, 1]));
        let mut rng = StdRng::seed_from_u64(3);
        let mut counts: HashMap<usize, u32> = HashMap::new();
        for turn in 0..1000 {
            *counts.entry(pool.choose(&members, turn, None, &mut rng).unwrap()).or_default() += 1;
        }
        // Now and then a second one is not found among the draws.
        assert!(counts[&1] > 900, "{algorithm:?}: {counts:?}");
    }
}
