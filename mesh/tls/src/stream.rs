//! An established TLS connection as a stream of bytes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use ambit_net::relay::{Sizing, Tier};
use rustls::{AlertDescription, ContentType, ExtractedSecrets};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::buffers::{Buffer, Size};
use crate::handshake::{Keys, Leftover};
use crate::invalid;
use crate::message::{self, Message, alert, key_update};
use crate::record::{HEADER, KEY_LASTS, MAX_PLAIN, MAX_SEALED, Opener, RecordError, Sealer, complete};

/// Records without content, and key updates, that a peer may send between two with content.
const MAX_IDLE_RECORDS: u32 = 32;
/// A caller with less room than this does not know yet how much to read (HTTP/2 reads the head of a frame first). It gets
/// one record at a time, so that it can size its buffer before it has to move much.
const MANY: usize = 128 * 1024;

/// TLS 1.3 over `io`, its handshake done.
///
/// One receive call takes many records; each is opened straight into the reader's memory, and sealed straight from the
/// writer's, so a byte is copied by its encryption only. Key updates are answered, and made before a key is worn. The end
/// of `io` without `close_notify` is `UnexpectedEof`. Dropping it closes `io` without `close_notify`.
pub struct TlsStream<IO> {
    io: IO,
    keys: Keys,
    opener: Opener,
    sealer: Sealer,
    /// Records after which our key is replaced.
    pub(crate) key_lasts: u64,
    /// Plaintext that came with the handshake.
    early: Vec<u8>,
    incoming: Option<Buffer>,
    /// The first record of `incoming`, when it was opened in place: bytes of content left, and bytes that follow it.
    opened: (usize, usize),
    sizing: Sizing,
    idle_records: u32,
    received: Received,
    outgoing: Option<Buffer>,
    /// The peer asked for a key update of ours.
    update_due: bool,
    sent_close: bool,
}

/// What can still be received.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Received {
    /// More records.
    Open,
    /// Nothing: `close_notify`.
    Closed,
    /// Nothing: a record was rejected.
    Failed(RecordError),
    /// Nothing: the peer sent a fatal alert.
    Alert(AlertDescription),
}

impl<IO> TlsStream<IO> {
    pub(crate) fn new(
        io: IO,
        secrets: ExtractedSecrets,
        keys: Keys,
        leftover: Leftover,
    ) -> Result<Self, RecordError> {
        let Leftover { plain: early, sealed } = leftover;
        let mut stream = TlsStream {
            io,
            keys,
            opener: Opener::new(secrets.rx)?,
            sealer: Sealer::new(secrets.tx)?,
            key_lasts: KEY_LASTS,
            early,
            incoming: None,
            opened: (0, 0),
            sizing: Sizing::new(),
            idle_records: 0,
            received: Received::Open,
            outgoing: None,
            update_due: false,
            sent_close: false,
        };
        if !sealed.is_empty() {
            // The handshake reads little at a time, so it fits.
            let mut buffer = Buffer::take(Size::Large);
            buffer.push(&sealed);
            stream.incoming = Some(buffer);
        }
        Ok(stream)
    }

    /// Decrypts complete records into `out`, as many as fit.
    fn open(&mut self, out: &mut ReadBuf<'_>) -> Result<(), RecordError> {
        let many = out.remaining() >= MANY;
        let before = out.filled().len();
        while out.remaining() > 0 && self.received == Received::Open {
            if !self.take_opened(out) && !self.open_next(out)? {
                break;
            }
            if !many && out.filled().len() > before {
                break;
            }
        }
        Ok(())
    }

    /// Copies content that was decrypted before; `false` if there is none.
    fn take_opened(&mut self, out: &mut ReadBuf<'_>) -> bool {
        if !self.early.is_empty() {
            let fits = self.early.len().min(out.remaining());
            out.put_slice(self.early.get(..fits).unwrap_or_default());
            self.early.drain(..fits);
            if self.early.is_empty() {
                self.early = Vec::new();
            }
            return true;
        }
        let (left, after) = self.opened;
        let Some(buffer) = self.incoming.as_mut().filter(|_| left > 0) else { return false };
        let fits = left.min(out.remaining());
        out.put_slice(buffer.filled().get(..fits).unwrap_or_default());
        if fits < left {
            buffer.consume(fits);
            self.opened = (left - fits, after);
        } else {
            buffer.consume(left + after);
            self.opened = (0, 0);
        }
        true
    }

