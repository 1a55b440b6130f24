//! The program, from configuration to exit: what there is, in the order in which it is made.
//!
//! The calling thread becomes the control runtime (configuration, certificates, admin, accepting); data-path threads are
//! [`ambit_runtime::workers`]. Every task here is essential: when one ends by itself, the program ends with its reason.

mod servers;

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use ambit_directory::{Directory, Removed, Revision, WorkloadUid};
use ambit_hbone::{
    ClientSettings, ConnectionSettings, InFlight, Pool, PoolCounters, PoolSettings, Server, ServerSettings,
    WindowBudget,
};
use ambit_identity::{CertificateStore, ControlPlane, GrpcIssuer, SpiffeId, Trust};
use ambit_net::accept::Acceptor;
use ambit_runtime::configuration::proxy::ProxySettings;
use ambit_runtime::connections::Connections;
use ambit_runtime::cut::CutReason;
use ambit_runtime::drain::{self, Drain, DrainSignal, Drainable, Drained};
use ambit_runtime::flows::{FlowCounter, Flows, Observer};
use ambit_runtime::hostnames::Hostnames;
use ambit_runtime::idle_memory;
use ambit_runtime::loads::Loads;
use ambit_runtime::resolv_conf::ResolvConf;
use ambit_runtime::stop::Requests;
use ambit_runtime::tasks::Tasks;
use ambit_runtime::workers::{WorkerHandle, Workers};
use ambit_telemetry::logging::{self, Logging};
use ambit_telemetry::{LogWriter, Readiness, Registry, RequestMetrics, Target, TcpMetrics};
use anyhow::Context;
use tokio::net::TcpStream;

use crate::backend_tls::TlsClients;
use crate::balancers::Balancers;
use crate::clients::Clients;
use crate::config::Config;
use crate::datagrams::Datagrams;
use crate::names::Names;
use crate::proxy::{InProgress, Proxy, Publication, Settings, Tallies, TunnelKey, Worker};
use crate::report::Reporter;
use crate::telemetry::Exports;
use crate::upstream::Upstreams;
use crate::{accept, feed, gateway};

/// Bytes of tunnel windows beyond each connection's first ones, for the whole process.
const WINDOW_BUDGET: u64 = 256 << 20;
/// Label sets of requests that are counted apart.
const MAX_REQUEST_SERIES: usize = 10_000;
/// How often the files that policies name are read again.
const RELOAD_EVERY: Duration = Duration::from_secs(10);
/// How often unused connections are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// Runs the waypoint until it is asked to stop or can't go on. `collect` has the allocator give back to the system what the
/// calling thread has freed.
///
/// # Errors
/// What kept it from starting, or which essential part ended.
pub fn run(config: Config, collect: fn()) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let logging = logging::init(config.proxy.log_format.into(), &config.proxy.log_level, Target::Stderr)?;
    let outcome = runtime.block_on(Box::pin(serve(config, &logging, collect)));
    runtime.shutdown_background();
    outcome
}

/// What the parts are made of, before they are put together.
struct Parts {
    config: Config,
    registry: Registry,
    trust: Trust,
    identity: SpiffeId,
    certificates: CertificateStore,
    directory: ambit_directory::Reader,
    published: Arc<Publication>,
    discovery: ambit_xds::Client,
    reporter: Arc<Reporter>,
    exports: Exports,
    budget: WindowBudget,
    pool_counters: Arc<PoolCounters>,
    flows: Flows,
    _access_writer: Option<LogWriter>,
    _flow_counter: Option<FlowCounter>,
}

/// The parts put together.
struct Program {
    proxy: Arc<Proxy>,
    workers: Arc<Workers<Worker>>,
}

