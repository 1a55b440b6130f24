//! AuthorizationPolicies as the node proxy enforces them.
//!
//! What L4 cannot see never matches in an ALLOW and is dropped from a DENY; a DENY rule with nothing left has no effect
//! at L4, unless the mesh is set to deny then (xDS contract). A policy that could not be read fails closed.

use std::sync::Arc;

use ambit_api::security::{self as api, string_match::MatchType};
use prost::Message;

use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, L7DenyAtL4, Settings, l7, wire};
use crate::object::{
    Action, Attribute, AuthorizationPolicy, Condition, IpBlock, Labels, NamespacedName, Operation, Pattern,
    PolicyBody, PortNumber, Rule, Source, TrustDomainPattern,
};

/// The policy's selector, if it has one and is enforced by node proxies.
pub(in crate::index) fn selector_at_l4(policy: &AuthorizationPolicy) -> Option<&Labels> {
    l4_action(policy)?;
    policy.listed_by()
}

fn l4_action(policy: &AuthorizationPolicy) -> Option<api::Action> {
    let (PolicyBody::Rules { action, .. } | PolicyBody::Unreadable { action, .. }) = &policy.body;
    match action {
        _ if policy.has_targets() => None,
        Action::Allow => Some(api::Action::Allow),
        Action::Deny => Some(api::Action::Deny),
        Action::Audit | Action::Custom => None,
    }
}

/// The resource of a policy, if node proxies enforce it.
pub(in crate::index) fn of_policy(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(policy) = reader.store.policies.get(id) else { return Vec::new() };
    let Some(action) = l4_action(policy) else {
        if policy.has_targets() {
            return l7::policies::of_policy(reader, policy);
        }
        let message = "AUDIT and CUSTOM need a waypoint (targetRefs); node proxies do not enforce them";
        reader.find(accepted(false, "UnsupportedAction", message.to_owned()));
        return Vec::new();
    };
    let scope = match (&policy.selector, id.namespace == reader.settings.root_namespace) {
        (Some(_), _) => api::Scope::WorkloadSelector,
        (None, true) => api::Scope::Global,
        (None, false) => api::Scope::Namespace,
    };
    let rules = match (&policy.body, action) {
        (PolicyBody::Rules { rules, .. }, _) => translated(reader, &id.namespace, action, rules),
        (PolicyBody::Unreadable { reason, .. }, action) => {
            reader.find(accepted(false, "Unreadable", reason.clone()));
            match action {
                api::Action::Deny => vec![everything()],
                api::Action::Allow => Vec::new(),
            }
        }
    };
    let message = api::Authorization {
        name: id.name.to_string(),
        namespace: id.namespace.to_string(),
        scope: scope as i32,
        action: action as i32,
        rules,
        dry_run: policy.dry_run,
        extensions: Vec::new(),
    };
    vec![policy_resource(&message)]
}

/// The resource of a policy: named `<namespace>/<name>`.
pub(in crate::index) fn policy_resource(message: &api::Authorization) -> (ResourceType, Resource) {
    let name = format!("{}/{}", message.namespace, message.name).into();
    let body = message.encode_to_vec().into();
    let resource = Resource { name, aliases: Vec::new(), parents: Vec::new(), body, unhealthy: false };
    (ResourceType::Authorization, resource)
}

/// A rule that matches every connection.
pub(in crate::index) fn everything() -> api::Rule {
    // xDS contract: an empty clause matches.
    api::Rule { clauses: vec![api::Clause::default()] }
}

