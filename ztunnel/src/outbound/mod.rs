//! What a pod dials: captured connections on port 15001 and requested ones on the SOCKS5 port.
//!
//! Reaches the destination through [`crate::outbound::dial`], then relays. The pod's identity needs no
//! proof here: the connection came out of its own network namespace.

mod attempt;
pub mod connect_request;
pub mod dial;
pub mod ejections;
pub mod socks5;
pub mod tunnels;

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_directory::{Authority, Snapshot, Workload};
use ambit_net::original_dst;
use ambit_net::relay::{Counters, Side};
use ambit_net::socket::reset_on_close;
use ambit_net::splice::splice;
use tokio::net::TcpStream;

use crate::connection::error::{ConnectionError, CutReason};
use crate::connection::report::{AccessRecord, End};
use crate::inbound::destination::Connected;
use crate::outbound::dial::{ConnectedUpstream, Dial, Upstream};
use crate::outbound::socks5::{Reply, Target};
use crate::pods::{Pod, Role};
use crate::proxy::Worker;
use ambit_runtime::connections::{Direction, NewConnection};

/// Time for the whole SOCKS5 handshake.
const SOCKS_LIMIT: Duration = Duration::from_secs(10);

/// The life of a connection after it was opened.
type Relaying = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A pod's connection whose destination is known.
struct OutboundRequest {
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    source: SocketAddr,
    dialled: Authority,
    since: Instant,
}

/// Serves one captured connection to its end.
pub async fn serve_captured(worker: Arc<Worker>, pod: Arc<Pod>, stream: TcpStream, peer: SocketAddr) {
    let since = Instant::now();
    let dialled = match original_dst(&stream) {
        Ok(dialled) => SocketAddr::new(dialled.ip().to_canonical(), dialled.port()),
        Err(error) => {
            tracing::debug!(%peer, %error, "a captured connection without a destination");
            return reset_on_close(&stream);
        }
    };
    // Not redirected but dialled directly: it would come back to us for ever.
    let is_own = dialled.port() == Role::Outbound.port()
        && stream.local_addr().is_ok_and(|local| local.ip().to_canonical() == dialled.ip());
    let mut request = OutboundRequest { worker, pod, source: peer, dialled: dialled.into(), since };
    if is_own {
        let record = request.record();
        request.worker.reporter.failed(&record, &ConnectionError::Loop(dialled));
        return reset_on_close(&stream);
    }
    match Box::pin(request.reach()).await {
        Ok((reached, counters)) => request.carry(stream, reached, counters).await,
        Err(_) => reset_on_close(&stream),
    }
}

/// Serves one connection of the SOCKS5 listener to its end.
pub async fn serve_socks5(worker: Arc<Worker>, pod: Arc<Pod>, mut stream: TcpStream, peer: SocketAddr) {
    let since = Instant::now();
    let target = match tokio::time::timeout(SOCKS_LIMIT, socks5::accept(&mut stream)).await {
        Ok(Ok(target)) => target,
        Ok(Err(error)) => return tracing::debug!(%peer, %error, "SOCKS5 refused"),
        Err(_) => return tracing::debug!(%peer, "SOCKS5 handshake took too long"),
    };
    // A loopback listener sees the loopback address; on the wire the pod has its own.
    let source = own_address(&worker, &pod, peer);
    let dialled = match target {
        Target::Address(address) => Authority::Address(address),
        Target::Name(name, port) => name_of(&worker, &pod, source, &name, port).await,
    };
    let mut request = OutboundRequest { worker, pod, source, dialled, since };
    let reached = Box::pin(request.reach()).await;
    let reply = reached.as_ref().map_or_else(|error| error.socks_reply(), |_| Reply::Succeeded);
    if let Err(error) = socks5::answer(&mut stream, reply).await {
        return tracing::debug!(%peer, %error, "the SOCKS5 client went away");
    }
    if let Ok((reached, counters)) = reached {
        request.carry(stream, reached, counters).await;
    }
}

fn own_address(worker: &Worker, pod: &Pod, peer: SocketAddr) -> SocketAddr {
    let snapshot = worker.proxy.directory.load();
    let own = snapshot.workload(pod.workload().as_str()).and_then(|workload| workload.address_like(None));
    SocketAddr::new(own.unwrap_or(peer.ip()), peer.port())
}

/// What a name means to the pod: a name of the mesh, with Kubernetes' search path, else an address by
/// DNS, else the name itself, which then is refused as unknown.
async fn name_of(worker: &Worker, pod: &Pod, pod_address: SocketAddr, name: &str, port: u16) -> Authority {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let known = {
        let snapshot = worker.proxy.directory.load();
        known_name(&snapshot, &pod.info().namespace, &worker.proxy.settings.cluster_domain, &name)
    };
    if let Some(hostname) = known {
        return Authority::Host { host: hostname.into(), port };
    }
    let limit = worker.proxy.settings.limits.attempt_timeout;
    let like = pod_address.ip();
    let found = worker.proxy.lookup(pod, &name, like, limit).await;
    match found.as_deref().map(<[_]>::first) {
        Ok(Some(first)) => Authority::Address(SocketAddr::new(*first, port)),
        outcome => {
            tracing::debug!(pod = pod.uid(), ?outcome, "a SOCKS5 client asked for a name without addresses");
            Authority::Host { host: name.into(), port }
        }
    }
}

