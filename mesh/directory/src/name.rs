//! Names under which resources are found, and borrowed forms of them for look-ups without allocation.

use std::borrow::Borrow;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use equivalent::Equivalent;
use serde::{Serialize, Serializer};

/// The name of a workload that is never given to another one: of a pod `<cluster>//Pod/<namespace>/<name>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct WorkloadUid(Arc<str>);

impl WorkloadUid {
    /// The uid of a pod (xDS contract).
    pub fn of_pod(cluster: &str, namespace: &str, name: &str) -> Self {
        Self(format!("{cluster}//Pod/{namespace}/{name}").into())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text, shared.
    pub fn shared(&self) -> &Arc<str> {
        &self.0
    }
}

impl From<&str> for WorkloadUid {
    fn from(uid: &str) -> Self {
        Self(uid.into())
    }
}

impl From<Arc<str>> for WorkloadUid {
    fn from(uid: Arc<str>) -> Self {
        Self(uid)
    }
}

impl Borrow<str> for WorkloadUid {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// The name of a service: its namespace and full host name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHost {
    /// The namespace.
    pub namespace: Arc<str>,
    /// The full host name, such as `reviews.default.svc.cluster.local`.
    pub hostname: Arc<str>,
}

impl NamespacedHost {
    /// The borrowed form.
    pub fn as_ref(&self) -> HostRef<'_> {
        HostRef { namespace: &self.namespace, hostname: &self.hostname }
    }
}

impl fmt::Display for NamespacedHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl Serialize for NamespacedHost {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A [`NamespacedHost`] to look up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostRef<'a> {
    /// The namespace.
    pub namespace: &'a str,
    /// The full host name.
    pub hostname: &'a str,
}

impl<'a> HostRef<'a> {
    /// Reads `<namespace>/<hostname>`.
    pub fn parse(name: &'a str) -> Option<Self> {
        let (namespace, hostname) = name.split_once('/')?;
        (!hostname.is_empty() && !hostname.contains('/')).then_some(Self { namespace, hostname })
    }
}

impl Equivalent<NamespacedHost> for HostRef<'_> {
    fn equivalent(&self, key: &NamespacedHost) -> bool {
        *self == key.as_ref()
    }
}

/// An address in a network; networks may use the same addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// The network; empty where there is only one.
    pub network: Arc<str>,
    /// The address, in canonical form.
    pub address: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

impl Serialize for NetworkAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A [`NetworkAddress`] to look up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressRef<'a> {
    /// The network.
    pub network: &'a str,
    /// The address, in canonical form.
    pub address: IpAddr,
}

impl Equivalent<NetworkAddress> for AddressRef<'_> {
    fn equivalent(&self, key: &NetworkAddress) -> bool {
        self.address == key.address && self.network == &*key.network
    }
}

/// A resource that the directory lacks and the control plane may have; displayed, the name to subscribe to (xDS contract).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Demand {
    /// `<network>/<ip>`: the workload or service there.
    Address(NetworkAddress),
    /// `<namespace>/<hostname>`: the service.
    Service(NamespacedHost),
}

impl fmt::Display for Demand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Service(service) => service.fmt(f),
        }
    }
}
