//! A certificate authority, proxies and applications on loopback.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use ambit_hbone::client::Target;
use ambit_hbone::{
    Authority, ClientSettings, ConnectRequest, ConnectionSettings, Endpoints, Incoming, OpenError, Pool,
    PoolCounters, PoolSettings, ServeError, Server, ServerSettings, Tunnel, WindowBudget, relay,
};
use ambit_identity::{SpiffeId, TlsSettings, Trust, TrustDomain, WorkloadCertificate};
use ambit_net::relay::{Counters, RelayError, Side};
use http::StatusCode;
use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Longer than anything here may take.
pub const DEADLINE: Duration = Duration::from_secs(20);

pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(done) => done,
        Err(_) => panic!("{what} did not happen within {DEADLINE:?}"),
    }
}

pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "{what} did not become true within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub struct World {
    ca: CertifiedIssuer<'static, KeyPair>,
    pub trust: Trust,
}

impl World {
    pub fn new() -> World {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let trust = Trust::new(TrustDomain::new("cluster.local").unwrap(), Vec::new());
        trust.set_roots(ca.pem().as_bytes()).unwrap();
        World { ca, trust }
    }

    pub fn id(name: &str) -> SpiffeId {
        SpiffeId::new("cluster.local", "default", name).unwrap()
    }

    /// The root as PEM.
    pub fn root(&self) -> String {
        self.ca.pem()
    }

    /// Somebody else's trust, in these roots.
    pub fn trusting(roots: &[String]) -> Trust {
        let trust = Trust::new(TrustDomain::new("cluster.local").unwrap(), Vec::new());
        trust.set_roots(roots.concat().as_bytes()).unwrap();
        trust
    }

    pub fn certificate(&self, name: &str) -> WorkloadCertificate {
        self.certificate_until(name, SystemTime::now() + Duration::from_secs(3600), &self.trust)
    }

    pub fn certificate_until(&self, name: &str, end: SystemTime, trust: &Trust) -> WorkloadCertificate {
        let id = World::id(name);
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.not_after = end.into();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.ca).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let chain = [leaf.pem(), self.ca.pem()];
        WorkloadCertificate::new(&id, key, &chain, trust, TlsSettings::default()).unwrap()
    }
}

/// What a [`Node`] saw.
#[derive(Default)]
pub struct Seen {
    pub accepted: AtomicUsize,
    pub ended: Mutex<Vec<Result<(), ServeError>>>,
    pub requests: Mutex<Vec<ConnectRequest>>,
    pub given_up: AtomicUsize,
    pub relayed: Mutex<Vec<Result<(), RelayError>>>,
}

impl Seen {
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    pub fn connections_ended(&self) -> usize {
        self.ended.lock().len()
    }
}

/// The destination's proxy: dials what CONNECT names. Port 1 is denied, port 2 is never answered.
pub struct Node {
    pub address: SocketAddr,
    pub seen: Arc<Seen>,
    drain: watch::Sender<u32>,
    task: JoinHandle<()>,
}

impl Node {
    pub async fn start(world: &World, name: &str, settings: ServerSettings) -> Node {
        let server = Server::new(settings, world.trust.clone(), WindowBudget::default());
        Node::serve(world.certificate(name), server).await
    }

    pub async fn serve(certificate: WorkloadCertificate, server: Server) -> Node {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Seen::default());
        let (drain, drained) = watch::channel(0);
        let tls = certificate.server_config();
        let task = tokio::spawn(accept_loop(listener, tls, server, Arc::clone(&seen), drained));
        Node { address, seen, drain, task }
    }

    /// Sends GOAWAY on the connections that are open now.
    pub fn drain(&self) {
        self.drain.send_modify(|generation| *generation += 1);
    }

    /// As if the process was killed.
    pub fn kill(&self) {
        self.task.abort();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept_loop(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    server: Server,
    seen: Arc<Seen>,
    drained: watch::Receiver<u32>,
) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (socket, remote) = listener.accept().await.unwrap();
        socket.set_nodelay(true).unwrap();
        let endpoints = Endpoints { local: socket.local_addr().unwrap(), remote };
        seen.accepted.fetch_add(1, Ordering::SeqCst);
        let (tls, server, seen) = (Arc::clone(&tls), server.clone(), Arc::clone(&seen));
        let mut drained = drained.clone();
        drained.mark_unchanged();
        connections.spawn(async move {
            let ended = match server.accept(socket, endpoints, tls).await {
                Err(error) => Err(error),
                Ok(accepted) => {
                    let drain = async move {
                        let _ = drained.changed().await;
                    };
                    let inner = Arc::clone(&seen);
                    let handler = move |incoming| handle(incoming, Arc::clone(&inner));
                    server.serve(accepted, drain, handler).await
                }
            };
            seen.ended.lock().push(ended);
        });
    }
}

