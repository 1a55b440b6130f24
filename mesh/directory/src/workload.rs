//! Workloads: pods, virtual machines and other endpoints.

use std::cmp::Ordering;
use std::net::IpAddr;
use std::sync::Arc;

use ambit_identity::SpiffeId;
use ambit_policy::PolicyList;
use serde::Serialize;
use smallvec::SmallVec;

use crate::dump;
use crate::name::{HostRef, NamespacedHost, WorkloadUid};
use crate::service::{Gateway, Ports, Scope};

/// A workload. Immutable; kept behind an `Arc`.
///
/// The order of the fields is that in memory: what decides about an endpoint comes first, then what a route needs, so that a look-up among many
/// workloads touches two or three lines of the processor's cache for each.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
#[repr(C)]
pub struct Workload {
    /// The network that the addresses are in.
    pub network: Arc<str>,
    /// Its share of a service's connections, in proportion to the other endpoints; 0 gets none.
    pub capacity: u32,
    /// How it is reached.
    #[serde(rename = "protocol")]
    pub tunnel: TunnelProtocol,
    /// Whether it is chosen as an endpoint.
    pub status: Status,
    /// Whether it still serves although it is not healthy, because it is terminating. Chosen where nothing else is left.
    pub serving_while_terminating: bool,
    /// Whether it terminates HBONE itself, without a node proxy.
    pub native_tunnel: bool,
    /// Whether it shares its address with the node and others there.
    pub host_network: bool,
    /// Whether it is a pod, as its uid says: a pod owns its addresses, whatever else claims them.
    #[serde(skip)]
    pub is_pod: bool,
    /// When its object was created, in seconds since the epoch; 0 if that is not known.
    #[serde(skip)]
    pub(crate) created: i64,
    /// Whether the direct route is allowed while its waypoint is missing.
    pub waypoint_failure_open: bool,
    /// The kind of its owner.
    pub workload_type: WorkloadType,
    /// Spreads workloads evenly for session affinity: the same on every node, of the uid alone.
    #[serde(skip)]
    pub(crate) spread: u64,
    /// Its addresses, in canonical form; empty if only [`Workload::hostname`] leads to it.
    #[serde(rename = "workloadIps")]
    pub addresses: SmallVec<[IpAddr; 2]>,
    /// The name that is never used again for another.
    pub uid: WorkloadUid,
    /// Who it is: trust domain, namespace and service account.
    #[serde(serialize_with = "dump::identity")]
    pub identity: SpiffeId,
    /// The node that it runs on; empty if none is known.
    pub node: Arc<str>,
    /// The cluster that it runs in.
    pub cluster_id: Arc<str>,
    /// The waypoint that traffic to its addresses must pass.
    pub waypoint: Option<Gateway>,
    /// The gateway for connections from other networks.
    pub network_gateway: Option<Gateway>,
    /// The services whose endpoint it is.
    pub services: Box<[Membership]>,
    /// The policies that select it.
    #[serde(rename = "authorizationPolicies")]
    pub policies: PolicyList,
    /// The namespace.
    pub namespace: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    /// The application's name.
    pub canonical_name: Arc<str>,
    /// The application's revision.
    pub canonical_revision: Arc<str>,
    /// The owner's name.
    pub workload_name: Arc<str>,
    /// A host name of its own; empty if none.
    pub hostname: Arc<str>,
    /// Where connections from the tunnel go instead of the target port.
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Where it is.
    pub locality: Locality,
    /// Those of its labels that subsets of services select by, in the order of their names.
    pub labels: Box<[Label]>,
}

impl Workload {
    /// Whether only DNS can locate it.
    pub fn is_only_named(&self) -> bool {
        self.addresses.is_empty() && !self.hostname.is_empty()
    }

    /// What it makes of the ports of `host`; `None` if it is no endpoint of that service.
    pub fn membership(&self, host: HostRef<'_>) -> Option<&Membership> {
        self.services.iter().find(|membership| membership.host.as_ref() == host)
    }

