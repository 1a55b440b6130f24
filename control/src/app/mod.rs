//! The control plane, put together: sources → index → tables → the TLS port, beside the CA.

mod credentials;
mod error;
mod servers;
mod worker;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ambit_ca::{Authenticator, Authority, CertificateService, IssuancePolicy};
use ambit_telemetry::{Readiness, ReadinessTask, Registry, Target, logging};
use ambit_xds::{Server, ServerConfig};
use anyhow::Context;
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tonic::service::Routes;

use crate::api_server::connect;
use crate::config::Config;
use crate::index::SessionSecret;
use crate::keys::{Keys, Wanted};
use crate::observe::{Findings, Observed, OnKubernetes};
use crate::serve::admission::TokenAdmission;
use crate::serve::live_pods::LivePods;
use crate::serve::port::{self, PortLimits};
use crate::serve::publish::Published;
use crate::source::files::Directories;
use crate::source::kubernetes::ApiServer;
use crate::source::{Event, SourceName};
use crate::write::classes::ClassWriter;
use crate::write::deployments::WaypointWriter;
use crate::write::ingress::IngressWriter;
use crate::write::lease::Elector;
use crate::write::pod_certificates::PodCertificateSigner;
use crate::write::roots::{Namespaces, RootsWriter};
use crate::write::status::StatusWriter;
use crate::write::trust_bundle::TrustBundleWriter;
pub use error::AppError;
use servers::{listen, serve_admin, serve_metrics};
use worker::{IndexWorker, Input};

/// The task that serves the port.
const PORT: &str = "the port";
/// The task that holds the lease.
const ELECTION: &str = "the election";
/// Time that open streams have to end after a request to stop.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the start waits for keys of token issuers: without them, waypoints refuse the tokens.
const FIRST_KEYS: Duration = Duration::from_secs(10);
/// What waits for the index.
const INPUTS: usize = 64;
/// Descriptors for everything but the connections of the port.
const OWN_FILES: u64 = 128;

/// Runs the program until SIGTERM or SIGINT.
///
/// # Errors
/// Whatever keeps it from running.
pub fn main(config: Config) -> anyhow::Result<()> {
    let logging = logging::init(config.log_format, &config.log_level, Target::Stderr)
        .context("cannot start the log")?;
    let open_files = ambit_net::process::raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("control")
        .build()
        .context("cannot start the runtime")?;
    let result: Result<(), AppError> = runtime.block_on(async {
        let (quit, quitting) = watch::channel(false);
        let end = ended(quitting);
        tokio::pin!(end);
        // Starting takes as long as the API server is away.
        let app = tokio::select! {
            app = App::start(within(config, open_files), Some(&logging), quit) => app?,
            () = &mut end => return Ok(()),
        };
        app.run(end).await
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    drop(logging);
    Ok(result?)
}

/// The configuration with no more connections than the limit of open files allows; a part of it is kept for files, metrics,
/// readiness and the admin interface.
fn within(mut config: Config, open_files: u64) -> Config {
    let allowed = open_files.saturating_sub(OWN_FILES).max(1);
    config.max_connections = config.max_connections.min(usize::try_from(allowed).unwrap_or(usize::MAX));
    config
}

/// Resolves when a signal or the admin interface asks the program to end.
async fn ended(mut quitting: watch::Receiver<bool>) {
    let by_admin = async {
        // The sender lives as long as the admin interface; without one nobody asks by it.
        if quitting.wait_for(|quit| *quit).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let by_signal = async {
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(mut terminate), Ok(mut interrupt)) => {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "signals cannot be caught; they end the program at once");
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = by_admin => tracing::info!("stopping, as requested by the admin interface"),
        () = by_signal => tracing::info!("stopping after a signal"),
    }
}

/// The control plane, started and serving.
pub struct App {
    address: SocketAddr,
    metrics: Option<SocketAddr>,
    readiness: Readiness,
    tasks: Tasks,
    xds: Option<Server>,
    stop: watch::Sender<bool>,
    /// Tasks that end on request: the port's, and the election's on Kubernetes.
    ending: usize,
    /// Watches for as long as the program runs.
    sources: Option<Sources>,
}

/// What is watched. Dropping this ends the watch.
#[derive(Debug)]
enum Sources {
    Directories { _watch: Directories },
    Kubernetes { _watch: ApiServer },
}

impl std::fmt::Debug for App {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("App").field("address", &self.address).finish_non_exhaustive()
    }
}

/// Tasks without which the program cannot work, by name.
#[derive(Default)]
struct Tasks(JoinSet<(&'static str, String)>);

impl Tasks {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            task.await;
            (name, "it had nothing more to do".to_owned())
        });
    }

    /// The first that ends.
    async fn ended(&mut self) -> AppError {
        match self.0.join_next().await {
            Some(Ok((name, reason))) => AppError::Died { name, reason },
            Some(Err(error)) => AppError::Died { name: "a task", reason: error.to_string() },
            None => AppError::Died { name: "the program", reason: "it has no tasks".to_owned() },
        }
    }
}

