//! The byte stream of a client's HTTP connection, which is closed as a whole, with the bytes that were read ahead and the
//! deadlines of its connection.
//!
//! Dropping it resets it, and the reset would overtake an answer that was written last. So what carries it is handed back
//! to its [`Remains`] while those exist: their owner decides how it ends. An upgraded connection outlives them; then
//! it is shut down by a task of its own.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::{Sleep, sleep, sleep_until};

use crate::activity::{Activity, Exceeded};
use crate::client::Client;

/// What carries a client's HTTP.
#[derive(Debug)]
pub struct ClientStream {
    first: Bytes,
    transport: Option<Client>,
    activity: Arc<Activity>,
    /// Whether the deadlines of the connection end a read that waits. They do not where another part of the program watches them.
    has_deadlines: bool,
    timer: Option<Pin<Box<Sleep>>>,
    /// Runs while the client takes nothing of what is sent to it.
    stall: Option<Pin<Box<Sleep>>>,
    remains: Weak<Mutex<Option<Client>>>,
}

/// What is left of a [`ClientStream`] that was dropped before its end.
#[derive(Debug, Default)]
pub struct Remains(Arc<Mutex<Option<Client>>>);

impl Remains {
    /// What carried the stream, if that was dropped and has not been shut down.
    pub fn take(&self) -> Option<Client> {
        self.0.lock().take()
    }
}

impl ClientStream {
    /// `first` comes before what `transport` still gives. A read that waits fails once a bound of `activity` has been passed.
    pub fn new(first: Bytes, transport: Client, activity: Arc<Activity>) -> (Self, Remains) {
        let remains = Remains::default();
        let handed_back = Arc::downgrade(&remains.0);
        let stream = Self {
            first,
            transport: Some(transport),
            activity,
            has_deadlines: true,
            timer: None,
            stall: None,
            remains: handed_back,
        };
        (stream, remains)
    }

    /// The same without deadlines: bytes are counted only.
    pub fn without_deadlines(first: Bytes, transport: Client, activity: Arc<Activity>) -> (Self, Remains) {
        let (mut stream, remains) = Self::new(first, transport, activity);
        stream.has_deadlines = false;
        (stream, remains)
    }

    fn io(self: Pin<&mut Self>) -> io::Result<Pin<&mut Client>> {
        self.get_mut().transport.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::BrokenPipe.into())
    }

    /// Called while nothing can be written: fails once the client has taken nothing for too long.
    fn poll_stall<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let activity = &self.activity;
        let timer = self.stall.get_or_insert_with(|| Box::pin(sleep(activity.write_limit())));
        ready!(timer.as_mut().poll(cx));
        self.activity.exceed(Exceeded::Write);
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// Called while nothing can be read: fails once a bound of the connection has been passed.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.has_deadlines {
            return Poll::Pending;
        }
        let activity = &self.activity;
        let Some(due) = activity.deadline() else { return Poll::Pending };
        let due = due.into();
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        // A timer that is too early looks again; it costs less than to set it for each request.
        if timer.deadline() > due {
            timer.as_mut().reset(due);
        }
        while timer.as_mut().poll(cx).is_ready() {
            if activity.check(Instant::now()).is_some() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            let Some(due) = activity.deadline() else { return Poll::Pending };
            timer.as_mut().reset(due.into());
        }
        Poll::Pending
    }
}

impl Drop for ClientStream {
    fn drop(&mut self) {
        let Some(mut transport) = self.transport.take() else { return };
        if let Some(remains) = self.remains.upgrade() {
            *remains.lock() = Some(transport);
        } else if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            // A client that has gone away needs no end.
            runtime.spawn(async move { drop(transport.shutdown().await) });
        }
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.first.is_empty() {
            let taken = this.first.len().min(buf.remaining());
            buf.put_slice(this.first.get(..taken).unwrap_or_default());
            this.first.advance(taken);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let Some(transport) = &mut this.transport else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        if Pin::new(transport).poll_read(cx, buf)?.is_pending() {
            return this.poll_deadline(cx);
        }
        if buf.filled().len() > before {
            this.activity.count_move();
            if this.has_deadlines {
                this.activity.handle_bytes(Instant::now());
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let Poll::Ready(written) = self.as_mut().io()?.poll_write(cx, buf) else {
            return self.poll_stall(cx);
        };
        self.stall = None;
        self.activity.count_move();
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Poll::Ready(flushed) = self.as_mut().io()?.poll_flush(cx) else { return self.poll_stall(cx) };
        self.stall = None;
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = ready!(self.as_mut().io()?.poll_shutdown(cx));
        self.get_mut().transport = None;
        Poll::Ready(ended)
    }
}
