//! Which worker a new connection goes to, and how busy workers are.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;

/// What a worker carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Burden {
    /// Its connections.
    pub connections: usize,
    /// Thousandths of a core that it took lately.
    pub busy: u32,
}

/// How much busier than the least busy worker one must be for it to count, thousandths of a core. Below, it may be chance:
/// of the moment, or of which worker the system let run.
const NOTICED: u32 = 250;

/// The worker with the fewest connections, `home` before others. One that is a good deal busier than the least busy, with a
/// bulk transfer say, counts as if each thousandth of a core were a connection more: whoever shared it would wait.
pub(super) fn choose(burdens: &[Burden], home: usize) -> Option<usize> {
    let least = burdens.iter().map(|burden| burden.busy).min()?;
    let weight = |burden: &Burden| match burden.busy - least {
        more if more < NOTICED => burden.connections,
        more => burden.connections.saturating_add(more as usize),
    };
    let distance = |index: usize| (index + burdens.len() - home % burdens.len()) % burdens.len();
    let all = burdens.iter().enumerate();
    all.min_by_key(|(index, burden)| (weight(burden), distance(*index))).map(|(index, _)| index)
}

/// Between two looks at the clocks of the workers, at least.
const LOOK: Duration = Duration::from_millis(100);

/// How busy one thread is.
#[derive(Debug, Default)]
pub(super) struct Meter {
    clock: OnceLock<ClockId>,
    /// Nanoseconds of its CPU at the last look.
    used: AtomicU64,
    busy: AtomicU32,
}

impl Meter {
    /// Measures the calling thread from now on.
    pub(super) fn watch_this_thread(&self) {
        // CPUCLOCK_SCHED of one thread, as pthread_getcpuclockid(3) makes it (linux/posix-timers.h).
        self.clock.get_or_init(|| ClockId::from_raw((!gettid().as_raw() << 3) | 0b110));
    }

    /// Thousandths of a core between the last two looks.
    pub(super) fn busy(&self) -> u32 {
        self.busy.load(Ordering::Relaxed)
    }

    fn look(&self, since: Duration) {
        // Of a thread that is not there yet, or no longer, nothing is known.
        let Some(time) = self.clock.get().and_then(|clock| clock_gettime(*clock).ok()) else { return };
        let used = u64::try_from(Duration::from(time).as_nanos()).unwrap_or(u64::MAX);
        let taken = used.saturating_sub(self.used.swap(used, Ordering::Relaxed));
        let busy = u128::from(taken) * 1000 / since.as_nanos().max(1);
        self.busy.store(u32::try_from(busy).unwrap_or(u32::MAX), Ordering::Relaxed);
    }
}

/// When the clocks of the workers were last looked at.
#[derive(Debug)]
pub(super) struct Looks(Mutex<Instant>);

impl Looks {
    pub(super) fn from_now() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    /// Looks again if the last look is some time ago and nobody else does so now.
    pub(super) fn renew<'a>(&self, meters: impl Iterator<Item = &'a Meter>) {
        let Ok(mut last) = self.0.try_lock() else { return };
        let since = last.elapsed();
        if since >= LOOK {
            *last += since;
            meters.for_each(|meter| meter.look(since));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn burdens(all: &[(usize, u32)]) -> Vec<Burden> {
        all.iter().map(|&(connections, busy)| Burden { connections, busy }).collect()
    }

    #[test]
    fn the_fewest_connections_count_and_home_wins_ties() {
        assert_eq!(choose(&burdens(&[(1, 0), (0, 0), (0, 0)]), 0), Some(1));
        assert_eq!(choose(&burdens(&[(0, 0), (0, 0), (0, 0)]), 2), Some(2));
        assert_eq!(choose(&burdens(&[(0, 0), (0, 0), (1, 0)]), 2), Some(0));
        assert_eq!(choose(&[], 0), None);
    }

    #[test]
    fn a_worker_that_is_much_busier_is_avoided_until_the_others_have_as_much() {
        assert_eq!(choose(&burdens(&[(1, 700), (100, 100)]), 0), Some(1));
        assert_eq!(choose(&burdens(&[(1, 700), (700, 100)]), 1), Some(0));
        // All busy alike, or differing by chance.
        assert_eq!(choose(&burdens(&[(1, 1000), (2, 1000)]), 1), Some(0));
        assert_eq!(choose(&burdens(&[(1, 349), (2, 100)]), 1), Some(0));
    }

    proptest! {
        #[test]
        fn one_is_always_chosen_and_nobody_is_better_in_both(
            all in proptest::collection::vec((0usize..1000, 0u32..=1000), 1..8), home in 0usize..16,
        ) {
            let all = burdens(&all);
            let chosen = all[choose(&all, home).unwrap()];
            for other in &all {
                let better = other.connections < chosen.connections && other.busy < chosen.busy;
                prop_assert!(!better, "{other:?} over {chosen:?}");
            }
        }
    }
}
