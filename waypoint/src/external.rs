//! The second part of step 5: external authorizers are asked about the requests that policies with the action CUSTOM match.
//!
//! `grpc` and `http` are the two ways of asking. An authorizer that does not answer denies, unless its settings say otherwise.

pub mod grpc;
pub mod http;

pub(crate) use self::grpc::Channel;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ::http::header::{CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING};
use ::http::request::Parts;
use ::http::{Request, Response, StatusCode};
use ambit_api::l7;
use ambit_api::security::StringMatch;
use ambit_route::Backend;
use bytes::Bytes;
use hyper::body::Incoming;

use crate::accept::Inbound;
use crate::attempt::{ConnectBudget, dispatch, learn, sender};
use crate::balance::{self, Chosen, Target};
use crate::body::{RequestBody, ResponseBody, Source};
use crate::exchange::Answered;
use crate::failure::Failure;
use crate::filters::OnResponse;
use crate::names;
use crate::proxy::Worker;
use crate::sanitise::Sane;
use crate::upstream::Returned;

/// Requests of one worker that wait for authorizers; more are as those that get no answer.
const MOST: usize = 1024;
/// Largest answer of an authorizer.
const MAX_ANSWER: usize = 256 << 10;

/// An authorizer, as policies name it.
#[derive(Debug)]
pub struct Authorizer {
    name: Box<str>,
    backend: Backend,
    timeout: Duration,
    fail_open: bool,
    status_on_error: StatusCode,
    body: Option<l7::CheckedBody>,
    /// By gRPC where there is none.
    http: Option<http::Check>,
    /// Fields that it sees by gRPC; none: all.
    include: Vec<StringMatch>,
}

/// A request as authorizers see it.
struct Question<'a> {
    inbound: &'a Arc<Inbound>,
    sane: &'a Sane,
    parts: &'a Parts,
    body: Option<Body>,
}

/// What an authorizer sees of a body.
struct Body {
    beginning: Bytes,
    is_whole: bool,
}

/// What an authorizer says.
pub enum Verdict {
    /// The request goes on, changed.
    Allowed(Changes),
    /// The client gets this answer.
    Denied(Denial),
}

/// What changes by it.
#[derive(Default)]
pub struct Changes {
    removed: Vec<HeaderName>,
    request: Vec<Field>,
    response: Vec<Field>,
}

/// How a field is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Write {
    Append,
    Replace,
    IfAbsent,
    IfPresent,
}

struct Field {
    name: HeaderName,
    value: HeaderValue,
    write: Write,
}

/// The answer to a request that is denied.
pub struct Denial {
    status: StatusCode,
    fields: Vec<Field>,
    body: Bytes,
}

/// What became of a request.
pub enum Checked {
    /// It goes on, and its response gets these fields.
    Goes(Additions),
    /// An authorizer answered.
    Denied(Box<Answered>, String),
}

/// Fields that the response gets.
#[derive(Default)]
pub struct Additions(Vec<Field>);

impl Additions {
    /// Writes the fields.
    pub fn apply(&self, headers: &mut HeaderMap) {
        self.0.iter().for_each(|field| field.apply(headers));
    }
}

impl Authorizer {
    /// Compiles what the control plane says.
    pub fn new(source: &l7::ExternalAuthorizer) -> Self {
        let status =
            u16::try_from(source.status_on_error).ok().and_then(|status| StatusCode::from_u16(status).ok());
        let port = u16::try_from(source.port).unwrap_or_default();
        Self {
            name: source.provider.as_str().into(),
            backend: Backend {
                namespace: source.namespace.as_str().into(),
                hostname: source.hostname.to_ascii_lowercase().into(),
                port,
                subset: None,
                filters: Box::default(),
                invalid: None,
            },
            timeout: Duration::from_nanos(source.timeout_nanos),
            fail_open: source.fail_open,
            status_on_error: status.unwrap_or(StatusCode::FORBIDDEN),
            body: source.body,
            http: source.http.as_ref().map(http::Check::new),
            include: source.include.clone(),
        }
    }

    /// Its name in the mesh's settings.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it sees bodies.
    pub fn reads_bodies(&self) -> bool {
        self.body.is_some()
    }

    /// Whether it alone writes this field of requests.
    pub fn writes(&self, name: &HeaderName) -> bool {
        self.http.as_ref().is_some_and(|check| check.writes(name))
    }

