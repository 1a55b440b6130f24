//! Publishes what the index computes to the store that subscribers follow.

use std::collections::HashSet;
use std::sync::Arc;

use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_xds::{Change, Publisher, Resource, Store, StoreConfig};

use crate::index::{self, ResourceChanges, ResourceType};

/// The published resources.
#[derive(Clone, Debug)]
pub struct Published(Store);

impl Published {
    /// An empty store, and what announces its batched changes: run it for the process's life.
    pub fn new() -> (Published, Publisher) {
        // Policies before the workloads that list them.
        let types = ResourceType::ALL.map(ResourceType::type_url);
        let (store, publisher) = Store::new(&types, StoreConfig::default());
        (Published(store), publisher)
    }

    /// The store, to be served.
    pub fn store(&self) -> Store {
        self.0.clone()
    }

    /// How many policies there are.
    pub fn policies(&self) -> usize {
        self.0.len(AUTHORIZATION_TYPE_URL)
    }

    /// How many workloads and services there are.
    pub fn addresses(&self) -> usize {
        self.0.len(ADDRESS_TYPE_URL)
    }

    /// Publishes changes of one batch at once: no subscriber takes a workload for complete without its policies.
    pub fn publish(&self, changed: impl IntoIterator<Item = (ResourceType, ResourceChanges)>) {
        let changed = changed.into_iter().map(|(kind, changed)| (kind.type_url(), changes(changed)));
        self.0.apply_batch(changed);
    }
}

fn changes(changes: ResourceChanges) -> Vec<Change> {
    let ResourceChanges { upserts, urgent, removals } = changes;
    let urgent: HashSet<Arc<str>> = urgent.into_iter().collect();
    let removals = removals.into_iter().map(Change::Remove);
    let upserts = upserts.into_iter().map(|resource| {
        let is_urgent = urgent.contains(&resource.name);
        let resource = translate(resource);
        Change::Upsert(if is_urgent { resource.urgent() } else { resource })
    });
    removals.chain(upserts).collect()
}

fn translate(resource: index::Resource) -> Resource {
    let index::Resource { name, aliases, parents, body, unhealthy: _ } = resource;
    let resource = Resource::from_bytes(name, body);
    let resource = aliases.into_iter().fold(resource, Resource::alias);
    parents.into_iter().fold(resource, Resource::parent)
}
