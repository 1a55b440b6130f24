//! Endpoints that a pod could not reach, and that its connections leave out for a while.
//!
//! A connection that meets a node that is cut off waits for its whole attempt; those that follow choose another
//! endpoint. One endpoint that can't be reached says nothing of its node; a second one of the same node, with none reached
//! between them, ejects all of the node. Each pod has a table of its own: what a pod's own network policy drops
//! ejects nothing for others. [`Ejections`] is pure, time is an argument; [`EjectedEndpoints`] shares it between workers.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use ambit_directory::{Workload, WorkloadUid};

/// The first ejection; each failure in a row doubles it.
const FIRST: Duration = Duration::from_secs(1);
/// The longest ejection.
const LONGEST: Duration = Duration::from_secs(30);
/// How long after its ejection an endpoint counts as one that failed before.
const MEMORY: Duration = Duration::from_secs(60);
/// Endpoints that a pod's table remembers, and nodes; beyond it, none is ejected.
const MAX_ENDPOINTS: usize = 1024;

/// Who is ejected until when.
#[derive(Debug)]
pub struct Ejections<K> {
    failed: HashMap<K, Failed>,
}

/// What a failure to reach an endpoint says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreachable {
    /// Something about the endpoint.
    Endpoint,
    /// Perhaps something about its node: nothing of the endpoint answered.
    Node,
}

#[derive(Debug, Clone, Copy)]
struct Failed {
    in_a_row: u32,
    until: Instant,
}

impl<K> Default for Ejections<K> {
    fn default() -> Self {
        Self { failed: HashMap::new() }
    }
}

impl<K: Eq + Hash + Clone> Ejections<K> {
    /// An endpoint could not be reached. Whether it is ejected for that: connections that were on their way when it was
    /// ejected already do not prolong it.
    pub fn handle_failure(&mut self, endpoint: &K, now: Instant) -> bool {
        if self.is_ejected(endpoint, now) {
            return false;
        }
        if self.failed.len() >= MAX_ENDPOINTS {
            self.failed.retain(|_, failed| now < failed.until + MEMORY);
            if self.failed.len() >= MAX_ENDPOINTS {
                return false;
            }
        }
        let before = self.failed.get(endpoint).filter(|failed| now < failed.until + MEMORY);
        let in_a_row = before.map_or(0, |failed| failed.in_a_row);
        let time = FIRST.saturating_mul(1 << in_a_row.min(16)).min(LONGEST);
        self.failed
            .insert(endpoint.clone(), Failed { in_a_row: in_a_row.saturating_add(1), until: now + time });
        true
    }

    /// An endpoint was reached.
    pub fn handle_success(&mut self, endpoint: &K) {
        self.failed.remove(endpoint);
    }

    /// Whether an endpoint is ejected.
    pub fn is_ejected(&self, endpoint: &K, now: Instant) -> bool {
        self.failed.get(endpoint).is_some_and(|failed| now < failed.until)
    }

    /// Whether it failed lately, and was not reached since.
    fn remembers(&self, endpoint: &K, now: Instant) -> bool {
        self.failed.get(endpoint).is_some_and(|failed| now < failed.until + MEMORY)
    }

    /// Endpoints that are ejected.
    pub fn count(&self, now: Instant) -> usize {
        self.failed.values().filter(|failed| now < failed.until).count()
    }
}

/// A node: its name, which is unique in its cluster only.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Node {
    cluster: Arc<str>,
    name: Arc<str>,
}

impl Node {
    fn of(workload: &Workload) -> Self {
        Self { cluster: workload.cluster_id.clone(), name: workload.node.clone() }
    }
}

/// Ejections of endpoints and of nodes.
#[derive(Debug, Default)]
struct Table {
    endpoints: Ejections<WorkloadUid>,
    nodes: Ejections<Node>,
    /// The endpoint of a node that failed last, since one of the node was reached.
    suspects: HashMap<Node, (WorkloadUid, Instant)>,
}

impl Table {
    /// Returns how many ejections that makes.
    fn handle_failure(&mut self, endpoint: &WorkloadUid, node: Option<&Node>, now: Instant) -> u64 {
        let mut ejected = u64::from(self.endpoints.handle_failure(endpoint, now));
        if let Some(node) = node {
            let is_another = self
                .suspects
                .get(node)
                .is_some_and(|(suspect, since)| suspect != endpoint && now < *since + MEMORY);
            if is_another || self.nodes.remembers(node, now) {
                ejected += u64::from(self.nodes.handle_failure(node, now));
            }
            self.suspects.retain(|_, (_, since)| now < *since + MEMORY);
            if self.suspects.len() < MAX_ENDPOINTS {
                self.suspects.insert(node.clone(), (endpoint.clone(), now));
            }
        }
        ejected
    }

    fn handle_success(&mut self, endpoint: &WorkloadUid, node: &Node) {
        self.endpoints.handle_success(endpoint);
        self.nodes.handle_success(node);
        self.suspects.remove(node);
    }

    fn is_ejected(&self, endpoint: &WorkloadUid, node: &Node, now: Instant) -> bool {
        self.endpoints.is_ejected(endpoint, now) || self.nodes.is_ejected(node, now)
    }

    fn holds(&self, endpoint: &WorkloadUid, node: &Node) -> bool {
        self.endpoints.failed.contains_key(endpoint)
            || self.nodes.failed.contains_key(node)
            || self.suspects.contains_key(node)
    }

    fn len(&self) -> usize {
        self.endpoints.failed.len() + self.nodes.failed.len() + self.suspects.len()
    }
}

/// What a pod could not reach, the same for all workers.
#[derive(Debug, Default)]
pub struct EjectedEndpoints {
    /// Guards the table: read a few times a connection, and only while it is not empty.
    table: RwLock<Table>,
    /// Entries of the table.
    remembered: AtomicUsize,
}

