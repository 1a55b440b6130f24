//! What is decided, about what, and by which policy.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::compile::{Action, Policy};
use crate::http::{Content, HttpRequest};
use crate::name::PolicyName;

/// The authenticated peer of a connection: the parts of its SPIFFE id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer<'a> {
    /// The SPIFFE id without `spiffe://`: `<trust domain>/ns/<namespace>/sa/<service account>`.
    pub principal: &'a str,
    /// The peer's namespace.
    pub namespace: &'a str,
    /// The peer's service account.
    pub service_account: &'a str,
}

/// A connection that asks to be let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// Who is at the other end, if it proved an identity.
    pub peer: Option<Peer<'a>>,
    /// The address that the client connected from.
    pub source_ip: IpAddr,
    /// The workload's address that is connected to.
    pub destination_ip: IpAddr,
    /// The workload's port that is connected to.
    pub destination_port: u16,
}

/// Whether a connection is let in, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Decision {
    /// No ALLOW policy applies to the workload, and no DENY matched.
    AllowedByDefault,
    /// This ALLOW policy matched, and no DENY did.
    AllowedBy(PolicyName),
    /// This DENY policy matched.
    DeniedBy(PolicyName),
    /// ALLOW policies apply to the workload and none matched.
    DeniedByDefault,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeniedBy(policy) => write!(f, "denied by policy {policy}"),
            Self::DeniedByDefault => f.write_str("denied: policies that allow apply, and none matches"),
            Self::AllowedBy(policy) => write!(f, "allowed by policy {policy}"),
            Self::AllowedByDefault => f.write_str("allowed: no policy applies"),
        }
    }
}

impl Decision {
    /// Whether the connection is let in.
    pub fn allowed(&self) -> bool {
        matches!(self, Self::AllowedByDefault | Self::AllowedBy(_))
    }

    /// The policy that decided, if a single one did.
    pub fn by(&self) -> Option<&PolicyName> {
        match self {
            Self::AllowedBy(name) | Self::DeniedBy(name) => Some(name),
            Self::AllowedByDefault | Self::DeniedByDefault => None,
        }
    }
}

/// The answer of a policy set for one connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    /// What is enforced.
    pub decision: Decision,
    /// What would be enforced if the policies marked `dry_run` were in force too; `None` when none of those applies to the workload.
    /// To be logged and counted, never enforced.
    pub dry_run: Option<Decision>,
}

impl Verdict {
    /// Whether the connection is let in.
    pub fn allowed(&self) -> bool {
        self.decision.allowed()
    }

    /// The policy that decided, if a single one did.
    pub fn by(&self) -> Option<&PolicyName> {
        self.decision.by()
    }

    /// Whether enforcing the dry-run policies would have changed whether the connection is let in.
    pub fn dry_run_differs(&self) -> bool {
        self.dry_run.as_ref().is_some_and(|dry_run| dry_run.allowed() != self.decision.allowed())
    }
}

/// Decides `request` by walking over `policies`, all of which apply. For a handful of policies; [`crate::PolicySet`] is for all others.
///
/// xDS contract: a DENY that matches denies; else, no ALLOW policy at all allows; else one ALLOW that matches allows; else deny.
pub fn evaluate<'p>(policies: impl Iterator<Item = &'p Policy> + Clone, request: &Request<'_>) -> Verdict {
    evaluate_http(policies, request, Content::Unread)
}

/// The same for policies of [`Policy::compile_http`], with what is known of what is sent. Where requests are not read, what a policy demands
/// of them counts as met by a DENY and as not met by an ALLOW.
pub fn evaluate_http<'p>(
    policies: impl Iterator<Item = &'p Policy> + Clone,
    request: &Request<'_>,
    content: Content<'_>,
) -> Verdict {
    let has_dry_run = policies.clone().any(Policy::dry_run);
    let enforced = policies.clone().filter(|policy| !policy.dry_run());
    Verdict {
        decision: decide(enforced, request, content),
        dry_run: has_dry_run.then(|| decide(policies, request, content)),
    }
}

/// Why a request is denied whatever an external authorizer says and changes, so that none has to be asked; `None` where it may be
/// allowed. What depends on headers or on the token is left open: authorizers write headers, and send clients to where they get a token.
pub fn denied_whatever_is_changed<'p>(
    policies: impl Iterator<Item = &'p Policy>,
    request: &Request<'_>,
    http: &HttpRequest<'_>,
) -> Option<Decision> {
    let mut default = None;
    let mut may_be_allowed = false;
    for policy in policies.filter(|policy| !policy.dry_run()) {
        let matches = policy.settled_match(request, http);
        match policy.action() {
            Action::Deny if matches == Some(true) => return Some(Decision::DeniedBy(policy.name().clone())),
            Action::Deny => {}
            Action::Allow => {
                default = Some(Decision::DeniedByDefault);
                may_be_allowed |= matches != Some(false);
            }
        }
    }
    default.filter(|_| !may_be_allowed)
}

