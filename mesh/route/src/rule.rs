//! A rule of a route: what is done with the requests that it matches.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;

use crate::{Backends, Filter, SessionPersistence};

/// The object that a rule comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteName {
    /// Its kind: `HTTPRoute`.
    pub kind: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl fmt::Display for RouteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

/// What is done with the requests that match.
#[derive(Debug, Clone)]
pub struct Rule {
    /// The route.
    pub route: Arc<RouteName>,
    /// The rule's own name, empty if it has none.
    pub name: Arc<str>,
    /// Its number in the route, from 0.
    pub index: u32,
    /// In order.
    pub filters: Box<[Filter]>,
    /// Where requests go.
    pub backends: Backends,
    /// How long they may take.
    pub timeouts: Timeouts,
    /// When they are sent again.
    pub retry: Option<Retry>,
    /// How clients keep their endpoint.
    pub session: Option<Box<SessionPersistence>>,
    /// Why the rule can't be followed. Its requests are answered with 500.
    pub invalid: Option<Arc<str>>,
}

/// How long a request may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// The whole exchange, body and retries included.
    pub request: Option<Duration>,
    /// One try.
    pub backend: Option<Duration>,
    /// After how long without an answer a second endpoint is asked too, if the request is safe.
    pub hedge: Option<Duration>,
}

/// When a request is sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// Tries beyond the first.
    pub attempts: u32,
    /// Answers that are tried again.
    pub codes: Box<[StatusCode]>,
    /// The least wait before a try beyond the first.
    pub backoff: Option<Duration>,
    /// Conditions by name.
    pub conditions: RetryConditions,
}

/// What else is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RetryConditions {
    /// The connection could not be made.
    pub connect_failure: bool,
    /// The server refused the stream, so that it had no effect.
    pub refused_stream: bool,
    /// The connection broke before the answer's head, or a try took too long.
    pub reset: bool,
    /// 502, 503 and 504.
    pub gateway_error: bool,
    /// Every answer from 500 on, and everything that yields no answer.
    pub server_error: bool,
    /// 409.
    pub retriable_4xx: bool,
    /// gRPC's CANCELLED.
    pub cancelled: bool,
    /// gRPC's DEADLINE_EXCEEDED.
    pub deadline_exceeded: bool,
    /// gRPC's INTERNAL.
    pub internal: bool,
    /// gRPC's RESOURCE_EXHAUSTED.
    pub resource_exhausted: bool,
    /// gRPC's UNAVAILABLE.
    pub unavailable: bool,
}

impl RetryConditions {
    /// Adds the condition of this name; false if there is none such.
    pub fn add(&mut self, name: &str) -> bool {
        let condition = match name {
            "connect-failure" => &mut self.connect_failure,
            "refused-stream" => &mut self.refused_stream,
            "reset" => &mut self.reset,
            "gateway-error" => &mut self.gateway_error,
            "5xx" => &mut self.server_error,
            "retriable-4xx" => &mut self.retriable_4xx,
            "cancelled" => &mut self.cancelled,
            "deadline-exceeded" => &mut self.deadline_exceeded,
            "internal" => &mut self.internal,
            "resource-exhausted" => &mut self.resource_exhausted,
            "unavailable" => &mut self.unavailable,
            // Answers by their codes are listed beside the conditions; a request that never left is always sent again; what the
            // others name does not happen here.
            "retriable-status-codes"
            | "reset-before-request"
            | "envoy-ratelimited"
            | "retriable-headers"
            | "http3-post-connect-failure" => return true,
            _ => return false,
        };
        *condition = true;
        true
    }
}

impl Default for Retry {
    /// Istio's default for the mesh: twice, on connect-failure, refused-stream, unavailable and cancelled.
    fn default() -> Self {
        Self {
            attempts: 2,
            codes: Box::default(),
            backoff: None,
            conditions: RetryConditions {
                connect_failure: true,
                refused_stream: true,
                unavailable: true,
                cancelled: true,
                ..RetryConditions::default()
            },
        }
    }
}
