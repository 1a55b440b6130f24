//! The policies of what is bound here: by service, and for all that is reached through the waypoint.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ambit_api::{l7, security};
use ambit_directory::{AppProtocol, NamespacedHost};
use ambit_identity::SpiffeId;
use ambit_policy::{
    Content, Decision, HttpRequest, Peer, Policy, Request, Verdict, denied_whatever_is_changed, evaluate_http,
};
use ambit_token::{Rule, Rules};
use ambit_traffic::TrafficPolicy;

use crate::accept::Destination;
use crate::external::Authorizer;
use crate::traffic::TrafficPolicies;

/// Policies by what they are for, compiled. Immutable; built anew when one changes.
#[derive(Debug, Default)]
pub struct Policies {
    /// For everything that is reached through this waypoint.
    everywhere: Group,
    services: HashMap<NamespacedHost, Group>,
    traffic: TrafficPolicies,
    /// By the name of its resource, what each was compiled from.
    compiled: BTreeMap<String, (l7::Policy, Compiled)>,
}

/// Policies for the same.
#[derive(Debug, Default)]
struct Group {
    policies: Vec<Arc<Policy>>,
    tokens: Vec<Rules>,
    /// Policies that match what authorizers are asked about, and whom.
    custom: Vec<(Arc<Policy>, Arc<Authorizer>)>,
    /// Policies that only report what they match. Each is a DENY that nothing is denied by.
    audits: Vec<Arc<Policy>>,
}

impl Group {
    fn add(&mut self, compiled: &Compiled) {
        match compiled {
            Compiled::Policy(policy) => self.policies.push(policy.clone()),
            Compiled::Tokens(rules) => self.tokens.push(rules.clone()),
            Compiled::Custom(policy, authorizer) => self.custom.push((policy.clone(), authorizer.clone())),
            Compiled::Audit(policy) => self.audits.push(policy.clone()),
            // They have a place of their own.
            Compiled::Traffic(_) => {}
        }
    }
}

/// A policy in the form in which it is enforced. Cheap to clone.
#[derive(Debug, Clone)]
enum Compiled {
    Policy(Arc<Policy>),
    Tokens(Rules),
    Custom(Arc<Policy>, Arc<Authorizer>),
    Traffic(Arc<TrafficPolicy>),
    Audit(Arc<Policy>),
}

impl Compiled {
    /// `before` is what the policy was before it changed.
    fn new(name: &str, source: &l7::Policy, before: Option<&Self>) -> Self {
        if let Some(audit) = &source.audit {
            return Self::Audit(Arc::new(read(name, audit)));
        }
        if let Some(traffic) = &source.traffic {
            let before = match before {
                Some(Self::Traffic(before)) => Some(&**before),
                _ => None,
            };
            return Self::Traffic(Arc::new(TrafficPolicy::compile(
                object_name(name, source),
                traffic,
                before,
            )));
        }
        match (&source.authentication, &source.external) {
            (Some(authentication), _) => Self::Tokens(Rules::new(authentication)),
            (None, Some(authorizer)) => {
                Self::Custom(Arc::new(compile(name, source)), Arc::new(Authorizer::new(authorizer)))
            }
            (None, None) => Self::Policy(Arc::new(compile(name, source))),
        }
    }
}

impl Policies {
    /// The policies for what is reached through the gateways whose names `is_own` knows. What is as it was in `before` is not
    /// compiled again.
    pub fn new(all: &BTreeMap<String, l7::Policy>, before: &Self, is_own: impl Fn(&str) -> bool) -> Self {
        let mut policies = Self::default();
        for (name, source) in all {
            let known = before.compiled.get(name);
            let (source, compiled) = match known {
                Some((same, compiled)) if same == source => (same.clone(), compiled.clone()),
                other => {
                    let before = other.map(|(_, compiled)| compiled);
                    (source.clone(), Compiled::new(name, source, before))
                }
            };
            if let (Compiled::Traffic(policy), Some(traffic)) = (&compiled, &source.traffic) {
                policies.traffic.add(&source, traffic, policy, &is_own);
                policies.compiled.insert(name.clone(), (source, compiled));
                continue;
            }
            if source.gateways.iter().any(|gateway| is_own(gateway)) {
                policies.everywhere.add(&compiled);
            }
            for target in &source.targets {
                let hostname = target.hostname.to_ascii_lowercase().into();
                let service = NamespacedHost { namespace: target.namespace.as_str().into(), hostname };
                policies.services.entry(service).or_default().add(&compiled);
            }
            policies.compiled.insert(name.clone(), (source, compiled));
        }
        policies
    }

