//! HTTP connections to endpoints, of one worker: those of HTTP/1 wait for the next request, those of HTTP/2 carry many.
//!
//! A key names a workload by its uid, so an address that is used again never meets an old connection. One lock guards the
//! index; it is held for look-ups only, and each worker has its own. How many connections there may be of all workers is decided by
//! a [`Circuit`](crate::balancers::circuit::Circuit), which counts each until its task has ended.

use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use ambit_directory::{Authority, WorkloadUid};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::backend_policies::PoolPolicy;
use crate::backend_tls::TlsKey;
use crate::balancers::Shape;
use crate::balancers::circuit::Connection;
use crate::balancers::host::Active;
use crate::body::RequestBody;
use crate::failure::Failure;
use crate::io::Endpoint;

/// Streams of an HTTP/2 connection before another one is opened.
const BUSY: usize = 64;
/// HTTP/2 connections to one endpoint, of each worker.
const MAX_HTTP2: usize = 8;
/// Time between the PINGs of an HTTP/2 connection.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long the answer to a PING may take.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// What may share a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// The workload; none for an address that the directory does not know.
    pub workload: Option<WorkloadUid>,
    /// Its address and port.
    pub address: SocketAddr,
    /// Whether HTTP/2 is spoken.
    pub http2: bool,
    /// TLS to the endpoint, if a policy demands it.
    pub tls: Option<TlsKey>,
    /// What its connections have of their own, where a policy says something of connections.
    pub shape: Option<Arc<Shape>>,
    /// What a waypoint was asked for, if the workload is one.
    pub asked_of_waypoint: Option<Authority>,
}

impl Key {
    fn pool<T>(&self, read: impl FnOnce(&PoolPolicy) -> Option<T>) -> Option<T> {
        self.shape.as_ref().and_then(|shape| read(&shape.pool))
    }

    /// Whether a connection takes no more requests: it had its number of them, or is as old as it may become.
    fn is_worn(&self, worn: &Wear) -> bool {
        let is_used_up =
            self.pool(|pool| pool.max_requests_per_connection).is_some_and(|most| worn.uses >= most);
        is_used_up || self.pool(|pool| pool.max_age).is_some_and(|most| worn.since.elapsed() >= most)
    }

    /// How long an unused connection is kept.
    fn idle_timeout(&self, default: Duration) -> Duration {
        self.pool(|pool| pool.idle_timeout).unwrap_or(default)
    }
}

/// How much a connection was used.
#[derive(Debug, Clone, Copy)]
struct Wear {
    since: Instant,
    uses: u32,
}

impl Wear {
    /// A connection with its first request.
    fn first() -> Self {
        Self { since: Instant::now(), uses: 1 }
    }

    fn count(&mut self) {
        self.uses = self.uses.saturating_add(1);
    }
}

/// The connections of one worker. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Upstreams(Arc<Mutex<HashMap<Key, Slot>>>);

#[derive(Debug, Default)]
struct Slot {
    idle: Vec<Idle>,
    shared: Vec<Shared>,
    /// HTTP/1 connections, in use or not.
    open: Arc<AtomicUsize>,
    /// The dial that others wait for, with HTTP/2.
    dialling: Option<watch::Receiver<DialOutcome>>,
}

/// The connections to one endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Connections {
    /// Of HTTP/1, waiting for a request.
    pub idle: usize,
    /// Of HTTP/1, with a request.
    pub busy: usize,
    /// Of HTTP/2.
    pub shared: usize,
    /// Requests on those.
    pub streams: usize,
}

/// How a dial ended; `None` while it goes on. Its channel closes without an outcome where the dial was given up.
type DialOutcome = Option<Result<(), Failure>>;

