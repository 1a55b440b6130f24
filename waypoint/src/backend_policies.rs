//! How endpoints are treated, as DestinationRules say: by service, port and subset, compiled.
//!
//! Policies of the service's own namespace count, else those for the whole mesh. Among them a host that is named in full comes before
//! wildcards, the longer of these first; of several for one host the oldest one's settings count, and subsets are joined.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ambit_api::l7;
use ambit_balance::{Algorithm, Outcome, OutlierSettings, TableKind};
use ambit_directory::NamespacedHost;
use http::HeaderName;
use serde::Serialize;

use crate::backend_tls::{BackendTls, TlsClients};

/// The kind of policies that say nothing but TLS.
pub(crate) const TLS_POLICY: &str = "BackendTLSPolicy";

/// What a policy says of one port of a service or subset. The default: of services without a policy.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PortPolicy {
    /// The object, for admin and log.
    pub object: Option<Arc<str>>,
    /// Why requests can't be sent as the policy demands.
    pub invalid: Option<Arc<str>>,
    /// How an endpoint is chosen; `None`: as the service says, by default by peak EWMA.
    pub algorithm: Option<Algorithm>,
    /// What consistent hashing goes by.
    pub hash: Option<HashKey>,
    /// Which localities are preferred.
    pub locality: Option<l7::LocalityPreference>,
    /// How long the share of a new endpoint grows.
    pub warmup: Duration,
    /// When an endpoint is ejected.
    pub outliers: Option<Outliers>,
    /// How much is sent at once.
    pub pool: PoolPolicy,
    /// How many retries there may be at once; `None`: the waypoint's own limit.
    pub retry_budget: Option<RetryBudget>,
    /// TLS to the endpoints, inside the tunnel where there is one.
    pub tls: Option<Arc<BackendTls>>,
    /// Whether something is said of TLS, be it that there is none.
    pub says_tls: bool,
}

/// What of a request the hash is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// The value of a header.
    Header(HeaderName),
    /// The value of a parameter of the query.
    Query(Arc<str>),
    /// The value of a cookie, which is set where a lifetime is given.
    Cookie {
        /// Its name.
        name: Arc<str>,
        /// Its path; empty: not said.
        path: Arc<str>,
        /// How long a cookie lasts that is set here; 0: the session.
        lifetime: Option<Duration>,
    },
    /// The client's address.
    SourceIp,
}

/// Ejection, and when it is given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outliers {
    /// When an endpoint is ejected.
    pub settings: OutlierSettings,
    /// Per cent of the endpoints that must not be ejected, else ejections are ignored.
    pub min_health: u32,
    /// Answers with these statuses are failures too.
    pub codes: Box<[u16]>,
}

impl Outliers {
    /// How a request ended in the eyes of the policy: what it calls a failure is one.
    pub fn judge(&self, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Answer(code) if code < 500 && self.codes.contains(&code) => Outcome::Answer(500),
            Outcome::Answer(_) | Outcome::LocalFailure | Outcome::ClientDeadline => outcome,
        }
    }
}

/// Bounds of what is sent at once, and how connections are made and kept. `None`: the waypoint's own, or none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolPolicy {
    /// Connections to all endpoints.
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection.
    pub max_pending: Option<u32>,
    /// Requests in progress.
    pub max_requests: Option<u32>,
    /// Retries in progress.
    pub max_retries: Option<u32>,
    /// Requests that a connection is used for.
    pub max_requests_per_connection: Option<u32>,
    /// Budget of one connection, handshakes included.
    pub connect_timeout: Option<Duration>,
    /// How long an unused connection is kept.
    pub idle_timeout: Option<Duration>,
    /// Whether requests of HTTP/1 clients are sent in HTTP/2.
    pub upgrade_to_http2: bool,
    /// Whether requests are sent in the version of HTTP that their clients speak.
    pub use_client_protocol: bool,
    /// How long a connection that is passed on may be silent.
    pub stream_idle_timeout: Option<Duration>,
    /// How old a connection may become.
    pub max_age: Option<Duration>,
    /// Requests at once on one HTTP/2 connection.
    pub max_concurrent_streams: Option<u32>,
    /// Probes of sockets to endpoints outside the mesh.
    pub tcp_keepalive: Option<TcpProbes>,
    /// Time between the PINGs of an HTTP/2 connection.
    pub ping_interval: Option<Duration>,
    /// How long the answer to a PING may take.
    pub ping_timeout: Option<Duration>,
}

