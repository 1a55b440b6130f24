//! Publishes what the index computes to the store that subscribers follow.

use std::collections::HashSet;
use std::sync::Arc;

use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_xds::{Change, Publisher, Resource, Store, StoreConfig};
use parking_lot::Mutex;

use crate::index::{self, ResourceChanges, ResourceType};

/// The published resources.
#[derive(Clone, Debug)]
pub struct Published {
    store: Store,
    /// Names of the services, to count them.
    services: Arc<Mutex<HashSet<Arc<str>>>>,
}

impl Published {
    /// An empty store, and what announces its batched changes: run it for the process's life.
    pub fn new() -> (Published, Publisher) {
        // Policies before the workloads that list them.
        let types = ResourceType::ALL.map(ResourceType::type_url);
        let (store, publisher) = Store::new(&types, StoreConfig::default());
        (Published { store, services: Arc::default() }, publisher)
    }

    /// The store, to be served.
    pub fn store(&self) -> Store {
        self.store.clone()
    }

    /// How many policies there are.
    pub fn policies(&self) -> usize {
        self.store.len(AUTHORIZATION_TYPE_URL)
    }

    /// How many workloads and services there are.
    pub fn addresses(&self) -> usize {
        self.store.len(ADDRESS_TYPE_URL)
    }

    /// How many services there are.
    pub fn services(&self) -> usize {
        self.services.lock().len()
    }

    fn count_services(&self, changes: &ResourceChanges) {
        let mut services = self.services.lock();
        for name in &changes.removals {
            services.remove(name);
        }
        let names = changes.upserts.iter().map(|resource| &resource.name);
        services.extend(names.filter(|name| is_service(name)).cloned());
    }

    /// Publishes changes of one batch at once: no subscriber takes a workload for complete without its policies.
    pub fn publish(&self, changed: impl IntoIterator<Item = (ResourceType, ResourceChanges)>) {
        let changed = changed.into_iter().map(|(kind, changed)| {
            if kind == ResourceType::Address {
                self.count_services(&changed);
            }
            (kind.type_url(), changes(changed))
        });
        self.store.apply_batch(changed);
    }
}

/// Whether a resource's name is that of a service: `<namespace>/<hostname>`. Uids of workloads have more parts.
fn is_service(name: &str) -> bool {
    name.matches('/').count() == 1
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_known_from_workloads_by_their_names() {
        assert!(is_service("shop/reviews.shop.svc.cluster.local"));
        assert!(!is_service("Kubernetes//Pod/shop/reviews-1"));
        assert!(!is_service("Kubernetes/networking.istio.io/ServiceEntry/shop/e/192.0.2.1"));
    }
}
