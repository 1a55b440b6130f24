//! Endpoints that were not reached a moment ago: new sessions go elsewhere while there is another endpoint. Pure but for its lock.

use std::time::{Duration, Instant};

use ambit_directory::WorkloadUid;
use parking_lot::Mutex;
use smallvec::SmallVec;

/// How long an endpoint is avoided.
const LENGTH: Duration = Duration::from_secs(10);
/// Endpoints that are remembered; the oldest is forgotten for one more.
const MOST: usize = 64;

/// The endpoints, the oldest first.
#[derive(Debug, Default)]
pub struct Avoided(Mutex<Vec<(WorkloadUid, Instant)>>);

impl Avoided {
    /// An endpoint was not reached.
    pub fn add(&self, endpoint: &WorkloadUid, now: Instant) {
        let mut all = self.0.lock();
        all.retain(|(known, since)| known != endpoint && is_recent(*since, now));
        if all.len() >= MOST {
            all.remove(0);
        }
        all.push((endpoint.clone(), now));
    }

    /// Those that are avoided.
    pub fn current(&self, now: Instant) -> SmallVec<[WorkloadUid; 4]> {
        let all = self.0.lock();
        let recent = all.iter().filter(|(_, since)| is_recent(*since, now));
        recent.map(|(endpoint, _)| endpoint.clone()).collect()
    }
}

fn is_recent(since: Instant, now: Instant) -> bool {
    now.saturating_duration_since(since) < LENGTH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_avoided_for_a_while_only() {
        let (avoided, start) = (Avoided::default(), Instant::now());
        let uid = |at: usize| WorkloadUid::of_pod("c", "n", &at.to_string());
        avoided.add(&uid(0), start);
        assert_eq!(avoided.current(start + LENGTH / 2)[..], [uid(0)]);
        assert!(avoided.current(start + LENGTH).is_empty());
        (0..100).for_each(|at| avoided.add(&uid(at), start));
        assert_eq!(avoided.current(start).len(), MOST);
        assert_eq!(avoided.current(start).last(), Some(&uid(99)));
    }
}
