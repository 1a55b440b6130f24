//! Why a request is answered by the waypoint and not by an endpoint: whose fault it is, and what that means for status,
//! `response_flags` and another try.

use std::time::Duration;

use ambit_token::Rejection;
use ambit_traffic::Refusal;
use http::StatusCode;

/// The `response_flags` of a request that policy, an authorizer or its token denied.
pub const DENIED: &str = "UAEX";

/// What there is too much of at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Connections.
    Connections,
    /// Requests that have no connection yet.
    Pending,
    /// Requests in progress.
    Requests,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Connections => "connections",
            Self::Pending => "requests that wait for a connection",
            Self::Requests => "requests in progress",
        })
    }
}

/// A request that no endpoint answered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// The client broke the rules of HTTP.
    #[error("malformed request: {0}")]
    Malformed(&'static str),
    /// The request's body is in a transfer coding other than chunked.
    #[error("the transfer coding of the request is not known")]
    TransferCoding,
    /// The head of a request is too large, or has too many fields.
    #[error("the head of the request is too large")]
    HeadTooLarge,
    /// The head of a request took too long.
    #[error("the head of the request took too long")]
    HeadTimeout,
    /// The body of a request was silent for too long.
    #[error("the body of the request took too long")]
    BodyTimeout,
    /// The request's target is too long.
    #[error("the target of the request is too long")]
    TargetTooLong,
    /// What a proxy must not do for this client: CONNECT.
    #[error("method {0} is not allowed here")]
    Method(http::Method),
    /// No rule of the routes matches.
    #[error("no route matches")]
    NoRoute,
    /// The request's host belongs to another listener than the name that its connection's TLS asked for.
    #[error("the host of the request is not the one that TLS asked for")]
    Misdirected,
    /// The rule that matches, or the backend that was drawn, can't be followed.
    #[error("route {route}: {reason}")]
    InvalidRoute {
        /// The route.
        route: String,
        /// What is wrong.
        reason: String,
    },
    /// Its token is not valid, or it has none and needs one.
    #[error("{0}")]
    Unauthenticated(Rejection),
    /// Requests can't be sent as a DestinationRule demands, or it does not name the subset.
    #[error("{0}")]
    InvalidPolicy(String),
    /// Policy denies it.
    #[error("{0}")]
    Denied(String),
    /// There were more requests than a TrafficPolicy allows.
    #[error("{0}")]
    RateLimited(Box<Refusal>),
    /// The body is larger than what an authorizer has to see.
    #[error("the body is larger than an authorizer takes")]
    BodyTooLarge,
    /// An authorizer did not answer.
    #[error("{reason}")]
    Authorizer {
        /// The answer's status.
        status: StatusCode,
        /// Which, and why.
        reason: String,
    },
    /// The service is not known here.
    #[error("service {0} is not known")]
    UnknownService(String),
    /// No endpoint can take it.
    #[error("no endpoint: {0}")]
    NoEndpoint(String),
    /// The waypoint itself is not ready, or is out of something.
    #[error("{0}")]
    Unavailable(String),
    /// No connection to the endpoint.
    #[error("connect: {0}")]
    Connect(String),
    /// As much is under way to the endpoints as may be.
    #[error("too many {0}")]
    Overflow(Limit),
    /// The endpoint refused the stream without looking at it.
    #[error("the endpoint refused the stream")]
    RefusedStream,
    /// The endpoint closes the connection and has not looked at the request.
    #[error("the endpoint closed the connection before the request")]
    GoneAway,
    /// The connection broke before there was an answer.
    #[error("the endpoint's connection broke: {0}")]
    Reset(String),
    /// One try took too long.
    #[error("the endpoint did not answer in time")]
    TryTimeout,
    /// The whole exchange took too long.
    #[error("the request took longer than its route allows")]
    Timeout,
    /// The client's body could not be read.
    #[error("the request's body broke off: {0}")]
    RequestBody(String),
    /// A route says so.
    #[error("aborted by a fault filter")]
    Fault(StatusCode),
    /// A route says so, by a status of gRPC.
    #[error("aborted by a fault filter")]
    FaultGrpc(u8),
}