    fn groups(&self, destination: &Destination) -> impl Iterator<Item = &Group> + Clone {
        let of_service = destination.service().and_then(|service| self.services.get(&service.host));
        std::iter::once(&self.everywhere).chain(of_service)
    }

    /// The rules for tokens of requests to a destination.
    pub fn tokens(&self, destination: &Destination) -> impl Iterator<Item = &Rule> {
        self.groups(destination).flat_map(|group| &group.tokens).flat_map(Rules::iter)
    }

    /// The TrafficPolicies.
    pub fn traffic(&self) -> &TrafficPolicies {
        &self.traffic
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        let Group { policies, tokens, custom, audits } = &self.everywhere;
        [
            policies.is_empty(),
            tokens.is_empty(),
            custom.is_empty(),
            audits.is_empty(),
            self.services.is_empty(),
        ]
        .iter()
        .all(|it| *it)
            && self.traffic.is_empty()
    }

    /// Whether bytes that are passed on unread could get around the rules for tokens. Where nothing is declared, what is passed on
    /// may be a request that was not recognised; where the port declares no HTTP, only rules that no connection can meet count.
    pub fn needs_requests(&self, destination: &Destination) -> bool {
        let is_declared = destination.protocol() != AppProtocol::Unknown;
        self.tokens(destination).any(|rule| !is_declared || rule.needs_request())
    }

    /// The policies that allow or deny at a destination.
    pub fn applying(&self, destination: &Destination) -> impl Iterator<Item = &Policy> {
        self.groups(destination).flat_map(|group| &group.policies).map(|policy| &**policy)
    }

    /// Whether a policy for a destination asks for the name that a client's TLS asks for.
    pub fn needs_server_name(&self, destination: &Destination) -> bool {
        self.groups(destination).any(|group| {
            let custom = group.custom.iter().map(|(policy, _)| policy);
            group.policies.iter().chain(custom).any(|policy| policy.needs_server_name())
        })
    }

    /// Decides about what the client `client` sends, as far as it proved who it is, at address `source`.
    pub fn decide(
        &self,
        destination: &Destination,
        client: Option<&SpiffeId>,
        source: IpAddr,
        content: Content<'_>,
    ) -> Verdict {
        let request = request(destination, client, source);
        let applying = self.groups(destination).flat_map(|group| &group.policies).map(|policy| &**policy);
        if matches!(content, Content::Request(_)) {
            return evaluate_http(applying, &request, content);
        }
        // Nobody is asked about connections: what would be asked about is denied.
        let custom = self.groups(destination).flat_map(|group| &group.custom).map(|(policy, _)| &**policy);
        evaluate_http(applying.chain(custom), &request, content)
    }

    /// Why a request is denied whatever authorizers say; `None` where that is not known yet.
    pub fn denied_whatever_is_changed(
        &self,
        destination: &Destination,
        client: Option<&SpiffeId>,
        source: IpAddr,
        http: &HttpRequest<'_>,
    ) -> Option<Decision> {
        let applying = self.groups(destination).flat_map(|group| &group.policies).map(|policy| &**policy);
        denied_whatever_is_changed(applying, &request(destination, client, source), http)
    }

    /// The authorizers that policies ask about a request, each once: those whose answers count, or those of dry-run policies.
    pub fn authorizers(
        &self,
        destination: &Destination,
        client: Option<&SpiffeId>,
        source: IpAddr,
        http: &HttpRequest<'_>,
        dry_run: bool,
    ) -> Vec<Arc<Authorizer>> {
        let mut asked: Vec<Arc<Authorizer>> = Vec::new();
        let custom = self.groups(destination).flat_map(|group| &group.custom);
        let mut custom = custom.filter(|(policy, _)| policy.dry_run() == dry_run).peekable();
        if custom.peek().is_none() {
            return asked;
        }
        let request = request(destination, client, source);
        for (policy, authorizer) in custom {
            let is_new = asked.iter().all(|known| known.name() != authorizer.name());
            // The policy is a DENY for who can't ask: what it denies is asked about.
            if is_new && denies(policy, &request, http) {
                asked.push(authorizer.clone());
            }
        }
        asked
    }