impl Slot {
    /// An HTTP/1 connection without a request.
    fn take_idle(&mut self, key: &Key) -> Option<Http1> {
        // The one used last is most likely still open; one that is not ready has not finished with its last request.
        let mut at = self.idle.len();
        while at > 0 {
            at -= 1;
            let Some(idle) = self.idle.get(at) else { continue };
            if idle.sender.is_closed() || key.is_worn(&idle.wear) {
                drop(self.idle.swap_remove(at));
                continue;
            }
            if !idle.sender.is_ready() {
                continue;
            }
            let Idle { key, sender, mut wear, counted, .. } = self.idle.swap_remove(at);
            // One that is to close for another request is nobody's any more.
            if counted.as_ref().is_none_or(|counted| counted.take()) {
                wear.count();
                return Some(Http1 { sender, key, open: Open::new(&self.open), wear, counted });
            }
        }
        None
    }

    /// Forgets HTTP/2 connections that take no more requests: one that is worn ends with its last stream.
    fn prune_shared(&mut self, key: &Key) {
        self.shared.retain(|shared| !shared.sender.is_closed() && !key.is_worn(&shared.wear));
    }

    /// The HTTP/2 connection with the fewest streams, if one more does not wait for others, or wherever there can be no more connections.
    fn take_shared(&mut self, key: &Key, is_full: bool) -> Option<(http2::SendRequest<RequestBody>, Stream)> {
        self.prune_shared(key);
        let most = key.pool(|pool| pool.max_concurrent_streams);
        let most = most.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
        let load = |shared: &&mut Shared| shared.streams.load(Ordering::Relaxed);
        let least = self.shared.iter_mut().min_by_key(load)?;
        let is_used_up = least.streams.load(Ordering::Relaxed) >= most;
        if is_used_up || (!is_full && least.is_busy()) {
            return None;
        }
        least.used = Instant::now();
        least.wear.count();
        least.streams.fetch_add(1, Ordering::Relaxed);
        Some((least.sender.clone(), Stream(least.streams.clone())))
    }

    /// The dial that is under way.
    fn dialling(&self) -> Option<&watch::Receiver<DialOutcome>> {
        self.dialling.as_ref().filter(|dial| dial.borrow().is_none() && dial.has_changed().is_ok())
    }
}

#[derive(Debug)]
struct Idle {
    key: Arc<Key>,
    sender: http1::SendRequest<RequestBody>,
    since: Instant,
    wear: Wear,
    counted: Option<Arc<Connection>>,
}

#[derive(Debug)]
struct Shared {
    sender: http2::SendRequest<RequestBody>,
    streams: Arc<AtomicUsize>,
    /// Streams that the endpoint allows.
    most: Arc<AtomicUsize>,
    used: Instant,
    wear: Wear,
}

/// An HTTP/1 connection that one request has.
#[derive(Debug)]
pub struct Http1 {
    /// Sends the request.
    pub sender: http1::SendRequest<RequestBody>,
    /// What may share it.
    key: Arc<Key>,
    open: Open,
    wear: Wear,
    counted: Option<Arc<Connection>>,
}

impl Shared {
    /// Whether one more stream would wait for others.
    fn is_busy(&self) -> bool {
        self.streams.load(Ordering::Relaxed) >= self.most.load(Ordering::Relaxed).min(BUSY)
    }
}

/// A connection that a request may use.
#[derive(Debug)]
pub enum Sender {
    /// HTTP/1: nobody else uses it meanwhile.
    Http1(Http1),
    /// HTTP/2.
    Http2(http2::SendRequest<RequestBody>, Stream),
}

/// Counts a stream of an HTTP/2 connection until it is dropped.
#[derive(Debug)]
pub struct Stream(Arc<AtomicUsize>);

impl Drop for Stream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts an HTTP/1 connection while a request has it.
#[derive(Debug)]
pub struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection whose answer is being read; given back when that has ended.
#[derive(Debug)]
pub struct Returned {
    /// The connection.
    pub used: Used,
    /// Counts the request at its endpoint.
    pub active: Option<Active>,
}

