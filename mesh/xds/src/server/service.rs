//! The gRPC service: one stream per subscriber, answers made only when the transport takes them.
//!
//! The response body is a stream that is polled when HTTP/2 has room, so a slow subscriber holds one
//! answer and costs nobody else anything. There is no task and no queue per subscriber.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use ambit_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use http_body::Frame;
use tokio::time::Sleep;
use tonic::codec::Codec;
use tonic::codegen::{Body, Service, StdError};
use tonic::metadata::MetadataMap;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;
use tracing::{debug, info, warn};

use super::answer::{Answer, Builder};
use super::bell::{Bell, Listener};
use super::metrics::ServerMetrics;
use super::subscription::{Lagged, Subscription, TooManyNames};
use super::table::Table;

const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
/// Types that are not served but asked for, per stream.
const MAX_UNKNOWN_TYPES: usize = 16;

/// Limits of the service.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Streams at the same time.
    pub max_subscribers: i64,
    /// Largest request, in bytes: a reconnecting proxy names every version it holds.
    pub max_request_size: usize,
    /// Names a stream may ask for one by one, per type.
    pub max_names: usize,
    /// How long a new stream may stay silent.
    pub first_request: Duration,
}

impl Default for ServerConfig {
    /// 10,000 streams, 64 MiB, 100,000 names, 30 s.
    fn default() -> Self {
        Self {
            max_subscribers: 10_000,
            max_request_size: 64 << 20,
            max_names: 100_000,
            first_request: Duration::from_secs(30),
        }
    }
}

/// Who may subscribe. Asked once per stream, with the request's metadata.
pub trait Admission: Send + Sync + 'static {
    /// Lets the caller in or says why not (`UNAUTHENTICATED`, `PERMISSION_DENIED`).
    fn admit(&self, metadata: &MetadataMap) -> BoxFuture<'static, Result<(), Status>>;
}

/// The delta discovery service over a set of tables; a tonic service, cheap to clone.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    tables: Vec<Table>,
    config: ServerConfig,
    admission: Option<Arc<dyn Admission>>,
    metrics: Arc<ServerMetrics>,
    draining: AtomicBool,
    /// Rung by the tables, and when draining starts.
    bell: Bell,
}

impl Server {
    /// Serves the tables. When several have news, those named first are answered first, and what is gone
    /// from them last: a policy is there before a workload lists it and until none lists it any more.
    pub fn new(tables: Vec<Table>, config: ServerConfig) -> Self {
        let bell = Bell::default();
        tables.iter().for_each(|table| table.announce_to(bell.clone()));
        let (metrics, draining) = (Arc::default(), AtomicBool::new(false));
        Self { shared: Arc::new(Shared { tables, config, admission: None, metrics, draining, bell }) }
    }

    /// Asks for leave before a stream is opened.
    #[must_use]
    pub fn with_admission(self, admission: Arc<dyn Admission>) -> Self {
        let Shared { tables, config, metrics, bell, .. } = &*self.shared;
        let shared = Shared {
            tables: tables.clone(),
            config: config.clone(),
            admission: Some(admission),
            metrics: Arc::clone(metrics),
            draining: AtomicBool::new(false),
            bell: bell.clone(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Ends every stream and refuses new ones, so that subscribers go to another control plane while
    /// this one still finishes what it does.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
        self.shared.bell.ring();
    }

    /// Live counters.
    pub fn metrics(&self) -> &Arc<ServerMetrics> {
        &self.shared.metrics
    }
}

impl tonic::server::NamedService for Server {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}

impl<B> Service<http::Request<B>> for Server
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<StdError> + Send,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        Box::pin(
            async move { Ok(respond(shared, request).await.unwrap_or_else(|status| status.into_http())) },
        )
    }
}

