//! What policies mean (xDS contract), case by case.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::IpAddr;

use ambit_api::security::{
    Action, Address, Authorization, Clause, Match, Rule, Scope, StringMatch, string_match::MatchType,
};
use ambit_policy::{CompileError, Decision, Peer, Policy, PolicyList, PolicyName, PolicySet, Request};

const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
const DESTINATION: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

fn from(peer: Option<&'static str>) -> Request<'static> {
    let parts = |principal: &'static str| {
        let mut parts = principal.split('/');
        let (namespace, service_account) = (parts.nth(2).unwrap(), parts.nth(1).unwrap());
        Peer { principal, namespace, service_account }
    };
    Request { peer: peer.map(parts), source_ip: SOURCE, destination_ip: DESTINATION, destination_port: 8080 }
}

fn text(match_type: MatchType) -> Vec<StringMatch> {
    vec![StringMatch { match_type: Some(match_type) }]
}

fn exact(principal: &str) -> Match {
    Match { principals: text(MatchType::Exact(principal.into())), ..Match::default() }
}

fn rule(matches: Vec<Match>) -> Rule {
    Rule { clauses: vec![Clause { matches }] }
}

fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Authorization {
    Authorization {
        name: name.into(),
        namespace: "app".into(),
        scope: Scope::Namespace.into(),
        action: action.into(),
        rules,
        ..Authorization::default()
    }
}

fn decide(policies: &[Authorization], request: &Request<'_>) -> Decision {
    let mut set = PolicySet::default();
    for policy in policies {
        set.insert(Policy::compile(policy).unwrap());
    }
    set.evaluate("app", &PolicyList::default(), request).decision
}

const ALICE: &str = "cluster.local/ns/client/sa/alice";

#[test]
fn without_policies_everybody_is_let_in() {
    assert_eq!(decide(&[], &from(None)), Decision::AllowedByDefault);
}

#[test]
fn an_allow_policy_without_rules_lets_nobody_in() {
    assert_eq!(
        decide(&[policy("none", Action::Allow, vec![])], &from(Some(ALICE))),
        Decision::DeniedByDefault
    );
}

#[test]
fn empty_rules_and_clauses_match_and_an_empty_match_does_not() {
    let all = PolicyName::from("app/p");
    let decide = |rule| decide(&[policy("p", Action::Allow, vec![rule])], &from(None));
    assert_eq!(decide(Rule::default()), Decision::AllowedBy(all.clone()));
    assert_eq!(decide(rule(vec![])), Decision::AllowedBy(all));
    assert_eq!(decide(rule(vec![Match::default()])), Decision::DeniedByDefault);
}

#[test]
fn a_deny_wins_over_an_allow() {
    let policies = [
        policy("yes", Action::Allow, vec![Rule::default()]),
        policy("no", Action::Deny, vec![rule(vec![exact(ALICE)])]),
    ];
    assert_eq!(decide(&policies, &from(Some(ALICE))), Decision::DeniedBy(PolicyName::from("app/no")));
    assert_eq!(decide(&policies, &from(None)), Decision::AllowedBy(PolicyName::from("app/yes")));
}

#[test]
fn principals_compare_without_the_scheme() {
    for written in [ALICE.to_owned(), format!("spiffe://{ALICE}")] {
        let policies = [policy("p", Action::Allow, vec![rule(vec![exact(&written)])])];
        assert!(decide(&policies, &from(Some(ALICE))).allowed(), "{written}");
    }
}

#[test]
fn strict_mutual_tls_refuses_peers_without_identity_only() {
    // The form in which control planes send PeerAuthentication STRICT.
    let strict = Match { not_principals: text(MatchType::Presence(())), ..Match::default() };
    let policies = [policy("strict", Action::Deny, vec![rule(vec![strict])])];
    assert_eq!(decide(&policies, &from(None)), Decision::DeniedBy(PolicyName::from("app/strict")));
    assert_eq!(decide(&policies, &from(Some(ALICE))), Decision::AllowedByDefault);
}

#[test]
fn addresses_mapped_into_ipv6_are_the_ipv4_addresses() {
    let net = |address: Vec<u8>, length| Match {
        source_ips: vec![Address { address: address.into(), length }],
        ..Match::default()
    };
    let mapped = std::net::Ipv4Addr::new(10, 0, 0, 0).to_ipv6_mapped().octets().to_vec();
    for (written, length) in [(vec![10, 0, 0, 0], 24), (mapped, 120)] {
        let policies = [policy("p", Action::Allow, vec![rule(vec![net(written, length)])])];
        let mut request = from(None);
        assert!(decide(&policies, &request).allowed());
        request.source_ip = "::ffff:10.0.0.9".parse().unwrap();
        assert!(decide(&policies, &request).allowed());
        request.source_ip = "10.0.1.1".parse().unwrap();
        assert!(!decide(&policies, &request).allowed());
    }
}

