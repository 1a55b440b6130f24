//! The directory at one moment: every look-up, and nothing that changes.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ambit_identity::SpiffeId;
use ambit_policy::{Peer, PolicySet, Request, Stamp, Verdict};
use smallvec::SmallVec;

use crate::endpoints::{Endpoints, Known};
use crate::list::List;
use crate::name::{AddressRef, HostRef, NamespacedHost, NetworkAddress, WorkloadUid};
use crate::service::{Mode, Service};
use crate::table::Table;
use crate::vips::Vips;
use crate::workload::Workload;

/// Which state a snapshot shows. Both only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Revision {
    /// Grows with every change.
    pub snapshot: u64,
    /// Grows when a verdict may have changed for some workload: with policies, and with workloads' policy lists. Live connections are to be
    /// evaluated again then; [`Snapshot::authorization_stamp`] says of which workloads.
    pub authorization: u64,
}

/// Workloads that went since a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed<'a> {
    /// These.
    These(Vec<&'a WorkloadUid>),
    /// More than are remembered: ask for each with [`Snapshot::workload`].
    TooMany,
}

/// How many removals are remembered.
const REMEMBERED_REMOVALS: usize = 1024;

/// Workloads that claim one address or host name; the first has it.
pub(crate) type Claims = SmallVec<[Arc<Workload>; 1]>;

/// Whether a pod is among those that claim an address: it would be the first.
pub(crate) fn has_pod(claims: &Claims) -> bool {
    claims.first().is_some_and(|workload| workload.is_pod)
}

/// The directory at one moment. Immutable behind its `Arc`; keeping one keeps the memory of what changed since, no more.
#[derive(Clone, Default, Debug)]
pub struct Snapshot {
    pub(crate) revision: Revision,
    pub(crate) workloads: Table<WorkloadUid, Arc<Workload>>,
    /// The workloads that claim an address, in the order of [`Workload::cmp_claim`].
    pub(crate) by_address: Table<NetworkAddress, Claims>,
    pub(crate) by_identity: Table<SpiffeId, List<Arc<Workload>>>,
    /// The workloads that claim a host name, in the same order.
    pub(crate) by_hostname: Table<Arc<str>, Claims>,
    pub(crate) services: Table<NamespacedHost, Arc<Known>>,
    pub(crate) services_by_hostname: Table<Arc<str>, SmallVec<[Arc<Service>; 1]>>,
    pub(crate) endpoints: Table<NamespacedHost, Arc<Endpoints>>,
    pub(crate) vips: Vips,
    pub(crate) policies: PolicySet,
    pub(crate) removals: Arc<VecDeque<(u64, WorkloadUid)>>,
    pub(crate) forgotten_removals: u64,
}

impl Snapshot {
    /// Which state this is.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The workload of this uid.
    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The pod of this name in this cluster, if it has this service account.
    pub fn pod(
        &self,
        cluster: &str,
        namespace: &str,
        name: &str,
        service_account: &str,
    ) -> Option<&Arc<Workload>> {
        let workload = self.workloads.get(&WorkloadUid::of_pod(cluster, namespace, name))?;
        (workload.identity.service_account() == service_account).then_some(workload)
    }