fn translated(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    action: api::Action,
    rules: &[Rule],
) -> Vec<api::Rule> {
    let translator = Translator { namespace, action, settings: reader.settings };
    let mut unseen = Unseen::default();
    let translated = rules.iter().flat_map(|rule| translator.rule(rule, &mut unseen)).collect();
    let http = "node proxies see no HTTP attributes or JWTs";
    reader.find(match (action, unseen) {
        (_, Unseen { named: false, .. }) => accepted(true, "Accepted", "enforced by node proxies".to_owned()),
        (api::Action::Allow, _) => {
            accepted(false, "UnsupportedValue", format!("{http}: alternatives with such never match"))
        }
        (api::Action::Deny, Unseen { no_effect: false, .. }) => accepted(
            false,
            "UnsupportedValue",
            format!("{http}: such fields are left out, so more is denied"),
        ),
        (api::Action::Deny, _) if reader.settings.l7_deny_at_l4 == L7DenyAtL4::Deny => accepted(
            false,
            "UnsupportedValue",
            format!("{http}: a rule with nothing else denies every connection (l7DenyAtL4: deny)"),
        ),
        (api::Action::Deny, _) => accepted(
            false,
            NO_EFFECT_AT_L4,
            format!("{http}: a rule, or an alternative of one, with nothing else has no effect at L4"),
        ),
    });
    translated
}

/// Reason of the finding about a DENY rule without effect.
pub(crate) const NO_EFFECT_AT_L4: &str = "NoEffectAtL4";

/// What a policy names that L4 cannot see.
#[derive(Clone, Copy, Default)]
struct Unseen {
    /// Anything at all.
    named: bool,
    /// In a rule, or a combination of alternatives, of a DENY with nothing beside it.
    no_effect: bool,
}

/// Alternatives of a rule as far as L4 sees them.
#[derive(Default)]
struct Seen<T> {
    /// Those with something to match.
    some: Vec<T>,
    /// Whether there is one that everything meets: none was asked for, or what it asked for cannot be seen.
    anything: bool,
}

impl<T> Seen<T> {
    fn never(&self) -> bool {
        self.some.is_empty() && !self.anything
    }
}

/// A source on the wire: a match, and principals of which one must match too where both are asked for.
pub(in crate::index) struct SourceMatch {
    pub(in crate::index) fields: api::Match,
    pub(in crate::index) trust_domains: Vec<api::StringMatch>,
}

pub(in crate::index) struct Translator<'a> {
    pub(in crate::index) namespace: &'a Arc<str>,
    pub(in crate::index) action: api::Action,
    pub(in crate::index) settings: &'a Settings,
}