async fn respond<B>(
    shared: Arc<Shared>,
    request: http::Request<B>,
) -> Result<http::Response<tonic::body::Body>, Status>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<StdError> + Send,
{
    if request.uri().path() != METHOD {
        return Err(Status::unimplemented(format!("no such method: {}", request.uri().path())));
    }
    let (parts, body) = request.into_parts();
    if let Some(admission) = &shared.admission {
        admission.admit(&MetadataMap::from_headers(parts.headers)).await?;
    }
    let seat = Seat::take(&shared)?;
    let decoder = ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default().decoder();
    let max_size = shared.config.max_request_size;
    let requests = Streaming::new_request(decoder, body, None, Some(max_size));
    let body = AnswerBody { stream: Some(Box::new(Stream::new(shared, requests, seat))) };
    let mut response = http::Response::new(tonic::body::Body::new(body));
    let grpc = http::HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
    Ok(response)
}

fn draining() -> Status {
    Status::unavailable("this control plane is going away")
}

/// One of the places for subscribers; given back when dropped.
struct Seat(Arc<ServerMetrics>);

impl Seat {
    fn take(shared: &Shared) -> Result<Self, Status> {
        let taken: &AtomicI64 = &shared.metrics.subscribers;
        // Counted first, so that the drop below gives back exactly what was taken.
        let before = taken.fetch_add(1, Ordering::Relaxed);
        let seat = Self(Arc::clone(&shared.metrics));
        if shared.draining.load(Ordering::Acquire) {
            return Err(draining());
        }
        if before >= shared.config.max_subscribers {
            shared.metrics.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Status::resource_exhausted("too many discovery streams"));
        }
        Ok(seat)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.subscribers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One subscriber's stream.
struct Stream {
    shared: Arc<Shared>,
    requests: Streaming<DeltaDiscoveryRequest>,
    /// By table.
    subscriptions: Vec<Option<Subscription>>,
    unknown: Vec<String>,
    /// Empty answers owed to types that are not served.
    courtesies: Vec<Answer>,
    bell: Listener,
    node: String,
    /// When the stream ends if nothing was asked; `None` once something was.
    silence: Option<Pin<Box<Sleep>>>,
    _seat: Seat,
}

impl Stream {
    fn new(shared: Arc<Shared>, requests: Streaming<DeltaDiscoveryRequest>, seat: Seat) -> Self {
        let bell = shared.bell.listen();
        let subscriptions = shared.tables.iter().map(|_| None).collect();
        let silence = Some(Box::pin(tokio::time::sleep(shared.config.first_request)));
        Self {
            shared,
            requests,
            subscriptions,
            unknown: Vec::new(),
            courtesies: Vec::new(),
            bell,
            node: String::new(),
            silence,
            _seat: seat,
        }
    }

    /// The next answer, once there is one; `None` when the subscriber is done.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Answer>, Status>> {
        // Requests that wait are taken first, so that a withdrawn subscription is not answered.
        while let Poll::Ready(request) = self.requests.poll_next_unpin(context)? {
            match request {
                Some(request) => self.handle_request(&request)?,
                None => return Poll::Ready(Ok(None)),
            }
        }
        loop {
            if self.shared.draining.load(Ordering::Acquire) {
                return Poll::Ready(Err(draining()));
            }
            if let Some(answer) = self.poll_answer()? {
                return Poll::Ready(Ok(Some(answer)));
            }
            if self.silence.as_mut().is_some_and(|silence| silence.poll_unpin(context).is_ready()) {
                return Poll::Ready(Err(Status::deadline_exceeded("no discovery request arrived")));
            }
            std::task::ready!(self.bell.poll_rung(context));
        }
    }

