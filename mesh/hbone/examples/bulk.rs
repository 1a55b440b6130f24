//! Measures the tunnel on loopback: application → proxy → tunnel → proxy → application, each proxy one
//! thread with a single-threaded runtime, beside a raw relay (the same TLS library and cipher suite,
//! 256 KiB buffers, no HTTP/2). CPU is that of the two proxy threads.
//!
//! `cargo run --release -p ambit-hbone --example bulk [-- ROUNDS [ROW]]` runs both in turn.
#![allow(clippy::print_stdout, reason = "its output is a table")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener as StdListener, TcpStream as StdStream};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use ambit_hbone::client::Target;
use ambit_hbone::{
    ConnectRequest, Endpoints, Incoming, Pool, PoolSettings, Server, ServerSettings, WindowBudget, relay,
};
use ambit_identity::{SpiffeId, TlsSettings, Trust, TrustDomain, WorkloadCertificate, unnamed_server};
use ambit_net::relay::{Counters, Side};
use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BUFFER: usize = 256 * 1024;
const BULK: u64 = 2_000_000_000;
const TRIPS: u32 = 20_000;
const IDLE: u32 = 3_000;
const CONNECTIONS: u32 = 5_000;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let rounds = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let only = arguments.next();
    let (certificates, trust) = certificates()?;
    for round in 1..=rounds {
        for path in [Path::Tunnel, Path::Raw] {
            let bed = Bed::start(path, &certificates, &trust)?;
            for (name, row) in
                ROWS.iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name))
            {
                println!("{round}  {path:<6?}  {name:<11}  {}", row(&bed)?);
            }
        }
    }
    Ok(())
}

type Row = fn(&Bed) -> Result<String>;

const ROWS: [(&str, Row); 5] = [
    ("bulk", |bed| {
        let (seconds, cpu) = bed.measure(|entry, exit| bulk(entry, exit, BULK))?;
        let gigabytes = BULK as f64 / 1e9;
        Ok(format!("{:.2} Gb/s, {:.3} CPU-s/GB", gigabytes * 8.0 / seconds, cpu / gigabytes))
    }),
    ("trip", |bed| {
        let (seconds, cpu) = bed.measure(|entry, exit| trips(entry, exit, 1))?;
        let millions = f64::from(TRIPS) / 1e6;
        Ok(format!("{:.1} µs, {:.1} µs CPU a trip", seconds / millions, cpu / millions))
    }),
    ("32 trips", |bed| {
        let (seconds, cpu) = bed.measure(|entry, exit| trips(entry, exit, 32))?;
        let (thousands, millions) = (f64::from(TRIPS) / 1e3, f64::from(TRIPS) / 1e6);
        Ok(format!("{:.1} k/s, {:.1} µs CPU a trip", thousands / seconds, cpu / millions))
    }),
    ("connections", |bed| {
        let (seconds, cpu) = bed.measure(connections)?;
        let millions = f64::from(CONNECTIONS) / 1e6;
        Ok(format!("{:.1} µs, {:.1} µs CPU each", seconds / millions, cpu / millions))
    }),
    ("idle", |bed| {
        // The first connections make allocations that are not repeated, so they are not counted.
        let first = idle(bed.entry, &bed.exit, IDLE / 10)?;
        let before = resident()?;
        let held = idle(bed.entry, &bed.exit, IDLE)?;
        let bytes = resident()?.saturating_sub(before) / u64::from(IDLE) / 2;
        drop((first, held));
        Ok(format!("{bytes} bytes a connection and side"))
    }),
];

#[derive(Debug, Clone, Copy)]
enum Path {
    Raw,
    Tunnel,
}

/// Two proxies, and the listener of the application behind them.
struct Bed {
    entry: SocketAddr,
    exit: StdListener,
    threads: [u32; 2],
}

impl Bed {
    fn start(path: Path, certificates: &[Arc<WorkloadCertificate>; 2], trust: &Trust) -> Result<Bed> {
        let exit = StdListener::bind("127.0.0.1:0")?;
        let application = exit.local_addr()?;
        let [client, server] = certificates.clone();
        let (client_trust, server_trust) = (trust.clone(), trust.clone());
        let (wire, far) = proxy(move |listener| match path {
            Path::Raw => tokio::spawn(raw_server(listener, server, application)),
            Path::Tunnel => tokio::spawn(tunnel_server(listener, server, server_trust)),
        })?;
        let (entry, near) = proxy(move |listener| match path {
            Path::Raw => tokio::spawn(raw_client(listener, client, wire)),
            Path::Tunnel => tokio::spawn(tunnel_client(listener, client, client_trust, wire, application)),
        })?;
        Ok(Bed { entry, exit, threads: [near, far] })
    }

