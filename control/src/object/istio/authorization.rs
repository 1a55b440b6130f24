//! AuthorizationPolicy: who may talk to whom, as its author wrote it.
//!
//! Every value is checked while it is read, so that an error has the line and the field of its value, and
//! an unknown field is an error: a field of a rule that was misspelt would otherwise widen an ALLOW.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ambit_policy::Template;
use ipnet::IpNet;
use serde::Deserialize;

use super::NamespacedName;
use super::condition::Condition;
use super::meta::{self, Invalid, Labels, Meta, annotation};

/// What a policy does with connections that its rules match.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// Allows them, and by its existence nothing else.
    #[default]
    Allow,
    /// Denies them.
    Deny,
    /// Records them; waypoints only.
    Audit,
    /// Asks an extension; waypoints only.
    Custom,
}

/// A TCP port of a policy, written as a string.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PortNumber(pub u16);

impl TryFrom<String> for PortNumber {
    type Error = String;

    fn try_from(text: String) -> Result<PortNumber, String> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(PortNumber(number)),
            _ => Err(format!("{text:?} is no port (1 to 65535)")),
        }
    }
}

/// An address or a CIDR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct IpBlock(pub IpNet);

impl TryFrom<String> for IpBlock {
    type Error = String;

    fn try_from(text: String) -> Result<IpBlock, String> {
        let block = IpNet::from_str(&text).or_else(|_| IpAddr::from_str(&text).map(IpNet::from));
        block.map(IpBlock).map_err(|_| format!("{text:?} is neither an IP address nor a CIDR"))
    }
}

/// A value that may begin or end with `*`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "String")]
pub enum Pattern {
    /// This value.
    Exact(String),
    /// Values that begin so (`text*`).
    Prefix(String),
    /// Values that end so (`*text`).
    Suffix(String),
    /// Any value (`*`).
    Presence,
}

impl From<String> for Pattern {
    fn from(text: String) -> Pattern {
        if text == "*" {
            Pattern::Presence
        } else if let Some(suffix) = text.strip_prefix('*') {
            Pattern::Suffix(suffix.to_owned())
        } else if let Some(prefix) = text.strip_suffix('*') {
            Pattern::Prefix(prefix.to_owned())
        } else {
            Pattern::Exact(text)
        }
    }
}

/// A path of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum PathPattern {
    /// Compared as text.
    Text(Pattern),
    /// A template: `{*}` is one segment, `{**}` any number.
    Template(String),
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PathPattern::Text(Pattern::Exact(text)) | PathPattern::Template(text) => write!(f, "{text:?}"),
            PathPattern::Text(Pattern::Prefix(text)) => write!(f, "{:?}", format!("{text}*")),
            PathPattern::Text(Pattern::Suffix(text)) => write!(f, "{:?}", format!("*{text}")),
            PathPattern::Text(Pattern::Presence) => f.write_str("\"*\""),
        }
    }
}

impl TryFrom<String> for PathPattern {
    type Error = String;

    fn try_from(text: String) -> Result<PathPattern, String> {
        if !text.contains(['{', '}']) {
            return Ok(PathPattern::Text(Pattern::from(text)));
        }
        match Template::parse(&text) {
            Ok(_) => Ok(PathPattern::Template(text)),
            Err(error) => Err(format!("{text:?} is no path template: {error}")),
        }
    }
}

/// A trust domain, or the beginning of one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum TrustDomainPattern {
    /// This one.
    Exact(String),
    /// Those that begin so (`text*`).
    Prefix(String),
    /// Any (`*`).
    Presence,
}

impl TryFrom<String> for TrustDomainPattern {
    type Error = String;

    fn try_from(text: String) -> Result<TrustDomainPattern, String> {
        if text.is_empty() || text.contains('/') {
            return Err(format!("{text:?} is no trust domain"));
        }
        match Pattern::from(text) {
            Pattern::Exact(text) => Ok(TrustDomainPattern::Exact(text)),
            Pattern::Prefix(text) => Ok(TrustDomainPattern::Prefix(text)),
            Pattern::Presence => Ok(TrustDomainPattern::Presence),
            // On the wire a trust domain is the beginning of a principal, whose middle cannot be matched.
            Pattern::Suffix(text) => {
                Err(format!("\"*{text}\" is not supported: only the end of a trust domain may be a *"))
            }
        }
    }
}

