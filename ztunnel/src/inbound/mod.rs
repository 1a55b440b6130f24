//! Inbound HBONE, port 15008: mutual TLS, then each CONNECT checked, authorised and relayed.
//!
//! One task a connection and one a CONNECT, all on the worker that accepted. Phases as in
//! [`destination`]; before them, a connection is `Accepted` and nobody is known.

pub mod destination;
pub mod passthrough;
pub mod proxy_protocol;

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use ambit_hbone::{Endpoints, Forwarded, Incoming, ServeError, Tunnel};
use ambit_identity::PeerCertificate;
use ambit_net::relay::{Counters, Side};
use ambit_net::socket::reset_on_close;
use tokio::net::TcpStream;

use crate::connection::error::ConnectionError;
use crate::connection::report::{AccessRecord, End};
use crate::inbound::destination::{Authenticated, Connected};
use crate::outbound::connect_request::baggage;
use crate::pods::Pod;
use crate::proxy::Worker;
use ambit_runtime::connections::Direction;
use ambit_runtime::shares::{Holder, Taken};
use ambit_runtime::workers::{ConnectionGuard, WorkerHandle};

/// Descriptors of one tunnel: the connection to the application.
const TUNNEL_DESCRIPTORS: u64 = 1;

/// A connection that was accepted, and whose peer is not known yet.
struct Accepted {
    worker: Arc<Worker>,
    pod: Arc<Pod>,
    stream: TcpStream,
    peer: SocketAddr,
    handshake: Option<Taken>,
    since: Instant,
}

/// What is the same for all CONNECTs of a connection.
#[derive(Debug, Clone)]
struct Tunnelled {
    worker: Arc<Worker>,
    handle: WorkerHandle,
    pod: Arc<Pod>,
    holder: Holder,
    source: SocketAddr,
    reached: SocketAddr,
    certificate: PeerCertificate,
}

/// Serves one connection to its end.
///
/// `handshake` is given back when the peer is known.
pub async fn serve(
    worker: Arc<Worker>,
    handle: WorkerHandle,
    pod: Arc<Pod>,
    stream: TcpStream,
    peer: SocketAddr,
    handshake: Option<Taken>,
) {
    let accepted = Accepted { worker, pod, stream, peer, handshake, since: Instant::now() };
    let (record, reporter) = (accepted.record(), accepted.worker.reporter.clone());
    if let Err(error) = Box::pin(accepted.run(handle)).await {
        reporter.failed(&record, &error);
    }
}

impl Accepted {
    /// Fails only before the first CONNECT. Later failures are reported per CONNECT, and for a peer that violates the protocol.
    async fn run(self, handle: WorkerHandle) -> Result<(), ConnectionError> {
        let Self { worker, pod, stream, peer, handshake, .. } = self;
        let reached = stream.local_addr().map_err(ConnectionError::OriginalDestination)?;
        let reached = SocketAddr::new(reached.ip().to_canonical(), reached.port());
        let certificate = worker.proxy.certificates.certificate(pod.identity()).await?;
        let server = worker.proxy.server.clone();
        let endpoints = Endpoints { local: reached, remote: peer };
        let accepted = Box::pin(server.accept(stream, endpoints, certificate.server_config())).await?;
        drop((certificate, handshake));
        let tunnelled = Arc::new(Tunnelled {
            worker: worker.clone(),
            handle,
            pod: pod.clone(),
            holder: pod.shares().inbound(peer.ip()),
            source: peer,
            reached,
            certificate: accepted.peer().certificate.clone(),
        });
        let (malformed, asked) = (Arc::clone(&tunnelled), Arc::clone(&tunnelled));
        let accepted = accepted.on_malformed(move |error| malformed.report_failed(&error.into()));
        let mut drain = worker.proxy.drain.clone();
        let ending = async {
            tokio::select! {
                () = drain.draining() => {}
                () = pod.leaving() => {}
            }
        };
        let ended = server.serve(accepted, ending, move |incoming| Tunnelled::clone(&asked).serve(incoming));
        match ended.await {
            Err(error) if error.is_misconduct() => tunnelled.report_failed(&error.into()),
            Err(error @ ServeError::PingTimeout { .. }) => {
                worker.proxy.tallies.silent_clients.add(1);
                tracing::info!(%peer, %error, "a tunnel connection was given up");
            }
            // Each CONNECT has its own report.
            Err(error) => tracing::debug!(%peer, %error, "a tunnel connection ended"),
            Ok(()) => {}
        }
        Ok(())
    }

