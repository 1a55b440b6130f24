//! Returns freed memory to the system when the proxy is idle, after a start or a burst.
//!
//! A control task. It observes the process's CPU time and nothing of the data path.

use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::proxy::Worker;
use crate::workers::Workers;

/// Time between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// CPU time between two looks below which the proxy is at rest: half a percent of one core.
const AT_REST: Duration = Duration::from_millis(25);

/// Looks at rest from one release to the next: idle tunnels end meanwhile.
const AGAIN_AFTER: u32 = 12;

/// When to release: as soon as rest begins, and now and then while it lasts.
#[derive(Debug, Default)]
struct Rest {
    /// Looks at rest in a row.
    looks: u32,
}

impl Rest {
    /// Takes the CPU time since the last look, and says whether to release now.
    fn handle_look(&mut self, used: Duration) -> bool {
        if used >= AT_REST {
            self.looks = 0;
            return false;
        }
        let release = self.looks.is_multiple_of(AGAIN_AFTER);
        self.looks = self.looks.wrapping_add(1);
        release
    }
}

/// Watches for as long as the program lives. `collect` has the allocator give back what the calling thread has
/// freed.
pub async fn watch(workers: Arc<Workers<Worker>>, collect: fn()) {
    let mut rest = Rest::default();
    let mut before = cpu_time();
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // The first tick is at once.
    looks.tick().await;
    loop {
        looks.tick().await;
        let now = cpu_time();
        if rest.handle_look(now.saturating_sub(before)) {
            collect();
            for seat in workers.seats() {
                seat.spawn("collect", async move { collect() });
            }
        }
        // What releasing itself took is no work.
        before = cpu_time();
    }
}

/// CPU time of the whole process. A system without that clock never counts as at rest for long.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_released_when_rest_begins_and_now_and_then_while_it_lasts() {
        let mut rest = Rest::default();
        let (busy, quiet) = (Duration::from_secs(1), Duration::from_millis(2));
        assert!(!rest.handle_look(busy));
        let released: Vec<usize> = (0..30).filter(|_| rest.handle_look(quiet)).collect();
        assert_eq!(released, [0, 12, 24]);
        assert!(!rest.handle_look(busy));
        assert!(rest.handle_look(quiet));
        assert!(!rest.handle_look(quiet));
    }
}
