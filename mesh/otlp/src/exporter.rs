//! A bounded queue of what is to be exported, and the loop that sends batches of it.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};

/// How a queue is bounded and emptied.
#[derive(Debug, Clone, Copy)]
pub struct Batching {
    /// Items that wait; more are dropped.
    pub queue: usize,
    /// Items of one batch.
    pub batch: usize,
    /// How long the first item of a batch waits for more.
    pub delay: Duration,
    /// How often a batch is sent before it is given up.
    pub attempts: u32,
    /// The first wait after a failure; it doubles with each.
    pub backoff: Duration,
    /// The longest wait after a failure.
    pub max_backoff: Duration,
}

impl Default for Batching {
    /// 2,048 items, batches of 512 or what came within a second, five attempts within about 15 seconds.
    fn default() -> Self {
        Self {
            queue: 2048,
            batch: 512,
            delay: Duration::from_secs(1),
            attempts: 5,
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(30),
        }
    }
}

/// What became of items.
#[derive(Debug, Default)]
pub struct Counts {
    /// Those that collectors took.
    pub exported: AtomicU64,
    /// Those that found the queue full.
    pub dropped: AtomicU64,
    /// Those that were given up because they could not be sent, or that the collector refused.
    pub failed: AtomicU64,
}

/// What became of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It waits, and somebody sends it.
    Queued,
    /// It waits, and nobody sends: who pushed it must start [`Exporter::run`].
    Start,
    /// The queue is full.
    Dropped,
}

/// Why a batch was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It may be taken later; after so long, where the collector says that.
    Retry {
        /// What went wrong.
        reason: String,
        /// How long the collector asks to wait.
        after: Option<Duration>,
    },
    /// It never will be.
    Refused(String),
}

/// The queue of one kind of items for one collector. Cheap to clone; clones are one queue.
#[derive(Debug)]
pub struct Exporter<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    batching: Batching,
    counts: Arc<Counts>,
    state: Mutex<State<T>>,
    /// A batch is full, or nothing more is waited for.
    ready: Notify,
    idle: Notify,
}

#[derive(Debug)]
struct State<T> {
    queue: VecDeque<T>,
    running: bool,
    flushing: bool,
}

impl<T> Clone for Exporter<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Exporter<T> {
    /// An empty queue.
    pub fn new(batching: Batching, counts: Arc<Counts>) -> Self {
        let state = State { queue: VecDeque::new(), running: false, flushing: false };
        let (ready, idle) = (Notify::new(), Notify::new());
        Self(Arc::new(Shared { batching, counts, state: Mutex::new(state), ready, idle }))
    }

    /// Queues an item. Never waits.
    #[must_use]
    pub fn push(&self, item: T) -> Pushed {
        let Shared { batching, counts, ready, .. } = &*self.0;
        let mut state = self.0.state.lock();
        if state.queue.len() >= batching.queue {
            counts.dropped.fetch_add(1, Ordering::Relaxed);
            return Pushed::Dropped;
        }
        state.queue.push_back(item);
        if state.queue.len() == batching.batch {
            ready.notify_one();
        }
        match std::mem::replace(&mut state.running, true) {
            true => Pushed::Queued,
            false => Pushed::Start,
        }
    }

    /// Sends what waits until nothing does. `send` gets each batch, again where it may succeed later, and answers how many items
    /// the collector refused of it.
    pub async fn run<F>(&self, send: impl Fn(Arc<[T]>) -> F)
    where
        F: Future<Output = Result<u64, Fault>>,
    {
        let _running = Running(self);
        loop {
            self.batch_is_due().await;
            let batch: Arc<[T]> = {
                let mut state = self.0.state.lock();
                let most = state.queue.len().min(self.0.batching.batch);
                if most == 0 {
                    state.running = false;
                    return;
                }
                state.queue.drain(..most).collect()
            };
            let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
            let counts = &self.0.counts;
            let failed = match self.send(batch, &send).await {
                Ok(refused) => refused.min(count),
                Err(reason) => {
                    tracing::warn!(items = count, reason, "a collector did not take what was exported");
                    count
                }
            };
            counts.failed.fetch_add(failed, Ordering::Relaxed);
            counts.exported.fetch_add(count - failed, Ordering::Relaxed);
        }
    }

