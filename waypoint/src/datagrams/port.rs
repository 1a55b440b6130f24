//! A worker's socket on one port of a gateway: finds the session of each datagram, or begins one.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ambit_net::datagram::{BoundDatagrams, DatagramSocket, LARGEST, Received};
use ambit_runtime::drain::Drain;
use ambit_runtime::workers::WorkerHandle;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::session::{self, End, Forwarded, Session};
use super::{Datagrams, Refused};
use crate::accept::{Destination, Inbound};
use crate::gateway::inbound;
use crate::proxy::{Published, Worker};

/// How often sessions are looked for that are to end.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long reading rests after an error that is none of a datagram's.
const REST: Duration = Duration::from_millis(50);

/// The sessions of a port, by the client's address and the address that it sends to. A worker's own: its lock is never waited for.
type Sessions = Arc<Mutex<HashMap<(SocketAddr, IpAddr), Arc<Session>>>>;

/// The port.
struct Port {
    worker: Arc<Worker>,
    handle: WorkerHandle,
    number: u16,
    socket: Arc<DatagramSocket>,
    sessions: Sessions,
    is_draining: bool,
    /// What was published when the sessions were looked at last.
    seen: Arc<Published>,
}

/// Takes datagrams until `closed` says that no listener names the port any more, or the drain has come and no session is left.
pub async fn run(
    worker: Arc<Worker>,
    handle: WorkerHandle,
    (number, bound): (u16, BoundDatagrams),
    mut closed: watch::Receiver<bool>,
    mut drain: Drain,
) {
    let socket = match bound.register() {
        Ok(socket) => Arc::new(socket),
        Err(error) => return tracing::error!(port = number, %error, "a UDP port can't be used"),
    };
    let seen = worker.proxy.published.load_full();
    let sessions = Sessions::default();
    let mut port = Port { worker, handle, number, socket, sessions, is_draining: false, seen };
    let mut buffer = vec![0; LARGEST];
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while !port.is_draining || port.has_sessions() {
        tokio::select! {
            received = port.socket.receive(&mut buffer) => match received {
                Ok(received) => port.take(received, buffer.get(..received.length).unwrap_or_default()),
                Err(error) => {
                    tracing::debug!(port = number, %error, "a datagram could not be read");
                    tokio::time::sleep(REST).await;
                }
            },
            _ = look.tick(), if port.has_sessions() => port.look(),
            () = is_closed(&mut closed) => break,
            () = drain.accepting_stopped(), if !port.is_draining => port.is_draining = true,
        }
    }
    port.sessions.lock().values().for_each(|session| session.end(End::Closed));
}

/// Waits until the port is to be closed. Who would say so may be gone: then the drain has begun.
async fn is_closed(closed: &mut watch::Receiver<bool>) {
    if closed.wait_for(|closed| *closed).await.is_err() {
        std::future::pending::<()>().await;
    }
}

impl Port {
    fn has_sessions(&self) -> bool {
        !self.sessions.lock().is_empty()
    }

    fn datagrams(&self) -> &Datagrams {
        &self.worker.proxy.datagrams
    }

    fn take(&self, received: Received, bytes: &[u8]) {
        let key = (received.from, received.to);
        let known = self.sessions.lock().get(&key).cloned();
        if let Some(session) = known {
            match session.forward(bytes) {
                Forwarded::Done => return,
                Forwarded::Unreachable(error) => {
                    session::avoid(&self.worker.proxy, &session);
                    self.sessions.lock().remove(&key);
                    session.end(End::Unreachable(error));
                }
            }
        }
        match self.begin(&received) {
            // A socket that was made now has no error of an earlier datagram.
            Ok(session) => _ = session.forward(bytes),
            Err(refused) => self.datagrams().refuse(self.number, received.from, &refused),
        }
    }

    fn begin(&self, received: &Received) -> Result<Arc<Session>, Refused> {
        if self.is_draining {
            return Err(Refused::Draining);
        }
        let inbound = self.inbound(received)?;
        let (session, held) = session::open(inbound)?;
        let key = (received.from, received.to);
        self.sessions.lock().insert(key, session.clone());
        let sessions = self.sessions.clone();
        let forget = move |session: &Arc<Session>| {
            let mut sessions = sessions.lock();
            if sessions.get(&key).is_some_and(|known| Arc::ptr_eq(known, session)) {
                sessions.remove(&key);
            }
        };
        let running = session::run(session.clone(), held, self.socket.clone(), forget);
        self.handle.spawn("datagram session", running);
        Ok(session)
    }

    fn inbound(&self, received: &Received) -> Result<Arc<Inbound>, Refused> {
        let published = self.worker.proxy.published.load();
        let taken = published.listeners.of_datagrams(self.number).cloned();
        let taken = taken.ok_or(crate::failure::Failure::NoRoute)?;
        let from = received.from;
        let is_own = from.ip() == received.to && published.listeners.of_datagrams(from.port()).is_some();
        if is_own || from.port() == 0 {
            return Err(Refused::OwnAddress);
        }
        let address = SocketAddr::new(received.to, self.number);
        let destination = Destination::Listener { address, taken: Some(taken) };
        Ok(Arc::new(inbound(self.worker.clone(), &self.handle, from, destination)))
    }

    /// Ends sessions that were idle for too long, and those that would go elsewhere now.
    fn look(&mut self) {
        let settings = &self.worker.proxy.settings;
        let mut most = settings.limits.udp_idle_timeout.get();
        if self.is_draining {
            most = most.min(settings.drain_idle);
        }
        let (now, published) = (Instant::now(), self.worker.proxy.published.load_full());
        let has_changed = !Arc::ptr_eq(&published, &self.seen);
        for session in self.sessions.lock().values() {
            if session.idle(now) >= most {
                session.end(End::Idle);
            } else if has_changed && !session.is_current(&published) {
                session.end(End::Moved);
            }
        }
        self.seen = published;
    }
}
