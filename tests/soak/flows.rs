//! The mixed load: flows of new and kept connections, bulk and DNS, each at a steady rate.
//!
//! Kept connections live until a node proxy on their way is handed over; then the client ends them properly and
//! opens others within [`RENEWAL`], as applications do while an old proxy drains.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ambit_local::Pod;
use ambit_tests::{apps, dns};
use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::bed::{Bed, ECHO, GREETER, HTTP, MESH, MOVING, ROLLED};
use crate::flow_log::{FlowLog, Title};

/// How long a request may take before it counts as failed.
const LIMIT: Duration = Duration::from_secs(10);
/// How long a resolver waits for an answer before it asks again, and how often it asks (resolv.conf(5): timeout,
/// attempts).
const DNS_TIMEOUT: Duration = Duration::from_secs(2);
const DNS_ATTEMPTS: usize = 3;
/// Within what time after a hand-over kept connections are opened again.
const RENEWAL: Duration = Duration::from_secs(20);
/// Nodes of the cluster.
const NODES: usize = 2;
/// Bytes of a chunk on a kept bulk connection.
const CHUNK: usize = 256 << 10;
/// Bytes of a bulk transfer on a new connection, each way.
const TRANSFER: usize = 4 << 20;

/// What a flow does.
#[derive(Clone, Debug)]
enum Kind {
    /// A connection, an HTTP request.
    New,
    /// A look-up of a headless service, a connection to what it gave, an HTTP request.
    Headless { resolver: SocketAddr },
    /// A connection on which the server speaks first.
    ServerFirst,
    /// A connection on which so many bytes go there and back, ended by half-close.
    Transfer(usize),
    /// HTTP requests on so many kept connections.
    KeptHttp(u32),
    /// Messages of so many bytes, echoed, on so many kept connections.
    KeptEcho(u32, usize),
    /// A DNS question.
    Dns { name: &'static str, ipv6: bool },
}

/// A steady stream of requests of one kind.
#[derive(Clone, Debug)]
struct Flow {
    title: Title,
    kind: Kind,
    client: Pod,
    target: SocketAddr,
    /// Requests a second, over all its connections.
    rate: f64,
}

/// All flows, ready to run.
#[derive(Debug)]
pub(crate) struct Flows {
    flows: Vec<Flow>,
    /// Hand-overs of each node's proxy so far.
    handed_over: Arc<[AtomicU64; NODES]>,
}

impl Flows {
    /// The load for a bed.
    ///
    /// # Errors
    /// When a service has no address.
    pub(crate) fn new(bed: &Bed) -> Result<Self> {
        let vip = |service, port, ipv6| bed.vip(MESH, service, port, ipv6);
        let resolver = bed.vip("kube-system", "kube-dns", 53, false)?;
        let far = |port| SocketAddr::new(bed.far.ip().into(), port);
        let near_v6 = bed.near.ipv6().map(|ip| SocketAddr::new(ip.into(), HTTP));
        let (client, other, outside) = (&bed.client, &bed.other_client, &bed.outside);
        let moving = bed.vip(MOVING, "web", HTTP, false)?;
        let both: &'static [usize] = &[0, 1];
        let flow = |name, kind, client: &Pod, target, rate, nodes| {
            let kept = matches!(kind, Kind::KeptHttp(_) | Kind::KeptEcho(..));
            let small = !matches!(kind, Kind::Transfer(_) | Kind::KeptEcho(_, CHUNK) | Kind::Dns { .. });
            Flow { title: Title { name, kept, small, nodes }, kind, client: client.clone(), target, rate }
        };
        let headless = Kind::Headless { resolver };
        let mut flows = vec![
            flow("new, VIP of both nodes", Kind::New, client, vip("web", HTTP, false)?, 20.0, both),
            flow("new, VIP across, IPv6", Kind::New, client, vip("far", HTTP, true)?, 10.0, both),
            flow("new, pod address across", Kind::New, client, far(HTTP), 10.0, both),
            flow("new, VIP, from the other node", Kind::New, other, vip("near", HTTP, false)?, 10.0, both),
            flow("new, headless name", headless, client, far(HTTP), 5.0, both),
            flow("new, server first", Kind::ServerFirst, client, vip("far", GREETER, false)?, 5.0, both),
            flow("new, application rolled out", Kind::New, client, vip("rolled", ROLLED, false)?, 10.0, both),
            flow("new, from outside the mesh", Kind::New, outside, far(HTTP), 5.0, &[1]),
            flow("new, namespace that moves", Kind::New, &bed.moving.client, moving, 5.0, both),
            flow("new, 4 MiB both ways across", Kind::Transfer(TRANSFER), client, far(ECHO), 0.5, both),
            flow(
                "kept HTTP, VIP of both nodes",
                Kind::KeptHttp(10),
                client,
                vip("web", HTTP, false)?,
                40.0,
                both,
            ),
            flow("kept HTTP across, IPv6", Kind::KeptHttp(5), client, vip("far", HTTP, true)?, 10.0, both),
            flow("kept echo across, 50 nearly idle", Kind::KeptEcho(50, 64), client, far(ECHO), 10.0, both),
            flow(
                "kept echo, same node",
                Kind::KeptEcho(20, 64),
                client,
                vip("near", ECHO, false)?,
                10.0,
                &[0],
            ),
            flow("kept bulk across", Kind::KeptEcho(1, CHUNK), client, vip("far", ECHO, false)?, 8.0, both),
            flow(
                "kept bulk, same node",
                Kind::KeptEcho(1, CHUNK),
                client,
                vip("near", ECHO, false)?,
                8.0,
                &[0],
            ),
            flow("kept HTTP, from outside the mesh", Kind::KeptHttp(5), outside, far(HTTP), 5.0, &[1]),
            flow("kept HTTP, namespace that moves", Kind::KeptHttp(5), &bed.moving.client, moving, 5.0, both),
        ];
        flows.extend(near_v6.map(|near| flow("new, same node, IPv6", Kind::New, client, near, 10.0, &[0])));
        for (title, name, ipv6, rate) in [
            ("DNS, A of a service", "web.soak.svc.cluster.local.", false, 10.0),
            ("DNS, AAAA of a service", "far.soak.svc.cluster.local.", true, 5.0),
            ("DNS, a name outside the cluster", "outside.example.", false, 2.0),
        ] {
            flows.push(flow(title, Kind::Dns { name, ipv6 }, client, resolver, rate, &[0]));
        }
        Ok(Self { flows, handed_over: Arc::default() })
    }

