//! The data path's threads: each a single-threaded runtime that keeps the connections it was given.
//!
//! A connection goes to the worker with the fewest and stays there; its pooled tunnels belong to the
//! same worker, so nothing on the data path wakes or locks another thread. Control tasks (xDS,
//! certificates, admin) run elsewhere and are never spawned here.

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

/// Panics of data-path tasks since start. Anything but zero is a defect.
#[derive(Debug, Default)]
pub struct Panics(AtomicU64);

impl Panics {
    /// How many there were.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where tasks can be started on a worker: its runtime and its load.
#[derive(Debug, Clone)]
pub struct Seat {
    index: usize,
    runtime: runtime::Handle,
    load: Arc<AtomicUsize>,
    panics: Arc<Panics>,
    pulse: Arc<Pulse>,
}

/// How late a worker gets to what it has to do: a sign of a task that holds it up.
///
/// The beat has another use: while a timer is due soon, setting a later one needs no wake-up call to
/// the runtime's own driver, and every connection sets later ones.
#[derive(Debug, Default)]
pub struct Pulse {
    latest_millis: AtomicU64,
}

/// Time between two beats of a worker.
const BEAT: Duration = Duration::from_millis(500);

impl Pulse {
    /// How late the last beat was, in milliseconds.
    pub fn delay_millis(&self) -> u64 {
        self.latest_millis.load(Ordering::Relaxed)
    }

    async fn beat(&self) {
        loop {
            let due = tokio::time::Instant::now() + BEAT;
            tokio::time::sleep_until(due).await;
            let late = u64::try_from(due.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.latest_millis.store(late, Ordering::Relaxed);
        }
    }
}

/// One connection's weight on its worker, for as long as it lives.
#[derive(Debug)]
pub struct Weight(Arc<AtomicUsize>);

impl Drop for Weight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Seat {
    /// Which worker this is, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Connections that the worker carries now.
    pub fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// How punctual the worker is.
    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// Counts one more connection until the guard is dropped.
    pub fn weigh(&self) -> Weight {
        self.load.fetch_add(1, Ordering::Relaxed);
        Weight(self.load.clone())
    }

