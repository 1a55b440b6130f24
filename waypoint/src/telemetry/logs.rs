//! Which logs a request or connection is in: the proxy's own, and those of collectors.

use std::sync::Arc;

use ambit_api::l7;
use ambit_otlp::{KeyValue, LogRecord, SeverityNumber, integer, nanos, text};
use ambit_telemetry::access::{Ended, FieldValue, Record};
use ambit_traffic::{LogFacts, LogFilter};

use super::{Collector, Exports};
use crate::proxy::Worker;

/// The logs of a destination.
#[derive(Debug)]
pub struct Logs {
    /// The proxy's own; none: nothing is written to it.
    own: Option<Selection>,
    otlp: Vec<OtlpLog>,
}

/// What a log has: all, or what a filter selects.
#[derive(Debug)]
struct Selection(Option<LogFilter>);

/// The log of a collector.
#[derive(Debug)]
struct OtlpLog {
    collector: Arc<Collector>,
    name: Box<str>,
    selection: Selection,
}

/// The span that a log record is of.
#[derive(Debug, Clone, Copy)]
pub struct SpanRef {
    /// Its trace.
    pub trace_id: u128,
    /// Itself.
    pub span_id: u64,
}

impl Default for Logs {
    /// Everything is written to the proxy's own log.
    fn default() -> Self {
        Self { own: Some(Selection(None)), otlp: Vec::new() }
    }
}

impl Logs {
    pub(super) fn new(sources: &[l7::AccessLog], known: &mut Vec<Arc<Collector>>, exports: &Exports) -> Self {
        let mut logs = Self { own: None, otlp: Vec::new() };
        for source in sources {
            let selection = Selection::new(&source.filter);
            match &source.collector {
                None => logs.own = Some(selection),
                Some(collector) => logs.otlp.push(OtlpLog {
                    collector: super::collector(collector, known, exports),
                    name: source.log_name.as_str().into(),
                    selection,
                }),
            }
        }
        logs
    }

    pub(super) fn collectors(&self) -> impl Iterator<Item = &Arc<Collector>> {
        self.otlp.iter().map(|log| &log.collector)
    }

    fn filters(&self) -> impl Iterator<Item = &LogFilter> {
        let all = self.own.iter().chain(self.otlp.iter().map(|log| &log.selection));
        all.filter_map(|selection| selection.0.as_ref())
    }

    /// Whether filters must see what was asked for.
    pub fn has_filters(&self) -> bool {
        self.filters().next().is_some()
    }

    /// Whether filters must see the headers of requests.
    pub fn reads_headers(&self) -> bool {
        self.filters().any(LogFilter::reads_headers)
    }

    /// Whether a record is written to the proxy's own log.
    pub fn is_written(&self, facts: &LogFacts<'_>) -> bool {
        self.own.as_ref().is_some_and(|own| own.selects(facts))
    }

    /// Whether collectors get log records.
    pub fn exports(&self) -> bool {
        !self.otlp.is_empty()
    }

    /// Sends a record to the collectors that it is for.
    pub fn export(&self, worker: &Arc<Worker>, record: &Record, facts: &LogFacts<'_>, span: Option<SpanRef>) {
        for log in self.otlp.iter().filter(|log| log.selection.selects(facts)) {
            log.collector.export_log(worker, log_record(record, &log.name, span));
        }
    }
}

impl Selection {
    /// A filter that can't be read lets everything through; the control plane has said so.
    fn new(filter: &str) -> Self {
        if filter.is_empty() {
            return Self(None);
        }
        Self(
            LogFilter::compile(filter)
                .inspect_err(
                    |error| tracing::warn!(filter, %error, "a filter of the access log can't be read"),
                )
                .ok(),
        )
    }

    fn selects(&self, facts: &LogFacts<'_>) -> bool {
        self.0.as_ref().is_none_or(|filter| filter.holds(facts))
    }
}

/// A record of the access log in the form of OpenTelemetry: its fields are attributes.
fn log_record(record: &Record, name: &str, span: Option<SpanRef>) -> LogRecord {
    let mut attributes: Vec<KeyValue> = Vec::new();
    if !name.is_empty() {
        attributes.push(text("log_name", name));
    }
    record.each_field(|key, value| {
        attributes.push(match value {
            FieldValue::Text(value) => text(key, value),
            FieldValue::Number(value) => integer(key, value),
        });
    });
    let body = match &record.ended {
        Ended::Request(entry) => {
            let texts = &entry.texts;
            format!("{} {}{} {}", entry.method, texts.authority(), texts.path(), entry.code)
        }
        Ended::Connection(entry) => match &entry.service {
            Some(service) => format!("connection to {service}"),
            None => "connection".to_owned(),
        },
    };
    let (severity, severity_text) = match record.has_failed() {
        true => (SeverityNumber::Error, "ERROR"),
        false => (SeverityNumber::Info, "INFO"),
    };
    LogRecord {
        time_unix_nano: nanos(record.time),
        observed_time_unix_nano: nanos(record.time),
        severity_number: severity.into(),
        severity_text: severity_text.to_owned(),
        body: text("", body).value,
        attributes,
        flags: u32::from(span.is_some()),
        trace_id: span.map(|span| span.trace_id.to_be_bytes().to_vec().into()).unwrap_or_default(),
        span_id: span.map(|span| span.span_id.to_be_bytes().to_vec().into()).unwrap_or_default(),
    }
}
