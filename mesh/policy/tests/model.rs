//! Compiled and indexed policies decide as a naive reading of the xDS contract does, whatever the policies, the order in which they came
//! and went, and the connection.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ambit_api::security::{
    Action, Address, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch,
    string_match::MatchType,
};
use ambit_policy::{Decision, Peer, Policy, PolicyList, PolicyName, PolicySet, Request, evaluate};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

const NAMESPACES: [&str; 3] = ["a", "ab", "b"];
const ACCOUNTS: [&str; 3] = ["x", "xy", "y"];

/// A connection to a workload, with what the workload lists.
#[derive(Debug, Clone)]
struct Case {
    peer: Option<(String, String, String)>,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
    namespace: String,
    listed: Vec<String>,
}

impl Case {
    fn request(&self) -> Request<'_> {
        Request {
            peer: self.peer.as_ref().map(|(principal, namespace, service_account)| Peer {
                principal,
                namespace,
                service_account,
            }),
            source_ip: self.source,
            destination_ip: self.destination,
            destination_port: self.port,
        }
    }
}

mod naive {
    //! The contract, word for word, on the messages of the wire.

    use super::*;

    pub(super) fn decide(policies: &[&Authorization], case: &Case) -> bool {
        let of = |action: Action| policies.iter().filter(move |policy| policy.action == action as i32);
        if of(Action::Deny).any(|policy| matches(policy, case)) {
            return false;
        }
        of(Action::Allow).count() == 0 || of(Action::Allow).any(|policy| matches(policy, case))
    }

    pub(super) fn applies(policy: &Authorization, case: &Case) -> bool {
        policy.scope == Scope::Global as i32
            || (policy.scope == Scope::Namespace as i32 && policy.namespace == case.namespace)
            || case.listed.contains(&format!("{}/{}", policy.namespace, policy.name))
    }

    fn matches(policy: &Authorization, case: &Case) -> bool {
        policy.rules.iter().any(|rule| rule.clauses.iter().all(|clause| clause_matches(clause, case)))
    }

    fn clause_matches(clause: &Clause, case: &Case) -> bool {
        clause.matches.is_empty() || clause.matches.iter().any(|candidate| match_matches(candidate, case))
    }

    fn match_matches(candidate: &Match, case: &Case) -> bool {
        if *candidate == Match::default() {
            return false;
        }
        let principal = case.peer.as_ref().map(|(principal, _, _)| principal.as_str());
        let namespace = case.peer.as_ref().map(|(_, namespace, _)| namespace.as_str());
        let account = |it: &ServiceAccountMatch| {
            case.peer.as_ref().is_some_and(|(_, namespace, account)| {
                it.namespace == *namespace && it.service_account == *account
            })
        };
        field(&candidate.principals, &candidate.not_principals, |it| text(it, principal))
            && field(&candidate.namespaces, &candidate.not_namespaces, |it| text(it, namespace))
            && field(&candidate.service_accounts, &candidate.not_service_accounts, account)
            && field(&candidate.source_ips, &candidate.not_source_ips, |it| within(it, case.source))
            && field(&candidate.destination_ips, &candidate.not_destination_ips, |it| {
                within(it, case.destination)
            })
            && field(&candidate.destination_ports, &candidate.not_destination_ports, |it| {
                *it == u32::from(case.port)
            })
    }

    fn field<T>(positive: &[T], negative: &[T], is: impl Fn(&T) -> bool) -> bool {
        (positive.is_empty() || positive.iter().any(&is)) && !negative.iter().any(&is)
    }

    fn text(pattern: &StringMatch, value: Option<&str>) -> bool {
        let Some(value) = value else { return false };
        match pattern.match_type.as_ref().unwrap() {
            MatchType::Exact(text) => value == text,
            MatchType::Prefix(text) => value.starts_with(text.as_str()),
            MatchType::Suffix(text) => value.ends_with(text.as_str()),
            MatchType::Presence(()) => true,
        }
    }

    fn within(net: &Address, address: IpAddr) -> bool {
        let bits = |bytes: &[u8]| -> Vec<bool> {
            bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1 == 1)).collect()
        };
        let address = match address.to_canonical() {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        address.len() == net.address.len()
            && bits(&address)
                .iter()
                .zip(bits(&net.address))
                .take(net.length as usize)
                .all(|(one, other)| *one == other)
    }
}

fn text(values: &'static [&'static str]) -> impl Strategy<Value = StringMatch> {
    let value = select(values);
    (value, 0..8u8, 0..30usize).prop_map(|(value, kind, cut)| {
        let cut = cut.min(value.len());
        StringMatch {
            match_type: Some(match kind {
                0..=3 => MatchType::Exact(value.into()),
                4 | 5 => MatchType::Prefix(value[..cut].into()),
                6 => MatchType::Suffix(value[cut..].into()),
                _ => MatchType::Presence(()),
            }),
        }
    })
}

