//! Reports requests: one set of metrics and one line of the access log each, when its answer has ended.

mod logs;
mod spans;

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ambit_directory::{Service, Transport, Workload};
use ambit_identity::SpiffeId;
use ambit_runtime::peers::{End, dialled, party, peer_labels, service_labels};
use ambit_telemetry::access::{
    AccessLog, Dialled, Direction, Entry, Named, Party, RequestEntry, RequestTexts, Status,
};
use ambit_telemetry::tcp::{self, Labels, Security};
use ambit_telemetry::{Outcome, RequestMetrics, RequestSeries, TcpMetrics};
use bytes::Bytes;
use http::header::{HeaderName, USER_AGENT};
use http::request::Parts;
use http::{Method, Request, Response, Version};
use http_body::Frame;
use hyper::body::Incoming;
use parking_lot::Mutex;

use crate::accept::{Destination, Inbound};
use crate::answer::grpc_status;
use crate::balance::Endpoint;
use crate::body::{ResponseBody, Source};
use crate::failure::{DENIED, Failure};
use crate::matching::Routed;
use crate::messages::Messages;
use crate::proxy::Published;
use crate::sanitise::{Sane, is_grpc};
use crate::telemetry::Telemetry;
use crate::telemetry::trace::RequestTrace;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// After this time a request in progress is shown to the observer of the log: it may go on for days.
pub const LONG: Duration = Duration::from_secs(10);

/// Counts and logs.
#[derive(Debug)]
pub struct Reporter {
    /// The families of requests.
    pub requests: RequestMetrics,
    /// The families of connections that are passed on.
    pub connections: TcpMetrics,
    /// The access log.
    pub log: AccessLog,
}

/// What a connection's last requests are counted by and logged with, by what it is made of: to make it costs several allocations.
#[derive(Debug, Default)]
pub struct RecentSeries(Mutex<VecDeque<(SeriesKey, Arc<Recent>)>>);

/// What requests to one endpoint that end alike have in common.
#[derive(Debug)]
struct Recent {
    /// The counters of their labels.
    series: Arc<RequestSeries>,
    /// The endpoint as the access log shows it.
    destination: Arc<Party>,
}

/// Series that are kept for a connection: enough for the endpoints of most services.
const RECENT_SERIES: usize = 16;

/// What the labels and the endpoint of a request depend on beside its client. Holds what it compares, so that no address is used again.
#[derive(Debug, Clone)]
struct SeriesKey {
    workload: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    address: Option<SocketAddr>,
    identity: Option<SpiffeId>,
    tunnelled: bool,
    grpc: bool,
    outcome: Outcome,
}

/// The same, of a request.
#[derive(Clone, Copy)]
struct SeriesOf<'a> {
    endpoint: Option<&'a Endpoint>,
    service: Option<&'a Arc<Service>>,
    grpc: bool,
    outcome: Outcome,
}

impl SeriesOf<'_> {
    fn is_tunnelled(&self) -> bool {
        self.endpoint.is_some_and(|endpoint| endpoint.tunnel.is_some())
    }

    fn to_key(self) -> SeriesKey {
        SeriesKey {
            workload: self.endpoint.and_then(|endpoint| endpoint.workload.clone()),
            service: self.service.cloned(),
            address: self.endpoint.map(|endpoint| endpoint.address),
            identity: self.endpoint.and_then(Endpoint::identity).cloned(),
            tunnelled: self.is_tunnelled(),
            grpc: self.grpc,
            outcome: self.outcome,
        }
    }

    fn is(&self, key: &SeriesKey) -> bool {
        let SeriesKey { workload, service, address, identity, tunnelled, grpc, outcome } = key;
        same(workload.as_ref(), self.endpoint.and_then(|endpoint| endpoint.workload.as_ref()))
            && same(service.as_ref(), self.service)
            && *address == self.endpoint.map(|endpoint| endpoint.address)
            && (*tunnelled, *grpc, *outcome) == (self.is_tunnelled(), self.grpc, self.outcome)
            && identity.as_ref() == self.endpoint.and_then(Endpoint::identity)
    }
}

fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (one, other) => one.is_none() && other.is_none(),
    }
}

impl RecentSeries {
    fn get(&self, of: SeriesOf<'_>, make: impl FnOnce() -> Recent) -> Arc<Recent> {
        let mut recent = self.0.lock();
        if let Some((_, found)) = recent.iter().rev().find(|(known, _)| of.is(known)) {
            return found.clone();
        }
        let made = Arc::new(make());
        if recent.len() >= RECENT_SERIES {
            recent.pop_front();
        }
        recent.push_back((of.to_key(), made.clone()));
        made
    }
}

