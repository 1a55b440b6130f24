//! From `istio.security.Authorization` to a policy that can be evaluated.
//!
//! What cannot be read is an error here, so nothing is left to check per connection. A caller that must go on without the
//! policy uses [`Policy::closed`], which fails in the safe direction.

use std::net::IpAddr;

use ambit_api::security;
use serde::Serialize;

use crate::http::{Content, HttpMatch, HttpRequest};
use crate::matcher::{Nets, Ports, ServiceAccount, ServiceAccounts, Texts};
use crate::name::PolicyName;
use crate::place::Place;
use crate::request::Request;

/// Which workloads a policy applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Scope {
    /// All.
    Global,
    /// Those of the policy's namespace.
    Namespace,
    /// Those that list it by name.
    WorkloadSelector,
}

/// What a policy does when it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// Lets the connection in, unless a DENY matches.
    Allow,
    /// Keeps it out.
    Deny,
}

/// The field of a match that an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    /// `namespaces`, `not_namespaces`.
    Namespaces,
    /// `principals`, `not_principals`.
    Principals,
    /// `source_ips`, `not_source_ips`.
    SourceIps,
    /// `destination_ips`, `not_destination_ips`.
    DestinationIps,
    /// `destination_ports`, `not_destination_ports`.
    DestinationPorts,
    /// Hosts of requests.
    Hosts,
    /// Other attributes of requests that are compared as text.
    Attributes,
    /// `remote_ips`, `not_remote_ips`.
    RemoteIps,
}

impl std::fmt::Display for Field {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Namespaces => "namespaces",
            Self::Principals => "principals",
            Self::SourceIps => "source_ips",
            Self::DestinationIps => "destination_ips",
            Self::DestinationPorts => "destination_ports",
            Self::Hosts => "hosts",
            Self::Attributes => "attributes",
            Self::RemoteIps => "remote_ips",
        })
    }
}

/// Why a policy cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// The policy has no name.
    #[error("policy of namespace {namespace:?} has no name")]
    Nameless {
        /// Its namespace.
        namespace: String,
    },
    /// A scope that this version does not know.
    #[error("policy {policy} has unknown scope {scope}")]
    Scope {
        /// Which policy.
        policy: PolicyName,
        /// The number on the wire.
        scope: i32,
    },
    /// An action that this version does not know.
    #[error("policy {policy} has unknown action {action}")]
    Action {
        /// Which policy.
        policy: PolicyName,
        /// The number on the wire.
        action: i32,
    },
    /// A text comparison of no known kind.
    #[error("policy {policy}, rule {rule}: a value of {field} has no known way to compare")]
    Comparison {
        /// Which policy.
        policy: PolicyName,
        /// Which rule, from 0.
        rule: usize,
        /// Which field.
        field: Field,
    },
    /// An address that is neither 4 nor 16 bytes long, or a prefix longer than the address.
    #[error(
        "policy {policy}, rule {rule}: {field} has an address of {bytes} bytes with prefix length {length}"
    )]
    Address {
        /// Which policy.
        policy: PolicyName,
        /// Which rule, from 0.
        rule: usize,
        /// Which field.
        field: Field,
        /// Length of the address in bytes.
        bytes: usize,
        /// Prefix length in bits.
        length: u32,
    },
    /// A port above 65535.
    #[error("policy {policy}, rule {rule}: {port} in {field} is no port")]
    Port {
        /// Which policy.
        policy: PolicyName,
        /// Which rule, from 0.
        rule: usize,
        /// Which field.
        field: Field,
        /// The number on the wire.
        port: u32,
    },
    /// An extension of a match that this version does not know.
    #[error("policy {policy}, rule {rule}: an extension can't be read: {what}")]
    Extension {
        /// Which policy.
        policy: PolicyName,
        /// Which rule, from 0.
        rule: usize,
        /// What it is.
        what: String,
    },
}

/// What of a policy is evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layer {
    /// What a connection shows. Extensions are passed over.
    Connection,
    /// What an HTTP request shows too.
    Http,
}

/// A policy, ready to be evaluated. Immutable; kept behind an `Arc`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    name: PolicyName,
    namespace: Box<str>,
    scope: Scope,
    action: Action,
    rules: Box<[Rule]>,
    dry_run: bool,
}

