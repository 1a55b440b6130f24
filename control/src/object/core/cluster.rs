//! Namespaces, nodes and replica sets: what workloads inherit from where they are.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::{apps, core};

use super::NamespacedName;
use super::binding::WaypointBinding;
use super::meta::{Invalid, Labels, Owner, annotation, labels, name, namespaced};
use super::service::Distribution;

/// Label that names the network of a workload, namespace or gateway.
pub(in crate::object) const NETWORK: &str = "topology.istio.io/network";

/// A namespace: the defaults of what lives in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its name.
    pub name: Arc<str>,
    /// Its labels, which `allowedRoutes` of a gateway may select.
    pub labels: Labels,
    /// The waypoint of what names none itself.
    pub waypoint: WaypointBinding,
    /// The network of its workloads.
    pub network: Option<Arc<str>>,
    /// Traffic distribution of services that have none themselves.
    pub distribution: Option<Distribution>,
}

impl TryFrom<core::v1::Namespace> for Namespace {
    type Error = Invalid;

    fn try_from(object: core::v1::Namespace) -> Result<Namespace, Invalid> {
        let meta = object.metadata;
        let (name, labels) = (name(&meta)?, labels(&meta));
        Ok(Namespace {
            waypoint: WaypointBinding::read(&labels, &meta, &name),
            network: labels.get(NETWORK).map(Arc::from),
            distribution: annotation(&meta, Distribution::ANNOTATION).and_then(Distribution::parse),
            name,
            labels,
        })
    }
}

/// A node: where its pods are, and its own addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: Arc<str>,
    /// `topology.kubernetes.io/region`, else empty.
    pub region: Arc<str>,
    /// `topology.kubernetes.io/zone`, else empty.
    pub zone: Arc<str>,
    /// `topology.istio.io/subzone`, else empty.
    pub subzone: Arc<str>,
    /// Its addresses, in order; no other object may claim them.
    pub addresses: Vec<IpAddr>,
}

impl TryFrom<core::v1::Node> for Node {
    type Error = Invalid;

    fn try_from(object: core::v1::Node) -> Result<Node, Invalid> {
        let labels = labels(&object.metadata);
        let status = object.status.unwrap_or_default();
        // A hostname is among a node's addresses, too.
        let listed = status.addresses.iter().flatten();
        let mut addresses: Vec<IpAddr> = listed.filter_map(|given| given.address.parse().ok()).collect();
        addresses.sort();
        addresses.dedup();
        let label = |keys: [&str; 2]| keys.iter().find_map(|key| labels.get(key)).unwrap_or_default().into();
        Ok(Node {
            name: name(&object.metadata)?,
            region: label(["topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region"]),
            zone: label(["topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"]),
            subzone: labels.get("topology.istio.io/subzone").unwrap_or_default().into(),
            addresses,
        })
    }
}

/// A replica set: the owner between a pod and its deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaSet {
    /// Namespace and name.
    pub id: NamespacedName,
    /// What owns it; `None` for one of its own.
    pub owner: Option<Owner>,
}

impl TryFrom<apps::v1::ReplicaSet> for ReplicaSet {
    type Error = Invalid;

    fn try_from(object: apps::v1::ReplicaSet) -> Result<ReplicaSet, Invalid> {
        Ok(ReplicaSet { id: namespaced(&object.metadata)?, owner: Owner::of(&object.metadata) })
    }
}

/// The identity of an object of which nothing else is read.
pub(crate) fn identity(
    meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta,
) -> Result<NamespacedName, Invalid> {
    namespaced(meta)
}
