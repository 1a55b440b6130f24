//! Asks by Envoy's gRPC service (`envoy.service.auth.v3.Authorization`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::SystemTime;

use ambit_api::core::header_value_option::HeaderAppendAction;
use ambit_api::core::{Address, HeaderValueOption, SocketAddress, address, socket_address};
use ambit_api::external_auth::authorization_client::AuthorizationClient;
use ambit_api::external_auth::check_response::HttpResponse;
use ambit_api::external_auth::{AttributeContext, CheckRequest, CheckResponse, attribute_context as context};
use ambit_api::l7;
use ambit_api::security::StringMatch;
use futures_util::future::BoxFuture;
use http::header::{CONTENT_LENGTH, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use tonic::body::Body;
use tonic::codegen::Service;

use super::http::is_any;
use super::{Changes, Denial, Field, MAX_ANSWER, Question, Verdict, Write, exchange};
use crate::balance::Target;
use crate::body::RequestBody;
use crate::failure::Failure;
use crate::proxy::Worker;

/// Carries calls of the waypoint's own to an endpoint of a service.
pub(crate) struct Channel {
    /// The worker that the call is made on.
    pub(crate) worker: Arc<Worker>,
    /// Whom the endpoint is chosen for.
    pub(crate) source: std::net::SocketAddr,
    /// The service.
    pub(crate) target: Target,
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = Failure;
    type Future = BoxFuture<'static, Result<Self::Response, Failure>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (worker, source, target) = (self.worker.clone(), self.source, self.target.clone());
        Box::pin(async move {
            let mut request = request.map(RequestBody::Call);
            *request.version_mut() = Version::HTTP_2;
            // A connection of HTTP/2 is shared: it needs nobody to give it back.
            let (response, _) = Box::pin(exchange(&worker, source, &target, true, request)).await?;
            Ok(response)
        })
    }
}

/// Asks, and reads the answer.
///
/// # Errors
/// Why there is none.
pub(super) async fn ask(
    question: &Question<'_>,
    target: &Target,
    body: Option<&l7::CheckedBody>,
    include: &[StringMatch],
) -> Result<Verdict, String> {
    let origin = Uri::try_from(format!("http://{}", target.authority)).map_err(|error| error.to_string())?;
    let channel = Channel {
        worker: question.inbound.worker.clone(),
        source: question.inbound.remote,
        target: target.clone(),
    };
    let mut client = AuthorizationClient::with_origin(channel, origin).max_decoding_message_size(MAX_ANSWER);
    let answer = client.check(request(question, body, include)).await;
    let answer = answer.map_err(|status| format!("{}: {}", status.code(), status.message()))?;
    Ok(verdict(answer.into_inner()))
}

