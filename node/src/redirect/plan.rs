//! What a pod's namespace is to contain, decided without looking at it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ambit_net::{Family, MARK_MASK, PROXY_CONNMARK, PROXY_MARK};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::nft::{
    Action, Chain, ChainKind, Compare, Hook, HookPoint, Match, Protocol, Rule as NftRule, Table,
};
use crate::ports;

/// The name of our table in a pod's namespace.
pub const TABLE: &str = "ambit";
/// Priority of the routing rule (kubernetes.md, "The node").
pub const ROUTE_PRIORITY: u32 = 32764;
/// The routing table of packets that the proxy's connections brought back.
pub const ROUTE_TABLE: u32 = 100;
/// Stands for kubelet probes after translation on the host (contracts.md, section 1).
pub const PROBE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
/// The same for IPv6.
pub const PROBE_V6: Ipv6Addr = Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);
/// The zone in which the proxy's own DNS datagrams are tracked.
const DNS_ZONE: u16 = 1;
/// The zone of the proxy's connections to the application, in the direction of their first packet.
const APPLICATION_ZONE: u16 = 2;

/// The flag RST (RFC 9293 §3.1).
const TCP_RST: u8 = 0x04;

const RAW: i32 = -300;
const MANGLE: i32 = -150;
const DSTNAT: i32 = -100;

/// What a pod asks for, by its annotations and the settings of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Options {
    /// Whether DNS is answered by the proxy (`ambient.istio.io/dns-capture`).
    pub dns_capture: bool,
    /// Whether inbound connections are captured (not `ambient.istio.io/bypass-inbound-capture`).
    pub inbound_capture: bool,
    /// Interfaces inside the pod whose incoming connections are outbound ones of the pod
    /// (`istio.io/reroute-virtual-interfaces`).
    pub virtual_interfaces: Vec<String>,
    /// Whether the proxy offers SOCKS5 in the pod.
    pub socks5: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { dns_capture: true, inbound_capture: true, virtual_interfaces: Vec::new(), socks5: false }
    }
}

/// How far a pod is in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Stage {
    /// New connections are redirected.
    In,
    /// New connections are not redirected; those that are tunnelled still find their way.
    Leaving,
}

/// The whole of a pod's redirection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The rules of packets.
    pub table: Table,
    /// What is to stand in place of `table` until tracking knows every connection that is older: as `table`, but what
    /// it does not know passes.
    pub opening: Option<Table>,
    /// The rules of routing.
    pub routes: Vec<LocalRoute>,
    /// The kernel's settings.
    pub settings: &'static [Setting],
}

/// A setting of the kernel in the namespace (sysctl(8)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// Its name, as of sysctl(8).
    pub name: &'static str,
    /// What it is to be.
    pub value: u32,
    /// What it is in a new namespace.
    pub default: u32,
    /// What is no longer guaranteed without it.
    pub guarantee: &'static str,
}

/// What the kernel is to do with every connection of a pod in the mesh.
const SETTINGS: [Setting; 4] = [
    // An accepted connection bears the mark of its first packet and so finds the way back to the proxy, whatever
    // becomes of its tracking: without, an answer would leave the pod in the clear. And its packets need no second
    // look-up of their route. `mangle_prerouting` chooses the mark.
    Setting {
        name: "net.ipv4.tcp_fwmark_accept",
        value: 1,
        default: 0,
        guarantee: "answers of an application stay encrypted when connection tracking loses the connection",
    },
    // What has ended on one side may go on for long on the other. Forgotten, it would no longer be translated, and go
    // to the wire. An hour is what kube-proxy sets on the host; the proxy's keepalive probes are 75 s apart at most.
    Setting {
        name: "net.netfilter.nf_conntrack_tcp_timeout_close_wait",
        value: 3600,
        default: 60,
        guarantee: "a half-closed connection may be silent for more than a minute",
    },
    // Neither of the two ends, both here, sends anything any more. Two minutes of them fill the tracking table (262,144
    // entries) at 2,200 connections a second, and it then refuses new ones.
    Setting {
        name: "net.netfilter.nf_conntrack_tcp_timeout_time_wait",
        value: 10,
        default: 120,
        guarantee: "more than 2,000 new connections a second can be tracked",
    },
    // Redirected, each of the pod's connections has both ends here, as those over loopback have, to which the kernel
    // itself gives the port of one that ended a second ago where timestamps tell the two apart (RFC 7323, PAWS). Else a
    // client of one port of one server has 28,000 a minute, and each beyond takes a search of a millisecond.
    Setting {
        name: "net.ipv4.tcp_tw_reuse",
        value: 1,
        default: 2,
        guarantee: "a client can open more than 28,000 connections a minute to one port of one server",
    },
];