    /// The titles of the flows, in the order of the log.
    pub(crate) fn titles(&self) -> Vec<Title> {
        self.flows.iter().map(|flow| flow.title.clone()).collect()
    }

    /// Says that a node's proxy is being handed over: kept connections through it are renewed.
    pub(crate) fn handed_over(&self, node: usize) {
        if let Some(count) = self.handed_over.get(node) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Runs all flows until they are stopped.
    pub(crate) fn run(&self, flow_log: &Arc<FlowLog>) -> Load {
        let stopping = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for (index, flow) in self.flows.iter().enumerate() {
            let runner = Runner {
                index,
                flow: flow.clone(),
                flow_log: Arc::clone(flow_log),
                stopping: Arc::clone(&stopping),
                handed_over: Arc::clone(&self.handed_over),
            };
            match flow.kind {
                Kind::KeptHttp(connections) | Kind::KeptEcho(connections, _) => {
                    let pause = Duration::from_secs_f64(f64::from(connections) / flow.rate);
                    for nth in 0..connections {
                        let delay = pause * nth / connections;
                        tasks.spawn(Box::pin(runner.clone().keep(delay, pause)));
                    }
                }
                _ => drop(tasks.spawn(Box::pin(runner.renew()))),
            }
        }
        Load { stopping, tasks }
    }
}

/// A load that runs.
#[derive(Debug)]
pub(crate) struct Load {
    stopping: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Load {
    /// Ends it: requests that run are waited for, kept connections are ended properly.
    ///
    /// # Errors
    /// When one of its tasks panicked.
    pub(crate) async fn stop(mut self) -> Result<()> {
        self.stopping.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended?;
        }
        Ok(())
    }
}

/// A kept connection.
struct Kept {
    stream: TcpStream,
    asked: Instant,
    /// Hand-overs on its way when it was opened.
    born: u64,
}

#[derive(Clone, Debug)]
struct Runner {
    index: usize,
    flow: Flow,
    flow_log: Arc<FlowLog>,
    stopping: Arc<AtomicBool>,
    handed_over: Arc<[AtomicU64; NODES]>,
}

impl Runner {
    fn running(&self) -> bool {
        !self.stopping.load(Ordering::Relaxed)
    }

    fn record(&self, asked: Instant, began: Instant, outcome: io::Result<()>) {
        self.flow_log.record(self.index, asked, began, outcome);
    }

    /// Hand-overs so far of the proxies on this flow's way.
    fn generation(&self) -> u64 {
        let count =
            |node: &usize| self.handed_over.get(*node).map_or(0, |count| count.load(Ordering::Relaxed));
        self.flow.title.nodes.iter().map(count).sum()
    }

    async fn open(&self, target: SocketAddr) -> io::Result<TcpStream> {
        let stream = self.flow.client.connect(target).await?;
        stream.set_nodelay(true)?;
        self.flow_log.connected(self.index);
        Ok(stream)
    }

    /// Requests on connections of their own, or DNS questions.
    async fn renew(self) {
        let mut turns = turns(Duration::from_secs_f64(1.0 / self.flow.rate));
        let mut requests = JoinSet::new();
        while self.running() {
            turns.tick().await;
            let runner = self.clone();
            requests.spawn(Box::pin(async move {
                let asked = Instant::now();
                let outcome = within(runner.one()).await;
                runner.record(asked, asked, outcome);
            }));
            while requests.try_join_next().is_some() {}
        }
        while requests.join_next().await.is_some() {}
    }

