//! What a pod's namespace is planned to contain, as people read it. Needs no root.

use ambit_node::listeners::wanted;
use ambit_node::redirect::{Options, OtherProtocols, Plan, Stage, plan};

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
