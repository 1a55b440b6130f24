//! The one writer of the directory, and the handle of its readers.

use std::collections::HashSet;
use std::sync::Arc;

use ambit_api::{security, workload as wire};
use ambit_policy::{Policy, PolicyName};
use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

use crate::convert;
use crate::endpoints::{Endpoint, Endpoints, Known};
use crate::error::{InvalidResource, Rejected};
use crate::intern::Interner;
use crate::name::{AddressRef, HostRef, NamespacedHost, NetworkAddress};
use crate::service::Service;
use crate::snapshot::{Claims, Revision, Snapshot, has_pod};
use crate::workload::Workload;

/// One change from the control plane.
#[derive(Debug, Clone)]
#[allow(
    clippy::large_enum_variant,
    reason = "each is made, handed over and consumed once; a box would be one more allocation"
)]
pub enum Update {
    /// A workload or service is there, new or changed.
    Address {
        /// The resource's name on the wire.
        name: String,
        /// The resource.
        address: wire::Address,
    },
    /// A workload or service is gone.
    AddressRemoved {
        /// The resource's name on the wire.
        name: String,
    },
    /// A policy is there, new or changed.
    Policy {
        /// The resource's name on the wire.
        name: String,
        /// The resource.
        policy: security::Authorization,
    },
    /// A policy is gone.
    PolicyRemoved {
        /// The resource's name on the wire.
        name: String,
    },
}

/// What writer and readers share.
#[derive(Debug)]
struct Shared {
    snapshot: ArcSwap<Snapshot>,
    revision: watch::Sender<Revision>,
}

/// The directory's writer: a synchronous struct, owned by whoever listens to the control plane. Each [`Directory::apply`] publishes at most one
/// snapshot; readers go on with the one before until then. Dropping it leaves readers with the last.
#[derive(Debug)]
pub struct Directory {
    pub(crate) next: Snapshot,
    /// Services that are to be put together with their endpoints anew before the next publication.
    stale: HashSet<NamespacedHost>,
    texts: Interner,
    shared: Arc<Shared>,
}

/// Reads the newest published snapshot. Cloning is cheap; every worker has its own.
#[derive(Debug, Clone)]
pub struct Reader {
    shared: Arc<Shared>,
}

impl Reader {
    /// The newest snapshot, without touching its reference count: for the length of one decision.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.shared.snapshot.load()
    }

    /// The newest snapshot, to keep.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// Wakes when a new snapshot is published. Several publications may be seen as one; the revisions say what changed.
    pub fn changes(&self) -> watch::Receiver<Revision> {
        self.shared.revision.subscribe()
    }
}

impl Directory {
    /// An empty directory and a first reader.
    pub fn new() -> (Self, Reader) {
        let snapshot = ArcSwap::from_pointee(Snapshot::default());
        let shared = Arc::new(Shared { snapshot, revision: watch::Sender::new(Revision::default()) });
        let directory = Self {
            next: Snapshot::default(),
            stale: HashSet::new(),
            texts: Interner::default(),
            shared: Arc::clone(&shared),
        };
        (directory, Reader { shared })
    }

    /// Applies `updates` in order and publishes the result if it differs. What cannot be read is returned, to be nacked; the rest is applied.
    /// A rejected workload or service keeps its last good form; a rejected policy is replaced by one that refuses ([`Policy::closed`]).
    pub fn apply(&mut self, updates: impl IntoIterator<Item = Update>) -> Vec<Rejected> {
        let before = self.next.revision;
        let mut rejected = Vec::new();
        for update in updates {
            let (name, result) = match update {
                Update::Address { name, address } => (name, self.put_address(address)),
                Update::AddressRemoved { name } => {
                    self.remove_address(&name);
                    continue;
                }
                Update::Policy { name, policy } => (name, self.put_policy(&policy)),
                Update::PolicyRemoved { name } => {
                    if self.next.policies.remove(&PolicyName::from(name.as_str())) {
                        self.changed(true);
                    }
                    continue;
                }
            };
            if let Err(error) = result {
                rejected.push(Rejected { name, error });
            }
        }
        self.publish(before);
        rejected
    }

