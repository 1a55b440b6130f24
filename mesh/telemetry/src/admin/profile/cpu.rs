//! CPU profiles for `/debug/pprof/profile`.
//!
//! Samples are taken by a timer signal while a profile runs and cost nothing otherwise; one profile runs
//! at a time.

use std::time::Duration;

use pprof::{ProfilerGuard, ProfilerGuardBuilder, Report};
use prost::Message;
use tokio::sync::Mutex;

use super::ProfileError;
use super::encoding::{Profile, Sample, Tables};

/// Samples a second.
const FREQUENCY: i32 = 99;

/// Held while a profile runs: the signal handler and its buffer are the process's. Waited for by nobody;
/// a second request is refused.
static RUNNING: Mutex<()> = Mutex::const_new(());

/// Takes a profile for so many seconds.
pub(super) async fn take(seconds: u64) -> Result<Vec<u8>, ProfileError> {
    let _running = RUNNING.try_lock().map_err(|_busy| ProfileError::Busy)?;
    let profiler = ProfilerGuardBuilder::default()
        .frequency(FREQUENCY)
        // Unwinding out of these may deadlock on locks that the interrupted code holds.
        .blocklist(&["libc", "libgcc", "pthread", "vdso"])
        .build()?;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let made = tokio::task::spawn_blocking(move || report(&profiler, seconds)).await;
    made.map_err(ProfileError::Report)?
}

fn report(profiler: &ProfilerGuard<'_>, seconds: u64) -> Result<Vec<u8>, ProfileError> {
    Ok(render(&profiler.report().build()?, seconds).encode_to_vec())
}

fn render(report: &Report, seconds: u64) -> Profile {
    let mut tables = Tables::default();
    let period = 1_000_000_000 / i64::from(FREQUENCY);
    let kinds = [("samples", "count"), ("cpu", "nanoseconds")];
    let sample_type: Vec<_> = kinds.iter().map(|(kind, unit)| tables.value_type(kind, unit)).collect();
    let mut samples = Vec::with_capacity(report.data.len());
    for (frames, count) in &report.data {
        let mut location_id = Vec::new();
        for symbol in frames.frames.iter().flatten() {
            let line = i64::from(symbol.lineno.unwrap_or(0));
            location_id.push(tables.location(&symbol.name(), &symbol.filename(), line));
        }
        let count = i64::try_from(*count).unwrap_or(i64::MAX);
        samples.push(Sample { location_id, value: vec![count, count.saturating_mul(period)] });
    }
    let period_type = tables.value_type("cpu", "nanoseconds");
    Profile {
        sample_type,
        sample: samples,
        duration_nanos: i64::try_from(seconds * 1_000_000_000).unwrap_or(i64::MAX),
        period_type: Some(period_type),
        period,
        ..tables.into_profile()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::hint::black_box;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_profile_names_the_function_that_burns_time_and_a_second_one_is_refused() {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let burner = std::thread::spawn(move || {
            let mut number = 1u64;
            while !stopped.load(Ordering::Relaxed) {
                number = black_box(number.wrapping_mul(31).wrapping_add(7));
            }
        });
        let (first, second) = tokio::join!(biased; take(2), take(1));
        assert!(matches!(second, Err(ProfileError::Busy)));
        let bytes = first.unwrap();
        stop.store(true, Ordering::Relaxed);
        burner.join().unwrap();
        let profile = Profile::decode(bytes.as_slice()).unwrap();
        assert_eq!(profile.string_table.first().map(String::as_str), Some(""));
        assert!(!profile.sample.is_empty());
        let functions = profile.function.iter().map(|function| &profile.string_table[function.name as usize]);
        assert!(functions.into_iter().any(|name| name.contains("a_profile_names_the_function")));
    }
}
