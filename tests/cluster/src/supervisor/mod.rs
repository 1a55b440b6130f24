//! The supervisor of a cluster: the process that holds its namespaces and processes, and answers requests about them.
//!
//! It runs in the three stages of [`ambit_local::isolate`]. The outermost process holds the cluster's lock, waits for
//! the rest to end and removes what the kernel does not: control groups and the files that others read. If even that
//! process is killed, [`clean`] does it, which every `up` and `down` calls.

mod base;
mod control_plane;
mod forward;
mod network;
mod nodes;
mod serve;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use ambit_local::isolate;
use nix::mount::{MsFlags, mount};
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use crate::cgroup;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::pki::{self, Authority};
use crate::plan::Plan;
use control_plane::ControlPlane;
use network::Network;
use nodes::Nodes;

pub(crate) use forward::API_PORT;
pub(crate) use network::CONTROL;

/// Size limit of the file system in memory that holds everything of the cluster.
const MEMORY: &str = "size=75%,mode=755";

/// What a supervisor is started with.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Name of the cluster.
    #[arg(long)]
    pub name: String,
    /// Its number: clusters of different numbers share no address range.
    #[arg(long, default_value_t = 0)]
    pub number: u8,
    /// How many nodes it has; without any, only etcd and the API server run.
    #[arg(long, default_value_t = 2)]
    pub nodes: u8,
    /// Image archives to import on every node.
    #[arg(long = "image")]
    pub images: Vec<PathBuf>,
    /// Ends the cluster when standard input is closed, which the kernel does when the owner dies.
    #[arg(long)]
    pub owned: bool,
}

/// How far the start has come.
#[derive(Debug, Clone)]
pub(crate) enum Progress {
    /// This step is going on.
    Starting(String),
    /// Everything is up.
    Ready,
    /// The start failed.
    Failed(String),
}

/// A cluster that is coming up or is up.
#[derive(Debug)]
pub(crate) struct RunningCluster {
    pub(crate) name: String,
    pub(crate) network: Network,
    pub(crate) control_plane: ControlPlane,
    pub(crate) nodes: Nodes,
    pub(crate) progress: watch::Sender<Progress>,
}

/// Runs the stage that this process is. Call it before any thread is started.
///
/// # Errors
/// When the kernel refuses a namespace, or another supervisor of this name runs.
pub fn enter(options: &Options) -> Result<ExitCode> {
    match isolate::stage() {
        isolate::Stage::Supervisor => supervise(options),
        isolate::Stage::Init => Ok(isolate::init()?),
        isolate::Stage::Program => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
            let runtime = runtime.map_err(Error::system("start a runtime"))?;
            runtime.block_on(run(options)).map(|()| ExitCode::SUCCESS)
        }
    }
}

/// Removes what a dead supervisor of this name left. Returns whether no supervisor of this name runs.
///
/// # Errors
/// When the lock or the files can't be reached.
pub fn clean(layout: &Layout, name: &str) -> Result<bool> {
    let Some(lock) = layout.try_lock(name)? else { return Ok(false) };
    remove_traces(layout, name)?;
    drop(lock);
    layout.remove_lock(name);
    Ok(true)
}

fn remove_traces(layout: &Layout, name: &str) -> Result<()> {
    let left = cgroup::remove(&format!("{}-", layout.cgroup_prefix(name)));
    if let Some(group) = left.first() {
        let message = format!("{} still has processes", group.display());
        return Err(Error::Refused { cluster: name.to_owned(), message });
    }
    let directory = layout.run(name);
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::system(format!("remove {}", directory.display()))(error))
        }
        _ => Ok(()),
    }
}

