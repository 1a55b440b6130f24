//! Tables, chains and rules as data, and their text form.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

/// A table of the family `inet`: it sees IPv4 and IPv6.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its name, unique among the `inet` tables of the namespace.
    pub name: String,
    /// Its chains. A chain that is jumped to comes before the one that jumps.
    pub chains: Vec<Chain>,
}

/// A chain of rules, evaluated in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name, unique in the table.
    pub name: String,
    /// Where packets enter it; `None` for a chain that is only jumped to.
    pub hook: Option<Hook>,
    /// Its rules.
    pub rules: Vec<Rule>,
}

/// Where and how a base chain is attached. Its policy is accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// What the chain may do.
    pub kind: ChainKind,
    /// The point on a packet's path.
    pub point: HookPoint,
    /// The order among chains at one point, lower first: raw −300, mangle −150, dstnat −100, filter 0,
    /// srcnat 100.
    pub priority: i32,
}

/// What a base chain may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    /// Judge and mark packets.
    Filter,
    /// Translate addresses; sees only the first packet of a tracked connection.
    Nat,
    /// As `Filter`, and packets whose mark changed are routed again; at [`HookPoint::Output`] only.
    Route,
}

/// A point on a packet's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookPoint {
    /// Every packet that comes in, before routing.
    Prerouting,
    /// Packets for local sockets.
    Input,
    /// Packets that are forwarded.
    Forward,
    /// Packets of local sockets.
    Output,
    /// Every packet that goes out, after routing.
    Postrouting,
}

/// One rule: if every match holds, the actions are taken in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// All have to hold; none means every packet.
    pub matches: Vec<Match>,
    /// The actions; one that ends the evaluation (accept, drop, a translation) comes last.
    pub actions: Vec<Action>,
    /// Shown by tools beside the rule; at most 127 bytes, longer ones are cut.
    pub comment: String,
}

impl Rule {
    /// A rule with one action.
    pub fn new(matches: impl Into<Vec<Match>>, action: Action, comment: impl Into<String>) -> Self {
        Self { matches: matches.into(), actions: vec![action], comment: comment.into() }
    }
}

/// Whether a match holds for equal or for different values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// Holds when equal.
    Is,
    /// Holds when not equal.
    IsNot,
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP of IPv4.
    Icmp,
    /// ICMP of IPv6.
    Icmpv6,
}

/// A condition on a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// The packet is IPv4.
    Ipv4,
    /// The packet is IPv6.
    Ipv6,
    /// The transport protocol.
    Protocol(Protocol),
    /// The transport protocol is another one.
    NotProtocol(Protocol),
    /// The source address is in the network. Implies its family.
    Source(Compare, IpNet),
    /// The destination address is in the network. Implies its family.
    Destination(Compare, IpNet),
    /// The transport source port. Only after a [`Match::Protocol`].
    SourcePort(Compare, u16),
    /// The transport destination port. Only after a [`Match::Protocol`].
    DestinationPort(Compare, u16),
    /// TCP flags: those of the mask are exactly those of the value. Only after `Protocol(Tcp)`.
    TcpFlags {
        /// The flags that are looked at.
        mask: u8,
        /// Those of them that are set.
        value: u8,
    },
    /// A SYN without ACK, FIN or RST: the first packet of a TCP connection. Only after `Protocol(Tcp)`.
    TcpFirst,
    /// Any other TCP packet. Only after `Protocol(Tcp)`.
    TcpLater,
    /// A local socket sent the packet, on behalf of this user. On the way out only.
    LocalUser(u32),
    /// The packet's mark under a mask.
    Mark {
        /// Equal or not.
        compare: Compare,
        /// The value under the mask.
        value: u32,
        /// The bits that are looked at.
        mask: u32,
    },
    /// The connection's mark under a mask.
    ConnMark {
        /// Equal or not.
        compare: Compare,
        /// The value under the mask.
        value: u32,
        /// The bits that are looked at.
        mask: u32,
    },
    /// The packet belongs to no connection and cannot begin one, or lies beyond its connection's window.
    Invalid,
    /// The packet is exempt from tracking.
    Untracked,
    /// The connection has seen no reply yet.
    New,
    /// The connection was known before this packet, and its destination is not translated.
    Untranslated,
    /// The mark, under a mask, of the local socket that has or listens for the packet's connection. Does not match
    /// where there is no such socket. At [`HookPoint::Prerouting`] and [`HookPoint::Input`] only.
    SocketMark {
        /// The value under the mask.
        value: u32,
        /// The bits that are looked at.
        mask: u32,
    },
    /// The name of the interface that the packet came in by.
    InputInterface(Compare, String),
    /// The name of the interface that the packet goes out by.
    OutputInterface(Compare, String),
    /// Whether the destination is an address of this host.
    DestinationLocal(Compare),
    /// A random number below `modulus` is `value`: for one endpoint of many.
    Random {
        /// How many values there are; at least 1.
        modulus: u32,
        /// The one that matches.
        value: u32,
    },
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Counts packets and bytes.
    Count,
    /// Ends this base chain; the packet goes on.
    Accept,
    /// Drops the packet.
    Drop,
    /// Refuses with an answer: a reset for TCP, else "port unreachable". Filter and route chains only; at
    /// [`HookPoint::Prerouting`] from Linux 5.9 on.
    Reject,
    /// Goes on after the jump that led here.
    Return,
    /// Evaluates another chain of the table, then goes on.
    Jump(String),
    /// Sets the bits of the mask in the packet's mark to those of the value.
    SetMark {
        /// The new bits.
        value: u32,
        /// The bits that change.
        mask: u32,
    },
    /// Sets the bits of the mask in the connection's mark to those of the value.
    SetConnMark {
        /// The new bits.
        value: u32,
        /// The bits that change.
        mask: u32,
    },
    /// Tracks the packet's connection in a zone of its own. Before tracking (priority below −200) only.
    Zone(u16),
    /// As `Zone`, in the original direction only; replies are tracked in the default zone. So two connections may
    /// have equal addresses and ports as long as their replies differ.
    ZoneOfOriginal(u16),
    /// Tracks nothing of this packet, which then is not translated and has no connection mark either. Before
    /// tracking (priority below −200) only.
    Untracked,
    /// Translates the destination to this host and the port. Nat chains only.
    Redirect(u16),
    /// Translates the destination. Nat chains only, after matches that imply the address's family.
    Dnat(IpAddr, Option<u16>),
    /// Translates the source to the outgoing interface's address. Nat postrouting only.
    Masquerade,
    /// Replaces the source address; in translating chains at [`HookPoint::Postrouting`].
    Snat(IpAddr),
}

