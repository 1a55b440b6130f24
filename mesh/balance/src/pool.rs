//! A choice among endpoints that are alike but for their weight.

use rand::{Rng, RngExt};

use crate::hash::{Table, TableKind};

/// Draws at most so often before all are looked at.
const DRAWS: usize = 12;
/// Draws at most so often for another candidate to compare with.
const MORE_DRAWS: usize = 4;
/// Places of a table that are looked at before all endpoints are.
const PLACES: usize = 32;
/// Endpoints that an adaptive choice compares.
const ADAPTIVE_CANDIDATES: usize = 8;
/// Of so many adaptive choices one is a trial of whichever endpoint is drawn.
const TRIAL: u32 = 50;
/// The longest schedule of turns.
const MOST_TURNS: usize = 4096;

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// Of two that are drawn the one with the lower peak EWMA cost.
    #[default]
    PeakEwma,
    /// In turn.
    RoundRobin,
    /// Of two that are drawn the one with fewer requests in progress.
    LeastRequest,
    /// At random.
    Random,
    /// By the hash of a key, with such a table.
    ConsistentHash(TableKind),
    /// Of several that are drawn the one with the lowest expected cost, failures included; now and then another one, to learn of it.
    Adaptive,
}

/// What changes from request to request.
pub trait Members {
    /// Whether the endpoint may be chosen now.
    fn is_usable(&self, at: usize) -> bool;
    /// Its cost by peak EWMA; the lowest is best.
    fn peak_cost(&self, at: usize) -> f64;
    /// Its cost as adaptive balancing sees it.
    fn adaptive_cost(&self, at: usize) -> f64;
    /// Its requests in progress.
    fn active(&self, at: usize) -> u32;
    /// The part of its share that it gets, from 0 to 1: less than 1 while it warms up.
    fn warmth(&self, at: usize) -> f64;
}

/// Endpoints, numbered from 0, and how one of them is chosen.
#[derive(Debug, Clone)]
pub struct Pool {
    algorithm: Algorithm,
    /// The sum of the weights up to and including each.
    cumulative: Box<[u64]>,
    /// With `RoundRobin`: whose turn it is.
    turns: Box<[u32]>,
    table: Option<Table>,
}

impl Pool {
    /// A pool of endpoints, each with the hash of its name and its weight.
    pub fn new(algorithm: Algorithm, endpoints: &[(u64, u32)]) -> Self {
        let mut sum = 0;
        let cumulative = endpoints.iter().map(|(_, weight)| {
            sum += u64::from(*weight);
            sum
        });
        let cumulative = cumulative.collect();
        Self {
            algorithm,
            cumulative,
            turns: match algorithm {
                Algorithm::RoundRobin => turns(endpoints),
                _ => Box::default(),
            },
            table: match algorithm {
                Algorithm::ConsistentHash(kind) => Some(Table::new(kind, endpoints)),
                _ => None,
            },
        }
    }

    /// How many endpoints there are.
    pub fn len(&self) -> usize {
        self.cumulative.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.cumulative.is_empty()
    }

    /// Chooses a usable endpoint. `turn` counts the choices, `key` is the hash of the request where it has one; without one, consistent
    /// hashing chooses at random. Without a usable endpoint with a weight there is none.
    pub fn choose(
        &self,
        members: &impl Members,
        turn: u64,
        key: Option<u64>,
        rng: &mut impl Rng,
    ) -> Option<usize> {
        if let (Some(table), Some(key)) = (&self.table, key) {
            return self.by_key(table, members, key);
        }
        match self.algorithm {
            Algorithm::RoundRobin => self.in_turn(members, turn, rng),
            Algorithm::Random | Algorithm::ConsistentHash(_) => self.draw(members, rng),
            Algorithm::PeakEwma => self.cheapest(members, 2, rng, |at| members.peak_cost(at)),
            Algorithm::LeastRequest => self.cheapest(members, 2, rng, |at| f64::from(members.active(at))),
            Algorithm::Adaptive if rng.random_range(0..TRIAL) == 0 => self.draw(members, rng),
            Algorithm::Adaptive => {
                self.cheapest(members, ADAPTIVE_CANDIDATES, rng, |at| members.adaptive_cost(at))
            }
        }
    }

