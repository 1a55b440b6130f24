//! Values that many resources share (namespaces, nodes, identities, ports, lists of policies), kept once.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;

use ambit_identity::SpiffeId;
use ambit_policy::PolicyList;

use crate::service::Ports;

/// Below this many texts, unused ones are not looked for.
const SMALLEST_SWEEP: usize = 1024;
/// At so many values of one kind all are forgotten: later ones share anew.
const MOST_VALUES: usize = 16_384;

/// Shared values. Owned by the writer; forgets texts that nobody uses once they have doubled, and other values when they are too many.
#[derive(Debug, Default)]
pub(crate) struct Interner {
    texts: HashSet<Arc<str>>,
    sweep_at: usize,
    identities: HashSet<SpiffeId>,
    ports: HashSet<Ports>,
    policies: HashSet<PolicyList>,
}

impl Interner {
    /// The one copy of `text`.
    pub(crate) fn intern(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        if self.texts.len() >= self.sweep_at.max(SMALLEST_SWEEP) {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.sweep_at = self.texts.len() * 2;
        }
        let text: Arc<str> = text.into();
        self.texts.insert(Arc::clone(&text));
        text
    }

    /// The shared copy of an identity.
    pub(crate) fn identity(&mut self, identity: SpiffeId) -> SpiffeId {
        share(&mut self.identities, identity)
    }

    /// The shared copy of a list of ports.
    pub(crate) fn ports(&mut self, ports: Ports) -> Ports {
        share(&mut self.ports, ports)
    }

    /// The shared copy of a list of policies.
    pub(crate) fn policies(&mut self, policies: PolicyList) -> PolicyList {
        share(&mut self.policies, policies)
    }
}

fn share<T: Clone + Eq + Hash>(values: &mut HashSet<T>, value: T) -> T {
    if let Some(known) = values.get(&value) {
        return known.clone();
    }
    if values.len() >= MOST_VALUES {
        values.clear();
    }
    values.insert(value.clone());
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_are_one_copy_and_unused_ones_are_forgotten() {
        let mut interner = Interner::default();
        let kept = interner.intern("kept");
        for number in 0..10 * SMALLEST_SWEEP {
            interner.intern(&number.to_string());
        }
        assert!(Arc::ptr_eq(&kept, &interner.intern("kept")));
        assert!(interner.texts.len() <= 2 * SMALLEST_SWEEP, "{} texts", interner.texts.len());
    }
}