    async fn send<F>(&self, batch: Arc<[T]>, send: &impl Fn(Arc<[T]>) -> F) -> Result<u64, String>
    where
        F: Future<Output = Result<u64, Fault>>,
    {
        let Batching { attempts, backoff, max_backoff, .. } = self.0.batching;
        let mut tried = 0;
        loop {
            let (reason, after) = match send(batch.clone()).await {
                Ok(refused) => return Ok(refused),
                Err(Fault::Refused(reason)) => return Err(reason),
                Err(Fault::Retry { reason, after }) => (reason, after),
            };
            tried += 1;
            // Whoever waits for the end of the program does not wait for a collector that is not there.
            if tried >= attempts || self.0.state.lock().flushing {
                return Err(reason);
            }
            let wait = pause(backoff, max_backoff, tried - 1, rand::random());
            self.wait(after.unwrap_or(wait).min(max_backoff)).await;
        }
    }

    /// Waits for a pause, or until what is queued is to be flushed.
    async fn wait(&self, pause: Duration) {
        let end = Instant::now() + pause;
        while !self.0.state.lock().flushing && timeout_at(end, self.0.ready.notified()).await.is_ok() {}
    }

    /// Waits for a whole batch, or until the first item has waited long enough.
    async fn batch_is_due(&self) {
        let Shared { batching, ready, .. } = &*self.0;
        let end = Instant::now() + batching.delay;
        loop {
            {
                let state = self.0.state.lock();
                if state.flushing || state.queue.len() >= batching.batch || state.queue.is_empty() {
                    return;
                }
            }
            if timeout_at(end, ready.notified()).await.is_err() {
                return;
            }
        }
    }

    /// Sends what waits without delay from now on, and waits until it is sent or given up. For the end of the program.
    pub async fn flush(&self) {
        loop {
            let idle = self.0.idle.notified();
            {
                let mut state = self.0.state.lock();
                state.flushing = true;
                if !state.running {
                    return;
                }
            }
            self.0.ready.notify_one();
            tokio::select! {
                () = idle => {}
                // The loop may have missed the notice while it was sending.
                () = sleep(Duration::from_millis(20)) => {}
            }
        }
    }
}

/// Whoever starts the loop again finds it ended, however it ended.
struct Running<'a, T>(&'a Exporter<T>);

impl<T> Drop for Running<'_, T> {
    fn drop(&mut self) {
        self.0.0.state.lock().running = false;
        self.0.0.idle.notify_waiters();
    }
}

