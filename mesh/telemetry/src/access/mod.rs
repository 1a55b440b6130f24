//! The access log: one line a connection, when it ends.
//!
//! A proxy fills an [`Entry`] (shared strings, no formatting) and hands it over; the writer's thread
//! renders it. The same records go to whoever taps them ([`Taps`]) and to the program's observer of them. Nothing waits for the
//! disk, for a tap or for the observer.

mod filter;
mod format;
mod tap;

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use http::Method;

use crate::Registry;
use crate::sink::{LogWriter, Render, Sink, Target};

pub use filter::{Filter, FilterError};
pub use tap::{Tap, TapLines, Taps, TooManyTaps};

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `time<TAB>info<TAB>access<TAB>src.addr=…<TAB>…`; text values are quoted.
    Tab,
    /// One JSON object a line.
    Json,
}

/// Settings of the access log.
#[derive(Debug, Clone)]
pub struct Config {
    /// How lines look.
    pub format: Format,
    /// Where they go.
    pub target: Target,
    /// Lines that may wait for the writer; more are dropped and counted.
    pub queue: usize,
}

impl Default for Config {
    /// Tab-separated to stdout, 8,192 lines.
    fn default() -> Self {
        Self { format: Format::Tab, target: Target::Stdout, queue: 8192 }
    }
}

/// The direction of a connection, seen from the reporting proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To a pod of this node.
    Inbound,
    /// From a pod of this node.
    Outbound,
}

/// One end of a connection. Unknown fields are left out of the line.
#[derive(Debug, Clone, Default)]
pub struct Party {
    /// Address and port.
    pub addr: Option<SocketAddr>,
    /// Pod name.
    pub workload: Option<Arc<str>>,
    /// Namespace.
    pub namespace: Option<Arc<str>>,
    /// `spiffe://…`, where the peer was authenticated.
    pub identity: Option<Arc<str>>,
    /// Name of what the pod belongs to, such as its Deployment. Not part of a line.
    pub owner: Option<Arc<str>>,
}

/// What a client dialled, before routes and endpoints. Not part of a line.
#[derive(Debug, Clone, Default)]
pub struct Dialled {
    /// Namespace of the service.
    pub namespace: Option<Arc<str>>,
    /// Host name of the service; `None` where an address was dialled.
    pub host: Option<Arc<str>>,
    /// The port; 0 if it is not known.
    pub port: u16,
}

/// How a connection or request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// As its ends wanted; for a request, with whatever answer an endpoint gave.
    Ok,
    /// Policy denied it.
    Denied,
    /// It failed otherwise.
    Failed,
}

impl Status {
    /// As filters and taps name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Denied => "denied",
            Self::Failed => "failed",
        }
    }
}

/// A connection that ended.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The client.
    pub source: Party,
    /// The server.
    pub destination: Party,
    /// The CONNECT authority: `ip:port` or `hostname:port`; `None` without a tunnel.
    pub hbone_addr: Option<Arc<str>>,
    /// Host name of the service dialled.
    pub service: Option<Arc<str>>,
    /// What was dialled.
    pub dialled: Dialled,
    /// Whether it was a client's session of datagrams, not a connection.
    pub is_udp: bool,
    /// The direction.
    pub direction: Direction,
    /// How it ended.
    pub status: Status,
    /// Bytes from client to server for outbound, as the reporting proxy counts them.
    pub bytes_sent: u64,
    /// Bytes the other way.
    pub bytes_received: u64,
    /// From accept to end.
    pub duration: Duration,
    /// Why it failed; a failed connection is logged at level `error`.
    pub error: Option<String>,
    /// Whether [`AccessLog::observe_open`] had it when it opened. Not part of a line.
    pub was_observed: bool,
}

/// A request that ended, as a waypoint or gateway saw it.
#[derive(Debug, Clone)]
pub struct RequestEntry {
    /// The client. Requests of one connection share it.
    pub source: Arc<Party>,
    /// The endpoint that answered, or was tried last.
    pub destination: Arc<Party>,
    /// Host name of the service of that endpoint, or of the one dialled.
    pub service: Option<Arc<str>>,
    /// What was dialled. Requests of one connection share it.
    pub dialled: Arc<Dialled>,
    /// How it ended.
    pub status: Status,
    /// `HTTP/1.1`, `HTTP/2`, ...
    pub protocol: &'static str,
    /// The method.
    pub method: Method,
    /// What the request says of itself.
    pub texts: RequestTexts,
    /// The answer's status; 0 if the client went before there was one.
    pub code: u16,
    /// gRPC's own status.
    pub grpc_status: Option<u8>,
    /// Why the answer is not the endpoint's, or `-`.
    pub flags: &'static str,
    /// The name of the route that was followed.
    pub route: Option<Arc<dyn Named>>,
    /// The policies with the action AUDIT that matched, separated by commas.
    pub audited_by: Option<Box<str>>,
    /// How often it was sent.
    pub attempts: u32,
    /// Bytes of the response's body.
    pub bytes_sent: u64,
    /// Bytes of the request's body.
    pub bytes_received: u64,
    /// From the request's head to the end of the answer.
    pub duration: Duration,
    /// Why it failed.
    pub error: Option<String>,
    /// Whether [`AccessLog::observe_open_request`] had it while it was in progress. Not part of a line.
    pub was_observed: bool,
}

