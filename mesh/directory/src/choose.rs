//! The choice of an endpoint from a pool.
//!
//! Two are drawn at random in proportion to their capacity, and the one with fewer connections for its capacity is taken ("power of two
//! choices"). With session affinity the client's address and the endpoint's uid decide: rendezvous hashing, so that an endpoint that comes or
//! goes moves no more clients than its share.

use std::net::IpAddr;

use rand::{Rng, RngExt};

use crate::convert::{mix, spread};
use crate::endpoints::{Endpoint, Pool};
use crate::name::WorkloadUid;
use crate::workload::Workload;

/// Draws at most so often before the pool is walked.
const DRAWS: usize = 12;
/// Draws at most so often for a second candidate; without one the first is taken.
const SECOND_DRAWS: usize = 4;

/// How a workload does, as far as this node sees.
pub trait Load {
    /// Connections open now to the workload.
    fn connections(&self, workload: &WorkloadUid) -> u32;

    /// Whether the workload is ejected for a while because it could not be reached. Chosen only where all others are too.
    fn is_ejected(&self, workload: &Workload) -> bool {
        let _ = workload;
        false
    }
}

impl<F: Fn(&WorkloadUid) -> u32> Load for F {
    fn connections(&self, workload: &WorkloadUid) -> u32 {
        self(workload)
    }
}

/// An endpoint and the port of it that the connection goes to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Choice<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) port: u16,
}

/// Chooses among the endpoints for which `usable` gives a port.
pub(crate) fn least_loaded<'a>(
    pool: &'a Pool,
    usable: impl Fn(&Endpoint) -> Option<u16>,
    load: &impl Load,
    rng: &mut impl Rng,
) -> Option<Choice<'a>> {
    let (at, first) = draw(pool, None, &usable, rng, DRAWS).or_else(|| walk(pool, &usable, rng))?;
    let Some((_, second)) = draw(pool, Some(at), &usable, rng, SECOND_DRAWS) else { return Some(first) };
    let weighted = |one: &Choice<'_>, other: &Choice<'_>| {
        u64::from(load.connections(&one.endpoint.workload.uid)) * u64::from(other.endpoint.workload.capacity)
    };
    Some(if weighted(&second, &first) < weighted(&first, &second) { second } else { first })
}

/// Chooses by the client's address: the usable endpoint with the highest score, each in proportion to its capacity.
pub(crate) fn by_affinity<'a>(
    pool: &'a Pool,
    usable: impl Fn(&Endpoint) -> Option<u16>,
    client: IpAddr,
) -> Option<Choice<'a>> {
    let client = match client.to_canonical() {
        IpAddr::V4(v4) => spread(&v4.octets()),
        IpAddr::V6(v6) => spread(&v6.octets()),
    };
    let scored = pool.iter().filter_map(|endpoint| {
        let port = usable(endpoint)?;
        Some((
            score(endpoint.workload.spread ^ client, endpoint.workload.capacity),
            Choice { endpoint, port },
        ))
    });
    let best = scored.max_by(|(one, first), (other, second)| {
        one.total_cmp(other).then_with(|| first.endpoint.workload.uid.cmp(&second.endpoint.workload.uid))
    });
    best.map(|(_, choice)| choice)
}

/// Weighted rendezvous hashing: `-weight / ln(hash)`, the hash uniform between 0 and 1.
fn score(seed: u64, capacity: u32) -> f64 {
    /// 2⁵³: the integers that a double holds exactly.
    const SPAN: f64 = 9_007_199_254_740_992.0;
    let uniform = ((mix(seed) >> 11) as f64 + 0.5) / SPAN;
    -f64::from(capacity) / uniform.ln()
}

/// Draws up to `draws` times in proportion to capacity, but never the endpoint at `but`.
fn draw<'a>(
    pool: &'a Pool,
    but: Option<usize>,
    usable: &impl Fn(&Endpoint) -> Option<u16>,
    rng: &mut impl Rng,
    draws: usize,
) -> Option<(usize, Choice<'a>)> {
    let candidates = pool.len() - usize::from(but.is_some());
    if candidates == 0 {
        return None;
    }
    let heaviest = pool.heaviest();
    (0..draws).find_map(|_| {
        let drawn = rng.random_range(0..candidates);
        let at = drawn + usize::from(but.is_some_and(|but| drawn >= but));
        let endpoint = pool.get(at)?;
        let capacity = endpoint.workload.capacity;
        if capacity < heaviest && rng.random_range(0..heaviest) >= capacity {
            return None;
        }
        Some((at, Choice { endpoint, port: usable(endpoint)? }))
    })
}

/// Walks over the pool and keeps each usable endpoint with the probability that is its share so far.
fn walk<'a>(
    pool: &'a Pool,
    usable: &impl Fn(&Endpoint) -> Option<u16>,
    rng: &mut impl Rng,
) -> Option<(usize, Choice<'a>)> {
    let (mut kept, mut total) = (None, 0u64);
    for (at, endpoint) in pool.iter().enumerate() {
        let Some(port) = usable(endpoint) else { continue };
        let capacity = u64::from(endpoint.workload.capacity);
        total += capacity;
        if rng.random_range(0..total) < capacity {
            kept = Some((at, Choice { endpoint, port }));
        }
    }
    kept
}
