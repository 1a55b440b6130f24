//! Stopping: stop accepting → tell → wait → deadline → cut.
//!
//! SIGTERM, SIGINT and `POST /quitquitquit` do all of it; `POST /drain_listeners` the first two only. A
//! second signal cuts at once.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Program;
use crate::error::CutReason;

/// How often the end of the last connection is looked for.
const LOOK: Duration = Duration::from_millis(20);
/// What cut connections get to tell their story.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Who may ask for a stop.
#[derive(Debug, Clone)]
pub(super) struct Requests {
    quit: Arc<Notify>,
    drain: Arc<Notify>,
}

impl Requests {
    pub(super) fn new() -> Self {
        Self { quit: Arc::default(), drain: Arc::default() }
    }

    /// Asks for a full stop.
    pub(super) fn quit(&self) {
        self.quit.notify_one();
    }

    /// Asks for the first two steps only.
    pub(super) fn drain(&self) {
        self.drain.notify_one();
    }

    /// Resolves when a full stop is asked for; calls `begin` for each request to drain before.
    pub(super) async fn wait(&self, mut begin: impl FnMut()) {
        loop {
            tokio::select! {
                () = asked_by_signal() => return,
                () = self.quit.notified() => return,
                () = self.drain.notified() => {
                    tracing::info!("draining: nothing new is taken");
                    begin();
                }
            }
        }
    }
}

/// Resolves when the system asks the program to stop.
async fn asked_by_signal() {
    let (terminate, interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    match (terminate, interrupt) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "signals can't be received; only the admin server can stop this program");
            std::future::pending::<()>().await;
        }
    }
}

/// Waits for open connections, at most `limit`, then cuts them. The first step was taken before.
pub(super) async fn finish(program: &Program, limit: Duration, requests: &Requests) {
    let open = program.proxy.connections.len();
    tracing::info!(open, limit = ?limit, "stopping: nothing new is taken, open connections may finish");
    let finished = tokio::select! {
        () = quiet(program) => true,
        () = tokio::time::sleep(limit) => false,
        () = requests.wait(|| ()) => false,
    };
    // Not before: what was accepted last may still need a tunnel.
    for worker in program.workers.states() {
        worker.pool.drain();
    }
    if finished {
        return tracing::info!("stopped: every connection has finished");
    }
    let cut = program.proxy.connections.review(|_| Some(CutReason::Drained));
    tracing::warn!(cut, "the drain time is over: connections were cut");
    let deadline = Instant::now() + LAST_WORDS;
    while !program.proxy.connections.is_empty() && Instant::now() < deadline {
        tokio::time::sleep(LOOK).await;
    }
    for worker in program.workers.states() {
        worker.pool.cut();
    }
}

/// Resolves when no worker carries anything.
async fn quiet(program: &Program) {
    while !program.proxy.connections.is_empty() || program.workers.seats().any(|seat| seat.load() > 0) {
        tokio::time::sleep(LOOK).await;
    }
}
