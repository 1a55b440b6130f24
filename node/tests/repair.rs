//! Rules that differ from the plan, and routing that belongs to others, in real namespaces. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ambit_net::conntrack::Conntrack;
use ambit_net::{Netns, PROXY_MARK, SocketStock, connect_local};
use ambit_node::nft::{
    self, Action, Chain, ChainKind, Compare, Difference, Hook, HookPoint, Match, Protocol, Rule, Table,
};
use ambit_node::redirect::{self, Fault, FormerSettings, Options, Stage, plan};
use common::pair;
use common::raw::Wire;
use common::traffic::{Proxy, SOON, accept, apply, dial, listen, talk};
use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteScope, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{IpVersion, RouteMessageBuilder};
use socket2::{Domain, Socket, Type};

/// The rules of the first version, which redirected first packets only.
fn first_version() -> Table {
    let mark = |compare| Match::Mark { compare, value: 0x539, mask: 0xfff };
    let of_proxy = Match::ConnMark { compare: Compare::Is, value: 0x111, mask: 0xfff };
    let tcp = Match::Protocol(Protocol::Tcp);
    let out = |compare| Match::OutputInterface(compare, "lo".into());
    let loopbacks = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    let beyond = |loopback: IpAddr| Match::Destination(Compare::IsNot, loopback.into());
    let set_mark = Action::SetMark { value: 0x111, mask: 0xfff };
    let base = |name: &str, kind, point, priority, rules| Chain {
        name: name.into(),
        hook: Some(Hook { kind, point, priority }),
        rules,
    };
    let mut outbound = vec![Rule::new([of_proxy.clone()], Action::Accept, "answers to the proxy")];
    let mut inbound = vec![Rule::new([of_proxy.clone()], Action::Accept, "connections of the proxy")];
    for loopback in loopbacks {
        outbound.push(Rule::new([beyond(loopback), out(Compare::Is)], Action::Accept, "own address"));
        outbound.push(Rule::new(
            [beyond(loopback), tcp.clone(), mark(Compare::IsNot)],
            Action::Redirect(15001),
            "outbound",
        ));
        inbound.push(Rule::new(
            [beyond(loopback), tcp.clone(), Match::TcpFirst, Match::DestinationPort(Compare::IsNot, 15008)],
            Action::Redirect(15006),
            "inbound",
        ));
    }
    Table {
        name: redirect::TABLE.into(),
        chains: vec![
            base(
                "raw_output",
                ChainKind::Filter,
                HookPoint::Output,
                -300,
                vec![Rule::new(
                    [tcp.clone(), out(Compare::Is), mark(Compare::Is)],
                    Action::ZoneOfOriginal(2),
                    "connections to the application",
                )],
            ),
            base(
                "mangle_prerouting",
                ChainKind::Filter,
                HookPoint::Prerouting,
                -150,
                vec![
                    Rule::new(
                        [mark(Compare::Is)],
                        Action::SetConnMark { value: 0x111, mask: 0xfff },
                        "connections of the proxy",
                    ),
                    Rule::new([tcp, Match::TcpFirst, mark(Compare::Is)], set_mark.clone(), "first packets"),
                ],
            ),
            base(
                "mangle_output",
                ChainKind::Route,
                HookPoint::Output,
                -150,
                vec![Rule::new([of_proxy, mark(Compare::IsNot)], set_mark, "answers to the proxy")],
            ),
            base("nat_prerouting", ChainKind::Nat, HookPoint::Prerouting, -100, inbound),
            base("nat_output", ChainKind::Nat, HookPoint::Output, -100, outbound),
        ],
    }
}

