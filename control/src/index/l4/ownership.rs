//! Who owns an address: a pod its own, a Service its cluster IPs, and of ServiceEntries that claim one the oldest.
//!
//! Everything else that claims such an address is left out and gets a finding, so that whoever can write objects in
//! one namespace cannot divert connections to another.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::Finding;
use super::reader::Reader;
use super::workloads;
use crate::object::{Kind, NamespacedName, ObjectRef, ServiceEntry, Visibility};

/// The object that an address belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::index) enum Owner {
    Pod(NamespacedName),
    Service(NamespacedName),
    ServiceEntry(NamespacedName),
}

impl Owner {
    fn reference(&self) -> ObjectRef {
        let (kind, name) = match self {
            Owner::Pod(id) => (Kind::Pod, id),
            Owner::Service(id) => (Kind::Service, id),
            Owner::ServiceEntry(id) => (Kind::ServiceEntry, id),
        };
        ObjectRef { kind, name: name.clone() }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Pod(id) => write!(f, "Pod {id}"),
            Owner::Service(id) => write!(f, "Service {id}"),
            Owner::ServiceEntry(id) => write!(f, "ServiceEntry {id}, which is older"),
        }
    }
}

/// The owner of one of a workload's addresses, if that is a pod or a Service, with the address.
pub(in crate::index) fn of_endpoint(
    reader: &Reader<'_>,
    network: &Arc<str>,
    addresses: &[IpAddr],
) -> Option<(IpAddr, Owner)> {
    addresses.iter().find_map(|address| Some((*address, pod_or_service(reader, network, *address)?)))
}

/// The owner of a virtual address of `entry`, if that is not the entry itself. Ranges of addresses have no owner: they
/// rank below everything that has an address within.
pub(in crate::index) fn of_virtual_address(
    reader: &Reader<'_>,
    network: &Arc<str>,
    entry: &ServiceEntry,
    block: IpNet,
) -> Option<Owner> {
    if block.prefix_len() != block.max_prefix_len() {
        return None;
    }
    let address = block.addr();
    pod_or_service(reader, network, address).or_else(|| older_entry(reader, network, entry, address))
}

fn pod_or_service(reader: &Reader<'_>, network: &Arc<str>, address: IpAddr) -> Option<Owner> {
    let mut pods = reader.pods_at(address);
    let pod =
        pods.find(|pod| workloads::network(reader, &pod.meta.id.namespace, pod.network.as_ref()) == *network);
    if let Some(pod) = pod {
        return Some(Owner::Pod(pod.meta.id.clone()));
    }
    let mut services = reader.services_at(address);
    let service = services.find(|id| workloads::network(reader, &id.namespace, None) == *network)?;
    Some(Owner::Service(service.clone()))
}

/// An older entry of another namespace that everybody sees. Entries of one namespace may share an address, and one that
/// only its own namespace sees diverts nobody else.
fn older_entry(
    reader: &Reader<'_>,
    network: &Arc<str>,
    entry: &ServiceEntry,
    address: IpAddr,
) -> Option<Owner> {
    if entry.visibility != Visibility::Public {
        return None;
    }
    let id = &entry.meta.id;
    let others = reader.entries_at(address).filter(|other| {
        other.meta.id.namespace != id.namespace
            && other.visibility == Visibility::Public
            && other.meta.seniority() < entry.meta.seniority()
            && workloads::network(reader, &other.meta.id.namespace, None) == *network
    });
    let oldest = others.min_by_key(|other| other.meta.seniority())?;
    Some(Owner::ServiceEntry(oldest.meta.id.clone()))
}

/// Collects what an object claims and does not get, for one finding.
#[derive(Debug, Default)]
pub(in crate::index) struct Losses {
    texts: Vec<String>,
    /// The first owner.
    parent: Option<ObjectRef>,
}

impl Losses {
    pub(in crate::index) fn address(&mut self, address: IpAddr, owner: &Owner) {
        self.texts.push(format!("{address} belongs to {owner}"));
        self.parent.get_or_insert_with(|| owner.reference());
    }

    pub(in crate::index) fn host(&mut self, host: &str, owner: ObjectRef) {
        self.texts.push(format!("host {host} is offered by {owner}"));
        self.parent.get_or_insert(owner);
    }

    pub(in crate::index) fn other(&mut self, text: String) {
        self.texts.push(text);
    }

    /// Tells the author, if there is something to tell.
    pub(in crate::index) fn find(self, reader: &Reader<'_>, condition: &'static str, reason: &'static str) {
        /// More than these say nothing new.
        const SHOWN: usize = 8;
        let Losses { texts, parent } = self;
        if texts.is_empty() {
            return;
        }
        let mut message = texts.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join("; ");
        if let Some(more) = texts.len().checked_sub(SHOWN).filter(|more| *more > 0) {
            message.push_str(&format!("; and {more} more"));
        }
        reader.find(Finding { parent, ..Finding::new(condition, false, reason, message) });
    }
}
