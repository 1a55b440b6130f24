//! Step 8: a request is sent to an endpoint, and where its route allows to another one if that fails.
//!
//! All retries are here: the pools below report what never left and send nothing twice.

mod budget;
mod hedge;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use ambit_balance::Outcome;
use ambit_directory::{AppProtocol, WorkloadUid};
use ambit_hbone::ConnectRequest;
use ambit_hbone::client::Target as TunnelTarget;
use ambit_net::socket::set_probes;
use ambit_route::{Retry, Timeouts};
use http::header::{CONTENT_LENGTH, HOST, HeaderMap, HeaderName, RETRY_AFTER, SET_COOKIE, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use smallvec::SmallVec;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep_until, timeout};

pub use self::budget::ConnectBudget;
use crate::accept::{Destination, Inbound};
use crate::answer::grpc_status;
use crate::authorize::AllowedRequest;
use crate::backend_policies::{PoolPolicy, TcpProbes};
use crate::backend_tls::Alpn;
use crate::balance::{Chosen, Endpoint, Target, guard, request_endpoint};
use crate::balancers::balancer::Balancer;
use crate::balancers::circuit::{Connection, Guard, Turn};
use crate::balancers::key::{Hashed, of_request};
use crate::balancers::{Gate, Trial};
use crate::body::{RequestBody, ResponseBody, Source};
use crate::exchange::Answered;
use crate::failure::{Failure, Limit, status_of_grpc};
use crate::filters::{self, OnResponse};
use crate::io;
use crate::matching::Routed;
use crate::proxy::{Counted, Published, TunnelKey, Worker};
use crate::report::Record;
use crate::sanitise::Sane;
use crate::upstream::{Found, Key, Returned, Sender, Used};
use crate::{mirror, names, upgrade};

/// The first wait before another try, where the route says none; it doubles with each.
const BACKOFF: Duration = Duration::from_millis(25);
/// The longest wait before another try.
const MAX_BACKOFF: Duration = Duration::from_millis(250);
/// The longest wait that an endpoint may ask for; one that asks for more is the client's to follow.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);
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
    let hashed = balancer.map(|balancer| hash(&balancer, inbound, &parts)).unwrap_or_default();
    // RFC 9110 §9.2.1: what is asked twice must change nothing.
    let is_safe = parts.method.is_safe() && source.is_none() && sane.upgrade.is_none();
    let hedge = timeouts.hedge.filter(|_| is_safe);
    let head = head(&form, http2, target.tls);
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

/// A request as it is sent on, before the version is known that its endpoint speaks.
#[derive(Debug, Clone, Copy)]
pub struct Form<'a> {
    /// Its head.
    pub parts: &'a Parts,
    /// What was found out about it.
    pub sane: &'a Sane,
    /// Another host, if a filter says so.
    pub host: Option<&'a Authority>,
    /// Whether the client speaks to a gateway, not to the endpoint that it has in mind: its protocol says nothing of that.
    pub at_gateway: bool,
}

impl Form<'_> {
    /// Whether endpoints are spoken to in HTTP/2: as a policy says, else as declared, else as the client does. What wants to change the
    /// protocol can do so in HTTP/1 only. Inside TLS and at gateways, what is not declared is HTTP/1.1, which every server speaks,
    /// except gRPC.
    pub fn speaks_http2(&self, target: &Target, pool: Option<&PoolPolicy>) -> bool {
        if self.sane.upgrade.is_some() {
            return false;
        }
        match target.protocol {
            _ if pool.is_some_and(|pool| pool.use_client_protocol) => {
                self.sane.grpc || self.sane.version == Version::HTTP_2
            }
            _ if pool.is_some_and(|pool| pool.upgrade_to_http2) => true,
            AppProtocol::Http2 | AppProtocol::Grpc => true,
            AppProtocol::Http11 => self.sane.grpc,
            _ if target.tls || self.at_gateway => self.sane.grpc,
            AppProtocol::Unknown | AppProtocol::Tcp | AppProtocol::Tls => {
                self.sane.version == Version::HTTP_2
            }
        }
    }
}

