//! ServiceEntry and WorkloadEntry: services and workloads that Kubernetes does not know.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;

use super::binding::WaypointBinding;
use super::cluster::NETWORK;
use super::meta::{Invalid, Labels, Meta, annotation};
use super::service::{AppProtocol, Visibility};

/// Where a workload outside of Kubernetes is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryAddress {
    /// At an IP address.
    Ip(IpAddr),
    /// Wherever this DNS name leads.
    Hostname(Arc<str>),
    /// Not said: it is reached through the gateway of its network.
    Unknown,
}

/// A workload outside of Kubernetes, as a WorkloadEntry or an endpoint of a ServiceEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadSpec {
    /// Where it is.
    pub address: EntryAddress,
    /// Port numbers by the name of the service's port.
    pub ports: BTreeMap<Arc<str>, u16>,
    /// What selectors select it by.
    pub labels: Labels,
    /// The network it is in.
    pub network: Option<Arc<str>>,
    /// Region, zone and subzone.
    pub locality: [Arc<str>; 3],
    /// Its share of connections, relative to others.
    pub weight: Option<u32>,
    /// Its identity; empty if it has none.
    pub service_account: Arc<str>,
}

impl WorkloadSpec {
    /// Its IP address, if it has one.
    pub fn ip(&self) -> Option<IpAddr> {
        match self.address {
            EntryAddress::Ip(address) => Some(address),
            EntryAddress::Hostname(_) | EntryAddress::Unknown => None,
        }
    }

    /// Whether it terminates HBONE itself (label `networking.istio.io/tunnel: http`).
    pub fn has_native_tunnel(&self) -> bool {
        self.labels.get("networking.istio.io/tunnel") == Some("http")
    }
}

/// A workload outside of Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// Name, age, and the labels of metadata and `spec.labels` together.
    pub meta: Meta,
    /// What it is.
    pub spec: WorkloadSpec,
    /// Condition `Healthy` is not false.
    pub healthy: bool,
    /// A node proxy or VM proxy serves it (annotation `ambient.istio.io/redirection: enabled`).
    pub captured: bool,
    /// Terminates HBONE itself (label `networking.istio.io/tunnel: http`).
    pub native_tunnel: bool,
    /// What it says about its waypoint.
    pub waypoint: WaypointBinding,
}

/// How the endpoints of a ServiceEntry are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    /// The address that was dialled is the endpoint.
    #[default]
    None,
    /// Listed, or selected.
    Static,
    /// By DNS.
    Dns,
    /// By DNS, one address at a time.
    DnsRoundRobin,
    /// By DNS, on the name that the client asked for.
    DynamicDns,
}

/// A TCP port of a ServiceEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryPort {
    /// Its name.
    pub name: Arc<str>,
    /// The port that clients dial.
    pub number: u16,
    /// The port of endpoints that name none themselves.
    pub target: u16,
    /// What is spoken on it.
    pub protocol: AppProtocol,
}

/// A service that Kubernetes does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Name, labels and age.
    pub meta: Meta,
    /// Its names.
    pub hosts: Vec<Arc<str>>,
    /// Virtual addresses of all its hosts, which may be CIDRs.
    pub addresses: Vec<IpNet>,
    /// Virtual addresses given to one host by an allocator (`status.addresses`).
    pub allocated: Vec<(Arc<str>, IpNet)>,
    /// Its TCP ports.
    pub ports: Vec<EntryPort>,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Endpoints that it lists.
    pub endpoints: Vec<WorkloadSpec>,
    /// Pods and WorkloadEntries that it selects instead.
    pub selector: Option<Labels>,
    /// Identities to expect of its endpoints, beside their own.
    pub subject_alt_names: Vec<String>,
    /// Who sees it (`exportTo`).
    pub visibility: Visibility,
    /// Namespaces of `exportTo`, which the wire cannot express.
    pub foreign_namespaces: Vec<Arc<str>>,
    /// What it says about its waypoint.
    pub waypoint: WaypointBinding,
}