impl EjectedEndpoints {
    /// A workload could not be reached. Returns how many ejections that makes.
    pub fn failed(&self, workload: &Workload, what: Unreachable) -> u64 {
        let is_of_node = what == Unreachable::Node && !workload.node.is_empty();
        let node = is_of_node.then(|| Node::of(workload));
        let mut table = self.table.write();
        let ejected = table.handle_failure(&workload.uid, node.as_ref(), Instant::now());
        self.remembered.store(table.len(), Ordering::Relaxed);
        ejected
    }

    /// A workload was reached, and so its node.
    pub fn reached(&self, workload: &Workload) {
        if self.remembered.load(Ordering::Relaxed) == 0 {
            return;
        }
        let node = Node::of(workload);
        if self.table.read().holds(&workload.uid, &node) {
            let mut table = self.table.write();
            table.handle_success(&workload.uid, &node);
            self.remembered.store(table.len(), Ordering::Relaxed);
        }
    }

    /// Whether a workload, or its node, is ejected.
    pub fn is_ejected(&self, workload: &Workload) -> bool {
        self.remembered.load(Ordering::Relaxed) > 0
            && self.table.read().is_ejected(&workload.uid, &Node::of(workload), Instant::now())
    }

    /// Endpoints and nodes that are ejected.
    pub fn count(&self) -> usize {
        let (table, now) = (self.table.read(), Instant::now());
        table.endpoints.count(now) + table.nodes.count(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn node(name: &str) -> Node {
        Node { cluster: "here".into(), name: name.into() }
    }

    #[test]
    fn failures_in_a_row_double_the_time_up_to_a_limit() {
        let (mut ejections, mut now) = (Ejections::default(), Instant::now());
        for seconds in [1, 2, 4, 8, 16, 30, 30, 30] {
            assert!(ejections.handle_failure(&"node", now));
            assert!(!ejections.handle_failure(&"node", now), "another connection met the same failure");
            assert!(ejections.is_ejected(&"node", now + SECOND * seconds - Duration::from_millis(1)));
            now += SECOND * seconds;
            assert!(!ejections.is_ejected(&"node", now));
        }
        assert!(!ejections.is_ejected(&"other", now));
    }

    #[test]
    fn success_or_time_makes_an_endpoint_as_good_as_new() {
        let (mut ejections, start) = (Ejections::default(), Instant::now());
        ejections.handle_failure(&"a", start);
        ejections.handle_failure(&"b", start);
        ejections.handle_success(&"a");
        assert!(!ejections.is_ejected(&"a", start));
        let later = start + MEMORY + SECOND * 2;
        for endpoint in ["a", "b"] {
            ejections.handle_failure(&endpoint, later);
            assert!(!ejections.is_ejected(&endpoint, later + SECOND), "{endpoint}: the first time again");
        }
    }

    #[test]
    fn only_so_many_are_remembered_and_old_ones_make_room() {
        let (mut ejections, now) = (Ejections::default(), Instant::now());
        for endpoint in 0..MAX_ENDPOINTS {
            assert!(ejections.handle_failure(&endpoint, now));
        }
        assert!(!ejections.handle_failure(&usize::MAX, now));
        assert_eq!(ejections.count(now), MAX_ENDPOINTS);
        assert!(ejections.handle_failure(&usize::MAX, now + FIRST + MEMORY));
        assert_eq!(ejections.failed.len(), 1);
    }

    #[test]
    fn a_second_endpoint_of_a_node_ejects_the_node() {
        let (mut table, now) = (Table::default(), Instant::now());
        let (one, two, three): (WorkloadUid, WorkloadUid, WorkloadUid) = ("1".into(), "2".into(), "3".into());
        let node = node("node");
        for _ in 0..3 {
            table.handle_failure(&one, Some(&node), now);
        }
        assert!(table.is_ejected(&one, &node, now) && !table.is_ejected(&three, &node, now));
        assert_eq!(table.handle_failure(&two, Some(&node), now), 2, "the endpoint and its node");
        assert!(table.is_ejected(&three, &node, now));
        let later = now + SECOND * 2;
        assert!(!table.is_ejected(&three, &node, later), "tried again");
        table.handle_failure(&three, Some(&node), later);
        assert!(table.is_ejected(&one, &node, later + SECOND), "longer, by the first failure");
    }

    #[test]
    fn a_node_of_which_something_answers_is_not_ejected() {
        let (mut table, now) = (Table::default(), Instant::now());
        let (one, two, three): (WorkloadUid, WorkloadUid, WorkloadUid) = ("1".into(), "2".into(), "3".into());
        let node = node("node");
        table.handle_failure(&one, Some(&node), now);
        table.handle_success(&three, &node);
        table.handle_failure(&two, Some(&node), now);
        assert!(!table.is_ejected(&three, &node, now));
        table.handle_failure(&one, None, now);
        assert!(!table.is_ejected(&three, &node, now), "not a failure of the node");
        table.handle_success(&two, &node);
        table.handle_success(&one, &node);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn nodes_of_one_name_in_two_clusters_are_two() {
        let (mut table, now) = (Table::default(), Instant::now());
        let (one, two, three): (WorkloadUid, WorkloadUid, WorkloadUid) = ("1".into(), "2".into(), "3".into());
        let (here, there) = (node("node"), Node { cluster: "there".into(), ..node("node") });
        table.handle_failure(&one, Some(&there), now);
        table.handle_failure(&two, Some(&there), now);
        assert!(table.is_ejected(&three, &there, now) && !table.is_ejected(&three, &here, now));
        table.handle_success(&three, &here);
        assert!(table.is_ejected(&one, &there, now), "success on another cluster's node");
    }
}