    /// Seconds by the clock and of the proxies' CPU.
    fn measure(&self, work: impl Fn(SocketAddr, &StdListener) -> Result<()>) -> Result<(f64, f64)> {
        let before = self.cpu()?;
        let start = Instant::now();
        work(self.entry, &self.exit)?;
        let seconds = start.elapsed().as_secs_f64();
        std::thread::sleep(Duration::from_millis(20));
        Ok((seconds, (self.cpu()? - before).as_secs_f64()))
    }

    fn cpu(&self) -> Result<Duration> {
        self.threads.iter().try_fold(Duration::ZERO, |sum, thread| {
            let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat"))?;
            let nanos = text.split(' ').next().context("schedstat is empty")?;
            Ok(sum + Duration::from_nanos(nanos.parse()?))
        })
    }
}

fn proxy(
    run: impl FnOnce(TcpListener) -> tokio::task::JoinHandle<Result<()>> + Send + 'static,
) -> Result<(SocketAddr, u32)> {
    let (started, starts) = mpsc::channel();
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async move {
            let Ok(listener) = TcpListener::bind("127.0.0.1:0").await else { return };
            let link = std::fs::read_link("/proc/thread-self").unwrap_or_default();
            let thread = link.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let (Ok(address), Some(thread)) = (listener.local_addr(), thread) else { return };
            let task = run(listener);
            if started.send((address, thread)).is_ok() {
                println!("{:?}", task.await);
            }
        });
    });
    starts.recv().context("a proxy did not start")
}

async fn tunnel_client(
    listener: TcpListener,
    certificate: Arc<WorkloadCertificate>,
    trust: Trust,
    wire: SocketAddr,
    application: SocketAddr,
) -> Result<()> {
    let pool: Pool<SocketAddr> =
        Pool::new(PoolSettings::default(), trust, WindowBudget::default(), Arc::default());
    let expected: Arc<[SpiffeId]> = Arc::new([id("server")?]);
    loop {
        let (mut socket, _) = listener.accept().await?;
        let (pool, expected) = (pool.clone(), Arc::clone(&expected));
        let tls = certificate.client_tls();
        tokio::spawn(async move {
            socket.set_nodelay(true)?;
            let request = ConnectRequest::new(application);
            let target = Target { address: wire, source: wire.ip(), tls: &tls, expected: &expected };
            let dial = || async move {
                let stream = TcpStream::connect(wire).await?;
                stream.set_nodelay(true)?;
                Ok(stream)
            };
            let tunnel = pool.open(&wire, target, &request, dial).await?;
            relay(&mut socket, Side::Downstream, tunnel, &Counters::new()).await?;
            anyhow::Ok(())
        });
    }
}

async fn tunnel_server(
    listener: TcpListener,
    certificate: Arc<WorkloadCertificate>,
    trust: Trust,
) -> Result<()> {
    let server = Server::new(ServerSettings::default(), trust, WindowBudget::default());
    loop {
        let (socket, remote) = listener.accept().await?;
        let (server, endpoints) = (server.clone(), Endpoints { local: socket.local_addr()?, remote });
        let tls = certificate.server_config();
        tokio::spawn(async move {
            socket.set_nodelay(true)?;
            let accepted = server.accept(socket, endpoints, tls).await?;
            server.serve(accepted, std::future::pending(), to_application).await?;
            anyhow::Ok(())
        });
    }
}

async fn to_application(mut incoming: Incoming) {
    let Some(destination) = incoming.request().authority.address() else { return };
    let Ok(Ok(mut socket)) = incoming.within(TcpStream::connect(destination)).await else { return };
    if socket.set_nodelay(true).is_err() {
        return;
    }
    let Ok(tunnel) = incoming.accept(None) else { return };
    if let Err(error) = relay(&mut socket, Side::Upstream, tunnel, &Counters::new()).await {
        println!("relay: {error}");
    }
}

async fn raw_client(
    listener: TcpListener,
    certificate: Arc<WorkloadCertificate>,
    wire: SocketAddr,
) -> Result<()> {
    loop {
        let (mut socket, _) = listener.accept().await?;
        let connector = TlsConnector::from(certificate.client_tls().dangerous_expecting_anyone());
        tokio::spawn(async move {
            socket.set_nodelay(true)?;
            let outer = TcpStream::connect(wire).await?;
            outer.set_nodelay(true)?;
            let mut tls = connector.connect(unnamed_server(), outer).await?;
            tls.get_mut().1.set_buffer_limit(Some(BUFFER));
            copy_bidirectional_with_sizes(&mut socket, &mut tls, BUFFER, BUFFER).await?;
            anyhow::Ok(())
        });
    }
}

