//! Returns freed memory to the system when the proxy is idle, after a start or a burst.
//!
//! A control task. It observes the process's CPU time and nothing of the data path.

use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::workers::Workers;

/// Time between two samples.
const INTERVAL: Duration = Duration::from_secs(5);
/// CPU time between two samples below which the proxy is idle: half a percent of one core.
const IDLE_CPU: Duration = Duration::from_millis(25);

/// Idle samples from one release to the next: idle tunnels end meanwhile.
const AGAIN_AFTER: u32 = 12;

/// Decides when to release: when the proxy becomes idle, and now and then while it is.
#[derive(Debug, Default)]
struct IdleDetector {
    /// Consecutive idle samples.
    samples: u32,
}

impl IdleDetector {
    /// Takes the CPU time since the last sample. Returns whether to release now.
    fn handle_sample(&mut self, used: Duration) -> bool {
        if used >= IDLE_CPU {
            self.samples = 0;
            return false;
        }
        let release = self.samples.is_multiple_of(AGAIN_AFTER);
        self.samples = self.samples.wrapping_add(1);
        release
    }
}

/// Runs for as long as the program. `collect` has the allocator return what the calling thread has freed.
pub async fn watch<W: Send + Sync + 'static>(workers: Arc<Workers<W>>, collect: fn()) {
    let mut detector = IdleDetector::default();
    let mut before = cpu_time();
    let mut samples = tokio::time::interval(INTERVAL);
    samples.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first tick is at once.
    samples.tick().await;
    loop {
        samples.tick().await;
        let now = cpu_time();
        if detector.handle_sample(now.saturating_sub(before)) {
            collect();
            for handle in workers.handles() {
                handle.spawn("collect", async move { collect() });
            }
        }
        // The CPU time of releasing does not count.
        before = cpu_time();
    }
}

/// CPU time of the whole process. A system without that clock never counts as idle for long.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_released_when_idle_and_periodically_after() {
        let mut detector = IdleDetector::default();
        let (busy, quiet) = (Duration::from_secs(1), Duration::from_millis(2));
        assert!(!detector.handle_sample(busy));
        let released: Vec<usize> = (0..30).filter(|_| detector.handle_sample(quiet)).collect();
        assert_eq!(released, [0, 12, 24]);
        assert!(!detector.handle_sample(busy));
        assert!(detector.handle_sample(quiet));
        assert!(!detector.handle_sample(quiet));
    }
}
