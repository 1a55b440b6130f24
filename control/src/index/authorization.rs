//! AuthorizationPolicies as the node proxy enforces them.
//!
//! What L4 cannot see never matches in an ALLOW and is dropped from a DENY (kubernetes.md), so that both
//! err on the side of refusing. A policy that could not be read errs the same way.

use std::sync::Arc;

use ambit_api::security::{self as api, string_match::MatchType};
use prost::Message;

use super::outputs::{Resource, ResourceType};
use super::reader::Reader;
use super::{Finding, wire};
use crate::object::{
    Action, Attribute, AuthorizationPolicy, Condition, IpBlock, Labels, NamespacedName, Operation, Pattern,
    PolicyBody, PortNumber, Rule, Source,
};

/// The policy's selector, if it has one and is enforced by node proxies.
pub(super) fn selector_at_l4(policy: &AuthorizationPolicy) -> Option<&Labels> {
    l4_action(policy)?;
    policy.listed_by()
}

fn l4_action(policy: &AuthorizationPolicy) -> Option<api::Action> {
    let (PolicyBody::Rules { action, .. } | PolicyBody::Unreadable { action, .. }) = &policy.body;
    match action {
        _ if policy.has_targets => None,
        Action::Allow => Some(api::Action::Allow),
        Action::Deny => Some(api::Action::Deny),
        Action::Audit | Action::Custom => None,
    }
}