    async fn ask(&self, question: &Question<'_>) -> Result<Verdict, String> {
        let worker = &question.inbound.worker;
        let counted = worker.requests.authorization(MOST).ok_or("too many requests wait for authorizers")?;
        let target = self.target(question.inbound)?;
        let asking = async {
            match &self.http {
                Some(check) => check.ask(question, &target).await,
                None => grpc::ask(question, &target, self.body.as_ref(), &self.include).await,
            }
        };
        let verdict = tokio::time::timeout(self.timeout, Box::pin(asking)).await;
        drop(counted);
        verdict.unwrap_or_else(|_| Err(format!("no answer within {:?}", self.timeout)))
    }

    fn target(&self, inbound: &Inbound) -> Result<Target, String> {
        let proxy = &inbound.worker.proxy;
        let published = proxy.published.load_full();
        balance::of_backend(proxy, &published, &self.backend)
    }

    /// The beginning of the body that the authorizer sees. It must come within `budget`.
    async fn read(&self, source: Option<&Source>, budget: Duration) -> Result<Option<Body>, Failure> {
        let Some(wanted) = &self.body else { return Ok(None) };
        let Some(source) = source else { return Ok(Some(Body { beginning: Bytes::new(), is_whole: true })) };
        let most = usize::try_from(wanted.max_bytes).unwrap_or(usize::MAX);
        let read = tokio::time::timeout(budget, source.read_ahead(most)).await;
        let read = read.map_err(|_| Failure::BodyTimeout)?;
        let (beginning, is_whole) = read.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => Failure::BodyTimeout,
            _ => Failure::RequestBody(error.to_string()),
        })?;
        if !is_whole && !wanted.allow_partial {
            return Err(Failure::BodyTooLarge);
        }
        Ok(Some(Body { beginning, is_whole }))
    }
}

/// Asks the authorizers, one after the other; each sees what the ones before it changed.
///
/// # Errors
/// [`Failure::Authorizer`], [`Failure::Denied`] for a gRPC call, [`Failure::BodyTooLarge`], [`Failure::RequestBody`].
pub async fn check(
    authorizers: &[Arc<Authorizer>],
    inbound: &Arc<Inbound>,
    sane: &Sane,
    parts: &mut Parts,
    source: Option<&Source>,
) -> Result<Checked, Failure> {
    let tallies = &inbound.worker.proxy.tallies.external;
    let budget = inbound.worker.proxy.settings.limits.authorized_body_timeout.get();
    let mut additions = Additions::default();
    for authorizer in authorizers {
        let body = authorizer.read(source, budget).await?;
        let question = Question { inbound, sane, parts, body };
        match authorizer.ask(&question).await {
            Ok(Verdict::Allowed(changes)) => {
                tallies.allowed.fetch_add(1, Ordering::Relaxed);
                additions.0.extend(changes.apply(&mut parts.headers).0);
            }
            Ok(Verdict::Denied(denial)) => {
                tallies.denied.fetch_add(1, Ordering::Relaxed);
                let reason = format!("denied by authorizer {}", authorizer.name);
                if sane.grpc {
                    return Err(Failure::Denied(reason));
                }
                return Ok(Checked::Denied(Box::new(denial.answer()), reason));
            }
            Err(reason) => {
                tallies.failed.fetch_add(1, Ordering::Relaxed);
                let name = &authorizer.name;
                tracing::warn!(authorizer = %name, reason, fail_open = authorizer.fail_open, "an authorizer did not answer");
                if !authorizer.fail_open {
                    let reason = format!("authorizer {name}: {reason}");
                    return Err(Failure::Authorizer { status: authorizer.status_on_error, reason });
                }
            }
        }
    }
    Ok(Checked::Goes(additions))
}

/// Asks the authorizers of dry-run policies about a request that is allowed without them. It waits for none of them; what would have
/// denied it is logged and counted. They see no body: reading it would delay the request.
pub fn try_out(authorizers: &[Arc<Authorizer>], inbound: &Arc<Inbound>, sane: &Sane, parts: &Parts) {
    for authorizer in authorizers {
        let mut head = Request::new(());
        *head.method_mut() = parts.method.clone();
        *head.uri_mut() = parts.uri.clone();
        *head.version_mut() = parts.version;
        *head.headers_mut() = parts.headers.clone();
        let (parts, ()) = head.into_parts();
        let (authorizer, inbound, sane) = (authorizer.clone(), inbound.clone(), sane.clone());
        // How many there are at once is bounded where they ask.
        tokio::spawn(async move {
            let question = Question { inbound: &inbound, sane: &sane, parts: &parts, body: None };
            let reason = match Box::pin(authorizer.ask(&question)).await {
                Ok(Verdict::Allowed(_)) => return,
                Ok(Verdict::Denied(denial)) => format!("it denies with {}", denial.status),
                Err(reason) if authorizer.fail_open => {
                    tracing::debug!(authorizer = %authorizer.name, reason, "an authorizer of a dry-run policy did not answer");
                    return;
                }
                Err(reason) => reason,
            };
            inbound.worker.proxy.tallies.dry_run_differs.fetch_add(1, Ordering::Relaxed);
            tracing::info!(
                source = %inbound.source, to = %inbound.default_host, authorizer = %authorizer.name, reason,
                "a dry-run policy would decide otherwise"
            );
        });
    }
}

