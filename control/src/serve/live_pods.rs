//! Who runs where, as the certificate authority asks it.

use std::collections::HashMap;
use std::sync::Arc;

use ambit_ca::{NodePods, PodRef};
use ambit_identity::SpiffeId;
use parking_lot::RwLock;

use crate::index::PodPlacement;
use crate::object::NamespacedName;

/// The live pods by name and by what they are on which node.
///
/// The lock guards both maps together; it is held for one change or one question, never across an await.
#[derive(Debug, Default)]
pub struct LivePods {
    /// Whether the source has every pod of the cluster. A directory may lack the node proxies, for example.
    is_complete: bool,
    placements: RwLock<Placements>,
}

#[derive(Debug, Default)]
struct Placements {
    by_pod: HashMap<NamespacedName, PodPlacement>,
    /// How many pods of a service account there are on a node: node, then namespace, then account.
    counts: HashMap<Arc<str>, HashMap<Account, usize>>,
}

type Account = (Arc<str>, Arc<str>);

impl LivePods {
    /// No pods yet. `is_complete` says whether the source has every pod of the cluster. Nobody asks before the source
    /// was read.
    pub fn new(is_complete: bool) -> Self {
        Self { is_complete, placements: RwLock::default() }
    }

    /// Takes what the index says of pods.
    pub fn apply(&self, changes: Vec<(NamespacedName, Option<PodPlacement>)>) {
        if changes.is_empty() {
            return;
        }
        let mut placements = self.placements.write();
        for (pod, placement) in changes {
            placements.set(pod, placement);
        }
    }

    /// Where a live pod is, and as what.
    pub fn placement(&self, namespace: &str, pod: &str) -> Option<PodPlacement> {
        self.placements.read().by_pod.get(&NamespacedName::new(namespace, pod)).cloned()
    }

    /// How many live pods are bound to a node.
    pub fn len(&self) -> usize {
        self.placements.read().by_pod.len()
    }

    /// Whether there is no live pod at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Placements {
    fn set(&mut self, pod: NamespacedName, placement: Option<PodPlacement>) {
        let old = match &placement {
            Some(placement) => self.by_pod.insert(pod.clone(), placement.clone()),
            None => self.by_pod.remove(&pod),
        };
        if let Some(placement) = placement {
            let account = (pod.namespace.clone(), placement.service_account);
            *self.counts.entry(placement.node).or_default().entry(account).or_default() += 1;
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

impl NodePods for LivePods {
    fn is_complete(&self) -> bool {
        self.is_complete
    }

    fn runs(&self, node: &str, identity: &SpiffeId) -> bool {
        let account = (identity.namespace().into(), identity.service_account().into());
        self.placements.read().counts.get(node).is_some_and(|accounts| accounts.contains_key(&account))
    }

    fn node_of(&self, namespace: &str, pod: &PodRef) -> Option<String> {
        let placements = self.placements.read();
        let placement = placements.by_pod.get(&NamespacedName::new(namespace, pod.name.as_str()))?;
        (!placement.uid.is_empty() && *placement.uid == *pod.uid).then(|| placement.node.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placement(node: &str) -> Option<PodPlacement> {
        Some(PodPlacement { node: node.into(), service_account: "reviews".into(), uid: "u1".into() })
    }

    fn pod(name: &str) -> NamespacedName {
        NamespacedName::new("shop", name)
    }

    fn runs(live_pods: &LivePods, node: &str) -> bool {
        live_pods.runs(node, &SpiffeId::new("cluster.local", "shop", "reviews").unwrap())
    }

    #[test]
    fn an_identity_runs_on_a_node_until_its_last_pod_leaves() {
        let live_pods = LivePods::default();
        live_pods.apply(vec![(pod("a"), placement("n1")), (pod("b"), placement("n1"))]);
        live_pods.apply(vec![(pod("a"), None)]);
        assert!(runs(&live_pods, "n1"));
        assert!(!runs(&live_pods, "n2"));
        live_pods.apply(vec![(pod("b"), placement("n2"))]);
        assert!(!runs(&live_pods, "n1"));
        assert!(runs(&live_pods, "n2"));
    }

    #[test]
    fn a_pod_under_another_uid_is_another_pod() {
        let live_pods = LivePods::default();
        live_pods.apply(vec![(pod("a"), placement("n1"))]);
        let named = |uid: &str| PodRef { name: "a".to_owned(), uid: uid.to_owned() };
        assert_eq!(live_pods.node_of("shop", &named("u1")).as_deref(), Some("n1"));
        assert_eq!(live_pods.node_of("shop", &named("u2")), None);
    }
}
