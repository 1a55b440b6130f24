//! The program's configuration: one file, and flags or environment over its keys.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ambit_ca::{AuthorityConfig, NodeProxy};
use ambit_identity::TrustDomain;
use ambit_telemetry::logging::LogFormat;
use clap::{Args, Parser};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::index::{L7DenyAtL4, Settings};
use crate::serve::port::PortLimits;
use crate::source::SourceName;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file cannot be understood.
    #[error("configuration {path}: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its line.
        reason: String,
    },
    /// The file has a key that there is not.
    #[error("configuration {path}: unknown key {key:?}{suggestion}")]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The nearest key that there is.
        suggestion: String,
    },
    /// A value is missing.
    #[error("{0} must be given")]
    Missing(&'static str),
    /// A value cannot be.
    #[error("{key}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// Settings of the control plane.
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
    pub index: Settings,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Where readiness is served.
    pub readiness: Option<SocketAddr>,
    /// Where the admin interface is served.
    pub admin: Option<SocketAddr>,
    /// Levels of the program's log.
    pub log_level: String,
    /// Form of the program's log.
    pub log_format: LogFormat,
}

/// Turns Kubernetes objects into configuration for the mesh's proxies, and issues their certificates.
#[derive(Debug, Default, Parser)]
#[command(name = "ambit-control", version)]
pub struct Flags {
    /// Configuration file; flags and environment override its keys.
    #[arg(long, env = "AMBIT_CONTROL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Raw,
}

/// Every key, as flag, environment variable and key of the file.
#[derive(Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Raw {
    /// Where objects come from: kubernetes (the cluster that the program runs in), kubernetes:KUBECONFIG, or dir:PATH, which may be repeated.
    #[arg(long = "source", env = "AMBIT_CONTROL_SOURCE", value_name = "SOURCE", value_delimiter = ',')]
    sources: Option<Vec<String>>,
    /// Where xDS and CA are served (default 0.0.0.0:15012).
    #[arg(long, env = "AMBIT_CONTROL_LISTEN", value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Name on the certificate of that port; may be repeated (default: those of the service ambit-control).
    #[arg(
        long = "server-name",
        env = "AMBIT_CONTROL_SERVER_NAME",
        value_name = "NAME",
        value_delimiter = ','
    )]
    server_names: Option<Vec<String>>,
    /// Directory of the CA's files (default with Kubernetes: Secrets cacerts or istio-ca-secret of the system namespace).
    #[arg(long, env = "AMBIT_CONTROL_CA_DIR", value_name = "DIR")]
    ca_dir: Option<PathBuf>,
    /// Longest lifetime of a certificate in seconds, 10 or more, whatever is asked for, and 90 days at most (default 24 hours). A change of roots may take six tenths of it.
    #[arg(long, env = "AMBIT_CONTROL_MAX_CERTIFICATE_LIFETIME", value_name = "SECONDS")]
    max_certificate_lifetime: Option<u64>,
    /// How long a new root is published before it signs, in seconds (default: until every workload has renewed its certificate, at least 300).
    #[arg(long, env = "AMBIT_CONTROL_ROOT_PROPAGATION", value_name = "SECONDS")]
    root_propagation: Option<u64>,
    /// Age in seconds at which a connection of a proxy ends and is made again (default 1800).
    #[arg(long, env = "AMBIT_CONTROL_MAX_CONNECTION_AGE", value_name = "SECONDS")]
    max_connection_age: Option<u64>,
    /// Connections of proxies at the same time; the limit of open files may allow fewer (default 32768).
    #[arg(long, env = "AMBIT_CONTROL_MAX_CONNECTIONS", value_name = "NUMBER")]
    max_connections: Option<usize>,
    /// JSON Web Key Set that callers' tokens are verified with (default with Kubernetes: the API server reviews them).
    #[arg(long, env = "AMBIT_CONTROL_JWKS", value_name = "FILE")]
    jwks: Option<PathBuf>,
    /// Audience of tokens; may be repeated (default istio-ca).
    #[arg(long = "audience", env = "AMBIT_CONTROL_AUDIENCE", value_name = "NAME", value_delimiter = ',')]
    audiences: Option<Vec<String>>,
    /// Service account of node proxies, NAMESPACE/NAME; may be repeated (default: ztunnel in the system namespace).
    #[arg(
        long = "trusted-node-proxy",
        env = "AMBIT_CONTROL_TRUSTED_NODE_PROXY",
        value_name = "ACCOUNT",
        value_delimiter = ','
    )]
    trusted_node_proxies: Option<Vec<String>>,
    /// Where the CA's roots are written.
    #[arg(long, env = "AMBIT_CONTROL_ROOT_OUT", value_name = "FILE")]
    root_out: Option<PathBuf>,
    /// Trust domain of the mesh (default cluster.local).
    #[arg(long, env = "AMBIT_CONTROL_TRUST_DOMAIN", value_name = "NAME")]
    trust_domain: Option<String>,
    /// Name of the cluster (default Kubernetes).
    #[arg(long, env = "AMBIT_CONTROL_CLUSTER_ID", value_name = "NAME")]
    cluster_id: Option<String>,
    /// Network of workloads that name none (default: empty).
    #[arg(long, env = "AMBIT_CONTROL_NETWORK", value_name = "NAME")]
    network: Option<String>,
    /// Suffix of service hosts (default cluster.local).
    #[arg(long, env = "AMBIT_CONTROL_CLUSTER_DOMAIN", value_name = "NAME")]
    cluster_domain: Option<String>,
    /// Ambit's own namespace (default ambit-system).
    #[arg(long, env = "AMBIT_CONTROL_SYSTEM_NAMESPACE", value_name = "NAME")]
    system_namespace: Option<String>,
    /// Namespace whose policies are for the whole mesh (default: the system namespace).
    #[arg(long, env = "AMBIT_CONTROL_ROOT_NAMESPACE", value_name = "NAME")]
    root_namespace: Option<String>,
    /// gatewayClassName of waypoints; may be repeated (default ambit-waypoint, istio-waypoint).
    #[arg(
        long = "waypoint-class",
        env = "AMBIT_CONTROL_WAYPOINT_CLASS",
        value_name = "NAME",
        value_delimiter = ','
    )]
    waypoint_classes: Option<Vec<String>>,
    /// What a DENY rule that names HTTP attributes alone does without a waypoint: ignore or deny (default ignore).
    #[arg(long, env = "AMBIT_CONTROL_L7_DENY_AT_L4", value_name = "EFFECT")]
    #[serde(rename = "l7DenyAtL4")]
    l7_deny_at_l4: Option<L7DenyAtL4>,
    /// Where metrics are served.
    #[arg(long, env = "AMBIT_CONTROL_METRICS", value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Where readiness is served.
    #[arg(long, env = "AMBIT_CONTROL_READINESS", value_name = "ADDRESS")]
    readiness: Option<SocketAddr>,
    /// Where the admin interface is served.
    #[arg(long, env = "AMBIT_CONTROL_ADMIN", value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    /// Levels of the log, as info or info,ambit_control=debug (default info).
    #[arg(long, env = "AMBIT_CONTROL_LOG_LEVEL", value_name = "LEVELS")]
    log_level: Option<String>,
    /// Form of the log: text or json (default text).
    #[arg(long, env = "AMBIT_CONTROL_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<String>,
}

