//! Relaying between two TCP connections without TLS: bulk data by `splice`, small messages by a copy.
//!
//! The same-node hand-over and the passthrough of the node proxy call [`splice`]. A message that fits the
//! thread's scratch buffer costs one read and one write; once a direction fills that buffer it
//! moves pages through a pipe instead. An idle connection holds neither buffer nor pipe.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use crate::pipe::Pipe;
use crate::relay::{Counters, RelayError, Side};
use crate::socket::reset_on_close;

/// A thread's scratch buffer, in bytes; a read that fills it starts splicing.
const SCRATCH: usize = 64 * 1024;
/// A splice that moved less than this ends splicing, in bytes.
const SMALL: usize = 16 * 1024;
/// Bytes that one direction may move before it yields.
const TURN: usize = 4 << 20;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH]);
}

/// Relays both ways until both directions have ended. `counters` are updated as bytes are delivered. An end of
/// data in one direction is passed on as a half-close.
///
/// # Errors
/// [`RelayError`] names the side that failed; both connections are then set to close with a reset, so
/// that both peers see a failure. Dropping the future stops the relay and leaves both unchanged.
pub async fn splice(
    downstream: &mut TcpStream,
    upstream: &mut TcpStream,
    counters: &Counters,
) -> Result<(), RelayError> {
    let mut sending = Direction::new(Side::Downstream, Side::Upstream);
    let mut receiving = Direction::new(Side::Upstream, Side::Downstream);
    let outcome = poll_fn(|cx| {
        let sent = sending.poll(cx, downstream, upstream, &|n| counters.add_sent(n))?;
        let received = receiving.poll(cx, upstream, downstream, &|n| counters.add_received(n))?;
        match (sent, received) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            _ => Poll::Pending,
        }
    })
    .await;
    if outcome.is_err() {
        for stream in [&*downstream, &*upstream] {
            reset_on_close(stream);
        }
    }
    outcome
}

/// A failure of one direction.
enum Broken {
    Read(io::Error),
    Write(io::Error),
}

/// One direction of a relay.
struct Direction {
    from: Side,
    to: Side,
    state: State,
}

#[derive(Default)]
enum State {
    /// Nothing is in transit; the next bytes are read.
    #[default]
    Reading,
    /// Bulk data; the next bytes are spliced.
    Splicing,
    /// Bytes that were read but not completely written, and how many of them are written.
    Leftover(Box<[u8]>, usize),
    /// Bytes in the pipe that are not completely written, and how many there were at first.
    Piped(Pipe, usize),
    /// The source has ended; the end is still to be passed on.
    Ending,
    /// Done.
    Ended,
}

impl Direction {
    fn new(from: Side, to: Side) -> Self {
        Self { from, to, state: State::default() }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut TcpStream,
        to: &mut TcpStream,
        count: &dyn Fn(u64),
    ) -> Poll<Result<(), RelayError>> {
        self.advance(cx, from, to, count).map_err(|broken| match broken {
            Broken::Read(source) => RelayError::Read { side: self.from, source },
            Broken::Write(source) => RelayError::Write { side: self.to, source },
        })
    }

    fn advance(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut TcpStream,
        to: &mut TcpStream,
        count: &dyn Fn(u64),
    ) -> Poll<Result<(), Broken>> {
        let mut moved = 0;
        loop {
            match &mut self.state {
                State::Reading => self.state = ready!(copy(cx, from, to, count, &mut moved))?,
                State::Splicing => self.state = ready!(fill(cx, from))?,
                State::Leftover(bytes, gone) => {
                    let rest = bytes.get(*gone..).unwrap_or_default();
                    let n = ready!(Pin::new(&mut *to).poll_write(cx, rest)).map_err(Broken::Write)?;
                    count(n as u64);
                    moved += n;
                    *gone += n;
                    if *gone >= bytes.len() {
                        self.state = State::Reading;
                    }
                }
                State::Piped(pipe, _) => {
                    let n = ready!(empty(cx, pipe, to))?;
                    count(n as u64);
                    moved += n;
                    if pipe.held == 0 {
                        self.emptied();
                    }
                }
                State::Ending => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))
                        .or_else(ignore_gone)
                        .map_err(Broken::Write)?;
                    self.state = State::Ended;
                }
                State::Ended => return Poll::Ready(Ok(())),
            }
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Returns the empty pipe, and chooses between splicing and copying.
    fn emptied(&mut self) {
        if let State::Piped(pipe, filled) = std::mem::take(&mut self.state) {
            pipe.give_back();
            self.state = if filled < SMALL { State::Reading } else { State::Splicing };
        }
    }
}

