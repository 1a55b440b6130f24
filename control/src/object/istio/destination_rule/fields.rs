//! The fields of a DestinationRule as one table, and those of earlier versions.

use Shape::{Any, Each, Fields};
use serde_json::Value;

use crate::object::istio::fields::{self, Shape, Withdrawn};

const LOAD_BALANCER: Shape = Fields(&[
    ("simple", Any),
    (
        "consistentHash",
        Fields(&[
            ("httpHeaderName", Any),
            ("httpQueryParameterName", Any),
            ("httpCookie", Fields(&[("name", Any), ("path", Any), ("ttl", Any), ("attributes", Any)])),
            ("useSourceIp", Any),
            ("ringHash", Fields(&[("minimumRingSize", Any)])),
            ("maglev", Fields(&[("tableSize", Any)])),
            ("minimumRingSize", Any),
        ]),
    ),
    (
        "localityLbSetting",
        Fields(&[
            ("distribute", Each(&Fields(&[("from", Any), ("to", Any)]))),
            ("failover", Each(&Fields(&[("from", Any), ("to", Any)]))),
            ("failoverPriority", Any),
            ("enabled", Any),
        ]),
    ),
    ("warmupDurationSecs", Any),
    ("warmup", Fields(&[("duration", Any), ("minimumPercent", Any), ("aggression", Any)])),
    ("backendUtilization", Any),
    ("zoneAwareLbSetting", Any),
]);

const CONNECTION_POOL: Shape = Fields(&[
    (
        "tcp",
        Fields(&[
            ("maxConnections", Any),
            ("connectTimeout", Any),
            ("tcpKeepalive", Fields(&[("probes", Any), ("time", Any), ("interval", Any)])),
            ("maxConnectionDuration", Any),
            ("idleTimeout", Any),
        ]),
    ),
    (
        "http",
        Fields(&[
            ("http1MaxPendingRequests", Any),
            ("http2MaxRequests", Any),
            ("maxRequestsPerConnection", Any),
            ("maxRetries", Any),
            ("idleTimeout", Any),
            ("h2UpgradePolicy", Any),
            ("useClientProtocol", Any),
            ("maxConcurrentStreams", Any),
            ("http2KeepAlive", Fields(&[("interval", Any), ("timeout", Any)])),
        ]),
    ),
]);

const OUTLIER_DETECTION: Shape = Fields(&[
    ("consecutiveErrors", Any),
    ("splitExternalLocalOriginErrors", Any),
    ("consecutiveLocalOriginFailures", Any),
    ("consecutiveGatewayErrors", Any),
    ("consecutive5xxErrors", Any),
    ("interval", Any),
    ("baseEjectionTime", Any),
    ("maxEjectionPercent", Any),
    ("minHealthPercent", Any),
    ("failurePercentageThreshold", Any),
    ("outlierDetectionHttpErrorCodes", Any),
]);

const PORT_LEVEL: Shape = Fields(&[
    ("port", Fields(&[("number", Any)])),
    ("loadBalancer", LOAD_BALANCER),
    ("connectionPool", CONNECTION_POOL),
    ("outlierDetection", OUTLIER_DETECTION),
    ("tls", Any),
]);

const TRAFFIC_POLICY: Shape = Fields(&[
    ("loadBalancer", LOAD_BALANCER),
    ("connectionPool", CONNECTION_POOL),
    ("outlierDetection", OUTLIER_DETECTION),
    ("tls", Any),
    ("portLevelSettings", Each(&PORT_LEVEL)),
    ("tunnel", Any),
    ("proxyProtocol", Any),
    ("retryBudget", Fields(&[("percent", Any), ("minRetryConcurrency", Any), ("budgetInterval", Any)])),
]);

const SPEC: Shape = Fields(&[
    ("host", Any),
    ("trafficPolicy", TRAFFIC_POLICY),
    ("subsets", Each(&Fields(&[("name", Any), ("labels", Any), ("trafficPolicy", TRAFFIC_POLICY)]))),
    ("exportTo", Any),
    ("workloadSelector", Any),
]);

/// Fields of earlier versions and of examples on the web, with what has their effect today.
const WITHDRAWN: &[Withdrawn] = &[
    ("name", "use `host`"),
    ("connectTimeout", "use `connectionPool.tcp.connectTimeout`"),
    ("maxConnections", "use `connectionPool.tcp.maxConnections`"),
    (
        "timeout",
        "use `timeout` of a VirtualService or HTTPRoute for requests, `connectionPool.tcp.connectTimeout` for connections",
    ),
    ("retryPolicy", "use `retries` of a VirtualService"),
    ("retries", "use `retries` of a VirtualService"),
    ("http", "leave this level out: its fields are those of `outlierDetection` itself"),
    ("httpMaxPendingRequests", "use `http1MaxPendingRequests`"),
    ("maxPendingRequests", "use `http1MaxPendingRequests`"),
    ("httpMaxRequests", "use `http2MaxRequests`"),
    ("maxRequests", "use `http2MaxRequests`"),
    ("httpMaxRequestsPerConnection", "use `maxRequestsPerConnection`"),
    ("httpMaxRetries", "use `maxRetries`"),
    ("httpConsecutiveErrors", "use `outlierDetection.consecutive5xxErrors`"),
    ("httpDetectionInterval", "use `outlierDetection.interval`"),
    ("httpMaxEjectionPercent", "use `outlierDetection.maxEjectionPercent`"),
    ("sleepWindow", "use `outlierDetection.baseEjectionTime`"),
    ("circuitBreaker", "use `connectionPool` and `outlierDetection`"),
    ("simpleCb", "use `connectionPool` and `outlierDetection`"),
    ("loadBalancing", "use `loadBalancer`"),
    ("mtls", "use `tls: {mode: ISTIO_MUTUAL}`; endpoints with a tunnel have it in any case"),
];

/// The fields of a spec that the table does not have, with the path from the document on, and advice.
pub(super) fn unknown(spec: &Value) -> impl Iterator<Item = (String, String)> {
    let unknown = fields::unknown(spec, &SPEC, WITHDRAWN).into_iter();
    unknown.map(|fields::Unknown { path, advice }| (format!("spec.{path}"), format!("no effect, {advice}")))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_of_old_tutorials_are_named_with_the_modern_form() {
        let spec = json!({
            "host": "a",
            "trafficPolicy": {
                "connectionPool": { "http": { "connectTimeout": "1s", "http1MaxPendingRequest": 1 } },
                "outlierDetection": { "http": { "consecutiveErrors": 1 } },
                "tls": { "anything": "is read strictly" },
            },
            "subsets": [{ "name": "v1", "labels": { "any": "label" }, "trafficPolicy": { "circuitBreaker": {} } }],
        });
        let found: Vec<String> = unknown(&spec).map(|(field, advice)| format!("{field}: {advice}")).collect();
        assert_eq!(
            found,
            [
                "spec.subsets[0].trafficPolicy.circuitBreaker: no effect, use `connectionPool` and `outlierDetection`",
                "spec.trafficPolicy.connectionPool.http.connectTimeout: no effect, use `connectionPool.tcp.connectTimeout`",
                "spec.trafficPolicy.connectionPool.http.http1MaxPendingRequest: no effect, did you mean \
                 `http1MaxPendingRequests`?",
                "spec.trafficPolicy.outlierDetection.http: no effect, leave this level out: its fields are those of \
                 `outlierDetection` itself",
            ]
        );
    }
}
