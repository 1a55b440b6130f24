//! Who runs where, as the certificate authority asks it.

use std::collections::HashMap;
use std::sync::Arc;

use ambit_ca::{NodePods, PodRef};
use ambit_identity::SpiffeId;
use parking_lot::RwLock;

use crate::index::Seat;
use crate::object::NamespacedName;

/// The live pods by name and by what they are on which node.
///
/// The lock guards both maps together; it is held for one change or one question, never across an await.
#[derive(Debug, Default)]
pub struct Census {
    seats: RwLock<Seats>,
}

#[derive(Debug, Default)]
struct Seats {
    by_pod: HashMap<NamespacedName, Seat>,
    /// How many pods of a service account there are on a node: node, then namespace, then account.
    counts: HashMap<Arc<str>, HashMap<Account, usize>>,
}

type Account = (Arc<str>, Arc<str>);

impl Census {
    /// Takes what the index says of pods.
    pub fn apply(&self, changes: Vec<(NamespacedName, Option<Seat>)>) {
        if changes.is_empty() {
            return;
        }
        let mut seats = self.seats.write();
        for (pod, seat) in changes {
            seats.set(pod, seat);
        }
    }

    /// How many live pods are bound to a node.
    pub fn len(&self) -> usize {
        self.seats.read().by_pod.len()
    }

    /// Whether there is no live pod at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Seats {
    fn set(&mut self, pod: NamespacedName, seat: Option<Seat>) {
        let old = match &seat {
            Some(seat) => self.by_pod.insert(pod.clone(), seat.clone()),
            None => self.by_pod.remove(&pod),
        };
        if let Some(seat) = seat {
            let account = (pod.namespace.clone(), seat.service_account);
            *self.counts.entry(seat.node).or_default().entry(account).or_default() += 1;
        }
        if let Some(old) = old {
            self.leave(&old.node, &(pod.namespace, old.service_account));
        }
    }

    fn leave(&mut self, node: &Arc<str>, account: &Account) {
        let Some(accounts) = self.counts.get_mut(node) else { return };
        if let Some(count) = accounts.get_mut(account) {
            *count -= 1;
            if *count == 0 {
                accounts.remove(account);
            }
        }
        if accounts.is_empty() {
            self.counts.remove(node);
        }
    }
}

impl NodePods for Census {
    fn runs(&self, node: &str, identity: &SpiffeId) -> bool {
        let account = (identity.namespace().into(), identity.service_account().into());
        self.seats.read().counts.get(node).is_some_and(|accounts| accounts.contains_key(&account))
    }

    fn node_of(&self, namespace: &str, pod: &PodRef) -> Option<String> {
        let seats = self.seats.read();
        let seat = seats.by_pod.get(&NamespacedName::new(namespace, pod.name.as_str()))?;
        (!seat.uid.is_empty() && *seat.uid == *pod.uid).then(|| seat.node.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat(node: &str) -> Option<Seat> {
        Some(Seat { node: node.into(), service_account: "reviews".into(), uid: "u1".into() })
    }

    fn pod(name: &str) -> NamespacedName {
        NamespacedName::new("shop", name)
    }

    fn runs(census: &Census, node: &str) -> bool {
        census.runs(node, &SpiffeId::new("cluster.local", "shop", "reviews").unwrap())
    }

    #[test]
    fn an_identity_runs_on_a_node_until_its_last_pod_leaves() {
        let census = Census::default();
        census.apply(vec![(pod("a"), seat("n1")), (pod("b"), seat("n1"))]);
        census.apply(vec![(pod("a"), None)]);
        assert!(runs(&census, "n1"));
        assert!(!runs(&census, "n2"));
        census.apply(vec![(pod("b"), seat("n2"))]);
        assert!(!runs(&census, "n1"));
        assert!(runs(&census, "n2"));
    }

    #[test]
    fn a_pod_under_another_uid_is_another_pod() {
        let census = Census::default();
        census.apply(vec![(pod("a"), seat("n1"))]);
        let named = |uid: &str| PodRef { name: "a".to_owned(), uid: uid.to_owned() };
        assert_eq!(census.node_of("shop", &named("u1")).as_deref(), Some("n1"));
        assert_eq!(census.node_of("shop", &named("u2")), None);
    }
}