    /// Publishes what differs from the revision `before`, if anything does.
    pub(crate) fn publish(&mut self, before: Revision) {
        self.refresh();
        if self.next.revision != before {
            // Within one publication everything carries the same number, whatever the number of changes.
            self.shared.snapshot.store(Arc::new(self.next.clone()));
            self.shared.revision.send_replace(self.next.revision);
        }
    }

    /// Puts services that changed, or whose endpoints did, together with what they have now: once an update, however many endpoints it moved.
    fn refresh(&mut self) {
        for host in self.stale.drain() {
            let Some(known) = self.next.services.get(&host) else { continue };
            let endpoints = self.next.endpoints.get(&host).map(|endpoints| (**endpoints).clone());
            let service = Arc::clone(&known.service);
            let known = Arc::new(Known { endpoints: endpoints.unwrap_or_default(), service });
            let Snapshot { vips, by_address, .. } = &mut self.next;
            let is_pods = |address: &NetworkAddress| by_address.get(address).is_some_and(has_pod);
            for vip in &known.service.vips {
                vips.insert(vip, &known, is_pods);
            }
            self.next.services.insert(host, known);
        }
    }

    fn changed(&mut self, authorization: bool) {
        let published = self.shared.revision.borrow().snapshot;
        self.next.revision.snapshot = published + 1;
        if authorization {
            self.next.revision.authorization = published + 1;
        }
    }

