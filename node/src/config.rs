//! The configuration of `ambit-node`: one file, and flags or environment over its keys.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ambit_runtime::settings::{self, SettingsError};
use ambit_telemetry::logging::LogFormat;
use clap::{Args, Parser, Subcommand};
use serde::{Deserialize, Serialize};

use crate::AgentConfig;
use crate::cni::conflist::Entry;
use crate::cni::install::Installation;
use crate::discovery::Discovery;
use crate::enrol::Settings;

/// What the program is to do.
#[derive(Debug, Clone)]
pub enum Task {
    /// Be the agent of a node.
    Agent(Config),
    /// Remove everything from a node.
    Uninstall {
        /// The configuration of the agent that made it.
        config: Config,
        /// Whether to stay and answer readiness when it is done.
        wait: bool,
    },
}

/// The agent's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's name.
    pub node: String,
    /// The agent's own settings.
    pub agent: AgentConfig,
    /// Which pods are enrolled.
    pub enrolment: Settings,
    /// The plugin's installation; `None`: somebody else installs it.
    pub installation: Option<Installation>,
    /// The socket that the CNI plugin dials.
    pub cni_socket: PathBuf,
    /// Locked while an agent runs on the node.
    pub lock: PathBuf,
    /// Whether the node's taint is taken off.
    pub remove_taint: bool,
    /// Where metrics are served.
    pub metrics: SocketAddr,
    /// Where readiness is served.
    pub readiness: SocketAddr,
    /// Where the admin interface is served; it takes commands.
    pub admin: SocketAddr,
    /// Levels of the program's log.
    pub log_level: String,
    /// Form of the program's log.
    pub log_format: LogFormat,
}

/// The node agent of Ambit.
#[derive(Debug, Parser)]
#[command(name = "ambit-node", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Enrols the pods of this node, and keeps the CNI plugin installed.
    Agent(Flags),
    /// Removes the CNI plugin, its configuration and every rule from this node. Waits until the agent has ended.
    Uninstall {
        #[command(flatten)]
        flags: Flags,
        /// Stay when it is done, and answer readiness.
        #[arg(long)]
        wait: bool,
    },
}

#[derive(Debug, Default, Args)]
struct Flags {
    /// Configuration file; flags and environment override its keys.
    #[arg(long, env = "AMBIT_NODE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Raw,
}

