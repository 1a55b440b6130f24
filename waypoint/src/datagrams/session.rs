//! A client's session: its datagrams go to one endpoint, by a socket of its own that takes datagrams of that endpoint only.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ambit_balance::Outcome;
use ambit_net::datagram::{DatagramSocket, LARGEST, send_connected};
use parking_lot::Mutex;
use tokio::net::UdpSocket;
use tokio::sync::Notify;

use super::shares::Share;
use super::{Counts, Datagrams, Refused};
use crate::accept::Inbound;
use crate::authorize::{Began, authorize_connection, denied_later};
use crate::backend_policies::HashKey;
use crate::balance::{self, Chosen, Endpoint, Target};
use crate::balancers::Trial;
use crate::balancers::circuit::Connection;
use crate::balancers::host::Active;
use crate::balancers::key::of_address;
use crate::client_hello::Opening;
use crate::failure::Failure;
use crate::matching;
use crate::proxy::{Proxy, Published};
use crate::report::ConnectionReport;

/// Datagrams of an endpoint that are sent on in one turn.
const TURN: usize = 32;

thread_local! {
    /// A worker reads one datagram at a time.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; LARGEST]);
}

/// Why a session ended.
#[derive(Debug)]
pub enum End {
    /// No datagram passed for as long as may be.
    Idle,
    /// The endpoint is none of its service any more, or its route leads elsewhere.
    Moved,
    /// The port was closed, or the gateway stops.
    Closed,
    /// Nothing listens at the endpoint, or it can't be reached.
    Unreachable(io::Error),
    /// Policy denies it now.
    Denied(Failure),
}

/// What the receiving side needs of a session.
#[derive(Debug)]
pub struct Session {
    upstream: UdpSocket,
    client: SocketAddr,
    /// The address that the client sends to: its answers come from there.
    local: IpAddr,
    inbound: Arc<Inbound>,
    target: Target,
    endpoint: Arc<Endpoint>,
    started: Instant,
    /// Milliseconds from the start to the last datagram.
    last: AtomicU64,
    /// Bytes of the client.
    received: AtomicU64,
    /// Bytes for the client.
    sent: AtomicU64,
    end: Mutex<Option<End>>,
    ended: Notify,
}

/// What a session holds until its end.
#[derive(Debug)]
pub struct Held {
    share: Share,
    report: ConnectionReport,
    trial: Option<Trial>,
    active: Option<Active>,
    counted: Option<Arc<Connection>>,
}

/// What became of a datagram.
#[derive(Debug)]
pub enum Forwarded {
    /// It was sent on, or lost on the way.
    Done,
    /// The endpoint could not be reached before: this one was not sent.
    Unreachable(io::Error),
}

/// Decides where the datagrams of a client go.
///
/// # Errors
/// [`Refused`].
pub fn open(inbound: Arc<Inbound>) -> Result<(Arc<Session>, Held), Refused> {
    let proxy = &inbound.worker.proxy;
    let share = proxy.datagrams.shares.take(inbound.source.ip())?;
    let published = proxy.published.load_full();
    authorize_connection(&published, &inbound, &Opening::Unread)?;
    let target = matching::connection(&published, &inbound, None)?;
    let Chosen { endpoint, trial, gate } = choose(&inbound, &target)?;
    if endpoint.host.is_some() {
        return Err(Failure::NoEndpoint("datagrams are sent to addresses only".to_owned()).into());
    }
    balance::guard(proxy, endpoint.address)?;
    let pool = gate.as_ref().map(|gate| *gate.pool()).unwrap_or_default();
    let counted = gate.map(|gate| gate.circuit.stream(&pool)).transpose()?;
    let upstream = dial(endpoint.address)?;
    let mut report = inbound.worker.reporter.connection(&inbound);
    report.set_endpoint(&endpoint);
    report.set_open();
    let session = Session {
        upstream,
        client: inbound.source,
        local: inbound.destination.address(),
        inbound,
        target,
        endpoint,
        started: Instant::now(),
        last: AtomicU64::default(),
        received: AtomicU64::default(),
        sent: AtomicU64::default(),
        end: Mutex::default(),
        ended: Notify::new(),
    };
    Ok((Arc::new(session), Held { share, report, trial, active: None, counted }))
}

/// An endpoint that was reached a moment ago, or is not known to be unreachable; any where there is none such.
fn choose(inbound: &Inbound, target: &Target) -> Result<Chosen, Failure> {
    let proxy = &inbound.worker.proxy;
    let key = match &target.balanced {
        Some(balanced) => {
            let by_source = balanced.current(proxy)?.hash_key() == Some(&HashKey::SourceIp);
            by_source.then(|| of_address(inbound.source.ip()))
        }
        None => None,
    };
    let avoided = proxy.datagrams.avoided.current(Instant::now());
    let choose = |tried| balance::endpoint(&inbound.worker, inbound.source, target, tried, key);
    match choose(&avoided) {
        Err(_) if !avoided.is_empty() => choose(&[]),
        chosen => chosen,
    }
}

