//! Memory of the node proxies with many idle connections, and after they have closed.
//!
//! Clients open many connections, exchange one message on each and hold them; the resident memory of the node
//! proxies is read before, while and after. A process may have only so many descriptors, so the crowd is spread
//! over as many pairs of nodes as it takes. Bounded in count and time.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ambit_local::{Cluster, Command, Pod, PodOptions, Process};
use ambit_scale::machine;
use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::bed::{SERVER_PORTS, address, serve};
use crate::load::MESSAGE;

/// Connections that are being opened at a time.
const AT_ONCE: usize = 64;
/// How long all of them may take to open.
const OPENING: Duration = Duration::from_secs(120);
/// How long memory may take to come back after they have closed: idle tunnels are kept for two minutes.
const RETURNING: Duration = Duration::from_secs(200);
/// What counts as back: this much above the memory before, and this share of what the crowd took.
const BACK: f64 = 0.2;
/// Connections opened and closed before the first reading, so that one-time allocations are not counted.
const FIRST: usize = 1_000;
/// How long a client may take to close its connections.
const CLOSING: Duration = Duration::from_secs(30);
/// Descriptors that suffice for any crowd on one pair of nodes.
const WANTED: u64 = 1 << 20;
/// Time between two readings of memory: longer than a proxy takes to detect that it is idle.
const LOOK: Duration = Duration::from_secs(6);
/// The line by which the client reports that all connections are open.
pub(crate) const HELD: &str = "held";

/// Descriptors of a node proxy that are not a crowd's.
const RESERVED: usize = 2_000;

/// The measurements of one crowd of connections.
#[derive(Debug, Serialize)]
pub(crate) struct Crowd {
    /// Connections held at once.
    pub(crate) connections: usize,
    /// Pairs of nodes that they were spread over.
    pub(crate) pairs: usize,
    /// Seconds until all were open.
    pub(crate) opening_seconds: f64,
    /// Resident bytes of all proxies at clients' nodes: before, while held, after.
    pub(crate) source: Resident,
    /// The same at servers' nodes.
    pub(crate) destination: Resident,
}

/// Memory around a crowd.
#[derive(Debug, Serialize)]
pub(crate) struct Resident {
    /// Before.
    pub(crate) before: u64,
    /// While held.
    pub(crate) held: u64,
    /// After.
    pub(crate) after: u64,
}

impl Resident {
    /// Bytes for one of `connections`.
    pub(crate) fn each(&self, connections: usize) -> f64 {
        self.held.saturating_sub(self.before) as f64 / connections as f64
    }

    /// What stayed, as a share of the memory before.
    pub(crate) fn left(&self) -> f64 {
        self.after as f64 / self.before as f64 - 1.0
    }
}

/// Opens `connections` between pairs of nodes, holds them until memory was read, and closes them.
///
/// # Errors
/// Without root, or when a connection fails.
pub(crate) async fn measure(connections: usize) -> Result<Crowd> {
    let limit = usize::try_from(raise_descriptors()?)?;
    let per_pair = limit.saturating_sub(RESERVED).max(1);
    let pairs = connections.div_ceil(per_pair);
    let bed = PairBed::start(pairs).await?;
    let outcome = measure_on(&bed, connections).await;
    bed.cluster.shutdown().await;
    outcome
}

async fn measure_on(bed: &PairBed, connections: usize) -> Result<Crowd> {
    for client in bed.hold(FIRST).await? {
        client.terminate(CLOSING).await?;
    }
    let before = bed.settled(|_| true).await?;
    let start = Instant::now();
    let each = connections.div_ceil(bed.pairs.len());
    let clients = bed.hold(each).await?;
    let opening_seconds = start.elapsed().as_secs_f64();
    let held = bed.resident()?;
    for client in clients {
        client.terminate(CLOSING).await?;
    }
    let back = |now: [u64; 2]| (0..2).all(|n| now[n] as f64 <= before[n] as f64 * (1.0 + BACK));
    let after = bed.settled(back).await?;
    let [source, destination] =
        [0, 1].map(|n| Resident { before: before[n], held: held[n], after: after[n] });
    let pairs = bed.pairs.len();
    Ok(Crowd { connections: each * pairs, pairs, opening_seconds, source, destination })
}