impl Policy {
    /// Compiles a policy as it comes from the control plane.
    ///
    /// # Errors
    /// [`CompileError`] says which policy, rule and field cannot be read.
    pub fn compile(source: &security::Authorization) -> Result<Self, CompileError> {
        Self::compile_for(source, Layer::Connection)
    }

    /// Compiles a policy for requests too: its extensions are read.
    ///
    /// # Errors
    /// As [`Policy::compile`], and for an extension that is not known.
    pub fn compile_http(source: &security::Authorization) -> Result<Self, CompileError> {
        Self::compile_for(source, Layer::Http)
    }

    fn compile_for(source: &security::Authorization, layer: Layer) -> Result<Self, CompileError> {
        if source.name.is_empty() {
            return Err(CompileError::Nameless { namespace: source.namespace.clone() });
        }
        let name = PolicyName::new(&source.namespace, &source.name);
        let scope =
            scope(source).ok_or_else(|| CompileError::Scope { policy: name.clone(), scope: source.scope })?;
        let action = match security::Action::try_from(source.action) {
            Ok(security::Action::Allow) => Action::Allow,
            Ok(security::Action::Deny) => Action::Deny,
            Err(_) => return Err(CompileError::Action { policy: name, action: source.action }),
        };
        let rules = source
            .rules
            .iter()
            .enumerate()
            .map(|(rule, source)| Rule::compile(source, Place { policy: &name, rule, action, layer }))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            name,
            namespace: source.namespace.as_str().into(),
            scope,
            action,
            rules,
            dry_run: source.dry_run,
        })
    }

    /// What stands in for a policy that [`Policy::compile`] rejects: an ALLOW that allows nothing, or a DENY that denies everything,
    /// for the workloads that the policy was meant for (of an unknown scope: its namespace; of an unknown action: DENY).
    ///
    /// A DENY that can't be read denies; an ALLOW that can't be read allows nothing.
    pub fn closed(source: &security::Authorization) -> Self {
        let (action, rules): (_, Box<[Rule]>) = match security::Action::try_from(source.action) {
            Ok(security::Action::Allow) => (Action::Allow, Box::from([])),
            Ok(security::Action::Deny) | Err(_) => {
                (Action::Deny, Box::from([Rule { clauses: Box::from([]) }]))
            }
        };
        Self {
            name: PolicyName::new(&source.namespace, &source.name),
            namespace: source.namespace.as_str().into(),
            scope: scope(source).unwrap_or(Scope::Namespace),
            action,
            rules,
            dry_run: source.dry_run,
        }
    }

    /// `<namespace>/<name>`.
    pub fn name(&self) -> &PolicyName {
        &self.name
    }

    /// The policy's own namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Which workloads it applies to.
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// What it does when it matches.
    pub fn action(&self) -> Action {
        self.action
    }

    /// Whether it is only logged and counted.
    pub fn dry_run(&self) -> bool {
        self.dry_run
    }

    /// Whether one of its rules matches. A policy with no rules never matches.
    pub fn matches(&self, request: &Request<'_>) -> bool {
        self.matches_http(request, Content::Unread)
    }

    /// The same with what is known of what is sent.
    pub fn matches_http(&self, request: &Request<'_>, content: Content<'_>) -> bool {
        let request = Facts { content, ..Facts::of(request) };
        self.rules.iter().any(|rule| rule.matches(&request))
    }

    /// For people: the field that is not met, of each rule; `None` if a rule matches.
    pub fn unmet(&self, request: &Request<'_>, content: Content<'_>) -> Option<Vec<&'static str>> {
        let request = Facts { content, ..Facts::of(request) };
        self.rules.iter().map(|rule| rule.unmet(&request)).collect()
    }

    /// Whether it matches a request whatever an external authorizer makes of it; `None` where that depends on the authorizer.
    pub(crate) fn settled_match(&self, request: &Request<'_>, http: &HttpRequest<'_>) -> Option<bool> {
        let request = Facts { content: Content::Request(http), ..Facts::of(request) };
        let (settled, open): (Vec<&Rule>, Vec<&Rule>) = self.rules.iter().partition(|rule| rule.is_settled());
        match settled.iter().any(|rule| rule.matches(&request)) {
            true => Some(true),
            false if open.is_empty() => Some(false),
            false => None,
        }
    }

    /// Whether it asks for the name that a client's TLS asks for.
    pub fn needs_server_name(&self) -> bool {
        let mut matches = self.rules.iter().flat_map(|rule| &rule.clauses).flat_map(|clause| &clause.matches);
        matches.any(|candidate| candidate.http.as_ref().is_some_and(|http| http.needs_server_name()))
    }

    pub(crate) fn rules(&self) -> &[Rule] {
        &self.rules
    }
}