/// The resource of a policy, if node proxies enforce it.
pub(super) fn of_policy(reader: &Reader<'_>, id: &NamespacedName) -> Vec<(ResourceType, Resource)> {
    let Some(policy) = reader.store.policies.get(id) else { return Vec::new() };
    let Some(action) = l4_action(policy) else {
        if !policy.has_targets {
            let message = "AUDIT and CUSTOM need a waypoint (targetRefs); node proxies do not enforce them";
            reader.find(accepted(false, "UnsupportedAction", message.to_owned()));
        }
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
pub(super) fn policy_resource(message: &api::Authorization) -> (ResourceType, Resource) {
    let name = format!("{}/{}", message.namespace, message.name).into();
    let body = message.encode_to_vec().into();
    let resource = Resource { name, aliases: Vec::new(), parents: Vec::new(), body, unhealthy: false };
    (ResourceType::Authorization, resource)
}

/// A rule that matches every connection.
fn everything() -> api::Rule {
    // contracts.md, section 4: an empty clause matches.
    api::Rule { clauses: vec![api::Clause::default()] }
}

fn translated(
    reader: &Reader<'_>,
    namespace: &Arc<str>,
    action: api::Action,
    rules: &[Rule],
) -> Vec<api::Rule> {
    let mut unseen = false;
    let translated =
        rules.iter().filter_map(|rule| translate(namespace, action, rule, &mut unseen)).collect();
    reader.find(if unseen {
        let effect = match action {
            api::Action::Allow => "such alternatives never match",
            api::Action::Deny => "such fields are left out, so more is denied",
        };
        accepted(false, "UnsupportedValue", format!("node proxies see no HTTP attributes or JWTs: {effect}"))
    } else {
        accepted(true, "Accepted", "enforced by node proxies".to_owned())
    });
    translated
}

/// A rule's clauses, or `None` if it can never match. `unseen` is set when it names what L4 cannot see.
fn translate(namespace: &Arc<str>, action: api::Action, rule: &Rule, unseen: &mut bool) -> Option<api::Rule> {
    let operations = alternatives(action, &rule.to, Operation::needs_http, operation, unseen);
    let sources = alternatives(action, &rule.from, Source::needs_http, |s| source(namespace, s), unseen);
    let mut clauses = Vec::new();
    for clause in [sources, operations] {
        match clause {
            Alternatives::Never => return None,
            Alternatives::Always => {}
            Alternatives::Of(matches) => clauses.push(api::Clause { matches }),
        }
    }
    for Condition(attribute) in &rule.when {
        if let Attribute::Http(_) = attribute {
            *unseen = true;
            match action {
                api::Action::Allow => return None,
                api::Action::Deny => continue,
            }
        }
        clauses.push(api::Clause { matches: vec![condition(namespace, attribute)] });
    }
    if clauses.is_empty() { Some(everything()) } else { Some(api::Rule { clauses }) }
}

enum Alternatives {
    /// None of them can match.
    Never,
    /// There are none, or one is met by everything.
    Always,
    Of(Vec<api::Match>),
}

fn alternatives<T>(
    action: api::Action,
    list: &[T],
    needs_http: impl Fn(&T) -> bool,
    translate: impl Fn(&T) -> api::Match,
    unseen: &mut bool,
) -> Alternatives {
    if list.is_empty() {
        return Alternatives::Always;
    }
    let mut matches = Vec::new();
    for alternative in list {
        let needs_http = needs_http(alternative);
        *unseen |= needs_http;
        if needs_http && action == api::Action::Allow {
            continue;
        }
        let translated = translate(alternative);
        // An empty match never matches on the wire; here it is what is left of one that named more.
        if translated == api::Match::default() {
            return Alternatives::Always;
        }
        matches.push(translated);
    }
    if matches.is_empty() { Alternatives::Never } else { Alternatives::Of(matches) }
}

fn operation(operation: &Operation) -> api::Match {
    api::Match {
        destination_ports: ports(&operation.ports),
        not_destination_ports: ports(&operation.not_ports),
        ..api::Match::default()
    }
}

fn source(namespace: &Arc<str>, source: &Source) -> api::Match {
    api::Match {
        namespaces: patterns(&source.namespaces),
        not_namespaces: patterns(&source.not_namespaces),
        principals: principals(&source.principals),
        not_principals: principals(&source.not_principals),
        source_ips: addresses(&source.ip_blocks),
        not_source_ips: addresses(&source.not_ip_blocks),
        service_accounts: service_accounts(namespace, &source.service_accounts),
        not_service_accounts: service_accounts(namespace, &source.not_service_accounts),
        ..api::Match::default()
    }
}

fn condition(namespace: &Arc<str>, attribute: &Attribute) -> api::Match {
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
        Attribute::DestinationPort { values, not_values } => {
            api::Match { destination_ports: ports(values), not_destination_ports: ports(not_values), ..empty }
        }
        Attribute::SourceNamespace { values, not_values } => {
            api::Match { namespaces: patterns(values), not_namespaces: patterns(not_values), ..empty }
        }
        Attribute::SourcePrincipal { values, not_values } => {
            api::Match { principals: principals(values), not_principals: principals(not_values), ..empty }
        }
        Attribute::SourceServiceAccount { values, not_values } => api::Match {
            service_accounts: service_accounts(namespace, values),
            not_service_accounts: service_accounts(namespace, not_values),
            ..empty
        },
        Attribute::Http(_) => empty,
    }
}

fn ports(ports: &[PortNumber]) -> Vec<u32> {
    ports.iter().map(|port| port.0.into()).collect()
}

fn addresses(blocks: &[IpBlock]) -> Vec<api::Address> {
    let address = |block: &IpBlock| api::Address {
        address: wire::octets(block.0.network()),
        length: block.0.prefix_len().into(),
    };
    blocks.iter().map(address).collect()
}

fn patterns(patterns: &[Pattern]) -> Vec<api::StringMatch> {
    patterns.iter().map(string_match).collect()
}

/// Principals compare without their scheme (contracts.md, section 4), so one that was written is cut.
fn principals(patterns: &[Pattern]) -> Vec<api::StringMatch> {
    let bare = |text: &String| text.strip_prefix("spiffe://").unwrap_or(text).to_owned();
    let principal = |pattern: &Pattern| match pattern {
        Pattern::Exact(text) => string_match(&Pattern::Exact(bare(text))),
        Pattern::Prefix(text) => string_match(&Pattern::Prefix(bare(text))),
        other => string_match(other),
    };
    patterns.iter().map(principal).collect()
}

fn string_match(pattern: &Pattern) -> api::StringMatch {
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
    Finding { condition: "ZtunnelAccepted", met, reason, message }
}
