//! Filters of the access log in CEL: which requests are logged. Their variables are those that Envoy has for them, as far as they are
//! known here.

use std::fmt;
use std::net::IpAddr;
use std::sync::OnceLock;

use cel::common::types::{CelBool, CelInt, CelMap, CelString};
use cel::common::value::CowVal;
use cel::context::VariableResolver;
use http::HeaderMap;

use crate::expression::{Expression, ExpressionError, Names};
use crate::facts::of_headers;

/// A compiled filter. Cheap to clone.
#[derive(Debug, Clone, PartialEq)]
pub struct LogFilter(Expression);

/// What is known of a request whose answer has ended.
#[derive(Debug, Clone, Copy)]
pub struct LogFacts<'a> {
    /// The method.
    pub method: &'a str,
    /// The path with the query.
    pub target: &'a str,
    /// The path without the query.
    pub path: &'a str,
    /// The query.
    pub query: Option<&'a str>,
    /// The host that was asked for.
    pub host: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// `HTTP/1.1`, `HTTP/2`, ...
    pub protocol: &'a str,
    /// The headers.
    pub headers: &'a HeaderMap,
    /// Bytes of the request's body.
    pub request_size: u64,
    /// The answer's status; 0 where there was none.
    pub code: u16,
    /// gRPC's own status.
    pub grpc_status: Option<u8>,
    /// Why the answer is not the endpoint's, or `-`.
    pub flags: &'a str,
    /// Bytes of the response's body.
    pub response_size: u64,
    /// The client's SPIFFE id, if it proved one.
    pub source_identity: Option<&'a str>,
    /// The client's address.
    pub source_address: IpAddr,
    /// Host of the service that was dialled; empty where it is none.
    pub destination_host: &'a str,
    /// The port that was dialled.
    pub destination_port: u16,
    /// The name of the route; empty where there is none.
    pub route: &'a str,
}

static OF_LOGS: Names = Names {
    variables: &[
        "request.method",
        "request.path",
        "request.url_path",
        "request.query",
        "request.host",
        "request.scheme",
        "request.protocol",
        "request.headers",
        "request.useragent",
        "request.id",
        "request.size",
        "response.code",
        "response.grpc_status",
        "response.flags",
        "response.size",
        "source.address",
        "source.identity",
        "connection.mtls",
        "connection.uri_san_peer_certificate",
        "destination.host",
        "destination.port",
        "xds.route_name",
    ],
    maps: &["request.headers"],
};

impl LogFilter {
    /// Compiles a filter.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn compile(text: &str) -> Result<Self, ExpressionError> {
        Expression::compile_with(text, &OF_LOGS).map(Self)
    }

    /// Whether it asks for headers of the request.
    pub fn reads_headers(&self) -> bool {
        ["request.headers", "request.useragent", "request.id"].iter().any(|name| self.0.text().contains(name))
    }

    /// Whether a request is logged. One of which that can't be said is not, as in Envoy.
    pub fn holds(&self, facts: &LogFacts<'_>) -> bool {
        self.0.evaluate(&Variables { facts, headers: OnceLock::new() }).unwrap_or(false)
    }
}

struct Variables<'a> {
    facts: &'a LogFacts<'a>,
    headers: OnceLock<CelMap<'static>>,
}

impl fmt::Debug for Variables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Variables").field("facts", self.facts).finish_non_exhaustive()
    }
}

impl VariableResolver for Variables<'_> {
    fn resolve<'b>(&'b self, variable: &str) -> Option<CowVal<'b, 'b>> {
        let facts = self.facts;
        let text = |text: &'b str| Some(CowVal::owned(CelString::from(text)));
        let number =
            |number: u64| Some(CowVal::owned(CelInt::from(i64::try_from(number).unwrap_or(i64::MAX))));
        let header = |name: &str| facts.headers.get(name).and_then(|value| value.to_str().ok());
        match variable {
            "request.method" => text(facts.method),
            "request.path" => text(facts.target),
            "request.url_path" => text(facts.path),
            "request.query" => text(facts.query.unwrap_or_default()),
            "request.host" => text(facts.host),
            "request.scheme" => text(facts.scheme),
            "request.protocol" => text(facts.protocol),
            "request.headers" => {
                Some(CowVal::Borrowed(self.headers.get_or_init(|| of_headers(facts.headers))))
            }
            "request.useragent" => text(header("user-agent")?),
            "request.id" => text(header("x-request-id")?),
            "request.size" => number(facts.request_size),
            "response.code" => number(facts.code.into()),
            "response.grpc_status" => number(facts.grpc_status?.into()),
            "response.flags" => text(facts.flags),
            "response.size" => number(facts.response_size),
            "source.address" => {
                Some(CowVal::owned(CelString::from(facts.source_address.to_canonical().to_string())))
            }
            "source.identity" | "connection.uri_san_peer_certificate" => {
                text(facts.source_identity.unwrap_or_default())
            }
            "connection.mtls" => Some(CowVal::owned(CelBool::from(facts.source_identity.is_some()))),
            "destination.host" => text(facts.destination_host),
            "destination.port" => number(facts.destination_port.into()),
            "xds.route_name" => text(facts.route),
            _ => None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn holds(text: &str) -> bool {
        let field = |name: &'static str, value: &'static str| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        let headers = HeaderMap::from_iter([field("x-user", "anna"), field("user-agent", "curl")]);
        let facts = LogFacts {
            method: "GET",
            target: "/a?b=c",
            path: "/a",
            query: Some("b=c"),
            host: "web.example",
            scheme: "http",
            protocol: "HTTP/1.1",
            headers: &headers,
            request_size: 0,
            code: 503,
            grpc_status: None,
            flags: "UF",
            response_size: 19,
            source_identity: Some("spiffe://cluster.local/ns/shop/sa/cli"),
            source_address: [10, 0, 0, 1].into(),
            destination_host: "web.shop.svc.cluster.local",
            destination_port: 80,
            route: "HTTPRoute/shop/web",
        };
        LogFilter::compile(text).unwrap().holds(&facts)
    }

    #[test]
    fn each_variable_of_a_log_has_its_value() {
        for text in [
            "response.code >= 400 && response.code < 600",
            "response.flags == 'UF' && response.size == 19",
            "request.method == 'GET' && request.path == '/a?b=c' && request.url_path == '/a'",
            "request.query == 'b=c' && request.host == 'web.example' && request.scheme == 'http'",
            "request.headers['x-user'] == 'anna' && !('x-other' in request.headers)",
            "request.useragent.startsWith('curl') && request.protocol == 'HTTP/1.1'",
            "connection.mtls && source.identity.endsWith('/cli') && source.address == '10.0.0.1'",
            "destination.port == 80 && destination.host.contains('shop') && request.size == 0",
            "xds.route_name.endsWith('/web')",
        ] {
            assert!(holds(text), "{text}");
        }
        for text in
            ["response.code < 400", "request.id == 'a'", "response.grpc_status == 0", "request.method"]
        {
            assert!(!holds(text), "{text}");
        }
        assert!(LogFilter::compile("response.cod == 200").is_err());
        assert!(Expression::compile("response.code == 200").is_err(), "a policy sees no response");
    }
}
