//! The program's configuration: one file, and flags or environment over its keys.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ambit_api::ports;
use ambit_ca::{AuthorityConfig, NodeProxy};
use ambit_identity::TrustDomain;
use ambit_runtime::configuration::common::LogFormat;
use ambit_runtime::configuration::{self, Settings, Span};
use ambit_telemetry::logging;
use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use ambit_runtime::configuration::ConfigError;

use crate::index::{self, L7DenyAtL4};
use crate::mesh_config::{self, MeshSettings};
use crate::serve::port::PortLimits;
use crate::source::SourceName;
use crate::write::deployments::Template;

/// The configuration of the control plane.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where objects come from; for the same object the first named counts.
    pub sources: Vec<SourceName>,
    /// Where xDS and CA are served.
    pub listen: SocketAddr,
    /// Names on the certificate of that port.
    pub server_names: Vec<String>,
    /// The CA's files; a self-signed root is made there if there is none. `None`: Secrets of the system namespace.
    pub ca_dir: Option<PathBuf>,
    /// Longest lifetime of a certificate, whatever is asked for.
    pub max_certificate_lifetime: Duration,
    /// How long a new root is published before it signs. None: until every workload has renewed its certificate.
    pub root_propagation: Option<Duration>,
    /// Age at which a connection of a proxy ends, so that it is made again.
    pub max_connection_age: Duration,
    /// Connections of the port at the same time.
    pub max_connections: usize,
    /// Roots of servers of key sets, beside Mozilla's.
    pub key_set_roots: Option<PathBuf>,
    /// Age at which key sets are fetched again.
    pub key_set_refresh: Duration,
    /// Addresses that key sets are not fetched from, beside those of this host and link.
    pub key_set_blocked_cidrs: Vec<IpNet>,
    /// Key set that callers' tokens are verified with. `None`: the API server reviews them.
    pub jwks: Option<PathBuf>,
    /// Audiences of which a token must name one.
    pub audiences: Vec<String>,
    /// Service accounts that may ask for the identities of pods on their node.
    pub trusted_node_proxies: Vec<NodeProxy>,
    /// Where the CA's roots are written.
    pub root_out: Option<PathBuf>,
    /// Ambit's own namespace.
    pub system_namespace: String,
    /// Trust domain of the mesh.
    pub trust_domain: TrustDomain,
    /// What the index needs to know.
    pub index: index::Settings,
    /// What waypoints are deployed from; `None`: none are deployed.
    pub waypoint_template: Option<Template>,
    /// `gatewayClassName`s of waypoints that are deployed.
    pub deployed_waypoint_classes: Vec<Arc<str>>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Where readiness is served.
    pub readiness: Option<SocketAddr>,
    /// Where the admin interface is served.
    pub admin: Option<SocketAddr>,
    /// Where the admin interface takes commands: an address of the loopback interface.
    pub commands: Option<SocketAddr>,
    /// Levels of the program's log.
    pub log_level: String,
    /// Form of the program's log.
    pub log_format: logging::LogFormat,
}