#[test]
fn a_dry_run_policy_decides_nothing_and_says_what_it_would() {
    let mut set = PolicySet::default();
    let mut deny = policy("no", Action::Deny, vec![Rule::default()]);
    deny.dry_run = true;
    set.insert(Policy::compile(&deny).unwrap());
    let verdict = set.evaluate("app", &PolicyList::default(), &from(Some(ALICE)));
    assert_eq!(verdict.decision, Decision::AllowedByDefault);
    assert_eq!(verdict.dry_run, Some(Decision::DeniedBy(PolicyName::from("app/no"))));
    assert!(verdict.dry_run_differs());
}

#[test]
fn what_cannot_be_read_is_an_error_that_names_the_place() {
    let address =
        Match { source_ips: vec![Address { address: vec![1, 2, 3].into(), length: 8 }], ..Match::default() };
    let long = Match {
        source_ips: vec![Address { address: vec![1, 2, 3, 4].into(), length: 33 }],
        ..Match::default()
    };
    let port = Match { not_destination_ports: vec![65536], ..Match::default() };
    let comparison = Match { namespaces: vec![StringMatch { match_type: None }], ..Match::default() };
    let texts: Vec<String> = [address, long, port, comparison]
        .into_iter()
        .map(|bad| {
            let source = policy("p", Action::Deny, vec![Rule::default(), rule(vec![bad])]);
            Policy::compile(&source).unwrap_err().to_string()
        })
        .collect();
    assert_eq!(
        texts,
        [
            "policy app/p, rule 1: source_ips has an address of 3 bytes with prefix length 8",
            "policy app/p, rule 1: source_ips has an address of 4 bytes with prefix length 33",
            "policy app/p, rule 1: 65536 in destination_ports is no port",
            "policy app/p, rule 1: a value of namespaces has no known way to compare",
        ]
    );
    assert!(matches!(
        Policy::compile(&Authorization { action: 7, ..policy("p", Action::Allow, vec![]) }),
        Err(CompileError::Action { action: 7, .. })
    ));
}

#[test]
fn an_unreadable_deny_denies_and_an_allow_allows_nothing() {
    let bad = rule(vec![Match { destination_ports: vec![70000], ..Match::default() }]);
    for (action, deny_by) in [(Action::Deny, true), (Action::Allow, false)] {
        let source = policy("p", action, vec![bad.clone()]);
        assert!(Policy::compile(&source).is_err());
        let mut set = PolicySet::default();
        set.insert(Policy::closed(&source));
        let decision = set.evaluate("app", &PolicyList::default(), &from(Some(ALICE))).decision;
        assert!(!decision.allowed());
        assert_eq!(decision.by().is_some(), deny_by);
    }
    let unknown = Authorization { action: 7, ..policy("p", Action::Allow, vec![]) };
    assert!(
        Policy::closed(&unknown).matches(&from(None))
            && Policy::closed(&unknown).action() == ambit_policy::Action::Deny
    );
}

#[test]
fn policies_show_in_the_dump_with_scope_action_and_rules() {
    let mut set = PolicySet::default();
    set.insert(Policy::compile(&policy("p", Action::Deny, vec![rule(vec![exact(ALICE)])])).unwrap());
    assert_eq!(
        serde_json::to_value(&set).unwrap(),
        serde_json::json!([{
            "name": "app/p", "namespace": "app", "scope": "namespace", "action": "deny", "dryRun": false,
            "rules": [[[{"principals": {"exact": [ALICE]}}]]],
        }])
    );
}

#[test]
fn taking_one_policy_out_leaves_the_others_that_demand_the_same() {
    let (mut set, count) = (PolicySet::default(), 40);
    for number in 0..count {
        let rules = vec![rule(vec![exact(ALICE)]), Rule::default(), rule(vec![exact("other/ns/b/sa/y")])];
        let rules = rules.into_iter().skip(usize::from(number % 2 == 0) * 2).collect();
        set.insert(Policy::compile(&policy(&number.to_string(), Action::Deny, rules)).unwrap());
    }
    let request = from(Some("other/ns/b/sa/y"));
    for number in (0..count).rev() {
        let decision = set.evaluate("app", &PolicyList::default(), &request).decision;
        assert!(!decision.allowed(), "{} policies are left", number + 1);
        assert!(set.get(decision.by().unwrap()).is_some(), "{decision:?} is gone");
        assert!(set.remove(&PolicyName::new("app", &number.to_string())));
    }
    assert!(set.evaluate("app", &PolicyList::default(), &request).allowed());
}
