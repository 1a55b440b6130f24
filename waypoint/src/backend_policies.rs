//! How endpoints are treated, as DestinationRules say: by service, port and subset, compiled.
//!
//! Policies of the service's own namespace count, else those for the whole mesh. Among them a host that is named in full comes before
//! wildcards, the longer of these first; of several for one host the oldest one's settings count, and subsets are joined.

mod read;
mod settings;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use ambit_api::l7;
use ambit_directory::NamespacedHost;

use self::read::policy;
pub use self::settings::{HashKey, Outliers, PoolPolicy, PortPolicy, RetryBudget, TcpProbes};
use crate::backend_tls::TlsClients;

/// The kind of policies that say nothing but TLS.
pub(crate) const TLS_POLICY: &str = "BackendTLSPolicy";

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