    /// Decrypts the next record; `false` if it is not complete.
    fn open_next(&mut self, out: &mut ReadBuf<'_>) -> Result<bool, RecordError> {
        let Some(buffer) = &mut self.incoming else { return Ok(false) };
        let Some(length) = complete(buffer.filled())? else { return Ok(false) };
        let room = Opener::room(length);
        let message = if room <= out.remaining() {
            let record = buffer.filled().get(..length).unwrap_or_default();
            let target = out.initialize_unfilled_to(room);
            let opened = self.opener.open_into(record, target)?;
            let content = target.get(..opened.length).unwrap_or_default();
            let message = message::read(opened.kind, content, self.keys.peer())?;
            if message == Message::Data {
                out.advance(opened.length);
            }
            buffer.consume(length);
            message
        } else {
            let record = buffer.filled_mut().get_mut(..length).unwrap_or_default();
            let opened = self.opener.open_in_place(record)?;
            let content = record.get(HEADER..HEADER + opened.length).unwrap_or_default();
            let message = message::read(opened.kind, content, self.keys.peer())?;
            if message == Message::Data {
                buffer.consume(HEADER);
                self.opened = (opened.length, length - HEADER - opened.length);
            } else {
                buffer.consume(length);
            }
            message
        };
        self.handle(message)?;
        Ok(true)
    }

    fn handle(&mut self, message: Message) -> Result<(), RecordError> {
        if message == Message::Data {
            self.idle_records = 0;
            return Ok(());
        }
        self.idle_records += 1;
        if self.idle_records > MAX_IDLE_RECORDS {
            return Err(RecordError::Overhead);
        }
        match message {
            Message::Data | Message::Nothing => {}
            Message::Closed => self.received = Received::Closed,
            Message::Alert(description) => self.received = Received::Alert(description),
            Message::KeyUpdate { requested } => {
                self.opener = Opener::new(self.keys.next_receiving()?)?;
                self.update_due |= requested;
            }
        }
        Ok(())
    }

    /// Encrypts a record without application data, if there is room. A peer that leaves no room does not read alerts either.
    fn seal_small(&mut self, kind: ContentType, content: &[u8]) -> Result<bool, RecordError> {
        let outgoing = self.outgoing.get_or_insert_with(|| Buffer::take(Size::Small));
        if outgoing.spare().len() < MAX_SEALED - MAX_PLAIN + content.len() {
            return Ok(false);
        }
        let length = self.sealer.seal(kind, content, outgoing.spare())?;
        outgoing.fill(length);
        Ok(true)
    }

    /// Updates our key if the peer asked for it or it is worn.
    fn update_key(&mut self) -> Result<(), RecordError> {
        if (self.update_due || self.sealer.sealed() >= self.key_lasts)
            && self.seal_small(ContentType::Handshake, &key_update())?
        {
            self.sealer = Sealer::new(self.keys.next_sending()?)?;
            self.update_due = false;
        }
        Ok(())
    }