    /// Whether it has every one of these labels.
    pub fn has_labels<'l>(&self, wanted: impl IntoIterator<Item = (&'l str, &'l str)>) -> bool {
        wanted
            .into_iter()
            .all(|(name, value)| self.labels.iter().any(|(own, of_own)| **own == *name && **of_own == *value))
    }

    /// Whether it may be chosen by default.
    pub fn is_healthy(&self) -> bool {
        self.status == Status::Healthy
    }

    /// Whether `address` is one of its own.
    pub fn has_address(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address.to_canonical())
    }

    /// An address of the family of `like` if it has one, else any.
    pub fn address_like(&self, like: Option<IpAddr>) -> Option<IpAddr> {
        let same_family = |address: &&IpAddr| like.is_none_or(|like| like.is_ipv4() == address.is_ipv4());
        self.addresses.iter().find(same_family).or_else(|| self.addresses.first()).copied()
    }

    /// Orders workloads that claim one address; the first has it. Depends only on the workloads, not on the order in which they arrived.
    ///
    /// A pod comes before everything else. Of several pods a healthy one comes first, then the newest: the address was reused and the former
    /// holder is not removed yet. Of other workloads the oldest comes first, so that nobody takes over an address by claiming it too.
    pub(crate) fn cmp_claim(&self, other: &Self) -> Ordering {
        let known = |workload: &Self| if workload.created == 0 { i64::MAX } else { workload.created };
        let by_age = match (self.is_pod, other.is_pod) {
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (true, true) => {
                other.is_healthy().cmp(&self.is_healthy()).then_with(|| other.created.cmp(&self.created))
            }
            (false, false) => known(self).cmp(&known(other)),
        };
        by_age.then_with(|| self.uid.cmp(&other.uid))
    }

    /// Whether both are the same workload, in the same or another state.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        // The hash distinguishes nearly all without comparing texts.
        self.spread == other.spread && self.uid == other.uid
    }

    /// Whether both run on one node of one cluster.
    pub fn shares_node_with(&self, other: &Self) -> bool {
        !self.node.is_empty()
            && self.node == other.node
            && self.cluster_id == other.cluster_id
            && self.network == other.network
    }

    /// What it has of `scope`.
    pub fn scope(&self, scope: Scope) -> &str {
        match scope {
            Scope::Region => &self.locality.region,
            Scope::Zone => &self.locality.zone,
            Scope::Subzone => &self.locality.subzone,
            Scope::Node => &self.node,
            Scope::Cluster => &self.cluster_id,
            Scope::Network => &self.network,
        }
    }
}

/// Name and value of a label.
pub type Label = (Arc<str>, Arc<str>);

/// That a workload is an endpoint of a service.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Membership {
    /// The service.
    pub host: NamespacedHost,
    /// What the workload makes of its ports.
    pub ports: Ports,
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
pub enum TunnelProtocol {
    /// As it is: plain TCP.
    #[default]
    #[serde(rename = "TCP")]
    None,
    /// Through HBONE.
    #[serde(rename = "HBONE")]
    Hbone,
    /// Through a sidecar's TLS, which a node proxy does not speak: as it is.
    #[serde(rename = "LEGACY_ISTIO_MTLS")]
    LegacyIstioMtls,
}

/// Whether a workload takes part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Status {
    /// Ready.
    #[default]
    Healthy,
    /// Not ready, or terminating.
    Unhealthy,
}

/// The kind of a workload's owner.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names are those of the kinds")]
pub enum WorkloadType {
    #[default]
    Deployment,
    CronJob,
    Pod,
    Job,
}

/// Where connections from the tunnel go instead of the target port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ApplicationTunnel {
    /// Whether each connection begins with a PROXY v2 header.
    pub proxy: bool,
    /// The port of the tunnel; 0 keeps the target port.
    pub port: u16,
}

/// Where something is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "the names are those of the wire (xDS contract)")]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}
