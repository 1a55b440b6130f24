//! Which names are demanded, and for which pods. Pure: no I/O, and time is an argument.
//!
//! A pod has a share of names and of names that it waits for; beyond the first its own least recently used name is
//! given up, beyond the second it is refused. So a pod that dials one address after the other costs the control plane
//! and the other pods of its node no more than its share.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bounds of what is demanded.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Names of all pods together.
    pub names: usize,
    /// Names of one pod.
    pub names_per_pod: usize,
    /// Names that one pod may wait for at a time.
    pub waiting_per_pod: usize,
    /// How long a name is kept without use.
    pub idle: Duration,
}

impl Default for Bounds {
    /// 512 names a pod, 64 of them waited for, 65,536 in all (a control plane takes 100,000 a stream), 10 minutes.
    fn default() -> Self {
        Self { names: 65_536, names_per_pod: 512, waiting_per_pod: 64, idle: Duration::from_secs(600) }
    }
}

/// A limit that is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// The pod's.
    #[error("the pod waits for {0} other names already")]
    Pod(usize),
    /// The node's.
    #[error("the node's pods use {0} names already")]
    Node(usize),
}

/// The names that are demanded.
#[derive(Debug, Default)]
pub(super) struct Names {
    bounds: Bounds,
    /// The number of pods that use each name.
    users: HashMap<String, usize>,
    pods: HashMap<Arc<str>, Share>,
}

/// What one pod uses.
#[derive(Debug, Default)]
struct Share {
    /// When each name was used last.
    used: HashMap<String, Instant>,
    /// Names that connections wait for, with the number of these.
    waiting: HashMap<String, usize>,
}

impl Names {
    /// No names yet.
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// Number of names.
    pub(super) fn len(&self) -> usize {
        self.users.len()
    }

    /// Whether a pod uses a name.
    pub(super) fn is_used(&self, name: &str) -> bool {
        self.users.contains_key(name)
    }

    /// A pod uses a name that is known. Notes it if the name is one that was demanded; returns the name that the pod
    /// gives up for it, if that is of no use to another.
    pub(super) fn handle_use(&mut self, pod: &Arc<str>, name: &str, now: Instant) -> Option<String> {
        if !self.users.contains_key(name) {
            return None;
        }
        self.enter(pod, name, now)
    }

    /// A connection of a pod begins to wait for a name; [`Names::handle_answered`] ends it. Returns the name that the pod
    /// gives up for it, if that is of no use to another.
    ///
    /// # Errors
    /// [`Full`]; then nothing has changed.
    pub(super) fn handle_demand(
        &mut self,
        pod: &Arc<str>,
        name: &str,
        now: Instant,
    ) -> Result<Option<String>, Full> {
        let Bounds { names, waiting_per_pod, names_per_pod, .. } = self.bounds;
        let share = self.pods.get(pod);
        let waits = share.is_some_and(|share| share.waiting.contains_key(name));
        if !waits && share.is_some_and(|share| share.waiting.len() >= waiting_per_pod) {
            return Err(Full::Pod(waiting_per_pod));
        }
        // A pod that gives up a name makes room, if it alone uses that.
        let given_up = share.filter(|share| share.used.len() >= names_per_pod).and_then(Share::oldest);
        let replaces = given_up.is_some_and(|name| self.users.get(name) == Some(&1));
        if !self.users.contains_key(name) && self.users.len() >= names && !replaces {
            return Err(Full::Node(names));
        }
        let given_up = self.enter(pod, name, now);
        if let Some(share) = self.pods.get_mut(pod) {
            *share.waiting.entry(name.to_owned()).or_default() += 1;
        }
        Ok(given_up)
    }

    /// A connection of a pod waits for a name no longer.
    pub(super) fn handle_answered(&mut self, pod: &Arc<str>, name: &str) {
        let Some(share) = self.pods.get_mut(pod) else { return };
        if let Some(waiting) = share.waiting.get_mut(name) {
            *waiting -= 1;
            if *waiting == 0 {
                share.waiting.remove(name);
            }
        }
        if share.used.is_empty() && share.waiting.is_empty() {
            self.pods.remove(pod);
        }
    }

    /// Gives up what was not used for too long; returns those names that nobody uses.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<String> {
        let idle = self.bounds.idle;
        let mut unused = Vec::new();
        for share in self.pods.values_mut() {
            let waiting = &share.waiting;
            let old = share.used.extract_if(|name, used| {
                now.saturating_duration_since(*used) >= idle && !waiting.contains_key(name)
            });
            for (name, _) in old {
                if leave(&mut self.users, &name) {
                    unused.push(name);
                }
            }
        }
        self.pods.retain(|_, share| !share.used.is_empty() || !share.waiting.is_empty());
        unused
    }

    fn enter(&mut self, pod: &Arc<str>, name: &str, now: Instant) -> Option<String> {
        let share = self.pods.entry(Arc::clone(pod)).or_default();
        if let Some(used) = share.used.get_mut(name) {
            *used = now;
            return None;
        }
        let full = share.used.len() >= self.bounds.names_per_pod;
        let oldest = share.oldest().filter(|_| full).map(ToOwned::to_owned);
        share.used.insert(name.to_owned(), now);
        *self.users.entry(name.to_owned()).or_default() += 1;
        let given_up = oldest?;
        share.used.remove(&given_up);
        leave(&mut self.users, &given_up).then_some(given_up)
    }
}