    /// The first usable endpoint of the table from the place of the key on. Each endpoint is asked at most once beyond the first places: a
    /// table has far more places than endpoints.
    fn by_key(&self, table: &Table, members: &impl Members, key: u64) -> Option<usize> {
        if let Some(at) = table.walk(key).take(PLACES).find(|at| members.is_usable(*at)) {
            return Some(at);
        }
        let usable: Vec<bool> =
            (0..self.len()).map(|at| self.has_weight(at) && members.is_usable(at)).collect();
        if !usable.contains(&true) {
            return None;
        }
        table.walk(key).skip(PLACES).find(|at| usable.get(*at).copied().unwrap_or(false))
    }

    fn has_weight(&self, at: usize) -> bool {
        let before = at.checked_sub(1).and_then(|before| self.cumulative.get(before));
        self.cumulative.get(at) > Some(before.unwrap_or(&0))
    }

    fn in_turn(&self, members: &impl Members, turn: u64, rng: &mut impl Rng) -> Option<usize> {
        let size = self.turns.len() as u64;
        let first = turn.checked_rem(size)?;
        let (before, after) = self.turns.split_at(usize::try_from(first).unwrap_or(0));
        let mut passed_by = None;
        for at in after.iter().chain(before).map(|at| *at as usize).filter(|at| members.is_usable(*at)) {
            if is_warm(members, at, rng) {
                return Some(at);
            }
            passed_by.get_or_insert(at);
        }
        passed_by
    }

    /// Draws in proportion to weight and warmth.
    fn draw(&self, members: &impl Members, rng: &mut impl Rng) -> Option<usize> {
        let total = *self.cumulative.last().filter(|total| **total > 0)?;
        for _ in 0..DRAWS {
            let at = self.at(rng.random_range(0..total));
            if members.is_usable(at) && is_warm(members, at, rng) {
                return Some(at);
            }
        }
        // Few are usable: each is kept with the probability that is its share so far.
        let (mut kept, mut sum, mut before) = (None, 0, 0);
        for (at, below) in self.cumulative.iter().enumerate() {
            let weight = below - before;
            before = *below;
            if weight == 0 || !members.is_usable(at) {
                continue;
            }
            sum += weight;
            if rng.random_range(0..sum) < weight {
                kept = Some(at);
            }
        }
        kept
    }

    fn at(&self, draw: u64) -> usize {
        self.cumulative.partition_point(|below| *below <= draw)
    }

    /// The cheapest of up to `candidates` that are drawn; of all, if these are no more.
    fn cheapest(
        &self,
        members: &impl Members,
        candidates: usize,
        rng: &mut impl Rng,
        cost: impl Fn(usize) -> f64,
    ) -> Option<usize> {
        let mut best = self.draw(members, rng)?;
        let mut lowest = cost(best);
        for _ in 1..candidates {
            let other = (0..MORE_DRAWS).find_map(|_| self.draw(members, rng).filter(|at| *at != best));
            let Some(other) = other else { continue };
            let of_other = cost(other);
            if of_other < lowest {
                (best, lowest) = (other, of_other);
            }
        }
        Some(best)
    }
}

fn is_warm(members: &impl Members, at: usize, rng: &mut impl Rng) -> bool {
    let warmth = members.warmth(at);
    warmth >= 1.0 || rng.random::<f64>() < warmth
}

/// A schedule in which each endpoint comes in proportion to its weight, evenly spread (smooth weighted round robin).
fn turns(endpoints: &[(u64, u32)]) -> Box<[u32]> {
    let weights: Vec<i64> = endpoints.iter().map(|(_, weight)| i64::from(*weight)).collect();
    let divisor = weights.iter().fold(0, |divisor, weight| gcd(divisor, *weight)).max(1);
    let mut weights: Vec<i64> = weights.iter().map(|weight| weight / divisor).collect();
    let most = i64::try_from(MOST_TURNS.max(endpoints.len())).unwrap_or(i64::MAX);
    let total: i64 = weights.iter().sum();
    if total > most {
        let scale = |weight: &i64| if *weight == 0 { 0 } else { (weight * most / total).max(1) };
        weights = weights.iter().map(scale).collect();
    }
    let total: i64 = weights.iter().sum();
    let mut credits = vec![0; weights.len()];
    let next = |_| {
        credits.iter_mut().zip(&weights).for_each(|(credit, weight)| *credit += weight);
        // The first of equals.
        let (at, credit) = credits.iter_mut().enumerate().rev().max_by_key(|(_, credit)| **credit)?;
        *credit -= total;
        u32::try_from(at).ok()
    };
    (0..total).filter_map(next).collect()
}

fn gcd(a: i64, b: i64) -> i64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
