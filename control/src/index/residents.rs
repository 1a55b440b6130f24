//! Which identities run on which node: what a node proxy may ask certificates for.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::object::Pod;

/// A service account on a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Resident {
    /// The node.
    pub node: Arc<str>,
    /// The namespace of the service account.
    pub namespace: Arc<str>,
    /// The service account.
    pub service_account: Arc<str>,
}

/// Live pods counted by node and identity.
#[derive(Debug, Default)]
pub(super) struct Residents {
    counts: HashMap<Resident, usize>,
    /// Who was touched since the last [`Residents::take_changes`], and whether it was there before.
    touched: BTreeMap<Resident, bool>,
}

impl Residents {
    pub(super) fn add(&mut self, pod: &Pod) {
        let Some(resident) = resident(pod) else { return };
        let count = self.counts.entry(resident.clone()).or_default();
        self.touched.entry(resident).or_insert(*count > 0);
        *count += 1;
    }

    pub(super) fn remove(&mut self, pod: &Pod) {
        let Some(resident) = resident(pod) else { return };
        let Some(count) = self.counts.get_mut(&resident) else { return };
        self.touched.entry(resident.clone()).or_insert(*count > 0);
        *count -= 1;
        if *count == 0 {
            self.counts.remove(&resident);
        }
    }

    /// Identities that came to a node (`true`) or left it since the last call.
    pub(super) fn take_changes(&mut self) -> Vec<(Resident, bool)> {
        let touched = std::mem::take(&mut self.touched);
        let now = touched.into_iter().map(|(r, before)| (self.counts.contains_key(&r), r, before));
        now.filter(|(now, _, before)| now != before).map(|(now, r, _)| (r, now)).collect()
    }

    /// Everybody, in order.
    pub(super) fn all(&self) -> std::collections::BTreeSet<Resident> {
        self.counts.keys().cloned().collect()
    }
}

fn resident(pod: &Pod) -> Option<Resident> {
    let is_placed = pod.is_live() && !pod.node.is_empty();
    is_placed.then(|| Resident {
        node: pod.node.clone(),
        namespace: pod.meta.id.namespace.clone(),
        service_account: pod.service_account.clone(),
    })
}
