//! How much goes at once to the endpoints of a port or subset: connections, requests that wait for one, requests, retries.
//!
//! The limits are a DestinationRule's; the counts are kept whether there is one or not, so that a limit holds from the moment that it
//! is known. They are shared by the workers.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::Notify;

use crate::backend_policies::{PoolPolicy, RetryBudget};
use crate::failure::{Failure, Limit};

/// Requests of one port or subset that have no connection, where their connections are limited and nothing is said of these requests.
const MAX_PENDING: u32 = 1024;
/// The longest wait for one of the connections that may be open, whatever a route allows.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The counts of one port or subset.
#[derive(Debug)]
pub struct Circuit {
    /// Distinguishes it from all others of the process.
    id: u64,
    counts: [AtomicU32; 3],
    /// Those that have one request at a time, and those that are passed on.
    connections: AtomicU32,
    /// Those that requests share, of HTTP/2: not limited.
    shared: AtomicU32,
    /// Requests that wait because as many connections are open as may be.
    waiting: AtomicU32,
    /// A connection was closed or has no request any more: one that waits may go on.
    freed: Notify,
    /// Connections that may have no request: they close where another endpoint or worker needs their place. The lock is held for a
    /// look-up, never across an await.
    idle: Mutex<VecDeque<Weak<Connection>>>,
    /// What was refused here.
    pub overflows: Overflows,
    /// What was refused in all.
    all: Arc<Overflows>,
}

/// What a [`Guard`] counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    /// Requests that have no connection yet.
    Pending,
    /// Requests until the end of their answers.
    Request,
    /// Tries beyond the first.
    Retry,
}

/// Counts of what was refused because a limit was reached.
#[derive(Debug, Default)]
pub struct Overflows {
    /// Connections that are passed on, and requests that waited too long for a connection.
    pub connections: AtomicU64,
    /// Requests because too many waited.
    pub pending: AtomicU64,
    /// Requests because too many were in progress.
    pub requests: AtomicU64,
    /// Tries beyond the first.
    pub retries: AtomicU64,
}

/// The counts as they show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CircuitSummary {
    /// Open connections.
    pub connections: u32,
    /// Requests that have no connection yet.
    pub pending: u32,
    /// Requests in progress.
    pub requests: u32,
    /// Retries in progress.
    pub retries: u32,
    /// What was refused.
    pub overflows: OverflowSummary,
}

/// What was refused, by the limit that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct OverflowSummary {
    connections: u64,
    pending: u64,
    requests: u64,
    retries: u64,
}

