//! A connection to a pod of ours, from the moment its peer is known: authorise, connect, relay.
//!
//! Inbound HBONE, inbound plaintext and the hand-over on one node all come through here, so that the
//! same policy is asked in the same way. Each phase is a type that only the one before can make:
//! [`Authenticated`] → [`Authorized`] → [`Connected`].

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use ambit_directory::{Authority, InboundTarget, Snapshot, Workload};
use ambit_hbone::Baggage;
use ambit_identity::{PeerCertificate, PeerError, SpiffeId, Trust};
use ambit_net::connect_local;
use ambit_net::relay::Counters;
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::connection::error::ConnectionError;
use crate::connection::report::{AccessRecord, ConnectionReport, End};
use crate::inbound::proxy_protocol;
use crate::pods::{Pod, Role};
use crate::proxy::Worker;
use ambit_runtime::connections::{Direction, NewConnection, Open, Subject};
use ambit_runtime::cut::CutReason;

/// A connection to a pod whose peer is known, or known to be nobody.
#[derive(Debug)]
pub struct Authenticated {
    /// The worker that carries it.
    pub worker: Arc<Worker>,
    /// The pod that it is to.
    pub pod: Arc<Pod>,
    /// The client's address; on a tunnel, the tunnel's port.
    pub source: SocketAddr,
    /// The port that the client itself dials from, as far as it is known; else 0.
    pub client_port: u16,
    /// Who the client is, proven by certificate or by being a pod of this node.
    pub peer: Option<SpiffeId>,
    /// The certificate that proved it.
    pub certificate: Option<PeerCertificate>,
    /// The client's workload, where it is known without a look-up.
    pub client: Option<Arc<Workload>>,
    /// The pod's address that was reached: of the HBONE listener, or what was dialled in plaintext.
    pub reached: SocketAddr,
    /// What a tunnelled connection asks for.
    pub authority: Option<Authority>,
    /// The service that the client says it dialled.
    pub host: Option<Arc<str>>,
    /// What the client's proxy says of its workload.
    pub baggage: Option<Arc<Baggage>>,
    /// Since when.
    pub since: Instant,
    /// Where its bytes are counted.
    pub counters: Arc<Counters>,
}

/// A connection that policy lets in.
#[derive(Debug)]
pub struct Authorized {
    from: Authenticated,
    target: InboundTarget,
    record: AccessRecord,
    open: Open,
}

/// A connection that has reached the application. The caller relays, and finishes the report.
#[derive(Debug)]
pub struct Connected {
    /// The application's socket.
    pub stream: TcpStream,
    /// Its entry on the table of open connections.
    pub open: Open,
    /// Its report, finished when it ends.
    pub report: ConnectionReport,
}

impl Authenticated {
    /// Reports a failure before anything was decided.
    pub fn report_failed(&self, error: &ConnectionError) {
        self.worker.reporter.failed(&self.record(), error);
    }

    /// Asks policy.
    ///
    /// # Errors
    /// [`ConnectionError`], already reported: the pod is unknown, the connection isn't meant for it, the
    /// certificate was revoked, or policy says no.
    pub async fn authorize(self) -> Result<Authorized, ConnectionError> {
        let mut record = self.record();
        match self.decide(&mut record).await {
            Ok((target, open)) => Ok(Authorized { from: self, target, record, open }),
            Err(error) => {
                self.worker.reporter.failed(&record, &error);
                Err(error)
            }
        }
    }

    async fn decide(&self, record: &mut AccessRecord) -> Result<(InboundTarget, Open), ConnectionError> {
        let proxy = &self.worker.proxy;
        let workload = proxy.workload_of(&self.pod).await?;
        let target = self.target(&proxy.directory.load(), &workload)?;
        let listeners = proxy.settings.listeners;
        if Role::ALL.iter().any(|role| listeners.wants(*role) && role.port() == target.dial.port()) {
            return Err(ConnectionError::Loop(target.dial));
        }
        let subject = Subject {
            workload: workload.uid.clone(),
            peer: self.peer.clone(),
            source: self.source,
            destination: target.destination,
            stamp: Mutex::new(None),
        };
        // On the table first, decided after: a policy that comes between is then asked twice, never not at all.
        let connection = NewConnection {
            direction: Direction::Inbound,
            source: self.source,
            destination: target.destination,
            subject: Some(subject),
            certificate: self.certificate.clone(),
            counters: self.counters.clone(),
        };
        let open = proxy.connections.open(self.worker.index, connection);
        if let Some(certificate) = &self.certificate {
            proxy.trust.recheck(certificate, SystemTime::now()).map_err(ConnectionError::Untrusted)?;
        }
        let snapshot = proxy.directory.load();
        // The newest form of the workload, with the newest list of policies.
        let workload = snapshot.workload(workload.uid.as_str()).unwrap_or(&workload);
        self.fill(record, &snapshot, workload, target);
        let verdict = snapshot.authorize(workload, self.peer.as_ref(), self.source.ip(), target.destination);
        if verdict.dry_run_differs() {
            proxy.tallies.dry_run_differs.add(1);
            tracing::info!(
                source = %self.source, peer = ?self.peer, workload = %workload.uid, decision = ?verdict.decision,
                dry_run = ?verdict.dry_run, "a dry-run policy would decide otherwise"
            );
        }
        if !verdict.allowed() {
            return Err(ConnectionError::Denied(verdict.decision));
        }
        if let Some(subject) = &open.subject {
            *subject.stamp.lock() = Some(snapshot.authorization_stamp(workload));
        }
        Ok((target, open))
    }

