//! Stopping a server in two steps: take nothing new, then, at the deadline, cut what is left.
//!
//! The order is: stop accepting → tell peers → wait → deadline → cut. One [`DrainSignal`] rules any
//! number of [`Drain`] handles; each listener and each connection holds one, and holding it is what
//! keeps the signal waiting. Dropping the signal without draining cuts.

use std::time::Duration;

use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    Draining,
    Cut,
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Everybody had finished before the deadline.
    Finished,
    /// The deadline passed with this many handles left, which were told to stop.
    Cut(usize),
}

/// The side that decides.
#[derive(Debug)]
pub struct DrainSignal {
    phase: watch::Sender<Phase>,
}

/// The side that obeys. Holding one means being at work.
#[derive(Debug, Clone)]
pub struct Drain {
    phase: watch::Receiver<Phase>,
}

/// A signal and the first handle.
pub fn new() -> (DrainSignal, Drain) {
    let (phase, seen) = watch::channel(Phase::Serving);
    (DrainSignal { phase }, Drain { phase: seen })
}

impl DrainSignal {
    /// First step: handles learn that nothing new is to be taken.
    pub fn drain(&self) {
        self.phase.send_if_modified(|phase| advance(phase, Phase::Draining));
    }

    /// Second step: handles learn that they must stop now.
    pub fn cut(&self) {
        self.phase.send_if_modified(|phase| advance(phase, Phase::Cut));
    }

    /// Handles that are held now.
    pub fn at_work(&self) -> usize {
        self.phase.receiver_count()
    }

    /// Another handle, in the phase that the signal is in.
    pub fn subscribe(&self) -> Drain {
        Drain { phase: self.phase.subscribe() }
    }

    /// Waits until no handle is held.
    pub async fn finished(&self) {
        self.phase.closed().await;
    }

    /// Both steps: drains, waits at most `limit` for everybody to finish, then cuts. After a cut it
    /// does not wait for handles to be dropped; [`finished`](Self::finished) does.
    pub async fn drain_within(&self, limit: Duration) -> Drained {
        self.drain();
        match tokio::time::timeout(limit, self.finished()).await {
            Ok(()) => Drained::Finished,
            Err(_) => {
                let left = self.at_work();
                self.cut();
                Drained::Cut(left)
            }
        }
    }
}

fn advance(phase: &mut Phase, to: Phase) -> bool {
    let later = *phase < to;
    if later {
        *phase = to;
    }
    later
}

impl Drain {
    /// Whether nothing new may be taken.
    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining
    }

    /// Whether work must stop now.
    pub fn is_cut(&self) -> bool {
        *self.phase.borrow() >= Phase::Cut || self.phase.has_changed().is_err()
    }

    /// Resolves when nothing new may be taken. Cancel safe.
    pub async fn draining(&mut self) {
        // A dropped signal is a cut, which is later than draining.
        drop(self.phase.wait_for(|phase| *phase >= Phase::Draining).await);
    }

    /// Resolves when work must stop now. Cancel safe.
    pub async fn cut(&mut self) {
        drop(self.phase.wait_for(|phase| *phase >= Phase::Cut).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drain_comes_before_cut_and_cut_only_at_the_deadline() {
        tokio::time::pause();
        let (signal, mut drain) = new();
        let worker = tokio::spawn(async move {
            let start = tokio::time::Instant::now();
            drain.draining().await;
            assert!(!drain.is_cut());
            let drained_at = start.elapsed();
            drain.cut().await;
            (drained_at, start.elapsed())
        });
        tokio::task::yield_now().await;
        let outcome = signal.drain_within(Duration::from_secs(600)).await;
        assert_eq!(outcome, Drained::Cut(1));
        let (drained_at, cut_at) = worker.await.unwrap();
        assert_eq!(drained_at, Duration::ZERO);
        assert!(cut_at >= Duration::from_secs(600));
    }

    #[tokio::test]
    async fn a_drain_ends_as_soon_as_the_last_handle_is_dropped() {
        tokio::time::pause();
        let (signal, drain) = new();
        let second = drain.clone();
        let started = tokio::time::Instant::now();
        tokio::spawn(async move {
            let _held = (drain, second);
            tokio::time::sleep(Duration::from_secs(3)).await;
        });
        assert_eq!(signal.drain_within(Duration::from_secs(600)).await, Drained::Finished);
        // The clock of timers has a resolution of a millisecond.
        assert!((3000..3010).contains(&started.elapsed().as_millis()));
    }

    #[tokio::test]
    async fn a_cut_is_never_taken_back_and_a_dropped_signal_cuts() {
        let (signal, mut drain) = new();
        signal.cut();
        signal.drain();
        assert!(drain.is_cut());
        drain.cut().await;
        let (signal, mut drain) = new();
        drop(signal);
        assert!(drain.is_cut());
        drain.cut().await;
    }
}
