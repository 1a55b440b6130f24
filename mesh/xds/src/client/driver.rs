//! Drives a session over a gRPC stream: connects, moves messages, waits between attempts.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ambit_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use ambit_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::{Body, StdError};
use tonic::{Code, Status, Streaming};
use tracing::{debug, info, warn};

use super::session::{Outcome, Session};
use super::{BoxError, ClientConfig, ClientMetrics, Command, DemandError, Found, Rejected, Termination};
use crate::Backoff;

/// Requests between the session and the transport; beyond it they wait (and coalesce) in the session.
const REQUEST_QUEUE: usize = 16;

/// Makes connections to the control plane, with credentials attached to every request.
pub trait Connector: Send + 'static {
    /// A connection that carries gRPC.
    type Service: tonic::client::GrpcService<
            tonic::body::Body,
            ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
            Future: Send,
        > + Send
        + 'static;

    /// Connects. Called once per attempt; the driver sets the time limit.
    fn connect(&mut self) -> impl Future<Output = Result<Self::Service, BoxError>> + Send;
}

impl<F, Connecting, Service> Connector for F
where
    F: FnMut() -> Connecting + Send + 'static,
    Connecting: Future<Output = Result<Service, BoxError>> + Send,
    Service: tonic::client::GrpcService<
            tonic::body::Body,
            ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
            Future: Send,
        > + Send
        + 'static,
{
    type Service = Service;

    fn connect(&mut self) -> impl Future<Output = Result<Service, BoxError>> + Send {
        self()
    }
}

/// Why a stream could not be opened or ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("cannot connect to the control plane: {0}")]
    Connect(BoxError),
    #[error("the control plane did not answer within {0:?}")]
    Timeout(Duration),
    #[error("the control plane refused or broke the discovery stream: {}", describe(.0))]
    Stream(Box<Status>),
    #[error("the control plane ended the discovery stream")]
    Ended,
}

impl StreamError {
    fn termination(&self) -> Termination {
        match self {
            Self::Connect(_) | Self::Timeout(_) => Termination::ConnectionError,
            Self::Ended => Termination::Complete,
            Self::Stream(status) => match status.code() {
                Code::Unknown | Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable => {
                    Termination::Reconnect
                }
                _ => Termination::Error,
            },
        }
    }
}

fn describe(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

type Waiting = HashMap<(Arc<str>, String), Vec<oneshot::Sender<Result<Found, DemandError>>>>;

/// Owns the stream. Run it on a task; it ends when the last [`Client`](super::Client) is dropped.
#[must_use = "nothing is received unless the driver runs"]
pub struct Driver<C> {
    connector: C,
    core: Core,
}

/// Everything but the connector, so that a connection attempt and demands can go on side by side.
struct Core {
    config: ClientConfig,
    session: Session,
    commands: mpsc::Receiver<Command>,
    ready: watch::Sender<bool>,
    metrics: Arc<ClientMetrics>,
    waiting: Waiting,
}

/// Whether the driver goes on.
#[derive(PartialEq, Eq)]
enum Next {
    Continue,
    Stop,
}

impl<C: Connector> Driver<C> {
    pub(super) fn new(
        config: ClientConfig,
        session: Session,
        connector: C,
        commands: mpsc::Receiver<Command>,
        ready: watch::Sender<bool>,
        metrics: Arc<ClientMetrics>,
    ) -> Self {
        let core = Core { config, session, commands, ready, metrics, waiting: Waiting::new() };
        Self { connector, core }
    }

    /// Runs until the last handle is dropped. Never gives up on the control plane.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(self.core.config.min_delay, self.core.config.max_delay);
        loop {
            let answers_before = self.core.metrics.answers.load(Ordering::Relaxed);
            let error = match self.stream().await {
                Ok(()) => return,
                Err(error) => error,
            };
            self.core.session.handle_disconnected();
            self.core.metrics.connected.store(false, Ordering::Relaxed);
            self.core.metrics.disconnections.fetch_add(1, Ordering::Relaxed);
            self.core.metrics.count_termination(error.termination());
            if self.core.metrics.answers.load(Ordering::Relaxed) != answers_before {
                backoff.reset();
            }
            let delay = backoff.next_delay(rand::random());
            warn!(%error, ?delay, "discovery stream is down; trying again");
            if self.core.serve_commands_until(tokio::time::sleep(delay)).await.is_none() {
                return;
            }
        }
    }

    /// One stream from connect to end; `Ok` when the last handle is dropped.
    async fn stream(&mut self) -> Result<(), StreamError> {
        let timeout = self.core.config.open_timeout;
        let connecting = tokio::time::timeout(timeout, self.connector.connect());
        let Some(connected) = self.core.serve_commands_until(connecting).await else { return Ok(()) };
        let service =
            connected.map_err(|_elapsed| StreamError::Timeout(timeout))?.map_err(StreamError::Connect)?;

        let (requests, queue) = mpsc::channel(REQUEST_QUEUE);
        self.core.session.handle_connected();
        self.core.fill(&requests);
        let max_message_size = self.core.config.max_message_size;
        let opening = tokio::time::timeout(timeout, open(service, queue, max_message_size));
        let Some(opened) = self.core.serve_commands_until(opening).await else { return Ok(()) };
        let stream = opened
            .map_err(|_elapsed| StreamError::Timeout(timeout))?
            .map_err(|status| StreamError::Stream(Box::new(status)))?;

        info!("discovery stream is open");
        self.core.metrics.connections.fetch_add(1, Ordering::Relaxed);
        self.core.metrics.connected.store(true, Ordering::Relaxed);
        self.core.converse(stream, &requests).await
    }
}

