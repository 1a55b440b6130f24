//! Rules into the kernel's expressions (linux/netfilter/nf_tables.h).
//!
//! Every match loads a value into register 1 and compares it; every action loads what it needs into
//! registers 1 and 2. Nothing lives in a register from one match to the next.

use std::net::IpAddr;

use ambit_net::netlink::Attribute;
use ipnet::IpNet;

use super::rule::{Action, Compare, Match, Protocol, Rule};

const REG_VERDICT: u32 = 0;
const REG_1: u32 = 1;
const REG_2: u32 = 2;

const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
const LIST_ELEM: u16 = 1;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;

const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_SKUID: u32 = 10;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const CT_STATE: u32 = 0;
/// `NF_CT_STATE_INVALID_BIT` of linux/netfilter/nf_conntrack_common.h.
const CT_STATE_INVALID: u32 = 1;
/// `NF_CT_STATE_BIT(IP_CT_NEW)` of the same.
const CT_STATE_NEW: u32 = 8;
/// `NF_CT_STATE_UNTRACKED_BIT` of the same.
const CT_STATE_UNTRACKED: u32 = 64;
const CT_STATUS: u32 = 2;
/// `IPS_CONFIRMED` of the same.
const CT_STATUS_CONFIRMED: u32 = 0x08;
/// `IPS_DST_NAT` of the same.
const CT_STATUS_DNAT: u32 = 0x20;
const CT_MARK: u32 = 3;
const CT_ZONE: u32 = 17;
/// `IP_CT_DIR_ORIGINAL` of linux/netfilter/nf_conntrack_tuple_common.h.
const DIRECTION_ORIGINAL: u8 = 0;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
const SOCKET_MARK: u32 = 1;
const FIB_RESULT_ADDRTYPE: u32 = 3;
const FIB_DADDR: u32 = 2;
/// `RTN_LOCAL` of linux/rtnetlink.h.
const ADDRTYPE_LOCAL: u32 = 2;
const NUMGEN_RANDOM: u32 = 1;
const NAT_SNAT: u32 = 0;
const NAT_DNAT: u32 = 1;
const REJECT_TCP_RST: u32 = 1;
const REJECT_ICMPX: u32 = 2;
const ICMPX_PORT_UNREACH: u8 = 1;

const VERDICT_DROP: i32 = 0;
const VERDICT_ACCEPT: i32 = 1;
const VERDICT_JUMP: i32 = -3;
const VERDICT_RETURN: i32 = -5;

const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;
/// The flags that distinguish the first packet of a connection from the others.
const TCP_KIND: u8 = TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK;
/// Length of an interface's name with padding (`IFNAMSIZ`).
const NAME_SIZE: usize = 16;

/// The rule's expressions, as the elements of `NFTA_RULE_EXPRESSIONS`.
pub(super) fn render(rule: &Rule) -> Vec<Attribute> {
    let mut out = Vec::new();
    let mut family = None;
    for part in &rule.matches {
        // An address is compared only in packets of its family.
        if let Match::Source(_, net) | Match::Destination(_, net) = part {
            let wanted = nfproto(net.addr());
            if family != Some(wanted) {
                family = Some(wanted);
                family_is(&mut out, wanted);
            }
        }
        render_match(&mut out, part);
    }
    let tcp = rule.matches.contains(&Match::Protocol(Protocol::Tcp));
    for action in &rule.actions {
        render_action(&mut out, action, tcp);
    }
    out
}

