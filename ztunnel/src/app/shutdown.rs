//! How this program takes the steps of a drain ([`ambit_runtime::drain`]).
//!
//! SIGTERM, SIGINT and `POST /quitquitquit` take all of them; `POST /drain_listeners` the first two only. A second
//! signal closes everything at once.

use ambit_telemetry::Readiness;
use tokio::task::JoinHandle;

use super::Program;
use ambit_runtime::cut::CutReason;
use ambit_runtime::drain::{DrainSignal, Drainable};

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
