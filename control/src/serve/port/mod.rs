//! The control plane's TLS port: who may connect how often, and how long a connection lives.
//!
//! `serve` accepts, shakes hands and serves HTTP/2 until it is stopped. A connection ends when it has reached
//! its age, or when it carried no request for a while: new replicas get their share of proxies, and a token that has
//! expired keeps no stream open. A request has to arrive in time, so that none holds its connection for nothing. The services behind the port decide who the caller is.

mod accept;
mod connection;
mod handshakes;
mod request;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tonic::service::Routes;

use accept::ConnectionLimits;
use handshakes::HandshakeLimits;

/// Limits of the port.
#[derive(Debug, Clone, Copy)]
pub struct PortLimits {
    /// Handshakes at the same time.
    pub(crate) handshakes: HandshakeLimits,
    /// Connections, those in their handshake included.
    pub(crate) connections: ConnectionLimits,
    /// How long a new socket may be silent.
    pub(crate) first_byte: Duration,
    /// How long a handshake may take after its first byte.
    pub(crate) handshake: Duration,
    /// How long a connection may be without a request.
    pub(crate) idle: Duration,
    /// How long a request may take to arrive; of a stream, its first message.
    pub(crate) body: Duration,
    /// Age at which a connection ends; each one's own differs by up to a tenth.
    pub(crate) max_age: Duration,
    /// Time that requests have to end after that.
    pub(crate) grace: Duration,
}

impl PortLimits {
    /// Default of the maximum age.
    pub const MAX_AGE: Duration = Duration::from_secs(30 * 60);
    /// Default of the number of connections.
    pub const MAX_CONNECTIONS: usize = 32 * 1024;

    /// The defaults with this maximum age and number of connections.
    pub fn new(max_age: Duration, connections: usize) -> Self {
        Self {
            handshakes: HandshakeLimits { per_address: 32, total: 1024 },
            connections: ConnectionLimits { per_address: 2048, total: connections },
            first_byte: Duration::from_secs(2),
            handshake: Duration::from_secs(5),
            idle: Duration::from_secs(60),
            body: Duration::from_secs(10),
            max_age,
            grace: Duration::from_secs(5),
        }
    }
}

/// Counters of the port.
#[derive(Debug, Default)]
pub struct PortMetrics {
    /// Connections whose handshake succeeded.
    pub(crate) accepted: AtomicU64,
    /// Connections open now, those in their handshake included.
    pub(crate) open: AtomicU64,
    /// Connections refused because their address, or all together, have too many.
    pub(crate) refused: AtomicU64,
    /// Requests that did not arrive in time.
    pub(crate) unfinished: AtomicU64,
    /// Handshakes that failed or took too long.
    pub(crate) failed_handshakes: AtomicU64,
    /// Of those: sockets that sent nothing.
    pub(crate) silent: AtomicU64,
    /// Handshakes that gave way to newer ones.
    pub(crate) evicted: AtomicU64,
    /// Connections ended because of their age.
    pub(crate) aged: AtomicU64,
    /// Connections ended because they carried no request.
    pub(crate) idle: AtomicU64,
}

/// Serves `routes` on connections to `listener` until `stop` turns true; returns when the last connection has ended.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    routes: Routes,
    limits: PortLimits,
    metrics: Arc<PortMetrics>,
    mut stop: watch::Receiver<bool>,
) {
    let (send, mut connections) = mpsc::channel(limits.handshakes.total);
    let mut tasks = JoinSet::new();
    tasks.spawn(accept::accept(listener, TlsAcceptor::from(tls), limits, metrics.clone(), send));
    let stopping = stop.clone();
    let stopped = async move {
        // A dropped sender also means stop.
        drop(stop.wait_for(|stop| *stop).await);
    };
    tokio::pin!(stopped);
    loop {
        tokio::select! {
            () = &mut stopped => break,
            connection = connections.recv() => {
                let Some(connection) = connection else { break };
                metrics.accepted.fetch_add(1, Ordering::Relaxed);
                tasks.spawn(connection::serve(
                    connection,
                    routes.clone(),
                    limits,
                    metrics.clone(),
                    stopping.clone(),
                ));
            }
            // Joins those that have ended; there is always the one that accepts.
            Some(ended) = tasks.join_next() => report(ended),
        }
    }
    drop(connections);
    while let Some(ended) = tasks.join_next().await {
        report(ended);
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "a connection's task ended abnormally");
    }
}
