//! The relay between a socket and a tunnel: the hot path of every tunnelled connection.
//!
//! One task serves both directions. Towards the tunnel, one read of up to 256 KiB becomes one piece;
//! towards the socket, everything that has arrived is written by one vectored write, and only then
//! is window credit given back, so a slow application delays only its own sender.
//! Buffers belong to the worker (see [`ambit_net::relay::buffers`]); an idle relay holds none.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use ambit_net::relay::{Counters, RelayError, Side, Sizing, buffers};
use ambit_net::socket::reset_on_close;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

use crate::Tunnel;
use crate::load::Lease;
use crate::tunnel::{io_error, poll_room};

/// Bytes that one direction may move before it yields to other tasks of the worker.
const TURN: usize = 256 * 1024;
/// Pieces in one vectored write; the kernel accepts 1024.
const SLICES: usize = 64;
/// Received pieces below this size are merged: thousands of tiny ones may wait for a slow reader.
const SMALL: usize = 1024;
/// Slots for received pieces that an idle relay keeps, so that a message costs no allocation.
const IDLE_SLOTS: usize = 4;

/// Moves bytes between `socket` and `tunnel` until both directions have ended.
///
/// The end of one direction is passed on as a half-close and the other goes on. When the socket
/// fails, the tunnel is reset; when the tunnel is reset or lost, the socket is made to answer with
/// RST once the caller drops it. Dropping the future resets the tunnel and leaves the socket as it is.
///
/// `socket_side` says which side of the proxied connection the socket is, and so which way `counters` count.
///
/// # Errors
///
/// [`RelayError`] names the side and the operation that failed.
pub fn relay<'a>(
    socket: &'a mut TcpStream,
    socket_side: Side,
    tunnel: Tunnel,
    counters: &'a Counters,
) -> impl Future<Output = Result<(), RelayError>> + Send + use<'a> {
    // Built outside of the future, which would otherwise also reserve room for the tunnel: most relays are idle, so their
    // size matters.
    let mut state = Relay::new(socket_side, tunnel);
    poll_fn(move |cx| {
        let ended = state.poll(cx, socket, counters);
        if let Poll::Ready(Err(_)) = &ended {
            state.pass_on(socket);
        }
        ended
    })
}

/// The state of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// The end has been read; it is still to be passed on.
    Ending,
    Done,
}

struct Relay {
    socket_side: Side,
    tunnel_side: Side,
    send: SendStream<Bytes>,
    recv: RecvStream,
    lease: Lease,
    up: Phase,
    up_sizing: Sizing,
    down: Phase,
    down_sizing: Sizing,
    waiting: Waiting,
}

