//! One request and its answer: the order of the steps, and what they hand on.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderValue, Request, Response};
use hyper::body::{Body, Incoming};

use crate::accept::Inbound;
use crate::activity::OpenRequest;
use crate::authorize::AllowedRequest;
use crate::body::{ResponseBody, Source};
use crate::external::{Authorizer, Checked};
use crate::failure::Failure;
use crate::filters::{Filtered, Limits};
use crate::proxy::{Counted, Published};
use crate::report::Record;
use crate::{answer, attempt, authenticate, authorize, balance, external, filters, matching, sanitise};

/// A response on its way to the client.
#[derive(Debug)]
pub struct Answered {
    /// The response.
    pub response: Response<ResponseBody>,
    /// What response filters still have to do.
    pub filters: filters::OnResponse,
    /// What the endpoint has agreed to change to.
    pub upgrade: Option<HeaderValue>,
}

/// Leads a request through the steps. Never fails: a failure is an answer too.
///
/// # Errors
/// None.
pub async fn handle(
    inbound: Arc<Inbound>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let mut record = Record::start(&inbound, &request);
    let counted = inbound.worker.requests.request();
    let open = inbound.activity.start_request(Instant::now());
    let answered = Box::pin(steps(&inbound, request, &mut record)).await;
    if let Err(failure) = &answered {
        inbound.worker.proxy.tallies.count_failure(failure);
    }
    Ok(answer::finish(answered, Held { counted, record, open }))
}

async fn steps(
    inbound: &Arc<Inbound>,
    request: Request<Incoming>,
    record: &mut Record,
) -> Result<Answered, Failure> {
    let (mut parts, body) = request.into_parts();
    let published = inbound.worker.proxy.published.load_full();
    let sane = sanitise::sanitise(&mut parts, &inbound.claims(&published));
    record.set_target(sane.as_ref().ok(), &parts);
    let sane = sane?;
    record.set_telemetry(&published, &sane, &parts);
    authenticate::remove_outputs(&published, inbound, &mut parts);
    let limits = &inbound.worker.proxy.settings.limits;
    let source = (!body.is_end_stream()).then(|| {
        let source = Source::new(body, limits.retry_buffer, limits.body_timeout.get());
        if sane.grpc { source.counting_messages() } else { source }
    });
    // Gateway API, GEP-5093: what authorizers of a listener change is what routes match.
    let first = matching::listener(&published, inbound, &sane);
    let first = first.map(|listener| listener.authorizers.clone()).unwrap_or_default();
    let of_listener = match external::check(&first, inbound, &sane, &mut parts, source.as_ref()).await? {
        Checked::Goes(additions) => additions,
        Checked::Denied(answered, reason) => {
            record.fail(crate::failure::DENIED, reason);
            return Ok(*answered);
        }
    };
    let matched = matching::find(&published, inbound, &sane, &parts);
    record.set_route(matched.as_ref().ok().and_then(Option::as_ref));
    let token = authenticate::authenticate(&published, inbound, &mut parts)?;
    let authorizers = authorize::authorizers(&published, inbound, &sane, &parts, token.as_ref(), false);
    record.set_audits(authorize::audits(&published, inbound, &sane, &parts, token.as_ref()));
    let tried_out = authorize::authorizers(&published, inbound, &sane, &parts, token.as_ref(), true);
    if let Some(source) = &source {
        let all: Vec<Arc<Authorizer>> = first.iter().chain(&authorizers).cloned().collect();
        withhold_trailers(&published, inbound, all, source);
        // Nobody's body is kept who is denied in any case.
        if authorizers.iter().any(|authorizer| authorizer.reads_bodies()) {
            authorize::authorize_asking(&published, inbound, &sane, &parts, token.as_ref())?;
        }
    }
    let additions = match external::check(&authorizers, inbound, &sane, &mut parts, source.as_ref()).await? {
        Checked::Goes(additions) => additions,
        Checked::Denied(answered, reason) => {
            record.fail(crate::failure::DENIED, reason);
            return Ok(*answered);
        }
    };
    let rule = matched.as_ref().ok().and_then(Option::as_ref).map(|routed| &routed.rule);
    authorize::authorize(&published, inbound, &sane, &parts, token.as_ref(), rule.map(|rule| &**rule))?;
    external::try_out(&tried_out, inbound, &sane, &parts);
    if let (true, Some(certificate)) = (published.forwards_client_identity, &inbound.certificate) {
        let identity = certificate.identity();
        sanitise::forward_identity(&mut parts.headers, &inbound.worker.proxy.identity, identity);
    }
    // Only who is allowed learns which routes there are.
    let routed = matched?;
    let rule = routed.as_ref().map(|routed| &routed.rule);
    if let Some(asked) = AllowedRequest::keep(&sane, &parts, token.as_ref(), rule) {
        parts.extensions.insert(asked);
    }
    let limits = Limits { published: &published, token: token.as_ref() };
    let on_response = match filters::on_request(routed.as_ref(), inbound, &sane, &mut parts, limits).await? {
        Filtered::Goes(on_response) => on_response,
        Filtered::Answered(answered) => return Ok(*answered),
    };
    let target = balance::split(&published, routed.as_ref(), inbound)?;
    record.set_body(source.clone());
    let sent = attempt::send(
        &published,
        inbound,
        &target,
        routed.as_ref(),
        &sane,
        parts,
        source,
        on_response,
        record,
    )
    .await;
    sent.map(|mut answered| {
        of_listener.apply(answered.response.headers_mut());
        additions.apply(answered.response.headers_mut());
        answered
    })
}

/// Keeps a client from writing in its trailers what it may not write in its header: claims of its token, and what authorizers say.
fn withhold_trailers(
    published: &Published,
    inbound: &Inbound,
    authorizers: Vec<Arc<Authorizer>>,
    source: &Source,
) {
    let claims = authenticate::outputs(published, inbound);
    if !claims.is_empty() || !authorizers.is_empty() {
        source.withhold(move |name| {
            claims.contains(name) || authorizers.iter().any(|authorizer| authorizer.writes(name))
        });
    }
}

/// What lives as long as the exchange.
#[derive(Debug)]
pub struct Held {
    /// Counts the request.
    pub counted: Counted,
    /// Its report.
    pub record: Record,
    /// Its place on the client's connection.
    pub open: OpenRequest,
}