impl App {
    /// Starts everything and returns once the sources were read and the port serves.
    ///
    /// # Errors
    /// Whatever keeps it from serving.
    pub async fn start(
        config: Config,
        logging: Option<&logging::Logging>,
        quit: watch::Sender<bool>,
    ) -> Result<App, AppError> {
        let mut tasks = Tasks::default();
        let readiness = Readiness::new();
        let (synced, serving) = (readiness.task("sources"), readiness.task("certificates and discovery"));
        let registry = Registry::new();
        let metrics = serve_metrics(&mut tasks, &config, &registry, &readiness).await?;
        let listener = listen(config.listen, "xDS and certificates").await?;
        let address = listener.local_addr().unwrap_or(config.listen);

        let client = api_server(&config).await?;
        let authority = credentials::start_authority(&mut tasks, &config, client.as_ref()).await?;
        let live_pods = Arc::new(LivePods::new(client.is_some()));
        let (authenticator, reviews) =
            credentials::start_authentication(&mut tasks, &config, client.as_ref(), &live_pods).await?;
        let (tls, keep_fresh) = authority.serving(config.server_names.clone())?;
        tasks.spawn("the port's certificate", keep_fresh);

        let kubernetes = client.as_ref().map(|_| OnKubernetes { reviews, written: Arc::default() });
        let (xds, certificates, observed) =
            services(&mut tasks, &config, authority, authenticator, live_pods, kubernetes);
        observed.register(&registry);
        if let Some(logging) = logging {
            logging.register(&registry);
        }
        serve_admin(&mut tasks, &config, &observed, logging, quit).await?;
        let (stop, stopping) = watch::channel(false);
        let (namespaces, seen_namespaces) = watch::channel(Namespaces::default());
        let sources =
            start_index(&mut tasks, &config, client.as_ref(), &observed, namespaces, synced).await?;
        if let Some(client) = &client {
            start_writers(&mut tasks, &config, client, &observed, seen_namespaces, stopping.clone());
        }

        let routes = Routes::new(xds.clone()).add_service(certificates.into_server()).prepare();
        let limits = PortLimits::new(config.max_connection_age, config.max_connections);
        tasks.spawn(PORT, port::serve(listener, tls, routes, limits, observed.port.clone(), stopping));
        serving.done();
        tracing::info!(%address, "serving");
        let ending = 1 + usize::from(client.is_some());
        Ok(App { address, metrics, readiness, tasks, xds: Some(xds), stop, ending, sources: Some(sources) })
    }

    /// Where xDS and certificates are served.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where metrics are served.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// Runs until it is asked to stop, then lets open streams end.
    ///
    /// # Errors
    /// [`AppError::Died`] when something essential ends by itself.
    pub async fn run(mut self, end: impl Future<Output = ()>) -> Result<(), AppError> {
        tokio::select! {
            () = end => {}
            died = self.tasks.ended() => {
                tracing::error!(error = %died, "the control plane cannot go on");
                return Err(died);
            }
        }
        self.readiness.start_draining();
        // Streams are ended so that proxies reconnect elsewhere; then the port stops accepting and waits for the rest.
        if let Some(xds) = self.xds.take() {
            xds.drain();
        }
        self.stop.send_replace(true);
        drop(self.sources.take());
        let all_ended = async {
            while self.ending > 0
                && let Some(ended) = self.tasks.0.join_next().await
            {
                self.ending -= usize::from(matches!(ended, Ok((PORT | ELECTION, _))));
            }
        };
        if tokio::time::timeout(DRAIN, all_ended).await.is_err() {
            tracing::warn!("streams were still open after {DRAIN:?} and are cut");
        }
        Ok(())
    }
}

