//! One connection after its handshake: HTTP/2, with an age.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use http_body::Frame;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tower::Service;

use super::accept::Connection;
use super::request::Timed;
use super::{PortLimits, PortMetrics};

/// Between probes of a peer that is silent, and how long it may take to answer.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// Answers end so much later than the connection's age, so that GOAWAY comes before their end: what the peer asks for
/// next goes to a new connection.
const AFTER_GOAWAY: Duration = Duration::from_millis(100);
/// Requests at the same time on one connection.
const MAX_STREAMS: u32 = 256;

/// Serves a connection until the peer ends it, it has reached its age, it carried no request for too long, or `stop`
/// turns true.
pub(super) async fn serve(
    connection: Connection,
    routes: Routes,
    limits: PortLimits,
    metrics: Arc<PortMetrics>,
    mut stop: watch::Receiver<bool>,
) {
    let Connection { stream, peer, place } = connection;
    let info = stream.get_ref().0.connect_info();
    let started = Instant::now();
    let end = started + jittered(limits.max_age);
    let requests = Arc::new(AtomicUsize::new(0));
    let service = Requests {
        routes,
        info,
        end: end + AFTER_GOAWAY,
        open: requests.clone(),
        body: limits.body,
        metrics: metrics.clone(),
    };
    let service = hyper::service::service_fn(move |request| service.call(request));
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1);
    let served = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);

    let mut idle_since = Some(started);
    loop {
        let look = Instant::now() + limits.idle / 2;
        tokio::select! {
            outcome = served.as_mut() => return log_end(peer, outcome),
            () = sleep_until(end) => {
                metrics.aged.fetch_add(1, Ordering::Relaxed);
                break;
            }
            // A sender that is gone is the end of the program, too.
            _ = stop.wait_for(|stop| *stop) => break,
            () = sleep_until(look) => match idle_since {
                _ if requests.load(Ordering::Relaxed) > 0 => idle_since = None,
                None => idle_since = Some(Instant::now()),
                Some(since) if since.elapsed() < limits.idle => {}
                Some(_) => {
                    metrics.idle.fetch_add(1, Ordering::Relaxed);
                    break;
                }
            },
        }
    }
    // RFC 9113 §6.8: GOAWAY lets requests that are open end; the peer makes others on a new connection.
    served.as_mut().graceful_shutdown();
    match tokio::time::timeout(limits.grace, served.as_mut()).await {
        Ok(outcome) => log_end(peer, outcome),
        Err(_) => tracing::debug!(%peer, "connection cut: requests did not end in time"),
    }
    drop(place);
}

fn log_end(peer: std::net::SocketAddr, outcome: hyper::Result<()>) {
    if let Err(error) = outcome {
        tracing::debug!(%peer, %error, "connection broke");
    }
}

/// Up to a tenth more or less, so that connections made at one time don't end at one time.
fn jittered(age: Duration) -> Duration {
    age.mul_f64(rand::random_range(0.9..1.1))
}

/// The services for the requests of one connection.
struct Requests {
    routes: Routes,
    info: TcpConnectInfo,
    /// When answers that are still going on end.
    end: Instant,
    open: Arc<AtomicUsize>,
    /// How long a request may take to arrive.
    body: Duration,
    metrics: Arc<PortMetrics>,
}

impl Requests {
    fn call(
        &self,
        request: http::Request<hyper::body::Incoming>,
    ) -> impl Future<Output = Result<http::Response<Aged>, Infallible>> + Send + use<> {
        let (mut routes, end, open) = (self.routes.clone(), self.end, OpenRequest::new(&self.open));
        let path = request.uri().path().to_owned();
        let mut request =
            request.map(|body| Body::new(Timed::new(Body::new(body), &path, self.body, &self.metrics)));
        request.extensions_mut().insert(self.info.clone());
        async move {
            // Routes are always ready, and answer every error themselves.
            let response = routes.call(request).await?;
            let sleep = Box::pin(sleep_until(end));
            Ok(response.map(|body| Aged { body: Some(body), sleep, _open: open }))
        }
    }
}

/// Counts one request until its answer has been sent.
struct OpenRequest(Arc<AtomicUsize>);

impl OpenRequest {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer that ends with the connection's age: a discovery stream would go on for ever.
struct Aged {
    /// `None` after the trailers that end it.
    body: Option<Body>,
    sleep: Pin<Box<Sleep>>,
    _open: OpenRequest,
}

impl http_body::Body for Aged {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        if let Poll::Ready(frame) = Pin::new(body).poll_frame(context) {
            return Poll::Ready(frame);
        }
        std::task::ready!(self.sleep.poll_unpin(context));
        self.body = None;
        let status = Status::unavailable("the connection has reached its age; connect again");
        let mut trailers = http::HeaderMap::new();
        status.add_header(&mut trailers)?;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.as_ref().map(http_body::Body::size_hint).unwrap_or_default()
    }
}