/// What is known of a request and its answer. Dropped before its answer has ended, it reports that the client left.
#[derive(Debug)]
pub struct Record {
    inbound: Arc<Inbound>,
    since: Instant,
    version: Version,
    method: Method,
    texts: RequestTexts,
    grpc: bool,
    /// What is reported of it beside metrics, where that is not the default.
    telemetry: Option<Arc<Telemetry>>,
    /// What filters of logs see of it.
    asked: Option<Box<logs::FilterInput>>,
    /// Its spans, if it is traced.
    trace: Option<Box<RequestTrace>>,
    route: Option<Arc<ambit_route::RouteName>>,
    audited_by: Option<Box<str>>,
    /// The address of the first client, if proxies stand before it.
    remote: Option<SocketAddr>,
    body: Option<Source>,
    endpoint: Option<Arc<Endpoint>>,
    attempts: u32,
    code: u16,
    grpc_status: Option<u8>,
    sent: u64,
    /// Those of the answer to a gRPC call.
    messages: Option<Messages>,
    flags: &'static str,
    error: Option<String>,
    /// Whether the observer of the log had it while it was in progress.
    was_observed: AtomicBool,
    reported: bool,
}

impl Record {
    /// A request came.
    pub fn start(inbound: &Arc<Inbound>, request: &Request<Incoming>) -> Self {
        let content_type = request.headers().get(http::header::CONTENT_TYPE);
        let grpc = content_type.is_some_and(|value| is_grpc(value.as_bytes()));
        Self::new(inbound.clone(), request.version(), request.method().clone(), grpc)
    }

    /// What came could not be read as a request.
    pub fn unread(inbound: &Arc<Inbound>) -> Self {
        let unknown = Method::from_bytes(b"-").unwrap_or_default();
        Self::new(inbound.clone(), Version::HTTP_11, unknown, false)
    }

    fn new(inbound: Arc<Inbound>, version: Version, method: Method, grpc: bool) -> Self {
        Self {
            inbound,
            since: Instant::now(),
            version,
            method,
            texts: RequestTexts::default(),
            grpc,
            telemetry: None,
            asked: None,
            trace: None,
            route: None,
            audited_by: None,
            remote: None,
            body: None,
            endpoint: None,
            attempts: 0,
            code: 0,
            grpc_status: None,
            sent: 0,
            messages: None,
            flags: "-",
            error: None,
            was_observed: AtomicBool::new(false),
            reported: false,
        }
    }

    /// Ends the report of what was refused before it was a request.
    pub fn refuse(mut self, failure: &Failure) {
        self.code = failure.status().as_u16();
        self.fail(failure.flags(), failure.to_string());
        self.finish();
    }

    /// What was asked for, in its one form; as it came where it has none.
    pub fn set_target(&mut self, sane: Option<&Sane>, parts: &Parts) {
        let text = |name: &HeaderName| parts.headers.get(name)?.to_str().ok();
        let authority = sane.map_or("", |sane| &sane.authority);
        self.texts = RequestTexts::new(authority, parts.uri.path(), text(&X_REQUEST_ID), text(&USER_AGENT));
        // Its port is not known.
        let is_other = |address: &IpAddr| *address != self.inbound.remote.ip();
        let remote = sane.and_then(|sane| sane.remote).filter(is_other);
        self.remote = remote.map(|address| SocketAddr::new(address, 0));
    }

    /// Decides whether it is traced, and which logs it is in.
    pub fn set_telemetry(&mut self, published: &Published, sane: &Sane, parts: &Parts) {
        if let Some(telemetry) = published.telemetry.of(&self.inbound.destination) {
            self.trace = RequestTrace::begin(telemetry, sane, parts, self.since);
            self.asked = logs::FilterInput::keep(&telemetry.logs, sane, parts);
            self.telemetry = Some(telemetry.clone());
        }
    }

    /// Its trace, if it is traced.
    pub fn trace_mut(&mut self) -> Option<&mut RequestTrace> {
        self.trace.as_deref_mut()
    }

    /// Which rule it follows.
    pub fn set_route(&mut self, routed: Option<&Routed>) {
        self.route = routed.map(|routed| routed.rule.route.clone());
    }

    /// The policies that only report it, if any does.
    pub fn set_audits(&mut self, policies: Option<String>) {
        self.audited_by = policies.map(Into::into);
    }

