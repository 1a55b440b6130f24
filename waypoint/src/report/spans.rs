//! The spans of a request, when its answer has ended: one for the request itself, and one for each try below it.
//!
//! Attributes have the names that Envoy and Istio give them, which Kiali reads, and beside these those of OpenTelemetry's semantic
//! conventions for HTTP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ambit_directory::{Workload, WorkloadType};
use ambit_hbone::WorkloadKind;
use ambit_otlp::{KeyValue, Span, SpanKind, Status, StatusCode, integer, nanos, text};
use http::Version;

use super::{Record, service};
use crate::accept::{Destination, Inbound};
use crate::balance::{Endpoint, own_workload};
use crate::telemetry::logs::SpanRef;
use crate::telemetry::trace::{RequestTrace, Try};

/// Bits 8 and 9 of a span's flags: whether its parent is of another process is known, and it is.
const HAS_IS_REMOTE: u32 = 0x100;
const IS_REMOTE: u32 = 0x200;
/// Bit 0: it is sampled.
const SAMPLED: u32 = 1;

impl Record {
    /// Exports the spans of a request that is traced, and returns its own.
    pub(super) fn export_spans(
        &mut self,
        duration: Duration,
        received: u64,
        grpc_status: Option<u8>,
    ) -> Option<SpanRef> {
        let mut trace = self.trace.take()?;
        let end = trace.start.checked_add(duration).unwrap_or_else(SystemTime::now);
        trace.end_try(end);
        let shared = self.shared_attributes(&trace);
        let of_tries: Vec<Span> =
            trace.tries.iter().map(|it| self.span_of_try(&trace, it, &shared)).collect();
        let own = self.span_of_request(&trace, end, received, grpc_status, shared);
        let worker = &self.inbound.worker;
        for span in of_tries.into_iter().chain([own]) {
            trace.tracing.collector.export_span(worker, span);
        }
        Some(SpanRef { trace_id: trace.trace_id, span_id: trace.span_id })
    }

    fn span_of_request(
        &self,
        trace: &RequestTrace,
        end: SystemTime,
        received: u64,
        grpc_status: Option<u8>,
        mut attributes: Vec<KeyValue>,
    ) -> Span {
        let inbound = &self.inbound;
        let is_error = self.code >= 500 || self.code == 0 || grpc_status.is_some_and(is_server_error);
        attributes.extend(upstream(inbound, self.endpoint.as_deref()));
        attributes.extend([
            text("peer.address", inbound.source.ip().to_string()),
            text("downstream_cluster", "-"),
            text("request_size", received.to_string()),
            text("response_size", self.sent.to_string()),
            text("response_flags", self.flags),
            text("http.status_code", self.code.to_string()),
            integer("http.request.body.size", received),
            integer("http.response.body.size", self.sent),
            text("client.address", inbound.source.ip().to_string()),
        ]);
        if self.code != 0 {
            attributes.push(integer("http.response.status_code", self.code));
        }
        if let Some(status) = grpc_status {
            attributes.push(text("grpc.status_code", status.to_string()));
            attributes.push(integer("rpc.grpc.status_code", status));
        }
        if let Some(route) = &self.route {
            attributes.push(text("ambit.route", route.to_string()));
        }
        if is_error {
            attributes.push(text("error", "true"));
            attributes.push(text("error.type", error_type(self.code, self.flags)));
        }
        attributes.extend(trace.tags.iter().cloned());
        Span {
            parent_span_id: trace.parent.map(|parent| id(parent.span_id)).unwrap_or_default(),
            flags: SAMPLED | HAS_IS_REMOTE | trace.parent.map_or(0, |_| IS_REMOTE),
            name: self.operation(self.endpoint.as_deref()),
            kind: SpanKind::Server.into(),
            start_time_unix_nano: nanos(trace.start),
            end_time_unix_nano: nanos(end),
            attributes,
            status: Some(status(is_error, self.error.as_deref())),
            ..self.span(trace, trace.span_id)
        }
    }

