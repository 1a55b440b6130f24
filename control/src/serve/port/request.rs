//! The body of a request: it arrives in time, or the request fails.
//!
//! A request for a certificate is small and arrives at once. One that never ends would keep its connection open for as
//! long as the connection may live. A discovery stream stays open by design; only its first message has to arrive.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::Status;
use tonic::body::Body;

use super::PortMetrics;

/// Paths of discovery streams begin so.
const STREAMS: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/";

/// A request's body with a deadline.
pub(super) struct Timed {
    body: Body,
    /// `None` once the body has arrived as far as it must.
    deadline: Option<Pin<Box<Sleep>>>,
    is_stream: bool,
    metrics: Arc<PortMetrics>,
}

impl Timed {
    /// Limits how long the body of a request for `path` may take.
    pub(super) fn new(body: Body, path: &str, limit: Duration, metrics: &Arc<PortMetrics>) -> Timed {
        Timed {
            body,
            deadline: Some(Box::pin(sleep(limit))),
            is_stream: path.starts_with(STREAMS),
            metrics: Arc::clone(metrics),
        }
    }
}

impl http_body::Body for Timed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            if self.is_stream || frame.is_none() || self.body.is_end_stream() {
                self.deadline = None;
            }
            return Poll::Ready(frame);
        }
        let Some(deadline) = &mut self.deadline else { return Poll::Pending };
        std::task::ready!(deadline.poll_unpin(context));
        self.deadline = None;
        self.metrics.unfinished.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(Some(Err(Status::deadline_exceeded("the request did not arrive in time"))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