/// Even those that tracking has lost: they are not taken for connections older than the enrolment.
#[tokio::test]
async fn captured_connections_stay_captured_through_an_upgrade() {
    let (outside, pod) = pair().await;
    let mut older = Vec::new();
    for (theirs, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        for (from, to, ip) in [(&pod, &outside, theirs), (&outside, &pod, own)] {
            let server = listen(&to.netns, SocketAddr::new(ip, 9000)).await;
            let client = dial(&from.netns, SocketAddr::new(ip, 9000)).await;
            older.push((client, accept(&server).await.0));
        }
    }
    apply(&pod, Stage::In).await;
    nft::apply(&pod.netns, first_version()).await.unwrap();
    for message in first_routing() {
        message.add(&pod.netns).await;
    }
    let proxy = Proxy::in_pod(&pod).await;
    let stock = SocketStock::new(pod.netns.clone(), Some(PROXY_MARK));
    let mut conntrack = Conntrack::open(&pod.netns).await.unwrap();
    let (mut captured, mut ports) = (Vec::new(), Vec::new());
    for (theirs, own) in outside.addresses().into_iter().zip(pod.addresses()) {
        let to = SocketAddr::new(theirs, 9080);
        let client = dial(&pod.netns, to).await;
        let local = client.local_addr().unwrap();
        captured.push((client, accept(&proxy.tcp(15001, theirs)).await.0));
        assert!(conntrack.delete_tcp(local, to).await.unwrap(), "{local} was tracked");
        ports.push(local.port());

        let to = SocketAddr::new(own, 9080);
        captured.push((dial(&outside.netns, to).await, accept(&proxy.tcp(15006, own)).await.0));

        let application = listen(&pod.netns, to).await;
        let proxied = connect_local(&stock, Some(SocketAddr::new(theirs, 0)), to, SOON).await.unwrap();
        captured.push((proxied, accept(&application).await.0));
        ports.push(to.port());
    }
    let mut wire = Wire::open(&outside.netns).await;
    let faults = apply(&pod, Stage::In).await;
    assert!(matches!(faults[..], [Fault::Rules(_)]), "{faults:?}");
    for (client, taken) in captured.iter_mut().chain(&mut older) {
        talk(client, taken).await;
        talk(taken, client).await;
    }
    let leaked: Vec<_> = wire
        .seen()
        .into_iter()
        .filter(|seen| pod.addresses().contains(&seen.from.ip()) && ports.contains(&seen.from.port()))
        // What the proxy answers a captured client looks like this, and is meant to.
        .filter(|seen| {
            seen.from.port() != 9080 || !captured.iter().any(|(c, _)| c.local_addr().unwrap() == seen.to)
        })
        .collect();
    assert!(leaked.is_empty(), "{leaked:?}");
    for message in first_routing() {
        assert!(!message.is_there(&pod.netns).await, "a route of the first version is left");
    }
}

#[tokio::test]
async fn a_dormant_table_is_found_and_repaired() {
    let (_outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    set_dormant(&pod.netns).await;
    let wanted = plan(&Options::default(), Stage::In);
    assert_eq!(redirect::verify(&pod.netns, &wanted).await.unwrap(), [Fault::Rules(Difference::Dormant)]);
    assert_eq!(apply(&pod, Stage::In).await, [Fault::Rules(Difference::Dormant)]);
    assert_eq!(redirect::verify(&pod.netns, &wanted).await.unwrap(), []);
}

/// The CNI plugin sbr takes the first free table from 100 on.
#[tokio::test]
async fn routes_of_others_are_left_alone() {
    let (outside, pod) = pair().await;
    let theirs = Routing {
        rule: RuleMessage::default(),
        route: RouteMessageBuilder::<Ipv4Addr>::new().gateway(outside.v4).table_id(100).build(),
    };
    theirs.add_route(&pod.netns).await;
    let is_there = async || {
        let routes = routes(&pod.netns, AddressFamily::Inet).await;
        routes.iter().any(|route| {
            route.header.table == 100
                && route.attributes.contains(&RouteAttribute::Gateway(outside.v4.into()))
        })
    };
    assert!(is_there().await);
    apply(&pod, Stage::In).await;
    assert!(is_there().await);
    nft::apply(&pod.netns, first_version()).await.unwrap();
    apply(&pod, Stage::In).await;
    assert!(is_there().await);
    redirect::remove(&pod.netns, &FormerSettings::default()).await.unwrap();
    assert!(is_there().await);
}

/// A routing rule that comes before ours sends answers to the proxy elsewhere; they do not leave the pod.
#[tokio::test]
async fn answers_that_are_routed_elsewhere_do_not_leave() {
    let (outside, pod) = pair().await;
    apply(&pod, Stage::In).await;
    let stock = SocketStock::new(pod.netns.clone(), Some(PROXY_MARK));
    let to = SocketAddr::new(pod.v4.into(), 9080);
    let application = listen(&pod.netns, to).await;
    let client = Some(SocketAddr::new(outside.v4.into(), 0));
    let mut proxied = connect_local(&stock, client, to, SOON).await.unwrap();
    let mut taken = accept(&application).await.0;
    talk(&mut proxied, &mut taken).await;
    let mut first = RuleMessage::default();
    first.header.family = AddressFamily::Inet;
    first.header.action = RuleAction::ToTable;
    first.attributes = vec![RuleAttribute::Priority(1), RuleAttribute::Table(254)];
    let (link, driver) = common::netlink(&pod.netns).await;
    let mut add = link.rule().add();
    *add.message_mut() = first;
    add.execute().await.unwrap();
    driver.abort();
    let mut wire = Wire::open(&outside.netns).await;
    taken.try_write(b"answer").unwrap();
    // What comes after on the same wire.
    let server = listen(&outside.netns, SocketAddr::new(outside.v4.into(), 9081)).await;
    let marked = ambit_net::connect(&stock, server.local_addr().unwrap(), SOON).await.unwrap();
    drop(marked);
    let leaked: Vec<_> = wire.seen().into_iter().filter(|seen| seen.from.port() == 9080).collect();
    assert!(leaked.is_empty(), "{leaked:?}");
}

/// A routing rule and the route of its table.
struct Routing {
    rule: RuleMessage,
    route: RouteMessage,
}

/// As the first version had it: priority 32764, table 100.
fn first_routing() -> [Routing; 2] {
    let rule = |family| {
        let mut rule = RuleMessage::default();
        rule.header.family = family;
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![
            RuleAttribute::Priority(32764),
            RuleAttribute::FwMark(0x111),
            RuleAttribute::FwMask(0xfff),
            RuleAttribute::Table(100),
        ];
        rule
    };
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::UNSPECIFIED, 0);
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(Ipv6Addr::UNSPECIFIED, 0);
    [
        Routing {
            rule: rule(AddressFamily::Inet),
            route: v4
                .output_interface(1)
                .table_id(100)
                .kind(RouteType::Local)
                .scope(RouteScope::Host)
                .build(),
        },
        Routing {
            rule: rule(AddressFamily::Inet6),
            route: v6
                .output_interface(1)
                .table_id(100)
                .kind(RouteType::Local)
                .scope(RouteScope::Host)
                .build(),
        },
    ]
}