impl Failure {
    /// The answer's status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(_) | Self::RequestBody(_) => StatusCode::BAD_REQUEST,
            Self::TransferCoding => StatusCode::NOT_IMPLEMENTED,
            Self::TargetTooLong => StatusCode::URI_TOO_LONG,
            Self::HeadTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::HeadTimeout | Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            Self::Unauthenticated(_) => StatusCode::UNAUTHORIZED,
            Self::InvalidRoute { .. } | Self::InvalidPolicy(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Denied(_) => StatusCode::FORBIDDEN,
            Self::RateLimited(refusal) => refusal.status,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Authorizer { status, .. } => *status,
            Self::UnknownService(_)
            | Self::NoEndpoint(_)
            | Self::Unavailable(_)
            | Self::Connect(_)
            | Self::Overflow(_)
            | Self::RefusedStream
            | Self::GoneAway
            | Self::Reset(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::TryTimeout | Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Fault(status) => *status,
            Self::FaultGrpc(status) => status_of_grpc(*status),
        }
    }

    /// Whether nothing more is read from such a client.
    pub fn ends_connection(&self) -> bool {
        matches!(self, Self::Malformed(_) | Self::TransferCoding | Self::RequestBody(_) | Self::BodyTimeout)
    }

    /// Whether the endpoint is to blame, as far as that shows: there was no connection, no answer, or none in time.
    ///
    /// A try that `took` so long waited for the client's body for the part `awaited` of that. A client that takes half of the time for its
    /// body must not make an endpoint seem slow.
    pub fn is_of_endpoint(&self, took: Duration, awaited: Duration) -> bool {
        match self {
            Self::Connect(_) | Self::RefusedStream | Self::Reset(_) => true,
            Self::TryTimeout | Self::Timeout => awaited < took / 2,
            Self::Malformed(_)
            | Self::TransferCoding
            | Self::HeadTooLarge
            | Self::HeadTimeout
            | Self::BodyTimeout
            | Self::TargetTooLong
            | Self::Method(_)
            | Self::NoRoute
            | Self::Misdirected
            | Self::InvalidRoute { .. }
            | Self::Unauthenticated(_)
            | Self::InvalidPolicy(_)
            | Self::Denied(_)
            | Self::RateLimited(_)
            | Self::BodyTooLarge
            | Self::Authorizer { .. }
            | Self::UnknownService(_)
            | Self::NoEndpoint(_)
            | Self::Unavailable(_)
            | Self::Overflow(_)
            | Self::GoneAway
            | Self::RequestBody(_)
            | Self::Fault(_)
            | Self::FaultGrpc(_) => false,
        }
    }

