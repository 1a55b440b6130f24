//! The resources as they stand, by who produces them, and what a batch changed of them.
//!
//! Two objects may claim the same name (a Service and a ServiceEntry for its host); the first in the order
//! of their references has it, and the next follows when that one goes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;

use crate::object::ObjectRef;

/// The types of resources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceType {
    /// `istio.security.Authorization`
    Authorization,
    /// `istio.workload.Address`
    Address,
    /// `ambit.l7.Gateway`
    Gateway,
    /// `ambit.l7.Policy`
    Policy,
    /// `ambit.l7.BackendPolicy`
    BackendPolicy,
    /// `ambit.l7.KeyPair`
    KeyPair,
    /// `ambit.l7.Listener`
    Listener,
    /// `ambit.l7.Route`
    Route,
    /// `ambit.l7.StreamRoute`
    StreamRoute,
}

impl ResourceType {
    /// Every type. A type comes before those whose resources refer to it.
    pub const ALL: [ResourceType; 9] = [
        ResourceType::Authorization,
        ResourceType::Address,
        ResourceType::Gateway,
        ResourceType::Policy,
        ResourceType::BackendPolicy,
        ResourceType::KeyPair,
        ResourceType::Listener,
        ResourceType::Route,
        ResourceType::StreamRoute,
    ];

    /// How the type is named on the wire.
    pub const fn type_url(self) -> &'static str {
        match self {
            ResourceType::Authorization => ambit_api::AUTHORIZATION_TYPE_URL,
            ResourceType::Address => ambit_api::ADDRESS_TYPE_URL,
            ResourceType::Gateway => ambit_api::GATEWAY_TYPE_URL,
            ResourceType::Policy => ambit_api::POLICY_TYPE_URL,
            ResourceType::BackendPolicy => ambit_api::BACKEND_POLICY_TYPE_URL,
            ResourceType::KeyPair => ambit_api::KEY_PAIR_TYPE_URL,
            ResourceType::Listener => ambit_api::LISTENER_TYPE_URL,
            ResourceType::Route => ambit_api::ROUTE_TYPE_URL,
            ResourceType::StreamRoute => ambit_api::STREAM_ROUTE_TYPE_URL,
        }
    }
}

/// A resource for proxies, encoded once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// Its name (xDS contract).
    pub name: Arc<str>,
    /// Further names that it may be asked for by: `<network>/<ip>`.
    pub aliases: Vec<Arc<str>>,
    /// Names of resources that bring it along when they are asked for: a workload's services.
    pub parents: Vec<Arc<str>>,
    /// The encoded message.
    pub body: Bytes,
    /// A workload that takes no new connections.
    pub unhealthy: bool,
}

/// What a batch of changes did to the resources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResourceChanges {
    /// Resources that are new or differ.
    pub upserts: Vec<Resource>,
    /// Names among the upserts of workloads that were healthy and no longer are: these cannot wait.
    pub urgent: Vec<Arc<str>>,
    /// Names of resources that are gone.
    pub removals: Vec<Arc<str>>,
}

type Key = (ResourceType, Arc<str>);

/// Claims by resource and by producer.
#[derive(Debug, Default)]
pub(super) struct Outputs {
    claims: HashMap<Key, Vec<(ObjectRef, Resource)>>,
    produced: HashMap<ObjectRef, Vec<Key>>,
    /// What was in force before the current batch, for what it touched.
    before: BTreeMap<Key, Option<Resource>>,
}

impl Outputs {
    /// Replaces everything that a producer produces.
    pub(super) fn set(&mut self, producer: &ObjectRef, resources: Vec<(ResourceType, Resource)>) {
        let old = self.produced.remove(producer).unwrap_or_default();
        for key in old.iter().chain(&resources.iter().map(|(t, r)| (*t, r.name.clone())).collect::<Vec<_>>())
        {
            if !self.before.contains_key(key) {
                let current = self.current(key).cloned();
                self.before.insert(key.clone(), current);
            }
        }
        for key in &old {
            if let Some(claims) = self.claims.get_mut(key) {
                claims.retain(|(claimant, _)| claimant != producer);
                if claims.is_empty() {
                    self.claims.remove(key);
                }
            }
        }
        let mut keys = Vec::with_capacity(resources.len());
        for (kind, resource) in resources {
            let key = (kind, resource.name.clone());
            // One is the rule, and there are as many as resources.
            let claims = self.claims.entry(key.clone()).or_insert_with(|| Vec::with_capacity(1));
            let at = claims.partition_point(|(claimant, _)| claimant <= producer);
            claims.insert(at, (producer.clone(), resource));
            keys.push(key);
        }
        if !keys.is_empty() {
            self.produced.insert(producer.clone(), keys);
        }
    }

    /// Whether a producer produces anything.
    pub(super) fn has(&self, producer: &ObjectRef) -> bool {
        self.produced.contains_key(producer)
    }

    /// Ends the batch: what is in force now and was not before, by type.
    pub(super) fn take_changes(&mut self) -> BTreeMap<ResourceType, ResourceChanges> {
        let mut all: BTreeMap<ResourceType, ResourceChanges> = BTreeMap::new();
        for (key, before) in std::mem::take(&mut self.before) {
            let changes = all.entry(key.0).or_default();
            match (before, self.current(&key)) {
                (Some(_), None) => changes.removals.push(key.1),
                (before, Some(now)) if before.as_ref() != Some(now) => {
                    if now.unhealthy && before.is_some_and(|b| !b.unhealthy) {
                        changes.urgent.push(key.1.clone());
                    }
                    changes.upserts.push(now.clone());
                }
                _ => {}
            }
        }
        all
    }

    /// Everything in force, in order.
    pub(super) fn all(&self) -> BTreeMap<Key, Resource> {
        let current =
            self.claims.iter().filter_map(|(key, claims)| Some((key.clone(), claims.first()?.1.clone())));
        current.collect()
    }

    fn current(&self, key: &Key) -> Option<&Resource> {
        self.claims.get(key)?.first().map(|(_, resource)| resource)
    }
}
