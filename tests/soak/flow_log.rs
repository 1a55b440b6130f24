//! The outcome of every request: counts for each second, latencies, and each failure.
//!
//! The flows write, the sampler and the report read. A failure is judged only at the end, when it is known which
//! node proxy was killed when.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

/// Failures that are kept in full; all are counted.
const KEPT_FAILURES: usize = 5_000;
/// How long after the death of a proxy the end of a connection through it may be noticed: kept connections
/// speak every few seconds only.
const NOTICED: Duration = Duration::from_secs(12);

/// What is known of a flow for good.
#[derive(Clone, Debug)]
pub(crate) struct Title {
    /// Its row in the report.
    pub(crate) name: &'static str,
    /// Whether its requests are on kept connections.
    pub(crate) kept: bool,
    /// Whether its latencies are those of small requests.
    pub(crate) small: bool,
    /// Nodes whose proxies carry it.
    pub(crate) nodes: &'static [usize],
}

/// A request that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// The flow's index.
    pub(crate) flow: usize,
    /// When its connection was asked for.
    pub(crate) asked: Instant,
    /// When it failed.
    pub(crate) failed: Instant,
    /// How.
    pub(crate) kind: io::ErrorKind,
    /// The same in words.
    pub(crate) error: String,
}

/// A node proxy that was killed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kill {
    /// Its node.
    pub(crate) node: usize,
    /// Just before the signal.
    pub(crate) before: Instant,
    /// Once the process was gone.
    pub(crate) gone: Instant,
}

/// Successes and failures of one second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Second {
    /// Requests that were answered.
    pub(crate) answered: u32,
    /// Requests that failed.
    pub(crate) failed: u32,
}

/// Counts of one flow.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    /// Requests that were answered.
    pub(crate) answered: u64,
    /// Requests that failed.
    pub(crate) failed: u64,
    /// DNS questions that were asked once more before they were answered.
    pub(crate) asked_again: u64,
    /// Connections opened.
    pub(crate) connections: u64,
    /// Latencies of all answered requests, microseconds, in the order of their ends.
    pub(crate) latencies: Vec<u32>,
}

/// Everything that is written down.
#[derive(Debug)]
pub(crate) struct FlowLog {
    /// When the first load began; all times of the report are since then.
    pub(crate) start: Instant,
    /// The flows, by index.
    pub(crate) titles: Vec<Title>,
    pages: Mutex<Pages>,
    /// The worst that a timer of this process was late by since it was asked for, microseconds.
    late: AtomicU64,
}

#[derive(Debug)]
struct Pages {
    counts: Vec<Counts>,
    seconds: Vec<Second>,
    failures: Vec<Failure>,
    kills: Vec<Kill>,
}

impl FlowLog {
    /// An empty one.
    pub(crate) fn new(titles: Vec<Title>) -> Self {
        let pages = Pages {
            counts: vec![Counts::default(); titles.len()],
            seconds: Vec::new(),
            failures: Vec::new(),
            kills: Vec::new(),
        };
        Self { start: Instant::now(), titles, pages: Mutex::new(pages), late: AtomicU64::new(0) }
    }

    /// Writes down a request of flow `flow`: `asked` is when its connection was asked for, `began` when it was.
    pub(crate) fn record(&self, flow: usize, asked: Instant, began: Instant, outcome: io::Result<()>) {
        let now = Instant::now();
        let second = usize::try_from((now - self.start).as_secs()).unwrap_or(usize::MAX);
        let mut pages = self.pages.lock();
        let pages = &mut *pages;
        if pages.seconds.len() <= second {
            pages.seconds.resize(second + 1, Second::default());
        }
        let (Some(counts), Some(second)) = (pages.counts.get_mut(flow), pages.seconds.get_mut(second)) else {
            return;
        };
        match outcome {
            Ok(()) => {
                counts.answered += 1;
                second.answered += 1;
                counts.latencies.push(u32::try_from((now - began).as_micros()).unwrap_or(u32::MAX));
            }
            Err(error) => {
                counts.failed += 1;
                second.failed += 1;
                if pages.failures.len() < KEPT_FAILURES {
                    let (kind, error) = (error.kind(), error.to_string());
                    pages.failures.push(Failure { flow, asked, failed: now, kind, error });
                }
            }
        }
    }