impl Translator<'_> {
    /// The rules on the wire that come to the same; none if it can never match.
    fn rule(&self, rule: &Rule, unseen: &mut Unseen) -> Vec<api::Rule> {
        let sources = self.seen(&rule.from, Source::needs_http, |source| self.source(source), unseen);
        let operations = self.seen(&rule.to, Operation::needs_http, operation, unseen);
        let mut conditions = Vec::new();
        for Condition(attribute) in &rule.when {
            if let Attribute::Http(_) = attribute {
                unseen.named = true;
                if self.action == api::Action::Allow {
                    return Vec::new();
                }
            } else {
                conditions.push(api::Clause { matches: vec![self.condition(attribute)] });
            }
        }
        if sources.never() || operations.never() {
            return Vec::new();
        }
        let asks_nothing = rule.from.is_empty() && rule.to.is_empty() && rule.when.is_empty();
        let is_left = !conditions.is_empty() || asks_nothing || self.action == api::Action::Allow;
        self.combine(sources, operations, &conditions, is_left, unseen)
    }

    /// Sources, operations and conditions together. `is_left`: also what asks for neither source nor operation is enforced.
    fn combine(
        &self,
        sources: Seen<SourceMatch>,
        operations: Seen<api::Match>,
        conditions: &[api::Clause],
        is_left: bool,
        unseen: &mut Unseen,
    ) -> Vec<api::Rule> {
        let of = |clauses: Vec<api::Clause>| api::Rule {
            clauses: clauses.into_iter().chain(conditions.iter().cloned()).collect(),
        };
        let ports = (!operations.some.is_empty()).then(|| api::Clause { matches: operations.some });
        if sources.anything && operations.anything {
            if is_left || self.settings.l7_deny_at_l4 == L7DenyAtL4::Deny {
                unseen.no_effect |= !is_left;
                let rule = of(Vec::new());
                return vec![if rule.clauses.is_empty() { everything() } else { rule }];
            }
            unseen.no_effect = true;
            let by_source = by_source(sources.some).into_iter().map(of);
            return by_source.chain(ports.map(|ports| api::Rule { clauses: vec![ports] })).collect();
        }
        if sources.anything {
            return ports.into_iter().map(|ports| of(vec![ports])).collect();
        }
        let ports = ports.filter(|_| !operations.anything);
        by_source(sources.some)
            .into_iter()
            .map(|clauses| of(clauses.into_iter().chain(ports.clone()).collect()))
            .collect()
    }

    fn seen<T, M>(
        &self,
        list: &[T],
        needs_http: impl Fn(&T) -> bool,
        translate: impl Fn(&T) -> Option<M>,
        unseen: &mut Unseen,
    ) -> Seen<M> {
        let mut seen = Seen { some: Vec::new(), anything: list.is_empty() };
        for alternative in list {
            if needs_http(alternative) {
                unseen.named = true;
                if self.action == api::Action::Allow {
                    continue;
                }
            }
            // An empty match never matches on the wire; here it is what is left of one that named more.
            match translate(alternative) {
                Some(translated) => seen.some.push(translated),
                None => seen.anything = true,
            }
        }
        seen
    }

    /// `None` when there is nothing in it to match.
    fn source(&self, source: &Source) -> Option<SourceMatch> {
        let translated = self.source_fields(source);
        (translated.fields != api::Match::default()).then_some(translated)
    }

    /// What L4 sees of a source.
    pub(in crate::index) fn source_fields(&self, source: &Source) -> SourceMatch {
        let (principals, trust_domains) =
            match (self.principals(&source.principals), self.trust_domains(&source.trust_domains)) {
                (principals, trust_domains) if principals.is_empty() => (trust_domains, Vec::new()),
                both => both,
            };
        let mut not_principals = self.principals(&source.not_principals);
        not_principals.extend(self.trust_domains(&source.not_trust_domains));
        let fields = api::Match {
            namespaces: patterns(&source.namespaces),
            not_namespaces: patterns(&source.not_namespaces),
            principals,
            not_principals,
            source_ips: addresses(&source.ip_blocks),
            not_source_ips: addresses(&source.not_ip_blocks),
            service_accounts: service_accounts(self.namespace, &source.service_accounts),
            not_service_accounts: service_accounts(self.namespace, &source.not_service_accounts),
            ..api::Match::default()
        };
        SourceMatch { fields, trust_domains }
    }

    /// What L4 sees of a condition.
    pub(in crate::index) fn condition(&self, attribute: &Attribute) -> api::Match {
        let empty = api::Match::default();
        match attribute {
            Attribute::SourceIp { values, not_values } => {
                api::Match { source_ips: addresses(values), not_source_ips: addresses(not_values), ..empty }
            }
            Attribute::DestinationIp { values, not_values } => api::Match {
                destination_ips: addresses(values),
                not_destination_ips: addresses(not_values),
                ..empty
            },
            Attribute::DestinationPort { values, not_values } => api::Match {
                destination_ports: ports(values),
                not_destination_ports: ports(not_values),
                ..empty
            },
            Attribute::SourceNamespace { values, not_values } => {
                api::Match { namespaces: patterns(values), not_namespaces: patterns(not_values), ..empty }
            }
            Attribute::SourcePrincipal { values, not_values } => api::Match {
                principals: self.principals(values),
                not_principals: self.principals(not_values),
                ..empty
            },
            Attribute::SourceServiceAccount { values, not_values } => api::Match {
                service_accounts: service_accounts(self.namespace, values),
                not_service_accounts: service_accounts(self.namespace, not_values),
                ..empty
            },
            Attribute::Http(_) => empty,
        }
    }

    fn principals(&self, patterns: &[Pattern]) -> Vec<api::StringMatch> {
        let principal = |pattern: &Pattern| match pattern {
            Pattern::Exact(text) => string_match(&Pattern::Exact(self.principal(text))),
            Pattern::Prefix(text) => string_match(&Pattern::Prefix(self.principal(text))),
            other => string_match(other),
        };
        patterns.iter().map(principal).collect()
    }

    /// xDS contract: principals compare without their scheme, and `cluster.local/…` stands for the mesh's own
    /// trust domain, whatever its name.
    fn principal(&self, text: &str) -> String {
        let bare = text.strip_prefix("spiffe://").unwrap_or(text);
        match bare.strip_prefix(OWN_TRUST_DOMAIN).and_then(|rest| rest.strip_prefix('/')) {
            Some(rest) => format!("{}/{rest}", self.settings.trust_domain),
            None => bare.to_owned(),
        }
    }

    /// xDS contract: at L4 a trust domain is the beginning of a principal.
    fn trust_domains(&self, patterns: &[TrustDomainPattern]) -> Vec<api::StringMatch> {
        let trust_domain = |pattern: &TrustDomainPattern| match pattern {
            TrustDomainPattern::Exact(text) => Pattern::Prefix(self.principal(&format!("{text}/"))),
            TrustDomainPattern::Prefix(text) => Pattern::Prefix(text.clone()),
            TrustDomainPattern::Presence => Pattern::Presence,
        };
        patterns.iter().map(|pattern| string_match(&trust_domain(pattern))).collect()
    }
}

