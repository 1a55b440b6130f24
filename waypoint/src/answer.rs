//! Step 9: the response is brought into its one form, and the exchange ends with its body.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName};
use http::{HeaderMap, HeaderValue, Response, StatusCode, Version};

use crate::body::ResponseBody;
use crate::exchange::{Answered, Held};
use crate::failure::Failure;
use crate::proxy::Counted;
use crate::report::Record;
use crate::sanitise::remove_hop_by_hop;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// Makes the response of what came out of the steps.
pub fn finish(
    answered: Result<Answered, Failure>,
    mut record: Record,
    counted: Counted,
) -> Response<ResponseBody> {
    let mut response = match answered {
        Ok(Answered { mut response, filters, upgrade }) => {
            if remove_hop_by_hop(response.headers_mut()).is_err() {
                // The endpoint's `Connection` is no text: what it names is not known, so nothing is passed on.
                let failure = Failure::Reset("the endpoint's Connection field is no text".to_owned());
                record.fail(failure.flags(), failure.to_string());
                response = of_failure(&failure, record.is_grpc());
            }
            filters.apply(response.headers_mut());
            if let Some(protocol) = upgrade {
                crate::upgrade::announce(response.headers_mut(), protocol);
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
    let (parts, body) = response.into_parts();
    Response::from_parts(parts, body.holding(Held { counted, record }))
}

/// An answer of the waypoint's own. gRPC has its status in the trailers, or in the only head.
fn of_failure(failure: &Failure, grpc: bool) -> Response<ResponseBody> {
    if grpc {
        let mut response = Response::new(ResponseBody::full(Bytes::new()));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(GRPC_STATUS, HeaderValue::from(u16::from(failure.grpc_status())));
        headers.insert(GRPC_MESSAGE, HeaderValue::from_static(failure.message().trim_end()));
        return response;
    }
    let mut response = Response::new(ResponseBody::full(Bytes::from_static(failure.message().as_bytes())));
    *response.status_mut() = failure.status();
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    if matches!(failure, Failure::Malformed(_) | Failure::RequestBody(_)) {
        // Nothing more is read from such a client.
        response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    }
    if failure.status() == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(http::header::ALLOW, HeaderValue::from_static("GET, HEAD, POST"));
    }
    response
}

/// gRPC's own status, from a response's head or trailers.
pub fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.trim().parse().ok()
}