fn request(question: &Question<'_>, body: Option<&l7::CheckedBody>, include: &[StringMatch]) -> CheckRequest {
    let Question { inbound, sane, parts, .. } = question;
    let socket = |ip: std::net::IpAddr, port: u16| Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: ip.to_string(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(port.into())),
        })),
    };
    // As Envoy has it: the first client, with the port of the connection.
    let client = sane.remote.unwrap_or(inbound.remote.ip());
    let source = context::Peer {
        address: Some(socket(client, inbound.remote.port())),
        principal: inbound.identity().map(|identity| identity.as_str().to_owned()).unwrap_or_default(),
        ..context::Peer::default()
    };
    let destination = context::Peer {
        address: Some(socket(inbound.destination.address(), inbound.destination.port())),
        service: inbound.destination.host(),
        ..context::Peer::default()
    };
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
    let mut headers: BTreeMap<String, String> = BTreeMap::new();
    let is_seen = |name: &HeaderName| include.is_empty() || is_any(include, name);
    for (name, value) in parts.headers.iter().filter(|(name, _)| is_seen(name)) {
        let value = String::from_utf8_lossy(value.as_bytes());
        match headers.get_mut(name.as_str()) {
            // RFC 9110 §5.3: several lines are one list.
            Some(list) => *list = format!("{list},{value}"),
            None => drop(headers.insert(name.as_str().to_owned(), value.into_owned())),
        }
    }
    let pseudo = [
        (":authority", &*sane.authority),
        (":method", parts.method.as_str()),
        (":path", target),
        (":scheme", sane.scheme),
    ];
    headers.extend(pseudo.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let length = parts.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let mut http = context::HttpRequest {
        id: headers.get("x-request-id").cloned().unwrap_or_default(),
        method: parts.method.to_string(),
        path: target.to_owned(),
        host: sane.authority.to_string(),
        scheme: sane.scheme.to_owned(),
        size: length.unwrap_or(-1),
        protocol: format!("{:?}", sane.version),
        ..context::HttpRequest::default()
    };
    if let Some(seen) = &question.body {
        headers.insert("x-envoy-auth-partial-body".to_owned(), (!seen.is_whole).to_string());
        match body.is_some_and(|body| body.as_bytes) {
            true => http.raw_body = seen.beginning.clone(),
            false => http.body = String::from_utf8_lossy(&seen.beginning).into_owned(),
        }
    }
    http.headers = headers;
    let request = context::Request { time: Some(SystemTime::now().into()), http: Some(http) };
    CheckRequest {
        attributes: Some(AttributeContext {
            source: Some(source),
            destination: Some(destination),
            request: Some(request),
            context_extensions: BTreeMap::new(),
        }),
    }
}

/// What an answer says.
pub fn verdict(answer: CheckResponse) -> Verdict {
    // google.rpc.Code.OK; an answer without a status is one, as in Envoy.
    let is_allowed = answer.status.is_none_or(|status| status.code == 0);
    match answer.http_response {
        Some(HttpResponse::OkResponse(ok)) if is_allowed => Verdict::Allowed(Changes {
            removed: ok.headers_to_remove.iter().filter_map(|name| HeaderName::try_from(name).ok()).collect(),
            request: fields(ok.headers, Write::Replace),
            response: fields(ok.response_headers_to_add, Write::Append),
        }),
        None if is_allowed => Verdict::Allowed(Changes::default()),
        Some(HttpResponse::DeniedResponse(denied)) => Verdict::Denied(Denial {
            status: denied
                .status
                .and_then(|status| StatusCode::from_u16(u16::try_from(status.code).ok()?).ok())
                .unwrap_or(StatusCode::FORBIDDEN),
            fields: fields(denied.headers, Write::Replace),
            body: denied.body.into(),
        }),
        Some(HttpResponse::OkResponse(_)) | None => {
            Verdict::Denied(Denial { status: StatusCode::FORBIDDEN, fields: Vec::new(), body: "".into() })
        }
    }
}

/// Fields that can be written; `otherwise` is how where the answer does not say.
fn fields(options: Vec<HeaderValueOption>, otherwise: Write) -> Vec<Field> {
    let field = |option: HeaderValueOption| {
        let header = option.header?;
        let value = match header.raw_value.is_empty() {
            true => HeaderValue::try_from(header.value).ok()?,
            false => HeaderValue::from_bytes(&header.raw_value).ok()?,
        };
        let write = match (option.append, HeaderAppendAction::try_from(option.append_action).ok()?) {
            (Some(true), _) => Write::Append,
            (Some(false), _) => Write::Replace,
            (None, HeaderAppendAction::AppendIfExistsOrAdd) => otherwise,
            (None, HeaderAppendAction::AddIfAbsent) => Write::IfAbsent,
            (None, HeaderAppendAction::OverwriteIfExistsOrAdd) => Write::Replace,
            (None, HeaderAppendAction::OverwriteIfExists) => Write::IfPresent,
        };
        Some(Field { name: HeaderName::try_from(header.key).ok()?, value, write })
    };
    options.into_iter().filter_map(field).collect()
}
