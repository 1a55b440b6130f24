//! A stream that yields to the other tasks of its worker, meters its bytes, and keeps the cause of its failure.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::overhead::Meter;

/// Bytes that a connection's task reads, and writes, before it yields: about a sixth of a
/// millisecond of encryption and system calls.
const TURN: usize = 256 * 1024;
/// Bytes read in search of a peer's last alert.
const ALERT_ROOM: usize = 4096;
/// Reads of [`ALERT_ROOM`] bytes, at most, before the alert.
const ALERT_READS: usize = 16;

/// Wraps a stream whose socket may never be unready. After each [`TURN`] it is pending once and wakes its task, so that a
/// bulk transfer does not delay the small ones beside it.
#[derive(Debug)]
pub(crate) struct Paced<IO> {
    io: IO,
    to_read: usize,
    to_write: usize,
    meter: Meter,
}

impl<IO> Paced<IO> {
    pub(crate) fn new(io: IO, meter: Meter) -> Paced<IO> {
        Paced { io, to_read: TURN, to_write: TURN, meter }
    }
}

fn poll_turn(left: &mut usize, cx: &Context<'_>) -> Poll<()> {
    if *left > 0 {
        return Poll::Ready(());
    }
    *left = TURN;
    cx.waker().wake_by_ref();
    Poll::Pending
}

impl<IO: AsyncRead + Unpin> AsyncRead for Paced<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(poll_turn(&mut this.to_read, cx));
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        let received = buf.filled().get(before..).unwrap_or_default();
        this.to_read = this.to_read.saturating_sub(received.len());
        this.meter.received(received);
        read.map_err(|error| this.meter.failed(error))
    }
}

impl<IO: AsyncRead + Unpin> Paced<IO> {
    /// A peer that rejects us sends its alert and closes: what then fails may be a write. The alert, which is the cause, is
    /// still to be read; a socket whose peer is gone is readable as soon as the runtime has noticed.
    fn poll_cause(&mut self, cx: &mut Context<'_>, error: io::Error) -> Poll<io::Error> {
        let mut discarded = [0; ALERT_ROOM];
        let is_closed = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
        for _ in 0..ALERT_READS {
            let mut buf = ReadBuf::new(&mut discarded);
            match Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                Poll::Ready(Err(cause)) => return Poll::Ready(self.meter.failed(cause)),
                Poll::Ready(Ok(())) if buf.filled().is_empty() => break,
                Poll::Ready(Ok(())) => {}
                // The write is tried again then, and fails again.
                Poll::Pending if is_closed => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready(self.meter.failed(error))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Paced<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(poll_turn(&mut this.to_write, cx));
        let written = match ready!(Pin::new(&mut this.io).poll_write(cx, buf)) {
            Ok(written) => written,
            Err(error) => return this.poll_cause(cx, error).map(Err),
        };
        this.to_write = this.to_write.saturating_sub(written);
        this.meter.sent(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(poll_turn(&mut this.to_write, cx));
        let written = match ready!(Pin::new(&mut this.io).poll_write_vectored(cx, bufs)) {
            Ok(written) => written,
            Err(error) => return this.poll_cause(cx, error).map(Err),
        };
        this.to_write = this.to_write.saturating_sub(written);
        this.meter.sent(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        match ready!(Pin::new(&mut this.io).poll_flush(cx)) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => this.poll_cause(cx, error).map(Err),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::{Future, poll_fn};

    use tokio::io::{AsyncReadExt, AsyncWriteExt, empty, repeat, sink};

    use super::*;

    /// How often `work` had to be polled.
    fn polls(work: impl Future<Output = ()>) -> usize {
        let count = Cell::new(0);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut work = std::pin::pin!(work);
            poll_fn(|cx| {
                count.set(count.get() + 1);
                work.as_mut().poll(cx)
            })
            .await;
        });
        count.get()
    }

    #[test]
    fn a_stream_that_never_blocks_yields_after_each_turn() {
        let data = vec![0; 64 * 1024];
        let writes = polls(async {
            let mut paced = Paced::new(tokio::io::join(empty(), sink()), Meter::of_server());
            for _ in 0..32 {
                paced.write_all(&data).await.unwrap();
            }
        });
        assert_eq!(writes, 8);
        let reads = polls(async {
            let mut paced = Paced::new(tokio::io::join(repeat(7), sink()), Meter::of_server());
            let mut data = vec![0; 64 * 1024];
            for _ in 0..32 {
                paced.read_exact(&mut data).await.unwrap();
            }
        });
        assert_eq!(reads, 8);
    }

    #[test]
    fn small_amounts_do_not_yield() {
        assert_eq!(
            polls(async {
                let mut paced = Paced::new(tokio::io::join(empty(), sink()), Meter::of_server());
                paced.write_all(b"hello").await.unwrap();
                assert_eq!(paced.read(&mut [0; 8]).await.unwrap(), 0);
            }),
            1
        );
    }
}
