//! Service VIPs for pods outside the mesh: what kube-proxy does, as one nftables table a node.
//!
//! [`plan`] is pure; the cluster applies its result to every node whenever a service or an endpoint changed.
//! Connections that were translated before keep their target.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ambit_node::nft::{
    self, Action, Chain, ChainKind, Compare, Hook, HookPoint, Match, Protocol, Rule, Table,
};
use ipnet::IpNet;

use crate::addresses::{SERVICES_PREFIX_V4, SERVICES_PREFIX_V6, SERVICES_V4, SERVICES_V6};
use crate::error::{Error, Result};
use crate::sandbox::Sandbox;
use crate::services::{PortView, ServiceView};

/// Name of the table on each node.
const TABLE: &str = "ambit-local-services";
/// Priority of destination translation, as nft(8) names it `dstnat`.
const DSTNAT: i32 = -100;
/// Priority of source translation, `srcnat`.
const SRCNAT: i32 = 100;

/// The table that translates every VIP to one of its endpoints, chosen at random for each connection. A VIP without endpoints
/// refuses connections.
pub(crate) fn plan(services: &[ServiceView]) -> Table {
    let mut rules = Vec::new();
    let mut endpoints = BTreeSet::new();
    for service in services {
        for port in &service.ports {
            for vip in &service.vips {
                add_rules(&mut rules, service, port, *vip, &mut endpoints);
            }
        }
    }
    let base = |name: &str, kind, point, priority, rules| Chain {
        name: name.to_owned(),
        hook: Some(Hook { kind, point, priority }),
        rules,
    };
    let jump = || vec![Rule::new([], Action::Jump("services".to_owned()), "")];
    // A pod that reaches itself through a VIP would see its own address as the peer's and drop the packet.
    let hairpins = endpoints.into_iter().map(|ip| {
        let own = IpNet::from(ip);
        let matches = [Match::Source(Compare::Is, own), Match::Destination(Compare::Is, own)];
        Rule::new(matches, Action::Masquerade, "a pod behind a service reaches itself")
    });
    Table {
        name: TABLE.to_owned(),
        chains: vec![
            Chain { name: "services".to_owned(), hook: None, rules },
            base("prerouting", ChainKind::Nat, HookPoint::Prerouting, DSTNAT, jump()),
            base("output", ChainKind::Nat, HookPoint::Output, DSTNAT, jump()),
            base("postrouting", ChainKind::Nat, HookPoint::Postrouting, SRCNAT, hairpins.collect()),
            base("forward", ChainKind::Filter, HookPoint::Forward, 0, refusals()),
            base("local", ChainKind::Filter, HookPoint::Output, 0, refusals()),
        ],
    }
}

/// Puts a table in place on a node, in one transaction.
///
/// # Errors
/// When the kernel refuses a rule.
pub(crate) async fn apply(node: &Sandbox, table: Table) -> Result<()> {
    let refused = |reason: String| Error::Netlink {
        attempt: format!("translate service addresses to their endpoints on {}", node.name()),
        reason,
    };
    let inside = node.netns()?;
    nft::apply(&inside, table).await.map_err(|error| refused(error.to_string()))
}

fn add_rules(
    rules: &mut Vec<Rule>,
    service: &ServiceView,
    port: &PortView,
    vip: IpAddr,
    endpoints: &mut BTreeSet<IpAddr>,
) {
    let protocol = match port.protocol.as_str() {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        // SCTP has no translation here; its packets are refused like those of a port that does not exist.
        _ => return,
    };
    let targets: Vec<&SocketAddr> =
        port.targets.iter().filter(|target| target.is_ipv4() == vip.is_ipv4()).collect();
    let mut left = u32::try_from(targets.len()).unwrap_or(u32::MAX);
    for target in targets {
        let mut matches = vec![
            Match::Destination(Compare::Is, IpNet::from(vip)),
            Match::Protocol(protocol),
            Match::DestinationPort(Compare::Is, port.port),
        ];
        // The first of n takes one n-th, the second one (n-1)-th of the rest, and the last what is left.
        if left > 1 {
            matches.push(Match::Random { modulus: left, value: 0 });
        }
        left = left.saturating_sub(1);
        endpoints.insert(target.ip());
        let comment = format!("{}/{}:{}", service.namespace, service.name, port.port);
        rules.push(Rule::new(matches, Action::Dnat(target.ip(), Some(target.port())), comment));
    }
}

/// Rules that refuse packets that are still addressed to a VIP after translation: it has no endpoints.
fn refusals() -> Vec<Rule> {
    let ranges = [
        IpNet::new(IpAddr::V4(SERVICES_V4), SERVICES_PREFIX_V4),
        IpNet::new(IpAddr::V6(SERVICES_V6), SERVICES_PREFIX_V6),
    ];
    let refuse = |range: IpNet| {
        let destination = Match::Destination(Compare::Is, range);
        let comment = "no endpoint";
        [
            Rule::new([destination.clone(), Match::Protocol(Protocol::Tcp)], Action::Reject, comment),
            Rule::new([destination], Action::Reject, comment),
        ]
    };
    ranges.into_iter().flatten().flat_map(refuse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(targets: &[&str]) -> ServiceView {
        ServiceView {
            namespace: "n".to_owned(),
            name: "s".to_owned(),
            vips: vec![IpAddr::from([10, 96, 1, 0])],
            ports: vec![PortView {
                name: String::new(),
                protocol: "TCP".to_owned(),
                port: 80,
                targets: targets.iter().map(|target| target.parse().expect("an address")).collect(),
            }],
            endpoints: BTreeSet::new(),
        }
    }

    #[test]
    fn every_target_gets_an_equal_share() {
        let table = plan(&[service(&["10.0.0.1:1", "10.0.0.2:2", "10.0.0.3:3"])]);
        let shares: Vec<_> = table.chains[0]
            .rules
            .iter()
            .map(|rule| {
                rule.matches.iter().find_map(|part| match part {
                    Match::Random { modulus, value: 0 } => Some(*modulus),
                    _ => None,
                })
            })
            .collect();
        assert_eq!(shares, [Some(3), Some(2), None]);
    }

    #[test]
    fn a_target_of_the_other_family_is_left_out() {
        let table = plan(&[service(&["[fd00::1]:1"])]);
        assert!(table.chains[0].rules.is_empty());
    }

    #[test]
    fn a_chain_stands_before_those_that_jump_to_it() {
        assert_eq!(plan(&[]).chains[0].name, "services");
    }
}
