//! The node proxy's configuration: one typed value, built once at start and never changed.
//!
//! `app` destructures it; everything else receives only the part that it needs. Where values come
//! from (file, environment, flags) and how a wrong key is reported is [`load`]'s business.

mod istio;
pub mod load;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use ambit_runtime::configuration::Span;
pub use ambit_runtime::configuration::common::{AccessLog, Cipher, LogFormat};
pub use load::ConfigError;

/// Everything that can be set. Every key has a default, so an empty file is a valid one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// Name of the node that this proxy serves; decides who is "on the same node".
    pub node: String,
    /// The network that this node is in; workloads of another are reached through its gateway.
    pub network: String,
    /// The cluster's name: first part of workload uids, and the `clusterid` sent with credentials.
    pub cluster_id: String,
    /// The trust domain of this node's pods.
    pub trust_domain: String,
    /// Other trust domains whose peers are accepted as if they were of ours.
    pub trust_domain_aliases: Vec<String>,
    /// `host:port` of the control plane, which serves xDS and certificates. Empty: there is none, and the mesh is what `xds.localFile`
    /// says.
    pub control_plane: String,
    /// PEM file with the roots that the control plane's own certificate must chain to.
    pub control_plane_root: PathBuf,
    /// PEM file with the roots that workloads are verified against; watched. None: the roots that come with each issued
    /// certificate.
    pub workload_root: Option<PathBuf>,
    /// DNS name that the control plane's certificate must bear.
    pub control_plane_server_name: String,
    /// File with the service account token (audience `istio-ca`), read again before each use.
    pub token_file: PathBuf,
    /// The node agent's socket (contracts.md, section 3).
    pub zds_socket: PathBuf,
    /// Where the admin server listens; loopback unless there is a reason.
    pub admin_address: SocketAddr,
    /// Where Prometheus metrics are served.
    pub metrics_address: SocketAddr,
    /// Where readiness is served.
    pub readiness_address: SocketAddr,
    /// Data-path threads; 0 means one per available core, at most 16.
    pub workers: u16,
    /// How a connection between two pods of this node is carried.
    pub same_node: SameNode,
    /// How long open connections may continue after the proxy was asked to stop.
    pub drain_timeout: Span,
    /// The DNS proxy of each pod.
    pub dns: Dns,
    /// Whether each pod gets a SOCKS5 listener on its loopback, port 15080.
    pub socks5: bool,
    /// The access log.
    pub access_log: AccessLog,
    /// Certificate revocation list (PEM or DER); watched. None: nothing is revoked.
    pub crl_file: Option<PathBuf>,
    /// Name of the proxy's own pod, part of its xDS node id.
    pub pod_name: String,
    /// Namespace of the proxy's own pod.
    pub pod_namespace: String,
    /// Address of the proxy's own pod, part of its xDS node id.
    pub instance_ip: IpAddr,
    /// Filter of the program's log, as in `info,ztunnel=debug`.
    pub log_level: String,
    /// Shape of a line of the program's log.
    pub log_format: LogFormat,
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Certificates {
    /// Lifetime asked for; the authority may grant less. From one minute to 90 days.
    pub lifetime: Span,
    /// Which cipher suite is offered first; both are always accepted.
    pub cipher: Cipher,
    /// `host:port` of the certificate authority. None: the control plane; without one, no pod gets a certificate.
    pub authority: Option<String>,
    /// PEM file with the roots that the authority's own certificate must chain to. None: those of the control plane.
    pub authority_root: Option<PathBuf>,
    /// DNS name that the authority's certificate must bear. None: the host of its address.
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
        Self {
            node: String::new(),
            network: String::new(),
            cluster_id: "Kubernetes".into(),
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            control_plane: "ambit-control.ambit-system.svc:15012".into(),
            control_plane_root: "/var/run/secrets/istio/root-cert.pem".into(),
            workload_root: None,
            control_plane_server_name: "ambit-control.ambit-system.svc".into(),
            token_file: "/var/run/secrets/tokens/istio-token".into(),
            zds_socket: "/var/run/ztunnel/ztunnel.sock".into(),
            admin_address: (Ipv4Addr::LOCALHOST, 15000).into(),
            metrics_address: (Ipv4Addr::UNSPECIFIED, 15020).into(),
            readiness_address: (Ipv4Addr::UNSPECIFIED, 15021).into(),
            workers: 0,
            same_node: SameNode::Splice,
            drain_timeout: Span::from_secs(600),
            dns: Dns::default(),
            socks5: false,
            access_log: AccessLog::default(),
            crl_file: None,
            pod_name: "ztunnel".into(),
            pod_namespace: "ambit-system".into(),
            instance_ip: Ipv4Addr::LOCALHOST.into(),
            log_level: "info".into(),
            log_format: LogFormat::Text,
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

impl Default for Certificates {
    fn default() -> Self {
        Self {
            lifetime: Span::from_secs(24 * 3600),
            cipher: Cipher::Aes128,
            authority: None,
            authority_root: None,
            authority_server_name: None,
        }
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
    /// The number of data-path threads to start.
    pub fn worker_count(&self) -> usize {
        match self.workers {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get().min(16)),
            n => usize::from(n),
        }
    }

    /// Checks what types alone can't say.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key whose value can't work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, reason: &str| {
            Err(ConfigError::Value { key: key.to_owned(), reason: reason.to_owned() })
        };
        if self.node.is_empty() {
            return wrong("node", "is not set; it is the name of the node that this proxy serves");
        }
        if self.workers > 256 {
            return wrong("workers", "is more than 256");
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
        let lifetime = self.certificates.lifetime.get().as_secs();
        // contracts.md, section 5: maximum 90 days; below a minute renewal can't keep up.
        if !(60..=90 * 24 * 3600).contains(&lifetime) {
            return wrong("certificates.lifetime", "is not between one minute and 90 days");
        }
        let is_address = |address: &str| {
            address
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        };
        if !self.control_plane.is_empty() && !is_address(&self.control_plane) {
            return wrong("controlPlane", "is not host:port");
        }
        if self.certificates.authority.as_ref().is_some_and(|address| !is_address(address)) {
            return wrong("certificates.authority", "is not host:port");
        }
        if !self.control_plane.is_empty() && self.xds.local_file.is_some() {
            return wrong("xds.localFile", "is only read where `controlPlane` is empty");
        }
        Ok(())
    }
}
