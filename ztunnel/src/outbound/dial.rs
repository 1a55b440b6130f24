//! From a dialled address to an open connection: resolve, connect, and try another endpoint if one
//! fails before the first byte.
//!
//! `outbound` calls it for every connection of a pod; `attempt` connects. Nothing of the application is read here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use ambit_directory::{
    Authority, ClientRole, Demand, Dependencies, Dependency, Load, Question, Route, Workload, WorkloadUid,
    resolve, resolve_on_demand,
};
use ambit_hbone::{OpenError, Tunnel};
use ambit_net::relay::Counters;
use ambit_runtime::loads::LoadGuard;
use ambit_xds::Found;
use smallvec::SmallVec;
use tokio::net::TcpStream;

use crate::connection::error::ConnectionError;
use crate::connection::report::{AccessRecord, End};
use crate::inbound::destination::Connected;
use crate::pods::Pod;
use crate::proxy::{Proxy, Worker};

/// Requests that a peer did not process, beside [`connect_attempts`](crate::config::Limits::connect_attempts).
const UNPROCESSED_ATTEMPTS: u32 = 8;

/// Names asked for while one connection is routed, at most: address, waypoint, gateway and their services.
const MAX_DEMANDS: usize = 8;

/// An open connection to the destination.
#[derive(Debug)]
pub enum Upstream {
    /// Through a tunnel on a pooled connection.
    Tunnel(Box<Tunnel>),
    /// Through a tunnel inside a tunnel, on a connection of its own.
    InnerTunnel(Box<Tunnel>),
    /// In plaintext, out of the pod's namespace.
    Plain(TcpStream),
    /// To a pod of this node, in its namespace.
    Local(Box<Connected>),
}

/// A connection that was reached, and its record.
#[derive(Debug)]
pub struct ConnectedUpstream {
    /// The connection.
    pub upstream: Upstream,
    /// Its record.
    pub record: AccessRecord,
    /// Counts it at its workload.
    pub load: Option<LoadGuard>,
}

/// A connection that was not reached, and its record.
#[derive(Debug)]
pub struct ConnectFailure {
    /// Why.
    pub error: ConnectionError,
    /// Its record.
    pub record: AccessRecord,
}

/// Who dials what.
#[derive(Debug)]
pub struct Dial<'a> {
    /// The worker that carries the connection.
    pub worker: &'a Arc<Worker>,
    /// The pod that dials.
    pub pod: &'a Arc<Pod>,
    /// Its workload.
    pub client: Arc<Workload>,
    /// The application's address.
    pub source: SocketAddr,
    /// What it dialled.
    pub dialled: Authority,
    /// Since when.
    pub since: Instant,
    /// Where its bytes will be counted.
    pub counters: Arc<Counters>,
}