    /// The workload that has an address: a pod before anything else, then the older object (`Workload::cmp_claim`). Workloads that share their
    /// node's address are not found by it.
    pub fn workload_at(&self, network: &str, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&AddressRef { network, address: address.to_canonical() })?.first()
    }

    /// Whether one of the addresses of `workload`, which is not a pod, is a pod's own.
    pub(crate) fn claims_a_pods_address(&self, workload: &Workload) -> bool {
        let network = &*workload.network;
        workload.addresses.iter().any(|address| self.has_pod_at(AddressRef { network, address: *address }))
    }

    pub(crate) fn has_pod_at(&self, address: AddressRef<'_>) -> bool {
        self.by_address.get(&address).is_some_and(has_pod)
    }

    /// The workloads that have an identity, in no order.
    pub fn workloads_of(&self, identity: &SpiffeId) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_identity.get(identity).into_iter().flat_map(List::iter)
    }

    /// The workloads with a host name of their own, in lower case.
    pub fn workloads_named(&self, hostname: &str) -> &[Arc<Workload>] {
        self.by_hostname.get(hostname).map_or(&[], |workloads| workloads)
    }

    /// The service of this name; `hostname` in lower case.
    pub fn service(&self, host: HostRef<'_>) -> Option<&Arc<Service>> {
        self.known(host).map(|known| &known.service)
    }

    /// All services, in no order.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values().map(|known| &known.service)
    }

    /// The service that a client in `namespace` reaches at a virtual address of its own.
    pub fn service_at(&self, network: &str, address: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        let sharing = self.vips.at(AddressRef { network, address: address.to_canonical() });
        preferred(sharing, |known| &known.service, namespace).map(|known| &known.service)
    }

    /// The services of a host name (in lower case) in all namespaces, in the order of these.
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        self.services_by_hostname.get(hostname).map_or(&[], |services| services)
    }

    /// The service that a client in `namespace` means by a host name (in lower case), wildcard services such as `*.example.com` included.
    pub fn service_named<'s>(&'s self, hostname: &str, namespace: &str) -> Option<&'s Arc<Service>> {
        let preferred = |services: &'s [Arc<Service>]| preferred(services, |service| service, namespace);
        preferred(self.services_named(hostname)).or_else(|| {
            let parents = hostname.match_indices('.').filter_map(|(at, _)| hostname.get(at..));
            let wild =
                parents.filter_map(|parent| self.services_by_hostname.get(format!("*{parent}").as_str()));
            wild.into_iter().find_map(|services| preferred(services))
        })
    }

    /// The endpoints of a service, which need not be known yet.
    pub fn endpoints(&self, host: HostRef<'_>) -> Option<&Endpoints> {
        self.endpoints.get(&host).map(|endpoints| &**endpoints)
    }

    /// All policies.
    pub fn policies(&self) -> &PolicySet {
        &self.policies
    }

    /// Whether a connection to `workload` is let in: from `peer` if it proved an identity, from the address `source`, to `destination`.
    pub fn authorize(
        &self,
        workload: &Workload,
        peer: Option<&SpiffeId>,
        source: IpAddr,
        destination: SocketAddr,
    ) -> Verdict {
        let request = Request {
            peer: peer.map(|id| Peer {
                principal: id.principal(),
                namespace: id.namespace(),
                service_account: id.service_account(),
            }),
            source_ip: source,
            destination_ip: destination.ip(),
            destination_port: destination.port(),
        };
        self.policies.evaluate(&workload.namespace, &workload.policies, &request)
    }

    /// Stands for everything that [`Snapshot::authorize`] goes by for `workload` besides the connection. While it stays the same, verdicts do, and
    /// live connections to the workload need no second look. `workload` should be the one of this snapshot.
    pub fn authorization_stamp(&self, workload: &Workload) -> Stamp {
        self.policies.stamp(&workload.namespace, &workload.policies)
    }

    /// The workloads that went after `snapshot` (a [`Revision::snapshot`]), so that pooled connections to them can be closed.
    pub fn removed_since(&self, snapshot: u64) -> Removed<'_> {
        if snapshot < self.forgotten_removals {
            return Removed::TooMany;
        }
        let later = self.removals.iter().rev().take_while(|(revision, _)| *revision > snapshot);
        Removed::These(
            later.map(|(_, uid)| uid).filter(|uid| self.workload(uid.as_str()).is_none()).collect(),
        )
    }

    /// Notes that a workload went in the revision that is being made.
    pub(crate) fn note_removal(&mut self, uid: WorkloadUid, revision: u64) {
        let removals = Arc::make_mut(&mut self.removals);
        if removals.len() >= REMEMBERED_REMOVALS
            && let Some((forgotten, _)) = removals.pop_front()
        {
            self.forgotten_removals = forgotten;
        }
        removals.push_back((revision, uid));
    }

    pub(crate) fn known(&self, host: HostRef<'_>) -> Option<&Arc<Known>> {
        self.services.get(&host)
    }

    /// The service that a client in `namespace` reaches at `port` of a virtual address of its own. A service that makes no choice among
    /// endpoints has its own ports only; others have the whole address.
    pub(crate) fn known_at(
        &self,
        network: &str,
        address: IpAddr,
        port: u16,
        namespace: &str,
    ) -> Option<&Arc<Known>> {
        let sharing = self.vips.at(AddressRef { network, address: address.to_canonical() });
        let captured =
            |service: &Service| service.load_balancing.mode != Mode::Passthrough || service.captures(port);
        preferred_where(sharing, |known| &known.service, namespace, captured)
    }

    /// The service that a client in `namespace` reaches at `port` of an address within a network of virtual addresses: that of the longest
    /// prefix that has the port. Other ports of the network are as if it were not there.
    pub(crate) fn known_around(
        &self,
        network: &str,
        address: IpAddr,
        port: u16,
        namespace: &str,
    ) -> Option<&Arc<Known>> {
        let mut around = self.vips.around(network, address.to_canonical());
        around.find_map(|sharing| {
            preferred_where(sharing, |known| &known.service, namespace, |service| service.captures(port))
        })
    }
}

/// Of services that share a name or address the one that a client in `namespace` gets: of those it may see one of its own namespace, else a
/// canonical one, else the first.
fn preferred<'a, T>(services: &'a [T], service: impl Fn(&T) -> &Service, namespace: &str) -> Option<&'a T> {
    preferred_where(services, service, namespace, |_| true)
}

/// As [`preferred`], of those that `suits` holds of.
fn preferred_where<'a, T>(
    services: &'a [T],
    service: impl Fn(&T) -> &Service,
    namespace: &str,
    suits: impl Fn(&Service) -> bool,
) -> Option<&'a T> {
    let visible = services
        .iter()
        .filter(|candidate| service(candidate).visible_to(namespace) && suits(service(candidate)));
    // `min_by_key` keeps the first of equals.
    visible.min_by_key(|candidate| {
        let service = service(candidate);
        (&*service.host.namespace != namespace, !service.canonical)
    })
}
