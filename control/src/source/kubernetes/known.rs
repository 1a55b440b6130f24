//! The objects of one kind that the index was given, and what an event of a watch changes of them. No I/O.
//!
//! A list that begins anew says what there is and never what is gone, so names are kept and what a new list lacks is
//! deleted at its end.

use std::collections::{HashMap, HashSet};

use kube::Resource;

use super::raw::RawObject;
use crate::intake::{self, Fault};
use crate::object::{Change, Kind, NamespacedName, ObjectRef};

/// What an event comes to.
#[derive(Debug, Default)]
pub(super) struct Effect {
    /// What changes.
    pub(super) changes: Vec<Change>,
    /// What cannot be taken and was not reported before.
    pub(super) new_faults: Vec<(ObjectRef, Fault)>,
}

/// The objects of one kind.
#[derive(Debug)]
pub(super) struct KnownObjects {
    kind: Kind,
    present: HashSet<NamespacedName>,
    /// What a list that has not ended has named; `None` outside of one.
    listed: Option<HashSet<NamespacedName>>,
    /// Objects that cannot be taken, and why.
    faults: HashMap<NamespacedName, String>,
}

impl KnownObjects {
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, present: HashSet::new(), listed: None, faults: HashMap::new() }
    }

    /// How many objects there are.
    pub(super) fn len(&self) -> usize {
        self.present.len()
    }

    /// How many of them cannot be taken.
    pub(super) fn faults(&self) -> usize {
        self.faults.len()
    }

    /// A list begins.
    pub(super) fn begin_list(&mut self) {
        self.listed = Some(HashSet::new());
    }

    /// The list is complete: what it did not name is gone.
    pub(super) fn end_list(&mut self) -> Effect {
        let Some(listed) = self.listed.take() else { return Effect::default() };
        let gone: Vec<NamespacedName> = self.present.difference(&listed).cloned().collect();
        Effect { changes: gone.into_iter().map(|name| self.forget(name)).collect(), ..Effect::default() }
    }

    /// An object is new, or changed, or was listed.
    pub(super) fn apply(&mut self, object: &RawObject) -> Effect {
        let Some(name) = self.name_of(object) else { return Effect::default() };
        self.present.insert(name.clone());
        if let Some(listed) = &mut self.listed {
            listed.insert(name.clone());
        }
        match intake::read(self.kind, object.value()) {
            Ok(object) => {
                self.faults.remove(&name);
                Effect { changes: vec![Change::Apply(object)], ..Effect::default() }
            }
            Err(fault) => self.apply_fault(name, fault),
        }
    }

    /// An object was deleted.
    pub(super) fn delete(&mut self, object: &RawObject) -> Effect {
        let Some(name) = self.name_of(object) else { return Effect::default() };
        Effect { changes: vec![self.forget(name)], ..Effect::default() }
    }

    /// The kind is no longer served: all of its objects are gone.
    pub(super) fn clear(&mut self) -> Effect {
        self.begin_list();
        self.end_list()
    }

    /// An object that cannot be taken counts as deleted, whatever it was before, unless something stands for it.
    fn apply_fault(&mut self, name: NamespacedName, mut fault: Fault) -> Effect {
        let reference = ObjectRef { kind: self.kind, name: name.clone() };
        let change = match fault.stand_in.take() {
            Some(stand_in) => Change::Apply(*stand_in),
            None => Change::Delete(reference.clone()),
        };
        let is_new = self.faults.insert(name, fault.message.clone()).as_ref() != Some(&fault.message);
        let new_faults = if is_new { vec![(reference, fault)] } else { Vec::new() };
        Effect { changes: vec![change], new_faults }
    }

    fn forget(&mut self, name: NamespacedName) -> Change {
        self.present.remove(&name);
        self.faults.remove(&name);
        Change::Delete(ObjectRef { kind: self.kind, name })
    }

    fn name_of(&self, object: &RawObject) -> Option<NamespacedName> {
        let metadata = object.meta();
        let namespace = match self.kind.is_namespaced() {
            true => metadata.namespace.as_deref()?,
            false => "",
        };
        Some(NamespacedName::new(namespace, metadata.name.as_deref()?))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn raw(value: Value) -> RawObject {
        serde_json::from_value(value).unwrap()
    }

    fn service(name: &str, port: &Value) -> RawObject {
        raw(json!({
            "metadata": { "name": name, "namespace": "shop" },
            "spec": { "ports": [{ "port": port }] },
        }))
    }

    fn deny(action: &str) -> RawObject {
        raw(json!({
            "metadata": { "name": "deny", "namespace": "shop" },
            "spec": { "action": action, "rules": 7 },
        }))
    }

    fn deleted(effect: &Effect) -> Vec<&str> {
        let name = |change: &Change| match change {
            Change::Delete(_) => true,
            Change::Apply(_) => false,
        };
        let mut names: Vec<_> = Vec::new();
        for change in effect.changes.iter().filter(|change| name(change)) {
            let Change::Delete(reference) = change else { continue };
            names.push(&*reference.name.name);
        }
        names.sort_unstable();
        names
    }

    #[test]
    fn what_a_new_list_lacks_is_deleted() {
        let mut known = KnownObjects::new(Kind::Service);
        known.begin_list();
        known.apply(&service("a", &json!(80)));
        known.apply(&service("b", &json!(80)));
        assert!(known.end_list().changes.is_empty());
        known.apply(&service("c", &json!(80)));
        known.begin_list();
        known.apply(&service("b", &json!(81)));
        assert_eq!(deleted(&known.end_list()), ["a", "c"]);
        assert_eq!(known.len(), 1);
    }

    #[test]
    fn a_list_that_begins_again_deletes_nothing_twice() {
        let mut known = KnownObjects::new(Kind::Service);
        known.apply(&service("a", &json!(80)));
        known.begin_list();
        known.begin_list();
        known.apply(&service("a", &json!(80)));
        assert!(known.end_list().changes.is_empty());
        assert!(known.end_list().changes.is_empty());
    }

    #[test]
    fn an_unreadable_object_is_reported_once_and_gone() {
        let mut known = KnownObjects::new(Kind::Service);
        known.apply(&service("a", &json!(80)));
        let effect = known.apply(&service("a", &json!("eighty")));
        assert_eq!(deleted(&effect), ["a"]);
        assert_eq!(effect.new_faults.len(), 1);
        assert!(known.apply(&service("a", &json!("eighty"))).new_faults.is_empty());
        assert_eq!(known.faults(), 1);
        known.apply(&service("a", &json!(80)));
        assert_eq!(known.faults(), 0);
    }

    #[test]
    fn an_unreadable_policy_has_a_stand_in() {
        let mut known = KnownObjects::new(Kind::AuthorizationPolicy);
        let effect = known.apply(&deny("DENY"));
        assert!(matches!(effect.changes.as_slice(), [Change::Apply(_)]), "{effect:?}");
        assert_eq!(effect.new_faults.len(), 1);
    }

    #[test]
    fn a_kind_that_is_no_longer_served_has_no_objects() {
        let mut known = KnownObjects::new(Kind::Service);
        known.apply(&service("a", &json!(80)));
        assert_eq!(deleted(&known.clear()), ["a"]);
        assert_eq!(known.len(), 0);
    }
}