/// Takes as many descriptors as the system allows, for this process and those that it starts.
fn raise_descriptors() -> Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit of descriptors")?;
    if setrlimit(Resource::RLIMIT_NOFILE, WANTED.max(soft), WANTED.max(hard)).is_ok() {
        return Ok(WANTED.max(soft));
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raising the limit of descriptors")?;
    Ok(hard)
}

/// Pairs of nodes, each with a client and a server.
struct PairBed {
    cluster: Cluster,
    pairs: Vec<(Pod, Pod)>,
    _servers: Vec<Process>,
}

impl PairBed {
    async fn start(pairs: usize) -> Result<Self> {
        let cluster = Cluster::builder().nodes(pairs * 2).start().await?;
        cluster.namespace("crowd", true).await?;
        let mut bed = Self { cluster, pairs: Vec::new(), _servers: Vec::new() };
        for n in 0..pairs {
            let pod = |name: &str, node| PodOptions::new("crowd", format!("{name}-{n}")).node(node);
            let client = bed.cluster.pod(pod("client", n * 2)).await?;
            let server = bed.cluster.pod(pod("server", n * 2 + 1)).await?;
            bed._servers.push(serve(&server).await?);
            bed.pairs.push((client, server));
        }
        Ok(bed)
    }

    /// `connections` on each pair, one pair after the other.
    async fn hold(&self, connections: usize) -> Result<Vec<Process>> {
        let mut clients = Vec::new();
        for (client, server) in &self.pairs {
            let command = Command::new(std::env::current_exe().context("finding this program")?)
                .args(["hold", "--server"])
                .arg(address(server).to_string())
                .arg("--connections")
                .arg(connections.to_string());
            let process = client.spawn(command).await?;
            process.wait_for_line(OPENING, |line| line == HELD || line.starts_with("Error")).await?;
            if process.last_line().is_none_or(|line| line != HELD) {
                bail!("the crowd did not open: {}", process.logs().join("\n"));
            }
            clients.push(process);
        }
        Ok(clients)
    }

    /// Resident bytes of the proxies at clients' nodes, and at servers'.
    fn resident(&self) -> Result<[u64; 2]> {
        let mut sums = [0; 2];
        for n in 0..self.cluster.nodes() {
            let pid =
                self.cluster.ztunnel(n)?.pid().with_context(|| format!("ztunnel of node {n} is gone"))?;
            sums[n % 2] += machine::resident(pid)?;
        }
        Ok(sums)
    }

    /// Reads the memory until it satisfies `enough` and has stopped falling, or [`RETURNING`] has passed.
    async fn settled(&self, enough: impl Fn([u64; 2]) -> bool) -> Result<[u64; 2]> {
        let deadline = Instant::now() + RETURNING;
        let mut last = self.resident()?;
        loop {
            tokio::time::sleep(LOOK).await;
            let now = self.resident()?;
            let falling = (0..2).any(|n| now[n] < last[n] - last[n] / 100);
            if (enough(now) && !falling) || Instant::now() > deadline {
                return Ok(now);
            }
            last = now;
        }
    }
}

/// The client: opens `connections` to `server` and the ports after it, in turn, says so, and holds them until
/// it is ended.
pub(crate) async fn run(server: SocketAddr, connections: usize) -> Result<()> {
    let mut held: Vec<TcpStream> = Vec::with_capacity(connections);
    let mut opening = tokio::task::JoinSet::new();
    for n in 0..connections {
        if opening.len() >= AT_ONCE {
            held.push(opening.join_next().await.context("no connection is being opened")???);
        }
        let port = server.port() + u16::try_from(n % usize::from(SERVER_PORTS))?;
        opening.spawn(open(SocketAddr::new(server.ip(), port)));
    }
    while let Some(opened) = opening.join_next().await {
        held.push(opened??);
    }
    println!("{HELD}");
    std::future::pending::<()>().await;
    drop(held);
    Ok(())
}

async fn open(server: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(server).await.with_context(|| format!("connecting to {server}"))?;
    let mut message = [b'R'; MESSAGE];
    stream.write_all(&message).await?;
    stream.read_exact(&mut message).await.with_context(|| format!("waiting for {server} to answer"))?;
    Ok(stream)
}