    /// Its body, to be counted.
    pub fn set_body(&mut self, body: Option<Source>) {
        self.body = body;
    }

    /// Where it is sent now.
    pub fn set_endpoint(&mut self, endpoint: &Arc<Endpoint>) {
        self.attempts += 1;
        self.endpoint = Some(endpoint.clone());
    }

    /// It was sent to a second endpoint beside the first; `winner` is that one if its answer counts.
    pub fn add_hedge(&mut self, winner: Option<&Arc<Endpoint>>) {
        self.attempts += 1;
        if let Some(endpoint) = winner {
            self.endpoint = Some(endpoint.clone());
            if let Some(trace) = &mut self.trace {
                trace.set_endpoint(endpoint);
            }
        }
    }

    /// Whether its client speaks HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.version == Version::HTTP_2
    }

    /// Whether it is a gRPC call.
    pub fn is_grpc(&self) -> bool {
        self.grpc
    }

    /// Its answer is the waypoint's, or broke off.
    pub fn fail(&mut self, flags: &'static str, error: String) {
        self.flags = flags;
        self.error = Some(error);
    }

    /// The head of its answer.
    pub fn set_answer(&mut self, response: &Response<ResponseBody>) {
        self.code = response.status().as_u16();
        self.grpc_status = grpc_status(response.headers());
        let content_type = response.headers().get(http::header::CONTENT_TYPE);
        let speaks_grpc = self.grpc && content_type.is_some_and(|value| is_grpc(value.as_bytes()));
        self.messages = speaks_grpc.then(Messages::default);
    }

    /// A part of its answer.
    pub fn add_frame(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.sent += data.len() as u64;
            if let Some(messages) = &mut self.messages {
                messages.feed(data);
            }
        } else if let Some(trailers) = frame.trailers_ref() {
            self.grpc_status = grpc_status(trailers).or(self.grpc_status);
        }
    }

    /// When the observer of the log is to have it if it is still in progress then; `None` if there is none, or it has it.
    pub fn observed_at(&self) -> Option<Instant> {
        let is_due =
            self.inbound.worker.reporter.log.is_observed() && !self.was_observed.load(Ordering::Relaxed);
        is_due.then(|| self.since + LONG)
    }

    /// It is allowed, and has been in progress for long.
    pub fn observe_open(&self) {
        if !self.was_observed.swap(true, Ordering::Relaxed) {
            let destination = Arc::new(destination(self.endpoint.as_deref()));
            let opened = self.of_open(destination, self.texts.clone());
            self.inbound.worker.reporter.log.observe_open_request(opened);
        }
    }

    /// Its answer has ended.
    pub fn finish(mut self) {
        self.report();
    }

    fn report(&mut self) {
        if std::mem::replace(&mut self.reported, true) {
            return;
        }
        let duration = self.since.elapsed();
        let received = self.body.as_ref().map_or(0, Source::received);
        let grpc_status = self.grpc_status.filter(|_| self.grpc);
        let outcome = Outcome { code: self.code, grpc_status, flags: self.flags };
        let retries = self.attempts.saturating_sub(1);
        let inbound = self.inbound.clone();
        let endpoint = self.endpoint.clone();
        let is_counted = self.telemetry.as_ref().is_none_or(|telemetry| !telemetry.uncounted);
        let is_logged = self.is_logged();
        let recent = (is_counted || is_logged).then(|| self.recent(endpoint.as_deref(), outcome));
        if let Some(recent) = recent.as_ref().filter(|_| is_counted) {
            recent.series.count(duration, received, self.sent, retries);
            if self.grpc {
                let sent = self.messages.map_or(0, |messages| messages.count());
                recent.series.count_messages(self.body.as_ref().map_or(0, Source::messages), sent);
            }
        }
        let span = self.export_spans(duration, received, grpc_status);
        if let Some(recent) = recent.filter(|_| is_logged) {
            let entry = self.entry(recent.destination.clone(), duration, received, grpc_status);
            logs::log_request(&inbound, self.telemetry.as_deref(), self.asked.as_deref(), entry, span);
        }
    }

    /// The counters of its labels, and its endpoint for the log.
    fn recent(&self, endpoint: Option<&Endpoint>, outcome: Outcome) -> Arc<Recent> {
        let inbound = &self.inbound;
        let of = SeriesOf { endpoint, service: service(inbound, endpoint), grpc: self.grpc, outcome };
        inbound.recent_series.get(of, || {
            let labels = labels(inbound, endpoint, if self.grpc { "grpc" } else { "http" });
            Recent {
                series: inbound.worker.reporter.requests.series(&labels, outcome),
                destination: Arc::new(destination(endpoint)),
            }
        })
    }

    fn entry(
        &mut self,
        destination: Arc<Party>,
        duration: Duration,
        received: u64,
        grpc_status: Option<u8>,
    ) -> RequestEntry {
        let texts = std::mem::take(&mut self.texts);
        RequestEntry {
            status: match (self.flags, &self.error) {
                (DENIED, _) => Status::Denied,
                (_, Some(_)) => Status::Failed,
                (_, None) => Status::Ok,
            },
            grpc_status,
            route: self.route.take().map(|route| route as Arc<dyn Named>),
            audited_by: self.audited_by.take(),
            bytes_received: received,
            duration,
            error: self.error.take(),
            was_observed: self.was_observed.load(Ordering::Relaxed),
            ..self.of_open(destination, texts)
        }
    }

    /// What is known while it is in progress.
    fn of_open(&self, destination: Arc<Party>, texts: RequestTexts) -> RequestEntry {
        let inbound = &self.inbound;
        RequestEntry {
            source: match self.remote {
                Some(remote) => Arc::new(party(&inbound.client, remote)),
                None => inbound.client_party.clone(),
            },
            destination,
            service: service(inbound, self.endpoint.as_deref()).map(|service| service.host.hostname.clone()),
            dialled: inbound.dialled.clone(),
            status: Status::Ok,
            protocol: match self.version {
                Version::HTTP_10 => "HTTP/1.0",
                Version::HTTP_2 => "HTTP/2",
                _ => "HTTP/1.1",
            },
            method: self.method.clone(),
            texts,
            code: self.code,
            grpc_status: None,
            flags: self.flags,
            route: None,
            audited_by: None,
            attempts: self.attempts,
            bytes_sent: self.sent,
            bytes_received: 0,
            duration: Duration::ZERO,
            error: None,
            was_observed: false,
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if !self.reported {
            self.flags = "DC";
            self.error.get_or_insert_with(|| "the client left".to_owned());
            self.report();
        }
    }
}

