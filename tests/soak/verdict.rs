//! Whether memory and descriptors were flat: functions of series of samples.
//!
//! Two views. Under load, the life of a process after its warm-up is cut into windows, and the medians of the first
//! and the last are compared: that finds what is lost with every connection or request. Growth that is no more than
//! how far the samples scatter is noise: how many connections are open at a sample is chance. At rest, before and after
//! the load, the same processes' roles must hold the same number of descriptors: that finds a single one lost with
//! each restart, which no share of the whole would show. A process that is there at the end is judged by that: a busy
//! machine makes it hold more connections under load.

use serde::Serialize;

use crate::processes::{Series, Usage};

/// Windows that a life is cut into.
const WINDOWS: usize = 6;
/// Samples of a life after its warm-up below which nothing is said of it.
const FEWEST: usize = 4 * WINDOWS;
/// Growth from the first window to the last that is no leak.
const SHARE: f64 = 0.20;
/// The same where every window lies above the one before.
const MONOTONE_SHARE: f64 = 0.05;
/// Growth of memory below which nothing is said, bytes: an allocator's pages.
const MEMORY_FLOOR: f64 = 2.0 * 1024.0 * 1024.0;
/// The same for descriptors: connections that happen to be open.
const DESCRIPTORS_FLOOR: f64 = 10.0;
/// Descriptors at rest that may come and go with housekeeping: sockets in stock, watches.
pub(crate) const REST_SLACK: u64 = 4;

/// Medians of the first and last windows of a life, and what they say.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Trend {
    /// Median of the first window.
    pub(crate) first: f64,
    /// Median of the last.
    pub(crate) last: f64,
    /// Whether it grew in every window.
    pub(crate) monotone: bool,
    /// Whether it is flat.
    pub(crate) flat: bool,
}

/// What is said of one process.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Judgement {
    /// Whose process.
    pub(crate) name: String,
    /// Its process id.
    pub(crate) pid: u32,
    /// How long it was watched, seconds.
    pub(crate) lived: f64,
    /// CPU time that it used meanwhile, seconds.
    pub(crate) cpu: f64,
    /// Its anonymous memory, if it lived long enough, bytes.
    pub(crate) memory: Option<Trend>,
    /// Its descriptors, the same.
    pub(crate) descriptors: Option<Trend>,
    /// The most threads that it had.
    pub(crate) threads: u64,
}

impl Judgement {
    /// Judges a process by its samples; those of its first `warm_up` seconds do not count. `memory` says whether
    /// its memory counts.
    pub(crate) fn of(series: &Series, warm_up: f64, memory: bool) -> Self {
        let born = series.samples.first().map_or(0.0, |(at, _)| *at);
        let warm = series.samples.iter().filter(|(at, _)| at - born >= warm_up);
        let warm: Vec<Usage> = warm.map(|(_, usage)| *usage).collect();
        let of = |value: fn(&Usage) -> u64| warm.iter().map(|usage| value(usage) as f64).collect::<Vec<_>>();
        let anonymous = of(|usage| usage.anonymous);
        Self {
            name: series.name.clone(),
            pid: series.pid,
            lived: series.lived(),
            cpu: series.cpu(),
            memory: trend(&anonymous, MEMORY_FLOOR).filter(|_| memory),
            descriptors: trend(&of(|usage| usage.descriptors), DESCRIPTORS_FLOOR),
            threads: series.samples.iter().map(|(_, usage)| usage.threads).max().unwrap_or(0),
        }
    }

    /// The judgement of a process that holds no more descriptors without load than were held before: however many it had
    /// under load, none was lost.
    pub(crate) fn at_rest(mut self) -> Self {
        if let Some(descriptors) = &mut self.descriptors {
            descriptors.flat = true;
        }
        self
    }

    /// Whether nothing grew.
    pub(crate) fn flat(&self) -> bool {
        [self.memory, self.descriptors].iter().flatten().all(|trend| trend.flat)
    }
}

/// The trend of samples taken at a steady pace; none of too few.
fn trend(samples: &[f64], floor: f64) -> Option<Trend> {
    if samples.len() < FEWEST {
        return None;
    }
    let medians: Vec<f64> = (0..WINDOWS).map(|nth| median(window(samples, nth, WINDOWS))).collect();
    let (first, last) = (*medians.first()?, *medians.last()?);
    let monotone = medians.windows(2).all(|pair| matches!(pair, [before, after] if after > before));
    let grown = last - first;
    let share = if monotone { MONOTONE_SHARE } else { SHARE };
    let flat = grown <= floor || grown <= first * share || is_noise(samples);
    Some(Trend { first, last, monotone, flat })
}

