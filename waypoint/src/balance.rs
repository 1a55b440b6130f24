//! Step 7: which backend of the rule gets a request, by weight, and which endpoint of it, by load.

use std::net::SocketAddr;
use std::sync::Arc;

use ambit_directory::{
    AppProtocol, Authority, ClientRole, HostRef, Load, Question, Route, Service, Snapshot, Workload,
    WorkloadUid, resolve,
};
use ambit_identity::SpiffeId;
use ambit_route::Backend;
use rand::RngExt;
use smallvec::SmallVec;

use crate::accept::{Destination, Inbound};
use crate::failure::Failure;
use crate::matching::Routed;
use crate::proxy::{Proxy, Worker};

/// What a request is for: a service or an address, whose endpoints are tried.
#[derive(Debug, Clone)]
pub struct Target {
    /// The destination.
    pub authority: Authority,
    /// The backend that was drawn, where a rule decides.
    pub backend: Option<Backend>,
    /// What is spoken there, as far as it was declared.
    pub protocol: AppProtocol,
}

/// Draws the backend of a rule; without a rule it is the destination itself.
///
/// # Errors
/// [`Failure::InvalidRoute`].
pub fn split(routed: Option<&Routed>, inbound: &Inbound) -> Result<Target, Failure> {
    let Some(Routed { rule, .. }) = routed else {
        let authority = match &inbound.destination {
            Destination::Service { service, port, .. } => {
                Authority::Host { host: service.host.hostname.clone(), port: *port }
            }
            Destination::Workload { address, .. } => Authority::Address(*address),
        };
        return Ok(Target { authority, backend: None, protocol: inbound.destination.protocol() });
    };
    let invalid =
        |reason: &str| Failure::InvalidRoute { route: rule.route.to_string(), reason: reason.to_owned() };
    let total = rule.backends.total();
    if total == 0 {
        return Err(invalid("no backend gets requests"));
    }
    let drawn = rule.backends.choose(rand::rng().random_range(0..total));
    let backend = drawn.ok_or_else(|| invalid("no backend gets requests"))?;
    of_backend(&inbound.worker.proxy, backend).map_err(|reason| invalid(&reason))
}

/// The target that a backend is.
///
/// # Errors
/// Why it can be none.
pub fn of_backend(proxy: &Proxy, backend: &Backend) -> Result<Target, String> {
    if let Some(reason) = &backend.invalid {
        return Err(reason.to_string());
    }
    if let Some(subset) = &backend.subset {
        // To send its requests to all endpoints would be another version than the one that was asked for.
        return Err(format!("subset {subset} of {} is not known", backend.hostname));
    }
    let snapshot = &proxy.published.load().directory;
    let host = HostRef { namespace: &backend.namespace, hostname: &backend.hostname };
    let service =
        snapshot.service(host).ok_or_else(|| format!("service {} is not known", backend.hostname))?;
    let port = service.ports.get(backend.port);
    Ok(Target {
        authority: Authority::Host { host: backend.hostname.clone(), port: backend.port },
        backend: Some(backend.clone()),
        protocol: port.map(|port| port.app_protocol).unwrap_or_default(),
    })
}

/// An endpoint that was chosen.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// The workload; none for an address that the directory does not know.
    pub workload: Option<Arc<Workload>>,
    /// The service that it was chosen for.
    pub service: Option<Arc<Service>>,
    /// Its address and port.
    pub address: SocketAddr,
    /// Where its proxy listens, and who must answer there; none outside the mesh.
    pub tunnel: Option<(SocketAddr, SmallVec<[SpiffeId; 1]>)>,
}

impl Endpoint {
    /// Its identity, as far as one is expected.
    pub fn identity(&self) -> Option<&SpiffeId> {
        self.tunnel.as_ref().and_then(|(_, expected)| expected.first())
    }
}

/// Chooses an endpoint that was not tried.
///
/// # Errors
/// [`Failure::NoEndpoint`], [`Failure::UnknownService`], [`Failure::Unavailable`].
pub fn endpoint(
    worker: &Worker,
    source: SocketAddr,
    target: &Target,
    tried: &[WorkloadUid],
) -> Result<Endpoint, Failure> {
    let proxy = &worker.proxy;
    let snapshot = &proxy.published.load().directory;
    let own = own_workload(proxy, snapshot)?;
    let question = Question {
        client: own,
        role: ClientRole::Waypoint,
        source: source.ip(),
        destination: target.authority.clone(),
        exclude: tried,
    };
    match resolve(snapshot, &question, &InProgress(proxy), &mut rand::rng()) {
        Route::Tunnel(route) | Route::SameNode(route) => Ok(Endpoint {
            workload: Some(route.workload),
            service: route.service,
            address: route.address,
            tunnel: Some((route.hbone, route.expected)),
        }),
        Route::Plain(route) | Route::Own(route) => Ok(Endpoint {
            workload: route.workload,
            service: route.service,
            address: route.address,
            tunnel: None,
        }),
        Route::Refuse(refusal) => Err(Failure::NoEndpoint(refusal.to_string())),
        Route::Unknown(unknown) => Err(Failure::UnknownService(unknown.authority.to_string())),
        Route::Lookup(_) | Route::DoubleHbone(_) | Route::Waypoint(_) => Err(Failure::NoEndpoint(format!(
            "{} needs a route that a waypoint does not support",
            target.authority
        ))),
    }
}

fn own_workload<'a>(proxy: &Proxy, snapshot: &'a Snapshot) -> Result<&'a Workload, Failure> {
    let own = snapshot.workload(proxy.settings.uid.as_str());
    own.map(AsRef::as_ref).ok_or_else(|| {
        Failure::Unavailable(format!("the waypoint's own workload {} is not known", proxy.settings.uid))
    })
}

/// Requests in progress stand for connections.
struct InProgress<'a>(&'a Proxy);

impl Load for InProgress<'_> {
    fn connections(&self, workload: &WorkloadUid) -> u32 {
        self.0.loads.get(workload)
    }
}
