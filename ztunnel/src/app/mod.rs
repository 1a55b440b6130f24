//! The program, from configuration to exit: what there is, in the order in which it is made.
//!
//! The calling thread becomes the control runtime (configuration, certificates, node agent, admin);
//! data-path threads are [`ambit_runtime::workers`]. Every task here is essential: when one ends by itself, the
//! program ends with its reason.

mod authority;
mod dump;
mod servers;
mod shutdown;

use std::sync::Arc;
use std::time::Duration;

use ambit_directory::Directory;
use ambit_hbone::{Pool, PoolCounters, Server, WindowBudget};
use ambit_identity::{CertificateStore, StoreConfig, Trust};
use ambit_telemetry::access::AccessLog;
use ambit_telemetry::logging::{self, Logging};
use ambit_telemetry::{LogWriter, Readiness, Registry, Target, TcpMetrics};
use anyhow::Context;
use tokio::sync::watch;

use crate::config::Config;
use crate::connection::report::Reporter;
use crate::directory::ondemand::{Bounds, OnDemandClient};
use crate::directory::{feed, local};
use crate::dns::{self, DnsProxy};
use crate::outbound::tunnels::{pool_settings, server_settings};
use crate::pods::sockets::OptionalListeners;
use crate::pods::{LocalPods, Pods};
use crate::proxy::{Limits, Proxy, ProxyMetrics, Settings, Worker};
use crate::zds::client::Progress;
use ambit_runtime::connections::Connections;
use ambit_runtime::drain::{self, Drain, Drained};
use ambit_runtime::flows::{FlowCounter, Flows, Observer};
use ambit_runtime::hostnames::Hostnames;
use ambit_runtime::idle_memory;
use ambit_runtime::loads::Loads;
use ambit_runtime::resolv_conf::ResolvConf;
use ambit_runtime::shares::Shares;
use ambit_runtime::stop::Requests;
use ambit_runtime::tasks::Tasks;
use ambit_runtime::workers::{Supervisor, Workers};

/// Bytes of tunnel windows beyond each connection's first ones, for the whole process.
const WINDOW_BUDGET: u64 = 256 << 20;

/// Descriptors that are kept from connections however few there are.
const OWN_FILES: u64 = 64;

/// Look-ups of host names at a time.
const MAX_LOOKUPS: u64 = 256;

/// Runs the proxy until it is asked to stop or can't continue.
///
/// `collect` has the allocator give back to the system what the calling thread has freed; it is called when the
/// proxy comes to rest.
///
/// # Errors
/// What kept it from starting, or which essential part ended.
pub fn run(config: Config, collect: fn()) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let logging = logging::init(config.proxy.log_format.into(), &config.proxy.log_level, Target::Stderr)?;
    if !config.without_effect.is_empty() {
        let variables = config.without_effect.join(", ");
        tracing::warn!(variables, "variables of the environment that have no effect here");
    }
    let open_files = ambit_net::process::raise_file_limit();
    let outcome = runtime.block_on(Box::pin(serve(config, open_files, &logging, collect)));
    runtime.shutdown_background();
    outcome
}

/// What is left of the limit of open files for connections. An eighth is for the pipes of bulk transfers between pods of the
/// node; an eighth, and [`OWN_FILES`], for pods that come, ready-made sockets, pooled tunnel connections without a
/// tunnel, the control plane, and the admin, metrics and readiness servers.
fn descriptors_of_connections(open_files: u64) -> u64 {
    open_files.saturating_sub(open_files / 4 + OWN_FILES)
}

fn shares(config: &Config, workers: usize, open_files: u64) -> Shares {
    let connections = config.limits.connections_per_worker.saturating_mul(workers) as u64;
    // Two descriptors each.
    ambit_net::pipe::set_limit(usize::try_from(open_files / 16).unwrap_or(usize::MAX));
    let descriptors = descriptors_of_connections(open_files).min(connections.saturating_mul(2));
    Shares::new(descriptors, config.limits.handshakes as u64, MAX_LOOKUPS)
}

/// What the parts are made of, before they are put together.
struct Parts {
    config: Config,
    registry: Registry,
    trust: Trust,
    certificates: CertificateStore,
    directory: ambit_directory::Reader,
    /// None without a control plane.
    discovery: Option<ambit_xds::Client>,
    access_log: AccessLog,
    flows: Flows,
    tcp_metrics: TcpMetrics,
    budget: WindowBudget,
    /// Descriptors that the process may open.
    open_files: u64,
}

/// The threads that write what the data path reports, for as long as the program runs.
struct Writers {
    _access_log: Option<LogWriter>,
    _flows: Option<FlowCounter>,
}

