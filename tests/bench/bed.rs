//! The cluster that the benchmark runs on, and one measurement on it.
//!
//! Two nodes. Outside the mesh a client, a server on each node; inside it the same. The raw relay's halves run in
//! the client's and the server's own pods, where the node proxy's sockets would be.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ambit_local::{Cluster, Command, Pod, PodOptions, Process};
use ambit_scale::machine;
use anyhow::{Context, Result, bail};

use crate::load::{Drive, Outcome, Work};
use crate::relay::{Side, write_identity};
use crate::report::{Beside, Order, Path, Row, Sample, Steady, Storm};

const SERVER_PORT: u16 = 9100;
/// Ports that each server listens on, so that one client can have more connections than it has ports: closed
/// ones keep theirs for a minute.
pub(crate) const SERVER_PORTS: u16 = 16;
const NEAR_PORT: u16 = 9001;
const FAR_PORT: u16 = 9002;
const PLAIN_PORT: u16 = 9003;
/// From which range a client's ports are taken.
const PORT_RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Beyond the ports that anything listens on.
const ALL_PORTS: &str = "16000 65535";
/// Connections that a storm opens at a time.
const STORM_CONNECTIONS: usize = 64;
/// Kept connections of a steady load, and clients that open new ones.
const STEADY_CONNECTIONS: usize = 10;
/// Milliseconds between two operations of each.
const STEADY_MS: u32 = 100;
/// How long a proxy's memory may take to settle after its start.
const RESTING: Duration = Duration::from_secs(60);
/// Time between two readings: longer than a proxy takes to detect that it is idle.
const LOOK: Duration = Duration::from_secs(11);
/// How long a server or relay may take to listen.
const READY: Duration = Duration::from_secs(10);

/// Client and servers of one namespace.
struct Pods {
    client: Pod,
    near_server: Pod,
    far_server: Pod,
}

/// The cluster with its servers and relays running.
pub(crate) struct Bed {
    cluster: Cluster,
    outside: Pods,
    inside: Pods,
    /// Near half, far half, and the plain relay of the same node.
    relays: [Process; 3],
    program: PathBuf,
    /// Holds servers and the relay's identity as long as the bed.
    _servers: Vec<Process>,
    _identity: tempfile::TempDir,
}