/// Where a connection comes from. Values of a field are alternatives, fields must all hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Source {
    /// Peer identities, without `spiffe://`.
    pub principals: Vec<Pattern>,
    /// None of these identities.
    pub not_principals: Vec<Pattern>,
    /// Trust domains of the peer's identity.
    pub trust_domains: Vec<TrustDomainPattern>,
    /// None of these trust domains.
    pub not_trust_domains: Vec<TrustDomainPattern>,
    /// JWT principals, which L4 cannot see.
    pub request_principals: Vec<Pattern>,
    /// None of these JWT principals.
    pub not_request_principals: Vec<Pattern>,
    /// Namespaces of the peer.
    pub namespaces: Vec<Pattern>,
    /// None of these namespaces.
    pub not_namespaces: Vec<Pattern>,
    /// Service accounts, `name` (of the policy's namespace) or `namespace/name`.
    pub service_accounts: Vec<String>,
    /// None of these service accounts.
    pub not_service_accounts: Vec<String>,
    /// Addresses of the peer's socket.
    pub ip_blocks: Vec<IpBlock>,
    /// None of these addresses.
    pub not_ip_blocks: Vec<IpBlock>,
    /// Original client addresses of HTTP headers, which L4 cannot see.
    pub remote_ip_blocks: Vec<IpBlock>,
    /// None of these original addresses.
    pub not_remote_ip_blocks: Vec<IpBlock>,
}

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Operation {
    /// HTTP hosts, which L4 cannot see.
    pub hosts: Vec<Pattern>,
    /// None of these hosts.
    pub not_hosts: Vec<Pattern>,
    /// Ports of the destination.
    pub ports: Vec<PortNumber>,
    /// None of these ports.
    pub not_ports: Vec<PortNumber>,
    /// HTTP methods, which L4 cannot see.
    pub methods: Vec<Pattern>,
    /// None of these methods.
    pub not_methods: Vec<Pattern>,
    /// HTTP paths, which L4 cannot see.
    pub paths: Vec<PathPattern>,
    /// None of these paths.
    pub not_paths: Vec<PathPattern>,
}

impl Operation {
    /// Whether it names anything that only HTTP shows.
    pub fn needs_http(&self) -> bool {
        let Operation { hosts, not_hosts, ports: _, not_ports: _, methods, not_methods, paths, not_paths } =
            self;
        [hosts, not_hosts, methods, not_methods].iter().any(|values| !values.is_empty())
            || [paths, not_paths].iter().any(|values| !values.is_empty())
    }
}

impl Source {
    /// Whether it names anything that only HTTP shows.
    pub fn needs_http(&self) -> bool {
        !self.request_principals.is_empty()
            || !self.not_request_principals.is_empty()
            || !self.remote_ip_blocks.is_empty()
            || !self.not_remote_ip_blocks.is_empty()
    }
}

/// One rule: sources, operations and conditions must all hold; each of the three lists that is empty does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Alternatives for the peer.
    pub from: Vec<Source>,
    /// Alternatives for what is asked.
    pub to: Vec<Operation>,
    /// Conditions, all of which must hold.
    pub when: Vec<Condition>,
}

/// What a policy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PolicyBody {
    /// As written.
    Rules {
        /// What it does.
        action: Action,
        /// Its alternatives; none never matches.
        rules: Vec<Rule>,
    },
    /// It could not be read, and fails closed: a DENY denies, an ALLOW allows nothing.
    Unreadable {
        /// [`Action::Deny`] also where the action itself could not be read.
        action: Action,
        /// Why, for the policy's status.
        reason: String,
    },
}

/// The kinds of things that a policy may be bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyTargetKind {
    /// A Gateway.
    Gateway,
    /// A GatewayClass: all of its gateways.
    GatewayClass,
    /// A Service.
    Service,
    /// A ServiceEntry.
    ServiceEntry,
    /// Anything else.
    Other,
}

