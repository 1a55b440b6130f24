//! The access log: one line a connection, when it ends.
//!
//! A proxy fills an [`Entry`] (shared strings, no formatting) and hands it over; the writer's thread
//! renders it. Nothing waits for the disk.

mod format;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crate::Registry;
use crate::sink::{LogWriter, Render, Sink, Target};

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
    /// The direction.
    pub direction: Direction,
    /// Bytes from client to server for outbound, as the reporting proxy counts them.
    pub bytes_sent: u64,
    /// Bytes the other way.
    pub bytes_received: u64,
    /// From accept to end.
    pub duration: Duration,
    /// Why it failed; a failed connection is logged at level `error`.
    pub error: Option<String>,
}

/// A request that ended, as a waypoint or gateway saw it.
#[derive(Debug, Clone)]
pub struct RequestEntry {
    /// The client.
    pub source: Party,
    /// The endpoint that answered, or was tried last.
    pub destination: Party,
    /// Host name of the service dialled.
    pub service: Option<Arc<str>>,
    /// `HTTP/1.1`, `HTTP/2`, ...
    pub protocol: &'static str,
    /// The method.
    pub method: Box<str>,
    /// The host that was asked for.
    pub authority: Box<str>,
    /// The path, without the query.
    pub path: Box<str>,
    /// The answer's status; 0 if the client went before there was one.
    pub code: u16,
    /// gRPC's own status.
    pub grpc_status: Option<u8>,
    /// Why the answer is not the endpoint's, or `-`.
    pub flags: &'static str,
    /// The route that was followed.
    pub route: Option<Box<str>>,
    /// How often it was sent.
    pub attempts: u32,
    /// `x-request-id`.
    pub request_id: Option<Box<str>>,
    /// `user-agent`.
    pub user_agent: Option<Box<str>>,
    /// Bytes of the response's body.
    pub bytes_sent: u64,
    /// Bytes of the request's body.
    pub bytes_received: u64,
    /// From the request's head to the end of the answer.
    pub duration: Duration,
    /// Why it failed.
    pub error: Option<String>,
}

/// The access log. Cheap to clone; a disabled one does nothing.
#[derive(Debug, Clone)]
pub struct AccessLog {
    writer: Option<(Sink<Line>, Format)>,
}

/// An entry on its way to the writer.
#[derive(Debug)]
struct Line {
    entry: LineOf,
    time: SystemTime,
    format: Format,
}

#[derive(Debug)]
enum LineOf {
    Connection(Box<Entry>),
    Request(Box<RequestEntry>),
}

impl Render for Line {
    fn render(&self, line: &mut Vec<u8>) {
        match (&self.entry, self.format) {
            (LineOf::Connection(entry), Format::Tab) => format::tab(&**entry, self.time, line),
            (LineOf::Connection(entry), Format::Json) => format::json(&**entry, self.time, line),
            (LineOf::Request(entry), Format::Tab) => format::tab(&**entry, self.time, line),
            (LineOf::Request(entry), Format::Json) => format::json(&**entry, self.time, line),
        }
    }
}

impl AccessLog {
    /// Opens the target and starts the writer; keep the [`LogWriter`] until the program ends.
    pub fn start(config: Config) -> io::Result<(Self, LogWriter)> {
        let Config { format, target, queue } = config;
        let (sink, writer) = Sink::spawn("access-log", target, queue)?;
        Ok((Self { writer: Some((sink, format)) }, writer))
    }

    /// A log that writes nothing.
    pub fn disabled() -> Self {
        Self { writer: None }
    }

    /// Whether entries are written. A caller need not build them otherwise.
    pub fn is_enabled(&self) -> bool {
        self.writer.is_some()
    }

    /// Logs a connection that ended now. Never blocks.
    pub fn log(&self, entry: Entry) {
        self.send(LineOf::Connection(Box::new(entry)));
    }

    /// Logs a request that ended now. Never blocks.
    pub fn log_request(&self, entry: RequestEntry) {
        self.send(LineOf::Request(Box::new(entry)));
    }

    fn send(&self, entry: LineOf) {
        if let Some((sink, format)) = &self.writer {
            sink.send(Line { entry, time: SystemTime::now(), format: *format });
        }
    }

    /// Registers `ambit_access_log_dropped_total` and `ambit_access_log_failed_writes_total`.
    pub fn register(&self, registry: &Registry) {
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
