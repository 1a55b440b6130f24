//! All policies that a node knows, and the decision for a connection to one workload.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use serde::Serialize;

use crate::compile::{Action, Facts, Policy, Scope};
use crate::index::RuleIndex;
use crate::name::{PolicyList, PolicyName};
use crate::request::{Decision, Request, Verdict};

/// Up to this many listed policies are walked over one by one; above, their namespaces' indexes are asked and the answers filtered.
const WALKED: usize = 16;

/// Stands for everything that a verdict for one workload depends on but the connection itself: if two stamps are equal, so are the verdicts.
/// Comparable only between stamps of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Stamp(u64);

/// A policy and when it came.
#[derive(Debug)]
struct Entry {
    policy: Arc<Policy>,
    /// The set's revision when this policy was put in; never used twice.
    revision: u64,
    slot: u32,
}

/// Policies, indexed. Cloning is cheap and a clone never changes: readers keep one while the writer goes on.
#[derive(Clone, Default)]
pub struct PolicySet {
    by_name: imbl::HashMap<PolicyName, Arc<Entry>>,
    global: Arc<Group>,
    namespaces: imbl::HashMap<Box<str>, Arc<Namespace>>,
    revision: u64,
}

/// Policies of one namespace that are not global.
#[derive(Clone, Default)]
struct Namespace {
    /// Of scope NAMESPACE.
    whole: Group,
    /// Of scope WORKLOAD_SELECTOR.
    selected: Group,
}

/// Policies that apply to the same workloads.
#[derive(Clone, Default)]
struct Group {
    enforced: Layer,
    dry_run: Layer,
    /// The set's revision when this group last changed.
    revision: u64,
}

impl Group {
    fn layer_mut(&mut self, policy: &Policy) -> &mut RuleIndex {
        let layer = if policy.dry_run() { &mut self.dry_run } else { &mut self.enforced };
        layer.index_mut(policy.action())
    }

    fn is_empty(&self) -> bool {
        self.enforced.is_empty() && self.dry_run.is_empty()
    }
}

#[derive(Clone, Default)]
struct Layer {
    allow: RuleIndex,
    deny: RuleIndex,
}

impl Layer {
    fn index(&self, action: Action) -> &RuleIndex {
        match action {
            Action::Allow => &self.allow,
            Action::Deny => &self.deny,
        }
    }

    fn index_mut(&mut self, action: Action) -> &mut RuleIndex {
        match action {
            Action::Allow => &mut self.allow,
            Action::Deny => &mut self.deny,
        }
    }

    fn is_empty(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }
}

impl PolicySet {
    /// Puts `policy` in, in place of one of the same name. Returns whether that changed anything.
    pub fn insert(&mut self, policy: Policy) -> bool {
        if self.by_name.get(policy.name()).is_some_and(|entry| *entry.policy == policy) {
            return false;
        }
        self.remove(&policy.name().clone());
        self.revision += 1;
        let revision = self.revision;
        let policy = Arc::new(policy);
        let group = self.group_mut(&policy);
        group.revision = revision;
        let slot = group.layer_mut(&policy).insert(&policy);
        self.by_name.insert(policy.name().clone(), Arc::new(Entry { policy, revision, slot }));
        true
    }

    /// Takes the policy of this name out. Returns whether it was there.
    pub fn remove(&mut self, name: &PolicyName) -> bool {
        let Some(entry) = self.by_name.remove(name) else { return false };
        self.revision += 1;
        let revision = self.revision;
        let group = self.group_mut(&entry.policy);
        group.revision = revision;
        group.layer_mut(&entry.policy).remove(entry.slot);
        let namespace = entry.policy.namespace();
        let left = self.namespaces.get(namespace);
        if left.is_some_and(|left| left.whole.is_empty() && left.selected.is_empty()) {
            self.namespaces.remove(namespace);
        }
        true
    }

    /// The policy of this name.
    pub fn get(&self, name: &PolicyName) -> Option<&Arc<Policy>> {
        self.by_name.get(name).map(|entry| &entry.policy)
    }

    /// How many policies there are.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is no policy.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// All policies, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.by_name.values().map(|entry| &entry.policy)
    }

    /// The policies that apply to a workload of `namespace` that lists `listed`: those of its namespace, the global ones and those that it
    /// lists by name. Walks over all policies; for people, not for decisions.
    pub fn applying(&self, namespace: &str, listed: &PolicyList) -> impl Iterator<Item = &Arc<Policy>> {
        self.iter().filter(move |policy| applies(policy, namespace, listed))
    }

    /// Decides `request` to a workload of `namespace` that lists `listed`. A listed name that is unknown is no policy.
    ///
    /// xDS contract: a DENY that matches denies; else, no ALLOW policy at all allows; else one ALLOW that matches allows; else deny.
    pub fn evaluate(&self, namespace: &str, listed: &PolicyList, request: &Request<'_>) -> Verdict {
        let subject = Subject {
            set: self,
            own: self.namespaces.get(namespace).map(|own| &own.whole),
            listed,
            request: Facts::of(request),
        };
        Verdict {
            decision: subject.decide(&[false]),
            dry_run: subject.has_dry_run().then(|| subject.decide(&[false, true])),
        }
    }

    /// The stamp of what [`PolicySet::evaluate`] depends on for such a workload. Time grows with the length of `listed` only.
    pub fn stamp(&self, namespace: &str, listed: &PolicyList) -> Stamp {
        let mut hasher = DefaultHasher::new();
        self.global.revision.hash(&mut hasher);
        namespace.hash(&mut hasher);
        self.namespaces.get(namespace).map_or(0, |own| own.whole.revision).hash(&mut hasher);
        for name in listed {
            name.hash(&mut hasher);
            self.by_name.get(name).map(|entry| entry.revision).hash(&mut hasher);
        }
        Stamp(hasher.finish())
    }

    fn group_mut(&mut self, policy: &Policy) -> &mut Group {
        let namespace = match policy.scope() {
            Scope::Global => return Arc::make_mut(&mut self.global),
            Scope::Namespace | Scope::WorkloadSelector => policy.namespace(),
        };
        let own = Arc::make_mut(self.namespaces.entry(namespace.into()).or_default());
        if policy.scope() == Scope::Namespace { &mut own.whole } else { &mut own.selected }
    }
}