impl Dial<'_> {
    /// Reaches the destination within the connect budget.
    ///
    /// # Errors
    /// [`ConnectFailure`]: the last attempt's error, or why there was none.
    pub async fn reach(&self) -> Result<ConnectedUpstream, Box<ConnectFailure>> {
        let limits = self.worker.proxy.settings.limits;
        let mut record = self.record();
        let attempts = self.attempts(&mut record);
        match tokio::time::timeout(limits.connect_timeout, Box::pin(attempts)).await {
            Ok(Ok((upstream, load))) => Ok(ConnectedUpstream { upstream, record, load }),
            Ok(Err(error)) => Err(Box::new(ConnectFailure { error, record })),
            Err(_) => {
                let error = ConnectionError::Budget {
                    destination: self.dialled.clone(),
                    budget: limits.connect_timeout,
                };
                Err(Box::new(ConnectFailure { error, record }))
            }
        }
    }

    async fn attempts(
        &self,
        record: &mut AccessRecord,
    ) -> Result<(Upstream, Option<LoadGuard>), ConnectionError> {
        let limits = self.worker.proxy.settings.limits;
        let deadline = Instant::now() + limits.connect_timeout;
        let mut tried: SmallVec<[WorkloadUid; 4]> = SmallVec::new();
        let mut last: Option<ConnectionError> = None;
        let (mut attempts, mut unprocessed) = (0, 0);
        let mut bypassed = false;
        while attempts < limits.connect_attempts {
            let mut route = self.route(&tried).await?;
            if let (Route::Refuse(refusal), Some(error)) = (&route, &last)
                && refusal.is_exhausted()
            {
                if !is_passing(error) {
                    break;
                }
                tried.clear();
                route = self.route(&tried).await?;
            }
            record.service = route.service().cloned();
            // Counted once a connection, however many endpoints it is tried at.
            if !bypassed && bypasses_waypoint(&route) {
                bypassed = true;
                self.worker.proxy.tallies.waypoint_bypassed.add(1);
            }
            let peer = route.peer().cloned();
            let load = peer.as_ref().map(|peer| self.worker.proxy.loads.open(&peer.uid));
            // Each attempt leaves to the others their part of what is left of the budget.
            let attempts_left = u32::from(limits.connect_attempts - attempts).max(1);
            let part = deadline.saturating_duration_since(Instant::now()) / attempts_left;
            let limit = limits.attempt_timeout.min(part);
            let ejected = self.pod.ejected();
            match Box::pin(self.attempt(route, record, limit)).await {
                Ok(upstream) => {
                    if let Some(peer) = &peer {
                        ejected.reached(peer);
                    }
                    return Ok((upstream, load));
                }
                // The peer's connection was closing, as before an upgrade: the same endpoint may take it on another one.
                Err(ConnectionError::Tunnel(error))
                    if error.never_processed() && unprocessed < UNPROCESSED_ATTEMPTS =>
                {
                    tracing::debug!(%error, dialled = %self.dialled, "a request was not processed");
                    self.worker.proxy.tallies.retries.add(1);
                    unprocessed += 1;
                    last = Some(error.into());
                }
                Err(error) => {
                    attempts += 1;
                    if let (Some(peer), Some(what)) = (&peer, error.unreachable()) {
                        self.worker.proxy.tallies.ejected.add(ejected.failed(peer, what));
                    }
                    let again = error.another_endpoint_may_help();
                    tracing::debug!(%error, dialled = %self.dialled, again, "an attempt failed");
                    last = Some(error);
                    match peer {
                        Some(peer) if again => {
                            self.worker.proxy.tallies.retries.add(1);
                            tried.push(peer.uid.clone());
                        }
                        _ => break,
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| ConnectionError::UnknownName(self.dialled.to_string())))
    }

    /// Where to go.
    async fn route(&self, tried: &[WorkloadUid]) -> Result<Route, ConnectionError> {
        self.route_to(&self.dialled, tried).await
    }

    /// Where a connection to `destination` goes. Where resources come on demand, the control plane is asked first for every
    /// name that the route depends on.
    pub(super) async fn route_to(
        &self,
        destination: &Authority,
        tried: &[WorkloadUid],
    ) -> Result<Route, ConnectionError> {
        let proxy = &self.worker.proxy;
        let Some(on_demand) = &proxy.on_demand else {
            return Ok(resolve(
                &proxy.directory.load(),
                &self.question(destination, tried),
                &self.load(),
                &mut rand::rng(),
            ));
        };
        let mut answers: SmallVec<[(Demand, Found); 4]> = SmallVec::new();
        loop {
            let (route, names) = {
                let (question, load) = (self.question(destination, tried), self.load());
                resolve_on_demand(&proxy.directory.load(), &question, &load, &mut rand::rng())
            };
            for name in names.iter().filter(|name| name.is_known) {
                on_demand.note_use(self.pod.shared_uid(), &name.demand.to_string());
            }
            let is_asked = |name: &Demand| answers.iter().any(|(asked, _)| asked == name);
            let next = names.into_iter().find(|name| !name.is_known && !is_asked(&name.demand));
            let Some(Dependency { demand, .. }) = next.filter(|_| answers.len() < MAX_DEMANDS) else {
                return self.settled(route, &answers);
            };
            let name = demand.to_string();
            let found =
                on_demand.demand(self.pod.shared_uid(), &name, proxy.settings.limits.directory_wait).await;
            let found = found.map_err(|reason| ConnectionError::Undetermined { name, reason })?;
            answers.push((demand, found));
        }
    }

    /// What the directory doesn't know passes only if the control plane said that there is no such thing.
    fn settled(&self, route: Route, answers: &[(Demand, Found)]) -> Result<Route, ConnectionError> {
        if let Route::Unknown(unknown) = &route
            && !answers.contains(&(unknown.demand.clone(), Found::Absent))
        {
            return Err(ConnectionError::UnknownName(unknown.demand.to_string()));
        }
        Ok(route)
    }

    fn question<'a>(&'a self, destination: &Authority, tried: &'a [WorkloadUid]) -> Question<'a> {
        Question {
            client: &self.client,
            role: ClientRole::Workload,
            source: self.source.ip(),
            destination: destination.clone(),
            exclude: tried,
        }
    }

    fn load(&self) -> SeenByPod<'_> {
        SeenByPod { proxy: &self.worker.proxy, pod: self.pod }
    }

    fn record(&self) -> AccessRecord {
        let source = End { workload: Some(self.client.clone()), ..End::default() };
        AccessRecord::outbound(source, self.source, &self.dialled, self.since)
    }
}

