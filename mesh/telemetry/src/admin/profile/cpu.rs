//! CPU profiles for `/debug/pprof/profile`.
//!
//! A timer signal takes samples while a profile runs; at other times it costs nothing. One profile runs at a time.

use std::time::Duration;

use pprof::protos::Message;
use pprof::{ProfilerGuard, ProfilerGuardBuilder};
use tokio::sync::Mutex;

use super::ProfileError;

/// Samples per second.
const FREQUENCY: i32 = 99;

/// Held while a profile runs: the signal handler and its buffer belong to the process. A second request is refused, not
/// queued.
static RUNNING: Mutex<()> = Mutex::const_new(());

/// Takes a profile for `seconds`.
pub(super) async fn take(seconds: u64) -> Result<Vec<u8>, ProfileError> {
    let _running = RUNNING.try_lock().map_err(|_busy| ProfileError::Busy)?;
    let profiler = ProfilerGuardBuilder::default()
        .frequency(FREQUENCY)
        // Unwinding out of these may deadlock on locks that the interrupted code holds.
        .blocklist(&["libc", "libgcc", "pthread", "vdso"])
        .build()?;
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let encoded = tokio::task::spawn_blocking(move || encode(&profiler)).await;
    encoded.map_err(ProfileError::Report)?
}

fn encode(profiler: &ProfilerGuard<'_>) -> Result<Vec<u8>, ProfileError> {
    let profile = profiler.report().build()?.pprof()?;
    profile.write_to_bytes().map_err(|error| ProfileError::Encode(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pprof::protos::Profile;
    use std::hint::black_box;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_profile_names_busy_functions_and_excludes_a_second() {
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
        let profile = Profile::parse_from_bytes(&bytes).unwrap();
        assert_eq!(profile.string_table.first().map(String::as_str), Some(""));
        assert!(!profile.sample.is_empty());
        let functions = profile.function.iter().map(|function| &profile.string_table[function.name as usize]);
        assert!(functions.into_iter().any(|name| name.contains("a_profile_names_busy_functions")));
    }
}
