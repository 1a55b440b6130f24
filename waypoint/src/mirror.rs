//! Copies of requests for other backends. Nobody waits for them: they never delay the request, and what fails is counted.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ambit_route::filter::Mirror;
use http::Request;
use http::uri::Authority;
use http_body::Body as _;
use tokio::time::timeout;

use crate::accept::Inbound;
use crate::attempt::{ConnectBudget, Form, GRPC_TIMEOUT, dispatch, head, learn, sender};
use crate::balance::{self, Chosen};
use crate::body::{RequestBody, Source};
use crate::failure::Failure;
use crate::names;
use crate::proxy::Published;

/// How long a copy may take, its answer included.
const LIMIT: Duration = Duration::from_secs(30);
/// Copies in progress of each worker; more are not sent.
const MOST: usize = 256;

/// Sends the copies that a request's draw asks for.
pub fn send(
    published: &Published,
    inbound: &Arc<Inbound>,
    mirrors: &[Mirror],
    form: &Form<'_>,
    source: Option<&Source>,
) {
    for mirror in mirrors.iter().filter(|mirror| mirror.applies(rand::random())) {
        let failed = |reason: &str| {
            inbound.worker.proxy.tallies.mirrors_failed.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(backend = %mirror.backend.hostname, reason, "a copy was not sent");
        };
        let Some(counted) = inbound.worker.requests.mirror(MOST) else {
            failed("too many copies are in progress");
            continue;
        };
        let target = match balance::of_backend(&inbound.worker.proxy, published, &mirror.backend) {
            Ok(target) => target,
            Err(reason) => {
                failed(&reason);
                continue;
            }
        };
        let shadow = if mirror.shadow_host { shadow_host(form) } else { None };
        let form = Form { host: shadow.as_ref().or(form.host), ..*form };
        let http2 = form.speaks_http2(&target, target.pool(&inbound.worker.proxy).as_ref());
        let head = head(&form, http2, target.tls);
        let body = source.map_or(RequestBody::Empty, |source| RequestBody::Copy(source.copy()));
        let inbound = inbound.clone();
        tokio::spawn(async move {
            let sent = timeout(LIMIT, Box::pin(copy(&inbound, &target, head, body, http2))).await;
            let failure = match sent {
                Ok(Ok(())) => None,
                Ok(Err(failure)) => Some(failure.to_string()),
                Err(_) => Some("it took too long".to_owned()),
            };
            if let Some(reason) = failure {
                inbound.worker.proxy.tallies.mirrors_failed.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(target = %target.authority, reason, "a copy failed");
            }
            drop(counted);
        });
    }
}

/// The host of a copy, marked as Envoy marks it: `-shadow` follows its name.
fn shadow_host(form: &Form<'_>) -> Option<Authority> {
    let authority = form.host.map_or(&*form.sane.authority, Authority::as_str);
    let marked = match authority.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()) {
        Some((host, port)) => format!("{host}-shadow:{port}"),
        None => format!("{authority}-shadow"),
    };
    Authority::try_from(marked).ok()
}

async fn copy(
    inbound: &Inbound,
    target: &balance::Target,
    head: Request<()>,
    body: RequestBody,
    http2: bool,
) -> Result<(), Failure> {
    let worker = &inbound.worker;
    let Chosen { endpoint: chosen, trial, gate } =
        balance::request_endpoint(worker, inbound.remote, target, &[], None)?;
    let has_deadline = head.headers().contains_key(GRPC_TIMEOUT);
    let (parts, ()) = head.into_parts();
    let state = match &body {
        RequestBody::Copy(copied) => Some(copied.state()),
        RequestBody::Empty | RequestBody::Replay(_) | RequestBody::Whole(_) | RequestBody::Call(_) => None,
    };
    let chosen = match names::locate(worker, chosen).await {
        Ok(chosen) => chosen,
        Err(failure) => return learn(trial, Duration::ZERO, has_deadline, Err(failure)).map(drop),
    };
    let connected = match chosen.key(http2, gate.as_ref()) {
        Ok(key) => {
            let budget = ConnectBudget::new(worker.proxy.settings.limits.connect_budget.get());
            sender(worker, &key, &chosen, gate.as_ref(), &budget).await
        }
        Err(failure) => Err(failure),
    };
    let answered = match connected {
        Ok(sender) => {
            let sent = dispatch(worker, sender, Request::from_parts(parts, body)).await;
            // A copy that broke off breaks the endpoint's connection, which is not to blame.
            let blame = |failure: Failure| match state.is_some_and(|state| state.is_broken()) {
                true => Failure::RequestBody(failure.to_string()),
                false => failure,
            };
            sent.map_err(|(failure, _)| blame(failure))
        }
        Err(failure) => Err(failure),
    };
    let (response, returned) = learn(trial, Duration::ZERO, has_deadline, answered)?;
    let mut answer = std::pin::pin!(response.into_body());
    // Read to its end, so that the connection can be used again.
    while let Some(frame) = std::future::poll_fn(|cx| answer.as_mut().poll_frame(cx)).await {
        if let Err(error) = frame {
            return Err(Failure::Reset(error.to_string()));
        }
    }
    returned.give_back();
    Ok(())
}