/// Whether `policy` is one of a workload of `namespace` that lists `listed`.
fn applies(policy: &Policy, namespace: &str, listed: &PolicyList) -> bool {
    let by_scope = match policy.scope() {
        Scope::Global => true,
        Scope::Namespace => policy.namespace() == namespace,
        Scope::WorkloadSelector => false,
    };
    by_scope || listed.contains(policy.name())
}

/// One connection to one workload.
struct Subject<'a> {
    set: &'a PolicySet,
    own: Option<&'a Group>,
    listed: &'a PolicyList,
    request: Facts<'a>,
}

impl<'a> Subject<'a> {
    /// Decides by the layers named: enforced policies (`false`), dry-run ones (`true`).
    fn decide(&self, layers: &[bool]) -> Decision {
        if let Some(policy) = self.find(Action::Deny, layers) {
            Decision::DeniedBy(policy.name().clone())
        } else if let Some(policy) = self.find(Action::Allow, layers) {
            Decision::AllowedBy(policy.name().clone())
        } else if self.any_allow(layers) {
            Decision::DeniedByDefault
        } else {
            Decision::AllowedByDefault
        }
    }

    fn find(&self, action: Action, layers: &[bool]) -> Option<&'a Arc<Policy>> {
        layers.iter().find_map(|&dry_run| {
            let by_scope = self
                .groups()
                .find_map(|group| layer(group, dry_run).index(action).find(&self.request, |_| true));
            by_scope.or_else(|| self.find_listed(action, dry_run))
        })
    }

    fn find_listed(&self, action: Action, dry_run: bool) -> Option<&'a Arc<Policy>> {
        if self.listed.len() <= WALKED {
            return self.listed_policies().find(|policy| {
                policy.action() == action
                    && policy.dry_run() == dry_run
                    && policy.rules().iter().any(|rule| rule.matches(&self.request))
            });
        }
        self.listed_namespaces().find_map(|(_, namespace)| {
            let listed = |policy: &Policy| self.listed.contains(policy.name());
            let find = |group: &'a Group| layer(group, dry_run).index(action).find(&self.request, listed);
            find(&namespace.selected).or_else(|| find(&namespace.whole))
        })
    }

    fn any_allow(&self, layers: &[bool]) -> bool {
        let allows = |group: &Group| layers.iter().any(|&dry_run| !layer(group, dry_run).allow.is_empty());
        self.groups().any(allows)
            || self.any_listed(allows, |policy| {
                policy.action() == Action::Allow && layers.contains(&policy.dry_run())
            })
    }

    fn has_dry_run(&self) -> bool {
        let has = |group: &Group| !group.dry_run.is_empty();
        self.groups().any(has) || self.any_listed(has, Policy::dry_run)
    }

    /// Whether a listed policy is such that `is`; groups that are not `possible` are passed over whole.
    fn any_listed(&self, possible: impl Fn(&Group) -> bool, is: impl Fn(&Policy) -> bool) -> bool {
        self.listed_namespaces().any(|(names, namespace)| {
            (possible(&namespace.selected) || possible(&namespace.whole))
                && names.iter().filter_map(|name| self.set.get(name)).any(|policy| is(policy))
        })
    }

    /// The list cut by namespace (sorted, it comes so), with what is known of each.
    fn listed_namespaces(&self) -> impl Iterator<Item = (&'a [PolicyName], &'a Namespace)> {
        let namespaces = self.listed.by_namespace();
        namespaces.filter_map(|names| Some((names, &**self.set.namespaces.get(names.first()?.namespace())?)))
    }

    /// The groups that apply whatever the workload lists.
    fn groups(&self) -> impl Iterator<Item = &'a Group> {
        std::iter::once(&*self.set.global).chain(self.own)
    }

    fn listed_policies(&self) -> impl Iterator<Item = &'a Arc<Policy>> {
        self.listed.iter().filter_map(|name| self.set.get(name))
    }
}

fn layer(group: &Group, dry_run: bool) -> &Layer {
    if dry_run { &group.dry_run } else { &group.enforced }
}

impl Serialize for PolicySet {
    /// As a list in the order of names.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut policies: Vec<&Policy> = self.iter().map(|policy| &**policy).collect();
        policies.sort_unstable_by_key(|policy| policy.name().clone());
        serializer.collect_seq(policies)
    }
}

impl fmt::Debug for PolicySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|policy| policy.name())).finish()
    }
}
