//! The threads of the data path. Each is a single-threaded runtime that keeps the connections placed on it.
//!
//! A connection is placed on the worker with the fewest and stays there. Its pooled tunnels belong to the same worker, so
//! nothing on the data path wakes or locks another thread. Control tasks (xDS, certificates, admin) run elsewhere.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::net::TcpStream;
use tokio::runtime;
use tokio::sync::{mpsc, watch};

/// Number of panics of data-path tasks since start. Anything but zero is a defect.
#[derive(Debug, Default)]
pub struct Panics(AtomicU64);

impl Panics {
    /// Panics so far.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Starts tasks on a worker, and counts its connections.
#[derive(Debug, Clone)]
pub struct WorkerHandle {
    index: usize,
    runtime: runtime::Handle,
    load: Arc<AtomicUsize>,
    panics: Arc<Panics>,
    lag: Arc<Lag>,
}

/// How late a worker's timers fire: a sign of a task that blocks it.
///
/// The timer that measures it has another use: while a timer is due soon, setting a later one does not wake the
/// runtime's driver, and every connection sets later ones.
#[derive(Debug, Default)]
pub struct Lag {
    latest_millis: AtomicU64,
}

/// Time between two measurements.
const MEASURE_EVERY: Duration = Duration::from_millis(500);

impl Lag {
    /// How late the last measurement was, in milliseconds.
    pub fn millis(&self) -> u64 {
        self.latest_millis.load(Ordering::Relaxed)
    }

    async fn measure(&self) {
        loop {
            let due = tokio::time::Instant::now() + MEASURE_EVERY;
            tokio::time::sleep_until(due).await;
            let late = u64::try_from(due.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.latest_millis.store(late, Ordering::Relaxed);
        }
    }
}

/// Counts one connection of a worker until it is dropped.
#[derive(Debug)]
pub struct ConnectionGuard(Arc<AtomicUsize>);

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl WorkerHandle {
    /// The worker's number, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Number of connections of the worker.
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// How late the worker's timers fire.
    pub fn lag(&self) -> &Lag {
        &self.lag
    }

    /// Counts one more connection until the guard is dropped.
    pub fn count_connection(&self) -> ConnectionGuard {
        self.load.fetch_add(1, Ordering::Relaxed);
        ConnectionGuard(self.load.clone())
    }

    /// Runs `task` on the worker. A panic ends that task only; it is logged and counted.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let panics = self.panics.clone();
        self.runtime.spawn(async move {
            if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
                panics.0.fetch_add(1, Ordering::Relaxed);
                let message = panic
                    .downcast_ref::<&str>()
                    .copied()
                    .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
                tracing::error!(task = name, message, "a data-path task panicked");
            }
        });
    }
}

/// Why the workers can't start or go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A runtime or thread could not be created.
    #[error("worker {index} can't start")]
    Start {
        /// Which worker.
        index: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A worker's thread ended by itself.
    #[error("worker {index} died")]
    Died {
        /// Which worker.
        index: usize,
    },
}

/// Number of task polls after which a busy worker checks for I/O events. A bulk transfer always has tasks that are ready, each
/// taking a fraction of a millisecond; with tokio's default of 61, small messages waited for tens of milliseconds.
const EVENT_INTERVAL: u32 = 8;

/// All workers. `W` is the state of each, such as its pool of connections.
#[derive(Debug)]
pub struct Workers<W> {
    members: Box<[Member<W>]>,
    turn: AtomicUsize,
    panics: Arc<Panics>,
}

#[derive(Debug)]
struct Member<W> {
    handle: WorkerHandle,
    state: Arc<W>,
}

/// Stops the workers, and notices one that ended by itself. Threads end when this is dropped.
#[derive(Debug)]
pub struct Supervisor {
    stop: watch::Sender<bool>,
    died: mpsc::Receiver<usize>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl<W: Send + Sync + 'static> Workers<W> {
    /// Starts `count` threads. `state` creates the state of each, inside its runtime.
    ///
    /// # Errors
    /// [`WorkerError::Start`].
    pub fn start(
        count: usize,
        mut state: impl FnMut(&WorkerHandle) -> W,
    ) -> Result<(Arc<Self>, Supervisor), WorkerError> {
        let (stop, _) = watch::channel(false);
        let (death, died) = mpsc::channel(count.max(1));
        let panics = Arc::new(Panics::default());
        let mut members = Vec::with_capacity(count);
        let mut threads = Vec::with_capacity(count);
        for index in 0..count {
            let started = |source| WorkerError::Start { index, source };
            let runtime = runtime::Builder::new_current_thread()
                .event_interval(EVENT_INTERVAL)
                .enable_all()
                .build()
                .map_err(started)?;
            let handle = WorkerHandle {
                index,
                runtime: runtime.handle().clone(),
                load: Arc::default(),
                panics: panics.clone(),
                lag: Arc::default(),
            };
            let state = {
                let _entered = runtime.enter();
                Arc::new(state(&handle))
            };
            let lag = handle.lag.clone();
            members.push(Member { handle, state });
            let (mut stopped, death) = (stop.subscribe(), ExitGuard { index, death: death.clone() });
            let body = move || {
                let _notice = death;
                runtime.block_on(async {
                    tokio::select! {
                        // A dropped supervisor is a stop too.
                        _ = stopped.wait_for(|stop| *stop) => {}
                        () = lag.measure() => {}
                    }
                });
                runtime.shutdown_background();
            };
            let name = format!("worker-{index}");
            threads.push(thread::Builder::new().name(name).spawn(body).map_err(started)?);
        }
        let workers =
            Arc::new(Self { members: members.into_boxed_slice(), turn: AtomicUsize::new(0), panics });
        Ok((workers, Supervisor { stop, died, threads }))
    }

