//! A steady load: requests on new and on kept connections, every failure counted and kept.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use ambit_local::Pod;

use crate::apps;
use crate::http::Stream;

/// How long a single request may take before it counts as failed.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// Times that are kept of each kind; more requests are answered unmeasured.
const KEPT_TIMES: usize = 100_000;
/// Failures that are kept.
const KEPT_FAILURES: usize = 256;

/// What a load looks like. The server is an [`apps::App::Http`].
#[derive(Clone, Debug)]
pub struct Shape {
    /// Requests a second, each on a connection of its own.
    pub new_per_second: u32,
    /// Requests a second over all kept connections together.
    pub kept_per_second: u32,
    /// Kept connections.
    pub kept_connections: u32,
    /// Whether a kept connection that the server closed instead of answering is opened again and the request
    /// repeated once, without counting as a failure, as HTTP clients do (RFC 9112 §9.3.1).
    pub reopen: bool,
    /// TLS of every connection, and the name that it asks for.
    pub tls: Option<(Arc<rustls::ClientConfig>, ServerName<'static>)>,
}

impl Default for Shape {
    /// 200 requests a second: 100 on new connections, 100 on ten kept ones.
    fn default() -> Self {
        Self { new_per_second: 100, kept_per_second: 100, kept_connections: 10, reopen: false, tls: None }
    }
}

/// What kind of connection a request was on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// One of its own.
    New,
    /// A kept one.
    Kept,
}

/// A request that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// On what.
    pub on: On,
    /// When the connection was asked for: the application's `connect` was not called before.
    pub asked: Instant,
    /// When the request failed.
    pub failed: Instant,
    /// How.
    pub kind: io::ErrorKind,
    /// The same in words, with the time since the load's start.
    pub error: String,
}

/// How a load went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests on new connections that were answered.
    pub new_answered: u64,
    /// Requests on kept connections that were answered.
    pub kept_answered: u64,
    /// Requests on new connections that failed.
    pub new_failed: u64,
    /// Requests on kept connections that failed; a kept connection is opened again after a failure.
    pub kept_failed: u64,
    /// Kept connections that were opened again because the server had closed them instead of answering.
    pub kept_reopened: u64,
    /// Kept connections that were opened again because an answer said that it was the last.
    pub kept_renewed: u64,
    /// The first 256 failures.
    pub failures: Vec<Failure>,
    /// Median time from the request to its answer on kept connections, and from the connect on new ones.
    pub medians: Medians,
}

/// Median times of a load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Medians {
    /// From the connect to the answer on a connection of its own.
    pub new: Duration,
    /// From the request to the answer on a kept connection.
    pub kept: Duration,
}

impl Tally {
    /// # Panics
    /// When a request failed, or too few were sent.
    pub fn assert_all_answered(&self) {
        assert!(self.new_answered > 0 && self.kept_answered > 0, "the load did not run: {self:?}");
        assert_eq!((self.new_failed, self.kept_failed), (0, 0), "requests failed: {self:#?}");
    }

    /// The failures that `allowed` does not allow; those past the first 256 are never allowed.
    pub fn not_allowed(&self, allowed: impl Fn(&Failure) -> bool) -> Vec<String> {
        let kept = self.failures.len() as u64;
        let dropped = (self.new_failed + self.kept_failed).saturating_sub(kept);
        let errors =
            self.failures.iter().filter(|failure| !allowed(failure)).map(|failure| failure.error.clone());
        errors.chain((dropped > 0).then(|| format!("{dropped} more failures"))).collect()
    }
}

/// A load that runs until [`finish`](Self::finish).
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    pod: Pod,
    target: SocketAddr,
    start: Instant,
    stopping: AtomicBool,
    new_answered: AtomicU64,
    kept_answered: AtomicU64,
    new_failed: AtomicU64,
    kept_failed: AtomicU64,
    kept_reopened: AtomicU64,
    kept_renewed: AtomicU64,
    failures: Mutex<Vec<Failure>>,
    /// Times of the answered requests, of new and of kept connections.
    times: [Mutex<Vec<Duration>>; 2],
    shape: Shape,
    /// Own addresses of the kept connections, those that were opened again included.
    kept: Mutex<Vec<SocketAddr>>,
}