/// Counts one until it is dropped.
#[derive(Debug)]
pub struct Guard {
    circuit: Arc<Circuit>,
    of: Of,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.circuit.count(self.of).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Circuit {
    /// Without a connection or request.
    pub fn new(id: u64, all: Arc<Overflows>) -> Arc<Self> {
        Arc::new(Self {
            id,
            counts: Default::default(),
            connections: AtomicU32::default(),
            shared: AtomicU32::default(),
            waiting: AtomicU32::default(),
            freed: Notify::new(),
            idle: Mutex::default(),
            overflows: Overflows::default(),
            all,
        })
    }

    /// Distinguishes it from all others of the process.
    pub fn id(&self) -> u64 {
        self.id
    }

    fn count(&self, of: Of) -> &AtomicU32 {
        let [pending, requests, retries] = &self.counts;
        match of {
            Of::Pending => pending,
            Of::Request => requests,
            Of::Retry => retries,
        }
    }

    fn admit(self: &Arc<Self>, of: Of, most: u32) -> Option<Guard> {
        admit(self.count(of), most).then(|| Guard { circuit: self.clone(), of })
    }

    /// Counts a refusal.
    pub fn refuse(&self, limit: Limit) -> Failure {
        self.overflows.of(limit).fetch_add(1, Ordering::Relaxed);
        self.all.refuse(limit)
    }

    /// Counts a request until the guard is dropped.
    ///
    /// # Errors
    /// [`Failure::Overflow`].
    pub fn request(self: &Arc<Self>, pool: &PoolPolicy) -> Result<Guard, Failure> {
        let most = pool.max_requests.unwrap_or(u32::MAX);
        self.admit(Of::Request, most).ok_or_else(|| self.refuse(Limit::Requests))
    }

    /// Counts a retry until the guard is dropped, if there may be one more.
    pub fn retry(self: &Arc<Self>, most: u32) -> Option<Guard> {
        let counted = self.admit(Of::Retry, most);
        if counted.is_none() {
            for overflows in [&self.overflows, &*self.all] {
                overflows.retries.fetch_add(1, Ordering::Relaxed);
            }
        }
        counted
    }

    /// How many retries there may be at once, as far as a policy says so.
    pub fn most_retries(&self, pool: &PoolPolicy, budget: Option<RetryBudget>) -> Option<u32> {
        match budget {
            // As in Envoy a budget replaces the fixed limit. Requests that have no connection yet are in progress too.
            Some(budget) => Some(budget.most(self.count(Of::Request).load(Ordering::Relaxed))),
            None => pool.max_retries,
        }
    }

    /// Counts a connection, if there may be one more.
    pub fn connect(self: &Arc<Self>, most: Option<u32>) -> Option<Arc<Connection>> {
        admit(&self.connections, most.unwrap_or(u32::MAX)).then(|| Connection::new(self, false))
    }

    /// Counts a connection that requests share.
    pub fn share(self: &Arc<Self>) -> Arc<Connection> {
        self.shared.fetch_add(1, Ordering::Relaxed);
        Connection::new(self, true)
    }

    /// Counts a connection that is passed on unread, if there may be one more.
    ///
    /// # Errors
    /// [`Failure::Overflow`].
    pub fn stream(self: &Arc<Self>, pool: &PoolPolicy) -> Result<Arc<Connection>, Failure> {
        self.connect(pool.max_connections).ok_or_else(|| self.refuse(Limit::Connections))
    }

    /// Whether requests wait for one of the connections that may be open: a new one comes after them.
    pub fn is_contended(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Counts a request that has no connection yet.
    ///
    /// # Errors
    /// [`Failure::Overflow`].
    pub fn pend(self: &Arc<Self>, pool: &PoolPolicy) -> Result<Guard, Failure> {
        // Where connections are not limited, nobody waits for longer than it takes to make one.
        let most = pool.max_pending.or_else(|| pool.max_connections.map(|_| MAX_PENDING)).unwrap_or(u32::MAX);
        self.admit(Of::Pending, most).ok_or_else(|| self.refuse(Limit::Pending))
    }

    /// Waits until there may be one more connection, or `ready` has one. The request's own timeouts end the wait too.
    ///
    /// # Errors
    /// [`Failure::Overflow`] after a minute.
    pub async fn turn<T>(
        self: &Arc<Self>,
        pool: &PoolPolicy,
        ready: impl Fn() -> Option<T>,
    ) -> Result<Turn<T>, Failure> {
        if !self.is_contended()
            && let Some(permit) = self.connect(pool.max_connections)
        {
            return Ok(Turn::Connect(permit));
        }
        let turn = tokio::time::timeout(MAX_WAIT, self.wait(pool, ready)).await;
        turn.map_err(|_| self.refuse(Limit::Connections))
    }

    async fn wait<T>(self: &Arc<Self>, pool: &PoolPolicy, ready: impl Fn() -> Option<T>) -> Turn<T> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waits = Waits(self);
        let mut is_first = true;
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            // From here on no call is missed.
            let is_called = freed.as_mut().enable();
            // The first come first: who has just come waits behind the others.
            if is_called || !is_first || self.waiting.load(Ordering::SeqCst) == 1 {
                if let Some(ready) = ready() {
                    return Turn::Ready(ready);
                }
                if let Some(permit) = self.connect(pool.max_connections) {
                    return Turn::Connect(permit);
                }
            }
            is_first = false;
            self.revoke_idle();
            if !is_called {
                freed.await;
            }
        }
    }

    /// Closes a connection that has no request. Its place is free when it has closed.
    fn revoke_idle(&self) {
        let mut idle = self.idle.lock();
        while let Some(connection) = idle.pop_front() {
            let Some(connection) = connection.upgrade() else { continue };
            connection.is_listed.store(false, Ordering::SeqCst);
            if connection.swap(IDLE, REVOKED) {
                connection.revoked.notify_one();
                return;
            }
        }
    }

    /// The counts as they show.
    pub fn summary(&self) -> CircuitSummary {
        let [pending, requests, retries] = self.counts.each_ref().map(|count| count.load(Ordering::Relaxed));
        let of = |limit| self.overflows.of(limit).load(Ordering::Relaxed);
        CircuitSummary {
            connections: self.connections.load(Ordering::Relaxed) + self.shared.load(Ordering::Relaxed),
            pending,
            requests,
            retries,
            overflows: OverflowSummary {
                connections: of(Limit::Connections),
                pending: of(Limit::Pending),
                requests: of(Limit::Requests),
                retries: self.overflows.retries.load(Ordering::Relaxed),
            },
        }
    }
}

impl Overflows {
    /// Counts a refusal.
    pub fn refuse(&self, limit: Limit) -> Failure {
        self.of(limit).fetch_add(1, Ordering::Relaxed);
        Failure::Overflow(limit)
    }