    /// Number of workers.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are no workers; never after a start with a count above zero.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Worker `n` modulo the number of workers.
    pub fn get(&self, n: usize) -> Option<(&WorkerHandle, &Arc<W>)> {
        let index = n.checked_rem(self.members.len())?;
        self.members.get(index).map(|member| (&member.handle, &member.state))
    }

    /// The workers in turn, for long-lived tasks.
    pub fn in_turn(&self) -> Option<&WorkerHandle> {
        self.get(self.turn.fetch_add(1, Ordering::Relaxed)).map(|(handle, _)| handle)
    }

    /// Every worker with its state.
    pub fn all(&self) -> impl Iterator<Item = (&WorkerHandle, &Arc<W>)> {
        self.members.iter().map(|member| (&member.handle, &member.state))
    }

    /// The state of every worker.
    pub fn states(&self) -> impl Iterator<Item = &Arc<W>> {
        self.members.iter().map(|member| &member.state)
    }

    /// The handle of every worker.
    pub fn handles(&self) -> impl Iterator<Item = &WorkerHandle> {
        self.members.iter().map(|member| &member.handle)
    }

    /// Panics of data-path tasks.
    pub fn panics(&self) -> &Arc<Panics> {
        &self.panics
    }

    /// Places a connection that `home` accepted on the least loaded worker; `home` itself wins ties, so that the usual case
    /// needs no other thread. The stream is registered with the runtime that gets it.
    ///
    /// `held` is dropped when the connection has ended.
    pub fn place<H, F, T>(
        &self,
        home: &WorkerHandle,
        name: &'static str,
        stream: std::net::TcpStream,
        held: H,
        serve: F,
    ) where
        H: Send + 'static,
        F: FnOnce(WorkerHandle, Arc<W>, TcpStream) -> T + Send + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let Some(chosen) = self.least_loaded(home) else { return };
        let (handle, state, counted) =
            (chosen.handle.clone(), chosen.state.clone(), chosen.handle.count_connection());
        chosen.handle.spawn(name, async move {
            let _held = (counted, held);
            match TcpStream::from_std(stream) {
                Ok(stream) => serve(handle, state, stream).await,
                Err(error) => tracing::warn!(%error, "an accepted connection can't be registered"),
            }
        });
    }

    fn least_loaded(&self, home: &WorkerHandle) -> Option<&Member<W>> {
        let distance = |index: usize| index.wrapping_add(self.members.len()).wrapping_sub(home.index);
        self.members.iter().min_by_key(|member| {
            (member.handle.load(), distance(member.handle.index).checked_rem(self.members.len()))
        })
    }
}

struct ExitGuard {
    index: usize,
    death: mpsc::Sender<usize>,
}

impl Drop for ExitGuard {
    fn drop(&mut self) {
        // The supervisor is gone when the program ends anyway.
        self.death.try_send(self.index).ok();
    }
}

impl Supervisor {
    /// Resolves when a worker ended by itself: the program must end.
    pub async fn failed(&mut self) -> WorkerError {
        match self.died.recv().await {
            Some(index) => WorkerError::Died { index },
            None => std::future::pending().await,
        }
    }

    /// Ends all workers and their connections, and waits for the threads.
    pub fn stop(self) {
        self.stop.send_replace(true);
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a worker ended with a panic");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn connections_are_spread_evenly_and_stay_where_they_were_put() {
        let (workers, supervisor) = Workers::start(3, |handle| handle.index()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (report, mut reports) = mpsc::channel(16);
        let mut clients = Vec::new();
        let (home, _) = workers.get(0).unwrap();
        for _ in 0..6 {
            clients.push(TcpStream::connect(address).await.unwrap());
            let (stream, _) = listener.accept().await.unwrap();
            let report = report.clone();
            workers.place(
                home,
                "test",
                stream.into_std().unwrap(),
                (),
                move |handle, state, stream| async move {
                    let thread = thread::current().name().map(str::to_owned);
                    report.send((handle.index(), *state, thread)).await.unwrap();
                    stream.readable().await.unwrap();
                },
            );
        }
        let mut seen = Vec::new();
        for _ in 0..6 {
            let (index, state, thread) = reports.recv().await.unwrap();
            assert_eq!(index, state);
            assert_eq!(thread.as_deref(), Some(format!("worker-{index}").as_str()));
            seen.push(index);
        }
        assert!((0..3).all(|n| seen.iter().filter(|i| **i == n).count() == 2), "{seen:?}");
        drop(clients);
        tokio::time::timeout(Duration::from_secs(5), async {
            while workers.handles().any(|handle| handle.load() != 0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("loads fall when connections end");
        supervisor.stop();
    }

    #[tokio::test]
    async fn a_panic_in_one_task_is_counted_and_leaves_its_worker_running() {
        let (workers, supervisor) = Workers::start(1, |_| ()).unwrap();
        let (handle, _) = workers.get(0).unwrap();
        handle.spawn("breaks", async { panic!("on purpose") });
        let (sender, done) = tokio::sync::oneshot::channel();
        handle.spawn("works", async { sender.send(()).unwrap() });
        done.await.unwrap();
        assert_eq!(workers.panics().count(), 1);
        supervisor.stop();
    }

    #[test]
    fn indices_wrap_around() {
        let (workers, supervisor) = Workers::start(2, |handle| handle.index()).unwrap();
        let indices: HashSet<_> =
            (0..4).filter_map(|n| workers.get(n)).map(|(handle, _)| handle.index()).collect();
        assert_eq!(indices.len(), 2);
        supervisor.stop();
    }
}
