//! What the index says, put into the tables that subscribers follow.

use std::collections::HashSet;
use std::sync::Arc;

use ambit_api::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use ambit_xds::{Change, Publisher, Resource, Table, TableConfig};

use crate::index::{self, ResourceChanges};

/// The tables of the two types.
#[derive(Clone, Debug)]
pub struct Tables {
    policies: Table,
    addresses: Table,
}

impl Tables {
    /// Empty tables, and what announces their batched changes: run both for the process's life.
    pub fn new() -> (Tables, [Publisher; 2]) {
        let (policies, first) = Table::new(AUTHORIZATION_TYPE_URL, TableConfig::default());
        let (addresses, second) = Table::new(ADDRESS_TYPE_URL, TableConfig::default());
        (Tables { policies, addresses }, [first, second])
    }

    /// The tables in the order in which subscribers are told of news: policies before the workloads that name them.
    pub fn in_order(&self) -> Vec<Table> {
        vec![self.policies.clone(), self.addresses.clone()]
    }

    /// How many resources there are: policies, then workloads and services.
    pub fn len(&self) -> (usize, usize) {
        (self.policies.len(), self.addresses.len())
    }

    /// Publishes changes. A policy is there before a workload lists it and goes after no workload lists it any more.
    pub fn publish(&self, policies: ResourceChanges, addresses: ResourceChanges) {
        let ResourceChanges { upserts, urgent, removals } = policies;
        apply(&self.policies, ResourceChanges { upserts, urgent, removals: Vec::new() });
        apply(&self.addresses, addresses);
        apply(&self.policies, ResourceChanges { removals, ..ResourceChanges::default() });
    }
}

fn apply(table: &Table, changes: ResourceChanges) {
    let ResourceChanges { upserts, urgent, removals } = changes;
    let urgent: HashSet<Arc<str>> = urgent.into_iter().collect();
    let removals = removals.into_iter().map(Change::Remove);
    let upserts = upserts.into_iter().map(|resource| {
        let is_urgent = urgent.contains(&resource.name);
        let resource = translate(resource);
        Change::Upsert(if is_urgent { resource.urgent() } else { resource })
    });
    let changes: Vec<Change> = removals.chain(upserts).collect();
    if !changes.is_empty() {
        table.apply(changes);
    }
}

fn translate(resource: index::Resource) -> Resource {
    let index::Resource { name, aliases, parents, body, unhealthy: _ } = resource;
    let resource = Resource::from_bytes(name, body);
    let resource = aliases.into_iter().fold(resource, Resource::alias);
    parents.into_iter().fold(resource, Resource::parent)
}