fn render_match(out: &mut Vec<Attribute>, part: &Match) {
    match part {
        Match::Ipv4 => family_is(out, libc::NFPROTO_IPV4 as u8),
        Match::Ipv6 => family_is(out, libc::NFPROTO_IPV6 as u8),
        Match::Protocol(protocol) => transport(out, Compare::Is, *protocol),
        Match::NotProtocol(protocol) => transport(out, Compare::IsNot, *protocol),
        Match::Source(how, net) => address(out, *how, net, 12, 8),
        Match::Destination(how, net) => address(out, *how, net, 16, 24),
        Match::SourcePort(how, port) => {
            out.push(payload(BASE_TRANSPORT, 0, 2));
            out.push(compare(*how, &port.to_be_bytes()));
        }
        Match::DestinationPort(how, port) => {
            out.push(payload(BASE_TRANSPORT, 2, 2));
            out.push(compare(*how, &port.to_be_bytes()));
        }
        Match::TcpFlags { mask, value } => tcp_flags(out, Compare::Is, *mask, *value),
        Match::TcpFirst => tcp_flags(out, Compare::Is, TCP_KIND, TCP_SYN),
        Match::TcpLater => tcp_flags(out, Compare::IsNot, TCP_KIND, TCP_SYN),
        Match::Mark { compare: how, value, mask } => {
            out.push(load_meta(META_MARK));
            out.push(bitwise(&mask.to_ne_bytes(), &[0; 4]));
            out.push(compare(*how, &value.to_ne_bytes()));
        }
        Match::ConnMark { compare: how, value, mask } => {
            out.push(load_ct(CT_MARK));
            out.push(bitwise(&mask.to_ne_bytes(), &[0; 4]));
            out.push(compare(*how, &value.to_ne_bytes()));
        }
        Match::Invalid => any_bit(out, load_ct(CT_STATE), CT_STATE_INVALID),
        Match::Untracked => any_bit(out, load_ct(CT_STATE), CT_STATE_UNTRACKED),
        Match::New => any_bit(out, load_ct(CT_STATE), CT_STATE_NEW),
        Match::Untranslated => {
            out.push(load_ct(CT_STATUS));
            out.push(bitwise(&(CT_STATUS_CONFIRMED | CT_STATUS_DNAT).to_ne_bytes(), &[0; 4]));
            out.push(compare(Compare::Is, &CT_STATUS_CONFIRMED.to_ne_bytes()));
        }
        Match::SocketMark { value, mask } => {
            out.push(expression(
                "socket",
                vec![Attribute::number(1, SOCKET_MARK), Attribute::number(2, REG_1)],
            ));
            out.push(bitwise(&mask.to_ne_bytes(), &[0; 4]));
            out.push(compare(Compare::Is, &value.to_ne_bytes()));
        }
        Match::InputInterface(how, name) => interface(out, META_IIFNAME, *how, name),
        Match::OutputInterface(how, name) => interface(out, META_OIFNAME, *how, name),
        Match::DestinationLocal(how) => {
            out.push(expression(
                "fib",
                vec![
                    Attribute::number(1, REG_1),
                    Attribute::number(2, FIB_RESULT_ADDRTYPE),
                    Attribute::number(3, FIB_DADDR),
                ],
            ));
            out.push(compare(*how, &ADDRTYPE_LOCAL.to_ne_bytes()));
        }
        Match::LocalUser(user) => {
            out.push(load_meta(META_SKUID));
            out.push(compare(Compare::Is, &user.to_ne_bytes()));
        }
        Match::Random { modulus, value } => {
            out.push(expression(
                "numgen",
                vec![
                    Attribute::number(1, REG_1),
                    Attribute::number(2, (*modulus).max(1)),
                    Attribute::number(3, NUMGEN_RANDOM),
                ],
            ));
            out.push(compare(Compare::Is, &value.to_ne_bytes()));
        }
    }
}

fn render_action(out: &mut Vec<Attribute>, action: &Action, tcp: bool) {
    match action {
        Action::Count => out.push(expression("counter", Vec::new())),
        Action::Accept => out.push(verdict(VERDICT_ACCEPT, None)),
        Action::Drop => out.push(verdict(VERDICT_DROP, None)),
        Action::Return => out.push(verdict(VERDICT_RETURN, None)),
        Action::Jump(chain) => out.push(verdict(VERDICT_JUMP, Some(chain))),
        Action::Reject if tcp => {
            out.push(expression("reject", vec![Attribute::number(1, REJECT_TCP_RST)]));
        }
        Action::Reject => out.push(expression(
            "reject",
            vec![Attribute::number(1, REJECT_ICMPX), Attribute::bytes(2, [ICMPX_PORT_UNREACH])],
        )),
        Action::SetMark { value, mask } => {
            out.push(load_meta(META_MARK));
            out.push(bitwise(&(!mask).to_ne_bytes(), &(value & mask).to_ne_bytes()));
            out.push(expression("meta", vec![Attribute::number(2, META_MARK), Attribute::number(3, REG_1)]));
        }
        Action::SetConnMark { value, mask } => {
            out.push(load_ct(CT_MARK));
            out.push(bitwise(&(!mask).to_ne_bytes(), &(value & mask).to_ne_bytes()));
            out.push(expression("ct", vec![Attribute::number(2, CT_MARK), Attribute::number(4, REG_1)]));
        }
        Action::Zone(zone) => {
            out.push(immediate(REG_1, &zone.to_ne_bytes()));
            out.push(expression("ct", vec![Attribute::number(2, CT_ZONE), Attribute::number(4, REG_1)]));
        }
        Action::ZoneOfOriginal(zone) => {
            out.push(immediate(REG_1, &zone.to_ne_bytes()));
            out.push(expression(
                "ct",
                vec![
                    Attribute::number(2, CT_ZONE),
                    Attribute::bytes(3, [DIRECTION_ORIGINAL]),
                    Attribute::number(4, REG_1),
                ],
            ));
        }
        // The only one that the kernel shows without data.
        Action::Untracked => {
            out.push(Attribute::tree(LIST_ELEM, vec![Attribute::string(EXPR_NAME, "notrack")]));
        }
        Action::Redirect(port) => {
            out.push(immediate(REG_1, &port.to_be_bytes()));
            out.push(expression("redir", vec![Attribute::number(1, REG_1)]));
        }
        Action::Dnat(address, port) => nat(out, NAT_DNAT, *address, *port),
        Action::Snat(address) => nat(out, NAT_SNAT, *address, None),
        Action::Masquerade => out.push(expression("masq", Vec::new())),
    }
}