/// Every key, as flag, environment variable and key of the file.
#[derive(Debug, Default, Serialize, Deserialize, Args)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Raw {
    /// The node's name.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
    /// Ambit's own namespace, whose pods are never enrolled (default ambit-system).
    #[arg(long, env = "AMBIT_NODE_SYSTEM_NAMESPACE", value_name = "NAME")]
    system_namespace: Option<String>,
    /// Other namespaces whose pods are never enrolled; may be repeated (default kube-system).
    #[arg(
        long = "exclude-namespace",
        env = "AMBIT_NODE_EXCLUDE_NAMESPACES",
        value_name = "NAME",
        value_delimiter = ','
    )]
    exclude_namespaces: Option<Vec<String>>,
    /// RuntimeClass handler whose pods cannot be enrolled, * at its end for any characters; may be repeated (default
    /// those of gVisor and Kata Containers).
    #[arg(
        long = "unsupported-runtime",
        env = "AMBIT_NODE_UNSUPPORTED_RUNTIMES",
        value_name = "HANDLER",
        value_delimiter = ','
    )]
    unsupported_runtimes: Option<Vec<String>>,
    /// Whether DNS is captured in pods that say nothing about it (default true).
    #[arg(long, env = "AMBIT_NODE_DNS_CAPTURE", value_name = "BOOL")]
    dns_capture: Option<bool>,
    /// Whether the node proxy offers SOCKS5 in pods (default false).
    #[arg(long, env = "AMBIT_NODE_SOCKS5", value_name = "BOOL")]
    socks5: Option<bool>,
    /// The socket that node proxies dial (default /var/run/ztunnel/ztunnel.sock).
    #[arg(long, env = "AMBIT_NODE_ZDS_SOCKET", value_name = "PATH")]
    zds_socket: Option<PathBuf>,
    /// The socket that the CNI plugin dials, under the same path on the host (default /var/run/ambit/cni.sock).
    #[arg(long, env = "AMBIT_NODE_CNI_SOCKET", value_name = "PATH")]
    cni_socket: Option<PathBuf>,
    /// Directory of what must survive a restart of the agent (default /var/run/ambit/pods).
    #[arg(long, env = "AMBIT_NODE_REGISTRY", value_name = "DIR")]
    registry: Option<PathBuf>,
    /// Whether the agent installs the CNI plugin (default true).
    #[arg(long, env = "AMBIT_NODE_INSTALL_CNI", value_name = "BOOL")]
    install_cni: Option<bool>,
    /// The CNI plugin's program (default /usr/local/bin/ambit-cni).
    #[arg(long, env = "AMBIT_NODE_CNI_PROGRAM", value_name = "PATH")]
    cni_program: Option<PathBuf>,
    /// The host's directory of CNI plugins (default /host/cni/bin).
    #[arg(long, env = "AMBIT_NODE_CNI_BIN_DIR", value_name = "DIR")]
    cni_bin_dir: Option<PathBuf>,
    /// The host's directory of CNI configurations (default /host/cni/net.d).
    #[arg(long, env = "AMBIT_NODE_CNI_CONF_DIR", value_name = "DIR")]
    cni_conf_dir: Option<PathBuf>,
    /// Whether the plugin is chained into the first configuration; else it gets one of its own (default true).
    #[arg(long, env = "AMBIT_NODE_CHAINED", value_name = "BOOL")]
    chained: Option<bool>,
    /// User of kubelet's processes, whose connections to pods are probes (default 0).
    #[arg(long, env = "AMBIT_NODE_KUBELET_UID", value_name = "UID")]
    kubelet_uid: Option<u32>,
    /// Whether the node's taint ambit.dev/not-ready is taken off when pods can be enrolled (default true).
    #[arg(long, env = "AMBIT_NODE_REMOVE_TAINT", value_name = "BOOL")]
    remove_taint: Option<bool>,
    /// Where metrics are served (default 0.0.0.0:15020).
    #[arg(long, env = "AMBIT_NODE_METRICS", value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Where readiness is served (default 0.0.0.0:15021).
    #[arg(long, env = "AMBIT_NODE_READINESS", value_name = "ADDRESS")]
    readiness: Option<SocketAddr>,
    /// Where the admin interface is served: state of the agent and its pods, and the log's level (default 127.0.0.1:15000).
    #[arg(long, env = "AMBIT_NODE_ADMIN", value_name = "ADDRESS")]
    admin: Option<SocketAddr>,
    /// Levels of the log, as info or info,ambit_node=debug (default info).
    #[arg(long, env = "AMBIT_NODE_LOG_LEVEL", value_name = "LEVELS")]
    log_level: Option<String>,
    /// Form of the log: text or json (default text).
    #[arg(long, env = "AMBIT_NODE_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<String>,
}

/// Reads flags, environment and file. Asking for help or version ends the program.
///
/// # Errors
/// [`SettingsError`], naming the key.
pub fn from_command_line() -> Result<Task, SettingsError> {
    match Cli::parse().command {
        Command::Agent(flags) => Ok(Task::Agent(resolve(&flags)?)),
        Command::Uninstall { flags, wait } => Ok(Task::Uninstall { config: resolve(&flags)?, wait }),
    }
}

/// The reference page of all settings, in Markdown.
pub fn reference() -> String {
    let command = Raw::augment_args(clap::Command::new("ambit-node"));
    format!(
        "# Settings of ambit-node\n\nWritten from the program; `AMBIT_WRITE_DOCS=1 cargo test -p ambit-node reference` \
         writes it anew. [The node agent](node.md) says what it does and what it needs.\n\n{}",
        settings::table(&command)
    )
}

