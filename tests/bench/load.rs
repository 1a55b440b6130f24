//! The applications that the benchmark drives: a server and a client for each kind of work.
//!
//! Both run as child processes inside pod namespaces. The client prints one JSON [`Outcome`] on its
//! last line of output. Neither knows what lies between them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Interval, MissedTickBehavior, interval_at};

/// What a client does with its connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Work {
    /// The client sends as fast as it can; the server discards.
    Bulk,
    /// 64 bytes there, 64 bytes back, one at a time.
    RoundTrip,
    /// HTTP/1.1 requests on kept connections.
    Http,
    /// A connection, one round trip of 64 bytes, closed; one at a time on each task.
    Connect,
}

impl Work {
    /// The first byte a client sends, so that one server port serves every kind.
    fn tag(self) -> u8 {
        match self {
            Work::Bulk => b'B',
            Work::RoundTrip | Work::Connect => b'R',
            Work::Http => b'G',
        }
    }
}

/// What a client measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Bytes of payload that arrived (bulk), or 0.
    pub(crate) bytes: u64,
    /// Round trips, requests or connections that were completed.
    pub(crate) operations: u64,
    /// Operations that failed, by what the system said.
    pub(crate) failures: BTreeMap<String, u64>,
    /// Wall-clock seconds of the measured part.
    pub(crate) seconds: f64,
    /// Median latency of an operation, in microseconds.
    pub p50_us: f64,
    /// 99th percentile of the latency of an operation, in microseconds.
    pub p99_us: f64,
    /// 99.9th percentile of the latency of an operation, in microseconds.
    pub p999_us: f64,
}

impl Outcome {
    /// Operations that failed.
    pub(crate) fn errors(&self) -> u64 {
        self.failures.values().sum()
    }

    /// The outcome where none may fail.
    ///
    /// # Errors
    /// Says what failed of what, if anything did.
    pub(crate) fn without_failures(self) -> Result<Self> {
        ensure!(self.failures.is_empty(), "operations failed: {:?}", self.failures);
        Ok(self)
    }

    fn add_failures(&mut self, cause: String, count: u64) {
        *self.failures.entry(cause).or_default() += count;
    }
}

/// Bytes of a message of the round trip.
pub(crate) const MESSAGE: usize = 64;
const BULK_CHUNK: usize = 256 * 1024;
const REQUEST: &[u8] =
    b"GET /bench HTTP/1.1\r\nhost: server\r\nuser-agent: ambit-bench\r\naccept: */*\r\n\r\n";
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 64\r\n\r\n\
0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// Latencies kept per client; more operations than this are still counted.
const MAX_SAMPLES: usize = 4_000_000;

/// Serves every kind of work on `listen` and the `ports - 1` ports after it until the process ends.
pub(crate) async fn serve(listen: SocketAddr, ports: u16) -> Result<()> {
    let mut serving = tokio::task::JoinSet::new();
    for n in 0..ports {
        let address = SocketAddr::new(listen.ip(), listen.port() + n);
        let listener = TcpListener::bind(address).await.with_context(|| format!("binding {address}"))?;
        serving.spawn(serve_port(listener));
    }
    println!("ready");
    serving.join_next().await.context("no port to serve")??
}

async fn serve_port(listener: TcpListener) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await.context("accepting")?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            // A client that disconnects ends its connection, which is not an error.
            if let Err(error) = serve_one(stream).await {
                tracing::debug!(%error, "connection ended");
            }
        });
    }
}

async fn serve_one(mut stream: TcpStream) -> Result<()> {
    let mut first = [0u8; 1];
    stream.read_exact(&mut first).await?;
    match first[0] {
        b'B' => serve_bulk(stream).await,
        b'G' => serve_http(stream).await,
        _ => serve_echo(stream).await,
    }
}

