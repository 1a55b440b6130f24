//! The gRPC service: one stream per subscriber, answers made only when the transport takes them.
//!
//! The response body is a stream that is polled when HTTP/2 has room, so a slow subscriber holds one
//! answer and does not affect the others. There is no task and no queue per subscriber.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body::Frame;
use tonic::codegen::{Body, Service, StdError};
use tonic::metadata::MetadataMap;
use tonic::{Status, Streaming};

use super::admission::{Admission, Subscriber};
use super::metrics::ServerMetrics;
use super::request::{Limits, RequestDecoder};
use super::store::Store;
use super::stream::Stream;

const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// Limits of the service.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Streams at the same time.
    pub max_subscribers: i64,
    /// Largest request, in bytes: a reconnecting proxy names every version it holds.
    pub max_request_size: usize,
    /// Names a stream may ask for one by one, per type; also in one request, repeated ones included.
    pub max_names: usize,
    /// Versions that one request may name.
    pub max_versions: usize,
    /// How long a new stream may stay silent.
    pub first_request: Duration,
}

impl Default for ServerConfig {
    /// 10,000 streams, 64 MiB, 100,000 names, 500,000 versions, 30 s.
    fn default() -> Self {
        Self {
            max_subscribers: 10_000,
            max_request_size: 64 << 20,
            max_names: 100_000,
            max_versions: 500_000,
            first_request: Duration::from_secs(30),
        }
    }
}

/// The delta discovery service over a store; a tonic service, cheap to clone.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

/// What the streams of a server share.
pub(super) struct Shared {
    pub(super) store: Store,
    pub(super) config: ServerConfig,
    pub(super) metrics: Arc<ServerMetrics>,
    admission: Option<Arc<dyn Admission>>,
    draining: AtomicBool,
}

impl Shared {
    /// Refuses to go on once the server drains.
    pub(super) fn check_draining(&self) -> Result<(), Status> {
        match self.draining.load(Ordering::Acquire) {
            true => Err(Status::unavailable("this control plane is shutting down")),
            false => Ok(()),
        }
    }
}

impl Server {
    /// Serves a store to every caller.
    pub fn new(store: Store, config: ServerConfig) -> Self {
        Self::build(store, config, None)
    }

    /// Serves to each caller that `admission` accepts the part of the store that it may see.
    pub fn with_admission(store: Store, config: ServerConfig, admission: Arc<dyn Admission>) -> Self {
        Self::build(store, config, Some(admission))
    }

    fn build(store: Store, config: ServerConfig, admission: Option<Arc<dyn Admission>>) -> Self {
        let (metrics, draining) = (Arc::default(), AtomicBool::new(false));
        Self { shared: Arc::new(Shared { store, config, metrics, admission, draining }) }
    }

    /// Ends every stream and refuses new ones, so that subscribers reconnect to another control plane while
    /// this one finishes its other requests.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
        self.shared.store.inner().wakeup.wake_all();
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
    let subscriber = match &shared.admission {
        Some(admission) => {
            admission.admit(&MetadataMap::from_headers(parts.headers), &parts.extensions).await?
        }
        None => Subscriber::anonymous(),
    };
    let place = Place::take(&shared)?;
    let ServerConfig { max_names, max_versions, max_request_size, .. } = shared.config;
    let decoder = RequestDecoder(Limits { names: max_names, versions: max_versions });
    let requests = Streaming::new_request(decoder, body, None, Some(max_request_size));
    let body = AnswerBody { stream: Some(Box::new(Stream::new(shared, subscriber, requests, place))) };
    let mut response = http::Response::new(tonic::body::Body::new(body));
    let grpc = http::HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(http::header::CONTENT_TYPE, grpc);
    Ok(response)
}

/// One of the places for subscribers, which is freed when dropped.
pub(super) struct Place(Arc<ServerMetrics>);

impl Place {
    fn take(shared: &Shared) -> Result<Self, Status> {
        let taken: &AtomicI64 = &shared.metrics.subscribers;
        // Counted first, so that the drop below gives back exactly what was taken.
        let before = taken.fetch_add(1, Ordering::Relaxed);
        let place = Self(Arc::clone(&shared.metrics));
        shared.check_draining()?;
        if before >= shared.config.max_subscribers {
            shared.metrics.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Status::resource_exhausted("too many discovery streams"));
        }
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.subscribers.fetch_sub(1, Ordering::Relaxed);
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