/// Packets with a mark are delivered locally, whatever their destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalRoute {
    /// IPv4 or IPv6.
    pub family: Family,
    /// The mark, under [`MARK_MASK`].
    pub mark: u32,
    /// Priority of the rule.
    pub priority: u32,
    /// The routing table, which holds one route: everything is local, on `lo`.
    pub table: u32,
}

/// Decides what a pod's namespace is to contain. The rules are those of kubernetes.md, "The node", in
/// that order.
pub fn plan(options: &Options, stage: Stage) -> Plan {
    let route =
        |family| LocalRoute { family, mark: PROXY_CONNMARK, priority: ROUTE_PRIORITY, table: ROUTE_TABLE };
    let (table, opening) = match stage {
        Stage::In => (table(options, stage, Unknown::Captured), Some(table(options, stage, Unknown::Passes))),
        Stage::Leaving => (table(options, stage, Unknown::Passes), None),
    };
    Plan { table, opening, routes: vec![route(Family::V4), route(Family::V6)], settings: &SETTINGS }
}

/// What becomes of what an application sends in the middle of an outgoing connection that tracking does not know. It is
/// older than the rules, or its entry was lost: flushed, timed out, dropped when the table was full. Sent on as it is,
/// it would leave the pod in the clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unknown {
    /// It goes out as it is.
    Passes,
    /// It goes where its first packet would. The proxy's end takes it up, as its addresses are again those
    /// that it had; where there is none, the kernel answers with a reset. What fits no connection is dropped.
    Captured,
}

impl Unknown {
    /// The packets whose way is chosen.
    fn captured(self) -> Option<Match> {
        (self == Self::Passes).then_some(Match::TcpFirst)
    }
}

fn table(options: &Options, stage: Stage, unknown: Unknown) -> Table {
    let mut chains = Vec::new();
    let mut raw_prerouting = tunnels_in(&options.virtual_interfaces);
    let mut raw_output = vec![to_application()];
    raw_output.extend(tunnels_out());
    if options.dns_capture {
        raw_prerouting.extend(dns_replies());
        raw_output.extend(dns_questions());
    }
    chains.push(chain("raw_prerouting", ChainKind::Filter, HookPoint::Prerouting, RAW, raw_prerouting));
    chains.push(chain("raw_output", ChainKind::Filter, HookPoint::Output, RAW, raw_output));
    chains.push(chain(
        "mangle_prerouting",
        ChainKind::Filter,
        HookPoint::Prerouting,
        MANGLE,
        vec![
            NftRule::new(
                [marked(Compare::Is)],
                Action::SetConnMark { value: PROXY_CONNMARK, mask: MARK_MASK },
                "connections of the proxy",
            ),
            NftRule::new(
                [Match::Protocol(Protocol::Tcp), Match::TcpFirst, marked(Compare::Is)],
                Action::SetMark { value: PROXY_CONNMARK, mask: MARK_MASK },
                "the application's end of them",
            ),
        ],
    ));
    let mut mangle_output = vec![NftRule::new(
        // What the proxy itself sends finds its way without; a change of mark has the kernel look up the
        // route of each packet again.
        [from_proxy(), marked(Compare::IsNot)],
        Action::SetMark { value: PROXY_CONNMARK, mask: MARK_MASK },
        "answers to the proxy",
    )];
    if unknown == Unknown::Captured {
        mangle_output.push(fits_no_connection());
    }
    chains.push(chain("mangle_output", ChainKind::Route, HookPoint::Output, MANGLE, mangle_output));
    // The chains of an empty stage stay: without them the kernel would stop translating what is open.
    let (inbound, outbound) = match stage {
        Stage::In => (inbound(options), outbound(options, unknown)),
        Stage::Leaving => (Vec::new(), Vec::new()),
    };
    chains.push(chain("nat_prerouting", ChainKind::Nat, HookPoint::Prerouting, DSTNAT, inbound));
    chains.push(chain("nat_output", ChainKind::Nat, HookPoint::Output, DSTNAT, outbound));
    Table { name: TABLE.into(), chains }
}

