//! Taps: clients of the admin server that follow the records of the access log while they are connected.
//!
//! A record is offered to each tap whose [`Filter`] it matches, on the thread that made it, through a bounded queue. A tap that does
//! not keep up loses records, and its stream says how many. Nobody taps most of the time; then a record costs one relaxed load.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::body::{Body, Frame};
use tokio::sync::mpsc;
use tokio::time::{Interval, MissedTickBehavior};

use super::filter::Filter;
use super::{Format, Record};
use crate::Registry;

/// Taps at once.
const MAX_TAPS: usize = 8;
/// Records that wait for a tap; more are dropped and counted.
const QUEUE: usize = 1024;
/// Records in one piece of a stream.
const PIECE: usize = 64;
/// How often an empty line is sent, so that a client that went without a word is found out.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// There are as many taps as may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_TAPS} clients tap this proxy already")]
pub struct TooManyTaps;

/// All taps of a log. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Taps(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// How many there are; read for each record.
    open: AtomicUsize,
    listeners: ArcSwap<Vec<Arc<Listener>>>,
    refused: AtomicU64,
    dropped: AtomicU64,
}

#[derive(Debug)]
struct Listener {
    filter: Filter,
    queue: mpsc::Sender<Arc<Record>>,
    /// Records that its stream has not reported as dropped yet.
    dropped: AtomicU64,
}

impl Taps {
    /// Whether there is one.
    pub fn is_open(&self) -> bool {
        self.0.open.load(Ordering::Relaxed) > 0
    }

    /// Opens one, until it is dropped.
    ///
    /// # Errors
    /// There are as many as may be.
    pub fn open(&self, filter: Filter) -> Result<Tap, TooManyTaps> {
        let counted = self
            .0
            .open
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |open| (open < MAX_TAPS).then_some(open + 1));
        if counted.is_err() {
            self.0.refused.fetch_add(1, Ordering::Relaxed);
            return Err(TooManyTaps);
        }
        let (queue, records) = mpsc::channel(QUEUE);
        let listener = Arc::new(Listener { filter, queue, dropped: AtomicU64::new(0) });
        self.0.listeners.rcu(|all| all.iter().cloned().chain([listener.clone()]).collect::<Vec<_>>());
        Ok(Tap { shared: self.0.clone(), listener, records })
    }

    /// Passes a record to those that want it. Never blocks.
    pub(super) fn offer(&self, record: &Arc<Record>) {
        for listener in self.0.listeners.load().iter().filter(|listener| listener.filter.matches(record)) {
            if listener.queue.try_send(record.clone()).is_err() {
                listener.dropped.fetch_add(1, Ordering::Relaxed);
                self.0.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn register(&self, registry: &Registry) {
        let (open, refused, dropped) = (self.0.clone(), self.0.clone(), self.0.clone());
        registry.gauge_from("ambit_taps", "Clients that follow live connections and requests", move || {
            i64::try_from(open.open.load(Ordering::Relaxed)).unwrap_or(i64::MAX)
        });
        let help = "Taps refused because there were too many";
        registry.counter_from("ambit_taps_refused", help, move || refused.refused.load(Ordering::Relaxed));
        let help = "Records that a tap missed because it did not keep up";
        registry
            .counter_from("ambit_tap_records_dropped", help, move || dropped.dropped.load(Ordering::Relaxed));
    }
}

/// The receiving end of a tap.
#[derive(Debug)]
pub struct Tap {
    shared: Arc<Shared>,
    listener: Arc<Listener>,
    records: mpsc::Receiver<Arc<Record>>,
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.shared
            .listeners
            .rcu(|all| all.iter().filter(|it| !Arc::ptr_eq(it, &self.listener)).cloned().collect::<Vec<_>>());
        self.shared.open.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Tap {
    /// The body of an answer: one JSON object a line, as in the access log with `status` added; `{"dropped":N}` for records that were
    /// lost; an empty line now and then. It has no end.
    pub fn into_lines(self) -> TapLines {
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        TapLines { tap: self, heartbeat }
    }
}

/// See [`Tap::into_lines`].
#[derive(Debug)]
pub struct TapLines {
    tap: Tap,
    heartbeat: Interval,
}

impl Body for TapLines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let mut piece = Vec::new();
        for _ in 0..PIECE {
            match self.tap.records.poll_recv(cx) {
                Poll::Ready(Some(record)) => render(&record, &mut piece),
                // The sender lives as long as the tap.
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => break,
            }
        }
        let dropped = self.tap.listener.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            piece.extend_from_slice(format!("{{\"dropped\":{dropped}}}\n").as_bytes());
        }
        if piece.is_empty() {
            if self.heartbeat.poll_tick(cx).is_pending() {
                return Poll::Pending;
            }
            piece.push(b'\n');
        }
        Poll::Ready(Some(Ok(Frame::data(piece.into()))))
    }
}

