//! The configuration of `ambit-node`: one file, and flags or environment over its keys.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ambit_api::ports;
use ambit_runtime::configuration::common::LogFormat;
use ambit_runtime::configuration::{self, ForeignVariable, Settings};
use ambit_telemetry::logging;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, Command};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use ambit_runtime::configuration::ConfigError;

use crate::AgentConfig;
use crate::cni::conflist::Entry;
use crate::cni::install::{Installation, Placement};
use crate::discovery::Discovery;
use crate::enrol;

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
    /// Try out what an agent of this configuration would need.
    Probe(Config),
}

/// The agent's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The node's name.
    pub node: String,
    /// The agent's own settings.
    pub agent: AgentConfig,
    /// Which pods are enrolled.
    pub enrolment: enrol::Settings,
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
    pub log_format: logging::LogFormat,
}

/// Every setting of the agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct NodeSettings {
    /// The node's name. The variable `NODE_NAME` sets it too.
    node_name: String,
    /// Ambit's own namespace, whose pods are never enrolled.
    system_namespace: String,
    /// Other namespaces whose pods are never enrolled.
    exclude_namespaces: Vec<String>,
    /// RuntimeClass handlers whose pods cannot be enrolled; * at the end of one stands for any characters.
    unsupported_runtimes: Vec<String>,
    /// Whether DNS is captured in pods that say nothing about it.
    dns_capture: bool,
    /// Whether the node proxy offers SOCKS5 in pods.
    socks5: bool,
    /// The socket that node proxies dial.
    zds_socket: PathBuf,
    /// The socket that the CNI plugin dials, under the same path on the host.
    cni_socket: PathBuf,
    /// Directory of what must survive a restart of the agent.
    registry: PathBuf,
    /// Whether the agent installs the CNI plugin.
    install_cni: bool,
    /// The CNI plugin's program.
    cni_program: PathBuf,
    /// The host's directory of CNI plugins.
    cni_bin_dir: PathBuf,
    /// The host's directory of CNI configurations.
    cni_conf_dir: PathBuf,
    /// Whether the plugin is chained into the first configuration; else it gets one of its own.
    chained: bool,
    /// Whether the plugin is chained into a copy of the first configuration that sorts before it: the owner of the first
    /// configuration may rewrite that, at a boot above all, and pods still meet the plugin.
    own_list: bool,
    /// User of kubelet's processes, whose connections to pods are probes.
    kubelet_uid: u32,
    /// Whether the node's taint ambit.dev/not-ready is taken off when pods can be enrolled.
    remove_taint: bool,
    /// Where metrics are served.
    metrics: SocketAddr,
    /// Where readiness is served.
    readiness: SocketAddr,
    /// Where the admin interface is served: state of the agent and its pods, and the log's level.
    admin: SocketAddr,
    /// Levels of the log, as info or info,ambit_node=debug.
    log_level: String,
    /// Form of the log: text or json.
    log_format: LogFormat,
}

impl Default for NodeSettings {
    fn default() -> Self {
        let enrolment = enrol::Settings::default();
        Self {
            node_name: String::new(),
            system_namespace: "ambit-system".into(),
            exclude_namespaces: vec!["kube-system".into()],
            unsupported_runtimes: enrolment.unsupported_runtimes.into_iter().collect(),
            dns_capture: enrolment.dns_capture,
            socks5: enrolment.socks5,
            zds_socket: "/var/run/ztunnel/ztunnel.sock".into(),
            cni_socket: "/var/run/ambit/cni.sock".into(),
            registry: "/var/run/ambit/pods".into(),
            install_cni: true,
            cni_program: "/usr/local/bin/ambit-cni".into(),
            cni_bin_dir: "/host/cni/bin".into(),
            cni_conf_dir: "/host/cni/net.d".into(),
            chained: true,
            own_list: false,
            kubelet_uid: 0,
            remove_taint: true,
            metrics: (Ipv4Addr::UNSPECIFIED, ports::METRICS).into(),
            readiness: (Ipv4Addr::UNSPECIFIED, ports::READINESS).into(),
            admin: (Ipv4Addr::LOCALHOST, ports::ADMIN).into(),
            log_level: "info".into(),
            log_format: LogFormat::Text,
        }
    }
}

impl Settings for NodeSettings {
    const PROGRAM: &'static str = "ambit-node";
    const ABOUT: &'static str = "The node agent of Ambit";

    fn validate(&self) -> Result<(), ConfigError> {
        match self.node_name.as_str() {
            "" => Err(ConfigError::value("nodeName", "is not set; it is the name of the agent's node")),
            _ => Ok(()),
        }
    }

    fn foreign_variables(variables: &[(String, String)]) -> Result<Vec<ForeignVariable>, ConfigError> {
        let name = variables.iter().find(|(name, value)| name == "NODE_NAME" && !value.is_empty());
        let setting = |(_, text): &(String, String)| ForeignVariable::Setting {
            key: "nodeName",
            text: text.clone(),
            variable: "NODE_NAME",
        };
        Ok(name.map(setting).into_iter().collect())
    }
}

