//! Who owns an address: a pod its own, a Service its cluster IPs, a node its own; of everything else that claims one the
//! oldest.
//!
//! Whoever can write objects in one namespace must not divert connections to another. So a claim on an address of a pod
//! or Service has no effect, a virtual address or gateway that somebody else owns is left out, and an endpoint that
//! shares its address with a node or with an older claim is reached by its own services only. Each gets a finding.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::Finding;
use super::entries;
use super::reader::Reader;
use super::store;
use super::workloads;
use crate::object::{
    AddressValue, EntryAddress, Kind, Meta, NamespacedName, ObjectRef, ServiceEntry, Visibility,
};

/// The object that an address belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::index) struct Owner {
    object: ObjectRef,
    reason: OwnershipReason,
}

/// Why an address belongs to its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OwnershipReason {
    /// It is the pod's, Service's or node's own.
    Own,
    /// It is that of the pod's node.
    OfNode,
    /// The owner claimed it first.
    Older,
}

impl Owner {
    fn new(kind: Kind, name: &NamespacedName, reason: OwnershipReason) -> Owner {
        Owner { object: ObjectRef { kind, name: name.clone() }, reason }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Owner { object, reason } = self;
        match reason {
            OwnershipReason::Own => write!(f, "{object}"),
            OwnershipReason::OfNode => write!(f, "the node of {object}"),
            OwnershipReason::Older => write!(f, "{object}, which is older"),
        }
    }
}

/// What becomes of an endpoint, by its addresses.
#[derive(Debug)]
pub(in crate::index) enum EndpointClaim {
    /// It is found by its addresses.
    Found,
    /// It is an endpoint of its services, but not found by its addresses: this one belongs to a node or an older object.
    Unlisted(IpAddr, Owner),
    /// It is left out: this address belongs to a pod or a Service.
    LeftOut(IpAddr, Owner),
}

/// What becomes of an endpoint of `claimant`, an object of this kind.
pub(in crate::index) fn of_endpoint(
    reader: &Reader<'_>,
    network: &Arc<str>,
    kind: Kind,
    claimant: &Meta,
    addresses: &[IpAddr],
) -> EndpointClaim {
    if let Some((address, owner)) = of_pod_or_service(reader, network, addresses) {
        return EndpointClaim::LeftOut(address, owner);
    }
    let shared = addresses.iter().find_map(|address| {
        let owner = node(reader, network, *address)
            .or_else(|| older_claim(reader, network, kind, claimant, *address))?;
        Some((*address, owner))
    });
    shared.map_or(EndpointClaim::Found, |(address, owner)| EndpointClaim::Unlisted(address, owner))
}

/// The owner of one of these addresses, if that is a pod or a Service, with the address.
pub(in crate::index) fn of_pod_or_service(
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
    let own = certain_owner(reader, network, address);
    // An entry that only its own namespace sees diverts nobody else.
    let is_public = entry.visibility == Visibility::Public;
    let older = || older_claim(reader, network, Kind::ServiceEntry, &entry.meta, address);
    own.or_else(|| older().filter(|_| is_public))
}

/// The owner of an address of a gateway into another network, if that is not the gateway itself.
pub(in crate::index) fn of_gateway(
    reader: &Reader<'_>,
    network: &Arc<str>,
    gateway: &Meta,
    address: IpAddr,
) -> Option<Owner> {
    let own = certain_owner(reader, network, address);
    own.or_else(|| older_claim(reader, network, Kind::Gateway, gateway, address))
}

/// The pod, Service or node that an address belongs to.
fn certain_owner(reader: &Reader<'_>, network: &Arc<str>, address: IpAddr) -> Option<Owner> {
    pod_or_service(reader, network, address).or_else(|| node(reader, network, address))
}

fn pod_or_service(reader: &Reader<'_>, network: &Arc<str>, address: IpAddr) -> Option<Owner> {
    let mut pods = reader.pods_at(address);
    let pod =
        pods.find(|pod| workloads::network(reader, &pod.meta.id.namespace, pod.network.as_ref()) == *network);
    if let Some(pod) = pod {
        return Some(Owner::new(Kind::Pod, &pod.meta.id, OwnershipReason::Own));
    }
    let mut services = reader.services_at(address);
    let service = services.find(|id| workloads::network(reader, &id.namespace, None) == *network)?;
    Some(Owner::new(Kind::Service, service, OwnershipReason::Own))
}