/// A half-close to a peer that has closed its connection is not an error.
fn ignore_gone(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotConnected { Ok(()) } else { Err(error) }
}

/// Reads available bytes into the scratch buffer and writes them at once. What the destination does not accept
/// is kept for later.
fn copy(
    cx: &mut Context<'_>,
    from: &mut TcpStream,
    to: &mut TcpStream,
    count: &dyn Fn(u64),
    moved: &mut usize,
) -> Poll<Result<State, Broken>> {
    BUFFER.with_borrow_mut(|scratch| {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(from).poll_read(cx, &mut buffer)).map_err(Broken::Read)?;
        let bytes = buffer.filled();
        if bytes.is_empty() {
            return Poll::Ready(Ok(State::Ending));
        }
        let bulk = bytes.len() == SCRATCH;
        match Pin::new(to).poll_write(cx, bytes) {
            Poll::Ready(Ok(n)) => {
                count(n as u64);
                *moved += n;
                let rest = bytes.get(n..).unwrap_or_default();
                if !rest.is_empty() {
                    return Poll::Ready(Ok(State::Leftover(rest.into(), 0)));
                }
                Poll::Ready(Ok(if bulk { State::Splicing } else { State::Reading }))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(Broken::Write(error))),
            Poll::Pending => Poll::Ready(Ok(State::Leftover(bytes.into(), 0))),
        }
    })
}

/// Splices available bytes into an empty pipe. If there are few, the next round copies again.
fn fill(cx: &mut Context<'_>, from: &TcpStream) -> Poll<Result<State, Broken>> {
    loop {
        ready!(from.poll_read_ready(cx)).map_err(Broken::Read)?;
        let Ok(mut pipe) = Pipe::take() else {
            // Without descriptors for a pipe, copying goes on.
            return Poll::Ready(Ok(State::Reading));
        };
        let spliced =
            from.try_io(Interest::READABLE, || splice_now(from.as_raw_fd(), pipe.write_end(), pipe.capacity));
        match spliced {
            Ok(0) => {
                pipe.give_back();
                return Poll::Ready(Ok(State::Ending));
            }
            Ok(n) => {
                pipe.held = n;
                return Poll::Ready(Ok(State::Piped(pipe, n)));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => pipe.give_back(),
            Err(error) => return Poll::Ready(Err(Broken::Read(error))),
        }
    }
}

/// Splices from the pipe into the destination.
fn empty(cx: &mut Context<'_>, pipe: &mut Pipe, to: &TcpStream) -> Poll<Result<usize, Broken>> {
    loop {
        ready!(to.poll_write_ready(cx)).map_err(Broken::Write)?;
        let spliced =
            to.try_io(Interest::WRITABLE, || splice_now(pipe.read_end(), to.as_raw_fd(), pipe.held));
        match spliced {
            Ok(0) => return Poll::Ready(Err(Broken::Write(io::ErrorKind::WriteZero.into()))),
            Ok(n) => {
                pipe.held = pipe.held.saturating_sub(n);
                return Poll::Ready(Ok(n));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err(Broken::Write(error))),
        }
    }
}

#[allow(unsafe_code, reason = "splice(2) takes raw descriptors and optional offsets")]
fn splice_now(from: RawFd, to: RawFd, len: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    loop {
        // SAFETY: both descriptors are open while their owners are borrowed by the caller; no offsets are passed.
        let n = unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), len, flags) };
        if let Ok(n) = usize::try_from(n) {
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
