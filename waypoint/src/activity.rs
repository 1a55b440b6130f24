//! What a client's HTTP connection is doing, and how long it may go on with that. Pure: the time comes in as an argument.
//!
//! [`protocol`](crate::protocol) makes one for each connection, [`ClientStream`](crate::client_stream::ClientStream)
//! reports bytes and asks for the deadline, [`exchange`](crate::exchange) reports requests and their ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// The period over which abandoned requests are counted.
pub const ABANDONED_PERIOD: Duration = Duration::from_secs(10);
/// A request that waited longer than this does not count as abandoned: its client lost patience with a slow endpoint.
const EARLY: Duration = Duration::from_secs(1);

/// How often [`Activity::quiet`] looks within its limit, and the shortest time between two looks.
const QUIET_LOOKS: u32 = 10;
const SHORTEST_LOOK: Duration = Duration::from_millis(10);

/// Bounds of one connection.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// How long it may be without a request.
    pub idle: Duration,
    /// How long the head of a request may take from its first byte.
    pub head: Duration,
    /// How long the client may take nothing of what is sent to it.
    pub write: Duration,
    /// Requests before it is closed.
    pub requests: u64,
    /// Requests that may be abandoned within [`ABANDONED_PERIOD`].
    pub abandoned: u32,
}

/// Which bound of a connection was passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exceeded {
    /// It was without a request for too long.
    Idle,
    /// A request's head took too long.
    Head,
    /// The client took nothing for too long.
    Write,
    /// Too many requests were abandoned (CVE-2023-44487).
    Abandoned,
}

/// The state of one connection. One lock, which only this connection's tasks take.
#[derive(Debug)]
pub struct Activity {
    bounds: Bounds,
    state: Mutex<State>,
    changed: Notify,
    head_read: Notify,
    /// Reads and writes that moved bytes.
    moves: AtomicU64,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    open: u32,
    requests: u64,
    /// Whether the next answer is the last.
    closing: bool,
    /// Start of the current period, and the requests abandoned in it.
    abandoned: (Instant, u32),
    /// Answers of which a part was handed over and not asked on for since then, by the number of their request.
    handed: HashMap<u64, Instant>,
    exceeded: Option<Exceeded>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle { since: Instant },
    Head { since: Instant },
    Busy,
}

/// An upgraded connection, or a stream of one, until it is dropped: nothing is known of its requests.
#[derive(Debug)]
pub struct OpenUpgrade(Arc<Activity>);

/// Reports the end of a request when it is dropped.
#[derive(Debug)]
pub struct OpenRequest {
    activity: Arc<Activity>,
    number: u64,
    since: Instant,
    answered: bool,
    /// Whether its answer waits for the client.
    is_handed: bool,
}

impl Activity {
    /// A connection on which nothing was asked yet.
    pub fn new(bounds: Bounds, now: Instant) -> Self {
        let state = State {
            phase: Phase::Idle { since: now },
            open: 0,
            requests: 0,
            closing: false,
            abandoned: (now, 0),
            handed: HashMap::new(),
            exceeded: None,
        };
        Self {
            bounds,
            state: Mutex::new(state),
            changed: Notify::new(),
            head_read: Notify::new(),
            moves: AtomicU64::new(0),
        }
    }

    /// Bytes came from the client.
    pub fn handle_bytes(&self, now: Instant) {
        let mut state = self.state.lock();
        if matches!(state.phase, Phase::Idle { .. }) {
            state.phase = Phase::Head { since: now };
        }
    }

    /// Bytes moved, in either direction.
    pub fn count_move(&self) {
        self.moves.fetch_add(1, Ordering::Relaxed);
    }

    /// The head of a request was read.
    pub fn start_request(self: &Arc<Self>, now: Instant) -> OpenRequest {
        let mut state = self.state.lock();
        state.open += 1;
        state.requests += 1;
        state.phase = Phase::Busy;
        self.head_read.notify_waiters();
        if state.requests >= self.bounds.requests {
            self.changed.notify_one();
        }
        let number = state.requests;
        OpenRequest { activity: self.clone(), number, since: now, answered: false, is_handed: false }
    }

    /// Lets the connection have one more answer.
    pub fn close_after_next(&self) {
        self.state.lock().closing = true;
    }

    /// Whether the connection has had all the requests that it may have.
    pub fn is_used_up(&self) -> bool {
        let state = self.state.lock();
        state.closing || state.requests >= self.bounds.requests
    }