/// What a connection is for, for the access log's observers.
pub fn dialled_at(destination: &Destination) -> Dialled {
    dialled(destination.service().map(|service| &**service), destination.port())
}

/// The service that a request reached: that of its endpoint, else the one that was dialled.
fn service<'a>(inbound: &'a Inbound, endpoint: Option<&'a Endpoint>) -> Option<&'a Arc<Service>> {
    endpoint.and_then(|endpoint| endpoint.service.as_ref()).or_else(|| inbound.destination.service())
}

fn destination(endpoint: Option<&Endpoint>) -> Party {
    match endpoint {
        Some(endpoint) => party(&end_of(endpoint), endpoint.address),
        None => Party::default(),
    }
}

fn end_of(endpoint: &Endpoint) -> End {
    End { workload: endpoint.workload.clone(), identity: endpoint.identity().cloned(), baggage: None }
}

fn labels(inbound: &Inbound, endpoint: Option<&Endpoint>, protocol: &'static str) -> Labels {
    let is_gateway = matches!(inbound.destination, Destination::Listener { .. });
    let is_tunnelled = endpoint.is_some_and(|endpoint| endpoint.tunnel.is_some());
    Labels {
        reporter: if is_gateway { tcp::Reporter::Source } else { tcp::Reporter::Waypoint },
        source: inbound.client_labels.clone(),
        destination: peer_labels(&endpoint.map(end_of).unwrap_or_default()),
        service: service(inbound, endpoint).map(|service| service_labels(service)),
        request_protocol: protocol,
        security: if !is_gateway || is_tunnelled { Security::MutualTls } else { Security::Unknown },
    }
}

/// The report of a connection that is passed on.
#[derive(Debug)]
pub struct ConnectionReport {
    inbound: Arc<Inbound>,
    endpoint: Option<Arc<Endpoint>>,
    since: Instant,
    /// What a failure is counted as.
    flags: tcp::ResponseFlags,
    /// Whether the observer of the log had it when it opened.
    is_open: bool,
}

impl Reporter {
    /// Begins the report of a connection that is passed on, or of a session of datagrams, as the destination takes them.
    pub fn connection(&self, inbound: &Arc<Inbound>) -> ConnectionReport {
        let flags = tcp::ResponseFlags::Connect;
        ConnectionReport {
            inbound: inbound.clone(),
            endpoint: None,
            since: Instant::now(),
            flags,
            is_open: false,
        }
    }
}