/// Reads flags, environment and file. Asking for help or version ends the program.
///
/// # Errors
/// [`ConfigError`], naming the key.
pub fn from_command_line() -> Result<Config, ConfigError> {
    resolve(&Flags::parse())
}

/// Brings flags and file together.
///
/// # Errors
/// [`ConfigError`], naming the key.
pub fn resolve(flags: &Flags) -> Result<Config, ConfigError> {
    let mut settings = match &flags.config {
        Some(path) => given(&read_file(path)?),
        None => Map::new(),
    };
    // Flags and environment override the file, key by key.
    settings.extend(given(&flags.settings));
    let raw = serde_json::from_value(Value::Object(settings));
    finish(raw.map_err(|error| invalid("settings", error))?)
}

/// The keys that have a value.
fn given(raw: &Raw) -> Map<String, Value> {
    match serde_json::to_value(raw) {
        Ok(Value::Object(keys)) => keys.into_iter().filter(|(_, value)| !value.is_null()).collect(),
        _ => Map::new(),
    }
}

fn read_file(path: &Path) -> Result<Raw, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let parse = |error: serde_saphyr::Error| ConfigError::Parse {
        path: path.to_owned(),
        reason: error.without_snippet().to_string(),
    };
    let keys: BTreeMap<String, Value> = serde_saphyr::from_str(&text).map_err(parse)?;
    let known = known_keys();
    if let Some(key) = keys.keys().find(|key| !known.contains(key)) {
        return Err(ConfigError::UnknownKey {
            path: path.to_owned(),
            suggestion: nearest(&known, key),
            key: key.clone(),
        });
    }
    serde_saphyr::from_str(&text).map_err(parse)
}

/// The keys of the file.
fn known_keys() -> Vec<String> {
    match serde_json::to_value(Raw::default()) {
        Ok(Value::Object(keys)) => keys.into_iter().map(|(key, _)| key).collect(),
        _ => Vec::new(),
    }
}

fn nearest(known: &[String], key: &str) -> String {
    let near = known.iter().map(|known| (strsim::damerau_levenshtein(known, key), known)).min();
    near.map(|(_, known)| format!(", did you mean {known:?}?")).unwrap_or_default()
}

/// The reference page of all settings, in Markdown.
pub fn reference() -> String {
    let mut page = String::from(
        "# Settings of ambit-control\n\nWritten from the program; `AMBIT_WRITE_DOCS=1 cargo test -p ambit-control reference` writes it \
         anew. [Configure the control plane](control.md) explains how to set them.\n\n| key | flag | variable | meaning |\n\
         | --- | --- | --- | --- |\n",
    );
    let command = Raw::augment_args(clap::Command::new("ambit-control"));
    for argument in command.get_arguments().filter(|argument| argument.get_env().is_some()) {
        let key = camel_case(argument.get_id().as_str());
        let flag = argument.get_long().unwrap_or_default();
        let variable = argument.get_env().map(|name| name.to_string_lossy()).unwrap_or_default();
        let meaning = argument.get_help().map(ToString::to_string).unwrap_or_default();
        page.push_str(&format!("| `{key}` | `--{flag}` | `{variable}` | {meaning} |\n"));
    }
    page
}