async fn open<S>(
    service: S,
    queue: mpsc::Receiver<DeltaDiscoveryRequest>,
    max_message_size: usize,
) -> Result<Streaming<DeltaDiscoveryResponse>, Status>
where
    S: tonic::client::GrpcService<
            tonic::body::Body,
            ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
        >,
{
    let mut client =
        AggregatedDiscoveryServiceClient::new(service).max_decoding_message_size(max_message_size);
    Ok(client.delta_aggregated_resources(ReceiverStream::new(queue)).await?.into_inner())
}

impl Core {
    /// Awaits `future` while demands are accepted. Returns `None` when the last handle was dropped.
    async fn serve_commands_until<F: Future>(&mut self, future: F) -> Option<F::Output> {
        let mut future = std::pin::pin!(future);
        loop {
            tokio::select! {
                output = &mut future => return Some(output),
                command = self.commands.recv() => {
                    if self.handle_command(command) == Next::Stop {
                        return None;
                    }
                }
            }
        }
    }

    /// Moves messages both ways until the stream ends. Reading never waits for sending: acks wait in
    /// the session, so two full directions cannot block each other.
    async fn converse(
        &mut self,
        mut stream: Streaming<DeltaDiscoveryResponse>,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
    ) -> Result<(), StreamError> {
        loop {
            tokio::select! {
                response = stream.message() => {
                    let response = response
                        .map_err(|status| StreamError::Stream(Box::new(status)))?
                        .ok_or(StreamError::Ended)?;
                    self.handle_response(response);
                }
                command = self.commands.recv() => {
                    if self.handle_command(command) == Next::Stop {
                        return Ok(());
                    }
                }
                permit = requests.reserve(), if self.session.wants_to_send() => {
                    let permit = permit.map_err(|_closed| StreamError::Ended)?;
                    if let Some(request) = self.session.poll_request() {
                        permit.send(request);
                    }
                }
            }
        }
    }

    /// Queues what can be queued without waiting.
    fn fill(&mut self, requests: &mpsc::Sender<DeltaDiscoveryRequest>) {
        while let Ok(permit) = requests.try_reserve() {
            let Some(request) = self.session.poll_request() else { return };
            permit.send(request);
        }
    }

    fn handle_response(&mut self, response: DeltaDiscoveryResponse) {
        let metrics = &self.metrics;
        metrics.answers.fetch_add(1, Ordering::Relaxed);
        metrics.count_message(&response.type_url);
        metrics.resources.fetch_add(response.resources.len() as u64, Ordering::Relaxed);
        metrics.removals.fetch_add(response.removed_resources.len() as u64, Ordering::Relaxed);
        debug!(
            type_url = response.type_url,
            resources = response.resources.len(),
            removed = response.removed_resources.len(),
            nonce = response.nonce,
            "discovery answer"
        );
        let Outcome { rejected, answered, split } = self.session.handle_response(response);
        self.metrics.rejected.fetch_add(rejected.len() as u64, Ordering::Relaxed);
        if split {
            self.metrics.split_batches.fetch_add(1, Ordering::Relaxed);
            warn!(
                limit = self.config.max_batch,
                "a batch is too large to be applied at once; it is applied in parts"
            );
        }
        for Rejected { type_url, name, reason } in rejected {
            warn!(type_url, name, reason, "resource rejected");
        }
        for answered in answered {
            for reply in self.waiting.remove(&(answered.type_url, answered.name)).unwrap_or_default() {
                // Fails if the caller has stopped waiting, which is fine.
                reply.send(Ok(answered.found)).ok();
            }
        }
        if self.session.is_ready() {
            self.ready.send_if_modified(|ready| !std::mem::replace(ready, true));
        }
    }

    fn handle_command(&mut self, command: Option<Command>) -> Next {
        let (type_url, name, reply) = match command {
            None => return Next::Stop,
            Some(Command::Release { type_url, name }) => {
                self.session.handle_release(&type_url, &name);
                // Dropping the waiters fails their demands.
                self.waiting.remove(&(type_url, name));
                return Next::Continue;
            }
            Some(Command::Demand { type_url, name, reply }) => (type_url, name, reply),
        };
        match self.session.handle_demand(&type_url, &name) {
            Ok(None) => {
                let waiters = self.waiting.entry((type_url, name)).or_default();
                waiters.retain(|waiter| !waiter.is_closed());
                waiters.push(reply);
            }
            Ok(Some(found)) => {
                reply.send(Ok(found)).ok();
            }
            Err(error) => {
                reply.send(Err(error)).ok();
            }
        }
        Next::Continue
    }
}