fn chain(name: &str, kind: ChainKind, point: HookPoint, priority: i32, rules: Vec<NftRule>) -> Chain {
    Chain { name: name.into(), hook: Some(Hook { kind, point, priority }), rules }
}

/// The proxy dials the application from the client's address and a port that the kernel picks, which
/// may be the very port of a connection that the client itself has to the same application, captured or
/// older than the rules. In one zone the two would be taken for one connection.
fn to_application() -> NftRule {
    NftRule::new(
        [
            Match::Protocol(Protocol::Tcp),
            Match::OutputInterface(Compare::Is, "lo".into()),
            marked(Compare::Is),
        ],
        Action::ZoneOfOriginal(APPLICATION_ZONE),
        "connections to the application",
    )
}

/// Connections between proxies are neither translated nor marked, so tracking them would only cost, with
/// every packet. What a virtual interface brings in is the pod's own and may have to be translated.
fn tunnels_in(virtual_interfaces: &[String]) -> Vec<NftRule> {
    let from_outside = std::iter::once("lo")
        .chain(virtual_interfaces.iter().map(String::as_str))
        .map(|name| Match::InputInterface(Compare::IsNot, name.into()));
    let matches: Vec<Match> = from_outside.chain([Match::Protocol(Protocol::Tcp)]).collect();
    let rule = |port, what| {
        let matches: Vec<Match> = matches.iter().cloned().chain([port]).collect();
        NftRule::new(matches, Action::Untracked, what)
    };
    vec![
        rule(to_port(ports::INBOUND_HBONE), "tunnels to the pod"),
        rule(Match::SourcePort(Compare::Is, ports::INBOUND_HBONE), "tunnels of the pod"),
    ]
}

/// The other direction of [`tunnels_in`].
fn tunnels_out() -> Vec<NftRule> {
    let rule = |port, what| {
        NftRule::new(
            [
                Match::Protocol(Protocol::Tcp),
                Match::OutputInterface(Compare::IsNot, "lo".into()),
                port,
                marked(Compare::Is),
            ],
            Action::Untracked,
            what,
        )
    };
    vec![
        rule(to_port(ports::INBOUND_HBONE), "tunnels of the pod"),
        rule(Match::SourcePort(Compare::Is, ports::INBOUND_HBONE), "tunnels to the pod"),
    ]
}

/// Chains of translation do not see what tracking made nothing of, such as the end of a connection that it does not
/// know, or what is beyond a window. A reset bears no data, and is how the kernel answers on a tunnel that is gone.
fn fits_no_connection() -> NftRule {
    NftRule::new(
        [
            Match::Invalid,
            Match::Protocol(Protocol::Tcp),
            Match::TcpFlags { mask: TCP_RST, value: 0 },
            Match::OutputInterface(Compare::IsNot, "lo".into()),
            marked(Compare::IsNot),
        ],
        Action::Drop,
        "what fits no connection",
    )
}

/// Replies to the proxy's own questions do not meet the application's entries: an application may ask
/// from the same port.
fn dns_questions() -> Vec<NftRule> {
    vec![NftRule::new(
        [Match::Protocol(Protocol::Udp), to_port(53), marked(Compare::Is)],
        Action::Zone(DNS_ZONE),
        "questions of the proxy",
    )]
}

fn dns_replies() -> Vec<NftRule> {
    vec![NftRule::new(
        [Match::Protocol(Protocol::Udp), Match::SourcePort(Compare::Is, 53), marked(Compare::IsNot)],
        Action::Zone(DNS_ZONE),
        "answers to the proxy",
    )]
}