    /// A request changes to another protocol: in HTTP/1 the whole connection, in HTTP/2 its stream. It is not idle meanwhile.
    pub fn start_upgrade(self: &Arc<Self>) -> OpenUpgrade {
        let mut state = self.state.lock();
        state.open += 1;
        state.phase = Phase::Busy;
        OpenUpgrade(self.clone())
    }

    /// When [`check`](Self::check) is to be asked next, if nothing happens until then.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state.lock().phase {
            Phase::Idle { since } => Some(since + self.bounds.idle),
            Phase::Head { since } => Some(since + self.bounds.head),
            Phase::Busy => None,
        }
    }

    /// Which bound has been passed, if one has.
    pub fn check(&self, now: Instant) -> Option<Exceeded> {
        let mut state = self.state.lock();
        let passed = match state.phase {
            Phase::Idle { since } if now >= since + self.bounds.idle => Some(Exceeded::Idle),
            Phase::Head { since } if now >= since + self.bounds.head => Some(Exceeded::Head),
            _ => None,
        };
        state.exceeded = state.exceeded.or(passed);
        state.exceeded
    }

    /// Which bound was passed, as the last look found it.
    pub fn exceeded(&self) -> Option<Exceeded> {
        self.state.lock().exceeded
    }

    /// How long the client may take nothing of what is sent to it.
    pub fn write_limit(&self) -> Duration {
        self.bounds.write
    }

    /// A bound was passed that is watched elsewhere.
    pub fn exceed(&self, bound: Exceeded) {
        let mut state = self.state.lock();
        state.exceeded = state.exceeded.or(Some(bound));
    }

    /// Waits until an answer has waited for its client for too long. Of HTTP/2: a stream whose client opens no window holds up its
    /// endpoint, while its connection moves bytes.
    pub async fn stalled(&self) {
        let limit = self.bounds.write;
        loop {
            let now = Instant::now();
            let oldest = self.state.lock().handed.values().min().copied();
            let due = oldest.unwrap_or(now) + limit;
            if due <= now {
                return self.exceed(Exceeded::Write);
            }
            tokio::time::sleep_until(due.into()).await;
        }
    }

    fn end_request(&self, abandoned: bool, now: Instant) {
        let mut state = self.state.lock();
        state.open = state.open.saturating_sub(1);
        if state.open == 0 && state.phase == Phase::Busy {
            state.phase = Phase::Idle { since: now };
        }
        if !abandoned {
            return;
        }
        let (start, count) = state.abandoned;
        let is_new = now.saturating_duration_since(start) >= ABANDONED_PERIOD;
        state.abandoned = if is_new { (now, 1) } else { (start, count + 1) };
        if state.abandoned.1 > self.bounds.abandoned {
            state.exceeded = state.exceeded.or(Some(Exceeded::Abandoned));
            self.changed.notify_one();
        }
    }

    /// Waits until no part of a head has been read that is not a request yet. Closed before that, the connection would lose
    /// a request that was accepted.
    pub async fn head_is_read(&self) {
        loop {
            let mut read = std::pin::pin!(self.head_read.notified());
            read.as_mut().enable();
            if !matches!(self.state.lock().phase, Phase::Head { .. }) {
                return;
            }
            read.await;
        }
    }

    /// Waits until the connection is used up or has abandoned too many requests; may return earlier.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Waits until no request is open and no byte has moved for `limit`: an answer that its client takes slowly is still on its
    /// way when its request has ended.
    pub async fn quiet(&self, limit: Duration) {
        let pause = (limit / QUIET_LOOKS).max(SHORTEST_LOOK);
        let (mut since, mut seen) = (tokio::time::Instant::now(), None);
        loop {
            let moves = self.moves.load(Ordering::Relaxed);
            let is_open = self.state.lock().open > 0;
            if is_open || seen != Some(moves) {
                (since, seen) = (tokio::time::Instant::now(), Some(moves));
            } else if since.elapsed() >= limit {
                return;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Waits until the connection was without a request for too long.
    pub async fn idle(&self) {
        loop {
            let now = Instant::now();
            if self.check(now) == Some(Exceeded::Idle) {
                return;
            }
            let due = self.deadline().unwrap_or(now + self.bounds.idle);
            tokio::time::sleep_until(due.into()).await;
        }
    }
}

impl OpenRequest {
    /// Its answer has begun: what happens to it now is no abandoning.
    pub fn set_answered(&mut self) {
        self.answered = true;
    }

    /// A part of its answer was handed over, or its head: the rest waits until the client takes that.
    pub fn hand_over(&mut self, now: Instant) {
        self.is_handed = true;
        self.activity.state.lock().handed.insert(self.number, now);
    }

    /// Its answer waits for the endpoint.
    pub fn await_endpoint(&mut self) {
        if std::mem::take(&mut self.is_handed) {
            self.activity.state.lock().handed.remove(&self.number);
        }
    }

    /// The connection that it is on.
    pub fn connection(&self) -> &Arc<Activity> {
        &self.activity
    }
}

impl Drop for OpenUpgrade {
    fn drop(&mut self) {
        self.0.end_request(false, Instant::now());
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.await_endpoint();
        let now = Instant::now();
        let early = now.saturating_duration_since(self.since) < EARLY;
        self.activity.end_request(!self.answered && early, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn bounds() -> Bounds {
        Bounds { idle: 60 * SECOND, head: 10 * SECOND, write: 30 * SECOND, requests: 2, abandoned: 3 }
    }

    #[test]
    fn a_head_has_less_time_than_an_idle_connection() {
        let start = Instant::now();
        let activity = Arc::new(Activity::new(bounds(), start));
        assert_eq!(activity.deadline(), Some(start + 60 * SECOND));
        assert_eq!(activity.check(start + 59 * SECOND), None);
        activity.handle_bytes(start + 5 * SECOND);
        // Further bytes win no time.
        activity.handle_bytes(start + 14 * SECOND);
        assert_eq!(activity.deadline(), Some(start + 15 * SECOND));
        assert_eq!(activity.check(start + 15 * SECOND), Some(Exceeded::Head));
    }

    #[test]
    fn a_request_in_progress_has_no_deadline_here() {
        let activity = Arc::new(Activity::new(bounds(), Instant::now()));
        let one = activity.start_request(Instant::now());
        let other = activity.start_request(Instant::now());
        assert!(activity.is_used_up());
        drop(one);
        activity.handle_bytes(Instant::now());
        assert_eq!(activity.deadline(), None);
        drop(other);
        assert!(activity.deadline().is_some());
    }

    #[test]
    fn an_upgraded_stream_keeps_its_connection_only_while_it_is_open() {
        let activity = Arc::new(Activity::new(bounds(), Instant::now()));
        let request = activity.start_request(Instant::now());
        let upgraded = activity.start_upgrade();
        drop(request);
        activity.handle_bytes(Instant::now());
        assert_eq!(activity.deadline(), None);
        drop(activity.start_request(Instant::now()));
        assert_eq!(activity.deadline(), None);
        drop(upgraded);
        assert!(activity.deadline().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_quiet_without_requests_and_bytes_only() {
        let activity = Arc::new(Activity::new(bounds(), Instant::now()));
        let start = tokio::time::Instant::now();
        let request = activity.start_request(Instant::now());
        let ending = async {
            tokio::time::sleep(30 * SECOND).await;
            drop(request);
            for _ in 0..5 {
                tokio::time::sleep(6 * SECOND).await;
                activity.count_move();
            }
        };
        tokio::join!(ending, activity.quiet(10 * SECOND));
        let after = start.elapsed();
        assert!(after >= 70 * SECOND && after <= 72 * SECOND, "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_waits_for_its_client_only_so_long() {
        let now = || tokio::time::Instant::now().into_std();
        let activity = Arc::new(Activity::new(bounds(), now()));
        let mut waits_for_endpoint = activity.start_request(now());
        waits_for_endpoint.hand_over(now());
        waits_for_endpoint.await_endpoint();
        let mut ended = activity.start_request(now());
        ended.hand_over(now());
        drop(ended);
        let early = tokio::time::timeout(20 * SECOND, activity.stalled()).await;
        assert!(early.is_err() && activity.exceeded().is_none());
        let mut stalled = activity.start_request(now());
        // As if it had been handed over long ago: the clock of this test is not that of the program.
        stalled.hand_over(Instant::now().checked_sub(31 * SECOND).unwrap_or_else(Instant::now));
        tokio::time::timeout(61 * SECOND, activity.stalled()).await.expect("it is seen");
        assert_eq!(activity.exceeded(), Some(Exceeded::Write));
    }

    #[test]
    fn only_early_ends_without_an_answer_are_abandoned() {
        let start = Instant::now();
        let activity = Arc::new(Activity::new(bounds(), start));
        for _ in 0..10 {
            activity.start_request(start).set_answered();
        }
        assert_eq!(activity.exceeded(), None);
        for round in 0..10 {
            activity.end_request(true, start + round * 4 * SECOND);
        }
        assert_eq!(activity.exceeded(), None);
        for _ in 0..4 {
            activity.end_request(true, start + 100 * SECOND);
        }
        assert_eq!(activity.exceeded(), Some(Exceeded::Abandoned));
    }
}
