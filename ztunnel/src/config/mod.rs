//! The node proxy's configuration: one typed value, built once at start and never changed.
//!
//! `app` destructures it; everything else receives only the part that it needs. Where values come
//! from (file, environment, flags) and how a wrong key is reported is [`load`]'s business.

mod istio;
pub mod load;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use ambit_runtime::configuration::Span;
use ambit_runtime::configuration::proxy;
pub use ambit_runtime::configuration::proxy::ProxySettings;
pub use load::ConfigError;

/// Everything that can be set. Every key has a default, so an empty file is a valid one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Config {
    /// What the waypoint has too.
    #[serde(flatten)]
    pub proxy: ProxySettings,
    /// Name of the node that this proxy serves; decides who is "on the same node".
    pub node: String,
    /// The node agent's socket.
    pub zds_socket: PathBuf,
    /// How a connection between two pods of this node is carried.
    pub same_node: SameNode,
    /// The DNS proxy of each pod.
    pub dns: Dns,
    /// Whether each pod gets a SOCKS5 listener on its loopback, port 15080.
    pub socks5: bool,
    /// Further metadata of the xDS node: names and values.
    pub node_metadata: BTreeMap<String, String>,
    /// Variables of Istio's chart that have no effect here; named once at start.
    #[serde(skip)]
    pub without_effect: Vec<String>,
    /// The subscription to the control plane.
    pub xds: Xds,
    /// The certificates of this node's pods.
    pub certificates: Certificates,
    /// Bounds of everything that waits or grows.
    pub limits: Limits,
}

/// How two pods of one node are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SameNode {
    /// Bytes go from socket to socket in the kernel; policy and reporting are those of a tunnel.
    Splice,
    /// As between nodes: mutual TLS and HBONE.
    Tunnel,
}

/// The DNS proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Dns {
    /// Whether pods' DNS questions are answered from the directory.
    pub enabled: bool,
    /// Resolvers for everything that the directory doesn't know; empty: those of the proxy's own
    /// `/etc/resolv.conf`.
    pub upstreams: Vec<SocketAddr>,
    /// The domain of the cluster's service names.
    pub cluster_domain: String,
}

/// The subscription to the control plane.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Xds {
    /// Ask for a destination when a pod first dials it, instead of subscribing to everything.
    pub on_demand: bool,
    /// YAML file with workloads and services, read at start where there is no control plane.
    pub local_file: Option<PathBuf>,
}

/// The certificates of this node's pods.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Certificates {
    /// What the waypoint has too.
    #[serde(flatten)]
    pub requested: proxy::Certificates,
    /// `host:port` of the certificate authority. None: the control plane; without one, no pod gets a certificate.
    pub authority: Option<String>,
    /// PEM file with the roots that the authority's own certificate must chain to. None: those of the control plane.
    pub authority_root: Option<PathBuf>,
    /// DNS name that the authority's certificate must carry. None: the host of its address.
    pub authority_server_name: Option<String>,
}

/// Bounds of everything that waits or grows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Budget of a connection from accept to an open upstream, over all attempts.
    pub connect_timeout: Span,
    /// Budget of one attempt on one endpoint.
    pub attempt_timeout: Span,
    /// How many endpoints are tried before a connection fails; at least 1.
    pub connect_attempts: u8,
    /// Budget of a TLS plus HTTP/2 handshake, either side.
    pub handshake_timeout: Span,
    /// How long a connection waits for its pod to appear in the directory, or for an on-demand answer.
    pub directory_wait: Span,
    /// How long an unused HBONE connection is kept.
    pub pool_idle: Span,
    /// How long an open connection may move no byte, in neither direction, before it is closed; `0s`: for ever.
    pub connection_idle: Span,
    /// Open connections of the process, divided by its workers. Fewer where the limit of open files is lower. Each
    /// pod and each peer gets a share: as much as it leaves to the others.
    pub connections_per_worker: usize,
    /// TLS handshakes of clients in progress, of the process; shared in the same way.
    pub handshakes: usize,
}

impl Default for Config {
    fn default() -> Self {
        let proxy = ProxySettings {
            pod_name: "ztunnel".into(),
            pod_namespace: "ambit-system".into(),
            ..ProxySettings::default()
        };
        Self {
            proxy,
            node: String::new(),
            zds_socket: "/var/run/ztunnel/ztunnel.sock".into(),
            same_node: SameNode::Splice,
            dns: Dns::default(),
            socks5: false,
            node_metadata: BTreeMap::new(),
            without_effect: Vec::new(),
            xds: Xds::default(),
            certificates: Certificates::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Dns {
    fn default() -> Self {
        Self { enabled: true, upstreams: Vec::new(), cluster_domain: "cluster.local".into() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_timeout: Span::from_secs(10),
            attempt_timeout: Span::from_secs(5),
            connect_attempts: 3,
            handshake_timeout: Span::from_secs(5),
            directory_wait: Span::from_secs(5),
            pool_idle: Span::from_secs(120),
            // What Kubernetes' own node proxy leaves an idle connection in connection tracking.
            connection_idle: Span::from_secs(24 * 3600),
            connections_per_worker: 262_144,
            handshakes: 2048,
        }
    }
}

impl Config {
    /// Checks what types alone can't say.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key whose value can't work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.proxy.validate()?;
        self.certificates.requested.validate()?;
        let wrong = |key: &str, reason: &str| Err(ConfigError::value(key, reason));
        if self.node.is_empty() {
            return wrong("node", "is not set; it is the name of the node that this proxy serves");
        }
        if self.limits.connect_attempts == 0 {
            return wrong("limits.connectAttempts", "is 0: no connection could ever be made");
        }
        if self.limits.connections_per_worker == 0 {
            return wrong("limits.connectionsPerWorker", "is 0: no connection could ever be accepted");
        }
        if self.limits.handshakes == 0 {
            return wrong("limits.handshakes", "is 0: no tunnel could ever be accepted");
        }
        if self.certificates.authority.as_ref().is_some_and(|address| !proxy::is_address(address)) {
            return wrong("certificates.authority", "is not host:port");
        }
        if !self.proxy.control_plane.is_empty() && self.xds.local_file.is_some() {
            return wrong("xds.localFile", "is only read where `controlPlane` is empty");
        }
        Ok(())
    }
}
