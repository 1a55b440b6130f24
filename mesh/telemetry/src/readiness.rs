//! Whether the program can do its work: ready when every task that it waits for is done.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// The program's readiness. Cheap to clone.
///
/// A lock guards the list of what is awaited; it is taken at start, at shutdown and by probes.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// By name, how many tasks of it are not done.
    awaited: BTreeMap<String, usize>,
    draining: bool,
}

/// Something that must be done before the program is ready. Dropping it without
/// [`done`](Self::done) leaves the program unready: a task that died did not do its work.
#[derive(Debug)]
#[must_use = "the program stays unready until the task is done"]
pub struct ReadinessTask {
    readiness: Readiness,
    name: String,
}

impl Readiness {
    /// Ready until tasks are added.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a task to wait for.
    pub fn task(&self, name: &str) -> ReadinessTask {
        *self.state.lock().awaited.entry(name.to_owned()).or_default() += 1;
        ReadinessTask { readiness: self.clone(), name: name.to_owned() }
    }

    /// Makes the program unready for good, because it is shutting down.
    pub fn start_draining(&self) {
        self.state.lock().draining = true;
    }

    /// What is still awaited; empty means ready.
    pub fn awaited(&self) -> Vec<String> {
        let state = self.state.lock();
        let draining = state.draining.then(|| "draining".to_owned());
        state.awaited.keys().cloned().chain(draining).collect()
    }

    /// Whether everything is done and the program is not draining.
    pub fn is_ready(&self) -> bool {
        self.awaited().is_empty()
    }
}

impl ReadinessTask {
    /// The task is done.
    pub fn done(self) {
        let mut state = self.readiness.state.lock();
        if let Some(count) = state.awaited.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                state.awaited.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_only_when_every_task_is_done() {
        let readiness = Readiness::new();
        let (first, second) = (readiness.task("xds"), readiness.task("zds"));
        first.done();
        assert_eq!(readiness.awaited(), ["zds"]);
        second.done();
        assert!(readiness.is_ready());
    }

    #[test]
    fn a_task_that_died_leaves_the_program_unready() {
        let readiness = Readiness::new();
        drop(readiness.task("xds"));
        assert!(!readiness.is_ready());
    }

    #[test]
    fn a_draining_program_is_not_ready() {
        let readiness = Readiness::new();
        readiness.start_draining();
        assert_eq!(readiness.awaited(), ["draining"]);
    }
}