/// A socket for one endpoint alone.
fn dial(address: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = std::net::UdpSocket::bind((any, 0))?;
    socket.connect(address)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

impl Session {
    /// Sends a client's datagram on.
    pub fn forward(&self, bytes: &[u8]) -> Forwarded {
        let counts = self.counts();
        match send_connected(&self.upstream, bytes) {
            Ok(_) => {
                self.note(&self.received, &counts.to_endpoints, bytes.len());
                Forwarded::Done
            }
            Err(error) if is_unreachable(&error) => Forwarded::Unreachable(error),
            Err(_) => {
                counts.lost_to_endpoints.fetch_add(1, Ordering::Relaxed);
                Forwarded::Done
            }
        }
    }

    /// Ends it.
    pub fn end(&self, end: End) {
        self.end.lock().get_or_insert(end);
        self.ended.notify_one();
    }

    /// How long no datagram has passed.
    pub fn idle(&self, now: Instant) -> Duration {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        now.saturating_duration_since(self.started).saturating_sub(last)
    }

    /// Whether a new session of the same client could go to the same endpoint.
    pub fn is_current(&self, published: &Published) -> bool {
        let proxy = &self.inbound.worker.proxy;
        let is_endpoint = self.target.balanced.as_ref().is_some_and(|balanced| {
            balanced.current(proxy).is_ok_and(|balancer| {
                let mut hosts = balancer.hosts().iter().map(|host| &host.endpoint);
                hosts.any(|host| is_same(host, &self.endpoint))
            })
        });
        let backend = self.target.backend.as_ref();
        is_endpoint && backend.is_some_and(|own| matching::leads_to(published, &self.inbound, own))
    }

    fn counts(&self) -> &Counts {
        &self.inbound.worker.proxy.datagrams.counts
    }

    fn note(&self, bytes: &AtomicU64, datagrams: &AtomicU64, length: usize) {
        bytes.fetch_add(u64::try_from(length).unwrap_or(u64::MAX), Ordering::Relaxed);
        datagrams.fetch_add(1, Ordering::Relaxed);
        let last = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(last, Ordering::Relaxed);
    }

    /// Sends the endpoint's datagrams on until it can't be reached.
    async fn answers(&self, socket: &DatagramSocket, held: &mut Held) -> io::Error {
        loop {
            if let Err(error) = self.upstream.readable().await {
                return error;
            }
            let read = BUFFER.with_borrow_mut(|buffer| {
                (0..TURN).find_map(|_| match self.upstream.try_recv(buffer) {
                    Ok(length) => {
                        held.answered();
                        self.answer(socket, buffer.get(..length).unwrap_or_default());
                        None
                    }
                    Err(error) => Some(error),
                })
            });
            if let Some(error) = read.filter(is_unreachable) {
                return error;
            }
        }
    }

    fn answer(&self, socket: &DatagramSocket, bytes: &[u8]) {
        let counts = self.counts();
        match socket.send(bytes, self.local, self.client) {
            Ok(()) => self.note(&self.sent, &counts.to_clients, bytes.len()),
            Err(_) => _ = counts.lost_to_clients.fetch_add(1, Ordering::Relaxed),
        }
    }

    /// Waits until [`end`](Self::end) is called.
    async fn ended(&self) -> End {
        loop {
            if let Some(end) = self.end.lock().take() {
                return end;
            }
            self.ended.notified().await;
        }
    }
}

impl Held {
    /// The endpoint has answered once: it is as good as one that took a connection.
    fn answered(&mut self) {
        if let Some(trial) = self.trial.take() {
            self.active = trial.end(Outcome::Answer(200));
        }
    }

    fn finish(self, session: &Session, end: End) {
        let Self { share, report, trial, active, counted } = self;
        let datagrams: &Datagrams = &session.inbound.worker.proxy.datagrams;
        let bytes = (session.received.load(Ordering::Relaxed), session.sent.load(Ordering::Relaxed));
        match end {
            End::Idle | End::Moved | End::Closed => report.finish(Ok(bytes)),
            End::Denied(failure) => report.deny(failure.to_string()),
            End::Unreachable(error) => {
                let failure = Failure::Connect(format!("{}: {error}", session.endpoint.address));
                datagrams.counts.unreachable.fetch_add(1, Ordering::Relaxed);
                if let Some(trial) = trial {
                    trial.fail(&failure, Duration::ZERO);
                }
                report.finish(Err(failure.to_string()));
            }
        }
        drop((share, active, counted));
    }
}

/// Carries a session to its end; `forget` takes it out of its port's table.
pub async fn run(
    session: Arc<Session>,
    mut held: Held,
    socket: Arc<DatagramSocket>,
    forget: impl FnOnce(&Arc<Session>),
) {
    let proxy = session.inbound.worker.proxy.clone();
    let uid = session.endpoint.workload.as_ref().map(|workload| workload.uid.clone());
    let load = uid.as_ref().map(|uid| proxy.loads.open(uid));
    let end = tokio::select! {
        end = session.ended() => end,
        failure = denied_later(&session.inbound, Began::Passed(&Opening::Unread)) => End::Denied(failure),
        error = session.answers(&socket, &mut held) => {
            avoid(&proxy, &session);
            End::Unreachable(error)
        }
    };
    forget(&session);
    drop(load);
    held.finish(&session, end);
}

/// Lets new sessions go to other endpoints for a while.
pub fn avoid(proxy: &Proxy, session: &Session) {
    if let Some(workload) = &session.endpoint.workload {
        proxy.datagrams.avoided.add(&workload.uid, Instant::now());
    }
}

fn is_same(one: &Endpoint, other: &Endpoint) -> bool {
    let uid = |endpoint: &Endpoint| endpoint.workload.as_ref().map(|workload| workload.uid.clone());
    one.address == other.address && uid(one) == uid(other)
}

/// Whether the endpoint, or a router before it, says that nothing is taken there (RFC 1122 §4.1.3.3).
fn is_unreachable(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
    matches!(error.kind(), ConnectionRefused | HostUnreachable | NetworkUnreachable)
}