fn scope(source: &security::Authorization) -> Option<Scope> {
    match security::Scope::try_from(source.scope) {
        Ok(security::Scope::Global) => Some(Scope::Global),
        Ok(security::Scope::Namespace) => Some(Scope::Namespace),
        Ok(security::Scope::WorkloadSelector) => Some(Scope::WorkloadSelector),
        Err(_) => None,
    }
}

/// A request with its addresses in canonical form: an IPv4 address mapped into IPv6 is the IPv4 address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts<'a> {
    pub(crate) principal: Option<&'a str>,
    pub(crate) namespace: Option<&'a str>,
    pub(crate) service_account: Option<(&'a str, &'a str)>,
    pub(crate) source_ip: IpAddr,
    pub(crate) destination_ip: IpAddr,
    pub(crate) destination_port: u16,
    pub(crate) content: Content<'a>,
}

impl<'a> Facts<'a> {
    pub(crate) fn of(request: &Request<'a>) -> Self {
        Self {
            principal: request.peer.map(|peer| peer.principal),
            namespace: request.peer.map(|peer| peer.namespace),
            service_account: request.peer.map(|peer| (peer.namespace, peer.service_account)),
            source_ip: request.source_ip.to_canonical(),
            destination_ip: request.destination_ip.to_canonical(),
            destination_port: request.destination_port,
            content: Content::Unread,
        }
    }
}

/// Clauses, AND'ed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct Rule {
    pub(crate) clauses: Box<[Clause]>,
}

impl Rule {
    fn compile(source: &security::Rule, place: Place<'_>) -> Result<Self, CompileError> {
        let clauses = source.clauses.iter().map(|clause| Clause::compile(clause, place));
        Ok(Self { clauses: clauses.collect::<Result<_, _>>()? })
    }

    pub(crate) fn matches(&self, request: &Facts<'_>) -> bool {
        self.clauses.iter().all(|clause| clause.matches(request))
    }

    fn unmet(&self, request: &Facts<'_>) -> Option<&'static str> {
        let failing = self.clauses.iter().find(|clause| !clause.matches(request))?;
        Some(
            failing
                .matches
                .iter()
                .find_map(|candidate| candidate.unmet(request))
                .unwrap_or("a match without fields"),
        )
    }

    /// Whether nothing that an external authorizer changes decides whether it matches.
    fn is_settled(&self) -> bool {
        let mut matches = self.clauses.iter().flat_map(|clause| &clause.matches);
        matches.all(|candidate| candidate.http.as_ref().is_none_or(|http| http.is_settled()))
    }
}

/// Matches, OR'ed; an empty clause matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct Clause {
    pub(crate) matches: Box<[Match]>,
}

impl Clause {
    fn compile(source: &security::Clause, place: Place<'_>) -> Result<Self, CompileError> {
        let matches = source.matches.iter().map(|source| Match::compile(source, place));
        Ok(Self { matches: matches.collect::<Result<_, _>>()? })
    }

    fn matches(&self, request: &Facts<'_>) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|candidate| candidate.matches(request))
    }
}

