//! Connections to endpoints: one of the pool, or a new one through a tunnel or past the mesh, within the limits of policies.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ambit_hbone::ConnectRequest;
use ambit_hbone::client::Target as TunnelTarget;
use ambit_net::socket::set_probes;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::ConnectBudget;
use crate::backend_policies::TcpProbes;
use crate::backend_tls::Alpn;
use crate::balance::{Endpoint, guard};
use crate::balancers::Gate;
use crate::balancers::circuit::{Connection, Turn};
use crate::failure::{Failure, Limit};
use crate::io;
use crate::proxy::{TunnelKey, Worker};
use crate::upstream::{Found, Key, Sender};

/// A connection to an endpoint: one that waits, or a new one. Waiting for another request's dial has the limit of a dial; waiting for one
/// of the connections that a policy allows that of [`Circuit::turn`](crate::balancers::circuit::Circuit::turn).
///
/// # Errors
/// [`Failure::Connect`], [`Failure::NoEndpoint`], [`Failure::Overflow`], [`Failure::Unavailable`].
pub async fn sender(
    worker: &Worker,
    key: &Key,
    chosen: &Endpoint,
    gate: Option<&Gate>,
    budget: &ConnectBudget,
) -> Result<Sender, Failure> {
    let ready = || worker.upstreams.take(key);
    let is_contended = gate.is_some_and(|gate| !key.http2 && gate.circuit.is_contended());
    if !is_contended && let Some(sender) = ready() {
        return Ok(sender);
    }
    let Some(gate) = gate else { return dial(worker, key, chosen, None, None, budget).await };
    let _pending = gate.circuit.pend(gate.pool())?;
    if key.http2 {
        return dial(worker, key, chosen, Some(gate), None, budget).await;
    }
    match gate.circuit.turn(gate.pool(), ready).await? {
        Turn::Ready(sender) => Ok(sender),
        Turn::Connect(counted) => dial(worker, key, chosen, Some(gate), Some(counted), budget).await,
    }
}

async fn dial(
    worker: &Worker,
    key: &Key,
    chosen: &Endpoint,
    gate: Option<&Gate>,
    counted: Option<Arc<Connection>>,
    budget: &ConnectBudget,
) -> Result<Sender, Failure> {
    let limits = &worker.proxy.settings.limits;
    let limit = budget
        .limit(connect_timeout(worker, gate))
        .ok_or_else(|| Failure::Connect(format!("no time is left for a connection to {}", chosen.address)))?;
    let _spending = budget.spend();
    let timed_out = || Failure::Connect(format!("{} did not answer within {limit:?}", chosen.address));
    let found = timeout(limit, worker.upstreams.find(key, limits.connections_per_endpoint)).await;
    let mut dial = match found.map_err(|_| timed_out())? {
        Found::Sender(sender) => return Ok(sender),
        Found::Full => {
            return Err(match gate {
                Some(gate) => gate.circuit.refuse(Limit::Connections),
                None => worker.proxy.balancers.counts.overflows.refuse(Limit::Connections),
            });
        }
        Found::Failed(failure) => return Err(failure),
        Found::Dial(dial) => dial,
    };
    dial.counted = counted.or_else(|| Some(gate?.circuit.share()));
    let connecting = async {
        let alpn = if key.http2 { Alpn::Http2 } else { Alpn::Http1 };
        let io = connect(worker, chosen, gate, alpn).await?;
        let connected = worker.upstreams.connect(key, &mut dial, io).await;
        connected.map_err(|error| Failure::Connect(error.to_string()))
    };
    let connected = timeout(limit, connecting).await.unwrap_or_else(|_| Err(timed_out()));
    dial.finish(connected.as_ref().map(drop).map_err(Clone::clone));
    connected
}

/// The budget of one connection, handshakes included.
pub fn connect_timeout(worker: &Worker, gate: Option<&Gate>) -> Duration {
    let of_policy = gate.and_then(|gate| gate.pool().connect_timeout);
    of_policy.unwrap_or(worker.proxy.settings.limits.connect_timeout.get())
}

/// Opens a byte stream to an endpoint: HBONE, with the identity of that workload, or plain TCP outside the mesh; inside it TLS, where
/// a policy demands it.
///
/// # Errors
/// [`Failure::Connect`], [`Failure::InvalidPolicy`], [`Failure::NoEndpoint`], [`Failure::Unavailable`].
pub async fn connect(
    worker: &Worker,
    chosen: &Endpoint,
    gate: Option<&Gate>,
    alpn: Alpn,
) -> Result<io::Endpoint, Failure> {
    let io = Box::pin(transport(worker, chosen, gate)).await?;
    let Some(tls) = &chosen.tls else { return Ok(io) };
    let proxy = &worker.proxy;
    tls.handshake(io, alpn, (&proxy.certificates, &proxy.identity)).await
}

async fn transport(worker: &Worker, chosen: &Endpoint, gate: Option<&Gate>) -> Result<io::Endpoint, Failure> {
    let proxy = &worker.proxy;
    let failed = |error: &dyn std::fmt::Display| Failure::Connect(format!("{}: {error}", chosen.address));
    let dialled = chosen.tunnel.as_ref().map_or(chosen.address, |(hbone, _)| *hbone);
    guard(proxy, dialled)?;
    let Some((hbone, expected)) = &chosen.tunnel else {
        let stream = TcpStream::connect(chosen.address).await.map_err(|error| failed(&error))?;
        stream.set_nodelay(true).map_err(|error| failed(&error))?;
        if let Some(probes) = gate.and_then(|gate| gate.pool().tcp_keepalive) {
            let TcpProbes { idle, interval, probes } = probes;
            set_probes(&stream, idle, interval, probes).map_err(|error| failed(&error))?;
        }
        return Ok(io::Endpoint::Plain(stream));
    };
    let Some(workload) = &chosen.workload else {
        return Err(Failure::Unavailable("a tunnel to no workload".to_owned()));
    };
    let certificate = proxy.certificates.certificate(&proxy.identity).await;
    let certificate = certificate.map_err(|error| Failure::Unavailable(error.to_string()))?;
    let tls = certificate.client_tls();
    let crossing = chosen.crossing.as_deref();
    let destination = crossing.map_or(&workload.uid, |crossing| &crossing.gateway).clone();
    let key = TunnelKey { destination, address: *hbone };
    let source = SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, 0)).ip();
    let target = TunnelTarget { address: *hbone, source, tls: &tls, expected };
    let authority = match (crossing, &chosen.asked_of_waypoint) {
        (Some(crossing), _) => crossing.authority.clone(),
        (None, Some(asked)) => asked.clone(),
        (None, None) => chosen.address.into(),
    };
    let mut request = ConnectRequest::new(authority);
    let address = *hbone;
    let dial = move || async move {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    let tunnel = worker.tunnels.open(&key, target, &request, dial).await.map_err(|error| failed(&error))?;
    let Some(crossing) = crossing else { return Ok(io::Endpoint::Tunnel(tunnel.into_stream())) };
    request.forwarded_network = Some(crossing.network.to_string());
    let target = TunnelTarget { address: *hbone, source, tls: &tls, expected: &crossing.expected };
    let settings = &worker.tunnels.settings().client;
    let inner = Box::pin(ambit_hbone::client::open_within(tunnel, target, &request, settings)).await;
    Ok(io::Endpoint::Tunnel(inner.map_err(|error| failed(&error))?.into_stream()))
}