impl Field {
    fn apply(&self, headers: &mut HeaderMap) {
        let is_there = headers.contains_key(&self.name);
        match self.write {
            Write::Append => {
                headers.append(&self.name, self.value.clone());
            }
            Write::IfAbsent if is_there => {}
            Write::IfPresent if !is_there => {}
            Write::Replace | Write::IfAbsent | Write::IfPresent => {
                headers.insert(&self.name, self.value.clone());
            }
        }
    }
}

impl Changes {
    /// Changes a request, and returns what its response gets.
    pub fn apply(self, headers: &mut HeaderMap) -> Additions {
        let Self { removed, request, response } = self;
        for name in removed.iter().filter(|name| !is_framing(name)) {
            headers.remove(name);
        }
        let writable = request.iter().filter(|field| !is_framing(&field.name));
        writable.for_each(|field| field.apply(headers));
        Additions(response.into_iter().filter(|field| !is_framing(&field.name)).collect())
    }
}

impl Denial {
    /// The answer that the client gets.
    pub fn answer(self) -> Answered {
        let mut response = Response::new(ResponseBody::full(self.body));
        // RFC 9110 §15.2: an interim status is no answer, and 101 would make a tunnel of the connection.
        *response.status_mut() = match self.status.is_informational() {
            true => StatusCode::FORBIDDEN,
            false => self.status,
        };
        let writable = self.fields.iter().filter(|field| !is_framing(&field.name));
        writable.for_each(|field| field.apply(response.headers_mut()));
        Answered { response, filters: OnResponse::default(), upgrade: None }
    }
}

/// Fields that frame a message, or say where it goes: no authorizer writes them.
pub fn is_framing(name: &HeaderName) -> bool {
    const MORE: [&str; 6] =
        ["connection", "keep-alive", "proxy-connection", "te", "upgrade", "x-forwarded-client-cert"];
    [CONTENT_LENGTH, HOST, TRANSFER_ENCODING].contains(name) || MORE.contains(&name.as_str())
}

/// Sends a request of the waypoint's own to an endpoint of a service, as to any other; once more, to another one, where none could be
/// reached or the connection was closed before.
///
/// # Errors
/// [`Failure`] of the last try.
pub(crate) async fn exchange(
    worker: &Worker,
    source: SocketAddr,
    target: &Target,
    http2: bool,
    request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Returned), Failure> {
    let mut request = Some(request);
    let mut last = Failure::Unavailable("it was sent already".to_owned());
    let mut tried = Vec::new();
    let connects = ConnectBudget::new(worker.proxy.settings.limits.connect_budget.get());
    for _ in 0..3 {
        let Chosen { endpoint: chosen, trial, gate } =
            match balance::request_endpoint(worker, source, target, &tried, None) {
                Ok(chosen) => chosen,
                Err(Failure::NoEndpoint(_)) if !tried.is_empty() => {
                    tried.clear();
                    balance::request_endpoint(worker, source, target, &tried, None)?
                }
                Err(failure) => return Err(failure),
            };
        let workload = chosen.workload.as_ref().map(|workload| workload.uid.clone());
        let connected = async {
            let chosen = names::locate(worker, chosen).await?;
            let key = chosen.key(http2, gate.as_ref())?;
            sender(worker, &key, &chosen, gate.as_ref(), &connects).await
        };
        let sender = match Box::pin(connected).await {
            Ok(connected) => connected,
            Err(failure) => {
                tried.extend(workload);
                if let Err(failure) = learn(trial, Duration::ZERO, false, Err(failure)) {
                    last = failure;
                }
                continue;
            }
        };
        let Some(unsent) = request.take() else { break };
        let mut returned = None;
        let outcome = dispatch(worker, sender, unsent).await.map_err(|(failure, unsent)| {
            returned = unsent;
            failure
        });
        match (learn(trial, Duration::ZERO, false, outcome), returned) {
            (Ok(answered), _) => return Ok(answered),
            (Err(failure), None) => return Err(failure),
            (Err(failure), Some(unsent)) => {
                request = Some(*unsent);
                last = failure;
            }
        }
    }
    Err(last)
}
