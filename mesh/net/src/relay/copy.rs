//! The plain copy in both directions, in one task.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

use super::{Counters, RelayError, Side, Sizing, Tier, buffers, reset_on_close};

/// Bytes that one direction may move before other tasks of the worker get their turn.
const TURN: usize = 1024 * 1024;

/// Copies both ways between two sockets until both directions have ended.
///
/// The end of one direction is passed on as a half-close and the other goes on. When a side fails,
/// the other is made to answer with RST as soon as the caller drops it. Dropping the future stops
/// the copy and leaves both sockets as they are.
///
/// `idle` ends a relay on which nothing moved for that long (up to a half longer).
///
/// # Errors
///
/// [`RelayError`] names the side and the operation that failed.
pub async fn relay_tcp(
    downstream: &mut TcpStream,
    upstream: &mut TcpStream,
    counters: &Counters,
    idle: Option<Duration>,
) -> Result<(), RelayError> {
    let ended = relay(downstream, upstream, counters, idle).await;
    if ended.is_err() {
        for socket in [downstream, upstream] {
            if let Err(error) = reset_on_close(socket) {
                tracing::debug!(%error, "a socket could not be set to reset on close");
            }
        }
    }
    ended
}

/// Copies both ways between any two streams; as [`relay_tcp`], but a failed side is not passed on
/// as a reset, since not every stream has one.
///
/// # Errors
///
/// [`RelayError`] names the side and the operation that failed.
pub async fn relay<A, B>(
    downstream: &mut A,
    upstream: &mut B,
    counters: &Counters,
    idle: Option<Duration>,
) -> Result<(), RelayError>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut sending = Direction::new(Side::Downstream, Side::Upstream);
    let mut receiving = Direction::new(Side::Upstream, Side::Downstream);
    let copy = poll_fn(|cx| {
        let sent = sending.poll(cx, downstream, upstream, |n| counters.add_sent(n))?;
        let received = receiving.poll(cx, upstream, downstream, |n| counters.add_received(n))?;
        match (sent, received) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            _ => Poll::Pending,
        }
    });
    match idle {
        None => copy.await,
        Some(limit) => tokio::select! {
            ended = copy => ended,
            () = counters.idle_for(limit) => Err(RelayError::Idle(limit)),
        },
    }
}

enum Phase {
    Copying,
    Closing,
    Done,
}

struct Direction {
    from: Side,
    to: Side,
    phase: Phase,
    sizing: Sizing,
    waiting: BytesMut,
    tier: Tier,
}

impl Direction {
    fn new(from: Side, to: Side) -> Direction {
        Direction {
            from,
            to,
            phase: Phase::Copying,
            sizing: Sizing::new(),
            waiting: BytesMut::new(),
            tier: Tier::Idle,
        }
    }

    /// Moves what can be moved in one turn. Ready means that this direction has ended in order.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        count: impl Fn(u64),
    ) -> Result<Poll<()>, RelayError>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut moved = 0;
        loop {
            let step = match self.phase {
                Phase::Copying if self.waiting.is_empty() => self.poll_fill(cx, reader)?,
                Phase::Copying => self.poll_drain(cx, writer)?.map(|written| {
                    count(written as u64);
                    moved += written;
                }),
                Phase::Closing => match Pin::new(&mut *writer).poll_shutdown(cx) {
                    Poll::Ready(Ok(())) => {
                        self.phase = Phase::Done;
                        Poll::Ready(())
                    }
                    Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::NotConnected => {
                        self.phase = Phase::Done;
                        Poll::Ready(())
                    }
                    Poll::Ready(Err(source)) => {
                        return Err(RelayError::Write { side: self.to, source });
                    }
                    Poll::Pending => Poll::Pending,
                },
                Phase::Done => return Ok(Poll::Ready(())),
            };
            if step.is_pending() {
                return Ok(Poll::Pending);
            }
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Ok(Poll::Pending);
            }
        }
    }

    fn poll_fill<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
    ) -> Result<Poll<()>, RelayError> {
        self.tier = self.sizing.tier();
        let mut buffer = buffers::take(self.tier);
        let mut room = (&mut buffer).limit(self.tier.read_size());
        match poll_read_buf(Pin::new(reader), cx, &mut room) {
            Poll::Ready(Ok(0)) => {
                buffers::give_back(self.tier, buffer, None);
                self.phase = Phase::Closing;
            }
            Poll::Ready(Ok(read)) => {
                let now = Instant::now();
                self.sizing.record(read, now);
                self.waiting = buffer.split();
                buffers::give_back(self.tier, buffer, Some(now));
            }
            Poll::Ready(Err(source)) => {
                return Err(RelayError::Read { side: self.from, source });
            }
            Poll::Pending => {
                buffers::give_back(self.tier, buffer, None);
                return Ok(Poll::Pending);
            }
        }
        Ok(Poll::Ready(()))
    }

    fn poll_drain<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Result<Poll<usize>, RelayError> {
        let written = match Pin::new(&mut *writer).poll_write(cx, &self.waiting) {
            Poll::Ready(Ok(0)) => Err(io::ErrorKind::WriteZero.into()),
            Poll::Ready(result) => result,
            Poll::Pending => {
                return match Pin::new(writer).poll_flush(cx) {
                    Poll::Ready(Err(source)) => Err(RelayError::Write { side: self.to, source }),
                    _ => Ok(Poll::Pending),
                };
            }
        };
        let written = written.map_err(|source| RelayError::Write { side: self.to, source })?;
        self.waiting.advance(written);
        if self.waiting.is_empty() {
            self.waiting = BytesMut::new();
            // Streams that buffer (TLS) must not keep the end of a message back.
            if let Poll::Ready(Err(source)) = Pin::new(writer).poll_flush(cx) {
                return Err(RelayError::Write { side: self.to, source });
            }
        }
        Ok(Poll::Ready(written))
    }
}