async fn serve(config: Config, logging: &Logging, collect: fn()) -> anyhow::Result<()> {
    let mut tasks = Tasks::default();
    let (signal, drain) = drain::channel();
    let listener = listen(config.listen_address).context("listenAddress")?;
    let parts = parts(config, &mut tasks).await?;
    let proxy = Arc::new(proxy(&parts, names(&parts.config)?, drain.clone()));
    let (workers, mut supervisor) = Workers::start(parts.config.proxy.worker_count(), |handle| Worker {
        proxy: proxy.clone(),
        index: handle.index(),
        tunnels: Pool::new(
            pool_settings(&parts.config),
            parts.trust.clone(),
            parts.budget.clone(),
            parts.pool_counters.clone(),
        ),
        upstreams: Upstreams::default(),
        reporter: parts.reporter.clone(),
        requests: InProgress::default(),
    })?;
    let program = Program { proxy, workers };
    let readiness = readiness(&parts, &mut tasks);
    let stop = Requests::new();
    servers::start(&parts, &program, logging, &readiness, &stop, &mut tasks).await?;
    let workers = program.workers.clone();
    tasks.spawn_once(
        "accepting",
        accept_all(listener, workers, drain.clone(), "tunnel connection", accept::serve),
    );
    tasks.spawn_once("listeners", gateway::run(program.proxy.clone(), program.workers.clone(), drain));
    tasks.spawn("idle memory", idle_memory::watch(program.workers.clone(), collect));
    tasks.spawn("maintenance", maintain(program.proxy.clone(), program.workers.clone()));
    tracing::info!(
        identity = %parts.identity,
        workers = program.workers.len(),
        version = env!("CARGO_PKG_VERSION"),
        "started"
    );
    let mut running = Running { program: &program, signal, readiness };
    let outcome = tokio::select! {
        () = stop.wait(|| drain::begin(&mut running)) => Ok(()),
        ended = tasks.ended() => Err(ended.into()),
        died = supervisor.failed() => Err(died.into()),
    };
    if outcome.is_ok() {
        let limit = parts.config.proxy.drain_timeout.get();
        let minimum = parts.config.drain_minimum.get().min(limit);
        tracing::info!(?minimum, "asked to stop: going on as before for a while");
        tokio::select! {
            () = tokio::time::sleep(minimum) => {}
            () = stop.wait(|| ()) => {}
        }
        let limit = limit - minimum;
        tracing::info!(?limit, "stopping: nothing new is accepted, requests in progress may finish");
        match drain::finish(&mut running, limit, stop.wait(|| ())).await {
            Drained::Finished => tracing::info!("stopped: every connection has finished"),
            Drained::Closed(closed) => tracing::warn!(closed, "the drain time is over"),
        }
    }
    flush(&program.proxy.published).await;
    // Joining threads blocks; the control tasks are not needed any more.
    if let Err(error) = tokio::task::spawn_blocking(move || supervisor.stop()).await {
        tracing::error!(%error, "the workers did not end in order");
    }
    outcome
}

/// Listens on an address; on all of IPv4 where `[::]` is asked for and there is no IPv6.
pub(crate) fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let fallback = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    let listener = match TcpListener::bind(address) {
        Err(error) if address.ip().is_unspecified() && address.is_ipv6() => {
            tracing::info!(%error, "no IPv6: listening on IPv4 only");
            TcpListener::bind(fallback)
        }
        bound => bound,
    };
    listener.with_context(|| format!("listen on {address}"))
}

async fn parts(config: Config, tasks: &mut Tasks) -> anyhow::Result<Parts> {
    let registry = Registry::new();
    let control_plane = ControlPlane::new(config.proxy.control_plane_config())?;
    let identity =
        SpiffeId::new(&config.proxy.trust_domain, &config.proxy.pod_namespace, &config.service_account)
            .context("the waypoint's own identity")?;
    let (trust, watching) = Trust::from_files(config.proxy.trust_config()?).await?;
    tasks.spawn("trust", watching);
    let issuer = Arc::new(GrpcIssuer::own_identity(control_plane.clone()));
    let (certificates, renewal) =
        CertificateStore::new(config.certificates.store_config(), issuer, trust.clone());
    certificates.prefetch(&identity)?;
    tasks.spawn("certificates", renewal);
    let (directory, reader) = Directory::new();
    let published = Arc::new(Publication::default());
    let roots = config.upstream_roots.as_deref();
    let tls = Arc::new(TlsClients::new(roots).context("the roots of upstreamRoots")?);
    tasks.spawn("certificates of policies", reload(tls.clone()));
    let exports = Exports::new(config.proxy.worker_count());
    let (discovery, driver) = feed::subscribe(
        &config,
        directory,
        reader.clone(),
        published.clone(),
        tls,
        exports.clone(),
        control_plane,
    );
    tasks.spawn("discovery", driver);
    let (log, access_writer) = config.proxy.access_log.open().context("open the access log")?;
    log.register(&registry);
    let (log, flows, flow_counter) =
        Flows::observe(log, config.proxy.flows.clone(), Observer::Waypoint).context("count flows")?;
    flows.register(&registry);
    let reporter = Arc::new(Reporter {
        requests: RequestMetrics::register(&registry, MAX_REQUEST_SERIES),
        connections: TcpMetrics::register(&registry, ambit_telemetry::tcp::DEFAULT_MAX_SERIES),
        log,
    });
    Ok(Parts {
        config,
        registry,
        trust,
        identity,
        certificates,
        directory: reader,
        published,
        discovery,
        reporter,
        exports,
        budget: WindowBudget::new(WINDOW_BUDGET),
        pool_counters: Arc::default(),
        flows,
        _access_writer: access_writer,
        _flow_counter: flow_counter,
    })
}

