//! Bodies: of requests, which may have to be sent again, and of responses, which end the exchange.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, Sleep};

use crate::exchange::Held;
use crate::messages::Messages;
use crate::trailers;
use crate::upstream::Returned;

/// The body of a request on its way to an endpoint.
#[derive(Debug)]
pub enum RequestBody {
    /// None.
    Empty,
    /// One that is kept as far as it has been sent, to be sent again.
    Replay(Replay),
    /// The copy of another request's.
    Copy(Copied),
    /// One that is there.
    Whole(Option<Bytes>),
    /// That of a call of ours.
    Call(tonic::body::Body),
}

/// Frames of a body that wait for the copy's endpoint; if it is slower than this, the copy is given up.
const COPY_QUEUE: usize = 64;

/// The copy of a body, fed while the original is sent.
#[derive(Debug)]
pub struct Copied {
    frames: mpsc::Receiver<Bytes>,
    broken: Arc<AtomicBool>,
}

/// Says whether a copy broke off. It outlives the copy.
#[derive(Debug, Clone)]
pub struct CopyState(Arc<AtomicBool>);

impl Copied {
    /// What becomes of it.
    pub fn state(&self) -> CopyState {
        CopyState(self.broken.clone())
    }
}

impl CopyState {
    /// Whether the original broke off, or the copy was given up.
    pub fn is_broken(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

#[derive(Debug)]
struct Copy {
    frames: mpsc::Sender<Bytes>,
    broken: Arc<AtomicBool>,
    whole: bool,
}

impl Copy {
    /// Never waits: the original is not held up.
    fn feed(&mut self, data: &Bytes) -> bool {
        self.frames.try_send(data.clone()).is_ok()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if !self.whole {
            self.broken.store(true, Ordering::Release);
        }
    }
}

/// A body that several tries share, one after the other: each sends what was kept, then reads on.
#[derive(Debug, Clone)]
pub struct Source(Arc<Mutex<State>>);

/// Says which fields of a client's trailers are not passed on.
type Withheld = Box<dyn Fn(&HeaderName) -> bool + Send>;

struct State {
    incoming: Incoming,
    withheld: Option<Withheld>,
    kept: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    ended: bool,
    /// Bytes that may still be kept; `None` once there were more: the body can't be sent again.
    room: Option<usize>,
    /// Number of the try that may read. Those before it have been given up.
    attempt: u32,
    received: u64,
    /// Those of a gRPC call.
    messages: Option<Messages>,
    broken: bool,
    copies: Vec<Copy>,
    /// How long the client may be silent.
    silence: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// Whether the timer runs for the frame that is awaited now.
    waiting: bool,
    late: bool,
    awaited: Awaited,
}

/// How long a try has waited for the client.
#[derive(Debug, Default, Clone, Copy)]
struct Awaited {
    before: Duration,
    since: Option<Instant>,
}

impl Awaited {
    fn start(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    fn stop(&mut self, now: Instant) {
        self.before = self.total(now);
        self.since = None;
    }

    fn total(&self, now: Instant) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("received", &self.received)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

/// One try's view of a [`Source`].
#[derive(Debug)]
pub struct Replay {
    source: Source,
    attempt: u32,
    at: usize,
    trailers_sent: bool,
}

impl Source {
    /// Keeps at most `room` bytes. The client may be silent for `silence`.
    pub fn new(incoming: Incoming, room: usize, silence: Duration) -> Self {
        let state = State {
            incoming,
            withheld: None,
            kept: Vec::new(),
            trailers: None,
            ended: false,
            room: Some(room),
            attempt: 0,
            received: 0,
            messages: None,
            broken: false,
            copies: Vec::new(),
            silence,
            timer: None,
            waiting: false,
            late: false,
            awaited: Awaited::default(),
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Counts the messages of a gRPC call too; to be asked for before any of the body is read.
    pub fn counting_messages(self) -> Self {
        self.0.lock().messages = Some(Messages::default());
        self
    }

    /// How many messages of a gRPC call have come.
    pub fn messages(&self) -> u64 {
        self.0.lock().messages.map_or(0, |messages| messages.count())
    }

    /// Names the fields of its trailers that are not passed on: those that only the waypoint may write. To be called before any
    /// of it is read.
    pub fn withhold(&self, is_withheld: impl Fn(&HeaderName) -> bool + Send + 'static) {
        self.0.lock().withheld = Some(Box::new(is_withheld));
    }

    /// The body for another try, from its beginning; `None` if a part is lost.
    pub fn replay(&self) -> Option<Replay> {
        let mut state = self.0.lock();
        state.room?;
        state.attempt += 1;
        state.awaited = Awaited::default();
        Some(Replay { source: self.clone(), attempt: state.attempt, at: 0, trailers_sent: false })
    }

    /// A copy of the whole body; to be asked for before any of it is sent.
    pub fn copy(&self) -> Copied {
        let (feed, frames) = mpsc::channel(COPY_QUEUE);
        let broken = Arc::new(AtomicBool::new(false));
        let mut copy = Copy { frames: feed, broken: broken.clone(), whole: false };
        let mut state = self.0.lock();
        // What was read ahead is the beginning of the copy too.
        if state.kept.iter().all(|data| copy.feed(data)) {
            copy.whole = state.ended;
            if !state.ended {
                state.copies.push(copy);
            }
        }
        Copied { frames, broken }
    }

    /// Reads the beginning of the body, before any of it is sent: at most `most` bytes, and whether that is all. It is sent
    /// later as if it had not been read.
    ///
    /// # Errors
    /// The client's body breaks off, or is silent for too long.
    pub async fn read_ahead(&self, most: usize) -> io::Result<(Bytes, bool)> {
        std::future::poll_fn(|cx| self.0.lock().poll_read_ahead(most, cx)).await
    }

    /// Whether it can be sent once more.
    pub fn is_whole(&self) -> bool {
        let state = self.0.lock();
        state.room.is_some() && !state.broken
    }

    /// Bytes read from the client.
    pub fn received(&self) -> u64 {
        self.0.lock().received
    }

    /// Whether the client was silent for too long.
    pub fn is_late(&self) -> bool {
        self.0.lock().late
    }

    /// How long the present try has waited for the client so far.
    pub fn awaited(&self) -> Duration {
        self.0.lock().awaited.total(Instant::now())
    }

    /// Whether the client's body broke off.
    pub fn is_broken(&self) -> bool {
        self.0.lock().broken
    }
}

impl State {
    /// The body has ended as it should: so do its copies.
    fn end(&mut self) {
        self.ended = true;
        self.copies.iter_mut().for_each(|copy| copy.whole = true);
        self.copies.clear();
    }

    /// The next frame of the client. Fails when that takes too long.
    fn poll_incoming(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) {
            if std::mem::take(&mut self.waiting) {
                self.awaited.stop(Instant::now());
            }
            return Poll::Ready(frame.map(|frame| Ok(self.permitted(frame.map_err(io::Error::other)?))));
        }
        let now = Instant::now();
        self.awaited.start(now);
        let due = now + self.silence;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if !std::mem::replace(&mut self.waiting, true) {
            timer.as_mut().reset(due);
        }
        ready!(timer.as_mut().poll(cx));
        self.late = true;
        Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())))
    }

    /// A frame without the trailers that are withheld.
    fn permitted(&self, frame: Frame<Bytes>) -> Frame<Bytes> {
        match frame.into_trailers() {
            Ok(sent) => Frame::trailers(trailers::permitted(sent, self.withheld.as_deref())),
            Err(data) => data,
        }
    }

    fn poll_read_ahead(&mut self, most: usize, cx: &mut Context<'_>) -> Poll<io::Result<(Bytes, bool)>> {
        loop {
            let kept: usize = self.kept.iter().map(Bytes::len).sum();
            if self.ended || kept > most {
                let mut beginning = self.kept.concat();
                beginning.truncate(most);
                return Poll::Ready(Ok((beginning.into(), kept <= most)));
            }
            match ready!(self.poll_incoming(cx)) {
                None => self.end(),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        let data = data.clone();
                        self.count(&data);
                        // Whatever the room: it has to be sent.
                        self.room = self.room.map(|room| room.saturating_sub(data.len()));
                        self.kept.push(data);
                    } else if let Some(trailers) = frame.trailers_ref() {
                        self.trailers = Some(trailers.clone());
                        self.end();
                    }
                }
                Some(Err(error)) => {
                    self.broken = true;
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    fn count(&mut self, data: &Bytes) {
        self.received += data.len() as u64;
        if let Some(messages) = &mut self.messages {
            messages.feed(data);
        }
    }

    fn keep(&mut self, data: &Bytes) {
        self.copies.retain_mut(|copy| copy.feed(data));
        let Some(room) = self.room else { return };
        match room.checked_sub(data.len()) {
            Some(left) => {
                self.room = Some(left);
                self.kept.push(data.clone());
            }
            None => {
                self.room = None;
                self.kept = Vec::new();
            }
        }
    }
}

impl Replay {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let mut state = self.source.0.lock();
        if state.attempt != self.attempt {
            return Poll::Ready(Some(Err(io::Error::other("another try has taken over"))));
        }
        if let Some(kept) = state.kept.get(self.at) {
            self.at += 1;
            return Poll::Ready(Some(Ok(Frame::data(kept.clone()))));
        }
        if state.ended {
            let trailers = state.trailers.clone().filter(|_| !self.trailers_sent);
            self.trailers_sent = true;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        match ready!(state.poll_incoming(cx)) {
            None => {
                state.end();
                Poll::Ready(None)
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    let data = data.clone();
                    state.count(&data);
                    state.keep(&data);
                    self.at = state.kept.len();
                } else if let Some(trailers) = frame.trailers_ref() {
                    state.trailers = Some(trailers.clone());
                    state.end();
                    self.trailers_sent = true;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                state.broken = true;
                Poll::Ready(Some(Err(error)))
            }
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Replay(replay) => replay.poll(cx),
            Self::Copy(copied) => match ready!(copied.frames.poll_recv(cx)) {
                Some(data) => Poll::Ready(Some(Ok(Frame::data(data)))),
                None if copied.broken.load(Ordering::Acquire) => {
                    Poll::Ready(Some(Err(io::Error::other("the copy was given up"))))
                }
                None => Poll::Ready(None),
            },
            Self::Whole(content) => {
                let content = content.take().filter(|content| !content.is_empty());
                Poll::Ready(content.map(|content| Ok(Frame::data(content))))
            }
            Self::Call(body) => {
                Pin::new(body).poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(io::Error::other)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Whole(content) => content.as_ref().is_none_or(Bytes::is_empty),
            Self::Call(body) => body.is_end_stream(),
            Self::Replay(_) | Self::Copy(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Replay(replay) => {
                let state = replay.source.0.lock();
                // What the client announced, less what was read and is not sent yet.
                match state.incoming.size_hint().exact() {
                    Some(left) if replay.at == 0 && !state.ended => {
                        SizeHint::with_exact(left + state.received)
                    }
                    _ => SizeHint::default(),
                }
            }
            Self::Copy(_) => SizeHint::default(),
            Self::Whole(content) => SizeHint::with_exact(content.as_ref().map_or(0, Bytes::len) as u64),
            Self::Call(body) => body.size_hint(),
        }
    }
}

/// The body of a response on its way to the client. The exchange ends with it.
#[derive(Debug)]
pub struct ResponseBody {
    content: Content,
    deadline: Option<Pin<Box<Sleep>>>,
    held: Option<Box<Held>>,
    /// Runs while the endpoint is waited for, until the observer of the log is to know of the request.
    long: Option<Pin<Box<Sleep>>>,
}

#[derive(Debug)]
enum Content {
    Full(Bytes),
    Trailers(Option<HeaderMap>),
    Upstream(Incoming, Option<Returned>),
}

impl ResponseBody {
    /// Of the waypoint's own.
    pub fn full(body: Bytes) -> Self {
        Self { content: Content::Full(body), deadline: None, held: None, long: None }
    }

    /// Nothing but trailers.
    pub fn trailers(trailers: HeaderMap) -> Self {
        Self { content: Content::Trailers(Some(trailers)), deadline: None, held: None, long: None }
    }

    /// An endpoint's. At its end the connection is given back; it must end by `deadline`.
    pub fn upstream(body: Incoming, returned: Option<Returned>, deadline: Option<Pin<Box<Sleep>>>) -> Self {
        Self { content: Content::Upstream(body, returned), deadline, held: None, long: None }
    }

    /// Ends the exchange when this body has ended.
    pub fn holding(mut self, held: Held) -> Self {
        self.held = Some(Box::new(held));
        if self.is_end_stream() {
            self.end();
        }
        self.hand_over();
        self
    }

    /// A part was handed over. In HTTP/2 the client says when it takes more, and nothing is asked for until then.
    fn hand_over(&mut self) {
        if let Some(held) = &mut self.held
            && held.record.is_http2()
        {
            held.open.hand_over(std::time::Instant::now());
        }
    }

    fn end(&mut self) {
        if let Some(held) = self.held.take() {
            held.record.finish();
        }
        if let Content::Upstream(_, returned) = &mut self.content
            && let Some(returned) = returned.take()
        {
            returned.give_back();
        }
    }

    /// Called while the endpoint is waited for: shows a request that has been in progress for long to the observer of the log.
    fn poll_long(&mut self, cx: &mut Context<'_>) {
        let Some(held) = &self.held else { return };
        let Some(due) = held.record.observed_at() else { return };
        let timer = self.long.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due.into())));
        if timer.as_mut().poll(cx).is_ready() {
            held.record.observe_open();
            self.long = None;
        }
    }

    fn broken(&mut self, flags: &'static str, error: &str) {
        if let Some(mut held) = self.held.take() {
            held.record.fail(flags, error.to_owned());
            held.record.finish();
        }
    }
}

/// A frame of an endpoint's answer, without the trailers that no endpoint may send.
fn permitted(frame: Frame<Bytes>) -> Frame<Bytes> {
    match frame.into_trailers() {
        Ok(sent) => Frame::trailers(trailers::permitted(sent, None)),
        Err(data) => data,
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = &mut *self;
        let frame = match &mut this.content {
            Content::Full(body) if body.is_empty() => None,
            Content::Full(body) => Some(Ok(Frame::data(std::mem::take(body)))),
            Content::Trailers(trailers) => trailers.take().map(Frame::trailers).map(Ok),
            Content::Upstream(body, _) => match Pin::new(body).poll_frame(cx) {
                Poll::Ready(frame) => frame.map(|frame| frame.map(permitted).map_err(io::Error::other)),
                Poll::Pending => {
                    if let Some(deadline) = &mut this.deadline
                        && deadline.as_mut().poll(cx).is_ready()
                    {
                        this.broken("UT", "the request took longer than its route allows");
                        return Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())));
                    }
                    this.poll_long(cx);
                    if let Some(held) = &mut this.held {
                        held.open.await_endpoint();
                    }
                    return Poll::Pending;
                }
            },
        };
        match &frame {
            None => this.end(),
            Some(Err(error)) => this.broken("UC", &error.to_string()),
            Some(Ok(frame)) => {
                if let Some(held) = &mut this.held {
                    held.record.add_frame(frame);
                }
                // RFC 9113 §8.1: nothing comes after trailers.
                if frame.is_trailers() || this.is_end_stream() {
                    this.end();
                } else {
                    this.hand_over();
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Full(body) => body.is_empty(),
            Content::Trailers(trailers) => trailers.is_none(),
            Content::Upstream(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Full(body) => SizeHint::with_exact(body.len() as u64),
            Content::Trailers(_) => SizeHint::with_exact(0),
            Content::Upstream(body, _) => body.size_hint(),
        }
    }
}

#[cfg(test)]
#[path = "body_tests.rs"]
mod tests;
