//! Sockets of the port: accepted at once, their TLS handshakes side by side, each with an end.
//!
//! Which handshakes may run is decided by [`Handshakes`]; failed ones are counted and never reach the server.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::handshakes::{Handshakes, Origin, SocketId};
use super::{PortLimits, PortMetrics};

/// Pause after a failed accept, as when descriptors have run out.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// Connections of an address that has this many or fewer may use the last eighth of all places.
const FEW: usize = 8;

/// How many connections may be open, those in their handshake included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionLimits {
    /// Of one address.
    pub(crate) per_address: usize,
    /// Of all addresses. The last eighth is kept for addresses with few connections, so that no address uses up what
    /// the others need.
    pub(crate) total: usize,
}

impl ConnectionLimits {
    /// Whether an address that has `own` connections may have one more while `open` are open in all.
    fn allows(&self, own: usize, open: usize) -> bool {
        let for_all = self.total - self.total / 8;
        own < self.per_address && open < self.total && (open < for_all || own < FEW)
    }
}

/// A connection whose handshake is complete, counted for its address until it is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: TlsStream<TcpStream>,
    pub(super) peer: SocketAddr,
    pub(super) place: Place,
}

/// Accepts sockets and hands on those whose handshake succeeds, until nobody takes them any more.
pub(super) async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    limits: PortLimits,
    metrics: Arc<PortMetrics>,
    connections: mpsc::Sender<Connection>,
) {
    let pending = Arc::new(Pending {
        handshakes: Mutex::new(Running { core: Handshakes::new(limits.handshakes), tasks: HashMap::new() }),
        metrics: metrics.clone(),
    });
    let open = Arc::new(Open { counts: Mutex::default(), metrics: metrics.clone() });
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = connections.closed() => return,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let origin = Origin::from(peer.ip());
        let Some(place) = Place::take(&open, origin, limits.connections) else {
            metrics.refused.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%peer, "connection refused: too many are open");
            continue;
        };
        let (acceptor, connections) = (acceptor.clone(), connections.clone());
        pending.start(origin, |pending, id| async move {
            let handshake = Handshake { limits, id, pending: &pending };
            match handshake.run(acceptor, socket).await {
                Ok(stream) => {
                    // Nobody takes it when the program ends.
                    connections.send(Connection { stream, peer, place }).await.unwrap_or_default();
                }
                Err(error) => {
                    pending.metrics.failed_handshakes.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%peer, %error, "TLS handshake failed");
                }
            }
        });
    }
}

/// One handshake.
struct Handshake<'a> {
    limits: PortLimits,
    id: SocketId,
    pending: &'a Pending,
}

impl Handshake<'_> {
    async fn run(&self, acceptor: TlsAcceptor, socket: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let Self { limits, id, pending } = self;
        socket.set_nodelay(true)?;
        // `readable` may say so of a socket that has sent nothing.
        match tokio::time::timeout(limits.first_byte, socket.peek(&mut [0])).await {
            Ok(Ok(1..)) => {}
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                pending.metrics.silent.fetch_add(1, Ordering::Relaxed);
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        pending.handshakes.lock().core.handle_first_byte(*id);
        match tokio::time::timeout(limits.handshake, acceptor.accept(socket)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// The handshakes that run.
struct Pending {
    /// Held for look-ups and inserts, never across an await.
    handshakes: Mutex<Running>,
    metrics: Arc<PortMetrics>,
}

struct Running {
    core: Handshakes,
    tasks: HashMap<SocketId, AbortHandle>,
}

impl Pending {
    fn start<F>(self: &Arc<Self>, origin: Origin, run: impl FnOnce(Arc<Self>, SocketId) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut running = self.handshakes.lock();
        let (id, evicted) = running.core.begin(origin);
        if let Some(task) = evicted.and_then(|evicted| running.tasks.remove(&evicted)) {
            self.metrics.evicted.fetch_add(1, Ordering::Relaxed);
            task.abort();
        }
        let ended = Ended { pending: Arc::clone(self), id };
        let run = run(Arc::clone(self), id);
        // The lock is held, so that the task cannot end before it is entered.
        let task = tokio::spawn(async move {
            let _ended = ended;
            run.await;
        });
        running.tasks.insert(id, task.abort_handle());
    }
}

/// Ends a handshake's place however its task ends.
struct Ended {
    pending: Arc<Pending>,
    id: SocketId,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let mut running = self.pending.handshakes.lock();
        running.core.end(self.id);
        running.tasks.remove(&self.id);
    }
}

/// Connections by address, in their handshake or after it.
#[derive(Debug)]
struct Open {
    /// Held to count, never across an await.
    counts: Mutex<Counts>,
    metrics: Arc<PortMetrics>,
}

#[derive(Debug, Default)]
struct Counts {
    by_origin: HashMap<Origin, usize>,
    total: usize,
}

/// A connection's share of its address's limit; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    open: Arc<Open>,
    origin: Origin,
}

impl Place {
    fn take(open: &Arc<Open>, origin: Origin, limits: ConnectionLimits) -> Option<Self> {
        let mut counts = open.counts.lock();
        let own = counts.by_origin.get(&origin).copied().unwrap_or_default();
        if !limits.allows(own, counts.total) {
            return None;
        }
        counts.by_origin.insert(origin, own + 1);
        counts.total += 1;
        open.metrics.open.fetch_add(1, Ordering::Relaxed);
        Some(Self { open: Arc::clone(open), origin })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.open.counts.lock();
        counts.total = counts.total.saturating_sub(1);
        if let Some(count) = counts.by_origin.get_mut(&self.origin) {
            *count -= 1;
            if *count == 0 {
                counts.by_origin.remove(&self.origin);
            }
        }
        self.open.metrics.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_places_are_for_addresses_with_few_connections() {
        let limits = ConnectionLimits { per_address: 20, total: 64 };
        assert!(limits.allows(19, 55));
        assert!(!limits.allows(20, 0), "too many of one address");
        assert!(!limits.allows(8, 56), "the last eighth");
        assert!(limits.allows(7, 56));
        assert!(limits.allows(0, 63));
        assert!(!limits.allows(0, 64), "too many in all");
    }
}