fn resolve(flags: &Flags) -> Result<Config, SettingsError> {
    finish(settings::resolve(flags.config.as_deref(), &flags.settings)?)
}

fn finish(raw: Raw) -> Result<Config, SettingsError> {
    let Raw {
        node_name,
        system_namespace,
        exclude_namespaces,
        unsupported_runtimes,
        dns_capture,
        socks5,
        zds_socket,
        cni_socket,
        registry,
        install_cni,
        cni_program,
        cni_bin_dir,
        cni_conf_dir,
        chained,
        kubelet_uid,
        remove_taint,
        metrics,
        readiness,
        admin,
        log_level,
        log_format,
    } = raw;
    let path = |given: Option<PathBuf>, default: &str| given.unwrap_or_else(|| default.into());
    let default = Settings::default();
    let mut excluded: Vec<String> = exclude_namespaces.unwrap_or_else(|| vec!["kube-system".into()]);
    excluded.push(system_namespace.unwrap_or_else(|| "ambit-system".into()));
    let enrolment = Settings {
        excluded_namespaces: excluded.into_iter().collect(),
        unsupported_runtimes: unsupported_runtimes
            .map_or(default.unsupported_runtimes, |given| given.into_iter().collect()),
        dns_capture: dns_capture.unwrap_or(default.dns_capture),
        socks5: socks5.unwrap_or(default.socks5),
    };
    let cni_socket = path(cni_socket, "/var/run/ambit/cni.sock");
    let registry = path(registry, "/var/run/ambit/pods");
    let installation = Installation {
        program: path(cni_program, "/usr/local/bin/ambit-cni"),
        bin_dir: path(cni_bin_dir, "/host/cni/bin"),
        conf_dir: path(cni_conf_dir, "/host/cni/net.d"),
        chained: chained.unwrap_or(true),
        entry: entry(&cni_socket, &enrolment),
    };
    let mut agent = AgentConfig::new(path(zds_socket, "/var/run/ztunnel/ztunnel.sock"), &registry);
    agent.discovery = Discovery::of_node();
    agent.kubelet_uid = Some(kubelet_uid.unwrap_or(0));
    let everywhere = |port| SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    Ok(Config {
        node: node_name.ok_or(SettingsError::Missing("nodeName"))?,
        agent,
        enrolment,
        installation: install_cni.unwrap_or(true).then_some(installation),
        lock: registry.with_extension("lock"),
        cni_socket,
        remove_taint: remove_taint.unwrap_or(true),
        metrics: metrics.unwrap_or_else(|| everywhere(15020)),
        readiness: readiness.unwrap_or_else(|| everywhere(15021)),
        admin: admin.unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, 15000))),
        log_level: log_level.unwrap_or_else(|| "info".into()),
        log_format: log_format_of(log_format.as_deref())?,
    })
}

fn entry(cni_socket: &Path, enrolment: &Settings) -> Entry {
    Entry {
        socket: cni_socket.display().to_string(),
        excluded_namespaces: enrolment.excluded_namespaces.iter().cloned().collect(),
    }
}

fn log_format_of(given: Option<&str>) -> Result<LogFormat, SettingsError> {
    match given {
        None | Some("text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(SettingsError::Value {
            key: "logFormat",
            reason: format!("{other:?} is neither \"text\" nor \"json\""),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_namespace_is_always_excluded() {
        let raw = Raw {
            node_name: Some("n1".into()),
            system_namespace: Some("mesh".into()),
            exclude_namespaces: Some(vec![]),
            ..Raw::default()
        };
        let config = finish(raw).unwrap();
        assert_eq!(config.installation.unwrap().entry.excluded_namespaces, ["mesh"]);
        assert!(matches!(finish(Raw::default()), Err(SettingsError::Missing("nodeName"))));
    }

    #[test]
    fn the_reference_page_is_that_of_the_program() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/node-settings.md");
        if std::env::var_os("AMBIT_WRITE_DOCS").is_some() {
            std::fs::write(path, reference()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), reference(), "AMBIT_WRITE_DOCS=1 writes it anew");
    }
}
