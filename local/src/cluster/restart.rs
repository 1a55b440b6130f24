//! Restarts programs of the mesh that ended by themselves, as a DaemonSet and a Deployment do in a cluster.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cluster::Program;
use crate::cluster::shared::Shared;

/// Interval between two checks of the programs.
const LOOK: Duration = Duration::from_millis(100);
/// Delay before the first restart.
const FIRST_DELAY: Duration = Duration::from_millis(500);
/// Longest delay between two restarts.
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// A run of this length ends the growth of the delays.
const STABLE_AFTER: Duration = Duration::from_secs(30);

/// Restarts the control plane and the node proxies until the cluster ends.
pub(crate) async fn keep_running(shared: Arc<Shared>, control: Program) {
    let mut watched: Vec<Watched> = Vec::new();
    loop {
        tokio::time::sleep(LOOK).await;
        let proxies = shared.nodes.iter().flat_map(|node| node.ztunnels.lock().clone());
        let programs: Vec<Program> =
            proxies.map(|ztunnel| Program::clone(&ztunnel)).chain([control.clone()]).collect();
        watched.retain(|watched| programs.iter().any(|program| program.is_same(&watched.program)));
        for program in programs {
            let at = watched.iter().position(|watched| watched.program.is_same(&program));
            let at = at.unwrap_or_else(|| {
                watched.push(Watched { program, delay: FIRST_DELAY, began: Instant::now(), ended: None });
                watched.len() - 1
            });
            if let Some(watched) = watched.get_mut(at) {
                watched.look().await;
            }
        }
    }
}

struct Watched {
    program: Program,
    delay: Duration,
    /// When the present run began.
    began: Instant,
    /// When it was first seen to have ended.
    ended: Option<Instant>,
}

impl Watched {
    /// Starts the program again when it has been down for the delay.
    async fn look(&mut self) {
        if self.program.end().is_none() {
            self.ended = None;
            return;
        }
        let ended = *self.ended.get_or_insert_with(Instant::now);
        if ended.duration_since(self.began) >= STABLE_AFTER {
            self.delay = FIRST_DELAY;
        }
        if ended.elapsed() < self.delay {
            return;
        }
        self.delay = (self.delay * 2).min(LONGEST_DELAY);
        self.began = Instant::now();
        self.ended = None;
        if let Err(error) = self.program.start_again().await {
            tracing::warn!(%error, "a program of the mesh is not started again yet");
        }
    }
}