fn nat(out: &mut Vec<Attribute>, kind: u32, address: IpAddr, port: Option<u16>) {
    out.push(immediate(REG_1, &octets(address)));
    let mut nat = vec![
        Attribute::number(1, kind),
        Attribute::number(2, u32::from(nfproto(address))),
        Attribute::number(3, REG_1),
    ];
    if let Some(port) = port {
        out.push(immediate(REG_2, &port.to_be_bytes()));
        nat.push(Attribute::number(5, REG_2));
    }
    out.push(expression("nat", nat));
}

fn nfproto(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => libc::NFPROTO_IPV4 as u8,
        IpAddr::V6(_) => libc::NFPROTO_IPV6 as u8,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn family_is(out: &mut Vec<Attribute>, family: u8) {
    out.push(load_meta(META_NFPROTO));
    out.push(compare(Compare::Is, &[family]));
}

/// RFC 791 §3.1 and RFC 8200 §3: where the addresses are in each header.
fn address(out: &mut Vec<Attribute>, how: Compare, net: &IpNet, v4_offset: u32, v6_offset: u32) {
    let (offset, len) = if net.addr().is_ipv4() { (v4_offset, 4) } else { (v6_offset, 16) };
    out.push(payload(BASE_NETWORK, offset, len));
    if net.prefix_len() != net.max_prefix_len() {
        out.push(bitwise(&octets(net.netmask()), &vec![0; len as usize]));
    }
    out.push(compare(how, &octets(net.network())));
}

/// RFC 9293 §3.1: the flags are the fourteenth byte of the TCP header.
fn tcp_flags(out: &mut Vec<Attribute>, how: Compare, mask: u8, value: u8) {
    out.push(payload(BASE_TRANSPORT, 13, 1));
    out.push(bitwise(&[mask], &[0]));
    out.push(compare(how, &[value]));
}

fn transport(out: &mut Vec<Attribute>, how: Compare, protocol: Protocol) {
    let number = match protocol {
        Protocol::Tcp => libc::IPPROTO_TCP,
        Protocol::Udp => libc::IPPROTO_UDP,
        Protocol::Icmp => libc::IPPROTO_ICMP,
        Protocol::Icmpv6 => libc::IPPROTO_ICMPV6,
    };
    out.push(load_meta(META_L4PROTO));
    out.push(compare(how, &[number as u8]));
}

/// Whether what `load` puts into register 1 has any of `bits`.
fn any_bit(out: &mut Vec<Attribute>, load: Attribute, bits: u32) {
    out.push(load);
    out.push(bitwise(&bits.to_ne_bytes(), &[0; 4]));
    out.push(compare(Compare::IsNot, &[0; 4]));
}

fn interface(out: &mut Vec<Attribute>, key: u32, how: Compare, name: &str) {
    let mut padded = name.as_bytes().to_vec();
    padded.resize(NAME_SIZE, 0);
    out.push(load_meta(key));
    out.push(compare(how, &padded));
}

fn expression(name: &str, data: Vec<Attribute>) -> Attribute {
    Attribute::tree(LIST_ELEM, vec![Attribute::string(EXPR_NAME, name), Attribute::tree(EXPR_DATA, data)])
}

fn load_meta(key: u32) -> Attribute {
    expression("meta", vec![Attribute::number(2, key), Attribute::number(1, REG_1)])
}

fn load_ct(key: u32) -> Attribute {
    expression("ct", vec![Attribute::number(2, key), Attribute::number(1, REG_1)])
}

fn payload(base: u32, offset: u32, len: u32) -> Attribute {
    expression(
        "payload",
        vec![
            Attribute::number(1, REG_1),
            Attribute::number(2, base),
            Attribute::number(3, offset),
            Attribute::number(4, len),
        ],
    )
}

fn compare(how: Compare, value: &[u8]) -> Attribute {
    let op = match how {
        Compare::Is => 0,
        Compare::IsNot => 1,
    };
    expression("cmp", vec![Attribute::number(1, REG_1), Attribute::number(2, op), data(3, value)])
}

/// Register 1 becomes itself under `mask`, then exclusively or-ed with `xor`.
fn bitwise(mask: &[u8], xor: &[u8]) -> Attribute {
    expression(
        "bitwise",
        vec![
            Attribute::number(1, REG_1),
            Attribute::number(2, REG_1),
            Attribute::number(3, mask.len() as u32),
            data(4, mask),
            data(5, xor),
        ],
    )
}

fn immediate(register: u32, value: &[u8]) -> Attribute {
    expression("immediate", vec![Attribute::number(1, register), data(2, value)])
}

fn verdict(code: i32, chain: Option<&str>) -> Attribute {
    let mut inner = vec![Attribute::bytes(1, code.to_be_bytes())];
    if let Some(chain) = chain {
        inner.push(Attribute::string(2, chain));
    }
    expression(
        "immediate",
        vec![
            Attribute::number(1, REG_VERDICT),
            Attribute::tree(2, vec![Attribute::tree(DATA_VERDICT, inner)]),
        ],
    )
}

fn data(kind: u16, value: &[u8]) -> Attribute {
    Attribute::tree(kind, vec![Attribute::bytes(DATA_VALUE, value)])
}