    /// Notes how late a timer was.
    pub(crate) fn note_late(&self, late: Duration) {
        self.late.fetch_max(u64::try_from(late.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The worst lateness of a timer since this was asked for last, milliseconds.
    pub(crate) fn take_late(&self) -> u64 {
        self.late.swap(0, Ordering::Relaxed) / 1000
    }

    /// Counts a connection that was opened.
    pub(crate) fn connected(&self, flow: usize) {
        if let Some(counts) = self.pages.lock().counts.get_mut(flow) {
            counts.connections += 1;
        }
    }

    /// Counts a DNS question that is asked once more.
    pub(crate) fn asked_again(&self, flow: usize) {
        if let Some(counts) = self.pages.lock().counts.get_mut(flow) {
            counts.asked_again += 1;
        }
    }

    /// Writes down that a node proxy was killed.
    pub(crate) fn killed(&self, kill: Kill) {
        self.pages.lock().kills.push(kill);
    }

    /// How many latencies each flow has; a mark for [`since`](Self::since).
    pub(crate) fn mark(&self) -> Vec<usize> {
        self.pages.lock().counts.iter().map(|counts| counts.latencies.len()).collect()
    }

    /// Sorted latencies of small requests that ended since a mark, microseconds.
    pub(crate) fn since(&self, mark: &[usize]) -> Vec<u32> {
        let pages = self.pages.lock();
        let flows = self.titles.iter().zip(&pages.counts).zip(mark);
        let small = flows.filter(|((title, _), _)| title.small);
        let mut latencies: Vec<u32> = small
            .flat_map(|((_, counts), from)| counts.latencies.get(*from..).unwrap_or_default())
            .copied()
            .collect();
        drop(pages);
        latencies.sort_unstable();
        latencies
    }

    /// Counts of all flows, by index.
    pub(crate) fn counts(&self) -> Vec<Counts> {
        self.pages.lock().counts.clone()
    }

    /// All seconds so far, the current one excluded.
    pub(crate) fn seconds(&self) -> Vec<Second> {
        let pages = self.pages.lock();
        pages.seconds.get(..pages.seconds.len().saturating_sub(1)).unwrap_or_default().to_vec()
    }

    /// The failures, those that the death of a proxy explains apart.
    pub(crate) fn failures(&self) -> Failures {
        let pages = self.pages.lock();
        let explained = |failure: &&Failure| pages.kills.iter().any(|kill| self.is_explained(failure, kill));
        let (by_kill, other): (Vec<&Failure>, Vec<&Failure>) = pages.failures.iter().partition(explained);
        let recorded = pages.failures.len() as u64;
        let kept = |failure: &&&Failure| self.titles.get(failure.flow).is_some_and(|title| title.kept);
        let failed: u64 = pages.counts.iter().map(|counts| counts.failed).sum();
        Failures {
            kept_by_kill: by_kill.iter().filter(kept).count() as u64,
            new_by_kill: by_kill.iter().filter(|failure| !kept(failure)).count() as u64,
            errors: other.into_iter().cloned().collect(),
            unrecorded: failed.saturating_sub(recorded),
        }
    }

    /// Whether a failure is that of a connection through a process that was killed: it was asked for before the
    /// death, and it was closed, soon after it. What was asked for later, or was refused, or hung, is an error.
    fn is_explained(&self, failure: &Failure, kill: &Kill) -> bool {
        let closed =
            [io::ErrorKind::ConnectionReset, io::ErrorKind::UnexpectedEof, io::ErrorKind::BrokenPipe];
        let touches = self.titles.get(failure.flow).is_some_and(|title| title.nodes.contains(&kill.node));
        touches
            && failure.asked <= kill.gone
            && failure.failed >= kill.before
            && failure.failed <= kill.gone + NOTICED
            && closed.contains(&failure.kind)
    }
}

/// What failed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Failures {
    /// Requests on kept connections that a killed proxy took with it.
    pub(crate) kept_by_kill: u64,
    /// Requests on new connections that a killed proxy had accepted.
    pub(crate) new_by_kill: u64,
    /// All others: errors.
    pub(crate) errors: Vec<Failure>,
    /// Errors that were counted but not recorded.
    pub(crate) unrecorded: u64,
}

impl Failures {
    /// How many errors there are.
    pub(crate) fn count(&self) -> u64 {
        self.errors.len() as u64 + self.unrecorded
    }
}

/// The `q` quantile of sorted values.
pub(crate) fn quantile(sorted: &[u32], q: f64) -> u32 {
    let index = ((sorted.len() as f64) * q) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow_log() -> FlowLog {
        let title = |name, kept| Title { name, kept, small: true, nodes: &[1] };
        FlowLog::new(vec![title("new", false), title("kept", true)])
    }

    fn reset() -> io::Result<()> {
        Err(io::ErrorKind::ConnectionReset.into())
    }

    #[test]
    fn only_accepted_connections_are_explained_by_a_proxys_death() {
        let flow_log = flow_log();
        let asked = Instant::now();
        let kill = Kill { node: 1, before: Instant::now(), gone: Instant::now() };
        flow_log.killed(kill);
        flow_log.record(1, asked, asked, reset());
        flow_log.record(0, asked, asked, reset());
        let later = Instant::now();
        flow_log.record(0, later, later, reset());
        flow_log.record(1, asked, asked, Err(io::ErrorKind::TimedOut.into()));
        let failures = flow_log.failures();
        assert_eq!((failures.kept_by_kill, failures.new_by_kill, failures.count()), (1, 1, 2));
    }

    #[test]
    fn the_death_of_a_proxy_explains_nothing_on_another_node() {
        let flow_log = flow_log();
        let asked = Instant::now();
        flow_log.killed(Kill { node: 0, before: asked, gone: Instant::now() });
        flow_log.record(1, asked, asked, reset());
        assert_eq!(flow_log.failures().count(), 1);
    }
}