/// The two services, and everything that they count.
fn services(
    tasks: &mut Tasks,
    config: &Config,
    authority: Authority,
    authenticator: Arc<dyn Authenticator>,
    live_pods: Arc<LivePods>,
    kubernetes: Option<OnKubernetes>,
) -> (Server, CertificateService, Observed) {
    let (published, publisher) = Published::new();
    tasks.spawn("the publisher", publisher.run());
    let policy = IssuancePolicy { trusted_node_proxies: config.trusted_node_proxies.clone() };
    let admission = TokenAdmission::new(authenticator.clone(), policy.clone(), published.store());
    let certificates = CertificateService::new(authority.clone(), authenticator, live_pods.clone(), policy);
    let xds_refused = admission.refused();
    let xds = Server::with_admission(published.store(), ServerConfig::default(), Arc::new(admission));
    let observed = Observed {
        source: Arc::default(),
        index: Arc::default(),
        keys: Arc::default(),
        published,
        live_pods,
        port: Arc::default(),
        xds: xds.metrics().clone(),
        xds_refused,
        issuance: certificates.metrics(),
        authority,
        findings: Findings::default(),
        statuses: Arc::default(),
        waypoints: Arc::default(),
        kubernetes,
        cluster_id: config.index.cluster_id.clone(),
    };
    (xds, certificates, observed)
}

/// The client of the API server, if that is the source.
async fn api_server(config: &Config) -> Result<Option<Client>, AppError> {
    for source in &config.sources {
        if let SourceName::Kubernetes { kubeconfig } = source {
            return Ok(Some(connect(kubeconfig.as_deref()).await?));
        }
    }
    Ok(None)
}

/// Starts the election, and what its winner writes.
fn start_writers(
    tasks: &mut Tasks,
    config: &Config,
    client: &Client,
    observed: &Observed,
    namespaces: watch::Receiver<Namespaces>,
    stopping: watch::Receiver<bool>,
) {
    let metrics = observed.kubernetes.as_ref().map(|kubernetes| kubernetes.written.clone());
    let metrics = metrics.unwrap_or_default();
    let (elector, leads) =
        Elector::new(client.clone(), &config.system_namespace, replica_name(), metrics.clone());
    tasks.spawn(ELECTION, elector.run(stopping));
    let roots = RootsWriter {
        client: client.clone(),
        authority: observed.authority.clone(),
        namespaces,
        metrics: metrics.clone(),
    };
    tasks.spawn("the writer of root ConfigMaps", roots.run(leads.clone()));
    let bundle = TrustBundleWriter {
        client: client.clone(),
        authority: observed.authority.clone(),
        metrics: metrics.clone(),
    };
    tasks.spawn("the writer of the trust bundle", bundle.run(leads.clone()));
    let signer = PodCertificateSigner {
        client: client.clone(),
        authority: observed.authority.clone(),
        live_pods: observed.live_pods.clone(),
        metrics: metrics.clone(),
    };
    tasks.spawn("the signer of pod certificates", signer.run(leads.clone()));
    let (findings, queue) = (observed.findings.clone(), observed.statuses.clone());
    let gateway_class = config.index.gateway_classes.first().cloned();
    let has_gateways = gateway_class.is_some();
    let statuses = StatusWriter::new(client.clone(), findings, queue, metrics.clone(), has_gateways);
    tasks.spawn("the writer of statuses", statuses.run(leads.clone()));
    let Some(template) = config.waypoint_template.clone() else { return };
    if let Some(gateway_class) = gateway_class {
        let writer = IngressWriter {
            client: client.clone(),
            gateway_class,
            namespace: config.index.ingress_namespace.clone(),
            findings: observed.findings.clone(),
            metrics: metrics.clone(),
        };
        tasks.spawn("the writer of Gateways for Ingresses", writer.run(leads.clone()));
    }
    let classes = config.deployed_waypoint_classes.clone();
    let (of_classes, of_waypoints) = (client.clone(), client.clone());
    let written = metrics.clone();
    let gateway_classes = config.index.gateway_classes.clone();
    let (waypoints, gateways) = (classes.clone(), gateway_classes.clone());
    let writer = ClassWriter { client: of_classes, waypoints, gateways, metrics: written };
    tasks.spawn("the writer of classes", writer.run(leads.clone()));
    let (findings, queue) = (observed.findings.clone(), observed.waypoints.clone());
    let writer =
        WaypointWriter::new(of_waypoints, template, classes, gateway_classes, findings, queue, metrics);
    tasks.spawn("the writer of waypoints", writer.run(leads));
}