/// The request's head in the form that the endpoint's version wants.
pub fn head(form: &Form<'_>, http2: bool, tls: bool) -> Request<()> {
    let Form { parts, sane, host, at_gateway: _ } = form;
    let mut request = Request::new(());
    *request.method_mut() = parts.method.clone();
    *request.headers_mut() = parts.headers.clone();
    let authority = match host {
        Some(host) => Some((*host).clone()),
        None => Authority::try_from(&*sane.authority).ok(),
    };
    if http2 {
        let mut uri = parts.uri.clone().into_parts();
        // RFC 9113 §8.3.1; the tunnel encrypts, so the scheme is that of what is in it.
        uri.scheme = Some(if tls { Scheme::HTTPS } else { Scheme::HTTP });
        uri.authority = authority;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(uri).unwrap_or_else(|_| parts.uri.clone());
    } else {
        *request.uri_mut() = parts.uri.clone();
        if let Some(host) = authority.and_then(|host| HeaderValue::try_from(host.as_str()).ok()) {
            request.headers_mut().insert(HOST, host);
        }
        if let Some(protocol) = &sane.upgrade {
            upgrade::announce(request.headers_mut(), protocol.clone());
        }
    }
    request
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

/// Counts a try beyond the first until its answer begins.
enum RetryCount {
    /// Within the waypoint's own limit.
    Worker(#[expect(dead_code, reason = "counts until it is dropped")] Counted),
    /// Within that of a policy.
    Policy(#[expect(dead_code, reason = "counts until it is dropped")] Guard),
}

/// The head of an answer, and the connection that it came on.
pub type HeadOfAnswer = (Response<Incoming>, Returned);

impl Sending<'_> {
    async fn tries(&mut self) -> Result<HeadOfAnswer, Failure> {
        let mut retries = 0;
        loop {
            let outcome = self.one_try().await;
            let again = match &outcome {
                Ok((response, _)) => self.is_retriable_answer(response),
                Err(failure) => self.is_retriable(failure),
            };
            if !again || retries >= self.retry.attempts || !self.can_repeat() || self.connects.is_spent() {
                return outcome;
            }
            self.counted = None;
            self.counted = self.count_retry();
            if self.counted.is_none() {
                let tallies = &self.inbound.worker.proxy.tallies;
                tallies.retries_over_budget.fetch_add(1, Ordering::Relaxed);
                return outcome;
            }
            let asked = outcome
                .as_ref()
                .ok()
                .and_then(|(answer, _)| retry_after(answer.headers(), SystemTime::now()));
            let pause = backoff(self.retry.backoff.unwrap_or(BACKOFF), retries, rand::random());
            let pause = pause.max(asked.unwrap_or_default());
            let too_late = self.deadline.is_some_and(|deadline| Instant::now() + pause >= deadline);
            match outcome {
                // The client learns from the endpoint how long to wait.
                Ok(_) if too_late || pause > MAX_RETRY_AFTER => return outcome,
                Err(_) if too_late => return Err(Failure::Timeout),
                // The answer that is not wanted frees its connection or stream.
                Ok(_) | Err(_) => drop(outcome),
            }
            tokio::time::sleep(pause).await;
            retries += 1;
        }
    }

    /// Counts one more try, if there may be one: as a policy says, else as the waypoint's own settings do.
    fn count_retry(&self) -> Option<RetryCount> {
        if let Some(gate) = &self.gate
            && let Some(most) = gate.circuit.most_retries(gate.pool(), gate.retry_budget)
        {
            return gate.circuit.retry(most).map(RetryCount::Policy);
        }
        let worker = &self.inbound.worker;
        worker.requests.retry(worker.proxy.settings.limits.retry_budget).map(RetryCount::Worker)
    }

    fn can_repeat(&self) -> bool {
        self.source.as_ref().is_none_or(Source::is_whole)
    }

    fn is_retriable_answer(&self, response: &Response<Incoming>) -> bool {
        let (status, conditions) = (response.status(), &self.retry.conditions);
        let of_grpc = || {
            let status = response.headers().get("grpc-status")?.to_str().ok()?;
            Some(match status.trim() {
                "1" => conditions.cancelled,
                "4" => conditions.deadline_exceeded,
                "8" => conditions.resource_exhausted,
                "13" => conditions.internal,
                "14" => conditions.unavailable,
                _ => false,
            })
        };
        self.retry.codes.contains(&status)
            || (conditions.server_error && status.is_server_error())
            || (conditions.gateway_error && matches!(status.as_u16(), 502..=504))
            || (conditions.retriable_4xx && status == StatusCode::CONFLICT)
            || of_grpc().unwrap_or(false)
    }

    fn is_retriable(&self, failure: &Failure) -> bool {
        let conditions = &self.retry.conditions;
        let any = conditions.server_error;
        match failure {
            Failure::Connect(_) => conditions.connect_failure || any || conditions.gateway_error,
            Failure::RefusedStream | Failure::GoneAway => conditions.refused_stream || any,
            Failure::Reset(_) | Failure::TryTimeout => conditions.reset || any || conditions.gateway_error,
            _ => false,
        }
    }

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
        self.answered = Some(chosen.clone());
        let limit = self.timeouts.backend;
        let outcome = match (self.hedge, limit) {
            (None, None) => self.exchange(&chosen, self.gate.as_ref()).await,
            (None, Some(limit)) => within(limit, self.exchange(&chosen, self.gate.as_ref())).await,
            (Some(after), None) => Box::pin(self.hedged(&chosen, after)).await,
            (Some(after), Some(limit)) => within(limit, Box::pin(self.hedged(&chosen, after))).await,
        };
        self.learn(outcome)
    }

    fn learn(&mut self, outcome: Result<HeadOfAnswer, Failure>) -> Result<HeadOfAnswer, Failure> {
        let awaited = self.source.as_ref().map(Source::awaited).unwrap_or_default();
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
            match dispatch(worker, &key, sender, taken).await {
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
fn hash(balancer: &Balancer, inbound: &Inbound, parts: &Parts) -> Hashed {
    match balancer.hash_key() {
        Some(by) => of_request(by, parts, inbound.source.ip(), rand::random),
        None => Hashed::default(),
    }
}

/// How long to wait before try number `retries` beyond the first: doubling, and somewhere in the upper half of that.
fn backoff(base: Duration, retries: u32, random: u32) -> Duration {
    let most = base.saturating_mul(1 << retries.min(10)).min(MAX_BACKOFF.max(base));
    let half = most / 2;
    half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// How long an answer asks to wait (RFC 9110 §10.2.3): in seconds, or until a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).ok(),
    }
}

/// A connection to an endpoint: one that waits, or a new one. Waiting for another request's dial has the limit of a dial; waiting for one
/// of the connections that a policy allows that of [`Circuit::turn`](crate::balancers::circuit::Circuit::turn).
///
/// # Errors
/// [`Failure::Connect`], [`Failure::NoEndpoint`], [`Failure::Overflow`], [`Failure::Unavailable`].
pub async fn sender(
    worker: &Worker,
    key: &Key,
    chosen: &Endpoint,
    gate: Option<&Gate>,
    budget: &ConnectBudget,
) -> Result<Sender, Failure> {
    let ready = || worker.upstreams.take(key);
    let is_contended = gate.is_some_and(|gate| !key.http2 && gate.circuit.is_contended());
    if !is_contended && let Some(sender) = ready() {
        return Ok(sender);
    }
    let Some(gate) = gate else { return dial(worker, key, chosen, None, None, budget).await };
    let _pending = gate.circuit.pend(gate.pool())?;
    if key.http2 {
        return dial(worker, key, chosen, Some(gate), None, budget).await;
    }
    match gate.circuit.turn(gate.pool(), ready).await? {
        Turn::Ready(sender) => Ok(sender),
        Turn::Connect(counted) => dial(worker, key, chosen, Some(gate), Some(counted), budget).await,
    }
}

async fn dial(
    worker: &Worker,
    key: &Key,
    chosen: &Endpoint,
    gate: Option<&Gate>,
    counted: Option<Arc<Connection>>,
    budget: &ConnectBudget,
) -> Result<Sender, Failure> {
    let limits = &worker.proxy.settings.limits;
    let limit = budget
        .limit(connect_timeout(worker, gate))
        .ok_or_else(|| Failure::Connect(format!("no time is left for a connection to {}", chosen.address)))?;
    let _spending = budget.spend();
    let timed_out = || Failure::Connect(format!("{} did not answer within {limit:?}", chosen.address));
    let found = timeout(limit, worker.upstreams.find(key, limits.connections_per_endpoint)).await;
    let mut dial = match found.map_err(|_| timed_out())? {
        Found::Sender(sender) => return Ok(sender),
        Found::Full => {
            return Err(match gate {
                Some(gate) => gate.circuit.refuse(Limit::Connections),
                None => worker.proxy.balancers.counts.overflows.refuse(Limit::Connections),
            });
        }
        Found::Failed(failure) => return Err(failure),
        Found::Dial(dial) => dial,
    };
    dial.counted = counted.or_else(|| Some(gate?.circuit.share()));
    let connecting = async {
        let alpn = if key.http2 { Alpn::Http2 } else { Alpn::Http1 };
        let io = connect(worker, chosen, gate, alpn).await?;
        let connected = worker.upstreams.connect(key, &mut dial, io).await;
        connected.map_err(|error| Failure::Connect(error.to_string()))
    };
    let connected = timeout(limit, connecting).await.unwrap_or_else(|_| Err(timed_out()));
    dial.finish(connected.as_ref().map(drop).map_err(Clone::clone));
    connected
}

/// The budget of one connection, handshakes included.
pub fn connect_timeout(worker: &Worker, gate: Option<&Gate>) -> Duration {
    let of_policy = gate.and_then(|gate| gate.pool().connect_timeout);
    of_policy.unwrap_or(worker.proxy.settings.limits.connect_timeout.get())
}

/// Opens a byte stream to an endpoint: HBONE, with the identity of that workload, or plain TCP outside the mesh; inside it TLS, where
/// a policy demands it.
///
/// # Errors
/// [`Failure::Connect`], [`Failure::InvalidPolicy`], [`Failure::NoEndpoint`], [`Failure::Unavailable`].
pub async fn connect(
    worker: &Worker,
    chosen: &Endpoint,
    gate: Option<&Gate>,
    alpn: Alpn,
) -> Result<io::Endpoint, Failure> {
    let io = Box::pin(transport(worker, chosen, gate)).await?;
    let Some(tls) = &chosen.tls else { return Ok(io) };
    let proxy = &worker.proxy;
    tls.handshake(io, alpn, (&proxy.certificates, &proxy.identity)).await
}

async fn transport(worker: &Worker, chosen: &Endpoint, gate: Option<&Gate>) -> Result<io::Endpoint, Failure> {
    let proxy = &worker.proxy;
    let failed = |error: &dyn std::fmt::Display| Failure::Connect(format!("{}: {error}", chosen.address));
    let dialled = chosen.tunnel.as_ref().map_or(chosen.address, |(hbone, _)| *hbone);
    guard(proxy, dialled)?;
    let Some((hbone, expected)) = &chosen.tunnel else {
        let stream = TcpStream::connect(chosen.address).await.map_err(|error| failed(&error))?;
        stream.set_nodelay(true).map_err(|error| failed(&error))?;
        if let Some(probes) = gate.and_then(|gate| gate.pool().tcp_keepalive) {
            let TcpProbes { idle, interval, probes } = probes;
            set_probes(&stream, idle, interval, probes).map_err(|error| failed(&error))?;
        }
        return Ok(io::Endpoint::Plain(stream));
    };
    let Some(workload) = &chosen.workload else {
        return Err(Failure::Unavailable("a tunnel to no workload".to_owned()));
    };
    let certificate = proxy.certificates.certificate(&proxy.identity).await;
    let certificate = certificate.map_err(|error| Failure::Unavailable(error.to_string()))?;
    let tls = certificate.client_tls();
    let crossing = chosen.crossing.as_deref();
    let destination = crossing.map_or(&workload.uid, |crossing| &crossing.gateway).clone();
    let key = TunnelKey { destination, address: *hbone };
    let source = SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, 0)).ip();
    let target = TunnelTarget { address: *hbone, source, tls: &tls, expected };
    let authority = crossing.map_or(chosen.address.into(), |crossing| crossing.authority.clone());
    let mut request = ConnectRequest::new(authority);
    let address = *hbone;
    let dial = move || async move {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    };
    let tunnel = worker.tunnels.open(&key, target, &request, dial).await.map_err(|error| failed(&error))?;
    let Some(crossing) = crossing else { return Ok(io::Endpoint::Tunnel(tunnel.into_stream())) };
    request.forwarded_network = Some(crossing.network.to_string());
    let target = TunnelTarget { address: *hbone, source, tls: &tls, expected: &crossing.expected };
    let settings = &worker.tunnels.settings().client;
    let inner = Box::pin(ambit_hbone::client::open_within(tunnel, target, &request, settings)).await;
    Ok(io::Endpoint::Tunnel(inner.map_err(|error| failed(&error))?.into_stream()))
}

/// A request that never left.
pub type Unsent = Option<Box<Request<RequestBody>>>;

/// Sends a request on a connection. One that never left comes back.
///
/// # Errors
/// [`Failure::Reset`], [`Failure::RefusedStream`], [`Failure::GoneAway`].
pub async fn dispatch(
    worker: &Worker,
    key: &Key,
    sender: Sender,
    request: Request<RequestBody>,
) -> Result<HeadOfAnswer, (Failure, Unsent)> {
    match sender {
        Sender::Http1(mut connection) => match connection.sender.try_send_request(request).await {
            Ok(response) => {
                let (upstreams, key) = (worker.upstreams.clone(), Box::new(key.clone()));
                let used = Used::Http1 { upstreams, key, connection };
                Ok((response, Returned { used, active: None }))
            }
            Err(mut error) => {
                let unsent = error.take_message().map(Box::new);
                Err((failure(error.error()), unsent))
            }
        },
        Sender::Http2(mut sender, stream) => {
            if let Err(error) = crate::upstream::ready(&mut sender).await {
                return Err((failure(&error), Some(Box::new(request))));
            }
            match sender.try_send_request(request).await {
                Ok(response) => Ok((response, Returned { used: Used::Http2(stream), active: None })),
                Err(mut error) => {
                    let unsent = error.take_message().map(Box::new);
                    Err((failure(error.error()), unsent))
                }
            }
        }
    }
}

fn failure(error: &hyper::Error) -> Failure {
    use std::error::Error as _;
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(error) = inner.downcast_ref::<h2::Error>() {
            // RFC 9113 §6.8: streams above the last one that a GOAWAY names are not processed; h2 ends no others with it.
            if error.is_go_away() && error.is_remote() {
                return Failure::GoneAway;
            }
            // RFC 9113 §8.7: the server says that it did nothing.
            if error.reason() == Some(h2::Reason::REFUSED_STREAM) {
                return Failure::RefusedStream;
            }
        }
        cause = inner.source();
    }
    Failure::Reset(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_may_ask_for_a_wait_in_seconds_or_until_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_770);
        for (text, wait) in [
            ("2", Some(2)),
            (" 120 ", Some(120)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(7)),
            ("Sun, 06 Nov 1994 08:49:20 GMT", None),
            ("soon", None),
            ("-1", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(text))]);
            assert_eq!(retry_after(&headers, now), wait.map(Duration::from_secs), "{text}");
        }
    }
}
