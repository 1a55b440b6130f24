//! Step 9: the response is brought into its one form, and the exchange ends with its body.

use ambit_token::Rejection;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, RETRY_AFTER, SEC_WEBSOCKET_ACCEPT, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Response, StatusCode, Version};

use crate::body::ResponseBody;
use crate::exchange::{Answered, Held};
use crate::failure::Failure;
use crate::sanitise::remove_hop_by_hop;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Makes the response of what came out of the steps.
pub fn finish(answered: Result<Answered, Failure>, mut held: Held) -> Response<ResponseBody> {
    let record = &mut held.record;
    let mut response = match answered {
        Ok(Answered { mut response, filters, upgrade }) => {
            if remove_hop_by_hop(response.headers_mut()).is_err() {
                // The endpoint's `Connection` is no text: what it names is not known, so nothing is passed on.
                let failure = Failure::Reset("the endpoint's Connection field is no text".to_owned());
                record.fail(failure.flags(), failure.to_string());
                response = of_failure(&failure, record.is_grpc());
            }
            filters.apply(response.headers_mut());
            match upgrade {
                // RFC 8441 §5: in HTTP/2 the answer is 200, and there is no key to accept.
                Some(_) if record.is_http2() => {
                    *response.status_mut() = StatusCode::OK;
                    response.headers_mut().remove(SEC_WEBSOCKET_ACCEPT);
                }
                Some(protocol) => crate::upgrade::announce(response.headers_mut(), protocol),
                None => {}
            }
            response
        }
        Err(failure) => {
            record.fail(failure.flags(), failure.to_string());
            of_failure(&failure, record.is_grpc())
        }
    };
    *response.version_mut() = Version::HTTP_11;
    record.set_answer(&response);
    held.open.set_answered();
    if held.open.connection().is_used_up() && !record.is_http2() && !is_upgrade(&response) {
        response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    }
    let (parts, body) = response.into_parts();
    Response::from_parts(parts, body.holding(held))
}

fn is_upgrade(response: &Response<ResponseBody>) -> bool {
    response.status() == StatusCode::SWITCHING_PROTOCOLS
}

/// An answer of the waypoint's own. gRPC has its status in the trailers, or in the only head.
fn of_failure(failure: &Failure, grpc: bool) -> Response<ResponseBody> {
    if grpc {
        let mut response = Response::new(ResponseBody::full(Bytes::new()));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(GRPC_STATUS, HeaderValue::from(u16::from(failure.grpc_status())));
        headers.insert(GRPC_MESSAGE, HeaderValue::from_static(failure.message().trim_end()));
        say_when(headers, failure);
        return response;
    }
    let mut response = Response::new(ResponseBody::full(Bytes::from_static(failure.message().as_bytes())));
    *response.status_mut() = failure.status();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    if failure.ends_connection() {
        response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    }
    say_when(response.headers_mut(), failure);
    if let Failure::Unauthenticated(rejection) = failure {
        // RFC 6750 §3.1: no error is named to who sent no token.
        let challenge = match rejection {
            Rejection::Invalid(_) => "Bearer error=\"invalid_token\"",
            Rejection::Missing => "Bearer",
        };
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    }
    if failure.status() == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(http::header::ALLOW, HeaderValue::from_static("GET, HEAD, POST"));
    }
    response
}

/// RFC 6585 §4: a client over its rate learns when to come again, in whole seconds.
fn say_when(headers: &mut HeaderMap, failure: &Failure) {
    if let Failure::RateLimited(refusal) = failure {
        let wait = refusal.retry_after;
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    }
}

/// gRPC's own status, from a response's head or trailers.
pub fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.trim().parse().ok()
}
