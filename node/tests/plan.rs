//! What a pod's namespace is planned to contain, as people read it. Needs no root.

use ambit_node::listeners::wanted;
use ambit_node::redirect::{Options, OtherProtocols, Plan, ROUTE_PRIORITY, ROUTE_TABLE, Stage, plan};

/// The plan, the routes and the listeners as text.
fn shown(options: &Options, stage: Stage) -> String {
    let Plan { table, routes, settings, opening: _ } = plan(options, stage);
    let mut text = format!("{table}\n");
    for route in routes {
        text += &format!(
            "{:?}: rule {} fwmark {:#x} -> table {}: local default dev lo\n",
            route.family, route.priority, route.mark, route.table
        );
    }
    for setting in settings {
        text += &format!("{} = {} (else {})\n", setting.name, setting.value, setting.default);
    }
    for listen in wanted(options) {
        text += &format!("{} {}:{}\n", if listen.udp { "udp" } else { "tcp" }, listen.address, listen.port);
    }
    text
}

#[test]
fn a_pod_with_defaults() {
    insta::assert_snapshot!(shown(&Options::default(), Stage::In));
}

#[test]
fn a_pod_before_its_older_connections_are_tracked() {
    insta::assert_snapshot!(plan(&Options::default(), Stage::In).opening.unwrap());
}

#[test]
fn a_leaving_pod() {
    insta::assert_snapshot!(shown(&Options::default(), Stage::Leaving));
}

#[test]
fn a_pod_without_inbound_and_dns_capture() {
    let options = Options { dns_capture: false, inbound_capture: false, ..Options::default() };
    insta::assert_snapshot!(shown(&options, Stage::In));
}

#[test]
fn a_pod_with_a_virtual_interface_and_socks5() {
    let options = Options { virtual_interfaces: vec!["k6t-eth0".into()], socks5: true, ..Options::default() };
    insta::assert_snapshot!(shown(&options, Stage::In));
}

#[test]
fn a_pod_with_other_protocols_denied() {
    let options = Options { other_protocols: OtherProtocols::Deny, ..Options::default() };
    insta::assert_snapshot!(shown(&options, Stage::In));
}

/// Numbers that other programs on nodes and in pods use: (what, first, last).
const PRIORITIES: [(&str, u32, u32); 6] = [
    ("the kernel's local table", 0, 0),
    ("Cilium", 9, 9),
    ("Cilium, and the CNI plugin sbr", 100, 112),
    ("AWS VPC CNI", 512, 1536),
    ("Tailscale", 5210, 5270),
    ("given by default, downwards, and Istio's", 32000, 32767),
];
const TABLES: [(&str, u32, u32); 5] = [
    ("none, Tailscale and those of small numbers", 0, 99),
    ("the CNI plugin sbr, counting from 100", 100, 65_535),
    ("the kernel's: default, main, local", 253, 255),
    ("Cilium", 2004, 2005),
    ("systemd-networkd and NetworkManager for VRFs", 1_000_000, 1_999_999),
];

#[test]
fn rule_and_table_are_numbers_that_nobody_else_uses() {
    for (numbers, ours) in [(&PRIORITIES[..], ROUTE_PRIORITY), (&TABLES[..], ROUTE_TABLE)] {
        for (who, first, last) in numbers {
            assert!(!(*first..=*last).contains(&ours), "{ours} is of {who}");
        }
    }
    let routes = plan(&Options::default(), Stage::In).routes;
    assert!(
        routes.iter().all(|route| (route.priority, route.table) == (ROUTE_PRIORITY, ROUTE_TABLE)),
        "{routes:?}"
    );
}
