//! Spans and log records for collectors that speak the OpenTelemetry protocol (OTLP).
//!
//! A proxy hands what it reports to an [`Exporter`], which never waits: it queues within a bound, and what finds the queue full is
//! dropped and counted. Batches are sent by whatever the proxy passes to [`Exporter::run`]; nothing here opens a socket.

mod attributes;
mod exporter;
mod message;

pub use ambit_api::otlp::common::v1::KeyValue;
pub use ambit_api::otlp::logs::v1::{LogRecord, SeverityNumber};
pub use ambit_api::otlp::trace::v1::span::SpanKind;
pub use ambit_api::otlp::trace::v1::status::StatusCode;
pub use ambit_api::otlp::trace::v1::{Span, Status};
pub use attributes::{bounded, integer, nanos, text};
pub use exporter::{Batching, Counts, Exporter, Fault, Pushed};
pub use message::{Reporter, logs, spans};
