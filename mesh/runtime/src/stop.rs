//! Requests to stop a program: by signal, or by its admin server.

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// Who may ask for a stop.
#[derive(Debug, Clone, Default)]
pub struct Requests {
    quit: Arc<Notify>,
    drain: Arc<Notify>,
}

impl Requests {
    /// Nobody has asked yet.
    pub fn new() -> Self {
        Self { quit: Arc::default(), drain: Arc::default() }
    }

    /// Asks for a full stop.
    pub fn quit(&self) {
        self.quit.notify_one();
    }

    /// Asks for the first two steps only.
    pub fn drain(&self) {
        self.drain.notify_one();
    }

    /// Resolves when a full stop is asked for; calls `begin` for each request to drain before.
    pub async fn wait(&self, mut begin: impl FnMut()) {
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