fn supervise(options: &Options) -> Result<ExitCode> {
    let layout = Layout::find();
    // A terminal's signals are for the owner. Fails for a leader of a group, which has what it needs.
    nix::unistd::setsid().ok();
    let running = || Error::Refused { cluster: options.name.clone(), message: "it runs already".to_owned() };
    let lock = layout.try_lock(&options.name)?.ok_or_else(running)?;
    let lifeline =
        std::io::stdin().as_fd().try_clone_to_owned().map_err(Error::system("hold the owner's pipe"))?;
    let code = isolate::supervise(&[lifeline])?;
    let left = cgroup::remove(&format!("{}-", layout.cgroup_prefix(&options.name)));
    drop(lock);
    if let Some(group) = left.first() {
        tracing::error!(group = %group.display(), "control group is not empty");
    }
    Ok(code)
}

async fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    let lifeline = isolate::inherited().await?.into_iter().next();
    let layout = Layout::find();
    let plan = Plan { number: options.number, nodes: options.nodes };
    let none: Option<&str> = None;
    mount(Some("ambit-cluster"), isolate::DIRECTORY, Some("tmpfs"), MsFlags::empty(), Some(MEMORY))
        .map_err(Error::system("mount the cluster's file system"))?;
    mount(none, isolate::DIRECTORY, none, MsFlags::MS_PRIVATE, none)
        .map_err(Error::system("make the cluster's file system private"))?;
    let directory = PathBuf::from(isolate::DIRECTORY);
    let authority = Authority::create(&directory.join("pki"))?;
    let network = Network::create(&options.name, plan).await?;
    let control_plane = ControlPlane::prepare(&layout, &options.name, plan, &authority)?;
    let nodes = Nodes::prepare(&layout, options, plan, &authority)?;
    let port = forward::serve(network.control().netns()?, plan.control()).await?;
    let kubeconfig = authority.portable_kubeconfig("admin", &format!("https://127.0.0.1:{port}"))?;
    pki::write_private(&layout.run(&options.name).join("kubeconfig"), &kubeconfig)?;
    let (progress, _) = watch::channel(Progress::Starting("starting programs".to_owned()));
    let supervisor =
        Arc::new(RunningCluster { name: options.name.clone(), network, control_plane, nodes, progress });
    let starting = async {
        bring_up(&supervisor, plan, start).await;
        std::future::pending::<()>().await;
    };
    let ended = async {
        match lifeline {
            Some(pipe) if options.owned => until_closed(pipe).await,
            _ => std::future::pending().await,
        }
    };
    tokio::select! {
        served = serve::serve(Arc::clone(&supervisor), &layout) => served?,
        () = ended => tracing::info!("the owner is gone"),
        () = starting => {}
    }
    Ok(())
}

/// Starts everything in its order and reports each step.
async fn bring_up(supervisor: &RunningCluster, plan: Plan, start: Instant) {
    let step = |text: &str| {
        tracing::info!(after = ?start.elapsed(), "{text}");
        supervisor.progress.send_replace(Progress::Starting(text.to_owned()));
    };
    let attempt = async {
        step("starting nodes and the API server");
        supervisor.control_plane.start_all(&supervisor.network).await?;
        for node in plan.node_names() {
            supervisor.nodes.boot(&supervisor.network, &node).await?;
        }
        supervisor.control_plane.wait_until_ready(&supervisor.network).await?;
        if plan.nodes == 0 {
            return Ok(());
        }
        step("applying CoreDNS");
        base::apply(supervisor, plan).await?;
        step("waiting for the nodes and CoreDNS");
        base::wait_until_ready(supervisor, plan).await
    };
    let outcome = attempt.await;
    tracing::info!(after = ?start.elapsed(), ?outcome, "the start has ended");
    supervisor.progress.send_replace(match outcome {
        Ok(()) => Progress::Ready,
        Err(error) => Progress::Failed(error.to_string()),
    });
}

/// Returns when the other end of a pipe is closed.
async fn until_closed(pipe: OwnedFd) {
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    if nix::fcntl::fcntl(&pipe, nix::fcntl::FcntlArg::F_SETFL(flags)).is_err() {
        return;
    }
    let Ok(mut pipe) = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe) else { return };
    let mut byte = [0];
    while pipe.read(&mut byte).await.is_ok_and(|length| length > 0) {}
}
