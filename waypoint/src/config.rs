//! The waypoint's configuration: one typed value, built once at start and never changed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use ambit_runtime::configuration::common::{AccessLog, Cipher, LogFormat};
use ambit_runtime::configuration::{ConfigError, ForeignVariable, Settings, Span};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Everything that can be set. Every key has a default, so an empty file is a valid one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// The network that the waypoint is in.
    pub network: String,
    /// The cluster's name: first part of workload uids, and the `clusterid` sent with credentials.
    pub cluster_id: String,
    /// The trust domain of the waypoint.
    pub trust_domain: String,
    /// Other trust domains whose peers are accepted as if they were of ours.
    pub trust_domain_aliases: Vec<String>,
    /// `host:port` of the control plane, which serves xDS and certificates.
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
    /// Where HBONE is served.
    pub listen_address: SocketAddr,
    /// Where the admin server listens; loopback unless there is a reason.
    pub admin_address: SocketAddr,
    /// Where Prometheus metrics are served.
    pub metrics_address: SocketAddr,
    /// Where readiness is served.
    pub readiness_address: SocketAddr,
    /// Data-path threads; 0 means one per available core, at most 16.
    pub workers: u16,
    /// How long open connections may go on after the waypoint was asked to stop.
    pub drain_timeout: Span,
    /// The access log.
    pub access_log: AccessLog,
    /// Certificate revocation list (PEM or DER); watched. None: nothing is revoked.
    pub crl_file: Option<PathBuf>,
    /// Name of the waypoint's own pod.
    pub pod_name: String,
    /// Namespace of the waypoint's own pod.
    pub pod_namespace: String,
    /// Service account of the waypoint's own pod: the name of its Gateway.
    pub service_account: String,
    /// Address of the waypoint's own pod.
    pub instance_ip: IpAddr,
    /// Filter of the program's log, as in `info,ambit_waypoint=debug`.
    pub log_level: String,
    /// Shape of a line of the program's log.
    pub log_format: LogFormat,
    /// SPIFFE ids of clients whose `x-forwarded-for`, `x-forwarded-proto` and `forwarded` are kept and added to, such as
    /// that of an ingress gateway. What other clients claim is removed.
    pub trusted_forwarders: Vec<String>,
    /// The waypoint's certificate.
    pub certificates: Certificates,
    /// Bounds of everything that waits or grows.
    pub limits: Limits,
}

/// The waypoint's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Certificates {
    /// Lifetime asked for; the authority may grant less. From one minute to 90 days.
    pub lifetime: Span,
    /// Which cipher suite is offered first; both are always accepted.
    pub cipher: Cipher,
}

/// Bounds of everything that waits or grows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Budget of one connection to an endpoint, handshakes included.
    pub connect_timeout: Span,
    /// Budget of a TLS plus HTTP/2 handshake, either side.
    pub handshake_timeout: Span,
    /// How long an unused HBONE connection is kept.
    pub pool_idle: Span,
    /// How long an unused HTTP connection to an endpoint is kept.
    pub upstream_idle: Span,
    /// How long the head of a request may take.
    pub head_timeout: Span,
    /// How long to wait for the first bytes on a port whose protocol is not declared; then it is TCP.
    pub detect_timeout: Span,
    /// Largest head of a request, in bytes.
    pub head_size: usize,
    /// Most header fields of a request.
    pub headers: usize,
    /// Longest target of a request, in bytes.
    pub target_size: usize,
    /// Streams of one HTTP/2 connection at once.
    pub streams: u32,
    /// Bytes of a request's body that are kept for another try.
    pub retry_buffer: usize,
    /// Retries at once, in per cent of the requests in progress; three are always allowed to each worker.
    pub retry_budget: u32,
    /// HTTP connections to one endpoint, of each worker.
    pub connections_per_endpoint: usize,
}