/// Discards what comes; at the end of the stream answers with the count, so that the client measures arrival.
async fn serve_bulk(mut stream: TcpStream) -> Result<()> {
    let mut buffer = vec![0u8; BULK_CHUNK];
    let mut total = 0u64;
    loop {
        let n = stream.read(&mut buffer).await?;
        if n == 0 {
            break;
        }
        total += n as u64;
    }
    stream.write_all(&total.to_be_bytes()).await?;
    stream.shutdown().await?;
    Ok(())
}

async fn serve_echo(mut stream: TcpStream) -> Result<()> {
    let mut message = [0u8; MESSAGE];
    let mut have = 1;
    loop {
        let n = stream.read(&mut message[have..]).await?;
        if n == 0 {
            return Ok(());
        }
        have += n;
        if have == MESSAGE {
            stream.write_all(&message).await?;
            have = 0;
        }
    }
}

async fn serve_http(mut stream: TcpStream) -> Result<()> {
    let mut buffer = [0u8; 4096];
    let mut have = 1;
    loop {
        let n = stream.read(&mut buffer[have..]).await?;
        if n == 0 {
            return Ok(());
        }
        have += n;
        while have >= REQUEST.len() {
            stream.write_all(RESPONSE).await?;
            buffer.copy_within(REQUEST.len()..have, 0);
            have -= REQUEST.len();
        }
    }
}

/// What a client is to do.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Drive {
    /// The kind of work.
    #[arg(long, value_enum)]
    pub(crate) work: Work,
    /// Where the server listens.
    #[arg(long)]
    pub(crate) server: SocketAddr,
    /// Connections at once.
    #[arg(long)]
    pub(crate) connections: usize,
    /// How long it goes on.
    #[arg(long)]
    pub(crate) seconds: f64,
    /// How many ports of the server new connections go to in turn.
    #[arg(long, default_value_t = 1)]
    pub(crate) ports: u16,
    /// Milliseconds from one operation of a connection to its next; 0 is one after the other.
    #[arg(long, default_value_t = 0)]
    pub(crate) every_ms: u32,
}

impl Drive {
    /// Without pause, to one port.
    pub(crate) fn new(work: Work, server: SocketAddr, connections: usize, seconds: f64) -> Self {
        Self { work, server, connections, seconds, ports: 1, every_ms: 0 }
    }