    fn span_of_try(&self, trace: &RequestTrace, tried: &Try, shared: &[KeyValue]) -> Span {
        let mut attributes = shared.to_vec();
        attributes.extend(upstream(&self.inbound, Some(&tried.endpoint)));
        let is_error = tried.status.is_none_or(|status| status >= 400);
        if let Some(status) = tried.status {
            attributes.push(text("http.status_code", status.to_string()));
            attributes.push(integer("http.response.status_code", status));
        }
        if is_error {
            attributes.push(text("error", "true"));
            let kind = tried.status.map_or_else(|| "connect".to_owned(), |status| status.to_string());
            attributes.push(text("error.type", kind));
        }
        attributes.extend(trace.tags.iter().cloned());
        Span {
            parent_span_id: id(trace.span_id),
            flags: SAMPLED | HAS_IS_REMOTE,
            name: self.operation(Some(&tried.endpoint)),
            kind: SpanKind::Client.into(),
            start_time_unix_nano: nanos(tried.start),
            end_time_unix_nano: nanos(tried.end.unwrap_or(tried.start)),
            attributes,
            status: Some(status(is_error, tried.error.as_deref())),
            ..self.span(trace, tried.span_id)
        }
    }

    fn span(&self, trace: &RequestTrace, span_id: u64) -> Span {
        Span {
            trace_id: trace.trace_id.to_be_bytes().to_vec().into(),
            span_id: id(span_id),
            trace_state: trace.state.to_string(),
            ..Span::default()
        }
    }

    /// The operation, as Istio names it: the service and its port. Of few values, whatever clients ask for.
    fn operation(&self, endpoint: Option<&Endpoint>) -> String {
        let port = self.inbound.destination.port();
        match service(&self.inbound, endpoint) {
            Some(service) => format!("{}:{port}/*", service.host.hostname),
            None => format!("{}/*", self.inbound.destination.host()),
        }
    }

    /// What the spans of a request have in common.
    fn shared_attributes(&self, trace: &RequestTrace) -> Vec<KeyValue> {
        let inbound = &self.inbound;
        let proxy = &inbound.worker.proxy;
        let protocol = match self.version {
            Version::HTTP_10 => "1.0",
            Version::HTTP_2 => "2",
            _ => "1.1",
        };
        let host = host_of(self.texts.authority());
        let mut attributes = vec![
            text("component", "proxy"),
            text("node_id", &*proxy.settings.node_id),
            text("http.url", &*trace.url),
            text("http.method", self.method.as_str()),
            text(
                "http.protocol",
                if protocol == "2" { "HTTP/2".to_owned() } else { format!("HTTP/{protocol}") },
            ),
            text("http.request.method", self.method.as_str()),
            text("url.scheme", trace.scheme),
            text("url.path", self.texts.path()),
            text("server.address", host),
            integer("server.port", inbound.destination.port()),
            text("network.protocol.name", "http"),
            text("network.protocol.version", protocol),
            text("istio.mesh_id", proxy.identity.trust_domain()),
        ];
        let mut add = |key: &str, value: Option<&str>| attributes.extend(value.map(|value| text(key, value)));
        add("url.query", trace.query.as_deref());
        add("guid:x-request-id", self.texts.request_id());
        add("user_agent", self.texts.user_agent());
        add("user_agent.original", self.texts.user_agent());
        let published = proxy.published.load();
        if let Ok(own) = own_workload(proxy, &published.directory) {
            add("zone", Some(&*own.locality.zone).filter(|zone| !zone.is_empty()));
            add("istio.namespace", Some(&own.namespace));
            add("istio.canonical_service", Some(&own.canonical_name));
            add("istio.canonical_revision", Some(&own.canonical_revision));
            add("istio.cluster_id", Some(&own.cluster_id));
        }
        match &inbound.client.workload {
            Some(workload) => {
                attributes.extend(of_workload("source", workload));
                attributes.push(text("istio.downstream.workload", &*workload.workload_name));
                attributes.push(text("istio.downstream.namespace", &*workload.namespace));
            }
            None => attributes.extend(of_client(inbound)),
        }
        attributes
    }
}

