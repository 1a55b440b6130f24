//! What a decision costs with 10,000 policies of 10 rules each, in one namespace: `decide [DECISIONS]`, under callgrind or by the clock.
//!
//! Shapes of rules are mixed (principals whole, by prefix and suffix, service accounts, namespaces, networks, ports, negations). Prints the mean time of
//! a decision for a client that the last policy allows, for one that none allows, and for workloads that list many policies by name.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use ambit_api::security::{
    Action, Address, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch,
    string_match::MatchType,
};
use ambit_policy::{Peer, Policy, PolicyList, PolicyName, PolicySet, Request};

const POLICIES: u32 = 10_000;
const RULES: u32 = 10;

fn text(match_type: MatchType) -> Vec<StringMatch> {
    vec![StringMatch { match_type: Some(match_type) }]
}

/// Rule `rule` of policy `policy`, which lets in somebody of its own.
fn rule(policy: u32, rule: u32) -> Rule {
    let number = policy * RULES + rule;
    let (namespace, account) = (format!("ns-{}", number / 7), format!("sa-{number}"));
    let from = match number % 8 {
        0..=2 => Match {
            principals: text(MatchType::Exact(format!("cluster.local/ns/{namespace}/sa/{account}"))),
            ..Match::default()
        },
        3 => Match {
            principals: text(MatchType::Prefix(format!("cluster.local/ns/{namespace}/"))),
            ..Match::default()
        },
        4 => Match { principals: text(MatchType::Suffix(format!("/sa/{account}"))), ..Match::default() },
        5 => Match {
            service_accounts: vec![ServiceAccountMatch { namespace, service_account: account }],
            ..Match::default()
        },
        6 => Match { namespaces: text(MatchType::Exact(namespace)), ..Match::default() },
        _ => Match {
            source_ips: vec![Address {
                address: (0x0b00_0000 + number * 16).to_be_bytes().to_vec().into(),
                length: 28,
            }],
            ..Match::default()
        },
    };
    let to = Match { destination_ports: vec![8080 + number % 3], ..Match::default() };
    let not = Match {
        not_source_ips: vec![Address { address: vec![192, 0, 2, 0].into(), length: 24 }],
        ..Match::default()
    };
    Rule { clauses: [from, to, not].map(|only| Clause { matches: vec![only] }).into() }
}

fn policy(number: u32, scope: Scope) -> Authorization {
    Authorization {
        name: format!("p{number}"),
        namespace: "app".into(),
        scope: scope.into(),
        action: if number.is_multiple_of(10) { Action::Deny } else { Action::Allow }.into(),
        rules: (0..RULES).map(|at| rule(number, at)).collect(),
        ..Authorization::default()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let decisions: u32 = std::env::args().nth(1).map_or(Ok(100_000), |count| count.parse())?;
    for (what, scope) in [("of the namespace", Scope::Namespace), ("listed by name", Scope::WorkloadSelector)]
    {
        let start = Instant::now();
        let mut set = PolicySet::default();
        for number in 0..POLICIES {
            set.insert(Policy::compile(&policy(number, scope))?);
        }
        println!("{POLICIES} policies of {RULES} rules, {what}: built in {:?}", start.elapsed());
        let listed: PolicyList = match scope {
            Scope::WorkloadSelector => {
                (0..POLICIES).map(|it| PolicyName::new("app", &format!("p{it}"))).collect()
            }
            Scope::Global | Scope::Namespace => PolicyList::default(),
        };
        let last = (POLICIES - 1) * RULES;
        let allowed = format!("cluster.local/ns/ns-{}/sa/sa-{last}", last / 7);
        for (whom, principal) in
            [("whom one allows", allowed.as_str()), ("whom none allows", "cluster.local/ns/x/sa/y")]
        {
            let mut parts = principal.split('/').skip(2).step_by(2);
            let peer = Peer {
                principal,
                namespace: parts.next().unwrap_or_default(),
                service_account: parts.next().unwrap_or_default(),
            };
            let port = u16::try_from(8080 + last % 3)?;
            let request = Request {
                peer: Some(peer),
                source_ip: IpAddr::from(Ipv4Addr::new(10, 1, 2, 3)),
                destination_ip: IpAddr::from(Ipv4Addr::new(10, 1, 2, 4)),
                destination_port: port,
            };
            let start = Instant::now();
            for _ in 0..decisions {
                black_box(black_box(&set).evaluate("app", &listed, black_box(&request)));
            }
            let verdict = set.evaluate("app", &listed, &request);
            println!("  {whom}: {:?} a decision ({:?})", start.elapsed() / decisions, verdict.decision);
        }
        let start = Instant::now();
        for number in 0..1000 {
            let mut changed = policy(number, scope);
            changed.dry_run = true;
            let published = set.clone();
            set.insert(Policy::compile(&changed)?);
            drop(black_box(published));
        }
        println!("  a policy changed: {:?}", start.elapsed() / 1000);
    }
    Ok(())
}