/// Whether the middle samples, between the quartiles, of a life's first half overlap with those of its second.
fn is_noise(samples: &[f64]) -> bool {
    let (first, second) = (window(samples, 0, 2), window(samples, 1, 2));
    quantile(second, 1, 4) <= quantile(first, 3, 4)
}

/// The `nth` of `windows` equal parts.
fn window(samples: &[f64], nth: usize, windows: usize) -> &[f64] {
    let (from, to) = (samples.len() * nth / windows, samples.len() * (nth + 1) / windows);
    samples.get(from..to).unwrap_or_default()
}

/// The median of some numbers; 0 of none.
pub(crate) fn median(numbers: &[f64]) -> f64 {
    quantile(numbers, 1, 2)
}

/// The number that `part` of `whole` of them are below; 0 of none.
fn quantile(numbers: &[f64], part: usize, whole: usize) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() * part / whole).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Samples every five seconds of twenty minutes: 40 MiB that swing by 3 %, 100 descriptors that swing by 10.
    fn life(leak: impl Fn(f64) -> Usage) -> Series {
        let samples = (0..240).map(|nth| {
            let at = f64::from(nth) * 5.0;
            let swing = f64::from(nth * 7919 % 100) / 100.0;
            let leaked = leak(at);
            let usage = Usage {
                anonymous: (40.0 * 1048576.0 * (1.0 + 0.03 * swing)) as u64 + leaked.anonymous,
                descriptors: 100 + (10.0 * swing) as u64 + leaked.descriptors,
                threads: 8,
                ..Usage::default()
            };
            (at, usage)
        });
        Series { name: "ztunnel".to_owned(), pid: 1, samples: samples.collect() }
    }

    #[test]
    fn a_steady_life_is_flat() {
        assert!(Judgement::of(&life(|_| Usage::default()), 120.0, true).flat());
    }

    #[test]
    fn a_leak_of_a_kilobyte_a_connection_is_found() {
        let leak = |at: f64| Usage { anonymous: (at * 50.0 * 1024.0) as u64, ..Usage::default() };
        let judgement = Judgement::of(&life(leak), 120.0, true);
        assert!(!judgement.flat(), "{judgement:?}");
    }

    #[test]
    fn a_small_leak_is_found_by_growth_in_every_window() {
        let leak = |at: f64| Usage { anonymous: (at * 50.0 * 100.0) as u64, ..Usage::default() };
        let judgement = Judgement::of(&life(leak), 120.0, true);
        assert!(judgement.memory.is_some_and(|trend| trend.monotone && !trend.flat), "{judgement:?}");
    }

    #[test]
    fn a_descriptor_lost_in_a_thousand_connections_is_found() {
        let leak = |at: f64| Usage { descriptors: (at * 50.0 / 1000.0) as u64, ..Usage::default() };
        assert!(!Judgement::of(&life(leak), 120.0, true).flat());
    }

    /// A run of minutes has few samples, and under load two of them may differ by half.
    #[test]
    fn a_healthy_life_of_few_samples_is_flat() {
        let mut state = 1_u64;
        let mut chance = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % 60
        };
        let grew = (0..1000).filter(|_| {
            let samples: Vec<f64> = (0..FEWEST).map(|_| 110.0 + chance() as f64).collect();
            !trend(&samples, DESCRIPTORS_FLOOR).unwrap().flat
        });
        assert!(grew.count() <= 5, "of a thousand");
    }

    #[test]
    fn connections_that_a_busy_machine_adds_are_no_leak() {
        let more = |at: f64| Usage { descriptors: (at / 15.0) as u64, ..Usage::default() };
        let judgement = Judgement::of(&life(more), 120.0, true);
        assert!(!judgement.flat() && judgement.at_rest().flat());
        let leak = |at: f64| Usage { anonymous: (at * 50.0 * 1024.0) as u64, ..more(at) };
        assert!(!Judgement::of(&life(leak), 120.0, true).at_rest().flat(), "memory grew");
    }

    #[test]
    fn a_leak_within_noise_is_found_in_time() {
        let leak =
            |at: f64| Usage { descriptors: (at / 20.0) as u64 + at as u64 * 31 % 40, ..Usage::default() };
        assert!(!Judgement::of(&life(leak), 120.0, true).flat());
    }

    #[test]
    fn a_short_life_is_not_judged() {
        let mut short = life(|_| Usage::default());
        short.samples.truncate(30);
        assert_eq!(Judgement::of(&short, 120.0, true).memory, None);
    }
}