fn connection_settings(config: &Config) -> ConnectionSettings {
    ConnectionSettings {
        idle_timeout: config.limits.pool_idle.get(),
        drain_idle: config.proxy.drain_idle.get(),
        ..ConnectionSettings::default()
    }
}

fn pool_settings(config: &Config) -> PoolSettings {
    let client = ClientSettings {
        connection: connection_settings(config),
        handshake_timeout: config.limits.handshake_timeout.get(),
        connect_timeout: config.limits.connect_timeout.get(),
        ..ClientSettings::default()
    };
    PoolSettings { client, ..PoolSettings::default() }
}

/// Resolves host names by the resolvers of the waypoint's own pod.
fn names(config: &Config) -> anyhow::Result<Names> {
    let own = ResolvConf::of_system();
    // Hosts are full names, so no search path counts.
    let hostnames = Hostnames::new(&own.nameservers, &[], "").context("make a resolver of host names")?;
    Ok(Names::new(hostnames, &config.dynamic_hosts()?))
}

fn proxy(parts: &Parts, names: Names, drain: Drain) -> Proxy {
    let config = &parts.config;
    let server = ServerSettings {
        connection: connection_settings(config),
        handshake_timeout: config.limits.handshake_timeout.get(),
        ..ServerSettings::default()
    };
    Proxy {
        settings: Settings {
            network: config.proxy.network.as_str().into(),
            uid: WorkloadUid::of_pod(
                &config.proxy.cluster_id,
                &config.proxy.pod_namespace,
                &config.proxy.pod_name,
            ),
            node_id: node_id(&config.proxy),
            trusted_forwarders: config.trusted_forwarders.clone(),
            drain_idle: config.proxy.drain_idle.get(),
            limits: config.limits.clone(),
        },
        directory: parts.directory.clone(),
        published: parts.published.clone(),
        identity: parts.identity.clone(),
        certificates: parts.certificates.clone(),
        trust: parts.trust.clone(),
        connections: Connections::new(config.proxy.worker_count()),
        loads: Loads::default(),
        balancers: Balancers::default(),
        names,
        exports: parts.exports.clone(),
        drain,
        server: Server::new(server, parts.trust.clone(), parts.budget.clone()),
        clients: Clients::new(&config.limits),
        tallies: Tallies::default(),
        datagrams: Datagrams::new(config.limits.udp_sessions),
    }
}

/// The proxy as Istio names it: role, address, pod and domain.
fn node_id(proxy: &ProxySettings) -> Box<str> {
    let (pod, namespace) = (&proxy.pod_name, &proxy.pod_namespace);
    format!("waypoint~{}~{pod}.{namespace}~{namespace}.svc.cluster.local", proxy.instance_ip).into()
}

/// How long the end of the program waits for collectors to take what is left.
const FLUSH: Duration = Duration::from_secs(2);

/// Sends what waits for collectors.
async fn flush(published: &Publication) {
    let table = published.load_full().telemetry.clone();
    let all = futures_util::future::join_all(table.collectors().map(|it| async move { it.flush().await }));
    if tokio::time::timeout(FLUSH, all).await.is_err() {
        tracing::warn!("collectors did not take all spans and log records before the end");
    }
}

