//! HTTP connections to endpoints, of one worker: those of HTTP/1 wait for the next request, those of HTTP/2 carry many.
//!
//! A key names a workload by its uid, so an address that is used again never meets an old connection. One lock guards the
//! index; it is held for look-ups only, and each worker has its own.

use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use ambit_directory::WorkloadUid;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::backend_tls::TlsKey;
use crate::balancers::host::Active;
use crate::body::RequestBody;
use crate::failure::Failure;
use crate::io::Endpoint;

/// Streams of an HTTP/2 connection before another one is opened.
const BUSY: usize = 64;
/// HTTP/2 connections to one endpoint, of each worker.
const MAX_HTTP2: usize = 8;

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
}

/// The connections of one worker. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Upstreams(Arc<Mutex<HashMap<Key, Slot>>>);

#[derive(Debug, Default)]
struct Slot {
    idle: Vec<(http1::SendRequest<RequestBody>, Instant)>,
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
    /// The dial that is under way.
    fn dialling(&self) -> Option<&watch::Receiver<DialOutcome>> {
        self.dialling.as_ref().filter(|dial| dial.borrow().is_none() && dial.has_changed().is_ok())
    }
}

#[derive(Debug)]
struct Shared {
    sender: http2::SendRequest<RequestBody>,
    streams: Arc<AtomicUsize>,
    /// Streams that the endpoint allows.
    most: Arc<AtomicUsize>,
    used: Instant,
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
    Http1(http1::SendRequest<RequestBody>, Open),
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
        /// Under which key.
        key: Box<Key>,
        /// The connection.
        sender: http1::SendRequest<RequestBody>,
        /// Its count.
        open: Open,
    },
    /// HTTP/2: only counted.
    Http2(Stream),
}

impl Returned {
    /// The answer has ended: the next request may have the connection.
    pub fn give_back(self) {
        match self.used {
            Used::Http1 { upstreams, key, sender, open } => {
                drop(open);
                if !sender.is_closed() {
                    upstreams.0.lock().entry(*key).or_default().idle.push((sender, Instant::now()));
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
}

impl Upstreams {
    /// A connection for a request, or the permission to dial one: at most `limit` of HTTP/1.
    pub async fn find(&self, key: &Key, limit: usize) -> Found {
        if key.http2 {
            return self.find_shared(key).await;
        }
        let mut slots = self.0.lock();
        let slot = slots.entry(key.clone()).or_default();
        // The one used last is most likely still open; one that is not ready has not finished with its last request.
        let mut at = slot.idle.len();
        while at > 0 {
            at -= 1;
            let state = slot.idle.get(at).map(|(sender, _)| (sender.is_closed(), sender.is_ready()));
            match state {
                Some((true, _)) => drop(slot.idle.swap_remove(at)),
                Some((false, true)) => {
                    let (sender, _) = slot.idle.swap_remove(at);
                    let open = Open::new(&slot.open);
                    return Found::Sender(Sender::Http1(sender, open));
                }
                _ => {}
            }
        }
        if slot.open.load(Ordering::Relaxed) >= limit {
            return Found::Full;
        }
        Found::Dial(Dial { open: Some(Open::new(&slot.open)), waiters: None })
    }

    async fn find_shared(&self, key: &Key) -> Found {
        loop {
            let mut waiting = match self.turn(key) {
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

    fn turn(&self, key: &Key) -> Turn {
        let mut slots = self.0.lock();
        let slot = slots.entry(key.clone()).or_default();
        slot.shared.retain(|shared| !shared.sender.is_closed());
        let full = slot.shared.len() >= MAX_HTTP2;
        let load = |shared: &&mut Shared| shared.streams.load(Ordering::Relaxed);
        let least = slot.shared.iter_mut().min_by_key(load);
        if let Some(shared) = least.filter(|least| full || !least.is_busy()) {
            shared.used = Instant::now();
            shared.streams.fetch_add(1, Ordering::Relaxed);
            return Turn::Use(Sender::Http2(shared.sender.clone(), Stream(shared.streams.clone())));
        }
        if let Some(dialling) = slot.dialling() {
            return Turn::Wait(dialling.clone());
        }
        let (waiters, waiting) = watch::channel(None);
        slot.dialling = Some(waiting);
        Turn::Dial(Dial { open: None, waiters: Some(waiters) })
    }

    /// Makes an HTTP connection of a byte stream. Those that wait for the dial learn of it by [`Dial::finish`].
    ///
    /// # Errors
    /// The endpoint does not speak HTTP/2.
    pub async fn connect(&self, key: &Key, dial: &mut Dial, io: Endpoint) -> hyper::Result<Sender> {
        if key.http2 {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .adaptive_window(false)
                // RFC 9113 §6.5.2: how many streams the endpoint allows is known from its SETTINGS. Until then one is sent; more
                // might be refused.
                .initial_max_send_streams(1)
                .initial_stream_window_size(1 << 20)
                .initial_connection_window_size(4 << 20)
                .keep_alive_interval(Duration::from_secs(30))
                .keep_alive_timeout(Duration::from_secs(20));
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
            });
            let streams = Arc::new(AtomicUsize::new(1));
            let used = Instant::now();
            let shared = Shared { sender: sender.clone(), streams: streams.clone(), most, used };
            self.0.lock().entry(key.clone()).or_default().shared.push(shared);
            return Ok(Sender::Http2(sender, Stream(streams)));
        }
        let (sender, connection) = http1::Builder::new().max_headers(200).handshake(TokioIo::new(io)).await?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "an HTTP/1 connection to an endpoint ended");
            }
        });
        let open = dial.open.take().unwrap_or_else(|| Open::new(&Arc::default()));
        Ok(Sender::Http1(sender, open))
    }

    /// Closes what was not used for `idle`, and what leads to workloads that are gone.
    pub fn sweep(&self, idle: Duration, is_gone: impl Fn(&WorkloadUid) -> bool) {
        let now = Instant::now();
        let fresh = |used: Instant| now.saturating_duration_since(used) < idle;
        self.0.lock().retain(|key, slot| {
            if key.workload.as_ref().is_some_and(&is_gone) {
                return false;
            }
            slot.idle.retain(|(sender, used)| !sender.is_closed() && fresh(*used));
            slot.shared.retain(|shared| {
                let busy = shared.streams.load(Ordering::Relaxed) > 0;
                !shared.sender.is_closed() && (busy || fresh(shared.used))
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
        Key { workload: None, address: ([10, 0, 0, 1], 80).into(), http2: true, tls: None }
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
