//! 10,000 policies of 10 rules each in one namespace, rules of every shape: principals whole, by prefix and suffix, service accounts, namespaces,
//! networks, ports, negations.

use ambit_api::security::{
    Action, Address, Authorization, Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch,
    string_match::MatchType,
};

/// Policies, a tenth of which deny.
pub const POLICIES: u32 = 10_000;
/// Rules of each.
pub const RULES: u32 = 10;

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

/// A policy of namespace `app`.
pub fn policy(number: u32, scope: Scope) -> Authorization {
    Authorization {
        name: format!("p{number}"),
        namespace: "app".into(),
        scope: scope.into(),
        action: if number.is_multiple_of(10) { Action::Deny } else { Action::Allow }.into(),
        rules: (0..RULES).map(|at| rule(number, at)).collect(),
        ..Authorization::default()
    }
}

/// A port and a principal that the last policy, and no other, lets in.
pub fn allowed() -> (u16, String) {
    let last = (POLICIES - 1) * RULES;
    (8080 + (last % 3) as u16, format!("cluster.local/ns/ns-{}/sa/sa-{last}", last / 7))
}