/// Fields, AND'ed; an empty match never matches.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Match {
    #[serde(skip_serializing_if = "Texts::is_empty")]
    pub(crate) namespaces: Texts,
    #[serde(skip_serializing_if = "Texts::is_empty")]
    not_namespaces: Texts,
    #[serde(skip_serializing_if = "Texts::is_empty")]
    pub(crate) principals: Texts,
    #[serde(skip_serializing_if = "Texts::is_empty")]
    not_principals: Texts,
    #[serde(skip_serializing_if = "Nets::is_empty")]
    pub(crate) source_ips: Nets,
    #[serde(skip_serializing_if = "Nets::is_empty")]
    not_source_ips: Nets,
    #[serde(skip_serializing_if = "Nets::is_empty")]
    pub(crate) destination_ips: Nets,
    #[serde(skip_serializing_if = "Nets::is_empty")]
    not_destination_ips: Nets,
    #[serde(skip_serializing_if = "Ports::is_empty")]
    pub(crate) destination_ports: Ports,
    #[serde(skip_serializing_if = "Ports::is_empty")]
    not_destination_ports: Ports,
    #[serde(skip_serializing_if = "ServiceAccounts::is_empty")]
    pub(crate) service_accounts: ServiceAccounts,
    #[serde(skip_serializing_if = "ServiceAccounts::is_empty")]
    not_service_accounts: ServiceAccounts,
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<Box<HttpMatch>>,
}

impl Match {
    fn compile(source: &security::Match, place: Place<'_>) -> Result<Self, CompileError> {
        // Extensions carry what L4 can't see; passed over and alone they leave the match empty, which never matches.
        let security::Match {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
            service_accounts,
            not_service_accounts,
            extensions,
        } = source;
        Ok(Self {
            namespaces: place.texts(namespaces, Field::Namespaces)?,
            not_namespaces: place.texts(not_namespaces, Field::Namespaces)?,
            principals: place.texts(principals, Field::Principals)?,
            not_principals: place.texts(not_principals, Field::Principals)?,
            source_ips: place.nets(source_ips, Field::SourceIps)?,
            not_source_ips: place.nets(not_source_ips, Field::SourceIps)?,
            destination_ips: place.nets(destination_ips, Field::DestinationIps)?,
            not_destination_ips: place.nets(not_destination_ips, Field::DestinationIps)?,
            destination_ports: place.ports(destination_ports)?,
            not_destination_ports: place.ports(not_destination_ports)?,
            service_accounts: accounts(service_accounts),
            not_service_accounts: accounts(not_service_accounts),
            http: match place.layer {
                Layer::Connection => None,
                Layer::Http => HttpMatch::compile(extensions, place)?,
            },
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn matches(&self, request: &Facts<'_>) -> bool {
        !self.is_empty() && self.unmet(request).is_none()
    }

    /// The field that is not met, as AuthorizationPolicy names it; `None` if all are.
    fn unmet(&self, request: &Facts<'_>) -> Option<&'static str> {
        let texts = |wanted: &Texts, unwanted: &Texts, value| {
            (wanted.is_empty() || wanted.matches(value)) && !unwanted.matches(value)
        };
        let nets = |wanted: &Nets, unwanted: &Nets, address| {
            (wanted.is_empty() || wanted.matches(address)) && !unwanted.matches(address)
        };
        let accounts = &self.service_accounts;
        let ports = &self.destination_ports;
        if !texts(&self.principals, &self.not_principals, request.principal) {
            Some("principals")
        } else if !texts(&self.namespaces, &self.not_namespaces, request.namespace) {
            Some("namespaces")
        } else if !(accounts.is_empty() || accounts.matches(request.service_account))
            || self.not_service_accounts.matches(request.service_account)
        {
            Some("serviceAccounts")
        } else if !nets(&self.source_ips, &self.not_source_ips, request.source_ip) {
            Some("ipBlocks")
        } else if !nets(&self.destination_ips, &self.not_destination_ips, request.destination_ip) {
            Some("destination.ip")
        } else if !(ports.is_empty() || ports.matches(request.destination_port))
            || self.not_destination_ports.matches(request.destination_port)
        {
            Some("ports")
        } else {
            self.http.as_ref().and_then(|http| http.unmet(request.content))
        }
    }
}

fn accounts(source: &[security::ServiceAccountMatch]) -> ServiceAccounts {
    let accounts = source.iter().map(|account| ServiceAccount {
        namespace: account.namespace.as_str().into(),
        service_account: account.service_account.as_str().into(),
    });
    ServiceAccounts::new(accounts.collect())
}