async fn raw_server(
    listener: TcpListener,
    certificate: Arc<WorkloadCertificate>,
    application: SocketAddr,
) -> Result<()> {
    loop {
        let (socket, _) = listener.accept().await?;
        let acceptor = TlsAcceptor::from(certificate.server_config());
        tokio::spawn(async move {
            socket.set_nodelay(true)?;
            let mut tls = acceptor.accept(socket).await?;
            tls.get_mut().1.set_buffer_limit(Some(BUFFER));
            let mut socket = TcpStream::connect(application).await?;
            socket.set_nodelay(true)?;
            copy_bidirectional_with_sizes(&mut tls, &mut socket, BUFFER, BUFFER).await?;
            anyhow::Ok(())
        });
    }
}

/// One connection, one direction.
fn bulk(entry: SocketAddr, exit: &StdListener, bytes: u64) -> Result<()> {
    let mut from = StdStream::connect(entry)?;
    let sender = std::thread::spawn(move || -> std::io::Result<()> {
        let chunk = vec![7; BUFFER];
        let mut left = bytes;
        while left > 0 {
            let size = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
            from.write_all(chunk.get(..size).unwrap_or_default())?;
            left -= size as u64;
        }
        from.shutdown(Shutdown::Write)?;
        from.read_to_end(&mut Vec::new()).map(|_| ())
    });
    let (mut to, _) = exit.accept()?;
    let (mut buffer, mut got) = (vec![0; BUFFER], 0);
    loop {
        match to.read(&mut buffer)? {
            0 => break,
            read => got += read as u64,
        }
    }
    anyhow::ensure!(got == bytes, "{got} of {bytes} bytes arrived");
    drop(to);
    sender.join().ok().context("the sender panicked")??;
    Ok(())
}

/// Round trips of 64 bytes on `count` connections, one after another on each.
fn trips(entry: SocketAddr, exit: &StdListener, count: u32) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async move {
        let mut pairs = Vec::new();
        for _ in 0..count {
            let from = TcpStream::connect(entry).await?;
            from.set_nodelay(true)?;
            let exit = exit.try_clone()?;
            let (to, _) = tokio::task::spawn_blocking(move || exit.accept()).await??;
            to.set_nonblocking(true)?;
            to.set_nodelay(true)?;
            pairs.push((from, TcpStream::from_std(to)?));
        }
        let mut tasks = tokio::task::JoinSet::new();
        for (from, to) in pairs {
            tasks.spawn(bounce(to, TRIPS / count, false));
            tasks.spawn(bounce(from, TRIPS / count, true));
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok(())
    })
}

async fn bounce(mut socket: TcpStream, trips: u32, first: bool) -> Result<()> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut message = [7; 64];
    for _ in 0..trips {
        if first {
            socket.write_all(&message).await?;
        }
        socket.read_exact(&mut message).await?;
        if !first {
            socket.write_all(&message).await?;
        }
    }
    Ok(())
}

/// Connections with one small exchange each, one after another.
fn connections(entry: SocketAddr, exit: &StdListener) -> Result<()> {
    for _ in 0..CONNECTIONS {
        let mut from = StdStream::connect(entry)?;
        from.write_all(&[1])?;
        let (mut to, _) = exit.accept()?;
        let mut byte = [0];
        to.read_exact(&mut byte)?;
        to.write_all(&byte)?;
        from.read_exact(&mut byte)?;
    }
    Ok(())
}

/// Connections that carried a byte each way and then rest.
fn idle(entry: SocketAddr, exit: &StdListener, count: u32) -> Result<Vec<(StdStream, StdStream)>> {
    let mut held = Vec::new();
    for _ in 0..count {
        let mut from = StdStream::connect(entry)?;
        from.write_all(&[1])?;
        let (mut to, _) = exit.accept()?;
        let mut byte = [0];
        to.read_exact(&mut byte)?;
        to.write_all(&byte)?;
        from.read_exact(&mut byte)?;
        held.push((from, to));
    }
    Ok(held)
}

/// Resident bytes of this process.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

fn id(name: &str) -> Result<SpiffeId> {
    Ok(SpiffeId::new("cluster.local", "default", name)?)
}

/// The client's and the server's, and a trust in both.
fn certificates() -> Result<([Arc<WorkloadCertificate>; 2], Trust)> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let trust = Trust::new(TrustDomain::new("cluster.local")?, Vec::new());
    trust.set_roots(ca.pem().as_bytes())?;
    let certificate = |name: &str| -> Result<Arc<WorkloadCertificate>> {
        let id = id(name)?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        let key = KeyPair::generate()?;
        let chain = [params.signed_by(&key, &ca)?.pem(), ca.pem()];
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Ok(Arc::new(WorkloadCertificate::new(&id, key, &chain, &trust, TlsSettings::default())?))
    };
    Ok(([certificate("client")?, certificate("server")?], trust))
}