const PRINCIPALS: &[&str] =
    &["td/ns/a/sa/x", "td/ns/a/sa/xy", "td/ns/ab/sa/x", "td/ns/b/sa/y", "other/ns/a/sa/x", "td/ns/b/sa/x"];

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0..4u8, 0..4u8).prop_map(|(c, d)| IpAddr::from([10, 0, c, d])),
        (0..3u16).prop_map(|last| IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last))),
        (0..4u8).prop_map(|d| IpAddr::from(Ipv4Addr::new(10, 0, 0, d).to_ipv6_mapped())),
    ]
}

fn net() -> impl Strategy<Value = Address> {
    (address(), 0..=128u32).prop_map(|(address, length)| match address.to_canonical() {
        IpAddr::V4(v4) => Address { address: v4.octets().to_vec().into(), length: length.min(32) },
        IpAddr::V6(v6) => Address { address: v6.octets().to_vec().into(), length },
    })
}

fn few<T: std::fmt::Debug>(of: impl Strategy<Value = T>, chance: f64) -> impl Strategy<Value = Vec<T>> {
    prop::option::weighted(chance, prop::collection::vec(of, 1..3)).prop_map(Option::unwrap_or_default)
}

fn account() -> impl Strategy<Value = ServiceAccountMatch> {
    (select(&NAMESPACES[..]), select(&ACCOUNTS[..])).prop_map(|(namespace, account)| ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: account.into(),
    })
}

fn one_match() -> impl Strategy<Value = Match> {
    let positive = (
        few(text(&NAMESPACES), 0.2),
        few(text(PRINCIPALS), 0.4),
        few(net(), 0.2),
        few(net(), 0.15),
        few(80..84u32, 0.2),
        few(account(), 0.2),
    );
    let negative = (
        few(text(&NAMESPACES), 0.1),
        few(text(PRINCIPALS), 0.1),
        few(net(), 0.1),
        few(net(), 0.1),
        few(80..84u32, 0.1),
        few(account(), 0.1),
    );
    (positive, negative).prop_map(|(yes, no)| Match {
        namespaces: yes.0,
        principals: yes.1,
        source_ips: yes.2,
        destination_ips: yes.3,
        destination_ports: yes.4,
        service_accounts: yes.5,
        not_namespaces: no.0,
        not_principals: no.1,
        not_source_ips: no.2,
        not_destination_ips: no.3,
        not_destination_ports: no.4,
        not_service_accounts: no.5,
        extensions: vec![],
    })
}

fn policy() -> impl Strategy<Value = Authorization> {
    let clause = prop::collection::vec(one_match(), 0..3).prop_map(|matches| Clause { matches });
    let rule = prop::collection::vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    let rules = prop::collection::vec(rule, 0..4);
    (0..30u8, select(&NAMESPACES[..]), 0..3i32, prop::bool::weighted(0.4), rules, prop::bool::weighted(0.2))
        .prop_map(|(name, namespace, scope, deny, rules, dry_run)| Authorization {
            name: format!("p{name}"),
            namespace: namespace.into(),
            scope,
            action: deny.into(),
            rules,
            dry_run,
            extensions: vec![],
        })
}

fn case() -> impl Strategy<Value = Case> {
    let names: Vec<String> = NAMESPACES
        .iter()
        .flat_map(|namespace| (0..30).map(move |name| format!("{namespace}/p{name}")))
        .collect();
    let peer = prop::option::weighted(
        0.8,
        (select(&["td", "other"][..]), select(&NAMESPACES[..]), select(&ACCOUNTS[..])),
    );
    let listed = prop_oneof![subsequence(names.clone(), 0..8), subsequence(names, 17..60)];
    (peer, address(), address(), 80..84u16, select(&NAMESPACES[..]), listed).prop_map(
        |(peer, source, destination, port, namespace, listed)| Case {
            peer: peer.map(|(domain, namespace, account)| {
                (format!("{domain}/ns/{namespace}/sa/{account}"), namespace.into(), account.into())
            }),
            source,
            destination,
            port,
            namespace: namespace.into(),
            listed,
        },
    )
}

/// A policy comes (`Ok`) or goes (`Err`).
fn step() -> impl Strategy<Value = Result<Authorization, (String, String)>> {
    prop_oneof![
        4 => policy().prop_map(Ok),
        1 => (select(&NAMESPACES[..]), 0..30u8).prop_map(|(namespace, name)| Err((namespace.into(), format!("p{name}")))),
    ]
}

fn list(case: &Case) -> PolicyList {
    case.listed.iter().map(|name| PolicyName::from(name.as_str())).collect()
}

