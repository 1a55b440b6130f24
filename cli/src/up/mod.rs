//! `ambit up DIR`: the mesh on this machine.
//!
//! Three stages of one process ([`ambit_local::isolate`]): the last one builds the cluster, shows the flows between
//! workloads, opens a port of the host, and checks what the mesh promises.

mod answers;
mod datagrams;
mod expectations;
mod flows;
mod forward;
mod gateways;
mod proof;
mod requests;
mod screen;

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ambit_local::Cluster;
use ambit_local::isolate::{self, Stage};
use ambit_net::seqpacket::SeqPacketListener;
use anyhow::{Context, ensure};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::remote::{self, Endpoint};

use expectations::Expectations;
use forward::Forward;
use proof::Proof;
use screen::{Messages, Screen};

/// How often the table is drawn.
const REFRESH: Duration = Duration::from_secs(1);
/// How long a pod may be unready before it is reported.
const STARTING: Duration = Duration::from_secs(10);
/// How long workloads may take to become ready before that counts as a failure.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Options of `ambit up`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Directory of manifests; edit it while the mesh runs.
    directory: PathBuf,
    /// Prove what the mesh promises, once, and end: with 0 only if all of it held.
    #[arg(long)]
    once: bool,
    /// Nodes, 1 to 64.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=64))]
    nodes: u8,
    /// Port of this machine's loopback at which the application can be opened; default is the one that the annotation
    /// `ambit.dev/open` of a service or Gateway names. 0 takes any free one.
    #[arg(long, value_name = "PORT")]
    open: Option<u16>,
    /// Program that stands for an image; an image without one stands for the program of its name beside `ambit`.
    #[arg(long = "image", value_name = "IMAGE=PROGRAM", value_parser = image_and_program)]
    images: Vec<(String, PathBuf)>,
    /// Only IPv4.
    #[arg(long)]
    no_ipv6: bool,
    /// Where the outputs of the mesh's programs are kept; default is nowhere.
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
}

fn image_and_program(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((image, program)) if !image.is_empty() && Path::new(program).is_file() => {
            Ok((image.to_owned(), PathBuf::from(program)))
        }
        Some((_, program)) => Err(format!("{program:?} is no program")),
        None => Err("it has the form IMAGE=PROGRAM".to_owned()),
    }
}

/// Runs the command in whichever stage this process is.
///
/// # Errors
/// When the cluster can't be brought up.
pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    match isolate::stage() {
        Stage::Supervisor => {
            let directory = &options.directory;
            ensure!(directory.is_dir(), "{} is no directory", directory.display());
            let (_endpoint, socket) = Endpoint::listen()?;
            let mut descriptors = vec![socket];
            if let Some(listener) = listen(options)? {
                descriptors.push(OwnedFd::from(listener));
                descriptors.push(isolate::client_socket()?);
            }
            for listener in gateways::listeners(directory) {
                let attempt = || format!("open a port for Gateway {}", listener.gateway.name);
                descriptors.push(gateways::bind(&listener).with_context(attempt)?);
            }
            Ok(isolate::supervise(&descriptors)?)
        }
        Stage::Init => Ok(isolate::init()?),
        Stage::Program => {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
            let code = runtime.block_on(up(options));
            // Remaining tasks end with the process.
            runtime.shutdown_background();
            code
        }
    }
}

/// Takes the port before the namespaces are made: it belongs to the user's own network.
fn listen(options: &Options) -> anyhow::Result<Option<TcpListener>> {
    let Some(port) = port_to_open(options) else { return Ok(None) };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let attempt = || format!("open {address} (choose another port with --open PORT, or 0 for any)");
    TcpListener::bind(address).map(Some).with_context(attempt)
}

fn port_to_open(options: &Options) -> Option<u16> {
    options.open.or_else(|| expectations::port_to_open(&options.directory))
}

/// Leads the ports that were taken for Gateways to them.
fn open_gateways(
    options: &Options,
    descriptors: impl Iterator<Item = OwnedFd>,
    cluster: &Arc<Cluster>,
    screen: &mut Screen,
) -> anyhow::Result<Vec<Forward>> {
    let mut open = Vec::new();
    for (wanted, descriptor) in gateways::listeners(&options.directory).into_iter().zip(descriptors) {
        let gateways::Listener { gateway, port, scheme } = wanted;
        let name = format!("{}/{}", gateway.namespace, gateway.name);
        let forward = match scheme {
            "udp" => datagrams::start(UdpSocket::from(descriptor), cluster, gateway, port)?,
            _ => Forward::start(TcpListener::from(descriptor), None, cluster, gateway, Some(port))?,
        };
        screen.say(&format!("gateway {name} port {port}: {scheme}://{}", forward.address()));
        open.push(forward);
    }
    Ok(open)
}

