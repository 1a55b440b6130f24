//! Step 8: a request is sent to an endpoint, and where its route allows to another one if that fails.
//!
//! All retries are here: the pools below report what never left and send nothing twice.

mod budget;
mod connect;
mod dispatch;
mod head;
mod hedge;
mod retry;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ambit_balance::Outcome;
use ambit_directory::WorkloadUid;
use ambit_route::{Retry, Timeouts};
use http::header::{CONTENT_LENGTH, HeaderName, SET_COOKIE, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use smallvec::SmallVec;
use tokio::time::{Instant, sleep_until, timeout};

pub use self::budget::ConnectBudget;
pub use self::connect::{connect, connect_timeout, sender};
pub use self::dispatch::dispatch;
use self::head::assemble;
pub use self::head::{Form, head};
use self::retry::RetryCount;
use crate::accept::{Destination, Inbound};
use crate::answer::grpc_status;
use crate::authorize::AllowedRequest;
use crate::balance::{Chosen, Endpoint, Target, request_endpoint};
use crate::balancers::balancer::Balancer;
use crate::balancers::key::{Hashed, of_request};
use crate::balancers::{Gate, Trial};
use crate::body::{RequestBody, ResponseBody, Source};
use crate::exchange::Answered;
use crate::failure::{Failure, status_of_grpc};
use crate::filters::{self, OnResponse};
use crate::matching::Routed;
use crate::proxy::Published;
use crate::report::Record;
use crate::sanitise::Sane;
use crate::upstream::Returned;
use crate::{mirror, names, upgrade};

/// Connections that may close under a request that they did not take before that counts as a try.
const MAX_MOVES: u32 = 3;
/// How long the client of a gRPC call waits (gRPC over HTTP/2, "Requests").
pub const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// gRPC's status for a call that took too long.
const DEADLINE_EXCEEDED: u8 = 4;

/// Sends a request and waits for the head of its answer.
///
/// # Errors
/// [`Failure`] of the last try, or why there was none.
#[expect(clippy::too_many_arguments, reason = "what all steps before have found out")]
pub async fn send(
    published: &Published,
    inbound: &Arc<Inbound>,
    target: &Target,
    routed: Option<&Routed>,
    sane: &Sane,
    mut parts: Parts,
    source: Option<Source>,
    mut on_response: OnResponse,
    record: &mut Record,
) -> Result<Answered, Failure> {
    if let (Some(routed), Some(backend)) = (routed, &target.backend) {
        filters::on_backend(routed, backend, &mut on_response, &mut parts)?;
    }
    let asked = on_response.host.as_ref().map_or(&*sane.authority, Authority::as_str);
    let target = &*target.asking(published, inbound, names::asked_host(asked))?;
    let rule = routed.map(|routed| &routed.rule);
    let timeouts = rule.map(|rule| rule.timeouts).unwrap_or_default();
    let default = Retry::default();
    let retry = rule.and_then(|rule| rule.retry.as_ref()).unwrap_or(&default);
    let deadline = timeouts.request.map(|limit| Instant::now() + limit);
    let upgrade = parts.extensions.remove::<OnUpgrade>();
    let asked = parts.extensions.remove::<AllowedRequest>();
    let balancer = match &target.balanced {
        Some(balanced) => Some(balanced.current(&inbound.worker.proxy)?),
        None => None,
    };
    let at_gateway = matches!(inbound.destination, Destination::Listener { .. });
    let form = Form { parts: &parts, sane, host: on_response.host.as_ref(), at_gateway };
    let pool = balancer.as_ref().map(|balancer| &balancer.policy().pool);
    let http2 = form.speaks_http2(target, pool);
    mirror::send(published, inbound, &on_response.mirrors, &form, source.as_ref());
    let client = sane.remote.unwrap_or(inbound.remote.ip());
    let hashed = balancer.map(|balancer| hash(&balancer, client, &parts)).unwrap_or_default();
    // RFC 9110 §9.2.1: what is asked twice must change nothing.
    let is_safe = parts.method.is_safe() && source.is_none() && sane.upgrade.is_none();
    let hedge = timeouts.hedge.filter(|_| is_safe);
    let host = on_response.host.clone();
    let Parts { method, uri, headers, .. } = parts;
    let head = assemble((method, uri, headers), sane, host.as_ref(), http2, target.tls);
    let mut sending = Sending {
        inbound,
        target,
        timeouts,
        retry,
        deadline,
        hedge,
        http2,
        head,
        source,
        key: hashed.key,
        tried: SmallVec::new(),
        trial: None,
        gate: None,
        counted: None,
        answered: None,
        connects: ConnectBudget::new(inbound.worker.proxy.settings.limits.connect_budget.get()),
        record,
    };
    let all = Box::pin(sending.tries());
    let (mut response, returned) = match deadline {
        Some(deadline) => match tokio::time::timeout_at(deadline, all).await {
            Ok(answered) => answered?,
            Err(_) => sending.learn(Err(Failure::Timeout))?,
        },
        None => all.await?,
    };
    if let (Some(routed), Some(backend), Some(endpoint)) = (routed, &target.backend, &sending.answered)
        && let Some(session) = &routed.session
        && session.answer(&routed.rule, (backend, endpoint), response.headers_mut())
    {
        inbound.worker.proxy.tallies.sessions_moved.fetch_add(1, Ordering::Relaxed);
    }
    if let Some(cookie) = hashed.cookie {
        response.headers_mut().append(SET_COOKIE, cookie);
    }
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        // The endpoint's connection is the client's now.
        let agreed = upgrade::join(inbound, upgrade, sane.upgrade.as_ref(), asked, &mut response, returned)?;
        let (parts, _) = response.into_parts();
        let response = Response::from_parts(parts, ResponseBody::full(bytes::Bytes::new()));
        return Ok(Answered { response, filters: on_response, upgrade: Some(agreed) });
    }
    let (parts, body) = response.into_parts();
    let deadline = deadline.map(|deadline| Box::pin(sleep_until(deadline)));
    let body = ResponseBody::upstream(body, Some(returned), deadline);
    Ok(Answered { response: Response::from_parts(parts, body), filters: on_response, upgrade: None })
}

