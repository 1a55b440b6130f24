//! Sends one request on one connection, and says what an error of the connection means for it.

use http::Request;

use super::HeadOfAnswer;
use crate::body::RequestBody;
use crate::failure::Failure;
use crate::proxy::Worker;
use crate::upstream::{Returned, Sender, Used};

/// A request that never left.
pub(super) type Unsent = Option<Box<Request<RequestBody>>>;

/// Sends a request on a connection. One that never left comes back.
///
/// # Errors
/// [`Failure::Reset`], [`Failure::RefusedStream`], [`Failure::GoneAway`].
pub async fn dispatch(
    worker: &Worker,
    sender: Sender,
    request: Request<RequestBody>,
) -> Result<HeadOfAnswer, (Failure, Unsent)> {
    match sender {
        Sender::Http1(mut connection) => match connection.sender.try_send_request(request).await {
            Ok(response) => {
                let used = Used::Http1 { upstreams: worker.upstreams.clone(), connection };
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
