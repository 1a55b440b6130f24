//! Traffic policies to the settings of ports.
//!
//! Istio merges them so: what is said for a port replaces everything that is said for all ports; of what a subset says
//! each part (balancing, connection pool, outlier detection) replaces the rule's.

use std::collections::BTreeMap;

use ambit_api::l7;
use serde::Deserialize;
use serde_json::Value;

use super::Invalid;
use super::limits::{ConnectionPool, OutlierDetection, RetryBudget};
use super::tls::Tls;

/// Parts that a policy may have. `None` and empty: not said.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
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
#[serde(rename_all = "camelCase", default)]
struct PortLevel {
    port: PortSelector,
    load_balancer: Option<LoadBalancer>,
    connection_pool: Option<ConnectionPool>,
    outlier_detection: Option<OutlierDetection>,
    tls: Option<Tls>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct PortSelector {
    number: u16,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct LoadBalancer {
    simple: String,
    consistent_hash: Option<ConsistentHash>,
    locality_lb_setting: Option<Locality>,
    warmup_duration_secs: Option<String>,
    warmup: Option<Warmup>,
    backend_utilization: Option<Value>,
    zone_aware_lb_setting: Option<Value>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Warmup {
    duration: Option<String>,
    minimum_percent: Option<f64>,
    aggression: Option<f64>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
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
#[serde(rename_all = "camelCase", default)]
struct RingHash {
    minimum_ring_size: Option<u64>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Maglev {
    table_size: Option<u64>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Cookie {
    name: String,
    path: String,
    ttl: Option<String>,
    attributes: Option<Value>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Locality {
    distribute: Vec<Distribute>,
    failover: Vec<Failover>,
    failover_priority: Vec<String>,
    enabled: Option<bool>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct Distribute {
    from: String,
    to: BTreeMap<String, u32>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct Failover {
    from: String,
    to: String,
}

/// The largest table of consistent hashing, a prime.
const MOST_PLACES: u64 = 131_071;

/// Reads policies and notes what has no effect.
#[derive(Debug, Default)]
pub(super) struct Reading {
    /// Whether the rule asks for adaptive balancing.
    pub(super) adaptive: bool,
    unsupported: Vec<String>,
}

pub(super) type Read<T> = Result<T, Invalid>;

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
        let retry_budget = all.retry_budget;
        let mut settings = vec![all];
        for (i, port) in policy.port_level_settings.iter().enumerate() {
            let port = self.of_port(port, &format!("{at}.portLevelSettings[{i}]"))?;
            // Ports have no budget of their own.
            settings.push(l7::PortSettings { retry_budget, ..port });
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
            settings.retry_budget = Some(self.retry_budget(budget, &format!("{at}.retryBudget")));
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
                .map(|it| self.outliers(it, &format!("{at}.outlierDetection")))
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
        let others = [
            ("backendUtilization", source.backend_utilization.is_some()),
            ("zoneAwareLbSetting", source.zone_aware_lb_setting.is_some()),
        ];
        for (field, _) in others.into_iter().filter(|(_, is_set)| *is_set) {
            self.unsupported(format!("{at}.{field}"), "not supported");
        }
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
            Some(maglev) => Table::MaglevSize(self.maglev_size(maglev.table_size.unwrap_or(65_537), at)),
            None => {
                let size = ring.or(source.minimum_ring_size).unwrap_or(1024);
                Table::RingSize(self.table_size(size, &format!("{at}.ringHash.minimumRingSize")))
            }
        };
        Ok(l7::ConsistentHash { key: Some(key), table: Some(table) })
    }

    /// The number of places of a Maglev table: a prime.
    fn maglev_size(&mut self, wanted: u64, at: &str) -> u64 {
        let at = format!("{at}.maglev.tableSize");
        let size = self.table_size(wanted.max(2), &at);
        let is_prime = |n: &u64| {
            (2..).take_while(|divisor| divisor * divisor <= *n).all(|divisor| !n.is_multiple_of(divisor))
        };
        let prime = (size..).find(is_prime).unwrap_or(size);
        if prime != wanted && wanted <= MOST_PLACES {
            self.unsupported(at, format!("{wanted} is no prime number: {prime} is used"));
        }
        prime
    }

    /// A table is built for each subset in each waypoint: its size is bounded.
    fn table_size(&mut self, wanted: u64, at: &str) -> u64 {
        if wanted > MOST_PLACES {
            self.unsupported(at, format!("{wanted} is more than {MOST_PLACES}, which is used"));
        }
        wanted.min(MOST_PLACES)
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
}

fn overlaid(base: l7::PortSettings, own: &l7::PortSettings) -> l7::PortSettings {
    l7::PortSettings {
        port: base.port,
        load_balancer: own.load_balancer.clone().or(base.load_balancer),
        outlier_detection: own.outlier_detection.clone().or(base.outlier_detection),
        connection_pool: own.connection_pool.or(base.connection_pool),
        retry_budget: own.retry_budget.or(base.retry_budget),
        // A subset's TLS settings replace the rule's, but what is invalid stays so: nothing goes out in the clear by mistake.
        invalid: if own.invalid.is_empty() { base.invalid } else { own.invalid.clone() },
        tls: own.tls.clone().or(base.tls),
    }
}

/// Nanoseconds of a duration; 0 where there is none.
pub(super) fn nanos(text: Option<&String>, at: &str) -> Read<u64> {
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