/// Applies `step` to the set and to the plain map.
fn take(
    step: Result<Authorization, (String, String)>,
    set: &mut PolicySet,
    plain: &mut BTreeMap<(String, String), Authorization>,
) {
    match step {
        Ok(policy) => {
            set.insert(Policy::compile(&policy).unwrap());
            plain.insert((policy.namespace.clone(), policy.name.clone()), policy);
        }
        Err((namespace, name)) => {
            let known = plain.remove(&(namespace.clone(), name.clone())).is_some();
            assert_eq!(set.remove(&PolicyName::new(&namespace, &name)), known);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, max_shrink_iters: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_set_decides_as_the_contract_says(
        steps in prop::collection::vec(step(), 0..40),
        cases in prop::collection::vec(case(), 1..12),
    ) {
        let (mut set, mut plain) = (PolicySet::default(), BTreeMap::new());
        for step in steps {
            take(step, &mut set, &mut plain);
        }
        prop_assert_eq!(set.len(), plain.len());
        for case in &cases {
            let applying: Vec<&Authorization> =
                plain.values().filter(|policy| naive::applies(policy, case)).collect();
            let enforced: Vec<&Authorization> = applying.iter().copied().filter(|policy| !policy.dry_run).collect();
            let verdict = set.evaluate(&case.namespace, &list(case), &case.request());
            prop_assert_eq!(verdict.allowed(), naive::decide(&enforced, case), "enforced, {:?}", case);
            prop_assert_eq!(verdict.dry_run.is_some(), applying.iter().any(|policy| policy.dry_run));
            if let Some(dry_run) = &verdict.dry_run {
                prop_assert_eq!(dry_run.allowed(), naive::decide(&applying, case), "dry run, {:?}", case);
            }
            // The policy that is named is one that applies, of the right kind, and matches by itself.
            if let Some(name) = verdict.by() {
                let policy = set.get(name).unwrap();
                prop_assert!(policy.matches(&case.request()) && !policy.dry_run());
            }
            let compiled: Vec<Policy> = applying.iter().map(|policy| Policy::compile(policy).unwrap()).collect();
            let walked = evaluate(compiled.iter(), &case.request());
            prop_assert_eq!(walked.allowed(), verdict.allowed());
            prop_assert_eq!(walked.dry_run.map(|it| it.allowed()), verdict.dry_run.map(|it| it.allowed()));
            prop_assert_eq!(set.applying(&case.namespace, &list(case)).count(), applying.len());
        }
    }

    #[test]
    fn a_stamp_that_stays_means_that_verdicts_stay(
        steps in prop::collection::vec(step(), 1..30),
        case in case(),
    ) {
        let (mut set, mut plain) = (PolicySet::default(), BTreeMap::new());
        let look = |set: &PolicySet| {
            let verdict = set.evaluate(&case.namespace, &list(&case), &case.request());
            (set.stamp(&case.namespace, &list(&case)), verdict.allowed(), verdict.dry_run.map(|it| it.allowed()))
        };
        for step in steps {
            let before = (set.clone(), look(&set));
            take(step, &mut set, &mut plain);
            let after = look(&set);
            prop_assert!(before.1.0 != after.0 || before.1 == after, "{:?} then {:?}", before.1, after);
            prop_assert_eq!(look(&before.0), before.1, "a clone changed");
        }
    }
}

#[test]
fn a_policy_of_another_namespace_leaves_the_stamp_alone() {
    let policy = |namespace: &str, scope: Scope| {
        Policy::compile(&Authorization {
            name: "p".into(),
            namespace: namespace.into(),
            scope: scope.into(),
            ..Authorization::default()
        })
        .unwrap()
    };
    let mut set = PolicySet::default();
    let listed: PolicyList = [PolicyName::from("a/p")].into_iter().collect();
    let stamp = |set: &PolicySet| (set.stamp("a", &PolicyList::default()), set.stamp("a", &listed));
    let empty = stamp(&set);
    set.insert(policy("b", Scope::Namespace));
    assert_eq!(stamp(&set), empty);
    set.insert(policy("a", Scope::WorkloadSelector));
    let selected = stamp(&set);
    assert_eq!(selected.0, empty.0, "a workload that is not selected has nothing to evaluate again");
    assert_ne!(selected.1, empty.1);
    assert!(!set.insert(policy("a", Scope::WorkloadSelector)), "the same policy again is no change");
    assert_eq!(stamp(&set), selected);
    set.insert(policy("c", Scope::Global));
    assert!(stamp(&set).0 != selected.0 && stamp(&set).1 != selected.1);
    assert_ne!(set.stamp("a", &listed), set.stamp("a", &PolicyList::default()), "the list itself counts");
    assert!(matches!(
        set.evaluate(
            "a",
            &PolicyList::default(),
            &Request {
                peer: None,
                source_ip: Ipv4Addr::LOCALHOST.into(),
                destination_ip: Ipv4Addr::LOCALHOST.into(),
                destination_port: 80,
            }
        )
        .decision,
        Decision::DeniedByDefault
    ));
}
