//! Stopping a proxy: stop accepting → notify peers → wait → deadline → close.
//!
//! A [`DrainSignal`] notifies listeners and connections of the first two steps. [`finish`] takes the others. Nothing here
//! knows what is stopped.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// How often is looked whether the last connection has ended.
const POLL: Duration = Duration::from_millis(20);
/// Time for closed connections to be reported.
const REPORT_TIME: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    NotAccepting,
    Draining,
}

/// Starts a drain. Dropping it starts the drain too.
#[derive(Debug)]
pub struct DrainSignal(watch::Sender<Phase>);

/// Learns of a drain. Clones learn of the same one.
#[derive(Debug, Clone)]
pub struct Drain(watch::Receiver<Phase>);

/// A signal and a handle that learns of it.
pub fn channel() -> (DrainSignal, Drain) {
    let (phase, seen) = watch::channel(Phase::Serving);
    (DrainSignal(phase), Drain(seen))
}

impl DrainSignal {
    /// First step: listeners stop accepting. May be repeated.
    pub fn stop_accepting(&self) {
        self.advance(Phase::NotAccepting);
    }

    /// Second step: peers are asked to open nothing new. May be repeated.
    pub fn notify_peers(&self) {
        self.advance(Phase::Draining);
    }

    fn advance(&self, to: Phase) {
        self.0.send_if_modified(|phase| {
            let is_later = *phase < to;
            if is_later {
                *phase = to;
            }
            is_later
        });
    }
}

impl Drain {
    /// Resolves when listeners are to stop accepting. Cancel safe.
    pub async fn accepting_stopped(&mut self) {
        self.reached(Phase::NotAccepting).await;
    }

    /// Resolves when peers must be notified that nothing new is accepted. Cancel safe.
    pub async fn draining(&mut self) {
        self.reached(Phase::Draining).await;
    }

    async fn reached(&mut self, wanted: Phase) {
        // A dropped signal is the last phase.
        drop(self.0.wait_for(|phase| *phase >= wanted).await);
    }
}

/// What is stopped.
pub trait Drainable {
    /// Accepts nothing new. May be called again.
    fn stop_accepting(&mut self);
    /// Asks peers to open nothing new. May be called again.
    fn notify_peers(&mut self);
    /// Number of connections that are open or being opened.
    fn open(&self) -> usize;
    /// Closes upstream connections that carry nothing, and opens no more.
    fn close_unused(&mut self);
    /// Closes what is open. Returns how many connections that were; they may take a moment to be reported.
    fn close(&mut self) -> usize;
    /// Gives up what has not closed.
    fn abort(&mut self);
}

/// How a drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Every connection ended before the deadline.
    Finished,
    /// This many connections were closed.
    Closed(usize),
}

/// Takes the first two steps of a drain. May be repeated.
pub fn begin(server: &mut impl Drainable) {
    server.stop_accepting();
    server.notify_peers();
}

/// Takes all steps of a drain: connections may go on for `limit`, or until `hurry` resolves.
pub async fn finish(
    server: &mut impl Drainable,
    limit: Duration,
    hurry: impl Future<Output = ()>,
) -> Drained {
    begin(server);
    let is_idle = async {
        while server.open() > 0 {
            sleep(POLL).await;
        }
    };
    let finished = tokio::select! {
        ended = timeout(limit, is_idle) => ended.is_ok(),
        () = hurry => false,
    };
    // Not before: a connection that was accepted last may still need an upstream.
    server.close_unused();
    if finished {
        return Drained::Finished;
    }
    let closed = server.close();
    let deadline = Instant::now() + REPORT_TIME;
    while server.open() > 0 && Instant::now() < deadline {
        sleep(POLL).await;
    }
    server.abort();
    Drained::Closed(closed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;

    /// Notes the steps, with the seconds at which they were taken.
    struct Recorder {
        steps: Vec<(&'static str, u64)>,
        start: Instant,
        ends_at: Option<Duration>,
    }

    impl Recorder {
        fn new(ends_after: Option<u64>) -> Self {
            Self { steps: Vec::new(), start: Instant::now(), ends_at: ends_after.map(Duration::from_secs) }
        }

        fn note(&mut self, step: &'static str) {
            self.steps.push((step, self.start.elapsed().as_secs()));
        }
    }

    impl Drainable for Recorder {
        fn stop_accepting(&mut self) {
            self.note("stop accepting");
        }

        fn notify_peers(&mut self) {
            self.note("notify");
        }

        fn open(&self) -> usize {
            usize::from(self.ends_at.is_none_or(|end| self.start.elapsed() < end))
        }

        fn close_unused(&mut self) {
            self.note("close unused");
        }

        fn close(&mut self) -> usize {
            self.note("close");
            1
        }

        fn abort(&mut self) {
            self.note("abort");
        }
    }

    const LIMIT: Duration = Duration::from_secs(600);

    #[tokio::test(start_paused = true)]
    async fn connections_are_closed_at_the_deadline_after_all_other_steps() {
        let mut server = Recorder::new(None);
        assert_eq!(finish(&mut server, LIMIT, pending()).await, Drained::Closed(1));
        let steps =
            [("stop accepting", 0), ("notify", 0), ("close unused", 600), ("close", 600), ("abort", 601)];
        assert_eq!(server.steps, steps);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_with_the_last_connection_and_closes_none() {
        let mut server = Recorder::new(Some(3));
        assert_eq!(finish(&mut server, LIMIT, pending()).await, Drained::Finished);
        assert_eq!(server.steps, [("stop accepting", 0), ("notify", 0), ("close unused", 3)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_request_to_stop_closes_connections_at_once() {
        let mut server = Recorder::new(None);
        assert_eq!(finish(&mut server, LIMIT, sleep(Duration::from_secs(5))).await, Drained::Closed(1));
        assert_eq!(server.steps.last(), Some(&("abort", 6)));
    }

    #[tokio::test]
    async fn listeners_learn_of_a_drain_before_peers_do() {
        let (signal, mut drain) = channel();
        signal.stop_accepting();
        drain.accepting_stopped().await;
        let notified = timeout(Duration::from_millis(1), drain.draining()).await;
        assert!(notified.is_err(), "not yet");
        signal.notify_peers();
        signal.stop_accepting();
        drain.draining().await;
        let (signal, mut drain) = channel();
        drop(signal);
        drain.draining().await;
    }
}