    fn of(&self, limit: Limit) -> &AtomicU64 {
        match limit {
            Limit::Connections => &self.connections,
            Limit::Pending => &self.pending,
            Limit::Requests => &self.requests,
        }
    }
}

/// What a request does that has no connection.
#[derive(Debug)]
pub enum Turn<T> {
    /// It uses this one.
    Ready(T),
    /// It may make one.
    Connect(Arc<Connection>),
}

/// Counts a request that waits.
struct Waits<'a>(&'a Circuit);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The connection has a request, or is being made.
const BUSY: u8 = 0;
/// The connection has no request.
const IDLE: u8 = 1;
/// The connection closes: another one needs its place.
const REVOKED: u8 = 2;

/// Counts a connection until it is dropped: its task has one, and who uses it another.
#[derive(Debug)]
pub struct Connection {
    circuit: Arc<Circuit>,
    is_shared: bool,
    state: AtomicU8,
    /// Whether it is among those that may be closed.
    is_listed: AtomicBool,
    revoked: Notify,
}

impl Connection {
    fn new(circuit: &Arc<Circuit>, is_shared: bool) -> Arc<Self> {
        Arc::new(Self {
            circuit: circuit.clone(),
            is_shared,
            state: AtomicU8::new(BUSY),
            is_listed: AtomicBool::new(false),
            revoked: Notify::new(),
        })
    }