/// Where a connection of a pod would go now, and what that depends on. Nothing is asked of the control plane.
pub fn preview(proxy: &Proxy, pod: &Pod, client: &Workload, destination: Authority) -> (Route, Dependencies) {
    let source = client.address_like(destination.address().map(|address| address.ip()));
    let question = Question {
        client,
        role: ClientRole::Workload,
        source: source.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        destination,
        exclude: &[],
    };
    resolve_on_demand(&proxy.directory.load(), &question, &SeenByPod { proxy, pod }, &mut rand::rng())
}

/// What endpoint choice asks: the connections of this node, and what the pod could not reach.
struct SeenByPod<'a> {
    proxy: &'a Proxy,
    pod: &'a Pod,
}

impl Load for SeenByPod<'_> {
    fn connections(&self, workload: &WorkloadUid) -> u32 {
        self.proxy.loads.get(workload)
    }

    fn is_ejected(&self, workload: &Workload) -> bool {
        self.pod.ejected().is_ejected(workload)
    }
}

/// Whether the same endpoint may do better a little later: its proxy was lost or kept silent, as one does
/// that is being started again. What was answered or refused would be so again.
fn is_passing(error: &ConnectionError) -> bool {
    let error = match error {
        ConnectionError::AttemptTimedOut { .. } => return true,
        ConnectionError::Tunnel(error) | ConnectionError::InnerTunnel(error) => error,
        _ => return false,
    };
    match error {
        OpenError::Lost { .. }
        | OpenError::NotProcessed { .. }
        | OpenError::ConnectTimeout { .. }
        | OpenError::Silent { .. }
        | OpenError::HandshakeTimeout { .. }
        | OpenError::Abandoned { .. } => true,
        OpenError::Tls { source, .. } => {
            matches!(source.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
        }
        _ => false,
    }
}

/// Whether a missing waypoint is passed by because its owner allows that.
fn bypasses_waypoint(route: &Route) -> bool {
    match route {
        Route::Tunnel(route) | Route::SameNode(route) => route.waypoint_bypassed,
        Route::DoubleHbone(route) => route.waypoint_bypassed,
        Route::Plain(route) | Route::Own(route) => route.waypoint_bypassed,
        Route::Lookup(route) => route.waypoint_bypassed,
        Route::Waypoint(_) | Route::Unknown(_) | Route::Refuse(_) => false,
    }
}
