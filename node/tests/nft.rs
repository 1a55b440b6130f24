//! Tables in a real kernel. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::net::IpAddr;

use ambit_net::Netns;
use ambit_node::nft::{
    self, Action, Chain, ChainKind, Compare, Difference, Hook, HookPoint, Match, Protocol, Rule, Table,
};
use ambit_node::redirect::{Options, Stage, plan};

fn every_feature() -> Table {
    let net = |text: &str| text.parse().unwrap();
    let address = |text: &str| -> IpAddr { text.parse().unwrap() };
    let mut dnat = vec![];
    for (i, to) in ["10.0.0.1", "10.0.0.2", "10.0.0.3"].iter().enumerate() {
        dnat.push(Rule::new(
            [
                Match::Destination(Compare::Is, net("10.96.0.10/32")),
                Match::Protocol(Protocol::Tcp),
                Match::DestinationPort(Compare::Is, 80),
                Match::Random { modulus: 3 - i as u32, value: 0 },
            ],
            Action::Dnat(address(to), Some(8080)),
            format!("endpoint {i}"),
        ));
    }
    dnat.push(Rule::new(
        [Match::Destination(Compare::Is, net("fd00::/64")), Match::DestinationLocal(Compare::IsNot)],
        Action::Dnat(address("fd77::1"), None),
        "",
    ));
    let base = |name: &str, kind, point, priority, rules| Chain {
        name: name.into(),
        hook: Some(Hook { kind, point, priority }),
        rules,
    };
    Table {
        name: "features".into(),
        chains: vec![
            Chain {
                name: "side".into(),
                hook: None,
                rules: vec![Rule {
                    matches: vec![Match::Source(Compare::IsNot, net("192.168.0.0/16"))],
                    actions: vec![Action::Count, Action::Return],
                    comment: "ü".repeat(200),
                }],
            },
            base(
                "filter",
                ChainKind::Filter,
                HookPoint::Input,
                0,
                vec![
                    Rule::new([Match::Ipv4], Action::Jump("side".into()), "jump"),
                    Rule::new(
                        [
                            Match::Ipv6,
                            Match::Protocol(Protocol::Tcp),
                            Match::TcpFlags { mask: 3, value: 1 },
                            Match::SourcePort(Compare::IsNot, 7),
                            Match::InputInterface(Compare::Is, "eth0".into()),
                        ],
                        Action::Reject,
                        "",
                    ),
                    Rule::new([Match::Protocol(Protocol::Udp)], Action::Reject, ""),
                    Rule::new([], Action::Drop, ""),
                ],
            ),
            base(
                "raw",
                ChainKind::Filter,
                HookPoint::Prerouting,
                -300,
                vec![
                    Rule::new([], Action::Zone(1), ""),
                    Rule::new([], Action::ZoneOfOriginal(2), ""),
                    Rule::new([], Action::SetMark { value: 0x10, mask: 0xf0 }, ""),
                ],
            ),
            base("nat", ChainKind::Nat, HookPoint::Output, -100, dnat),
            base(
                "masquerade",
                ChainKind::Nat,
                HookPoint::Postrouting,
                100,
                vec![Rule::new(
                    [Match::Mark { compare: Compare::Is, value: 0x4000, mask: 0x4000 }],
                    Action::Masquerade,
                    "",
                )],
            ),
            base(
                "snat",
                ChainKind::Nat,
                HookPoint::Postrouting,
                99,
                vec![Rule::new(
                    [Match::Destination(Compare::Is, net("10.1.0.5/32")), Match::LocalUser(7)],
                    Action::Snat(address("169.254.7.127")),
                    "",
                )],
            ),
        ],
    }
}

