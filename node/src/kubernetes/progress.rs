//! Changes of pods in progress: those of one pod come one after another, and no pod waits for another. No I/O.
//!
//! A pod has at most one change in progress and one that waits, the latest: what came between them is of no interest any
//! more.

use std::collections::HashMap;

/// The pods with a change in progress, and the change that waits for its end.
#[derive(Debug)]
pub(super) struct Progress<C>(HashMap<String, Option<C>>);

impl<C> Default for Progress<C> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<C> Progress<C> {
    /// Notes a change. Returns it if it can begin; else it waits, in place of one that waited before.
    pub(super) fn begin(&mut self, uid: &str, change: C) -> Option<C> {
        match self.0.get_mut(uid) {
            Some(waiting) => {
                *waiting = Some(change);
                None
            }
            None => {
                self.0.insert(uid.to_owned(), None);
                Some(change)
            }
        }
    }

    /// Forgets the changes that wait: what brings the whole node in line takes their place.
    pub(super) fn forget_waiting(&mut self) {
        self.0.values_mut().for_each(|waiting| *waiting = None);
    }

    /// Notes that a pod's change has ended. Returns the one that waited, which begins now.
    pub(super) fn end(&mut self, uid: &str) -> Option<C> {
        let next = self.0.get_mut(uid)?.take();
        if next.is_none() {
            self.0.remove(uid);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_pod_holds_up_no_other() {
        let mut progress = Progress::default();
        assert_eq!(progress.begin("busy", "enrol"), Some("enrol"));
        assert_eq!(progress.begin("other", "enrol"), Some("enrol"));
        assert_eq!(progress.end("other"), None);
        assert_eq!(progress.begin("other", "leave"), Some("leave"));
    }

    #[test]
    fn a_change_that_was_forgotten_does_not_follow() {
        let mut progress = Progress::default();
        assert_eq!(progress.begin("pod", "enrol"), Some("enrol"));
        assert_eq!(progress.begin("pod", "leave"), None);
        progress.forget_waiting();
        assert_eq!(progress.end("pod"), None);
        assert_eq!(progress.begin("pod", "enrol again"), Some("enrol again"));
    }

    #[test]
    fn the_latest_change_follows_the_one_in_progress() {
        let mut progress = Progress::default();
        assert_eq!(progress.begin("pod", "enrol"), Some("enrol"));
        assert_eq!(progress.begin("pod", "leave"), None);
        assert_eq!(progress.begin("pod", "enrol again"), None);
        assert_eq!(progress.end("pod"), Some("enrol again"));
        assert_eq!(progress.end("pod"), None);
        assert_eq!(progress.begin("pod", "leave"), Some("leave"));
    }
}