/// The node whose address it is, or a pod that shares the address with its node.
fn node(reader: &Reader<'_>, network: &Arc<str>, address: IpAddr) -> Option<Owner> {
    if *network == reader.settings.network
        && let Some(node) = reader.nodes_at(address).next()
    {
        return Some(Owner::new(Kind::Node, node, OwnershipReason::Own));
    }
    let mut pods = reader.host_pods_at(address);
    let pod = pods
        .find(|pod| workloads::network(reader, &pod.meta.id.namespace, pod.network.as_ref()) == *network)?;
    Some(Owner::new(Kind::Pod, &pod.meta.id, OwnershipReason::OfNode))
}

/// The oldest object that claims an address, if it is older than `claimant` and of another namespace. Objects of the
/// oldest one's namespace may share the address with it.
fn older_claim(
    reader: &Reader<'_>,
    network: &Arc<str>,
    kind: Kind,
    claimant: &Meta,
    address: IpAddr,
) -> Option<Owner> {
    let claims = reader.claims_at(address).filter_map(|object| {
        let meta = claim(reader, object, network, address)?;
        Some((meta.seniority(), object))
    });
    let (seniority, oldest) = claims.min()?;
    let is_older = (seniority, oldest.kind) < (claimant.seniority(), kind);
    (is_older && oldest.name.namespace != claimant.id.namespace)
        .then(|| Owner::new(oldest.kind, &oldest.name, OwnershipReason::Older))
}

/// The metadata of an object that claims an address in a network for everybody.
fn claim<'a>(
    reader: &Reader<'a>,
    object: &ObjectRef,
    network: &Arc<str>,
    address: IpAddr,
) -> Option<&'a Meta> {
    let (store, id) = (reader.store, &object.name);
    let of = |own: Option<&Arc<str>>| workloads::network(reader, &id.namespace, own) == *network;
    match object.kind {
        Kind::ServiceEntry => {
            let entry = store.service_entries.get(id).filter(|e| e.visibility != Visibility::Hidden)?;
            let is_virtual = entry.visibility == Visibility::Public
                && store::virtual_addresses(Some(entry)).any(|own| own == address)
                && of(None);
            let has_endpoint = || {
                let mut endpoints = entry.endpoints.iter();
                endpoints.any(|e| e.address == EntryAddress::Ip(address) && of(e.network.as_ref()))
            };
            (is_virtual || has_endpoint()).then_some(&entry.meta)
        }
        Kind::WorkloadEntry => {
            let entry = store.workload_entries.get(id)?;
            let is_here = entry.spec.address == EntryAddress::Ip(address) && of(entry.spec.network.as_ref());
            is_here.then_some(&entry.meta)
        }
        Kind::Gateway => {
            let gateway = store.gateways.get(id).filter(|gateway| entries::is_remote(gateway))?;
            let is_here = gateway.network.as_ref() == Some(network)
                && gateway.requested.contains(&AddressValue::Ip(address));
            is_here.then_some(&gateway.meta)
        }
        _ => None,
    }
}

/// Collects what an object claims and does not get, for one finding.
#[derive(Debug, Default)]
pub(in crate::index) struct LostClaims {
    texts: Vec<String>,
    /// The first owner.
    parent: Option<ObjectRef>,
}

impl LostClaims {
    pub(in crate::index) fn address(&mut self, address: IpAddr, owner: &Owner) {
        self.texts.push(format!("{address} belongs to {owner}"));
        self.parent.get_or_insert_with(|| owner.object.clone());
    }

    /// An endpoint is not found by an address of its own.
    pub(in crate::index) fn unlisted(&mut self, address: IpAddr, owner: &Owner) {
        self.texts
            .push(format!("{address} belongs to {owner}; the endpoint is reached by its services only"));
        self.parent.get_or_insert_with(|| owner.object.clone());
    }

    pub(in crate::index) fn host(&mut self, host: &str, owner: ObjectRef) {
        self.texts.push(format!("host {host} is offered by {owner}"));
        self.parent.get_or_insert(owner);
    }

    pub(in crate::index) fn other(&mut self, text: String) {
        self.texts.push(text);
    }

    /// Reports what was not granted, if anything.
    pub(in crate::index) fn find(self, reader: &Reader<'_>, condition: &'static str, reason: &'static str) {
        /// More than these say nothing new.
        const SHOWN: usize = 8;
        let LostClaims { texts, parent } = self;
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