    /// Runs `task` on the worker. A panic in it ends that task alone, is logged and counted.
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

/// Why the workers can't go on.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A runtime or thread could not be made.
    #[error("worker {index} can't start")]
    Start {
        /// Which worker.
        index: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// A worker's thread ended though nobody told it to.
    #[error("worker {index} died")]
    Died {
        /// Which worker.
        index: usize,
    },
}

/// Polls of tasks after which a busy worker looks for what has arrived. A bulk transfer always has tasks that are ready, each good for
/// a fraction of a millisecond; with tokio's 61 of them in between, small messages waited for tens of milliseconds.
const EVENT_INTERVAL: u32 = 8;

/// All workers. `W` is what each keeps for its own connections, its pool above all.
#[derive(Debug)]
pub struct Workers<W> {
    members: Box<[Member<W>]>,
    turn: AtomicUsize,
    panics: Arc<Panics>,
}

#[derive(Debug)]
struct Member<W> {
    seat: Seat,
    state: Arc<W>,
}

/// Ends the workers and hears of one that ended by itself. Threads end when this is dropped.
#[derive(Debug)]
pub struct Supervisor {
    stop: watch::Sender<bool>,
    died: mpsc::Receiver<usize>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl<W: Send + Sync + 'static> Workers<W> {
    /// Starts `count` threads; `state` makes each one's own state, called inside its runtime.
    ///
    /// # Errors
    /// [`WorkerError::Start`].
    pub fn start(
        count: usize,
        mut state: impl FnMut(&Seat) -> W,
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
            let seat = Seat {
                index,
                runtime: runtime.handle().clone(),
                load: Arc::default(),
                panics: panics.clone(),
                pulse: Arc::default(),
            };
            let state = {
                let _entered = runtime.enter();
                Arc::new(state(&seat))
            };
            let pulse = seat.pulse.clone();
            members.push(Member { seat, state });
            let (mut stopped, death) = (stop.subscribe(), DeathNotice { index, death: death.clone() });
            let body = move || {
                let _notice = death;
                runtime.block_on(async {
                    tokio::select! {
                        // A dropped supervisor is a stop too.
                        _ = stopped.wait_for(|stop| *stop) => {}
                        () = pulse.beat() => {}
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

    /// How many workers there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there is none; never so after a start with a count above zero.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Worker `n`, counted round.
    pub fn seat(&self, n: usize) -> Option<(&Seat, &Arc<W>)> {
        let index = n.checked_rem(self.members.len())?;
        self.members.get(index).map(|member| (&member.seat, &member.state))
    }

    /// The worker that shall run the next long-lived task, in turn.
    pub fn next_seat(&self) -> Option<&Seat> {
        self.seat(self.turn.fetch_add(1, Ordering::Relaxed)).map(|(seat, _)| seat)
    }

    /// Every worker with its state.
    pub fn all(&self) -> impl Iterator<Item = (&Seat, &Arc<W>)> {
        self.members.iter().map(|member| (&member.seat, &member.state))
    }

    /// Every worker's state, for tasks that concern all of them.
    pub fn states(&self) -> impl Iterator<Item = &Arc<W>> {
        self.members.iter().map(|member| &member.state)
    }

    /// Every worker's seat.
    pub fn seats(&self) -> impl Iterator<Item = &Seat> {
        self.members.iter().map(|member| &member.seat)
    }

    /// Panics of data-path tasks.
    pub fn panics(&self) -> &Arc<Panics> {
        &self.panics
    }

    /// Hands a connection that `home` accepted to the least loaded worker; `home` itself wins ties,
    /// so that the usual case costs no hop. The stream is registered with the runtime that gets it.
    ///
    /// `held` is dropped when the connection has ended.
    pub fn place<H, F, T>(
        &self,
        home: &Seat,
        name: &'static str,
        stream: std::net::TcpStream,
        held: H,
        serve: F,
    ) where
        H: Send + 'static,
        F: FnOnce(Seat, Arc<W>, TcpStream) -> T + Send + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let Some(chosen) = self.least_loaded(home) else { return };
        let (seat, state, weight) = (chosen.seat.clone(), chosen.state.clone(), chosen.seat.weigh());
        chosen.seat.spawn(name, async move {
            let _held = (weight, held);
            match TcpStream::from_std(stream) {
                Ok(stream) => serve(seat, state, stream).await,
                Err(error) => tracing::warn!(%error, "an accepted connection can't be registered"),
            }
        });
    }

    fn least_loaded(&self, home: &Seat) -> Option<&Member<W>> {
        let distance = |index: usize| index.wrapping_add(self.members.len()).wrapping_sub(home.index);
        self.members.iter().min_by_key(|member| {
            (member.seat.load(), distance(member.seat.index).checked_rem(self.members.len()))
        })
    }
}

struct DeathNotice {
    index: usize,
    death: mpsc::Sender<usize>,
}

impl Drop for DeathNotice {
    fn drop(&mut self) {
        // The supervisor is gone when the program ends anyway.
        self.death.try_send(self.index).ok();
    }
}

impl Supervisor {
    /// Resolves when a worker ended by itself: an essential task died, and the program must end.
    pub async fn failed(&mut self) -> WorkerError {
        match self.died.recv().await {
            Some(index) => WorkerError::Died { index },
            None => std::future::pending().await,
        }
    }

    /// Ends all workers with everything they still carry, and waits for their threads.
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
        let (workers, supervisor) = Workers::start(3, |seat| seat.index()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, mut told) = mpsc::channel(16);
        let mut clients = Vec::new();
        let (home, _) = workers.seat(0).unwrap();
        for _ in 0..6 {
            clients.push(TcpStream::connect(address).await.unwrap());
            let (stream, _) = listener.accept().await.unwrap();
            let tell = tell.clone();
            workers.place(
                home,
                "test",
                stream.into_std().unwrap(),
                (),
                move |seat, state, stream| async move {
                    let thread = thread::current().name().map(str::to_owned);
                    tell.send((seat.index(), *state, thread)).await.unwrap();
                    stream.readable().await.unwrap();
                },
            );
        }
        let mut seen = Vec::new();
        for _ in 0..6 {
            let (index, state, thread) = told.recv().await.unwrap();
            assert_eq!(index, state);
            assert_eq!(thread.as_deref(), Some(format!("worker-{index}").as_str()));
            seen.push(index);
        }
        assert!((0..3).all(|n| seen.iter().filter(|i| **i == n).count() == 2), "{seen:?}");
        drop(clients);
        tokio::time::timeout(Duration::from_secs(5), async {
            while workers.seats().any(|seat| seat.load() != 0) {
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
        let (seat, _) = workers.seat(0).unwrap();
        seat.spawn("breaks", async { panic!("on purpose") });
        let (tell, told) = tokio::sync::oneshot::channel();
        seat.spawn("works", async { tell.send(()).unwrap() });
        told.await.unwrap();
        assert_eq!(workers.panics().count(), 1);
        supervisor.stop();
    }

    #[test]
    fn seats_are_counted_round() {
        let (workers, supervisor) = Workers::start(2, |seat| seat.index()).unwrap();
        let indices: HashSet<_> =
            (0..4).filter_map(|n| workers.seat(n)).map(|(seat, _)| seat.index()).collect();
        assert_eq!(indices.len(), 2);
        supervisor.stop();
    }
}
