//! What every connection's task does besides HTTP/2 itself: PING, idle limit, window growth, limits of overhead.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::ConnectionSettings;
use crate::keepalive::{Action, Keepalive};
use crate::load::Load;
use crate::overhead::{Overhead, Tally};
use crate::windows::Window;

/// What a connection's task must do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The timer has fired: periodic checks are due.
    Tick,
    /// No tunnel for the idle time, or for the limit of a connection that is closing.
    Idle,
    /// A PING went unanswered.
    PingTimeout,
    /// The peer sent this many frames that carry nothing.
    Overhead(u64),
}

/// The I/O around [`Keepalive`] and [`Window`], polled by the task that owns the connection.
#[derive(Debug)]
pub(crate) struct Maintenance {
    keepalive: Keepalive,
    window: Window,
    overhead: Overhead,
    ping: Option<PingPong>,
    timer: Pin<Box<Sleep>>,
    load: Arc<Load>,
}

impl Maintenance {
    pub(crate) fn new(
        settings: &ConnectionSettings,
        window: Window,
        ping: Option<PingPong>,
        load: Arc<Load>,
        tally: Arc<Tally>,
    ) -> Maintenance {
        let now = Instant::now();
        Maintenance {
            keepalive: Keepalive::new(
                settings.ping_interval,
                settings.ping_timeout,
                settings.idle_timeout,
                now.into_std(),
            ),
            window,
            overhead: Overhead::new(settings.max_overhead, settings.overhead_period, tally, now.into_std()),
            ping,
            timer: Box::pin(sleep_until(now)),
            load,
        }
    }

    /// The connection window to set, if it has changed.
    pub(crate) fn changed_window(&mut self, cx: &Context<'_>) -> Option<u32> {
        self.load.watch(cx);
        self.window.change(self.load.received(), self.load.held())
    }

    /// The connection is closing: from now on only an unanswered PING ends it early, or no tunnel for `limit`, which is
    /// [`Verdict::Idle`] again.
    pub(crate) fn closing(&mut self, limit: Option<Duration>) {
        let now = Instant::now();
        self.keepalive.handle_closing(limit, now.into_std(), self.load.opened());
        self.timer.as_mut().reset(now);
    }

    /// Sends PINGs as they fall due; ready when the connection's task has something to do.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Verdict> {
        if let Some(count) = self.overhead.excess(|| Instant::now().into_std()) {
            return Poll::Ready(Verdict::Overhead(count));
        }
        if self.keepalive.is_waiting() {
            self.poll_pong(cx);
        }
        // Registered before the flag is read, so that a probe requested in between wakes this task.
        self.load.watch(cx);
        if self.load.take_probe_request() {
            let now = Instant::now();
            self.keepalive.handle_probe(now.into_std());
            self.timer.as_mut().reset(now);
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            self.window.retry();
            let now = Instant::now();
            ambit_net::relay::buffers::trim(now.into_std());
            ambit_tls::trim(now.into_std());
            match self.keepalive.poll(now.into_std(), self.load.open(), self.load.opened()) {
                Action::Wait(until) => {
                    self.timer.as_mut().reset(until.into());
                    return Poll::Ready(Verdict::Tick);
                }
                Action::Ping => self.send_ping(cx),
                Action::Dead => return Poll::Ready(Verdict::PingTimeout),
                Action::Idle => return Poll::Ready(Verdict::Idle),
            }
        }
    }

    fn send_ping(&mut self, cx: &mut Context<'_>) {
        let sent = self.ping.as_mut().is_some_and(|ping| ping.send_ping(Ping::opaque()).is_ok());
        if sent {
            self.poll_pong(cx);
        } else {
            // The connection is closing, which its own future reports.
            self.keepalive.handle_pong();
        }
    }

    fn poll_pong(&mut self, cx: &mut Context<'_>) {
        match self.ping.as_mut().map(|ping| ping.poll_pong(cx)) {
            Some(Poll::Pending) => {}
            Some(Poll::Ready(Ok(_))) => {
                self.keepalive.handle_pong();
                self.load.note_alive();
                // The timer was set for the answer. The next deadline may be earlier.
                self.timer.as_mut().reset(Instant::now());
            }
            Some(Poll::Ready(Err(_))) | None => {
                self.ping = None;
                self.keepalive.handle_pong();
            }
        }
    }
}