    /// Encrypts as many bytes of `pieces` as there is room for, and returns how many.
    fn seal(&mut self, pieces: &[IoSlice<'_>]) -> Result<usize, RecordError> {
        let total: usize = pieces.iter().map(|piece| piece.len()).sum();
        let size = if total > MAX_PLAIN { Size::Large } else { Size::Small };
        let outgoing = self.outgoing.get_or_insert_with(|| Buffer::take(size));
        let mut taken = 0;
        let mut pieces = pieces.iter().map(|piece| &**piece).filter(|piece| !piece.is_empty());
        let mut piece: &[u8] = &[];
        while taken < total && outgoing.spare().len() >= MAX_SEALED {
            if piece.is_empty() {
                piece = pieces.next().unwrap_or_default();
            }
            let left = total - taken;
            let length = if piece.len() >= left.min(MAX_PLAIN) {
                let (plain, rest) = piece.split_at(piece.len().min(MAX_PLAIN));
                piece = rest;
                taken += plain.len();
                self.sealer.seal(ContentType::ApplicationData, plain, outgoing.spare())?
            } else {
                let plain = left.min(MAX_PLAIN);
                taken += plain;
                self.sealer.seal_gathered(
                    ContentType::ApplicationData,
                    plain,
                    outgoing.spare(),
                    |mut target| {
                        while !target.is_empty() {
                            if piece.is_empty() {
                                piece = pieces.next().unwrap_or_default();
                            }
                            let (now, rest) = piece.split_at(piece.len().min(target.len()));
                            let (front, back) = target.split_at_mut(now.len());
                            front.copy_from_slice(now);
                            (piece, target) = (rest, back);
                        }
                    },
                )?
            };
            outgoing.fill(length);
        }
        Ok(taken)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> TlsStream<IO> {
    /// Reads from `io`. A connection that waits holds a buffer only for an incomplete record.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let size = if self.sizing.tier() == Tier::Bulk { Size::Large } else { Size::Small };
        let mut buffer = match self.incoming.take().filter(|buffer| !buffer.is_empty()) {
            Some(buffer) if buffer.size() == Size::Small && size == Size::Large => {
                let mut larger = Buffer::take(size);
                larger.push(buffer.filled());
                larger
            }
            Some(buffer) => buffer,
            None => Buffer::take(size),
        };
        buffer.compact();
        let mut room = ReadBuf::new(buffer.spare());
        let polled = Pin::new(&mut self.io).poll_read(cx, &mut room);
        let received = room.filled().len();
        buffer.fill(received);
        if !buffer.is_empty() {
            self.incoming = Some(buffer);
        }
        ready!(polled)?;
        if received > 0 {
            self.sizing.record(received, Instant::now());
        }
        Poll::Ready(Ok(received))
    }

    /// Writes encrypted records; ready when all are written.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(outgoing) = self.outgoing.as_mut().filter(|outgoing| !outgoing.is_empty()) {
            match ready!(Pin::new(&mut self.io).poll_write(cx, outgoing.filled()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => outgoing.consume(sent),
            }
        }
        self.outgoing = None;
        Poll::Ready(Ok(()))
    }

    /// Sends an alert if that is possible without waiting.
    fn fail(&mut self, cx: &mut Context<'_>, error: RecordError) {
        self.received = Received::Failed(error);
        let sealed = self.seal_small(ContentType::Alert, &alert(error.alert()));
        // The error that is reported is `error`, whether the alert was sent or not.
        if let (Ok(true), Poll::Ready(Err(error))) = (sealed, self.poll_send(cx)) {
            tracing::trace!(%error, "a TLS alert was not sent");
        }
        self.sent_close = true;
    }

    fn ended(&self) -> io::Result<()> {
        match self.received {
            Received::Open | Received::Closed => Ok(()),
            Received::Failed(error) => Err(invalid(error)),
            Received::Alert(alert) => Err(invalid(rustls::Error::AlertReceived(alert))),
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        loop {
            if let Err(error) = this.open(buf) {
                this.fail(cx, error);
            }
            if buf.filled().len() > before || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            if this.received != Received::Open {
                return Poll::Ready(this.ended());
            }
            if ready!(this.poll_fill(cx))? == 0 {
                // RFC 8446 §6.1: an end without close_notify may be a truncation attack.
                let unannounced = "the peer closed the connection without TLS close_notify";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, unannounced)));
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.sent_close {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        // Earlier records are written first, so at most one piece waits here.
        ready!(this.poll_send(cx))?;
        this.update_key().map_err(invalid)?;
        let taken = this.seal(bufs).map_err(invalid)?;
        if let Poll::Ready(Err(error)) = this.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.sent_close {
            this.update_key().map_err(invalid)?;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.sent_close {
            ready!(this.poll_send(cx))?;
            let close = alert(AlertDescription::CloseNotify);
            this.seal_small(ContentType::Alert, &close).map_err(invalid)?;
            this.sent_close = true;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

impl<IO> std::fmt::Debug for TlsStream<IO> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsStream").finish_non_exhaustive()
    }
}