impl Relay {
    fn new(socket_side: Side, tunnel: Tunnel) -> Relay {
        let Tunnel { send, recv, lease, .. } = tunnel;
        Relay {
            socket_side,
            tunnel_side: match socket_side {
                Side::Downstream => Side::Upstream,
                Side::Upstream => Side::Downstream,
            },
            send,
            recv,
            lease,
            up: Phase::Open,
            up_sizing: Sizing::new(),
            down: Phase::Open,
            down_sizing: Sizing::new(),
            waiting: Waiting::default(),
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut TcpStream,
        counters: &Counters,
    ) -> Poll<Result<(), RelayError>> {
        // The direction to the socket comes first, because it reports why a tunnel was reset.
        let down = self.poll_down(cx, socket, counters)?;
        let up = self.poll_up(cx, socket, counters)?;
        if down.is_ready() && up.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    /// Socket to tunnel.
    fn poll_up(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut TcpStream,
        counters: &Counters,
    ) -> Result<Poll<()>, RelayError> {
        let mut moved = 0;
        while self.up == Phase::Open {
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Ok(Poll::Pending);
            }
            match poll_room(&mut self.send, cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Ok(self.stop_sending()),
                Poll::Pending => return Ok(Poll::Pending),
            }
            let Poll::Ready(piece) = self.poll_read(cx, socket)? else {
                return Ok(self.poll_stopped(cx));
            };
            let (length, ended) = (piece.len(), piece.is_empty());
            if self.send.send_data(piece, ended).is_err() {
                return Ok(self.stop_sending());
            }
            if ended {
                self.up = Phase::Done;
            }
            moved += length;
            match self.socket_side {
                Side::Downstream => counters.add_sent(length as u64),
                Side::Upstream => counters.add_received(length as u64),
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Called while the socket is not readable: whether the peer has reset our direction after it ended its own.
    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.down == Phase::Done && self.send.poll_reset(cx).is_ready() {
            return self.stop_sending();
        }
        Poll::Pending
    }

    /// The peer accepts no more bytes. The other direction reports whether that was an end or a failure.
    fn stop_sending(&mut self) -> Poll<()> {
        self.up = Phase::Done;
        Poll::Ready(())
    }

    /// One read; an empty piece is the end.
    fn poll_read(&mut self, cx: &mut Context<'_>, socket: &mut TcpStream) -> Result<Poll<Bytes>, RelayError> {
        let tier = self.up_sizing.tier();
        let mut buffer = buffers::take(tier);
        let mut room = (&mut buffer).limit(tier.read_size());
        let read = match poll_read_buf(Pin::new(socket), cx, &mut room) {
            Poll::Ready(Ok(read)) => read,
            Poll::Ready(Err(source)) => return Err(RelayError::Read { side: self.socket_side, source }),
            Poll::Pending => {
                buffers::give_back(tier, buffer, None);
                return Ok(Poll::Pending);
            }
        };
        let now = Instant::now();
        self.lease.record(&mut self.up_sizing, read, now);
        let piece = buffer.split().freeze();
        buffers::give_back(tier, buffer, Some(now));
        Ok(Poll::Ready(piece))
    }

    /// Tunnel to socket.
    fn poll_down(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut TcpStream,
        counters: &Counters,
    ) -> Result<Poll<()>, RelayError> {
        let mut moved = 0;
        loop {
            self.poll_receive(cx)?;
            if self.waiting.is_empty() {
                return match self.down {
                    Phase::Open => Ok(Poll::Pending),
                    Phase::Ending => self.poll_end(cx, socket),
                    Phase::Done => Ok(Poll::Ready(())),
                };
            }
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Ok(Poll::Pending);
            }
            let Poll::Ready(written) = self
                .waiting
                .poll_write(cx, socket)
                .map_err(|source| RelayError::Write { side: self.socket_side, source })?
            else {
                // Held bytes are added to the connection window, so that a slow application does not shrink the window of other tunnels.
                self.lease.set_held(self.waiting.bytes);
                return Ok(Poll::Pending);
            };
            moved += written;
            self.written(written, counters)?;
        }
    }

    /// Receives everything that has arrived. Bounded by the stream's window, which is not reopened until the
    /// bytes are written.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Result<(), RelayError> {
        while self.down == Phase::Open {
            match self.recv.poll_data(cx) {
                Poll::Ready(Some(Ok(piece))) => self.waiting.push(piece),
                Poll::Ready(Some(Err(error))) => {
                    return Err(RelayError::Read { side: self.tunnel_side, source: io_error(error) });
                }
                Poll::Ready(None) => self.down = Phase::Ending,
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    fn poll_end(&mut self, cx: &mut Context<'_>, socket: &mut TcpStream) -> Result<Poll<()>, RelayError> {
        match Pin::new(socket).poll_shutdown(cx) {
            Poll::Pending => Ok(Poll::Pending),
            Poll::Ready(Ok(())) => {
                self.down = Phase::Done;
                Ok(Poll::Ready(()))
            }
            // The application has already closed.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::NotConnected => {
                self.down = Phase::Done;
                Ok(Poll::Ready(()))
            }
            Poll::Ready(Err(source)) => Err(RelayError::Write { side: self.socket_side, source }),
        }
    }

    fn written(&mut self, bytes: usize, counters: &Counters) -> Result<(), RelayError> {
        self.lease.record(&mut self.down_sizing, bytes, Instant::now());
        self.lease.add_received(bytes);
        self.lease.set_held(0);
        match self.socket_side {
            Side::Downstream => counters.add_received(bytes as u64),
            Side::Upstream => counters.add_sent(bytes as u64),
        }
        self.recv
            .flow_control()
            .release_capacity(bytes)
            .map_err(|error| RelayError::Read { side: self.tunnel_side, source: io_error(error) })
    }

    /// Signals a failure to the other side.
    fn pass_on(&mut self, socket: &TcpStream) {
        // RFC 9113 §8.5: a TCP error becomes CONNECT_ERROR, a stream error becomes RST.
        self.send.send_reset(Reason::CONNECT_ERROR);
        // After a delivered end, RST would only discard what is still unread.
        if self.down != Phase::Done {
            reset_on_close(socket);
        }
    }
}

/// Pieces that have arrived and are not written yet; at most the stream's window.
#[derive(Default)]
struct Waiting {
    pieces: VecDeque<Bytes>,
    small: BytesMut,
    bytes: usize,
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Adds a piece. The first one is kept as it is; small ones behind others are merged.
    fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        let behind_others = !self.is_empty();
        self.bytes += piece.len();
        if behind_others && piece.len() < SMALL {
            self.small.extend_from_slice(&piece);
            return;
        }
        self.settle();
        self.pieces.push_back(piece);
    }

    /// Moves merged bytes into the queue.
    fn settle(&mut self) {
        if !self.small.is_empty() {
            self.pieces.push_back(self.small.split().freeze());
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, socket: &mut TcpStream) -> Poll<io::Result<usize>> {
        self.settle();
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut used = 0;
        for (slot, piece) in slices.iter_mut().zip(&self.pieces) {
            *slot = IoSlice::new(piece);
            used += 1;
        }
        let slices = slices.get(..used).unwrap_or_default();
        let written = std::task::ready!(Pin::new(socket).poll_write_vectored(cx, slices))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.advance(written);
        Poll::Ready(Ok(written))
    }

    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(first) = self.pieces.front_mut() {
            if written < first.len() {
                first.advance(written);
                return;
            }
            written -= first.len();
            self.pieces.pop_front();
        }
        // An idle relay holds next to nothing.
        self.pieces.shrink_to(IDLE_SLOTS);
        self.small = BytesMut::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pieces_behind_others_are_merged_in_order() {
        let mut waiting = Waiting::default();
        waiting.push(Bytes::from_static(b"first"));
        for _ in 0..3 {
            waiting.push(Bytes::from_static(b"ab"));
        }
        waiting.push(Bytes::from(vec![b'L'; SMALL]));
        waiting.push(Bytes::from_static(b"last"));
        waiting.settle();
        let lengths: Vec<_> = waiting.pieces.iter().map(Bytes::len).collect();
        assert_eq!(lengths, [5, 6, SMALL, 4]);
        waiting.advance(7);
        assert_eq!(waiting.pieces.front().map(|piece| &piece[..]), Some(&b"abab"[..]));
        assert_eq!(waiting.bytes, 4 + SMALL + 4);
        waiting.advance(4 + SMALL + 4);
        assert!(waiting.is_empty());
    }
}
