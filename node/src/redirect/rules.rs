//! The packet rules of a pod's namespace, as one table. Pure: [`plan`](super::plan) chooses the arguments.
//!
//! The proxy's sockets mark their packets with [`PROXY_MARK`]. Those that stay in the pod come back by `lo`, where their
//! connection gets [`PROXY_CONNMARK`], and so does what the application answers, which is then routed to `lo` again.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ambit_net::{MARK_MASK, PROXY_CONNMARK, PROXY_MARK};
use ipnet::IpNet;

use super::plan::{COMPLETE, Options, OtherProtocols, PROBE_V4, PROBE_V6, TABLE};
use crate::nft::{Action, Chain, ChainKind, Compare, Hook, HookPoint, Match, Protocol, Rule, Table};
use ambit_api::ports;

/// The zone of the proxy's own DNS questions, in the direction of the question.
const DNS_ZONE: u16 = 1;
/// The zone of the proxy's connections to the application, in the direction of their first packet.
const APPLICATION_ZONE: u16 = 2;

/// The chain of TCP packets that do not come from `lo`.
const FROM_OUTSIDE: &str = "from_outside";
/// The chain of TCP packets of applications that do not go to `lo`.
const FROM_APPLICATION: &str = "from_application";

/// The flag RST (RFC 9293 §3.1).
const TCP_RST: u8 = 0x04;

const RAW: i32 = -300;
const MANGLE: i32 = -150;
const DSTNAT: i32 = -100;
const FILTER: i32 = 0;

/// Which connections are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Capture {
    /// New ones only, since connections older than the rules may be unknown to tracking. A packet in the middle of an
    /// unknown connection leaves the pod as it is; none comes in.
    First,
    /// Every connection that tracking does not know: it is new, or its entry was lost (flushed, timed out, dropped
    /// when the table was full). The proxy's end takes a lost one up, as its addresses are again those that it had;
    /// where there is none, the kernel answers with a reset.
    Unknown,
    /// None. Captured connections are still translated.
    Nothing,
}

impl Capture {
    /// The TCP packets that are captured when they begin a tracking entry.
    fn packets(self) -> Option<Match> {
        (self == Self::First).then_some(Match::TcpFirst)
    }
}

/// The table of a pod with these options.
pub(super) fn table(options: &Options, capture: Capture) -> Table {
    let (inbound, outbound) = match capture {
        // The chains stay when they are empty: without them the kernel would stop translating open connections.
        Capture::Nothing => (Vec::new(), Vec::new()),
        Capture::First | Capture::Unknown => (inbound(options, capture), outbound(options, capture)),
    };
    let mut chains = Vec::new();
    if capture != Capture::Nothing {
        chains.push(side_chain(FROM_OUTSIDE, from_outside(options, capture)));
        chains.push(side_chain(FROM_APPLICATION, from_application(capture)));
    }
    chains.extend([
        chain("raw_prerouting", ChainKind::Filter, HookPoint::Prerouting, RAW, raw_prerouting(options)),
        chain("raw_output", ChainKind::Filter, HookPoint::Output, RAW, raw_output(options)),
        chain(
            "mangle_prerouting",
            ChainKind::Filter,
            HookPoint::Prerouting,
            MANGLE,
            mangle_prerouting(options, capture),
        ),
        chain("mangle_output", ChainKind::Route, HookPoint::Output, MANGLE, mangle_output(options, capture)),
        chain("nat_prerouting", ChainKind::Nat, HookPoint::Prerouting, DSTNAT, inbound),
        chain("nat_output", ChainKind::Nat, HookPoint::Output, DSTNAT, outbound),
        chain(
            "filter_postrouting",
            ChainKind::Filter,
            HookPoint::Postrouting,
            FILTER,
            filter_postrouting(options, capture),
        ),
    ]);
    if capture == Capture::Unknown {
        chains.push(side_chain(COMPLETE, Vec::new()));
    }
    Table { name: TABLE.into(), chains }
}

fn chain(name: &str, kind: ChainKind, point: HookPoint, priority: i32, rules: Vec<Rule>) -> Chain {
    Chain { name: name.into(), hook: Some(Hook { kind, point, priority }), rules }
}

/// A chain that packets enter only by a jump.
fn side_chain(name: &str, rules: Vec<Rule>) -> Chain {
    Chain { name: name.into(), hook: None, rules }
}

