//! Batches as the messages that collectors take.

use ambit_api::otlp::collector::logs::v1::ExportLogsServiceRequest;
use ambit_api::otlp::collector::trace::v1::ExportTraceServiceRequest;
use ambit_api::otlp::common::v1::{InstrumentationScope, KeyValue};
use ambit_api::otlp::logs::v1::{LogRecord, ResourceLogs, ScopeLogs};
use ambit_api::otlp::resource::v1::Resource;
use ambit_api::otlp::trace::v1::{ResourceSpans, ScopeSpans, Span};

/// Who reports: a proxy, as every batch of it says.
#[derive(Debug, Clone)]
pub struct Reporter {
    /// Attributes of the resource; `service.name` is among them.
    pub resource: Vec<KeyValue>,
    /// The program, as the instrumentation scope.
    pub program: &'static str,
    /// Its version.
    pub version: &'static str,
}

impl Reporter {
    fn resource(&self) -> Option<Resource> {
        Some(Resource { attributes: self.resource.clone() })
    }

    fn scope(&self) -> Option<InstrumentationScope> {
        Some(InstrumentationScope { name: self.program.to_owned(), version: self.version.to_owned() })
    }
}

/// Spans as a call to a collector.
pub fn spans(reporter: &Reporter, spans: Vec<Span>) -> ExportTraceServiceRequest {
    let scope_spans = vec![ScopeSpans { scope: reporter.scope(), spans, ..ScopeSpans::default() }];
    let all = ResourceSpans { resource: reporter.resource(), scope_spans, ..ResourceSpans::default() };
    ExportTraceServiceRequest { resource_spans: vec![all] }
}

/// Log records as a call to a collector.
pub fn logs(reporter: &Reporter, log_records: Vec<LogRecord>) -> ExportLogsServiceRequest {
    let scope_logs = vec![ScopeLogs { scope: reporter.scope(), log_records, ..ScopeLogs::default() }];
    let all = ResourceLogs { resource: reporter.resource(), scope_logs, ..ResourceLogs::default() };
    ExportLogsServiceRequest { resource_logs: vec![all] }
}
