//! Token buckets by key, in a table of bounded size.
//!
//! A bucket is kept as the time at which it is full again (the generic cell rate algorithm): one number, no timer. A bucket that is
//! full is the same as none, so it may be evicted at any time without changing a decision.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::LazyLock;
use std::time::Duration;

use parking_lot::Mutex;

/// Most buckets of one rate limit.
pub const CAPACITY: usize = 16_384;
/// Most buckets of one rate limit that one client may use.
pub const MOST_OF_ONE_CLIENT: usize = CAPACITY / 4;
/// Nanoseconds between two searches for buckets to evict.
const SWEEP_PAUSE: u64 = 100_000_000;

/// How often something may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Nanoseconds in which one token is added.
    period: u64,
    /// Nanoseconds in which an empty bucket is filled.
    depth: u64,
}

impl Rate {
    /// `requests` in each interval, and at most `burst` at once. Each is taken as at least 1. The time for one token is rounded
    /// up, so that never more is allowed.
    pub fn new(requests: u64, interval: Duration, burst: u64) -> Self {
        let interval = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
        let period = interval.div_ceil(requests.max(1)).max(1);
        Self { period, depth: period.saturating_mul(burst.max(1)) }
    }
}

/// Which bucket, or whose: 128 bits of a keyed hash of what it stands for. Its key is drawn at the start of the program, so a client
/// can't find two values that share a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Id(u64, u64);

static KEYS: LazyLock<[RandomState; 2]> = LazyLock::new(|| [RandomState::new(), RandomState::new()]);

impl Id {
    /// The id of what `parts` feeds to a hasher.
    pub fn of(parts: impl Fn(&mut dyn Hasher)) -> Self {
        let [first, second] = &*KEYS;
        let hash = |state: &RandomState| {
            let mut hasher = state.build_hasher();
            parts(&mut hasher);
            hasher.finish()
        };
        Self(hash(first), hash(second))
    }

    /// The id of a value.
    pub fn of_value(value: &(impl Hash + ?Sized)) -> Self {
        Self::of(|mut hasher| value.hash(&mut hasher))
    }
}

/// What became of asking for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// There was one; so many are left.
    Granted {
        /// Tokens that are left.
        remaining: u64,
    },
    /// There is none until this time has passed.
    Refused {
        /// How long until there is one.
        retry_after: Duration,
    },
    /// There is no room for another bucket, or for another of this client.
    Full,
}

#[derive(Debug)]
struct Bucket {
    /// When it is full again.
    full_at: u64,
    owner: Id,
}

#[derive(Debug, Default)]
struct Table {
    buckets: HashMap<Id, Bucket>,
    /// How many buckets each client has.
    owners: HashMap<Id, usize>,
    next_sweep: u64,
}

/// The buckets of one rate limit. Workers share them: the lock is held for one look-up.
#[derive(Debug)]
pub struct Buckets {
    rate: Rate,
    capacity: usize,
    table: Mutex<Table>,
}

impl Buckets {
    /// No bucket yet; all are full.
    pub fn new(rate: Rate) -> Self {
        Self::with_capacity(rate, CAPACITY)
    }

    fn with_capacity(rate: Rate, capacity: usize) -> Self {
        Self { rate, capacity, table: Mutex::default() }
    }

    /// The rate.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Takes a token for a request of the client `owner` at `now`, in nanoseconds since a moment that is always the same.
    pub fn take(&self, id: Id, owner: Id, now: u64) -> Taken {
        let mut table = self.table.lock();
        if let Some(bucket) = table.buckets.get_mut(&id) {
            let (taken, full_at) = self.decide(bucket.full_at, now);
            bucket.full_at = full_at;
            return taken;
        }
        if !table.has_room(owner, self.capacity, now) {
            return Taken::Full;
        }
        let (taken, full_at) = self.decide(now, now);
        table.buckets.insert(id, Bucket { full_at, owner });
        *table.owners.entry(owner).or_default() += 1;
        taken
    }

    /// What [`take`](Self::take) would say, without taking anything.
    pub fn peek(&self, id: Id, owner: Id, now: u64) -> Taken {
        let table = self.table.lock();
        match table.buckets.get(&id) {
            Some(bucket) => self.decide(bucket.full_at, now).0,
            None if table.is_full(owner, self.capacity) => Taken::Full,
            None => self.decide(now, now).0,
        }
    }

    /// Number of buckets.
    pub fn len(&self) -> usize {
        self.table.lock().buckets.len()
    }

    /// Whether there is no bucket.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The decision about a bucket, and when it is full again after that.
    fn decide(&self, full_at: u64, now: u64) -> (Taken, u64) {
        let Rate { period, depth } = self.rate;
        let next = full_at.max(now).saturating_add(period);
        let used = next.saturating_sub(now);
        match used.checked_sub(depth) {
            Some(over @ 1..) => (Taken::Refused { retry_after: Duration::from_nanos(over) }, full_at),
            _ => (Taken::Granted { remaining: (depth - used) / period }, next),
        }
    }
}

