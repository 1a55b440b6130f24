//! One CONNECT that waits for its answer.

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Response, StatusCode};
use tokio::time::{Instant, timeout_at};

use super::Peer;
use super::abandoned::Tally;
use crate::load::Lease;
use crate::request::set_baggage;
use crate::{Baggage, ConnectRequest, Tunnel};

/// A request that waited longer than this does not count as [abandoned](crate::ServerSettings::max_abandoned): its client
/// lost patience with a slow application.
const EARLY: Duration = Duration::from_secs(1);

/// A CONNECT that arrived. Dropped without an answer, it is answered with 503.
#[derive(Debug)]
pub struct Incoming {
    /// Boxed: handlers keep this while they dial.
    request: Box<ConnectRequest>,
    peer: Arc<Peer>,
    arrived: Instant,
    deadline: Instant,
    tally: Tally,
    /// Taken by the answer.
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    respond: SendResponse<Bytes>,
    recv: RecvStream,
    lease: Lease,
}

/// Why a CONNECT no longer needs an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAnswered {
    /// The peer reset the request, or its connection ended.
    #[error("the client cancelled the request")]
    Cancelled,
    /// [`ServerSettings::connect_timeout`](crate::ServerSettings::connect_timeout) has passed.
    #[error("the request was not answered in time")]
    TimedOut,
}

impl Incoming {
    pub(super) fn new(
        request: ConnectRequest,
        peer: Arc<Peer>,
        respond: SendResponse<Bytes>,
        recv: RecvStream,
        lease: Lease,
        tally: Tally,
        limit: Duration,
    ) -> Incoming {
        let arrived = Instant::now();
        Incoming {
            request: Box::new(request),
            peer,
            arrived,
            deadline: arrived + limit,
            tally,
            open: Some(Open { respond, recv, lease }),
        }
    }

    /// The request.
    pub fn request(&self) -> &ConnectRequest {
        &self.request
    }

    /// The connection's client: its certificate, and the addresses of the connection.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Runs `work` (deciding, dialling) while the client waits for it.
    ///
    /// # Errors
    ///
    /// [`NotAnswered`] if the client gave up or the time for an answer has passed; `work` is dropped.
    pub async fn within<T>(&mut self, work: impl Future<Output = T>) -> Result<T, NotAnswered> {
        let deadline = self.deadline;
        let cancelled = poll_fn(|cx| match &mut self.open {
            Some(open) => open.respond.poll_reset(cx).map(|_| ()),
            None => Poll::Ready(()),
        });
        let raced = async {
            tokio::select! {
                biased;
                done = work => Ok(done),
                () = cancelled => Err(NotAnswered::Cancelled),
            }
        };
        let ended = timeout_at(deadline, raced).await.unwrap_or(Err(NotAnswered::TimedOut));
        if ended.as_ref().err() == Some(&NotAnswered::Cancelled) {
            self.note_cancelled();
            self.open = None;
        }
        ended
    }

    /// Answers 200 and returns the tunnel; `baggage` describes our workload to the client.
    ///
    /// # Errors
    ///
    /// [`NotAnswered::Cancelled`] if the client cancelled the request.
    pub fn accept(mut self, baggage: Option<&Baggage>) -> Result<Tunnel, NotAnswered> {
        let Some(Open { mut respond, recv, lease }) = self.open.take() else {
            return Err(NotAnswered::Cancelled);
        };
        let mut response = Response::new(());
        set_baggage(response.headers_mut(), baggage);
        match respond.send_response(response, false) {
            Ok(send) => Ok(Tunnel::new(send, recv, lease, self.peer.certificate.clone(), None)),
            Err(_) => {
                self.note_cancelled();
                Err(NotAnswered::Cancelled)
            }
        }
    }

    fn note_cancelled(&self) {
        if self.arrived.elapsed() < EARLY {
            self.tally.add();
        }
    }

    /// Answers with a failure: 400, 401 or 503 by the HBONE contract.
    pub fn refuse(mut self, status: StatusCode) {
        if let Some(open) = self.open.take() {
            answer(open.respond, status);
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            answer(open.respond, StatusCode::SERVICE_UNAVAILABLE);
        }
    }
}

/// Answers without a body.
pub(super) fn answer(mut respond: SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    // A client that has gone away needs no answer.
    if let Err(error) = respond.send_response(response, true) {
        tracing::trace!(%error, %status, "answer not sent");
    }
}
