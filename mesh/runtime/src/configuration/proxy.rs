//! Settings that the node proxy and the waypoint share: where the proxy is, whom it trusts, what it serves and writes.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use ambit_api::ports;
use ambit_identity::{
    CipherPreference, ControlPlaneConfig, SpiffeIdError, StoreConfig, TlsSettings, TrustConfig, TrustDomain,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::common::{AccessLog, Cipher, LogFormat};
use super::flows::FlowSettings;
use super::{ConfigError, Span};

/// Settings of every proxy. A program's configuration flattens them among its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProxySettings {
    /// The network that the proxy is in; workloads of another are reached through its gateway.
    pub network: String,
    /// The cluster's name: first part of workload uids, and the `clusterid` sent with credentials.
    pub cluster_id: String,
    /// The trust domain of the proxy and of the pods that it serves.
    pub trust_domain: String,
    /// Other trust domains whose peers are accepted as if they were of ours.
    pub trust_domain_aliases: Vec<String>,
    /// `host:port` of the control plane, which serves xDS and certificates. Empty, for ztunnel: there is none, and the mesh is
    /// what `xds.localFile` says.
    pub control_plane: String,
    /// PEM file with the roots that the control plane's own certificate must chain to.
    pub control_plane_root: PathBuf,
    /// PEM file with the roots that workloads are verified against; watched. None: the roots that come with each issued
    /// certificate.
    pub workload_root: Option<PathBuf>,
    /// DNS name that the control plane's certificate must carry.
    pub control_plane_server_name: String,
    /// File with the service account token (audience `istio-ca`), read again before each use.
    pub token_file: PathBuf,
    /// Where the admin server listens; loopback unless there is a reason.
    pub admin_address: SocketAddr,
    /// Where Prometheus metrics are served.
    pub metrics_address: SocketAddr,
    /// Where readiness is served.
    pub readiness_address: SocketAddr,
    /// Data-path threads; 0 means one per available core, at most 16.
    pub workers: u16,
    /// How long open connections may continue after the proxy was asked to stop.
    pub drain_timeout: Span,
    /// How long a client's connection that carries nothing may continue after the proxy was asked to stop. It is asked to close
    /// at once; this is for clients that do not answer. At most `drainTimeout` counts.
    pub drain_idle: Span,
    /// The access log.
    pub access_log: AccessLog,
    /// The flows that the proxy remembers.
    pub flows: FlowSettings,
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
}

/// The certificates that a proxy asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Certificates {
    /// Lifetime asked for; the authority may grant less. From one minute to 90 days.
    pub lifetime: Span,
    /// Which cipher suite is offered first; both are always accepted.
    pub cipher: Cipher,
}

impl Default for ProxySettings {
    fn default() -> Self {
        Self {
            network: String::new(),
            cluster_id: "Kubernetes".into(),
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            control_plane: "ambit-control.ambit-system.svc:15012".into(),
            control_plane_root: "/var/run/secrets/istio/root-cert.pem".into(),
            workload_root: None,
            control_plane_server_name: "ambit-control.ambit-system.svc".into(),
            token_file: "/var/run/secrets/tokens/istio-token".into(),
            admin_address: (Ipv4Addr::LOCALHOST, ports::ADMIN).into(),
            metrics_address: (Ipv4Addr::UNSPECIFIED, ports::METRICS).into(),
            readiness_address: (Ipv4Addr::UNSPECIFIED, ports::READINESS).into(),
            workers: 0,
            drain_timeout: Span::from_secs(600),
            drain_idle: Span::from_secs(10),
            access_log: AccessLog::default(),
            flows: FlowSettings::default(),
            crl_file: None,
            pod_name: String::new(),
            pod_namespace: "default".into(),
            instance_ip: Ipv4Addr::LOCALHOST.into(),
            log_level: "info".into(),
            log_format: LogFormat::Text,
        }
    }
}

impl Default for Certificates {
    fn default() -> Self {
        Self { lifetime: Span::from_secs(24 * 3600), cipher: Cipher::Aes128 }
    }
}

impl ProxySettings {
    /// The number of data-path threads to start.
    pub fn worker_count(&self) -> usize {
        match self.workers {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get().min(16)),
            n => usize::from(n),
        }
    }

    /// How the control plane is reached.
    pub fn control_plane_config(&self) -> ControlPlaneConfig {
        ControlPlaneConfig {
            address: self.control_plane.clone(),
            root_file: self.control_plane_root.clone(),
            server_name: self.control_plane_server_name.clone(),
            token_file: Some(self.token_file.clone()),
            cluster_id: self.cluster_id.clone(),
        }
    }

    /// Whom the proxy trusts.
    ///
    /// # Errors
    /// A name that is no trust domain.
    pub fn trust_config(&self) -> Result<TrustConfig, SpiffeIdError> {
        Ok(TrustConfig {
            trust_domain: TrustDomain::new(&self.trust_domain)?,
            aliases: self
                .trust_domain_aliases
                .iter()
                .map(|name| TrustDomain::new(name))
                .collect::<Result<_, _>>()?,
            roots: self.workload_root.clone(),
            revocations: self.crl_file.clone(),
        })
    }

    /// The metadata of the proxy's xDS node.
    pub fn node_metadata(&self) -> BTreeMap<String, String> {
        let entry = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        BTreeMap::from([
            entry("NAME", &self.pod_name),
            entry("NAMESPACE", &self.pod_namespace),
            entry("INSTANCE_IPS", &self.instance_ip.to_string()),
            entry("CLUSTER_ID", &self.cluster_id),
            entry("NETWORK", &self.network),
        ])
    }

    /// Checks what types alone can't say.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key whose value can't work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.workers > 256 {
            return Err(ConfigError::value("workers", "is more than 256"));
        }
        if !self.control_plane.is_empty() && !is_address(&self.control_plane) {
            return Err(ConfigError::value("controlPlane", "is not host:port"));
        }
        self.flows.validate()
    }
}

impl Certificates {
    /// How certificates are kept and renewed.
    pub fn store_config(&self) -> StoreConfig {
        let ciphers = match self.cipher {
            Cipher::Aes128 => CipherPreference::Aes128First,
            Cipher::Aes256 => CipherPreference::Aes256First,
        };
        StoreConfig { lifetime: self.lifetime.get(), tls: TlsSettings { ciphers }, ..StoreConfig::default() }
    }

    /// Checks what types alone can't say.
    ///
    /// # Errors
    /// [`ConfigError::Value`] naming the key whose value can't work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        // Certificate contract: maximum 90 days; below a minute renewal can't keep up.
        match self.lifetime.get().as_secs() {
            60..=7_776_000 => Ok(()),
            _ => Err(ConfigError::value("certificates.lifetime", "is not between one minute and 90 days")),
        }
    }
}

/// Whether a text is `host:port`.
pub fn is_address(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}
