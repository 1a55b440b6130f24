//! The waypoint's configuration: one typed value, built once at start and never changed.

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Instant;

use ambit_api::ports;
use ambit_runtime::configuration::proxy::{Certificates, ProxySettings};
use ambit_runtime::configuration::{ConfigError, ForeignVariable, Settings, Span};
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::activity::{Activity, Bounds};

/// Everything that can be set. Every key has a default, so an empty file is a valid one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Config {
    /// What the node proxy has too.
    #[serde(flatten)]
    pub proxy: ProxySettings,
    /// Where HBONE is served.
    pub listen_address: SocketAddr,
    /// How long a waypoint that was asked to stop goes on as before, for peers that have yet to learn of it: a part of
    /// `drainTimeout`. Asked again, it drains at once.
    pub drain_minimum: Span,
    /// Service account of the waypoint's own pod: the name of its Gateway.
    pub service_account: String,
    /// SPIFFE ids of clients whose `x-forwarded-for`, `x-forwarded-proto` and `forwarded` are kept and added to, such as
    /// that of an ingress gateway. What other clients claim is removed.
    pub trusted_forwarders: Vec<String>,
    /// PEM file with roots of the servers outside the mesh that DestinationRules and BackendTLSPolicies demand TLS to, beside those
    /// of Mozilla.
    pub upstream_roots: Option<PathBuf>,
    /// Networks, beside public addresses, that a host may be in which a client asks for at a ServiceEntry with the resolution
    /// DYNAMIC_DNS, as 192.168.0.0/16. Addresses of this host and link, and those of the mesh, are always refused.
    pub dynamic_host_cidrs: Vec<String>,
    /// The waypoint's certificate.
    pub certificates: Certificates,
    /// Bounds of everything that waits or grows.
    pub limits: Limits,
}

/// Bounds of everything that waits or grows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Limits {
    /// Budget of one connection to an endpoint, handshakes included.
    pub connect_timeout: Span,
    /// Budget of all connections of one request or connection to endpoints, retries included: endpoints that drop packets do not multiply waits.
    pub connect_budget: Span,
    /// Budget of a TLS plus HTTP/2 handshake, either side.
    pub handshake_timeout: Span,
    /// How long an unused HBONE connection is kept.
    pub pool_idle: Span,
    /// How long an unused HTTP connection to an endpoint is kept.
    pub upstream_idle: Span,
    /// How long the head of a request may take from its first byte, and the first byte of a connection; then the answer
    /// is 408, and the connection is closed.
    pub head_timeout: Span,
    /// How long the body of a request may be silent; then the answer is 408, and the connection is closed.
    pub body_timeout: Span,
    /// How long the part of a body that an external authorizer sees may take in all; then the answer is 408, and the connection
    /// is closed.
    pub authorized_body_timeout: Span,
    /// How long a client may take none of what is sent to it, or nothing of an answer that waits for it; then its connection is cut.
    pub write_timeout: Span,
    /// How long a client's HTTP connection may be without a request; then it is closed, HTTP/2 with GOAWAY.
    pub idle_timeout: Span,
    /// How long to wait for the first bytes on a port whose protocol is not declared; then it is TCP.
    pub detect_timeout: Span,
    /// Largest head of a request, in bytes; a larger one is answered with 431.
    pub head_size: usize,
    /// Most header fields of a request; more are answered with 431.
    pub headers: usize,
    /// Longest target of a request, in bytes; a longer one is answered with 414.
    pub target_size: usize,
    /// Streams of one HTTP/2 connection at once; more are refused with REFUSED_STREAM.
    pub streams: u32,
    /// Requests of one connection; after the last one it is closed, HTTP/1 with `Connection: close`, HTTP/2 with GOAWAY.
    pub requests_per_connection: u64,
    /// Requests of one HTTP/2 connection that its client may reset early, within ten seconds; after more it is cut.
    pub abandoned_requests: u32,
    /// Bytes of a request's body that are kept for another try.
    pub retry_buffer: usize,
    /// Retries at once, in per cent of the requests in progress; three are always allowed to each worker.
    pub retry_budget: u32,
    /// HTTP connections to one endpoint, of each worker.
    pub connections_per_endpoint: usize,
    /// Connections of clients outside the mesh to a gateway's pod at once; more are closed. The last eighth is kept for addresses with few
    /// connections.
    pub client_connections: usize,
    /// Connections of one address outside the mesh, or of one IPv6 network of 64 bits, to a gateway's pod at once; more are closed. Those of
    /// the Gateway's trusted proxies are not limited by this.
    pub connections_per_client: usize,
    /// Connections of clients outside the mesh to a gateway's pod at once whose client has not begun yet: its PROXY header, TLS handshake
    /// and the first byte of a request are waited for. More are closed.
    pub pending_connections: usize,
    /// Such connections of one address, or of one IPv6 network of 64 bits.
    pub pending_per_client: usize,
    /// Sessions at once of clients that send datagrams to a gateway; a datagram that would begin one more is refused. One client may
    /// have as many as are left free, and each has a descriptor.
    pub udp_sessions: usize,
    /// How long a session of datagrams may be idle; then it ends, and the client's next datagram may go to another endpoint.
    pub udp_idle_timeout: Span,
}