    fn handle_request(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        self.silence = None;
        let metrics = &self.shared.metrics;
        metrics.requests.fetch_add(1, Ordering::Relaxed);
        if let Some(node) = request.node.as_ref().filter(|_| self.node.is_empty()) {
            self.node = node.id.chars().take(256).collect();
            info!(node = self.node, "discovery stream opened");
        }
        if let Some(error) = &request.error_detail {
            metrics.nacks.fetch_add(1, Ordering::Relaxed);
            let reason: String = error.message.chars().take(1024).collect();
            warn!(
                node = self.node,
                type_url = request.type_url,
                nonce = request.response_nonce,
                reason,
                "nack"
            );
        }
        let tables = self.shared.tables.iter().zip(&mut self.subscriptions);
        for (table, subscription) in tables {
            let state = table.inner().state.read();
            if *state.type_url != *request.type_url {
                continue;
            }
            let max_names = self.shared.config.max_names;
            let outcome = match subscription {
                Some(subscription) => subscription.handle_request(request, &state, max_names),
                None => {
                    Subscription::open(request, &state, max_names).map(|opened| *subscription = Some(opened))
                }
            };
            return outcome
                .map_err(|TooManyNames| Status::resource_exhausted("too many names are subscribed"));
        }
        self.handle_unknown(request)
    }

    /// A type that is not served is answered once, empty, so that the subscriber does not wait.
    fn handle_unknown(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Status> {
        if self.unknown.contains(&request.type_url) {
            return Ok(());
        }
        if self.unknown.len() >= MAX_UNKNOWN_TYPES || request.type_url.len() > 1024 {
            return Err(Status::invalid_argument("too many unknown types are subscribed"));
        }
        debug!(node = self.node, type_url = request.type_url, "a type that is not served");
        self.unknown.push(request.type_url.clone());
        self.courtesies.push(Builder::new(usize::MAX, &request.type_url).finish("own-0", 0, false));
        Ok(())
    }

    fn poll_answer(&mut self) -> Result<Option<Answer>, Status> {
        let due = match self.courtesies.pop() {
            Some(courtesy) => Some(courtesy),
            None => self.poll_tables()?,
        };
        if let Some(answer) = &due {
            let metrics = &self.shared.metrics;
            metrics.answers.fetch_add(1, Ordering::Relaxed);
            metrics.bytes.fetch_add(answer.frame.len() as u64, Ordering::Relaxed);
            metrics.resources.fetch_add(answer.resources, Ordering::Relaxed);
            metrics.removals.fetch_add(answer.removals, Ordering::Relaxed);
        }
        Ok(due)
    }

    /// What comes first is sent first; but what is gone there stays until those that may refer to it
    /// have been told: a workload must never list a policy that was taken away from under it.
    fn poll_tables(&mut self) -> Result<Option<Answer>, Status> {
        loop {
            let mut held = false;
            for index in 0..self.subscriptions.len() {
                let hold = self.is_behind_after(index);
                held |= hold;
                let table = self.shared.tables.get(index);
                let Some((table, Some(subscription))) = table.zip(self.subscriptions.get_mut(index)) else {
                    continue;
                };
                let inner = table.inner();
                let polled = subscription.poll_answer(inner, &inner.state.read(), hold);
                let due = polled.map_err(|Lagged| {
                    self.shared.metrics.lagged.fetch_add(1, Ordering::Relaxed);
                    Status::aborted("the subscriber fell behind the change log; reconnect with versions")
                })?;
                if due.is_some() {
                    return Ok(due);
                }
            }
            if !held {
                return Ok(None);
            }
        }
    }

    /// Whether a type that is answered after this one has something due.
    fn is_behind_after(&self, index: usize) -> bool {
        let later = self.shared.tables.iter().zip(&self.subscriptions).skip(index + 1);
        let mut subscribed = later.filter_map(|(table, subscription)| Some((table, subscription.as_ref()?)));
        subscribed.any(|(table, subscription)| subscription.is_behind(&table.inner().state.read()))
    }
}

/// The response's body: frames, then the status as trailers.
struct AnswerBody {
    /// `None` after the trailers.
    stream: Option<Box<Stream>>,
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(None) };
        let status = match std::task::ready!(stream.poll_next(context)) {
            Ok(Some(answer)) => return Poll::Ready(Some(Ok(Frame::data(answer.frame)))),
            Ok(None) => Status::ok(""),
            Err(status) => status,
        };
        self.stream = None;
        let mut trailers = http::HeaderMap::new();
        status.add_header(&mut trailers)?;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}