fn render(record: &Record, piece: &mut Vec<u8>) {
    record.render(Format::Json, piece);
    // In front of the brace and the newline that end the object.
    piece.truncate(piece.len().saturating_sub(2));
    piece.extend_from_slice(format!(",\"status\":\"{}\"}}\n", record.status().as_str()).as_bytes());
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use serde_json::Value;

    use super::super::{AccessLog, Dialled, Direction, Entry, Party, Status};
    use super::*;
    use crate::http::Query;

    fn entry(status: Status) -> Entry {
        Entry {
            source: Party::default(),
            destination: Party::default(),
            hbone_addr: None,
            service: None,
            dialled: Dialled::default(),
            is_udp: false,
            direction: Direction::Outbound,
            status,
            bytes_sent: 7,
            bytes_received: 0,
            duration: Duration::ZERO,
            error: None,
            was_observed: false,
        }
    }

    /// The objects of the next piece.
    async fn next(lines: &mut TapLines) -> Vec<Value> {
        let frame = lines.frame().await.unwrap().unwrap();
        let text = String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap();
        text.lines().filter(|line| !line.is_empty()).map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[tokio::test]
    async fn a_tap_sees_what_its_filter_wants_while_it_is_open() {
        let log = AccessLog::disabled();
        assert!(!log.is_enabled());
        let filter = Filter::parse(&Query::parse("status=denied")).unwrap();
        let mut lines = log.taps().open(filter).unwrap().into_lines();
        assert!(log.is_enabled());
        log.log(entry(Status::Ok));
        log.log(entry(Status::Denied));
        let seen = next(&mut lines).await;
        assert_eq!(seen.len(), 1, "{seen:?}");
        assert_eq!((seen[0]["status"].as_str(), seen[0]["bytes_sent"].as_u64()), (Some("denied"), Some(7)));
        drop(lines);
        assert!(!log.is_enabled());
    }

    #[tokio::test]
    async fn what_a_slow_tap_misses_is_counted_and_said() {
        let log = AccessLog::disabled();
        let mut lines = log.taps().open(Filter::default()).unwrap().into_lines();
        for _ in 0..QUEUE + 5 {
            log.log(entry(Status::Ok));
        }
        let seen = next(&mut lines).await;
        assert_eq!(seen.len(), PIECE + 1);
        assert_eq!(seen.last().unwrap()["dropped"], 5);
        assert_eq!(log.taps().0.dropped.load(Ordering::Relaxed), 5);
        assert_eq!(next(&mut lines).await.len(), PIECE, "said once");
    }

    #[tokio::test]
    async fn only_so_many_taps_are_open_at_once() {
        let taps = Taps::default();
        let mut open: Vec<Tap> = (0..MAX_TAPS).map(|_| taps.open(Filter::default()).unwrap()).collect();
        assert!(taps.open(Filter::default()).is_err());
        open.pop();
        assert!(taps.open(Filter::default()).is_ok());
        assert_eq!(taps.0.refused.load(Ordering::Relaxed), 1);
    }
}