/// How long to wait after failure number `failures`, from 0: doubling, and somewhere in the upper half of that.
fn pause(first: Duration, most: Duration, failures: u32, random: u32) -> Duration {
    let most = first.saturating_mul(1 << failures.min(10)).min(most);
    let half = most / 2;
    half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Batching = Batching {
        queue: 5,
        batch: 2,
        delay: Duration::from_secs(1),
        attempts: 3,
        backoff: Duration::from_secs(1),
        max_backoff: Duration::from_secs(30),
    };

    fn exporter() -> (Exporter<u32>, Arc<Counts>) {
        let counts = Arc::<Counts>::default();
        (Exporter::new(SMALL, counts.clone()), counts)
    }

    fn read(counts: &Counts) -> (u64, u64, u64) {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (read(&counts.exported), read(&counts.dropped), read(&counts.failed))
    }

    fn later() -> Fault {
        Fault::Retry { reason: "no".to_owned(), after: None }
    }

    #[test]
    fn what_finds_the_queue_full_is_dropped_and_counted() {
        let (exporter, counts) = exporter();
        let pushed: Vec<Pushed> = (0..7).map(|item| exporter.push(item)).collect();
        assert_eq!(pushed.first(), Some(&Pushed::Start));
        assert!(pushed[1..5].iter().all(|it| *it == Pushed::Queued), "{pushed:?}");
        assert!(pushed[5..].iter().all(|it| *it == Pushed::Dropped), "{pushed:?}");
        assert_eq!(read(&counts), (0, 2, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_batch_does_not_wait_and_the_rest_waits_the_delay() {
        let (exporter, counts) = exporter();
        let start = Instant::now();
        let sent = Mutex::new(Vec::new());
        for item in 0..3 {
            assert_ne!(exporter.push(item), Pushed::Dropped);
        }
        exporter
            .run(async |batch: Arc<[u32]>| {
                sent.lock().push((batch.to_vec(), start.elapsed().as_millis()));
                Ok(0)
            })
            .await;
        assert_eq!(*sent.lock(), [(vec![0, 1], 0), (vec![2], 1000)]);
        assert_eq!(read(&counts), (3, 0, 0));
        assert_eq!(exporter.push(9), Pushed::Start, "the loop has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_tried_again_after_a_growing_pause_and_then_given_up() {
        let (exporter, counts) = exporter();
        let tries = Mutex::new(Vec::new());
        let start = Instant::now();
        assert_eq!(exporter.push(1), Pushed::Start);
        assert_eq!(exporter.push(2), Pushed::Queued);
        exporter
            .run(async |_| {
                tries.lock().push(start.elapsed().as_secs_f64());
                Err(later())
            })
            .await;
        let tries = tries.into_inner();
        assert_eq!(tries.len(), 3);
        assert!((0.5..=1.1).contains(&(tries[1] - tries[0])), "{tries:?}");
        assert!((1.0..=2.1).contains(&(tries[2] - tries[1])), "{tries:?}");
        assert_eq!(read(&counts), (0, 0, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_collector_refuses_is_not_sent_again() {
        let (exporter, counts) = exporter();
        let tries = AtomicU64::new(0);
        assert_eq!(exporter.push(1), Pushed::Start);
        exporter
            .run(async |_| {
                tries.fetch_add(1, Ordering::Relaxed);
                Err(Fault::Refused("never".to_owned()))
            })
            .await;
        assert_eq!((tries.load(Ordering::Relaxed), read(&counts)), (1, (0, 0, 1)));
        assert_eq!(exporter.push(1), Pushed::Start);
        assert_eq!(exporter.push(2), Pushed::Queued);
        exporter.run(async |_| Ok(1)).await;
        assert_eq!(read(&counts), (1, 0, 2), "a part of a batch may be refused");
    }

    #[tokio::test(start_paused = true)]
    async fn a_collector_says_how_long_to_wait() {
        let (exporter, _) = exporter();
        let start = Instant::now();
        assert_eq!(exporter.push(1), Pushed::Start);
        assert_eq!(exporter.push(2), Pushed::Queued);
        let after = Some(Duration::from_secs(7));
        exporter.run(async |_| Err(Fault::Retry { reason: "busy".to_owned(), after })).await;
        assert_eq!(start.elapsed().as_secs(), 14);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flush_waits_neither_for_more_items_nor_for_a_dead_collector() {
        let (exporter, counts) = exporter();
        let start = Instant::now();
        assert_eq!(exporter.push(1), Pushed::Start);
        tokio::join!(exporter.run(async |_| Err(later())), exporter.flush());
        assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
        assert_eq!(read(&counts), (0, 0, 1));
        let idle = Instant::now();
        exporter.flush().await;
        assert_eq!(idle.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_is_cut_can_be_started_again() {
        let (exporter, counts) = exporter();
        assert_eq!(exporter.push(1), Pushed::Start);
        let never = exporter.run(async |_| std::future::pending().await);
        assert!(tokio::time::timeout(Duration::from_secs(5), never).await.is_err());
        assert_eq!(exporter.push(2), Pushed::Start);
        exporter.run(async |_| Ok(0)).await;
        assert_eq!(read(&counts), (1, 0, 0));
    }
}