    // One total order: either who waits sees that the connection has no request, or the connection sees that somebody waits.
    fn swap(&self, from: u8, to: u8) -> bool {
        self.state.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Takes it for a request; false if it closes.
    pub fn take(&self) -> bool {
        self.swap(IDLE, BUSY)
    }

    /// Its request has ended.
    pub fn rest(&self) {
        self.state.store(IDLE, Ordering::SeqCst);
    }

    /// Offers it and its place to those that wait, once it has a [`rest`](Self::rest) and can be found.
    pub fn offer(self: &Arc<Self>) {
        if !self.is_listed.load(Ordering::SeqCst) {
            self.list();
        }
        if self.circuit.is_contended() {
            self.circuit.freed.notify_one();
        }
    }

    fn list(self: &Arc<Self>) {
        let mut idle = self.circuit.idle.lock();
        if self.is_listed.swap(true, Ordering::SeqCst) {
            return;
        }
        // Closed ones go first: the list is as long as there are connections.
        if idle.len() >= self.circuit.connections.load(Ordering::Relaxed) as usize {
            idle.retain(|connection| connection.strong_count() > 0);
        }
        idle.push_back(Arc::downgrade(self));
    }

    /// Waits until it is to close.
    pub async fn revoked(&self) {
        self.revoked.notified().await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let count = if self.is_shared { &self.circuit.shared } else { &self.circuit.connections };
        count.fetch_sub(1, Ordering::AcqRel);
        self.circuit.freed.notify_one();
    }
}

/// Counts one more, up to `most`.
fn admit(count: &AtomicU32, most: u32) -> bool {
    let more = |count: u32| (count < most).then(|| count + 1);
    count.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn circuit() -> Arc<Circuit> {
        Circuit::new(1, Arc::default())
    }

    fn limited(connections: u32) -> PoolPolicy {
        PoolPolicy { max_connections: Some(connections), ..PoolPolicy::default() }
    }

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    fn permit(turn: Poll<Result<Turn<()>, Failure>>) -> Option<Arc<Connection>> {
        match turn {
            Poll::Ready(Ok(Turn::Connect(permit))) => Some(permit),
            _ => None,
        }
    }

    const NONE: fn() -> Option<()> = || None;

    #[test]
    fn what_is_too_much_is_refused_and_counted() {
        let circuit = circuit();
        let pool = PoolPolicy { max_requests: Some(2), max_pending: Some(1), ..limited(1) };
        let held = (circuit.request(&pool).unwrap(), circuit.request(&pool).unwrap());
        assert!(matches!(circuit.request(&pool), Err(Failure::Overflow(Limit::Requests))));
        let pending = circuit.pend(&pool).unwrap();
        assert!(matches!(circuit.pend(&pool), Err(Failure::Overflow(Limit::Pending))));
        let stream = circuit.stream(&pool).unwrap();
        assert!(matches!(circuit.stream(&pool), Err(Failure::Overflow(Limit::Connections))));
        let shown = circuit.summary();
        assert_eq!((shown.connections, shown.pending, shown.requests), (1, 1, 2));
        assert_eq!(
            (shown.overflows.connections, shown.overflows.pending, shown.overflows.requests),
            (1, 1, 1)
        );
        drop((held, pending, stream));
        let shown = circuit.summary();
        assert_eq!((shown.connections, shown.pending, shown.requests), (0, 0, 0));
        assert!(circuit.stream(&pool).is_ok() && circuit.request(&pool).is_ok());
    }

    #[tokio::test]
    async fn who_waits_goes_on_in_turn_when_a_connection_closes() {
        let (circuit, pool) = (circuit(), limited(1));
        let first = permit(poll(pin!(circuit.turn(&pool, NONE)))).unwrap();
        let (mut second, mut third) = (pin!(circuit.turn(&pool, NONE)), pin!(circuit.turn(&pool, NONE)));
        assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        assert!(circuit.is_contended());
        drop(first);
        // Who comes now waits behind those that are there.
        let mut late = pin!(circuit.turn(&pool, NONE));
        assert!(poll(late.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
        let second = permit(poll(second.as_mut())).unwrap();
        assert!(poll(third.as_mut()).is_pending());
        drop(second);
        let third = permit(poll(third.as_mut())).unwrap();
        drop(third);
        assert!(permit(poll(late.as_mut())).is_some());
        assert!(!circuit.is_contended());
    }

    #[tokio::test]
    async fn who_stops_waiting_leaves_the_place_to_the_next() {
        let (circuit, pool) = (circuit(), limited(1));
        let first = circuit.connect(pool.max_connections).unwrap();
        let mut third = pin!(circuit.turn(&pool, NONE));
        {
            let mut second = Box::pin(circuit.turn(&pool, NONE));
            assert!(poll(second.as_mut()).is_pending() && poll(third.as_mut()).is_pending());
            drop(first);
            // It was called, but is gone.
        }
        assert!(permit(poll(third.as_mut())).is_some());
    }

    #[tokio::test]
    async fn an_idle_connection_closes_for_who_waits_and_a_busy_one_does_not() {
        let (circuit, pool) = (circuit(), limited(2));
        let (busy, idle) = (circuit.connect(None).unwrap(), circuit.connect(None).unwrap());
        for connection in [&busy, &idle] {
            connection.rest();
            connection.offer();
        }
        assert!(busy.take());
        let mut waiting = pin!(circuit.turn(&pool, NONE));
        assert!(poll(waiting.as_mut()).is_pending());
        assert!(poll(pin!(busy.revoked())).is_pending());
        assert!(poll(pin!(idle.revoked())).is_ready() && !idle.take());
        drop(idle);
        assert!(permit(poll(waiting.as_mut())).is_some());
    }

    #[tokio::test]
    async fn who_waits_uses_a_connection_of_its_own_worker() {
        let (circuit, pool) = (circuit(), limited(1));
        let only = circuit.connect(None).unwrap();
        let is_idle = AtomicBool::new(false);
        let mut waiting = pin!(
            circuit.turn(&pool, || is_idle.load(Ordering::Relaxed).then(|| only.take()).filter(|it| *it))
        );
        assert!(poll(waiting.as_mut()).is_pending());
        is_idle.store(true, Ordering::Relaxed);
        only.rest();
        only.offer();
        assert!(matches!(poll(waiting.as_mut()), Poll::Ready(Ok(Turn::Ready(true)))));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let (circuit, pool) = (circuit(), limited(1));
        let _only = circuit.connect(None).unwrap();
        let ended = circuit.turn(&pool, NONE).await;
        assert!(matches!(ended, Err(Failure::Overflow(Limit::Connections))));
        assert_eq!(circuit.summary().overflows.connections, 1);
    }

    #[test]
    fn shared_connections_take_no_place() {
        let (circuit, pool) = (circuit(), limited(1));
        let shared = circuit.share();
        let stream = circuit.stream(&pool).unwrap();
        assert_eq!(circuit.summary().connections, 2);
        drop((shared, stream));
        assert_eq!(circuit.summary().connections, 0);
    }

    #[test]
    fn retries_have_the_budget_of_the_policy() {
        let circuit = circuit();
        let fixed = PoolPolicy { max_retries: Some(2), ..PoolPolicy::default() };
        let budget = RetryBudget { percent_milli: 20_000, least: 3 };
        assert_eq!(circuit.most_retries(&PoolPolicy::default(), None), None);
        assert_eq!(circuit.most_retries(&fixed, None), Some(2));
        assert_eq!(circuit.most_retries(&fixed, Some(budget)), Some(3));
        let requests: Vec<Guard> = (0..50).map(|_| circuit.request(&fixed).unwrap()).collect();
        assert_eq!(circuit.most_retries(&fixed, Some(budget)), Some(10));
        let retries: Vec<Guard> = (0..4).map_while(|_| circuit.retry(2)).collect();
        assert_eq!((retries.len(), circuit.summary().overflows.retries), (2, 1));
        drop((requests, retries));
        assert_eq!(circuit.summary().retries, 0);
    }
}
