//! When to send PING, and when to close a connection that does not answer. Has neither a clock nor I/O.

use std::time::{Duration, Instant};

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Nothing is due before then.
    Wait(Instant),
    /// Send a PING.
    Ping,
    /// The peer did not answer one.
    Dead,
    /// There was no tunnel for the idle time.
    Idle,
}

/// The shortest time for which a connection that is closing is waited for.
const SHORTEST_CLOSING: Duration = Duration::from_millis(10);

/// The state of one connection. `now` must not go back.
#[derive(Debug)]
pub(crate) struct Keepalive {
    interval: Duration,
    timeout: Duration,
    /// `None` if the connection is closing and waits for its peer without limit.
    idle: Option<Duration>,
    next_ping: Instant,
    unanswered: Option<Instant>,
    quiet: Option<(Instant, u64)>,
}

impl Keepalive {
    pub(crate) fn new(interval: Duration, timeout: Duration, idle: Duration, now: Instant) -> Keepalive {
        Keepalive {
            interval,
            timeout,
            idle: Some(idle),
            next_ping: now + interval,
            unanswered: None,
            quiet: Some((now, 0)),
        }
    }

    /// Whether a PING is unanswered.
    pub(crate) fn is_waiting(&self) -> bool {
        self.unanswered.is_some()
    }

    /// The connection is closing: from now on only an unanswered PING ends it early, or no tunnel for `limit`.
    pub(crate) fn handle_closing(&mut self, limit: Option<Duration>, now: Instant, opened: u64) {
        self.idle = limit.map(|limit| limit.max(SHORTEST_CLOSING));
        self.quiet = Some((now, opened));
    }

    /// Makes a PING due now, unless one is unanswered.
    pub(crate) fn handle_probe(&mut self, now: Instant) {
        self.next_ping = self.next_ping.min(now);
    }

    /// Takes the answer to a PING.
    pub(crate) fn handle_pong(&mut self) {
        self.unanswered = None;
    }

    /// Decides, given the tunnels that are open and how many were ever opened.
    pub(crate) fn poll(&mut self, now: Instant, open: u32, opened: u64) -> Action {
        if self.unanswered.is_some_and(|since| now >= since + self.timeout) {
            return Action::Dead;
        }
        let quiet_since = match self.quiet {
            _ if open > 0 => None,
            Some((since, seen)) if seen == opened => Some(since),
            _ => Some(now),
        };
        self.quiet = quiet_since.map(|since| (since, opened));
        let idle_at = self.idle.map(|idle| quiet_since.unwrap_or(now) + idle);
        if idle_at.is_some_and(|at| now >= at) {
            return Action::Idle;
        }
        if self.unanswered.is_none() && now >= self.next_ping {
            self.unanswered = Some(now);
            self.next_ping = now + self.interval;
            return Action::Ping;
        }
        let life = self.unanswered.map_or(self.next_ping, |since| since + self.timeout);
        Action::Wait(idle_at.map_or(life, |at| at.min(life)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn keepalive(now: Instant) -> Keepalive {
        Keepalive::new(10 * SECOND, 20 * SECOND, 300 * SECOND, now)
    }

    #[test]
    fn an_unanswered_ping_ends_the_connection() {
        let start = Instant::now();
        let mut state = keepalive(start);
        assert_eq!(state.poll(start, 1, 1), Action::Wait(start + 10 * SECOND));
        assert_eq!(state.poll(start + 10 * SECOND, 1, 1), Action::Ping);
        state.handle_pong();
        assert_eq!(state.poll(start + 11 * SECOND, 1, 1), Action::Wait(start + 20 * SECOND));
        assert_eq!(state.poll(start + 20 * SECOND, 1, 1), Action::Ping);
        assert_eq!(state.poll(start + 39 * SECOND, 1, 1), Action::Wait(start + 40 * SECOND));
        assert_eq!(state.poll(start + 40 * SECOND, 1, 1), Action::Dead);
    }

    #[test]
    fn a_probe_is_sent_at_once_and_only_once() {
        let start = Instant::now();
        let mut state = keepalive(start);
        state.handle_probe(start + SECOND);
        assert_eq!(state.poll(start + SECOND, 1, 1), Action::Ping);
        state.handle_probe(start + 2 * SECOND);
        assert_eq!(state.poll(start + 2 * SECOND, 1, 1), Action::Wait(start + 21 * SECOND));
        assert_eq!(state.poll(start + 21 * SECOND, 1, 1), Action::Dead);
    }

    #[test]
    fn only_a_connection_without_tunnels_for_the_whole_time_is_idle() {
        let start = Instant::now();
        let mut state = Keepalive::new(1000 * SECOND, SECOND, 300 * SECOND, start);
        assert_eq!(state.poll(start + 299 * SECOND, 0, 0), Action::Wait(start + 300 * SECOND));
        // A tunnel was opened and closed between two calls.
        assert_eq!(state.poll(start + 300 * SECOND, 0, 1), Action::Wait(start + 600 * SECOND));
        assert_eq!(state.poll(start + 500 * SECOND, 1, 2), Action::Wait(start + 800 * SECOND));
        assert_eq!(state.poll(start + 800 * SECOND, 0, 2), Action::Wait(start + 1000 * SECOND));
        assert_eq!(state.poll(start + 1100 * SECOND, 0, 2), Action::Idle);
    }

    #[test]
    fn a_connection_that_is_closing_is_still_probed() {
        let start = Instant::now();
        let mut state = keepalive(start);
        state.handle_closing(None, start, 0);
        assert_eq!(state.poll(start + 400 * SECOND, 0, 0), Action::Ping);
        assert_eq!(state.poll(start + 400 * SECOND, 0, 0), Action::Wait(start + 420 * SECOND));
        assert_eq!(state.poll(start + 420 * SECOND, 0, 0), Action::Dead);
    }

    #[test]
    fn a_connection_that_is_closing_has_its_limit_from_its_last_tunnel() {
        let start = Instant::now();
        let mut state = Keepalive::new(1000 * SECOND, SECOND, 300 * SECOND, start);
        // It was without tunnels for long before.
        let closing = start + 290 * SECOND;
        state.handle_closing(Some(10 * SECOND), closing, 0);
        assert_eq!(state.poll(closing, 0, 0), Action::Wait(closing + 10 * SECOND));
        assert_eq!(state.poll(closing + 9 * SECOND, 1, 1), Action::Wait(closing + 19 * SECOND));
        assert_eq!(state.poll(closing + 19 * SECOND, 1, 1), Action::Wait(closing + 29 * SECOND));
        assert_eq!(state.poll(closing + 20 * SECOND, 0, 1), Action::Wait(closing + 30 * SECOND));
        assert_eq!(state.poll(closing + 30 * SECOND, 0, 1), Action::Idle);
        state.handle_closing(Some(Duration::ZERO), closing + 30 * SECOND, 1);
        let soon = closing + 30 * SECOND + SHORTEST_CLOSING;
        assert_eq!(state.poll(closing + 30 * SECOND, 0, 1), Action::Wait(soon));
    }
}