/// Where a request goes: the cluster as Envoy names it, and the endpoint.
fn upstream(inbound: &Inbound, endpoint: Option<&Endpoint>) -> Vec<KeyValue> {
    let mut attributes = Vec::new();
    if let Some(service) = service(inbound, endpoint) {
        let (host, port) = (&service.host.hostname, inbound.destination.port());
        let cluster = match &inbound.destination {
            Destination::Listener { .. } => format!("outbound|{port}||{host}"),
            Destination::Service { .. } | Destination::Workload { .. } => {
                format!("inbound-vip|{port}|http|{host}")
            }
        };
        attributes
            .extend([text("upstream_cluster", cluster.clone()), text("upstream_cluster.name", cluster)]);
        attributes.push(text("istio.destination_service", &**host));
    }
    let Some(endpoint) = endpoint else { return attributes };
    attributes.extend(of_address(endpoint.address));
    if let Some(workload) = &endpoint.workload {
        attributes.extend(of_workload("destination", workload));
        attributes.push(text("istio.upstream.workload", &*workload.workload_name));
        attributes.push(text("istio.upstream.namespace", &*workload.namespace));
    }
    attributes
}

fn of_address(address: SocketAddr) -> [KeyValue; 3] {
    [
        text("upstream_address", address.to_string()),
        text("network.peer.address", address.ip().to_string()),
        integer("network.peer.port", address.port()),
    ]
}

/// A workload as Istio's waypoints name it, which Kiali finds workloads by.
fn of_workload(side: &str, workload: &Arc<Workload>) -> Vec<KeyValue> {
    let kind = match workload.workload_type {
        WorkloadType::Deployment => "deployment",
        WorkloadType::CronJob => "cronjob",
        WorkloadType::Pod => "pod",
        WorkloadType::Job => "job",
    };
    let field = |name: &str, value: &str| text(format!("istio.{side}_{name}"), value);
    vec![
        field("workload", &workload.workload_name),
        field("namespace", &workload.namespace),
        field("instance_name", &workload.name),
        field("canonical_service", &workload.canonical_name),
        field("canonical_revision", &workload.canonical_revision),
        field("cluster_id", &workload.cluster_id),
        field("workload_type", kind),
        field("principal", workload.identity.as_str()),
    ]
}

/// A client that the directory does not show to this waypoint: what its proxy says of it, and who it proved to be.
fn of_client(inbound: &Inbound) -> Vec<KeyValue> {
    let mut attributes = Vec::new();
    if let Some(identity) = inbound.identity() {
        attributes.push(text("istio.source_principal", identity.as_str()));
    }
    let Some(baggage) = &inbound.client.baggage else {
        attributes.extend(inbound.identity().map(|it| text("istio.source_namespace", it.namespace())));
        return attributes;
    };
    if let Some((kind, name)) = &baggage.workload {
        let kind = match kind {
            WorkloadKind::Deployment => "deployment",
            WorkloadKind::CronJob => "cronjob",
            WorkloadKind::Pod => "pod",
            WorkloadKind::Job => "job",
        };
        attributes.push(text("istio.source_workload", name));
        attributes.push(text("istio.source_workload_type", kind));
        attributes.push(text("istio.downstream.workload", name));
    }
    attributes.extend([
        text("istio.source_namespace", &baggage.namespace),
        text("istio.source_canonical_service", &baggage.service),
        text("istio.source_canonical_revision", &baggage.version),
        text("istio.source_cluster_id", &baggage.cluster),
        text("istio.downstream.namespace", &baggage.namespace),
    ]);
    attributes
}

/// The host of an authority, without its port.
fn host_of(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => host,
        _ => authority,
    }
}

fn id(id: u64) -> bytes::Bytes {
    id.to_be_bytes().to_vec().into()
}

/// Statuses of gRPC that are a server's error (OpenTelemetry semantic conventions for gRPC).
fn is_server_error(status: u8) -> bool {
    matches!(status, 2 | 4 | 12 | 13 | 14 | 15)
}

fn error_type(code: u16, flags: &str) -> String {
    match (code, flags) {
        (_, flags) if flags != "-" => flags.to_owned(),
        (code, _) => code.to_string(),
    }
}

fn status(is_error: bool, message: Option<&str>) -> Status {
    let code = if is_error { StatusCode::Error } else { StatusCode::Unset };
    let message = message.filter(|_| is_error).unwrap_or_default();
    Status { code: code.into(), message: message.to_owned() }
}