/// What a policy is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyTarget {
    /// What it is.
    pub kind: PolicyTargetKind,
    /// Its kind as written.
    pub kind_name: String,
    /// Its name; the namespace of a GatewayClass does not count.
    pub name: NamespacedName,
}

/// An AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Namespace and name.
    pub id: NamespacedName,
    /// Labels, age and generation.
    pub meta: Meta,
    /// The workloads that it is for; `None` is all of its namespace, or of the mesh.
    pub selector: Option<Labels>,
    /// The gateways and services that it is bound to; where there are any it is not for the node proxy.
    pub targets: Vec<PolicyTarget>,
    /// Only logged and counted (annotation `istio.io/dry-run`).
    pub dry_run: bool,
    /// Whom a CUSTOM policy asks.
    pub provider: Option<Arc<str>>,
    /// What it says.
    pub body: PolicyBody,
}

/// The manifest, strictly.
pub(crate) type Manifest = meta::Manifest<Spec>;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct Spec {
    selector: Option<Selector>,
    target_ref: Option<TargetRef>,
    target_refs: Vec<TargetRef>,
    rules: Vec<RawRule>,
    action: Action,
    provider: Option<Provider>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Selector {
    pub(super) match_labels: std::collections::BTreeMap<String, String>,
}

impl Selector {
    /// An empty selector is as none (Istio's API: it selects the whole namespace).
    pub(super) fn labels(self) -> Option<Labels> {
        Some(self.match_labels.into_iter().collect()).filter(|labels: &Labels| !labels.is_empty())
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TargetRef {
    #[serde(default)]
    group: String,
    kind: String,
    name: String,
    #[serde(default)]
    namespace: String,
}

impl TargetRef {
    pub(super) fn read(self, own_namespace: &Arc<str>) -> PolicyTarget {
        let kind = match (self.group.as_str(), self.kind.as_str()) {
            ("gateway.networking.k8s.io", "Gateway") => PolicyTargetKind::Gateway,
            ("gateway.networking.k8s.io", "GatewayClass") => PolicyTargetKind::GatewayClass,
            ("" | "core", "Service") => PolicyTargetKind::Service,
            ("networking.istio.io", "ServiceEntry") => PolicyTargetKind::ServiceEntry,
            _ => PolicyTargetKind::Other,
        };
        let namespace = match self.namespace.is_empty() {
            true => own_namespace.clone(),
            false => self.namespace.into(),
        };
        PolicyTarget { kind, kind_name: self.kind, name: NamespacedName::new(namespace, self.name) }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Provider {
    name: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRule {
    from: Vec<RawFrom>,
    to: Vec<RawTo>,
    when: Vec<Condition>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFrom {
    source: Source,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTo {
    operation: Operation,
}

impl TryFrom<Manifest> for AuthorizationPolicy {
    type Error = Invalid;

    fn try_from(manifest: Manifest) -> Result<AuthorizationPolicy, Invalid> {
        let Manifest { metadata, spec } = manifest;
        let Spec { selector, target_ref, target_refs, rules, action, provider } = spec;
        let targets: Vec<TargetRef> = target_ref.into_iter().chain(target_refs).collect();
        if !targets.is_empty() && selector.is_some() {
            return Err(Invalid::new("spec.selector", "cannot be combined with targetRefs"));
        }
        let rules =
            rules.into_iter().enumerate().map(|(i, rule)| checked(i, rule)).collect::<Result<_, _>>()?;
        let meta = Meta::read(&metadata)?;
        Ok(AuthorizationPolicy {
            id: meta.id.clone(),
            targets: targets.into_iter().map(|target| target.read(&meta.id.namespace)).collect(),
            meta,
            selector: selector.and_then(Selector::labels),
            dry_run: annotation(&metadata, "istio.io/dry-run") == Some("true"),
            provider: provider.map(|provider| provider.name.into()),
            body: PolicyBody::Rules { action, rules },
        })
    }
}

/// An alternative that says nothing would match everything; its author cannot have meant that.
fn checked(i: usize, rule: RawRule) -> Result<Rule, Invalid> {
    let from: Vec<Source> = rule.from.into_iter().map(|f| f.source).collect();
    let to: Vec<Operation> = rule.to.into_iter().map(|t| t.operation).collect();
    if let Some(j) = from.iter().position(|source| *source == Source::default()) {
        return Err(Invalid::new(format!("spec.rules[{i}].from[{j}].source"), "is empty"));
    }
    if let Some(j) = to.iter().position(|operation| *operation == Operation::default()) {
        return Err(Invalid::new(format!("spec.rules[{i}].to[{j}].operation"), "is empty"));
    }
    Ok(Rule { from, to, when: rule.when })
}

impl AuthorizationPolicy {
    /// The policy that stands for one that could not be read, from whatever of it can be.
    ///
    /// # Errors
    /// When it has no name, so that it cannot stand for anything.
    pub(crate) fn unreadable(
        object: &serde_json::Value,
        reason: String,
    ) -> Result<AuthorizationPolicy, Invalid> {
        let text = |pointer: &str| object.pointer(pointer).and_then(serde_json::Value::as_str);
        let meta = Meta::salvage(object)?;
        let selector = object.pointer("/spec/selector").cloned().map(serde_json::from_value::<Selector>);
        let action = match (object.pointer("/spec/action"), text("/spec/action")) {
            // Left out means ALLOW, which then allows nothing; anything else that is unknown denies.
            (None | Some(serde_json::Value::Null), _) | (_, Some("ALLOW")) => Action::Allow,
            (_, Some("AUDIT")) => Action::Audit,
            (_, Some("CUSTOM")) => Action::Custom,
            _ => Action::Deny,
        };
        let selects = object.pointer("/spec/selector").is_some_and(|selector| !selector.is_null());
        // Only what certainly names a waypoint is left to one; a selector beside it is enforced by node proxies.
        let targets = salvaged_targets(object).filter(|_| !selects).unwrap_or_default();
        Ok(AuthorizationPolicy {
            targets: targets.into_iter().map(|target| target.read(&meta.id.namespace)).collect(),
            id: meta.id.clone(),
            meta,
            // A selector that cannot be read selects everything: that is the closed side.
            selector: selector.and_then(Result::ok).and_then(Selector::labels),
            dry_run: text("/metadata/annotations/istio.io~1dry-run") == Some("true"),
            provider: None,
            body: PolicyBody::Unreadable { action, reason },
        })
    }

    /// Whether it is bound to gateways or services, and thus not for the node proxy.
    pub fn has_targets(&self) -> bool {
        !self.targets.is_empty()
    }

    /// Whom it asks about requests, by name.
    pub fn asks(&self) -> Option<&Arc<str>> {
        let (PolicyBody::Rules { action, .. } | PolicyBody::Unreadable { action, .. }) = &self.body;
        self.provider.as_ref().filter(|_| *action == Action::Custom && self.has_targets())
    }

    /// The workloads that list the policy by name, or `None` if it is in force by its scope or not at L4.
    pub fn listed_by(&self) -> Option<&Labels> {
        if self.has_targets() { None } else { self.selector.as_ref() }
    }
}

/// The targets of a policy that could not be read; `None` where one of them can't be read either.
pub(super) fn salvaged_targets(object: &serde_json::Value) -> Option<Vec<TargetRef>> {
    let one = object.pointer("/spec/targetRef").filter(|target| !target.is_null());
    let several = object.pointer("/spec/targetRefs").filter(|targets| !targets.is_null());
    let several =
        several.map(|targets| targets.as_array()).map_or(Some(&[][..]), |all| all.map(Vec::as_slice))?;
    one.into_iter().chain(several).map(|target| TargetRef::deserialize(target).ok()).collect()
}

/// A service account named in a policy of `namespace`: its namespace and name.
pub(crate) fn service_account(text: &str, namespace: &Arc<str>) -> (String, String) {
    match text.split_once('/') {
        Some((namespace, name)) => (namespace.to_owned(), name.to_owned()),
        None => (namespace.to_string(), text.to_owned()),
    }
}
