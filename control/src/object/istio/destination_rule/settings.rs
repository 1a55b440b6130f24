//! Traffic policies to the settings of ports.
//!
//! Istio merges them so: what is said for a port replaces everything that is said for all ports; of what a subset says
//! each part (balancing, connection pool, outlier detection) replaces the rule's.

use std::collections::BTreeMap;

use ambit_api::l7;
use serde::Deserialize;
use serde_json::Value;

use super::Invalid;
use super::tls::Tls;

/// Parts that a policy may have. `None` and empty: not said.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct TrafficPolicy {
    #[serde(rename = "loadBalancer")]
    load_balancer: Option<LoadBalancer>,
    connection_pool: Option<ConnectionPool>,
    outlier_detection: Option<OutlierDetection>,
    tls: Option<Tls>,
    port_level_settings: Vec<PortLevel>,
    tunnel: Option<Value>,
    proxy_protocol: Option<Value>,
    retry_budget: Option<RetryBudget>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct PortLevel {
    port: PortSelector,
    load_balancer: Option<LoadBalancer>,
    connection_pool: Option<ConnectionPool>,
    outlier_detection: Option<OutlierDetection>,
    tls: Option<Tls>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PortSelector {
    number: u16,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct LoadBalancer {
    simple: String,
    consistent_hash: Option<ConsistentHash>,
    locality_lb_setting: Option<Locality>,
    warmup_duration_secs: Option<String>,
    warmup: Option<Warmup>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Warmup {
    duration: Option<String>,
    minimum_percent: Option<f64>,
    aggression: Option<f64>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ConsistentHash {
    http_header_name: String,
    http_query_parameter_name: String,
    http_cookie: Option<Cookie>,
    use_source_ip: bool,
    ring_hash: Option<RingHash>,
    maglev: Option<Maglev>,
    minimum_ring_size: Option<u64>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RingHash {
    minimum_ring_size: Option<u64>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Maglev {
    table_size: Option<u64>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Cookie {
    name: String,
    path: String,
    ttl: Option<String>,
    attributes: Option<Value>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Locality {
    distribute: Vec<Distribute>,
    failover: Vec<Failover>,
    failover_priority: Vec<String>,
    enabled: Option<bool>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Distribute {
    from: String,
    to: BTreeMap<String, u32>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Failover {
    from: String,
    to: String,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConnectionPool {
    tcp: Tcp,
    http: Http,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Tcp {
    max_connections: Option<u32>,
    connect_timeout: Option<String>,
    tcp_keepalive: Option<Value>,
    max_connection_duration: Option<Value>,
    idle_timeout: Option<String>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Http {
    http1_max_pending_requests: Option<u32>,
    http2_max_requests: Option<u32>,
    max_requests_per_connection: Option<u32>,
    max_retries: Option<u32>,
    idle_timeout: Option<String>,
    h2_upgrade_policy: String,
    use_client_protocol: Option<bool>,
    max_concurrent_streams: Option<Value>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct OutlierDetection {
    consecutive_errors: Option<u32>,
    split_external_local_origin_errors: bool,
    consecutive_local_origin_failures: Option<u32>,
    consecutive_gateway_errors: Option<u32>,
    #[serde(rename = "consecutive5xxErrors")]
    consecutive_5xx_errors: Option<u32>,
    interval: Option<String>,
    base_ejection_time: Option<String>,
    max_ejection_percent: Option<u32>,
    min_health_percent: Option<u32>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RetryBudget {
    percent: Option<f64>,
    min_retry_concurrency: Option<u32>,
}

/// Reads policies and notes what has no effect.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// Whether the rule asks for adaptive balancing.
    pub(super) adaptive: bool,
    unsupported: Vec<String>,
}

type Read<T> = Result<T, Invalid>;

impl Reading {
    /// Notes a field without effect.
    pub(super) fn unsupported(&mut self, field: impl std::fmt::Display, reason: impl std::fmt::Display) {
        let text = format!("{field}: {reason}");
        if !self.unsupported.contains(&text) {
            self.unsupported.push(text);
        }
    }

    /// What had no effect.
    pub(super) fn finish(self) -> Vec<String> {
        self.unsupported
    }

    /// The settings of a rule's own policy.
    pub(super) fn of_all(&mut self, policy: &TrafficPolicy, at: &str) -> Read<Vec<l7::PortSettings>> {
        let all = self.parts(policy, at)?;
        let mut settings = vec![all];
        for (i, port) in policy.port_level_settings.iter().enumerate() {
            settings.push(self.of_port(port, &format!("{at}.portLevelSettings[{i}]"))?);
        }
        Ok(settings)
    }

    /// The settings of a subset, whose policy is `own`.
    pub(super) fn of_subset(
        &mut self,
        rule: &TrafficPolicy,
        own: &TrafficPolicy,
        at: &str,
    ) -> Read<Vec<l7::PortSettings>> {
        let subset = self.of_all(own, at)?;
        let Some((overlay, of_ports)) = subset.split_first() else { return Ok(Vec::new()) };
        let base = self.of_all(rule, "spec.trafficPolicy")?;
        let mut merged: Vec<l7::PortSettings> =
            base.into_iter().map(|base| overlaid(base, overlay)).collect();
        for port in of_ports {
            merged.retain(|settings| settings.port != port.port);
            merged.push(port.clone());
        }
        Ok(merged)
    }

    fn parts(&mut self, policy: &TrafficPolicy, at: &str) -> Read<l7::PortSettings> {
        if policy.tunnel.is_some() {
            self.unsupported(format!("{at}.tunnel"), "not supported at waypoints");
        }
        let mut settings = self.of_port(
            &PortLevel {
                port: PortSelector::default(),
                load_balancer: policy.load_balancer.clone(),
                connection_pool: policy.connection_pool.clone(),
                outlier_detection: policy.outlier_detection.clone(),
                tls: policy.tls.clone(),
            },
            at,
        )?;
        if policy.proxy_protocol.is_some() {
            self.unsupported(format!("{at}.proxyProtocol"), "not supported");
            settings.invalid = "a DestinationRule demands the PROXY protocol".to_owned();
        }
        if let Some(budget) = &policy.retry_budget {
            let percent = budget.percent.unwrap_or(20.0).clamp(0.0, 100.0);
            settings.retry_budget = Some(l7::RetryBudget {
                percent_milli: (percent * 1000.0) as u32,
                min_concurrency: budget.min_retry_concurrency.unwrap_or(3),
            });
        }
        Ok(settings)
    }

    fn of_port(&mut self, port: &PortLevel, at: &str) -> Read<l7::PortSettings> {
        let load_balancer = match &port.load_balancer {
            Some(balancer) => Some(self.load_balancer(balancer, &format!("{at}.loadBalancer"))?),
            None => self.adaptive.then(|| self.unhashed(l7::Algorithm::Adaptive)),
        };
        let outlier = port.outlier_detection.as_ref();
        let pool = port.connection_pool.as_ref();
        let (tls, invalid) = match port.tls.as_ref().map(|tls| self.tls(tls, &format!("{at}.tls"))) {
            None => (None, String::new()),
            Some(Ok(tls)) => (Some(tls), String::new()),
            Some(Err(reason)) => (None, reason),
        };
        Ok(l7::PortSettings {
            port: port.port.number.into(),
            load_balancer,
            outlier_detection: outlier
                .map(|it| outliers(it, &format!("{at}.outlierDetection")))
                .transpose()?,
            connection_pool: pool.map(|it| self.pool(it, &format!("{at}.connectionPool"))).transpose()?,
            retry_budget: None,
            invalid,
            tls,
        })
    }

    fn unhashed(&self, algorithm: l7::Algorithm) -> l7::LoadBalancer {
        l7::LoadBalancer { algorithm: algorithm as i32, ..l7::LoadBalancer::default() }
    }

    fn load_balancer(&mut self, source: &LoadBalancer, at: &str) -> Read<l7::LoadBalancer> {
        let algorithm = match source.simple.as_str() {
            _ if source.consistent_hash.is_some() => l7::Algorithm::ConsistentHash,
            _ if self.adaptive => l7::Algorithm::Adaptive,
            "" | "UNSPECIFIED" => l7::Algorithm::PeakEwma,
            "ROUND_ROBIN" => l7::Algorithm::RoundRobin,
            "LEAST_REQUEST" | "LEAST_CONN" => l7::Algorithm::LeastRequest,
            "RANDOM" => l7::Algorithm::Random,
            "PASSTHROUGH" => {
                let reason =
                    "PASSTHROUGH has no effect at waypoints, which clients reach by the service's address";
                self.unsupported(format!("{at}.simple"), reason);
                l7::Algorithm::PeakEwma
            }
            other => {
                return Err(Invalid::new(format!("{at}.simple"), format!("{other:?} is no load balancer")));
            }
        };
        let warmup = source.warmup.as_ref();
        let fine = warmup.is_some_and(|it| it.minimum_percent.is_some() || it.aggression.is_some());
        if fine {
            self.unsupported(
                format!("{at}.warmup"),
                "minimumPercent and aggression have no effect (10 and 1 are used)",
            );
        }
        let warmup = warmup.and_then(|it| it.duration.as_ref()).or(source.warmup_duration_secs.as_ref());
        let hash = source.consistent_hash.as_ref();
        let locality = source.locality_lb_setting.as_ref();
        Ok(l7::LoadBalancer {
            hash: hash.map(|it| self.hash(it, &format!("{at}.consistentHash"))).transpose()?,
            locality: locality.map(|it| self.locality(it, &format!("{at}.localityLbSetting"))),
            warmup_nanos: nanos(warmup, &format!("{at}.warmup"))?,
            ..self.unhashed(algorithm)
        })
    }

    fn hash(&mut self, source: &ConsistentHash, at: &str) -> Read<l7::ConsistentHash> {
        use l7::consistent_hash::{Key, Table};
        let mut keys = Vec::new();
        if !source.http_header_name.is_empty() {
            keys.push(Key::Header(source.http_header_name.to_ascii_lowercase()));
        }
        if !source.http_query_parameter_name.is_empty() {
            keys.push(Key::Query(source.http_query_parameter_name.clone()));
        }
        if let Some(cookie) = &source.http_cookie {
            if cookie.attributes.is_some() {
                self.unsupported(format!("{at}.httpCookie.attributes"), "not supported");
            }
            let ttl =
                cookie.ttl.as_ref().map(|_| nanos(cookie.ttl.as_ref(), &format!("{at}.httpCookie.ttl")));
            let (name, path) = (cookie.name.clone(), cookie.path.clone());
            keys.push(Key::Cookie(l7::HashCookie { name, path, ttl_nanos: ttl.transpose()? }));
        }
        if source.use_source_ip {
            keys.push(Key::SourceIp(true));
        }
        let [key] = <[Key; 1]>::try_from(keys).map_err(|_| {
            Invalid::new(at, "needs exactly one of header, query parameter, cookie and source")
        })?;
        let ring = source.ring_hash.as_ref().and_then(|ring| ring.minimum_ring_size);
        let table = match &source.maglev {
            Some(maglev) => Table::MaglevSize(maglev.table_size.unwrap_or(65_537)),
            None => Table::RingSize(ring.or(source.minimum_ring_size).unwrap_or(1024)),
        };
        Ok(l7::ConsistentHash { key: Some(key), table: Some(table) })
    }

    fn locality(&mut self, source: &Locality, at: &str) -> l7::LocalityPreference {
        for label in &source.failover_priority {
            let is_known = [
                "topology.kubernetes.io/region",
                "topology.kubernetes.io/zone",
                "topology.istio.io/subzone",
                "kubernetes.io/hostname",
                "topology.istio.io/network",
                "topology.istio.io/cluster",
            ]
            .contains(&label.as_str());
            if !is_known {
                let reason = format!("{label:?} is no label of topology: it and what follows have no effect");
                self.unsupported(format!("{at}.failoverPriority"), reason);
            }
        }
        let distribute =
            source.distribute.iter().map(|it| l7::Distribution { from: it.from.clone(), to: it.to.clone() });
        l7::LocalityPreference {
            disabled: source.enabled == Some(false),
            failover: source.failover.iter().map(|it| (it.from.clone(), it.to.clone())).collect(),
            distribute: distribute.collect(),
            priority: source.failover_priority.clone(),
        }
    }

    fn pool(&mut self, source: &ConnectionPool, at: &str) -> Read<l7::ConnectionPool> {
        let ConnectionPool { tcp, http } = source;
        let without_effect = [
            ("tcp.tcpKeepalive", tcp.tcp_keepalive.is_some()),
            ("tcp.maxConnectionDuration", tcp.max_connection_duration.is_some()),
            ("http.maxConcurrentStreams", http.max_concurrent_streams.is_some()),
            ("http.useClientProtocol", http.use_client_protocol == Some(true)),
        ];
        for (field, _) in without_effect.into_iter().filter(|(_, is_set)| *is_set) {
            self.unsupported(format!("{at}.{field}"), "not supported");
        }
        self.unsupported(at, "waypoints do not follow it yet");
        let upgrade_to_http2 = match http.h2_upgrade_policy.as_str() {
            "" | "DEFAULT" | "DO_NOT_UPGRADE" => false,
            "UPGRADE" => true,
            other => {
                return Err(Invalid::new(
                    format!("{at}.http.h2UpgradePolicy"),
                    format!("{other:?} is unknown"),
                ));
            }
        };
        let idle = http.idle_timeout.as_ref().or(tcp.idle_timeout.as_ref());
        Ok(l7::ConnectionPool {
            max_connections: tcp.max_connections.unwrap_or_default(),
            connect_timeout_nanos: nanos(tcp.connect_timeout.as_ref(), &format!("{at}.tcp.connectTimeout"))?,
            max_pending_requests: http.http1_max_pending_requests.unwrap_or_default(),
            max_requests: http.http2_max_requests.unwrap_or_default(),
            max_requests_per_connection: http.max_requests_per_connection.unwrap_or_default(),
            max_retries: http.max_retries.unwrap_or_default(),
            idle_timeout_nanos: nanos(idle, &format!("{at}.http.idleTimeout"))?,
            upgrade_to_http2,
        })
    }
}

fn overlaid(base: l7::PortSettings, own: &l7::PortSettings) -> l7::PortSettings {
    l7::PortSettings {
        port: base.port,
        load_balancer: own.load_balancer.clone().or(base.load_balancer),
        outlier_detection: own.outlier_detection.or(base.outlier_detection),
        connection_pool: own.connection_pool.or(base.connection_pool),
        retry_budget: own.retry_budget.or(base.retry_budget),
        // A subset's TLS settings replace the rule's, but what is invalid stays so: nothing goes out in the clear by mistake.
        invalid: if own.invalid.is_empty() { base.invalid } else { own.invalid.clone() },
        tls: own.tls.clone().or(base.tls),
    }
}

fn outliers(source: &OutlierDetection, at: &str) -> Read<l7::OutlierDetection> {
    const SECOND: u64 = 1_000_000_000;
    let or = |text: &Option<String>, field: &str, default: u64| match text {
        None => Ok(default * SECOND),
        Some(_) => nanos(text.as_ref(), &format!("{at}.{field}")),
    };
    let percent = |value: Option<u32>, field: &str, default: u32| match value.unwrap_or(default) {
        percent @ 0..=100 => Ok(percent),
        other => Err(Invalid::new(format!("{at}.{field}"), format!("{other} is no percentage"))),
    };
    Ok(l7::OutlierDetection {
        consecutive_5xx: source.consecutive_5xx_errors.or(source.consecutive_errors).unwrap_or(5),
        consecutive_gateway_errors: source.consecutive_gateway_errors.unwrap_or_default(),
        consecutive_local_origin_failures: source.consecutive_local_origin_failures.unwrap_or(5),
        split_local_origin: source.split_external_local_origin_errors,
        interval_nanos: or(&source.interval, "interval", 10)?,
        base_ejection_nanos: or(&source.base_ejection_time, "baseEjectionTime", 30)?,
        max_ejection_percent: percent(source.max_ejection_percent, "maxEjectionPercent", 10)?,
        min_health_percent: percent(source.min_health_percent, "minHealthPercent", 0)?,
    })
}

fn nanos(text: Option<&String>, at: &str) -> Read<u64> {
    let Some(text) = text else { return Ok(0) };
    duration(text).ok_or_else(|| Invalid::new(at, format!("{text:?} is no duration")))
}

/// Nanoseconds of a duration as Go writes it: `1h30m`, `1.5s`, `100ms`.
fn duration(text: &str) -> Option<u64> {
    let mut rest = text.trim();
    if rest.is_empty() {
        return None;
    }
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        let unit = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let scale = match unit {
            "ns" => 1.0,
            "us" | "µs" => 1e3,
            "ms" => 1e6,
            "s" => 1e9,
            "m" => 60e9,
            "h" => 3600e9,
            _ => return None,
        };
        total += number.parse::<f64>().ok()? * scale;
        rest = after;
    }
    // A hundred years are enough.
    (total <= 100.0 * 365.0 * 86_400e9).then_some(total as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let cases = [
            ("1s", Some(1_000_000_000)),
            ("1.5s", Some(1_500_000_000)),
            ("100ms", Some(100_000_000)),
            ("1h1m1s", Some(3_661_000_000_000)),
            ("", None),
            ("1", None),
            ("s", None),
            ("1x", None),
            ("-1s", None),
        ];
        for (text, nanos) in cases {
            assert_eq!(duration(text), nanos, "{text:?}");
        }
    }
}
