//! Expressions of TrafficPolicies.

use std::net::IpAddr;

use ambit_traffic::{
    DestinationFacts, Expression, ExpressionError, Facts, MAX_SIZE, RequestFacts, SourceFacts,
};
use http::{HeaderMap, HeaderName, HeaderValue};

/// An expression that can be compiled can be evaluated, for a request and for a connection, always with the same answer; one that is
/// too long is refused unread.
pub(crate) fn expression(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let expression = match Expression::compile(text) {
        Ok(expression) => expression,
        Err(error) => {
            assert_eq!(error == ExpressionError::TooLong, text.len() > MAX_SIZE);
            assert!(!matches!(error, ExpressionError::Parser(_)), "{error}: {text:?}");
            return;
        }
    };
    assert!(text.len() <= MAX_SIZE);
    let name = HeaderName::from_static("x-user");
    let headers = HeaderMap::from_iter([(name, HeaderValue::from_static("anna"))]);
    let claims = serde_json::json!({ "sub": "anna", "groups": ["a", "b"], "n": 1.5, "o": { "x": null } });
    let address = IpAddr::from([10, 0, 0, 1]);
    let request = RequestFacts {
        method: "GET",
        path: "/a/b",
        query: Some("a=1&b=%20"),
        host: "web.example",
        scheme: "http",
        headers: &headers,
        principal: Some("https://issuer/anna"),
        claims: claims.as_object(),
    };
    let facts = Facts {
        request: Some(request),
        source: SourceFacts {
            identity: Some("spiffe://cluster.local/ns/shop/sa/cli"),
            namespace: Some("shop"),
            address: Some(address),
            peer_address: address,
        },
        destination: DestinationFacts { host: "web.shop.svc.cluster.local", namespace: "shop", port: 80 },
    };
    assert_eq!(expression.holds(&facts), expression.holds(&facts));
    let connection = Facts { request: None, ..facts };
    assert_eq!(expression.holds(&connection), expression.holds(&connection));
}