/// Every setting of the control plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ControlSettings {
    /// Where objects come from: kubernetes (the cluster that the program runs in), kubernetes:KUBECONFIG, or dir:PATH.
    #[schemars(extend("x-flag" = "source"))]
    sources: Vec<String>,
    /// Where xDS and CA are served.
    listen: SocketAddr,
    /// Names on the certificate of that port. None: those of the service ambit-control.
    #[schemars(extend("x-flag" = "server-name"))]
    server_names: Option<Vec<String>>,
    /// Directory of the CA's files. None, with Kubernetes: Secrets cacerts or istio-ca-secret of the system namespace.
    ca_dir: Option<PathBuf>,
    /// Longest lifetime of a certificate, whatever is asked for; from 10 seconds to 90 days. A change of roots may take six
    /// tenths of it.
    max_certificate_lifetime: Span,
    /// How long a new root is published before it signs. None: until every workload has renewed its certificate, at
    /// least five minutes.
    root_propagation: Option<Span>,
    /// Age at which a connection of a proxy ends and is made again.
    max_connection_age: Span,
    /// Connections of proxies at the same time; the limit of open files may allow fewer.
    max_connections: usize,
    /// JSON Web Key Set that callers' tokens are verified with. None, with Kubernetes: the API server reviews them.
    jwks: Option<PathBuf>,
    /// Audiences of tokens, of which a token must name one.
    #[schemars(extend("x-flag" = "audience"))]
    audiences: Vec<String>,
    /// Service accounts of node proxies, NAMESPACE/NAME. None: ztunnel in the system namespace.
    #[schemars(extend("x-flag" = "trusted-node-proxy"))]
    trusted_node_proxies: Option<Vec<String>>,
    /// Where the CA's roots are written.
    root_out: Option<PathBuf>,
    /// Trust domain of the mesh.
    trust_domain: String,
    /// Name of the cluster.
    cluster_id: String,
    /// Network of workloads that name none.
    network: String,
    /// Suffix of service hosts.
    cluster_domain: String,
    /// Ambit's own namespace.
    system_namespace: String,
    /// Namespace whose policies are for the whole mesh. None: the system namespace.
    root_namespace: Option<String>,
    /// `gatewayClassName`s of waypoints.
    #[schemars(extend("x-flag" = "waypoint-class"))]
    waypoint_classes: Vec<String>,
    /// `gatewayClassName`s of gateways for clients outside the mesh.
    #[schemars(extend("x-flag" = "gateway-class"))]
    gateway_classes: Vec<String>,
    /// File with the template of waypoints' manifests, which the chart makes of its `waypoint` values. None: none are deployed.
    waypoint_template: Option<PathBuf>,
    /// `gatewayClassName`s of waypoints that are deployed, whose GatewayClass is made.
    #[schemars(extend("x-flag" = "deployed-waypoint-class"))]
    deployed_waypoint_classes: Vec<String>,
    /// What a DENY rule that names HTTP attributes alone does without a waypoint: ignore or deny.
    #[serde(rename = "l7DenyAtL4")]
    l7_deny_at_l4: L7DenyAtL4,
    /// File with the part of Istio's MeshConfig that is followed, which the chart makes of its `meshConfig` value:
    /// `extensionProviders` (external authorizers, and who takes spans and log records), `defaultProviders` and
    /// `defaultConfig.gatewayTopology`. None: policies with the action CUSTOM deny, there are no spans, and gateways believe no proxy in
    /// front of them.
    mesh_config: Option<PathBuf>,
    /// PEM file with roots of the servers that key sets of RequestAuthentications are fetched from, beside those of Mozilla.
    key_set_roots: Option<PathBuf>,
    /// Age at which such key sets are fetched again; at least ten seconds.
    key_set_refresh: Span,
    /// Networks that such key sets are never fetched from, as 10.96.0.0/12; those of this host and link never are.
    #[schemars(extend("x-flag" = "key-set-blocked-cidr"))]
    key_set_blocked_cidrs: Vec<String>,
    /// Where metrics are served.
    metrics: Option<SocketAddr>,
    /// Where readiness is served.
    readiness: Option<SocketAddr>,
    /// Where the admin interface is served. It takes commands if that is an address of the loopback interface.
    admin: Option<SocketAddr>,
    /// Where the admin interface takes commands beside that: an address of the loopback interface.
    commands: Option<SocketAddr>,
    /// Levels of the log, as info or info,ambit_control=debug.
    log_level: String,
    /// Form of the log: text or json.
    log_format: LogFormat,
}

impl Default for ControlSettings {
    fn default() -> Self {
        let index = index::Settings::default();
        Self {
            sources: Vec::new(),
            listen: (Ipv4Addr::UNSPECIFIED, ports::CONTROL_PLANE).into(),
            server_names: None,
            ca_dir: None,
            max_certificate_lifetime: Span::from_secs(AuthorityConfig::DEFAULT_MAX_LIFETIME.as_secs()),
            root_propagation: None,
            max_connection_age: Span::from_secs(PortLimits::MAX_AGE.as_secs()),
            max_connections: PortLimits::MAX_CONNECTIONS,
            jwks: None,
            audiences: vec!["istio-ca".into()],
            trusted_node_proxies: None,
            root_out: None,
            trust_domain: index.trust_domain.to_string(),
            cluster_id: index.cluster_id.to_string(),
            network: index.network.to_string(),
            cluster_domain: index.cluster_domain.to_string(),
            system_namespace: index.root_namespace.to_string(),
            root_namespace: None,
            waypoint_classes: index.waypoint_classes.iter().map(ToString::to_string).collect(),
            gateway_classes: index.gateway_classes.iter().map(ToString::to_string).collect(),
            waypoint_template: None,
            deployed_waypoint_classes: vec!["ambit-waypoint".into()],
            l7_deny_at_l4: index.l7_deny_at_l4,
            mesh_config: None,
            key_set_roots: None,
            key_set_refresh: Span::from_secs(1200),
            key_set_blocked_cidrs: Vec::new(),
            metrics: None,
            readiness: None,
            admin: None,
            commands: None,
            log_level: "info".into(),
            log_format: LogFormat::Text,
        }
    }
}