impl Routing {
    async fn add(&self, inside: &Netns) {
        let (link, driver) = common::netlink(inside).await;
        let mut add = link.rule().add();
        *add.message_mut() = self.rule.clone();
        add.execute().await.unwrap();
        driver.abort();
        self.add_route(inside).await;
    }

    async fn add_route(&self, inside: &Netns) {
        let (link, driver) = common::netlink(inside).await;
        link.route().add(self.route.clone()).execute().await.unwrap();
        driver.abort();
    }

    async fn is_there(&self, inside: &Netns) -> bool {
        let family = self.rule.header.family;
        let (link, driver) = common::netlink(inside).await;
        let version = if family == AddressFamily::Inet { IpVersion::V4 } else { IpVersion::V6 };
        let rules: Vec<RuleMessage> = link.rule().get(version).execute().try_collect().await.unwrap();
        driver.abort();
        rules.iter().any(|rule| rule.attributes.contains(&RuleAttribute::Priority(32764)))
            || routes(inside, family).await.iter().any(|route| route.header.table == 100)
    }
}

async fn routes(inside: &Netns, family: AddressFamily) -> Vec<RouteMessage> {
    let (link, driver) = common::netlink(inside).await;
    let mut filter = RouteMessage::default();
    filter.header.address_family = family;
    let listed = link.route().get(filter).execute().try_collect().await.unwrap();
    driver.abort();
    listed
}

/// What `nft add table inet ambit '{ flags dormant; }'` sends.
async fn set_dormant(inside: &Netns) {
    let message = |kind: u16, flags: u16, family: u8, resource: u16, attributes: &[u8]| {
        let mut bytes = (20 + attributes.len() as u32).to_ne_bytes().to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, family, 0]);
        bytes.extend_from_slice(&resource.to_be_bytes());
        bytes.extend_from_slice(attributes);
        bytes
    };
    let mut name_and_flags = vec![10, 0, 1, 0];
    name_and_flags.extend_from_slice(b"ambit\0\0\0");
    name_and_flags.extend_from_slice(&[8, 0, 2, 0, 0, 0, 0, 1]);
    let mut batch = message(0x10, 1, 0, 10, &[]);
    batch.extend(message(0x0a00, 0x5, 1, 0, &name_and_flags));
    batch.extend(message(0x11, 1, 0, 10, &[]));
    let open = || Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(12.into()));
    let socket = inside.run(open).await.unwrap().unwrap();
    socket.send(&batch).unwrap();
    let mut answer = [0; 1024];
    let len = std::io::Read::read(&mut &socket, &mut answer).unwrap();
    assert!(len >= 20 && answer[16..20] == [0; 4], "{:?}", &answer[..len]);
}