struct Sending<'a> {
    inbound: &'a Arc<Inbound>,
    target: &'a Target,
    timeouts: Timeouts,
    retry: &'a Retry,
    deadline: Option<Instant>,
    /// After how long a second endpoint is asked too.
    hedge: Option<Duration>,
    http2: bool,
    head: Request<()>,
    source: Option<Source>,
    /// The hash of the request, with consistent hashing.
    key: Option<u64>,
    tried: SmallVec<[WorkloadUid; 4]>,
    /// The try that is under way.
    trial: Option<Trial>,
    /// How much may go to the endpoints at once.
    gate: Option<Gate>,
    /// Counts a try beyond the first.
    counted: Option<RetryCount>,
    /// The endpoint of the try whose answer counts.
    answered: Option<Arc<Endpoint>>,
    /// What is left of the time for connections.
    connects: ConnectBudget,
    record: &'a mut Record,
}

/// The head of an answer, and the connection that it came on.
pub type HeadOfAnswer = (Response<Incoming>, Returned);

impl Sending<'_> {
    async fn one_try(&mut self) -> Result<HeadOfAnswer, Failure> {
        let Chosen { endpoint: chosen, trial, gate } = self.choose()?;
        if let Some(workload) = &chosen.workload {
            self.tried.push(workload.uid.clone());
        }
        (self.trial, self.gate) = (trial, gate);
        let chosen = match names::locate(&self.inbound.worker, chosen).await {
            Ok(chosen) => chosen,
            Err(failure) => return self.learn(Err(failure)),
        };
        self.record.set_endpoint(&chosen);
        if let Some(trace) = self.record.trace_mut() {
            trace.start_try(&chosen, self.head.headers_mut());
        }
        self.answered = Some(chosen.clone());
        let limit = self.timeouts.backend;
        let outcome = match (self.hedge, limit) {
            (None, limit) => {
                // Pinned here, so that it is not kept twice in what waits for it.
                let mut sending = std::pin::pin!(self.exchange(&chosen, self.gate.as_ref()));
                let waiting = self.observed(sending.as_mut());
                match limit {
                    None => waiting.await,
                    Some(limit) => within(limit, waiting).await,
                }
            }
            (Some(after), None) => Box::pin(self.hedged(&chosen, after)).await,
            (Some(after), Some(limit)) => within(limit, Box::pin(self.hedged(&chosen, after))).await,
        };
        self.learn(outcome)
    }

    /// Waits for the head of an answer. A request that waits for long is shown to the observer of the log meanwhile.
    async fn observed<T>(&self, mut waiting: std::pin::Pin<&mut impl Future<Output = T>>) -> T {
        let Some(due) = self.record.observed_at() else { return waiting.await };
        tokio::select! {
            biased;
            answered = waiting.as_mut() => return answered,
            () = sleep_until(due.into()) => self.record.observe_open(),
        }
        waiting.await
    }

    fn learn(&mut self, outcome: Result<HeadOfAnswer, Failure>) -> Result<HeadOfAnswer, Failure> {
        let awaited = self.source.as_ref().map(Source::awaited).unwrap_or_default();
        if let Some(trace) = self.record.trace_mut() {
            trace.learn(match &outcome {
                Ok((response, _)) => Ok(response.status().as_u16()),
                Err(failure) => Err(failure.to_string()),
            });
        }
        learn(self.trial.take(), awaited, self.has_deadline(), outcome)
    }

    /// Whether its client of gRPC waits only so long.
    fn has_deadline(&self) -> bool {
        self.head.headers().contains_key(GRPC_TIMEOUT)
    }

    fn choose(&mut self) -> Result<Chosen, Failure> {
        let Inbound { worker, source, .. } = &**self.inbound;
        match request_endpoint(worker, *source, self.target, &self.tried, self.key) {
            // Every endpoint was tried: the first ones again.
            Err(Failure::NoEndpoint(_)) if !self.tried.is_empty() => {
                self.tried.clear();
                request_endpoint(worker, *source, self.target, &self.tried, self.key)
            }
            chosen => chosen,
        }
    }

    async fn exchange(&self, chosen: &Endpoint, gate: Option<&Gate>) -> Result<HeadOfAnswer, Failure> {
        let worker = &self.inbound.worker;
        let key = chosen.key(self.http2, gate)?;
        let mut request = Some(self.request()?);
        let mut moves = 0;
        // A connection that was kept may close before the request is on it: that is nobody's fault, and no retry.
        loop {
            let sender = sender(worker, &key, chosen, gate, &self.connects).await?;
            let Some(taken) = request.take() else { return Err(Failure::Reset("sent already".to_owned())) };
            match dispatch(worker, sender, taken).await {
                Ok(answered) => return Ok(answered),
                Err((Failure::GoneAway, None)) if moves < MAX_MOVES && self.can_repeat() => {
                    moves += 1;
                    request = Some(self.request()?);
                }
                Err((failure, None)) => return Err(self.blame(failure)),
                Err((_, Some(unsent))) => request = Some(*unsent),
            }
        }
    }

    /// A body that broke off breaks the endpoint's connection: the client is to blame.
    fn blame(&self, failure: Failure) -> Failure {
        if self.source.as_ref().is_some_and(Source::is_late) {
            return Failure::BodyTimeout;
        }
        match self.source.as_ref().is_some_and(Source::is_broken) {
            true => Failure::RequestBody(failure.to_string()),
            false => failure,
        }
    }

    fn request(&self) -> Result<Request<RequestBody>, Failure> {
        let body = match &self.source {
            None => RequestBody::Empty,
            Some(source) => match source.replay() {
                Some(replay) => RequestBody::Replay(replay),
                None => return Err(Failure::Reset("a part of the request's body is lost".to_owned())),
            },
        };
        let mut request = Request::new(body);
        *request.method_mut() = self.head.method().clone();
        *request.uri_mut() = self.head.uri().clone();
        *request.version_mut() = self.head.version();
        *request.headers_mut() = self.head.headers().clone();
        if self.source.is_none() {
            // A length of 0 stays what it was; others can't be: the body has ended.
            let zero = request.headers().get(CONTENT_LENGTH).is_some_and(|length| length == "0");
            if !zero {
                request.headers_mut().remove(CONTENT_LENGTH);
            }
        } else if !self.http2 && !request.headers().contains_key(CONTENT_LENGTH) {
            // hyper sends no body of a GET whose length is unknown, unless its coding is named.
            request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        Ok(request)
    }
}