/// Tunnels are neither translated nor marked, so tracking them would only cost with every packet. What a virtual
/// interface brings in belongs to the pod and may have to be translated.
///
/// A packet from port 15008 is part of one of the pod's tunnels only if the proxy has a socket for it: clients may have
/// that source port too, and their packets have to be tracked to be captured.
fn raw_prerouting(options: &Options) -> Vec<Rule> {
    let from_outside: Vec<Match> = std::iter::once("lo")
        .chain(options.virtual_interfaces.iter().map(String::as_str))
        .map(|name| Match::InputInterface(Compare::IsNot, name.into()))
        .chain([Match::Protocol(Protocol::Tcp)])
        .collect();
    let untracked = |matches: &[Match], what| {
        let matches: Vec<Match> = from_outside.iter().chain(matches).cloned().collect();
        Rule::new(matches, Action::Untracked, what)
    };
    vec![
        untracked(&[to_port(ports::INBOUND_HBONE)], "tunnels to the pod"),
        untracked(
            &[
                Match::SourcePort(Compare::Is, ports::INBOUND_HBONE),
                Match::TcpLater,
                Match::DestinationPort(Compare::IsNot, ports::INBOUND_PLAINTEXT),
                Match::SocketMark { value: PROXY_MARK, mask: MARK_MASK },
            ],
            "tunnels of the pod",
        ),
    ]
}

fn raw_output(options: &Options) -> Vec<Rule> {
    let mut rules = vec![Rule::new(
        // The proxy dials the application from the client's address and maybe its port, which may be those of a
        // connection that the client itself has to the same application, captured or older than the rules. In one
        // zone the two would be taken for one connection.
        [
            Match::Protocol(Protocol::Tcp),
            Match::OutputInterface(Compare::Is, "lo".into()),
            marked(Compare::Is),
        ],
        Action::ZoneOfOriginal(APPLICATION_ZONE),
        "connections to the application",
    )];
    let mut tunnel = vec![
        Match::Protocol(Protocol::Tcp),
        Match::OutputInterface(Compare::IsNot, "lo".into()),
        marked(Compare::Is),
    ];
    let to_pod = Match::SourcePort(Compare::Is, ports::INBOUND_HBONE);
    rules.push(Rule::new(with(&tunnel, [to_pod]), Action::Untracked, "tunnels to the pod"));
    // Captured clients may have the source port 15008.
    tunnel
        .extend([to_port(ports::INBOUND_HBONE), Match::SourcePort(Compare::IsNot, ports::INBOUND_PLAINTEXT)]);
    if !options.virtual_interfaces.is_empty() {
        tunnel.push(Match::SourcePort(Compare::IsNot, ports::OUTBOUND));
    }
    rules.push(Rule::new(tunnel, Action::Untracked, "tunnels of the pod"));
    if options.dns_capture {
        // An application may ask the same resolver from the same port.
        rules.push(Rule::new(
            [Match::Protocol(Protocol::Udp), to_port(53), marked(Compare::Is)],
            Action::ZoneOfOriginal(DNS_ZONE),
            "questions of the proxy",
        ));
    }
    rules
}

fn mangle_prerouting(options: &Options, capture: Capture) -> Vec<Rule> {
    let mut rules = vec![Rule {
        matches: vec![Match::InputInterface(Compare::Is, "lo".into()), marked(Compare::Is)],
        actions: vec![
            Action::SetConnMark { value: PROXY_CONNMARK, mask: MARK_MASK },
            // An accepted connection takes the mark of a packet (`tcp_fwmark_accept`): of the first, or, made from a
            // SYN cookie, of any later one.
            Action::SetMark { value: PROXY_CONNMARK, mask: MARK_MASK },
        ],
        comment: "connections of the proxy".into(),
    }];
    if capture != Capture::Nothing {
        rules.push(Rule::new(
            [Match::InputInterface(Compare::IsNot, "lo".into()), Match::Protocol(Protocol::Tcp)],
            Action::Jump(FROM_OUTSIDE.into()),
            "TCP from outside",
        ));
    }
    if denies_others(options, capture) {
        let from_outside = Match::InputInterface(Compare::IsNot, "lo".into());
        rules.push(Rule::new(
            [Match::Protocol(Protocol::Udp), from_proxy()],
            Action::Accept,
            "answers to questions of the proxy",
        ));
        rules.push(Rule::new(other_protocols([from_outside]), Action::Drop, "other protocols"));
    }
    rules
}