    /// As arguments of a command line.
    pub(crate) fn to_arguments(self) -> Vec<String> {
        let Self { work, server, connections, seconds, ports, every_ms } = self;
        let work = work.to_possible_value().map(|work| work.get_name().to_owned()).unwrap_or_default();
        [
            ("--work", work),
            ("--server", server.to_string()),
            ("--connections", connections.to_string()),
            ("--seconds", seconds.to_string()),
            ("--ports", ports.to_string()),
            ("--every-ms", every_ms.to_string()),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }
}

/// When one connection's operations begin.
struct Pace {
    ticks: Option<Interval>,
    deadline: Instant,
}

impl Pace {
    /// Of connection `index` of all; those that pause do so in turn.
    fn new(drive: &Drive, index: usize, deadline: Instant) -> Self {
        let period = Duration::from_millis(u64::from(drive.every_ms));
        let share = index as f64 / drive.connections.max(1) as f64;
        let ticks = (drive.every_ms > 0).then(|| {
            let mut ticks = interval_at(tokio::time::Instant::now() + period.mul_f64(share), period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        Self { ticks, deadline }
    }

    /// The beginning of the next operation; nothing when it is time to end.
    async fn next(&mut self) -> Option<Instant> {
        if let Some(ticks) = &mut self.ticks {
            ticks.tick().await;
        }
        let now = Instant::now();
        (now < self.deadline).then_some(now)
    }
}

/// Runs a client and returns what it measured.
///
/// # Errors
/// When a connection that is kept fails; new ones that fail are counted.
pub(crate) async fn drive(drive: Drive) -> Result<Outcome> {
    let start = Instant::now();
    let deadline = start + Duration::from_secs_f64(drive.seconds);
    let mut tasks = Vec::with_capacity(drive.connections);
    for index in 0..drive.connections {
        tasks.push(tokio::spawn(drive_one(drive, Pace::new(&drive, index, deadline))));
    }
    let mut outcome = Outcome::default();
    let mut samples = Vec::new();
    for task in tasks {
        let (part, mut latencies) = task.await??;
        outcome.bytes += part.bytes;
        outcome.operations += part.operations;
        part.failures.into_iter().for_each(|(cause, count)| outcome.add_failures(cause, count));
        samples.append(&mut latencies);
    }
    outcome.seconds = start.elapsed().as_secs_f64();
    samples.sort_unstable();
    outcome.p50_us = percentile(&samples, 0.50);
    outcome.p99_us = percentile(&samples, 0.99);
    outcome.p999_us = percentile(&samples, 0.999);
    Ok(outcome)
}

/// The `q` quantile of sorted nanoseconds, in microseconds.
pub(crate) fn percentile(sorted: &[u64], q: f64) -> f64 {
    let index = ((sorted.len() as f64) * q) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).map_or(0.0, |&ns| ns as f64 / 1000.0)
}

async fn drive_one(drive: Drive, pace: Pace) -> Result<(Outcome, Vec<u64>)> {
    let Drive { work, server, ports, .. } = drive;
    match work {
        Work::Bulk => Ok((drive_bulk(server, pace.deadline).await?, Vec::new())),
        Work::RoundTrip => drive_messages(work, server, pace, &[b'R'; MESSAGE], MESSAGE).await,
        Work::Http => drive_messages(work, server, pace, REQUEST, RESPONSE.len()).await,
        Work::Connect => drive_connects(server, ports, pace).await,
    }
}

async fn open(server: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(server).await.with_context(|| format!("connecting to {server}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn drive_bulk(server: SocketAddr, deadline: Instant) -> Result<Outcome> {
    let mut stream = open(server).await?;
    let chunk = vec![Work::Bulk.tag(); BULK_CHUNK];
    while Instant::now() < deadline {
        stream.write_all(&chunk).await?;
    }
    stream.shutdown().await?;
    let mut count = [0u8; 8];
    stream.read_exact(&mut count).await.context("reading the count of bytes that arrived")?;
    Ok(Outcome { bytes: u64::from_be_bytes(count), operations: 1, ..Outcome::default() })
}

async fn drive_messages(
    work: Work,
    server: SocketAddr,
    mut pace: Pace,
    request: &[u8],
    answer: usize,
) -> Result<(Outcome, Vec<u64>)> {
    debug_assert_eq!(request[0], work.tag());
    let mut stream = open(server).await?;
    let mut buffer = vec![0u8; answer];
    let mut samples = Vec::with_capacity(100_000);
    let mut outcome = Outcome::default();
    while let Some(start) = pace.next().await {
        stream.write_all(request).await?;
        stream.read_exact(&mut buffer).await?;
        outcome.operations += 1;
        if samples.len() < MAX_SAMPLES {
            samples.push(start.elapsed().as_nanos() as u64);
        }
    }
    Ok((outcome, samples))
}

async fn drive_connects(server: SocketAddr, ports: u16, mut pace: Pace) -> Result<(Outcome, Vec<u64>)> {
    let mut samples = Vec::new();
    let mut outcome = Outcome::default();
    let mut turn = (0..ports).cycle();
    while let Some(start) = pace.next().await {
        let port = server.port() + turn.next().unwrap_or_default();
        match connect_once(SocketAddr::new(server.ip(), port)).await {
            Ok(()) => outcome.operations += 1,
            Err(error) => outcome.add_failures(error.root_cause().to_string(), 1),
        }
        samples.push(start.elapsed().as_nanos() as u64);
    }
    Ok((outcome, samples))
}

async fn connect_once(server: SocketAddr) -> Result<()> {
    let mut stream = open(server).await?;
    let mut message = [b'R'; MESSAGE];
    stream.write_all(&message).await?;
    stream.read_exact(&mut message).await?;
    Ok(())
}