    /// The value of `response_flags`, by the names that Envoy gave them.
    pub fn flags(&self) -> &'static str {
        match self {
            Self::Malformed(_)
            | Self::TransferCoding
            | Self::TargetTooLong
            | Self::HeadTooLarge
            | Self::Method(_) => "DPE",
            Self::HeadTimeout | Self::BodyTimeout => "SI",
            Self::RequestBody(_) => "DR",
            Self::NoRoute | Self::Misdirected => "NR",
            Self::InvalidRoute { .. } | Self::InvalidPolicy(_) => "NC",
            Self::BodyTooLarge => "DPE",
            Self::Unauthenticated(_) | Self::Denied(_) | Self::Authorizer { .. } => DENIED,
            Self::RateLimited(_) => "RL",
            Self::UnknownService(_) => "NC",
            Self::NoEndpoint(_) => "UH",
            Self::Unavailable(_) => "LR",
            Self::Connect(_) => "UF",
            Self::Overflow(_) => "UO",
            Self::RefusedStream | Self::GoneAway => "UR",
            Self::Reset(_) => "UC",
            Self::TryTimeout | Self::Timeout => "UT",
            Self::Fault(_) | Self::FaultGrpc(_) => "FI",
        }
    }

    /// The text of the answer. It says nothing of what is behind the waypoint.
    pub fn message(&self) -> &'static str {
        match self {
            Self::Malformed(_) | Self::RequestBody(_) => "malformed request\n",
            Self::TransferCoding => "this transfer coding is not known\n",
            Self::TargetTooLong => "the target is too long\n",
            Self::HeadTooLarge => "the head is too large\n",
            Self::HeadTimeout | Self::BodyTimeout => "request timeout\n",
            Self::Method(_) => "this method is not allowed\n",
            Self::NoRoute => "no route\n",
            Self::Misdirected => "misdirected request\n",
            Self::InvalidRoute { .. } => "the route is not valid\n",
            Self::Unauthenticated(rejection) => rejection.message(),
            Self::InvalidPolicy(_) => "the policy of the destination is not valid\n",
            Self::Denied(_) => "RBAC: access denied\n",
            Self::RateLimited(_) => "local_rate_limited\n",
            Self::BodyTooLarge => "the body is too large\n",
            Self::Authorizer { .. } => "authorization is not possible\n",
            Self::UnknownService(_) | Self::NoEndpoint(_) => "no healthy upstream\n",
            Self::Unavailable(_) => "not available\n",
            Self::Connect(_) | Self::Overflow(_) | Self::RefusedStream | Self::GoneAway | Self::Reset(_) => {
                "upstream connect error or reset before headers\n"
            }
            Self::TryTimeout | Self::Timeout => "upstream request timeout\n",
            Self::Fault(_) | Self::FaultGrpc(_) => "fault filter abort\n",
        }
    }

    /// gRPC's status for it (gRPC, "HTTP to gRPC status code mapping").
    pub fn grpc_status(&self) -> u8 {
        match self {
            Self::Timeout | Self::TryTimeout | Self::HeadTimeout | Self::BodyTimeout => 4,
            Self::FaultGrpc(status) => *status,
            // RESOURCE_EXHAUSTED, which clients do not take for a failure of the server's.
            Self::RateLimited(_) => 8,
            other => grpc_status_of(other.status()),
        }
    }
}

/// What proxies call an exchange that its client gave up.
const CLIENT_CLOSED_REQUEST: u16 = 499;

/// The status of HTTP for one of gRPC (`google.rpc.Code`).
pub fn status_of_grpc(status: u8) -> StatusCode {
    match status {
        1 => StatusCode::from_u16(CLIENT_CLOSED_REQUEST).unwrap_or(StatusCode::BAD_REQUEST),
        3 | 9 | 11 => StatusCode::BAD_REQUEST,
        4 => StatusCode::GATEWAY_TIMEOUT,
        5 => StatusCode::NOT_FOUND,
        6 | 10 => StatusCode::CONFLICT,
        7 => StatusCode::FORBIDDEN,
        8 => StatusCode::TOO_MANY_REQUESTS,
        12 => StatusCode::NOT_IMPLEMENTED,
        14 => StatusCode::SERVICE_UNAVAILABLE,
        16 => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// gRPC's status for an answer without one (gRPC, "HTTP to gRPC status code mapping").
pub fn grpc_status_of(status: StatusCode) -> u8 {
    match status.as_u16() {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_client_is_not_blamed_on_the_endpoint() {
        let second = Duration::from_secs(1);
        for timeout in [Failure::TryTimeout, Failure::Timeout] {
            assert!(timeout.is_of_endpoint(10 * second, Duration::ZERO));
            assert!(timeout.is_of_endpoint(10 * second, 4 * second));
            assert!(!timeout.is_of_endpoint(10 * second, 5 * second));
            assert!(!timeout.is_of_endpoint(10 * second, 10 * second));
        }
        assert!(Failure::Connect(String::new()).is_of_endpoint(second, second));
        assert!(!Failure::RequestBody(String::new()).is_of_endpoint(second, Duration::ZERO));
        assert!(!Failure::Overflow(Limit::Pending).is_of_endpoint(second, Duration::ZERO));
        assert!(!Failure::Unavailable(String::new()).is_of_endpoint(second, Duration::ZERO));
    }
}