/// A kept connection.
struct Open {
    stream: Box<dyn Stream>,
    asked: Instant,
}

/// Whether a request failed because the other side ended the connection.
fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    [BrokenPipe, ConnectionReset, UnexpectedEof].contains(&error.kind())
}

impl Load {
    /// Starts the load from `pod` to `target`; returns once every kept connection has had an answer.
    ///
    /// # Errors
    /// When a kept connection can't be opened.
    pub async fn start(pod: &Pod, target: SocketAddr, shape: &Shape) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            pod: pod.clone(),
            target,
            start: Instant::now(),
            stopping: AtomicBool::new(false),
            new_answered: AtomicU64::new(0),
            kept_answered: AtomicU64::new(0),
            new_failed: AtomicU64::new(0),
            kept_failed: AtomicU64::new(0),
            kept_reopened: AtomicU64::new(0),
            kept_renewed: AtomicU64::new(0),
            failures: Mutex::new(Vec::new()),
            times: Default::default(),
            shape: shape.clone(),
            kept: Mutex::new(Vec::new()),
        });
        let mut tasks = JoinSet::new();
        for _ in 0..shape.kept_connections {
            let mut open = shared.open_kept(Instant::now()).await?;
            apps::get(&mut open.stream).await?;
            let pause = Duration::from_secs(1) * shape.kept_connections / shape.kept_per_second.max(1);
            tasks.spawn(shared.clone().keep(Some(open), pause));
        }
        if shape.new_per_second > 0 {
            tasks.spawn(shared.clone().renew(Duration::from_secs(1) / shape.new_per_second));
        }
        Ok(Self { shared, tasks })
    }

    /// Own addresses of all connections that were kept so far.
    pub fn kept_addresses(&self) -> Vec<SocketAddr> {
        self.shared.kept.lock().clone()
    }

    /// Waits until `count` more requests of each kind have ended, well or badly.
    pub async fn more(&self, count: u64) {
        let ended = |s: &Shared| {
            let new = s.new_answered.load(Ordering::Relaxed) + s.new_failed.load(Ordering::Relaxed);
            let kept = s.kept_answered.load(Ordering::Relaxed) + s.kept_failed.load(Ordering::Relaxed);
            (new, kept)
        };
        let (new, kept) = ended(&self.shared);
        let limit = REQUEST_LIMIT * 2 + Duration::from_millis(50) * u32::try_from(count).unwrap_or(u32::MAX);
        crate::wait::until("more requests of the load", limit, || async {
            let now = ended(&self.shared);
            let Shape { new_per_second, kept_connections, .. } = self.shared.shape;
            (new_per_second == 0 || now.0 >= new + count) && (kept_connections == 0 || now.1 >= kept + count)
        })
        .await;
    }

    /// How it went so far.
    pub fn tally(&self) -> Tally {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Tally {
            new_answered: get(&self.shared.new_answered),
            kept_answered: get(&self.shared.kept_answered),
            new_failed: get(&self.shared.new_failed),
            kept_failed: get(&self.shared.kept_failed),
            kept_reopened: get(&self.shared.kept_reopened),
            kept_renewed: get(&self.shared.kept_renewed),
            failures: self.shared.failures.lock().clone(),
            medians: Medians { new: median(&self.shared.times[0]), kept: median(&self.shared.times[1]) },
        }
    }

    /// Ends the load after the requests that run, and says how it went.
    pub async fn finish(mut self) -> Tally {
        self.shared.stopping.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("a task of the load panicked");
        }
        self.tally()
    }
}

/// Ticks of a load. Ticks that were missed on a busy machine are dropped, because a burst would be another load.
fn every(pause: Duration) -> tokio::time::Interval {
    let mut turns = tokio::time::interval(pause);
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    turns
}

