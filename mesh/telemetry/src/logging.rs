//! The program log: its levels can be changed at run time, and writing a line never blocks.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry as Subscriber, reload};

use crate::Registry;
use crate::sink::{LogWriter, Sink, SinkMetrics, Target};

/// Lines of the program's log that may wait for the writer.
const QUEUE: usize = 8192;
/// Longest line of the program's log, in bytes; the rest is cut.
const MAX_LINE: usize = 64 << 10;

/// How the program's log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why a level was not set.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    /// The text is no filter.
    #[error("{filter:?} is not a log filter like `info` or `info,ztunnel::dns=debug`: {source}")]
    Parse {
        /// What was given.
        filter: String,
        /// Where it went wrong.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The subscriber is gone.
    #[error("the log's level cannot be changed: {0}")]
    Gone(reload::Error),
}

/// Why logging was not started.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The filter is wrong.
    #[error(transparent)]
    Level(#[from] LevelError),
    /// The writer's thread could not be started or its file not be opened.
    #[error("cannot start the log's writer: {0}")]
    Writer(#[from] io::Error),
    /// Something else logs already.
    #[error("a log is installed already")]
    Installed,
}

/// Changes the program's log level. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LevelHandle {
    reload: reload::Handle<EnvFilter, Subscriber>,
    initial: Arc<str>,
}

impl LevelHandle {
    /// Sets the filter: `info`, or per module `info,ztunnel::dns=debug`. `reset` restores the filter from program start.
    pub fn set(&self, filter: &str) -> Result<(), LevelError> {
        let filter = if filter == "reset" { &*self.initial } else { filter };
        self.reload.reload(parse(filter)?).map_err(LevelError::Gone)
    }

    /// The filter in force.
    pub fn get(&self) -> String {
        self.reload.with_current(ToString::to_string).unwrap_or_default()
    }
}

fn parse(filter: &str) -> Result<EnvFilter, LevelError> {
    EnvFilter::try_new(filter).map_err(|source| LevelError::Parse { filter: filter.to_owned(), source })
}

/// The running log, returned by [`init`].
#[derive(Debug)]
#[must_use = "dropping the writer ends the log"]
pub struct Logging {
    /// Changes the level.
    pub level: LevelHandle,
    /// Keep until the program ends.
    pub writer: LogWriter,
    metrics: Arc<SinkMetrics>,
}

impl Logging {
    /// Registers `ambit_log_dropped_total`.
    pub fn register(&self, registry: &Registry) {
        let metrics = Arc::clone(&self.metrics);
        registry.counter_from(
            "ambit_log_dropped",
            "Lines of the program's log dropped because the writer did not keep up",
            move || metrics.dropped.load(Ordering::Relaxed),
        );
    }
}

/// Starts the program's log. Called once, at the start.
pub fn init(format: LogFormat, filter: &str, target: Target) -> Result<Logging, InitError> {
    let (sink, writer) = Sink::spawn("log", target, QUEUE)?;
    let metrics = Arc::clone(sink.metrics());
    let (layer, reload) = reload::Layer::new(parse(filter)?);
    let lines = Lines(sink);
    let subscriber = tracing_subscriber::registry().with(layer);
    let installed = match format {
        LogFormat::Text => {
            subscriber.with(tracing_subscriber::fmt::layer().with_ansi(false).with_writer(lines)).try_init()
        }
        LogFormat::Json => {
            let layer = tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(lines);
            subscriber.with(layer).try_init()
        }
    };
    installed.map_err(|_already| InitError::Installed)?;
    Ok(Logging { level: LevelHandle { reload, initial: filter.into() }, writer, metrics })
}

/// Hands each event's line to the writer as one piece.
struct Lines(Sink<Vec<u8>>);

struct LineWriter {
    sink: Sink<Vec<u8>>,
    line: Vec<u8>,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = LineWriter;

    fn make_writer(&'a self) -> LineWriter {
        LineWriter { sink: self.0.clone(), line: Vec::with_capacity(256) }
    }
}

impl io::Write for LineWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = MAX_LINE.saturating_sub(self.line.len());
        self.line.extend(bytes.iter().take(room));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        let mut line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return;
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        self.sink.send(line);
    }
}