impl Table {
    fn is_full(&self, owner: Id, capacity: usize) -> bool {
        let own = self.owners.get(&owner).copied().unwrap_or_default();
        self.buckets.len() >= capacity || own >= capacity / 4
    }

    /// Whether a client may have another bucket, once those that are full again are evicted.
    fn has_room(&mut self, owner: Id, capacity: usize, now: u64) -> bool {
        if self.is_full(owner, capacity) && now >= self.next_sweep {
            self.next_sweep = now.saturating_add(SWEEP_PAUSE);
            self.sweep(now);
        }
        !self.is_full(owner, capacity)
    }

    fn sweep(&mut self, now: u64) {
        let Self { buckets, owners, .. } = self;
        buckets.retain(|_, bucket| {
            let stays = bucket.full_at > now;
            if !stays && let Some(count) = owners.get_mut(&bucket.owner) {
                *count -= 1;
            }
            stays
        });
        owners.retain(|_, count| *count > 0);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn id(value: u64) -> Id {
        Id::of_value(&value)
    }

    fn granted(taken: Taken) -> bool {
        matches!(taken, Taken::Granted { .. })
    }

    #[test]
    fn a_burst_is_granted_and_then_the_rate() {
        let buckets = Buckets::new(Rate::new(2, Duration::from_secs(1), 3));
        let take = |now| buckets.take(id(1), id(1), now);
        let first: Vec<Taken> = (0..4).map(|_| take(0)).collect();
        let refused = Taken::Refused { retry_after: Duration::from_millis(500) };
        let left = |remaining| Taken::Granted { remaining };
        assert_eq!(first, [left(2), left(1), left(0), refused]);
        assert_eq!(take(SECOND / 4), Taken::Refused { retry_after: Duration::from_millis(250) });
        assert_eq!(take(SECOND / 2), left(0));
        assert!(!granted(take(SECOND / 2)));
        // Full again, and not more than full.
        let later = (0..5).filter(|_| granted(take(100 * SECOND))).count();
        assert_eq!(later, 3);
        assert!(granted(buckets.take(id(2), id(2), SECOND / 2)), "another key has its own bucket");
    }

    #[test]
    fn looking_takes_nothing() {
        let buckets = Buckets::new(Rate::new(1, Duration::from_secs(1), 1));
        assert!(granted(buckets.peek(id(1), id(1), 0)));
        assert!(buckets.is_empty());
        assert!(granted(buckets.take(id(1), id(1), 0)));
        assert!(!granted(buckets.peek(id(1), id(1), 0)));
        assert!(granted(buckets.peek(id(1), id(1), SECOND)));
    }

    #[test]
    fn a_full_table_refuses_until_idle_buckets_are_evicted() {
        let buckets = Buckets::with_capacity(Rate::new(1, Duration::from_secs(10), 1), 8);
        for client in 0..8 {
            assert!(granted(buckets.take(id(client), id(client), 0)));
        }
        assert_eq!(buckets.take(id(9), id(9), SECOND), Taken::Full);
        assert!(!granted(buckets.take(id(1), id(1), SECOND)), "known clients keep their buckets");
        assert!(granted(buckets.take(id(9), id(9), 11 * SECOND)));
        assert_eq!(buckets.len(), 1);
    }

    #[test]
    fn one_client_uses_at_most_a_quarter() {
        let buckets = Buckets::with_capacity(Rate::new(1, Duration::from_secs(10), 1), 8);
        assert!(granted(buckets.take(id(100), id(1), 0)));
        assert!(granted(buckets.take(id(101), id(1), 0)));
        assert_eq!(buckets.take(id(102), id(1), 0), Taken::Full);
        assert!(granted(buckets.take(id(103), id(2), 0)));
        assert!(granted(buckets.take(id(102), id(1), 20 * SECOND)));
    }

    /// A bucket that is counted in tokens, by fractions.
    #[derive(Debug)]
    struct Naive {
        tokens: u128,
        at: u64,
    }

    proptest! {
        #[test]
        fn decisions_are_those_of_a_counted_bucket(
            requests in 1u64..50,
            burst in 1u64..20,
            steps in prop::collection::vec(0u64..SECOND / 4, 1..200),
        ) {
            let rate = Rate::new(requests, Duration::from_secs(1), burst);
            let buckets = Buckets::new(rate);
            // A token is `period` parts.
            let full = u128::from(rate.depth);
            let (mut naive, mut now) = (Naive { tokens: full, at: 0 }, 0);
            for step in steps {
                now += step;
                naive.tokens = full.min(naive.tokens + u128::from(now - naive.at));
                naive.at = now;
                let wanted = naive.tokens >= u128::from(rate.period);
                if wanted {
                    naive.tokens -= u128::from(rate.period);
                }
                prop_assert_eq!(granted(buckets.take(id(1), id(1), now)), wanted);
            }
        }
    }
}
