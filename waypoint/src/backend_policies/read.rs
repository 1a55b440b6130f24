//! Settings as the control plane sends them, read into what the data path goes by.

use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use ambit_balance::{Algorithm, OutlierSettings, TableKind};
use http::HeaderName;

use super::settings::{HashKey, Outliers, PoolPolicy, PortPolicy, RetryBudget, TcpProbes};
use crate::backend_tls::TlsClients;

/// The policy of a port, as `object` says it.
pub(super) fn policy(object: &Arc<str>, source: &l7::PortSettings, tls: &TlsClients) -> PortPolicy {
    let mut policy = PortPolicy { object: Some(object.clone()), ..PortPolicy::default() };
    let mut invalid = (!source.invalid.is_empty()).then(|| source.invalid.clone());
    if let Some(balancer) = &source.load_balancer {
        match algorithm(balancer) {
            Ok((algorithm, hash)) => (policy.algorithm, policy.hash) = (algorithm, hash),
            Err(reason) => _ = invalid.get_or_insert(reason),
        }
        policy.locality.clone_from(&balancer.locality);
        policy.warmup = Duration::from_nanos(balancer.warmup_nanos);
    }
    policy.outliers = source.outlier_detection.as_ref().map(outliers);
    policy.pool = source.connection_pool.as_ref().map(pool).unwrap_or_default();
    policy.retry_budget = source
        .retry_budget
        .as_ref()
        .map(|budget| RetryBudget { percent_milli: budget.percent_milli, least: budget.min_concurrency });
    policy.says_tls = source.tls.is_some();
    policy.tls = source.tls.as_ref().and_then(|source| tls.get(source));
    policy.invalid = invalid.map(|reason| format!("{object}: {reason}").into());
    policy
}

type Chosen = (Option<Algorithm>, Option<HashKey>);

fn algorithm(source: &l7::LoadBalancer) -> Result<Chosen, String> {
    let unknown = || format!("a load balancer that this waypoint does not know: {}", source.algorithm);
    let known = l7::Algorithm::try_from(source.algorithm).map_err(|_| unknown())?;
    Ok((
        Some(match known {
            // As the service says.
            l7::Algorithm::PeakEwma => return Ok((None, None)),
            l7::Algorithm::RoundRobin => Algorithm::RoundRobin,
            l7::Algorithm::LeastRequest => Algorithm::LeastRequest,
            l7::Algorithm::Random => Algorithm::Random,
            l7::Algorithm::Adaptive => Algorithm::Adaptive,
            l7::Algorithm::ConsistentHash => {
                let hash = source.hash.as_ref().ok_or("consistent hashing without a key")?;
                let (table, key) = (table(hash), hash_key(hash)?);
                return Ok((Some(Algorithm::ConsistentHash(table)), Some(key)));
            }
        }),
        None,
    ))
}

fn table(source: &l7::ConsistentHash) -> TableKind {
    use l7::consistent_hash::Table;
    let size = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
    match source.table {
        Some(Table::MaglevSize(places)) => TableKind::Maglev(size(places)),
        Some(Table::RingSize(points)) => TableKind::Ring(size(points)),
        None => TableKind::Ring(1024),
    }
}

fn hash_key(source: &l7::ConsistentHash) -> Result<HashKey, String> {
    use l7::consistent_hash::Key;
    Ok(match source.key.as_ref().ok_or("consistent hashing without a key")? {
        Key::Header(name) => {
            let name =
                HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("no header name: {name:?}"))?;
            HashKey::Header(name)
        }
        Key::Query(name) => HashKey::Query(name.as_str().into()),
        Key::Cookie(cookie) => HashKey::Cookie {
            name: cookie.name.as_str().into(),
            path: cookie.path.as_str().into(),
            lifetime: cookie.ttl_nanos.map(Duration::from_nanos),
        },
        Key::SourceIp(_) => HashKey::SourceIp,
    })
}

fn outliers(source: &l7::OutlierDetection) -> Outliers {
    Outliers {
        settings: OutlierSettings {
            consecutive_5xx: source.consecutive_5xx,
            consecutive_gateway_errors: source.consecutive_gateway_errors,
            consecutive_local_origin: source.consecutive_local_origin_failures,
            split_local_origin: source.split_local_origin,
            interval: Duration::from_nanos(source.interval_nanos),
            base_ejection: Duration::from_nanos(source.base_ejection_nanos),
            max_ejection_percent: source.max_ejection_percent,
        },
        min_health: source.min_health_percent,
        codes: source.error_codes.iter().filter_map(|code| u16::try_from(*code).ok()).collect(),
    }
}

fn pool(source: &l7::ConnectionPool) -> PoolPolicy {
    let some = |value: u32| (value > 0).then_some(value);
    let span = |nanos: u64| (nanos > 0).then(|| Duration::from_nanos(nanos));
    PoolPolicy {
        max_connections: some(source.max_connections),
        max_pending: some(source.max_pending_requests),
        max_requests: some(source.max_requests),
        max_retries: some(source.max_retries),
        max_requests_per_connection: some(source.max_requests_per_connection),
        connect_timeout: span(source.connect_timeout_nanos),
        idle_timeout: span(source.idle_timeout_nanos),
        upgrade_to_http2: source.upgrade_to_http2,
        use_client_protocol: source.use_client_protocol,
        stream_idle_timeout: span(source.tcp_idle_timeout_nanos),
        max_age: span(source.max_connection_duration_nanos),
        max_concurrent_streams: some(source.max_concurrent_streams),
        tcp_keepalive: source.tcp_keepalive.as_ref().map(|probes| TcpProbes {
            idle: span(probes.idle_nanos),
            interval: span(probes.interval_nanos),
            probes: some(probes.probes),
        }),
        ping_interval: span(source.http2_ping_interval_nanos),
        ping_timeout: span(source.http2_ping_timeout_nanos),
    }
}