/// The manifest of a WorkloadEntry.
#[derive(Debug, Deserialize)]
pub(crate) struct WorkloadManifest {
    metadata: ObjectMeta,
    spec: RawWorkload,
    #[serde(default)]
    status: WorkloadStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawWorkload {
    address: String,
    ports: BTreeMap<String, u16>,
    labels: BTreeMap<String, String>,
    network: Option<String>,
    locality: String,
    weight: Option<u32>,
    service_account: String,
}

#[derive(Debug, Default, Deserialize)]
struct WorkloadStatus {
    #[serde(default)]
    conditions: Vec<StatusCondition>,
}

#[derive(Debug, Deserialize)]
struct StatusCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

/// The manifest of a ServiceEntry.
#[derive(Debug, Deserialize)]
pub(crate) struct ServiceManifest {
    metadata: ObjectMeta,
    spec: RawService,
    #[serde(default)]
    status: ServiceStatus,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawService {
    hosts: Vec<String>,
    #[serde(default)]
    addresses: Vec<String>,
    #[serde(default)]
    ports: Vec<RawPort>,
    #[serde(default, rename = "location")]
    _location: Option<Location>,
    #[serde(default)]
    resolution: Resolution,
    #[serde(default)]
    endpoints: Vec<RawWorkload>,
    #[serde(default)]
    workload_selector: Option<WorkloadSelector>,
    #[serde(default)]
    subject_alt_names: Vec<String>,
    #[serde(default)]
    export_to: Vec<String>,
}

/// Checked only: node proxies treat both alike.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Location {
    MeshExternal,
    MeshInternal,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WorkloadSelector {
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPort {
    number: u16,
    #[serde(default)]
    protocol: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    target_port: Option<u16>,
}

#[derive(Debug, Default, Deserialize)]
struct ServiceStatus {
    #[serde(default)]
    addresses: Vec<AllocatedAddress>,
}

#[derive(Debug, Deserialize)]
struct AllocatedAddress {
    #[serde(default)]
    host: String,
    value: String,
}

impl TryFrom<WorkloadManifest> for WorkloadEntry {
    type Error = Invalid;

    fn try_from(manifest: WorkloadManifest) -> Result<WorkloadEntry, Invalid> {
        let WorkloadManifest { metadata, spec, status } = manifest;
        let mut meta = Meta::read(&metadata)?;
        let spec = workload(spec, "spec")?;
        let own = meta.labels.iter().chain(spec.labels.iter()).map(|(k, v)| (k.clone(), v.clone()));
        meta.labels = own.collect();
        Ok(WorkloadEntry {
            spec: WorkloadSpec { labels: meta.labels.clone(), ..spec },
            healthy: !status.conditions.iter().any(|c| c.kind == "Healthy" && c.status == "False"),
            captured: annotation(&metadata, "ambient.istio.io/redirection") == Some("enabled"),
            native_tunnel: meta.labels.get("networking.istio.io/tunnel") == Some("http"),
            waypoint: WaypointBinding::read(&meta.labels, &metadata, &meta.id.namespace),
            meta,
        })
    }
}

fn workload(raw: RawWorkload, at: &str) -> Result<WorkloadSpec, Invalid> {
    let RawWorkload { address, ports, labels, network, locality, weight, service_account } = raw;
    let address = match address.as_str() {
        "" => EntryAddress::Unknown,
        text if text.starts_with("unix://") => {
            return Err(Invalid::new(format!("{at}.address"), "a Unix socket cannot be reached by the mesh"));
        }
        text => text.parse().map_or_else(|_| EntryAddress::Hostname(text.into()), EntryAddress::Ip),
    };
    let labels: Labels = labels.into_iter().collect();
    let mut parts = locality.splitn(3, '/').map(Arc::from);
    let locality = [(); 3].map(|()| parts.next().unwrap_or_default());
    Ok(WorkloadSpec {
        address,
        ports: ports.into_iter().map(|(name, number)| (name.into(), number)).collect(),
        network: network
            .filter(|n| !n.is_empty())
            .map(Arc::from)
            .or_else(|| labels.get(NETWORK).map(Arc::from)),
        labels,
        locality,
        weight,
        service_account: service_account.into(),
    })
}

impl TryFrom<ServiceManifest> for ServiceEntry {
    type Error = Invalid;

    fn try_from(manifest: ServiceManifest) -> Result<ServiceEntry, Invalid> {
        let ServiceManifest { metadata, spec, status } = manifest;
        let RawService {
            hosts,
            addresses,
            ports,
            _location: _,
            resolution,
            endpoints,
            workload_selector,
            subject_alt_names,
            export_to,
        } = spec;
        let meta = Meta::read(&metadata)?;
        if hosts.is_empty() {
            return Err(Invalid::new("spec.hosts", "is empty"));
        }
        let addresses = addresses.iter().enumerate();
        let addresses = addresses.map(|(i, text)| network(&format!("spec.addresses[{i}]"), text));
        let allocated = status.addresses.iter().enumerate();
        let allocated = allocated
            .map(|(i, a)| Ok((host(&a.host), network(&format!("status.addresses[{i}].value"), &a.value)?)));
        let endpoints = endpoints.into_iter().enumerate();
        let endpoints = endpoints.map(|(i, raw)| workload(raw, &format!("spec.endpoints[{i}]")));
        Ok(ServiceEntry {
            addresses: addresses.collect::<Result<_, _>>()?,
            allocated: allocated.collect::<Result<_, _>>()?,
            ports: ports.into_iter().filter(|p| !p.protocol.eq_ignore_ascii_case("udp")).map(port).collect(),
            resolution,
            endpoints: endpoints.collect::<Result<_, _>>()?,
            selector: workload_selector
                .map(|s| s.labels.into_iter().collect())
                .filter(|s: &Labels| !s.is_empty()),
            subject_alt_names,
            visibility: Visibility::of_list(export_to.iter().map(String::as_str), &meta.id.namespace),
            foreign_namespaces: foreign_namespaces(&export_to, &meta.id.namespace),
            waypoint: WaypointBinding::read(&meta.labels, &metadata, &meta.id.namespace),
            hosts: hosts.iter().map(|text| host(text)).collect(),
            meta,
        })
    }
}

/// Names are compared without regard to case (RFC 4343), and proxies hold them in lower case.
fn host(text: &str) -> Arc<str> {
    text.to_ascii_lowercase().into()
}

fn foreign_namespaces(export_to: &[String], own: &str) -> Vec<Arc<str>> {
    if export_to.iter().any(|item| item == "*") {
        return Vec::new();
    }
    let others = export_to.iter().filter(|item| !matches!(item.as_str(), "." | "~") && *item != own);
    others.map(|item| item.as_str().into()).collect()
}

fn port(raw: RawPort) -> EntryPort {
    let RawPort { number, protocol, name, target_port } = raw;
    let protocol = AppProtocol::of_port(Some(&protocol), &name);
    EntryPort {
        name: name.into(),
        number,
        target: target_port.filter(|p| *p > 0).unwrap_or(number),
        protocol,
    }
}

fn network(field: &str, text: &str) -> Result<IpNet, Invalid> {
    let block = IpNet::from_str(text).or_else(|_| IpAddr::from_str(text).map(IpNet::from));
    block.map_err(|_| Invalid::new(field, format!("{text:?} is neither an IP address nor a CIDR")))
}