/// Nat chains see the packets that begin a tracking entry, and only those. The rest must not get to the application:
/// packets that begin none, and first packets of TCP for which there is an entry that is not translated. The latter are
/// left by connections older than the rules, and would let a new connection pass as the old one.
fn from_outside(options: &Options, capture: Capture) -> Vec<Rule> {
    let mut rules = vec![
        Rule::new([Match::Untracked], Action::Return, "tunnels"),
        Rule::new(
            [
                Match::Invalid,
                Match::Protocol(Protocol::Tcp),
                Match::SourcePort(Compare::Is, ports::INBOUND_HBONE),
            ],
            Action::Reject,
            "tunnels that the proxy no longer has",
        ),
        Rule::new([Match::Invalid], Action::Drop, "what fits no connection"),
    ];
    if capture == Capture::First || !options.inbound_capture {
        rules.push(Rule::new(
            [Match::New, Match::Protocol(Protocol::Tcp), Match::TcpLater],
            Action::Drop,
            "the middle of an unknown connection",
        ));
    }
    let reopening = |matches: Match| {
        Rule::new(
            [Match::Untranslated, Match::Protocol(Protocol::Tcp), Match::TcpFirst, matches],
            Action::Drop,
            "new connections in the place of old ones",
        )
    };
    if options.inbound_capture {
        let not_kubelet = |family: Addresses| reopening(Match::Source(Compare::IsNot, family.probe));
        rules.extend(families().map(not_kubelet));
    } else {
        let from = |name: &String| reopening(Match::InputInterface(Compare::Is, name.clone()));
        rules.extend(options.virtual_interfaces.iter().map(from));
    }
    rules
}

fn mangle_output(options: &Options, capture: Capture) -> Vec<Rule> {
    let mut rules = vec![Rule::new(
        // Packets of the proxy itself are routed to the application without; a change of mark makes the kernel look up
        // the route of each packet again.
        [from_proxy(), marked(Compare::IsNot)],
        Action::SetMark { value: PROXY_CONNMARK, mask: MARK_MASK },
        "answers to the proxy",
    )];
    if denies_others(options, capture) {
        rules.push(Rule::new(
            [Match::Protocol(Protocol::Udp), marked(Compare::Is)],
            Action::SetConnMark { value: PROXY_CONNMARK, mask: MARK_MASK },
            "questions of the proxy",
        ));
    }
    if capture != Capture::Nothing {
        rules.push(Rule::new(
            [
                Match::OutputInterface(Compare::IsNot, "lo".into()),
                Match::Protocol(Protocol::Tcp),
                marked(Compare::IsNot),
            ],
            Action::Jump(FROM_APPLICATION.into()),
            "TCP of applications",
        ));
    }
    rules
}

/// The same as [`from_outside`] for packets that leave the pod. Those that fit no connection include resets of the kernel
/// for tunnels that are gone: tunnels are not tracked.
fn from_application(capture: Capture) -> Vec<Rule> {
    let mut rules = Vec::new();
    if capture == Capture::Unknown {
        let reset = |port| {
            let flags = Match::TcpFlags { mask: TCP_RST, value: TCP_RST };
            let matches = [Match::Invalid, Match::Protocol(Protocol::Tcp), flags, port];
            Rule::new(matches, Action::Return, "resets of tunnels")
        };
        rules.push(reset(Match::SourcePort(Compare::Is, ports::INBOUND_HBONE)));
        rules.push(reset(to_port(ports::INBOUND_HBONE)));
        rules.push(Rule::new([Match::Invalid], Action::Drop, "what fits no connection"));
    }
    // The reset ends the entry too, so that the next attempt is captured.
    rules.extend(families().map(|family| {
        Rule::new(
            [
                Match::Untranslated,
                Match::Protocol(Protocol::Tcp),
                Match::TcpFirst,
                Match::Destination(Compare::IsNot, family.probe),
            ],
            Action::Reject,
            "new connections in the place of old ones",
        )
    }));
    rules
}