    /// The policies that only report a request, of those that match it.
    pub fn audits(
        &self,
        destination: &Destination,
        client: Option<&SpiffeId>,
        source: IpAddr,
        http: &HttpRequest<'_>,
    ) -> impl Iterator<Item = &Policy> {
        let audits = self.groups(destination).flat_map(|group| &group.audits).map(|policy| &**policy);
        audits.filter(move |policy| denies(policy, &request(destination, client, source), http))
    }
}

/// Whether a DENY matches a request, in force or not.
fn denies(policy: &Policy, request: &Request<'_>, http: &HttpRequest<'_>) -> bool {
    let verdict = evaluate_http(std::iter::once(policy), request, Content::Request(http));
    !verdict.dry_run.unwrap_or(verdict.decision).allowed()
}

/// A request as policies see what of it every connection shows.
pub fn request<'a>(destination: &Destination, client: Option<&'a SpiffeId>, source: IpAddr) -> Request<'a> {
    Request {
        peer: client.map(|client| Peer {
            principal: client.principal(),
            namespace: client.namespace(),
            service_account: client.service_account(),
        }),
        source_ip: source,
        destination_ip: destination.address(),
        destination_port: destination.port(),
    }
}

/// `<namespace>/<name>` of the object that a policy was made from.
fn object_name(name: &str, source: &l7::Policy) -> Arc<str> {
    match &source.object {
        Some(object) => format!("{}/{}", object.namespace, object.name).into(),
        None => name.into(),
    }
}

/// A policy that can't be read allows nothing, or denies everything; one without rules to enforce denies everything.
fn compile(name: &str, source: &l7::Policy) -> Policy {
    let Some(authorization) = &source.authorization else {
        let object = source.object.clone().unwrap_or_default();
        return Policy::closed(&security::Authorization {
            name: if object.name.is_empty() { name.to_owned() } else { object.name },
            namespace: object.namespace,
            action: security::Action::Deny.into(),
            ..security::Authorization::default()
        });
    };
    read(name, authorization)
}

fn read(name: &str, authorization: &security::Authorization) -> Policy {
    Policy::compile_http(authorization).unwrap_or_else(|error| {
        tracing::warn!(name, %error, "a policy can't be read, so it allows nothing");
        Policy::closed(authorization)
    })
}

#[cfg(test)]
mod tests {
    use ambit_api::workload as wire;
    use ambit_directory::{Directory, Update};

    use super::*;

    fn client() -> SpiffeId {
        "spiffe://cluster.local/ns/shop/sa/cli".parse().unwrap()
    }

