//! A collector of spans and log records: a service that is reached as any backend is, through the mesh where it is in it.
//!
//! Each worker has a queue of its own for each collector, and sends from it; a request never waits for that.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use ambit_api::otlp::collector::logs::v1::logs_service_client::LogsServiceClient;
use ambit_api::otlp::collector::trace::v1::trace_service_client::TraceServiceClient;
use ambit_otlp::{Batching, Counts, Exporter, Fault, KeyValue, LogRecord, Pushed, Reporter, Span, text};
use ambit_route::Backend;
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use prost::Message;
use tonic::Code;
use tonic::metadata::MetadataMap;

use crate::balance::{self, Target};
use crate::body::RequestBody;
use crate::external::{Channel, exchange};
use crate::proxy::Worker;

/// How long one export may take where nothing else is said (OTLP exporter specification).
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer of a collector.
const MAX_ANSWER: usize = 64 << 10;

/// What all collectors share.
#[derive(Debug, Clone)]
pub struct Exports {
    /// Workers, each of which has queues.
    workers: usize,
    /// What became of spans.
    pub spans: Arc<Counts>,
    /// What became of log records.
    pub logs: Arc<Counts>,
}

impl Exports {
    /// For so many workers.
    pub fn new(workers: usize) -> Self {
        Self { workers, spans: Arc::default(), logs: Arc::default() }
    }
}

/// A collector.
#[derive(Debug)]
pub struct Collector {
    source: l7::Collector,
    backend: Backend,
    timeout: Duration,
    /// Where spans and log records are sent to by HTTP; by gRPC where it is none.
    path: Option<Uri>,
    headers: HeaderMap,
    /// By worker.
    spans: Box<[Exporter<Span>]>,
    logs: Box<[Exporter<LogRecord>]>,
}

impl Collector {
    /// A collector for which nothing waits.
    pub fn new(source: &l7::Collector, exports: &Exports) -> Self {
        let port = u16::try_from(source.port).unwrap_or_default();
        let fields = match &source.http {
            Some(http) => &http.headers,
            None => &source.metadata,
        };
        let queues = |_| Exporter::new(Batching::default(), exports.spans.clone());
        let log_queues = |_| Exporter::new(Batching::default(), exports.logs.clone());
        Self {
            backend: Backend {
                namespace: source.namespace.as_str().into(),
                hostname: source.hostname.to_ascii_lowercase().into(),
                port,
                subset: None,
                filters: Box::default(),
                invalid: None,
            },
            timeout: match source.timeout_nanos {
                0 => TIMEOUT,
                nanos => Duration::from_nanos(nanos),
            },
            path: source.http.as_ref().map(|http| http.path.parse().unwrap_or_default()),
            headers: fields.iter().filter_map(field).collect(),
            spans: (0..exports.workers).map(queues).collect(),
            logs: (0..exports.workers).map(log_queues).collect(),
            source: source.clone(),
        }
    }

    /// What it was made of.
    pub fn source(&self) -> &l7::Collector {
        &self.source
    }

    /// Queues a span for it. Never waits.
    pub fn export_span(self: &Arc<Self>, worker: &Arc<Worker>, span: Span) {
        let Some(exporter) = self.spans.get(worker.index) else { return };
        if exporter.push(span) == Pushed::Start {
            let (collector, worker, exporter) = (self.clone(), worker.clone(), exporter.clone());
            start(async move { exporter.run(|batch| collector.send_spans(&worker, batch)).await });
        }
    }

    /// Queues a log record for it. Never waits.
    pub fn export_log(self: &Arc<Self>, worker: &Arc<Worker>, record: LogRecord) {
        let Some(exporter) = self.logs.get(worker.index) else { return };
        if exporter.push(record) == Pushed::Start {
            let (collector, worker, exporter) = (self.clone(), worker.clone(), exporter.clone());
            start(async move { exporter.run(|batch| collector.send_logs(&worker, batch)).await });
        }
    }

    /// Sends what waits, and waits until that has happened or was given up. For the end of the program.
    pub async fn flush(&self) {
        for exporter in &self.spans {
            exporter.flush().await;
        }
        for exporter in &self.logs {
            exporter.flush().await;
        }
    }

    async fn send_spans(&self, worker: &Arc<Worker>, batch: Arc<[Span]>) -> Result<u64, Fault> {
        let message = ambit_otlp::spans(&reporter(worker), batch.to_vec());
        let sending = async {
            if let Some(path) = &self.path {
                return self.post(worker, path, message.encode_to_vec().into()).await;
            }
            let (channel, origin) = self.channel(worker)?;
            let mut client =
                TraceServiceClient::with_origin(channel, origin).max_decoding_message_size(MAX_ANSWER);
            let answer = client.export(self.call(message)).await.map_err(|status| fault(&status))?;
            let partial = answer.into_inner().partial_success.unwrap_or_default();
            Ok(refused(partial.rejected_spans, &partial.error_message))
        };
        self.in_time(sending).await
    }