/// The parts put together.
struct Program {
    proxy: Arc<Proxy>,
    workers: Arc<Workers<Worker>>,
    pods: Pods,
    pool_counters: Arc<PoolCounters>,
}

async fn serve(config: Config, open_files: u64, logging: &Logging, collect: fn()) -> anyhow::Result<()> {
    let mut tasks = Tasks::default();
    let (signal, drain) = drain::channel();
    let (parts, _writers) = parts(config, open_files, &mut tasks).await?;
    let (program, mut supervisor) = assemble(&parts, drain)?;
    let (progress, seen) = watch::channel(Progress::default());
    let readiness = readiness(&parts, seen.clone(), &mut tasks);
    let stop = Requests::new();
    servers::start(&parts, &program, logging, &readiness, &stop, &mut tasks).await?;
    tasks.spawn("idle memory", idle_memory::watch(program.workers.clone(), collect));
    if let Some(on_demand) = program.proxy.on_demand.clone() {
        tasks.spawn("names demanded", on_demand.expire());
    }
    crate::connection::review::start(&program.proxy, &program.workers, &mut tasks);
    let agent = tokio::spawn({
        let (path, pods) = (parts.config.zds_socket.clone(), program.pods.clone());
        async move { crate::zds::client::run(&path, &pods, &progress).await }
    });
    tracing::info!(
        node = parts.config.node,
        workers = program.workers.len(),
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    let mut running = shutdown::Running { program: &program, signal, readiness, agent };
    let outcome = tokio::select! {
        () = stop.wait(|| drain::begin(&mut running)) => Ok(()),
        ended = tasks.ended() => Err(ended.into()),
        died = supervisor.failed() => Err(died.into()),
    };
    if outcome.is_ok() {
        stop_in_order(&mut running, parts.config.proxy.drain_timeout.get(), &stop).await;
    }
    end(supervisor).await;
    outcome
}

async fn stop_in_order(running: &mut shutdown::Running<'_>, limit: Duration, stop: &Requests) {
    let open = running.program.proxy.connections.len();
    tracing::info!(open, ?limit, "stopping: nothing new is accepted, open connections may finish");
    match drain::finish(running, limit, stop.wait(|| ())).await {
        Drained::Finished => tracing::info!("stopped: every connection has finished"),
        Drained::Closed(closed) => tracing::warn!(closed, "the drain time is over: connections were closed"),
    }
}

async fn end(supervisor: Supervisor) {
    // Joining threads blocks; the control tasks are not needed any more.
    if let Err(error) = tokio::task::spawn_blocking(move || supervisor.stop()).await {
        tracing::error!(%error, "the workers did not end in order");
    }
}

async fn parts(config: Config, open_files: u64, tasks: &mut Tasks) -> anyhow::Result<(Parts, Writers)> {
    let registry = Registry::new();
    let control_plane = authority::control_plane(&config)?;
    let trust = trust(&config, tasks).await?;
    let issuer = authority::issuer(&config, control_plane.clone())?;
    let (certificates, renewal) = CertificateStore::new(store_config(&config), issuer, trust.clone());
    tasks.spawn("certificates", renewal);
    let (directory, reader) = Directory::new();
    let discovery = match control_plane {
        Some(control_plane) => {
            let (discovery, driver) = feed::subscribe(&config, directory, control_plane);
            tasks.spawn("discovery", driver);
            Some(discovery)
        }
        None => {
            let directory = local::apply(config.xds.local_file.as_deref(), directory)?;
            // Readers follow it for as long as its writer lives.
            tasks.spawn("local directory", async move {
                let _directory = directory;
                std::future::pending::<()>().await;
            });
            None
        }
    };
    let (access_log, access_writer) = config.proxy.access_log.open().context("open the access log")?;
    access_log.register(&registry);
    let (access_log, flows, flow_counter) =
        Flows::observe(access_log, config.proxy.flows.clone(), Observer::Node).context("count flows")?;
    flows.register(&registry);
    let tcp_metrics = TcpMetrics::register(&registry, ambit_telemetry::tcp::DEFAULT_MAX_SERIES);
    let budget = WindowBudget::new(WINDOW_BUDGET);
    let parts = Parts {
        config,
        registry,
        trust,
        certificates,
        directory: reader,
        discovery,
        access_log,
        flows,
        tcp_metrics,
        budget,
        open_files,
    };
    Ok((parts, Writers { _access_log: access_writer, _flows: flow_counter }))
}

async fn trust(config: &Config, tasks: &mut Tasks) -> anyhow::Result<Trust> {
    let (trust, watching) = Trust::from_files(config.proxy.trust_config()?).await?;
    tasks.spawn("trust", watching);
    Ok(trust)
}

fn store_config(config: &Config) -> StoreConfig {
    let wait_timeout = config.limits.connect_timeout.get();
    StoreConfig { wait_timeout, ..config.certificates.requested.store_config() }
}

fn assemble(parts: &Parts, drain: Drain) -> anyhow::Result<(Program, Supervisor)> {
    let Parts { config, trust, certificates, directory, discovery, budget, open_files, .. } = parts;
    let (count, resolv_conf) = (config.proxy.worker_count(), ResolvConf::of_system());
    let shares = shares(config, count, *open_files);
    let proxy = Arc::new(Proxy {
        settings: settings(config, trust),
        directory: directory.clone(),
        certificates: certificates.clone(),
        trust: trust.clone(),
        local: LocalPods::default(),
        connections: Connections::new(count),
        loads: Loads::default(),
        on_demand: discovery
            .as_ref()
            .filter(|_| config.xds.on_demand)
            .map(|discovery| OnDemandClient::new(discovery.clone(), Bounds::default())),
        synced: synced(discovery.as_ref()),
        drain: drain.clone(),
        server: Server::new(server_settings(config), trust.clone(), budget.clone()),
        hostnames: hostnames(config, &resolv_conf)?,
        dns: dns(config, &resolv_conf, directory.clone(), shares.clone(), &parts.registry),
        shares,
        tallies: ProxyMetrics::default(),
    });
    let pool_counters = Arc::new(PoolCounters::default());
    let (workers, supervisor) = Workers::start(count, |handle| Worker {
        proxy: proxy.clone(),
        index: handle.index(),
        pool: Pool::new(pool_settings(config), trust.clone(), budget.clone(), pool_counters.clone()),
        reporter: Arc::new(Reporter::new(parts.tcp_metrics.clone(), parts.access_log.clone())),
    })?;
    let pods = Pods::new(proxy.clone(), workers.clone(), drain);
    Ok((Program { proxy, workers, pods, pool_counters }, supervisor))
}

fn dns(
    config: &Config,
    own: &ResolvConf,
    directory: ambit_directory::Reader,
    shares: Shares,
    registry: &Registry,
) -> DnsProxy {
    let configured = config.dns.upstreams.clone();
    let upstreams = if configured.is_empty() { own.reachable_from_pods() } else { configured };
    let settings = dns::Settings::new(&config.dns.cluster_domain, upstreams);
    DnsProxy::new(settings, directory, shares, dns::Metrics::register(registry))
}

fn hostnames(config: &Config, own: &ResolvConf) -> anyhow::Result<Hostnames> {
    let configured = &config.dns.upstreams;
    let nameservers = if configured.is_empty() { &own.nameservers } else { configured };
    Hostnames::new(nameservers, &own.search, &config.dns.cluster_domain)
        .context("make a resolver of host names")
}

/// Whether discovery has applied its first state, as something that a connection can look at.
fn synced(discovery: Option<&ambit_xds::Client>) -> watch::Receiver<bool> {
    let Some(discovery) = discovery else { return watch::channel(true).1 };
    let (sender, synced) = watch::channel(discovery.is_ready());
    let discovery = discovery.clone();
    tokio::spawn(async move {
        if discovery.ready().await {
            sender.send_replace(true);
        }
        // Connections look for as long as the process lives.
        sender.closed().await;
    });
    synced
}

fn settings(config: &Config, trust: &Trust) -> Settings {
    let limits = &config.limits;
    Settings {
        network: config.proxy.network.as_str().into(),
        cluster_id: config.proxy.cluster_id.as_str().into(),
        trust_domain: trust.trust_domain(),
        cluster_domain: config.dns.cluster_domain.as_str().into(),
        same_node: config.same_node,
        listeners: OptionalListeners { dns: config.dns.enabled, socks5: config.socks5 },
        limits: Limits {
            connect_timeout: limits.connect_timeout.get(),
            attempt_timeout: limits.attempt_timeout.get(),
            connect_attempts: limits.connect_attempts,
            connection_idle: limits.connection_idle.get(),
            directory_wait: limits.directory_wait.get(),
        },
    }
}

/// Ready once the first state of the control plane and the node agent's snapshot were applied.
fn readiness(parts: &Parts, mut progress: watch::Receiver<Progress>, tasks: &mut Tasks) -> Readiness {
    let readiness = Readiness::new();
    let (discovery, agent) = (readiness.task("discovery"), readiness.task("node agent"));
    let client = parts.discovery.clone();
    tasks.spawn_once("readiness of discovery", async move {
        let is_ready = match client {
            Some(client) => client.ready().await,
            None => true,
        };
        if is_ready {
            discovery.done();
        }
    });
    tasks.spawn_once("readiness of the node agent", async move {
        if progress.wait_for(|progress| progress.synced).await.is_ok() {
            agent.done();
        }
    });
    readiness
}