    fn target(&self, snapshot: &Snapshot, workload: &Workload) -> Result<InboundTarget, ConnectionError> {
        match &self.authority {
            Some(authority) => Ok(snapshot.inbound_target(workload, self.reached.ip(), authority)?),
            None => Ok(InboundTarget { destination: self.reached, dial: self.reached, proxy_header: false }),
        }
    }

    fn record(&self) -> AccessRecord {
        let identity = self.peer.is_some().then(|| self.pod.identity().clone());
        AccessRecord {
            direction: Direction::Inbound,
            source: End {
                workload: self.client.clone(),
                identity: self.peer.clone(),
                baggage: self.baggage.clone(),
            },
            source_address: self.source,
            destination: End { identity, ..End::default() },
            destination_address: self.reached,
            hbone_address: self.authority.as_ref().map(|authority| authority.to_string().into()),
            service: None,
            since: self.since,
        }
    }

    /// Adds what only the directory knows.
    fn fill(
        &self,
        record: &mut AccessRecord,
        snapshot: &Snapshot,
        workload: &Arc<Workload>,
        target: InboundTarget,
    ) {
        record.destination.workload = Some(workload.clone());
        if record.source.workload.is_none() {
            let network = &self.worker.proxy.settings.network;
            record.source.workload =
                snapshot.inbound_source(network, self.source.ip(), self.peer.as_ref()).cloned();
        }
        let port = target.destination.port();
        record.service = snapshot.inbound_service(workload, port, self.host.as_deref()).cloned();
    }
}

impl Authorized {
    /// Dials the application, from the client's own address.
    ///
    /// # Errors
    /// [`ConnectionError`], already reported: the application refuses or does not answer.
    pub async fn connect(self) -> Result<Connected, ConnectionError> {
        match self.dial().await {
            Ok(stream) => {
                let Self { from, record, open, .. } = self;
                let report = from.worker.reporter.open(record, &open);
                Ok(Connected { stream, open, report })
            }
            Err(error) => {
                self.from.worker.reporter.failed(&self.record, &error);
                Err(error)
            }
        }
    }

    /// The pod's own workload, which answers say something of.
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        self.record.destination.workload.as_ref()
    }

    async fn dial(&self) -> Result<TcpStream, ConnectionError> {
        let InboundTarget { destination, dial, proxy_header } = self.target;
        let limit = self.from.worker.proxy.settings.limits.attempt_timeout;
        let client = SocketAddr::new(self.from.source.ip(), self.from.client_port);
        let source = foreign(client, dial.ip());
        let mut stream = connect_local(self.from.pod.stock(), source, dial, limit)
            .await
            .map_err(ConnectionError::Application)?;
        if proxy_header {
            let identity = self.from.peer.as_ref().map(SpiffeId::as_str);
            let header = proxy_protocol::header(self.from.source, destination, identity);
            stream
                .write_all(&header)
                .await
                .map_err(|source| ConnectionError::ApplicationTunnel { address: dial, source })?;
        }
        Ok(stream)
    }
}

/// The source to carry towards the application: the client's, unless the application couldn't answer it.
fn foreign(source: SocketAddr, destination: IpAddr) -> Option<SocketAddr> {
    let ip = source.ip();
    let usable = ip.is_ipv4() == destination.is_ipv4() && !ip.is_loopback() && ip != destination;
    usable.then_some(source)
}

/// Why a connection to or from this peer must be closed now, if it must.
///
/// Certificate contract: an expired peer keeps its tunnels for the time of one renewal, so that they can move to a
/// connection with the new certificate. One that is revoked or lost its root has no such time.
pub fn peer_reason(trust: &Trust, peer: &PeerCertificate, now: SystemTime) -> Option<CutReason> {
    match trust.recheck_open(peer, now) {
        Ok(()) => None,
        Err(PeerError::Revoked { .. }) => Some(CutReason::Revoked),
        Err(error) if error.is_expiry() && now > peer.open_until() => Some(CutReason::Expired),
        Err(_) => Some(CutReason::Untrusted),
    }
}

/// Why policy does not allow an open connection any more, if it doesn't.
pub fn review(snapshot: &Snapshot, subject: &Subject) -> Option<CutReason> {
    // A pod that left the directory keeps what it has: nothing says that it may not.
    let workload = snapshot.workload(subject.workload.as_str())?;
    let stamp = snapshot.authorization_stamp(workload);
    if *subject.stamp.lock() == Some(stamp) {
        return None;
    }
    let verdict =
        snapshot.authorize(workload, subject.peer.as_ref(), subject.source.ip(), subject.destination);
    if !verdict.allowed() {
        return Some(CutReason::Policy(verdict.decision));
    }
    *subject.stamp.lock() = Some(stamp);
    None
}
