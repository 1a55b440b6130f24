//! Requests to stop, and how this program takes the steps of a drain ([`ambit_runtime::drain`]).
//!
//! SIGTERM, SIGINT and `POST /quitquitquit` take all of them; `POST /drain_listeners` the first two only. A second
//! signal closes everything at once.

use std::sync::Arc;

use ambit_telemetry::Readiness;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::Program;
use ambit_runtime::cut::CutReason;
use ambit_runtime::drain::{DrainSignal, Drainable};

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
                    tracing::info!("draining: nothing new is accepted");
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

/// The program as a drain stops it.
pub(super) struct Running<'a> {
    pub(super) program: &'a Program,
    pub(super) signal: DrainSignal,
    pub(super) readiness: Readiness,
    /// The connection to the node agent.
    pub(super) agent: JoinHandle<()>,
}

impl Drainable for Running<'_> {
    fn stop_accepting(&mut self) {
        self.readiness.start_draining();
        // The agent turns to a successor when this end of its socket closes.
        self.agent.abort();
        self.signal.stop_accepting();
    }

    fn notify_peers(&mut self) {
        self.signal.notify_peers();
    }

    fn open(&self) -> usize {
        let Program { proxy, workers, .. } = self.program;
        // What is being opened is on a worker only.
        proxy.connections.len().max(workers.handles().map(|handle| handle.load()).sum())
    }

    fn close_unused(&mut self) {
        self.program.workers.states().for_each(|worker| worker.pool.drain());
    }

    fn close(&mut self) -> usize {
        self.program.proxy.connections.review(|_| Some(CutReason::Drained))
    }

    fn abort(&mut self) {
        self.program.workers.states().for_each(|worker| worker.pool.cut());
    }
}