/// One try, which may take so long.
async fn within(
    limit: Duration,
    trying: impl Future<Output = Result<HeadOfAnswer, Failure>>,
) -> Result<HeadOfAnswer, Failure> {
    timeout(limit, trying).await.unwrap_or(Err(Failure::TryTimeout))
}

/// Reports to a try how it ended, which waited for the client for `awaited`. A failure that is the client's, or the waypoint's own, says nothing
/// of the endpoint; nor does it say something that an endpoint did not meet the deadline of a client that `has_deadline`.
///
/// # Errors
/// Those of the outcome.
pub fn learn(
    trial: Option<Trial>,
    awaited: Duration,
    has_deadline: bool,
    mut outcome: Result<HeadOfAnswer, Failure>,
) -> Result<HeadOfAnswer, Failure> {
    let Some(trial) = trial else { return outcome };
    match &mut outcome {
        Ok((response, returned)) => {
            // gRPC says how it went in a status of its own.
            let of_grpc = grpc_status(response.headers()).filter(|status| *status != 0);
            returned.active = trial.end(match of_grpc {
                Some(DEADLINE_EXCEEDED) if has_deadline => Outcome::ClientDeadline,
                Some(status) => Outcome::Answer(status_of_grpc(status).as_u16()),
                None => Outcome::Answer(response.status().as_u16()),
            });
        }
        Err(failure) => trial.fail(failure, awaited),
    }
    outcome
}

/// What decides about the endpoint, with consistent hashing.
fn hash(balancer: &Balancer, client: IpAddr, parts: &Parts) -> Hashed {
    match balancer.hash_key() {
        Some(by) => of_request(by, parts, client, rand::random),
        None => Hashed::default(),
    }
}