    async fn one(&self) -> io::Result<()> {
        let Flow { target, .. } = self.flow;
        match &self.flow.kind {
            Kind::Dns { name, ipv6 } => self.ask(target, name, *ipv6).await.map(drop),
            Kind::Headless { resolver } => {
                let found = self.ask(*resolver, "headless.soak.svc.cluster.local.", false).await?;
                apps::get(&mut self.open(SocketAddr::new(found, target.port())).await?).await.map(drop)
            }
            Kind::ServerFirst => {
                let mut stream = self.open(target).await?;
                let mut greeting = [0; 4];
                stream.read_exact(&mut greeting).await?;
                expect(&greeting, b"220 ")
            }
            Kind::Transfer(bytes) => {
                let sent = vec![b'x'; *bytes];
                let received = apps::exchange(&mut self.open(target).await?, &sent).await?;
                expect(&received, &sent)
            }
            Kind::New | Kind::KeptHttp(_) | Kind::KeptEcho(..) => {
                apps::get(&mut self.open(target).await?).await.map(drop)
            }
        }
    }

    /// Asks as a resolver does: once more when no answer comes.
    async fn ask(&self, resolver: SocketAddr, name: &str, ipv6: bool) -> io::Result<std::net::IpAddr> {
        for attempt in 1..=DNS_ATTEMPTS {
            let question = dns::ask(&self.flow.client, resolver, name, ipv6);
            match tokio::time::timeout(DNS_TIMEOUT, question).await {
                Ok(answer) => {
                    let none = || io::Error::new(io::ErrorKind::NotFound, format!("{name} has no address"));
                    return answer?.addresses.first().copied().ok_or_else(none);
                }
                Err(_) if attempt < DNS_ATTEMPTS => self.flow_log.asked_again(self.index),
                Err(_) => {}
            }
        }
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer for {name}, asked {DNS_ATTEMPTS} times"),
        ))
    }

    /// Requests on one kept connection.
    async fn keep(self, delay: Duration, pause: Duration) {
        tokio::time::sleep(delay).await;
        let mut turns = turns(pause);
        let mut kept: Option<Kept> = None;
        while self.running() {
            turns.tick().await;
            if kept.as_ref().is_some_and(|kept| kept.born != self.generation()) {
                // Not all at once, as clients of a real application would not either.
                tokio::time::sleep(RENEWAL.mul_f64(f64::from(spread(self.index, delay)) / 100.0)).await;
                self.end(kept.take()).await;
            }
            let began = Instant::now();
            let asked = kept.as_ref().map_or(began, |kept| kept.asked);
            let request = async {
                let mut open = match kept.take() {
                    Some(open) => open,
                    None => {
                        let born = self.generation();
                        Kept { stream: self.open(self.flow.target).await?, asked, born }
                    }
                };
                self.request_on(&mut open.stream).await?;
                Ok(open)
            };
            let outcome = within(Box::pin(request)).await.map(|open| kept = Some(open));
            self.record(asked, began, outcome);
        }
        self.end(kept.take()).await;
    }

    async fn request_on(&self, stream: &mut TcpStream) -> io::Result<()> {
        let Kind::KeptEcho(_, bytes) = self.flow.kind else {
            return apps::get(stream).await.map(drop);
        };
        let sent = vec![b'k'; bytes];
        let mut received = vec![0; bytes];
        let (mut reader, mut writer) = stream.split();
        tokio::try_join!(writer.write_all(&sent), reader.read_exact(&mut received))?;
        expect(&received, &sent)
    }

    /// Ends a connection as a client does: it says so, and the server's end follows.
    async fn end(&self, kept: Option<Kept>) {
        let Some(Kept { mut stream, asked, .. }) = kept else { return };
        let began = Instant::now();
        let ending = async {
            stream.shutdown().await?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await?;
            expect(&rest, b"")
        };
        if let Err(error) = within(ending).await {
            let error = io::Error::new(error.kind(), format!("at its proper end: {error}"));
            self.record(asked, began, Err(error));
        }
    }
}

/// Turns at a pace; those that were missed are left out.
fn turns(pause: Duration) -> tokio::time::Interval {
    let mut turns = tokio::time::interval(pause);
    turns.set_missed_tick_behavior(MissedTickBehavior::Skip);
    turns
}

/// A number from 0 to 99 that differs from connection to connection.
fn spread(flow: usize, delay: Duration) -> u32 {
    let mixed = (delay.subsec_micros() / 7).wrapping_add(u32::try_from(flow).unwrap_or(0).wrapping_mul(37));
    mixed % 100
}

fn expect(received: &[u8], wanted: &[u8]) -> io::Result<()> {
    if received == wanted {
        return Ok(());
    }
    let text = format!("{} bytes came, not the {} that were wanted", received.len(), wanted.len());
    // Less is an end before its time, which the death of a proxy explains; other bytes have no excuse.
    let is_cut = wanted.starts_with(received);
    let kind = if is_cut { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::InvalidData };
    Err(io::Error::new(kind, text))
}

async fn within<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(outcome) => outcome,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no end within 10 s")),
    }
}