/// A field's name as its key in the file.
fn camel_case(field: &str) -> String {
    let mut words = field.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |key, word| {
        let (head, tail) = word.split_at(word.len().min(1));
        key + &head.to_uppercase() + tail
    })
}

fn finish(raw: Raw) -> Result<Config, ConfigError> {
    let Raw {
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
        system_namespace,
        root_namespace,
        waypoint_classes,
        l7_deny_at_l4,
        metrics,
        readiness,
        admin,
        log_level,
        log_format,
    } = raw;
    let defaults = Settings::default();
    let system = system_namespace.unwrap_or_else(|| defaults.root_namespace.to_string());
    let trust_domain = trust_domain.as_deref().unwrap_or(&defaults.trust_domain);
    let trust_domain = TrustDomain::new(trust_domain).map_err(|error| invalid("trustDomain", error))?;
    let sources = sources.filter(|s| !s.is_empty()).ok_or(ConfigError::Missing("--source"))?;
    let sources = sources
        .iter()
        .map(|source| source.parse().map_err(|error| invalid("sources", error)))
        .collect::<Result<Vec<SourceName>, _>>()?;
    let has_api_server = has_api_server(&sources)?;
    let needed = |given: Option<PathBuf>, flag| match given {
        None if !has_api_server => Err(ConfigError::Missing(flag)),
        given => Ok(given),
    };
    let proxies = trusted_node_proxies.unwrap_or_else(|| vec![format!("{system}/ztunnel")]);
    let classes = waypoint_classes.map(|classes| classes.into_iter().map(Arc::from).collect());
    Ok(Config {
        sources,
        listen: listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], 15012))),
        server_names: server_names.unwrap_or_else(|| service_names(&system)),
        ca_dir: needed(ca_dir, "--ca-dir")?,
        max_certificate_lifetime: max_lifetime(max_certificate_lifetime)?,
        root_propagation: root_propagation.map(Duration::from_secs),
        max_connection_age: max_connection_age
            .map_or(PortLimits::MAX_AGE, |seconds| Duration::from_secs(seconds.max(1))),
        max_connections: max_connections.unwrap_or(PortLimits::MAX_CONNECTIONS).max(1),
        jwks: needed(jwks, "--jwks")?,
        audiences: audiences.unwrap_or_else(|| vec!["istio-ca".to_owned()]),
        trusted_node_proxies: proxies.iter().map(|text| node_proxy(text)).collect::<Result<_, _>>()?,
        root_out,
        index: Settings {
            cluster_id: cluster_id.map_or(defaults.cluster_id, Arc::from),
            network: network.map_or(defaults.network, Arc::from),
            trust_domain: trust_domain.as_str().into(),
            cluster_domain: cluster_domain.map_or(defaults.cluster_domain, Arc::from),
            root_namespace: root_namespace.unwrap_or_else(|| system.clone()).into(),
            waypoint_classes: classes.unwrap_or(defaults.waypoint_classes),
            l7_deny_at_l4: l7_deny_at_l4.unwrap_or_default(),
        },
        system_namespace: system,
        trust_domain,
        metrics,
        readiness,
        admin,
        log_level: log_level.unwrap_or_else(|| "info".to_owned()),
        log_format: form_of_log(log_format.as_deref())?,
    })
}

/// Whether the only source is an API server. With others, the owner of an object would be ambiguous.
fn has_api_server(sources: &[SourceName]) -> Result<bool, ConfigError> {
    let is_api_server = |source: &SourceName| matches!(source, SourceName::Kubernetes { .. });
    match sources.iter().any(is_api_server) {
        true if sources.len() > 1 => Err(invalid("sources", "kubernetes can be the only source alone")),
        any => Ok(any),
    }
}

/// contracts.md, section 5: maximum 90 days; below ten seconds renewal can't keep up.
fn max_lifetime(seconds: Option<u64>) -> Result<Duration, ConfigError> {
    let most = AuthorityConfig::MAX_LIFETIME;
    match seconds.map(Duration::from_secs) {
        None => Ok(AuthorityConfig::DEFAULT_MAX_LIFETIME),
        Some(limit) if limit >= Duration::from_secs(10) && limit <= most => Ok(limit),
        Some(limit) => {
            Err(invalid("maxCertificateLifetime", format!("{limit:?} is not between 10 s and 90 days")))
        }
    }
}

fn form_of_log(text: Option<&str>) -> Result<LogFormat, ConfigError> {
    match text {
        None | Some("text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(invalid("logFormat", format!("{other:?} is neither text nor json"))),
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
        _ => Err(invalid("trustedNodeProxies", format!("{text:?} is not NAMESPACE/NAME"))),
    }
}

fn invalid(key: &'static str, reason: impl std::fmt::Display) -> ConfigError {
    ConfigError::Value { key, reason: format!("{reason}") }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