    async fn send_logs(&self, worker: &Arc<Worker>, batch: Arc<[LogRecord]>) -> Result<u64, Fault> {
        let message = ambit_otlp::logs(&reporter(worker), batch.to_vec());
        let sending = async {
            if let Some(path) = &self.path {
                return self.post(worker, path, message.encode_to_vec().into()).await;
            }
            let (channel, origin) = self.channel(worker)?;
            let mut client =
                LogsServiceClient::with_origin(channel, origin).max_decoding_message_size(MAX_ANSWER);
            let answer = client.export(self.call(message)).await.map_err(|status| fault(&status))?;
            let partial = answer.into_inner().partial_success.unwrap_or_default();
            Ok(refused(partial.rejected_log_records, &partial.error_message))
        };
        self.in_time(sending).await
    }

    async fn in_time(&self, sending: impl Future<Output = Result<u64, Fault>>) -> Result<u64, Fault> {
        let sent = tokio::time::timeout(self.timeout, Box::pin(sending)).await;
        sent.unwrap_or_else(|_| Err(later(format!("no answer within {:?}", self.timeout))))
    }

    fn target(&self, worker: &Worker) -> Result<Target, Fault> {
        let published = worker.proxy.published.load_full();
        balance::of_backend(&worker.proxy, &published, &self.backend).map_err(later)
    }

    fn channel(&self, worker: &Arc<Worker>) -> Result<(Channel, Uri), Fault> {
        let target = self.target(worker)?;
        let origin = Uri::try_from(format!("http://{}", target.authority));
        let origin = origin.map_err(|error| Fault::Refused(error.to_string()))?;
        Ok((Channel { worker: worker.clone(), source: own_address(worker), target }, origin))
    }

    fn call<M>(&self, message: M) -> tonic::Request<M> {
        let mut request = tonic::Request::new(message);
        *request.metadata_mut() = MetadataMap::from_headers(self.headers.clone());
        request
    }

    async fn post(&self, worker: &Worker, path: &Uri, body: Bytes) -> Result<u64, Fault> {
        let target = self.target(worker)?;
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = path.clone();
        *request.headers_mut() = self.headers.clone();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        let host = HeaderValue::try_from(target.authority.to_string());
        headers.insert(HOST, host.map_err(|error| Fault::Refused(error.to_string()))?);
        let request = request.map(|()| RequestBody::Whole(Some(body)));
        let answered = Box::pin(exchange(worker, own_address(worker), &target, false, request)).await;
        let (answer, returned) = answered.map_err(|failure| later(failure.to_string()))?;
        let (parts, body) = answer.into_parts();
        Limited::new(body, MAX_ANSWER).collect().await.map_err(|error| later(error.to_string()))?;
        returned.give_back();
        let reason = format!("the answer is {}", parts.status);
        match parts.status {
            status if status.is_success() => Ok(0),
            // OTLP/HTTP: these may be sent again.
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => {
                let seconds =
                    parts.headers.get(RETRY_AFTER).and_then(|after| after.to_str().ok()?.parse().ok());
                Err(Fault::Retry { reason, after: seconds.map(Duration::from_secs) })
            }
            _ => Err(Fault::Refused(reason)),
        }
    }
}

/// Starts a task of the worker that this runs on. There is none when the program ends.
fn start(task: impl Future<Output = ()> + Send + 'static) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(task);
    }
}

fn later(reason: String) -> Fault {
    Fault::Retry { reason, after: None }
}

/// OTLP/gRPC: which calls may be repeated. What has no status of the collector's own was not sent, or got no answer.
fn fault(status: &tonic::Status) -> Fault {
    let reason = format!("{}: {}", status.code(), status.message());
    match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unknown => later(reason),
        _ => Fault::Refused(reason),
    }
}

/// Items that a collector refused of a batch.
fn refused(count: i64, message: &str) -> u64 {
    let count = u64::try_from(count).unwrap_or_default();
    if count > 0 {
        tracing::warn!(count, message, "a collector refused a part of what was exported");
    }
    count
}

fn field(source: &l7::ExportHeader) -> Option<(HeaderName, HeaderValue)> {
    use l7::export_header::Source;
    let value = match source.source.as_ref()? {
        Source::Value(value) => value.clone(),
        Source::Environment(name) => std::env::var(name).ok()?,
    };
    let mut value = HeaderValue::try_from(value).ok()?;
    // It may be a credential.
    value.set_sensitive(true);
    Some((HeaderName::try_from(&source.name).ok()?, value))
}

fn own_address(worker: &Worker) -> SocketAddr {
    let own = balance::own_address(&worker.proxy).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    SocketAddr::new(own, 0)
}

/// The proxy as collectors see it.
fn reporter(worker: &Worker) -> Reporter {
    let proxy = &worker.proxy;
    let published = proxy.published.load();
    let mut resource: Vec<KeyValue> = Vec::new();
    if let Ok(own) = balance::own_workload(proxy, &published.directory) {
        // Istio's name of a proxy's service, which Kiali looks for.
        resource.push(text("service.name", format!("{}.{}", own.canonical_name, own.namespace)));
        resource.push(text("service.version", &*own.canonical_revision));
        resource.push(text("service.instance.id", &*own.name));
        resource.push(text("k8s.namespace.name", &*own.namespace));
        resource.push(text("k8s.pod.name", &*own.name));
        resource.push(text("k8s.node.name", &*own.node));
        resource.push(text("k8s.cluster.name", &*own.cluster_id));
        resource.push(text("hostname", &*own.name));
    }
    Reporter { resource, program: "ambit-waypoint", version: env!("CARGO_PKG_VERSION") }
}