impl ConnectionReport {
    /// Where it goes.
    pub fn set_endpoint(&mut self, endpoint: &Arc<Endpoint>) {
        self.endpoint = Some(endpoint.clone());
    }

    /// Where it goes, as far as that is known.
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        self.endpoint.as_ref().and_then(|endpoint| endpoint.workload.as_ref())
    }

    /// It is open: bytes are passed on.
    pub fn set_open(&mut self) {
        let log = &self.inbound.worker.reporter.log;
        if log.is_observed() {
            log.observe_open(entry_of_connection(&self.inbound, self.endpoint.as_deref(), Status::Ok));
            self.is_open = true;
        }
    }

    /// There are as many connections as may be.
    pub fn overflow(self, reason: String) {
        Self { flags: tcp::ResponseFlags::Overflow, ..self }.finish(Err(reason));
    }

    /// Policy denies it.
    pub fn deny(self, reason: String) {
        Self { flags: tcp::ResponseFlags::Denied, ..self }.finish(Err(reason));
    }

    /// It ended: with the bytes from the client and those to it, or with a reason.
    pub fn finish(self, ended: Result<(u64, u64), String>) {
        let Self { inbound, endpoint, since, flags, is_open } = self;
        let reporter = &inbound.worker.reporter;
        let protocol = match inbound.destination.transport() {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        let series = reporter.connections.series(&labels(&inbound, endpoint.as_deref(), protocol));
        let (received, sent) = match &ended {
            Ok(bytes) => *bytes,
            Err(_) => {
                series.fail(flags);
                (0, 0)
            }
        };
        if ended.is_ok() {
            series.open().report(sent, received);
        }
        if !logs::is_connection_logged(&inbound) {
            return;
        }
        let status = match (&ended, flags) {
            (Ok(_), _) => Status::Ok,
            (Err(_), tcp::ResponseFlags::Denied) => Status::Denied,
            (Err(_), _) => Status::Failed,
        };
        let entry = entry_of_connection(&inbound, endpoint.as_deref(), status);
        let entry = Entry {
            bytes_sent: sent,
            bytes_received: received,
            duration: since.elapsed(),
            error: ended.err(),
            was_observed: is_open,
            ..entry
        };
        logs::log_connection(&inbound, entry);
    }
}

fn entry_of_connection(inbound: &Inbound, endpoint: Option<&Endpoint>, status: Status) -> Entry {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    let destination = endpoint.map(|endpoint| party(&end_of(endpoint), endpoint.address));
    Entry {
        source: Party::clone(&inbound.client_party),
        destination: destination.unwrap_or(Party { addr: Some(unknown), ..Party::default() }),
        hbone_addr: None,
        service: service(inbound, endpoint).map(|service| service.host.hostname.clone()),
        dialled: Dialled::clone(&inbound.dialled),
        is_udp: inbound.destination.transport() == Transport::Udp,
        direction: Direction::Inbound,
        status,
        bytes_sent: 0,
        bytes_received: 0,
        duration: Duration::ZERO,
        error: None,
        was_observed: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(code: u16) -> Outcome {
        Outcome { code, grpc_status: None, flags: "-" }
    }

    fn labels() -> Labels {
        Labels {
            reporter: tcp::Reporter::Waypoint,
            source: peer_labels(&End::default()),
            destination: peer_labels(&End::default()),
            service: None,
            request_protocol: "http",
            security: Security::MutualTls,
        }
    }

    fn of(code: u16) -> SeriesOf<'static> {
        SeriesOf { endpoint: None, service: None, grpc: false, outcome: outcome(code) }
    }

    #[test]
    fn series_of_recent_requests_are_kept_and_bounded() {
        let metrics = RequestMetrics::register(&ambit_telemetry::Registry::new(), 100);
        let (recent, found) = (RecentSeries::default(), std::cell::Cell::new(0));
        let get = |code| {
            recent.get(of(code), || {
                found.set(found.get() + 1);
                let series = metrics.series(&labels(), outcome(code));
                Recent { series, destination: Arc::default() }
            })
        };
        let first = get(200);
        assert!(Arc::ptr_eq(&first, &get(200)));
        assert!(!Arc::ptr_eq(&first, &get(404)));
        assert_eq!(found.get(), 2);
        for code in 0..40 {
            get(code);
        }
        assert_eq!(recent.0.lock().len(), RECENT_SERIES);
        assert!(Arc::ptr_eq(&first.series, &get(200).series));
    }
}