/// The trust domain that stands for the mesh's own.
const OWN_TRUST_DOMAIN: &str = "cluster.local";

/// The clauses of each rule that sources come to: the fields of a match are AND'ed but hold one list of principals, so a
/// source that asks for principals and trust domains needs a clause more, and hence a rule of its own.
pub(in crate::index) fn by_source(sources: Vec<SourceMatch>) -> Vec<Vec<api::Clause>> {
    let (mut together, mut rules) = (Vec::new(), Vec::new());
    for SourceMatch { fields, trust_domains } in sources {
        if trust_domains.is_empty() {
            together.push(fields);
            continue;
        }
        let of_trust_domains = api::Match { principals: trust_domains, ..api::Match::default() };
        rules.push([fields, of_trust_domains].map(|one| api::Clause { matches: vec![one] }).to_vec());
    }
    if !together.is_empty() {
        rules.insert(0, vec![api::Clause { matches: together }]);
    }
    rules
}

/// `None` when there is nothing in it to match.
fn operation(operation: &Operation) -> Option<api::Match> {
    let fields = operation_fields(operation);
    (fields != api::Match::default()).then_some(fields)
}

/// What L4 sees of an operation.
pub(in crate::index) fn operation_fields(operation: &Operation) -> api::Match {
    api::Match {
        destination_ports: ports(&operation.ports),
        not_destination_ports: ports(&operation.not_ports),
        ..api::Match::default()
    }
}

fn ports(ports: &[PortNumber]) -> Vec<u32> {
    ports.iter().map(|port| port.0.into()).collect()
}

pub(in crate::index) fn addresses(blocks: &[IpBlock]) -> Vec<api::Address> {
    let address = |block: &IpBlock| api::Address {
        address: wire::octets(block.0.network()),
        length: block.0.prefix_len().into(),
    };
    blocks.iter().map(address).collect()
}

pub(in crate::index) fn patterns(patterns: &[Pattern]) -> Vec<api::StringMatch> {
    patterns.iter().map(string_match).collect()
}

pub(in crate::index) fn string_match(pattern: &Pattern) -> api::StringMatch {
    let match_type = match pattern.clone() {
        Pattern::Exact(text) => MatchType::Exact(text),
        Pattern::Prefix(text) => MatchType::Prefix(text),
        Pattern::Suffix(text) => MatchType::Suffix(text),
        Pattern::Presence => MatchType::Presence(()),
    };
    api::StringMatch { match_type: Some(match_type) }
}

fn service_accounts(namespace: &Arc<str>, names: &[String]) -> Vec<api::ServiceAccountMatch> {
    let account = |name: &String| {
        let (namespace, service_account) = crate::object::service_account(name, namespace);
        api::ServiceAccountMatch { namespace, service_account }
    };
    names.iter().map(account).collect()
}

fn accepted(met: bool, reason: &'static str, message: String) -> Finding {
    Finding::new("ZtunnelAccepted", met, reason, message)
}