impl Bed {
    /// Brings everything up.
    ///
    /// # Errors
    /// Without root, or when a program is missing or does not become ready.
    pub(crate) async fn start() -> Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        let cluster = Cluster::builder().nodes(2).start().await?;
        cluster.namespace("outside", false).await?;
        cluster.namespace("inside", true).await?;
        let outside = Pods::make(&cluster, "outside").await?;
        let inside = Pods::make(&cluster, "inside").await?;
        for client in [&outside.client, &inside.client] {
            client
                .run(|| std::fs::write(PORT_RANGE, ALL_PORTS))
                .await?
                .context("widening the range of ports")?;
        }
        let mut servers = Vec::new();
        for pod in [&outside.near_server, &outside.far_server, &inside.near_server, &inside.far_server] {
            servers.push(serve(pod).await?);
        }
        let identity = tempfile::tempdir().context("a directory for the relay's identity")?;
        write_identity(identity.path())?;
        let relay = |side: &str, listen: SocketAddr, to: SocketAddr| {
            Command::new(&program)
                .args(["relay", "--side", side])
                .arg("--listen")
                .arg(listen.to_string())
                .arg("--to")
                .arg(to.to_string())
                .arg("--identity")
                .arg(identity.path())
        };
        let far = SocketAddr::new(IpAddr::V4(outside.far_server.ip()), FAR_PORT);
        let far_app = address(&outside.far_server);
        let near_app = address(&outside.near_server);
        let relays = [
            start(&outside.client, relay(name(Side::Near), loopback(NEAR_PORT), far)).await?,
            start(&outside.far_server, relay(name(Side::Far), far, far_app)).await?,
            start(&outside.client, relay(name(Side::Plain), loopback(PLAIN_PORT), near_app)).await?,
        ];
        Ok(Self { cluster, outside, inside, relays, program, _servers: servers, _identity: identity })
    }

    /// Takes everything down.
    ///
    /// # Errors
    /// None today; the signature leaves room for a cluster that can't be removed.
    pub(crate) async fn stop(self) -> Result<()> {
        let Self { cluster, .. } = self;
        cluster.shutdown().await;
        Ok(())
    }

    /// Resident memory of each node proxy once it no longer falls, bytes: starting needs more than being there.
    ///
    /// # Errors
    /// As [`Bed::resident`].
    pub(crate) async fn at_rest(&self) -> Result<Vec<u64>> {
        let mut last = self.resident()?;
        let deadline = Instant::now() + RESTING;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = self.resident()?;
            let falls = now.iter().zip(&last).any(|(now, last)| *now < last - last / 100);
            if !falls || Instant::now() > deadline {
                return Ok(now);
            }
            last = now;
        }
    }

    /// Resident memory of each node proxy, bytes.
    ///
    /// # Errors
    /// When a proxy is gone.
    pub(crate) fn resident(&self) -> Result<Vec<u64>> {
        self.proxies()?.into_iter().map(machine::resident).collect()
    }

    fn proxies(&self) -> Result<Vec<u32>> {
        (0..self.cluster.nodes())
            .map(|node| {
                self.cluster.ztunnel(node)?.pid().with_context(|| format!("ztunnel of node {node} is gone"))
            })
            .collect()
    }

    /// The pods of a path, the address that their client dials, and the processes in between.
    fn route(&self, row: &Row, path: Path) -> Result<(&Pods, SocketAddr, Vec<u32>)> {
        let pods = if path == Path::Ambit { &self.inside } else { &self.outside };
        let server = if row.same_node { &pods.near_server } else { &pods.far_server };
        let direct = address(server);
        let (target, between) = match path {
            Path::NoMesh => (direct, Vec::new()),
            Path::Raw if row.same_node => (loopback(PLAIN_PORT), vec![self.relays[2].pid()]),
            Path::Raw => (loopback(NEAR_PORT), vec![self.relays[0].pid(), self.relays[1].pid()]),
            Path::Ambit => (direct, self.proxies()?),
        };
        Ok((pods, target, between))
    }

    /// Runs one row over one path once.
    ///
    /// # Errors
    /// When the client fails, or any of its operations does.
    pub(crate) async fn sample(&self, row: &Row, path: Path, seconds: f64) -> Result<Sample> {
        let (pods, target, between) = self.route(row, path)?;
        // A connection before the measured ones: certificates, pools and caches are as in service.
        let drive = |seconds| Drive::new(row.work.0, target, row.connections, seconds);
        self.drive(&pods.client, drive(0.2)).await?;
        let before = cpu_seconds(&between)?;
        let outcome = self.drive(&pods.client, drive(seconds)).await?;
        let cpu_seconds = cpu_seconds(&between)? - before;
        Ok(Sample { outcome: outcome.without_failures()?, cpu_seconds })
    }

    /// Round trips on `small` connections alone, and the same beside one bulk stream of the same pair of pods.
    ///
    /// # Errors
    /// When a client fails, or any of its operations does.
    pub(crate) async fn beside(
        &self,
        path: Path,
        order: Order,
        small: usize,
        seconds: f64,
    ) -> Result<Beside> {
        let row = Row::new(Work::RoundTrip, false, small);
        let alone = self.sample(&row, path, seconds).await?.outcome;
        let (pods, target, _) = self.route(&row, path)?;
        // Buffers of the bulk stream have grown, or all small connections are open, when the other begins.
        let start = Duration::from_millis(300);
        let (bulk_after, small_after) = match order {
            Order::BulkFirst => (Duration::ZERO, start),
            Order::SmallFirst => (start, Duration::ZERO),
        };
        let bulk_seconds = match order {
            Order::BulkFirst => seconds + 2.0 * start.as_secs_f64(),
            Order::SmallFirst => seconds,
        };
        let after = |delay: Duration, drive| async move {
            tokio::time::sleep(delay).await;
            self.drive(&pods.client, drive).await
        };
        let (bulk, beside) = tokio::try_join!(
            after(bulk_after, Drive::new(Work::Bulk, target, 1, bulk_seconds)),
            after(small_after, Drive::new(Work::RoundTrip, target, small, seconds)),
        )?;
        Ok(Beside { path, order, small, alone, beside: beside.without_failures()?, bulk })
    }

    /// A hundred requests a second on kept connections and a hundred new connections a second, from one node to the other.
    ///
    /// # Errors
    /// When a client fails, or any of its operations does.
    pub(crate) async fn steady(&self, path: Path, seconds: f64) -> Result<Steady> {
        let row = Row::new(Work::Http, false, STEADY_CONNECTIONS);
        let (pods, target, _) = self.route(&row, path)?;
        let paced =
            |work| Drive { every_ms: STEADY_MS, ..Drive::new(work, target, STEADY_CONNECTIONS, seconds) };
        let (kept, new) = tokio::try_join!(
            self.drive(&pods.client, paced(Work::Http)),
            self.drive(&pods.client, paced(Work::Connect)),
        )?;
        Ok(Steady { path, kept: kept.without_failures()?, new: new.without_failures()? })
    }

    /// New connections from one node to the other without pause.
    ///
    /// # Errors
    /// When the client fails. Failed connections are counted in what it returns.
    pub(crate) async fn storm(&self, seconds: f64) -> Result<Storm> {
        let row = Row::new(Work::Connect, false, STORM_CONNECTIONS);
        let before = self.resident()?;
        let (pods, target, _) = self.route(&row, Path::Ambit)?;
        let drive = Drive::new(row.work.0, target, row.connections, seconds);
        let outcome = self.drive(&pods.client, Drive { ports: SERVER_PORTS, ..drive }).await?;
        let resident = before.into_iter().zip(self.resident()?).collect();
        Ok(Storm { outcome, resident })
    }

    async fn drive(&self, client: &Pod, drive: Drive) -> Result<Outcome> {
        let command = Command::new(&self.program).arg("drive").args(drive.to_arguments());
        let process = client.spawn(command).await?;
        let status = process.wait_within(Duration::from_secs_f64(drive.seconds + 30.0)).await?;
        let last = process.last_line().unwrap_or_default();
        if !status.success() {
            bail!("the client ended with {status}: {}", process.logs().join("\n"));
        }
        serde_json::from_str(&last).with_context(|| format!("the client's outcome {last:?}"))
    }
}