    fn record(&self) -> AccessRecord {
        AccessRecord {
            direction: Direction::Inbound,
            source: End::default(),
            source_address: self.peer,
            destination: End { identity: Some(self.pod.identity().clone()), ..End::default() },
            destination_address: self.stream.local_addr().unwrap_or(self.peer),
            hbone_address: None,
            service: None,
            since: self.since,
        }
    }
}

/// The port of a client that its own node's proxy dialled for. What a peer claims beyond its own address is not used.
fn client_port(forwarded: Option<&Forwarded>, tunnel: SocketAddr) -> u16 {
    let own = forwarded.map(|forwarded| forwarded.client).filter(|client| client.ip() == tunnel.ip());
    own.map_or(0, |client| client.port())
}

impl Tunnelled {
    /// What arrived on the connection, as far as is known without a CONNECT.
    fn arrived(self) -> Authenticated {
        Authenticated {
            worker: self.worker,
            pod: self.pod,
            source: self.source,
            client_port: 0,
            peer: Some(self.certificate.identity().clone()),
            certificate: Some(self.certificate),
            client: None,
            reached: self.reached,
            authority: None,
            host: None,
            baggage: None,
            since: Instant::now(),
            counters: Arc::new(Counters::new()),
        }
    }

    fn report_failed(&self, error: &ConnectionError) {
        self.clone().arrived().report_failed(error);
    }

    async fn serve(self, incoming: Incoming) {
        let shares = &self.worker.proxy.shares;
        let taken = match shares.descriptors.take(&self.holder, TUNNEL_DESCRIPTORS) {
            Ok(taken) => taken,
            Err(refusal) => {
                shares.report(refusal, "tunnel", &self.holder, self.pod.uid(), self.source.ip());
                let error = ConnectionError::Limit(refusal);
                incoming.refuse(error.status());
                return self.report_failed(&error);
            }
        };
        let held = (self.handle.count_connection(), taken);
        // What reaching takes is freed before the relay begins, which may last for days.
        if let Some((tunnel, connected)) = Box::pin(self.reach(incoming)).await {
            carry(tunnel, connected, held).await;
        }
    }

    /// Decides, dials and answers.
    async fn reach(self, mut incoming: Incoming) -> Option<(Tunnel, Connected)> {
        let arrived = self.clone();
        let request = incoming.request();
        let forwarded = request.forwarded.as_ref();
        let asked = Authenticated {
            authority: Some(request.authority.clone()),
            host: forwarded.and_then(|forwarded| forwarded.host.as_deref()).map(Into::into),
            client_port: client_port(forwarded, self.source),
            baggage: request.baggage.clone().map(Arc::new),
            ..self.arrived()
        };
        let reaching = async {
            let authorized = asked.authorize().await?;
            let about = authorized.workload().map(|workload| baggage(workload));
            authorized.connect().await.map(|connected| (connected, about))
        };
        let (connected, about) = match incoming.within(reaching).await {
            Ok(Ok(reached)) => reached,
            Ok(Err(error)) => {
                incoming.refuse(error.status());
                return None;
            }
            // The work was dropped with its report.
            Err(error) => {
                arrived.report_failed(&error.into());
                return None;
            }
        };
        match incoming.accept(about.as_ref()) {
            Ok(tunnel) => Some((tunnel, connected)),
            Err(error) => {
                connected.report.finish(&Err(error.into()));
                None
            }
        }
    }
}

/// Relays until both directions have ended or the connection is cut.
fn carry(
    tunnel: Tunnel,
    connected: Connected,
    held: (ConnectionGuard, Taken),
) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    let Connected { mut stream, open, report } = connected;
    Box::pin(async move {
        let relay = ambit_hbone::relay(&mut stream, Side::Upstream, tunnel, &open.counters);
        let outcome = match open.cut().race(relay).await {
            Ok(ended) => ended.map_err(ConnectionError::from),
            Err(reason) => {
                reset_on_close(&stream);
                Err(ConnectionError::Cut(reason))
            }
        };
        report.finish(&outcome);
        drop(held);
    })
}