/// Probes of a silent TCP connection. `None`: as the system has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
pub struct TcpProbes {
    /// Silence before the first one.
    pub idle: Option<Duration>,
    /// Time between them.
    pub interval: Option<Duration>,
    /// How many must be lost.
    pub probes: Option<u32>,
}

/// Retries at once, in proportion to the requests in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryBudget {
    /// Thousandths of a per cent.
    pub percent_milli: u32,
    /// So many are always allowed.
    pub least: u32,
}

impl RetryBudget {
    /// How many retries there may be while so many requests are in progress.
    pub fn most(self, active: u32) -> u32 {
        let share = u64::from(active) * u64::from(self.percent_milli) / 100_000;
        u32::try_from(share).unwrap_or(u32::MAX).max(self.least)
    }
}

/// Labels that an endpoint must have.
pub type Labels = Vec<(Box<str>, Box<str>)>;

/// Policy and endpoints of a port.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// What is said of it.
    pub policy: Arc<PortPolicy>,
    /// The labels of the subset's endpoints; `None`: all endpoints.
    pub labels: Option<Arc<Labels>>,
}

/// All policies. Immutable; built anew when one changes.
#[derive(Debug, Default)]
pub struct BackendPolicies {
    /// Grows with each change.
    generation: u64,
    /// The most specific host first, then the oldest.
    rules: Vec<Rule>,
    /// BackendTLSPolicies, which say nothing but TLS.
    tls: Vec<Rule>,
    default: Arc<PortPolicy>,
}

#[derive(Debug)]
struct Rule {
    host: Host,
    namespace: Box<str>,
    mesh_wide: bool,
    /// Whether it is a BackendTLSPolicy.
    says_tls_only: bool,
    settings: Ports,
    subsets: BTreeMap<Box<str>, (Arc<Labels>, Ports)>,
}

#[derive(Debug)]
enum Host {
    Exact(Box<str>),
    /// What follows the `*`.
    Suffix(Box<str>),
}

impl Host {
    fn read(host: &str) -> Self {
        match host.strip_prefix('*') {
            Some(suffix) => Self::Suffix(suffix.into()),
            None => Self::Exact(host.into()),
        }
    }

    fn matches(&self, hostname: &str) -> bool {
        match self {
            Self::Exact(host) => **host == *hostname,
            Self::Suffix(suffix) => hostname.ends_with(&**suffix),
        }
    }

    /// Orders by how much is said.
    fn rank(&self) -> (bool, Reverse<usize>) {
        match self {
            Self::Exact(host) => (false, Reverse(host.len())),
            Self::Suffix(suffix) => (true, Reverse(suffix.len())),
        }
    }

    fn text(&self) -> &str {
        match self {
            Self::Exact(text) | Self::Suffix(text) => text,
        }
    }
}

/// Settings by port; 0: every other port.
#[derive(Debug, Default)]
struct Ports(Vec<(u16, Arc<PortPolicy>)>);

impl Ports {
    fn read(object: &Arc<str>, all: &[l7::PortSettings], tls: &TlsClients) -> Self {
        let read = |source: &l7::PortSettings| {
            Some((u16::try_from(source.port).ok()?, Arc::new(policy(object, source, tls))))
        };
        Self(all.iter().filter_map(read).collect())
    }

    fn of(&self, port: u16) -> Option<&Arc<PortPolicy>> {
        self.named(port).or_else(|| self.named(0))
    }

    fn named(&self, wanted: u16) -> Option<&Arc<PortPolicy>> {
        self.0.iter().find(|(port, _)| *port == wanted).map(|(_, policy)| policy)
    }