impl Default for Config {
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
            listen_address: (std::net::Ipv6Addr::UNSPECIFIED, 15008).into(),
            admin_address: (Ipv4Addr::LOCALHOST, 15000).into(),
            metrics_address: (Ipv4Addr::UNSPECIFIED, 15020).into(),
            readiness_address: (Ipv4Addr::UNSPECIFIED, 15021).into(),
            workers: 0,
            drain_timeout: Span::from_secs(60),
            access_log: AccessLog::default(),
            crl_file: None,
            pod_name: String::new(),
            pod_namespace: "default".into(),
            service_account: "waypoint".into(),
            instance_ip: Ipv4Addr::LOCALHOST.into(),
            log_level: "info".into(),
            log_format: LogFormat::Text,
            trusted_forwarders: Vec::new(),
            certificates: Certificates::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Certificates {
    fn default() -> Self {
        Self { lifetime: Span::from_secs(24 * 3600), cipher: Cipher::Aes128 }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_timeout: Span::from_secs(5),
            handshake_timeout: Span::from_secs(5),
            pool_idle: Span::from_secs(120),
            upstream_idle: Span::from_secs(60),
            head_timeout: Span::from_secs(10),
            detect_timeout: Span::from_secs(1),
            head_size: 64 << 10,
            headers: 100,
            target_size: 16 << 10,
            streams: 200,
            retry_buffer: 64 << 10,
            retry_budget: 20,
            connections_per_endpoint: 1024,
        }
    }
}

/// Variables of a waypoint's pod, and the settings that they are.
const VARIABLES: &[(&str, &str)] = &[
    ("POD_NAME", "podName"),
    ("POD_NAMESPACE", "podNamespace"),
    ("INSTANCE_IP", "instanceIp"),
    ("SERVICE_ACCOUNT", "serviceAccount"),
    ("CLUSTER_ID", "clusterId"),
    ("NETWORK", "network"),
    ("XDS_ADDRESS", "controlPlane"),
    ("XDS_ROOT_CA", "controlPlaneRoot"),
    ("AUTH_TOKEN", "tokenFile"),
];

impl Settings for Config {
    const PROGRAM: &'static str = "ambit-waypoint";
    const ABOUT: &'static str =
        "The L7 proxy: routing, splits, retries and policy for the services bound to it";

    fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |key: &str, reason: &str| {
            Err(ConfigError::Value { key: key.to_owned(), reason: reason.to_owned() })
        };
        if self.pod_name.is_empty() {
            return wrong("podName", "is not set; it is the name of the waypoint's own pod");
        }
        if self.workers > 256 {
            return wrong("workers", "is more than 256");
        }
        if self.limits.head_size < 8 << 10 {
            return wrong("limits.headSize", "is less than 8192");
        }
        if self.limits.connections_per_endpoint == 0 {
            return wrong("limits.connectionsPerEndpoint", "is 0: no request could ever be sent");
        }
        Ok(())
    }

    fn foreign_variables(variables: &[(String, String)]) -> Result<Vec<ForeignVariable>, ConfigError> {
        let setting = |(variable, key): &(&'static str, &'static str)| {
            let (_, text) = variables.iter().find(|(name, text)| name == variable && !text.is_empty())?;
            Some(ForeignVariable::Setting { key, text: text.clone(), variable })
        };
        Ok(VARIABLES.iter().filter_map(setting).collect())
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
}

/// The reference page of all settings, in Markdown.
pub fn reference() -> String {
    ambit_runtime::configuration::reference::<Config>(
        "# Settings of the waypoint\n\nWritten from the program; `AMBIT_WRITE_DOCS=1 cargo test -p ambit-waypoint \
         reference` writes it anew. Each key is also a variable (`limits.headSize` is `AMBIT_WAYPOINT_LIMITS_HEAD_SIZE`) \
         and a flag (`--limits-head-size`).",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_page_is_that_of_the_program() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/waypoint-settings.md");
        if std::env::var_os("AMBIT_WRITE_DOCS").is_some() {
            std::fs::write(path, reference()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), reference());
    }

    #[test]
    fn every_setting_has_a_meaning_and_a_flag_of_its_own() {
        assert_eq!(ambit_runtime::configuration::faults::<Config>(), Vec::<String>::new());
    }
}
