//! The program `ambit-node`, from configuration to exit: what there is, in the order in which it is made.
//!
//! Every task here is essential: when one ends by itself, the program ends with its reason, and is started again. Rules,
//! registry, CNI plugin and its configuration stay on the node whenever the agent ends.

mod admin;
mod lock;
mod probe;
mod uninstall;

use std::net::SocketAddr;
use std::time::Duration;

use ambit_runtime::tasks::Tasks;
use ambit_telemetry::http::{metrics_router, readiness_router, serve};
use ambit_telemetry::logging::Logging;
use ambit_telemetry::{Readiness, Registry, Target, logging};
use anyhow::Context;
use kube::Client;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cni::install::Installation;
use crate::cni::server::Server;
use crate::config::{Config, Task};
use crate::kubernetes::lookup::Lookup;
use crate::kubernetes::{Source, annotate, sync, taint, watch as watches};
use crate::{Agent, capabilities};

/// How long a new pod waits for a node proxy that serves it; then its start is tried again.
const SERVED_WITHIN: Duration = Duration::from_secs(20);
/// Threads of the runtime. Namespaces are entered on threads of their own.
const THREADS: usize = 2;

/// Runs the program until it is asked to stop or cannot continue.
///
/// # Errors
/// What kept it from starting, or which essential part ended.
pub fn main(task: Task) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let config = match &task {
        Task::Agent(config) | Task::Probe(config) | Task::Uninstall { config, .. } => config,
    };
    let logging = logging::init(config.log_format, &config.log_level, Target::Stderr)?;
    let registry = Registry::new();
    logging.register(&registry);
    registry.build_info("node", env!("CARGO_PKG_VERSION"));
    // Every enrolled pod has its namespace and a dozen listeners open.
    ambit_net::process::raise_file_limit();
    let outcome = runtime.block_on(async {
        // Who changes the node is alone on it: two agents would take each other's sockets and rules.
        match task {
            Task::Agent(config) => {
                let _lock = lock::acquire(&config.lock).await?;
                Box::pin(agent(config, registry, &logging)).await
            }
            Task::Uninstall { config, wait } => {
                let _lock = lock::acquire(&config.lock).await?;
                Box::pin(uninstall::run(config, wait)).await
            }
            Task::Probe(config) => Box::pin(probe::run(config)).await,
        }
    });
    runtime.shutdown_background();
    outcome
}

async fn agent(config: Config, registry: Registry, logging: &Logging) -> anyhow::Result<()> {
    let Config {
        node,
        agent: settings,
        enrolment,
        installation,
        cni_socket,
        lock: _,
        remove_taint,
        metrics,
        readiness: readiness_address,
        admin,
        log_level: _,
        log_format: _,
    } = config;
    if let Err(error) = capabilities::make_settings_writable() {
        tracing::debug!(%error, "/proc/sys is left as it is mounted");
    }
    let client = client()?;
    let mut tasks = Tasks::default();
    let readiness = Readiness::new();
    let reconciled = readiness.task("first reconciliation");

    let (agent, driver) = Agent::start(settings).await.context("start the agent")?;
    agent.register_metrics(&registry);
    tasks.spawn("agent", driver);

    let source = Source::new(enrolment);
    let listed = watches::start(&client, &node, &source, &registry, |name| readiness.task(name), &mut tasks);
    tasks.spawn("reconciliation", sync::run(agent.clone(), source.clone(), listed));
    let written = annotate::Metrics::new(&registry);
    tasks.spawn("annotations", annotate::run(client.clone(), agent.clone(), source.clone(), written));
    tasks.spawn_once("first reconciliation", {
        let agent = agent.clone();
        async move {
            agent.wait_reconciled().await;
            reconciled.done();
        }
    });

    let lookup = Lookup::new(client.clone(), source);
    let server = Server::bind(&cni_socket, agent.clone(), lookup, SERVED_WITHIN)
        .with_context(|| format!("listen on {}", cni_socket.display()))?;
    server.register_metrics(&registry);
    tasks.spawn("CNI socket", server.run());
    let (installed, problem) = install(installation, &registry, &readiness, &mut tasks);
    let routes = admin::routes(agent.clone(), installed.clone(), problem, logging);
    if remove_taint {
        tasks.spawn("taint", taint::run(client, node.clone(), agent, installed));
    }

    tasks.spawn("admin", serve(listen(admin, "the admin interface").await?, routes));

    tasks.spawn("metrics", serve(listen(metrics, "metrics").await?, metrics_router(&registry)));
    let router = readiness_router(&readiness);
    tasks.spawn("readiness", serve(listen(readiness_address, "readiness").await?, router));
    tracing::info!(node, version = env!("CARGO_PKG_VERSION"), "started");
    tokio::select! {
        outcome = asked_to_stop() => outcome,
        ended = tasks.ended() => Err(ended.into()),
    }
}

/// Keeps the CNI plugin installed, if that is the agent's business. The first receiver is true while it is, the second has
/// the reason while it is not.
fn install(
    installation: Option<Installation>,
    registry: &Registry,
    readiness: &Readiness,
    tasks: &mut Tasks,
) -> (watch::Receiver<bool>, watch::Receiver<String>) {
    let (sender, installed) = watch::channel(installation.is_none());
    let (reason, problem) = watch::channel(String::new());
    let shown = installed.clone();
    registry.gauge_from("ambit_node_cni_installed", "Whether the CNI plugin is in place", move || {
        i64::from(*shown.borrow())
    });
    if let Some(installation) = installation {
        let task = readiness.task("installation of the CNI plugin");
        let mut first = installed.clone();
        tasks.spawn("CNI plugin", installation.keep(sender, reason));
        tasks.spawn_once("first installation", async move {
            if first.wait_for(|installed| *installed).await.is_ok() {
                task.done();
            }
        });
    }
    (installed, problem)
}

fn client() -> anyhow::Result<Client> {
    let config = kube::Config::incluster().context("no access to the API server")?;
    Client::try_from(config).context("no access to the API server")
}

async fn listen(address: SocketAddr, purpose: &'static str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("listen on {address} for {purpose}"))
}

async fn asked_to_stop() -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; rules and CNI plugin stay on the node");
    Ok(())
}