    fn put_address(&mut self, address: wire::Address) -> Result<(), InvalidResource> {
        match address.r#type {
            Some(wire::address::Type::Workload(source)) => {
                let workload = convert::workload(source, &mut self.texts)?;
                self.put_workload(workload);
            }
            Some(wire::address::Type::Service(source)) => {
                let service = convert::service(&source, &mut self.texts)?;
                self.put_service(service);
            }
            None => return Err(InvalidResource::Empty),
        }
        Ok(())
    }

    fn put_policy(&mut self, source: &security::Authorization) -> Result<(), InvalidResource> {
        let (policy, error) = match Policy::compile(source) {
            Ok(policy) => (policy, None),
            Err(error) => (Policy::closed(source), Some(error.into())),
        };
        if self.next.policies.insert(policy) {
            self.changed(true);
        }
        error.map_or(Ok(()), Err)
    }

    /// xDS contract: a workload's resource name is its uid, a service's `<namespace>/<hostname>`.
    pub(crate) fn remove_address(&mut self, name: &str) {
        if let Some(workload) = self.next.workloads.remove(name) {
            self.withdraw(&workload);
            self.changed(true);
            self.next.note_removal(workload.uid.clone(), self.next.revision.snapshot);
            return;
        }
        let Some(host) = HostRef::parse(name) else { return };
        let hostname = host.hostname.to_ascii_lowercase();
        let host = HostRef { hostname: &hostname, ..host };
        if let Some(known) = self.next.services.remove(&host) {
            self.retract(&known.service);
            self.changed(false);
        }
    }

    fn put_workload(&mut self, workload: Workload) {
        let old = self.next.workloads.get(&workload.uid).cloned();
        if old.as_ref().is_some_and(|old| **old == workload) {
            return;
        }
        let workload = Arc::new(workload);
        self.next.workloads.insert(workload.uid.clone(), Arc::clone(&workload));
        let authorization = old
            .as_ref()
            .is_none_or(|old| old.policies != workload.policies || old.namespace != workload.namespace);
        if let Some(old) = &old {
            self.withdraw(old);
        }
        self.enter(&workload);
        self.changed(authorization);
    }

    /// Enters `workload` into every index.
    fn enter(&mut self, workload: &Arc<Workload>) {
        for address in addresses(workload) {
            self.next.by_address.change(&address, |claims| claim(claims, workload));
            if workload.is_pod {
                self.next.vips.set_pod(&address, true);
            }
        }
        self.next.by_identity.change(&workload.identity, |holders| holders.push(Arc::clone(workload)));
        if !workload.hostname.is_empty() {
            self.next.by_hostname.change(&workload.hostname, |named| claim(named, workload));
        }
        for membership in &workload.services {
            let endpoint = Endpoint { workload: Arc::clone(workload), ports: membership.ports.clone() };
            // Endpoints that come before their service get its balancing when it comes.
            let known = self.next.services.get(&membership.host);
            self.next.endpoints.change(&membership.host, |endpoints| {
                let endpoints = Arc::make_mut(endpoints);
                if let Some(known) = known.filter(|_| endpoints.is_empty()) {
                    endpoints.set_balancing(&known.service.load_balancing);
                }
                endpoints.insert(endpoint);
            });
            self.stale.insert(membership.host.clone());
        }
    }

    /// Takes `workload` out of every index.
    fn withdraw(&mut self, workload: &Arc<Workload>) {
        for address in addresses(workload) {
            let key = AddressRef { network: &address.network, address: address.address };
            if let Some(claims) = self.next.by_address.get_mut(&key) {
                claims.retain(|claim| !Arc::ptr_eq(claim, workload));
                if claims.is_empty() {
                    self.next.by_address.remove(&key);
                }
            }
            if workload.is_pod && !self.next.has_pod_at(key) {
                self.next.vips.set_pod(&address, false);
            }
        }
        if let Some(holders) = self.next.by_identity.get_mut(&workload.identity) {
            holders.remove(|holder| Arc::ptr_eq(holder, workload));
            if holders.is_empty() {
                self.next.by_identity.remove(&workload.identity);
            }
        }
        if let Some(named) = self.next.by_hostname.get_mut(&workload.hostname) {
            named.retain(|other| !Arc::ptr_eq(other, workload));
            if named.is_empty() {
                self.next.by_hostname.remove(&workload.hostname);
            }
        }
        for membership in &workload.services {
            if let Some(endpoints) = self.next.endpoints.get_mut(&membership.host) {
                let endpoints = Arc::make_mut(endpoints);
                endpoints.remove(workload);
                if endpoints.is_empty() {
                    self.next.endpoints.remove(&membership.host);
                }
            }
            self.stale.insert(membership.host.clone());
        }
    }

    fn put_service(&mut self, service: Service) {
        if let Some(old) = self.next.services.get(&service.host).map(|known| Arc::clone(&known.service)) {
            if *old == service {
                return;
            }
            self.retract(&old);
        }
        let service = Arc::new(service);
        let known = Known { service: Arc::clone(&service), endpoints: Endpoints::default() };
        self.next.services.insert(service.host.clone(), Arc::new(known));
        self.stale.insert(service.host.clone());
        self.next.services_by_hostname.change(&service.host.hostname, |named| {
            let at = named.partition_point(|other| other.host.namespace < service.host.namespace);
            named.insert(at, Arc::clone(&service));
        });
        if let Some(endpoints) = self.next.endpoints.get_mut(&service.host) {
            Arc::make_mut(endpoints).set_balancing(&service.load_balancing);
        }
        self.changed(false);
    }

    /// Takes `service` out of every index but the one of names; its endpoints stay, for when it comes again.
    fn retract(&mut self, service: &Arc<Service>) {
        for vip in &service.vips {
            self.next.vips.remove(vip, &service.host);
        }
        if let Some(named) = self.next.services_by_hostname.get_mut(&service.host.hostname) {
            named.retain(|other| !Arc::ptr_eq(other, service));
            if named.is_empty() {
                self.next.services_by_hostname.remove(&service.host.hostname);
            }
        }
    }
}

/// Enters a workload among those that claim the same address or name.
fn claim(claims: &mut Claims, workload: &Arc<Workload>) {
    let at = claims.partition_point(|other| other.cmp_claim(workload).is_lt());
    claims.insert(at, Arc::clone(workload));
}

/// The addresses by which a workload is found; those of its node are not its own.
fn addresses(workload: &Workload) -> impl Iterator<Item = NetworkAddress> {
    let own = if workload.host_network { &[] } else { &*workload.addresses };
    own.iter().map(|address| NetworkAddress { network: Arc::clone(&workload.network), address: *address })
}
