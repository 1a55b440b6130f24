//! The fields of a VirtualService as one table, and those of earlier versions.

use Shape::{Any, Each, Fields};
use serde_json::Value;

use super::fields::{self, Shape, Withdrawn};

const PERCENT: Shape = Fields(&[("value", Any)]);
const DESTINATION: Shape = Fields(&[("host", Any), ("subset", Any), ("port", Fields(&[("number", Any)]))]);
const TEXT: Shape = Fields(&[("exact", Any), ("prefix", Any), ("regex", Any)]);
const HEADERS: Shape = {
    const CHANGES: Shape = Fields(&[("set", Any), ("add", Any), ("remove", Any)]);
    Fields(&[("request", CHANGES), ("response", CHANGES)])
};
const STREAM_ROUTE: Shape = Each(&Fields(&[("destination", DESTINATION), ("weight", Any)]));

const HTTP_MATCH: Shape = Fields(&[
    ("name", Any),
    ("uri", TEXT),
    ("scheme", TEXT),
    ("method", TEXT),
    ("authority", TEXT),
    ("headers", Any),
    ("withoutHeaders", Any),
    ("queryParams", Any),
    ("port", Any),
    ("sourceLabels", Any),
    ("sourceNamespace", Any),
    ("gateways", Any),
    ("ignoreUriCase", Any),
    ("statPrefix", Any),
]);

const HTTP: Shape = Fields(&[
    ("name", Any),
    ("match", Each(&HTTP_MATCH)),
    ("route", Each(&Fields(&[("destination", DESTINATION), ("weight", Any), ("headers", HEADERS)]))),
    (
        "redirect",
        Fields(&[
            ("uri", Any),
            ("authority", Any),
            ("port", Any),
            ("derivePort", Any),
            ("scheme", Any),
            ("redirectCode", Any),
            ("prefixRewrite", Any),
        ]),
    ),
    ("directResponse", Fields(&[("status", Any), ("body", Fields(&[("string", Any), ("bytes", Any)]))])),
    ("delegate", Fields(&[("name", Any), ("namespace", Any)])),
    (
        "rewrite",
        Fields(&[
            ("uri", Any),
            ("authority", Any),
            ("uriRegexRewrite", Fields(&[("match", Any), ("rewrite", Any)])),
        ]),
    ),
    ("timeout", Any),
    (
        "retries",
        Fields(&[
            ("attempts", Any),
            ("perTryTimeout", Any),
            ("retryOn", Any),
            ("backoff", Any),
            ("retryRemoteLocalities", Any),
            ("retryIgnorePreviousHosts", Any),
        ]),
    ),
    (
        "fault",
        Fields(&[
            ("delay", Fields(&[("fixedDelay", Any), ("percentage", PERCENT), ("percent", Any)])),
            (
                "abort",
                Fields(&[
                    ("httpStatus", Any),
                    ("grpcStatus", Any),
                    ("percentage", PERCENT),
                    ("percent", Any),
                ]),
            ),
        ]),
    ),
    ("mirror", DESTINATION),
    ("mirrors", Each(&Fields(&[("destination", DESTINATION), ("percentage", PERCENT)]))),
    ("mirrorPercentage", PERCENT),
    ("mirrorPercent", Any),
    ("mirror_percent", Any),
    (
        "corsPolicy",
        Fields(&[
            ("allowOrigins", Each(&TEXT)),
            ("allowOrigin", Any),
            ("allowMethods", Any),
            ("allowHeaders", Any),
            ("exposeHeaders", Any),
            ("maxAge", Any),
            ("allowCredentials", Any),
            ("unmatchedPreflights", Any),
        ]),
    ),
    ("headers", HEADERS),
]);

const SPEC: Shape = Fields(&[
    ("hosts", Any),
    ("gateways", Any),
    ("exportTo", Any),
    ("http", Each(&HTTP)),
    ("tcp", Each(&Fields(&[("match", Any), ("route", STREAM_ROUTE)]))),
    ("tls", Each(&Fields(&[("match", Any), ("route", STREAM_ROUTE)]))),
]);

/// Fields of earlier versions and of examples on the web, with what has their effect today.
const WITHDRAWN: &[Withdrawn] = &[
    ("retryPolicy", "use `retries: {attempts, perTryTimeout, retryOn}`"),
    ("maxAttempts", "use `attempts`"),
    ("maxRetries", "use `attempts`"),
    ("simpleRetry", "use `attempts` and `perTryTimeout` below `retries`"),
    (
        "connectTimeout",
        "use `trafficPolicy.connectionPool.tcp.connectTimeout` of a DestinationRule, or `timeout` for the request",
    ),
    ("appendHeaders", "use `headers.request.add`"),
    ("appendRequestHeaders", "use `headers.request.add`"),
    ("removeRequestHeaders", "use `headers.request.remove`"),
    ("appendResponseHeaders", "use `headers.response.add`"),
    ("removeResponseHeaders", "use `headers.response.remove`"),
    ("websocketUpgrade", "leave it out: upgrades are always possible"),
    ("httpFault", "use `fault`"),
    ("httpReqTimeout", "use `timeout`"),
    ("httpReqRetries", "use `retries`"),
    ("loadBalancer", "use `trafficPolicy.loadBalancer` of a DestinationRule"),
    ("outlierDetection", "use `trafficPolicy.outlierDetection` of a DestinationRule"),
    ("exponentialDelay", "use `fixedDelay`"),
    ("http2Error", "use `httpStatus` or `grpcStatus`"),
    ("name", "use `host`"),
    ("labels", "use `subset`, and a DestinationRule that names it"),
    ("request", "put its `headers` into `headers`, `uri`, `method` or `authority` of the match"),
    ("source", "use `sourceLabels` or `sourceNamespace`"),
    ("precedence", "rules count in the order in which they are written"),
    ("sourceSubnet", "use `sourceNamespace` or `sourceLabels`"),
];

/// The fields of a spec that the table does not have, each with advice.
pub(super) fn unknown(spec: &Value) -> Vec<String> {
    let unknown = fields::unknown(spec, &SPEC, WITHDRAWN).into_iter();
    unknown.map(|fields::Unknown { path, advice }| format!("{path} has no effect: {advice}")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_without_effect_are_named_with_the_modern_form() {
        let spec = json!({
            "hosts": ["a"],
            "http": [{
                "retryPolicy": { "maxAttempts": 3 },
                "connectTimeout": "1s",
                "route": [{ "destination": { "host": "a", "subsett": "v1" }, "weight": 1 }],
                "retries": { "per_try_timeout": "1s" },
            }],
            "unheard": 1,
        });
        assert_eq!(
            unknown(&spec),
            [
                "http[0].connectTimeout has no effect: use `trafficPolicy.connectionPool.tcp.connectTimeout` of a \
                 DestinationRule, or `timeout` for the request",
                "http[0].retries.per_try_timeout has no effect: did you mean `perTryTimeout`?",
                "http[0].retryPolicy has no effect: use `retries: {attempts, perTryTimeout, retryOn}`",
                "http[0].route[0].destination.subsett has no effect: did you mean `subset`?",
                "unheard has no effect: there is no such field",
            ]
        );
    }
}