/// Here, unlike in output chains, the interface is known that a packet goes out by after all changes of its route.
fn filter_postrouting(options: &Options, capture: Capture) -> Vec<Rule> {
    let out = Match::OutputInterface(Compare::IsNot, "lo".into());
    let mut rules = vec![Rule::new(
        // A routing rule of somebody else may come before ours.
        [out.clone(), Match::Mark { compare: Compare::Is, value: PROXY_CONNMARK, mask: MARK_MASK }],
        Action::Drop,
        "answers to the proxy that are routed elsewhere",
    )];
    if denies_others(options, capture) {
        rules.push(Rule::new(
            other_protocols([out, marked(Compare::IsNot)]),
            Action::Drop,
            "other protocols",
        ));
    }
    rules
}

fn inbound(options: &Options, capture: Capture) -> Vec<Rule> {
    let mut rules: Vec<Rule> = families()
        .map(|family| Rule::new([Match::Source(Compare::Is, family.probe)], Action::Accept, "kubelet probes"))
        .collect();
    let tcp = |from: Match, rest: &[Match]| -> Vec<Match> {
        [from, Match::Protocol(Protocol::Tcp)]
            .into_iter()
            .chain(capture.packets())
            .chain(rest.iter().cloned())
            .collect()
    };
    for name in &options.virtual_interfaces {
        let from = Match::InputInterface(Compare::Is, name.clone());
        rules.push(Rule::new(
            tcp(from.clone(), &[]),
            Action::Redirect(ports::OUTBOUND),
            "outbound of a virtual interface",
        ));
        rules.push(Rule::new([from], Action::Accept, "the rest of a virtual interface"));
    }
    if options.inbound_capture {
        let not_hbone = Match::DestinationPort(Compare::IsNot, ports::INBOUND_HBONE);
        rules.push(Rule::new(
            tcp(Match::InputInterface(Compare::IsNot, "lo".into()), &[not_hbone]),
            Action::Redirect(ports::INBOUND_PLAINTEXT),
            "inbound",
        ));
    }
    rules
}

fn outbound(options: &Options, capture: Capture) -> Vec<Rule> {
    let tcp = |first: Match, rest: &[Match]| -> Vec<Match> {
        [first, Match::Protocol(Protocol::Tcp)]
            .into_iter()
            .chain(capture.packets())
            .chain(rest.iter().cloned())
            .chain([marked(Compare::IsNot)])
            .collect()
    };
    let mut rules: Vec<Rule> = families()
        .map(|family| {
            Rule::new([Match::Destination(Compare::Is, family.probe)], Action::Accept, "kubelet probes")
        })
        .collect();
    if options.dns_capture {
        let to_others = [to_port(53), Match::OutputInterface(Compare::IsNot, "lo".into())];
        for family in families() {
            let mut udp = vec![family.not_loopback(), Match::Protocol(Protocol::Udp)];
            udp.extend(to_others.iter().cloned().chain([marked(Compare::IsNot)]));
            rules.push(Rule::new(udp, Action::Redirect(ports::DNS), "DNS"));
            rules.push(Rule::new(
                tcp(family.not_loopback(), &to_others),
                Action::Redirect(ports::DNS),
                "DNS",
            ));
        }
    }
    rules.push(Rule::new([from_proxy()], Action::Accept, "answers to the proxy"));
    for family in families() {
        rules.push(Rule::new(
            [family.not_loopback(), Match::OutputInterface(Compare::Is, "lo".into())],
            Action::Accept,
            "to another own address",
        ));
    }
    rules.extend(families().map(|family| {
        Rule::new(tcp(family.not_loopback(), &[]), Action::Redirect(ports::OUTBOUND), "outbound")
    }));
    rules
}

fn denies_others(options: &Options, capture: Capture) -> bool {
    options.other_protocols == OtherProtocols::Deny && capture != Capture::Nothing
}

/// Neither TCP nor ICMP, without which IPv6 finds no neighbours and paths lose their size (RFC 4861, RFC 8201).
fn other_protocols<const N: usize>(further: [Match; N]) -> Vec<Match> {
    [Protocol::Tcp, Protocol::Icmp, Protocol::Icmpv6]
        .map(Match::NotProtocol)
        .into_iter()
        .chain(further)
        .collect()
}

fn with<const N: usize>(matches: &[Match], further: [Match; N]) -> Vec<Match> {
    matches.iter().cloned().chain(further).collect()
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