async fn handle(mut incoming: Incoming, seen: Arc<Seen>) {
    seen.requests.lock().push(incoming.request().clone());
    let Authority::Address(destination) = incoming.request().authority.clone() else {
        return incoming.refuse(StatusCode::BAD_REQUEST);
    };
    let dialled = match destination.port() {
        1 => return incoming.refuse(StatusCode::UNAUTHORIZED),
        2 => incoming.within(std::future::pending()).await,
        _ => incoming.within(TcpStream::connect(destination)).await,
    };
    match dialled {
        Ok(Ok(mut socket)) => {
            socket.set_nodelay(true).unwrap();
            let Ok(tunnel) = incoming.accept(None) else { return };
            let relayed = relay(&mut socket, Side::Upstream, tunnel, &Counters::new()).await;
            seen.relayed.lock().push(relayed);
        }
        Ok(Err(_)) => incoming.refuse(StatusCode::SERVICE_UNAVAILABLE),
        Err(_) => {
            seen.given_up.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// The key of the client's connections.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    pub origin: &'static str,
    pub destination: &'static str,
    pub address: SocketAddr,
}

/// The source's proxy.
pub struct Client {
    pub pool: Pool<Key>,
    pub source: IpAddr,
    pub counters: Arc<PoolCounters>,
    pub certificate: WorkloadCertificate,
    pub dials: Arc<AtomicUsize>,
}

impl Client {
    pub fn new(world: &World, name: &str, settings: PoolSettings) -> Client {
        Client::trusting(world.certificate(name), world.trust.clone(), settings)
    }

    pub fn trusting(certificate: WorkloadCertificate, trust: Trust, settings: PoolSettings) -> Client {
        let counters = Arc::new(PoolCounters::default());
        let pool = Pool::new(settings, trust, WindowBudget::default(), Arc::clone(&counters));
        Client { pool, source: [127, 0, 0, 1].into(), counters, certificate, dials: Arc::default() }
    }

    pub fn key(&self, node: SocketAddr) -> Key {
        Key { origin: "pod-uid", destination: "server-uid", address: node }
    }

    pub async fn open(&self, node: SocketAddr, destination: SocketAddr) -> Result<Tunnel, OpenError> {
        self.request(node, &ConnectRequest::new(destination)).await
    }

    pub async fn request(&self, node: SocketAddr, request: &ConnectRequest) -> Result<Tunnel, OpenError> {
        self.request_as(&self.key(node), &[World::id("server")], request).await
    }

    pub async fn request_as(
        &self,
        key: &Key,
        expected: &[SpiffeId],
        request: &ConnectRequest,
    ) -> Result<Tunnel, OpenError> {
        let (address, source) = (key.address, self.source);
        let tls = self.certificate.client_tls();
        let target = Target { address, source, tls: &tls, expected };
        let dial = || {
            self.dials.fetch_add(1, Ordering::SeqCst);
            async move {
                let socket = TcpSocket::new_v4()?;
                socket.bind((source, 0).into())?;
                let stream = socket.connect(address).await?;
                stream.set_nodelay(true)?;
                Ok(stream)
            }
        };
        soon("opening a tunnel", self.pool.open(key, target, request, dial)).await
    }

    pub fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }

    /// A tunnel with the application's socket at this end; the task yields how the relay ended.
    pub async fn application(
        &self,
        node: SocketAddr,
        destination: SocketAddr,
    ) -> (TcpStream, JoinHandle<(Result<(), RelayError>, u64, u64)>) {
        let tunnel = self.open(node, destination).await.unwrap();
        let (application, mut socket) = pair().await;
        let task = tokio::spawn(async move {
            let counters = Counters::new();
            let ended = relay(&mut socket, Side::Downstream, tunnel, &counters).await;
            (ended, counters.sent(), counters.received())
        });
        (application, task)
    }
}

/// Two ends of one connection.
pub async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (one, two) = tokio::join!(TcpStream::connect(address), listener.accept());
    let (one, two) = (one.unwrap(), two.unwrap().0);
    one.set_nodelay(true).unwrap();
    two.set_nodelay(true).unwrap();
    (one, two)
}

/// An application that serves each connection with `serve`.
pub async fn application<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            socket.set_nodelay(true).unwrap();
            tokio::spawn(serve(socket));
        }
    });
    address
}

/// An application that gives back what it gets.
pub async fn echo() -> SocketAddr {
    application(|mut socket| async move {
        let (mut reader, mut writer) = socket.split();
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
    })
    .await
}

/// Bytes that depend on their position, so that lost, repeated or reordered pieces are noticed.
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// Small limits, so that tests of limits are short.
pub fn quick() -> PoolSettings {
    let (handshake_timeout, connect_timeout) = (Duration::from_millis(500), Duration::from_millis(500));
    PoolSettings {
        client: ClientSettings { handshake_timeout, connect_timeout, ..ClientSettings::default() },
        ..PoolSettings::default()
    }
}

/// The same for a server.
pub fn quick_server() -> ServerSettings {
    ServerSettings {
        handshake_timeout: Duration::from_millis(500),
        connect_timeout: Duration::from_millis(500),
        ..ServerSettings::default()
    }
}

/// Client settings with these for both ends.
pub fn pool_with(connection: ConnectionSettings) -> PoolSettings {
    PoolSettings {
        client: ClientSettings { connection, ..ClientSettings::default() },
        ..PoolSettings::default()
    }
}

/// Server settings with these for both ends.
pub fn server_with(connection: ConnectionSettings) -> ServerSettings {
    ServerSettings { connection, ..ServerSettings::default() }
}