#[tokio::test]
async fn an_applied_table_is_verified() {
    let inside = Netns::create().expect("needs root");
    for table in [every_feature(), plan(&Options::default(), Stage::In).table] {
        assert_eq!(nft::verify(&inside, table.clone()).await.unwrap(), Some(Difference::NoTable));
        nft::apply(&inside, table.clone()).await.unwrap();
        assert_eq!(nft::verify(&inside, table.clone()).await.unwrap(), None);
        nft::apply(&inside, table.clone()).await.unwrap();
        assert_eq!(nft::verify(&inside, table.clone()).await.unwrap(), None);
    }
    assert_eq!(nft::tables(&inside).await.unwrap(), ["features", "ambit"]);
    assert!(nft::remove(&inside, "features").await.unwrap());
    assert!(!nft::remove(&inside, "features").await.unwrap());
    assert_eq!(nft::tables(&inside).await.unwrap(), ["ambit"]);
}

#[tokio::test]
async fn every_difference_is_found() {
    let inside = Netns::create().expect("needs root");
    let table = every_feature();
    let rule = Rule::new([], Action::Count, "");
    let mut changed = table.clone();
    changed.chains[1].hook.as_mut().unwrap().priority = 5;
    nft::apply(&inside, changed).await.unwrap();
    assert_eq!(nft::verify(&inside, table.clone()).await.unwrap(), Some(Difference::Chain("filter".into())));
    let mut changed = table.clone();
    changed.chains.push(Chain { name: "more".into(), hook: None, rules: vec![] });
    nft::apply(&inside, changed).await.unwrap();
    assert_eq!(
        nft::verify(&inside, table.clone()).await.unwrap(),
        Some(Difference::ExtraChain("more".into()))
    );
    let mut changed = table.clone();
    changed.chains[3].rules.push(rule.clone());
    nft::apply(&inside, changed).await.unwrap();
    assert_eq!(
        nft::verify(&inside, table.clone()).await.unwrap(),
        Some(Difference::ExtraRules("nat".into()))
    );
    let mut changed = table.clone();
    changed.chains[3].rules.swap(1, 2);
    nft::apply(&inside, changed).await.unwrap();
    assert_eq!(nft::verify(&inside, table.clone()).await.unwrap(), Some(Difference::Rule("nat".into(), 1)));
    let mut changed = table.clone();
    changed.chains[1].rules[1].actions.insert(0, Action::Count);
    nft::apply(&inside, changed).await.unwrap();
    assert_eq!(
        nft::verify(&inside, table.clone()).await.unwrap(),
        Some(Difference::Rule("filter".into(), 1))
    );
}

#[tokio::test]
async fn a_refused_table_changes_nothing_and_says_why() {
    let inside = Netns::create().expect("needs root");
    let table = every_feature();
    nft::apply(&inside, table.clone()).await.unwrap();
    let mut wrong = table.clone();
    wrong.chains[1].rules.push(Rule::new([], Action::Jump("nowhere".into()), ""));
    let error = nft::apply(&inside, wrong).await.unwrap_err();
    assert!(error.to_string().contains("apply table inet features"), "{error}");
    assert_eq!(nft::verify(&inside, table).await.unwrap(), None);
}

#[tokio::test]
async fn thousands_of_rules_are_applied_in_one_transaction() {
    let inside = Netns::create().expect("needs root");
    let rules = (0..5000_u32)
        .map(|i| {
            Rule::new(
                [
                    Match::Destination(Compare::Is, IpAddr::from((0x0a60_0000 + i).to_be_bytes()).into()),
                    Match::Protocol(Protocol::Tcp),
                    Match::DestinationPort(Compare::Is, 80),
                ],
                Action::Dnat(IpAddr::from([10, 0, 0, 1]), Some(8080)),
                format!("service {i}"),
            )
        })
        .collect();
    let table = Table {
        name: "many".into(),
        chains: vec![Chain {
            name: "nat".into(),
            hook: Some(Hook { kind: ChainKind::Nat, point: HookPoint::Output, priority: -100 }),
            rules,
        }],
    };
    nft::apply(&inside, table.clone()).await.unwrap();
    assert_eq!(nft::verify(&inside, table).await.unwrap(), None);
}