    /// Whether something is said at all.
    fn is_empty(&self) -> bool {
        self.0.iter().all(|(_, policy)| {
            **policy == PortPolicy { object: policy.object.clone(), ..PortPolicy::default() }
        })
    }
}

impl BackendPolicies {
    /// Compiles policies; `generation` must grow from one to the next. `tls` has the clients of those before.
    pub fn new<'a>(
        generation: u64,
        sources: impl IntoIterator<Item = &'a l7::BackendPolicy>,
        tls: &TlsClients,
    ) -> Self {
        let mut sources: Vec<&l7::BackendPolicy> = sources.into_iter().collect();
        let age = |source: &l7::BackendPolicy| if source.created == 0 { i64::MAX } else { source.created };
        let name = |source: &l7::BackendPolicy| {
            let object = source.object.clone().unwrap_or_default();
            (object.namespace, object.name)
        };
        sources.sort_by_cached_key(|source| (age(source), name(source)));
        let rules: Vec<Rule> = sources.into_iter().map(|source| Rule::read(source, tls)).collect();
        let (of_tls, mut rules): (Vec<Rule>, Vec<Rule>) =
            rules.into_iter().partition(|rule| rule.says_tls_only);
        // Stable: the oldest stays the first for its host.
        rules.sort_by(|one, other| {
            let rank = |rule: &Rule| (rule.mesh_wide, rule.host.rank());
            rank(one).cmp(&rank(other)).then_with(|| one.host.text().cmp(other.host.text()))
        });
        Self { generation, rules, tls: of_tls, default: Arc::default() }
    }

    /// Which state this is.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What is said of a port of a service, or of a subset of it.
    ///
    /// # Errors
    /// No policy names such a subset.
    pub fn find(&self, service: &NamespacedHost, port: u16, subset: Option<&str>) -> Result<Found, String> {
        let hostname = &*service.hostname;
        let applies = |rule: &&Rule| {
            (rule.mesh_wide || *rule.namespace == *service.namespace) && rule.host.matches(hostname)
        };
        let mut rules = self.rules.iter().filter(applies).peekable();
        let first = rules.peek().map(|rule| (rule.mesh_wide, rule.host.rank()));
        let same: Vec<&Rule> =
            rules.take_while(|rule| Some((rule.mesh_wide, rule.host.rank())) == first).collect();
        let Some(subset) = subset else {
            let said = same.iter().find(|rule| !rule.settings.is_empty());
            let policy = said.and_then(|rule| rule.settings.of(port)).unwrap_or(&self.default);
            return Ok(Found { policy: self.with_tls(policy, service, port), labels: None });
        };
        let (labels, settings) = same
            .iter()
            .find_map(|rule| rule.subsets.get(subset))
            .ok_or_else(|| format!("subset {subset} of {hostname} is not known"))?;
        let policy = settings.of(port).unwrap_or(&self.default);
        Ok(Found { policy: self.with_tls(policy, service, port), labels: Some(labels.clone()) })
    }

    /// The policy with what a BackendTLSPolicy demands, if it says nothing of TLS itself.
    fn with_tls(&self, policy: &Arc<PortPolicy>, service: &NamespacedHost, port: u16) -> Arc<PortPolicy> {
        let applies =
            |rule: &&Rule| *rule.namespace == *service.namespace && rule.host.matches(&service.hostname);
        let all = || self.tls.iter().filter(applies);
        let for_port = |port: u16| all().find_map(|rule| rule.settings.named(port));
        match for_port(port).or_else(|| for_port(0)).filter(|_| !policy.says_tls) {
            None => policy.clone(),
            Some(demanded) => Arc::new(PortPolicy {
                object: policy.object.clone().or_else(|| demanded.object.clone()),
                tls: demanded.tls.clone(),
                invalid: policy.invalid.clone().or_else(|| demanded.invalid.clone()),
                says_tls: true,
                ..PortPolicy::clone(policy)
            }),
        }
    }
}