/// A connection with a request on it.
#[derive(Debug)]
pub enum Used {
    /// HTTP/1.
    Http1 {
        /// Where it goes.
        upstreams: Upstreams,
        /// The connection.
        connection: Http1,
    },
    /// HTTP/2: only counted.
    Http2(Stream),
}

impl Returned {
    /// The answer has ended: the next request may have the connection.
    pub fn give_back(self) {
        match self.used {
            Used::Http1 { upstreams, connection } => {
                let Http1 { sender, key, open, wear, counted } = connection;
                drop(open);
                if sender.is_closed() || key.is_worn(&wear) {
                    return;
                }
                let offered = counted.clone();
                if let Some(counted) = &offered {
                    counted.rest();
                }
                let idle = Idle { key: key.clone(), sender, since: Instant::now(), wear, counted };
                upstreams.keep(&key, idle);
                if let Some(counted) = offered {
                    counted.offer();
                }
            }
            Used::Http2(stream) => drop(stream),
        }
    }
}

/// What a look-up found.
#[derive(Debug)]
pub enum Found {
    /// A connection.
    Sender(Sender),
    /// None; one may be dialled. Others that could share it wait for its outcome.
    Dial(Dial),
    /// None: the dial of another request failed, which this one waited for.
    Failed(Failure),
    /// There are as many as may be.
    Full,
}

/// The permission to dial. Dropped without an outcome, it goes to one of those that wait.
#[derive(Debug)]
pub struct Dial {
    open: Option<Open>,
    waiters: Option<watch::Sender<DialOutcome>>,
    /// Counts the connection until its end.
    pub counted: Option<Arc<Connection>>,
}

impl Dial {
    /// Reports to those that wait how the dial ended.
    pub fn finish(self, outcome: Result<(), Failure>) {
        if let Some(waiters) = self.waiters {
            waiters.send_replace(Some(outcome));
        }
    }
}

/// What a request for an HTTP/2 connection does next.
enum Turn {
    Use(Sender),
    Dial(Dial),
    Wait(watch::Receiver<DialOutcome>),
    Full,
}

impl Upstreams {
    fn keep(&self, key: &Key, idle: Idle) {
        let mut slots = self.0.lock();
        match slots.get_mut(key) {
            Some(slot) => slot.idle.push(idle),
            None => slots.entry(key.clone()).or_default().idle.push(idle),
        }
    }

    /// A connection that is there.
    pub fn take(&self, key: &Key) -> Option<Sender> {
        let mut slots = self.0.lock();
        let slot = slots.get_mut(key)?;
        match key.http2 {
            true => slot.take_shared(key, false).map(|(sender, stream)| Sender::Http2(sender, stream)),
            false => slot.take_idle(key).map(Sender::Http1),
        }
    }

    /// A connection for a request, or the permission to dial one: at most `limit` to one endpoint.
    pub async fn find(&self, key: &Key, limit: usize) -> Found {
        if key.http2 {
            return self.find_shared(key, limit).await;
        }
        let mut slots = self.0.lock();
        let slot = slots.entry(key.clone()).or_default();
        if let Some(connection) = slot.take_idle(key) {
            return Found::Sender(Sender::Http1(connection));
        }
        if slot.open.load(Ordering::Relaxed) >= limit {
            return Found::Full;
        }
        Found::Dial(Dial { open: Some(Open::new(&slot.open)), waiters: None, counted: None })
    }

    async fn find_shared(&self, key: &Key, limit: usize) -> Found {
        loop {
            let mut waiting = match self.turn(key, limit) {
                Turn::Full => return Found::Full,
                Turn::Use(sender) => return Found::Sender(sender),
                Turn::Dial(dial) => return Found::Dial(dial),
                Turn::Wait(waiting) => waiting,
            };
            // Without an outcome its request was given up, and the next one dials.
            if waiting.changed().await.is_ok()
                && let Some(Err(failure)) = &*waiting.borrow()
            {
                return Found::Failed(failure.clone());
            }
        }
    }

