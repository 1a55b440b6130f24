//! What every connection's task does beside HTTP/2 itself: PING, idle limit, window growth.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::keepalive::{Action, Keepalive};
use crate::load::Load;
use crate::overhead::{Overhead, Tally};
use crate::windows::Window;
use crate::{Settings, WindowBudget};

/// Why a connection's task is to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// No tunnel for the idle time.
    Idle,
    /// A PING went unanswered.
    PingTimeout,
    /// The peer sent this many frames that move nothing.
    Overhead(u64),
}

/// The shell around [`Keepalive`] and [`Window`], polled by the task that owns the connection.
#[derive(Debug)]
pub(crate) struct Upkeep {
    keepalive: Keepalive,
    window: Window,
    overhead: Overhead,
    ping: Option<PingPong>,
    timer: Pin<Box<Sleep>>,
    load: Arc<Load>,
}

impl Upkeep {
    pub(crate) fn new(
        settings: &Settings,
        budget: WindowBudget,
        ping: Option<PingPong>,
        load: Arc<Load>,
        tally: Arc<Tally>,
    ) -> Upkeep {
        let now = Instant::now();
        Upkeep {
            keepalive: Keepalive::new(
                settings.ping_interval,
                settings.ping_timeout,
                settings.idle_timeout,
                now.into_std(),
            ),
            window: Window::new(settings, budget),
            overhead: Overhead::new(settings.max_overhead, settings.overhead_within, tally, now.into_std()),
            ping,
            timer: Box::pin(sleep_until(now)),
            load,
        }
    }

    /// The connection window to set now, if it is to be another one.
    pub(crate) fn changed_window(&mut self, cx: &Context<'_>) -> Option<u32> {
        self.load.watch(cx);
        self.window.change(self.load.received(), self.load.held())
    }

    /// The connection is closing: only the peer's silence matters from now on.
    pub(crate) fn closing(&mut self) {
        self.keepalive.handle_closing();
        self.timer.as_mut().reset(Instant::now());
    }

    /// Sends PINGs as they fall due; ready when the connection is to end.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Verdict> {
        if let Some(count) = self.overhead.excess(|| Instant::now().into_std()) {
            return Poll::Ready(Verdict::Overhead(count));
        }
        if self.keepalive.is_waiting() {
            self.poll_pong(cx);
        }
        // Before the look, so that a doubt that is raised after it wakes.
        self.load.watch(cx);
        if self.load.take_doubt() {
            let now = Instant::now();
            self.keepalive.handle_doubt(now.into_std());
            self.timer.as_mut().reset(now);
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            ambit_net::relay::buffers::trim(now.into_std());
            ambit_tls::trim(now.into_std());
            match self.keepalive.poll(now.into_std(), self.load.open(), self.load.opened()) {
                Action::Wait(until) => self.timer.as_mut().reset(until.into()),
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
            // The connection is closing and its own future will say so.
            self.keepalive.handle_pong();
        }
    }

    fn poll_pong(&mut self, cx: &mut Context<'_>) {
        match self.ping.as_mut().map(|ping| ping.poll_pong(cx)) {
            Some(Poll::Pending) => {}
            Some(Poll::Ready(Ok(_))) => {
                self.keepalive.handle_pong();
                self.load.note_alive();
            }
            Some(Poll::Ready(Err(_))) | None => {
                self.ping = None;
                self.keepalive.handle_pong();
            }
        }
    }
}