fn inbound(options: &Options) -> Vec<NftRule> {
    let mut rules: Vec<NftRule> = families()
        .map(|family| {
            NftRule::new([Match::Source(Compare::Is, family.probe)], Action::Accept, "kubelet probes")
        })
        .collect();
    rules.push(NftRule::new([from_proxy()], Action::Accept, "connections of the proxy"));
    for name in &options.virtual_interfaces {
        let from_inside = Match::InputInterface(Compare::Is, name.clone());
        rules.push(NftRule::new(
            [from_inside.clone(), Match::Protocol(Protocol::Tcp), Match::TcpFirst],
            Action::Redirect(ports::OUTBOUND),
            "outbound of a virtual interface",
        ));
        rules.push(NftRule::new([from_inside], Action::Accept, "the rest of a virtual interface"));
    }
    if options.inbound_capture {
        rules.extend(families().map(|family| {
            NftRule::new(
                [
                    family.not_loopback(),
                    Match::Protocol(Protocol::Tcp),
                    Match::TcpFirst,
                    Match::DestinationPort(Compare::IsNot, ports::INBOUND_HBONE),
                ],
                Action::Redirect(ports::INBOUND_PLAINTEXT),
                "inbound",
            )
        }));
    }
    rules
}

fn outbound(options: &Options, unknown: Unknown) -> Vec<NftRule> {
    let tcp = |first: Match, rest: &[Match]| -> Vec<Match> {
        [first, Match::Protocol(Protocol::Tcp)]
            .into_iter()
            .chain(unknown.captured())
            .chain(rest.iter().cloned())
            .chain([marked(Compare::IsNot)])
            .collect()
    };
    let mut rules: Vec<NftRule> = families()
        .map(|family| {
            NftRule::new([Match::Destination(Compare::Is, family.probe)], Action::Accept, "kubelet probes")
        })
        .collect();
    if options.dns_capture {
        for family in families() {
            rules.push(NftRule::new(
                [
                    family.not_loopback(),
                    Match::Protocol(Protocol::Udp),
                    to_port(53),
                    Match::OutputInterface(Compare::IsNot, "lo".into()),
                    marked(Compare::IsNot),
                ],
                Action::Redirect(ports::DNS),
                "DNS",
            ));
            rules.push(NftRule::new(
                tcp(family.not_loopback(), &[to_port(53)]),
                Action::Redirect(ports::DNS),
                "DNS",
            ));
        }
    }
    rules.push(NftRule::new([from_proxy()], Action::Accept, "answers to the proxy"));
    for family in families() {
        rules.push(NftRule::new(
            [family.not_loopback(), Match::OutputInterface(Compare::Is, "lo".into())],
            Action::Accept,
            "to another own address",
        ));
    }
    rules.extend(families().map(|family| {
        NftRule::new(tcp(family.not_loopback(), &[]), Action::Redirect(ports::OUTBOUND), "outbound")
    }));
    rules
}

/// The addresses that differ between the families.
struct Addresses {
    probe: IpNet,
    loopback: IpNet,
}

impl Addresses {
    fn not_loopback(&self) -> Match {
        Match::Destination(Compare::IsNot, self.loopback)
    }
}

fn families() -> impl Iterator<Item = Addresses> {
    [
        (IpAddr::V4(PROBE_V4), IpAddr::V4(Ipv4Addr::LOCALHOST)),
        (IpAddr::V6(PROBE_V6), IpAddr::V6(Ipv6Addr::LOCALHOST)),
    ]
    .into_iter()
    .map(|(probe, loopback)| Addresses { probe: probe.into(), loopback: loopback.into() })
}

fn marked(compare: Compare) -> Match {
    Match::Mark { compare, value: PROXY_MARK, mask: MARK_MASK }
}

fn from_proxy() -> Match {
    Match::ConnMark { compare: Compare::Is, value: PROXY_CONNMARK, mask: MARK_MASK }
}

fn to_port(port: u16) -> Match {
    Match::DestinationPort(Compare::Is, port)
}
