//! Limits of a traffic policy: connections, requests and retries at once, and when failing endpoints are ejected.

use ambit_api::l7;
use serde::Deserialize;

use super::Invalid;
use super::settings::{Read, Reading, nanos};

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub(super) struct ConnectionPool {
    tcp: Tcp,
    http: Http,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Tcp {
    max_connections: Option<u32>,
    connect_timeout: Option<String>,
    tcp_keepalive: Option<TcpKeepalive>,
    max_connection_duration: Option<String>,
    idle_timeout: Option<String>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct TcpKeepalive {
    probes: Option<u32>,
    time: Option<String>,
    interval: Option<String>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Http {
    http1_max_pending_requests: Option<u32>,
    http2_max_requests: Option<u32>,
    max_requests_per_connection: Option<u32>,
    max_retries: Option<u32>,
    idle_timeout: Option<String>,
    h2_upgrade_policy: String,
    use_client_protocol: Option<bool>,
    max_concurrent_streams: Option<u32>,
    http2_keep_alive: Option<Http2KeepAlive>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
struct Http2KeepAlive {
    interval: Option<String>,
    timeout: Option<String>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct OutlierDetection {
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
    failure_percentage_threshold: Option<u32>,
    outlier_detection_http_error_codes: Vec<u32>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RetryBudget {
    percent: Option<f64>,
    min_retry_concurrency: Option<u32>,
    budget_interval: Option<String>,
}

impl Reading {
    /// How much is sent at once, and how connections are kept.
    pub(super) fn pool(&self, source: &ConnectionPool, at: &str) -> Read<l7::ConnectionPool> {
        let ConnectionPool { tcp, http } = source;
        let span = |text: &Option<String>, field: &str| nanos(text.as_ref(), &format!("{at}.{field}"));
        let upgrade_to_http2 = match http.h2_upgrade_policy.as_str() {
            "" | "DEFAULT" | "DO_NOT_UPGRADE" => false,
            "UPGRADE" => true,
            other => {
                let reason = format!("{other:?} is unknown");
                return Err(Invalid::new(format!("{at}.http.h2UpgradePolicy"), reason));
            }
        };
        let keepalive = tcp.tcp_keepalive.as_ref().map(|source| keepalive(source, at)).transpose()?;
        let tcp_idle = span(&tcp.idle_timeout, "tcp.idleTimeout")?;
        let idle = match http.idle_timeout {
            // As in Istio, the one for TCP counts where HTTP has none.
            None => tcp_idle,
            Some(_) => span(&http.idle_timeout, "http.idleTimeout")?,
        };
        let pings = http.http2_keep_alive.clone().unwrap_or_default();
        Ok(l7::ConnectionPool {
            max_connections: tcp.max_connections.unwrap_or_default(),
            connect_timeout_nanos: span(&tcp.connect_timeout, "tcp.connectTimeout")?,
            max_pending_requests: http.http1_max_pending_requests.unwrap_or_default(),
            max_requests: http.http2_max_requests.unwrap_or_default(),
            max_requests_per_connection: http.max_requests_per_connection.unwrap_or_default(),
            max_retries: http.max_retries.unwrap_or_default(),
            idle_timeout_nanos: idle,
            upgrade_to_http2,
            tcp_idle_timeout_nanos: tcp_idle,
            max_connection_duration_nanos: span(&tcp.max_connection_duration, "tcp.maxConnectionDuration")?,
            max_concurrent_streams: http.max_concurrent_streams.unwrap_or_default(),
            use_client_protocol: http.use_client_protocol.unwrap_or_default(),
            tcp_keepalive: keepalive,
            http2_ping_interval_nanos: span(&pings.interval, "http.http2KeepAlive.interval")?,
            http2_ping_timeout_nanos: span(&pings.timeout, "http.http2KeepAlive.timeout")?,
        })
    }

    /// When an endpoint is ejected.
    pub(super) fn outliers(&mut self, source: &OutlierDetection, at: &str) -> Read<l7::OutlierDetection> {
        const SECOND: u64 = 1_000_000_000;
        if source.failure_percentage_threshold.is_some_and(|threshold| threshold > 0) {
            self.unsupported(format!("{at}.failurePercentageThreshold"), "not supported");
        }
        let or = |text: &Option<String>, field: &str, default: u64| match text {
            None => Ok(default * SECOND),
            Some(_) => nanos(text.as_ref(), &format!("{at}.{field}")),
        };
        let percent = |value: u32, field: &str| match value {
            percent @ 0..=100 => Ok(percent),
            other => Err(Invalid::new(format!("{at}.{field}"), format!("{other} is no percentage"))),
        };
        let codes = &source.outlier_detection_http_error_codes;
        if let Some(code) = codes.iter().find(|code| !(100..=599).contains(*code)) {
            let field = format!("{at}.outlierDetectionHttpErrorCodes");
            return Err(Invalid::new(field, format!("{code} is no status")));
        }
        // As in Istio, 0 stands for the default.
        let most = source.max_ejection_percent.filter(|percent| *percent > 0).unwrap_or(10);
        Ok(l7::OutlierDetection {
            consecutive_5xx: source.consecutive_5xx_errors.or(source.consecutive_errors).unwrap_or(5),
            consecutive_gateway_errors: source.consecutive_gateway_errors.unwrap_or_default(),
            consecutive_local_origin_failures: source.consecutive_local_origin_failures.unwrap_or(5),
            split_local_origin: source.split_external_local_origin_errors,
            interval_nanos: or(&source.interval, "interval", 10)?,
            base_ejection_nanos: or(&source.base_ejection_time, "baseEjectionTime", 30)?,
            max_ejection_percent: percent(most, "maxEjectionPercent")?,
            min_health_percent: percent(source.min_health_percent.unwrap_or(0), "minHealthPercent")?,
            error_codes: codes.clone(),
        })
    }

    /// How many retries there may be at once.
    pub(super) fn retry_budget(&mut self, source: &RetryBudget, at: &str) -> l7::RetryBudget {
        if source.budget_interval.is_some() {
            let reason = "not supported: the budget is that of the requests in progress";
            self.unsupported(format!("{at}.budgetInterval"), reason);
        }
        let percent = source.percent.unwrap_or(20.0).clamp(0.0, 100.0);
        l7::RetryBudget {
            percent_milli: (percent * 1000.0) as u32,
            min_concurrency: source.min_retry_concurrency.unwrap_or(3),
        }
    }
}

fn keepalive(source: &TcpKeepalive, at: &str) -> Read<l7::TcpKeepalive> {
    let span =
        |text: &Option<String>, field: &str| nanos(text.as_ref(), &format!("{at}.tcp.tcpKeepalive.{field}"));
    Ok(l7::TcpKeepalive {
        idle_nanos: span(&source.time, "time")?,
        interval_nanos: span(&source.interval, "interval")?,
        probes: source.probes.unwrap_or_default(),
    })
}