impl Rule {
    fn read(source: &l7::BackendPolicy, tls: &TlsClients) -> Self {
        let object = source.object.clone().unwrap_or_default();
        let name: Arc<str> = format!("{}/{}/{}", object.kind, object.namespace, object.name).into();
        let subsets = source.subsets.iter().map(|subset| {
            let mut labels: Labels = subset
                .labels
                .iter()
                .map(|(key, value)| (key.as_str().into(), value.as_str().into()))
                .collect();
            labels.sort_unstable();
            (subset.name.as_str().into(), (Arc::new(labels), Ports::read(&name, &subset.settings, tls)))
        });
        Self {
            host: Host::read(&source.host.to_ascii_lowercase()),
            namespace: object.namespace.into(),
            says_tls_only: object.kind == TLS_POLICY,
            mesh_wide: source.mesh_wide,
            settings: Ports::read(&name, &source.settings, tls),
            subsets: subsets.collect(),
        }
    }
}

fn policy(object: &Arc<str>, source: &l7::PortSettings, tls: &TlsClients) -> PortPolicy {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(port: u32, algorithm: l7::Algorithm) -> l7::PortSettings {
        let balancer = l7::LoadBalancer { algorithm: algorithm.into(), ..l7::LoadBalancer::default() };
        l7::PortSettings { port, load_balancer: Some(balancer), ..l7::PortSettings::default() }
    }

    fn source(name: &str, host: &str, created: i64, settings: Vec<l7::PortSettings>) -> l7::BackendPolicy {
        let object = l7::ObjectName {
            kind: "DestinationRule".to_owned(),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
        };
        l7::BackendPolicy {
            object: Some(object),
            host: host.to_owned(),
            created,
            settings,
            ..Default::default()
        }
    }

    fn tls() -> TlsClients {
        TlsClients::new(None).unwrap()
    }

    fn found(sources: &[l7::BackendPolicy], host: &str, port: u16) -> Option<Algorithm> {
        let service = NamespacedHost { namespace: "shop".into(), hostname: host.into() };
        BackendPolicies::new(1, sources, &tls()).find(&service, port, None).unwrap().policy.algorithm
    }

    #[test]
    fn the_named_host_then_the_longer_wildcard_then_the_mesh_counts() {
        use l7::Algorithm::{Adaptive, LeastRequest, Random, RoundRobin};
        let wide = l7::BackendPolicy {
            mesh_wide: true,
            ..source("w", "a.shop.local", 1, vec![settings(0, Adaptive)])
        };
        let all = [
            wide,
            source("a", "*.local", 1, vec![settings(0, Random)]),
            source("b", "*.shop.local", 2, vec![settings(0, LeastRequest)]),
            source("c", "a.shop.local", 3, vec![settings(0, RoundRobin), settings(81, Random)]),
        ];
        assert_eq!(found(&all, "a.shop.local", 80), Some(Algorithm::RoundRobin));
        assert_eq!(found(&all, "a.shop.local", 81), Some(Algorithm::Random));
        assert_eq!(found(&all, "b.shop.local", 80), Some(Algorithm::LeastRequest));
        assert_eq!(found(&all, "b.other.local", 80), Some(Algorithm::Random));
        assert_eq!(found(&all[..1], "a.shop.local", 80), Some(Algorithm::Adaptive));
        assert_eq!(found(&all, "elsewhere", 80), None);
    }

    #[test]
    fn the_oldest_settings_count_and_subsets_are_joined() {
        let subset = |name: &str, value: &str| l7::Subset {
            name: name.to_owned(),
            labels: [("version".to_owned(), value.to_owned())].into(),
            settings: vec![settings(0, l7::Algorithm::Random)],
        };
        let only_subsets = l7::BackendPolicy {
            subsets: vec![subset("v1", "1")],
            ..source("z", "a", 1, vec![l7::PortSettings::default()])
        };
        let older = l7::BackendPolicy {
            subsets: vec![subset("v1", "other"), subset("v2", "2")],
            ..source("b", "a", 2, vec![settings(0, l7::Algorithm::RoundRobin)])
        };
        let newer = source("a", "a", 3, vec![settings(0, l7::Algorithm::Random)]);
        let policies = BackendPolicies::new(1, &[newer, older, only_subsets], &tls());
        let service = NamespacedHost { namespace: "shop".into(), hostname: "a".into() };
        let labels = |subset| policies.find(&service, 80, Some(subset)).map(|found| found.labels.unwrap());
        assert_eq!(policies.find(&service, 80, None).unwrap().policy.algorithm, Some(Algorithm::RoundRobin));
        assert_eq!(*labels("v1").unwrap(), [("version".into(), "1".into())]);
        assert_eq!(*labels("v2").unwrap(), [("version".into(), "2".into())]);
        assert_eq!(labels("v3").unwrap_err(), "subset v3 of a is not known");
    }

    #[test]
    fn a_rule_that_says_nothing_of_tls_leaves_that_to_another_policy() {
        let wanted = |mode: l7::TlsMode, name: &str| {
            let roots = Some(l7::backend_tls::Roots::System(true));
            l7::BackendTls { mode: mode.into(), server_name: name.into(), roots, ..Default::default() }
        };
        let demands = |port: u32, name: &str| {
            let tls = Some(wanted(l7::TlsMode::Tls, name));
            l7::PortSettings { port, tls, ..l7::PortSettings::default() }
        };
        let demanded = |name: &str, settings: Vec<l7::PortSettings>| {
            let mut policy = source(name, "a", 1, settings);
            policy.object.as_mut().unwrap().kind = "BackendTLSPolicy".to_owned();
            policy
        };
        let off = l7::PortSettings {
            port: 82,
            tls: Some(wanted(l7::TlsMode::Plaintext, "")),
            ..l7::PortSettings::default()
        };
        let rule = source("r", "a", 1, vec![settings(0, l7::Algorithm::Random), demands(81, "rule"), off]);
        let broken = l7::PortSettings { port: 83, invalid: "no root".into(), ..l7::PortSettings::default() };
        let all = [
            rule,
            demanded("all", vec![demands(0, "all")]),
            demanded("port", vec![demands(80, "port")]),
            demanded("broken", vec![broken]),
        ];
        let policies = BackendPolicies::new(1, &all, &tls());
        let service = NamespacedHost { namespace: "shop".into(), hostname: "a".into() };
        let found = |port: u16| policies.find(&service, port, None).unwrap().policy;
        let name = |port: u16| found(port).tls.as_ref().and_then(|tls| tls.server_name().map(str::to_owned));
        assert_eq!(name(80).as_deref(), Some("port"));
        assert_eq!(found(80).algorithm, Some(Algorithm::Random));
        assert_eq!(name(81).as_deref(), Some("rule"));
        assert_eq!(name(82), None);
        assert_eq!((name(83), found(83).invalid.is_some()), (None, true));
        assert_eq!(name(84).as_deref(), Some("all"));
        let other = NamespacedHost { namespace: "other".into(), hostname: "a".into() };
        assert!(policies.find(&other, 80, None).unwrap().policy.tls.is_none());
    }

    #[test]
    fn what_can_not_be_read_is_invalid() {
        let unknown = l7::LoadBalancer { algorithm: 99, ..l7::LoadBalancer::default() };
        let hash = l7::ConsistentHash {
            key: Some(l7::consistent_hash::Key::Header("a b".to_owned())),
            ..l7::ConsistentHash::default()
        };
        let hashed = l7::LoadBalancer {
            algorithm: l7::Algorithm::ConsistentHash.into(),
            hash: Some(hash),
            ..l7::LoadBalancer::default()
        };
        for balancer in [unknown, hashed] {
            let settings = l7::PortSettings { load_balancer: Some(balancer), ..l7::PortSettings::default() };
            assert!(policy(&"DestinationRule/a/b".into(), &settings, &tls()).invalid.is_some());
        }
    }
}