impl fmt::Display for Compare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Is => "",
            Self::IsNot => "!= ",
        })
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
            Self::Icmpv6 => "ipv6-icmp",
        })
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = |net: &IpNet| if net.addr().is_ipv4() { "ip" } else { "ip6" };
        match self {
            Self::Ipv4 => f.write_str("meta nfproto ipv4"),
            Self::Ipv6 => f.write_str("meta nfproto ipv6"),
            Self::Protocol(protocol) => write!(f, "meta l4proto {protocol}"),
            Self::NotProtocol(protocol) => write!(f, "meta l4proto != {protocol}"),
            Self::Source(compare, net) => write!(f, "{} saddr {compare}{net}", family(net)),
            Self::Destination(compare, net) => write!(f, "{} daddr {compare}{net}", family(net)),
            Self::SourcePort(compare, port) => write!(f, "th sport {compare}{port}"),
            Self::DestinationPort(compare, port) => write!(f, "th dport {compare}{port}"),
            Self::TcpFlags { mask, value } => write!(f, "tcp flags & {mask:#04x} == {value:#04x}"),
            Self::TcpFirst => f.write_str("tcp flags & (fin|syn|rst|ack) == syn"),
            Self::TcpLater => f.write_str("tcp flags & (fin|syn|rst|ack) != syn"),
            Self::Mark { compare, value, mask } => write!(f, "meta mark & {mask:#x} {compare}{value:#x}"),
            Self::ConnMark { compare, value, mask } => write!(f, "ct mark & {mask:#x} {compare}{value:#x}"),
            Self::Invalid => f.write_str("ct state invalid"),
            Self::Untracked => f.write_str("ct state untracked"),
            Self::New => f.write_str("ct state new"),
            Self::Untranslated => f.write_str("ct status & (confirmed|dnat) == confirmed"),
            Self::SocketMark { value, mask } => write!(f, "socket mark & {mask:#x} {value:#x}"),
            Self::InputInterface(compare, name) => write!(f, "iifname {compare}\"{name}\""),
            Self::OutputInterface(compare, name) => write!(f, "oifname {compare}\"{name}\""),
            Self::DestinationLocal(compare) => write!(f, "fib daddr type {compare}local"),
            Self::Random { modulus, value } => write!(f, "numgen random mod {modulus} == {value}"),
            Self::LocalUser(user) => write!(f, "meta skuid {user}"),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count => f.write_str("counter"),
            Self::Accept => f.write_str("accept"),
            Self::Drop => f.write_str("drop"),
            Self::Reject => f.write_str("reject"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::SetMark { value, mask } => write!(f, "meta mark set {value:#x}/{mask:#x}"),
            Self::SetConnMark { value, mask } => write!(f, "ct mark set {value:#x}/{mask:#x}"),
            Self::Zone(zone) => write!(f, "ct zone set {zone}"),
            Self::ZoneOfOriginal(zone) => write!(f, "ct original zone set {zone}"),
            Self::Untracked => f.write_str("notrack"),
            Self::Redirect(port) => write!(f, "redirect to :{port}"),
            Self::Dnat(IpAddr::V6(address), Some(port)) => write!(f, "dnat to [{address}]:{port}"),
            Self::Dnat(address, Some(port)) => write!(f, "dnat to {address}:{port}"),
            Self::Dnat(address, None) => write!(f, "dnat to {address}"),
            Self::Masquerade => f.write_str("masquerade"),
            Self::Snat(address) => write!(f, "snat to {address}"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in &self.matches {
            write!(f, "{part} ")?;
        }
        for (i, action) in self.actions.iter().enumerate() {
            if i > 0 {
                f.write_str(" ")?;
            }
            write!(f, "{action}")?;
        }
        if self.comment.is_empty() { Ok(()) } else { write!(f, " # {}", self.comment) }
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, point, priority } = self;
        write!(f, "type {} hook {} priority {priority}", kind.name(), point.name())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.name)?;
        for chain in &self.chains {
            writeln!(f, "  chain {} {{", chain.name)?;
            if let Some(hook) = &chain.hook {
                writeln!(f, "    {hook}")?;
            }
            for rule in &chain.rules {
                writeln!(f, "    {rule}")?;
            }
            writeln!(f, "  }}")?;
        }
        write!(f, "}}")
    }
}

impl ChainKind {
    /// The kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        }
    }
}

impl HookPoint {
    /// The name that tools use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prerouting => "prerouting",
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
            Self::Postrouting => "postrouting",
        }
    }

    /// The kernel's number (`enum nf_inet_hooks`).
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Prerouting => 0,
            Self::Input => 1,
            Self::Forward => 2,
            Self::Output => 3,
            Self::Postrouting => 4,
        }
    }
}