fn median(times: &Mutex<Vec<Duration>>) -> Duration {
    let mut times = times.lock().clone();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

impl Shared {
    fn answered(&self, on: On, took: Duration) {
        let (counter, times) = match on {
            On::New => (&self.new_answered, &self.times[0]),
            On::Kept => (&self.kept_answered, &self.times[1]),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let mut times = times.lock();
        if times.len() < KEPT_TIMES {
            times.push(took);
        }
    }

    fn running(&self) -> bool {
        !self.stopping.load(Ordering::Relaxed)
    }

    fn fail(&self, on: On, asked: Instant, error: &io::Error) {
        let counter = match on {
            On::New => &self.new_failed,
            On::Kept => &self.kept_failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        let mut failures = self.failures.lock();
        if failures.len() < KEPT_FAILURES {
            let since = |time: Instant| time.saturating_duration_since(self.start).as_millis();
            let failed = Instant::now();
            let text = format!(
                "{:>6} ms: {on:?} connection that was asked for at {} ms: {error}",
                since(failed),
                since(asked)
            );
            failures.push(Failure { on, asked, failed, kind: error.kind(), error: text });
        }
    }

    async fn open_kept(&self, asked: Instant) -> io::Result<Open> {
        let (stream, local) = self.connect().await?;
        self.kept.lock().push(local);
        Ok(Open { stream, asked })
    }

    /// A connection, and its own address.
    async fn connect(&self) -> io::Result<(Box<dyn Stream>, SocketAddr)> {
        let stream = self.pod.connect(self.target).await?;
        let local = stream.local_addr()?;
        let Some((config, name)) = &self.shape.tls else { return Ok((Box::new(stream), local)) };
        let stream = TlsConnector::from(config.clone()).connect(name.clone(), stream).await?;
        Ok((Box::new(stream), local))
    }

    async fn keep(self: Arc<Self>, mut kept: Option<Open>, pause: Duration) {
        let mut turns = every(pause);
        while self.running() {
            turns.tick().await;
            let (is_kept, mut asked) = match &kept {
                Some(open) => (true, open.asked),
                None => (false, Instant::now()),
            };
            let mut outcome = self.turn(kept.take(), asked).await;
            if self.shape.reopen && is_kept && outcome.as_ref().is_err_and(is_closed) {
                self.kept_reopened.fetch_add(1, Ordering::Relaxed);
                asked = Instant::now();
                outcome = self.turn(None, asked).await;
            }
            match outcome {
                Ok((open, took)) => {
                    self.kept_renewed.fetch_add(u64::from(open.is_none()), Ordering::Relaxed);
                    kept = open;
                    self.answered(On::Kept, took);
                }
                Err(error) => self.fail(On::Kept, asked, &error),
            }
        }
    }

    /// One request on a kept connection, or on one that is opened now to be kept; and how long it took. The connection is given back
    /// unless the answer was its last.
    async fn turn(&self, kept: Option<Open>, asked: Instant) -> io::Result<(Option<Open>, Duration)> {
        within(async {
            let mut open = match kept {
                Some(open) => open,
                None => self.open_kept(asked).await?,
            };
            let began = Instant::now();
            let answer = apps::get_answer(&mut open.stream).await?;
            Ok(((!answer.closes).then_some(open), began.elapsed()))
        })
        .await
    }

    async fn renew(self: Arc<Self>, pause: Duration) {
        let mut turns = every(pause);
        let mut requests = JoinSet::new();
        while self.running() {
            turns.tick().await;
            let shared = self.clone();
            requests.spawn(async move {
                let asked = Instant::now();
                let outcome = within(async {
                    let (mut stream, _) = shared.connect().await?;
                    apps::get(&mut stream).await
                });
                match outcome.await {
                    Ok(_) => shared.answered(On::New, asked.elapsed()),
                    Err(error) => shared.fail(On::New, asked, &error),
                }
            });
            while requests.try_join_next().is_some() {}
        }
        while requests.join_next().await.is_some() {}
    }
}

async fn within<T>(request: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(REQUEST_LIMIT, request).await {
        Ok(outcome) => outcome,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")),
    }
}
