//! Consistent hashing: a key keeps its endpoint while that is there, and few keys move when another comes or goes.

/// The form of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableKind {
    /// Points on a ring, at least so many (Karger et al., 1997).
    Ring(usize),
    /// A table of so many places (Eisenbud et al., "Maglev", 2016). Made prime.
    Maglev(usize),
}

/// Greatest number of points or places. The greatest prime below is one less.
const MOST: usize = 1 << 17;

/// The table of a set of endpoints. The same set gives the same table in every process, in whatever order it is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Hash at which the part of an endpoint ends, and its index; one place after the other for Maglev.
    places: Box<[(u64, u32)]>,
    is_ring: bool,
}

/// The hash of a key: FNV-1a, mixed. The same in every process.
pub fn hash(key: &[u8]) -> u64 {
    let fnv = key.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    mix(fnv)
}

/// The finalizer of SplitMix64.
fn mix(mut hash: u64) -> u64 {
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

impl Table {
    /// The table of endpoints, each with the hash of its name and its weight.
    pub fn new(kind: TableKind, endpoints: &[(u64, u32)]) -> Self {
        match kind {
            TableKind::Ring(least) => Self::ring(least, endpoints),
            TableKind::Maglev(size) => Self::maglev(size, endpoints),
        }
    }

    fn ring(least: usize, endpoints: &[(u64, u32)]) -> Self {
        let total: u64 = endpoints.iter().map(|(_, weight)| u64::from(*weight)).sum();
        let least = least.min(MOST) as u64;
        let mut places = Vec::new();
        for (at, (name, weight)) in (0_u32..).zip(endpoints) {
            // A power of two for each unit of weight: the points of the others stay as they are when one endpoint comes or goes.
            let points = least.div_ceil(total.max(1)).next_power_of_two().saturating_mul(u64::from(*weight));
            let points = points.min((MOST / endpoints.len()).max(1) as u64);
            places.extend((0..points).map(|point| (mix(name.wrapping_add(mix(point + 1))), at, *name)));
        }
        // Equal hashes are ordered by name, whatever the order of the endpoints.
        places.sort_unstable_by_key(|(hash, _, name)| (*hash, *name));
        Self { places: places.into_iter().map(|(hash, at, _)| (hash, at)).collect(), is_ring: true }
    }

    fn maglev(size: usize, endpoints: &[(u64, u32)]) -> Self {
        let size = prime(size.clamp(endpoints.len().clamp(3, MOST), MOST));
        let mut places: Vec<Option<u32>> = vec![None; size];
        let mut order: Vec<(u64, u32, u32)> =
            (0_u32..).zip(endpoints).map(|(at, (name, weight))| (*name, *weight, at)).collect();
        order.retain(|(_, weight, _)| *weight > 0);
        order.sort_unstable();
        let heaviest = order.iter().map(|(_, weight, _)| *weight).max().unwrap_or(1);
        let mut turns: Vec<(usize, u64)> = vec![(0, 0); order.len()];
        let mut left = if order.is_empty() { 0 } else { size };
        let mut round = 0_u64;
        while left > 0 {
            round += 1;
            for ((name, weight, at), (next, taken)) in order.iter().zip(&mut turns) {
                // In proportion to the weight: the heaviest takes a place in each round.
                if *taken * u64::from(heaviest) >= round * u64::from(*weight) || left == 0 {
                    continue;
                }
                let (offset, skip) = permutation(*name, size);
                loop {
                    let place = (offset + *next * skip) % size;
                    *next += 1;
                    if let Some(free) = places.get_mut(place).filter(|place| place.is_none()) {
                        *free = Some(*at);
                        break;
                    }
                }
                *taken += 1;
                left -= 1;
            }
        }
        let places = (0_u64..).zip(places).filter_map(|(place, at)| Some((place, at?)));
        Self { places: places.collect(), is_ring: false }
    }

    /// The endpoints for a key, the first that is to be used first; each may come several times, and all come in the end.
    pub fn walk(&self, key: u64) -> impl Iterator<Item = usize> {
        let size = self.places.len();
        let start = match self.is_ring {
            true => self.places.partition_point(|(hash, _)| *hash < key),
            false => usize::try_from(key % (size.max(1) as u64)).unwrap_or(0),
        };
        let (before, after) = self.places.split_at(start.min(size));
        after.iter().chain(before).map(|(_, at)| *at as usize)
    }
}

fn permutation(name: u64, size: usize) -> (usize, usize) {
    let size = size as u64;
    let (offset, skip) = (mix(name ^ 0x6f66_6673) % size, mix(name ^ 0x736b_6970) % (size - 1) + 1);
    (usize::try_from(offset).unwrap_or(0), usize::try_from(skip).unwrap_or(1))
}

/// The least prime from `least` on.
fn prime(least: usize) -> usize {
    let is_prime = |n: &usize| *n > 1 && (2..).take_while(|d| d * d <= *n).all(|d| !n.is_multiple_of(d));
    (least..).find(is_prime).unwrap_or(65_537)
}