impl Settings for ControlSettings {
    const PROGRAM: &'static str = "ambit-control";
    const ABOUT: &'static str =
        "Turns Kubernetes objects into configuration for the mesh's proxies, and issues their certificates";

    fn validate(&self) -> Result<(), ConfigError> {
        // Certificate contract: maximum 90 days; below ten seconds renewal can't keep up.
        if !(Duration::from_secs(10)..=AuthorityConfig::MAX_LIFETIME)
            .contains(&self.max_certificate_lifetime.get())
        {
            return Err(invalid("maxCertificateLifetime", "is not between 10 seconds and 90 days"));
        }
        if self.max_connection_age.get() < Duration::from_secs(1) {
            return Err(invalid("maxConnectionAge", "is less than a second"));
        }
        if self.key_set_refresh.get() < Duration::from_secs(10) {
            return Err(invalid("keySetRefresh", "is less than ten seconds"));
        }
        if self.max_connections == 0 {
            return Err(invalid("maxConnections", "is 0: no proxy could ever connect"));
        }
        Ok(())
    }
}

/// Reads flags, environment and file.
///
/// # Errors
/// [`ConfigError`], naming the key. [`ConfigError::Arguments`] is also how `--help` and `--version` end;
/// `clap::Error::exit` prints and exits as they should.
pub fn from_environment(arguments: impl IntoIterator<Item = OsString>) -> Result<Config, ConfigError> {
    resolve(configuration::from_environment(arguments)?)
}

/// The reference page of all settings, in Markdown.
pub fn reference() -> String {
    configuration::reference::<ControlSettings>(
        "# Settings of ambit-control\n\nWritten from the program; `AMBIT_WRITE_DOCS=1 cargo test -p ambit-control reference` \
         writes it anew. Each key is also a variable (`clusterId` is `AMBIT_CONTROL_CLUSTER_ID`) and a flag (`--cluster-id`). \
         [Configure the control plane](control.md) explains how to set them.",
    )
}

fn resolve(settings: ControlSettings) -> Result<Config, ConfigError> {
    let ControlSettings {
        sources,
        listen,
        server_names,
        ca_dir,
        max_certificate_lifetime,
        root_propagation,
        max_connection_age,
        max_connections,
        jwks,
        audiences,
        trusted_node_proxies,
        root_out,
        trust_domain,
        cluster_id,
        network,
        cluster_domain,
        system_namespace: system,
        root_namespace,
        waypoint_classes,
        gateway_classes,
        waypoint_template,
        deployed_waypoint_classes,
        l7_deny_at_l4,
        mesh_config,
        key_set_roots,
        key_set_refresh,
        key_set_blocked_cidrs,
        metrics,
        readiness,
        admin,
        commands,
        log_level,
        log_format,
    } = settings;
    let sources = parse_sources(&sources)?;
    let mesh = mesh_config.as_deref().map(read_mesh_config).transpose()?.unwrap_or_default();
    let ca_dir = needed(&sources, ca_dir, "caDir")?;
    let jwks = needed(&sources, jwks, "jwks")?;
    let trust_domain = TrustDomain::new(&trust_domain).map_err(|error| invalid("trustDomain", error))?;
    let proxies = trusted_node_proxies.unwrap_or_else(|| vec![format!("{system}/ztunnel")]);
    if let Some(both) = gateway_classes.iter().find(|class| waypoint_classes.contains(class)) {
        return Err(invalid("gatewayClasses", format!("{both} is among waypointClasses too")));
    }
    if let Some(unknown) = deployed_waypoint_classes.iter().find(|class| !waypoint_classes.contains(class)) {
        return Err(invalid("deployedWaypointClasses", format!("{unknown} is not among waypointClasses")));
    }
    Ok(Config {
        sources,
        listen,
        server_names: server_names.unwrap_or_else(|| service_names(&system)),
        ca_dir,
        max_certificate_lifetime: max_certificate_lifetime.get(),
        root_propagation: root_propagation.map(Span::get),
        max_connection_age: max_connection_age.get(),
        max_connections,
        key_set_roots,
        key_set_refresh: key_set_refresh.get(),
        key_set_blocked_cidrs: key_set_blocked_cidrs
            .iter()
            .map(|text| cidr(text))
            .collect::<Result<_, _>>()?,
        jwks,
        audiences,
        trusted_node_proxies: proxies.iter().map(|text| node_proxy(text)).collect::<Result<_, _>>()?,
        root_out,
        index: index::Settings {
            cluster_id: cluster_id.into(),
            network: network.into(),
            trust_domain: trust_domain.as_str().into(),
            cluster_domain: cluster_domain.into(),
            root_namespace: root_namespace.unwrap_or_else(|| system.clone()).into(),
            waypoint_classes: waypoint_classes.into_iter().map(Arc::from).collect(),
            gateway_classes: gateway_classes.into_iter().map(Arc::from).collect(),
            ingress_namespace: system.as_str().into(),
            l7_deny_at_l4,
            authorizers: mesh.authorizers,
            gateway_topology: mesh.gateway_topology,
            telemetry: mesh.telemetry,
        },
        waypoint_template: waypoint_template.as_deref().map(read_template).transpose()?,
        deployed_waypoint_classes: deployed_waypoint_classes.into_iter().map(Arc::from).collect(),
        system_namespace: system,
        trust_domain,
        metrics,
        readiness,
        admin,
        commands: commands.map(loopback).transpose()?,
        log_level,
        log_format: log_format.into(),
    })
}