/// A name that is made into text where it is written.
pub trait Named: std::fmt::Display + std::fmt::Debug + Send + Sync {}

impl<T: std::fmt::Display + std::fmt::Debug + Send + Sync> Named for T {}

/// What a request says of itself, in one allocation: the record of a request goes from the data path to other threads.
#[derive(Debug, Clone, Default)]
pub struct RequestTexts {
    text: Box<str>,
    /// Where authority, path and request id end; the user agent is the rest.
    ends: [usize; 3],
    has_request_id: bool,
    has_user_agent: bool,
}

impl RequestTexts {
    /// The host that was asked for, the path without the query, `x-request-id` and `user-agent`.
    pub fn new(authority: &str, path: &str, request_id: Option<&str>, user_agent: Option<&str>) -> Self {
        let (id, agent) = (request_id.unwrap_or_default(), user_agent.unwrap_or_default());
        let mut text = String::with_capacity(authority.len() + path.len() + id.len() + agent.len());
        let ends = [authority, path, id].map(|part| {
            text.push_str(part);
            text.len()
        });
        text.push_str(agent);
        let (has_request_id, has_user_agent) = (request_id.is_some(), user_agent.is_some());
        Self { text: text.into_boxed_str(), ends, has_request_id, has_user_agent }
    }

    fn between(&self, start: usize, end: usize) -> &str {
        self.text.get(start..end).unwrap_or_default()
    }

    /// The host that was asked for.
    pub fn authority(&self) -> &str {
        self.between(0, self.ends[0])
    }

    /// The path, without the query.
    pub fn path(&self) -> &str {
        self.between(self.ends[0], self.ends[1])
    }

    /// `x-request-id`.
    pub fn request_id(&self) -> Option<&str> {
        self.has_request_id.then(|| self.between(self.ends[1], self.ends[2]))
    }

    /// `user-agent`.
    pub fn user_agent(&self) -> Option<&str> {
        self.has_user_agent.then(|| self.between(self.ends[2], self.text.len()))
    }
}

/// What ended, and when.
#[derive(Debug)]
pub struct Record {
    /// What ended, or opened.
    pub ended: Ended,
    /// It is a connection that has just opened, or a request in progress: only the observer gets such a record.
    pub is_open: bool,
    /// When.
    pub time: SystemTime,
}

/// What a record is of.
#[derive(Debug)]
pub enum Ended {
    /// A connection.
    Connection(Entry),
    /// A request.
    Request(RequestEntry),
}

impl Record {
    /// How it ended.
    pub fn status(&self) -> Status {
        match &self.ended {
            Ended::Connection(entry) => entry.status,
            Ended::Request(entry) => entry.status,
        }
    }

    /// Whether it reports a failure.
    pub fn has_failed(&self) -> bool {
        match &self.ended {
            Ended::Connection(entry) => entry.error.is_some(),
            Ended::Request(entry) => entry.error.is_some(),
        }
    }

    /// Its fields, as a line has them.
    pub fn each_field(&self, see: impl FnMut(&'static str, FieldValue<'_>)) {
        match &self.ended {
            Ended::Connection(entry) => format::each(entry, see),
            Ended::Request(entry) => format::each(entry, see),
        }
    }

    /// Appends its line, newline included.
    pub fn render(&self, format: Format, line: &mut Vec<u8>) {
        match (&self.ended, format) {
            (Ended::Connection(entry), Format::Tab) => format::tab(entry, self.time, line),
            (Ended::Connection(entry), Format::Json) => format::json(entry, self.time, line),
            (Ended::Request(entry), Format::Tab) => format::tab(entry, self.time, line),
            (Ended::Request(entry), Format::Json) => format::json(entry, self.time, line),
        }
    }
}

/// The value of a field of a record.
#[derive(Debug, PartialEq)]
pub enum FieldValue<'a> {
    /// A text.
    Text(Cow<'a, str>),
    /// A number.
    Number(u64),
}

/// What is done with every record beside writing and tapping it. Must not block.
type Observe = Arc<dyn Fn(&Arc<Record>) + Send + Sync>;

/// The access log. Cheap to clone; one that is disabled, not observed and not tapped does nothing.
#[derive(Clone, Default)]
pub struct AccessLog {
    writer: Option<(Sink<Line>, Format)>,
    observer: Option<Observe>,
    taps: Taps,
}

impl std::fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { writer, observer, taps } = self;
        f.debug_struct("AccessLog")
            .field("writer", writer)
            .field("observed", &observer.is_some())
            .field("taps", taps)
            .finish()
    }
}