/// Ready once the first state of the control plane was applied, the waypoint's own workload is in it, and there is a
/// certificate.
fn readiness(parts: &Parts, tasks: &mut Tasks) -> Readiness {
    let readiness = Readiness::new();
    let (discovery, certificate, own) =
        (readiness.task("discovery"), readiness.task("certificate"), readiness.task("own workload"));
    let client = parts.discovery.clone();
    tasks.spawn_once("readiness of discovery", async move {
        if client.ready().await {
            discovery.done();
        }
    });
    let (store, identity) = (parts.certificates.clone(), parts.identity.clone());
    tasks.spawn_once("readiness of the certificate", async move {
        while let Err(error) = store.certificate(&identity).await {
            tracing::warn!(%error, "no certificate yet");
        }
        certificate.done();
    });
    let (directory, config) = (parts.directory.clone(), parts.config.clone());
    tasks.spawn_once("readiness of the own workload", async move {
        let uid = WorkloadUid::of_pod(
            &config.proxy.cluster_id,
            &config.proxy.pod_namespace,
            &config.proxy.pod_name,
        );
        let mut changes = directory.changes();
        while directory.load().workload(uid.as_str()).is_none() {
            if changes.changed().await.is_err() {
                return;
            }
        }
        own.done();
    });
    readiness
}

/// Accepts until the drain, each connection for the least loaded worker.
pub(crate) async fn accept_all<F, T>(
    listener: TcpListener,
    workers: Arc<Workers<Worker>>,
    mut drain: Drain,
    name: &'static str,
    serve: F,
) where
    F: Fn(Arc<Worker>, WorkerHandle, TcpStream, SocketAddr) -> T + Clone + Send + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    let mut acceptor = match Acceptor::new(listener) {
        Ok(acceptor) => acceptor,
        Err(error) => return tracing::error!(%error, "the listener can't be registered"),
    };
    loop {
        let accepted = tokio::select! {
            accepted = acceptor.accept() => accepted,
            () = drain.accepting_stopped() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let Some(home) = workers.in_turn() else { return };
                let serve = serve.clone();
                workers.place(home, name, stream, (), move |handle, worker, stream| {
                    serve(worker, handle, stream, peer)
                });
            }
            Err(error) => {
                tracing::error!(%error, "accepting has ended");
                return;
            }
        }
    }
}

/// Closes connections that nobody uses, that lead to workloads that are gone, or whose peer is believed no longer.
async fn maintain(proxy: Arc<Proxy>, workers: Arc<Workers<Worker>>) {
    let mut changes = proxy.directory.changes();
    let mut trusted = proxy.trust.subscribe();
    let mut seen = Revision::default();
    let mut due = tokio::time::interval(SWEEP_EVERY);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            changed = trusted.changed() => if changed.is_err() { return },
            _ = due.tick() => {}
        }
        let snapshot = proxy.directory.snapshot();
        let gone: HashSet<WorkloadUid> = match snapshot.removed_since(seen.snapshot) {
            Removed::These(gone) => gone.into_iter().cloned().collect(),
            Removed::TooMany => HashSet::new(),
        };
        seen = snapshot.revision();
        proxy.balancers.sweep(&snapshot, &proxy.published.load().backends);
        let now = std::time::SystemTime::now();
        for worker in workers.states() {
            worker.upstreams.sweep(proxy.settings.limits.upstream_idle.get(), |uid| gone.contains(uid));
            if !gone.is_empty() {
                worker.tunnels.evict(|key: &TunnelKey| gone.contains(&key.destination), InFlight::Finish);
            }
            worker.tunnels.retain(|peer| proxy.trust.recheck_open(peer, now).is_ok());
        }
    }
}

/// Reads the files that policies name again and again.
async fn reload(tls: Arc<TlsClients>) {
    loop {
        tokio::time::sleep(RELOAD_EVERY).await;
        let tls = tls.clone();
        if tokio::task::spawn_blocking(move || tls.reload()).await.is_err() {
            return;
        }
    }
}

/// The program as a drain stops it.
struct Running<'a> {
    program: &'a Program,
    signal: DrainSignal,
    readiness: Readiness,
}

impl Drainable for Running<'_> {
    fn stop_accepting(&mut self) {
        self.readiness.start_draining();
        self.signal.stop_accepting();
    }

    fn notify_peers(&mut self) {
        self.signal.notify_peers();
    }

    fn open(&self) -> usize {
        self.program.workers.handles().map(|handle| handle.load()).sum()
    }

    fn close_unused(&mut self) {
        self.program.workers.states().for_each(|worker| worker.tunnels.drain());
    }

    fn close(&mut self) -> usize {
        let closed = self.open();
        self.program.proxy.connections.review(|_| Some(CutReason::Drained));
        closed
    }

    fn abort(&mut self) {
        self.program.workers.states().for_each(|worker| worker.tunnels.cut());
    }
}
