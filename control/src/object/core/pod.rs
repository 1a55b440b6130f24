//! Pods: the workloads of the mesh.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::binding::WaypointBinding;
use super::cluster::NETWORK;
use super::meta::{Invalid, Meta, Owner, annotation};
use super::service::Transport;

/// A pod, as far as the mesh reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Name, labels and age.
    pub meta: Meta,
    /// The node that it is bound to; empty before it is scheduled.
    pub node: Arc<str>,
    /// Its service account, `default` if it names none; empty for a mirror pod, which has no identity: a kubelet creates
    /// such pods for its static pods, in any namespace that it likes (Kubernetes, NodeRestriction).
    pub service_account: Arc<str>,
    /// Its addresses, first the primary one; empty before it has any.
    pub addresses: Vec<IpAddr>,
    /// Whether it shares its node's network.
    pub host_network: bool,
    /// Succeeded or failed: its address may already be another's.
    pub finished: bool,
    /// Being deleted.
    pub terminating: bool,
    /// Condition `Ready`.
    pub ready: bool,
    /// Annotation `ambient.istio.io/redirection: enabled`: captured and served by a node proxy.
    pub captured: bool,
    /// Terminates HBONE itself (label `networking.istio.io/tunnel: http`).
    pub native_tunnel: bool,
    /// Network named by its own label.
    pub network: Option<Arc<str>>,
    /// Its controlling owner.
    pub owner: Option<Owner>,
    /// Named container ports, which named target ports of services refer to.
    pub ports: Vec<(Arc<str>, u16, Transport)>,
    /// What it says about its waypoint.
    pub waypoint: WaypointBinding,
}

impl Pod {
    /// Label that names the gateway whose deployment the pod belongs to.
    pub const GATEWAY_NAME: &str = "gateway.networking.k8s.io/gateway-name";

    /// Annotation of the object that a kubelet creates for a static pod.
    const MIRROR: &str = "kubernetes.io/config.mirror";

    /// Whether the pod runs or will run, and has an identity: a certificate may be issued for it.
    pub fn is_live(&self) -> bool {
        !self.finished && !self.service_account.is_empty()
    }

    /// The number of a named container port for connections.
    pub fn port(&self, name: &str) -> Option<u16> {
        self.port_of(Transport::Tcp, name)
    }

    /// The number of a named container port of this transport.
    pub fn port_of(&self, transport: Transport, name: &str) -> Option<u16> {
        let mut ports = self.ports.iter().filter(|(_, _, own)| *own == transport);
        ports.find(|(own, _, _)| &**own == name).map(|(_, number, _)| *number)
    }
}

impl TryFrom<v1::Pod> for Pod {
    type Error = Invalid;

    fn try_from(object: v1::Pod) -> Result<Pod, Invalid> {
        let (meta, spec, status) =
            (object.metadata, object.spec.unwrap_or_default(), object.status.unwrap_or_default());
        let common = Meta::read(&meta)?;
        let host_network = spec.host_network.unwrap_or(false);
        // A sidecar's pod or one on its node's network is never captured, whatever the annotation says.
        let service_account = service_account(&meta, &spec);
        let capturable = !host_network
            && !service_account.is_empty()
            && annotation(&meta, "sidecar.istio.io/status").is_none();
        Ok(Pod {
            node: spec.node_name.as_deref().unwrap_or_default().into(),
            service_account: service_account.into(),
            addresses: addresses(&status)?,
            host_network,
            finished: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            terminating: meta.deletion_timestamp.is_some(),
            ready: status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True"),
            captured: capturable && annotation(&meta, "ambient.istio.io/redirection") == Some("enabled"),
            native_tunnel: common.labels.get("networking.istio.io/tunnel") == Some("http"),
            network: common.labels.get(NETWORK).map(Arc::from),
            owner: Owner::of(&meta),
            ports: named_ports(&spec),
            waypoint: WaypointBinding::read(&common.labels, &meta, &common.id.namespace),
            meta: common,
        })
    }
}

/// An API server fills in the account of every pod but mirror pods, and gives each object a uid. Only a file may leave
/// both out.
fn service_account<'a>(meta: &ObjectMeta, spec: &'a v1::PodSpec) -> &'a str {
    let named = spec.service_account_name.as_deref().unwrap_or_default();
    match (annotation(meta, Pod::MIRROR), named) {
        (Some(_), _) => "",
        (None, "") if meta.uid.is_none() => "default",
        (None, named) => named,
    }
}

fn addresses(status: &v1::PodStatus) -> Result<Vec<IpAddr>, Invalid> {
    let mut addresses = Vec::new();
    let listed = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str());
    for (field, text) in
        listed.map(|ip| ("status.podIPs", ip)).chain(status.pod_ip.as_deref().map(|ip| ("status.podIP", ip)))
    {
        if text.is_empty() {
            continue;
        }
        let address = text.parse().map_err(|_| Invalid::new(field, format!("{text:?} is no IP address")))?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// Named ports of containers and of init containers that keep running (native sidecars).
fn named_ports(spec: &v1::PodSpec) -> Vec<(Arc<str>, u16, Transport)> {
    let sidecars =
        spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            let transport = Transport::of_port(port.protocol.as_deref())?;
            Some((port.name.as_deref()?.into(), u16::try_from(port.container_port).ok()?, transport))
        })
        .collect()
}