/// A record on its way to the writer.
#[derive(Debug)]
struct Line {
    record: Arc<Record>,
    format: Format,
}

impl Render for Line {
    fn render(&self, line: &mut Vec<u8>) {
        self.record.render(self.format, line);
    }
}

impl AccessLog {
    /// Opens the target and starts the writer; keep the [`LogWriter`] until the program ends.
    pub fn start(config: Config) -> io::Result<(Self, LogWriter)> {
        let Config { format, target, queue } = config;
        let (sink, writer) = Sink::spawn("access-log", target, queue)?;
        Ok((Self { writer: Some((sink, format)), ..Self::disabled() }, writer))
    }

    /// A log that writes nothing.
    pub fn disabled() -> Self {
        Self::default()
    }

    /// The same log, whose records `observe` sees too, on the thread that made them. It must not block.
    #[must_use]
    pub fn observed_by(self, observe: impl Fn(&Arc<Record>) + Send + Sync + 'static) -> Self {
        Self { observer: Some(Arc::new(observe)), ..self }
    }

    /// Those who follow the records while the program runs.
    pub fn taps(&self) -> &Taps {
        &self.taps
    }

    /// Whether anybody wants entries. A caller need not build them otherwise.
    pub fn is_enabled(&self) -> bool {
        self.writer.is_some() || self.observer.is_some() || self.taps.is_open()
    }

    /// Whether there is an observer.
    pub fn is_observed(&self) -> bool {
        self.observer.is_some()
    }

    /// Shows a connection that opened now to the observer: it may be open for days. Never blocks.
    pub fn observe_open(&self, entry: Entry) {
        if let Some(observe) = &self.observer {
            let ended = Ended::Connection(entry);
            observe(&Arc::new(Record { ended, is_open: true, time: SystemTime::now() }));
        }
    }

    /// Shows a request to the observer that has been in progress for long: it may go on for days. Never blocks.
    pub fn observe_open_request(&self, entry: RequestEntry) {
        if let Some(observe) = &self.observer {
            let ended = Ended::Request(entry);
            observe(&Arc::new(Record { ended, is_open: true, time: SystemTime::now() }));
        }
    }

    /// Logs a connection that ended now. Never blocks.
    pub fn log(&self, entry: Entry) {
        if self.is_enabled() {
            self.share(entry, true);
        }
    }

    /// Logs a request that ended now. Never blocks.
    pub fn log_request(&self, entry: RequestEntry) {
        if self.is_enabled() {
            self.share_request(entry, true);
        }
    }

    /// As [`log`](Self::log), for who has logs of its own: the record, which is written here only if `is_written`. Taps and the
    /// observer see it in any case.
    pub fn share(&self, entry: Entry, is_written: bool) -> Arc<Record> {
        self.send(Ended::Connection(entry), is_written)
    }

    /// As [`log_request`](Self::log_request), likewise.
    pub fn share_request(&self, entry: RequestEntry, is_written: bool) -> Arc<Record> {
        self.send(Ended::Request(entry), is_written)
    }

    fn send(&self, ended: Ended, is_written: bool) -> Arc<Record> {
        let record = Arc::new(Record { ended, is_open: false, time: SystemTime::now() });
        if self.taps.is_open() {
            self.taps.offer(&record);
        }
        if let Some(observe) = &self.observer {
            observe(&record);
        }
        if let Some((sink, format)) = self.writer.as_ref().filter(|_| is_written) {
            sink.send(Line { record: record.clone(), format: *format });
        }
        record
    }

    /// Registers `ambit_access_log_dropped_total` and `ambit_access_log_failed_writes_total`, and the metrics of taps.
    pub fn register(&self, registry: &Registry) {
        self.taps.register(registry);
        let Some((sink, _)) = &self.writer else { return };
        let read = |counter: fn(&crate::sink::SinkMetrics) -> &AtomicU64| {
            let metrics = Arc::clone(sink.metrics());
            move || counter(&metrics).load(Ordering::Relaxed)
        };
        registry.counter_from(
            "ambit_access_log_dropped",
            "Access log lines dropped because the writer did not keep up or could not write",
            read(|metrics| &metrics.dropped),
        );
        registry.counter_from(
            "ambit_access_log_failed_writes",
            "Writes to the access log that failed",
            read(|metrics| &metrics.failed_writes),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_of_a_request_are_kept_apart() {
        let texts = RequestTexts::new("web", "/a", Some("1"), Some("curl"));
        assert_eq!((texts.authority(), texts.path()), ("web", "/a"));
        assert_eq!((texts.request_id(), texts.user_agent()), (Some("1"), Some("curl")));
        let texts = RequestTexts::new("", "/", None, Some(""));
        assert_eq!((texts.authority(), texts.path()), ("", "/"));
        assert_eq!((texts.request_id(), texts.user_agent()), (None, Some("")));
    }
}