    fn turn(&self, key: &Key, limit: usize) -> Turn {
        let mut slots = self.0.lock();
        let slot = slots.entry(key.clone()).or_default();
        slot.prune_shared(key);
        // Where a policy limits the streams of a connection, more connections carry what there is.
        let streams = key.pool(|pool| pool.max_concurrent_streams);
        let most = if streams.is_some() { limit } else { MAX_HTTP2 };
        let is_full = slot.shared.len() >= most;
        let taken = slot.take_shared(key, is_full);
        if let Some((sender, stream)) = taken {
            return Turn::Use(Sender::Http2(sender, stream));
        }
        if is_full {
            return Turn::Full;
        }
        if let Some(dialling) = slot.dialling() {
            return Turn::Wait(dialling.clone());
        }
        let (waiters, waiting) = watch::channel(None);
        slot.dialling = Some(waiting);
        Turn::Dial(Dial { open: None, waiters: Some(waiters), counted: None })
    }

    /// Makes an HTTP connection of a byte stream. Those that wait for the dial learn of it by [`Dial::finish`].
    ///
    /// # Errors
    /// The endpoint does not speak HTTP/2.
    pub async fn connect(&self, key: &Key, dial: &mut Dial, io: Endpoint) -> hyper::Result<Sender> {
        let counted = dial.counted.take();
        if key.http2 {
            let (sender, stream) = self.connect_http2(key, counted, io).await?;
            return Ok(Sender::Http2(sender, stream));
        }
        let (sender, connection) = http1::Builder::new().max_headers(200).handshake(TokioIo::new(io)).await?;
        let held = counted.clone();
        tokio::spawn(async move {
            let connection = connection.with_upgrades();
            let ended = match &held {
                Some(counted) => tokio::select! {
                    biased;
                    ended = connection => ended,
                    () = counted.revoked() => Ok(()),
                },
                None => connection.await,
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "an HTTP/1 connection to an endpoint ended");
            }
            drop(held);
        });
        let open = dial.open.take().unwrap_or_else(|| Open::new(&Arc::default()));
        let key = Arc::new(key.clone());
        Ok(Sender::Http1(Http1 { sender, key, open, wear: Wear::first(), counted }))
    }

    async fn connect_http2(
        &self,
        key: &Key,
        counted: Option<Arc<Connection>>,
        io: Endpoint,
    ) -> hyper::Result<(http2::SendRequest<RequestBody>, Stream)> {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .adaptive_window(false)
            // RFC 9113 §6.5.2: how many streams the endpoint allows is known from its SETTINGS. Until then one is sent; more
            // might be refused.
            .initial_max_send_streams(1)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(4 << 20)
            .keep_alive_interval(key.pool(|pool| pool.ping_interval).unwrap_or(PING_INTERVAL))
            .keep_alive_timeout(key.pool(|pool| pool.ping_timeout).unwrap_or(PING_TIMEOUT));
        let (sender, mut connection) = builder.handshake(TokioIo::new(io)).await?;
        let most = Arc::new(AtomicUsize::new(1));
        let allowed = most.clone();
        tokio::spawn(async move {
            let driven = poll_fn(|cx| {
                let ended = Pin::new(&mut connection).poll(cx);
                allowed.store(connection.current_max_send_streams(), Ordering::Relaxed);
                ended
            });
            if let Err(error) = driven.await {
                tracing::debug!(%error, "an HTTP/2 connection to an endpoint ended");
            }
            drop(counted);
        });
        let (streams, used) = (Arc::new(AtomicUsize::new(1)), Instant::now());
        let wear = Wear::first();
        let shared = Shared { sender: sender.clone(), streams: streams.clone(), most, used, wear };
        self.0.lock().entry(key.clone()).or_default().shared.push(shared);
        Ok((sender, Stream(streams)))
    }

    /// Closes what was not used for `idle`, and what leads to workloads that are gone.
    pub fn sweep(&self, idle: Duration, is_gone: impl Fn(&WorkloadUid) -> bool) {
        let now = Instant::now();
        self.0.lock().retain(|key, slot| {
            let idle = key.idle_timeout(idle);
            let fresh = |used: Instant| now.saturating_duration_since(used) < idle;
            if key.workload.as_ref().is_some_and(&is_gone) {
                return false;
            }
            slot.idle
                .retain(|idle| !idle.sender.is_closed() && fresh(idle.since) && !key.is_worn(&idle.wear));
            slot.shared.retain(|shared| {
                let busy = shared.streams.load(Ordering::Relaxed) > 0;
                !shared.sender.is_closed() && (busy || fresh(shared.used)) && !key.is_worn(&shared.wear)
            });
            let is_used = slot.dialling().is_some() || slot.open.load(Ordering::Relaxed) > 0;
            !slot.idle.is_empty() || !slot.shared.is_empty() || is_used
        });
    }

    /// What there is to each endpoint.
    pub fn pools(&self) -> Vec<(Key, Connections)> {
        let slots = self.0.lock();
        let pools = slots.iter().map(|(key, slot)| {
            let streams = slot.shared.iter().map(|shared| shared.streams.load(Ordering::Relaxed));
            let connections = Connections {
                idle: slot.idle.len(),
                busy: slot.open.load(Ordering::Relaxed),
                shared: slot.shared.len(),
                streams: streams.sum(),
            };
            (key.clone(), connections)
        });
        pools.collect()
    }

    /// How many connections wait or are shared.
    pub fn len(&self) -> usize {
        self.0.lock().values().map(|slot| slot.idle.len() + slot.shared.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Waits until an HTTP/2 connection takes one more stream.
pub async fn ready(sender: &mut http2::SendRequest<RequestBody>) -> hyper::Result<()> {
    poll_fn(|cx| match sender.poll_ready(cx) {
        Poll::Ready(ready) => Poll::Ready(ready),
        Poll::Pending => Poll::Pending,
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn key() -> Key {
        let address = ([10, 0, 0, 1], 80).into();
        Key { workload: None, address, http2: true, tls: None, shape: None, asked_of_waypoint: None }
    }

    fn now<T>(finding: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        finding.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn dial(found: Poll<Found>) -> Dial {
        match found {
            Poll::Ready(Found::Dial(dial)) => dial,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_failed_dial_fails_all_that_wait_for_it() {
        let (upstreams, key) = (Upstreams::default(), key());
        let first = dial(now(pin!(upstreams.find(&key, 1))));
        let (mut second, mut third) = (pin!(upstreams.find(&key, 1)), pin!(upstreams.find(&key, 1)));
        assert!(now(second.as_mut()).is_pending() && now(third.as_mut()).is_pending());
        // A sweep forgets no dial that is under way.
        upstreams.sweep(Duration::ZERO, |_| false);
        assert!(now(pin!(upstreams.find(&key, 1))).is_pending());
        first.finish(Err(Failure::Connect("refused".to_owned())));
        for waiting in [second, third] {
            assert!(matches!(now(waiting), Poll::Ready(Found::Failed(Failure::Connect(_)))));
        }
        // What comes later dials anew.
        drop(dial(now(pin!(upstreams.find(&key, 1)))));
    }

    #[test]
    fn a_dial_that_is_given_up_goes_to_one_that_waits() {
        let (upstreams, key) = (Upstreams::default(), key());
        let first = dial(now(pin!(upstreams.find(&key, 1))));
        let (mut second, mut third) = (pin!(upstreams.find(&key, 1)), pin!(upstreams.find(&key, 1)));
        assert!(now(second.as_mut()).is_pending() && now(third.as_mut()).is_pending());
        drop(first);
        let next = dial(now(second.as_mut()));
        assert!(now(third.as_mut()).is_pending());
        next.finish(Err(Failure::Connect("refused".to_owned())));
        assert!(matches!(now(third.as_mut()), Poll::Ready(Found::Failed(_))));
    }
}