    fn workload() -> Destination {
        let (mut directory, reader) = Directory::new();
        let workload = wire::Workload {
            uid: "c//Pod/shop/web".to_owned(),
            name: "web".to_owned(),
            namespace: "shop".to_owned(),
            addresses: vec![vec![10, 0, 0, 9].into()],
            ..wire::Workload::default()
        };
        let address = wire::Address { r#type: Some(wire::address::Type::Workload(workload)) };
        let update = Update::Address { name: "c//Pod/shop/web".to_owned(), address };
        assert!(directory.apply([update]).is_empty());
        let workload = reader.load().workload("c//Pod/shop/web").unwrap().clone();
        Destination::Workload { workload, address: ([10, 0, 0, 9], 80).into() }
    }

    fn decide(policy: l7::Policy, content: Content<'_>) -> bool {
        let all = BTreeMap::from([("shop/p".to_owned(), policy)]);
        let policies = Policies::new(&all, &Policies::default(), |gateway| gateway == "shop/waypoint");
        policies.decide(&workload(), Some(&client()), [10, 0, 0, 1].into(), content).allowed()
    }

    fn policy(authorization: Option<security::Authorization>) -> l7::Policy {
        l7::Policy { gateways: vec!["shop/waypoint".to_owned()], authorization, ..l7::Policy::default() }
    }

    #[test]
    fn a_policy_without_rules_to_enforce_denies() {
        assert!(!decide(policy(None), Content::Unread));
    }

    #[test]
    fn a_policy_that_cannot_be_read_denies() {
        let unknown = security::Extension { name: "later".to_owned(), config: None };
        let matches = vec![security::Match { extensions: vec![unknown], ..security::Match::default() }];
        for action in [security::Action::Allow, security::Action::Deny] {
            let clauses = vec![security::Clause { matches: matches.clone() }];
            let authorization = security::Authorization {
                name: "p".to_owned(),
                namespace: "shop".to_owned(),
                action: action.into(),
                rules: vec![security::Rule { clauses }],
                ..security::Authorization::default()
            };
            assert!(!decide(policy(Some(authorization)), Content::Unread), "{action:?}");
        }
    }

    /// A port of a service.
    fn service(protocol: wire::AppProtocol) -> Destination {
        let (mut directory, reader) = Directory::new();
        let port = wire::Port { service_port: 80, target_port: 8080, app_protocol: protocol.into() };
        let hostname = "web.shop.svc.cluster.local";
        let service = wire::Service {
            name: "web".to_owned(),
            namespace: "shop".to_owned(),
            hostname: hostname.to_owned(),
            ports: vec![port],
            ..wire::Service::default()
        };
        let address = wire::Address { r#type: Some(wire::address::Type::Service(service)) };
        let update = Update::Address { name: format!("shop/{hostname}"), address };
        assert!(directory.apply([update]).is_empty());
        let service = reader.load().services().next().unwrap().clone();
        Destination::Service { service, port: 80, dialled: None }
    }

    /// A client that is silent at first, or begins with an empty line or a lower-case method, is passed on unread.
    #[test]
    fn bytes_do_not_get_around_rules_for_tokens() {
        let plain = || l7::TokenRule { issuer: "https://a".to_owned(), ..l7::TokenRule::default() };
        let claim = l7::ClaimHeader { name: "x-user".to_owned(), claim: "sub".to_owned() };
        let required = l7::TokenRule { required: true, ..plain() };
        let payload = l7::TokenRule { payload_header: "x-payload".to_owned(), ..plain() };
        let claims = l7::TokenRule { claim_headers: vec![claim], ..plain() };
        for (rules, on_undeclared, on_tcp) in [
            (vec![], false, false),
            (vec![plain()], true, false),
            (vec![plain(), required], true, true),
            (vec![payload], true, true),
            (vec![claims], true, true),
        ] {
            let shown = format!("{rules:?}");
            let of_service = l7::Target {
                namespace: "shop".to_owned(),
                hostname: "web.shop.svc.cluster.local".to_owned(),
                ..l7::Target::default()
            };
            let authentication = Some(l7::Authentication { rules });
            let of_service = l7::Policy {
                targets: vec![of_service],
                authentication: authentication.clone(),
                ..l7::Policy::default()
            };
            for source in [of_service, l7::Policy { authentication, ..policy(None) }] {
                let all = BTreeMap::from([("shop/p".to_owned(), source)]);
                let policies =
                    Policies::new(&all, &Policies::default(), |gateway| gateway == "shop/waypoint");
                let (undeclared, tcp) =
                    (service(wire::AppProtocol::Unknown), service(wire::AppProtocol::Tcp));
                assert_eq!(policies.needs_requests(&undeclared), on_undeclared, "{shown}");
                assert_eq!(policies.needs_requests(&tcp), on_tcp, "{shown}");
            }
        }
    }

    #[test]
    fn what_did_not_change_is_not_compiled_again() {
        let rules = vec![l7::TokenRule { issuer: "https://a".to_owned(), ..l7::TokenRule::default() }];
        let tokens = l7::Policy { authentication: Some(l7::Authentication { rules }), ..policy(None) };
        let mut all = BTreeMap::from([("a".to_owned(), tokens), ("b".to_owned(), policy(None))]);
        let first = |policies: &Policies| std::ptr::from_ref(policies.tokens(&workload()).next().unwrap());
        let before = Policies::new(&all, &Policies::default(), |_| true);
        all.remove("b");
        let after = Policies::new(&all, &before, |_| true);
        assert_eq!(first(&before), first(&after));
        assert!(
            !before.decide(&workload(), Some(&client()), [10, 0, 0, 1].into(), Content::Unread).allowed()
        );
        assert!(after.decide(&workload(), Some(&client()), [10, 0, 0, 1].into(), Content::Unread).allowed());
        all.get_mut("a").unwrap().authentication.as_mut().unwrap().rules[0].required = true;
        let changed = Policies::new(&all, &after, |_| true);
        assert_ne!(first(&after), first(&changed));
    }

    #[test]
    fn a_policy_of_another_gateway_does_not_apply() {
        let policy = l7::Policy { gateways: vec!["shop/other".to_owned()], ..policy(None) };
        assert!(decide(policy, Content::Unread));
    }
}