/// The name of the mesh that a pod in `namespace` means by `name` (in lower case), with Kubernetes' search path.
pub(crate) fn known_name(snapshot: &Snapshot, namespace: &str, domain: &str, name: &str) -> Option<String> {
    let candidates = [
        name.to_owned(),
        format!("{name}.{namespace}.svc.{domain}"),
        format!("{name}.svc.{domain}"),
        format!("{name}.{domain}"),
    ];
    candidates.into_iter().find(|name| {
        snapshot.service_named(name, namespace).is_some() || !snapshot.workloads_named(name).is_empty()
    })
}

impl OutboundRequest {
    /// Reaches the destination. A failure has been reported when this returns.
    async fn reach(&mut self) -> Result<(ConnectedUpstream, Arc<Counters>), ConnectionError> {
        let counters = Arc::new(Counters::new());
        let client = match self.worker.proxy.workload_of(&self.pod).await {
            Ok(client) => client,
            Err(error) => {
                self.worker.reporter.failed(&self.record(), &error);
                return Err(error);
            }
        };
        if !self.correct_source(&client) {
            let error = ConnectionError::ForeignSource(self.source.ip());
            self.worker.reporter.failed(&self.record(), &error);
            return Err(error);
        }
        let dial = Dial {
            worker: &self.worker,
            pod: &self.pod,
            client,
            source: self.source,
            dialled: self.dialled.clone(),
            since: self.since,
            counters: counters.clone(),
        };
        match dial.reach().await {
            Ok(reached) => Ok((reached, counters)),
            Err(missed) => {
                self.worker.reporter.failed(&missed.record, &missed.error);
                Err(missed.error)
            }
        }
    }

    /// A pod chooses the address that its socket carries: `::1` without any privilege, any other with NET_ADMIN. Policies,
    /// logs and the application get an address of the workload instead, as they do of a tunnel from another node. False if it
    /// has none.
    fn correct_source(&mut self, client: &Workload) -> bool {
        if client.has_address(self.source.ip()) {
            return true;
        }
        self.worker.proxy.tallies.foreign_sources.add(1);
        let like = match &self.dialled {
            Authority::Address(address) => address.ip(),
            Authority::Host { .. } => self.source.ip(),
        };
        let Some(own) = client.address_like(Some(like)) else { return false };
        tracing::debug!(pod = self.pod.uid(), claimed = %self.source, %own, "not an address of the pod");
        self.source = SocketAddr::new(own, self.source.port());
        true
    }

    /// Relays until both directions have ended or the connection is cut. What is returned holds only
    /// what a connection at rest needs.
    fn carry(self, mut stream: TcpStream, reached: ConnectedUpstream, counters: Arc<Counters>) -> Relaying {
        let ConnectedUpstream { upstream, record, load } = reached;
        let Self { worker, source, .. } = self;
        let connection = NewConnection {
            direction: Direction::Outbound,
            source,
            destination: record.destination_address,
            subject: None,
            certificate: match &upstream {
                Upstream::InnerTunnel(tunnel) => Some(tunnel.certificate().clone()),
                Upstream::Tunnel(_) | Upstream::Plain(_) | Upstream::Local(_) => None,
            },
            counters,
        };
        let open = worker.proxy.connections.open(worker.index, connection);
        let report = worker.reporter.open(record, &open);
        match upstream {
            Upstream::Tunnel(tunnel) | Upstream::InnerTunnel(tunnel) => Box::pin(async move {
                let relay = ambit_hbone::relay(&mut stream, Side::Downstream, *tunnel, &open.counters);
                let outcome = settle(open.cut().race(relay).await);
                reset_if_cut(&outcome, &stream);
                report.finish(&outcome);
                drop(load);
            }),
            Upstream::Plain(mut plain) => Box::pin(async move {
                let outcome = settle(open.cut().race(splice(&mut stream, &mut plain, &open.counters)).await);
                reset_if_cut(&outcome, &stream);
                reset_if_cut(&outcome, &plain);
                report.finish(&outcome);
                drop(load);
            }),
            Upstream::Local(connected) => Box::pin(async move {
                let Connected { stream: mut application, open: inbound, report: at_destination } = *connected;
                let relay = splice(&mut stream, &mut application, &open.counters);
                // Either side may cut it, and both report it.
                let raced = open.cut().race(inbound.cut().race(relay)).await;
                let outcome = settle(raced.and_then(|inner| inner));
                reset_if_cut(&outcome, &stream);
                reset_if_cut(&outcome, &application);
                at_destination.finish(&outcome);
                report.finish(&outcome);
                drop(load);
            }),
        }
    }

    fn record(&self) -> AccessRecord {
        let source = End { identity: Some(self.pod.identity().clone()), ..End::default() };
        AccessRecord::outbound(source, self.source, &self.dialled, self.since)
    }
}

fn settle<E: Into<ConnectionError>>(raced: Result<Result<(), E>, CutReason>) -> Result<(), ConnectionError> {
    match raced {
        Ok(ended) => ended.map_err(Into::into),
        Err(reason) => Err(ConnectionError::Cut(reason)),
    }
}

/// A peer must see that its connection was cut, not finished.
fn reset_if_cut(outcome: &Result<(), ConnectionError>, stream: &TcpStream) {
    if matches!(outcome, Err(ConnectionError::Cut(_))) {
        reset_on_close(stream);
    }
}