/// Decides by every policy given.
fn decide<'p>(
    policies: impl Iterator<Item = &'p Policy>,
    request: &Request<'_>,
    content: Content<'_>,
) -> Decision {
    let mut decision = Decision::AllowedByDefault;
    for policy in policies {
        match policy.action() {
            Action::Deny if policy.matches_http(request, content) => {
                return Decision::DeniedBy(policy.name().clone());
            }
            Action::Deny => {}
            Action::Allow if matches!(decision, Decision::AllowedBy(_)) => {}
            Action::Allow if policy.matches_http(request, content) => {
                decision = Decision::AllowedBy(policy.name().clone());
            }
            Action::Allow => decision = Decision::DeniedByDefault,
        }
    }
    decision
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use ambit_api::l7::attribute_match::Attribute;
    use ambit_api::l7::{self, RequestAttribute};
    use ambit_api::security::string_match::MatchType;
    use ambit_api::{HTTP_MATCH_TYPE_URL, security};
    use http::HeaderMap;
    use prost::Message;

    use super::*;

    /// A rule that is met where the attribute has this value.
    fn rule(attribute: Attribute, value: &str) -> security::Rule {
        let values = vec![security::StringMatch { match_type: Some(MatchType::Exact(value.to_owned())) }];
        let wanted = l7::AttributeMatch { attribute: Some(attribute), values, not_values: Vec::new() };
        let http = l7::HttpMatch { attributes: vec![wanted], ..l7::HttpMatch::default() };
        let config =
            prost_types::Any { type_url: HTTP_MATCH_TYPE_URL.to_owned(), value: http.encode_to_vec() };
        let extensions = vec![security::Extension { name: "http".to_owned(), config: Some(config) }];
        let matches = vec![security::Match { extensions, ..security::Match::default() }];
        security::Rule { clauses: vec![security::Clause { matches }] }
    }

    fn policy(action: security::Action, rules: Vec<security::Rule>, dry_run: bool) -> Policy {
        Policy::compile_http(&security::Authorization {
            name: "p".to_owned(),
            namespace: "shop".to_owned(),
            action: action.into(),
            rules,
            dry_run,
            ..security::Authorization::default()
        })
        .unwrap()
    }

    #[test]
    fn what_is_passed_on_is_judged_by_the_name_that_its_tls_asks_for() {
        use security::Action::{Allow, Deny};
        let named = |value| rule(Attribute::Named(RequestAttribute::ServerName.into()), value);
        let method = |value| rule(Attribute::Named(RequestAttribute::Method.into()), value);
        let both = || security::Rule {
            clauses: [named("a"), method("GET")].into_iter().flat_map(|it| it.clauses).collect(),
        };
        let request = Request {
            peer: None,
            source_ip: [10, 0, 0, 1].into(),
            destination_ip: [10, 0, 0, 2].into(),
            destination_port: 443,
        };
        let (a, b, none) = (Content::Passed(Some("a")), Content::Passed(Some("b")), Content::Passed(None));
        for (action, of, content, allowed) in [
            (Allow, named("a"), a, true),
            (Allow, named("a"), b, false),
            (Allow, named("a"), none, false),
            (Allow, named("a"), Content::Unread, false),
            (Allow, both(), a, false),
            (Deny, named("a"), a, false),
            (Deny, named("a"), b, true),
            (Deny, named("a"), none, true),
            // It may ask for that name.
            (Deny, named("a"), Content::Unread, false),
            (Deny, both(), a, false),
            (Deny, both(), b, true),
        ] {
            let policy = policy(action, vec![of], false);
            assert!(policy.needs_server_name());
            let verdict = evaluate_http(std::iter::once(&policy), &request, content);
            assert_eq!(verdict.allowed(), allowed, "{action:?} {content:?}");
        }
        assert!(!policy(Deny, vec![method("GET")], false).needs_server_name());
    }

    #[test]
    fn authorizers_are_not_asked_about_what_is_denied_whatever_they_say() {
        use security::Action::{Allow, Deny};
        let method = |value| rule(Attribute::Named(RequestAttribute::Method.into()), value);
        let header = |value| rule(Attribute::Header("x-role".to_owned()), value);
        let principal = |value| rule(Attribute::Named(RequestAttribute::RequestPrincipal.into()), value);
        let named = PolicyName::new("shop", "p");
        let (by_name, by_default) = (Some(Decision::DeniedBy(named)), Some(Decision::DeniedByDefault));
        for (policies, expected) in [
            (vec![], None),
            (vec![policy(Deny, vec![method("GET")], false)], by_name.clone()),
            (vec![policy(Deny, vec![method("GET")], true)], None),
            (vec![policy(Deny, vec![method("POST")], false)], None),
            (vec![policy(Deny, vec![header("user")], false)], None),
            (vec![policy(Deny, vec![principal("i/s")], false)], None),
            (vec![policy(Deny, vec![header("user"), method("GET")], false)], by_name.clone()),
            (vec![policy(Allow, vec![method("GET")], false)], None),
            (vec![policy(Allow, vec![method("POST")], false)], by_default.clone()),
            (vec![policy(Allow, vec![], false)], by_default),
            (vec![policy(Allow, vec![method("POST"), header("admin")], false)], None),
            (vec![policy(Allow, vec![method("POST"), principal("i/s")], false)], None),
            (vec![policy(Allow, vec![], false), policy(Allow, vec![method("GET")], false)], None),
            (
                vec![policy(Allow, vec![method("GET")], false), policy(Deny, vec![method("GET")], false)],
                by_name,
            ),
        ] {
            let headers = HeaderMap::from_iter([(
                http::HeaderName::from_static("x-role"),
                http::HeaderValue::from_static("user"),
            )]);
            let http = HttpRequest {
                authority: "a",
                host: "a",
                method: "GET",
                path: "/",
                headers: &headers,
                remote_ip: None,
                server_name: None,
                token: None,
            };
            let request = Request {
                peer: None,
                source_ip: [10, 0, 0, 1].into(),
                destination_ip: [10, 0, 0, 2].into(),
                destination_port: 80,
            };
            let shown = format!("{policies:?}");
            assert_eq!(denied_whatever_is_changed(policies.iter(), &request, &http), expected, "{shown}");
        }
    }
}
