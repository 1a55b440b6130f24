//! The relay between two streams in memory: what it does besides system calls.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use ambit_net::relay::{Counters, relay};
use anyhow::{Result, ensure};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream that gives pieces until it ends, and takes whatever it is given.
struct End {
    piece: usize,
    left: usize,
    ready: bool,
}

impl End {
    fn giving(pieces: usize, piece: usize) -> Self {
        Self { piece, left: pieces * piece, ready: false }
    }
}

impl AsyncRead for End {
    /// As a socket whose peer writes piece by piece: after each there is nothing more for a moment.
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.ready = !self.ready;
        if !self.ready {
            return Poll::Pending;
        }
        let given = self.left.min(self.piece).min(buffer.remaining());
        buffer.initialize_unfilled_to(given);
        buffer.advance(given);
        self.left -= given;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Enough one way for every size of buffer. Pieces are small, as making them is counted too.
pub(crate) fn bulk() -> Result<()> {
    run(End::giving(10_000, 4 << 10), End::giving(0, 0))
}

/// Small pieces both ways.
pub(crate) fn round_trips() -> Result<()> {
    run(End::giving(10_000, 64), End::giving(10_000, 64))
}

fn run(mut downstream: End, mut upstream: End) -> Result<()> {
    let expected = (downstream.left + upstream.left) as u64;
    let moved = guarded_relay(&mut downstream, &mut upstream)?;
    ensure!(moved == expected, "{moved} bytes were relayed");
    Ok(())
}

#[inline(never)]
fn guarded_relay(downstream: &mut End, upstream: &mut End) -> Result<u64> {
    let counters = Counters::new();
    let mut copy = pin!(relay(downstream, upstream, &counters, None));
    let mut context = Context::from_waker(Waker::noop());
    while copy.as_mut().poll(&mut context)?.is_pending() {}
    Ok(counters.total())
}