/// A name that no other replica has, nor this one after a restart.
fn replica_name() -> String {
    let host = std::env::var("POD_NAME").or_else(|_| std::env::var("HOSTNAME"));
    format!("{}_{:08x}", host.unwrap_or_else(|_| "ambit-control".to_owned()), rand::random::<u32>())
}

/// Starts sources and index, and waits until everything that is there was taken: to a proxy that
/// reconnects, a resource that is not there is one that was removed.
async fn start_index(
    tasks: &mut Tasks,
    config: &Config,
    client: Option<&Client>,
    observed: &Observed,
    namespaces: watch::Sender<Namespaces>,
    synced: ReadinessTask,
) -> Result<Sources, AppError> {
    let (sources, events) = match client {
        Some(client) => {
            let (watch, events) =
                ApiServer::watch(client, &observed.source, !config.index.gateway_classes.is_empty());
            (Sources::Kubernetes { _watch: watch }, events)
        }
        None => {
            let (watch, events) = Directories::watch(directories(config), observed.source.clone())?;
            (Sources::Directories { _watch: watch }, events)
        }
    };
    let (ready, is_ready) = oneshot::channel();
    let (wanted_keys, wanted) = watch::channel(Wanted::new());
    let (unasked_keys, mut unasked) = watch::channel(0);
    let inputs = start_keys(tasks, config, observed, events, wanted)?;
    let worker = IndexWorker {
        published: observed.published.clone(),
        live_pods: observed.live_pods.clone(),
        metrics: observed.index.clone(),
        findings: observed.findings.clone(),
        namespaces,
        statuses: observed.statuses.clone(),
        waypoints: observed.waypoints.clone(),
        wanted_keys,
        unasked_keys,
        ready: Some(ready),
        synced: false,
    };
    let settings = config.index.clone();
    let (ended, has_ended) = oneshot::channel::<()>();
    // Computing is no work for the runtime: a large batch would hold up streams.
    let run = move || {
        worker.run(settings, inputs);
        drop(ended);
    };
    std::thread::Builder::new().name("index".to_owned()).spawn(run).map_err(AppError::Thread)?;
    tasks.spawn("the index", async move { drop(has_ended.await) });
    if is_ready.await.is_err() {
        return Err(AppError::Died {
            name: "the index",
            reason: "it ended before the sources were read".to_owned(),
        });
    }
    // A waypoint that reconnects would refuse tokens of issuers whose keys are not there yet.
    if tokio::time::timeout(FIRST_KEYS, unasked.wait_for(|unasked| *unasked == 0)).await.is_err() {
        tracing::warn!(
            "keys of some token issuers have not been fetched; their tokens are refused until they are"
        );
    }
    synced.done();
    Ok(sources)
}

/// Starts fetching keys, and gives the index what comes from the sources and of keys.
fn start_keys(
    tasks: &mut Tasks,
    config: &Config,
    observed: &Observed,
    mut events: mpsc::Receiver<Event>,
    wanted: watch::Receiver<Wanted>,
) -> Result<mpsc::Receiver<Input>, AppError> {
    let (send, inputs) = mpsc::channel(INPUTS);
    let (changed, mut fetched) = mpsc::channel(1);
    // The index ends with its sources.
    let authority = observed.authority.clone();
    let mut rotated = authority.subscribe();
    rotated.mark_changed();
    tasks.spawn("the sources", async move {
        loop {
            let input = tokio::select! {
                // First: no gateway is to choose a key of its own.
                biased;
                Ok(()) = rotated.changed() => {
                    Input::SessionSecret(SessionSecret::new(authority.derive("sessions")))
                }
                event = events.recv() => match event {
                    Some(event) => Input::Source(event),
                    None => return,
                },
                Some((address, keys)) = fetched.recv() => Input::Keys(address, keys),
            };
            if send.send(input).await.is_err() {
                return;
            }
        }
    });
    let keys = Keys::new(
        config.key_set_roots.as_deref(),
        config.key_set_refresh,
        &config.key_set_blocked_cidrs,
        observed.keys.clone(),
    )?;
    tasks.spawn("the keys of tokens", keys.run(wanted, changed));
    Ok(inputs)
}

fn directories(config: &Config) -> Vec<PathBuf> {
    let path = |source: &SourceName| match source {
        SourceName::Directory(path) => Some(path.clone()),
        SourceName::Kubernetes { .. } => None,
    };
    config.sources.iter().filter_map(path).collect()
}