/// Reads flags, environment and file.
///
/// # Errors
/// [`ConfigError`], naming the key. [`ConfigError::Arguments`] is also how `--help` and `--version` end;
/// `clap::Error::exit` prints and exits as they should.
pub fn from_environment(arguments: impl IntoIterator<Item = OsString>) -> Result<Task, ConfigError> {
    match command().try_get_matches_from(arguments)?.subcommand() {
        Some(("uninstall", matches)) => {
            let config = configuration::from_matches(matches)?;
            Ok(Task::Uninstall { config: resolve(config), wait: matches.get_flag("wait") })
        }
        Some(("probe", matches)) => Ok(Task::Probe(resolve(configuration::from_matches(matches)?))),
        Some((_, matches)) => Ok(Task::Agent(resolve(configuration::from_matches(matches)?))),
        None => Err(command().error(ErrorKind::MissingSubcommand, "agent, uninstall or probe").into()),
    }
}

fn command() -> Command {
    let agent =
        Command::new("agent").about("Enrols the pods of this node, and keeps the CNI plugin installed");
    let uninstall = Command::new("uninstall")
        .about(
            "Removes the CNI plugin, its configuration and every rule from this node. Waits until the agent has ended",
        )
        .arg(
            Arg::new("wait")
                .long("wait")
                .action(ArgAction::SetTrue)
                .help("Stay when it is done, and answer readiness"),
        );
    let probe = Command::new("probe").about(
        "Tries out what the agent needs on this node and serves what it found at the admin address; the CNI directories are those of \
         the host",
    );
    Command::new(NodeSettings::PROGRAM)
        .version(env!("CARGO_PKG_VERSION"))
        .about(NodeSettings::ABOUT)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(configuration::with_flags::<NodeSettings>(agent))
        .subcommand(configuration::with_flags::<NodeSettings>(uninstall))
        .subcommand(configuration::with_flags::<NodeSettings>(probe))
}

/// The reference page of all settings, in Markdown.
pub fn reference() -> String {
    configuration::reference::<NodeSettings>(
        "# Settings of ambit-node\n\nWritten from the program; `AMBIT_WRITE_DOCS=1 cargo test -p ambit-node reference` \
         writes it anew. Each key is also a variable (`dnsCapture` is `AMBIT_NODE_DNS_CAPTURE`) and a flag (`--dns-capture`). \
         [The node agent](node.md) says what it does and what it needs.",
    )
}

fn resolve(settings: NodeSettings) -> Config {
    let NodeSettings {
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
        own_list,
        kubelet_uid,
        remove_taint,
        metrics,
        readiness,
        admin,
        log_level,
        log_format,
    } = settings;
    let enrolment = enrol::Settings {
        excluded_namespaces: exclude_namespaces.into_iter().chain([system_namespace]).collect(),
        unsupported_runtimes: unsupported_runtimes.into_iter().collect(),
        dns_capture,
        socks5,
    };
    let installation = Installation {
        program: cni_program,
        bin_dir: cni_bin_dir,
        conf_dir: cni_conf_dir,
        placement: match (chained, own_list) {
            (true, true) => Placement::OwnList,
            (true, false) => Placement::Chained,
            (false, _) => Placement::Standalone,
        },
        entry: entry(&cni_socket, &enrolment),
    };
    let mut agent = AgentConfig::new(zds_socket, &registry);
    agent.discovery = Discovery::of_node();
    agent.kubelet_uid = Some(kubelet_uid);
    Config {
        node: node_name,
        agent,
        enrolment,
        installation: install_cni.then_some(installation),
        lock: registry.with_extension("lock"),
        cni_socket,
        remove_taint,
        metrics,
        readiness,
        admin,
        log_level,
        log_format: log_format.into(),
    }
}

fn entry(cni_socket: &Path, enrolment: &enrol::Settings) -> Entry {
    Entry {
        socket: cni_socket.display().to_string(),
        excluded_namespaces: enrolment.excluded_namespaces.iter().cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_namespace_is_always_excluded() {
        let settings: NodeSettings =
            configuration::from_yaml("nodeName: n1\nsystemNamespace: mesh\nexcludeNamespaces: []\n").unwrap();
        let config = resolve(settings);
        assert_eq!(config.installation.unwrap().entry.excluded_namespaces, ["mesh"]);
    }

    #[test]
    fn a_node_without_a_name_is_refused() {
        let error = from_environment(["ambit-node", "agent", "--node-name", ""].map(OsString::from));
        assert!(matches!(error, Err(ConfigError::Value { key, .. }) if key == "nodeName"));
    }

    #[test]
    fn lists_may_be_repeated_or_separated_by_commas() {
        let arguments = [
            "uninstall",
            "--wait",
            "--node-name",
            "n1",
            "--exclude-namespaces",
            "a",
            "--exclude-namespaces",
            "b,c",
        ];
        let task =
            from_environment(std::iter::once("ambit-node").chain(arguments).map(OsString::from)).unwrap();
        let Task::Uninstall { config, wait: true } = task else { panic!("{task:?}") };
        let excluded: Vec<_> = config.enrolment.excluded_namespaces.iter().map(String::as_str).collect();
        assert_eq!(excluded, ["a", "ambit-system", "b", "c"]);
    }

    #[test]
    fn the_reference_page_is_that_of_the_program() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/node-settings.md");
        if std::env::var_os("AMBIT_WRITE_DOCS").is_some() {
            std::fs::write(path, reference()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), reference(), "AMBIT_WRITE_DOCS=1 writes it anew");
    }

    #[test]
    fn every_setting_has_a_meaning_and_a_flag_of_its_own() {
        assert_eq!(configuration::faults::<NodeSettings>(), Vec::<String>::new());
    }
}