async fn up(options: &Options) -> anyhow::Result<ExitCode> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let ended = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let mut ended = std::pin::pin!(ended);
    let mut screen = Screen::new(options.once);
    screen.wait_for("bringing the mesh up");
    let cluster = tokio::select! {
        started = start(options) => started?,
        // Everything that was made so far is removed with the namespaces.
        () = &mut ended => return Ok(ExitCode::SUCCESS),
    };
    let expectations = Expectations::read(&cluster);
    let mut descriptors = isolate::inherited().await?.into_iter();
    let commands = descriptors.next().context("the supervisor passed no socket")?;
    let commands =
        tokio::spawn(remote::serve(SeqPacketListener::from_fd(commands)?, Arc::downgrade(&cluster)));
    let page = if port_to_open(options).is_some() { descriptors.next() } else { None };
    let forward = match page {
        Some(listener) => {
            let listener = TcpListener::from(listener);
            Some(Forward::page(listener, descriptors.next(), &cluster, &expectations)?)
        }
        None => None,
    };
    let gateways = open_gateways(options, descriptors, &cluster, &mut screen)?;
    if let Some(forward) = &forward {
        screen.say(&format!("open http://{}{}", forward.address(), expectations.page_path()));
    }
    let work = async {
        if options.once {
            once(&cluster, &expectations, forward.as_ref(), &mut screen).await
        } else {
            stay(&cluster, &expectations, forward.as_ref(), &mut screen).await
        }
    };
    let code = tokio::select! {
        code = work => code,
        () = &mut ended => ExitCode::SUCCESS,
    };
    screen.end();
    drop((forward, gateways));
    commands.abort();
    if let Some(cluster) = Arc::into_inner(cluster) {
        cluster.shutdown().await;
    }
    Ok(code)
}

async fn start(options: &Options) -> anyhow::Result<Arc<Cluster>> {
    let mut builder = Cluster::builder()
        .nodes(usize::from(options.nodes))
        .manifests(&options.directory)
        .directory(Path::new(isolate::DIRECTORY))
        .restart_programs();
    if options.no_ipv6 {
        builder = builder.ipv6(false);
    }
    for (image, program) in &options.images {
        builder = builder.program(image, program);
    }
    if let Some(logs) = &options.logs {
        builder = builder.log_dir(logs);
    }
    Ok(Arc::new(builder.start().await?))
}

/// Runs all checks once.
async fn once(
    cluster: &Arc<Cluster>,
    expectations: &Expectations,
    forward: Option<&Forward>,
    screen: &mut Screen,
) -> ExitCode {
    screen.wait_for("waiting for the workloads");
    let ready = proof::wait_ready(cluster, READY_WITHIN).await;
    screen.wait_for("watching their traffic");
    let mut proof = Proof::new();
    proof.note("every workload is ready and captured", ready);
    proof.run(cluster, expectations, forward).await;
    screen.draw(&messages(cluster).await, &flows::read(cluster).await, Some(&proof));
    if proof.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Shows the table until the user ends it. The checks run as soon as the workloads are ready.
async fn stay(
    cluster: &Arc<Cluster>,
    expectations: &Expectations,
    forward: Option<&Forward>,
    screen: &mut Screen,
) -> ExitCode {
    let mut proof = None;
    let proving = async {
        let mut proof = Proof::new();
        let ready = proof::wait_ready(cluster, READY_WITHIN).await;
        proof.note("every workload is ready and captured", ready);
        proof.run(cluster, expectations, forward).await;
        proof
    };
    let mut proving = std::pin::pin!(proving);
    let mut refresh = tokio::time::interval(REFRESH);
    refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            done = &mut proving, if proof.is_none() => proof = Some(done),
            _ = refresh.tick() => {
                let flows = flows::read(cluster).await;
                screen.draw(&messages(cluster).await, &flows, proof.as_ref());
            }
        }
    }
}

async fn messages(cluster: &Cluster) -> Messages {
    Messages { troubles: troubles(cluster).await, notes: cluster.ignored() }
}

/// Problems, one line each.
async fn troubles(cluster: &Cluster) -> Vec<String> {
    let mut lines = cluster.problems();
    lines.extend(cluster.control_problems().await);
    lines.extend(cluster.findings().await);
    lines.extend(cluster.program_troubles());
    for pod in cluster.pods() {
        let view = pod.view();
        // A pod that is starting or terminating is not a problem.
        let settled = view.terminating.is_none() && view.started.elapsed().is_ok_and(|age| age > STARTING)
            || view.failure.is_some();
        if (!view.is_ready() && settled) || view.restarts() > 0 || view.is_stuck() {
            let restarts = match view.restarts() {
                0 => String::new(),
                1 => ", restarted once".to_owned(),
                count => format!(", restarted {count} times"),
            };
            lines.push(format!("{pod}: {}{restarts}", view.summary()));
        }
    }
    lines
}