impl Pods {
    async fn make(cluster: &Cluster, namespace: &str) -> Result<Self> {
        Ok(Self {
            client: cluster.pod(PodOptions::new(namespace, "client").node(0)).await?,
            near_server: cluster.pod(PodOptions::new(namespace, "near-server").node(0)).await?,
            far_server: cluster.pod(PodOptions::new(namespace, "far-server").node(1)).await?,
        })
    }
}

/// The first address of the server in a pod.
pub(crate) fn address(pod: &Pod) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(pod.ip()), SERVER_PORT)
}

/// Starts a server for every kind of work in a pod.
///
/// # Errors
/// When it does not become ready.
pub(crate) async fn serve(pod: &Pod) -> Result<Process> {
    let program = std::env::current_exe().context("finding this program")?;
    let command = Command::new(program).args(["serve", "--listen"]).arg(address(pod).to_string());
    start(pod, command.arg("--ports").arg(SERVER_PORTS.to_string())).await
}

fn name(side: Side) -> &'static str {
    match side {
        Side::Near => "near",
        Side::Far => "far",
        Side::Plain => "plain",
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port)
}

/// Starts a program in a pod and waits until it says that it is ready.
async fn start(pod: &Pod, command: Command) -> Result<Process> {
    let process = pod.spawn(command).await?;
    process.wait_for_line(READY, |line| line == "ready").await?;
    Ok(process)
}

/// CPU seconds that several processes together have used so far.
fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    pids.iter().map(|&pid| machine::cpu_seconds(pid)).sum()
}
