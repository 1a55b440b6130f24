//! Which logs a record goes to: as Telemetry objects say it, or to the proxy's own.

use std::sync::Arc;

use ambit_telemetry::access::{Entry, RequestEntry};
use ambit_traffic::LogFacts;
use http::HeaderMap;
use http::request::Parts;

use super::Record;
use crate::accept::Inbound;
use crate::sanitise::Sane;
use crate::telemetry::Telemetry;
use crate::telemetry::logs::{Logs, SpanRef};

/// What filters see of a request beside what its record has.
#[derive(Debug, Default)]
pub(super) struct FilterInput {
    target: Box<str>,
    query: Option<Box<str>>,
    host: Box<str>,
    scheme: &'static str,
    headers: HeaderMap,
}

impl FilterInput {
    /// `None` where no filter wants to see it.
    pub(super) fn keep(logs: &Logs, sane: &Sane, parts: &Parts) -> Option<Box<Self>> {
        logs.has_filters().then(|| {
            let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
            let headers = if logs.reads_headers() { parts.headers.clone() } else { HeaderMap::new() };
            Box::new(Self {
                target: target.into(),
                query: parts.uri.query().map(Into::into),
                host: sane.authority.clone(),
                scheme: sane.scheme,
                headers,
            })
        })
    }
}

/// Hands a record to the logs that it is for.
pub(super) fn log_request(
    inbound: &Arc<Inbound>,
    telemetry: Option<&Telemetry>,
    asked: Option<&FilterInput>,
    entry: RequestEntry,
    span: Option<SpanRef>,
) {
    let log = &inbound.worker.reporter.log;
    let Some(telemetry) = telemetry else { return log.log_request(entry) };
    let none = FilterInput::default();
    let asked = asked.unwrap_or(&none);
    let (method, texts) = (entry.method.clone(), entry.texts.clone());
    let route = entry.route.as_ref().map(ToString::to_string);
    let facts = LogFacts {
        method: method.as_str(),
        target: &asked.target,
        path: texts.path(),
        query: asked.query.as_deref(),
        host: &asked.host,
        scheme: asked.scheme,
        protocol: entry.protocol,
        headers: &asked.headers,
        request_size: entry.bytes_received,
        code: entry.code,
        grpc_status: entry.grpc_status,
        flags: entry.flags,
        response_size: entry.bytes_sent,
        route: route.as_deref().unwrap_or_default(),
        ..of_connection(inbound, &asked.headers)
    };
    let record = log.share_request(entry, telemetry.logs.is_written(&facts));
    telemetry.logs.export(&inbound.worker, &record, &facts, span);
}

/// The same for a connection that was passed on. A filter about requests selects none.
pub(super) fn log_connection(inbound: &Arc<Inbound>, entry: Entry) {
    let log = &inbound.worker.reporter.log;
    let published = inbound.worker.proxy.published.load();
    let Some(telemetry) = published.telemetry.of(&inbound.destination) else { return log.log(entry) };
    let headers = HeaderMap::new();
    let facts = LogFacts {
        request_size: entry.bytes_received,
        response_size: entry.bytes_sent,
        ..of_connection(inbound, &headers)
    };
    let record = log.share(entry, telemetry.logs.is_written(&facts));
    telemetry.logs.export(&inbound.worker, &record, &facts, None);
}

/// What is known of a connection, without any request.
fn of_connection<'a>(inbound: &'a Inbound, headers: &'a HeaderMap) -> LogFacts<'a> {
    LogFacts {
        method: "",
        target: "",
        path: "",
        query: None,
        host: "",
        scheme: "",
        protocol: "",
        headers,
        request_size: 0,
        code: 0,
        grpc_status: None,
        flags: "-",
        response_size: 0,
        source_identity: inbound.identity().map(|identity| identity.as_str()),
        source_address: inbound.source.ip(),
        destination_host: inbound.destination.service().map_or("", |service| &service.host.hostname),
        destination_port: inbound.destination.port(),
        route: "",
    }
}

impl Record {
    /// Whether anybody wants the record of this request.
    pub(super) fn is_logged(&self) -> bool {
        let exports = self.telemetry.as_ref().is_some_and(|telemetry| telemetry.logs.exports());
        exports || self.inbound.worker.reporter.log.is_enabled()
    }
}

/// Whether anybody wants the record of a connection.
pub(super) fn is_connection_logged(inbound: &Inbound) -> bool {
    let published = inbound.worker.proxy.published.load();
    let telemetry = published.telemetry.of(&inbound.destination);
    telemetry.is_some_and(|telemetry| telemetry.logs.exports()) || inbound.worker.reporter.log.is_enabled()
}