impl Config {
    /// The networks of `dynamic_host_cidrs`.
    ///
    /// # Errors
    /// One that is none.
    pub fn dynamic_hosts(&self) -> Result<Vec<IpNet>, ConfigError> {
        let wrong = |text: &String| ConfigError::value("dynamicHostCidrs", format!("{text:?} is no network"));
        self.dynamic_host_cidrs.iter().map(|text| text.parse().map_err(|_| wrong(text))).collect()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            proxy: ProxySettings { drain_timeout: Span::from_secs(60), ..ProxySettings::default() },
            listen_address: (Ipv6Addr::UNSPECIFIED, ports::INBOUND_HBONE).into(),
            drain_minimum: Span::from_secs(5),
            service_account: "waypoint".into(),
            trusted_forwarders: Vec::new(),
            upstream_roots: None,
            dynamic_host_cidrs: Vec::new(),
            certificates: Certificates::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_timeout: Span::from_secs(5),
            connect_budget: Span::from_secs(10),
            handshake_timeout: Span::from_secs(5),
            pool_idle: Span::from_secs(120),
            upstream_idle: Span::from_secs(60),
            head_timeout: Span::from_secs(10),
            body_timeout: Span::from_secs(300),
            authorized_body_timeout: Span::from_secs(30),
            write_timeout: Span::from_secs(300),
            idle_timeout: Span::from_secs(3600),
            detect_timeout: Span::from_secs(1),
            head_size: 64 << 10,
            headers: 100,
            target_size: 16 << 10,
            streams: 200,
            requests_per_connection: 100_000,
            abandoned_requests: 200,
            retry_buffer: 64 << 10,
            retry_budget: 20,
            connections_per_endpoint: 1024,
            client_connections: 50_000,
            connections_per_client: 10_000,
            pending_connections: 8_000,
            pending_per_client: 1_000,
            udp_sessions: 32_768,
            udp_idle_timeout: Span::from_secs(30),
        }
    }
}

impl Limits {
    /// The state of a client's connection that nothing was asked on yet.
    pub fn activity(&self) -> Activity {
        let bounds = Bounds {
            idle: self.idle_timeout.get(),
            head: self.head_timeout.get(),
            write: self.write_timeout.get(),
            requests: self.requests_per_connection,
            abandoned: self.abandoned_requests,
        };
        Activity::new(bounds, Instant::now())
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
        self.proxy.validate()?;
        self.certificates.validate()?;
        self.dynamic_hosts()?;
        let wrong = |key: &str, reason: &str| Err(ConfigError::value(key, reason));
        if self.proxy.pod_name.is_empty() {
            return wrong("podName", "is not set; it is the name of the waypoint's own pod");
        }
        if self.proxy.control_plane.is_empty() {
            return wrong("controlPlane", "is not set; a waypoint has no other source of configuration");
        }
        if self.limits.head_size < 8 << 10 {
            return wrong("limits.headSize", "is less than 8192");
        }
        if self.limits.requests_per_connection == 0 {
            return wrong("limits.requestsPerConnection", "is 0: no request could ever be answered");
        }
        if self.limits.streams == 0 {
            return wrong("limits.streams", "is 0: no request could ever be answered");
        }
        if self.limits.connections_per_endpoint == 0 {
            return wrong("limits.connectionsPerEndpoint", "is 0: no request could ever be sent");
        }
        let of_clients = [
            ("limits.clientConnections", self.limits.client_connections),
            ("limits.connectionsPerClient", self.limits.connections_per_client),
            ("limits.pendingConnections", self.limits.pending_connections),
            ("limits.pendingPerClient", self.limits.pending_per_client),
        ];
        if let Some((key, _)) = of_clients.into_iter().find(|(_, limit)| *limit == 0) {
            return wrong(key, "is 0: no client could ever connect");
        }
        if self.limits.udp_sessions == 0 {
            return wrong("limits.udpSessions", "is 0: no datagram could ever be sent on");
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