impl Share {
    /// The name that was used least recently, of those that no connection waits for.
    fn oldest(&self) -> Option<&str> {
        let idle = self.used.iter().filter(|(name, _)| !self.waiting.contains_key(*name));
        idle.min_by_key(|(_, used)| **used).map(|(name, _)| name.as_str())
    }
}

/// Counts one user less; whether it was the last.
fn leave(users: &mut HashMap<String, usize>, name: &str) -> bool {
    let Some(count) = users.get_mut(name) else { return false };
    *count -= 1;
    if *count > 0 {
        return false;
    }
    users.remove(name);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds =
        Bounds { names: 6, names_per_pod: 4, waiting_per_pod: 2, idle: Duration::from_secs(60) };

    struct Node {
        names: Names,
        now: Instant,
    }

    impl Node {
        fn new() -> Self {
            Self { names: Names::new(BOUNDS), now: Instant::now() }
        }

        fn later(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
        }

        fn ask(&mut self, pod: &str, name: &str) -> Result<Option<String>, Full> {
            self.names.handle_demand(&pod.into(), name, self.now)
        }

        /// Asks, is answered at once, and lets a second pass.
        fn get(&mut self, pod: &str, name: &str) -> Result<Option<String>, Full> {
            let given_up = self.ask(pod, name)?;
            self.names.handle_answered(&pod.into(), name);
            self.later(1);
            Ok(given_up)
        }
    }

    #[test]
    fn a_pod_beyond_its_share_gives_up_its_own_oldest_name() {
        let mut node = Node::new();
        for name in ["a", "b", "c", "d"] {
            assert_eq!(node.get("scanner", name), Ok(None));
        }
        assert_eq!(node.names.handle_use(&"scanner".into(), "a", node.now), None);
        node.later(1);
        assert_eq!(node.get("scanner", "e"), Ok(Some("b".to_owned())));
        for number in 0..10_000 {
            assert!(node.get("scanner", &number.to_string()).unwrap().is_some());
        }
        assert_eq!(node.names.len(), 4);
        assert_eq!(node.get("other", "x"), Ok(None));
    }

    #[test]
    fn a_name_that_another_pod_uses_stays() {
        let mut node = Node::new();
        node.get("one", "shared").unwrap();
        node.get("two", "shared").unwrap();
        for name in ["b", "c", "d"] {
            node.get("one", name).unwrap();
        }
        assert_eq!(node.get("one", "e"), Ok(None), "the oldest is used by another");
        node.later(30);
        node.names.handle_use(&"two".into(), "shared", node.now);
        node.later(40);
        let mut gone = node.names.expire(node.now);
        gone.sort();
        assert_eq!(gone, ["b", "c", "d", "e"]);
        node.later(30);
        assert_eq!(node.names.expire(node.now), ["shared"]);
        assert_eq!(node.names.len(), 0);
    }

    #[test]
    fn waiting_names_of_a_pod_are_limited_and_connections_are_not() {
        let mut node = Node::new();
        for _ in 0..100 {
            node.ask("pod", "a").unwrap();
        }
        node.ask("pod", "b").unwrap();
        assert_eq!(node.ask("pod", "c"), Err(Full::Pod(2)));
        assert_eq!(node.ask("other", "c"), Ok(None));
        node.later(3600);
        assert_eq!(node.names.expire(node.now), Vec::<String>::new(), "what is waited for stays");
        node.names.handle_answered(&"pod".into(), "b");
        assert_eq!(node.ask("pod", "c"), Ok(None));
    }

    #[test]
    fn a_full_node_refuses_names_except_from_pods_that_release_one() {
        let mut node = Node::new();
        for (pod, name) in
            [("one", "a"), ("one", "b"), ("one", "c"), ("one", "d"), ("two", "e"), ("two", "f")]
        {
            node.get(pod, name).unwrap();
        }
        assert_eq!(node.get("two", "g"), Err(Full::Node(6)));
        assert_eq!(node.get("two", "a"), Ok(None), "it is there already");
        assert_eq!(node.get("one", "g"), Err(Full::Node(6)), "what it would give up is used by another");
        node.names.handle_use(&"one".into(), "a", node.now);
        assert_eq!(node.get("one", "g"), Ok(Some("b".to_owned())));
    }

    #[test]
    fn nothing_is_kept_of_a_pod_that_uses_nothing() {
        let mut node = Node::new();
        node.get("pod", "a").unwrap();
        node.later(60);
        assert_eq!(node.names.expire(node.now), ["a"]);
        assert!(node.names.pods.is_empty());
    }
}
