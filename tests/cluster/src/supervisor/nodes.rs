//! The nodes: booted, crashed, and entered with commands.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use ambit_local::{Command, Process, isolate};
use tokio::sync::Mutex;

use super::Options;
use super::control_plane::server;
use super::network::Network;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::node::Config;
use crate::pki::{self, Authority, Subject};
use crate::plan::Plan;
use crate::request::{Answer, OUTPUT};

/// How long a command on a node may take.
const COMMAND: Duration = Duration::from_secs(300);
/// Labels that put the nodes into different zones.
const ZONE: &str = "topology.kubernetes.io/zone";

/// What each node is started with, and the nodes that run.
#[derive(Debug)]
pub(crate) struct Nodes {
    commands: BTreeMap<String, Command>,
    running: Mutex<BTreeMap<String, Process>>,
}

impl Nodes {
    /// Signs certificates and writes each node's configuration.
    pub(crate) fn prepare(
        layout: &Layout,
        options: &Options,
        plan: Plan,
        authority: &Authority,
    ) -> Result<Self> {
        let own = std::env::current_exe().map_err(Error::system("find this program"))?;
        let logs = layout.run(&options.name).join("log");
        let mut commands = BTreeMap::new();
        for (index, name) in (1..).zip(plan.node_names()) {
            let config = configure(layout, options, plan, authority, (index, &name))?;
            let file = config.directory.join("node.json");
            let text = serde_json::to_string(&config).map_err(|error| Error::Refused {
                cluster: options.name.clone(),
                message: format!("configuration of node {name}: {error}"),
            })?;
            fs::write(&file, text).map_err(Error::system(format!("write {}", file.display())))?;
            let log = logs.join(format!("{name}.node"));
            commands.insert(name, Command::new(&own).arg("node").arg(file).log_file(log));
        }
        Ok(Self { commands, running: Mutex::default() })
    }

    /// Starts a node's first process, unless it runs.
    pub(crate) async fn boot(&self, network: &Network, node: &str) -> Result<()> {
        let command = self.commands.get(node).ok_or_else(|| unknown(node))?;
        let mut running = self.running.lock().await;
        if running.get(node).is_none_or(|process| !process.is_running()) {
            let process = Process::start(node, network.sandbox(node)?, command.clone()).await?;
            running.insert(node.to_owned(), process);
        }
        Ok(())
    }

    /// Kills a node's first process, and the kernel all others of the node.
    pub(crate) async fn crash(&self, node: &str) -> Result<()> {
        let process = self.running.lock().await.remove(node).ok_or_else(|| unknown(node))?;
        process.kill().await?;
        Ok(())
    }

    /// Names of the nodes that are up.
    pub(crate) async fn names(&self) -> Vec<String> {
        self.running.lock().await.keys().cloned().collect()
    }

    /// Runs a command inside a node's namespaces.
    pub(crate) async fn run(&self, network: &Network, node: &str, command: &[String]) -> Result<Answer> {
        let outer = self.running.lock().await.get(node).map(Process::pid).ok_or_else(|| unknown(node))?;
        let first = first_process(outer).ok_or_else(|| unknown(node))?;
        let enter = Command::new("nsenter")
            .args(["--mount", "--net", "--pid", "--uts", "--ipc", "--target"])
            .arg(first.to_string())
            .arg("--")
            .args(command);
        let process = Process::start(format!("a command on {node}"), network.sandbox(node)?, enter).await?;
        let status = process.wait_within(COMMAND).await?;
        let output = process.logs().join("\n");
        let from = output.len().saturating_sub(OUTPUT);
        let output = output.char_indices().filter(|(at, _)| *at >= from).map(|(_, c)| c).collect();
        Ok(Answer::Ran { code: ambit_local::exit_code(status), output })
    }
}

/// The only child of a node's outer process.
fn first_process(outer: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

fn unknown(node: &str) -> Error {
    Error::Local(ambit_local::Error::Unknown(format!("running node {node}")))
}

fn configure(
    layout: &Layout,
    options: &Options,
    plan: Plan,
    authority: &Authority,
    (index, name): (u8, &str),
) -> Result<Config> {
    let directory = PathBuf::from(isolate::DIRECTORY).join(name);
    fs::create_dir_all(&directory).map_err(Error::system(format!("make {}", directory.display())))?;
    let (client, serving) = (format!("node-{name}"), format!("kubelet-{name}"));
    let user = format!("system:node:{name}");
    authority.sign(&client, Subject { user: &user, group: Some("system:nodes"), ..Subject::default() })?;
    let addresses = [plan.node(index).into()];
    let subject = Subject { user: name, hosts: &[name], addresses: &addresses, group: None };
    authority.sign(&serving, subject)?;
    let server = server(plan);
    for (file, certificate) in [("kubelet", client.as_str()), ("proxy", "proxy")] {
        let path = directory.join(format!("{file}.kubeconfig"));
        pki::write_private(&path, &authority.kubeconfig(certificate, &server))?;
    }
    Ok(Config {
        name: name.to_owned(),
        address: plan.node(index),
        pods: format!("{}/{}", plan.pods(index), crate::plan::SEGMENT_PREFIX),
        cluster_cidr: plan.cluster_cidr(),
        dns: plan.dns(),
        labels: format!("{ZONE}=zone-{index},topology.kubernetes.io/region=region"),
        cgroup: format!("{}-{name}", layout.cgroup_prefix(&options.name)),
        bin: layout.bin(),
        log: layout.run(&options.name).join("log"),
        images: options.images.clone(),
        ca: authority.path("ca.crt"),
        certificate: authority.path(&format!("{serving}.crt")),
        key: authority.path(&format!("{serving}.key")),
        directory,
    })
}