fn loopback(address: SocketAddr) -> Result<SocketAddr, ConfigError> {
    match address.ip().is_loopback() {
        true => Ok(address),
        false => Err(invalid("commands", format!("{address} can be reached from other hosts"))),
    }
}

fn read_template(path: &Path) -> Result<Template, ConfigError> {
    Template::read(path).map_err(|error| invalid("waypointTemplate", format!("{}: {error}", path.display())))
}

fn read_mesh_config(path: &Path) -> Result<MeshSettings, ConfigError> {
    mesh_config::read(path).map_err(|error| invalid("meshConfig", format!("{}: {error}", path.display())))
}

/// Reads the sources. An API server is the only one: with others, the owner of an object would be ambiguous.
fn parse_sources(sources: &[String]) -> Result<Vec<SourceName>, ConfigError> {
    let parsed = sources.iter().map(|source| source.parse().map_err(|error| invalid("sources", error)));
    let parsed: Vec<SourceName> = parsed.collect::<Result<_, _>>()?;
    if parsed.is_empty() {
        return Err(invalid("sources", "is not set; it says where objects come from"));
    }
    if parsed.len() > 1 && has_api_server(&parsed) {
        return Err(invalid("sources", "has others beside kubernetes, which can only be the only one"));
    }
    Ok(parsed)
}

fn has_api_server(sources: &[SourceName]) -> bool {
    sources.iter().any(|source| matches!(source, SourceName::Kubernetes { .. }))
}

/// A file that stands for what an API server would do.
fn needed(
    sources: &[SourceName],
    given: Option<PathBuf>,
    key: &'static str,
) -> Result<Option<PathBuf>, ConfigError> {
    match given {
        None if !has_api_server(sources) => {
            Err(invalid(key, "is not set; it is needed where no source is kubernetes"))
        }
        given => Ok(given),
    }
}

/// The names of the service `ambit-control` and of this machine.
fn service_names(system: &str) -> Vec<String> {
    let service = format!("ambit-control.{system}.svc");
    vec![
        service.clone(),
        format!("{service}.cluster.local"),
        format!("ambit-control.{system}"),
        "localhost".to_owned(),
    ]
}

fn node_proxy(text: &str) -> Result<NodeProxy, ConfigError> {
    match text.split_once('/') {
        Some((namespace, account)) if !namespace.is_empty() && !account.is_empty() => {
            Ok(NodeProxy { namespace: namespace.to_owned(), service_account: account.to_owned() })
        }
        _ => Err(invalid("trustedNodeProxies", format!("names {text:?}, which is not NAMESPACE/NAME"))),
    }
}

fn cidr(text: &str) -> Result<IpNet, ConfigError> {
    text.parse().map_err(|_| invalid("keySetBlockedCidrs", format!("names {text:?}, which is no network")))
}

fn invalid(key: &str, reason: impl std::fmt::Display) -> ConfigError {
    ConfigError::value(key, reason.to_string())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
