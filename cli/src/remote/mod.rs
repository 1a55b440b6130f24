//! Commands for a mesh that `ambit up` runs in another terminal: `ambit exec`, `ambit logs`, `ambit dump`, and the other commands with
//! `--local`.
//!
//! `ambit up` listens on a socket of the user's; each command is one connection to it. A packet is one JSON message.

mod client;
mod directory;
mod lines;
mod protocol;
mod server;

use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use tokio::sync::mpsc;

pub(crate) use directory::Endpoint;
pub(crate) use lines::Lines;
pub(crate) use protocol::AskedProxy;
pub(crate) use server::serve;

use protocol::{Request, Target};

/// The choice among several meshes.
#[derive(Debug, Args)]
struct Mesh {
    /// Process id of the `ambit up` to use when several run.
    #[arg(long, value_name = "PID")]
    mesh: Option<u32>,
}

/// The choice of a container.
#[derive(Debug, Args)]
struct Container {
    /// The pod: its name, NAMESPACE/NAME, or the name of its Deployment.
    pod: String,
    /// Namespace of the pod.
    #[arg(short, long, default_value = "default")]
    namespace: String,
    /// The container; default is the first.
    #[arg(short, long)]
    container: Option<String>,
}

impl Container {
    fn target(&self) -> Target {
        let (namespace, pod) = self.pod.split_once('/').unwrap_or((&self.namespace, &self.pod));
        Target { namespace: namespace.to_owned(), pod: pod.to_owned(), container: self.container.clone() }
    }
}

/// Options of `ambit exec`.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    #[command(flatten)]
    container: Container,
    #[command(flatten)]
    mesh: Mesh,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Options of `ambit logs`.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    #[command(flatten)]
    container: Container,
    /// Continue with output that is written from now on.
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    mesh: Mesh,
}

/// Options of `ambit dump`.
#[derive(Debug, Args)]
pub(crate) struct Dump {
    /// The node, such as `node-1`.
    node: String,
    #[command(flatten)]
    mesh: Mesh,
}

/// Runs a command in a pod, with this terminal as its input and output.
///
/// # Errors
/// When no mesh runs, or it has no such pod, or the command cannot be started.
pub(crate) fn exec(options: &Exec) -> anyhow::Result<ExitCode> {
    let request = Request::Exec { target: options.container.target(), command: options.command.clone() };
    client::ask(options.mesh.mesh, &request)
}

/// Prints the output of a container.
///
/// # Errors
/// When no mesh runs, or it has no such pod.
pub(crate) fn logs(options: &Logs) -> anyhow::Result<ExitCode> {
    let request = Request::Logs { target: options.container.target(), follow: options.follow };
    client::ask(options.mesh.mesh, &request)
}

/// What a proxy of a mesh of `ambit up` answers to a `GET` at its admin server; `mesh` is the process id of one of several.
///
/// # Errors
/// When no mesh runs, it has no such proxy, or the answer is no success.
pub(crate) async fn admin(mesh: Option<u32>, proxy: AskedProxy, path: &str) -> anyhow::Result<String> {
    client::fetch(mesh, &Request::Admin { proxy, path: path.to_owned() }).await
}

/// The proxies of a mesh of `ambit up`.
///
/// # Errors
/// When no mesh runs.
pub(crate) async fn proxies(mesh: Option<u32>) -> anyhow::Result<Vec<AskedProxy>> {
    let text = client::fetch(mesh, &Request::Proxies).await?;
    serde_json::from_str(&text).context("read the proxies of the mesh")
}

/// Passes on the lines of an answer of a proxy's admin server that goes on, for as long as somebody takes them.
///
/// # Errors
/// When no mesh runs, it has no such proxy, or the answer is no success.
pub(crate) async fn admin_lines(
    mesh: Option<u32>,
    proxy: AskedProxy,
    path: &str,
    taken: &mpsc::Sender<String>,
) -> anyhow::Result<()> {
    client::stream(mesh, &Request::Stream { proxy, path: path.to_owned() }, taken).await
}

/// The objects that the control plane of a mesh of `ambit up` reads, as manifests.
///
/// # Errors
/// When no mesh runs.
pub(crate) async fn manifests(mesh: Option<u32>) -> anyhow::Result<String> {
    client::fetch(mesh, &Request::Manifests).await
}

/// Prints the configuration of a node's proxy as JSON.
///
/// # Errors
/// When no mesh runs, or it has no such node.
pub(crate) fn dump(options: &Dump) -> anyhow::Result<ExitCode> {
    client::ask(options.mesh.mesh, &Request::Dump { node: options.node.clone() })
}
